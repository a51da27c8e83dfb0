/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Spin, yield, sleep. Rejected: a futex per waited word. It wakes no faster than a yield when ranks
 * share cores (style of measurement: a barrier of 8 processes on 2 cores), and a word in a peer's
 * region would need the writer to know who sleeps.
 */
#include "base/backoff.h"

#include <sched.h>
#include <time.h>

#include "base/clock.h"

enum { YIELDS_BEFORE_SLEEP = 2000, SLEEP_NS = 50000, CLOCK_EVERY = 64 };

static inline void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

void nep_backoff_init(struct nep_backoff *backoff, uint64_t timeout_ns, uint32_t spin_limit)
{
    backoff->timeout_ns = timeout_ns;
    backoff->deadline_ns = nep_deadline_ns(timeout_ns);
    backoff->last_progress_ns = nep_now_ns();
    backoff->num_idle = 0;
    backoff->spin_limit = spin_limit;
    backoff->slow = false;
    backoff->next_slow_ns = backoff->last_progress_ns + 10 * NEP_MS;
}

bool nep_backoff_pause(struct nep_backoff *backoff)
{
    uint32_t idle = backoff->num_idle++;
    backoff->slow = false;
    if (idle < backoff->spin_limit) {
        cpu_relax();
        if (idle % CLOCK_EVERY != 0) {
            return true;
        }
    } else if (idle - backoff->spin_limit < YIELDS_BEFORE_SLEEP) {
        sched_yield();
    } else {
        nanosleep(&(struct timespec){.tv_nsec = SLEEP_NS}, NULL);
    }
    uint64_t now = nep_now_ns();
    if (now >= backoff->next_slow_ns) {
        backoff->next_slow_ns = now + 10 * NEP_MS;
        backoff->slow = true;
    }
    return now < backoff->deadline_ns;
}

void nep_backoff_reset(struct nep_backoff *backoff)
{
    if (backoff->num_idle != 0) {
        backoff->num_idle = 0;
        backoff->last_progress_ns = nep_now_ns();
        backoff->deadline_ns = nep_deadline_ns(backoff->timeout_ns);
        backoff->next_slow_ns = backoff->last_progress_ns + 10 * NEP_MS;
    }
}

uint64_t nep_backoff_idle_ns(const struct nep_backoff *backoff)
{
    return nep_now_ns() - backoff->last_progress_ns;
}
