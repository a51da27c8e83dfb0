/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What goes on the QPs: records are posted in order as far as the send queues have room, in lists,
 * each list with one signalled request at its end. The rest waits in the ring of send.c.
 *
 * A long put is split over the live QPs of the peer (parts), and a part over the pieces of memory
 * that it crosses: plain writes before the one that announces, on the same QP.
 *
 * When a QP dies, every put that had a part on it goes again, WHOLE, over a live QP. Before that,
 * the live QP carries "QP q is dead", on which the receiver puts its end in error: so no late write
 * of the dead QP can land after the put was announced and its slot given to somebody else. Whole,
 * and not the missing part: the receiver could not tell a late part from one sent again. The number
 * of parts falls with each death and never rises again, so parts that stay behind at the receiver
 * meet no others; when a QP comes back, whole puts use it in turn.
 */
#include <endian.h>
#include <stdio.h>
#include <string.h>

#include "transport/verbs/verbs.h"

enum { LIST = 8 };

/* Requests collected for one QP and posted as a list. */
struct list {
    struct ibv_send_wr wr[LIST];
    struct ibv_sge sge[LIST];
    uint32_t num;
};

/* The lists of one pump. */
struct lists {
    struct nep_verbs *verbs;
    struct nep_verbs_peer *peer;
    uint32_t used; /* bit q: there is something for QP q; the others' lists hold nothing at all */
    struct list of[NEP_VERBS_MAX_QPS];
};

/* What all requests of one put have in common. */
struct aim {
    uint64_t number;
    struct nep_verbs_record *record;
    const struct nep_put *put;
    const struct nep_verbs_window *window;
    const struct nep_verbs_way *way; /* NULL: no bytes */
    uint64_t to;                     /* where its first byte goes */
    enum ibv_wr_opcode opcode;       /* of its last request */
    bool is_one_piece;               /* and so is each part of it */
};

/* A contiguous range of a put that travels by one QP. */
struct part {
    uint64_t offset; /* in the put */
    uint64_t len;
    uint32_t imm;
};

static inline struct aim aim_at(const struct lists *lists, uint64_t number)
{
    struct nep_verbs_record *record = nep_verbs_record_of(lists->peer, number);
    const struct nep_put *put = &record->put;
    const struct nep_verbs_window *window = &lists->verbs->windows[put->window];
    const struct nep_verbs_remote *remote = &window->remotes[put->dst];
    struct aim aim = {.number = number,
                      .record = record,
                      .put = put,
                      .window = window,
                      .opcode = put->is_silent ? IBV_WR_RDMA_WRITE : IBV_WR_RDMA_WRITE_WITH_IMM,
                      .is_one_piece = nep_verbs_is_one_piece(lists->verbs, put, put->len)};
    if (put->len > 0) {
        aim.way = nep_verbs_way_of(remote, put->offset, put->len);
        aim.to = remote->base + put->offset;
    }
    return aim;
}

/* ---- lists ---------------------------------------------------------------------------------- */

static inline void flush(struct lists *lists, uint32_t qp_idx)
{
    struct nep_verbs *verbs = lists->verbs;
    struct nep_verbs_qp *qp = &lists->peer->qps[qp_idx];
    struct list *list = &lists->of[qp_idx];
    lists->used &= ~(1u << qp_idx);
    if (qp->is_dead) {
        return;
    }
    list->wr[list->num - 1].send_flags |= IBV_SEND_SIGNALED;
    list->wr[list->num - 1].next = NULL;
    struct ibv_send_wr *bad = NULL;
    lists->peer->num_requests += list->num;
    int error = verbs->api.post_send(qp->qp, list->wr, &bad);
    if (error != 0) {
        char why[96];
        snprintf(why, sizeof why, "posting failed: %s", strerror(error));
        nep_verbs_qp_failed(verbs, lists->peer, qp_idx, NULL, why);
    }
}

static inline void flush_all(struct lists *lists)
{
    while (lists->used != 0) {
        flush(lists, (uint32_t)__builtin_ctz(lists->used));
    }
}

/* The next request of a QP's list; `put`: the put that ends with it, or 0. NULL: the QP is dead. */
static inline struct ibv_send_wr *append(struct lists *lists, uint32_t qp_idx, uint64_t put)
{
    struct nep_verbs_qp *qp = &lists->peer->qps[qp_idx];
    struct list *list = &lists->of[qp_idx];
    bool is_begun = (lists->used >> qp_idx & 1) != 0;
    if (is_begun && list->num == LIST) {
        flush(lists, qp_idx);
        is_begun = false;
    }
    if (qp->is_dead) { /* by that, for instance: qp_failed took care of what was on it */
        return NULL;
    }
    uint32_t at = is_begun ? list->num : 0;
    struct ibv_send_wr *wr = &list->wr[at];
    lists->used |= 1u << qp_idx;
    list->num = at + 1;
    wr->sg_list = &list->sge[at];
    wr->next = wr + 1; /* flush ends the list */
    wr->num_sge = 0;
    uint64_t number = ++qp->posted;
    qp->put_of[number & lists->verbs->put_mask] = put;
    wr->wr_id = NEP_VERBS_WR_SEND | number;
    return wr;
}

