/* SPDX-License-Identifier: Apache-2.0 */
/*
 * usage: gpu_check refusal
 *        gpu_check random threads|processes RANKS SEED COUNT
 *        gpu_check faults
 * refusal: says what this machine lacks, and passes where it lacks a GPU and the library says so.
 * random: COUNT shapes, three rounds each (the third from the slots that the handle holds).
 * faults: a rank that does not come, an output that is too small, an id that does not exist.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/gpu_case.h"

enum { MAX_WINDOW = 96 << 20 };

struct job {
    uint64_t seed;
    uint32_t count;
};

/* The i-th shape of a seed, of a bearable size. */
static struct gpu_shape shape_of(const struct job *job, uint32_t i, uint32_t num_ranks)
{
    uint64_t key = nep_ref_mix(job->seed, i);
    struct gpu_shape shape = gpu_shape_random(key, num_ranks);
    while (gpu_shape_window_bytes(&shape) > MAX_WINDOW) {
        shape = gpu_shape_random(++key, num_ranks);
    }
    return shape;
}

static uint64_t run_random(struct gpu_world *world, void *ctx)
{
    const struct job *job = ctx;
    uint64_t wrong = 0;
    for (uint32_t i = 0; i < job->count; i++) {
        struct gpu_shape shape = shape_of(job, i, world->num_ranks);
        struct gpu_case *c = gpu_case_create(world, &shape);
        uint64_t here = 0;
        for (uint64_t round = 0; round < 3; round++) {
            if (round == 2) { /* the same routing again, from the handle */
                c->in.ids = NULL;
            }
            here += gpu_case_round(c, round < 2 ? round : 1);
        }
        if (here != 0) {
            printf("rank %u: %llu wrong in case %u: ", world->rank, (unsigned long long)here, i);
            gpu_shape_print(&shape);
        }
        wrong += here;
        gpu_case_destroy(c);
    }
    return wrong;
}

static int check_random(bool as_processes, uint32_t num_ranks, uint64_t seed, uint32_t count)
{
    struct job job = {seed, count};
    uint64_t wrong = gpu_world_run(num_ranks, MAX_WINDOW, as_processes, run_random, &job);
    printf("random: %u ranks as %s, seed %llu, %u shapes of 3 rounds: %llu wrong\n", num_ranks,
           as_processes ? "processes" : "threads", (unsigned long long)seed, count,
           (unsigned long long)wrong);
    return wrong != 0;
}

/* ---- faults --------------------------------------------------------------------------------- */

static struct gpu_shape small_shape(uint32_t num_ranks)
{
    return (struct gpu_shape){.key = 5,
                              .num_ranks = num_ranks,
                              .slots_per_rank = 4,
                              .num_experts = 4 * num_ranks,
                              .top_k = 4,
                              .hidden = 256,
                              .max_tokens = 64,
                              .num_sms = 4,
                              .layout = NEP_LAYOUT_RANK,
                              .dtype = NEP_DTYPE_BF16,
                              .wire = NEP_DTYPE_BF16,
                              .is_full = true};
}

static uint64_t expect(struct gpu_case *c, uint64_t want, const char *what)
{
    uint64_t status = gpu_case_status(c);
    if (status != want) {
        printf("rank %u, %s: status %llx, must be %llx\n", c->world->rank, what,
               (unsigned long long)status, (unsigned long long)want);
    }
    return status != want;
}

/* The last rank does not come: the others give up, name it, and later kernels end at once. */
static uint64_t check_absent(struct gpu_world *world)
{
    struct gpu_shape shape = small_shape(world->num_ranks);
    struct gpu_case *c = gpu_case_create(world, &shape);
    uint64_t *seen = NULL;
    uint64_t wrong = 0;
    uint32_t absent = world->num_ranks - 1;
    gpu_must((int)cudaHostAlloc((void **)&seen, 8, cudaHostAllocMapped), "pinned word");
    *seen = 0;
    c->group.status_host = seen;
    c->group.timeout_ns = 50000000;
    gpu_case_draw(c, 0);
    if (world->rank != absent) {
        uint64_t want = NEP_CUDA_STATUS(NEP_CUDA_EXPIRED, NEP_CUDA_PHASE_COUNTS, absent);
        gpu_case_dispatch(c);
        wrong += expect(c, want, "a rank is absent");
        wrong += *(volatile uint64_t *)seen != want;
        struct nep_cuda_state before;
        struct nep_cuda_state after;
        cudaMemcpy(&before, c->group.state, sizeof before, cudaMemcpyDeviceToHost);
        for (uint32_t i = 0; i < 100; i++) {
            gpu_case_dispatch(c);
            gpu_case_combine(c);
        }
        wrong += expect(c, want, "after more launches");
        cudaMemcpy(&after, c->group.state, sizeof after, cudaMemcpyDeviceToHost);
        wrong += after.op != before.op; /* they returned at once */
    }
    gpu_world_meet(world);
    gpu_case_destroy(c);
    cudaFreeHost(seen);
    return wrong;
}

