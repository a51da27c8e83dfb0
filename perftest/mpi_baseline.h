/* SPDX-License-Identifier: Apache-2.0 */
/* Dispatch and combine with MPI_Alltoallv, as one would write them with care today. */
#ifndef NEP_PERFTEST_MPI_BASELINE_H
#define NEP_PERFTEST_MPI_BASELINE_H

#include "perftest/rank.h"
#include "perftest/results.h"

struct nep_perf_mpi;

/* Collective. NULL: said already. Uses the rank's plan and topology, nothing of the library. */
struct nep_perf_mpi *nep_perf_mpi_create(struct nep_perf_rank *rank);
void nep_perf_mpi_destroy(struct nep_perf_mpi *mpi);
/* As nep_perf_rank_block: the same batches, times and barriers. */
int nep_perf_mpi_block(struct nep_perf_mpi *mpi, uint32_t warmup, uint32_t iters);
/* Samples so far and wrong elements. */
void nep_perf_mpi_results(const struct nep_perf_mpi *mpi, struct nep_perf_baseline *baseline);

/* ---- mpi_kernels.c: chosen at run time, like the library's own ---- */

struct nep_perf_kernels {
    /* acc += weight * row */
    void (*axpy)(float *acc, const uint16_t *row, float weight, uint32_t num);
    /* acc = weight * row */
    void (*scale)(float *acc, const uint16_t *row, float weight, uint32_t num);
    void (*store)(const float *acc, uint16_t *row, uint32_t num);
    /* Rates of memory: reads all, returns something; writes rows past the caches. */
    uint64_t (*read)(const uint64_t *words, size_t num);
    void (*fill)(uint64_t *words, size_t num, const uint64_t *row, size_t row_words);
};
const struct nep_perf_kernels *nep_perf_kernels(void);

#endif
