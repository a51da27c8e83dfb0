/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A clock that costs a few instructions, for what is stamped on the path of a token. It counts in
 * ticks of unknown length: a pair of (ticks, nanoseconds) before and one after give the length.
 * Alike on all cores of a machine: x86 processors with AVX2 and arm64 count at a constant rate.
 * Rejected: clock_gettime, three to five times the instructions.
 */
#ifndef NEP_BASE_TICKS_H
#define NEP_BASE_TICKS_H

#include <stdint.h>

#include "base/clock.h"

static inline uint64_t nep_ticks(void)
{
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    uint64_t ticks;
    __asm__ __volatile__("mrs %0, cntvct_el0" : "=r"(ticks));
    return ticks;
#else
    return nep_now_ns();
#endif
}

/* The two clocks at one moment. */
struct nep_tick_pair {
    uint64_t ticks;
    uint64_t ns;
    uint64_t error_ns; /* they were read so far apart, at most */
};

static inline struct nep_tick_pair nep_tick_pair_now(void)
{
    struct nep_tick_pair best = {.error_ns = UINT64_MAX};
    for (int i = 0; i < 8; i++) { /* the core may be taken away in between */
        uint64_t before = nep_now_ns(), ticks = nep_ticks(), after = nep_now_ns();
        if (after - before < best.error_ns) {
            best.ticks = ticks;
            best.ns = before + (after - before) / 2;
            best.error_ns = after - before;
        }
    }
    return best;
}

/* Nanoseconds of CLOCK_MONOTONIC at `ticks`, on the line through two pairs. */
static inline uint64_t nep_ticks_to_ns(uint64_t ticks, const struct nep_tick_pair *a,
                                       const struct nep_tick_pair *b)
{
    double length =
        b->ticks > a->ticks ? (double)(b->ns - a->ns) / (double)(b->ticks - a->ticks) : 1.0;
    return b->ns + (uint64_t)(int64_t)((double)(int64_t)(ticks - b->ticks) * length);
}

#endif
