/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The receiving side of a dispatch. Every rank of a node reads all rows that came to its node, from
 * where they landed, takes its share and stores each row once, at its final place. Nobody forwards.
 */
#include "dispatch/recv.h"

#include <string.h>

#include "dispatch/counts.h"
#include "dispatch/pack.h"
#include "dispatch/positions.h"
#include "dispatch/wait.h"

void nep_recv_bind(struct nep_ep *ep, struct nep_handle *handle)
{
    const struct nep_rows *out = &handle->op.out;
    const struct nep_wire *format = &ep->shape.format;
    struct nep_place rows = {0}, scales = {0};
    uint64_t scale_rows = format->scale_columns != 0 ? out->capacity : handle->num_rows;
    bool is_mapped =
        nep_buffers_find(ep, out->x, handle->num_rows * format->payload_bytes, &rows) &&
        (format->scale_bytes == 0 ||
         nep_buffers_find(ep, out->scales, nep_wire_scales_bytes(format, scale_rows), &scales));
    struct nep_bind *bind = (struct nep_bind *)((uint8_t *)ep->head + ep->region->out_bind) +
                            handle->op.number % ep->shape.window;
    bind->mode = is_mapped ? NEP_BIND_MAPPED : NEP_BIND_PRIVATE;
    bind->rows = rows;
    bind->extra = scales;
    bind->capacity = out->capacity;
    handle->op.out_is_mapped = is_mapped;
    handle->op.is_bound = true;
    /* Release: pairs with the acquire in find_bind (home.c). */
    atomic_store_explicit(&bind->word, handle->op.number + 1, memory_order_release);
}

/* Rows that came inside COUNTS: no tile, nothing to free. */
static enum nep_status read_riding(struct nep_ep *ep, struct nep_handle *handle, uint32_t source)
{
    uint32_t num = handle->rows_expected[source];
    const uint8_t *meta = nep_counts_rows(ep, source, handle->op.number);
    uint64_t meta_bytes = ((uint64_t)num * ep->shape.meta_bytes + 63) / 64 * 64;
    struct nep_payload payload = {meta + meta_bytes, ep->shape.wire_row_bytes, false};
    handle->rows_read[source] = num;
    return nep_positions_walk(ep, handle, source, meta, num, &payload);
}

static enum nep_status bad_tile(struct nep_ep *ep, const struct nep_handle *handle, uint32_t source,
                                const struct nep_tile_msg *msg, uint64_t number)
{
    struct nep_fault fault = {
        .size = sizeof fault,
        .status = NEP_ERR_FORMAT,
        .rank = source,
        .op = handle->op.number,
        .phase = "tiles",
    };
    snprintf(fault.message, sizeof fault.message,
             "tile %llu of rank %u holds something else (operation %llu, tile %llu of rank %u, "
             "%u rows): its slot was written by another message",
             (unsigned long long)number, nep_ep_name(ep, source), (unsigned long long)msg->op,
             (unsigned long long)msg->number, nep_ep_name(ep, msg->source), msg->num_rows);
    return nep_break(ep, &fault);
}

/* Reads the tiles of a source on another node from the rank of this node where they land. */
static enum nep_status read_far(struct nep_ep *ep, struct nep_handle *handle, uint32_t source,
                                bool *progress_p)
{
    enum nep_status status = NEP_OK;
    if (nep_counts_carry(ep, source, handle->rows_expected[source])) {
        *progress_p = true;
        return read_riding(ep, handle, source);
    }
    uint32_t landing = ep->counts_at[source].rank;
    const struct nep_region *there = &ep->plan.regions[landing];
    uint8_t *base = ep->window[landing];
    uint64_t lane = nep_plan_lane(&ep->plan, source, ep->node);
    struct nep_inflow *inflow = &ep->dispatch_in[source];
    while (status == NEP_OK && handle->rows_read[source] < handle->rows_expected[source]) {
        uint64_t idx = lane * ep->shape.tile_slots + inflow->next % ep->shape.tile_slots;
        /* Acquire: pairs with the release in raise() of the sink. */
        if (nep_word_get(base, there->dispatch_word, idx) != inflow->next + 1) {
            nep_ep_miss(ep, "tiles", source, handle->rows_expected[source],
                        handle->rows_read[source]);
            return NEP_OK;
        }
        const uint8_t *tile = base + there->dispatch_landing + idx * there->dispatch_tile_bytes;
        struct nep_tile_msg msg;
        memcpy(&msg, tile, sizeof msg);
        uint32_t left = handle->rows_expected[source] - handle->rows_read[source];
        if (msg.op != handle->op.number || msg.number != inflow->next || msg.source != source ||
            msg.num_rows == 0 || msg.num_rows > left || msg.num_rows > ep->shape.tile_rows) {
            return bad_tile(ep, handle, source, &msg, inflow->next);
        }
        struct nep_payload payload = {
            tile + nep_tile_payload_offset(&ep->shape, NEP_KIND_DISPATCH, msg.num_rows),
            ep->shape.wire_row_bytes, false};
        status = nep_positions_walk(ep, handle, source, tile + sizeof msg, msg.num_rows, &payload);
        handle->rows_read[source] += msg.num_rows;
        inflow->next++;
        /* Release: the slot has been read; pairs with the acquire in give_credits. */
        nep_word_set(ep->head, ep->region->dispatch_read, source, inflow->next);
        *progress_p = true;
    }
    return status;
}

