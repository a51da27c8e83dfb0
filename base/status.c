/* SPDX-License-Identifier: Apache-2.0 */
/* One message per thread, in thread-local storage: no allocation on a failure path. */
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"

static _Thread_local char message[NEP_MESSAGE_BYTES];

const char *nep_last_message(void)
{
    return message;
}

enum nep_status nep_fail(enum nep_status status, const char *fmt, ...)
{
    char text[sizeof message];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    memcpy(message, text, sizeof text);
    nep_info("%s: %s", nep_status_name(status), message);
    return status;
}

enum nep_status nep_fail_prefix(enum nep_status status, const char *fmt, ...)
{
    char text[sizeof message];
    va_list args;
    va_start(args, fmt);
    int used = vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    if (used < 0 || (size_t)used >= sizeof text) {
        return status;
    }
    snprintf(text + used, sizeof text - (size_t)used, "%s", message);
    memcpy(message, text, sizeof text);
    return status;
}

void nep_message_save(char saved[NEP_MESSAGE_BYTES])
{
    memcpy(saved, message, sizeof message);
}

void nep_message_restore(const char saved[NEP_MESSAGE_BYTES])
{
    memcpy(message, saved, sizeof message);
}

enum nep_status nep_struct_copy(void *dst, size_t known, const void *src, size_t least,
                                const char *what)
{
    if (src == NULL) {
        return nep_fail(NEP_ERR_INVALID, "%s is NULL", what);
    }
    size_t given;
    memcpy(&given, src, sizeof given);
    if (given < least) {
        return nep_fail(NEP_ERR_INVALID,
                        "%s has size %zu, less than %zu: set its size field to sizeof(struct %s)",
                        what, given, least, what);
    }
    for (size_t i = known; i < given; i++) {
        if (((const unsigned char *)src)[i] != 0) {
            return nep_fail(NEP_ERR_UNSUPPORTED,
                            "%s has size %zu and byte %zu is not zero: it asks for something that "
                            "this library (%zu bytes) does not know",
                            what, given, i, known);
        }
    }
    memset(dst, 0, known);
    memcpy(dst, src, given < known ? given : known);
    memcpy(dst, &known, sizeof known);
    return NEP_OK;
}

const char *nep_status_name(enum nep_status status)
{
    switch (status) {
    case NEP_OK:
        return "NEP_OK";
    case NEP_ERR_INVALID:
        return "NEP_ERR_INVALID";
    case NEP_ERR_UNSUPPORTED:
        return "NEP_ERR_UNSUPPORTED";
    case NEP_ERR_BUSY:
        return "NEP_ERR_BUSY";
    case NEP_ERR_NOT_FOUND:
        return "NEP_ERR_NOT_FOUND";
    case NEP_ERR_FORMAT:
        return "NEP_ERR_FORMAT";
    case NEP_ERR_OVERFLOW:
        return "NEP_ERR_OVERFLOW";
    case NEP_ERR_NO_MEMORY:
        return "NEP_ERR_NO_MEMORY";
    case NEP_ERR_IO:
        return "NEP_ERR_IO";
    case NEP_ERR_MISMATCH:
        return "NEP_ERR_MISMATCH";
    case NEP_ERR_TIMEOUT:
        return "NEP_ERR_TIMEOUT";
    case NEP_ERR_PEER_LOST:
        return "NEP_ERR_PEER_LOST";
    case NEP_ERR_BROKEN:
        return "NEP_ERR_BROKEN";
    case NEP_ERR_INTERNAL:
        return "NEP_ERR_INTERNAL";
    }
    return "unknown status";
}
