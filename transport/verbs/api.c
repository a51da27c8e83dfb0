/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libibverbs by dlopen. Linking it would make every user of nearep install it, GPU-only and
 * laptop users included. The data-path calls (post, poll, notify) are inline functions of the
 * header over the device's own table, so they need no symbol; the header's inline ibv_query_port
 * and ibv_reg_mr do, and are replaced here by the symbols behind them.
 */
#include "transport/verbs/api.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#undef ibv_query_port
#undef ibv_reg_mr

static int poll_cq(struct ibv_cq *cq, int max, struct ibv_wc *wc)
{
    return cq->context->ops.poll_cq(cq, max, wc);
}

static int req_notify_cq(struct ibv_cq *cq, int solicited_only)
{
    return cq->context->ops.req_notify_cq(cq, solicited_only);
}

static int post_srq_recv(struct ibv_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
    return srq->context->ops.post_srq_recv(srq, wr, bad);
}

static int post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
    return qp->context->ops.post_send(qp, wr, bad);
}

static struct ibv_mw *alloc_mw(struct ibv_pd *pd, enum ibv_mw_type type)
{
    return ibv_alloc_mw(pd, type);
}

static int dealloc_mw(struct ibv_mw *mw)
{
    return ibv_dealloc_mw(mw);
}

static int post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
    return qp->context->ops.post_recv(qp, wr, bad);
}

/* What the header's inline functions call; looked up again on each call, which is at set-up only:
 * the alternative is a global. */
static void *symbol(const char *name)
{
    void *library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (library == NULL) {
        return NULL;
    }
    void *found = dlsym(library, name);
    dlclose(library);
    return found;
}

static struct ibv_mr *reg_mr(struct ibv_pd *pd, void *addr, size_t length, unsigned access)
{
    struct ibv_mr *(*with_iova)(struct ibv_pd *, void *, size_t, uint64_t, unsigned);
    *(void **)&with_iova = symbol("ibv_reg_mr_iova2");
    if (with_iova != NULL && (access & IBV_ACCESS_OPTIONAL_RANGE) != 0) {
        return with_iova(pd, addr, length, (uintptr_t)addr, access);
    }
    struct ibv_mr *(*plain)(struct ibv_pd *, void *, size_t, int);
    *(void **)&plain = symbol("ibv_reg_mr");
    if (plain == NULL) {
        errno = ENOSYS;
        return NULL;
    }
    return plain(pd, addr, length, (int)(access & ~IBV_ACCESS_OPTIONAL_RANGE));
}

static int query_port(struct ibv_context *context, uint8_t port, struct ibv_port_attr *attr)
{
    int (*query)(struct ibv_context *, uint8_t, struct ibv_port_attr *);
    *(void **)&query = symbol("ibv_query_port");
    memset(attr, 0, sizeof *attr);
    return query == NULL ? ENOSYS : query(context, port, attr);
}

static int query_gid(struct ibv_context *context, uint8_t port, uint32_t index,
                     struct ibv_gid_entry *entry)
{
    int (*query)(struct ibv_context *, uint32_t, uint32_t, struct ibv_gid_entry *, uint32_t,
                 size_t);
    *(void **)&query = symbol("_ibv_query_gid_ex");
    return query == NULL ? ENOSYS : query(context, port, index, entry, 0, sizeof *entry);
}

struct entry {
    const char *name;
    size_t offset;
    bool is_optional;
};

#define ENTRY(member)                                                                              \
    {                                                                                              \
        "ibv_" #member, offsetof(struct nep_verbs_api, member), false                              \
    }

