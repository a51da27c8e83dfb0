/* SPDX-License-Identifier: Apache-2.0 */
/* Queue pairs of the device in memory: fake_device.h. */
#include "tests/unit/verbs/fake_device.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct ibv_qp *fake_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *attr)
{
    if (attr->cap.max_inline_data > 128) {
        errno = EINVAL;
        return NULL;
    }
    if (attr->qp_type == IBV_QPT_UD && fake.no_datagrams) {
        errno = EOPNOTSUPP;
        return NULL;
    }
    if (!fake_make()) {
        return NULL;
    }
    struct fake_qp *qp = calloc(1, sizeof *qp);
    qp->is_datagram = attr->qp_type == IBV_QPT_UD;
    qp->qp.context = pd->context;
    qp->qp.pd = pd;
    qp->cq = (struct fake_cq *)attr->send_cq;
    qp->srq = (struct fake_srq *)attr->srq;
    qp->max_wr = attr->cap.max_send_wr;
    qp->fail_after = qp->enomem_after = -1;
    pthread_mutex_lock(&fake.lock);
    qp->qp.qp_num = fake.num_qps;
    fake.qps[fake.num_qps++] = qp;
    pthread_mutex_unlock(&fake.lock);
    return &qp->qp;
}

static void fake_complete(struct fake_qp *qp, const struct ibv_send_wr *wr,
                          enum ibv_wc_status status)
{
    struct ibv_wc wc = {.wr_id = wr->wr_id, .status = status, .qp_num = qp->qp.qp_num};
    wc.opcode = status == IBV_WC_SUCCESS ? IBV_WC_RDMA_WRITE : (enum ibv_wc_opcode)0x55;
    qp->unsignalled++;
    if (status != IBV_WC_SUCCESS || (wr->send_flags & IBV_SEND_SIGNALED) != 0) {
        qp->num_wr -= status == IBV_WC_SUCCESS ? qp->unsignalled : 0;
        qp->unsignalled = 0;
        fake_push(qp->cq, &wc);
    }
}

/* The range [addr, addr + len) if the registration `key` allows it. */
static bool fake_key_allows(uint32_t key, uint64_t addr, uint64_t len, unsigned access)
{
    struct fake_mr *mr = key < FAKE_MRS ? fake.mrs[key] : NULL;
    return mr != NULL && (mr->access & access) == access && addr >= (uintptr_t)mr->mr.addr &&
           addr + len <= (uintptr_t)mr->mr.addr + mr->mr.length;
}

/* A write that comes by QP `dest`. */
static bool fake_write_allows(const struct fake_qp *dest, uint32_t key, uint64_t addr, uint64_t len)
{
    if ((key & FAKE_MW) == 0) {
        return fake_key_allows(key, addr, len, IBV_ACCESS_REMOTE_WRITE);
    }
    struct fake_mw *mw = fake.mws[key >> 8 & (FAKE_MRS - 1)];
    return mw != NULL && mw->key == key && mw->qp_num == dest->qp.qp_num && addr >= mw->addr &&
           addr + len <= mw->addr + mw->len;
}

static enum ibv_wc_status fake_bind(const struct fake_qp *qp, const struct ibv_send_wr *wr)
{
    struct fake_mw *mw = (struct fake_mw *)wr->bind_mw.mw;
    const struct ibv_mw_bind_info *info = &wr->bind_mw.bind_info;
    struct fake_mr *mr = (struct fake_mr *)info->mr;
    if (mw->key != 0 || mw->mw.rkey == wr->bind_mw.rkey || mr->mr.pd != qp->qp.pd ||
        mw->mw.pd != qp->qp.pd ||
        !fake_key_allows(mr->mr.rkey, info->addr, info->length,
                         IBV_ACCESS_MW_BIND | IBV_ACCESS_LOCAL_WRITE)) {
        return IBV_WC_MW_BIND_ERR;
    }
    mw->key = wr->bind_mw.rkey;
    mw->qp_num = qp->qp.qp_num;
    mw->addr = info->addr;
    mw->len = info->length;
    mw->mr = mr;
    return IBV_WC_SUCCESS;
}

