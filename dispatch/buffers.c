/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Registering is collective, as in other libraries with symmetric windows, so that whoever cannot
 * map a buffer says so then, to all, and not in the middle of a dispatch. Rejected: mapping a
 * peer's buffer when an operation first names it. It saves a call, and turns a wrong file or a
 * missing right into a fault of the communicator.
 */
#include "dispatch/buffers.h"

#include <stdlib.h>
#include <string.h>

#include "dispatch/ep.h"
#include "transport/bootstrap.h"

enum { MAX_REGISTERED = 4096 };

/* ---- places --------------------------------------------------------------------------------- */

bool nep_buffers_find(const struct nep_ep *ep, const void *from, uint64_t bytes,
                      struct nep_place *place_p)
{
    if (nep_pool_holds(&ep->pool, from, bytes)) {
        *place_p =
            (struct nep_place){.offset = (uint64_t)((const uint8_t *)from - (uint8_t *)ep->head)};
        return true;
    }
    for (uint32_t i = 0; i < ep->num_registered; i++) {
        const struct nep_registered *buffer = &ep->registered[i];
        uint64_t offset = (uint64_t)((uintptr_t)from - (uintptr_t)buffer->base);
        if (buffer->is_used && buffer->base != NULL && offset < buffer->bytes &&
            bytes <= buffer->bytes - offset) {
            *place_p = (struct nep_place){.offset = offset, .space = i + 1};
            return true;
        }
    }
    return false;
}

uint8_t *nep_buffers_at(const struct nep_ep *ep, uint32_t local, struct nep_place place)
{
    if (place.space == 0) {
        return ep->window[nep_ep_rank_at(ep, local)] + place.offset;
    }
    if (place.space > ep->num_registered || !ep->registered[place.space - 1].is_used) {
        return NULL;
    }
    uint8_t *base = ep->registered[place.space - 1].near[local].base;
    return base != NULL ? base + place.offset : NULL;
}

/* ---- registering ---------------------------------------------------------------------------- */

static void forget(struct nep_ep *ep, struct nep_registered *buffer)
{
    for (uint32_t g = 0; buffer->near != NULL && g < ep->node_size; g++) {
        nep_share_detach(&buffer->near[g]);
    }
    free(buffer->near);
    memset(buffer, 0, sizeof *buffer);
}

void nep_buffers_fini(struct nep_ep *ep)
{
    for (uint32_t i = 0; i < ep->num_registered; i++) {
        forget(ep, &ep->registered[i]);
    }
    free(ep->registered);
    ep->registered = NULL;
    ep->num_registered = 0;
}

/* The first free index, which is then there, with a table for the node. */
static enum nep_status reserve(struct nep_ep *ep, uint32_t *idx_p)
{
    uint32_t idx = 0;
    while (idx < ep->num_registered && ep->registered[idx].is_used) {
        idx++;
    }
    if (idx == MAX_REGISTERED) {
        return nep_fail(NEP_ERR_BUSY,
                        "%u buffers are registered, which is the most: deregister "
                        "some, or register larger ones",
                        idx);
    }
    if (idx == ep->num_registered) {
        void *more = realloc(ep->registered, (idx + 1) * sizeof *ep->registered);
        if (more == NULL) {
            return nep_fail(NEP_ERR_NO_MEMORY, "no memory for a list of %u buffers", idx + 1);
        }
        ep->registered = more;
        memset(&ep->registered[idx], 0, sizeof *ep->registered);
        ep->num_registered++;
    }
    ep->registered[idx].near = calloc(ep->node_size, sizeof *ep->registered[idx].near);
    if (ep->registered[idx].near == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for the buffers of %u ranks", ep->node_size);
    }
    *idx_p = idx;
    return NEP_OK;
}

/* What each rank tells all others. */
struct offer {
    struct nep_share_card card;
    uint32_t idx;
    uint32_t reserved;
};

static enum nep_status attach(struct nep_ep *ep, const struct offer *offers, uint32_t idx)
{
    for (uint32_t r = 0; r < ep->plan.topology->num_ranks; r++) {
        if (offers[r].idx != idx) {
            return nep_fail(NEP_ERR_MISMATCH,
                            "rank %u registers its buffer as number %u, rank %u as number %u: all "
                            "ranks must register and deregister in the same order",
                            nep_ep_name(ep, ep->rank), idx, nep_ep_name(ep, r), offers[r].idx);
        }
    }
    enum nep_status status = NEP_OK;
    for (uint32_t g = 0; status == NEP_OK && g < ep->node_size; g++) {
        uint32_t rank = nep_ep_rank_at(ep, g);
        if (g != ep->local) {
            status = nep_share_attach(&offers[rank].card, nep_ep_name(ep, rank),
                                      &ep->registered[idx].near[g]);
        }
    }
    return status;
}

