/* SPDX-License-Identifier: Apache-2.0 */
/* Ids from a recorded trace, in the schedule that nep-place eval uses too. */
#ifndef NEP_PERFTEST_TRACE_ROUTING_H
#define NEP_PERFTEST_TRACE_ROUTING_H

#include "nearep.h"
#include "perftest/options.h"

struct nep_perf_trace;

/* Sets options' experts and top_k. Exit status, or -1. */
int nep_perf_trace_open(struct nep_perf_options *options, const struct nep_topology *topology,
                        struct nep_perf_trace **trace_p);
/* Which request runs where. Exit status, or -1. */
int nep_perf_trace_schedule(struct nep_perf_trace *trace, const struct nep_map *map);
void nep_perf_trace_close(struct nep_perf_trace *trace);
uint32_t nep_perf_trace_num_layers(const struct nep_perf_trace *trace);
uint32_t nep_perf_trace_layer(const struct nep_perf_trace *trace, uint64_t batch);
/* ids: [num_tokens][K]. Returns num_tokens, or 0 for a rank that no request runs on. */
uint32_t nep_perf_trace_ids(const struct nep_perf_trace *trace, uint32_t rank, uint64_t batch,
                            uint32_t num_tokens, int32_t *ids);

/* What nep-place eval predicts: rows to other nodes of batches [first, first + num), all ranks. */
enum nep_status nep_perf_trace_remote_rows(const struct nep_perf_trace *trace,
                                           const struct nep_map *map, uint64_t first, uint64_t num,
                                           uint64_t *rows_p);

#endif
