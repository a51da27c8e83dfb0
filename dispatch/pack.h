/* SPDX-License-Identifier: Apache-2.0 */
/* From the caller's tokens to rows that travel. */
#ifndef NEP_DISPATCH_PACK_H
#define NEP_DISPATCH_PACK_H

#include "dispatch/ep.h"

/*
 * Writes what accompanies rows [first, first + num) of the handle's list for `node`: token, slots
 * as that node numbers them, weights.
 */
void nep_pack_meta(const struct nep_ep *ep, const struct nep_handle *handle, uint32_t node,
                   uint32_t first, uint32_t num, void *meta);
/* A token as the caller gave it. */
struct nep_wire_row nep_pack_input(const struct nep_ep *ep, const struct nep_handle *handle,
                                   uint32_t token);
/* Copies or casts the rows themselves, one after the other. */
void nep_pack_rows(const struct nep_ep *ep, const struct nep_handle *handle, uint32_t node,
                   uint32_t first, uint32_t num, void *rows);
/*
 * Packs and posts tiles for other nodes as far as credits and send slots allow. Never waits. Sets
 * op.is_sent when none is left; else says what is missing. *progress_p is set when something was
 * sent.
 */
enum nep_status nep_pack_send(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p);

/* Whether rows of that number travel inside COUNTS, and the tiles they need otherwise. */
static inline bool nep_rides(const struct nep_ep *ep, uint32_t num_rows)
{
    return num_rows <= ep->shape.ride_rows;
}
static inline uint32_t nep_num_tiles(const struct nep_ep *ep, uint32_t num_rows)
{
    return (num_rows + ep->shape.tile_rows - 1) / ep->shape.tile_rows;
}

#endif
