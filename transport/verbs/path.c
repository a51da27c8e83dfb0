/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One path: a device port with its queues. Every limit is met here, with numbers, and not later:
 *
 * - SRQ: one receive for each QP of each put that may be under way to this rank, and two control
 *   messages for each QP of every peer, so that no burst finds it empty. Receives have no buffer.
 *   Groups of a thousand ranks ask for more than devices have; they get what there is, since a
 *   burst beyond it only waits, as long as senders try for ever (NEP_VERBS_RNR_RETRY 7).
 * - CQ: one entry for each receive of the SRQ and for each work request of all send queues, since
 *   an error completes every one of them at once and an overrun CQ is fatal and silent; and those
 * of the datagram QP.
 *
 * One SRQ per path, rejected: receive queues per QP. They need the worst burst for each peer.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/log.h"
#include "transport/verbs/verbs.h"

enum { LEAST_DEPTH = 8 };

static enum nep_status open_device(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    struct ibv_device **list;
    int num_devices;
    enum nep_status status = nep_verbs_api_devices(&verbs->api, &list, &num_devices);
    if (status != NEP_OK) {
        return status;
    }
    errno = ENODEV;
    for (int i = 0; i < num_devices && path->context == NULL; i++) {
        if (strcmp(verbs->api.get_device_name(list[i]), path->device) == 0) {
            path->context = verbs->api.open_device(list[i]);
        }
    }
    int error = errno;
    verbs->api.free_device_list(list);
    if (path->context == NULL) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "verbs: device %s cannot be opened: %s; ibv_devices lists them, and "
                        "/dev/infiniband/uverbs* must be readable and writable",
                        path->device, strerror(error));
    }
    return NEP_OK;
}

/* Facts of the device and the port; refuses a port that cannot carry traffic. */
static enum nep_status query(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    int error = verbs->api.query_device(path->context, &path->device_attr);
    if (error == 0) {
        error = verbs->api.query_port(path->context, path->port, &path->port_attr);
    }
    if (error != 0) {
        return nep_fail(NEP_ERR_IO, "verbs: %s port %u cannot be queried: %s", path->device,
                        path->port, strerror(error));
    }
    if (path->port_attr.state != IBV_PORT_ACTIVE) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "verbs: %s port %u is not active (state %d): bring its link up",
                        path->device, path->port, path->port_attr.state);
    }
    if (path->port_attr.max_msg_sz != 0 && path->port_attr.max_msg_sz < verbs->max_message_bytes) {
        verbs->max_message_bytes = path->port_attr.max_msg_sz;
    }
    nep_verbs_gids_read(&verbs->api, path->context, path->port,
                        (uint32_t)path->port_attr.gid_tbl_len, verbs->params.config->verbs_gid,
                        &path->gids);
    return NEP_OK;
}

/* A real registration, before anything depends on it: limits and rights show here. */
static enum nep_status prove_registration(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    const size_t bytes = 4096;
    void *page = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) {
        return nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for a page");
    }
    struct ibv_mr *mr =
        verbs->api.reg_mr(path->pd, page, bytes, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    int error = errno;
    enum nep_status status = NEP_OK;
    if (mr == NULL) {
        status = nep_verbs_register_failed(path->device, "a page of host memory", bytes, error);
    } else {
        verbs->api.dereg_mr(mr);
    }
    munmap(page, bytes);
    return status;
}

/* Depths from the configuration and the device's limits; lowers verbs->depth where it must. */
static enum nep_status size_queues(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    uint64_t qps_here = verbs->num_qps / verbs->num_paths;
    uint64_t num_qps = qps_here * verbs->num_ranks;
    uint64_t least = 2 * num_qps + 32;
    uint64_t srq = verbs->params.max_puts * qps_here + least;
    uint64_t max_cqe = (uint64_t)path->device_attr.max_cqe - 2 * NEP_VERBS_KNOCKS;
    uint64_t max_wr = (uint64_t)path->device_attr.max_qp_wr;
    uint64_t room = max_cqe > LEAST_DEPTH * num_qps ? max_cqe - LEAST_DEPTH * num_qps : 0;
    uint64_t most = (uint64_t)path->device_attr.max_srq_wr;
    most = room < most ? room : most;
    if (num_qps > (uint64_t)path->device_attr.max_qp) {
        return nep_fail(NEP_ERR_UNSUPPORTED, "verbs: %s has %d QPs, %llu are needed", path->device,
                        path->device_attr.max_qp, (unsigned long long)num_qps);
    }
    bool may_wait = verbs->params.config->verbs_rnr_retry == 7;
    if (most < least || (srq > most && !may_wait) || max_wr < LEAST_DEPTH) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "verbs: %u ranks need %llu receives, %llu at the very least, and send "
                        "queues of %d; %s has %llu, with room for their completions, and %llu: "
                        "lower NEP_VERBS_QPS, or set NEP_VERBS_RNR_RETRY=7 so that senders wait",
                        verbs->num_ranks, (unsigned long long)srq, (unsigned long long)least,
                        LEAST_DEPTH, path->device, (unsigned long long)most,
                        (unsigned long long)max_wr);
    }
    if (srq > most) {
        nep_info("verbs: %s has %llu receives, not %llu: larger bursts wait for their senders' "
                 "next try",
                 path->device, (unsigned long long)most, (unsigned long long)srq);
        srq = most;
    }
    uint64_t depth = (max_cqe - srq) / num_qps;
    depth = depth < max_wr ? depth : max_wr;
    if (depth < verbs->depth) {
        nep_info("verbs: %s allows send queues of %llu, not %u", path->device,
                 (unsigned long long)depth, verbs->depth);
        verbs->depth = (uint32_t)depth;
    }
    path->srq_depth = (uint32_t)srq;
    path->cq_depth = (uint32_t)(srq + num_qps * verbs->depth) + 2 * NEP_VERBS_KNOCKS;
    return NEP_OK;
}

