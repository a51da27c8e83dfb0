/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The calls of dispatch and combine: arguments, order of operations, halves. Everything that can be
 * refused is refused before an operation number is taken, so that a refused call leaves no trace on
 * other ranks.
 */
#include <stdlib.h>
#include <string.h>

#include "dispatch/combine.h"
#include "dispatch/counts.h"
#include "dispatch/pack.h"
#include "dispatch/recv.h"
#include "dispatch/wait.h"

/* ---- arguments ------------------------------------------------------------------------------ */

static enum nep_status check_call(struct nep_ep *ep, struct nep_handle *handle, const void *stream)
{
    enum nep_status status = nep_ep_check(ep);
    if (status != NEP_OK) {
        return status;
    }
    if (handle == NULL || handle->ep != ep) {
        return nep_fail(NEP_ERR_INVALID, "the handle is NULL or belongs to another ep");
    }
    if (stream != NULL) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "a stream was given, but tokens of this ep are in host "
                        "memory: pass NULL");
    }
    return NEP_OK;
}

static enum nep_status check_begin(const struct nep_ep *ep, const struct nep_handle *handle)
{
    if (handle->state == NEP_HANDLE_DISPATCHING || handle->state == NEP_HANDLE_COMBINING) {
        return nep_fail(NEP_ERR_BUSY,
                        "handle %u is still in operation %llu: complete it with nep_%s_recv first",
                        handle->id, (unsigned long long)handle->op.number,
                        handle->state == NEP_HANDLE_COMBINING ? "combine" : "dispatch");
    }
    if (ep->next_op - ep->completed_op >= ep->shape.outstanding) {
        return nep_fail(NEP_ERR_BUSY,
                        "%u operations are outstanding, which is all that this ep was made for "
                        "(outstanding = %u): complete operation %llu first",
                        (unsigned)(ep->next_op - ep->completed_op), ep->shape.outstanding,
                        (unsigned long long)ep->completed_op);
    }
    return NEP_OK;
}

static enum nep_status check_end(const struct nep_ep *ep, const struct nep_handle *handle,
                                 enum nep_handle_state state)
{
    const char *name = state == NEP_HANDLE_COMBINING ? "combine" : "dispatch";
    if (handle->state != state) {
        return nep_fail(NEP_ERR_INVALID, "handle %u has no %s to complete: call nep_%s_send first",
                        handle->id, name, name);
    }
    if (handle->op.number != ep->completed_op) {
        return nep_fail(NEP_ERR_BUSY,
                        "operation %llu cannot complete before operation %llu: operations of an ep "
                        "complete in the order in which they were sent",
                        (unsigned long long)handle->op.number,
                        (unsigned long long)ep->completed_op);
    }
    return NEP_OK;
}

static enum nep_status check_tokens(const struct nep_ep *ep, const struct nep_handle *handle,
                                    const struct nep_tokens *in)
{
    const struct nep_shape *shape = &ep->shape;
    if (in->num_tokens > shape->max_tokens) {
        return nep_fail(NEP_ERR_INVALID, "num_tokens is %u; this ep was made for at most %u",
                        in->num_tokens, shape->max_tokens);
    }
    if (in->layer >= shape->num_layers) {
        return nep_fail(NEP_ERR_INVALID, "layer is %u; this ep has %u", in->layer,
                        shape->num_layers);
    }
    if (in->id_type != NEP_IDS_INT32 && in->id_type != NEP_IDS_INT64) {
        return nep_fail(NEP_ERR_INVALID, "id_type %d is not one of enum nep_id_type",
                        (int)in->id_type);
    }
    if (in->scales != NULL && shape->format.scale_bytes == 0) {
        return nep_fail(NEP_ERR_INVALID, "scales were given, but rows of type %s have none",
                        nep_dtype_name(shape->wire));
    }
    if (handle != NULL && in->scales == NULL && in->num_tokens != 0 &&
        shape->wire == NEP_DTYPE_OPAQUE && shape->format.scale_bytes != 0) {
        return nep_fail(NEP_ERR_INVALID, "scales is NULL, but opaque rows have %u bytes of scales",
                        shape->format.scale_bytes);
    }
    if (handle != NULL && in->topk_ids == NULL && in->num_tokens != 0) {
        if (!handle->has_routing) {
            return nep_fail(NEP_ERR_INVALID, "topk_ids is NULL, but handle %u holds no routing yet",
                            handle->id);
        }
        if (in->num_tokens != handle->num_tokens || in->layer != handle->layer) {
            return nep_fail(NEP_ERR_INVALID,
                            "a cached dispatch of %u tokens of layer %u, but handle %u holds the "
                            "routing of %u tokens of layer %u",
                            in->num_tokens, in->layer, handle->id, handle->num_tokens,
                            handle->layer);
        }
    } else if (in->topk_ids == NULL && in->num_tokens != 0) {
        return nep_fail(NEP_ERR_INVALID, "topk_ids is NULL");
    }
    if (handle != NULL && in->x == NULL && in->num_tokens != 0) {
        return nep_fail(NEP_ERR_INVALID, "x is NULL, but there are %u tokens", in->num_tokens);
    }
    return NEP_OK;
}

