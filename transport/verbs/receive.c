/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Completions and arrivals. A receive has no buffer: WRITE_WITH_IMM uses one up and tells the
 * immediate and the QP, which tells the source. Parts of a split put are a set: the put is
 * announced when its immediate has come by as many QPs as its part field says. No order is used,
 * neither between QPs nor on one.
 *
 * The completion of an arrival follows its data, also where data is written with relaxed ordering,
 * so what the sink stores with release after the poll below publishes the data too.
 */
#include <endian.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/verbs/verbs.h"

enum { BATCH = 32 };

enum nep_status nep_verbs_srq_fill(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    while (path->srq_posted < path->srq_depth) {
        uint32_t missing = path->srq_depth - path->srq_posted;
        uint32_t num = missing < NEP_VERBS_REFILL ? missing : NEP_VERBS_REFILL;
        struct ibv_recv_wr *list = &verbs->receives[NEP_VERBS_REFILL - num], *bad = NULL;
        int error = verbs->api.post_srq_recv(path->srq, list, &bad);
        if (error != 0) {
            uint32_t posted = bad == NULL ? 0 : (uint32_t)(bad - list);
            path->srq_posted += posted;
            return nep_fail(NEP_ERR_IO, "verbs: %s: receive %u of %u cannot be posted: %s",
                            path->device, path->srq_posted, path->srq_depth, strerror(error));
        }
        path->srq_posted += num;
    }
    return NEP_OK;
}

void nep_verbs_srq_watch(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    struct ibv_srq_attr limit = {.srq_limit = path->srq_depth / 8};
    path->is_unwatched = false;
    if (verbs->api.modify_srq(path->srq, &limit, IBV_SRQ_LIMIT) != 0) {
        nep_debug("verbs: %s has no low-water event", path->device);
    }
}

static void announce(struct nep_verbs *verbs, uint32_t src, uint32_t imm)
{
    void *base = verbs->windows[nep_verbs_imm_window(imm)].base;
    if (base == NULL) {
        atomic_fetch_add_explicit(&verbs->stale, 1, memory_order_relaxed);
        return;
    }
    atomic_fetch_add_explicit(&verbs->arrivals, 1, memory_order_relaxed);
    verbs->params.sink(base, verbs->rank, src, imm & ~15u);
}

/* Takes a part; announces when it was the last one. */
static void take_part(struct nep_verbs *verbs, uint32_t src, uint32_t qp_idx, uint32_t imm)
{
    uint32_t num_parts = nep_verbs_imm_part(imm);
    struct nep_verbs_assembly *assembly = &verbs->peers[src].parts[num_parts];
    uint16_t bit = (uint16_t)(1u << qp_idx);
    uint32_t i = 0;
    while (i < assembly->num &&
           (assembly->partials[i].imm != imm || (assembly->partials[i].seen & bit) != 0)) {
        i++;
    }
    if (i == assembly->num) {
        if (assembly->num == assembly->cap) {
            uint32_t cap = assembly->cap == 0 ? 16 : assembly->cap * 2;
            struct nep_verbs_partial *partials =
                realloc(assembly->partials, cap * sizeof *partials);
            if (partials == NULL) {
                nep_warn("verbs: no memory for %u split puts from rank %u: one is lost", cap, src);
                return;
            }
            assembly->partials = partials;
            assembly->cap = cap;
        }
        assembly->partials[assembly->num++] = (struct nep_verbs_partial){.imm = imm};
    }
    struct nep_verbs_partial *partial = &assembly->partials[i];
    partial->seen |= bit;
    if (++partial->num_seen == num_parts) {
        uint32_t num_after = --assembly->num - i;
        if (num_after > 0) { /* the oldest stay first */
            memmove(partial, partial + 1, num_after * sizeof *partial);
        }
        announce(verbs, src, imm);
    }
}

static void take_control(struct nep_verbs *verbs, uint32_t src, uint32_t imm)
{
    struct nep_verbs_peer *peer = &verbs->peers[src];
    uint32_t code = imm >> 4 & 15, argument = imm >> 8;
    pthread_mutex_lock(&peer->lock);
    if (code == NEP_VERBS_QP_DEAD && (argument & 15) < verbs->num_qps) {
        nep_verbs_qp_reported(verbs, peer, argument & 15, argument >> 4);
    } else if (code == NEP_VERBS_LEAVE) {
        atomic_store(&peer->has_left, true);
    }
    pthread_mutex_unlock(&peer->lock);
}

/*
 * Completions of one peer's sends that follow one another are taken under one lock, and then its
 * puts go on once.
 */
struct run {
    struct nep_verbs_peer *peer; /* locked; NULL: none */
};

static void end_run(struct nep_verbs *verbs, struct run *run)
{
    struct nep_verbs_peer *peer = run->peer;
    if (peer != NULL) {
        run->peer = NULL;
        nep_verbs_peer_advance(peer);
        nep_verbs_peer_pump(verbs, peer);
        pthread_mutex_unlock(&peer->lock);
    }
}

