/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From COUNTS to the place of every row. A position on rank D depends on counts alone: rows are
 * ordered by (slot, source rank, token) in the expert layouts, by (source rank, token) in the rank
 * layout. So whoever walks a source's rows in order computes the same positions: D itself, the
 * source that pushes, and the rank that will sum.
 */
#ifndef NEP_DISPATCH_POSITIONS_H
#define NEP_DISPATCH_POSITIONS_H

#include "dispatch/ep.h"

/* Cursors per source, sizes of this rank's output, empty tables. All COUNTS must be here. */
void nep_positions_from_counts(struct nep_ep *ep, struct nep_handle *handle);

/* Where the payload of a run of rows is: row i at base + (by_token ? token : i) * stride. */
struct nep_payload {
    const uint8_t *base; /* NULL: the rows come by themselves (pushed) */
    uint64_t stride;
    bool by_token;
};

/*
 * Walks `num` rows of source s in order: advances cursors, fills the caller's output arrays and
 * rows for this rank's share, the consumer's addends if this rank sums for s, the producer's table.
 * A row that contradicts COUNTS is refused (NEP_ERR_FORMAT, naming s).
 */
enum nep_status nep_positions_walk(struct nep_ep *ep, struct nep_handle *handle, uint32_t source,
                                   const void *meta, uint32_t num,
                                   const struct nep_payload *payload);

/* This rank's consumer of source s: 0 for its own, 1 + lane, or UINT32_MAX where another rank sums.
 */
static inline uint32_t nep_consumer_idx(const struct nep_ep *ep, uint32_t rank, uint32_t source)
{
    if (source == rank) {
        return 0;
    }
    if (ep->plan.topology->node_of_rank[source] == ep->node ||
        nep_plan_landing(&ep->plan, source, ep->node) != rank) {
        return UINT32_MAX;
    }
    return 1 + nep_plan_lane(&ep->plan, source, ep->node);
}

#endif
