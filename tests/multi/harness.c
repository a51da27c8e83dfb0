/* SPDX-License-Identifier: Apache-2.0 */
/* The barrier yields soon: tests run many more ranks than there are cores. */
#include "tests/multi/harness.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "transport/rendezvous.h"

struct nep_multi_shared {
    _Atomic uint32_t arrived;
    _Atomic uint32_t round;
    _Atomic uint32_t failed;
    _Atomic uint64_t words[64];
    char error[640];
    char gather[NEP_MULTI_MAX_RANKS][NEP_MULTI_GATHER_BYTES];
};

static bool shared_barrier(struct nep_multi_rank *rank, uint64_t timeout_ns)
{
    struct nep_multi_shared *shared = rank->shared;
    uint32_t round = atomic_load(&shared->round);
    if (atomic_fetch_add(&shared->arrived, 1) + 1 == rank->num_ranks) {
        atomic_store(&shared->arrived, 0);
        atomic_fetch_add(&shared->round, 1);
        return true;
    }
    uint64_t deadline_ns = nep_deadline_ns(timeout_ns);
    for (uint32_t i = 0; atomic_load(&shared->round) == round; i++) {
        sched_yield();
        if (i % 64 == 63 && (atomic_load(&shared->failed) != 0 || nep_left_ns(deadline_ns) == 0)) {
            return false;
        }
    }
    return true;
}

static int gather(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns)
{
    struct nep_multi_rank *rank = ctx;
    for (size_t first = 0; first < bytes; first += NEP_MULTI_GATHER_BYTES) {
        size_t part =
            bytes - first < NEP_MULTI_GATHER_BYTES ? bytes - first : NEP_MULTI_GATHER_BYTES;
        memcpy(rank->shared->gather[rank->rank], (const char *)in + first, part);
        if (!shared_barrier(rank, timeout_ns)) {
            return -1;
        }
        for (uint32_t r = 0; r < rank->num_ranks; r++) {
            memcpy((char *)out + r * bytes + first, rank->shared->gather[r], part);
        }
        if (!shared_barrier(rank, timeout_ns)) {
            return -1;
        }
    }
    return 0;
}

bool nep_multi_barrier(struct nep_multi_rank *rank)
{
    return shared_barrier(rank, 120 * NEP_S);
}

_Atomic uint64_t *nep_multi_words(struct nep_multi_rank *rank)
{
    return rank->shared->words;
}

bool nep_multi_fail(struct nep_multi_rank *rank, const char *fmt, ...)
{
    if (atomic_fetch_add(&rank->shared->failed, 1) == 0) {
        va_list args;
        va_start(args, fmt);
        int len =
            snprintf(rank->shared->error, sizeof(rank->shared->error), "rank %u: ", rank->rank);
        vsnprintf(rank->shared->error + len, sizeof(rank->shared->error) - (size_t)len, fmt, args);
        va_end(args);
    }
    return false;
}

