/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The calls of dispatch: arguments, order of operations, halves. Everything that can be
 * refused is refused before an operation number is taken, so that a refused call leaves no trace on
 * other ranks.
 */
#include <stdlib.h>
#include <string.h>

#include "dispatch/counts.h"
#include "dispatch/device.h"
#include "dispatch/op.h"
#include "dispatch/pack.h"
#include "dispatch/recv.h"
#include "dispatch/wait.h"

/* ---- arguments ------------------------------------------------------------------------------ */

enum nep_status nep_op_check_tokens(const struct nep_ep *ep, const struct nep_handle *handle,
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

/* ---- steps ---------------------------------------------------------------------------------- */

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

/* The copy of a caller's outputs, checked as far as it can be before rows are counted. */
static enum nep_status copy_rows(const struct nep_ep *ep, const struct nep_rows *out,
                                 struct nep_rows *rows)
{
    enum nep_status status =
        nep_struct_copy(rows, sizeof *rows, out, sizeof rows->size, "nep_rows");
    if (status == NEP_OK && ep->device != NULL && rows->x != NULL && rows->scales == NULL &&
        ep->shape.format.scale_bytes != 0) {
        status = nep_fail(NEP_ERR_INVALID, "scales is NULL, but rows of type %s have some",
                          nep_dtype_name(ep->shape.wire));
    }
    return status;
}

/* What the handle keeps of a routing that only kernels see. */
static enum nep_status send_on_device(struct nep_ep *ep, struct nep_handle *handle,
                                      const struct nep_tokens *tokens, const struct nep_rows *out,
                                      void *stream)
{
    if (tokens->topk_ids != NULL || tokens->num_tokens == 0) {
        const struct nep_map_version *map = nep_maps_at(&ep->maps, ep->next_op);
        handle->num_tokens = tokens->num_tokens;
        handle->layer = tokens->layer;
        handle->map_digest = map->digest;
        handle->map_version = map->version;
        handle->has_routing = true;
    }
    nep_op_begin(ep, handle, NEP_OP_DISPATCH);
    handle->op.in = *tokens;
    ep->stats.dispatches++;
    ep->stats.tokens += tokens->num_tokens;
    /* Which tokens leave their node kernels count. */
    ep->stats.tokens_local += ep->plan.topology->num_nodes == 1 ? tokens->num_tokens : 0;
    return nep_op_settle(ep, nep_device_dispatch_send(handle, out, stream));
}

static enum nep_status check_send(struct nep_ep *ep, struct nep_handle *handle,
                                  const struct nep_tokens *in, void *stream,
                                  struct nep_tokens *tokens)
{
    enum nep_status status = nep_op_check(ep, handle, stream);
    if (status == NEP_OK) {
        status = nep_op_check_begin(ep, handle);
    }
    if (status == NEP_OK) {
        status = nep_struct_copy(tokens, sizeof *tokens, in, sizeof tokens->size, "nep_tokens");
    }
    return status == NEP_OK ? nep_op_check_tokens(ep, handle, tokens) : status;
}

enum nep_status nep_dispatch_send(struct nep_ep *ep, struct nep_handle *handle,
                                  const struct nep_tokens *in, void *stream)
{
    struct nep_tokens tokens;
    enum nep_status status = check_send(ep, handle, in, stream, &tokens);
    if (status == NEP_OK && ep->device != NULL) {
        return send_on_device(ep, handle, &tokens, NULL, stream);
    }
    if (status != NEP_OK) {
        return status;
    }
    uint64_t op = ep->next_op;
    nep_ep_begin_call(ep, NEP_CALL_DISPATCH_SEND, op);
    status = take_routing(ep, handle, &tokens);
    if (status != NEP_OK) {
        handle->has_routing = false;
        handle->state = NEP_HANDLE_EMPTY;
        return nep_ep_end_call(ep, NEP_CALL_DISPATCH_SEND, op, status);
    }
    nep_op_begin(ep, handle, NEP_OP_DISPATCH);
    handle->op.in = tokens;
    count_tokens(ep, handle);
    status = nep_counts_send(ep, handle);
    if (status == NEP_OK && is_next_to_send(ep, handle)) {
        status = nep_try(ep, handle, pack_step);
    }
    return nep_ep_end_call(ep, NEP_CALL_DISPATCH_SEND, op, status);
}

enum nep_status nep_dispatch_counts(struct nep_ep *ep, struct nep_handle *handle,
                                    struct nep_counts *counts_p)
{
    enum nep_status status = nep_op_check(ep, handle, NULL);
    if (status != NEP_OK) {
        return status;
    }
    if (counts_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_dispatch_counts: counts_p is NULL");
    }
    if (handle->state == NEP_HANDLE_EMPTY) {
        status = nep_fail(NEP_ERR_INVALID, "handle %u has not been dispatched", handle->id);
    } else if (ep->device != NULL) {
        status = nep_device_counts(handle);
    } else if (handle->state == NEP_HANDLE_DISPATCHING) {
        status = nep_wait_in(ep, handle, counts_step, NEP_CALL_COUNTS);
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

enum nep_status nep_dispatch_counts_device(struct nep_ep *ep, struct nep_handle *handle,
                                           struct nep_counts *counts_p)
{
    enum nep_status status = nep_op_check(ep, handle, NULL);
    if (status == NEP_OK && counts_p == NULL) {
        status = nep_fail(NEP_ERR_INVALID, "nep_dispatch_counts_device: counts_p is NULL");
    }
    if (status == NEP_OK && ep->device == NULL) {
        status = nep_fail(NEP_ERR_UNSUPPORTED,
                          "tokens of this ep are in host memory: call nep_dispatch_counts");
    }
    if (status == NEP_OK) {
        nep_device_counts_at(handle, counts_p);
    }
    return status;
}

enum nep_status nep_handle_bind_output(struct nep_handle *handle, const struct nep_rows *out)
{
    struct nep_rows rows;
    if (handle == NULL) {
        return nep_fail(NEP_ERR_INVALID, "the handle is NULL");
    }
    enum nep_status status = nep_op_check(handle->ep, handle, NULL);
    if (status == NEP_OK && handle->state == NEP_HANDLE_DISPATCHING) {
        status = nep_fail(NEP_ERR_BUSY, "handle %u is being dispatched: bind outputs before",
                          handle->id);
    }
    if (status == NEP_OK && out != NULL) {
        status = copy_rows(handle->ep, out, &rows);
    }
    if (status == NEP_OK && handle->ep->device != NULL) {
        status = nep_device_bind(handle, out != NULL ? &rows : NULL);
    }
    return status;
}

static enum nep_status overflow(const struct nep_handle *handle, const struct nep_rows *rows)
{
    return nep_fail(NEP_ERR_OVERFLOW,
                    "the output has room for %llu rows, %llu are needed: call again with a "
                    "larger one, nothing is lost",
                    rows->x != NULL ? (unsigned long long)rows->capacity : 0ull,
                    (unsigned long long)handle->num_rows);
}

/* num_rows is known where the caller asked for counts; else a kernel looks. */
static enum nep_status receive_on_device(struct nep_ep *ep, struct nep_handle *handle,
                                         const struct nep_rows *rows, void *stream)
{
    if (nep_device_is_counted(handle) && rows->capacity < handle->num_rows) {
        return overflow(handle, rows);
    }
    handle->op.is_receiving = true;
    enum nep_status status = nep_op_settle(ep, nep_device_dispatch_recv(handle, rows, stream));
    if (status == NEP_OK) {
        nep_op_end(ep, handle);
    }
    return status;
}

enum nep_status nep_dispatch_recv(struct nep_ep *ep, struct nep_handle *handle,
                                  const struct nep_rows *out, void *stream)
{
    struct nep_rows rows;
    enum nep_status status = nep_op_check(ep, handle, stream);
    if (status == NEP_OK) {
        status = nep_op_check_end(ep, handle, NEP_HANDLE_DISPATCHING);
    }
    if (status == NEP_OK) {
        status = copy_rows(ep, out, &rows);
    }
    if (status == NEP_OK && ep->device != NULL) {
        return receive_on_device(ep, handle, &rows, stream);
    }
    if (status == NEP_OK) {
        status = nep_wait_in(ep, handle, counts_step, NEP_CALL_COUNTS);
    }
    if (status == NEP_OK &&
        (rows.capacity < handle->num_rows || (rows.x == NULL && handle->num_real_rows != 0))) {
        status = overflow(handle, &rows);
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
    status = nep_wait_in(ep, handle, nep_recv_step, NEP_CALL_ROWS);
    if (status == NEP_OK) {
        nep_op_end(ep, handle);
    }
    return status;
}

/* ---- both halves ---------------------------------------------------------------------------- */

enum nep_status nep_dispatch(struct nep_ep *ep, struct nep_handle *handle,
                             const struct nep_tokens *in, const struct nep_rows *out, void *stream)
{
    struct nep_tokens tokens;
    struct nep_rows rows;
    if (ep == NULL || ep->device == NULL) {
        enum nep_status status = nep_dispatch_send(ep, handle, in, stream);
        return status == NEP_OK ? nep_dispatch_recv(ep, handle, out, stream) : status;
    }
    enum nep_status status = check_send(ep, handle, in, stream, &tokens);
    if (status == NEP_OK) {
        status = copy_rows(ep, out, &rows);
    }
    if (status == NEP_OK) {
        /* Behind one that is outstanding only the send half is possible now. */
        bool is_next = ep->next_op == ep->completed_op;
        status = send_on_device(ep, handle, &tokens, is_next ? &rows : NULL, stream);
    }
    return status == NEP_OK ? nep_dispatch_recv(ep, handle, out, stream) : status;
}
