/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Ranks of nep-perf ep whose tokens are in GPU memory (--executor cuda). The arrays of a lane stay
 * on the host, where they are filled and checked; here are their twins on the device, and times
 * from CUDA events. Without CUDA in the build, nep_perf_gpu_probe refuses.
 */
#ifndef NEP_PERFTEST_GPU_H
#define NEP_PERFTEST_GPU_H

#include "perftest/rank.h"

/* Whether there is a GPU, found out in a child process: this one may fork later. -1: there is. */
int nep_perf_gpu_probe(void);

struct nep_perf_gpu;
/* Bytes of the pool that the twins of one lane take. */
uint64_t nep_perf_gpu_bytes(const struct nep_perf_rank *rank);
/* After ep and lanes. -1: go on; failures leave their sentence in nep_last_message. */
enum nep_status nep_perf_gpu_create(struct nep_perf_rank *rank);
void nep_perf_gpu_destroy(struct nep_perf_rank *rank);
/* Inputs and poisoned outputs to the device; what dispatch left to the host; expert outputs to the
 * device; what combine left to the host. */
enum nep_status nep_perf_gpu_upload(struct nep_perf_rank *rank);
enum nep_status nep_perf_gpu_fetch_rows(struct nep_perf_rank *rank);
enum nep_status nep_perf_gpu_put_experts(struct nep_perf_rank *rank);
enum nep_status nep_perf_gpu_fetch_results(struct nep_perf_rank *rank);
/* The calls, timed on the device from the first kernel to the last. */
enum nep_status nep_perf_gpu_dispatch(struct nep_perf_rank *rank, uint64_t *ns_p);
enum nep_status nep_perf_gpu_combine(struct nep_perf_rank *rank, uint64_t *ns_p);

#endif
