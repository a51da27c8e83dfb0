/* SPDX-License-Identifier: Apache-2.0 */
/*
 * COUNTS come first and tell everything about sizes, so that each reader knows the final place of
 * every row before the first one arrives. Taking the COUNTS of ALL ranks is also what makes slot
 * reuse safe: it proves that every rank has begun this operation (docs/protocol.md, rule R1).
 */
#include "dispatch/counts.h"

#include <string.h>

#include "base/backoff.h"
#include "dispatch/pack.h"
#include "dispatch/positions.h"
#include "dispatch/wait.h"

/* ---- sending -------------------------------------------------------------------------------- */

static void begin_flows(struct nep_ep *ep, struct nep_handle *handle)
{
    bool is_dispatch = handle->op.kind == NEP_OP_DISPATCH;
    uint64_t op = handle->op.number;
    uint32_t window = ep->shape.window;
    for (uint32_t n = 0; n < ep->plan.topology->num_nodes; n++) {
        uint32_t rows = is_dispatch ? handle->node_begin[n + 1] - handle->node_begin[n] : 0;
        uint32_t tiles = n != ep->node && nep_rides(ep, rows) ? 0 : nep_num_tiles(ep, rows);
        nep_flow_begin(&ep->dispatch_flows[n], op, window, tiles);
    }
    for (uint32_t l = 0; l < ep->region->num_lanes; l++) {
        uint32_t rows = is_dispatch ? 0 : handle->consumers[1 + l].num_rows;
        nep_flow_begin(&ep->combine_flows[l], op, window, nep_num_tiles(ep, rows));
    }
}

/* The tables and riding rows of a dispatch for `node`; returns the end of the message. */
static uint32_t fill_dispatch(const struct nep_ep *ep, const struct nep_handle *handle,
                              uint32_t node, struct nep_counts_msg *msg, uint8_t *to)
{
    const struct nep_topology *topology = ep->plan.topology;
    uint32_t node_ranks = topology->node_ranks[node];
    uint32_t slots_per_rank = ep->shape.slots_per_rank;
    uint32_t *rows_per_rank = (uint32_t *)(to + sizeof *msg);
    uint32_t *rows_per_slot = (uint32_t *)(to + nep_counts_rows_per_slot_offset(node_ranks));
    for (uint32_t g = 0; g < node_ranks; g++) {
        uint32_t rank = nep_plan_rank_at(&ep->plan, node, g);
        rows_per_rank[g] = ep->layout.rank_rows[rank];
        const uint32_t *rows = ep->layout.slot_rows + (uint64_t)rank * slots_per_rank;
        memcpy(rows_per_slot + g * slots_per_rank, rows, slots_per_rank * sizeof *rows);
    }
    msg->layer = handle->layer;
    msg->num_rows = handle->node_begin[node + 1] - handle->node_begin[node];
    msg->tiles_end = ep->dispatch_flows[node].planned;
    msg->ride_offset = nep_counts_ride_offset(&ep->shape, node_ranks);
    if (node == ep->node || !nep_rides(ep, msg->num_rows)) {
        msg->num_tiles = nep_num_tiles(ep, msg->num_rows);
        return msg->ride_offset;
    }
    msg->ride_rows = msg->num_rows;
    uint64_t meta = ((uint64_t)msg->num_rows * ep->shape.meta_bytes + 63) / 64 * 64;
    nep_pack_meta(ep, handle, node, 0, msg->num_rows, to + msg->ride_offset);
    nep_pack_rows(ep, handle, node, 0, msg->num_rows, to + msg->ride_offset + meta);
    return (uint32_t)(msg->ride_offset + meta + (uint64_t)msg->num_rows * ep->shape.wire_row_bytes);
}

/* What a combine tells a rank: the sums that come to it, if this rank makes them. */
static void fill_combine(const struct nep_ep *ep, const struct nep_handle *handle, uint32_t dst,
                         struct nep_counts_msg *msg)
{
    if (dst != ep->rank && nep_plan_landing(&ep->plan, dst, ep->node) == ep->rank) {
        uint32_t lane = nep_plan_lane(&ep->plan, dst, ep->node);
        msg->num_rows = handle->consumers[1 + lane].num_rows;
        msg->num_tiles = nep_num_tiles(ep, msg->num_rows);
        msg->tiles_end = ep->combine_flows[lane].planned;
    }
}

