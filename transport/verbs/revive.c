/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Dead QPs come back. A reliable connection that failed is of no use for saying so, hence each path
 * has one datagram QP (UD), which knows no connection and does not fail for want of an answer.
 * While a QP is dead both sides knock: "QP q of yours and mine, incarnation n". Who hears that
 * knows that the path works again, resets its end, makes it ready for incarnation n, and knocks as
 * armed; who is armed and hears an armed knock goes on. A lost knock is only late: they are
 * repeated, and a live end answers those of its own incarnation.
 *
 * Nothing is lost or doubled beyond what a fail-over does already (post.c): puts of the dead end go
 * again, whole, and only after the other side has reset its end, so that no write of the last
 * incarnation can land any more. The number stays that of the same QP, and with it whatever hangs
 * on it; incarnations begin at packet numbers of their own, so a packet that was lost for long does
 * not fit. Completions of the last incarnation are taken before the reset.
 *
 * Rejected: a new QP. Its number would have to travel, and memory windows bound to the old one
 * would have to be made again. Rejected: an address over TCP: it would take another way than the
 * path, and say nothing about it.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/verbs/verbs.h"

#define SETTLE_NS  (10 * NEP_MS) /* from a death to the reset: what arrived before is taken */
#define TICK_NS    (5 * NEP_MS)
#define MAX_GAP_NS (200 * NEP_MS) /* between two knocks */

enum { GRH_BYTES = 40 };

struct knock {
    uint64_t key; /* the receiver's, which it gave to those of its communicator */
    uint32_t rank;
    uint32_t qp_idx;
    uint32_t incarnation;
    uint32_t is_armed;
};

enum { SLOT_BYTES = GRH_BYTES + sizeof(struct knock) };

static uint32_t q_key(uint64_t key)
{
    return (uint32_t)key & 0x7fffffff; /* the highest bit asks for rights */
}

/* ---- the datagram QP of a path -------------------------------------------------------------- */

static uint8_t *slot_of(const struct nep_verbs_path *path, uint32_t slot)
{
    return path->knocks.memory + (size_t)slot * SLOT_BYTES;
}

static int post_receive(struct nep_verbs *verbs, struct nep_verbs_path *path, uint32_t slot)
{
    struct ibv_sge sge = {(uintptr_t)slot_of(path, slot), SLOT_BYTES, path->knocks.mr->lkey};
    struct ibv_recv_wr wr = {.wr_id = NEP_VERBS_WR_KNOCK | slot, .sg_list = &sge, .num_sge = 1};
    struct ibv_recv_wr *bad = NULL;
    return verbs->api.post_recv(path->knocks.qp, &wr, &bad);
}

/* From RESET to ready, with all receives posted. */
static int start(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    struct ibv_qp *qp = path->knocks.qp;
    struct ibv_qp_attr init = {
        .qp_state = IBV_QPS_INIT, .port_num = path->port, .qkey = q_key(verbs->key)};
    struct ibv_qp_attr receive = {.qp_state = IBV_QPS_RTR};
    struct ibv_qp_attr send = {.qp_state = IBV_QPS_RTS};
    int error = verbs->api.modify_qp(qp, &init,
                                     IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY);
    for (uint32_t slot = 0; slot < NEP_VERBS_KNOCKS && error == 0; slot++) {
        error = post_receive(verbs, path, slot);
    }
    error = error != 0 ? error : verbs->api.modify_qp(qp, &receive, IBV_QP_STATE);
    error = error != 0 ? error : verbs->api.modify_qp(qp, &send, IBV_QP_STATE | IBV_QP_SQ_PSN);
    path->knocks.num_sending = 0;
    path->knocks.is_broken = error != 0;
    return error;
}

void nep_verbs_knocks_open(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    struct ibv_qp_init_attr attr = {.send_cq = path->cq,
                                    .recv_cq = path->cq,
                                    .qp_type = IBV_QPT_UD,
                                    .cap = {.max_send_wr = NEP_VERBS_KNOCKS,
                                            .max_recv_wr = NEP_VERBS_KNOCKS,
                                            .max_send_sge = 1,
                                            .max_recv_sge = 1}};
    size_t bytes = (size_t)2 * NEP_VERBS_KNOCKS * SLOT_BYTES;
    int error = ENOMEM;
    if (verbs->params.config->verbs_revive_ns == 0) {
        return;
    }
    path->knocks.memory = calloc(1, bytes);
    if (path->knocks.memory != NULL) {
        path->knocks.mr =
            verbs->api.reg_mr(path->pd, path->knocks.memory, bytes, IBV_ACCESS_LOCAL_WRITE);
        error = errno;
    }
    if (path->knocks.mr != NULL) {
        path->knocks.qp = verbs->api.create_qp(path->pd, &attr);
        error = path->knocks.qp == NULL ? errno : start(verbs, path);
    }
    if (error != 0 || path->knocks.qp == NULL) {
        nep_info("verbs: %s has no datagram QP (%s): a connection that fails stays dead",
                 path->device, strerror(error));
        nep_verbs_knocks_close(verbs, path);
    }
}

