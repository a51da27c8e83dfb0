/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copies of experts on nodes: which copy each token of a sample takes, what one more copy would
 * save, and the search for the copies that save most.
 */
#ifndef NEP_PLACEMENT_COVER_H
#define NEP_PLACEMENT_COVER_H

#include "placement/sets.h"

/* The copies of one layer, at the level of nodes. */
struct nep_layer_copies {
    uint32_t num;
    uint32_t cap;
    uint16_t *expert; /* [cap] */
    uint16_t *node;   /* [cap] */
};

struct nep_cover_params {
    const struct nep_sets *sets; /* of experts, homes set */
    uint32_t num_nodes;
    const uint32_t *slots; /* [num_nodes] */
    const double *limit;   /* [num_nodes] load in pairs of the sample */
    double price;          /* rows that one pair above a limit is worth */
    double soft_share;     /* as in nep_swap_params */
    double soft_price;
};

struct nep_cover {
    struct nep_cover_params params;
    uint8_t *has;         /* [E][N] */
    uint16_t *list;       /* [E][N]: the nodes of the copies, the first num_copies[e] are valid */
    uint32_t *num_copies; /* [E] */
    uint32_t *used;       /* [N] slots taken */
    uint16_t *assigned;   /* [T][width] the node each item goes to */
    float *gain;          /* [E][N] rows saved by one more copy */
    float *moved;         /* [E][N] pairs that it would draw */
    double *load;         /* [N] pairs */
    uint64_t cost;        /* rows to remote nodes */
    uint32_t *stamp;      /* [N] scratch */
    uint32_t now;
};

enum nep_status nep_cover_init(struct nep_cover *cover, const struct nep_cover_params *params,
                               const struct nep_layer_copies *copies);
void nep_cover_fini(struct nep_cover *cover);
/* Fills free slots with the copies that save most; stops when no copy saves anything. */
void nep_cover_fill(struct nep_cover *cover);
/* Replaces copies (of experts with several) by better ones, at most `passes` times over all. */
void nep_cover_improve(struct nep_cover *cover, uint32_t passes);
void nep_cover_add(struct nep_cover *cover, uint32_t expert, uint32_t node);
void nep_cover_remove(struct nep_cover *cover, uint32_t expert, uint32_t node);
/* Rows, with the loads above their limits at their price. */
double nep_cover_total(const struct nep_cover *cover);
/* The copy that is worth most on a node with a free slot, not of expert `but`; 0.0: none is worth
 * anything. */
double nep_cover_best(const struct nep_cover *cover, uint32_t node, uint32_t but,
                      uint32_t *expert_p);
/* Back to a list; copies must have room. */
void nep_cover_get(const struct nep_cover *cover, struct nep_layer_copies *copies);
/* Adds, for every token, the remote nodes from each possible home: cost[request][node]. */
void nep_cover_home_costs(struct nep_cover *cover, uint32_t *cost);

enum nep_status nep_layer_copies_init(struct nep_layer_copies *copies, uint32_t cap);
void nep_layer_copies_fini(struct nep_layer_copies *copies);

#endif
