/* SPDX-License-Identifier: Apache-2.0 */
/* The device but for its queue pairs: fake_device.h. */
#include "tests/unit/verbs/fake_device.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct fake_fabric fake;

/* Counts a thing that is made; false: this call is to fail, with ENOMEM. */
bool fake_make(void)
{
    pthread_mutex_lock(&fake.lock);
    bool works = fake.fail_call != 0;
    fake.fail_call -= fake.fail_call >= 0;
    fake.num_live += works;
    pthread_mutex_unlock(&fake.lock);
    errno = works ? errno : ENOMEM;
    return works;
}

void fake_unmake(void *thing)
{
    pthread_mutex_lock(&fake.lock);
    fake.num_live--;
    pthread_mutex_unlock(&fake.lock);
    free(thing);
}

void fake_reset(uint32_t num_devices)
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

int fake_memory_kind(const void *addr, bool *is_device_p)
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

void fake_push(struct fake_cq *cq, const struct ibv_wc *wc)
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

int fake_post_srq_recv(struct ibv_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
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

const struct nep_verbs_api fake_api = {
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
