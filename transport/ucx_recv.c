/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What arrives over UCX. A put is an active message of (header, payload): small ones come whole
 * (eager) and are copied to their place; of large ones UCX hands over a descriptor (rendezvous) and
 * the payload is received right into the window. Either way the sink hears of a put once, after its
 * bytes are in place.
 *
 * Nothing in a header is believed: a message of no rank, of another communicator, for no window, or
 * for a place where its sender has no slot is dropped, counted, logged, and held against its
 * sender in peer_status.
 *
 * All of this runs inside ucp_worker_progress, so by the holder of the worker (ucx_thread.c).
 */
#if NEP_HAVE_UCX

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/ucx.h"

enum { REFUSALS_LOGGED = 8, MAX_PARTIALS = 4096 };

/* It comes from the rank that it names. */
static bool is_known(const struct nep_ucx *ux, const struct nep_ucx_header *header)
{
    return header->src < ux->num_ranks && header->src != ux->rank &&
           header->pass == ux->peers[header->src].pass_from;
}

static void refuse(struct nep_ucx *ux, const struct nep_ucx_header *header, const char *why)
{
    if (is_known(ux, header)) {
        atomic_store_explicit(&ux->peers[header->src].misbehaved, true, memory_order_relaxed);
    }
    if (atomic_fetch_add_explicit(&ux->num_refused, 1, memory_order_relaxed) < REFUSALS_LOGGED) {
        nep_warn("rank %u dropped a ucx message that claims to be from rank %u: %s (window %u, "
                 "offset %llu, length %u)",
                 ux->rank, header->src, why, header->window, (unsigned long long)header->offset,
                 header->len);
    }
}

/* Every field comes from outside: nothing is used before it is checked. NULL: refused, said why. */
static struct nep_ucx_window *check_header(struct nep_ucx *ux, const void *bytes, size_t bytes_len,
                                           size_t len, struct nep_ucx_header *header)
{
    if (bytes_len != sizeof *header) {
        memset(header, 0xff, sizeof *header);
        refuse(ux, header, "its header has another size");
        return NULL;
    }
    memcpy(header, bytes, sizeof *header);
    if (header->src >= ux->num_ranks || header->src == ux->rank) {
        refuse(ux, header, "no such rank sends here");
        return NULL;
    }
    if (!is_known(ux, header)) {
        refuse(ux, header, "it is of another communicator, or of another rank");
        return NULL;
    }
    struct nep_ucx_window *window = &ux->windows[header->window % NEP_UCX_WINDOWS];
    if (header->window >= NEP_UCX_WINDOWS || header->life > window->life) {
        refuse(ux, header, "this rank has no such window");
        return NULL;
    }
    /* Acquire: pairs with the release in ucx.c, window_open. */
    if (!atomic_load_explicit(&window->alive, memory_order_acquire) ||
        header->life < window->life) {
        /* No lie: a rank that leaves says so to those that have left already. */
        atomic_fetch_add_explicit(&ux->num_refused, 1, memory_order_relaxed);
        nep_debug("rank %u dropped a late put of rank %u: window %u is gone", ux->rank, header->src,
                  header->window);
        return NULL;
    }
    uint64_t bytes_here = window->bytes[ux->rank];
    if (header->num_pieces == 0 || header->len != len || header->offset > bytes_here ||
        header->len > bytes_here - header->offset) {
        refuse(ux, header, "it does not fit into the window");
        return NULL;
    }
    if (!nep_grants_allow(&window->grants, header->src, header->offset, header->len)) {
        refuse(ux, header, "that rank has no slot there");
        return NULL;
    }
    return window;
}

static struct nep_ucx_partial *partial_get(struct nep_ucx *ux, struct nep_ucx_peer *peer)
{
    struct nep_ucx_partial *partial = ux->unused_partials;
    if (peer->num_partials >= MAX_PARTIALS) {
        return NULL;
    }
    if (partial != NULL) {
        ux->unused_partials = partial->next;
    } else {
        partial = malloc(sizeof *partial);
    }
    if (partial != NULL) {
        partial->next = peer->partials;
        peer->partials = partial;
        peer->num_partials++;
    }
    return partial;
}