/* ---- beginning and ending ------------------------------------------------------------------- */

static void begin(struct nep_ep *ep, struct nep_handle *handle, enum nep_op_kind kind)
{
    memset(&handle->op, 0, sizeof handle->op);
    handle->op.kind = kind;
    handle->op.number = ep->next_op++;
    memset(handle->rows_sent, 0, ep->plan.topology->num_ranks * sizeof *handle->rows_sent);
    handle->state = kind == NEP_OP_COMBINE ? NEP_HANDLE_COMBINING : NEP_HANDLE_DISPATCHING;
    ep->in_flight[handle->op.number % ep->shape.outstanding] = handle;
}

static void end(struct nep_ep *ep, struct nep_handle *handle)
{
    uint64_t op = handle->op.number;
    /* The sink completes the 8 bits of a CREDIT from these words, so they go on without one too. */
    for (uint32_t n = 0; n < ep->plan.topology->num_nodes; n++) {
        nep_flow_complete(&ep->dispatch_flows[n], op, ep->shape.window);
        nep_word_raise(nep_word(ep->head, ep->region->dispatch_credit, n),
                       ep->dispatch_flows[n].implicit);
    }
    for (uint32_t l = 0; l < ep->region->num_lanes; l++) {
        nep_flow_complete(&ep->combine_flows[l], op, ep->shape.window);
        nep_word_raise(nep_word(ep->head, ep->region->combine_credit, l),
                       ep->combine_flows[l].implicit);
    }
    ep->in_flight[op % ep->shape.outstanding] = NULL;
    ep->completed_op = op + 1;
    /* Release: the sink's window of COUNTS moves on; pairs with the acquire in nep_arrive. */
    atomic_store_explicit(&ep->head->completed, op + 1, memory_order_release);
    handle->state = NEP_HANDLE_READY;
}

/* Whether all operations before this one have sent what they had to send: streams are in order. */
static bool is_next_to_send(const struct nep_ep *ep, const struct nep_handle *handle)
{
    for (uint64_t op = ep->completed_op; op < handle->op.number; op++) {
        if (!ep->in_flight[op % ep->shape.outstanding]->op.is_sent) {
            return false;
        }
    }
    return true;
}

static enum nep_status pack_step(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p,
                                 bool *done_p)
{
    enum nep_status status = nep_pack_send(ep, handle, progress_p);
    *done_p = handle->op.is_sent;
    return status;
}

/* COUNTS are taken in the order of operations, since streams are numbered through. */
static enum nep_status counts_step(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p,
                                   bool *done_p)
{
    enum nep_status status = NEP_OK;
    bool is_taken = true;
    for (uint64_t op = ep->completed_op; is_taken && op <= handle->op.number; op++) {
        status = nep_counts_take(ep, ep->in_flight[op % ep->shape.outstanding], &is_taken);
        if (status != NEP_OK) {
            return status;
        }
    }
    if (!handle->op.is_sent && is_next_to_send(ep, handle)) {
        status = nep_pack_send(ep, handle, progress_p);
    }
    *done_p = is_taken;
    return status;
}

/* ---- dispatch ------------------------------------------------------------------------------- */