static bool fake_is_cut(const struct fake_qp *qp)
{
    return (fake.cut >> (qp->qp.context->device->name[4] - '0') & 1) != 0;
}

/* A datagram arrives, or nobody hears of it. */
static void fake_datagram(struct fake_qp *qp, const struct ibv_send_wr *wr)
{
    struct fake_qp *dest = wr->wr.ud.remote_qpn < FAKE_QPS ? fake.qps[wr->wr.ud.remote_qpn] : NULL;
    uint32_t len = wr->sg_list[0].length;
    if (qp->state != IBV_QPS_RTS) {
        fake_complete(qp, wr, IBV_WC_WR_FLUSH_ERR);
        return;
    }
    fake_complete(qp, wr, IBV_WC_SUCCESS);
    bool is_lost = fake.lost_datagrams != 0 && ++fake.num_datagrams % fake.lost_datagrams == 0;
    if (dest == NULL || !dest->is_datagram || dest->state != IBV_QPS_RTS || is_lost ||
        dest->qkey != wr->wr.ud.remote_qkey || fake_is_cut(qp) || fake_is_cut(dest) ||
        dest->num_recvs == 0) {
        return;
    }
    struct ibv_wc wc = {.wr_id = dest->recvs[0].wr_id,
                        .opcode = IBV_WC_RECV,
                        .qp_num = dest->qp.qp_num,
                        .byte_len = FAKE_GRH + len};
    if (dest->recvs[0].sge.length < wc.byte_len) {
        fake.num_bad++;
        return;
    }
    memcpy((uint8_t *)(uintptr_t)dest->recvs[0].sge.addr + FAKE_GRH,
           (void *)(uintptr_t)wr->sg_list[0].addr, len);
    dest->num_recvs--;
    memmove(&dest->recvs[0], &dest->recvs[1], dest->num_recvs * sizeof dest->recvs[0]);
    fake_push(dest->cq, &wc);
}

int fake_post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
    struct fake_qp *mine = (struct fake_qp *)qp;
    pthread_mutex_lock(&fake.lock);
    int error = mine->num_recvs < FAKE_PENDING ? 0 : ENOMEM;
    *bad = wr;
    if (error == 0) {
        mine->recvs[mine->num_recvs++] = (struct fake_recv){wr->wr_id, wr->sg_list[0]};
    }
    pthread_mutex_unlock(&fake.lock);
    return error;
}

struct ibv_ah *fake_create_ah(struct ibv_pd *pd, struct ibv_ah_attr *attr)
{
    (void)attr;
    if (!fake_make()) {
        return NULL;
    }
    struct ibv_ah *ah = calloc(1, sizeof *ah);
    ah->pd = pd;
    return ah;
}

int fake_destroy_ah(struct ibv_ah *ah)
{
    fake_unmake(ah);
    return 0;
}