/* Writes the message for `dst` at `to`; returns its size. */
static uint32_t fill(const struct nep_ep *ep, const struct nep_handle *handle, uint32_t dst,
                     uint8_t *to)
{
    struct nep_counts_msg msg = {
        .op = handle->op.number,
        .map_digest = handle->map_digest,
        .source = ep->rank,
        .kind = (uint32_t)handle->op.kind,
        .routed = handle->routed,
        .num_tokens = handle->num_tokens,
        .has_weights = nep_op_weights(&handle->op),
    };
    msg.bytes = sizeof msg;
    if (handle->op.kind == NEP_OP_DISPATCH) {
        msg.bytes = fill_dispatch(ep, handle, ep->plan.topology->node_of_rank[dst], &msg, to);
    } else {
        fill_combine(ep, handle, dst, &msg);
    }
    memcpy(to, &msg, sizeof msg);
    return msg.bytes;
}

/* The put of W operations ago must have let go of its bytes; by now its receiver has answered. */
static enum nep_status wait_put(struct nep_ep *ep, uint32_t dst, uint64_t number)
{
    struct nep_transport *inter = ep->comm->inter;
    struct nep_backoff backoff;
    nep_backoff_init(&backoff, ep->timeout_ns, ep->comm->spin_limit);
    while (inter->ops->completed(inter, dst) < number) {
        inter->ops->progress(inter);
        bool in_time = nep_backoff_pause(&backoff);
        if ((backoff.slow || !in_time) && inter->ops->peer_status(inter, dst) != NEP_OK) {
            return nep_blame_put(ep, dst, NEP_ERR_PEER_LOST);
        }
        if (!in_time) {
            return nep_blame_put(
                ep, dst,
                nep_fail(NEP_ERR_TIMEOUT,
                         "a COUNTS message has not left this rank for a whole timeout"));
        }
    }
    return NEP_OK;
}

static enum nep_status put_to(struct nep_ep *ep, struct nep_handle *handle, uint32_t control)
{
    uint32_t dst = ep->control_rank[control];
    uint32_t window = ep->shape.window;
    uint64_t op = handle->op.number;
    uint64_t idx = (uint64_t)control * window + op % window;
    enum nep_status status = wait_put(ep, dst, ep->counts_put[idx]);
    if (status != NEP_OK) {
        return status;
    }
    uint8_t *from =
        (uint8_t *)ep->head + ep->region->send_counts + idx * ep->region->send_counts_bytes;
    const struct nep_region *there = &ep->plan.regions[dst];
    uint64_t idx_there =
        (uint64_t)nep_plan_control(&ep->plan, dst, ep->rank) * window + op % window;
    struct nep_put put = {
        .dst = dst,
        .window = ep->number,
        .offset = there->counts + idx_there * there->counts_bytes,
        .src = from,
        .len = fill(ep, handle, dst, from),
        .imm = nep_imm(ep->head->generation, NEP_KIND_COUNTS, ep->number, op, 0),
    };
    const struct nep_counts_msg *msg = (const struct nep_counts_msg *)from;
    ep->stats.remote_rows += msg->ride_rows;
    return nep_ep_put(ep, &put, &ep->counts_put[idx]);
}

enum nep_status nep_counts_send(struct nep_ep *ep, struct nep_handle *handle)
{
    uint32_t window = ep->shape.window;
    uint64_t op = handle->op.number;
    begin_flows(ep, handle);
    uint64_t slot = op % window; /* of control 0: this rank itself */
    fill(ep, handle, ep->rank,
         (uint8_t *)ep->head + ep->region->counts + slot * ep->region->counts_bytes);
    /* Release: pairs with the acquire in nep_counts_find of this node's ranks. */
    nep_word_set(ep->head, ep->region->counts_word, slot, op + 1);

