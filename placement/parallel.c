/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Jobs are taken from one counter; what a job computes depends on its number alone, so results do
 * not depend on the number of threads. Threads live for one call: a solve makes a dozen calls of
 * many milliseconds each, and a pool would be state to own and to end.
 */
#include "placement/parallel.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/status.h"

#define MAX_THREADS 256u

struct shared {
    atomic_uint next;
    uint32_t num_jobs;
    nep_job_fn fn;
    void *ctx;
    pthread_mutex_t lock;
    uint32_t failed_job; /* under lock, with the two below */
    enum nep_status status;
    char message[512];
};

static void *work(void *arg)
{
    struct shared *shared = arg;
    for (;;) {
        /* Relaxed: the jobs' inputs were complete before the threads started. */
        uint32_t job = atomic_fetch_add_explicit(&shared->next, 1, memory_order_relaxed);
        if (job >= shared->num_jobs) {
            return NULL;
        }
        enum nep_status status = shared->fn(shared->ctx, job);
        if (status != NEP_OK) {
            pthread_mutex_lock(&shared->lock);
            if (job < shared->failed_job) {
                shared->failed_job = job;
                shared->status = status;
                snprintf(shared->message, sizeof shared->message, "%s", nep_last_message());
            }
            pthread_mutex_unlock(&shared->lock);
        }
    }
}

enum nep_status nep_parallel_run(uint32_t num_threads, uint32_t num_jobs, nep_job_fn fn, void *ctx)
{
    struct shared shared = {.num_jobs = num_jobs, .fn = fn, .ctx = ctx, .failed_job = UINT32_MAX};
    atomic_init(&shared.next, 0);
    pthread_mutex_init(&shared.lock, NULL);
    if (num_threads > num_jobs) {
        num_threads = num_jobs;
    }
    if (num_threads > MAX_THREADS) {
        num_threads = MAX_THREADS;
    }
    pthread_t threads[MAX_THREADS];
    uint32_t started = 0;
    while (started + 1 < num_threads &&
           pthread_create(&threads[started], NULL, work, &shared) == 0) {
        started++; /* with fewer threads than asked for, the rest do the work */
    }
    work(&shared);
    for (uint32_t i = 0; i < started; i++) {
        pthread_join(threads[i], NULL);
    }
    pthread_mutex_destroy(&shared.lock);
    if (shared.status != NEP_OK) {
        return nep_fail(shared.status, "%s", shared.message);
    }
    return NEP_OK;
}
