/* SPDX-License-Identifier: Apache-2.0 */
/* What a map and homes cost on requests: the scored tokens routed as nep_choose would. */
#ifndef NEP_PLACEMENT_SCORE_H
#define NEP_PLACEMENT_SCORE_H

#include "placement/homes.h"

struct nep_score {
    double remote_nodes_per_token; /* mean over scored tokens and layers */
    double ranks_per_token;        /* distinct ranks, own included */
    double local_share;            /* (token, layer) pairs that leave their node not at all */
    double imbalance_node;         /* max/mean (token, expert) pairs, mean over layers */
    double imbalance_rank;
    uint64_t num_tokens; /* scored */
};

/* Optional details; arrays are the caller's, zeroed by it, may be NULL. */
struct nep_score_details {
    double *remote_of_layer; /* [num_layers] remote nodes per token */
    uint64_t *traffic;       /* [num_nodes][num_nodes] rows from home to node, all layers */
    uint64_t *rank_load;     /* [num_layers][num_ranks] pairs */
};

/* homes: [requests->num]. A request enters at a rank of its home, ranks in turn. */
enum nep_status nep_score_map(const struct nep_requests *requests, const struct nep_map *map,
                              const uint32_t *homes, struct nep_score *score_p,
                              const struct nep_score_details *details);
/* Mean over `draws` draws of random homes, seeds from `seed` on. */
enum nep_status nep_score_random_homes(const struct nep_requests *requests,
                                       const struct nep_map *map, uint32_t draws, uint64_t seed,
                                       struct nep_score *score_p);

/* Most loaded over mean of one layer, nodes and ranks each held against their share of the ranks.
 */
void nep_score_imbalance(const struct nep_map_shape *shape, const uint64_t *rank_load,
                         double *node_p, double *rank_p);

#endif