static inline uint32_t room(const struct nep_verbs *verbs, const struct nep_verbs_qp *qp)
{
    return qp->is_dead ? 0 : verbs->depth - (uint32_t)(qp->posted - qp->done);
}

static void append_control(struct lists *lists, uint32_t qp_idx, enum nep_verbs_control code,
                           uint32_t argument)
{
    struct ibv_send_wr *wr = append(lists, qp_idx, 0);
    if (wr != NULL) {
        wr->opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
        wr->send_flags = IBV_SEND_SOLICITED;
        wr->imm_data = htobe32(argument << 8 | (uint32_t)code << 4 | 15);
    }
}

/* ---- one put -------------------------------------------------------------------------------- */

/* The longest piece at `done` of a part: to the next border of registrations or messages. */
static uint64_t piece_bytes(const struct nep_verbs *verbs, const struct nep_put *put,
                            const struct part *part, uint64_t done)
{
    uint64_t chunk = verbs->params.config->verbs_chunk_bytes;
    uint64_t from = (uint64_t)((const uint8_t *)put->src - verbs->windows[put->window].start) +
                    part->offset + done;
    uint64_t to = put->offset + part->offset + done;
    uint64_t bytes = part->len - done;
    uint64_t limit = verbs->max_message_bytes;
    uint64_t left_from = chunk - from % chunk, left_to = chunk - to % chunk;
    bytes = left_from < bytes ? left_from : bytes;
    bytes = left_to < bytes ? left_to : bytes;
    return limit < bytes ? limit : bytes;
}

static inline uint32_t num_pieces(const struct nep_verbs *verbs, const struct aim *aim,
                                  const struct part *part)
{
    uint32_t num = 0;
    uint64_t done = 0;
    if (aim->is_one_piece) {
        return 1;
    }
    do {
        done += piece_bytes(verbs, aim->put, part, done);
        num++;
    } while (done < part->len);
    return num;
}

/* The bytes of a request: `bytes` of the put from `at` on, with the keys of its pieces of memory.
 */
static inline void fill(struct ibv_send_wr *wr, const struct nep_verbs_qp *qp,
                        const struct aim *aim, uint64_t at, uint64_t bytes, size_t from, size_t to)
{
    wr->num_sge = 1;
    wr->sg_list->addr = (uintptr_t)aim->put->src + at;
    wr->sg_list->length = (uint32_t)bytes;
    wr->sg_list->lkey = aim->window->mrs[from]->lkey;
    wr->wr.rdma.remote_addr = aim->to + at;
    wr->wr.rdma.rkey = aim->way != NULL ? aim->way->rkeys[to] : 0; /* check() has seen one */
    if (bytes <= qp->max_inline && !aim->window->is_device) {      /* inline is read by the host */
        wr->send_flags |= IBV_SEND_INLINE;
    }
}

/* One request: bytes of a put; the last one of a part announces. False: QP dead. */
static bool append_piece(struct lists *lists, uint32_t qp_idx, const struct aim *aim,
                         const struct part *part, uint64_t done, uint64_t bytes)
{
    const struct nep_verbs_qp *qp = &lists->peer->qps[qp_idx];
    const struct nep_verbs_window *window = aim->window;
    uint64_t chunk = lists->verbs->params.config->verbs_chunk_bytes;
    uint64_t at = part->offset + done;
    bool is_last = done + bytes == part->len;
    struct ibv_send_wr *wr = append(lists, qp_idx, is_last ? aim->number : 0);
    if (wr == NULL) {
        return false;
    }
    wr->opcode = is_last ? aim->opcode : IBV_WR_RDMA_WRITE;
    wr->imm_data = htobe32(part->imm);
    wr->send_flags = is_last ? IBV_SEND_SOLICITED : 0; /* wakes the other side */
    size_t from = (size_t)((const uint8_t *)aim->put->src + at - window->start) / chunk;
    size_t to = (aim->put->offset + at) / chunk;
    fill(wr, qp, aim, at, bytes, qp->path * window->num_chunks + from,
         qp_idx * window->num_chunks + to);
    return true;
}

