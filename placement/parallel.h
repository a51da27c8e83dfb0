/* SPDX-License-Identifier: Apache-2.0 */
/* Independent jobs over a few threads. */
#ifndef NEP_PLACEMENT_PARALLEL_H
#define NEP_PLACEMENT_PARALLEL_H

#include "nearep.h"

typedef enum nep_status (*nep_job_fn)(void *ctx, uint32_t job);

/* Runs jobs 0 to num_jobs - 1, each once, on at most num_threads threads (the caller's included).
 * Returns the failure of the lowest job, with its message; the others still run. */
enum nep_status nep_parallel_run(uint32_t num_threads, uint32_t num_jobs, nep_job_fn fn, void *ctx);

#endif
