/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Cursors: one row of counters per source, advanced as its rows are walked. A rank that only
 * receives advances those of its own slots; a rank that also sums for a source advances all of its
 * node's.
 */
#include "dispatch/positions.h"

#include <string.h>

#include "dispatch/counts.h"
#include "dispatch/wait.h"

static uint32_t node_slots(const struct nep_ep *ep)
{
    return ep->node_size * ep->shape.slots_per_rank;
}

/* Rank layout: a rank's rows by source. */
static void place_by_rank(struct nep_ep *ep, struct nep_handle *handle)
{
    uint32_t stride = node_slots(ep);
    for (uint32_t g = 0; g < ep->node_size; g++) {
        uint32_t end = 0;
        for (uint32_t s = 0; s < ep->plan.topology->num_ranks; s++) {
            handle->cursor[(uint64_t)s * stride + g] = end;
            end += nep_counts_rows_per_rank(nep_counts_taken(ep, s))[g];
        }
        if (g == ep->local) {
            handle->num_rows = handle->num_real_rows = end;
        }
    }
}

/* Expert layouts, packed: slots one after the other, aligned, or each at a place of its own; inside
 * by source. */
static void place_packed(struct nep_ep *ep, struct nep_handle *handle)
{
    uint32_t num_ranks = ep->plan.topology->num_ranks;
    uint32_t stride = node_slots(ep);
    uint32_t align = ep->shape.alignment;
    bool is_front = ep->shape.layout == NEP_LAYOUT_EXPERT_FRONT;
    uint32_t room =
        ep->plan.num_seats * ep->shape.max_tokens; /* shape.c: that times the slots fits */
    /* Totals per slot into the row of source 0, which is overwritten last. */
    uint32_t *first = handle->cursor;
    for (uint32_t s = 0; s < num_ranks; s++) {
        const uint32_t *rows = nep_counts_rows_per_slot(ep, nep_counts_taken(ep, s));
        for (uint32_t i = 0; i < stride; i++) {
            first[i] = (s == 0 ? 0 : first[i]) + rows[i];
        }
    }
    for (uint32_t g = 0; g < ep->node_size; g++) {
        uint32_t end = 0;
        for (uint32_t l = 0; l < ep->shape.slots_per_rank; l++) {
            uint32_t *at = &first[g * ep->shape.slots_per_rank + l];
            uint32_t total = *at;
            *at = is_front ? l * room : (end + align - 1) / align * align;
            end = *at + total;
        }
        if (g == ep->local) {
            handle->num_rows =
                is_front ? ep->shape.slots_per_rank * room : (end + align - 1) / align * align;
        }
    }
    for (uint32_t s = 1; s < num_ranks; s++) {
        const uint32_t *rows = nep_counts_rows_per_slot(ep, nep_counts_taken(ep, s - 1));
        uint32_t *cursor = handle->cursor + (uint64_t)s * stride;
        for (uint32_t i = 0; i < stride; i++) {
            cursor[i] = cursor[i - (int64_t)stride] + rows[i];
        }
    }
}

static void place_padded(struct nep_ep *ep, struct nep_handle *handle)
{
    uint32_t num_seats = ep->plan.num_seats;
    uint32_t slots = ep->shape.slots_per_rank;
    uint32_t stride = node_slots(ep);
    for (uint32_t s = 0; s < ep->plan.topology->num_ranks; s++) {
        for (uint32_t i = 0; i < stride; i++) {
            handle->cursor[(uint64_t)s * stride + i] =
                (i % slots * num_seats + nep_ep_name(ep, s)) * ep->shape.max_tokens;
        }
    }
    handle->num_rows = (uint64_t)slots * num_seats * ep->shape.max_tokens;
}

static void count_own(struct nep_ep *ep, struct nep_handle *handle)
{
    uint32_t slots = ep->shape.slots_per_rank;
    uint32_t stride = node_slots(ep);
    bool is_rank_layout = ep->shape.layout == NEP_LAYOUT_RANK;
    memset(handle->rows_per_slot, 0, slots * sizeof *handle->rows_per_slot);
    uint64_t pairs = 0;
    for (uint32_t s = 0; s < ep->plan.topology->num_ranks; s++) {
        const struct nep_counts_msg *msg = nep_counts_taken(ep, s);
        const uint32_t *rows = nep_counts_rows_per_slot(ep, msg) + ep->local * slots;
        uint32_t here = 0;
        for (uint32_t l = 0; l < slots; l++) {
            handle->rows_per_slot[l] += rows[l];
            here += rows[l];
        }
        pairs += here;
        handle->rows_per_source[nep_ep_name(ep, s)] =
            is_rank_layout ? nep_counts_rows_per_rank(msg)[ep->local] : here;
        handle->rows_expected[s] = msg->num_rows;
        handle->rows_read[s] = 0;
        handle->producers[s].num_rows = 0;
        handle->producers[s].first = handle->cursor[(uint64_t)s * stride + ep->local];
    }
    for (uint32_t l = 0; l < slots; l++) {
        handle->first_row[l] = is_rank_layout ? 0 : handle->cursor[ep->local * slots + l];
    }
    if (!is_rank_layout) {
        handle->num_real_rows = pairs;
    }
    for (uint32_t c = 0; c < 1 + ep->region->num_lanes; c++) {
        handle->consumers[c].num_rows = 0;
        handle->consumers[c].begin[0] = 0;
    }
}

