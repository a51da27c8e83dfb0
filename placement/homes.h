/* SPDX-License-Identifier: Apache-2.0 */
/* Where the requests of a trace run: one home node each, under a limit on tokens per node. */
#ifndef NEP_PLACEMENT_HOMES_H
#define NEP_PLACEMENT_HOMES_H

#include "placement/placement.h"

/* A node takes at most this much more than its share of the tokens (by ranks). */
#define NEP_HOMES_SLACK 0.05

/* Some requests of a trace, in order. idx == NULL: all. */
struct nep_requests {
    const struct nep_trace *trace;
    const uint32_t *idx;
    uint32_t num;
};

static inline uint32_t nep_requests_at(const struct nep_requests *requests, uint32_t i)
{
    return requests->idx == NULL ? i : requests->idx[i];
}

/* What is asked of an assignment of requests to nodes. */
struct nep_homes_params {
    uint32_t num_requests;
    uint32_t num_nodes;
    const uint32_t *ranks_per_node;
    const uint64_t *tokens; /* [num_requests]: what a request weighs */
    const float *cost;      /* [num_requests][num_nodes] */
};

/* All of a trace. */
struct nep_requests nep_requests_all(const struct nep_trace *trace);

/* Uniform draws among the nodes with room. homes: [requests->num]. */
enum nep_status nep_homes_random(const struct nep_requests *requests,
                                 const struct nep_map_shape *shape, uint64_t seed, uint32_t *homes);
/* From the signature part of each request and the map alone: the fewest remote nodes under the
 * limit. */
enum nep_status nep_homes_predict(const struct nep_requests *requests, const struct nep_map *map,
                                  uint32_t *homes);
/* The same from the scored part: an oracle, for reference. */
enum nep_status nep_homes_oracle(const struct nep_requests *requests, const struct nep_map *map,
                                 uint32_t *homes);
/* Least total cost under the limit, by regret, then moves and swaps that improve. homes: out. */
enum nep_status nep_homes_assign(const struct nep_homes_params *params, uint32_t *homes);

#endif
