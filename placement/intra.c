/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Ranks inside a node: the same search one level down. Tokens are cut down to the copies that they
 * use on this node, there is no home, and the objective is distinct ranks per token, because each
 * costs a row over NVLink or shared memory. The start is longest-processing-time packing, which
 * balances; swaps then bring together what fires together without leaving the balance.
 */
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "placement/solver.h"
#include "placement/swap.h"

/* A rank has few experts, so its limit is wider than a node's: with the node's own limit hardly any
 * swap is allowed, and ranks end neither balanced nor near. */
#define RANK_SLACK 1.1

/* The copies of one node, and the tokens' needs in terms of them. */
struct node_part {
    uint32_t node;
    uint32_t num_items;
    uint16_t *item_of_copy; /* [copies->num] or UINT16_MAX */
    uint32_t *copy_of_item; /* [num_items] */
    double *weight;         /* [slots of the node] */
    uint16_t *group;        /* [slots of the node] rank within the node */
    double *limit;          /* [ranks of the node] */
    struct nep_sets sets;
};

static void part_fini(struct node_part *part)
{
    free(part->item_of_copy);
    free(part->copy_of_item);
    free(part->weight);
    free(part->group);
    free(part->limit);
    nep_sets_fini(&part->sets);
}

/* Tokens of the sample with at least two copies used on the node. */
static enum nep_status cut_tokens(struct node_part *part, const struct nep_cover *cover)
{
    const struct nep_sets *all = cover->params.sets;
    enum nep_status status =
        nep_sets_init(&part->sets, all->num_tokens, part->num_items, all->width);
    if (status != NEP_OK) {
        return status;
    }
    uint32_t num = 0;
    for (uint32_t t = 0; t < all->num_tokens; t++) {
        uint16_t *items = &part->sets.items[(size_t)num * all->width];
        uint8_t len = 0;
        for (uint32_t i = 0; i < all->len[t]; i++) {
            size_t at = (size_t)t * all->width + i;
            if (cover->assigned[at] == part->node) {
                /* item_of_copy is indexed by expert here: one copy of an expert per node. */
                uint16_t item = part->item_of_copy[all->items[at]];
                part->weight[item] += 1.0;
                items[len++] = item;
            }
        }
        part->sets.len[num] = len;
        part->sets.home[num] = NEP_NO_HOME;
        num += len >= 2;
    }
    part->sets.num_tokens = num;
    return nep_sets_index(&part->sets);
}

/* Heaviest first, each to the lightest rank with a free slot. */
static enum nep_status pack(struct node_part *part, uint32_t ranks, uint32_t slots_per_rank)
{
    uint32_t slots = ranks * slots_per_rank;
    uint32_t *used = calloc(ranks, sizeof *used);
    double *load = calloc(ranks, sizeof *load);
    uint8_t *is_done = calloc((size_t)slots + 1, 1);
    if (used == NULL || load == NULL || is_done == NULL) {
        free(used);
        free(load);
        free(is_done);
        return nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u slots", slots);
    }
    for (uint32_t step = 0; step < slots; step++) {
        uint32_t item = UINT32_MAX;
        for (uint32_t i = 0; i < slots; i++) {
            if (!is_done[i] && (item == UINT32_MAX || part->weight[i] > part->weight[item])) {
                item = i;
            }
        }
        uint32_t rank = UINT32_MAX;
        for (uint32_t r = 0; r < ranks; r++) {
            if (used[r] < slots_per_rank && (rank == UINT32_MAX || load[r] < load[rank])) {
                rank = r;
            }
        }
        is_done[item] = 1;
        part->group[item] = (uint16_t)rank;
        used[rank]++;
        load[rank] += part->weight[item];
    }
    free(used);
    free(load);
    free(is_done);
    return NEP_OK;
}

