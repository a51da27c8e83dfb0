/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Shared memory between processes. A window is a memfd, so nothing has a name and nothing is left
 * behind by a crash; peers open it through /proc/PID/fd, which the system allows to the same user
 * alone, and check that they got the file that was meant (inode and size). Rejected: names in
 * /dev/shm. They survive a crash between creation and unlinking, and that file system is often 64
 * MiB in containers.
 *
 * A peer's end is seen through its pidfd.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/log.h"
#include "transport/bootstrap.h"
#include "transport/mapped.h"

struct shm {
    struct nep_mapped mapped;
    int *pidfd;  /* [num_ranks]; -1 where unknown */
    pid_t *pids; /* [num_ranks]; 0 where unknown */
};

struct shm_card {
    uint64_t inode;
    uint64_t device;
    uint64_t bytes;
    int32_t pid;
    int32_t fd;
};

extern const struct nep_transport_ops nep_shm_ops;

static enum nep_status shm_probe(const struct nep_config *config)
{
    (void)config;
    int fd = memfd_create("nearep-probe", MFD_CLOEXEC);
    if (fd < 0) {
        return nep_fail(NEP_ERR_UNSUPPORTED, "shm: memfd_create failed: %m");
    }
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)getpid(), fd);
    int again = open(path, O_RDWR | O_CLOEXEC);
    enum nep_status status = NEP_OK;
    if (again < 0) {
        status = nep_fail(NEP_ERR_UNSUPPORTED, "shm: cannot open %s: %m; is /proc mounted?", path);
    } else {
        close(again);
    }
    close(fd);
    return status;
}

static void shm_close(struct nep_transport *transport)
{
    struct shm *shm = (struct shm *)transport;
    for (uint32_t r = 0; shm->pidfd != NULL && r < shm->mapped.params.topology->num_ranks; r++) {
        if (shm->pidfd[r] >= 0) {
            close(shm->pidfd[r]);
        }
    }
    free(shm->pidfd);
    free(shm->pids);
    nep_mapped_fini(&shm->mapped);
    free(shm);
}

/* Learns the pids of the ranks that this transport serves and opens what tells of their end. */
static enum nep_status watch_peers(struct shm *shm)
{
    const struct nep_topology *topology = shm->mapped.params.topology;
    int32_t pid = (int32_t)getpid();
    int32_t *pids = calloc(topology->num_ranks, sizeof *pids);
    if (pids == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "shm: no memory for %u pids", topology->num_ranks);
    }
    enum nep_status status =
        nep_bootstrap_allgather(shm->mapped.params.bootstrap, &pid, pids, sizeof pid,
                                shm->mapped.params.timeout_ns, "shm process ids");
    for (uint32_t r = 0; status == NEP_OK && r < topology->num_ranks; r++) {
        if (!nep_mapped_serves(&shm->mapped, r)) {
            continue;
        }
        shm->pids[r] = pids[r];
        if (pids[r] != pid) {
            shm->pidfd[r] = (int)syscall(SYS_pidfd_open, pids[r], 0);
        }
    }
    free(pids);
    return status;
}

static enum nep_status shm_create(const struct nep_transport_params *params,
                                  struct nep_transport **transport_p)
{
    struct shm *shm = calloc(1, sizeof *shm);
    if (shm == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "shm: no memory for the transport");
    }
    enum nep_status status = nep_mapped_init(&shm->mapped, &nep_shm_ops, params);
    if (status != NEP_OK) {
        free(shm);
        return status;
    }
    uint32_t num_ranks = params->topology->num_ranks;
    shm->pidfd = malloc(num_ranks * sizeof *shm->pidfd);
    shm->pids = calloc(num_ranks, sizeof *shm->pids);
    if (shm->pidfd == NULL || shm->pids == NULL) {
        free(shm->pidfd);
        shm->pidfd = NULL;
        shm_close(&shm->mapped.transport);
        return nep_fail(NEP_ERR_NO_MEMORY, "shm: no memory for %u ranks", num_ranks);
    }
    for (uint32_t r = 0; r < num_ranks; r++) {
        shm->pidfd[r] = -1;
    }
    status = watch_peers(shm);
    if (status != NEP_OK) {
        shm_close(&shm->mapped.transport);
        return status;
    }
    *transport_p = &shm->mapped.transport;
    return NEP_OK;
}

/* Unmaps all windows of this number; of the own one, what lies before keep_from or from keep_to on.
 */