struct nep_multi_shared *nep_multi_shared_create(void)
{
    void *memory = mmap(NULL, sizeof(struct nep_multi_shared), PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

void nep_multi_shared_destroy(struct nep_multi_shared *shared)
{
    if (shared != NULL) {
        munmap(shared, sizeof(*shared));
    }
}

void nep_multi_seat(struct nep_multi_rank *rank, uint32_t number, uint32_t num_ranks,
                    struct nep_multi_shared *shared, void *arg)
{
    *rank = (struct nep_multi_rank){
        .rank = number, .num_ranks = num_ranks, .shared = shared, .arg = arg};
    rank->bootstrap =
        (struct nep_bootstrap){.size = sizeof(rank->bootstrap), .ctx = rank, .allgather = gather};
}

struct thread {
    pthread_t id;
    nep_multi_fn fn;
    struct nep_multi_rank rank;
    bool is_fine;
};

static void *thread_main(void *arg)
{
    struct thread *thread = arg;
    thread->is_fine = thread->fn(&thread->rank);
    return NULL;
}

void nep_multi_run_threads(uint32_t num_ranks, nep_multi_fn fn, void *arg,
                           struct nep_multi_result *result)
{
    struct nep_multi_shared *shared = nep_multi_shared_create();
    struct thread *threads = calloc(num_ranks, sizeof(*threads));
    memset(result, 0, sizeof(*result));
    uint32_t started = 0;
    for (; started < num_ranks && shared != NULL && threads != NULL; started++) {
        nep_multi_seat(&threads[started].rank, started, num_ranks, shared, arg);
        threads[started].fn = fn;
        if (pthread_create(&threads[started].id, NULL, thread_main, &threads[started]) != 0) {
            nep_multi_fail(&threads[started].rank, "the thread cannot be started");
            result->num_failed++;
            break;
        }
    }
    for (uint32_t r = 0; r < started; r++) {
        pthread_join(threads[r].id, NULL);
        result->num_failed += !threads[r].is_fine;
    }
    if (shared != NULL) {
        memcpy(result->error, shared->error, sizeof(result->error));
    }
    nep_multi_shared_destroy(shared);
    free(threads);
}

/* Waits for the children; kills them by id when the time is over. */
static void wait_children(pid_t *pids, uint32_t num, uint32_t timeout_s,
                          struct nep_multi_result *result)
{
    uint64_t deadline_ns = nep_deadline_ns(timeout_s * NEP_S);
    bool is_killed = false;
    for (uint32_t left = num; left > 0;) {
        int status;
        pid_t pid = waitpid(-1, &status, WNOHANG);
        if (pid <= 0) {
            if (!is_killed && nep_left_ns(deadline_ns) == 0) {
                is_killed = true;
                for (uint32_t r = 0; r < num; r++) {
                    if (pids[r] > 0) {
                        kill(pids[r], SIGKILL);
                    }
                }
                snprintf(result->error, sizeof(result->error), "not done after %u s", timeout_s);
            }
            usleep(2000);
            continue;
        }
        for (uint32_t r = 0; r < num; r++) {
            if (pids[r] == pid) {
                pids[r] = 0;
                left--;
                result->num_failed += !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
            }
        }
    }
}

void nep_multi_run_processes(uint32_t num_ranks, nep_multi_fn fn, void *arg, uint32_t timeout_s,
                             struct nep_multi_result *result)
{
    struct nep_multi_shared *shared = nep_multi_shared_create();
    pid_t pids[NEP_MULTI_MAX_RANKS];
    memset(result, 0, sizeof(*result));
    if (shared == NULL) {
        result->num_failed = num_ranks;
        snprintf(result->error, sizeof(result->error), "no shared memory for the harness");
        return;
    }
    fflush(NULL);
    for (uint32_t r = 0; r < num_ranks; r++) {
        pids[r] = fork();
        if (pids[r] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            struct nep_multi_rank rank;
            nep_multi_seat(&rank, r, num_ranks, shared, arg);
            bool is_fine = fn(&rank);
            fflush(NULL);
            _exit(is_fine ? 0 : 1);
        }
    }
    wait_children(pids, num_ranks, timeout_s, result);
    if (shared->error[0] != '\0') {
        memcpy(result->error, shared->error, sizeof(result->error));
    }
    nep_multi_shared_destroy(shared);
}

struct nep_map *nep_multi_map_read(FILE *text)
{
    struct nep_map *map = NULL;
    char path[64];
    if (text == NULL || fflush(text) != 0) {
        perror("a map's text");
        return NULL;
    }
    snprintf(path, sizeof path, "/proc/self/fd/%d", fileno(text));
    if (nep_map_load(path, &map) != NEP_OK) {
        fprintf(stderr, "%s\n", nep_last_message());
    }
    fclose(text);
    return map;
}

uint64_t nep_multi_seed(const char *test)
{
    const char *text = getenv("NEP_TEST_SEED");
    uint64_t seed = text != NULL ? strtoull(text, NULL, 10) : nep_now_ns() ^ (uint64_t)getpid();
    printf("%s: NEP_TEST_SEED=%llu\n", test, (unsigned long long)seed);
    fflush(stdout);
    return seed;
}

uint64_t nep_multi_scaled(uint64_t amount)
{
    const char *text = getenv("NEP_TEST_SCALE");
    uint64_t percent = text != NULL ? strtoull(text, NULL, 10) : 100;
    uint64_t scaled = amount * percent / 100;
    return scaled > 0 ? scaled : 1;
}

pid_t nep_multi_serve(const struct nep_rendezvous_params *params, uint16_t *port_p)
{
    int fds[2];
    if (pipe(fds) != 0) {
        return -1;
    }
    pid_t pid = fork();
    if (pid == 0) {
        struct nep_rendezvous_server *server = NULL;
        uint16_t port = 0;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (nep_rendezvous_server_start(params, &server, &port) != NEP_OK ||
            write(fds[1], &port, sizeof port) != (ssize_t)sizeof port) {
            _exit(1);
        }
        close(fds[1]);
        for (;;) {
            pause(); /* until it is killed */
        }
    }
    close(fds[1]);
    if (pid > 0 && read(fds[0], port_p, sizeof *port_p) != (ssize_t)sizeof *port_p) {
        waitpid(pid, NULL, 0);
        pid = -1;
    }
    close(fds[0]);
    return pid;
}

void nep_multi_serve_end(pid_t pid)
{
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
}
