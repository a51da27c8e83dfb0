/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What every rank sends in every iteration, computable on any rank: ids, weights, inputs, the slots
 * chosen. A batch is one dispatch: iteration * S + position; warm-up iterations count, from 0.
 */
#ifndef NEP_PERFTEST_PLAN_H
#define NEP_PERFTEST_PLAN_H

#include "nearep.h"
#include "perftest/options.h"
#include "placement/placement.h"
#include "tests/ref/ref.h"

struct nep_perf_plan;

/* Exit status, or -1: go on. Reads map and trace; options get E and K of the trace. */
int nep_perf_plan_create(struct nep_perf_options *options, const struct nep_topology *topology,
                         struct nep_perf_plan **plan_p);
void nep_perf_plan_destroy(struct nep_perf_plan *plan);

const struct nep_map *nep_perf_plan_map(const struct nep_perf_plan *plan); /* NULL: contiguous */
uint32_t nep_perf_plan_num_layers(const struct nep_perf_plan *plan);       /* of the routing */
/* The layer of a batch: of the routing, and of the map (0 when it has one). */
uint32_t nep_perf_plan_layer(const struct nep_perf_plan *plan, uint64_t batch);
uint32_t nep_perf_plan_map_layer(const struct nep_perf_plan *plan, uint64_t batch);

/* Rank's own part of a batch: ids and weights [T][K]. Returns T: --tokens, or 0 for a rank that no
 * request of a trace runs on. */
uint32_t nep_perf_plan_routing(const struct nep_perf_plan *plan, uint32_t rank, uint64_t batch,
                               int32_t *ids, float *weights);
void nep_perf_plan_row(const struct nep_perf_plan *plan, uint32_t rank, uint64_t batch,
                       uint32_t token, void *row);
/* Slots of a rank's own tokens, [T][K]. */
void nep_perf_plan_slots(const struct nep_perf_plan *plan, uint32_t rank, uint64_t batch,
                         const int32_t *ids, uint32_t num_tokens, uint32_t *slots);
/* The whole group of a batch, for the oracle; valid until the next call. all: of every rank, else
 * of `rank` alone. */
const struct nep_ref_group *nep_perf_plan_group(struct nep_perf_plan *plan, uint64_t batch,
                                                bool all, uint32_t rank);
/* [R] ranks that live, from now on: others bring no tokens, and their experts are lost. */
void nep_perf_plan_set_live(struct nep_perf_plan *plan, const uint8_t *is_live);
/* NULL, or the rule that the slots of the batch at hand break. */
const char *nep_perf_plan_check_choice(const struct nep_perf_plan *plan, uint32_t rank);
/* Rows to other nodes in timed iterations as nep-place eval predicts them; false: no trace. */
bool nep_perf_plan_predicted_rows(const struct nep_perf_plan *plan, uint64_t *rows_p);
/* Most output rows of any rank in any batch. */
uint64_t nep_perf_plan_max_rows(struct nep_perf_plan *plan);

#endif