static void unmap_all(struct shm *shm, uint32_t window, size_t keep_from, size_t keep_to)
{
    struct nep_mapped_window *entry = &shm->mapped.windows[window];
    for (uint32_t r = 0; r < shm->mapped.params.topology->num_ranks; r++) {
        uint8_t *base = entry->base != NULL ? entry->base[r] : NULL;
        if (base != NULL && r != shm->mapped.params.topology->rank) {
            munmap(base, entry->bytes);
        } else if (base != NULL) {
            munmap(base, keep_from);
            if (keep_to < entry->bytes) {
                munmap(base + keep_to, entry->bytes - keep_to);
            }
        }
    }
    nep_mapped_window_free(&shm->mapped, window);
}

static void shm_window_destroy(struct nep_transport *transport, uint32_t window)
{
    struct shm *shm = (struct shm *)transport;
    size_t bytes = shm->mapped.windows[window].bytes;
    unmap_all(shm, window, bytes, bytes);
}

/*
 * The pages that stay are replaced, at the same addresses, by a copy that no peer has mapped: a
 * rank that was taken for lost, and writes after all, writes into the file that nobody reads.
 */
static void shm_window_retire(struct nep_transport *transport, uint32_t window, size_t keep_offset,
                              size_t keep_bytes)
{
    struct shm *shm = (struct shm *)transport;
    uint8_t *base = nep_mapped_peer_window(transport, window, shm->mapped.params.topology->rank);
    if (base == NULL) {
        shm_window_destroy(transport, window);
        return;
    }
    void *copy = mmap(NULL, keep_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (copy != MAP_FAILED) {
        memcpy(copy, base + keep_offset, keep_bytes);
    }
    if (copy == MAP_FAILED || mremap(copy, keep_bytes, keep_bytes, MREMAP_MAYMOVE | MREMAP_FIXED,
                                     base + keep_offset) == MAP_FAILED) {
        nep_warn("shm: no memory for a copy of %zu bytes: they stay shared with whoever mapped "
                 "them (%m)",
                 keep_bytes);
    }
    unmap_all(shm, window, keep_offset, keep_offset + keep_bytes);
}

/* A memfd of *bytes_p, which may grow to whole huge pages where those are asked for. */
static enum nep_status make_file(const struct nep_config *config, size_t *bytes_p, int *fd_p)
{
    if (config->huge_pages) {
        /* Rounded also where there are none: all ranks need the same size. */
        size_t huge = 2u << 20;
        *bytes_p = (*bytes_p + huge - 1) / huge * huge;
        int fd = memfd_create("nearep", MFD_CLOEXEC | MFD_HUGETLB);
        if (fd >= 0 && ftruncate(fd, (off_t)*bytes_p) == 0 &&
            fallocate(fd, 0, 0, (off_t)*bytes_p) == 0) {
            *fd_p = fd;
            return NEP_OK;
        }
        nep_info("shm: no huge pages for %zu bytes (%m): ordinary pages are used", *bytes_p);
        if (fd >= 0) {
            close(fd);
        }
    }
    int fd = memfd_create("nearep", MFD_CLOEXEC);
    if (fd < 0) {
        return nep_fail(NEP_ERR_NO_MEMORY, "shm: memfd_create failed: %m");
    }
    if (ftruncate(fd, (off_t)*bytes_p) != 0) {
        enum nep_status status = nep_fail(NEP_ERR_NO_MEMORY,
                                          "shm: a window of %zu bytes does not fit (%m): ask for a "
                                          "smaller shape or pool, or raise the limit on file sizes",
                                          *bytes_p);
        close(fd);
        return status;
    }
    *fd_p = fd;
    return NEP_OK;
}

static enum nep_status map_peer(struct shm *shm, uint32_t window, uint32_t rank,
                                const struct shm_card *card)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", card->pid, card->fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    struct stat info;
    if (fd < 0 || fstat(fd, &info) != 0) {
        enum nep_status status = nep_fail(
            NEP_ERR_IO,
            "shm: cannot open the window of rank %u (%s): %m; the ranks of a node must share a "
            "process namespace and a user, or be given different NEP_NODE names",
            rank, path);
        if (fd >= 0) {
            close(fd);
        }
        return status;
    }
    size_t bytes = shm->mapped.windows[window].bytes;
    void *base = MAP_FAILED;
    enum nep_status status = NEP_OK;
    if (info.st_ino != card->inode || info.st_dev != card->device || card->bytes != bytes) {
        status = nep_fail(NEP_ERR_MISMATCH,
                          "shm: %s is not the window of rank %u (another process has that number "
                          "here, or its size is %llu, not %zu)",
                          path, rank, (unsigned long long)card->bytes, bytes);
    } else {
        base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (base == MAP_FAILED) {
            status = nep_fail(NEP_ERR_NO_MEMORY, "shm: mapping %zu bytes of rank %u failed: %m",
                              bytes, rank);
        } else {
            shm->mapped.windows[window].base[rank] = base;
        }
    }
    close(fd);
    return status;
}