/* Does one request; false when it must wait for a receive. */
static bool fake_execute(struct fake_qp *qp, const struct ibv_send_wr *wr)
{
    struct fake_qp *dest = fake.qps[qp->dest];
    uint32_t len = wr->num_sge == 0 ? 0 : wr->sg_list[0].length;
    bool is_announced = wr->opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
    enum ibv_wc_status status = IBV_WC_SUCCESS;
    if (qp->state != IBV_QPS_RTS) {
        fake_complete(qp, wr, IBV_WC_WR_FLUSH_ERR);
        return true;
    }
    if (wr->opcode == IBV_WR_BIND_MW) {
        status = fake_bind(qp, wr);
        qp->state = status == IBV_WC_SUCCESS ? qp->state : IBV_QPS_ERR;
        fake_complete(qp, wr, status);
        return true;
    }
    bool fails = qp->fail_after == 0;
    qp->fail_after -= qp->fail_after >= 0;
    bool works = !fails || qp->deliver_failed;
    if (dest != NULL && (fake_is_cut(qp) || fake_is_cut(dest))) {
        fails = true; /* of every second one the acknowledgement alone is lost */
        works = fake.num_posted % 2 == 0 && qp->num_wr == 1;
    }
    if (dest == NULL || qp->send_psn != dest->recv_psn ||
        (dest->state != IBV_QPS_RTR && dest->state != IBV_QPS_RTS)) {
        status = IBV_WC_RETRY_EXC_ERR;
        works = false;
    } else if (works && len > 0 &&
               !fake_write_allows(dest, wr->wr.rdma.rkey, wr->wr.rdma.remote_addr, len)) {
        status = IBV_WC_REM_ACCESS_ERR;
        dest->state = IBV_QPS_ERR;
        works = false;
    } else if (works && is_announced && dest->srq->posted == 0) {
        qp->fail_after += !fails && qp->fail_after >= 0;
        return false;
    }
    if (works && len > 0) {
        memcpy((void *)(uintptr_t)wr->wr.rdma.remote_addr, (void *)(uintptr_t)wr->sg_list[0].addr,
               len);
    }
    if (works && is_announced) {
        struct ibv_wc wc = {.opcode = IBV_WC_RECV_RDMA_WITH_IMM,
                            .qp_num = dest->qp.qp_num,
                            .imm_data = wr->imm_data,
                            .wc_flags = IBV_WC_WITH_IMM,
                            .byte_len = len};
        dest->srq->posted--;
        fake_push(dest->cq, &wc);
    }
    status = fails ? IBV_WC_RETRY_EXC_ERR : status;
    if (status != IBV_WC_SUCCESS) {
        qp->state = IBV_QPS_ERR;
    }
    fake_complete(qp, wr, status);
    return true;
}

static void fake_drop_pending(struct fake_qp *qp)
{
    qp->num_pending--;
    free(qp->pending_inline[0]);
    memmove(&qp->pending[0], &qp->pending[1], qp->num_pending * sizeof qp->pending[0]);
    memmove(&qp->pending_sge[0], &qp->pending_sge[1], qp->num_pending * sizeof qp->pending_sge[0]);
    memmove(&qp->pending_inline[0], &qp->pending_inline[1],
            qp->num_pending * sizeof qp->pending_inline[0]);
}

static void fake_run_pending(struct fake_qp *qp)
{
    while (qp->num_pending > 0) {
        qp->pending[0].sg_list = &qp->pending_sge[0];
        if (!fake_execute(qp, &qp->pending[0])) {
            return;
        }
        fake_drop_pending(qp);
    }
}

static void fake_queue(struct fake_qp *qp, const struct ibv_send_wr *wr)
{
    if (qp->num_pending == FAKE_PENDING) {
        fake.num_bad++;
        return;
    }
    uint32_t i = qp->num_pending++;
    qp->pending[i] = *wr;
    qp->pending_inline[i] = NULL;
    if (wr->num_sge > 0) {
        qp->pending_sge[i] = wr->sg_list[0];
        if ((wr->send_flags & IBV_SEND_INLINE) != 0) { /* inline data is copied when posted */
            qp->pending_inline[i] = malloc(wr->sg_list[0].length);
            memcpy(qp->pending_inline[i], (void *)(uintptr_t)wr->sg_list[0].addr,
                   wr->sg_list[0].length);
            qp->pending_sge[i].addr = (uintptr_t)qp->pending_inline[i];
        }
    }
}