/* A part that crosses borders. */
static void append_pieces(struct lists *lists, uint32_t qp_idx, const struct aim *aim,
                          const struct part *part)
{
    uint64_t done = 0, bytes;
    do {
        bytes = piece_bytes(lists->verbs, aim->put, part, done);
        done += bytes;
    } while (append_piece(lists, qp_idx, aim, part, done - bytes, bytes) && done < part->len);
}

/* Puts a part on a QP that has room for it. */
static inline void append_part(struct lists *lists, uint32_t qp_idx, const struct aim *aim,
                               const struct part *part)
{
    struct nep_verbs_record *record = aim->record;
    if (lists->peer->qps[qp_idx].is_dead) { /* died while the parts before this were posted */
        lists->peer->num_resend += !record->must_resend;
        record->must_resend = true;
        return;
    }
    record->on_qps |= (uint16_t)(1u << qp_idx);
    if (!aim->is_one_piece) {
        append_pieces(lists, qp_idx, aim, part);
        return;
    }
    struct ibv_send_wr *wr = append(lists, qp_idx, aim->number);
    if (wr != NULL) {
        wr->opcode = aim->opcode;
        wr->imm_data = htobe32(part->imm);
        wr->send_flags = IBV_SEND_SOLICITED;
        if (part->len > 0) {
            const struct nep_verbs_qp *qp = &lists->peer->qps[qp_idx];
            fill(wr, qp, aim, part->offset, part->len, qp->path, qp_idx);
        }
    }
}

/* Whole, over the next live QP with room; false when none has. */
static bool post_whole(struct lists *lists, const struct aim *aim)
{
    struct nep_verbs *verbs = lists->verbs;
    struct nep_verbs_peer *peer = lists->peer;
    const struct nep_put *put = aim->put;
    struct part part = {0, put->len, put->imm};
    for (uint32_t pass = 0; pass < 2; pass++) {
        for (uint32_t i = 0; i < verbs->num_qps; i++) {
            uint32_t q = peer->next_qp + i;
            q -= q >= verbs->num_qps ? verbs->num_qps : 0;
            struct nep_verbs_qp *qp = &peer->qps[q];
            /* first the paths whose port is up */
            if (qp->is_dead || qp->told != peer->dead ||
                (pass == 0 &&
                 atomic_load_explicit(&verbs->paths[qp->path].is_down, memory_order_relaxed)) ||
                room(verbs, qp) < num_pieces(verbs, aim, &part)) {
                continue;
            }
            append_part(lists, q, aim, &part);
            /* a list is filled, or the QP has a long put, before the next one's turn comes */
            bool is_full = (lists->used >> q & 1) == 0 || lists->of[q].num == LIST ||
                           put->len >= verbs->params.config->verbs_split_bytes;
            peer->next_qp = is_full ? (q + 1) % verbs->num_qps : q;
            return true;
        }
    }
    return false;
}

/* Split over live QPs; false when one of them has no room yet. */
static bool post_split(struct lists *lists, const struct aim *aim)
{
    struct nep_verbs *verbs = lists->verbs;
    struct nep_verbs_peer *peer = lists->peer;
    const struct nep_put *put = aim->put;
    uint32_t num_parts = peer->num_parts, num_left = num_parts;
    uint64_t share = (put->len / num_parts + 63) / 64 * 64;
    struct part part = {0, share, put->imm | num_parts};
    uint32_t on = 0;
    for (uint32_t q = 0; num_left > 0; q++) {
        const struct nep_verbs_qp *qp = &peer->qps[q];
        if (qp->is_dead) {
            continue;
        }
        part.len = --num_left > 0 ? share : put->len - part.offset;
        if (room(verbs, qp) < num_pieces(verbs, aim, &part)) {
            return false;
        }
        part.offset += share;
        on |= 1u << q;
    }
    part.offset = 0;
    for (; on != 0; on &= on - 1, part.offset += share) {
        part.len = (on & (on - 1)) != 0 ? share : put->len - part.offset;
        append_part(lists, (uint32_t)__builtin_ctz(on), aim, &part);
    }
    return true;
}

static inline bool post_record(struct lists *lists, uint64_t number)
{
    const struct aim aim = aim_at(lists, number);
    uint64_t split = lists->verbs->params.config->verbs_split_bytes;
    uint64_t num_parts = lists->peer->num_parts, len = aim.put->len;
    /* Shares are rounded to 64 bytes, and the last one must not come out negative. */
    if (num_parts > 1 && len >= split && len >= 64 * num_parts * num_parts &&
        atomic_load_explicit(&lists->verbs->num_down, memory_order_relaxed) == 0) {
        return post_split(lists, &aim);
    }
    return post_whole(lists, &aim);
}

/* ---- the pump ------------------------------------------------------------------------------- */