void nep_verbs_knocks_close(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    if (path->knocks.qp != NULL) {
        verbs->api.destroy_qp(path->knocks.qp);
    }
    if (path->knocks.mr != NULL) {
        verbs->api.dereg_mr(path->knocks.mr);
    }
    free(path->knocks.memory);
    memset(&path->knocks, 0, sizeof path->knocks);
}

/* After a send that failed by the device, for want of a link: as new. */
static void mend(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    struct ibv_qp_attr reset = {.qp_state = IBV_QPS_RESET};
    int error = verbs->api.modify_qp(path->knocks.qp, &reset, IBV_QP_STATE);
    error = error != 0 ? error : start(verbs, path);
    if (error != 0) {
        nep_debug("verbs: %s: the datagram QP stays in error: %s", path->device, strerror(error));
    }
}

static void knock(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint32_t qp_idx)
{
    const struct nep_verbs_qp *qp = &peer->qps[qp_idx];
    struct nep_verbs_path *path = &verbs->paths[qp->path];
    if (path->knocks.num_sending == NEP_VERBS_KNOCKS || path->knocks.is_broken) {
        return; /* there will be another time */
    }
    uint32_t slot = NEP_VERBS_KNOCKS + path->knocks.next++ % NEP_VERBS_KNOCKS;
    struct knock message = {.key = verbs->keys[peer->rank],
                            .rank = verbs->rank,
                            .qp_idx = qp_idx,
                            .incarnation = qp->incarnation,
                            .is_armed = qp->is_armed || !qp->is_dead};
    memcpy(slot_of(path, slot), &message, sizeof message);
    struct ibv_sge sge = {(uintptr_t)slot_of(path, slot), sizeof message, path->knocks.mr->lkey};
    struct ibv_send_wr wr = {
        .wr_id = NEP_VERBS_WR_KNOCK | slot,
        .sg_list = &sge,
        .num_sge = 1,
        .opcode = IBV_WR_SEND,
        .send_flags = IBV_SEND_SIGNALED | IBV_SEND_SOLICITED,
        .wr.ud = {.ah = peer->ahs[qp->path],
                  .remote_qpn = nep_verbs_card_of(verbs, peer->rank, qp->path)->knock_qp,
                  .remote_qkey = q_key(verbs->keys[peer->rank])}};
    struct ibv_send_wr *bad = NULL;
    if (verbs->api.post_send(path->knocks.qp, &wr, &bad) == 0) {
        path->knocks.num_sending++;
    }
}

/* ---- one QP --------------------------------------------------------------------------------- */

bool nep_verbs_qp_may_revive(const struct nep_verbs *verbs, const struct nep_verbs_peer *peer,
                             uint32_t qp_idx)
{
    const struct nep_verbs_path *path = &verbs->paths[peer->qps[qp_idx].path];
    return !peer->qps[qp_idx].stays_dead && peer->ahs[peer->qps[qp_idx].path] != NULL &&
           path->knocks.qp != NULL && !path->has_failed;
}

void nep_verbs_qp_begin(struct nep_verbs_qp *qp, uint32_t incarnation)
{
    qp->incarnation = incarnation;
    qp->is_armed = qp->is_answered = qp->is_other_armed = false;
    qp->died_ns = nep_now_ns();
    qp->next_ns = 0;
    qp->gap_ns = TICK_NS;
}

/* The other side is at a later incarnation: whatever this end is, its time is over. */
static void follow(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint32_t qp_idx,
                   uint32_t incarnation)
{
    struct nep_verbs_qp *qp = &peer->qps[qp_idx];
    if (!qp->is_dead) {
        nep_verbs_qp_failed(verbs, peer, qp_idx, NULL, "the other side connects again");
    } else if (qp->is_armed) {
        struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
        verbs->api.modify_qp(qp->qp, &attr, IBV_QP_STATE);
    }
    if (qp->incarnation != incarnation) {
        nep_verbs_qp_begin(qp, incarnation);
    }
}

