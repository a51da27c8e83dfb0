/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Windows: memory registered with every path, in pieces of at most NEP_VERBS_CHUNK bytes, because
 * systems with an IOMMU refuse 2 GiB and more at once. Who may write where, and with which keys,
 * is in gate.c; keys of all pieces are exchanged, so a put is arithmetic. A put that crosses pieces
 * becomes several writes on one QP, of which the last announces.
 *
 * The limit on locked memory is the commonest failure of a first run; it is said in words, with
 * both numbers. Data may be written with relaxed PCIe ordering: arrival is a completion, which is
 * never reordered before its data, and no word in a window is polled for the device's writes.
 *
 * Destroying a window is not collective: others may still have puts under way to it, credits of the
 * last operation for instance. A write to memory that is not registered any more would end their
 * QP, and with it every other window's traffic. So a destroyed window stays registered, which pins
 * its pages even when they are unmapped, and its announcements are dropped, until all ranks make a
 * window of this number again, or until close. For the same reason destroying waits, bounded, for
 * the own puts from it.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/bootstrap.h"
#include "transport/verbs/verbs.h"

enum nep_status nep_verbs_register_failed(const char *device, const char *what, size_t bytes,
                                          int error)
{
    struct rlimit limit = {0};
    getrlimit(RLIMIT_MEMLOCK, &limit);
    if ((error == ENOMEM || error == EAGAIN) && limit.rlim_cur != RLIM_INFINITY) {
        return nep_fail(NEP_ERR_NO_MEMORY,
                        "verbs: %s cannot register %s (%zu bytes): %s; this process may lock %llu "
                        "bytes: raise it (ulimit -l unlimited; LimitMEMLOCK=infinity; docker "
                        "--ulimit memlock=-1)",
                        device, what, bytes, strerror(error), (unsigned long long)limit.rlim_cur);
    }
    const char *hint = error == ENOMEM   ? "memory is short, or the piece too large for the IOMMU: "
                                           "lower NEP_VERBS_CHUNK"
                       : error == EFAULT ? "the pages are not there or not writable"
                       : error == EPERM  ? "the container needs the right to lock memory "
                                           "(IPC_LOCK) and /dev/infiniband"
                       : error == EINVAL ? "the device does not take this kind of memory or access"
                                         : "see dmesg";
    return nep_fail(error == ENOMEM ? NEP_ERR_NO_MEMORY : NEP_ERR_IO,
                    "verbs: %s cannot register %s (%zu bytes): %s; %s", device, what, bytes,
                    strerror(error), hint);
}

/*
 * GPU memory: by dma-buf, which needs no module beyond the driver; else as if it were the host's,
 * which works where the driver's peer-memory module is loaded. The address is the device's own, so
 * a put's arithmetic is the same for all memory.
 */
static struct ibv_mr *register_device(struct nep_verbs *verbs, struct nep_verbs_path *path,
                                      uint8_t *base, size_t bytes, unsigned access)
{
    const struct nep_verbs_api *api = &verbs->api;
    int fd = -1;
    uint64_t offset = 0;
    int error = api->reg_dmabuf_mr == NULL ? ENOSYS : api->dmabuf_of(base, bytes, &fd, &offset);
    struct ibv_mr *mr = NULL;
    if (error == 0) {
        mr = api->reg_dmabuf_mr(path->pd, offset, bytes, (uintptr_t)base, fd, (int)access);
        error = errno;
        close(fd); /* the registration keeps the memory */
    }
    if (mr == NULL) {
        nep_info("verbs: %s: no dma-buf of %zu bytes of GPU memory (%s): trying peer memory",
                 path->device, bytes, strerror(error));
        mr = api->reg_mr(path->pd, base, bytes, access);
    }
    return mr;
}

static size_t chunks_of(const struct nep_verbs *verbs, size_t bytes)
{
    size_t chunk = verbs->params.config->verbs_chunk_bytes;
    return bytes / chunk + (bytes % chunk != 0);
}

unsigned nep_verbs_access(const struct nep_verbs *verbs)
{
    bool is_relaxed = verbs->params.config->verbs_relaxed_ordering;
    return (unsigned)IBV_ACCESS_LOCAL_WRITE |
           (is_relaxed ? (unsigned)IBV_ACCESS_RELAXED_ORDERING : 0);
}

