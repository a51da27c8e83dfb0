/* SPDX-License-Identifier: Apache-2.0 */
/* Ranks meet in memory that they share: a counter, and an area to gather in. */
#include "tests/gpu/gpu_world.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_RANKS = 16, MEET_SECONDS = 60, GATHER_BYTES = 16384 };

struct gpu_shared {
    _Atomic uint32_t arrived;
    _Atomic uint32_t round;
    double values[MAX_RANKS];
    uint64_t wrong[MAX_RANKS];
    char gather[MAX_RANKS][GATHER_BYTES];
};

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

void gpu_must(int error, const char *what)
{
    if (error != 0) {
        printf("%s: %s\n", what, cudaGetErrorString((cudaError_t)error));
        fflush(stdout);
        _exit(3);
    }
}

void gpu_must_nep(enum nep_status status, const char *what)
{
    if (status != NEP_OK) {
        printf("%s: %s: %s\n", what, nep_status_name(status), nep_last_message());
        fflush(stdout);
        _exit(3);
    }
}

void gpu_world_meet(struct gpu_world *world)
{
    struct gpu_shared *shared = world->shared;
    uint32_t round = atomic_load(&shared->round);
    if (atomic_fetch_add(&shared->arrived, 1) + 1 == world->num_ranks) {
        atomic_store(&shared->arrived, 0);
        atomic_store(&shared->round, round + 1);
        return;
    }
    double start = seconds();
    while (atomic_load(&shared->round) == round) {
        sched_yield();
        if (seconds() - start > MEET_SECONDS) {
            printf("rank %u: the others did not come in %d s\n", world->rank, MEET_SECONDS);
            fflush(stdout);
            _exit(3);
        }
    }
}

double gpu_world_max(struct gpu_world *world, double value)
{
    struct gpu_shared *shared = world->shared;
    gpu_world_meet(world);
    shared->values[world->rank] = value;
    gpu_world_meet(world);
    double most = shared->values[0];
    for (uint32_t r = 1; r < world->num_ranks; r++) {
        most = shared->values[r] > most ? shared->values[r] : most;
    }
    gpu_world_meet(world);
    return most;
}

void gpu_world_leave(void)
{
    fflush(stdout);
    kill(getpid(), SIGKILL);
}

static int allgather(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns)
{
    struct gpu_world *world = ctx;
    (void)timeout_ns;
    for (size_t done = 0; done < bytes; done += GATHER_BYTES) {
        size_t now = bytes - done < GATHER_BYTES ? bytes - done : GATHER_BYTES;
        memcpy(world->shared->gather[world->rank], (const char *)in + done, now);
        gpu_world_meet(world);
        for (uint32_t r = 0; r < world->num_ranks; r++) {
            memcpy((char *)out + r * bytes + done, world->shared->gather[r], now);
        }
        gpu_world_meet(world);
    }
    return 0;
}

static void open_rank(struct gpu_world *world, uint64_t timeout_ns)
{
    uint32_t ranks_per_node[MAX_RANKS];
    for (uint32_t n = 0; n < world->num_nodes; n++) {
        ranks_per_node[n] = world->num_ranks / world->num_nodes;
    }
    const struct nep_bootstrap bootstrap = {
        .size = sizeof bootstrap, .ctx = world, .allgather = allgather};
    const struct nep_comm_params params = {
        .size = sizeof params,
        .rank = world->rank,
        .num_ranks = world->num_ranks,
        .bootstrap = &bootstrap,
        .timeout_ns = timeout_ns != 0 ? timeout_ns : 60000000000ull,
        .ranks_per_node = ranks_per_node,
        .num_nodes = world->num_nodes,
    };
    gpu_must((int)cudaSetDevice(0), "cudaSetDevice");
    gpu_must((int)cudaStreamCreateWithFlags(&world->stream, cudaStreamNonBlocking), "stream");
    gpu_must_nep(nep_comm_create(&params, &world->comm), "communicator");
}

static void close_rank(struct gpu_world *world)
{
    nep_comm_destroy(world->comm);
    gpu_must((int)cudaStreamDestroy(world->stream), "stream");
}

static uint64_t run_processes(struct gpu_shared *shared, uint32_t num_ranks, uint32_t num_nodes,
                              uint64_t timeout_ns, gpu_rank_fn fn, void *ctx)
{
    uint64_t wrong = 0;
    fflush(stdout);
    for (uint32_t r = 0; r < num_ranks; r++) {
        if (fork() == 0) {
            struct gpu_world world = {
                .num_ranks = num_ranks, .num_nodes = num_nodes, .rank = r, .shared = shared};
            open_rank(&world, timeout_ns);
            shared->wrong[r] = fn(&world, ctx);
            close_rank(&world);
            fflush(stdout);
            _exit(0);
        }
    }
    for (uint32_t r = 0; r < num_ranks; r++) {
        int status = 1;
        wait(&status);
        wrong += WIFEXITED(status) && WEXITSTATUS(status) != 0;
        wrong += WIFSIGNALED(status) && WTERMSIG(status) != SIGKILL;
    }
    return wrong;
}

struct thread {
    pthread_t id;
    struct gpu_world world;
    uint64_t timeout_ns;
    gpu_rank_fn fn;
    void *ctx;
};

static void *run_thread(void *arg)
{
    struct thread *thread = arg;
    struct gpu_world *world = &thread->world;
    open_rank(world, thread->timeout_ns);
    world->shared->wrong[world->rank] = thread->fn(world, thread->ctx);
    gpu_world_meet(world);
    close_rank(world);
    return NULL;
}

static void run_threads(struct gpu_shared *shared, uint32_t num_ranks, uint32_t num_nodes,
                        uint64_t timeout_ns, gpu_rank_fn fn, void *ctx)
{
    struct thread threads[MAX_RANKS];
    for (uint32_t r = 0; r < num_ranks; r++) {
        threads[r] = (struct thread){
            .world = {.num_ranks = num_ranks, .num_nodes = num_nodes, .rank = r, .shared = shared},
            .timeout_ns = timeout_ns,
            .fn = fn,
            .ctx = ctx};
        gpu_must(pthread_create(&threads[r].id, NULL, run_thread, &threads[r]), "pthread_create");
    }
    for (uint32_t r = 0; r < num_ranks; r++) {
        pthread_join(threads[r].id, NULL);
    }
}

uint64_t gpu_world_run(uint32_t num_ranks, uint32_t num_nodes, bool as_processes,
                       uint64_t timeout_ns, gpu_rank_fn fn, void *ctx)
{
    struct gpu_shared *shared =
        mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    gpu_must(shared == MAP_FAILED || num_ranks > MAX_RANKS, "mmap");
    uint64_t wrong = 0;
    if (as_processes) {
        wrong = run_processes(shared, num_ranks, num_nodes, timeout_ns, fn, ctx);
    } else {
        run_threads(shared, num_ranks, num_nodes, timeout_ns, fn, ctx);
    }
    for (uint32_t r = 0; r < num_ranks; r++) {
        wrong += shared->wrong[r];
    }
    munmap(shared, sizeof *shared);
    return wrong;
}
