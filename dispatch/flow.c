/* SPDX-License-Identifier: Apache-2.0 */
/* Credits by arithmetic on operation numbers first; messages only where an operation has many
 * tiles. */
#include "dispatch/flow.h"

#include <sched.h>

#include "dispatch/ep.h"

void nep_flow_begin(struct nep_flow *flow, uint64_t op, uint32_t window, uint32_t num_tiles)
{
    flow->planned += num_tiles;
    flow->end[op % window] = flow->planned;
}

void nep_flow_complete(struct nep_flow *flow, uint64_t op, uint32_t window)
{
    uint32_t outstanding = window / 2;
    if (op >= outstanding) {
        flow->implicit = flow->end[(op - outstanding) % window];
    }
}

bool nep_inflow_begin(struct nep_inflow *inflow, uint64_t op, uint32_t window, uint64_t end,
                      uint32_t num_tiles)
{
    if (end != inflow->planned + num_tiles) {
        return false;
    }
    /* The sender begins op, so it has completed op - S and knows op - 2S = op - W to be free. */
    uint64_t known = inflow->end[op % window];
    if (known > inflow->announced) {
        inflow->announced = known;
    }
    inflow->planned = end;
    inflow->end[op % window] = end;
    return true;
}

static bool is_in_flight(struct nep_ep *ep, const struct nep_inflow *inflow, uint32_t dst)
{
    struct nep_transport *inter = ep->comm->inter;
    return inflow->credit_put != 0 && inter->ops->completed(inter, dst) < inflow->credit_put;
}

bool nep_inflow_may_credit(struct nep_ep *ep, const struct nep_inflow *inflow, uint32_t dst,
                           uint64_t freed)
{
    return !is_in_flight(ep, inflow, dst) || freed <= inflow->credit_oldest + NEP_CREDIT_SPAN;
}

enum nep_status nep_inflow_credit(struct nep_ep *ep, struct nep_inflow *inflow,
                                  const struct nep_put *put, uint64_t freed)
{
    if (!is_in_flight(ep, inflow, put->dst)) {
        inflow->credit_oldest = freed;
    }
    inflow->announced = freed;
    return nep_ep_put(ep, put, &inflow->credit_put);
}

bool nep_inflow_is_settled(struct nep_ep *ep, const struct nep_inflow *inflow, uint32_t dst)
{
    if (nep_inflow_needs_credit(inflow, ep->shape.tile_slots)) {
        return false; /* whoever gives it has said what it waits for */
    }
    if (is_in_flight(ep, inflow, dst)) {
        nep_ep_miss(ep, "local completion", dst, 1, 0);
        return false;
    }
    return true;
}

uint8_t *nep_send_slot(struct nep_ep *ep, uint32_t ring)
{
    struct nep_send_ring *sends = &ep->rings[ring];
    uint32_t slot = (uint32_t)(sends->next % ep->shape.tile_slots);
    struct nep_transport *inter = ep->comm->inter;
    if (sends->slots[slot].number > inter->ops->completed(inter, sends->slots[slot].dst)) {
        return NULL;
    }
    uint64_t idx = (uint64_t)ring * ep->shape.tile_slots + slot;
    return (uint8_t *)ep->head + ep->region->send + idx * ep->region->send_tile_bytes;
}

void nep_send_turn(const struct nep_ep *ep)
{
    const struct nep_transport *inter = ep->comm->inter;
    if (ep->comm->spin_limit == 0 && (inter->ops->caps & NEP_CAP_THREAD) != 0) {
        sched_yield();
    }
}

enum nep_status nep_send_post(struct nep_ep *ep, uint32_t ring, uint32_t dst, uint64_t offset,
                              uint64_t bytes, uint32_t imm)
{
    struct nep_send_ring *sends = &ep->rings[ring];
    uint32_t slot = (uint32_t)(sends->next % ep->shape.tile_slots);
    uint64_t idx = (uint64_t)ring * ep->shape.tile_slots + slot;
    struct nep_put put = {
        .dst = dst,
        .window = ep->number,
        .offset = offset,
        .src = (uint8_t *)ep->head + ep->region->send + idx * ep->region->send_tile_bytes,
        .len = (uint32_t)bytes,
        .imm = imm,
    };
    enum nep_status status = nep_ep_put(ep, &put, &sends->slots[slot].number);
    sends->slots[slot].dst = dst;
    sends->next++;
    return status;
}