void nep_verbs_qp_reported(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint32_t qp_idx,
                           uint32_t incarnation)
{
    struct nep_verbs_qp *qp = &peer->qps[qp_idx];
    if ((qp->incarnation & NEP_VERBS_INCARNATION) != incarnation) {
        return; /* fenced already */
    }
    if (!qp->is_dead) {
        nep_verbs_qp_failed(verbs, peer, qp_idx, NULL, "the other side reported it dead");
    } else {
        follow(verbs, peer, qp_idx, qp->incarnation + 1);
    }
}

/* Ready for the present incarnation; the completions of the last one have been taken. */
static void arm(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint32_t qp_idx)
{
    struct nep_verbs_qp *qp = &peer->qps[qp_idx];
    struct ibv_qp_attr reset = {.qp_state = IBV_QPS_RESET};
    int error = verbs->api.modify_qp(qp->qp, &reset, IBV_QP_STATE);
    if (error != 0 || nep_verbs_qp_start(verbs, peer->rank, qp_idx) != NEP_OK) {
        nep_info("verbs: QP %u to rank %u is not ready again yet: %s", qp->qp->qp_num,
                 nep_transport_name(&verbs->params, peer->rank),
                 error != 0 ? strerror(error) : nep_last_message());
        qp->is_answered = false; /* until the next knock */
        return;
    }
    qp->is_armed = true;
    qp->next_ns = 0;
}

static void go_on(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint32_t qp_idx)
{
    struct nep_verbs_qp *qp = &peer->qps[qp_idx];
    uint16_t bit = (uint16_t)(1u << qp_idx);
    knock(verbs, peer, qp_idx); /* the other side may wait for it */
    qp->is_dead = false;
    qp->told = 0;
    peer->dead &= (uint16_t)~bit;
    for (uint32_t q = 0; q < verbs->num_qps; q++) {
        peer->qps[q].told &= (uint16_t)~bit;
    }
    peer->num_alive++;
    nep_verbs_ask_end(peer);
    atomic_fetch_add_explicit(&verbs->revivals, 1, memory_order_relaxed);
    nep_warn("verbs: QP %u of %s port %u to rank %u works again; %u of %u QPs carry on",
             qp->qp->qp_num, verbs->paths[qp->path].device, verbs->paths[qp->path].port,
             nep_transport_name(&verbs->params, peer->rank), peer->num_alive, verbs->num_qps);
    nep_verbs_peer_pump(verbs, peer);
}

static void revive(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint32_t qp_idx,
                   uint64_t now_ns)
{
    struct nep_verbs_qp *qp = &peer->qps[qp_idx];
    if (atomic_load_explicit(&verbs->paths[qp->path].is_down, memory_order_relaxed)) {
        return;
    }
    if (!qp->is_armed && qp->is_answered && now_ns - qp->died_ns >= SETTLE_NS) {
        arm(verbs, peer, qp_idx);
    }
    if (qp->is_armed && qp->is_other_armed) {
        go_on(verbs, peer, qp_idx);
    } else if (now_ns >= qp->next_ns) {
        knock(verbs, peer, qp_idx);
        qp->next_ns = now_ns + qp->gap_ns;
        qp->gap_ns = qp->gap_ns * 2 < MAX_GAP_NS ? qp->gap_ns * 2 : MAX_GAP_NS;
    }
}

/* ---- all of them ---------------------------------------------------------------------------- */

static void take(struct nep_verbs *verbs, struct nep_verbs_path *path, const struct knock *message,
                 uint64_t now_ns)
{
    if (message->key != verbs->key || message->rank >= verbs->num_ranks ||
        message->qp_idx >= verbs->num_qps ||
        &verbs->paths[message->qp_idx % verbs->num_paths] != path) {
        return; /* of another communicator, which had this QP's number before */
    }
    struct nep_verbs_peer *peer = &verbs->peers[message->rank];
    pthread_mutex_lock(&peer->lock);
    if (peer->qps != NULL && atomic_load(&peer->status) == NEP_OK &&
        !atomic_load(&peer->has_left) && nep_verbs_qp_may_revive(verbs, peer, message->qp_idx)) {
        struct nep_verbs_qp *qp = &peer->qps[message->qp_idx];
        atomic_store_explicit(&peer->last_heard_ns, now_ns, memory_order_relaxed);
        if ((int32_t)(message->incarnation - qp->incarnation) > 0) {
            follow(verbs, peer, message->qp_idx, message->incarnation);
        }
        if (message->incarnation == qp->incarnation && !qp->is_dead) {
            knock(verbs, peer, message->qp_idx); /* the one that said so was lost */
        } else if (message->incarnation == qp->incarnation) {
            qp->is_answered = true;
            qp->is_other_armed = qp->is_other_armed || message->is_armed != 0;
            qp->next_ns = 0;
        }
    }
    pthread_mutex_unlock(&peer->lock);
}