/* True when this was the last piece of its put. Pieces come in order on one connection, so the
 * list is short; nothing depends on it. */
static bool is_whole(struct nep_ucx *ux, const struct nep_ucx_header *header)
{
    struct nep_ucx_peer *peer = &ux->peers[header->src];
    if (header->num_pieces == 1) {
        return true;
    }
    struct nep_ucx_partial **at = &peer->partials;
    while (*at != NULL && (*at)->put != header->put) {
        at = &(*at)->next;
    }
    struct nep_ucx_partial *partial = *at;
    if (partial == NULL) {
        partial = partial_get(ux, peer);
        if (partial == NULL) {
            refuse(ux, header, "too many puts of that rank are here in part");
            return false;
        }
        partial->put = header->put;
        partial->num_left = header->num_pieces;
        at = &peer->partials;
    }
    if (--partial->num_left != 0) {
        return false;
    }
    *at = partial->next;
    peer->num_partials--;
    partial->next = ux->unused_partials;
    ux->unused_partials = partial;
    return true;
}

/* The bytes of a piece are in place. */
static void arrive(struct nep_ucx *ux, struct nep_ucx_window *window,
                   const struct nep_ucx_header *header)
{
    if (is_whole(ux, header)) {
        atomic_fetch_add_explicit(&ux->num_arrivals, 1, memory_order_relaxed);
        ux->params.sink(window->base, ux->rank, header->src, header->imm);
    }
}

static void recv_put(struct nep_ucx *ux, struct nep_ucx_recv *recv)
{
    recv->window->num_receiving--;
    recv->next_unused = ux->unused_recvs;
    ux->unused_recvs = recv;
}

static void on_received(void *request, ucs_status_t status, size_t len, void *user)
{
    struct nep_ucx_recv *recv = user;
    struct nep_ucx *ux = recv->ux;
    (void)len;
    ux->lib.ucp_request_free(request);
    atomic_fetch_sub_explicit(&ux->num_in_flight, 1, memory_order_relaxed);
    if (status == UCS_OK) {
        arrive(ux, recv->window, &recv->header);
    } else {
        nep_ucx_peer_fail(&ux->peers[recv->header.src], status);
    }
    recv_put(ux, recv);
}

static struct nep_ucx_recv *recv_get(struct nep_ucx *ux)
{
    struct nep_ucx_recv *recv = ux->unused_recvs;
    if (recv != NULL) {
        ux->unused_recvs = recv->next_unused;
        return recv;
    }
    recv = calloc(1, sizeof *recv);
    if (recv != NULL) {
        recv->ux = ux;
        recv->next_made = ux->recvs;
        ux->recvs = recv;
    }
    return recv;
}

static ucs_status_t receive(struct nep_ucx *ux, struct nep_ucx_window *window,
                            const struct nep_ucx_header *header, void *descriptor)
{
    struct nep_ucx_recv *recv = recv_get(ux);
    if (recv == NULL) {
        refuse(ux, header, "no memory to receive it");
        return UCS_ERR_NO_MEMORY; /* also fails the sender's request */
    }
    recv->window = window;
    recv->header = *header;
    window->num_receiving++;
    ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA,
        .cb.recv_am = on_received,
        .user_data = recv,
    };
    if (window->memory != NULL) {
        param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
        param.memh = window->memory;
    }
    void *request = ux->lib.ucp_am_recv_data_nbx(
        ux->worker, descriptor, (char *)window->base + header->offset, header->len, &param);
    if (UCS_PTR_IS_PTR(request)) {
        atomic_fetch_add_explicit(&ux->num_in_flight, 1, memory_order_relaxed);
        return UCS_INPROGRESS;
    }
    if (UCS_PTR_STATUS(request) == UCS_OK) {
        arrive(ux, window, header);
    } else {
        nep_ucx_peer_fail(&ux->peers[header->src], UCS_PTR_STATUS(request));
    }
    recv_put(ux, recv);
    return UCS_INPROGRESS; /* the descriptor is UCX's again */
}

