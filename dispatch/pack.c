/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One row per (token, destination node), in tiles. Ordinary copies: the bytes are read again at
 * once, by the fabric.
 */
#include "dispatch/pack.h"

#include <string.h>

void nep_pack_meta(const struct nep_ep *ep, const struct nep_handle *handle, uint32_t node,
                   uint32_t first, uint32_t num, void *meta)
{
    const struct nep_topology *topology = ep->plan.topology;
    uint32_t top_k = ep->shape.top_k;
    uint32_t slots_per_rank = ep->shape.slots_per_rank;
    const uint32_t *tokens = handle->node_tokens + handle->node_begin[node] + first;
    for (uint32_t i = 0; i < num; i++) {
        uint8_t *row = (uint8_t *)meta + (uint64_t)i * ep->shape.meta_bytes;
        uint16_t *slots = nep_meta_slots(row);
        memcpy(row, &tokens[i], sizeof tokens[i]);
        slots[top_k - 1 + top_k % 2] = NEP_META_NONE; /* the pad of an odd K */
        uint64_t at = (uint64_t)tokens[i] * top_k;
        for (uint32_t k = 0; k < top_k; k++) {
            uint32_t slot = handle->slots[at + k];
            slots[k] = NEP_META_NONE;
            if (slot != NEP_SLOT_NONE && ep->slot_at[slot].node == node) {
                uint32_t rank = ep->slot_at[slot].rank;
                slots[k] = (uint16_t)(topology->local_of_rank[rank] * slots_per_rank + slot -
                                      rank * slots_per_rank);
            }
        }
        memcpy(nep_meta_weights(row, top_k), handle->weights + at, top_k * sizeof(float));
    }
}

struct nep_wire_row nep_pack_input(const struct nep_ep *ep, const struct nep_handle *handle,
                                   uint32_t token)
{
    const struct nep_tokens *in = &handle->op.in;
    const struct nep_wire *format = &ep->shape.format;
    bool is_cast = format->scale_bytes != 0 && in->scales == NULL;
    uint64_t stride = is_cast ? format->in_bytes : format->payload_bytes;
    return (struct nep_wire_row){
        .x = (const uint8_t *)in->x + token * stride,
        .scales = in->scales != NULL
                      ? (const uint8_t *)in->scales + (uint64_t)token * format->scale_bytes
                      : NULL,
    };
}

void nep_pack_rows(const struct nep_ep *ep, const struct nep_handle *handle, uint32_t node,
                   uint32_t first, uint32_t num, void *rows)
{
    const uint32_t *tokens = handle->node_tokens + handle->node_begin[node] + first;
    for (uint32_t i = 0; i < num; i++) {
        struct nep_wire_row row = nep_pack_input(ep, handle, tokens[i]);
        nep_wire_pack(&ep->shape.format, ep->kernels, &row,
                      (uint8_t *)rows + (uint64_t)i * ep->shape.wire_row_bytes);
    }
    ep->kernels->fence();
}

/* Packs the next tile for `node` into its send slot and posts it. */
static enum nep_status send_tile(struct nep_ep *ep, struct nep_handle *handle, uint32_t node,
                                 uint32_t num, uint8_t *slot)
{
    struct nep_flow *flow = &ep->dispatch_flows[node];
    uint32_t num_slots = ep->shape.tile_slots;
    struct nep_tile_msg msg = {
        .op = handle->op.number,
        .number = flow->next,
        .source = ep->rank,
        .kind = NEP_KIND_DISPATCH,
        .first_row = handle->rows_sent[node],
        .num_rows = num,
    };
    uint32_t payload = nep_tile_payload_offset(&ep->shape, NEP_KIND_DISPATCH, num);
    memcpy(slot, &msg, sizeof msg);
    nep_pack_meta(ep, handle, node, handle->rows_sent[node], num, slot + sizeof msg);
    nep_pack_rows(ep, handle, node, handle->rows_sent[node], num, slot + payload);

    const struct nep_region *there = &ep->plan.regions[flow->dst];
    uint64_t idx =
        (uint64_t)nep_plan_lane(&ep->plan, ep->rank, node) * num_slots + flow->next % num_slots;
    uint64_t offset = there->dispatch_landing + idx * there->dispatch_tile_bytes;
    uint32_t imm =
        nep_imm(ep->head->generation, NEP_KIND_DISPATCH, ep->number, handle->op.number, flow->next);
    handle->rows_sent[node] += num;
    flow->next++;
    /* Before the put: a credit for this tile must find it sent. */
    nep_word_set(ep->head, ep->region->dispatch_sent, node, flow->next);
    ep->stats.remote_rows += num;
    return nep_send_post(ep, flow->ring, flow->dst, offset,
                         payload + (uint64_t)num * ep->shape.wire_row_bytes, imm);
}

/* The next tile for a node, if there is one and it may go. */
static enum nep_status send_to_node(struct nep_ep *ep, struct nep_handle *handle, uint32_t node,
                                    bool *progress_p)
{
    struct nep_flow *flow = &ep->dispatch_flows[node];
    uint32_t total = handle->node_begin[node + 1] - handle->node_begin[node];
    if (nep_rides(ep, total) || handle->rows_sent[node] == total) {
        return NEP_OK;
    }
    uint64_t credit = nep_word_get(ep->head, ep->region->dispatch_credit, node);
    uint8_t *slot = NULL;
    if (!nep_flow_may_send(flow, credit, ep->shape.tile_slots)) {
        nep_ep_miss(ep, "credit", flow->dst, total, handle->rows_sent[node]);
    } else {
        slot = nep_send_slot(ep, flow->ring);
        if (slot == NULL) {
            nep_ep_miss(ep, "local completion", flow->dst, total, handle->rows_sent[node]);
        }
    }
    enum nep_status status = NEP_OK;
    if (slot != NULL) {
        uint32_t left = total - handle->rows_sent[node];
        uint32_t num = left < ep->shape.tile_rows ? left : ep->shape.tile_rows;
        status = send_tile(ep, handle, node, num, slot);
        *progress_p = true;
    }
    if (handle->rows_sent[node] < total) {
        handle->op.is_sent = false;
    }
    return status;
}

/* A tile for each node in turn, beginning with the neighbour, so that not all send to node 0 first.
 */
enum nep_status nep_pack_send(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p)
{
    uint32_t num_nodes = ep->plan.topology->num_nodes;
    enum nep_status status = NEP_OK;
    bool is_moving = true;
    while (status == NEP_OK && is_moving) {
        is_moving = false;
        handle->op.is_sent = true;
        for (uint32_t i = 1; status == NEP_OK && i < num_nodes; i++) {
            status = send_to_node(ep, handle, (ep->node + i) % num_nodes, &is_moving);
        }
        *progress_p |= is_moving;
        if (is_moving) {
            nep_send_turn(ep);
        }
    }
    return status;
}
