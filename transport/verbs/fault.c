/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What goes wrong. A QP that reports an error is dead; its puts go over the others, until it comes
 * back (revive.c). A peer that has no QP left for NEP_VERBS_REVIVE is lost, with a sentence that
 * has all the device knew; the others are not touched. A port that goes down is avoided for new
 * puts while another is up, and nothing more: RC sends again by itself, and when the port is back
 * within its budget nothing was lost.
 *
 * A waiting rank may have nothing under way to the peer it waits for, and would never hear that it
 * died. So nep_verbs_peer_status, which waits call, writes zero bytes to a silent peer: the other
 * device answers that by itself, however busy its process is.
 */
#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/verbs/verbs.h"

static const char *qp_state_name(enum ibv_qp_state state)
{
    static const char *const names[] = {"RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR"};
    return (unsigned)state < sizeof names / sizeof names[0] ? names[state] : "unknown";
}

static const char *port_state_name(enum ibv_port_state state)
{
    static const char *const names[] = {"NOP", "DOWN", "INIT", "ARMED", "ACTIVE", "DEFER"};
    return (unsigned)state < sizeof names / sizeof names[0] ? names[state] : "unknown";
}

/* The sentence about a dead QP. */
static void describe(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint32_t qp_idx,
                     const char *cause, char *text, size_t size)
{
    struct nep_verbs_qp *qp = &peer->qps[qp_idx];
    struct nep_verbs_path *path = &verbs->paths[qp->path];
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_UNKNOWN};
    struct ibv_qp_init_attr init_attr;
    struct ibv_port_attr port = {.state = IBV_PORT_NOP};
    verbs->api.query_qp(qp->qp, &attr, IBV_QP_STATE, &init_attr);
    verbs->api.query_port(path->context, path->port, &port);
    uint64_t heard_ns = atomic_load_explicit(&peer->last_heard_ns, memory_order_relaxed);
    uint64_t completed = atomic_load_explicit(&peer->completed, memory_order_relaxed);
    snprintf(text, size,
             "QP %u of %s port %u to rank %u failed: %s; QP state %s, port %s, %llu of %llu puts "
             "under way, last sign of life %llu ms ago",
             qp->qp->qp_num, path->device, path->port,
             nep_transport_name(&verbs->params, peer->rank), cause, qp_state_name(attr.qp_state),
             port_state_name(port.state), (unsigned long long)(peer->posted - completed),
             (unsigned long long)peer->next,
             (unsigned long long)((nep_now_ns() - heard_ns) / NEP_MS));
}

/* Takes the work of a dead QP off it. */
static void strand(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint32_t qp_idx)
{
    struct nep_verbs_qp *qp = &peer->qps[qp_idx];
    uint16_t bit = (uint16_t)(1u << qp_idx);
    uint64_t completed = atomic_load_explicit(&peer->completed, memory_order_relaxed);
    /* Also a put whose last piece was not posted yet, hence the ring and not put_of. */
    for (uint64_t n = completed + 1; n <= peer->next; n++) {
        struct nep_verbs_record *record = nep_verbs_record_of(peer, n);
        if ((record->on_qps & bit) != 0) {
            record->on_qps &= (uint16_t)~bit;
            peer->num_resend += !record->must_resend;
            record->must_resend = true;
        }
    }
    qp->done = qp->posted;
    (void)verbs;
}

void nep_verbs_peer_lose(struct nep_verbs *verbs, struct nep_verbs_peer *peer)
{
    (void)verbs;
    peer->num_resend = 0;
    peer->posted = peer->next;
    /* All its QPs are in error: the device holds no source bytes any more. */
    atomic_store_explicit(&peer->completed, peer->next, memory_order_release);
    /* release: pairs with the acquire in nep_verbs_peer_status; the message is complete */
    atomic_store_explicit(&peer->status, NEP_ERR_PEER_LOST, memory_order_release);
    nep_warn("%s", peer->message);
}

/* The last QP died: the reason is kept for when the peer is given up, which may be now. */
static void fall_silent(struct nep_verbs *verbs, struct nep_verbs_peer *peer, const char *text)
{
    bool may_return = false;
    snprintf(peer->message, sizeof peer->message, "verbs: rank %u is lost: %s",
             nep_transport_name(&verbs->params, peer->rank), text);
    for (uint32_t q = 0; q < verbs->num_qps; q++) {
        may_return = may_return || nep_verbs_qp_may_revive(verbs, peer, q);
    }
    peer->silent_ns = nep_now_ns();
    if (!may_return) {
        nep_verbs_peer_lose(verbs, peer);
        return;
    }
    nep_warn("verbs: %s; no QP is left, and for %.1f s it is tried to reach it again", text,
             (double)verbs->params.config->verbs_revive_ns / 1e9);
}

