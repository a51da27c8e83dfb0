/* SPDX-License-Identifier: Apache-2.0 */
/*
 * VMM allocations, passed as file descriptors over sockets without a name in any file system, whose
 * addresses travel with the bootstrap. A process maps all windows of its node once; its ranks (they
 * may be threads) share that mapping, because the same memory under two addresses of one process is
 * not coherent. An imported allocation outlives the process that made it, so a rank that dies takes
 * nobody's memory away. Rejected: cudaIpc handles, whose memory goes with its owner.
 */
#include "dispatch/cuda/windows.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/clock.h"
#include "dispatch/cuda/driver.h"
#include "transport/bootstrap.h"

struct nep_cuda_mapping {
    _Atomic uint32_t users;
    CUdeviceptr base;
    uint64_t stride;
    uint32_t num;
    uint32_t num_mapped;
    CUmemGenericAllocationHandle *handles; /* [num], 0: none */
};

/* What a rank tells the others. */
struct card {
    uint64_t process; /* a random number */
    uint64_t secret;  /* what a message to its socket begins with */
    uint64_t handle;  /* for ranks of the same process */
    uint64_t granularity;
    uint8_t device[16];
    int32_t ordinal;
    uint32_t name_len;
    char name[32]; /* of its socket */
};

/* What goes with a file descriptor. */
struct parcel {
    uint64_t secret;
    uint32_t rank;
    uint32_t reserved;
};

struct setup {
    struct nep_comm *comm;
    const struct nep_cuda_driver *driver;
    struct card card;
    struct card *cards; /* [R] */
    uint64_t bytes;
    int socket;
    int fd; /* of the own allocation */
    CUmemGenericAllocationHandle handle;
};

static uint64_t process_number;
static pthread_once_t process_once = PTHREAD_ONCE_INIT;

static void draw_process(void)
{
    if (getrandom(&process_number, sizeof process_number, 0) != sizeof process_number) {
        process_number = nep_now_ns() ^ (uint64_t)getpid() << 32;
    }
}

static uint32_t rank_at(const struct setup *s, uint32_t local)
{
    const struct nep_topology *topology = &s->comm->topology;
    for (uint32_t r = 0; r < topology->num_ranks; r++) {
        if (topology->node_of_rank[r] == topology->node && topology->local_of_rank[r] == local) {
            return r;
        }
    }
    return topology->rank;
}

static uint32_t node_size(const struct setup *s)
{
    return s->comm->topology.node_ranks[s->comm->topology.node];
}

/* The rank that maps for the process of rank r: the lowest of it on this node. */
static uint32_t lead_of(const struct setup *s, uint32_t rank)
{
    for (uint32_t l = 0; l < node_size(s); l++) {
        uint32_t r = rank_at(s, l);
        if (s->cards[r].process == s->cards[rank].process) {
            return r;
        }
    }
    return rank;
}

/* ---- the own allocation --------------------------------------------------------------------- */

static CUmemAllocationProp properties(const struct setup *s, int ordinal)
{
    CUmemAllocationProp prop = {
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = ordinal},
    };
    int can_rdma = 0;
    if (s->driver->attribute(&can_rdma, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED,
                             ordinal) == CUDA_SUCCESS &&
        can_rdma != 0) {
        prop.allocFlags.gpuDirectRDMACapable = 1;
    }
    return prop;
}

static enum nep_status open_socket(struct setup *s)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    socklen_t len = sizeof(sa_family_t); /* the system picks a name */
    s->socket = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (s->socket < 0 || bind(s->socket, (struct sockaddr *)&address, len) != 0) {
        return nep_fail(NEP_ERR_IO, "a socket to pass device memory: %s", strerror(errno));
    }
    len = sizeof address;
    if (getsockname(s->socket, (struct sockaddr *)&address, &len) != 0 ||
        len - sizeof(sa_family_t) > sizeof s->card.name) {
        return nep_fail(NEP_ERR_IO, "the name of a socket to pass device memory: %s",
                        strerror(errno));
    }
    s->card.name_len = (uint32_t)(len - sizeof(sa_family_t));
    memcpy(s->card.name, address.sun_path, s->card.name_len);
    return NEP_OK;
}

