/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Driver functions are asked of the run-time library, so that the program also links and starts
 * where there is no driver. A file descriptor reaches the other ranks over socket pairs made before
 * the fork. Rejected: cudaIpc handles, whose memory dies with its owner.
 */
#include "tests/gpu/gpu_world.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_RANKS = 16, MEET_SECONDS = 60 };

struct gpu_shared {
    _Atomic uint32_t arrived;
    _Atomic uint32_t round;
    double values[2][MAX_RANKS];
    uint64_t wrong[MAX_RANKS];
    int sockets[MAX_RANKS][2];
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
    shared->values[0][world->rank] = value;
    gpu_world_meet(world);
    double most = shared->values[0][0];
    for (uint32_t r = 1; r < world->num_ranks; r++) {
        most = shared->values[0][r] > most ? shared->values[0][r] : most;
    }
    gpu_world_meet(world);
    return most;
}

/* ---- processes ------------------------------------------------------------------------------ */

#define DRIVER(name)                                                                               \
    __typeof__(&name) name##_fn = NULL;                                                            \
    enum cudaDriverEntryPointQueryResult name##_found;                                             \
    gpu_must((int)cudaGetDriverEntryPointByVersion(#name, (void **)&name##_fn, 12000,              \
                                                   cudaEnableDefault, &name##_found),              \
             #name)

static void send_fd(int socket, int fd)
{
    char byte = 0;
    char control[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec piece = {&byte, 1};
    struct msghdr message = {.msg_iov = &piece,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(head), &fd, sizeof fd);
    gpu_must(sendmsg(socket, &message, 0) != 1, "sendmsg");
}

static int receive_fd(int socket)
{
    char byte;
    int fd;
    char control[CMSG_SPACE(sizeof fd)];
    struct iovec piece = {&byte, 1};
    struct msghdr message = {.msg_iov = &piece,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    gpu_must(recvmsg(socket, &message, 0) != 1, "recvmsg");
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

/* The own allocation and everybody's mapping. Ranks take turns, so a descriptor names its owner. */
static void map_windows(struct gpu_world *world, uint64_t bytes)
{
    DRIVER(cuMemCreate);
    DRIVER(cuMemExportToShareableHandle);
    DRIVER(cuMemImportFromShareableHandle);
    DRIVER(cuMemAddressReserve);
    DRIVER(cuMemMap);
    DRIVER(cuMemSetAccess);
    const CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                      .requestedHandleTypes =
                                          CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                      .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE}};
    CUmemGenericAllocationHandle handles[MAX_RANKS];
    int fd = -1;
    world->stride = bytes;
    gpu_must((int)cuMemCreate_fn(&handles[world->rank], bytes, &prop, 0), "cuMemCreate");
    gpu_must((int)cuMemExportToShareableHandle_fn(&fd, handles[world->rank],
                                                  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
             "cuMemExportToShareableHandle");
    for (uint32_t owner = 0; owner < world->num_ranks; owner++) {
        for (uint32_t r = 0; owner == world->rank && r < world->num_ranks; r++) {
            if (r != owner) {
                send_fd(world->shared->sockets[r][0], fd);
            }
        }
        if (owner != world->rank) {
            int theirs = receive_fd(world->shared->sockets[world->rank][1]);
            gpu_must(
                (int)cuMemImportFromShareableHandle_fn(&handles[owner], (void *)(intptr_t)theirs,
                                                       CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
                "cuMemImportFromShareableHandle");
            close(theirs);
        }
        gpu_world_meet(world);
    }
    CUdeviceptr base = 0;
    const CUmemAccessDesc access = {.location = prop.location,
                                    .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    gpu_must((int)cuMemAddressReserve_fn(&base, bytes * world->num_ranks, 0, 0, 0),
             "cuMemAddressReserve");
    for (uint32_t r = 0; r < world->num_ranks; r++) {
        gpu_must((int)cuMemMap_fn(base + r * bytes, bytes, 0, handles[r], 0), "cuMemMap");
    }
    gpu_must((int)cuMemSetAccess_fn(base, bytes * world->num_ranks, &access, 1), "cuMemSetAccess");
    world->base = (char *)(uintptr_t)base;
}

static uint64_t round_up(uint64_t bytes)
{
    return (bytes + (2 << 20) - 1) >> 21 << 21; /* the granularity of VMM on all GPUs so far */
}

static uint64_t run_processes(struct gpu_shared *shared, uint32_t num_ranks, uint64_t bytes,
                              gpu_rank_fn fn, void *ctx)
{
    uint64_t wrong = 0;
    for (uint32_t r = 0; r < num_ranks; r++) {
        gpu_must(socketpair(AF_UNIX, SOCK_DGRAM, 0, shared->sockets[r]), "socketpair");
    }
    fflush(stdout);
    for (uint32_t r = 0; r < num_ranks; r++) {
        if (fork() == 0) {
            struct gpu_world world = {.num_ranks = num_ranks, .rank = r, .shared = shared};
            gpu_must((int)cudaSetDevice(0), "cudaSetDevice");
            gpu_must((int)cudaFree(NULL), "context");
            map_windows(&world, round_up(bytes));
            gpu_must((int)cudaStreamCreateWithFlags(&world.stream, cudaStreamNonBlocking),
                     "stream");
            shared->wrong[r] = fn(&world, ctx);
            gpu_world_meet(&world);
            fflush(stdout);
            _exit(0);
        }
    }
    for (uint32_t r = 0; r < num_ranks; r++) {
        int status = 1;
        wait(&status);
        wrong += status != 0;
    }
    return wrong;
}

/* ---- threads -------------------------------------------------------------------------------- */

struct thread {
    pthread_t id;
    struct gpu_world world;
    gpu_rank_fn fn;
    void *ctx;
};

static void *run_thread(void *arg)
{
    struct thread *thread = arg;
    struct gpu_world *world = &thread->world;
    gpu_must((int)cudaSetDevice(0), "cudaSetDevice");
    gpu_must((int)cudaStreamCreateWithFlags(&world->stream, cudaStreamNonBlocking), "stream");
    world->shared->wrong[world->rank] = thread->fn(world, thread->ctx);
    gpu_must((int)cudaStreamDestroy(world->stream), "stream");
    return NULL;
}

static uint64_t run_threads(struct gpu_shared *shared, uint32_t num_ranks, uint64_t bytes,
                            gpu_rank_fn fn, void *ctx)
{
    struct thread threads[MAX_RANKS];
    void *base = NULL;
    bytes = round_up(bytes);
    gpu_must((int)cudaMalloc(&base, bytes * num_ranks), "memory of all windows");
    for (uint32_t r = 0; r < num_ranks; r++) {
        threads[r] = (struct thread){
            .world = {num_ranks, r, base, bytes, shared, NULL}, .fn = fn, .ctx = ctx};
        gpu_must(pthread_create(&threads[r].id, NULL, run_thread, &threads[r]), "pthread_create");
    }
    for (uint32_t r = 0; r < num_ranks; r++) {
        pthread_join(threads[r].id, NULL);
    }
    gpu_must((int)cudaFree(base), "cudaFree");
    return 0;
}

uint64_t gpu_world_run(uint32_t num_ranks, uint64_t window_bytes, bool as_processes, gpu_rank_fn fn,
                       void *ctx)
{
    struct gpu_shared *shared =
        mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    gpu_must(shared == MAP_FAILED, "mmap");
    uint64_t wrong = as_processes ? run_processes(shared, num_ranks, window_bytes, fn, ctx)
                                  : run_threads(shared, num_ranks, window_bytes, fn, ctx);
    for (uint32_t r = 0; r < num_ranks; r++) {
        wrong += shared->wrong[r];
    }
    munmap(shared, sizeof *shared);
    return wrong;
}
