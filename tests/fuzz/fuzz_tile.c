/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any tile, its head and what accompanies its rows: of a dispatch, of sums that come back, or one
 * that a neighbour publishes. Rows are stored inside the output, or the sender is named and
 * refused. Input: a byte for the moment (fuzz_group.c) and which tile; then patches of the right
 * one.
 */
#include "dispatch/pack.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/fuzz_group.h"

/* The tile that rank 2 sent to rank 0, or for it. */
static uint8_t *far_tile(struct nep_ep *ep, const struct nep_handle *handle, uint32_t number,
                         uint32_t *bytes_p)
{
    const struct nep_region *region = ep->region;
    if (handle->op.kind == NEP_OP_COMBINE) {
        *bytes_p = (uint32_t)region->combine_tile_bytes;
        return (uint8_t *)ep->head + region->combine_landing +
               number % ep->shape.tile_slots * region->combine_tile_bytes;
    }
    uint64_t idx = (uint64_t)nep_plan_lane(&ep->plan, 2, ep->node) * ep->shape.tile_slots +
                   number % ep->shape.tile_slots;
    *bytes_p = (uint32_t)region->dispatch_tile_bytes;
    return (uint8_t *)ep->head + region->dispatch_landing + idx * region->dispatch_tile_bytes;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    if (len == 0) {
        return 0;
    }
    struct fuzz_group *group = fuzz_group_at(data[0] & 63u);
    struct nep_ep *ep = fuzz_group_ep(group);
    uint32_t bytes;
    uint8_t *tile = far_tile(ep, fuzz_group_handle(group), data[0] >> 6, &bytes);
    fuzz_group_patch(tile, bytes, data + 1, len - 1);
    fuzz_group_go_on(group);
    return 0;
}
