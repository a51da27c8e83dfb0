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
    *backoff = (struct nep_backoff){.timeout_ns = timeout_ns, .spin_limit = spin_limit};
}

static uint64_t later(uint64_t ns, uint64_t by_ns)
{
    return by_ns > UINT64_MAX - ns ? UINT64_MAX : ns + by_ns;
}

static void start(struct nep_backoff *backoff, uint64_t now_ns)
{
    backoff->idle_since_ns = backoff->watched_since_ns = now_ns;
    backoff->deadline_ns = later(now_ns, backoff->timeout_ns);
    backoff->next_slow_ns = now_ns + 10 * NEP_MS;
    backoff->forgiven_ns = 0;
}

static void forgive(struct nep_backoff *backoff, uint64_t gap_ns, uint64_t now_ns)
{
    uint64_t left_ns = backoff->timeout_ns / 2 - backoff->forgiven_ns;
    uint64_t by_ns = gap_ns < left_ns ? gap_ns : left_ns;
    uint64_t again_ns = later(now_ns, backoff->timeout_ns / 8);
    backoff->watched_since_ns = now_ns;
    if (left_ns == 0) {
        return;
    }
    backoff->forgiven_ns += by_ns;
    backoff->deadline_ns = later(backoff->deadline_ns, by_ns);
    backoff->deadline_ns = backoff->deadline_ns < again_ns ? again_ns : backoff->deadline_ns;
}

bool nep_backoff_look(struct nep_backoff *backoff, uint64_t now_ns)
{
    if (backoff->seen_ns == 0) {
        start(backoff, now_ns);
    } else if (now_ns - backoff->seen_ns > backoff->timeout_ns / 8) {
        forgive(backoff, now_ns - backoff->seen_ns, now_ns);
    }
    backoff->seen_ns = now_ns;
    if (now_ns >= backoff->next_slow_ns) {
        backoff->next_slow_ns = now_ns + 10 * NEP_MS;
        backoff->slow = true;
    }
    return now_ns < backoff->deadline_ns;
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
    return nep_backoff_look(backoff, nep_now_ns());
}

void nep_backoff_reset(struct nep_backoff *backoff)
{
    backoff->num_idle = 0;
    backoff->seen_ns = 0;
}

uint64_t nep_backoff_idle_ns(const struct nep_backoff *backoff)
{
    return backoff->seen_ns != 0 ? nep_now_ns() - backoff->idle_since_ns : 0;
}

uint64_t nep_backoff_watched_ns(const struct nep_backoff *backoff)
{
    return backoff->seen_ns != 0 ? backoff->seen_ns - backoff->watched_since_ns : 0;
}
