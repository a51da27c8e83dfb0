/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Distinct ranks and nodes of a token are found with stamps: one word per rank or node that holds
 * the last token that counted there. No set is cleared between tokens, and the cost does not grow
 * with R or N.
 */
#include "dispatch/layout.h"

#include <stdlib.h>
#include <string.h>

#include "dispatch/ep.h"

enum nep_status nep_layout_init(struct nep_layout_tables *layout, uint32_t num_ranks,
                                uint32_t num_nodes, uint32_t slots_per_rank)
{
    layout->rank_rows = calloc(num_ranks, sizeof *layout->rank_rows);
    layout->node_rows = calloc(num_nodes, sizeof *layout->node_rows);
    layout->slot_rows = calloc((size_t)num_ranks * slots_per_rank, sizeof *layout->slot_rows);
    layout->rank_stamp = calloc(num_ranks, sizeof *layout->rank_stamp);
    layout->node_stamp = calloc(num_nodes, sizeof *layout->node_stamp);
    if (layout->rank_rows == NULL || layout->node_rows == NULL || layout->slot_rows == NULL ||
        layout->rank_stamp == NULL || layout->node_stamp == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "ep: no memory for the counts of %u ranks of %u slots",
                        num_ranks, slots_per_rank);
    }
    return NEP_OK;
}

void nep_layout_fini(struct nep_layout_tables *layout)
{
    free(layout->rank_rows);
    free(layout->node_rows);
    free(layout->slot_rows);
    free(layout->rank_stamp);
    free(layout->node_stamp);
}

/* One token's ids as 32-bit numbers; false with *bad_p = the first k out of range. */
static bool take_ids(const struct nep_tokens *in, uint32_t token, uint32_t top_k,
                     uint32_t num_experts, int32_t *ids, uint32_t *bad_p)
{
    uint64_t first = (uint64_t)token * top_k;
    for (uint32_t k = 0; k < top_k; k++) {
        int64_t id = in->id_type == NEP_IDS_INT64 ? ((const int64_t *)in->topk_ids)[first + k]
                                                  : ((const int32_t *)in->topk_ids)[first + k];
        if (id < -1 || id >= (int64_t)num_experts) {
            *bad_p = k;
            return false;
        }
        ids[k] = (int32_t)id;
    }
    return true;
}

/* Ids of experts that no rank holds any more count as unused. */
static void drop_lost(const uint8_t *is_lost, int32_t *ids, uint32_t top_k)
{
    for (uint32_t k = 0; k < top_k; k++) {
        ids[k] = ids[k] >= 0 && is_lost[ids[k]] != 0 ? -1 : ids[k];
    }
}

enum nep_status nep_route(const struct nep_ep *ep, const struct nep_map_version *map,
                          const struct nep_tokens *in, uint32_t *slots)
{
    const struct nep_shape *shape = &ep->shape;
    const struct nep_copies *copies = &map->copies[in->layer];
    const uint8_t *is_lost =
        map->is_lost != NULL ? map->is_lost + (size_t)in->layer * shape->num_experts : NULL;
    for (uint32_t t = 0; t < in->num_tokens; t++) {
        int32_t ids[NEP_MAX_TOP_K];
        uint32_t bad = 0;
        if (!take_ids(in, t, shape->top_k, shape->num_experts, ids, &bad)) {
            uint64_t at = (uint64_t)t * shape->top_k + bad;
            long long id = in->id_type == NEP_IDS_INT64 ? ((const int64_t *)in->topk_ids)[at]
                                                        : ((const int32_t *)in->topk_ids)[at];
            return nep_fail(NEP_ERR_INVALID,
                            "topk_ids[%u][%u] is %lld; it must be -1 (unused) or 0 to %u", t, bad,
                            id, shape->num_experts - 1);
        }
        if (is_lost != NULL) {
            drop_lost(is_lost, ids, shape->top_k);
        }
        nep_choose(copies, ep->rank, t, ids, shape->top_k, slots + (uint64_t)t * shape->top_k);
    }
    return NEP_OK;
}

