/* SPDX-License-Identifier: Apache-2.0 */
/* A few moves of copies on a running layer: what the online corrector and a warm solve are made of.
 */
#ifndef NEP_PLACEMENT_ADJUST_H
#define NEP_PLACEMENT_ADJUST_H

#include "placement/cover.h"
#include "placement/map.h"

#define NEP_SLOT_EMPTY UINT32_MAX

struct nep_adjust_params {
    const struct nep_map_shape *shape;
    const struct nep_sets *sets; /* of experts, homes set */
    double max_imbalance;        /* node loads above this times the mean are overload */
    double price;                /* rows that a pair of overload is worth */
    double least_gain;           /* rows that a moved copy must bring */
    uint32_t max_moves;          /* copies that may move; a swap is two */
};

/* expert_of_slot: [num_ranks * slots_per_rank], changed in place. *moved_p: slots that changed. */
enum nep_status nep_adjust_layer(const struct nep_adjust_params *params, uint32_t *expert_of_slot,
                                 uint32_t *moved_p);
/* The same for many moves: a turn takes whatever gains `least` rows per copy moved, until nothing
 * does or `most` copies have moved. params: without its least_gain and max_moves; its sets, shape
 * and the table stay the caller's and must outlive it. */
struct nep_adjust;
enum nep_status nep_adjust_create(const struct nep_adjust_params *params, uint32_t *expert_of_slot,
                                  struct nep_adjust **adjust_p);
enum nep_status nep_adjust_turn(struct nep_adjust *adjust, double least, uint32_t most,
                                uint32_t *moved_p);
void nep_adjust_destroy(struct nep_adjust *adjust);
/* The copies of a layer, one per expert and node; the list must have room for every slot. */
void nep_adjust_copies(const struct nep_map *map, uint32_t layer, struct nep_layer_copies *list);
/* The table of a layer, and a map of the tables of all layers ([num_layers][slots]). Weights are
 * those of `map` for copies that stay. */
void nep_adjust_table(const struct nep_map *map, uint32_t layer, uint32_t *expert_of_slot);
enum nep_status nep_adjust_build(const struct nep_map *map, const uint32_t *tables,
                                 struct nep_map **map_p);

#endif
