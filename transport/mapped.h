/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What `shm` and `loop` share: peers' windows are pointers here, so a put is a copy and a call of
 * the sink on the peer's own memory, done by the sender's thread. Nobody forwards and nobody is
 * late.
 */
#ifndef NEP_TRANSPORT_MAPPED_H
#define NEP_TRANSPORT_MAPPED_H

#include <stdatomic.h>

#include "transport/transport.h"

enum { NEP_MAX_WINDOWS = 64 };

struct nep_mapped_window {
    size_t bytes;   /* equal on all ranks that are mapped; 0: free */
    uint8_t **base; /* [num_ranks]; NULL where a rank is not mapped */
};

struct nep_mapped {
    struct nep_transport transport;
    struct nep_transport_params params;
    struct nep_mapped_window windows[NEP_MAX_WINDOWS];
    atomic_uint_fast64_t *num_puts; /* [num_ranks]: every put is complete when it returns */
    atomic_uint_fast64_t put_bytes;
};

enum nep_status nep_mapped_init(struct nep_mapped *mapped, const struct nep_transport_ops *ops,
                                const struct nep_transport_params *params);
void nep_mapped_fini(struct nep_mapped *mapped);
/* Whether this transport serves `rank` (its node only, or everyone). */
bool nep_mapped_serves(const struct nep_mapped *mapped, uint32_t rank);
/* Claims entry `window`: allocates its table of bases. */
enum nep_status nep_mapped_window_open(struct nep_mapped *mapped, uint32_t window, size_t bytes);
void nep_mapped_window_free(struct nep_mapped *mapped, uint32_t window);

/* Entries of the operations table that both use as they are. */
void *nep_mapped_peer_window(struct nep_transport *transport, uint32_t window, uint32_t rank);
enum nep_status nep_mapped_put(struct nep_transport *transport, const struct nep_put *put,
                               uint64_t *number_p);
void nep_mapped_progress(struct nep_transport *transport);
uint64_t nep_mapped_completed(struct nep_transport *transport, uint32_t dst);
void nep_mapped_stats(struct nep_transport *transport, struct nep_transport_stats *stats);

#endif