    enum nep_status status = NEP_OK;
    for (uint32_t c = 1; status == NEP_OK && c < ep->region->num_controls; c++) {
        uint32_t dst = ep->control_rank[c];
        uint32_t node = ep->plan.topology->node_of_rank[dst];
        if (handle->op.kind == NEP_OP_COMBINE ||
            nep_plan_landing(&ep->plan, ep->rank, node) == dst) {
            status = put_to(ep, handle, c);
        }
    }
    return status;
}

/* ---- taking --------------------------------------------------------------------------------- */

/* Where the COUNTS lie that land at `rank` under a control. */
static uint8_t *place_at(const struct nep_ep *ep, uint32_t rank, uint32_t control, uint64_t op)
{
    const struct nep_region *region = &ep->plan.regions[rank];
    uint64_t idx = (uint64_t)control * ep->shape.window + op % ep->shape.window;
    return ep->window[rank] + region->counts + idx * region->counts_bytes;
}

static const struct nep_counts_msg *find_at(const struct nep_ep *ep, uint32_t rank,
                                            uint32_t control, uint64_t op)
{
    uint64_t idx = (uint64_t)control * ep->shape.window + op % ep->shape.window;
    /* Acquire: pairs with the release in nep_counts_send, or with the sink's in raise(). */
    if (nep_word_get(ep->window[rank], ep->plan.regions[rank].counts_word, idx) != op + 1) {
        return NULL;
    }
    return (const struct nep_counts_msg *)place_at(ep, rank, control, op);
}

const struct nep_counts_msg *nep_counts_find(const struct nep_ep *ep, uint32_t source, uint64_t op)
{
    return find_at(ep, ep->counts_at[source].rank, ep->counts_at[source].control, op);
}

/* Of the COUNTS that a combine's summing rank F(this rank, node) sent to this very rank. */
static uint32_t sums_control(const struct nep_ep *ep, uint32_t node)
{
    uint32_t far = nep_plan_landing(&ep->plan, ep->rank, node);
    return nep_plan_control(&ep->plan, ep->rank, far);
}

bool nep_counts_carry(const struct nep_ep *ep, uint32_t source, uint32_t num_rows)
{
    return ep->plan.topology->node_of_rank[source] != ep->node && nep_rides(ep, num_rows);
}

const uint8_t *nep_counts_rows(const struct nep_ep *ep, uint32_t source, uint64_t op)
{
    const struct nep_word_at *at = &ep->counts_at[source];
    return place_at(ep, at->rank, at->control, op) +
           nep_counts_ride_offset(&ep->shape, ep->node_size);
}

static enum nep_status disagree(struct nep_ep *ep, const struct nep_handle *handle, uint32_t source,
                                const struct nep_counts_msg *msg, const char *what, uint64_t theirs,
                                uint64_t ours)
{
    struct nep_fault fault = {
        .size = sizeof fault,
        .status = NEP_ERR_MISMATCH,
        .rank = source,
        .op = handle->op.number,
        .phase = "counts",
    };
    snprintf(fault.message, sizeof fault.message,
             "operation %llu: rank %u runs a %s, this rank (%u) runs a %s with handle %u; %s: %llu "
             "there, %llu here",
             (unsigned long long)handle->op.number, nep_ep_name(ep, source),
             msg->kind == NEP_OP_COMBINE ? "combine" : "dispatch", nep_ep_name(ep, ep->rank),
             handle->op.kind == NEP_OP_COMBINE ? "combine" : "dispatch", handle->id, what,
             (unsigned long long)theirs, (unsigned long long)ours);
    ep->is_broken = true;
    return nep_comm_fail(ep->comm, &fault);
}

/* What a dispatch's COUNTS claim must fit in what they describe: rows are placed by these numbers.
 */