int fake_post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
    struct fake_qp *mine = (struct fake_qp *)qp;
    int error = 0;
    pthread_mutex_lock(&fake.lock);
    for (; wr != NULL && error == 0; wr = wr->next) {
        bool is_inline = (wr->send_flags & IBV_SEND_INLINE) != 0;
        if (mine->enomem_after == 0 || mine->num_wr == mine->max_wr) {
            *bad = wr;
            error = ENOMEM;
            break;
        }
        mine->enomem_after -= mine->enomem_after >= 0;
        fake.num_posted++;
        bool is_device = false;
        if (is_inline && wr->num_sge > 0) {
            fake_memory_kind((void *)(uintptr_t)wr->sg_list[0].addr, &is_device);
        }
        fake.num_inline_from_device += is_device;
        if (wr->num_sge > 0 && !is_inline &&
            !fake_key_allows(wr->sg_list[0].lkey, wr->sg_list[0].addr, wr->sg_list[0].length,
                             IBV_ACCESS_LOCAL_WRITE)) {
            fake.num_bad++;
        }
        mine->num_wr++;
        if (mine->is_datagram) {
            fake_datagram(mine, wr);
            continue;
        }
        fake_queue(mine, wr);
        fake_run_pending(mine);
    }
    pthread_mutex_unlock(&fake.lock);
    return error;
}

int fake_poll_cq(struct ibv_cq *cq, int max, struct ibv_wc *wc)
{
    struct fake_cq *mine = (struct fake_cq *)cq;
    int num = 0;
    pthread_mutex_lock(&fake.lock);
    for (uint32_t q = 1; q < fake.num_qps; q++) {
        if (fake.qps[q] != NULL && fake.qps[q]->num_pending > 0) {
            fake_run_pending(fake.qps[q]);
        }
    }
    max = fake.slow && max > 1 ? 1 : max;
    while (num < max && mine->num > 0) {
        wc[num++] = mine->wc[mine->first];
        mine->first = (mine->first + 1) % (uint32_t)mine->cq.cqe;
        mine->num--;
    }
    pthread_mutex_unlock(&fake.lock);
    return num;
}

int fake_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask)
{
    struct fake_qp *mine = (struct fake_qp *)qp;
    pthread_mutex_lock(&fake.lock);
    bool works = fake.fail_call != 0;
    fake.fail_call -= fake.fail_call >= 0;
    if (!works) {
        pthread_mutex_unlock(&fake.lock);
        return ENOMEM;
    }
    if ((mask & IBV_QP_STATE) != 0 && attr->qp_state == IBV_QPS_RESET) {
        while (mine->num_pending > 0) {
            fake_drop_pending(mine);
        }
        mine->num_wr = mine->unsignalled = mine->num_recvs = 0;
    }
    mine->state = (mask & IBV_QP_STATE) != 0 ? attr->qp_state : mine->state;
    mine->qkey = (mask & IBV_QP_QKEY) != 0 ? attr->qkey : mine->qkey;
    mine->recv_psn = (mask & IBV_QP_RQ_PSN) != 0 ? attr->rq_psn : mine->recv_psn;
    mine->send_psn = (mask & IBV_QP_SQ_PSN) != 0 ? attr->sq_psn : mine->send_psn;
    mine->dest = (mask & IBV_QP_DEST_QPN) != 0 ? attr->dest_qp_num : mine->dest;
    fake_run_pending(mine);
    pthread_mutex_unlock(&fake.lock);
    return 0;
}

int fake_query_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask,
                  struct ibv_qp_init_attr *init_attr)
{
    (void)mask;
    (void)init_attr;
    attr->qp_state = ((struct fake_qp *)qp)->state;
    return 0;
}

int fake_destroy_qp(struct ibv_qp *qp)
{
    struct fake_qp *mine = (struct fake_qp *)qp;
    pthread_mutex_lock(&fake.lock);
    while (mine->num_pending > 0) {
        fake_drop_pending(mine);
    }
    fake.qps[qp->qp_num] = NULL;
    pthread_mutex_unlock(&fake.lock);
    fake_unmake(mine);
    return 0;
}
