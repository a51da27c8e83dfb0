/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Ranks on one GPU: threads of one process, each with a stream, or processes (under MPS). Every
 * rank gets a bootstrap for its communicator. CUDA must not have been used by the calling process
 * before processes are asked for.
 */
#ifndef NEP_TESTS_GPU_WORLD_H
#define NEP_TESTS_GPU_WORLD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nearep.h"

struct gpu_shared;

struct gpu_world {
    uint32_t num_ranks;
    uint32_t num_nodes; /* of equal size, emulated */
    uint32_t rank;
    struct gpu_shared *shared;
    struct CUstream_st *stream;
    struct nep_comm *comm;
};

/* Returns the number of wrong things that this rank saw. */
typedef uint64_t (*gpu_rank_fn)(struct gpu_world *world, void *ctx);

/*
 * Runs fn as every rank; the sum of what they return, and 1 for each that did not end well. timeout
 * 0: 60 s. A rank that fn ends with gpu_world_leave counts as nothing wrong.
 */
uint64_t gpu_world_run(uint32_t num_ranks, uint32_t num_nodes, bool as_processes,
                       uint64_t timeout_ns, gpu_rank_fn fn, void *ctx);
/* All ranks; ends the process after a minute without the others. */
void gpu_world_meet(struct gpu_world *world);
/* All ranks: the greatest value. */
double gpu_world_max(struct gpu_world *world, double value);
/* Processes: this rank is gone at once, as if killed. */
void gpu_world_leave(void);

/* Prints and ends the process: for set-up that must not fail. */
void gpu_must(int error, const char *what);
/* The same for calls of the library. */
void gpu_must_nep(enum nep_status status, const char *what);

#endif
