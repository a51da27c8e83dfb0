/* SPDX-License-Identifier: Apache-2.0 */
/* COUNTS: written once per operation to every rank that lands them, read by everyone on the node.
 */
#ifndef NEP_DISPATCH_COUNTS_H
#define NEP_DISPATCH_COUNTS_H

#include "dispatch/ep.h"

/*
 * Announces the handle's operation: own page first, then the fabric. Dispatch: after layout; tiles
 * of every stream are begun here. Waits only for the local completion of COUNTS sent W operations
 * ago.
 */
enum nep_status nep_counts_send(struct nep_ep *ep, struct nep_handle *handle);

/*
 * Source s's COUNTS of an operation where this node has them; NULL while they are not here. Others
 * can write there: what is believed is the copy that nep_counts_take has checked.
 */
const struct nep_counts_msg *nep_counts_find(const struct nep_ep *ep, uint32_t source, uint64_t op);
/*
 * *done_p: COUNTS of all ranks are here. Then takes them: copies each once, checks that all mean
 * the same operation, and (dispatch) computes every position. Else names the first rank that is
 * missing.
 */
enum nep_status nep_counts_take(struct nep_ep *ep, struct nep_handle *handle, bool *done_p);
/* Whether that many rows of a source come in its COUNTS. */
bool nep_counts_carry(const struct nep_ep *ep, uint32_t source, uint32_t num_rows);
/* Where those rows begin, of COUNTS that were taken. */
const uint8_t *nep_counts_rows(const struct nep_ep *ep, uint32_t source, uint64_t op);

/* What the operation taken last was told by a source. */
static inline const struct nep_counts_msg *nep_counts_taken(const struct nep_ep *ep,
                                                            uint32_t source)
{
    uint64_t each = nep_counts_ride_offset(&ep->shape, ep->node_size);
    return (const struct nep_counts_msg *)(ep->counts + source * each);
}

/* The tables behind a dispatch's COUNTS for this node: [G] and [G * L]. */
static inline const uint32_t *nep_counts_rows_per_rank(const struct nep_counts_msg *msg)
{
    return (const uint32_t *)((const uint8_t *)msg + sizeof *msg);
}
static inline const uint32_t *nep_counts_rows_per_slot(const struct nep_ep *ep,
                                                       const struct nep_counts_msg *msg)
{
    return (const uint32_t *)((const uint8_t *)msg +
                              nep_counts_rows_per_slot_offset(ep->node_size));
}

#endif
