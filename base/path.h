/* SPDX-License-Identifier: Apache-2.0 */
/* Names of files that each process of a group writes for itself. */
#ifndef NEP_BASE_PATH_H
#define NEP_BASE_PATH_H

#include <stddef.h>
#include <stdint.h>

/* %p becomes the process id, %h the host, %r the rank (UINT32_MAX: it stays). Cut at cap. */
void nep_path_expand(const char *path, uint32_t rank, char *out, size_t cap);

#endif
