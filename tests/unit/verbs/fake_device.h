/* SPDX-License-Identifier: Apache-2.0 */
/*
 * long because one device is one thing: half of it would be of no use.
 *
 * RDMA devices in memory, behind the table of calls that the verbs transport makes: writes are
 * copies, completions are entries in arrays. Everything a device here cannot be made to do is a
 * knob: error completions with the data delivered or not, posting that fails, registrations that
 * fail, events, slow completions. One mutex for all; ranks are threads.
 *
 * It is strict: a completion queue that overflows, an unknown key, an address outside its
 * registration or a write to a QP that is not ready fails the test or the QP, as a device would.
 */
#ifndef NEP_TESTS_FAKE_DEVICE_H
#define NEP_TESTS_FAKE_DEVICE_H

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "transport/verbs/api.h"

enum { FAKE_DEVICES = 4, FAKE_QPS = 4096, FAKE_MRS = 4096, FAKE_PENDING = 256, FAKE_GRH = 40 };
#define FAKE_MW                                                                                    \
    0x80000000u /* in keys of memory windows; below: the number, and 8 bits that count */

struct fake_mr {
    struct ibv_mr mr;
    unsigned access;
};

struct fake_mw {
    struct ibv_mw mw;
    uint32_t key; /* 0: not bound */
    uint32_t qp_num;
    uint64_t addr, len;
    struct fake_mr *mr;
};

struct fake_cq {
    struct ibv_cq cq;
    struct ibv_wc *wc;
    uint32_t num, first;
    bool armed;
};

struct fake_srq {
    struct ibv_srq srq;
    uint32_t posted;
    uint32_t max;
};

struct fake_qp {
    struct ibv_qp qp;
    struct fake_cq *cq;
    struct fake_srq *srq;
    enum ibv_qp_state state;
    uint32_t dest;
    uint32_t num_wr; /* posted and not completed */
    uint32_t max_wr;
    /* waiting: the receiver had no receive posted */
    struct ibv_send_wr pending[FAKE_PENDING];
    struct ibv_sge pending_sge[FAKE_PENDING];
    uint8_t *pending_inline[FAKE_PENDING];
    uint32_t num_pending;
    /* knobs */
    int64_t fail_after;  /* requests until one fails; -1: never */
    bool deliver_failed; /* the failing request did its work: its acknowledgement was lost */
    int64_t enomem_after;
    uint32_t unsignalled; /* requests since the last signalled one */
    uint32_t send_psn, recv_psn;
    /* a datagram QP: its own receives, oldest first */
    bool is_datagram;
    uint32_t qkey;
    struct fake_recv {
        uint64_t wr_id;
        struct ibv_sge sge;
    } recvs[FAKE_PENDING];
    uint32_t num_recvs;
};

struct fake_context {
    struct ibv_context context;
    int events[2];
};

struct fake_fabric {
    pthread_mutex_t lock;
    uint32_t num_devices;
    int list_errno; /* of ibv_get_device_list */
    struct ibv_device devices[FAKE_DEVICES];
    struct fake_qp *qps[FAKE_QPS]; /* by number */
    struct fake_mr *mrs[FAKE_MRS];
    struct fake_mw *mws[FAKE_MRS];
    uint32_t num_qps, num_mrs, num_mws;
    bool no_mw;
    bool is_loopback;       /* GIDs are addresses that this machine has */
    uint64_t max_reg_bytes; /* larger registrations fail with ENOMEM; 0: no limit */
    uint32_t num_overflows;
    uint32_t num_bad;
    bool no_srq_limit;
    bool slow; /* one completion per poll */
    struct fake_context *contexts[64];
    uint32_t num_contexts;
    uint64_t num_posted;
    const uint8_t *device_base;
    size_t device_bytes;
    bool no_dmabuf;
    int last_dmabuf;
    uint32_t num_dmabufs;
    uint32_t num_inline_from_device;
    uint32_t cut; /* bit d: nothing passes to or from device d */
    bool no_datagrams;
    uint32_t lost_datagrams; /* one of so many is lost; 0: none */
    uint32_t num_datagrams;
    int32_t max_srq_wr;   /* 0: many */
    uint32_t num_watches; /* SRQ limits set */
    /* calls that make or change something: the one after so many others fails; < 0: none does */
    int64_t fail_call;
    int64_t num_live; /* things made and not destroyed */
};

