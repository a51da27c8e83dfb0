/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The caller opens a loop, takes chunks from one counter like everybody else, closes the loop and
 * waits for the workers that joined it. A worker that wakes too late finds the loop closed and goes
 * back to sleep: with more ranks than cores the caller never waits for a thread that has not been
 * given a core yet, only for chunks that are being worked on.
 *
 * Everything but the counter is under one mutex, taken twice by a thread in a loop; chunks take
 * many microseconds, so it does not show. Rejected: a fixed share of chunks per thread, which makes
 * the slowest core the time of the loop; OpenMP, whose pool is the process's and whose threads spin
 * or sleep by its own rules; a queue of tasks, which nothing here needs.
 */
#include "dispatch/host/workers.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct nep_workers {
    uint32_t num_workers; /* threads beside the caller */
    uint32_t spin;
    pid_t pid; /* of the process whose threads they are */
    pthread_t *threads;
    atomic_flag taken; /* by the thread whose loop it is */

    pthread_mutex_t mutex;
    pthread_cond_t opened; /* a loop was opened, or stopping was set */
    pthread_cond_t left;   /* the last worker left a loop */
    bool stopping;
    bool open;
    uint32_t num_inside; /* workers in the loop */
    uint32_t num_asleep; /* workers that wait for `opened` */
    /* Also read without the mutex, as a hint, by workers that spin. */
    atomic_uint loop; /* number of the latest loop */

    /* The loop's; written under the mutex while nobody is inside. */
    nep_chunk_fn fn;
    void *ctx;
    uint32_t num_chunks;
    atomic_uint_fast64_t next; /* chunk that nobody has taken */
};

static void loop_take_chunks(struct nep_workers *workers)
{
    /* Relaxed: a chunk's inputs and outputs are ordered by the mutex on the way in and out. */
    for (;;) {
        uint64_t chunk = atomic_fetch_add_explicit(&workers->next, 1, memory_order_relaxed);
        if (chunk >= workers->num_chunks) {
            return;
        }
        workers->fn(workers->ctx, (uint32_t)chunk);
    }
}

static void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void spin_for_loop(struct nep_workers *workers, unsigned seen)
{
    for (uint32_t look = 0; look < workers->spin; look++) {
        if (atomic_load_explicit(&workers->loop, memory_order_relaxed) != seen) {
            return; /* only a hint: the mutex orders */
        }
        cpu_relax();
    }
}

static void *worker_main(void *arg)
{
    struct nep_workers *workers = arg;
    unsigned seen = 0;
    pthread_mutex_lock(&workers->mutex);
    while (!workers->stopping) {
        unsigned loop = atomic_load_explicit(&workers->loop, memory_order_relaxed);
        if (!workers->open || loop == seen) {
            seen = loop; /* also of a loop that was over before this thread woke */
            workers->num_asleep++;
            pthread_cond_wait(&workers->opened, &workers->mutex);
            workers->num_asleep--;
            continue;
        }
        seen = loop;
        workers->num_inside++;
        pthread_mutex_unlock(&workers->mutex);
        loop_take_chunks(workers);
        pthread_mutex_lock(&workers->mutex);
        if (--workers->num_inside == 0) {
            pthread_cond_signal(&workers->left);
        }
        pthread_mutex_unlock(&workers->mutex);
        spin_for_loop(workers, seen);
        pthread_mutex_lock(&workers->mutex);
    }
    pthread_mutex_unlock(&workers->mutex);
    return NULL;
}

static void workers_stop(struct nep_workers *workers, uint32_t num_started)
{
    pthread_mutex_lock(&workers->mutex);
    workers->stopping = true;
    atomic_fetch_add_explicit(&workers->loop, 1, memory_order_relaxed); /* ends their spinning */
    pthread_cond_broadcast(&workers->opened);
    pthread_mutex_unlock(&workers->mutex);
    for (uint32_t i = 0; i < num_started; i++) {
        pthread_join(workers->threads[i], NULL);
    }
    pthread_cond_destroy(&workers->left);
    pthread_cond_destroy(&workers->opened);
    pthread_mutex_destroy(&workers->mutex);
}

