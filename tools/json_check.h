/* SPDX-License-Identifier: Apache-2.0 */
/* Whether a text is one JSON value by RFC 8259, nothing more; depth at most 64. No tree is made. */
#ifndef NEP_TOOLS_JSON_CHECK_H
#define NEP_TOOLS_JSON_CHECK_H

#include <stdbool.h>
#include <stddef.h>

/* False: *at_p is where it goes wrong, *why_p what was expected there. */
bool json_check(const char *text, size_t len, size_t *at_p, const char **why_p);

#endif