static enum nep_status take_routing(struct nep_ep *ep, struct nep_handle *handle,
                                    const struct nep_tokens *in)
{
    uint64_t pairs = (uint64_t)in->num_tokens * ep->shape.top_k;
    if (in->topk_ids != NULL || in->num_tokens == 0) {
        handle->has_routing = false;
        const struct nep_map_version *map = nep_maps_at(&ep->maps, ep->next_op);
        enum nep_status status = nep_route(ep, map, in, handle->slots);
        if (status != NEP_OK) {
            return status;
        }
        nep_route_count(in, ep->shape.top_k,
                        ep->load + (uint64_t)in->layer * ep->shape.num_experts);
        if (ep->recorder != NULL) {
            nep_recorder_take(ep->recorder, in);
        }
        handle->num_tokens = in->num_tokens;
        handle->layer = in->layer;
        handle->routed =
            in->topk_ids != NULL ? (uint32_t)ep->next_op % NEP_ROUTED_ANY : NEP_ROUTED_ANY;
        handle->map_digest = map->digest;
        handle->map_version = map->version;
        for (uint64_t i = 0; in->topk_weights == NULL && i < pairs; i++) {
            handle->weights[i] = 1.0f;
        }
    }
    if (in->topk_weights != NULL) {
        memcpy(handle->weights, in->topk_weights, pairs * sizeof *handle->weights);
    }
    nep_layout_count(ep, handle->slots, handle->num_tokens, NULL);
    uint64_t num_slots = (uint64_t)ep->plan.topology->num_ranks * ep->shape.slots_per_rank;
    bool is_bounded = nep_layout_is_fixed(ep->shape.layout);
    for (uint64_t i = 0; is_bounded && i < num_slots; i++) {
        if (ep->layout.slot_rows[i] > ep->shape.max_tokens) {
            return nep_fail(
                NEP_ERR_INVALID,
                "slot %llu would get %u rows, more than this layout's %u from one rank: a token "
                "names an expert twice",
                (unsigned long long)i, ep->layout.slot_rows[i], ep->shape.max_tokens);
        }
    }
    nep_layout_lists(ep, handle);
    handle->has_routing = true;
    return NEP_OK;
}

static void count_tokens(struct nep_ep *ep, const struct nep_handle *handle)
{
    ep->stats.dispatches++;
    ep->stats.tokens += handle->num_tokens;
    ep->stats.tokens_local += handle->num_tokens;
    /* A token leaves its node when it is in the list of another one. */
    uint32_t num_nodes = ep->plan.topology->num_nodes;
    for (uint32_t t = 0; num_nodes > 1 && t < handle->num_tokens; t++) {
        for (uint32_t k = 0; k < ep->shape.top_k; k++) {
            uint32_t slot = handle->slots[(uint64_t)t * ep->shape.top_k + k];
            if (slot != NEP_SLOT_NONE && ep->slot_at[slot].node != ep->node) {
                ep->stats.tokens_local--;
                break;
            }
        }
    }
}

enum nep_status nep_dispatch_send(struct nep_ep *ep, struct nep_handle *handle,
                                  const struct nep_tokens *in, void *stream)
{
    struct nep_tokens tokens;
    enum nep_status status = check_call(ep, handle, stream);
    if (status == NEP_OK) {
        status = check_begin(ep, handle);
    }
    if (status == NEP_OK) {
        status = nep_struct_copy(&tokens, sizeof tokens, in, sizeof tokens.size, "nep_tokens");
    }
    if (status == NEP_OK) {
        status = check_tokens(ep, handle, &tokens);
    }
    if (status == NEP_OK) {
        status = take_routing(ep, handle, &tokens);
        if (status != NEP_OK) {
            handle->has_routing = false;
            handle->state = NEP_HANDLE_EMPTY;
        }
    }
    if (status != NEP_OK) {
        return status;
    }
    begin(ep, handle, NEP_OP_DISPATCH);
    handle->op.in = tokens;
    count_tokens(ep, handle);
    status = nep_counts_send(ep, handle);
    if (status == NEP_OK && is_next_to_send(ep, handle)) {
        status = nep_try(ep, handle, pack_step);
    }
    return status;
}

