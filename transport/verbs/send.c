/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Puts. Each gets a number and a record in its peer's ring, from which post.c takes it; so a put
 * never blocks and is never refused for a full queue. Completions take records off the ring again.
 */
#include <stdlib.h>
#include <string.h>

#include "transport/verbs/verbs.h"

enum { FIRST_RING = 64 };

void nep_verbs_peer_advance(struct nep_verbs_peer *peer)
{
    uint64_t completed = atomic_load_explicit(&peer->completed, memory_order_relaxed);
    while (completed < peer->posted) {
        const struct nep_verbs_record *record = nep_verbs_record_of(peer, completed + 1);
        if (record->on_qps != 0 || record->must_resend) {
            break;
        }
        completed++;
    }
    /* release: pairs with the acquire in nep_verbs_completed; the device is done with the source */
    atomic_store_explicit(&peer->completed, completed, memory_order_release);
}

uint64_t nep_verbs_peer_forget(struct nep_verbs_peer *peer, uint32_t window, bool forget)
{
    uint64_t num = 0;
    uint64_t completed = atomic_load_explicit(&peer->completed, memory_order_relaxed);
    for (uint64_t n = completed + 1; n <= peer->next; n++) {
        struct nep_verbs_record *record = nep_verbs_record_of(peer, n);
        bool is_meant = record->put.window == window && record->put.len > 0;
        num += is_meant;
        if (is_meant && forget) { /* what the device has already lies in memory that is pinned */
            record->put.len = 0;
            record->put.is_silent = true;
        }
    }
    return num;
}

/* ---- the calls ------------------------------------------------------------------------------ */

static enum nep_status check(const struct nep_verbs *verbs, const struct nep_put *put)
{
    if (put->dst >= verbs->num_ranks || put->window >= NEP_VERBS_MAX_WINDOWS ||
        verbs->windows[put->window].remotes == NULL || verbs->windows[put->window].base == NULL) {
        return nep_fail(NEP_ERR_INVALID, "verbs: put to rank %u, window %u: there is none",
                        put->dst, put->window);
    }
    if (nep_verbs_imm_window(put->imm) != put->window || nep_verbs_imm_part(put->imm) != 0) {
        return nep_fail(NEP_ERR_INVALID,
                        "verbs: the immediate 0x%08x must name window %u in bits 20 to 25 and have "
                        "part 0",
                        put->imm, put->window);
    }
    const struct nep_verbs_window *window = &verbs->windows[put->window];
    uint64_t to = window->remotes[put->dst].bytes;
    const uint8_t *src = put->src;
    if (put->len > to || put->offset > to - put->len) {
        return nep_fail(
            NEP_ERR_INVALID, "verbs: a put of %u bytes at %llu leaves the window of rank %u (%llu)",
            put->len, (unsigned long long)put->offset, put->dst, (unsigned long long)to);
    }
    if (put->len > 0 && put->dst != verbs->rank &&
        nep_verbs_way_of(&window->remotes[put->dst], put->offset, put->len) == NULL) {
        return nep_fail(NEP_ERR_INVALID,
                        "verbs: a put of %u bytes at %llu of window %u: rank %u lets this rank "
                        "write elsewhere alone",
                        put->len, (unsigned long long)put->offset, put->window,
                        nep_transport_name(&verbs->params, put->dst));
    }
    if (put->len > 0 && (src < window->base || src + put->len > window->base + window->bytes)) {
        return nep_fail(NEP_ERR_INVALID,
                        "verbs: the source of a put of %u bytes is outside the "
                        "own window %u",
                        put->len, put->window);
    }
    if (put->dst == verbs->rank && window->is_device && put->len > 0) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "verbs: a put from GPU memory to the own rank: copy it there instead");
    }
    uint64_t pieces = 1;
    if (!nep_verbs_is_one_piece(verbs, put, put->len)) {
        pieces = put->len / verbs->params.config->verbs_chunk_bytes * 2 +
                 put->len / verbs->max_message_bytes + 3;
    }
    if (pieces > verbs->depth) {
        return nep_fail(NEP_ERR_INVALID,
                        "verbs: a put of %u bytes needs %llu requests, the send queue has %u: "
                        "raise NEP_VERBS_CHUNK or NEP_VERBS_DEPTH",
                        put->len, (unsigned long long)pieces, verbs->depth);
    }
    return NEP_OK;
}

