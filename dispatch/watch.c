/* SPDX-License-Identifier: Apache-2.0 */
#include "dispatch/watch.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "base/clock.h"
#include "base/log.h"

struct nep_watch {
    struct nep_watch_params params;
    pthread_t thread;
    pthread_mutex_t lock; /* of must_stop */
    pthread_cond_t stopped;
    bool must_stop;
    bool has_looked; /* a kernel has given up, and it was said */
    bool *is_told;   /* [num_ranks] */
};

static void look_after_ranks(struct nep_watch *watch)
{
    const struct nep_watch_params *params = &watch->params;
    for (uint32_t r = 0; r < params->num_ranks; r++) {
        if (r != params->rank && !watch->is_told[r] &&
            params->peer_status(params->ctx, r) != NEP_OK) {
            watch->is_told[r] = true;
            nep_debug("rank %u is gone, which kernels that wait for it are told: %s", r,
                      nep_last_message());
            params->tell(params->ctx, r);
        }
    }
}

/* Until the next look; false: stop. */
static bool nap(struct nep_watch *watch)
{
    uint64_t until_ns = nep_now_ns() + watch->params.period_ns;
    struct timespec until = {(time_t)(until_ns / NEP_S), (long)(until_ns % NEP_S)};
    pthread_mutex_lock(&watch->lock);
    int error = 0;
    while (!watch->must_stop && error != ETIMEDOUT) {
        error = pthread_cond_timedwait(&watch->stopped, &watch->lock, &until);
    }
    bool goes_on = !watch->must_stop;
    pthread_mutex_unlock(&watch->lock);
    return goes_on;
}

static void *run(void *arg)
{
    struct nep_watch *watch = arg;
    do {
        look_after_ranks(watch);
        if (!watch->has_looked) {
            watch->has_looked = watch->params.look(watch->params.ctx);
        }
    } while (nap(watch));
    return NULL;
}

static void watch_free(struct nep_watch *watch)
{
    pthread_cond_destroy(&watch->stopped);
    pthread_mutex_destroy(&watch->lock);
    free(watch->is_told);
    free(watch);
}

enum nep_status nep_watch_start(const struct nep_watch_params *params, struct nep_watch **watch_p)
{
    struct nep_watch *watch = calloc(1, sizeof *watch);
    bool *is_told = calloc(params->num_ranks, sizeof *is_told);
    if (watch == NULL || is_told == NULL) {
        free(watch);
        free(is_told);
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory to watch over %u ranks", params->num_ranks);
    }
    watch->params = *params;
    watch->is_told = is_told;
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC); /* that of nep_now_ns */
    pthread_cond_init(&watch->stopped, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&watch->lock, NULL);
    int error = pthread_create(&watch->thread, NULL, run, watch);
    if (error != 0) {
        watch_free(watch);
        return nep_fail(NEP_ERR_IO, "the system refuses a thread that watches (error %d)", error);
    }
    *watch_p = watch;
    return NEP_OK;
}

void nep_watch_stop(struct nep_watch *watch)
{
    if (watch == NULL) {
        return;
    }
    pthread_mutex_lock(&watch->lock);
    watch->must_stop = true;
    pthread_cond_signal(&watch->stopped);
    pthread_mutex_unlock(&watch->lock);
    pthread_join(watch->thread, NULL);
    watch_free(watch);
}