static void take_arrival(struct nep_verbs *verbs, struct nep_verbs_path *path,
                         const struct ibv_wc *wc, struct run *run, uint64_t now_ns)
{
    uint32_t imm = be32toh(wc->imm_data), part = nep_verbs_imm_part(imm);
    const struct nep_verbs_qp_key *key = nep_verbs_qp_find(path, wc->qp_num);
    path->srq_posted--;
    if (key == NULL || wc->opcode != IBV_WC_RECV_RDMA_WITH_IMM) {
        nep_warn("verbs: %s: a message by QP %u that is not of this protocol (opcode %d)",
                 path->device, wc->qp_num, wc->opcode);
        return;
    }
    atomic_store_explicit(&verbs->peers[key->peer].last_heard_ns, now_ns, memory_order_relaxed);
    if (part == 0) {
        announce(verbs, key->peer, imm);
    } else if (part == 15) {
        end_run(verbs, run);
        take_control(verbs, key->peer, imm);
    } else {
        take_part(verbs, key->peer, key->qp_idx, imm);
    }
}

/* All requests of a QP up to `number` are complete: RC completes in order, so one that is signalled
 * stands for all before it. */
static inline void take_done(const struct nep_verbs *verbs, struct nep_verbs_peer *peer,
                             uint32_t qp_idx, uint64_t number)
{
    struct nep_verbs_qp *qp = &peer->qps[qp_idx];
    if (qp->is_dead || number > qp->posted) {
        return;
    }
    uint64_t done = qp->done;
    while (done < number) {
        uint64_t put = qp->put_of[++done & verbs->put_mask];
        if (put != 0) {
            nep_verbs_record_of(peer, put)->on_qps &= (uint16_t) ~(1u << qp_idx);
        }
    }
    qp->done = done;
}

static inline struct nep_verbs_peer *run_of(struct nep_verbs *verbs, struct run *run, uint32_t rank)
{
    struct nep_verbs_peer *peer = &verbs->peers[rank];
    if (run->peer != peer) {
        end_run(verbs, run);
        pthread_mutex_lock(&peer->lock);
        run->peer = peer;
    }
    return peer;
}

/* A send or a receive that failed. */
static void take_failed(struct nep_verbs *verbs, const struct nep_verbs_path *path,
                        const struct ibv_wc *wc, struct run *run)
{
    const struct nep_verbs_qp_key *key = nep_verbs_qp_find(path, wc->qp_num);
    if (key != NULL) {
        struct nep_verbs_peer *peer = run_of(verbs, run, key->peer);
        if (wc->wr_id == 0 || /* a receive */
            (wc->wr_id & ~NEP_VERBS_WR_SEND) > peer->qps[key->qp_idx].done) {
            nep_verbs_qp_failed(verbs, peer, key->qp_idx, wc, NULL);
        } /* else of an incarnation that is over */
    }
}

static inline void take_sent(struct nep_verbs *verbs, const struct nep_verbs_path *path,
                             const struct ibv_wc *wc, struct run *run, uint64_t now_ns)
{
    const struct nep_verbs_qp_key *key = nep_verbs_qp_find(path, wc->qp_num);
    if (wc->status != IBV_WC_SUCCESS) {
        take_failed(verbs, path, wc, run);
    } else if (key != NULL) {
        struct nep_verbs_peer *peer = run_of(verbs, run, key->peer);
        atomic_store_explicit(&peer->last_heard_ns, now_ns, memory_order_relaxed);
        take_done(verbs, peer, key->qp_idx, wc->wr_id & ~NEP_VERBS_WR_SEND);
    }
}

static void take_all(struct nep_verbs *verbs, struct nep_verbs_path *path, const struct ibv_wc *wc,
                     int num)
{
    uint64_t now_ns = nep_now_ns();
    struct run run = {NULL};
    for (int i = 0; i < num; i++) {
        /* wr_id is valid in failed completions too; opcode is not. */
        if ((wc[i].wr_id & NEP_VERBS_WR_SEND) != 0) {
            take_sent(verbs, path, &wc[i], &run, now_ns);
        } else if (wc[i].wr_id != 0) {
            end_run(verbs, &run);
            nep_verbs_knock_completed(verbs, path, &wc[i], now_ns);
        } else if (wc[i].status == IBV_WC_SUCCESS) {
            take_arrival(verbs, path, &wc[i], &run, now_ns);
        } else {
            path->srq_posted--;
            take_failed(verbs, path, &wc[i], &run);
        }
    }
    end_run(verbs, &run);
}

bool nep_verbs_poll_path(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    struct ibv_wc wc[BATCH];
    if (atomic_load_explicit(&path->is_dead, memory_order_relaxed)) {
        return false;
    }
    int num = verbs->api.poll_cq(path->cq, BATCH, wc);
    if (num == 0) {
        return false;
    }
    if (num < 0) {
        nep_warn("verbs: %s: the completion queue failed (%d): the path is dead", path->device,
                 num);
        struct ibv_async_event event = {.event_type = IBV_EVENT_CQ_ERR};
        nep_verbs_event_handle(verbs, path, &event);
        return false;
    }
    take_all(verbs, path, wc, num);
    if (path->srq_posted + NEP_VERBS_REFILL <= path->srq_depth &&
        nep_verbs_srq_fill(verbs, path) != NEP_OK) {
        nep_warn("%s", nep_last_message());
    }
    if (path->is_unwatched && path->srq_posted > path->srq_depth / 2) {
        nep_verbs_srq_watch(verbs, path); /* the event comes once */
    }
    return true;
}

bool nep_verbs_poll(struct nep_verbs *verbs)
{
    bool any = false;
    for (uint32_t p = 0; p < verbs->num_paths; p++) {
        any = nep_verbs_poll_path(verbs, &verbs->paths[p]) || any;
    }
    return any;
}