/* Maps all windows; a rank that could not says so to all, so that nobody waits for it later. */
static enum nep_status map_all(struct shm *shm, uint32_t window, const struct shm_card *cards)
{
    const struct nep_topology *topology = shm->mapped.params.topology;
    enum nep_status status = NEP_OK;
    for (uint32_t r = 0; status == NEP_OK && r < topology->num_ranks; r++) {
        if (nep_mapped_serves(&shm->mapped, r)) {
            status = map_peer(shm, window, r, &cards[r]);
        }
    }
    return nep_bootstrap_common(shm->mapped.params.bootstrap, topology->rank, topology->num_ranks,
                                status, shm->mapped.params.timeout_ns);
}

static enum nep_status shm_window_create(struct nep_transport *transport, uint32_t window,
                                         void **base_p, size_t bytes)
{
    struct shm *shm = (struct shm *)transport;
    const struct nep_topology *topology = shm->mapped.params.topology;
    if (*base_p != NULL) {
        return nep_fail(NEP_ERR_UNSUPPORTED, "shm: a window over memory that exists");
    }
    int fd = -1;
    struct stat info = {0};
    struct shm_card *cards = calloc(topology->num_ranks, sizeof *cards);
    enum nep_status status = cards == NULL ? nep_fail(NEP_ERR_NO_MEMORY, "shm: no memory")
                                           : make_file(shm->mapped.params.config, &bytes, &fd);
    if (status == NEP_OK && fstat(fd, &info) != 0) {
        status = nep_fail(NEP_ERR_IO, "shm: fstat failed: %m");
    }
    /* All ranks come here, also one that failed: a rank that is missing would hold the others. */
    status = nep_bootstrap_common(shm->mapped.params.bootstrap, topology->rank, topology->num_ranks,
                                  status, shm->mapped.params.timeout_ns);
    if (status == NEP_OK) {
        status = nep_mapped_window_open(&shm->mapped, window, bytes);
    }
    if (status == NEP_OK) {
        struct shm_card card = {info.st_ino, info.st_dev, bytes, (int32_t)getpid(), fd};
        status = nep_bootstrap_allgather(shm->mapped.params.bootstrap, &card, cards, sizeof card,
                                         shm->mapped.params.timeout_ns, "shm window");
        if (status == NEP_OK) {
            status = map_all(shm, window, cards);
        }
        if (status == NEP_OK) {
            *base_p = shm->mapped.windows[window].base[topology->rank];
        } else {
            shm_window_destroy(transport, window);
        }
    }
    if (fd >= 0) {
        close(fd);
    }
    free(cards);
    return status;
}

static enum nep_status shm_peer_status(struct nep_transport *transport, uint32_t rank)
{
    struct shm *shm = (struct shm *)transport;
    struct pollfd pollfd = {.fd = shm->pidfd[rank], .events = POLLIN};
    if (pollfd.fd < 0 || poll(&pollfd, 1, 0) <= 0) {
        return NEP_OK;
    }
    return nep_fail(NEP_ERR_PEER_LOST, "the process of rank %u (pid %d) ended",
                    nep_transport_name(&shm->mapped.params, rank), (int)shm->pids[rank]);
}

const struct nep_transport_ops nep_shm_ops = {
    .name = "shm",
    .caps = NEP_CAP_MAPPED | NEP_CAP_FABRIC | NEP_CAP_ORDERED | NEP_CAP_SILENT,
    .probe = shm_probe,
    .create = shm_create,
    .close = shm_close,
    .window_create = shm_window_create,
    .window_grant = nep_open_window_grant,
    .window_destroy = shm_window_destroy,
    .window_retire = shm_window_retire,
    .peer_window = nep_mapped_peer_window,
    .put = nep_mapped_put,
    .progress = nep_mapped_progress,
    .completed = nep_mapped_completed,
    .peer_status = shm_peer_status,
    .abandon = nep_unsupported_abandon,
    .stats = nep_mapped_stats,
};
