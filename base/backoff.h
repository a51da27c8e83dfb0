/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a host waits: spin briefly, then yield, then sleep. With more ranks than cores a pure spin
 * costs scheduler slices of milliseconds; with fewer, a sleep costs tens of microseconds. One
 * struct lives for one wait: nep_backoff_init, then nep_backoff_pause after each look that found
 * nothing, nep_backoff_reset after each that found something.
 */
#ifndef NEP_BASE_BACKOFF_H
#define NEP_BASE_BACKOFF_H

#include <stdbool.h>
#include <stdint.h>

struct nep_backoff {
    uint64_t timeout_ns;
    uint64_t deadline_ns; /* the timeout after the last progress */
    uint64_t last_progress_ns;
    uint32_t num_idle;   /* looks without progress */
    uint32_t spin_limit; /* spins before the first yield; 0 when ranks outnumber cores */
    uint64_t next_slow_ns;
    bool slow; /* set by pause every ~10 ms without progress: look for dead peers */
};

void nep_backoff_init(struct nep_backoff *backoff, uint64_t timeout_ns, uint32_t spin_limit);
/* Pauses; false once nothing has moved for the timeout. */
bool nep_backoff_pause(struct nep_backoff *backoff);
void nep_backoff_reset(struct nep_backoff *backoff);
/* Nanoseconds since the last progress. */
uint64_t nep_backoff_idle_ns(const struct nep_backoff *backoff);

#endif
