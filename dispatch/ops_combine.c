/* SPDX-License-Identifier: Apache-2.0 */
/* The calls of combine: arguments, halves, and which executor does the work. */
#include <string.h>

#include "base/backoff.h"
#include "dispatch/combine.h"
#include "dispatch/counts.h"
#include "dispatch/device.h"
#include "dispatch/op.h"
#include "dispatch/wait.h"

/* Other nodes, and the rank layout's callers, weigh rows before they come here. */
static enum nep_status check_token_weights(const struct nep_ep *ep)
{
    if (ep->shape.layout == NEP_LAYOUT_RANK) {
        return nep_fail(NEP_ERR_INVALID, "token_weights are for the expert layouts: in the rank "
                                         "layout the caller weighs the rows");
    }
    if (ep->plan.topology->num_nodes != 1) {
        return nep_fail(
            NEP_ERR_UNSUPPORTED,
            "token_weights with %u nodes: rows are summed on the node of their experts, "
            "which has the weights of the dispatch alone; give them to nep_dispatch",
            ep->plan.topology->num_nodes);
    }
    return NEP_OK;
}

static enum nep_status check_combine(struct nep_ep *ep, struct nep_handle *handle,
                                     const struct nep_expert_rows *in, void *stream,
                                     struct nep_expert_rows *rows)
{
    enum nep_status status = nep_op_check(ep, handle, stream);
    if (status == NEP_OK) {
        status = nep_op_check_begin(ep, handle);
    }
    if (status == NEP_OK && handle->state != NEP_HANDLE_READY) {
        status = nep_fail(NEP_ERR_INVALID, "handle %u has not been dispatched", handle->id);
    }
    if (status == NEP_OK) {
        status = nep_struct_copy(rows, sizeof *rows, in, sizeof rows->size, "nep_expert_rows");
    }
    if (status == NEP_OK && rows->y == NULL && handle->num_real_rows != 0) {
        status = nep_fail(NEP_ERR_INVALID, "y is NULL, but %llu rows were dispatched here",
                          (unsigned long long)handle->num_real_rows);
    }
    if (status == NEP_OK && rows->topk_weights != NULL && ep->shape.layout != NEP_LAYOUT_RANK) {
        status = nep_fail(NEP_ERR_INVALID,
                          "topk_weights come back in the rank layout alone: in the expert layouts "
                          "combine weighs the rows itself");
    }
    if (status == NEP_OK && rows->token_weights != NULL) {
        status = check_token_weights(ep);
    }
    return status;
}

/* is_whole: the complete half follows at once. */
static enum nep_status send_combine(struct nep_ep *ep, struct nep_handle *handle,
                                    const struct nep_expert_rows *in, bool is_whole, void *stream)
{
    struct nep_expert_rows rows;
    enum nep_status status = check_combine(ep, handle, in, stream, &rows);
    if (status != NEP_OK) {
        return status;
    }
    uint64_t op = ep->next_op;
    nep_ep_begin_call(ep, NEP_CALL_COMBINE_SEND, op);
    nep_op_begin(ep, handle, NEP_OP_COMBINE);
    handle->op.rows = rows;
    ep->stats.combines++;
    if (ep->device != NULL) {
        status = nep_op_settle(ep, nep_device_combine_send(handle, is_whole, stream));
        return nep_ep_end_call(ep, NEP_CALL_COMBINE_SEND, op, status);
    }
    uint32_t num_ranks = ep->plan.topology->num_ranks;
    memset(handle->rows_read, 0, num_ranks * sizeof *handle->rows_read);
    memset(handle->rows_staged, 0, num_ranks * sizeof *handle->rows_staged);
    nep_combine_bind(ep, handle);
    status = nep_counts_send(ep, handle);
    if (status == NEP_OK && handle->op.number == ep->completed_op) {
        status = nep_try(ep, handle, nep_combine_step);
    }
    return nep_ep_end_call(ep, NEP_CALL_COMBINE_SEND, op, status);
}

