/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Watching while the host makes no call: a graph that is replayed waits in kernels alone. A thread
 * looks now and then whether a rank is gone and tells this rank's kernels, so that those that wait
 * for it return long before their deadline; and whether a kernel has given up, so that the log, the
 * trace and nep_comm_fault have it at once. Kernels do not depend on the thread: should it die or
 * starve, they return at their own deadline.
 */
#ifndef NEP_DISPATCH_WATCH_H
#define NEP_DISPATCH_WATCH_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

struct nep_watch;

struct nep_watch_params {
    /* NEP_OK, or why the rank is gone, with a sentence in this thread's message. */
    enum nep_status (*peer_status)(void *ctx, uint32_t rank);
    /* Lets kernels of this rank know that `rank` is gone. Once for each. */
    void (*tell)(void *ctx, uint32_t rank);
    /* Looks whether a kernel has given up, and says it where the host says such things; true: it
     * has, and need not be looked for again. */
    bool (*look)(void *ctx);
    void *ctx;
    uint32_t rank; /* itself, not asked after */
    uint32_t num_ranks;
    uint64_t period_ns;
};

/* All of params' functions are called from the thread, between start and stop alone. */
enum nep_status nep_watch_start(const struct nep_watch_params *params, struct nep_watch **watch_p);
/* Ends the thread. NULL is nothing. */
void nep_watch_stop(struct nep_watch *watch);

#endif
