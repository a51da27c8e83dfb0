/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A link is followed, so that its target is replaced and not the link. Rejected: files without a
 * name (O_TMPFILE). They cannot replace one that is there.
 */
#include "base/out_file.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/status.h"

static enum nep_status cannot_write(const char *path, int error)
{
    return nep_fail(NEP_ERR_IO, "%s: cannot write: %s", path, strerror(error));
}

/* Devices, pipes, and the names of what the shell opened: there is nothing to rename onto. */
static int is_in_place(const char *path, int is_there, const struct stat *info)
{
    static const char *const folders[] = {"/dev/fd/", "/dev/std", "/proc/"};
    for (size_t i = 0; i < sizeof folders / sizeof folders[0]; i++) {
        if (strncmp(path, folders[i], strlen(folders[i])) == 0) {
            return 1;
        }
    }
    return is_there && !S_ISREG(info->st_mode);
}

enum nep_status nep_out_file_open(struct nep_out_file *out, const char *path)
{
    static _Atomic unsigned long num_files; /* two threads never share a name */
    struct stat info;
    *out = (struct nep_out_file){.file = NULL};
    int is_there = stat(path, &info) == 0;
    int is_special = is_in_place(path, is_there, &info);
    int len = 0;
    if (is_there && !is_special && realpath(path, out->path) == NULL) {
        return cannot_write(path, errno);
    }
    if (!is_there || is_special) {
        len = snprintf(out->path, sizeof out->path, "%s", path);
    }
    if (!is_special && len >= 0 && (size_t)len < sizeof out->path) {
        unsigned long number = atomic_fetch_add_explicit(&num_files, 1, memory_order_relaxed);
        len = snprintf(out->tmp, sizeof out->tmp, "%s.%ld.%lu.tmp", out->path, (long)getpid(),
                       number);
    }
    if (len < 0 || (size_t)len >= sizeof out->path) {
        out->tmp[0] = '\0';
        return cannot_write(path, ENAMETOOLONG);
    }
    out->file = fopen(is_special ? out->path : out->tmp, "we");
    if (out->file == NULL) {
        int error = errno;
        out->tmp[0] = '\0';
        return cannot_write(path, error);
    }
    return NEP_OK;
}

enum nep_status nep_out_file_commit(struct nep_out_file *out)
{
    errno = 0;
    int ok = fflush(out->file) == 0 && ferror(out->file) == 0;
    int error = errno;
    if (!out->is_kept_open) {
        ok = fclose(out->file) == 0 && ok;
        error = error == 0 ? errno : error;
    }
    out->file = NULL;
    if (ok && out->tmp[0] != '\0' && rename(out->tmp, out->path) != 0) {
        ok = 0;
        error = errno;
    }
    if (!ok) {
        nep_out_file_drop(out);
        /* An error that an earlier write met has left no number behind. */
        return cannot_write(out->path, error == 0 ? EIO : error);
    }
    out->tmp[0] = '\0';
    return NEP_OK;
}

void nep_out_file_drop(struct nep_out_file *out)
{
    if (out->file != NULL && !out->is_kept_open) {
        fclose(out->file);
    }
    out->file = NULL;
    if (out->tmp[0] != '\0') {
        unlink(out->tmp);
        out->tmp[0] = '\0';
    }
}