static struct fake_fabric fake;

/* Counts a thing that is made; false: this call is to fail, with ENOMEM. */
static bool fake_make(void)
{
    pthread_mutex_lock(&fake.lock);
    bool works = fake.fail_call != 0;
    fake.fail_call -= fake.fail_call >= 0;
    fake.num_live += works;
    pthread_mutex_unlock(&fake.lock);
    errno = works ? errno : ENOMEM;
    return works;
}

static void fake_unmake(void *thing)
{
    pthread_mutex_lock(&fake.lock);
    fake.num_live--;
    pthread_mutex_unlock(&fake.lock);
    free(thing);
}

static void fake_reset(uint32_t num_devices)
{
    memset(&fake, 0, sizeof fake);
    pthread_mutex_init(&fake.lock, NULL);
    fake.num_devices = num_devices;
    fake.fail_call = -1;
    for (uint32_t d = 0; d < num_devices; d++) {
        snprintf(fake.devices[d].name, sizeof fake.devices[d].name, "fake%u", d);
    }
    fake.num_qps = 1;
    fake.num_mrs = 1;
    fake.num_mws = 1;
}

static struct ibv_device **fake_get_device_list(int *num)
{
    if (fake.list_errno != 0) {
        errno = fake.list_errno;
        return NULL;
    }
    struct ibv_device **list = calloc(FAKE_DEVICES + 1, sizeof(struct ibv_device *));
    for (uint32_t d = 0; d < fake.num_devices; d++) {
        list[d] = &fake.devices[d];
    }
    *num = (int)fake.num_devices;
    return list;
}

static void fake_free_device_list(struct ibv_device **list)
{
    free(list);
}

static const char *fake_get_device_name(struct ibv_device *device)
{
    return device->name;
}

static struct ibv_context *fake_open_device(struct ibv_device *device)
{
    if (!fake_make()) {
        return NULL;
    }
    struct fake_context *context = calloc(1, sizeof *context);
    context->context.device = device;
    if (pipe(context->events) != 0) {
        abort();
    }
    context->context.async_fd = context->events[0];
    pthread_mutex_lock(&fake.lock);
    fake.contexts[fake.num_contexts++ % 64] = context;
    pthread_mutex_unlock(&fake.lock);
    return &context->context;
}

static int fake_close_device(struct ibv_context *context)
{
    struct fake_context *mine = (struct fake_context *)context;
    pthread_mutex_lock(&fake.lock);
    for (uint32_t i = 0; i < 64; i++) {
        fake.contexts[i] = fake.contexts[i] == mine ? NULL : fake.contexts[i];
    }
    pthread_mutex_unlock(&fake.lock);
    close(mine->events[0]);
    if (mine->events[1] >= 0) {
        close(mine->events[1]);
    }
    fake_unmake(mine);
    return 0;
}

static int fake_query_device(struct ibv_context *context, struct ibv_device_attr *attr)
{
    (void)context;
    memset(attr, 0, sizeof *attr);
    attr->phys_port_cnt = 1;
    attr->max_qp = FAKE_QPS;
    attr->max_qp_wr = 1024;
    attr->max_cqe = 32767;
    attr->device_cap_flags = fake.no_mw ? 0 : IBV_DEVICE_MEM_WINDOW_TYPE_2B;
    attr->max_srq_wr = fake.max_srq_wr != 0 ? fake.max_srq_wr : 16384;
    return 0;
}

static int fake_query_port(struct ibv_context *context, uint8_t port, struct ibv_port_attr *attr)
{
    (void)context;
    (void)port;
    memset(attr, 0, sizeof *attr);
    attr->state = IBV_PORT_ACTIVE;
    attr->active_mtu = IBV_MTU_4096;
    attr->gid_tbl_len = 4;
    attr->max_msg_sz = 1u << 23;
    attr->link_layer = IBV_LINK_LAYER_ETHERNET;
    return 0;
}