static bool grow(struct nep_verbs_peer *peer)
{
    uint64_t completed = atomic_load_explicit(&peer->completed, memory_order_relaxed);
    uint64_t size = peer->ring == NULL ? 0 : peer->mask + 1;
    if (peer->next - completed < size) {
        return true;
    }
    uint64_t larger = size == 0 ? FIRST_RING : size * 2;
    struct nep_verbs_record *ring = calloc(larger, sizeof *ring);
    if (ring == NULL) {
        return false;
    }
    for (uint64_t n = completed + 1; n <= peer->next; n++) {
        ring[n & (larger - 1)] = *nep_verbs_record_of(peer, n);
    }
    free(peer->ring);
    peer->ring = ring;
    peer->mask = larger - 1;
    return true;
}

static void put_to_self(struct nep_verbs *verbs, const struct nep_put *put)
{
    uint8_t *base = verbs->windows[put->window].base;
    if (put->len > 0) {
        memmove(base + put->offset, put->src, put->len);
    }
    if (put->is_silent) {
        return;
    }
    verbs->params.sink(base, verbs->rank, verbs->rank, put->imm);
    atomic_fetch_add_explicit(&verbs->arrivals, 1, memory_order_relaxed);
}

enum nep_status nep_verbs_put(struct nep_transport *transport, const struct nep_put *put,
                              uint64_t *number_p)
{
    struct nep_verbs *verbs = (struct nep_verbs *)transport;
    enum nep_status status = check(verbs, put);
    if (status != NEP_OK) {
        return status;
    }
    struct nep_verbs_peer *peer = &verbs->peers[put->dst];
    pthread_mutex_lock(&peer->lock);
    status = (enum nep_status)atomic_load_explicit(&peer->status, memory_order_relaxed);
    bool is_gone = put->dst == verbs->rank || atomic_load(&peer->has_left);
    if (status != NEP_OK) {
        status = nep_fail(status, "%s", peer->message);
    } else if (is_gone) {
        peer->posted = ++peer->next;
        atomic_store_explicit(&peer->completed, peer->next, memory_order_release);
    } else if (!grow(peer)) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for %llu puts to rank %u",
                          (unsigned long long)(peer->mask + 1) * 2, put->dst);
    } else {
        peer->next++;
        *nep_verbs_record_of(peer, peer->next) = (struct nep_verbs_record){.put = *put};
        nep_verbs_peer_pump(verbs, peer);
    }
    uint64_t number = peer->next;
    peer->put_bytes += status == NEP_OK ? put->len : 0;
    atomic_store_explicit(&peer->last, number, memory_order_relaxed);
    pthread_mutex_unlock(&peer->lock);
    if (status != NEP_OK) {
        return status;
    }
    if (put->dst == verbs->rank) {
        put_to_self(verbs, put);
    }
    *number_p = number;
    return NEP_OK;
}

uint64_t nep_verbs_completed(struct nep_transport *transport, uint32_t dst)
{
    struct nep_verbs *verbs = (struct nep_verbs *)transport;
    if (dst >= verbs->num_ranks) {
        return 0;
    }
    struct nep_verbs_peer *peer = &verbs->peers[dst];
    /* acquire: pairs with the release in nep_verbs_peer_advance */
    uint64_t completed = atomic_load_explicit(&peer->completed, memory_order_acquire);
    if (completed < atomic_load_explicit(&peer->last, memory_order_relaxed)) {
        nep_verbs_progress(transport); /* completions of sends wake nobody */
        /* acquire: pairs with the release in nep_verbs_peer_advance */
        completed = atomic_load_explicit(&peer->completed, memory_order_acquire);
    }
    return completed;
}