void nep_route_count(const struct nep_tokens *in, uint32_t top_k, uint64_t *load)
{
    uint64_t pairs = (uint64_t)in->num_tokens * top_k;
    for (uint64_t i = 0; i < pairs; i++) {
        int64_t id = in->id_type == NEP_IDS_INT64 ? ((const int64_t *)in->topk_ids)[i]
                                                  : ((const int32_t *)in->topk_ids)[i];
        if (id >= 0) {
            load[id]++;
        }
    }
}

void nep_layout_count(struct nep_ep *ep, const uint32_t *slots, uint32_t num_tokens,
                      uint8_t *is_token_in_rank)
{
    struct nep_layout_tables *layout = &ep->layout;
    uint32_t num_ranks = ep->plan.topology->num_ranks;
    uint32_t num_nodes = ep->plan.topology->num_nodes;
    uint32_t top_k = ep->shape.top_k;
    memset(layout->rank_rows, 0, num_ranks * sizeof *layout->rank_rows);
    memset(layout->node_rows, 0, num_nodes * sizeof *layout->node_rows);
    memset(layout->slot_rows, 0,
           (size_t)num_ranks * ep->shape.slots_per_rank * sizeof *layout->slot_rows);
    memset(layout->rank_stamp, 0, num_ranks * sizeof *layout->rank_stamp);
    memset(layout->node_stamp, 0, num_nodes * sizeof *layout->node_stamp);
    if (is_token_in_rank != NULL) {
        memset(is_token_in_rank, 0, (size_t)num_tokens * num_ranks);
    }
    for (uint32_t t = 0; t < num_tokens; t++) {
        for (uint32_t k = 0; k < top_k; k++) {
            uint32_t slot = slots[(uint64_t)t * top_k + k];
            if (slot == NEP_SLOT_NONE) {
                continue;
            }
            struct nep_slot_at at = ep->slot_at[slot];
            layout->slot_rows[slot]++;
            layout->rank_rows[at.rank] += layout->rank_stamp[at.rank] != t + 1;
            layout->node_rows[at.node] += layout->node_stamp[at.node] != t + 1;
            layout->rank_stamp[at.rank] = t + 1;
            layout->node_stamp[at.node] = t + 1;
            if (is_token_in_rank != NULL) {
                is_token_in_rank[(uint64_t)t * num_ranks + at.rank] = 1;
            }
        }
    }
}

void nep_layout_lists(struct nep_ep *ep, struct nep_handle *handle)
{
    struct nep_layout_tables *layout = &ep->layout;
    uint32_t num_nodes = ep->plan.topology->num_nodes;
    uint32_t top_k = ep->shape.top_k;
    uint32_t end = 0;
    for (uint32_t n = 0; n < num_nodes; n++) {
        handle->node_begin[n] = end;
        end += layout->node_rows[n];
        layout->node_rows[n] = handle->node_begin[n]; /* a cursor for the loop below */
        layout->node_stamp[n] = 0;
    }
    handle->node_begin[num_nodes] = end;
    for (uint32_t t = 0; t < handle->num_tokens; t++) {
        for (uint32_t k = 0; k < top_k; k++) {
            uint32_t slot = handle->slots[(uint64_t)t * top_k + k];
            uint32_t node = slot == NEP_SLOT_NONE ? 0 : ep->slot_at[slot].node;
            if (slot != NEP_SLOT_NONE && layout->node_stamp[node] != t + 1) {
                layout->node_stamp[node] = t + 1;
                handle->node_tokens[layout->node_rows[node]++] = t;
            }
        }
    }
    for (uint32_t n = 0; n < num_nodes; n++) {
        layout->node_rows[n] = handle->node_begin[n + 1] - handle->node_begin[n];
    }
}