enum nep_status nep_dispatch_counts(struct nep_ep *ep, struct nep_handle *handle,
                                    struct nep_counts *counts_p)
{
    enum nep_status status = check_call(ep, handle, NULL);
    if (status != NEP_OK) {
        return status;
    }
    if (counts_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_dispatch_counts: counts_p is NULL");
    }
    if (handle->state == NEP_HANDLE_DISPATCHING) {
        status = nep_wait(ep, handle, counts_step);
    } else if (handle->state == NEP_HANDLE_EMPTY) {
        status = nep_fail(NEP_ERR_INVALID, "handle %u has not been dispatched", handle->id);
    }
    if (status != NEP_OK) {
        return status;
    }
    *counts_p = (struct nep_counts){
        .size = sizeof *counts_p,
        .num_rows = handle->num_rows,
        .num_real_rows = handle->num_real_rows,
        .rows_per_slot = handle->rows_per_slot,
        .first_row = handle->first_row,
        .rows_per_source = handle->rows_per_source,
    };
    return NEP_OK;
}

enum nep_status nep_dispatch_recv(struct nep_ep *ep, struct nep_handle *handle,
                                  const struct nep_rows *out, void *stream)
{
    struct nep_rows rows;
    enum nep_status status = check_call(ep, handle, stream);
    if (status == NEP_OK) {
        status = check_end(ep, handle, NEP_HANDLE_DISPATCHING);
    }
    if (status == NEP_OK) {
        status = nep_struct_copy(&rows, sizeof rows, out, sizeof rows.size, "nep_rows");
    }
    if (status == NEP_OK) {
        status = nep_wait(ep, handle, counts_step);
    }
    if (status == NEP_OK &&
        (rows.capacity < handle->num_rows || (rows.x == NULL && handle->num_real_rows != 0))) {
        status = nep_fail(NEP_ERR_OVERFLOW,
                          "the output has room for %llu rows, %llu are needed: call again with a "
                          "larger one, nothing is lost",
                          rows.x != NULL ? (unsigned long long)rows.capacity : 0ull,
                          (unsigned long long)handle->num_rows);
    }
    if (status == NEP_OK && rows.scales == NULL && ep->shape.format.scale_bytes != 0 &&
        handle->num_real_rows != 0) {
        status = nep_fail(NEP_ERR_INVALID, "scales is NULL, but rows of type %s have some",
                          nep_dtype_name(ep->shape.wire));
    }
    if (status != NEP_OK) {
        return status;
    }
    handle->op.out = rows;
    handle->op.is_receiving = true;
    status = nep_wait(ep, handle, nep_recv_step);
    if (status == NEP_OK) {
        end(ep, handle);
    }
    return status;
}

/* ---- combine -------------------------------------------------------------------------------- */

enum nep_status nep_combine_send(struct nep_ep *ep, struct nep_handle *handle,
                                 const struct nep_expert_rows *in, void *stream)
{
    struct nep_expert_rows rows;
    enum nep_status status = check_call(ep, handle, stream);
    if (status == NEP_OK) {
        status = check_begin(ep, handle);
    }
    if (status == NEP_OK && handle->state != NEP_HANDLE_READY) {
        status = nep_fail(NEP_ERR_INVALID, "handle %u has not been dispatched", handle->id);
    }
    if (status == NEP_OK) {
        status = nep_struct_copy(&rows, sizeof rows, in, sizeof rows.size, "nep_expert_rows");
    }
    if (status == NEP_OK && rows.y == NULL && handle->num_real_rows != 0) {
        status = nep_fail(NEP_ERR_INVALID, "y is NULL, but %llu rows were dispatched here",
                          (unsigned long long)handle->num_real_rows);
    }
    if (status == NEP_OK && rows.topk_weights != NULL && ep->shape.layout != NEP_LAYOUT_RANK) {
        status = nep_fail(NEP_ERR_INVALID,
                          "topk_weights come back in the rank layout alone: in the expert layouts "
                          "combine weighs the rows itself");
    }
    if (status != NEP_OK) {
        return status;
    }
    begin(ep, handle, NEP_OP_COMBINE);
    handle->op.rows = rows;
    ep->stats.combines++;
    uint32_t num_ranks = ep->plan.topology->num_ranks;
    memset(handle->rows_read, 0, num_ranks * sizeof *handle->rows_read);
    memset(handle->rows_staged, 0, num_ranks * sizeof *handle->rows_staged);
    nep_combine_bind(ep, handle);
    status = nep_counts_send(ep, handle);
    if (status == NEP_OK && handle->op.number == ep->completed_op) {
        status = nep_try(ep, handle, nep_combine_step);
    }
    return status;
}

