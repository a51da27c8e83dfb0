/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What leaves over UCX: puts as active messages, because UCP's own put reaches less than half of a
 * wire over TCP and has no immediate anywhere; heartbeats; and the closing of endpoints that
 * failed.
 *
 * A put is only queued by its caller; whoever drives the worker (ucx_thread.c) hands it to UCX.
 * Over TCP a put is cut into pieces of less than UCX's receive buffer, sent eagerly: a rendezvous
 * asks the receiver first, and its answer queues behind all that the receiver itself has put into
 * the same connection, which halved what two hosts that send to each other got through 1 Gbit/s
 * (64 instead of 124 MB/s each way, puts of 1.8 MB, UCX 1.13.1, 2 network namespaces, 2026-11-24).
 * Elsewhere a put is one message and UCX chooses.
 *
 * Liveness. UCX reports what the system reports (a closed or reset connection). A pulled cable
 * leaves a TCP connection silent for many minutes, so each rank sends a heartbeat a second and
 * peer_status (ucx.c) looks at the age of what was heard last: after 5 s a peer is called slow,
 * after the communicator's timeout lost. It counts in heartbeats of this rank's own, too: a machine
 * that was suspended or starved says nothing about its peers.
 */
#if NEP_HAVE_UCX

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "transport/ucx.h"

static const uint64_t BEAT_NS = 1 * NEP_S;

static struct nep_ucx_send *send_get(struct nep_ucx *ux)
{
    if (ux->unused == NULL) {
        struct nep_ucx_block *block = calloc(1, sizeof *block);
        if (block == NULL) {
            return NULL;
        }
        block->next = ux->blocks;
        ux->blocks = block;
        for (size_t i = 0; i < sizeof block->sends / sizeof block->sends[0]; i++) {
            block->sends[i].next = ux->unused;
            ux->unused = &block->sends[i];
        }
    }
    struct nep_ucx_send *send = ux->unused;
    ux->unused = send->next;
    return send;
}

/* Numbers complete in any order; `completed` is the end of the unbroken run from the start. */
static void send_complete(struct nep_ucx_send *send)
{
    struct nep_ucx *ux = send->ux;
    struct nep_ucx_peer *peer = &ux->peers[send->dst];
    pthread_mutex_lock(&ux->queue_lock);
    send->done = true;
    while (peer->first != NULL && peer->first->done) {
        struct nep_ucx_send *first = peer->first;
        /* Release: pairs with the acquire in ucx.c, completed(). */
        atomic_store_explicit(&peer->completed, first->number, memory_order_release);
        peer->first = first->next_peer;
        first->next = ux->unused;
        ux->unused = first;
    }
    pthread_mutex_unlock(&ux->queue_lock);
}

static struct nep_ucx_piece *piece_get(struct nep_ucx *ux)
{
    struct nep_ucx_piece *piece = ux->unused_pieces;
    if (piece != NULL) {
        ux->unused_pieces = piece->next_unused;
        return piece;
    }
    piece = calloc(1, sizeof *piece);
    if (piece != NULL) {
        piece->next_made = ux->pieces;
        ux->pieces = piece;
    }
    return piece;
}

/* Of one that is about to leave, UCX's error handler says which connections have ended. */
static void send_fail(struct nep_ucx_peer *peer, ucs_status_t status)
{
    if (peer->num_leaves == 0) {
        nep_ucx_peer_fail(peer, status);
    }
}

static void piece_end(struct nep_ucx_piece *piece, ucs_status_t status)
{
    struct nep_ucx_send *send = piece->send;
    struct nep_ucx *ux = send->ux;
    piece->next_unused = ux->unused_pieces;
    ux->unused_pieces = piece;
    if (status != UCS_OK) {
        send_fail(&ux->peers[send->dst], status);
    }
    if (--send->num_open == 0) {
        send_complete(send);
    }
}

static void on_sent(void *request, ucs_status_t status, void *user)
{
    struct nep_ucx_piece *piece = user;
    struct nep_ucx *ux = piece->send->ux;
    ux->lib.ucp_request_free(request);
    atomic_fetch_sub_explicit(&ux->num_in_flight, 1, memory_order_relaxed);
    piece_end(piece, status);
}

/*
 * CREDITs do not wait behind tiles. All others stay in one connection: completed means here that
 * the bytes were handed over, and only order within a connection keeps a put that is complete from
 * landing upon a later one, and an announcement that is repeated behind its bytes.
 */