void nep_verbs_knock_completed(struct nep_verbs *verbs, struct nep_verbs_path *path,
                               const struct ibv_wc *wc, uint64_t now_ns)
{
    uint32_t slot = (uint32_t)(wc->wr_id & ~NEP_VERBS_WR_KNOCK);
    if (slot >= NEP_VERBS_KNOCKS) {
        path->knocks.num_sending -= path->knocks.num_sending > 0;
    }
    if (wc->status != IBV_WC_SUCCESS) {
        path->knocks.is_broken = true;
    } else if (slot < NEP_VERBS_KNOCKS) {
        struct knock message;
        if (wc->byte_len == SLOT_BYTES) {
            memcpy(&message, slot_of(path, slot) + GRH_BYTES, sizeof message);
            take(verbs, path, &message, now_ns);
        }
        path->knocks.is_broken = path->knocks.is_broken || post_receive(verbs, path, slot) != 0;
    }
}

/* How long a peer that no QP reaches is waited for: longer while it is a port of this side. */
static uint64_t patience_ns(const struct nep_verbs *verbs)
{
    const struct nep_config *config = verbs->params.config;
    bool is_longer = config->timeout_ns > config->verbs_revive_ns;
    return is_longer && atomic_load(&verbs->num_down) > 0 ? config->timeout_ns
                                                          : config->verbs_revive_ns;
}

/* True while a QP of the peer is to be revived. */
static bool revive_peer(struct nep_verbs *verbs, struct nep_verbs_peer *peer)
{
    uint64_t now_ns = nep_now_ns(); /* under the lock: no death is later */
    bool any = false;
    if (peer->qps == NULL || peer->dead == 0 || atomic_load(&peer->status) != NEP_OK ||
        atomic_load(&peer->has_left)) {
        return false;
    }
    for (uint32_t q = 0; q < verbs->num_qps; q++) {
        if (peer->qps[q].is_dead && nep_verbs_qp_may_revive(verbs, peer, q)) {
            revive(verbs, peer, q, now_ns);
            any = true;
        }
    }
    if (peer->num_alive == 0 && nep_verbs_has_ended(verbs, peer, now_ns)) {
        size_t len = strlen(peer->message);
        snprintf(peer->message + len, sizeof peer->message - len, "; its process has ended");
        nep_verbs_peer_lose(verbs, peer);
        any = false;
    } else if (peer->num_alive == 0 && now_ns - peer->silent_ns > patience_ns(verbs)) {
        nep_verbs_peer_lose(verbs, peer);
        any = false;
    }
    return any;
}

void nep_verbs_revive(struct nep_verbs *verbs)
{
    uint64_t now_ns = nep_now_ns();
    if (now_ns < verbs->next_revive_ns) {
        return;
    }
    verbs->next_revive_ns = now_ns + TICK_NS;
    pthread_mutex_lock(&verbs->poll_lock);
    atomic_store(&verbs->has_dead, false); /* before the look: a QP may die after it */
    for (uint32_t i = 0; i < verbs->paths[0].cq_depth && nep_verbs_poll(verbs); i++) {
    }
    for (uint32_t p = 0; p < verbs->num_paths; p++) {
        struct nep_verbs_path *path = &verbs->paths[p];
        if (path->knocks.is_broken && path->knocks.qp != NULL && !atomic_load(&path->is_down) &&
            !atomic_load(&path->is_dead)) {
            mend(verbs, path);
        }
    }
    bool any = false;
    for (uint32_t r = 0; r < verbs->num_ranks; r++) {
        pthread_mutex_lock(&verbs->peers[r].lock);
        any = revive_peer(verbs, &verbs->peers[r]) || any;
        pthread_mutex_unlock(&verbs->peers[r].lock);
    }
    if (any) {
        atomic_store(&verbs->has_dead, true);
    }
    pthread_mutex_unlock(&verbs->poll_lock);
}