static enum nep_status check_tables(struct nep_ep *ep, const struct nep_handle *handle,
                                    uint32_t source, const struct nep_counts_msg *msg)
{
    uint32_t offset = nep_counts_ride_offset(&ep->shape, ep->node_size);
    if (msg->ride_offset != offset) {
        return disagree(ep, handle, source, msg, "offset of its rows", msg->ride_offset, offset);
    }
    const uint32_t *per_rank = nep_counts_rows_per_rank(msg);
    for (uint32_t g = 0; g < ep->node_size; g++) {
        if (per_rank[g] > msg->num_rows) {
            return disagree(ep, handle, source, msg, "rows of one rank, beyond all", per_rank[g],
                            msg->num_rows);
        }
    }
    const uint32_t *per_slot = nep_counts_rows_per_slot(ep, msg);
    uint64_t pairs = 0, most = (uint64_t)msg->num_rows * ep->shape.top_k;
    for (uint32_t i = 0; i < ep->node_size * ep->shape.slots_per_rank; i++) {
        pairs += per_slot[i];
    }
    if (pairs > most) {
        return disagree(ep, handle, source, msg, "rows of all slots, at most top_k each", pairs,
                        most);
    }
    return NEP_OK;
}

/* All ranks must mean the same; sizes must be possible, since positions follow from them. */
static enum nep_status check(struct nep_ep *ep, const struct nep_handle *handle, uint32_t source,
                             const struct nep_counts_msg *msg)
{
    bool is_dispatch = handle->op.kind == NEP_OP_DISPATCH;
    uint32_t max_tokens = ep->shape.max_tokens;
    bool is_any = msg->routed == NEP_ROUTED_ANY || handle->routed == NEP_ROUTED_ANY;
    uint64_t routed_there = is_any ? 0 : msg->routed;
    uint64_t routed_here = is_any ? 0 : handle->routed;
    const struct {
        const char *what;
        uint64_t theirs, ours;
    } equal[] = {
        {"operation number", msg->op, handle->op.number},
        {"source rank", msg->source, source},
        {"kind of operation", msg->kind, handle->op.kind},
        {"the dispatch that the handle holds", routed_there, routed_here},
        {"map digest", msg->map_digest, handle->map_digest},
        {"layer", msg->layer, is_dispatch ? handle->layer : 0},
        {"weights of the combine (0: held, 1: topk_weights come back, 2: token_weights are given)",
         msg->has_weights, nep_op_weights(&handle->op)},
    };
    for (size_t i = 0; i < sizeof equal / sizeof equal[0]; i++) {
        if (equal[i].theirs != equal[i].ours) {
            return disagree(ep, handle, source, msg, equal[i].what, equal[i].theirs, equal[i].ours);
        }
    }
    if (msg->num_tokens > max_tokens || msg->num_rows > max_tokens) {
        return disagree(ep, handle, source, msg, "tokens, beyond the most of", msg->num_tokens,
                        max_tokens);
    }
    bool rides = is_dispatch && nep_counts_carry(ep, source, msg->num_rows);
    uint32_t tiles = rides ? 0 : nep_num_tiles(ep, msg->num_rows);
    if (msg->num_tiles != tiles || msg->ride_rows != (rides ? msg->num_rows : 0)) {
        return disagree(ep, handle, source, msg, "tiles", msg->num_tiles, tiles);
    }
    return is_dispatch && source != ep->rank ? check_tables(ep, handle, source, msg) : NEP_OK;
}

static enum nep_status begin_inflows(struct nep_ep *ep, struct nep_handle *handle)
{
    uint64_t op = handle->op.number;
    uint32_t window = ep->shape.window;
    bool is_dispatch = handle->op.kind == NEP_OP_DISPATCH;
    for (uint32_t s = 0; s < ep->plan.topology->num_ranks; s++) {
        const struct nep_counts_msg *msg = nep_counts_taken(ep, s);
        struct nep_inflow *inflow = &ep->dispatch_in[s];
        uint64_t end = is_dispatch ? msg->tiles_end : inflow->planned;
        if (!nep_inflow_begin(inflow, op, window, end, is_dispatch ? msg->num_tiles : 0)) {
            return disagree(ep, handle, s, msg, "end of its tiles", end,
                            inflow->planned + msg->num_tiles);
        }
    }
    for (uint32_t n = 0; n < ep->plan.topology->num_nodes; n++) {
        struct nep_inflow *inflow = &ep->combine_in[n];
        if (is_dispatch || n == ep->node) {
            nep_inflow_begin(inflow, op, window, inflow->planned, 0);
            continue;
        }
        const struct nep_counts_msg *msg = &ep->counts_of_sums[n];
        uint32_t rows = handle->node_begin[n + 1] - handle->node_begin[n];
        uint32_t far = nep_plan_landing(&ep->plan, ep->rank, n);
        if (msg->num_rows != rows) {
            return disagree(ep, handle, far, msg, "rows of sums", msg->num_rows, rows);
        }
        if (!nep_inflow_begin(inflow, op, window, msg->tiles_end, msg->num_tiles)) {
            return disagree(ep, handle, far, msg, "end of its tiles of sums", msg->tiles_end,
                            inflow->planned + msg->num_tiles);
        }
    }
    return NEP_OK;
}