static enum nep_status read_all(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p)
{
    enum nep_status status = NEP_OK;
    for (uint32_t s = 0; status == NEP_OK && s < ep->plan.topology->num_ranks; s++) {
        if (s == ep->rank || handle->rows_read[s] == handle->rows_expected[s]) {
            continue;
        }
        status = ep->plan.topology->node_of_rank[s] == ep->node
                     ? nep_home_read(ep, handle, s, progress_p)
                     : read_far(ep, handle, s, progress_p);
    }
    return status;
}

/* Tiles of a lane source that all readers of the node have read. */
static uint64_t lane_freed(struct nep_ep *ep, uint32_t source, uint32_t *slowest_p)
{
    uint64_t freed = UINT64_MAX;
    for (uint32_t g = 0; g < ep->node_size; g++) {
        uint32_t rank = nep_ep_rank_at(ep, g);
        uint64_t read =
            nep_word_get(ep->window[rank], ep->plan.regions[rank].dispatch_read, source);
        if (read < freed) {
            freed = read;
            *slowest_p = rank;
        }
    }
    return freed;
}

/* Tells lane sources what is free, where they cannot know it by themselves. */
static enum nep_status give_credits(struct nep_ep *ep, const struct nep_handle *handle,
                                    bool *progress_p)
{
    uint32_t num_ranks = ep->plan.topology->num_ranks;
    enum nep_status status = NEP_OK;
    for (uint32_t s = 0; status == NEP_OK && s < num_ranks; s++) {
        struct nep_inflow *inflow = &ep->dispatch_in[s];
        uint32_t slowest = ep->rank;
        if (ep->counts_at[s].rank != ep->rank || s == ep->rank ||
            !nep_inflow_needs_credit(inflow, ep->shape.tile_slots)) {
            continue;
        }
        uint64_t freed = lane_freed(ep, s, &slowest);
        if (freed <= inflow->announced) {
            nep_ep_miss(ep, "reading of tiles", slowest, inflow->planned, freed);
            continue;
        }
        if (!nep_inflow_may_credit(ep, inflow, s, freed)) {
            nep_ep_miss(ep, "local completion", s, 1, 0);
            continue;
        }
        struct nep_put put = {
            .dst = s,
            .window = ep->number,
            .is_apart = true,
            .imm = nep_imm(ep->head->generation, NEP_KIND_DISPATCH_CREDIT, ep->number,
                           handle->op.number, freed),
        };
        status = nep_inflow_credit(ep, inflow, &put, freed);
        *progress_p = true;
    }
    return status;
}

/* All that was to come is here, and all that this rank lends or forwards credits for has been read.
 */
static bool is_done(struct nep_ep *ep, const struct nep_handle *handle)
{
    const struct nep_op *op = &handle->op;
    if (!op->is_sent || !op->is_pushed) {
        return false;
    }
    uint64_t end = ep->dispatch_flows[ep->node].end[op->number % ep->shape.window];
    for (uint32_t s = 0; s < ep->plan.topology->num_ranks; s++) {
        if (handle->rows_read[s] != handle->rows_expected[s]) {
            return false;
        }
        if (ep->counts_at[s].rank == ep->rank && s != ep->rank &&
            !nep_inflow_is_settled(ep, &ep->dispatch_in[s], s)) {
            return false;
        }
    }
    for (uint32_t g = 0; g < ep->node_size; g++) {
        uint32_t rank = nep_ep_rank_at(ep, g);
        /* Acquire: pairs with the release in say_pushed (home.c): the rows are in this output. */
        uint64_t pushed = nep_word_get(ep->head, ep->region->pushed, g);
        if (pushed < op->number + 1) {
            nep_ep_miss(ep, "push", rank, 1, 0);
            return false;
        }
        uint64_t read =
            nep_word_get(ep->window[rank], ep->plan.regions[rank].dispatch_read, ep->rank);
        if (read < end) {
            nep_ep_miss(ep, "reading of home tiles", rank, end, read);
            return false;
        }
    }
    return true;
}

enum nep_status nep_recv_step(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p,
                              bool *done_p)
{
    bool is_counted = false;
    enum nep_status status = nep_counts_take(ep, handle, &is_counted);
    if (status == NEP_OK && !handle->op.is_sent) {
        status = nep_pack_send(ep, handle, progress_p);
    }
    if (status != NEP_OK || !is_counted) {
        return status;
    }
    if (!handle->op.is_bound) {
        nep_recv_bind(ep, handle);
        *progress_p = true;
    }
    status = nep_home_step(ep, handle, progress_p);
    if (status == NEP_OK) {
        status = read_all(ep, handle, progress_p);
    }
    if (status == NEP_OK && ep->comm->inter != NULL) {
        status = give_credits(ep, handle, progress_p);
    }
    if (status == NEP_OK && is_done(ep, handle)) {
        ep->kernels->fence(); /* rows pulled with non-temporal stores: before the caller reads */
        *done_p = true;
    }
    return status;
}
