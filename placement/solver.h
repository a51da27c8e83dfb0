/* SPDX-License-Identifier: Apache-2.0 */
/* The solver's state, shared by solve.c (the course of it), start.c (first placement), intra.c
 * (ranks inside a node) and warm.c (the course from a running map). */
#ifndef NEP_PLACEMENT_SOLVER_H
#define NEP_PLACEMENT_SOLVER_H

#include "placement/cover.h"
#include "placement/map.h"
#include "placement/parallel.h"
#include "placement/rng.h"

/* From a running map: few copies move, and they are soon found. */
#define NEP_WARM_MAX_TOKENS 4096u
/* Rows that a copy may cost for each pair that it takes off a node above its limit. */
#define NEP_LOAD_PRICE 2.0

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
/* How many of them are worth a search each. */
uint32_t nep_start_count(const struct nep_solver *solver);
/* Spreads the copies of each node over its ranks and writes layer->entries. */
enum nep_status nep_intra_place(const struct nep_solver *solver, struct nep_solver_layer *layer,
                                uint32_t layer_idx);
/* solver->warm with the copies moved that save most, at most solver->max_moves; into the layers'
 * entries. */
enum nep_status nep_solve_warm(struct nep_solver *solver);

/* Writes the solver's homes into a sample. */
void nep_solver_set_homes(const struct nep_solver *s, struct nep_sets *sets);
/* Rows that each request would cost from each home, with the layer's copies: into layer->cost. */
enum nep_status nep_solver_cost_homes(const struct nep_solver *s, struct nep_solver_layer *layer);
/* New homes from the costs of all layers. */
enum nep_status nep_solver_assign_homes(struct nep_solver *s);
/* Runs one step over all layers and says how far the solve is. */
enum nep_status nep_solver_step(struct nep_solver *s, nep_job_fn fn, void *ctx, double done);

#endif