void nep_verbs_qp_failed(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint32_t qp_idx,
                         const struct ibv_wc *wc, const char *why)
{
    struct nep_verbs_qp *qp = &peer->qps[qp_idx];
    if (qp->is_dead) {
        return; /* one of the flushed rest */
    }
    char cause[160], text[420];
    if (wc != NULL) {
        snprintf(cause, sizeof cause, "%s (status %d, vendor error 0x%x)",
                 verbs->api.wc_status_str(wc->status), wc->status, wc->vendor_err);
    } else {
        snprintf(cause, sizeof cause, "%s", why);
    }
    describe(verbs, peer, qp_idx, cause, text, sizeof text);
    qp->is_dead = true;
    nep_verbs_qp_begin(qp, qp->incarnation + 1);
    peer->dead |= (uint16_t)(1u << qp_idx);
    peer->num_alive--;
    peer->num_parts -= peer->num_parts > 1;
    atomic_store(&verbs->has_dead, true);
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
    verbs->api.modify_qp(qp->qp, &attr, IBV_QP_STATE); /* so that nothing of it is sent again */
    strand(verbs, peer, qp_idx);
    if (atomic_load(&peer->has_left)) {
        peer->num_resend = 0;
        peer->posted = peer->next;
        atomic_store_explicit(&peer->completed, peer->next, memory_order_release);
        return;
    }
    if (peer->num_alive == 0) {
        fall_silent(verbs, peer, text);
        return;
    }
    nep_warn("verbs: %s; %u of %u QPs carry on", text, peer->num_alive, verbs->num_qps);
    nep_verbs_peer_ping(verbs, peer); /* if the peer is gone, learn it from all QPs at once */
    nep_verbs_peer_advance(peer);
}

/*
 * What arrived before has been acknowledged and would not be sent again. So its completions are
 * taken first, after its QPs are in error, so that no more can come.
 */
static void path_failed(struct nep_verbs *verbs, struct nep_verbs_path *path, bool is_readable,
                        const char *why)
{
    uint32_t path_idx = (uint32_t)(path - verbs->paths);
    if (path->has_failed) {
        return;
    }
    path->has_failed = true;
    for (uint32_t r = 0; r < verbs->num_ranks; r++) {
        struct nep_verbs_peer *peer = &verbs->peers[r];
        for (uint32_t q = path_idx; peer->qps != NULL && q < verbs->num_qps;
             q += verbs->num_paths) {
            pthread_mutex_lock(&peer->lock);
            nep_verbs_qp_failed(verbs, peer, q, NULL, why);
            nep_verbs_peer_pump(verbs, peer);
            pthread_mutex_unlock(&peer->lock);
        }
    }
    for (uint32_t i = 0; is_readable && i < path->cq_depth && nep_verbs_poll_path(verbs, path);
         i++) {
    }
    atomic_store(&path->is_dead, true);
}

static void qp_event(struct nep_verbs *verbs, struct nep_verbs_path *path, uint32_t qp_num,
                     const char *why)
{
    const struct nep_verbs_qp_key *key = nep_verbs_qp_find(path, qp_num);
    if (key != NULL) {
        struct nep_verbs_peer *peer = &verbs->peers[key->peer];
        pthread_mutex_lock(&peer->lock);
        nep_verbs_qp_failed(verbs, peer, key->qp_idx, NULL, why);
        nep_verbs_peer_pump(verbs, peer);
        pthread_mutex_unlock(&peer->lock);
    }
}

static void port_event(struct nep_verbs *verbs, struct nep_verbs_path *path, uint8_t port,
                       bool is_down)
{
    if (port != path->port) {
        return;
    }
    if (atomic_exchange(&path->is_down, is_down) != is_down) {
        atomic_fetch_add(&verbs->num_down, is_down ? 1u : UINT32_MAX);
        nep_warn("verbs: %s port %u is %s", path->device, port,
                 is_down ? "down: waiting for it, other paths are used meanwhile" : "up again");
    }
    for (uint32_t r = 0; !is_down && r < verbs->num_ranks; r++) {
        pthread_mutex_lock(&verbs->peers[r].lock);
        if (verbs->peers[r].qps != NULL) {
            nep_verbs_peer_pump(verbs, &verbs->peers[r]);
        }
        pthread_mutex_unlock(&verbs->peers[r].lock);
    }
}

