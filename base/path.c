/* SPDX-License-Identifier: Apache-2.0 */
/* One place for the letters after a percent sign, so that the log and the traces know the same. */
#include "base/path.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

void nep_path_expand(const char *path, uint32_t rank, char *out, size_t cap)
{
    size_t used = 0;
    for (const char *at = path; *at != '\0' && used + 1 < cap; at++) {
        char host[65] = "";
        int len = -1;
        if (at[0] == '%' && at[1] == 'p') {
            len = snprintf(out + used, cap - used, "%ld", (long)getpid());
        } else if (at[0] == '%' && at[1] == 'h') {
            gethostname(host, sizeof host - 1);
            len = snprintf(out + used, cap - used, "%s", host);
        } else if (at[0] == '%' && at[1] == 'r' && rank != UINT32_MAX) {
            len = snprintf(out + used, cap - used, "%u", rank);
        }
        if (len >= 0) {
            used += (size_t)len;
            at++;
        } else {
            out[used++] = *at;
        }
    }
    out[used < cap ? used : cap - 1] = '\0';
}