static enum nep_status exchange(struct nep_ep *ep, const struct offer *mine, uint32_t idx)
{
    const struct nep_bootstrap *bootstrap = &ep->comm->bootstrap;
    uint32_t num_ranks = ep->plan.topology->num_ranks;
    uint64_t timeout_ns = ep->comm->timeout_ns;
    struct offer *offers = calloc(num_ranks, sizeof *offers);
    enum nep_status status =
        offers != NULL
            ? NEP_OK
            : nep_fail(NEP_ERR_NO_MEMORY, "no memory for the buffers of %u ranks", num_ranks);
    status = nep_bootstrap_common(bootstrap, ep->rank, num_ranks, status, timeout_ns);
    if (status == NEP_OK) {
        status = nep_bootstrap_allgather(bootstrap, mine, offers, sizeof *mine, timeout_ns,
                                         "registered buffers");
    }
    if (status == NEP_OK) {
        status = nep_bootstrap_common(bootstrap, ep->rank, num_ranks, attach(ep, offers, idx),
                                      timeout_ns);
    }
    free(offers);
    return status;
}

/* What this rank can say before the others are asked. */
static enum nep_status check(struct nep_ep *ep, const struct nep_buffer_params *given,
                             struct nep_buffer_params *params)
{
    enum nep_status status =
        nep_struct_copy(params, sizeof *params, given, sizeof params->size, "nep_buffer_params");
    if (status == NEP_OK && ep->device != NULL) {
        status = nep_fail(NEP_ERR_UNSUPPORTED, "tokens of this ep are in GPU memory, which is not "
                                               "registered: take it from nep_buffer_alloc");
    }
    if (status == NEP_OK && (params->base == NULL) != (params->bytes == 0)) {
        status = nep_fail(NEP_ERR_INVALID,
                          "a buffer of %zu bytes at %p: give both, or neither "
                          "where this rank has nothing to register",
                          params->bytes, params->base);
    }
    if (status == NEP_OK && ep->next_op != ep->completed_op) {
        status = nep_fail(NEP_ERR_BUSY,
                          "operation %llu is outstanding: complete it before a "
                          "buffer is registered",
                          (unsigned long long)ep->completed_op);
    }
    return status;
}

enum nep_status nep_buffer_register(struct nep_ep *ep, const struct nep_buffer_params *params,
                                    uint32_t *buffer_p)
{
    enum nep_status status = nep_ep_check(ep);
    if (status == NEP_OK && buffer_p == NULL) {
        status = nep_fail(NEP_ERR_INVALID, "nep_buffer_register: buffer_p is NULL");
    }
    if (status != NEP_OK) {
        return status;
    }
    struct nep_buffer_params own = {.size = sizeof own};
    struct offer mine = {.card = {.fd = -1}};
    uint32_t num_ranks = ep->plan.topology->num_ranks;
    status = check(ep, params, &own);
    if (status == NEP_OK) {
        status = nep_share_offer(own.base, own.bytes, own.fd, &mine.card);
    }
    bool is_reserved = false;
    if (status == NEP_OK) {
        status = reserve(ep, &mine.idx);
        is_reserved = status == NEP_OK;
    }
    status = nep_bootstrap_common(&ep->comm->bootstrap, ep->rank, num_ranks, status,
                                  ep->comm->timeout_ns);
    if (status == NEP_OK) {
        status = exchange(ep, &mine, mine.idx);
    }
    nep_share_withdraw(&mine.card);
    if (status != NEP_OK) {
        if (is_reserved) {
            forget(ep, &ep->registered[mine.idx]);
        }
        return status;
    }
    struct nep_registered *buffer = &ep->registered[mine.idx];
    buffer->is_used = true;
    buffer->base = own.base;
    buffer->bytes = own.bytes;
    *buffer_p = mine.idx;
    return NEP_OK;
}

enum nep_status nep_buffer_deregister(struct nep_ep *ep, uint32_t buffer)
{
    if (ep == NULL || buffer >= ep->num_registered || !ep->registered[buffer].is_used) {
        return nep_fail(NEP_ERR_NOT_FOUND, "buffer %u is not registered (any more)", buffer);
    }
    if (ep->next_op != ep->completed_op) {
        return nep_fail(NEP_ERR_BUSY,
                        "operation %llu is outstanding: complete it before a buffer "
                        "is deregistered",
                        (unsigned long long)ep->completed_op);
    }
    forget(ep, &ep->registered[buffer]);
    return NEP_OK;
}