/* rows: what was, or will be, sent. */
static enum nep_status check_sum(const struct nep_handle *handle,
                                 const struct nep_expert_rows *rows,
                                 const struct nep_tokens_out *out, struct nep_tokens_out *sum)
{
    enum nep_status status =
        nep_struct_copy(sum, sizeof *sum, out, sizeof sum->size, "nep_tokens_out");
    if (status == NEP_OK &&
        (sum->num_tokens != handle->num_tokens || (sum->y == NULL && sum->num_tokens != 0))) {
        status = nep_fail(NEP_ERR_INVALID,
                          "the result has %u tokens%s; the dispatch of handle %u had %u",
                          sum->num_tokens, sum->y == NULL ? " and y is NULL" : "", handle->id,
                          handle->num_tokens);
    }
    if (status == NEP_OK && sum->present != NULL && handle->device != NULL) {
        status = nep_fail(NEP_ERR_UNSUPPORTED, "present is not counted where tokens are in GPU "
                                               "memory: all ranks live there");
    }
    if (status == NEP_OK && sum->topk_weights != NULL && rows->topk_weights == NULL) {
        status = nep_fail(NEP_ERR_INVALID, "topk_weights are asked for, but none were passed to "
                                           "nep_combine_send");
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
    const float *given = handle->op.rows.token_weights;
    const float *weights = given != NULL ? given : handle->weights;
    for (uint32_t t = 0; t < handle->num_tokens; t++) {
        const uint32_t *slots = handle->slots + (uint64_t)t * top_k;
        float sum = 0.0f;
        for (uint32_t k = 0; k < top_k; k++) {
            bool counts = slots[k] != NEP_SLOT_NONE;
            for (uint32_t i = 0; counts && ep->shape.layout == NEP_LAYOUT_RANK && i < k; i++) {
                counts = slots[i] == NEP_SLOT_NONE ||
                         ep->slot_at[slots[i]].rank != ep->slot_at[slots[k]].rank;
            }
            float weight =
                ep->shape.layout == NEP_LAYOUT_RANK ? 1.0f : weights[(uint64_t)t * top_k + k];
            sum += counts ? weight : 0.0f;
        }
        present[t] = sum;
    }
}

static enum nep_status receive_combine(struct nep_ep *ep, struct nep_handle *handle,
                                       const struct nep_tokens_out *out, bool is_whole,
                                       void *stream)
{
    struct nep_tokens_out sum;
    enum nep_status status = nep_op_check(ep, handle, stream);
    if (status == NEP_OK) {
        status = nep_op_check_end(ep, handle, NEP_HANDLE_COMBINING);
    }
    if (status == NEP_OK) {
        status = check_sum(handle, &handle->op.rows, out, &sum);
    }
    if (status != NEP_OK) {
        return status;
    }
    handle->op.sum = sum;
    handle->op.is_receiving = true;
    status = ep->device != NULL
                 ? nep_op_settle(ep, nep_device_combine_recv(handle, is_whole, stream))
                 : nep_wait_in(ep, handle, nep_combine_step, NEP_CALL_COMBINE_RECV);
    if (status == NEP_OK && sum.present != NULL) {
        fill_present(ep, handle, sum.present);
    }
    if (status == NEP_OK) {
        nep_op_end(ep, handle);
    }
    return status;
}

/* ---- outputs that are still being written ---------------------------------------------------- */

/* Until one slot's rows are written. */
static enum nep_status await_slot(const struct nep_ep *ep, const struct nep_written *written,
                                  uint32_t slot, uint32_t rows)
{
    const uint32_t *flags = written->flags + (uint64_t)slot * written->flags_per_slot;
    uint32_t each = written->rows_per_flag != 0 ? written->rows_per_flag : UINT32_MAX;
    uint32_t num = (uint32_t)(((uint64_t)rows + each - 1) / each);
    if (num > written->flags_per_slot) {
        return nep_fail(NEP_ERR_INVALID,
                        "slot %u has %u rows, but %u flags for %u rows each: give it %u", slot,
                        rows, written->flags_per_slot, each, num);
    }
    struct nep_backoff backoff;
    nep_backoff_init(&backoff, ep->timeout_ns, ep->comm->spin_limit);
    for (uint32_t i = 0; i < num; i++) {
        /* Acquire: pairs with the release of the caller's writer; rows are read after it. */
        uint32_t value = __atomic_load_n(&flags[i], __ATOMIC_ACQUIRE);
        while (value < written->least) {
            if (!nep_backoff_pause(&backoff)) {
                return nep_fail(NEP_ERR_TIMEOUT,
                                "expert outputs of slot %u were not written within %.3f s: flag %u "
                                "is %u, waited for %u",
                                slot, (double)ep->timeout_ns / 1e9, i, value, written->least);
            }
            value = __atomic_load_n(&flags[i], __ATOMIC_ACQUIRE);
        }
        nep_backoff_reset(&backoff);
    }
    return NEP_OK;
}

enum nep_status nep_combine_await(struct nep_ep *ep, struct nep_handle *handle,
                                  const struct nep_written *written, void *stream)
{
    struct nep_written is;
    enum nep_status status = nep_op_check(ep, handle, stream);
    if (status == NEP_OK && handle->state != NEP_HANDLE_READY) {
        status = nep_fail(NEP_ERR_INVALID, "handle %u has not been dispatched", handle->id);
    }
    if (status == NEP_OK && ep->shape.layout == NEP_LAYOUT_RANK) {
        status = nep_fail(NEP_ERR_INVALID, "flags are by slot: they are for the expert layouts");
    }
    if (status == NEP_OK) {
        status = nep_struct_copy(&is, sizeof is, written, sizeof is.size, "nep_written");
    }
    if (status == NEP_OK && (is.flags == NULL || is.flags_per_slot == 0)) {
        status = nep_fail(NEP_ERR_INVALID, "flags is %s, flags_per_slot is %u; both are required",
                          is.flags == NULL ? "NULL" : "given", is.flags_per_slot);
    }
    if (status == NEP_OK && ep->device != NULL) {
        return nep_device_combine_await(handle, &is, stream);
    }
    for (uint32_t l = 0; status == NEP_OK && l < ep->shape.slots_per_rank; l++) {
        status = await_slot(ep, &is, l, handle->rows_per_slot[l]);
    }
    return status;
}

enum nep_status nep_combine_send(struct nep_ep *ep, struct nep_handle *handle,
                                 const struct nep_expert_rows *in, void *stream)
{
    return send_combine(ep, handle, in, false, stream);
}

enum nep_status nep_combine_recv(struct nep_ep *ep, struct nep_handle *handle,
                                 const struct nep_tokens_out *out, void *stream)
{
    return receive_combine(ep, handle, out, false, stream);
}

enum nep_status nep_combine(struct nep_ep *ep, struct nep_handle *handle,
                            const struct nep_expert_rows *in, const struct nep_tokens_out *out,
                            void *stream)
{
    struct nep_expert_rows rows;
    struct nep_tokens_out sum;
    enum nep_status status = check_combine(ep, handle, in, stream, &rows);
    if (status == NEP_OK) {
        status = check_sum(handle, &rows, out, &sum); /* before anything begins */
    }
    /* Behind one that is outstanding only the send half is possible now. */
    bool is_whole = ep != NULL && ep->next_op == ep->completed_op;
    if (status == NEP_OK) {
        status = send_combine(ep, handle, in, is_whole, stream);
    }
    return status == NEP_OK ? receive_combine(ep, handle, out, is_whole, stream) : status;
}