static enum nep_status search(struct node_part *part, const struct nep_solver *solver,
                              uint32_t ranks, uint64_t seed)
{
    uint32_t slots = ranks * solver->shape.slots_per_rank;
    double total = 0.0;
    for (uint32_t i = 0; i < slots; i++) {
        total += part->weight[i];
    }
    for (uint32_t r = 0; r < ranks; r++) {
        part->limit[r] = RANK_SLACK * solver->max_imbalance * total / ranks;
    }
    const struct nep_swap_params params = {.sets = &part->sets,
                                           .num_slots = slots,
                                           .num_groups = ranks,
                                           .weight = part->weight,
                                           .limit = part->limit,
                                           .price = 8.0};
    struct nep_swap swap;
    enum nep_status status = nep_swap_init(&swap, &params, part->group);
    if (status != NEP_OK) {
        return status;
    }
    struct nep_rng rng = nep_rng_seed(seed);
    nep_swap_run(&swap, &rng, solver->max_proposals, solver->deadline_ns);
    memcpy(part->group, swap.group, slots * sizeof *part->group);
    nep_swap_fini(&swap);
    return NEP_OK;
}

static void write_entries(const struct node_part *part, const struct nep_solver *solver,
                          struct nep_solver_layer *layer, uint32_t layer_idx, uint32_t first_rank)
{
    uint32_t ranks = solver->shape.ranks_per_node[part->node];
    uint32_t slots_per_rank = solver->shape.slots_per_rank;
    for (uint32_t r = 0; r < ranks; r++) {
        uint32_t slot = (first_rank + r) * slots_per_rank;
        for (uint32_t i = 0; i < part->num_items; i++) {
            if (part->group[i] == r) {
                layer->entries[layer->num_entries++] = (struct nep_map_entry){
                    layer_idx, layer->copies.expert[part->copy_of_item[i]], slot++, 1, 0};
            }
        }
    }
}

static enum nep_status place_node(const struct nep_solver *solver, struct nep_solver_layer *layer,
                                  const struct nep_cover *cover, uint32_t layer_idx, uint32_t node,
                                  uint32_t first_rank)
{
    uint32_t ranks = solver->shape.ranks_per_node[node];
    uint32_t slots = ranks * solver->shape.slots_per_rank;
    struct node_part part = {.node = node};
    part.item_of_copy = malloc(solver->shape.num_experts * sizeof *part.item_of_copy);
    part.copy_of_item = malloc(((size_t)slots + 1) * sizeof *part.copy_of_item);
    part.weight = calloc((size_t)slots + 1, sizeof *part.weight);
    part.group = calloc((size_t)slots + 1, sizeof *part.group);
    part.limit = calloc(ranks, sizeof *part.limit);
    enum nep_status status = NEP_OK;
    if (part.item_of_copy == NULL || part.copy_of_item == NULL || part.weight == NULL ||
        part.group == NULL || part.limit == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u slots", slots);
        goto out;
    }
    for (uint32_t c = 0; c < layer->copies.num; c++) {
        if (layer->copies.node[c] == node) {
            part.item_of_copy[layer->copies.expert[c]] = (uint16_t)part.num_items;
            part.copy_of_item[part.num_items++] = c;
        }
    }
    if (ranks > 1) {
        status = cut_tokens(&part, cover);
        if (status == NEP_OK) {
            status = pack(&part, ranks, solver->shape.slots_per_rank);
        }
        if (status == NEP_OK) {
            status =
                search(&part, solver, ranks, solver->seed ^ ((uint64_t)layer_idx << 20) ^ node);
        }
    }
    if (status == NEP_OK) {
        write_entries(&part, solver, layer, layer_idx, first_rank);
    }
out:
    part_fini(&part);
    return status;
}

enum nep_status nep_intra_place(const struct nep_solver *solver, struct nep_solver_layer *layer,
                                uint32_t layer_idx)
{
    const struct nep_cover_params params = {.sets = &layer->sets,
                                            .num_nodes = solver->shape.num_nodes,
                                            .slots = solver->slots,
                                            .limit = layer->limit};
    struct nep_cover cover;
    enum nep_status status = nep_cover_init(&cover, &params, &layer->copies);
    uint32_t first_rank = 0;
    layer->num_entries = 0;
    if (status != NEP_OK) {
        return status;
    }
    for (uint32_t n = 0; n < solver->shape.num_nodes && status == NEP_OK; n++) {
        status = place_node(solver, layer, &cover, layer_idx, n, first_rank);
        first_rank += solver->shape.ranks_per_node[n];
    }
    nep_cover_fini(&cover);
    return status;
}