/* The last rank's output is one row short: every rank says so, and nothing is written. */
static uint64_t check_overflow(struct gpu_world *world)
{
    struct gpu_shape shape = small_shape(world->num_ranks);
    struct gpu_case *c = gpu_case_create(world, &shape);
    uint32_t last = world->num_ranks - 1;
    gpu_case_draw(c, 0);
    if (world->rank == last) {
        c->out.capacity = c->want[last].num_rows - 1;
    }
    gpu_case_dispatch(c);
    uint64_t wrong = expect(c, NEP_CUDA_STATUS(NEP_CUDA_OVERFLOW, NEP_CUDA_PHASE_COUNTS, last),
                            "output too small");
    uint32_t row[128];
    char *window = world->base + world->rank * world->stride;
    cudaMemcpy(row, window + c->out.x, sizeof row, cudaMemcpyDeviceToHost);
    for (uint32_t i = 0; i < 128; i++) {
        wrong += row[i] != 0xeeeeeeeeu;
    }
    gpu_case_destroy(c);
    return wrong;
}

/* An id out of range is named by its index. */
static uint64_t check_bad_id(struct gpu_world *world)
{
    struct gpu_shape shape = small_shape(world->num_ranks);
    struct gpu_case *c = gpu_case_create(world, &shape);
    const int32_t bad = (int32_t)shape.num_experts;
    gpu_case_draw(c, 0);
    cudaMemcpy((int32_t *)c->ids_device + 77, &bad, 4, cudaMemcpyHostToDevice);
    gpu_must(nep_cuda_layout(&c->dispatch, world->stream) != NEP_OK, nep_last_message());
    uint64_t wrong = expect(c, NEP_CUDA_STATUS(NEP_CUDA_BAD_ID, NEP_CUDA_PHASE_LAYOUT, 77),
                            "an id that does not exist");
    gpu_case_destroy(c);
    return wrong;
}

/* Padded layout, every id the same: more rows for a slot than a source has room for. */
static uint64_t check_crowded(struct gpu_world *world)
{
    struct gpu_shape shape = small_shape(world->num_ranks);
    shape.layout = NEP_LAYOUT_EXPERT_PADDED;
    struct gpu_case *c = gpu_case_create(world, &shape);
    gpu_case_draw(c, 0);
    cudaMemset(c->ids_device, 0, shape.max_tokens * shape.top_k * 4);
    cudaDeviceSynchronize();
    gpu_world_meet(world);
    gpu_case_dispatch(c);
    uint64_t wrong =
        expect(c, NEP_CUDA_STATUS(NEP_CUDA_OVERFLOW, NEP_CUDA_PHASE_COUNTS, 0), "a crowded slot");
    gpu_case_destroy(c);
    return wrong;
}

static uint64_t run_faults(struct gpu_world *world, void *ctx)
{
    (void)ctx;
    return check_absent(world) + check_overflow(world) + check_bad_id(world) + check_crowded(world);
}

static int check_faults(void)
{
    uint64_t wrong = 0;
    for (uint32_t ranks = 2; ranks <= 4; ranks++) {
        wrong += gpu_world_run(ranks, MAX_WINDOW, false, run_faults, NULL);
    }
    printf("faults: absent rank, short output, bad id, crowded slot, with 2, 3 and 4 ranks: %llu "
           "wrong\n",
           (unsigned long long)wrong);
    return wrong != 0;
}

static int check_refusal(void)
{
    int num = -1;
    cudaError_t error = cudaGetDeviceCount(&num);
    if (error == cudaSuccess && num > 0) {
        printf("refusal: %d GPUs here; nothing to refuse\n", num);
        return nep_cuda_load() != NEP_OK;
    }
    printf("no GPU here: %s; tests/gpu look at the refusal alone\n", cudaGetErrorString(error));
    return !(nep_cuda_load() == NEP_ERR_IO && strstr(nep_last_message(), "CUDA says") != NULL);
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == 2 && strcmp(argv[1], "refusal") == 0) {
        return check_refusal();
    }
    if (argc == 2 && strcmp(argv[1], "faults") == 0) {
        return check_faults();
    }
    if (argc == 6 && strcmp(argv[1], "random") == 0) {
        return check_random(strcmp(argv[2], "processes") == 0, (uint32_t)atoi(argv[3]),
                            strtoull(argv[4], NULL, 0), (uint32_t)atoi(argv[5]));
    }
    fprintf(stderr, "usage: gpu_check refusal | faults | random threads|processes RANKS SEED "
                    "COUNT\n");
    return 2;
}
