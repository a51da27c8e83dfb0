/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Route and layout: from a router's ids to physical slots, to counts per rank, node and slot, and
 * to the list of tokens that each node gets. Deterministic, without atomics, the same on every
 * executor.
 */
#ifndef NEP_DISPATCH_LAYOUT_H
#define NEP_DISPATCH_LAYOUT_H

#include <stdint.h>

#include "nearep.h"

struct nep_map_version;
struct nep_ep;
struct nep_handle;

/* Scratch and result of one layout, kept by the ep. */
struct nep_layout_tables {
    uint32_t *rank_rows;  /* [R] tokens for each rank */
    uint32_t *node_rows;  /* [N] tokens for each node */
    uint32_t *slot_rows;  /* [R * L] (token, k) pairs for each physical slot */
    uint32_t *rank_stamp; /* [R] last token that counted, + 1 */
    uint32_t *node_stamp; /* [N] */
};

enum nep_status nep_layout_init(struct nep_layout_tables *layout, uint32_t num_ranks,
                                uint32_t num_nodes, uint32_t slots_per_rank);
void nep_layout_fini(struct nep_layout_tables *layout);

/*
 * Chooses a copy of every id from its layer's table. slots: [T][K], NEP_SLOT_NONE where the id is
 * -1, or where no copy of the expert is left. An id out of range is NEP_ERR_INVALID with token, k
 * and value.
 */
enum nep_status nep_route(const struct nep_ep *ep, const struct nep_map_version *map,
                          const struct nep_tokens *in, uint32_t *slots);
/* Adds the pairs of a call whose ids nep_route has checked to load[E]. */
void nep_route_count(const struct nep_tokens *in, uint32_t top_k, uint64_t *load);

/* Counts into ep->layout. is_token_in_rank: [T][R] or NULL. */
void nep_layout_count(struct nep_ep *ep, const uint32_t *slots, uint32_t num_tokens,
                      uint8_t *is_token_in_rank);
/* After nep_layout_count: the handle's lists of tokens per node. */
void nep_layout_lists(struct nep_ep *ep, struct nep_handle *handle);

#endif