static ucp_ep_h ep_for(const struct nep_ucx_peer *peer, const struct nep_ucx_send *send)
{
    bool is_short = send->is_apart && peer->eps[NEP_UCX_SHORT] != NULL;
    return peer->eps[is_short ? NEP_UCX_SHORT : NEP_UCX_BULK];
}

static void piece_start(struct nep_ucx_peer *peer, struct nep_ucx_piece *piece, const void *src)
{
    struct nep_ucx *ux = peer->ux;
    ucp_request_param_t param = {
        .op_attr_mask =
            UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS,
        .cb.send = on_sent,
        .user_data = piece,
        .flags = peer->piece_bytes != UINT32_MAX ? UCP_AM_SEND_FLAG_EAGER : 0,
    };
    if (piece->send->memory != NULL) {
        param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
        param.memh = piece->send->memory;
    }
    atomic_fetch_add_explicit(&ux->num_messages, 1, memory_order_relaxed);
    void *request =
        ux->lib.ucp_am_send_nbx(ep_for(peer, piece->send), NEP_UCX_AM_PUT, &piece->header,
                                sizeof piece->header, src, piece->header.len, &param);
    if (UCS_PTR_IS_PTR(request)) {
        atomic_fetch_add_explicit(&ux->num_in_flight, 1, memory_order_relaxed);
    } else {
        piece_end(piece, UCS_PTR_STATUS(request));
    }
}

static void send_start(struct nep_ucx_send *send)
{
    struct nep_ucx *ux = send->ux;
    struct nep_ucx_peer *peer = &ux->peers[send->dst];
    uint32_t left = send->header.len;
    uint32_t most = peer->piece_bytes;
    send->header.num_pieces = left == 0 ? 1 : (uint32_t)(((uint64_t)left + most - 1) / most);
    send->num_open = send->header.num_pieces + 1;
    for (uint32_t i = 0; i < send->header.num_pieces; i++) {
        /* Once the peer is gone, its status says so, and the rest only frees its source. */
        struct nep_ucx_piece *piece = nep_ucx_peer_is_open(peer) ? piece_get(ux) : NULL;
        if (piece == NULL) {
            nep_ucx_peer_fail(peer, UCS_ERR_NO_MEMORY);
            send->num_open -= send->header.num_pieces - i;
            break;
        }
        uint64_t done = (uint64_t)i * most;
        piece->send = send;
        piece->header = send->header;
        piece->header.offset += done;
        piece->header.len = left < most ? left : most;
        left -= piece->header.len;
        piece_start(peer, piece, (const char *)send->src + done);
    }
    if (--send->num_open == 0) {
        send_complete(send);
    }
}

uint32_t nep_ucx_send_queued(struct nep_ucx *ux)
{
    if (atomic_load_explicit(&ux->num_queued, memory_order_relaxed) == 0) {
        return 0;
    }
    pthread_mutex_lock(&ux->queue_lock);
    struct nep_ucx_send *send = ux->queue_first;
    ux->queue_first = NULL;
    ux->queue_last = NULL;
    uint32_t num = atomic_exchange_explicit(&ux->num_queued, 0, memory_order_relaxed);
    pthread_mutex_unlock(&ux->queue_lock);
    while (send != NULL) {
        struct nep_ucx_send *next = send->next;
        send_start(send);
        send = next;
    }
    return num;
}

enum nep_status nep_ucx_send_push(struct nep_ucx *ux, const struct nep_put *put, uint64_t *number_p)
{
    struct nep_ucx_peer *peer = &ux->peers[put->dst];
    const struct nep_ucx_window *window = &ux->windows[put->window];
    pthread_mutex_lock(&ux->queue_lock);
    struct nep_ucx_send *send = send_get(ux);
    if (send == NULL) {
        pthread_mutex_unlock(&ux->queue_lock);
        return nep_fail(NEP_ERR_NO_MEMORY, "transport ucx: no memory for a put to rank %u",
                        put->dst);
    }
    uint64_t number = ++peer->posted;
    *send = (struct nep_ucx_send){
        .ux = ux,
        .dst = put->dst,
        .number = number,
        .is_apart = put->is_apart,
        .src = put->len != 0 ? put->src : NULL,
        .memory = put->len != 0 ? window->memory : NULL,
        .header = {.pass = peer->pass_to,
                   .src = ux->rank,
                   .window = put->window,
                   .imm = put->imm,
                   .offset = put->offset,
                   .len = put->len,
                   .life = window->life,
                   .put = (uint32_t)number},
    };
    *(peer->first == NULL ? &peer->first : &peer->last->next_peer) = send;
    peer->last = send;
    *(ux->queue_first == NULL ? &ux->queue_first : &ux->queue_last->next) = send;
    ux->queue_last = send;
    *number_p = number;
    atomic_fetch_add(&ux->num_queued, 1); /* ucx_thread.c says why in this order */
    pthread_mutex_unlock(&ux->queue_lock);
    return NEP_OK;
}

