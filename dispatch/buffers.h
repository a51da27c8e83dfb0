/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory that the ranks of a node reach: the pool, which lies in the window, and what callers have
 * registered. A place names a byte of it in a way that is the same on every rank.
 */
#ifndef NEP_DISPATCH_BUFFERS_H
#define NEP_DISPATCH_BUFFERS_H

#include <stdbool.h>

#include "dispatch/region.h"
#include "transport/share.h"

struct nep_ep;

/* One call of nep_buffer_register. Its index is the same on all ranks. */
struct nep_registered {
    bool is_used;
    uint8_t *base; /* of this rank; NULL: it has nothing */
    uint64_t bytes;
    struct nep_share *near; /* [G] what the node's ranks have; the own one is empty */
};

/* Where [from, from + bytes) is for other ranks of the node; false: private memory. */
bool nep_buffers_find(const struct nep_ep *ep, const void *from, uint64_t bytes,
                      struct nep_place *place_p);
/* That place of a local rank as it is mapped here; NULL: there is no such registration. */
uint8_t *nep_buffers_at(const struct nep_ep *ep, uint32_t local, struct nep_place place);
/* Forgets all registrations. */
void nep_buffers_fini(struct nep_ep *ep);

#endif