static enum nep_status register_all(struct nep_verbs *verbs, struct nep_verbs_window *window)
{
    unsigned access = nep_verbs_access(verbs);
    if (!window->is_guarded) {
        access |= IBV_ACCESS_REMOTE_WRITE;
    } else if (window->is_device) {
        access |= IBV_ACCESS_MW_BIND;
    }
    size_t chunk = verbs->params.config->verbs_chunk_bytes;
    for (uint32_t p = 0; p < verbs->num_paths; p++) {
        for (size_t c = 0; c * chunk < window->bytes; c++) {
            size_t left = window->bytes - c * chunk;
            size_t bytes = left < chunk ? left : chunk;
            uint8_t *base = window->base + c * chunk;
            struct ibv_mr *mr = window->is_device
                                    ? register_device(verbs, &verbs->paths[p], base, bytes, access)
                                    : verbs->api.reg_mr(verbs->paths[p].pd, base, bytes, access);
            if (mr == NULL) {
                return nep_verbs_register_failed(verbs->paths[p].device,
                                                 window->is_device
                                                     ? "GPU memory (neither as dma-buf nor by "
                                                       "nvidia_peermem)"
                                                     : "a window",
                                                 bytes, errno);
            }
            window->mrs[p * window->num_chunks + c] = mr;
        }
    }
    return NEP_OK;
}

static void deregister(struct nep_verbs *verbs, struct nep_verbs_window *window)
{
    nep_verbs_gates_free(verbs, window);
    for (size_t i = 0; window->mrs != NULL && i < verbs->num_paths * window->num_chunks; i++) {
        if (window->mrs[i] != NULL) {
            verbs->api.dereg_mr(window->mrs[i]);
        }
    }
    free(window->mrs);
    free(window->remotes);
    free(window->rkeys);
    if (window->is_own_memory && window->start != NULL) {
        munmap(window->start, window->bytes);
    }
    memset(window, 0, sizeof *window);
}

void nep_verbs_window_release(struct nep_verbs *verbs, uint32_t window_idx)
{
    pthread_mutex_lock(&verbs->poll_lock);
    struct nep_verbs_window window = verbs->windows[window_idx];
    memset(&verbs->windows[window_idx], 0, sizeof window);
    pthread_mutex_unlock(&verbs->poll_lock);
    deregister(verbs, &window);
}

/* Learns everybody's size: the widest window sets how many keys a gate has. */
static enum nep_status gather_sizes(struct nep_verbs *verbs, struct nep_verbs_window *window)
{
    uint64_t mine[2] = {(uint64_t)(uintptr_t)window->base, window->bytes};
    uint64_t(*all)[2] = calloc(verbs->num_ranks, sizeof *all);
    window->remotes = calloc(verbs->num_ranks, sizeof *window->remotes);
    if (all == NULL || window->remotes == NULL) {
        free(all);
        return nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for %u windows", verbs->num_ranks);
    }
    enum nep_status status =
        nep_bootstrap_allgather(verbs->params.bootstrap, mine, all, sizeof mine,
                                verbs->params.timeout_ns, "verbs window sizes");
    for (uint32_t r = 0; status == NEP_OK && r < verbs->num_ranks; r++) {
        size_t chunks = chunks_of(verbs, all[r][1]);
        window->remotes[r].base = all[r][0];
        window->remotes[r].bytes = all[r][1];
        window->num_chunks = chunks > window->num_chunks ? chunks : window->num_chunks;
    }
    free(all);
    return status;
}

/* Registers and exchanges keys. A rank that cannot register says so to all. */
static enum nep_status exchange_keys(struct nep_verbs *verbs, struct nep_verbs_window *window,
                                     const struct nep_grants *grants)
{
    const struct nep_transport_params *params = &verbs->params;
    window->mrs = calloc(verbs->num_paths * window->num_chunks, sizeof(struct ibv_mr *));
    uint32_t *nums = calloc(verbs->num_ranks, sizeof *nums), most = 0;
    uint64_t begin_ns = nep_now_ns();
    enum nep_status status = window->mrs == NULL || nums == NULL
                                 ? nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for registrations")
                                 : register_all(verbs, window);
    if (status == NEP_OK) {
        nep_info("verbs: rank %u: a window of %.1f MB registered on %u paths in %.1f ms",
                 verbs->rank, (double)window->bytes / 1e6, verbs->num_paths,
                 (double)(nep_now_ns() - begin_ns) / 1e6);
        status = nep_verbs_gates_make(verbs, window, grants);
    }
    status = nep_bootstrap_common(params->bootstrap, verbs->rank, verbs->num_ranks, status,
                                  params->timeout_ns);
    if (status == NEP_OK) {
        status = nep_bootstrap_allgather(params->bootstrap, &window->num_gates, nums, sizeof *nums,
                                         params->timeout_ns, "verbs numbers of gates");
    }
    for (uint32_t r = 0; status == NEP_OK && r < verbs->num_ranks; r++) {
        most = nums[r] > most ? nums[r] : most;
    }
    free(nums);
    return status == NEP_OK && most > 0 ? nep_verbs_gates_exchange(verbs, window, most) : status;
}

static bool poll_locked(struct nep_verbs *verbs)
{
    pthread_mutex_lock(&verbs->poll_lock);
    bool any = nep_verbs_poll(verbs);
    pthread_mutex_unlock(&verbs->poll_lock);
    return any;
}