void nep_positions_from_counts(struct nep_ep *ep, struct nep_handle *handle)
{
    switch (ep->shape.layout) {
    case NEP_LAYOUT_RANK:
        place_by_rank(ep, handle);
        break;
    case NEP_LAYOUT_EXPERT_PADDED:
        place_padded(ep, handle);
        break;
    default:
        place_packed(ep, handle);
        break;
    }
    count_own(ep, handle);
}

/* ---- walking -------------------------------------------------------------------------------- */

static enum nep_status contradiction(struct nep_ep *ep, const struct nep_handle *handle,
                                     uint32_t source, const char *what)
{
    struct nep_fault fault = {
        .size = sizeof fault,
        .status = NEP_ERR_FORMAT,
        .rank = source,
        .op = handle->op.number,
        .phase = "rows",
    };
    snprintf(fault.message, sizeof fault.message,
             "operation %llu: the rows of rank %u contradict its COUNTS: %s",
             (unsigned long long)handle->op.number, nep_ep_name(ep, source), what);
    return nep_break(ep, &fault);
}

/* A token's rows on this node: (position, local rank, weight), k ascending. */
struct found {
    uint32_t seat; /* of their source, as callers know it */
    uint32_t num;
    struct nep_addend rows[NEP_MAX_TOP_K];
    int32_t slots[NEP_MAX_TOP_K]; /* rank layout: slots of this rank by k, -1 elsewhere */
};

/* Expert layouts: every (token, k) is a row. False: a slot that this node does not have. */
static bool find_by_slot(const struct nep_ep *ep, uint32_t *cursor, const uint16_t *slots,
                         const float *weights, bool is_consumer, struct found *found)
{
    uint32_t num_slots = node_slots(ep);
    found->num = 0;
    for (uint32_t k = 0; k < ep->shape.top_k; k++) {
        uint32_t slot = slots[k];
        if (slot == NEP_META_NONE) {
            continue;
        }
        if (slot >= num_slots) {
            return false;
        }
        uint16_t local = ep->slot_local[slot];
        if (is_consumer || local == ep->local) {
            found->rows[found->num++] =
                (struct nep_addend){cursor[slot]++, local, 0, (uint8_t)k, weights[k]};
        }
    }
    return true;
}

/* Rank layout: a row per rank. */
static bool find_by_rank(const struct nep_ep *ep, uint32_t *cursor, const uint16_t *slots,
                         bool is_consumer, struct found *found)
{
    uint32_t num_slots = node_slots(ep);
    found->num = 0;
    for (uint32_t k = 0; k < ep->shape.top_k; k++) {
        uint32_t slot = slots[k];
        found->slots[k] = -1;
        if (slot == NEP_META_NONE) {
            continue;
        }
        if (slot >= num_slots) {
            return false;
        }
        uint16_t local = ep->slot_local[slot];
        if (local == ep->local) {
            found->slots[k] = (int32_t)(slot - ep->local * ep->shape.slots_per_rank);
        } else if (!is_consumer) {
            continue;
        }
        uint32_t i = 0;
        while (i < found->num && found->rows[i].local != local) {
            i++;
        }
        if (i == found->num) {
            found->rows[found->num++] = (struct nep_addend){cursor[local]++, local, 0, 0, 1.0f};
        }
    }
    return true;
}

/* Appends a token to a consumer: addends by local rank, k ascending inside. */
static void add_consumer_row(struct nep_consumer *consumer, const struct found *found)
{
    uint32_t row = consumer->num_rows++;
    uint32_t begin = consumer->begin[row];
    struct nep_addend *to = consumer->addends + begin;
    for (uint32_t i = 0; i < found->num; i++) {
        uint32_t at = i;
        for (; at > 0 && to[at - 1].local > found->rows[i].local; at--) {
            to[at] = to[at - 1];
        }
        to[at] = found->rows[i];
    }
    for (uint32_t i = 0; i < found->num; i++) {
        to[i].is_last = i + 1 == found->num || to[i + 1].local != to[i].local;
    }
    consumer->begin[row + 1] = begin + found->num;
}

