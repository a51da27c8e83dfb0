/* SPDX-License-Identifier: Apache-2.0 */
/* The solver's state, shared by solve.c (the course of it), start.c (first placement) and intra.c
 * (ranks inside a node). */
#ifndef NEP_PLACEMENT_SOLVER_H
#define NEP_PLACEMENT_SOLVER_H

#include "placement/cover.h"
#include "placement/map.h"
#include "placement/rng.h"

struct nep_solver_layer {
    struct nep_sets sets;           /* of experts */
    struct nep_layer_copies copies; /* the placement so far */
    double *load;                   /* [num_experts] pairs of the sample */
    uint32_t *cost;                 /* [num_requests][num_nodes] rows from each possible home */
    double *limit;                  /* [num_nodes] pairs */
    struct nep_map_entry *entries;  /* [num_slots] the result */
    uint32_t num_entries;
};

struct nep_solver {
    struct nep_requests requests;
    struct nep_map_shape shape;
    uint32_t *slots; /* [num_nodes] of the node's ranks together */
    uint32_t
        *base_slots;  /* [num_nodes] for first copies; all of `slots` where there are no replicas */
    uint32_t *homes;  /* [num_requests] */
    uint64_t *tokens; /* [num_requests] */
    struct nep_solver_layer *layers;
    double max_imbalance;
    uint64_t seed;
    uint32_t num_threads;
    uint32_t stride;
    int is_whole;           /* the sample is of whole requests: their scored parts are few tokens */
    uint32_t drawn_homes;   /* percent of the sample's tokens that have a home drawn at random */
    uint64_t max_proposals; /* a layer and round */
    uint64_t deadline_ns;   /* UINT64_MAX: none */
    uint64_t start_ns;
    uint64_t max_moves; /* with warm */
    const struct nep_map *warm;
    void (*progress)(void *ctx, double done, uint64_t eta_ns);
    void *progress_ctx;
    int has_replicas;
};

/* The method of arXiv 2604.23150 as far as it is known: clusters of requests and the first
 * placement under the same limits, nothing after. A baseline. */
enum nep_status nep_solve_paper(const struct nep_trace *trace,
                                const struct nep_solve_params *params, struct nep_map **map_p);
/* First placement of a layer's experts on nodes, for the homes: by who is served where, under the
 * limits on slots and load; or, where tokens are scarce, by who fires together. */
enum nep_status nep_start_place(const struct nep_solver *solver, struct nep_solver_layer *layer,
                                uint64_t seed, int is_paper);
/* Spreads the copies of each node over its ranks and writes layer->entries. */
enum nep_status nep_intra_place(const struct nep_solver *solver, struct nep_solver_layer *layer,
                                uint32_t layer_idx);

#endif