/* Names the first rank whose COUNTS are missing; true when none is. */
static bool all_here(struct nep_ep *ep, const struct nep_handle *handle)
{
    uint32_t num_ranks = ep->plan.topology->num_ranks;
    uint64_t op = handle->op.number;
    uint32_t here = 0;
    for (uint32_t s = 0; s < num_ranks; s++) {
        here += nep_counts_find(ep, s, op) != NULL;
    }
    for (uint32_t s = 0; here < num_ranks && s < num_ranks; s++) {
        if (nep_counts_find(ep, s, op) == NULL) {
            nep_ep_miss(ep, "counts", s, num_ranks, here);
        }
    }
    if (here < num_ranks) {
        return false;
    }
    for (uint32_t n = 0; handle->op.kind == NEP_OP_COMBINE && n < ep->plan.topology->num_nodes;
         n++) {
        if (n != ep->node && find_at(ep, ep->rank, sums_control(ep, n), op) == NULL) {
            nep_ep_miss(ep, "counts", nep_plan_landing(&ep->plan, ep->rank, n), 1, 0);
            return false;
        }
    }
    return true;
}

/*
 * Copied before they are checked: a neighbour, or a peer over a fabric, that writes there again
 * changes nothing that is used.
 */
static enum nep_status copy_and_check(struct nep_ep *ep, struct nep_handle *handle)
{
    const struct nep_topology *topology = ep->plan.topology;
    bool is_dispatch = handle->op.kind == NEP_OP_DISPATCH;
    uint64_t op = handle->op.number;
    uint64_t each = nep_counts_ride_offset(&ep->shape, ep->node_size);
    enum nep_status status = NEP_OK;
    for (uint32_t s = 0; status == NEP_OK && s < topology->num_ranks; s++) {
        const struct nep_word_at *at = &ep->counts_at[s];
        memcpy(ep->counts + s * each, place_at(ep, at->rank, at->control, op),
               is_dispatch ? each : sizeof(struct nep_counts_msg));
        status = check(ep, handle, s, nep_counts_taken(ep, s));
    }
    for (uint32_t n = 0; status == NEP_OK && !is_dispatch && n < topology->num_nodes; n++) {
        if (n != ep->node) {
            struct nep_counts_msg *msg = &ep->counts_of_sums[n];
            memcpy(msg, place_at(ep, ep->rank, sums_control(ep, n), op), sizeof *msg);
            status = check(ep, handle, nep_plan_landing(&ep->plan, ep->rank, n), msg);
        }
    }
    return status;
}

enum nep_status nep_counts_take(struct nep_ep *ep, struct nep_handle *handle, bool *done_p)
{
    *done_p = handle->op.is_counted;
    if (handle->op.is_counted || !all_here(ep, handle)) {
        return NEP_OK;
    }
    enum nep_status status = copy_and_check(ep, handle);
    if (status == NEP_OK) {
        status = begin_inflows(ep, handle);
    }
    if (status == NEP_OK && handle->op.kind == NEP_OP_DISPATCH) {
        nep_positions_from_counts(ep, handle);
    }
    if (status == NEP_OK) {
        handle->op.is_counted = true;
        *done_p = true;
    }
    return status;
}
