/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Ranks on one GPU: threads of one process, each with a stream, or processes (under MPS) that map
 * each other's memory from VMM allocations passed as file descriptors. Either way rank r's window
 * is at base + r * stride. CUDA must not have been used by the calling process before processes
 * are asked for.
 */
#ifndef NEP_TESTS_GPU_WORLD_H
#define NEP_TESTS_GPU_WORLD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct gpu_shared;

struct gpu_world {
    uint32_t num_ranks;
    uint32_t rank;
    char *base;
    uint64_t stride;
    struct gpu_shared *shared;
    struct CUstream_st *stream;
};

/* Returns the number of wrong things that this rank saw. */
typedef uint64_t (*gpu_rank_fn)(struct gpu_world *world, void *ctx);

/* Runs fn as every rank; the sum of what they return, and 1 for each that did not end well. */
uint64_t gpu_world_run(uint32_t num_ranks, uint64_t window_bytes, bool as_processes, gpu_rank_fn fn,
                       void *ctx);
/* All ranks; ends the process after a minute without the others. */
void gpu_world_meet(struct gpu_world *world);
/* All ranks: the greatest value. */
double gpu_world_max(struct gpu_world *world, double value);

/* Prints and ends the process: for set-up that must not fail. */
void gpu_must(int error, const char *what);

#endif
