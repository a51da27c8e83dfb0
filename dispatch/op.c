/* SPDX-License-Identifier: Apache-2.0 */
/* Which calls are possible when, and the numbers of operations. */
#include "dispatch/op.h"

#include <string.h>

enum nep_status nep_op_check(struct nep_ep *ep, struct nep_handle *handle, const void *stream)
{
    enum nep_status status = nep_ep_check(ep);
    if (status != NEP_OK) {
        return status;
    }
    if (handle == NULL || handle->ep != ep) {
        return nep_fail(NEP_ERR_INVALID, "the handle is NULL or belongs to another ep");
    }
    if (stream != NULL && ep->device == NULL) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "a stream was given, but tokens of this ep are in host "
                        "memory: pass NULL");
    }
    return NEP_OK;
}

enum nep_status nep_op_check_begin(const struct nep_ep *ep, const struct nep_handle *handle)
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

enum nep_status nep_op_check_end(const struct nep_ep *ep, const struct nep_handle *handle,
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

void nep_op_begin(struct nep_ep *ep, struct nep_handle *handle, enum nep_op_kind kind)
{
    memset(&handle->op, 0, sizeof handle->op);
    handle->op.kind = kind;
    handle->op.number = ep->next_op++;
    if (ep->device == NULL) {
        memset(handle->rows_sent, 0, ep->plan.topology->num_ranks * sizeof *handle->rows_sent);
    }
    handle->state = kind == NEP_OP_COMBINE ? NEP_HANDLE_COMBINING : NEP_HANDLE_DISPATCHING;
    ep->in_flight[handle->op.number % ep->shape.outstanding] = handle;
}

/* Streams of tiles go on without what this operation did not send. */
static void end_streams(struct nep_ep *ep, uint64_t op)
{
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
    /* Release: the sink's window of COUNTS moves on; pairs with the acquire in nep_arrive. */
    atomic_store_explicit(&ep->head->completed, op + 1, memory_order_release);
}

void nep_op_end(struct nep_ep *ep, struct nep_handle *handle)
{
    uint64_t op = handle->op.number;
    if (ep->device == NULL) {
        end_streams(ep, op);
    }
    ep->in_flight[op % ep->shape.outstanding] = NULL;
    ep->completed_op = op + 1;
    handle->state = NEP_HANDLE_READY;
}

enum nep_status nep_op_settle(struct nep_ep *ep, enum nep_status status)
{
    ep->is_broken |= status != NEP_OK;
    return status;
}
