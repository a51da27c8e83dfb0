/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bootstrap is one mapping: a ticket counter for each allgather and a page of slots per rank.
 * An allgather writes its part, waits for all, reads, waits for all again, so that the slots can be
 * used for the next one.
 */
#include "ranks.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "transport/topology.h"

enum { SLOT_BYTES = 1 << 17 };

struct board {
    atomic_uint num_written, num_read; /* running totals over all allgathers */
    uint32_t num_ranks;
    _Alignas(64) char scratch[RANKS_SCRATCH];
    char slots[RANKS_MAX][SLOT_BYTES];
};

struct seat {
    struct board *board;
    uint32_t rank;
    uint32_t num_done; /* allgathers of this rank */
};

struct runner {
    struct rank rank;
    struct seat seat;
    struct nep_topology_store *store;
    rank_fn fn;
    int result;
    pthread_t thread;
    pid_t pid;
};

static uint64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static int wait_total(const atomic_uint *total, uint32_t wanted, uint64_t timeout_ns)
{
    uint64_t start = now_ms();
    while ((int32_t)(atomic_load(total) - wanted) < 0) {
        if (now_ms() - start > timeout_ns / 1000000) {
            return 1;
        }
        sched_yield();
    }
    return 0;
}

static int board_allgather(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns)
{
    struct seat *seat = ctx;
    struct board *board = seat->board;
    if (bytes > SLOT_BYTES) {
        return 1;
    }
    uint32_t wanted = ++seat->num_done * board->num_ranks;
    memcpy(board->slots[seat->rank], in, bytes);
    atomic_fetch_add(&board->num_written, 1);
    if (wait_total(&board->num_written, wanted, timeout_ns) != 0) {
        return 1;
    }
    for (uint32_t i = 0; i < board->num_ranks; i++) {
        memcpy((char *)out + i * bytes, board->slots[i], bytes);
    }
    atomic_fetch_add(&board->num_read, 1);
    return wait_total(&board->num_read, wanted, timeout_ns);
}

static void *thread_main(void *arg)
{
    struct runner *runner = arg;
    runner->result = runner->fn(&runner->rank);
    return NULL;
}

static int start_one(struct runner *runner, bool threads)
{
    if (threads) {
        return pthread_create(&runner->thread, NULL, thread_main, runner);
    }
    fflush(NULL);
    runner->pid = fork();
    if (runner->pid == 0) {
        int result = runner->fn(&runner->rank);
        fflush(NULL);
        _exit(result);
    }
    return runner->pid < 0;
}

static int join_process(struct runner *runner, uint64_t deadline_ms)
{
    int status;
    bool late = false;
    while (waitpid(runner->pid, &status, late ? 0 : WNOHANG) == 0) {
        if (now_ms() > deadline_ms) {
            fprintf(stderr, "rank %u did not come back and was killed\n", runner->rank.rank);
            kill(runner->pid, SIGKILL);
            late = true;
        }
        usleep(1000);
    }
    return late || !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

static int join_one(struct runner *runner, bool threads, uint64_t deadline_ms)
{
    if (!threads) {
        return join_process(runner, deadline_ms);
    }
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    uint64_t now = now_ms();
    until.tv_sec += deadline_ms > now ? (time_t)((deadline_ms - now) / 1000 + 1) : 1;
    if (pthread_timedjoin_np(runner->thread, NULL, &until) != 0) {
        fprintf(stderr, "rank %u (a thread) did not come back\n", runner->rank.rank);
        _exit(1);
    }
    return runner->result != 0;
}

int ranks_run(const struct ranks_params *params, rank_fn fn, void *arg)
{
    uint32_t num_ranks = 0;
    for (uint32_t i = 0; i < params->num_nodes; i++) {
        num_ranks += params->ranks_per_node[i];
    }
    struct board *board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE,
                               MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    struct runner *runners = calloc(num_ranks, sizeof *runners);
    if (board == MAP_FAILED || runners == NULL || num_ranks > RANKS_MAX) {
        return (int)num_ranks;
    }
    board->num_ranks = num_ranks;
    int num_failed = 0;
    uint64_t deadline_ms = now_ms() + params->seconds * 1000ull;
    for (uint32_t i = 0; i < num_ranks; i++) {
        struct runner *runner = &runners[i];
        runner->fn = fn;
        runner->seat = (struct seat){.board = board, .rank = i};
        runner->rank = (struct rank){.rank = i,
                                     .num_ranks = num_ranks,
                                     .scratch = board->scratch,
                                     .arg = arg,
                                     .bootstrap = {.size = sizeof(struct nep_bootstrap),
                                                   .ctx = &runner->seat,
                                                   .allgather = board_allgather}};
        if (nep_topology_from_sizes(params->ranks_per_node, params->num_nodes, i, &runner->store,
                                    &runner->rank.topology) != NEP_OK ||
            start_one(runner, params->threads) != 0) {
            fprintf(stderr, "rank %u could not be started\n", i);
            _exit(1);
        }
    }
    for (uint32_t i = 0; i < num_ranks; i++) {
        int failed = join_one(&runners[i], params->threads, deadline_ms);
        num_failed += i + params->num_spare < num_ranks ? failed : 0;
        nep_topology_destroy(runners[i].store);
    }
    free(runners);
    munmap(board, sizeof *board);
    return num_failed;
}

uint64_t ranks_seed(const char *test)
{
    const char *given = getenv("NEP_TEST_SEED");
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t seed = given != NULL
                        ? strtoull(given, NULL, 0)
                        : ((uint64_t)now.tv_nsec << 20) ^ (uint64_t)now.tv_sec ^ (uint64_t)getpid();
    printf("%s: NEP_TEST_SEED=%llu\n", test, (unsigned long long)seed);
    return seed;
}
