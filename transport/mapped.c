/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Windows that are pointers. Rejected: a ring of arrivals per pair that the receiver drains. It
 * needs a receiver that is awake; here the sender itself runs the sink on the peer's words, so a
 * rank that computes holds nobody up.
 */
#include "transport/mapped.h"

#include <stdlib.h>
#include <string.h>

enum nep_status nep_mapped_init(struct nep_mapped *mapped, const struct nep_transport_ops *ops,
                                const struct nep_transport_params *params)
{
    mapped->transport.ops = ops;
    mapped->params = *params;
    mapped->num_puts = calloc(params->topology->num_ranks, sizeof *mapped->num_puts);
    if (mapped->num_puts == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "%s: no memory for the counters of %u ranks", ops->name,
                        params->topology->num_ranks);
    }
    return NEP_OK;
}

void nep_mapped_fini(struct nep_mapped *mapped)
{
    free(mapped->num_puts);
}

bool nep_mapped_serves(const struct nep_mapped *mapped, uint32_t rank)
{
    const struct nep_topology *topology = mapped->params.topology;
    return !mapped->params.node_only || topology->node_of_rank[rank] == topology->node;
}

enum nep_status nep_mapped_window_open(struct nep_mapped *mapped, uint32_t window, size_t bytes)
{
    const char *name = mapped->transport.ops->name;
    if (window >= NEP_MAX_WINDOWS || mapped->windows[window].bytes != 0 || bytes == 0) {
        return nep_fail(NEP_ERR_INTERNAL, "%s: window %u of %zu bytes is impossible or in use",
                        name, window, bytes);
    }
    uint8_t **base = calloc(mapped->params.topology->num_ranks, sizeof *base);
    if (base == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "%s: no memory for the table of window %u", name,
                        window);
    }
    mapped->windows[window].base = base;
    mapped->windows[window].bytes = bytes;
    return NEP_OK;
}

void nep_mapped_window_free(struct nep_mapped *mapped, uint32_t window)
{
    free(mapped->windows[window].base);
    memset(&mapped->windows[window], 0, sizeof mapped->windows[window]);
}

void *nep_mapped_peer_window(struct nep_transport *transport, uint32_t window, uint32_t rank)
{
    struct nep_mapped *mapped = (struct nep_mapped *)transport;
    return mapped->windows[window].base != NULL ? mapped->windows[window].base[rank] : NULL;
}

enum nep_status nep_mapped_put(struct nep_transport *transport, const struct nep_put *put,
                               uint64_t *number_p)
{
    struct nep_mapped *mapped = (struct nep_mapped *)transport;
    const struct nep_mapped_window *window = &mapped->windows[put->window];
    uint8_t *base = window->base != NULL ? window->base[put->dst] : NULL;
    if (base == NULL || put->offset > window->bytes || put->len > window->bytes - put->offset) {
        return nep_fail(NEP_ERR_INTERNAL, "%s: put of %u bytes at %llu of window %u of rank %u",
                        transport->ops->name, put->len, (unsigned long long)put->offset,
                        put->window, put->dst);
    }
    if (put->len != 0) {
        memcpy(base + put->offset, put->src, put->len);
        atomic_fetch_add_explicit(&mapped->put_bytes, put->len, memory_order_relaxed);
    }
    /* The sink's stores release the copied bytes to the receiver. */
    if (!put->is_silent) {
        mapped->params.sink(base, put->dst, mapped->params.topology->rank, put->imm);
    }
    *number_p = atomic_fetch_add_explicit(&mapped->num_puts[put->dst], 1, memory_order_relaxed) + 1;
    return NEP_OK;
}

void nep_mapped_progress(struct nep_transport *transport)
{
    (void)transport;
}

uint64_t nep_mapped_completed(struct nep_transport *transport, uint32_t dst)
{
    struct nep_mapped *mapped = (struct nep_mapped *)transport;
    return atomic_load_explicit(&mapped->num_puts[dst], memory_order_relaxed);
}

void nep_mapped_stats(struct nep_transport *transport, struct nep_transport_stats *stats)
{
    struct nep_mapped *mapped = (struct nep_mapped *)transport;
    memset(stats, 0, sizeof *stats);
    for (uint32_t r = 0; r < mapped->params.topology->num_ranks; r++) {
        stats->puts += atomic_load_explicit(&mapped->num_puts[r], memory_order_relaxed);
    }
    stats->put_bytes = atomic_load_explicit(&mapped->put_bytes, memory_order_relaxed);
    stats->work_requests = stats->puts;
}