/*
 * An operation that completes has brought every row that was routed: what is missing of a token is
 * what found no copy when it was routed, and its source knows that alone.
 */
static void fill_present(const struct nep_ep *ep, const struct nep_handle *handle, float *present)
{
    uint32_t top_k = ep->shape.top_k;
    for (uint32_t t = 0; t < handle->num_tokens; t++) {
        const uint32_t *slots = handle->slots + (uint64_t)t * top_k;
        float sum = 0.0f;
        for (uint32_t k = 0; k < top_k; k++) {
            bool counts = slots[k] != NEP_SLOT_NONE;
            for (uint32_t i = 0; counts && ep->shape.layout == NEP_LAYOUT_RANK && i < k; i++) {
                counts = slots[i] == NEP_SLOT_NONE ||
                         ep->slot_at[slots[i]].rank != ep->slot_at[slots[k]].rank;
            }
            float weight = ep->shape.layout == NEP_LAYOUT_RANK
                               ? 1.0f
                               : handle->weights[(uint64_t)t * top_k + k];
            sum += counts ? weight : 0.0f;
        }
        present[t] = sum;
    }
}

enum nep_status nep_combine_recv(struct nep_ep *ep, struct nep_handle *handle,
                                 const struct nep_tokens_out *out, void *stream)
{
    struct nep_tokens_out sum;
    enum nep_status status = check_call(ep, handle, stream);
    if (status == NEP_OK) {
        status = check_end(ep, handle, NEP_HANDLE_COMBINING);
    }
    if (status == NEP_OK) {
        status = nep_struct_copy(&sum, sizeof sum, out, sizeof sum.size, "nep_tokens_out");
    }
    if (status == NEP_OK &&
        (sum.num_tokens != handle->num_tokens || (sum.y == NULL && sum.num_tokens != 0))) {
        status = nep_fail(
            NEP_ERR_INVALID, "the result has %u tokens%s; the dispatch of handle %u had %u",
            sum.num_tokens, sum.y == NULL ? " and y is NULL" : "", handle->id, handle->num_tokens);
    }
    if (status == NEP_OK && sum.topk_weights != NULL && handle->op.rows.topk_weights == NULL) {
        status = nep_fail(NEP_ERR_INVALID, "topk_weights are asked for, but none were passed to "
                                           "nep_combine_send");
    }
    if (status != NEP_OK) {
        return status;
    }
    handle->op.sum = sum;
    handle->op.is_receiving = true;
    status = nep_wait(ep, handle, nep_combine_step);
    if (status == NEP_OK && sum.present != NULL) {
        fill_present(ep, handle, sum.present);
    }
    if (status == NEP_OK) {
        end(ep, handle);
    }
    return status;
}

/* ---- both halves ---------------------------------------------------------------------------- */

enum nep_status nep_dispatch(struct nep_ep *ep, struct nep_handle *handle,
                             const struct nep_tokens *in, const struct nep_rows *out, void *stream)
{
    enum nep_status status = nep_dispatch_send(ep, handle, in, stream);
    return status == NEP_OK ? nep_dispatch_recv(ep, handle, out, stream) : status;
}

enum nep_status nep_combine(struct nep_ep *ep, struct nep_handle *handle,
                            const struct nep_expert_rows *in, const struct nep_tokens_out *out,
                            void *stream)
{
    enum nep_status status = nep_combine_send(ep, handle, in, stream);
    return status == NEP_OK ? nep_combine_recv(ep, handle, out, stream) : status;
}

/* ---- layout alone --------------------------------------------------------------------------- */

static void copy_counts(uint32_t *to, const uint32_t *from, uint64_t num)
{
    if (to != NULL) {
        memcpy(to, from, num * sizeof *to);
    }
}