/* Device, socket, granularity; the memory itself when all know the size. */
static enum nep_status fill_card(struct setup *s)
{
    struct cudaDeviceProp prop;
    int ordinal = 0;
    enum nep_status status = nep_cuda_driver_get(&s->driver);
    if (status == NEP_OK) {
        status = nep_cuda_runtime_check(cudaGetDevice(&ordinal), "the current device");
    }
    if (status == NEP_OK) {
        status = nep_cuda_runtime_check(cudaGetDeviceProperties(&prop, ordinal), "its properties");
    }
    if (status != NEP_OK) {
        return status;
    }
    pthread_once(&process_once, draw_process);
    s->card.process = process_number;
    s->card.ordinal = ordinal;
    memcpy(s->card.device, prop.uuid.bytes, sizeof s->card.device);
    if (getrandom(&s->card.secret, sizeof s->card.secret, 0) != sizeof s->card.secret) {
        return nep_fail(NEP_ERR_IO, "no random number: %s", strerror(errno));
    }
    CUmemAllocationProp wanted = properties(s, ordinal);
    size_t granularity = 0;
    status = nep_cuda_driver_check(
        s->driver->granularity(&granularity, &wanted, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
        "granularity of device memory");
    s->card.granularity = granularity;
    s->bytes = (s->bytes + granularity - 1) / granularity * granularity;
    if (status == NEP_OK) {
        status = nep_cuda_driver_check(s->driver->mem_create(&s->handle, s->bytes, &wanted, 0),
                                       "device memory of a window");
    }
    if (status == NEP_OK) {
        s->card.handle = s->handle;
        status = nep_cuda_driver_check(
            s->driver->mem_export(&s->fd, s->handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
            "a window as a file descriptor");
    }
    return status == NEP_OK ? open_socket(s) : status;
}

/* ---- passing descriptors -------------------------------------------------------------------- */

/* False: not now. */
static bool send_one(struct setup *s, uint32_t to, enum nep_status *status_p)
{
    const struct card *card = &s->cards[to];
    struct parcel parcel = {card->secret, s->comm->topology.rank, 0};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, card->name, card->name_len);
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec piece = {&parcel, sizeof parcel};
    struct msghdr message = {.msg_name = &address,
                             .msg_namelen = (socklen_t)(sizeof(sa_family_t) + card->name_len),
                             .msg_iov = &piece,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(head), &s->fd, sizeof(int));
    if (sendmsg(s->socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL) == (ssize_t)sizeof parcel) {
        return true;
    }
    if (errno != EAGAIN && errno != ENOBUFS && errno != EINTR) {
        *status_p = nep_fail(NEP_ERR_IO,
                             "device memory cannot be passed to rank %u: %s; ranks of a node must "
                             "share a network namespace",
                             to, strerror(errno));
    }
    return false;
}

/* Takes one parcel, if there is one; others than expected are dropped. */
static enum nep_status take_one(struct setup *s, struct nep_cuda_mapping *mapping, uint32_t *num_p)
{
    struct parcel parcel;
    int fd = -1;
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec piece = {&parcel, sizeof parcel};
    struct msghdr message = {.msg_iov = &piece,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    ssize_t len = recvmsg(s->socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (len < 0) {
        return NEP_OK;
    }
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    if (head != NULL && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS &&
        head->cmsg_len == CMSG_LEN(sizeof(int))) {
        memcpy(&fd, CMSG_DATA(head), sizeof fd);
    }
    const struct nep_topology *topology = &s->comm->topology;
    bool is_ours = len == (ssize_t)sizeof parcel && parcel.secret == s->card.secret && fd >= 0 &&
                   parcel.rank < topology->num_ranks &&
                   topology->node_of_rank[parcel.rank] == topology->node &&
                   mapping->handles[topology->local_of_rank[parcel.rank]] == 0;
    enum nep_status status = NEP_OK;
    if (is_ours) {
        status = nep_cuda_driver_check(
            s->driver->mem_import(&mapping->handles[topology->local_of_rank[parcel.rank]],
                                  (void *)(intptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
            "a peer's window");
        (*num_p)++;
    }
    if (fd >= 0) {
        close(fd);
    }
    return status;
}

/* To the leads of all other processes; a lead (mapping not NULL) takes theirs meanwhile. */
static enum nep_status pass(struct setup *s, struct nep_cuda_mapping *mapping)
{
    uint32_t size = node_size(s), taken = 0, to_take = 0, sent = 0;
    uint32_t rank = s->comm->topology.rank;
    enum nep_status status = NEP_OK;
    for (uint32_t l = 0; mapping != NULL && l < size; l++) {
        uint32_t r = rank_at(s, l);
        bool is_same = s->cards[r].process == s->card.process;
        mapping->handles[l] = is_same ? s->cards[r].handle : 0;
        to_take += !is_same;
    }
    uint64_t deadline_ns = nep_deadline_ns(s->comm->timeout_ns);
    while (status == NEP_OK && (sent < size || taken < to_take)) {
        uint32_t to = sent < size ? rank_at(s, sent) : rank;
        bool is_target = s->cards[to].process != s->card.process && lead_of(s, to) == to;
        bool has_moved = sent < size && (!is_target || send_one(s, to, &status));
        sent += has_moved;
        uint32_t before = taken;
        if (status == NEP_OK && taken < to_take) {
            status = take_one(s, mapping, &taken);
        }
        if (status == NEP_OK && !has_moved && taken == before) {
            struct pollfd wait = {.fd = s->socket, .events = POLLIN};
            poll(&wait, 1, 1);
        }
        if (status == NEP_OK && nep_left_ns(deadline_ns) == 0) {
            status = nep_fail(NEP_ERR_TIMEOUT,
                              "device memory: %u of %u windows of the node came in %.1f s", taken,
                              to_take, (double)s->comm->timeout_ns / 1e9);
        }
    }
    return status;
}

/* ---- mapping -------------------------------------------------------------------------------- */

static void release(struct nep_cuda_mapping *mapping)
{
    const struct nep_cuda_driver *driver;
    if (nep_cuda_driver_get(&driver) == NEP_OK) {
        for (uint32_t l = 0; l < mapping->num_mapped; l++) {
            driver->mem_unmap(mapping->base + l * mapping->stride, mapping->stride);
        }
        if (mapping->base != 0) {
            driver->address_free(mapping->base, mapping->stride * mapping->num);
        }
        for (uint32_t l = 0; l < mapping->num; l++) {
            if (mapping->handles[l] != 0) {
                driver->mem_release(mapping->handles[l]);
            }
        }
    }
    free(mapping->handles);
    free(mapping);
}

static void drop(struct nep_cuda_mapping *mapping)
{
    if (mapping != NULL && atomic_fetch_sub(&mapping->users, 1) == 1) {
        release(mapping);
    }
}

static enum nep_status map(const struct setup *s, struct nep_cuda_mapping *mapping)
{
    const struct nep_cuda_driver *driver = s->driver;
    uint64_t all = mapping->stride * mapping->num;
    enum nep_status status =
        nep_cuda_driver_check(driver->address_reserve(&mapping->base, all, 0, 0, 0),
                              "addresses for the windows of a node");
    for (uint32_t l = 0; status == NEP_OK && l < mapping->num; l++) {
        status = nep_cuda_driver_check(driver->mem_map(mapping->base + l * mapping->stride,
                                                       mapping->stride, 0, mapping->handles[l], 0),
                                       "mapping a window");
        mapping->num_mapped += status == NEP_OK;
    }
    /* Every device that a rank of this process uses must reach all of them. */
    for (uint32_t l = 0; status == NEP_OK && l < mapping->num; l++) {
        const struct card *card = &s->cards[rank_at(s, l)];
        if (card->process != s->card.process) {
            continue;
        }
        const CUmemAccessDesc access = {
            .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = card->ordinal},
            .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
        status = nep_cuda_driver_check(driver->set_access(mapping->base, all, &access, 1),
                                       "access to the windows of a node (do all devices reach each "
                                       "other?)");
    }
    return status;
}

static enum nep_status make_mapping(struct setup *s, struct nep_cuda_mapping **mapping_p)
{
    struct nep_cuda_mapping *mapping = NULL;
    uint32_t size = node_size(s);
    if (lead_of(s, s->comm->topology.rank) != s->comm->topology.rank) {
        return pass(s, NULL);
    }
    mapping = calloc(1, sizeof *mapping);
    CUmemGenericAllocationHandle *handles = calloc(size, sizeof *handles);
    if (mapping == NULL || handles == NULL) {
        free(mapping);
        free(handles);
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for %u windows", size);
    }
    mapping->handles = handles;
    mapping->num = size;
    mapping->stride = s->bytes;
    for (uint32_t l = 0; l < size; l++) {
        mapping->users += s->cards[rank_at(s, l)].process == s->card.process;
    }
    enum nep_status status = pass(s, mapping);
    *mapping_p = mapping;
    return status == NEP_OK ? map(s, mapping) : status;
}

/* The lead's mapping, to the other ranks of its process. */
static enum nep_status share(struct setup *s, enum nep_status status,
                             struct nep_cuda_mapping *mapping, struct nep_cuda_windows *windows)
{
    uint32_t num_ranks = s->comm->topology.num_ranks;
    struct nep_cuda_mapping **all = calloc(num_ranks, sizeof(struct nep_cuda_mapping *));
    enum nep_status gathered =
        all == NULL ? nep_fail(NEP_ERR_NO_MEMORY, "no memory for %u ranks", num_ranks)
                    : nep_bootstrap_allgather(&s->comm->bootstrap, &mapping, all, sizeof(void *),
                                              s->comm->timeout_ns, "device mappings");
    if (gathered == NEP_OK) {
        windows->mapping = all[lead_of(s, s->comm->topology.rank)];
    } else {
        windows->mapping = mapping;
    }
    free(all);
    status = status == NEP_OK ? gathered : status;
    if (status == NEP_OK && windows->mapping == NULL) {
        status = nep_fail(NEP_ERR_IO, "the rank that maps for this process failed");
    }
    if (status == NEP_OK) {
        windows->base = (char *)(uintptr_t)windows->mapping->base;
        windows->stride = windows->mapping->stride;
    }
    return status;
}

enum nep_status nep_cuda_windows_create(struct nep_comm *comm, uint64_t bytes,
                                        struct nep_cuda_windows *windows)
{
    struct setup s = {.comm = comm, .bytes = bytes, .socket = -1, .fd = -1};
    uint32_t rank = comm->topology.rank, num_ranks = comm->topology.num_ranks;
    memset(windows, 0, sizeof *windows);
    s.cards = calloc(num_ranks, sizeof *s.cards);
    enum nep_status status = s.cards != NULL
                                 ? fill_card(&s)
                                 : nep_fail(NEP_ERR_NO_MEMORY, "no memory for %u ranks", num_ranks);
    status = nep_bootstrap_common(&comm->bootstrap, rank, num_ranks, status, comm->timeout_ns);
    if (status == NEP_OK) {
        status = nep_bootstrap_allgather(&comm->bootstrap, &s.card, s.cards, sizeof s.card,
                                         comm->timeout_ns, "device windows");
    }
    bool is_released = true; /* a mapping owns the handles of its process */
    if (status == NEP_OK) {
        struct nep_cuda_mapping *mapping = NULL;
        is_released = false;
        status = make_mapping(&s, &mapping);
        status = share(&s, status, mapping, windows);
        for (uint32_t r = 0; r < num_ranks; r++) {
            windows->ranks_on_device +=
                memcmp(s.cards[r].device, s.card.device, sizeof s.card.device) == 0;
        }
        status = nep_bootstrap_common(&comm->bootstrap, rank, num_ranks, status, comm->timeout_ns);
    }
    if (s.handle != 0 && is_released) {
        s.driver->mem_release(s.handle);
    }
    if (s.socket >= 0) {
        close(s.socket);
    }
    if (s.fd >= 0) {
        close(s.fd);
    }
    free(s.cards);
    if (status != NEP_OK) {
        nep_cuda_windows_destroy(windows);
    }
    return status;
}

void nep_cuda_windows_destroy(struct nep_cuda_windows *windows)
{
    drop(windows->mapping);
    memset(windows, 0, sizeof *windows);
}