/* Fills the caller's arrays for one row of this rank. */
static void fill_row(const struct nep_ep *ep, const struct nep_rows *out, uint32_t pos,
                     uint32_t token, const struct found *found, uint32_t i, const float *weights)
{
    if (out->source_rank != NULL) {
        out->source_rank[pos] = found->seat;
    }
    if (out->source_token != NULL) {
        out->source_token[pos] = token;
    }
    if (ep->shape.layout != NEP_LAYOUT_RANK) {
        if (out->topk_weights != NULL) {
            out->topk_weights[pos] = found->rows[i].weight;
        }
        return;
    }
    uint64_t at = (uint64_t)pos * ep->shape.top_k;
    for (uint32_t k = 0; k < ep->shape.top_k; k++) {
        if (out->topk_slots != NULL) {
            out->topk_slots[at + k] = found->slots[k];
        }
        if (out->topk_weights != NULL) {
            out->topk_weights[at + k] = found->slots[k] >= 0 ? weights[k] : 0.0f;
        }
    }
}

/* This rank's share of a token: arrays, the row itself, the producer's table. False: no room. */
static bool take_own(struct nep_ep *ep, struct nep_handle *handle, uint32_t source, uint32_t token,
                     const struct found *found, const float *weights, const uint8_t *row)
{
    const struct nep_rows *out = &handle->op.out;
    struct nep_producer *producer = &handle->producers[source];
    struct nep_wire_places places;
    uint32_t num = 0;
    uint32_t fill = producer->begin != NULL ? producer->begin[producer->num_rows] : 0;
    for (uint32_t i = 0; i < found->num; i++) {
        uint32_t pos = found->rows[i].pos;
        if (found->rows[i].local != ep->local) {
            continue;
        }
        if (pos >= handle->num_rows) {
            return false;
        }
        fill_row(ep, out, pos, token, found, i, weights);
        places.x[num] = (uint8_t *)out->x + (uint64_t)pos * ep->shape.format.payload_bytes;
        places.scales[num] = nep_wire_scales_at(&ep->shape.format, out->scales, pos, out->capacity);
        if (producer->begin != NULL) {
            producer->pos[fill + num] = pos;
            producer->weight[fill + num] = found->rows[i].weight;
        }
        num++;
    }
    if (num == 0) {
        return true;
    }
    producer->num_rows++;
    if (producer->begin != NULL) {
        producer->begin[producer->num_rows] = fill + num;
    }
    if (row != NULL) {
        struct nep_wire_row from = nep_wire_row_at(&ep->shape.format, row);
        places.num = num;
        nep_wire_push(&ep->shape.format, ep->kernels, &from, &places, NULL);
        ep->stats.intra_bytes += (uint64_t)num * ep->shape.wire_row_bytes;
    }
    return true;
}

enum nep_status nep_positions_walk(struct nep_ep *ep, struct nep_handle *handle, uint32_t source,
                                   const void *meta, uint32_t num,
                                   const struct nep_payload *payload)
{
    uint32_t top_k = ep->shape.top_k;
    uint32_t idx = nep_consumer_idx(ep, ep->rank, source);
    struct nep_consumer *consumer = idx != UINT32_MAX ? &handle->consumers[idx] : NULL;
    uint32_t *cursor = handle->cursor + (uint64_t)source * node_slots(ep);
    struct found found;
    found.seat = nep_ep_name(ep, source);
    for (uint32_t i = 0; i < num; i++) {
        uint8_t *row = (uint8_t *)meta + (uint64_t)i * ep->shape.meta_bytes;
        const uint16_t *slots = nep_meta_slots(row);
        const float *weights = nep_meta_weights(row, top_k);
        uint32_t token;
        memcpy(&token, row, sizeof token);
        bool is_known = ep->shape.layout == NEP_LAYOUT_RANK
                            ? find_by_rank(ep, cursor, slots, consumer != NULL, &found)
                            : find_by_slot(ep, cursor, slots, weights, consumer != NULL, &found);
        if (!is_known || token >= ep->shape.max_tokens) {
            return contradiction(ep, handle, source, "a token or slot that does not exist");
        }
        if (consumer != NULL) {
            add_consumer_row(consumer, &found);
        }
        const uint8_t *from = payload->base;
        if (from != NULL) {
            from += (payload->by_token ? token : i) * payload->stride;
        }
        if (!take_own(ep, handle, source, token, &found, weights, from)) {
            return contradiction(ep, handle, source, "a row beyond the end of the output");
        }
    }
    return NEP_OK;
}