/* ---- peers -------------------------------------------------------------------------------- */

void nep_ucx_peer_fail(struct nep_ucx_peer *peer, ucs_status_t status)
{
    int alive = NEP_UCX_ALIVE;
    if (atomic_load_explicit(&peer->state, memory_order_relaxed) == NEP_UCX_ALIVE) {
        atomic_store_explicit(&peer->failure, (int)status, memory_order_relaxed);
    }
    /* Release: whoever reads FAILED (ucx.c, peer_status) also reads `failure`. */
    atomic_compare_exchange_strong(&peer->state, &alive, NEP_UCX_FAILED);
    if (nep_ucx_peer_is_open(peer)) {
        peer->close_ep = true;
        peer->ux->num_to_close++;
    }
}

void nep_ucx_connection_fail(struct nep_ucx_peer *peer, ucs_status_t status)
{
    bool is_leaving = peer->num_leaves != 0 &&
                      atomic_load_explicit(&peer->state, memory_order_relaxed) == NEP_UCX_ALIVE;
    if (!is_leaving || ++peer->num_ended > peer->num_leaves) {
        nep_ucx_peer_fail(peer, status);
    }
}

/* Outside of handlers, because closing purges requests and so calls them. */
void nep_ucx_close_failed(struct nep_ucx *ux)
{
    ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS,
                                 .flags = UCP_EP_CLOSE_FLAG_FORCE};
    for (uint32_t i = 0; i < ux->num_ranks && ux->num_to_close != 0; i++) {
        struct nep_ucx_peer *peer = &ux->peers[i];
        if (!peer->close_ep) {
            continue;
        }
        ucp_ep_h eps[NEP_UCX_EPS];
        memcpy(eps, peer->eps, sizeof eps);
        memset(peer->eps, 0, sizeof peer->eps);
        peer->close_ep = false;
        ux->num_to_close--;
        for (int e = 0; e < NEP_UCX_EPS; e++) {
            void *request = eps[e] != NULL ? ux->lib.ucp_ep_close_nbx(eps[e], &param) : NULL;
            if (UCS_PTR_IS_PTR(request)) {
                ux->lib.ucp_request_free(request); /* UCX keeps it until it is done */
            }
        }
    }
}

static void on_beat_sent(void *request, ucs_status_t status, void *user)
{
    struct nep_ucx_peer *peer = user;
    peer->ux->lib.ucp_request_free(request);
    peer->beat_pending = false;
    if (status != UCS_OK) {
        send_fail(peer, status);
    }
}

void nep_ucx_beat(struct nep_ucx *ux)
{
    ux->beat_ns = nep_now_ns() + BEAT_NS;
    for (uint32_t i = 0; i < ux->num_ranks; i++) {
        struct nep_ucx_peer *peer = &ux->peers[i];
        atomic_fetch_add_explicit(&peer->num_silent, 1, memory_order_relaxed);
        if (!nep_ucx_peer_is_open(peer) || peer->beat_pending) {
            continue;
        }
        ucp_request_param_t param = {
            .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA,
            .cb.send = on_beat_sent,
            .user_data = peer,
        };
        ucp_ep_h ep = peer->eps[NEP_UCX_SHORT];
        void *request =
            ux->lib.ucp_am_send_nbx(ep != NULL ? ep : peer->eps[NEP_UCX_BULK], NEP_UCX_AM_BEAT,
                                    &peer->word, sizeof peer->word, NULL, 0, &param);
        if (UCS_PTR_IS_PTR(request)) {
            peer->beat_pending = true;
        } else if (UCS_PTR_STATUS(request) != UCS_OK) {
            send_fail(peer, UCS_PTR_STATUS(request));
        }
    }
}

#endif
