/* SPDX-License-Identifier: Apache-2.0 */
/* Monotonic time and deadlines, in nanoseconds of CLOCK_MONOTONIC. */
#ifndef NEP_BASE_CLOCK_H
#define NEP_BASE_CLOCK_H

#include <stdint.h>
#include <time.h>

#define NEP_MS 1000000ull
#define NEP_S  1000000000ull

static inline uint64_t nep_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NEP_S + (uint64_t)now.tv_nsec;
}

/* now + timeout, saturating: a huge timeout is "never". */
static inline uint64_t nep_deadline_ns(uint64_t timeout_ns)
{
    uint64_t now = nep_now_ns();
    return timeout_ns > UINT64_MAX - now ? UINT64_MAX : now + timeout_ns;
}

/* Time left, 0 when it has passed. */
static inline uint64_t nep_left_ns(uint64_t deadline_ns)
{
    uint64_t now = nep_now_ns();
    return deadline_ns > now ? deadline_ns - now : 0;
}

#endif
