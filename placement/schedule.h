/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which tokens of a trace enter at which rank in which iteration: one text for nep-perf, which
 * sends them, and for nep-place eval, which predicts the rows. The scored tokens of a request enter
 * at a rank of its home, ranks of a node in turn by request; iteration i (warm-up counts, from 0)
 * takes the next T tokens of each rank, wrapping; the layer is `layer`, or i modulo the layers.
 */
#ifndef NEP_PLACEMENT_SCHEDULE_H
#define NEP_PLACEMENT_SCHEDULE_H

#include "placement/homes.h"

#define NEP_SCHEDULE_ALL_LAYERS (-1)

struct nep_schedule;

/* homes: [requests->num], copied. The trace must outlive the schedule. */
enum nep_status nep_schedule_create(const struct nep_requests *requests, const uint32_t *homes,
                                    const struct nep_map_shape *shape, int layer,
                                    struct nep_schedule **schedule_p);
void nep_schedule_destroy(struct nep_schedule *schedule);
/* Scored tokens that enter at this rank before it wraps; 0: this rank never has tokens. */
uint64_t nep_schedule_length(const struct nep_schedule *schedule, uint32_t rank);
uint32_t nep_schedule_layer(const struct nep_schedule *schedule, uint64_t iteration);
/* ids: [num_tokens][top_k], -1 = none. Returns how many tokens: num_tokens, or 0. */
uint32_t nep_schedule_ids(const struct nep_schedule *schedule, uint32_t rank, uint64_t iteration,
                          uint32_t num_tokens, int32_t *ids);
/* The rows that dispatch sends to other nodes in these iterations, by the map: one per (token,
 * remote node). */
enum nep_status nep_schedule_remote_rows(const struct nep_schedule *schedule,
                                         const struct nep_map *map, uint32_t num_tokens,
                                         uint64_t first_iteration, uint64_t num_iterations,
                                         uint64_t *rows_p);

#endif