static const struct entry entries[] = {
    ENTRY(get_device_list),
    ENTRY(free_device_list),
    ENTRY(get_device_name),
    ENTRY(open_device),
    ENTRY(close_device),
    ENTRY(query_device),
    ENTRY(alloc_pd),
    ENTRY(dealloc_pd),
    {"ibv_reg_dmabuf_mr", offsetof(struct nep_verbs_api, reg_dmabuf_mr), true},
    ENTRY(dereg_mr),
    ENTRY(create_comp_channel),
    ENTRY(destroy_comp_channel),
    ENTRY(create_cq),
    ENTRY(destroy_cq),
    ENTRY(get_cq_event),
    ENTRY(ack_cq_events),
    ENTRY(get_async_event),
    ENTRY(ack_async_event),
    ENTRY(create_srq),
    ENTRY(modify_srq),
    ENTRY(destroy_srq),
    ENTRY(create_qp),
    ENTRY(modify_qp),
    ENTRY(query_qp),
    ENTRY(destroy_qp),
    ENTRY(create_ah),
    ENTRY(destroy_ah),
    ENTRY(wc_status_str),
    ENTRY(event_type_str),
};

enum nep_status nep_verbs_api_load(struct nep_verbs_api *api)
{
    struct nep_verbs_api loaded = {
        .query_port = query_port,
        .query_gid = query_gid,
        .reg_mr = reg_mr,
        .poll_cq = poll_cq,
        .req_notify_cq = req_notify_cq,
        .post_srq_recv = post_srq_recv,
        .post_send = post_send,
        .alloc_mw = alloc_mw,
        .dealloc_mw = dealloc_mw,
        .post_recv = post_recv,
        .memory_kind = nep_verbs_cuda_memory_kind,
        .gpu_numa = nep_verbs_cuda_numa,
        .dmabuf_of = nep_verbs_cuda_dmabuf_of,
    };
    /* NODELETE: providers it loads leave handlers behind that must stay callable. */
    loaded.library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (loaded.library == NULL) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "verbs: %s; install libibverbs1 and ibverbs-providers (rdma-core)",
                        dlerror());
    }
    for (size_t i = 0; i < sizeof entries / sizeof entries[0]; i++) {
        void *found = dlsym(loaded.library, entries[i].name);
        if (found == NULL && !entries[i].is_optional) {
            dlclose(loaded.library);
            return nep_fail(NEP_ERR_UNSUPPORTED,
                            "verbs: libibverbs.so.1 has no %s: install rdma-core 22 or newer",
                            entries[i].name);
        }
        memcpy((char *)&loaded + entries[i].offset, &found, sizeof found);
    }
    *api = loaded;
    return NEP_OK;
}

void nep_verbs_api_unload(struct nep_verbs_api *api)
{
    if (api->library != NULL) {
        dlclose(api->library);
        api->library = NULL;
    }
}

/* Whether the kernel has RDMA devices, whatever the library sees. */
static bool kernel_has_devices(void)
{
    bool found = false;
    DIR *dir = opendir("/sys/class/infiniband");
    for (struct dirent *entry; dir != NULL && (entry = readdir(dir)) != NULL;) {
        found = found || entry->d_name[0] != '.';
    }
    if (dir != NULL) {
        closedir(dir);
    }
    return found;
}

enum nep_status nep_verbs_api_devices(const struct nep_verbs_api *api, struct ibv_device ***list_p,
                                      int *num_devices_p)
{
    int num_devices = 0;
    errno = 0;
    struct ibv_device **list = api->get_device_list(&num_devices);
    if (list == NULL) {
        int error = errno;
        return nep_fail(NEP_ERR_UNSUPPORTED, "verbs: no RDMA devices: ibv_get_device_list: %s%s",
                        strerror(error),
                        error == ENOSYS ? "; this kernel has no verbs loaded (modprobe ib_uverbs)"
                                        : "");
    }
    if (num_devices == 0) {
        api->free_device_list(list);
        if (api->library != NULL && kernel_has_devices()) {
            return nep_fail(NEP_ERR_UNSUPPORTED,
                            "verbs: /sys/class/infiniband has devices but libibverbs sees none: "
                            "install ibverbs-providers, and give the container /dev/infiniband");
        }
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "verbs: no RDMA devices on this machine; ucx or shm are used instead, or "
                        "Soft-RoCE: rdma link add rxe0 type rxe netdev eth0");
    }
    *list_p = list;
    *num_devices_p = num_devices;
    return NEP_OK;
}