static void hear(struct nep_ucx_peer *peer)
{
    atomic_store_explicit(&peer->heard_ns, nep_now_ns(), memory_order_relaxed);
    atomic_store_explicit(&peer->num_silent, 0, memory_order_relaxed);
}

ucs_status_t nep_ucx_on_put(void *arg, const void *header, size_t header_len, void *data,
                            size_t len, const ucp_am_recv_param_t *param)
{
    struct nep_ucx *ux = arg;
    struct nep_ucx_header head;
    struct nep_ucx_window *window = check_header(ux, header, header_len, len, &head);
    if (window == NULL) {
        return UCS_OK;
    }
    hear(&ux->peers[head.src]);
    if (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) {
        return receive(ux, window, &head, data);
    }
    if (len != 0) {
        memcpy((char *)window->base + head.offset, data, len);
    }
    arrive(ux, window, &head);
    return UCS_OK;
}

/* Heartbeats and goodbyes carry the same header, with pass, src and, in num_pieces, the number of
 * connections alone. */
static struct nep_ucx_peer *on_word(struct nep_ucx *ux, const void *header, size_t header_len)
{
    struct nep_ucx_header head;
    if (header_len != sizeof head) {
        return NULL;
    }
    memcpy(&head, header, sizeof head);
    if (!is_known(ux, &head)) {
        refuse(ux, &head, "it is of another communicator, or of another rank");
        return NULL;
    }
    struct nep_ucx_peer *peer = &ux->peers[head.src];
    hear(peer);
    return peer;
}

static ucs_status_t on_beat(void *arg, const void *header, size_t header_len, void *data,
                            size_t len, const ucp_am_recv_param_t *param)
{
    (void)data;
    (void)len;
    (void)param;
    (void)on_word(arg, header, header_len);
    return UCS_OK;
}

ucs_status_t nep_ucx_on_leave(void *arg, const void *header, size_t header_len, void *data,
                              size_t len, const ucp_am_recv_param_t *param)
{
    (void)data;
    (void)len;
    (void)param;
    struct nep_ucx_peer *peer = on_word(arg, header, header_len);
    struct nep_ucx_header head;
    int alive = NEP_UCX_ALIVE;
    if (peer == NULL) {
        return UCS_OK;
    }
    memcpy(&head, header, sizeof head);
    if (++peer->num_leaves >= head.num_pieces) {
        atomic_compare_exchange_strong(&peer->state, &alive, NEP_UCX_LEFT);
    }
    return UCS_OK;
}

enum nep_status nep_ucx_handlers_set(struct nep_ucx *ux)
{
    static const ucp_am_recv_callback_t handlers[] = {
        [NEP_UCX_AM_PUT] = nep_ucx_on_put,
        [NEP_UCX_AM_BEAT] = on_beat,
        [NEP_UCX_AM_LEAVE] = nep_ucx_on_leave,
    };
    for (unsigned id = NEP_UCX_AM_PUT; id <= NEP_UCX_AM_LEAVE; id++) {
        ucp_am_handler_param_t param = {
            .field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB |
                          UCP_AM_HANDLER_PARAM_FIELD_ARG | UCP_AM_HANDLER_PARAM_FIELD_FLAGS,
            .id = id,
            .cb = handlers[id],
            .arg = ux,
            .flags = UCP_AM_FLAG_WHOLE_MSG,
        };
        ucs_status_t status = ux->lib.ucp_worker_set_am_recv_handler(ux->worker, &param);
        if (status != UCS_OK) {
            return nep_fail(NEP_ERR_UNSUPPORTED, "transport ucx: no active messages: %s",
                            ux->lib.ucs_status_string(status));
        }
    }
    return NEP_OK;
}

#endif