/* Connected QPs keep the GID they were made with; if it is gone they will fail, and say why. */
static void gid_event(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    struct nep_verbs_gids gids;
    nep_verbs_gids_read(&verbs->api, path->context, path->port,
                        (uint32_t)path->port_attr.gid_tbl_len, verbs->params.config->verbs_gid,
                        &gids);
    if (memcmp(gids.raw, path->gids.raw, sizeof gids.raw) != 0) {
        nep_warn("verbs: the GIDs of %s port %u changed: connections that use an address which is "
                 "gone will fail; make the communicator again",
                 path->device, path->port);
    }
    path->gids = gids;
}

void nep_verbs_event_handle(struct nep_verbs *verbs, struct nep_verbs_path *path,
                            const struct ibv_async_event *event)
{
    const char *name = verbs->api.event_type_str(event->event_type);
    switch (event->event_type) {
    case IBV_EVENT_PORT_ERR:
        port_event(verbs, path, (uint8_t)event->element.port_num, true);
        break;
    case IBV_EVENT_PORT_ACTIVE:
        port_event(verbs, path, (uint8_t)event->element.port_num, false);
        break;
    case IBV_EVENT_GID_CHANGE:
        gid_event(verbs, path);
        break;
    case IBV_EVENT_QP_FATAL:
    case IBV_EVENT_QP_REQ_ERR:
    case IBV_EVENT_QP_ACCESS_ERR:
    case IBV_EVENT_PATH_MIG_ERR:
        qp_event(verbs, path, event->element.qp->qp_num, name);
        break;
    case IBV_EVENT_CQ_ERR:
    case IBV_EVENT_SRQ_ERR:
    case IBV_EVENT_DEVICE_FATAL:
        path_failed(verbs, path, event->event_type != IBV_EVENT_CQ_ERR, name);
        break;
    case IBV_EVENT_SRQ_LIMIT_REACHED:
        path->num_overruns++;
        path->is_unwatched = true;
        nep_info("verbs: %s: few receives left (time %u): the progress thread is late",
                 path->device, path->num_overruns);
        break;
    default:
        nep_debug("verbs: %s: %s", path->device, name);
    }
}

enum nep_status nep_verbs_peer_status(struct nep_transport *transport, uint32_t rank)
{
    struct nep_verbs *verbs = (struct nep_verbs *)transport;
    if (rank >= verbs->num_ranks) {
        return nep_fail(NEP_ERR_INVALID, "verbs: there is no rank %u", rank);
    }
    struct nep_verbs_peer *peer = &verbs->peers[rank];
    /* acquire: pairs with the release in lose_peer */
    enum nep_status status =
        (enum nep_status)atomic_load_explicit(&peer->status, memory_order_acquire);
    if (status != NEP_OK) {
        return nep_fail(status, "%s", peer->message);
    }
    if (atomic_load(&peer->has_left)) {
        return nep_fail(NEP_ERR_PEER_LOST, "verbs: rank %u has left: its communicator was closed",
                        nep_transport_name(&verbs->params, rank));
    }
    uint64_t now_ns = nep_now_ns();
    uint64_t heard_ns = atomic_load_explicit(&peer->last_heard_ns, memory_order_relaxed);
    if (peer->is_served && now_ns - heard_ns > 50 * NEP_MS &&
        pthread_mutex_trylock(&peer->lock) == 0) {
        if (now_ns - peer->last_ping_ns > 50 * NEP_MS) {
            peer->last_ping_ns = now_ns;
            nep_verbs_peer_ping(verbs, peer);
        }
        pthread_mutex_unlock(&peer->lock);
    }
    return NEP_OK;
}

void nep_verbs_abandon(struct nep_transport *transport, uint32_t rank)
{
    struct nep_verbs *verbs = (struct nep_verbs *)transport;
    struct nep_verbs_peer *peer = &verbs->peers[rank];
    pthread_mutex_lock(&peer->lock);
    for (uint32_t q = 0; peer->qps != NULL && q < verbs->num_qps; q++) {
        peer->qps[q].stays_dead = true;
    }
    for (uint32_t q = 0; peer->qps != NULL && q < verbs->num_qps; q++) {
        nep_verbs_qp_failed(verbs, peer, q, NULL, "the group goes on without that rank");
    }
    if (peer->qps != NULL && atomic_load(&peer->status) == NEP_OK &&
        !atomic_load(&peer->has_left)) {
        nep_verbs_peer_lose(verbs, peer); /* it was silent before */
    }
    pthread_mutex_unlock(&peer->lock);
}
