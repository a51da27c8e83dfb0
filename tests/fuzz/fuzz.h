/* SPDX-License-Identifier: Apache-2.0 */
/* What every target shares. A broken promise aborts: libFuzzer and the driver then keep the input.
 */
#ifndef NEP_TESTS_FUZZ_H
#define NEP_TESTS_FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PROMISE(condition)                                                                         \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #condition);                \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

/* Splits data at newlines into at most max strings, ended by NULL. Free the first. */
static inline char *fuzz_lines(const uint8_t *data, size_t len, char **lines, size_t max)
{
    char *text = malloc(len + 1);
    size_t num = 0;
    PROMISE(text != NULL);
    memcpy(text, data, len);
    text[len] = '\0';
    for (char *at = text; at != NULL && num < max;) {
        lines[num++] = at;
        at = strchr(at, '\n');
        if (at != NULL) {
            *at++ = '\0';
        }
    }
    lines[num] = NULL;
    return text;
}

#endif
