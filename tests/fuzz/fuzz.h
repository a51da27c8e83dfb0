/* SPDX-License-Identifier: Apache-2.0 */
/* What every target shares. A broken promise aborts: libFuzzer and the driver then keep the input.
 */
#ifndef NEP_TESTS_FUZZ_H
#define NEP_TESTS_FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

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

/* A file of these bytes without a name in the file system; its path. Close what is returned. */
static inline int fuzz_file(const uint8_t *data, size_t len, char *path, size_t cap)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    PROMISE(fd >= 0 && write(fd, data, len) == (ssize_t)len);
    snprintf(path, cap, "/proc/self/fd/%d", fd);
    return fd;
}

#endif