/* Puts from this window that are not complete; `forget` see nep_verbs_peer_forget. */
static uint64_t puts_left(struct nep_verbs *verbs, uint32_t window_idx, bool forget)
{
    uint64_t num = 0;
    for (uint32_t r = 0; r < verbs->num_ranks; r++) {
        struct nep_verbs_peer *peer = &verbs->peers[r];
        pthread_mutex_lock(&peer->lock);
        num += nep_verbs_peer_forget(peer, window_idx, forget);
        pthread_mutex_unlock(&peer->lock);
    }
    return num;
}

enum nep_status nep_verbs_window_grant(struct nep_transport *transport, uint32_t window_idx,
                                       const struct nep_grant *grants, uint32_t num_grants)
{
    struct nep_verbs *verbs = (struct nep_verbs *)transport;
    if (window_idx >= NEP_VERBS_MAX_WINDOWS) {
        return nep_fail(NEP_ERR_INVALID, "verbs: window %u is out of 0 to 63", window_idx);
    }
    return nep_grants_set(&verbs->grants[window_idx], verbs->num_ranks, grants, num_grants);
}

enum nep_status nep_verbs_window_create(struct nep_transport *transport, uint32_t window_idx,
                                        void **base_p, size_t bytes)
{
    struct nep_verbs *verbs = (struct nep_verbs *)transport;
    if (window_idx >= NEP_VERBS_MAX_WINDOWS || verbs->windows[window_idx].base != NULL ||
        bytes == 0) {
        return nep_fail(NEP_ERR_INVALID,
                        "verbs: window %u of %zu bytes: in use, out of 0 to 63, "
                        "or empty",
                        window_idx, bytes);
    }
    struct nep_verbs_window made = {.base = *base_p, .start = *base_p, .bytes = bytes};
    if (made.base == NULL) {
        void *memory =
            mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        made.base = made.start = memory == MAP_FAILED ? NULL : memory;
        made.is_own_memory = true;
    }
    struct nep_grants *grants = &verbs->grants[window_idx];
    enum nep_status status = made.base != NULL
                                 ? nep_grants_check(grants, bytes)
                                 : nep_fail(NEP_ERR_NO_MEMORY, "verbs: a window of %zu bytes: %s",
                                            bytes, strerror(errno));
    if (status == NEP_OK) {
        verbs->api.memory_kind(made.base, &made.is_device);
        made.is_guarded = nep_verbs_can_guard(verbs, &made, grants);
    }
    status = nep_bootstrap_common(verbs->params.bootstrap, verbs->rank, verbs->num_ranks, status,
                                  verbs->params.timeout_ns);
    if (status == NEP_OK) {
        /* All ranks are here, so all of them have destroyed the last window of this number, and
         * what they had sent to it is complete: it is taken now, and dropped. */
        for (uint32_t i = 0; i < verbs->paths[0].cq_depth && poll_locked(verbs); i++) {
        }
        nep_verbs_window_release(verbs, window_idx);
        status = gather_sizes(verbs, &made);
    }
    if (status == NEP_OK) {
        /* In place before the keys leave: a peer that has them may write and announce at once. */
        pthread_mutex_lock(&verbs->poll_lock);
        verbs->windows[window_idx].base = made.base;
        pthread_mutex_unlock(&verbs->poll_lock);
        status = exchange_keys(verbs, &made, grants);
    }
    pthread_mutex_lock(&verbs->poll_lock);
    if (status == NEP_OK) {
        verbs->windows[window_idx] = made;
        *base_p = made.base;
    } else {
        verbs->windows[window_idx].base = NULL;
        deregister(verbs, &made);
    }
    pthread_mutex_unlock(&verbs->poll_lock);
    nep_grants_free(grants);
    return status;
}

void nep_verbs_window_destroy(struct nep_transport *transport, uint32_t window_idx)
{
    struct nep_verbs *verbs = (struct nep_verbs *)transport;
    if (window_idx >= NEP_VERBS_MAX_WINDOWS || verbs->windows[window_idx].base == NULL) {
        return;
    }
    uint64_t deadline_ns = nep_deadline_ns(nep_verbs_patience_ns(verbs->params.config));
    while (puts_left(verbs, window_idx, false) > 0 && nep_left_ns(deadline_ns) > 0) {
        nep_verbs_progress(transport);
        usleep(20);
    }
    uint64_t num_left = puts_left(verbs, window_idx, true);
    if (num_left > 0) {
        nep_info("verbs: window %u is destroyed with %llu puts not acknowledged", window_idx,
                 (unsigned long long)num_left);
    }
    pthread_mutex_lock(&verbs->poll_lock);
    struct nep_verbs_window *window = &verbs->windows[window_idx];
    window->base = NULL; /* announcements are dropped from here on */
    pthread_mutex_unlock(&verbs->poll_lock);
}
