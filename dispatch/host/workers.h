/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A pool of threads for loops over chunks. What a chunk is depends on the caller's arithmetic
 * alone, never on the number of threads, so that results are the same bits with any pool.
 */
#ifndef NEP_DISPATCH_HOST_WORKERS_H
#define NEP_DISPATCH_HOST_WORKERS_H

#include <stdint.h>

#include "base/status.h"

#define NEP_WORKERS_MAX 256

struct nep_workers;

/* Work on one chunk: never waits for another chunk; ends with a kernel's fence if it streamed. */
typedef void (*nep_chunk_fn)(void *ctx, uint32_t chunk_idx);

/*
 * num_threads (NEP_THREADS) counts the caller: 1, 0 and UINT32_MAX (auto) start none, and
 * nep_workers_run is then a plain loop.
 * spin: looks of an idle worker before it sleeps; 0 where ranks outnumber cores. The workers block
 * all signals.
 */
enum nep_status nep_workers_create(uint32_t num_threads, uint32_t spin,
                                   struct nep_workers **workers_p);
/* Ends and joins them: at once, for an idle worker holds nothing. After fork() it only frees. */
void nep_workers_destroy(struct nep_workers *workers);

/*
 * Calls fn once for each chunk in [0, num_chunks), on the caller and the workers, in any order, and
 * returns when all are done; what they wrote is then visible. Any thread: while another's loop has
 * the pool, or in a forked child, or with workers NULL, the caller does all of its chunks itself.
 * Waits at most for chunks that workers have begun.
 */
void nep_workers_run(struct nep_workers *workers, nep_chunk_fn fn, void *ctx, uint32_t num_chunks);

/* Threads that share a loop, the caller included: 1 for NULL. */
uint32_t nep_workers_num_threads(const struct nep_workers *workers);

#endif