static int fake_query_gid(struct ibv_context *context, uint8_t port, uint32_t index,
                          struct ibv_gid_entry *entry)
{
    (void)port;
    static const uint8_t mapped[16] = {[10] = 0xff, [11] = 0xff, [12] = 10, [13] = 9};
    if (index > 1) {
        return ENODATA;
    }
    entry->gid_type = IBV_GID_TYPE_ROCE_V2;
    entry->gid_index = index;
    if (index == 0) {
        entry->gid.raw[0] = 0xfe;
        entry->gid.raw[1] = 0x80;
    } else {
        memcpy(entry->gid.raw, mapped, 16);
        if (fake.is_loopback) {
            entry->gid.raw[12] = 127;
            entry->gid.raw[13] = 0;
        }
    }
    entry->gid.raw[15] = (uint8_t)(context->device->name[4] - '0' + 1);
    return 0;
}

static struct ibv_pd *fake_alloc_pd(struct ibv_context *context)
{
    if (!fake_make()) {
        return NULL;
    }
    struct ibv_pd *pd = calloc(1, sizeof *pd);
    pd->context = context;
    return pd;
}

static int fake_dealloc_pd(struct ibv_pd *pd)
{
    fake_unmake(pd);
    return 0;
}

static struct ibv_mr *fake_reg_mr(struct ibv_pd *pd, void *addr, size_t length, unsigned access)
{
    if (fake.max_reg_bytes != 0 && length > fake.max_reg_bytes) {
        errno = ENOMEM;
        return NULL;
    }
    if (!fake_make()) {
        return NULL;
    }
    struct fake_mr *mr = calloc(1, sizeof *mr);
    pthread_mutex_lock(&fake.lock);
    mr->mr.pd = pd;
    mr->mr.addr = addr;
    mr->mr.length = length;
    mr->mr.lkey = mr->mr.rkey = fake.num_mrs;
    mr->access = access;
    fake.mrs[fake.num_mrs++] = mr;
    pthread_mutex_unlock(&fake.lock);
    return &mr->mr;
}

static struct ibv_mw *fake_alloc_mw(struct ibv_pd *pd, enum ibv_mw_type type)
{
    if (type != IBV_MW_TYPE_2 || fake.no_mw) {
        errno = EOPNOTSUPP;
        return NULL;
    }
    if (!fake_make()) {
        return NULL;
    }
    struct fake_mw *mw = calloc(1, sizeof *mw);
    pthread_mutex_lock(&fake.lock);
    mw->mw.pd = pd;
    mw->mw.context = pd->context;
    mw->mw.type = type;
    mw->mw.rkey = FAKE_MW | fake.num_mws << 8;
    fake.mws[fake.num_mws++] = mw;
    pthread_mutex_unlock(&fake.lock);
    return &mw->mw;
}

/* A window may go while its QP lives, but not after it: devices count that as a use of the QP. */
static int fake_dealloc_mw(struct ibv_mw *mw)
{
    struct fake_mw *mine = (struct fake_mw *)mw;
    pthread_mutex_lock(&fake.lock);
    fake.num_bad += mine->key != 0 && (fake.qps[mine->qp_num] == NULL);
    fake.mws[mw->rkey >> 8 & (FAKE_MRS - 1)] = NULL;
    pthread_mutex_unlock(&fake.lock);
    fake_unmake(mine);
    return 0;
}

/* Memory that plays a GPU's: [device_base, device_base + device_bytes). */
static int32_t fake_gpu_numa(void)
{
    return -1; /* as in a process without one */
}

static int fake_memory_kind(const void *addr, bool *is_device_p)
{
    const uint8_t *at = addr;
    *is_device_p = fake.device_base != NULL && at >= fake.device_base &&
                   at < fake.device_base + fake.device_bytes;
    return 0;
}

static int fake_dmabuf_of(const void *addr, size_t length, int *fd_p, uint64_t *offset_p)
{
    (void)length;
    *offset_p = (uintptr_t)addr % 4096; /* the driver's buffers begin at pages */
    if (fake.no_dmabuf) {
        return ENOTSUP;
    }
    *fd_p = eventfd(0, EFD_CLOEXEC);
    pthread_mutex_lock(&fake.lock);
    fake.last_dmabuf = *fd_p;
    pthread_mutex_unlock(&fake.lock);
    return 0;
}

