/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Status and message. The function that first knows a cause says it with nep_fail; callers only
 * pass the status on. The message belongs to the thread.
 */
#ifndef NEP_BASE_STATUS_H
#define NEP_BASE_STATUS_H

#include "nearep.h"

#if defined(__GNUC__)
#define NEP_PRINTF(fmt_idx, arg_idx) __attribute__((format(printf, fmt_idx, arg_idx)))
#else
#define NEP_PRINTF(fmt_idx, arg_idx)
#endif

/* Records one sentence for this thread and returns status. Logs it at level info. */
enum nep_status nep_fail(enum nep_status status, const char *fmt, ...) NEP_PRINTF(2, 3);

/* Puts text before this thread's message: "ep 3: ...". Keeps the status; returns it. */
enum nep_status nep_fail_prefix(enum nep_status status, const char *fmt, ...) NEP_PRINTF(2, 3);

/* A destroy that runs on a failure's way out may fail in its turn, silently: it saves this thread's
 * message first and restores it last. */
enum { NEP_MESSAGE_BYTES = 1024 };
void nep_message_save(char saved[NEP_MESSAGE_BYTES]);
void nep_message_restore(const char saved[NEP_MESSAGE_BYTES]);

/*
 * Checks `given` = the size field of a caller's structure against what this library knows: copies
 * min(given, known) bytes of src to dst, zeroes the rest, and refuses a larger structure whose tail
 * is not zero, and one smaller than `least`. `what` names the structure in the message.
 */
enum nep_status nep_struct_copy(void *dst, size_t known, const void *src, size_t least,
                                const char *what);

#endif