/* Callers know seats: what was counted by members is spread over them, the last member first. */
static void spread(uint32_t *counts, const struct nep_comm *comm, uint64_t each)
{
    uint32_t m = comm->topology.num_ranks;
    for (uint32_t seat = comm->world.num_ranks; counts != NULL && seat-- > 0;) {
        if (m > 0 && comm->members[m - 1] == seat) {
            m--;
            memmove(counts + seat * each, counts + m * each, each * sizeof *counts);
        } else {
            memset(counts + seat * each, 0, each * sizeof *counts);
        }
    }
}

static void spread_tokens(uint8_t *in_rank, const struct nep_comm *comm, uint32_t num_tokens)
{
    uint32_t num_members = comm->topology.num_ranks, num_seats = comm->world.num_ranks;
    for (uint32_t t = num_tokens; in_rank != NULL && t-- > 0;) {
        uint8_t *from = in_rank + (size_t)t * num_members, *to = in_rank + (size_t)t * num_seats;
        uint32_t m = num_members;
        for (uint32_t seat = num_seats; seat-- > 0;) {
            bool is_member = m > 0 && comm->members[m - 1] == seat;
            to[seat] = is_member ? from[--m] : 0;
        }
    }
}

static void copy_layout(struct nep_ep *ep, const struct nep_layout_counts *to, uint32_t *slots,
                        uint32_t num_tokens)
{
    const struct nep_comm *comm = ep->comm;
    const struct nep_topology *topology = &comm->topology;
    uint32_t each = ep->shape.slots_per_rank;
    copy_counts(to->rows_per_rank, ep->layout.rank_rows, topology->num_ranks);
    copy_counts(to->rows_per_slot, ep->layout.slot_rows, (uint64_t)topology->num_ranks * each);
    if (to->rows_per_node != NULL) {
        memset(to->rows_per_node, 0, comm->world.num_nodes * sizeof *to->rows_per_node);
        for (uint32_t n = 0; n < topology->num_nodes; n++) {
            uint32_t first = nep_plan_rank_at(&ep->plan, n, 0);
            to->rows_per_node[nep_comm_node_name(comm, first)] = ep->layout.node_rows[n];
        }
    }
    if (topology->num_ranks == comm->world.num_ranks) {
        return;
    }
    spread(to->rows_per_rank, comm, 1);
    spread(to->rows_per_slot, comm, each);
    spread_tokens(to->is_token_in_rank, comm, num_tokens);
    for (uint64_t i = 0; to->topk_slots != NULL && i < (uint64_t)num_tokens * ep->shape.top_k;
         i++) {
        if (slots[i] != NEP_SLOT_NONE) {
            slots[i] = comm->members[slots[i] / each] * each + slots[i] % each;
        }
    }
}

enum nep_status nep_ep_layout(struct nep_ep *ep, const struct nep_tokens *in,
                              const struct nep_layout_counts *counts)
{
    struct nep_tokens tokens;
    struct nep_layout_counts to;
    enum nep_status status = nep_ep_check(ep);
    if (status == NEP_OK) {
        status = nep_struct_copy(&tokens, sizeof tokens, in, sizeof tokens.size, "nep_tokens");
    }
    if (status == NEP_OK) {
        status = nep_struct_copy(&to, sizeof to, counts, sizeof to.size, "nep_layout_counts");
    }
    if (status == NEP_OK) {
        status = check_tokens(ep, NULL, &tokens);
    }
    if (status != NEP_OK) {
        return status;
    }
    uint64_t pairs = (uint64_t)tokens.num_tokens * ep->shape.top_k;
    uint32_t *slots = to.topk_slots != NULL ? to.topk_slots : malloc((pairs + 1) * sizeof *slots);
    if (slots == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for the slots of %u tokens",
                        tokens.num_tokens);
    }
    const struct nep_map_version *map = nep_maps_at(&ep->maps, ep->next_op);
    status = nep_route(ep, map, &tokens, slots);
    if (status == NEP_OK) {
        nep_layout_count(ep, slots, tokens.num_tokens, to.is_token_in_rank);
        copy_layout(ep, &to, slots, tokens.num_tokens);
    }
    if (slots != to.topk_slots) {
        free(slots);
    }
    return status;
}