static enum nep_status set_nonblocking(const struct nep_verbs_path *path, const char *what, int fd)
{
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) {
        return nep_fail(NEP_ERR_IO, "verbs: %s: the %s cannot be made non-blocking: %s",
                        path->device, what, strerror(errno));
    }
    return NEP_OK;
}

static enum nep_status make_queues(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    path->channel = verbs->api.create_comp_channel(path->context);
    if (path->channel == NULL) {
        return nep_fail(NEP_ERR_IO, "verbs: %s: no completion channel: %s", path->device,
                        strerror(errno));
    }
    enum nep_status status = set_nonblocking(path, "completion channel", path->channel->fd);
    if (status == NEP_OK) {
        status = set_nonblocking(path, "event file", path->context->async_fd);
    }
    if (status != NEP_OK) {
        return status;
    }
    path->cq = verbs->api.create_cq(path->context, (int)path->cq_depth, path, path->channel, 0);
    if (path->cq == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "verbs: %s: no completion queue of %u entries: %s",
                        path->device, path->cq_depth, strerror(errno));
    }
    if ((uint32_t)path->cq->cqe < path->cq_depth) {
        return nep_fail(NEP_ERR_INTERNAL, "verbs: %s made a completion queue of %d, not %u",
                        path->device, path->cq->cqe, path->cq_depth);
    }
    struct ibv_srq_init_attr attr = {.attr = {.max_wr = path->srq_depth, .max_sge = 1}};
    path->srq = verbs->api.create_srq(path->pd, &attr);
    if (path->srq == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "verbs: %s: no shared receive queue of %u: %s",
                        path->device, path->srq_depth, strerror(errno));
    }
    status = nep_verbs_srq_fill(verbs, path);
    if (status != NEP_OK) {
        return status;
    }
    nep_verbs_srq_watch(verbs, path);
    return NEP_OK;
}

/* Memory windows that are bound to a QP: what the device says, and one to prove it. */
static void find_bound_windows(const struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    struct ibv_mw *mw = NULL;
    if ((path->device_attr.device_cap_flags & IBV_DEVICE_MEM_WINDOW_TYPE_2B) != 0) {
        mw = verbs->api.alloc_mw(path->pd, IBV_MW_TYPE_2);
    }
    path->has_bound_windows = mw != NULL;
    if (mw != NULL) {
        verbs->api.dealloc_mw(mw);
    }
}

enum nep_status nep_verbs_path_open(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    enum nep_status status = open_device(verbs, path);
    if (status == NEP_OK) {
        status = query(verbs, path);
    }
    if (status == NEP_OK) {
        path->pd = verbs->api.alloc_pd(path->context);
        status = path->pd != NULL
                     ? NEP_OK
                     : nep_fail(NEP_ERR_NO_MEMORY, "verbs: %s: no protection domain: %s",
                                path->device, strerror(errno));
    }
    if (status == NEP_OK) {
        status = prove_registration(verbs, path);
    }
    if (status == NEP_OK) {
        status = size_queues(verbs, path);
    }
    if (status == NEP_OK) {
        status = make_queues(verbs, path);
    }
    if (status == NEP_OK) {
        find_bound_windows(verbs, path);
        nep_verbs_knocks_open(verbs, path);
        nep_verbs_door_open(verbs, path);
    }
    return status; /* the caller closes what was made */
}

void nep_verbs_path_close(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    const struct nep_verbs_api *api = &verbs->api;
    nep_verbs_door_close(path);
    nep_verbs_knocks_close(verbs, path);
    free(path->table.keys);
    if (path->srq != NULL) {
        api->destroy_srq(path->srq);
    }
    if (path->cq != NULL) {
        if (path->num_unacked > 0) {
            api->ack_cq_events(path->cq, path->num_unacked); /* destroying waits for these */
        }
        api->destroy_cq(path->cq);
    }
    if (path->channel != NULL) {
        api->destroy_comp_channel(path->channel);
    }
    if (path->pd != NULL) {
        api->dealloc_pd(path->pd);
    }
    if (path->context != NULL) {
        api->close_device(path->context);
    }
    memset(path, 0, sizeof *path);
}