static struct ibv_mr *fake_reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset, size_t length,
                                         uint64_t iova, int fd, int access)
{
    if (offset != iova % 4096 || fcntl(fd, F_GETFD) < 0) {
        fake.num_bad++;
    }
    __atomic_fetch_add(&fake.num_dmabufs, 1, __ATOMIC_RELAXED);
    return fake_reg_mr(pd, (void *)(uintptr_t)iova, length, (unsigned)access);
}

static int fake_dereg_mr(struct ibv_mr *mr)
{
    pthread_mutex_lock(&fake.lock);
    for (uint32_t i = 0; i < fake.num_mws; i++) { /* refused while windows are bound to it */
        fake.num_bad += fake.mws[i] != NULL && fake.mws[i]->mr == (struct fake_mr *)mr;
    }
    fake.mrs[mr->rkey] = NULL;
    pthread_mutex_unlock(&fake.lock);
    fake_unmake(mr);
    return 0;
}

static struct ibv_comp_channel *fake_create_comp_channel(struct ibv_context *context)
{
    if (!fake_make()) {
        return NULL;
    }
    struct ibv_comp_channel *channel = calloc(1, sizeof *channel);
    channel->context = context;
    channel->fd = eventfd(0, EFD_CLOEXEC);
    return channel;
}

static int fake_destroy_comp_channel(struct ibv_comp_channel *channel)
{
    close(channel->fd);
    fake_unmake(channel);
    return 0;
}

static struct ibv_cq *fake_create_cq(struct ibv_context *context, int depth, void *cq_context,
                                     struct ibv_comp_channel *channel, int vector)
{
    if (!fake_make()) {
        return NULL;
    }
    (void)vector;
    struct fake_cq *cq = calloc(1, sizeof *cq);
    cq->cq.context = context;
    cq->cq.cq_context = cq_context;
    cq->cq.channel = channel;
    cq->cq.cqe = depth;
    cq->wc = calloc((size_t)depth, sizeof *cq->wc);
    return &cq->cq;
}

static int fake_destroy_cq(struct ibv_cq *cq)
{
    free(((struct fake_cq *)cq)->wc);
    fake_unmake(cq);
    return 0;
}

static void fake_push(struct fake_cq *cq, const struct ibv_wc *wc)
{
    uint32_t depth = (uint32_t)cq->cq.cqe;
    if (cq->num == depth) {
        fake.num_overflows++;
        return;
    }
    cq->wc[(cq->first + cq->num++) % depth] = *wc;
    if (cq->armed) {
        uint64_t one = 1;
        cq->armed = false;
        if (write(cq->cq.channel->fd, &one, sizeof one) < 0) {
            fake.num_bad++;
        }
    }
}

static int fake_req_notify_cq(struct ibv_cq *cq, int solicited_only)
{
    (void)solicited_only;
    pthread_mutex_lock(&fake.lock);
    ((struct fake_cq *)cq)->armed = true;
    pthread_mutex_unlock(&fake.lock);
    return 0;
}

static int fake_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **context)
{
    uint64_t count;
    (void)cq;
    (void)context;
    return read(channel->fd, &count, sizeof count) == sizeof count ? 0 : -1;
}

static void fake_ack_cq_events(struct ibv_cq *cq, unsigned num)
{
    (void)cq;
    (void)num;
}

static int fake_get_async_event(struct ibv_context *context, struct ibv_async_event *event)
{
    return read(context->async_fd, event, sizeof *event) == sizeof *event ? 0 : -1;
}

static void fake_ack_async_event(struct ibv_async_event *event)
{
    (void)event;
}

static struct ibv_srq *fake_create_srq(struct ibv_pd *pd, struct ibv_srq_init_attr *attr)
{
    if (!fake_make()) {
        return NULL;
    }
    struct fake_srq *srq = calloc(1, sizeof *srq);
    srq->srq.pd = pd;
    srq->srq.context = pd->context;
    srq->max = attr->attr.max_wr;
    return &srq->srq;
}

static int fake_modify_srq(struct ibv_srq *srq, struct ibv_srq_attr *attr, int mask)
{
    (void)srq;
    (void)attr;
    (void)mask;
    __atomic_fetch_add(&fake.num_watches, 1, __ATOMIC_RELAXED);
    return fake.no_srq_limit ? ENOSYS : 0;
}

