/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a rank needs to take part over several nodes, computed from the shape alone: the region of
 * the fabric (its words and, staged, its tiles lie in pinned memory), the area that ranks of a node
 * share on the GPU, and a handle's tables. No CUDA here: it is tested everywhere.
 */
#ifndef NEP_DISPATCH_CUDA_FAR_PLAN_H
#define NEP_DISPATCH_CUDA_FAR_PLAN_H

#include "dispatch/cuda/cuda_fabric.h"
#include "dispatch/region.h"

struct nep_far_plan {
    struct nep_shape shape; /* the ep's, with slots, tiles and numbers beside rows as kernels use */
    struct nep_plan plan;   /* points to that shape: not to be copied */
    uint64_t words_bytes;   /* of the window that the fabric knows; equal on all ranks */
    /* the area on the GPU: words and COUNTS of this node, then rows that are staged */
    uint64_t near_bytes;
    struct nep_far_output out; /* where rows for an output that is not mapped arrive */
    /* where expert outputs are copied to that are not, and the weights beside them: areas of y_rows
     * rows, one for each operation that may be outstanding, so far apart */
    uint64_t y;
    uint64_t y_weights;
    uint64_t y_rows;
    uint64_t y_step;
    uint64_t y_weights_step;
};

/* topology must outlive it. Refuses what kernels of several nodes cannot do, with a sentence. */
enum nep_status nep_far_plan_init(struct nep_far_plan *far, const struct nep_shape *shape,
                                  const struct nep_topology *topology, uint64_t staging_bytes);
void nep_far_plan_fini(struct nep_far_plan *far);

/* The tables of struct nep_far_routing, at `memory` (NULL: only counted). Returns their bytes. */
uint64_t nep_far_plan_handle(const struct nep_far_plan *far, uint32_t rank, char *memory,
                             struct nep_far_routing *routing);

/* The tables of struct nep_far that are numbers: as nep_far_plan_handle, in memory of the host. */
struct nep_far_tables {
    uint32_t *node_of_rank;
    uint32_t *local_of_rank;
    uint32_t *node_first;
    uint32_t *node_rank;
    uint32_t *landing;
    uint32_t *lane;
    uint32_t *lane_source;
    uint32_t *control;
    struct nep_region *regions;
};
uint64_t nep_far_plan_tables(const struct nep_far_plan *far, char *memory,
                             struct nep_far_tables *tables);
void nep_far_plan_fill_tables(const struct nep_far_plan *far, uint32_t rank,
                              const struct nep_far_tables *tables);

/* Ranks of other nodes that this one sends to or hears from; returns how many. peers: [R]. */
uint32_t nep_far_plan_peers(const struct nep_far_plan *far, uint32_t rank, uint32_t *peers);

#endif
