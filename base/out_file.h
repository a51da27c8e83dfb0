/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A file that appears whole or not at all: it is written beside its place and renamed into it. What
 * stood there before stays until then; a full disk or a kill leaves at most a file with a name of
 * its own (PATH.PID.N.tmp).
 */
#ifndef NEP_BASE_OUT_FILE_H
#define NEP_BASE_OUT_FILE_H

#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "nearep.h"

struct nep_out_file {
    FILE *file; /* to write to; NULL: not open */
    char path[PATH_MAX];
    char tmp[PATH_MAX]; /* "": written in place, as devices and pipes are */
    int is_kept_open;   /* standard output is not ours to close */
};

/* NEP_ERR_IO names the file and the cause. */
enum nep_status nep_out_file_open(struct nep_out_file *out, const char *path);
/* Ends it: the file is in its place, or NEP_ERR_IO says why not and what stood there is untouched.
 */
enum nep_status nep_out_file_commit(struct nep_out_file *out);
/* Ends it without a file. Also after a failed open or commit; then it does nothing. */
void nep_out_file_drop(struct nep_out_file *out);

/* For an argument of a tool: "-" is standard output. Here, because the library never prints. */
static inline enum nep_status nep_out_file_open_arg(struct nep_out_file *out, const char *arg)
{
    if (strcmp(arg, "-") != 0) {
        return nep_out_file_open(out, arg);
    }
    *out = (struct nep_out_file){.file = stdout, .path = "standard output", .is_kept_open = 1};
    return NEP_OK;
}

#endif