static int fake_destroy_srq(struct ibv_srq *srq)
{
    fake_unmake(srq);
    return 0;
}

static int fake_post_srq_recv(struct ibv_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
    struct fake_srq *mine = (struct fake_srq *)srq;
    int error = 0;
    pthread_mutex_lock(&fake.lock);
    if (fake.fail_call == 0) {
        *bad = wr;
        error = ENOMEM;
    }
    fake.fail_call -= fake.fail_call >= 0;
    for (; wr != NULL && error == 0; wr = wr->next) {
        if (mine->posted == mine->max) {
            *bad = wr;
            error = ENOMEM;
        } else {
            mine->posted++;
        }
    }
    pthread_mutex_unlock(&fake.lock);
    return error;
}

static struct ibv_qp *fake_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *attr)
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

static int fake_post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
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

static struct ibv_ah *fake_create_ah(struct ibv_pd *pd, struct ibv_ah_attr *attr)
{
    (void)attr;
    if (!fake_make()) {
        return NULL;
    }
    struct ibv_ah *ah = calloc(1, sizeof *ah);
    ah->pd = pd;
    return ah;
}

static int fake_destroy_ah(struct ibv_ah *ah)
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

static int fake_post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
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

static int fake_poll_cq(struct ibv_cq *cq, int max, struct ibv_wc *wc)
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

static int fake_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask)
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

static int fake_query_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask,
                         struct ibv_qp_init_attr *init_attr)
{
    (void)mask;
    (void)init_attr;
    attr->qp_state = ((struct fake_qp *)qp)->state;
    return 0;
}

static int fake_destroy_qp(struct ibv_qp *qp)
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

static const char *fake_wc_status_str(enum ibv_wc_status status)
{
    return status == IBV_WC_RETRY_EXC_ERR    ? "transport retry counter exceeded"
           : status == IBV_WC_REM_ACCESS_ERR ? "remote access error"
                                             : "error";
}

static const char *fake_event_type_str(enum ibv_event_type type)
{
    (void)type;
    return "event";
}

static const struct nep_verbs_api fake_api = {
    .get_device_list = fake_get_device_list,
    .free_device_list = fake_free_device_list,
    .get_device_name = fake_get_device_name,
    .open_device = fake_open_device,
    .close_device = fake_close_device,
    .query_device = fake_query_device,
    .query_port = fake_query_port,
    .query_gid = fake_query_gid,
    .alloc_pd = fake_alloc_pd,
    .dealloc_pd = fake_dealloc_pd,
    .reg_mr = fake_reg_mr,
    .reg_dmabuf_mr = fake_reg_dmabuf_mr,
    .memory_kind = fake_memory_kind,
    .gpu_numa = fake_gpu_numa,
    .dmabuf_of = fake_dmabuf_of,
    .dereg_mr = fake_dereg_mr,
    .alloc_mw = fake_alloc_mw,
    .dealloc_mw = fake_dealloc_mw,
    .create_comp_channel = fake_create_comp_channel,
    .destroy_comp_channel = fake_destroy_comp_channel,
    .create_cq = fake_create_cq,
    .destroy_cq = fake_destroy_cq,
    .poll_cq = fake_poll_cq,
    .req_notify_cq = fake_req_notify_cq,
    .get_cq_event = fake_get_cq_event,
    .ack_cq_events = fake_ack_cq_events,
    .get_async_event = fake_get_async_event,
    .ack_async_event = fake_ack_async_event,
    .create_srq = fake_create_srq,
    .modify_srq = fake_modify_srq,
    .destroy_srq = fake_destroy_srq,
    .post_srq_recv = fake_post_srq_recv,
    .create_qp = fake_create_qp,
    .modify_qp = fake_modify_qp,
    .query_qp = fake_query_qp,
    .destroy_qp = fake_destroy_qp,
    .create_ah = fake_create_ah,
    .destroy_ah = fake_destroy_ah,
    .post_recv = fake_post_recv,
    .post_send = fake_post_send,
    .wc_status_str = fake_wc_status_str,
    .event_type_str = fake_event_type_str,
};

#endif
