/* SPDX-License-Identifier: Apache-2.0 */
/* Route and layout alone, without an operation: what a dispatch of these tokens would send where.
 */
#include <stdlib.h>
#include <string.h>

#include "dispatch/device.h"
#include "dispatch/op.h"

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
        status = nep_op_check_tokens(ep, NULL, &tokens);
    }
    if (status == NEP_OK && ep->device != NULL) {
        return nep_device_layout(ep, &tokens, &to);
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
