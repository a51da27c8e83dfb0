/* SPDX-License-Identifier: Apache-2.0 */
/*
 * usage: gpu_perf RANKS SMS TOKENS bf16|fp8 rank|expert mapped|private
 * Figures of the library's calls with ranks as processes (start MPS before). Hidden 7168, top-8 of
 * 256. Whole operations one after the other in a CUDA graph, each waiting for all ranks. A time is
 * the slowest rank's, of the median of several replays; GB/s are bytes that a rank receives
 * (dispatch) or rows that it reads (combine), scales included. Every element is checked before the
 * timing. fp8: the caller brings fp8 rows and fp32 scales. private: inputs, outputs and expert
 * outputs lie in memory that peers do not map.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/gpu_case.h"

enum { REPLAYS = 7 };

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a;
    float y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Microseconds of one operation, of this rank. */
static double time_ops(struct gpu_case *c, void (*ops)(struct gpu_case *), int num)
{
    struct gpu_world *world = c->world;
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    cudaEvent_t begin;
    cudaEvent_t end;
    float ms[REPLAYS];
    gpu_must((int)cudaStreamBeginCapture(world->stream, cudaStreamCaptureModeThreadLocal),
             "capture");
    for (int i = 0; i < num; i++) {
        ops(c);
    }
    gpu_must((int)cudaStreamEndCapture(world->stream, &graph), "capture");
    gpu_must((int)cudaGraphInstantiate(&exec, graph, 0), "graph");
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    for (int i = -1; i < REPLAYS; i++) {
        float time = 0;
        gpu_world_meet(world);
        cudaEventRecord(begin, world->stream);
        gpu_must((int)cudaGraphLaunch(exec, world->stream), "graph");
        cudaEventRecord(end, world->stream);
        gpu_must((int)cudaStreamSynchronize(world->stream), "graph");
        cudaEventElapsedTime(&time, begin, end);
        double slowest = gpu_world_max(world, time);
        if (i >= 0) {
            ms[i] = (float)slowest;
        }
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    qsort(ms, REPLAYS, sizeof ms[0], by_value);
    return ms[REPLAYS / 2] * 1000.0 / num;
}

/* Slots and counts alone, as DeepEP's get_dispatch_layout; rows per rank and slot, is_in. */
static void one_layout(struct gpu_case *c)
{
    const struct nep_layout_counts counts = {.size = sizeof counts, .stream = c->world->stream};
    gpu_must_nep(nep_ep_layout(c->ep, &c->in, &counts), "layout");
}

static uint64_t run(struct gpu_world *world, void *ctx)
{
    const struct gpu_shape *shape = ctx;
    struct gpu_case *c = gpu_case_create(world, shape);
    uint64_t wrong = gpu_case_round(c, 0);
    wrong = (uint64_t)gpu_world_max(world, (double)wrong);
    int num = shape->max_tokens > 1024 ? 10 : 50;
    double dispatch = time_ops(c, gpu_case_dispatch, num);
    double combine = time_ops(c, gpu_case_combine, num);
    double layout = time_ops(c, one_layout, 50);
    struct nep_fault fault;
    gpu_must_nep(nep_comm_fault(world->comm, &fault), "fault");
    double status = gpu_world_max(world, (double)(fault.status != NEP_OK));
    double received = 0;
    double read = 0;
    for (uint32_t r = 0; r < shape->num_ranks; r++) {
        double rows = (double)c->want[r].num_real_rows / shape->num_ranks;
        const struct nep_wire *wire = &c->wire;
        received += rows * (wire->payload_bytes + wire->scale_bytes);
        read += rows * shape->hidden * 2;
    }
    if (world->rank == 0) {
        printf("%u ranks x %u tokens, %2u SMs, %s, %s layout, %s: dispatch %8.1f us %5.0f GB/s, "
               "combine %8.1f us %5.0f GB/s, layout %5.1f us; wrong %llu, given up %.0f\n",
               shape->num_ranks, shape->max_tokens, shape->num_sms,
               shape->is_cast_before ? "fp8 " : "bf16",
               shape->layout == NEP_LAYOUT_RANK ? "rank" : "expert",
               shape->is_x_private ? "private" : "mapped", dispatch, received / dispatch * 1e-3,
               combine, read / combine * 1e-3, layout, (unsigned long long)wrong, status);
    }
    gpu_case_destroy(c);
    return wrong + (uint64_t)status;
}

int main(int argc, char **argv)
{
    if (argc != 7) {
        fprintf(stderr, "usage: gpu_perf RANKS SMS TOKENS bf16|fp8 rank|expert mapped|private\n");
        return 2;
    }
    uint32_t ranks = (uint32_t)atoi(argv[1]);
    bool is_fp8 = strcmp(argv[4], "fp8") == 0;
    bool is_private = strcmp(argv[6], "private") == 0;
    struct gpu_shape shape = {
        .key = 1,
        .num_ranks = ranks,
        .slots_per_rank = 256 / ranks,
        .num_experts = 256 / ranks * ranks,
        .top_k = 8,
        .hidden = 7168,
        .max_tokens = (uint32_t)atoi(argv[3]),
        .num_sms = (uint32_t)atoi(argv[2]),
        .layout = strcmp(argv[5], "rank") == 0 ? NEP_LAYOUT_RANK : NEP_LAYOUT_EXPERT_PACKED,
        .dtype = NEP_DTYPE_BF16,
        .wire = is_fp8 ? NEP_DTYPE_FP8_E4M3 : NEP_DTYPE_BF16,
        .is_cast_before = is_fp8,
        .has_weights = true,
        .is_full = true,
        .is_x_private = is_private,
        .is_out_private = is_private,
        .is_y_private = is_private,
    };
    return gpu_world_run(ranks, 1, true, 0, run, &shape) != 0;
}
