/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a host waits: spin briefly, then yield, then sleep. With more ranks than cores a pure spin
 * costs scheduler slices of milliseconds; with fewer, a sleep costs tens of microseconds. One
 * struct lives for one wait: nep_backoff_init, then nep_backoff_pause after each look that found
 * nothing, nep_backoff_reset after each that found something.
 *
 * Time in which this thread did not look is no fault of whom it waits for. More than an eighth of
 * the timeout between two looks is such a gap (it got no core, or was stopped): the deadline moves
 * by it, by half a timeout in all. A gap that takes the rest of that half leaves an eighth of the
 * timeout to look once more, however long it was: a job that was stopped as a whole and goes on
 * finds what came meanwhile.
 */
#ifndef NEP_BASE_BACKOFF_H
#define NEP_BASE_BACKOFF_H

#include <stdbool.h>
#include <stdint.h>

struct nep_backoff {
    uint64_t timeout_ns;
    uint64_t deadline_ns; /* the timeout after the first look that found nothing, and gaps */
    uint64_t idle_since_ns;
    uint64_t watched_since_ns; /* the same, or the end of the last gap */
    uint64_t seen_ns;          /* when the clock was read last; 0: no look without progress yet */
    uint64_t forgiven_ns;      /* by which gaps have moved the deadline */
    uint32_t num_idle;         /* looks without progress */
    uint32_t spin_limit;       /* spins before the first yield; 0 when ranks outnumber cores */
    uint64_t next_slow_ns;
    bool slow; /* set by pause every ~10 ms without progress: look for dead peers */
};

void nep_backoff_init(struct nep_backoff *backoff, uint64_t timeout_ns, uint32_t spin_limit);
/* Pauses; false once nothing has moved for the timeout. */
bool nep_backoff_pause(struct nep_backoff *backoff);
void nep_backoff_reset(struct nep_backoff *backoff);
/* What pause does where it reads the clock; for tests, which have times of their own. */
bool nep_backoff_look(struct nep_backoff *backoff, uint64_t now_ns);
/* Nanoseconds since the first look that found nothing; 0 before it. */
uint64_t nep_backoff_idle_ns(const struct nep_backoff *backoff);
/* For how long of these, up to the last look at the clock, there was no gap. */
uint64_t nep_backoff_watched_ns(const struct nep_backoff *backoff);

#endif
