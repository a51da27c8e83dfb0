/* SPDX-License-Identifier: Apache-2.0 */
/* The inside of a map, for the files of this folder. */
#ifndef NEP_PLACEMENT_MAP_H
#define NEP_PLACEMENT_MAP_H

#include <stdatomic.h>

#include "placement/placement.h"

/* Bounds that keep every product of sizes in 64 bits and a table of slots in memory. */
#define NEP_MAP_MAX_LAYERS  65536u
#define NEP_MAP_MAX_EXPERTS 65536u
#define NEP_MAP_MAX_RANKS   65536u
#define NEP_MAP_MAX_SLOTS   (1u << 20) /* of the whole group, a layer */

struct nep_map {
    atomic_uint refs;
    struct nep_map_shape shape;
    uint32_t *ranks_per_node; /* [num_nodes] */
    uint32_t *node_of_rank;   /* [num_ranks] */
    size_t *first;            /* [num_layers + 1]: where a layer's copies start */
    uint32_t *begin;          /* [num_layers][num_experts + 1], relative to first */
    uint32_t *slot;
    uint32_t *node;
    uint16_t *weight;
    uint8_t *is_single; /* [num_layers] */
    uint64_t digest;
    int is_truncated;
};

/* One copy: what a file's line lists and what solvers produce. */
struct nep_map_entry {
    uint32_t layer;
    uint32_t expert;
    uint32_t slot; /* physical */
    uint16_t weight;
    uint32_t line; /* of the file it came from, for messages; 0: none */
};

/* Completes slots_per_rank and checks sizes; ranks_per_node stays the caller's. */
enum nep_status nep_map_check_shape(struct nep_map_shape *shape);
/* Sorts the entries and makes a map of them. Refuses missing experts, slots used twice or out of
 * range, with the numbers. */
enum nep_status nep_map_build(const struct nep_map_shape *shape, struct nep_map_entry *entries,
                              size_t num_entries, struct nep_map **map_p);

#endif