/* Starts the threads with all signals blocked: a program's handlers run on its own threads. */
static enum nep_status workers_start(struct nep_workers *workers)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int error = 0;
    uint32_t num_started = 0;
    while (num_started < workers->num_workers && error == 0) {
        error = pthread_create(&workers->threads[num_started], NULL, worker_main, workers);
        num_started += error == 0;
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (error != 0) {
        workers_stop(workers, num_started);
        return nep_fail(NEP_ERR_NO_MEMORY,
                        "worker thread %u of %u could not be started: %s; lower NEP_THREADS",
                        num_started + 1, workers->num_workers, strerror(error));
    }
    for (uint32_t i = 0; i < num_started; i++) {
        pthread_setname_np(workers->threads[i], "nep-worker");
    }
    return NEP_OK;
}

enum nep_status nep_workers_create(uint32_t num_threads, uint32_t spin,
                                   struct nep_workers **workers_p)
{
    if (num_threads == UINT32_MAX) {
        num_threads = 1;
    }
    if (num_threads > NEP_WORKERS_MAX) {
        return nep_fail(NEP_ERR_INVALID, "NEP_THREADS=%u: a pool has at most %d threads",
                        num_threads, NEP_WORKERS_MAX);
    }
    struct nep_workers *workers = calloc(1, sizeof *workers);
    if (workers == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for a pool of %u threads", num_threads);
    }
    workers->num_workers = num_threads > 1 ? num_threads - 1 : 0;
    workers->spin = spin;
    workers->pid = getpid();
    if (workers->num_workers != 0) {
        workers->threads = calloc(workers->num_workers, sizeof *workers->threads);
        if (workers->threads == NULL) {
            free(workers);
            return nep_fail(NEP_ERR_NO_MEMORY, "no memory for a pool of %u threads", num_threads);
        }
        pthread_mutex_init(&workers->mutex, NULL);
        pthread_cond_init(&workers->opened, NULL);
        pthread_cond_init(&workers->left, NULL);
        enum nep_status status = workers_start(workers);
        if (status != NEP_OK) {
            free(workers->threads);
            free(workers);
            return status;
        }
    }
    *workers_p = workers;
    return NEP_OK;
}

void nep_workers_destroy(struct nep_workers *workers)
{
    if (workers == NULL) {
        return;
    }
    if (workers->num_workers != 0 && workers->pid == getpid()) {
        workers_stop(workers, workers->num_workers);
    }
    free(workers->threads);
    free(workers);
}

uint32_t nep_workers_num_threads(const struct nep_workers *workers)
{
    return workers == NULL ? 1 : workers->num_workers + 1;
}

static void run_shared(struct nep_workers *workers, nep_chunk_fn fn, void *ctx, uint32_t num_chunks)
{
    pthread_mutex_lock(&workers->mutex);
    workers->fn = fn;
    workers->ctx = ctx;
    workers->num_chunks = num_chunks;
    atomic_store_explicit(&workers->next, 0, memory_order_relaxed);
    atomic_fetch_add_explicit(&workers->loop, 1, memory_order_relaxed);
    workers->open = true;
    uint32_t num_wanted = num_chunks - 1;
    for (uint32_t i = 0; i < workers->num_asleep && i < num_wanted; i++) {
        pthread_cond_signal(&workers->opened);
    }
    pthread_mutex_unlock(&workers->mutex);
    loop_take_chunks(workers);
    pthread_mutex_lock(&workers->mutex);
    workers->open = false;
    while (workers->num_inside != 0) {
        pthread_cond_wait(&workers->left, &workers->mutex);
    }
    pthread_mutex_unlock(&workers->mutex);
}

void nep_workers_run(struct nep_workers *workers, nep_chunk_fn fn, void *ctx, uint32_t num_chunks)
{
    if (workers != NULL && workers->num_workers != 0 && num_chunks > 1 &&
        workers->pid == getpid() &&
        !atomic_flag_test_and_set_explicit(&workers->taken, memory_order_acquire)) {
        run_shared(workers, fn, ctx, num_chunks);
        /* pairs with the acquire above: the next loop's owner comes after this one */
        atomic_flag_clear_explicit(&workers->taken, memory_order_release);
        return;
    }
    for (uint32_t chunk = 0; chunk < num_chunks; chunk++) {
        fn(ctx, chunk);
    }
}