/* Announces dead QPs by every live one, so that what follows on it is safe. */
static void tell_dead(struct lists *lists)
{
    struct nep_verbs_peer *peer = lists->peer;
    for (uint32_t j = 0; j < lists->verbs->num_qps; j++) {
        struct nep_verbs_qp *qp = &peer->qps[j];
        for (uint32_t q = 0; q < lists->verbs->num_qps && !qp->is_dead; q++) {
            uint16_t bit = (uint16_t)(1u << q);
            if ((peer->dead & bit & ~qp->told) != 0 && room(lists->verbs, qp) > 0) {
                uint32_t died = (peer->qps[q].incarnation - 1) & NEP_VERBS_INCARNATION;
                append_control(lists, j, NEP_VERBS_QP_DEAD, died << 4 | q);
                qp->told |= bit;
            }
        }
    }
}

static void resend(struct lists *lists)
{
    struct nep_verbs_peer *peer = lists->peer;
    uint64_t first = atomic_load_explicit(&peer->completed, memory_order_relaxed) + 1;
    for (uint64_t n = first; n <= peer->posted && peer->num_resend > 0; n++) {
        struct nep_verbs_record *record = nep_verbs_record_of(peer, n);
        /* Parts that still travel would end this record too early. */
        if (!record->must_resend || record->on_qps != 0) {
            continue;
        }
        record->must_resend = false;
        peer->num_resend--;
        const struct aim aim = aim_at(lists, n);
        if (!post_whole(lists, &aim)) {
            record->must_resend = true;
            peer->num_resend++;
            return;
        }
        atomic_fetch_add_explicit(&lists->verbs->retries, 1, memory_order_relaxed);
    }
}

void nep_verbs_peer_pump(struct nep_verbs *verbs, struct nep_verbs_peer *peer)
{
    if (atomic_load_explicit(&peer->status, memory_order_relaxed) != NEP_OK ||
        (peer->posted == peer->next && peer->num_resend == 0 && peer->dead == 0)) {
        return;
    }
    struct lists lists;
    lists.verbs = verbs;
    lists.peer = peer;
    lists.used = 0;
    uint16_t dead;
    do { /* again when a QP died by what was posted */
        dead = peer->dead;
        if (peer->dead != 0) {
            tell_dead(&lists);
        }
        if (peer->num_resend > 0) {
            resend(&lists);
        }
        while (peer->posted < peer->next && peer->num_alive > 0 &&
               post_record(&lists, peer->posted + 1)) {
            peer->posted++;
        }
        flush_all(&lists);
    } while (dead != peer->dead && peer->num_alive > 0);
}

/* ---- messages of the transport itself ------------------------------------------------------- */

static void post_single(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint32_t qp_idx,
                        struct ibv_send_wr *wr)
{
    struct nep_verbs_qp *qp = &peer->qps[qp_idx];
    qp->posted++;
    qp->put_of[qp->posted & verbs->put_mask] = 0;
    wr->wr_id = NEP_VERBS_WR_SEND | qp->posted;
    wr->send_flags = IBV_SEND_SIGNALED | IBV_SEND_SOLICITED;
    struct ibv_send_wr *bad = NULL;
    int error = verbs->api.post_send(qp->qp, wr, &bad);
    if (error != 0) {
        nep_verbs_qp_failed(verbs, peer, qp_idx, NULL, strerror(error));
    }
}

void nep_verbs_peer_bind(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint32_t qp_idx,
                         struct ibv_mw *mw, uint32_t key, const struct ibv_mw_bind_info *info)
{
    struct ibv_send_wr wr = {.opcode = IBV_WR_BIND_MW};
    wr.bind_mw.mw = mw;
    wr.bind_mw.rkey = key;
    wr.bind_mw.bind_info = *info;
    post_single(verbs, peer, qp_idx, &wr);
}

void nep_verbs_peer_leave(struct nep_verbs *verbs, struct nep_verbs_peer *peer)
{
    for (uint32_t q = 0; q < verbs->num_qps; q++) {
        if (room(verbs, &peer->qps[q]) > 0) {
            struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE_WITH_IMM,
                                     .imm_data = htobe32((uint32_t)NEP_VERBS_LEAVE << 4 | 15)};
            post_single(verbs, peer, q, &wr);
            return;
        }
    }
}

void nep_verbs_peer_ping(struct nep_verbs *verbs, struct nep_verbs_peer *peer)
{
    for (uint32_t q = 0; q < verbs->num_qps; q++) {
        struct nep_verbs_qp *qp = &peer->qps[q];
        if (!qp->is_dead && qp->posted == qp->done) {
            struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_WRITE};
            post_single(verbs, peer, q, &wr);
        }
    }
}
