/* SPDX-License-Identifier: Apache-2.0 */
/*
 * long because each case is a few lines for the same two ranks.
 *
 * Faults over real verbs, one case per run, in the guest of nep-vm: two ranks as threads, rank 1
 * does something wrong or has something done to it. usage: verbs_faults CASE
 *
 * - rkey: a put with a key that the peer did not give: that peer is lost, with the reason
 * - slot: a put into a slot that is not the sender's: refused by the device, never lands
 * - owner: a put by one QP with the key of another one: the same
 * - rnr: the receiver does not poll while far more comes than its queue holds: all arrives
 * - srq: the same with senders that do not try for ever: the peer is lost, for want of receives
 * - port: the link of rank 1 goes down and comes back within the budget: nothing is lost
 * - path: one of two paths goes down for good: its puts go over the other, none is lost
 * - again: the same, then the cable is back and the ranks connect anew: both paths carry puts
 * - back, backs: the link of the only path, or of one of two, goes down until its QP is dead, and
 *   comes back: nothing is lost, and the same QP carries puts again
 * - gone: rank 1's end is played by QPs in error: rank 0 learns it though it sends nothing
 * - cut: no frame of rank 1 gets through from the start: lost at the first put, in the budget
 * - refused: the ends have no address of one family: both are told, and nothing is left
 * - memlock: a limit on locked memory: a sentence with the limit
 * - dmabuf: Soft-RoCE has no dma-buf: refused, with an errno that says so
 * - registering: what it costs to register memory that nobody has touched, and the same again: no
 *   fault, and nothing but the calls is checked (docs/verbs.md has the figures)
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/config.h"
#include "tests/multi/conformance.h"
#include "transport/verbs/verbs.h"

enum { WINDOW = 9, SLOT_BYTES = 16 << 10, MANY = 2000 };

struct fault_case {
    const char *name;
    int (*body)(struct rank *rank, struct nep_transport *transport, struct window *window);
};

static struct nep_verbs *inner(struct nep_transport *transport)
{
    return (struct nep_verbs *)transport;
}

static enum nep_status put(struct nep_transport *transport, const struct window *window,
                           uint32_t rank, uint32_t i, uint32_t len, uint64_t *number_p)
{
    struct nep_put one = {.dst = 1 - rank,
                          .window = WINDOW,
                          .offset = window_landing(window, rank),
                          .src = window_source(window, 1 - rank),
                          .len = len,
                          .imm = window_imm(WINDOW, i)};
    return transport->ops->put(transport, &one, number_p);
}

/* Until the peer is lost, at most `seconds`; what was said then, else NULL. */
static const char *wait_lost(struct nep_transport *transport, uint32_t peer, uint32_t seconds)
{
    uint64_t deadline_ns = nep_deadline_ns(seconds * NEP_S);
    while (nep_left_ns(deadline_ns) > 0) {
        transport->ops->progress(transport);
        if (transport->ops->peer_status(transport, peer) == NEP_ERR_PEER_LOST) {
            printf("%s\n", nep_last_message());
            return nep_last_message();
        }
        usleep(10000);
    }
    return NULL;
}

static int body_rkey(struct rank *rank, struct nep_transport *transport, struct window *window)
{
    if (rank->rank == 0) {
        uint64_t number;
        inner(transport)->windows[WINDOW].remotes[1].ways[0].rkeys[0] ^= 0x5a00;
        RANK_CHECK(rank, put(transport, window, 0, 0, 64, &number) == NEP_OK, "put");
        const char *said = wait_lost(transport, 1, 60);
        RANK_CHECK(rank, said != NULL && strstr(said, "remote access error") != NULL, "%s",
                   said == NULL ? "nothing was said" : said);
        RANK_CHECK(rank, window_arrivals(window, 1, 0) == 0, "an announcement came");
        RANK_CHECK(rank, put(transport, window, 0, 1, 64, &number) == NEP_ERR_PEER_LOST, "put");
    }
    return barrier(rank);
}

/* Rank 0 forges, as `forge` says, and loses its connection; rank 1's memory is as it was. */
static int refuse_forged(struct rank *rank, struct nep_transport *transport, struct window *window,
                         uint64_t offset)
{
    struct nep_put one = {.dst = 1,
                          .window = WINDOW,
                          .offset = offset,
                          .src = window_source(window, 1),
                          .len = 64,
                          .imm = window_imm(WINDOW, 0)};
    char before[64];
    memcpy(before, (char *)window->base + offset, sizeof before);
    RANK_CHECK(rank, inner(transport)->windows[WINDOW].is_guarded, "not guarded");
    if (rank->rank == 0) {
        uint64_t number;
        memset(window_source(window, 1), 0xbd, one.len);
        RANK_CHECK(rank, transport->ops->put(transport, &one, &number) == NEP_OK, "%s",
                   nep_last_message());
        const char *said = wait_lost(transport, 1, 60);
        RANK_CHECK(rank, said != NULL && strstr(said, "remote access error") != NULL, "%s",
                   said == NULL ? "nothing was said" : said);
    }
    if (barrier(rank) != 0) {
        return 1;
    }
    if (rank->rank == 1) {
        RANK_CHECK(rank, memcmp(before, (char *)window->base + offset, sizeof before) == 0,
                   "it was written");
        RANK_CHECK(rank, window_arrivals(window, 0, 0) == 0, "an announcement came");
        const char *said = wait_lost(transport, 0, 60);
        RANK_CHECK(rank, said != NULL && strstr(said, "rank 0 is lost") != NULL, "%s",
                   said == NULL ? "nothing was said" : said);
    }
    return barrier(rank);
}

/* Rank 0 takes all of rank 1's window for its own, with the key that it was given. */
static int body_slot(struct rank *rank, struct nep_transport *transport, struct window *window)
{
    struct nep_verbs_remote *remote = &inner(transport)->windows[WINDOW].remotes[1 - rank->rank];
    remote->ways[0].offset = 0;
    remote->ways[0].bytes = remote->bytes;
    return refuse_forged(rank, transport, window, window_landing(window, 1));
}

static int body_owner(struct rank *rank, struct nep_transport *transport, struct window *window)
{
    struct nep_verbs_remote *remote = &inner(transport)->windows[WINDOW].remotes[1 - rank->rank];
    RANK_CHECK(rank, inner(transport)->has_bound_windows, "this kernel has no windows of type 2B");
    uint32_t key = remote->ways[0].rkeys[0];
    remote->ways[0].rkeys[0] = remote->ways[0].rkeys[1];
    remote->ways[0].rkeys[1] = key; /* also when it is sent again */
    return refuse_forged(rank, transport, window, window_landing(window, 0));
}

static int body_rnr(struct rank *rank, struct nep_transport *transport, struct window *window)
{
    if (rank->rank == 1) {
        pthread_mutex_lock(&inner(transport)->poll_lock); /* neither polls nor posts receives */
    }
    if (barrier(rank) != 0) {
        return 1;
    }
    if (rank->rank == 0) {
        uint64_t number = 0;
        for (uint32_t i = 0; i < MANY; i++) {
            RANK_CHECK(rank, put(transport, window, 0, i % 256, 64, &number) == NEP_OK, "put");
        }
        if (barrier(rank) != 0 || wait_completed(rank, transport, 1, number) != 0) {
            return 1;
        }
    } else {
        int failed = barrier(rank);
        usleep(300000);
        pthread_mutex_unlock(&inner(transport)->poll_lock);
        RANK_CHECK(rank, failed == 0, "barrier");
        uint64_t deadline_ns = nep_deadline_ns(60 * NEP_S);
        uint32_t sum = 0;
        while (sum < MANY && nep_left_ns(deadline_ns) > 0) {
            transport->ops->progress(transport);
            sum = 0;
            for (uint32_t i = 0; i < 256; i++) {
                sum += window_arrivals(window, 0, i);
            }
        }
        printf("%u of %u arrived, receives: %u\n", sum, MANY, inner(transport)->paths[0].srq_depth);
        RANK_CHECK(rank, sum == MANY, "%u", sum);
        RANK_CHECK(rank, inner(transport)->paths[0].srq_depth < MANY / 4, "queue too deep to test");
    }
    return barrier(rank);
}

static int body_srq(struct rank *rank, struct nep_transport *transport, struct window *window)
{
    if (rank->rank == 1) {
        pthread_mutex_lock(&inner(transport)->poll_lock);
    }
    int failed = barrier(rank);
    if (rank->rank == 0 && failed == 0) {
        uint64_t number = 0;
        enum nep_status status = NEP_OK;
        for (uint32_t i = 0; i < MANY && status == NEP_OK; i++) {
            status = put(transport, window, 0, i % 256, 64, &number);
        }
        const char *said = wait_lost(transport, 1, 60);
        RANK_CHECK(rank, said != NULL && strstr(said, "RNR retry") != NULL, "%s",
                   said == NULL ? "nothing was said" : said);
    }
    failed = barrier(rank) | failed;
    if (rank->rank == 1) {
        pthread_mutex_unlock(&inner(transport)->poll_lock);
    }
    return failed;
}

static int link_set(const char *device, const char *state)
{
    char command[128]; /* rxeN sits on nN, whose cable ends at pN: pulled there, as by a switch */
    snprintf(command, sizeof command, "ip link set p%s %s", device + 3, state);
    return system(command);
}

static int send_one(struct rank *rank, struct nep_transport *transport, struct window *window,
                    uint32_t i, uint64_t *number_p)
{
    enum nep_status status = put(transport, window, rank->rank, i, SLOT_BYTES - 1, number_p);
    RANK_CHECK(rank, status == NEP_OK, "%s", nep_last_message());
    return 0;
}

/*
 * Both send 256 times the same bytes. In the middle of a burst rank 0's cable is pulled at the
 * other end, for good or for 100 ms.
 */
static int send_across(struct rank *rank, struct nep_transport *transport, struct window *window,
                       uint32_t path, bool comes_back)
{
    const char *device = inner(transport)->paths[path].device;
    uint32_t peer = 1 - rank->rank;
    uint64_t number = 0;
    memset(window_source(window, peer), 0x5a, SLOT_BYTES);
    for (uint32_t i = 0; i < 256; i++) {
        bool is_puller = rank->rank == 0;
        if (i == 100 && is_puller) {
            /* The port's event must wait: the next puts shall still take the dead way. */
            pthread_mutex_lock(&inner(transport)->poll_lock);
            RANK_CHECK(rank, link_set(device, "down") == 0, "%s", device);
        }
        if (send_one(rank, transport, window, i, &number) != 0) {
            return 1;
        }
        if (i == 120 && is_puller) {
            pthread_mutex_unlock(&inner(transport)->poll_lock);
            usleep(100000);
            RANK_CHECK(rank, !comes_back || link_set(device, "up") == 0, "%s", device);
        }
    }
    if (wait_completed(rank, transport, peer, number) != 0) {
        return 1;
    }
    for (uint32_t i = 0; i < 256; i++) {
        if (window_wait(rank, transport, window, peer, i) != 0) {
            return 1;
        }
    }
    const char *landed = (char *)window->base + window_landing(window, peer);
    for (uint32_t i = 0; i < SLOT_BYTES - 1; i++) {
        RANK_CHECK(rank, landed[i] == 0x5a, "byte %u", i);
    }
    RANK_CHECK(rank, transport->ops->peer_status(transport, peer) == NEP_OK, "%s",
               nep_last_message());
    return barrier(rank);
}

static int body_port(struct rank *rank, struct nep_transport *transport, struct window *window)
{
    int failed = send_across(rank, transport, window, 0, true);
    for (uint32_t i = 0; i < 256 && failed == 0; i++) {
        uint32_t times = window_arrivals(window, 1 - rank->rank, i);
        RANK_CHECK(rank, times == 1, "%u: %u times", i, times);
    }
    return failed;
}

static int body_path(struct rank *rank, struct nep_transport *transport, struct window *window)
{
    int failed = send_across(rank, transport, window, 1, false);
    struct nep_transport_stats stats;
    transport->ops->stats(transport, &stats);
    uint32_t alive = inner(transport)->peers[1 - rank->rank].num_alive;
    printf("rank %u: %llu puts were sent again, %u of %u QPs live\n", rank->rank,
           (unsigned long long)stats.retries, alive, inner(transport)->num_qps);
    RANK_CHECK(rank, failed != 0 || alive == 1, "the path did not die");
    return failed;
}

static uint32_t num_alive(struct nep_transport *transport, uint32_t peer_rank)
{
    struct nep_verbs_peer *peer = &inner(transport)->peers[peer_rank];
    pthread_mutex_lock(&peer->lock);
    uint32_t num = peer->num_alive;
    pthread_mutex_unlock(&peer->lock);
    return num;
}

static int wait_alive(struct rank *rank, struct nep_transport *transport, uint32_t wanted)
{
    uint64_t deadline_ns = nep_deadline_ns(90 * NEP_S);
    uint32_t num = num_alive(transport, 1 - rank->rank);
    while (num != wanted && nep_left_ns(deadline_ns) > 0) {
        transport->ops->progress(transport);
        usleep(1000);
        num = num_alive(transport, 1 - rank->rank);
    }
    RANK_CHECK(rank, num == wanted, "%u QPs live, not %u", num, wanted);
    return 0;
}

/* 64 puts each way, numbered from `first`. */
static int send_some(struct rank *rank, struct nep_transport *transport, struct window *window,
                     uint32_t first, uint64_t *number_p)
{
    int failed = 0;
    memset(window_source(window, 1 - rank->rank), 0x5a, SLOT_BYTES);
    for (uint32_t i = first; i < first + 64 && failed == 0; i++) {
        failed = send_one(rank, transport, window, i, number_p);
    }
    return failed;
}

static int take_some(struct rank *rank, struct nep_transport *transport, struct window *window,
                     uint32_t first, uint64_t number)
{
    uint32_t peer = 1 - rank->rank;
    int failed = wait_completed(rank, transport, peer, number);
    for (uint32_t i = first; i < first + 64 && failed == 0; i++) {
        failed = window_wait(rank, transport, window, peer, i);
    }
    const char *landed = (char *)window->base + window_landing(window, peer);
    for (uint32_t i = 0; i < SLOT_BYTES - 1; i++) {
        RANK_CHECK(rank, failed != 0 || landed[i] == 0x5a, "byte %u", i);
    }
    return failed;
}

static int body_back(struct rank *rank, struct nep_transport *transport, struct window *window)
{
    struct nep_verbs *verbs = inner(transport);
    uint32_t qp_idx = verbs->num_qps - 1;
    const char *device = verbs->paths[qp_idx].device;
    const struct nep_verbs_qp *qp = &verbs->peers[1 - rank->rank].qps[qp_idx];
    uint64_t number = 0;
    RANK_CHECK(rank, rank->rank != 0 || link_set(device, "down") == 0, "%s", device);
    if (barrier(rank) != 0 || send_some(rank, transport, window, 0, &number) != 0 ||
        wait_alive(rank, transport, verbs->num_qps - 1) != 0 || barrier(rank) != 0) {
        return 1;
    }
    RANK_CHECK(rank, rank->rank != 0 || link_set(device, "up") == 0, "%s", device);
    if (take_some(rank, transport, window, 0, number) != 0 ||
        wait_alive(rank, transport, verbs->num_qps) != 0 || barrier(rank) != 0) {
        return 1;
    }
    uint64_t before = qp->posted;
    if (send_some(rank, transport, window, 64, &number) != 0 ||
        take_some(rank, transport, window, 64, number) != 0) {
        return 1;
    }
    RANK_CHECK(rank, qp->posted > before, "the QP is not used");
    RANK_CHECK(rank, transport->ops->peer_status(transport, 1 - rank->rank) == NEP_OK, "%s",
               nep_last_message());
    printf("rank %u: %u of %u QPs live again\n", rank->rank, num_alive(transport, 1 - rank->rank),
           verbs->num_qps);
    return barrier(rank);
}

static int body_gone(struct rank *rank, struct nep_transport *transport, struct window *window)
{
    (void)window;
    if (rank->rank == 1) {
        struct nep_verbs *verbs = inner(transport);
        struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
        for (uint32_t q = 0; q < verbs->num_qps; q++) {
            verbs->api.modify_qp(verbs->peers[0].qps[q].qp, &attr, IBV_QP_STATE);
        }
    }
    if (barrier(rank) != 0) {
        return 1;
    }
    if (rank->rank == 0) {
        const char *said = wait_lost(transport, 1, 60);
        RANK_CHECK(rank, said != NULL && strstr(said, "rank 1 is lost") != NULL, "%s",
                   said == NULL ? "nothing was said" : said);
        RANK_CHECK(rank, strstr(said, "QP state") != NULL && strstr(said, "port ACTIVE") != NULL,
                   "%s", said);
    }
    return barrier(rank);
}

/* The port of rank 1 stays up, but its bridge takes nothing from it. */
static int body_cut(struct rank *rank, struct nep_transport *transport, struct window *window)
{
    int failed = 0;
    if (rank->rank == 0) {
        const char *device = inner(transport)->paths[0].device;
        uint64_t number;
        RANK_CHECK(rank, link_set(device, "nomaster") == 0, "%s", device);
        RANK_CHECK(rank, put(transport, window, 0, 0, 64, &number) == NEP_OK, "put");
        const char *said = wait_lost(transport, 1, 60);
        RANK_CHECK(rank, link_set(device, "master br0") == 0, "%s", device);
        RANK_CHECK(rank, said != NULL && strstr(said, "retry counter exceeded") != NULL, "%s",
                   said == NULL ? "nothing was said" : said);
        failed = window_arrivals(window, 1, 0) != 0;
    }
    return barrier(rank) | failed;
}

static int open_two(struct rank *rank, const struct nep_transport_params *params,
                    const struct nep_transport_ops *ops, struct nep_transport **transport_p,
                    struct window *window)
{
    RANK_CHECK(rank, ops->create(params, transport_p) == NEP_OK, "%s", nep_last_message());
    return window_open(rank, *transport_p, WINDOW, SLOT_BYTES, window);
}

static void close_two(struct nep_transport *transport, struct window *window)
{
    window_close(transport, window);
    transport->ops->close(transport);
}

/* One address of each end, of different families: nothing can be connected. */
static int refuse(struct rank *rank, const struct nep_transport_params *params,
                  const struct nep_transport_ops *ops)
{
    struct nep_transport *transport = NULL;
    enum nep_status status = ops->create(params, &transport);
    RANK_CHECK(rank, status != NEP_OK && transport == NULL, "connected");
    if (rank->rank == 0) {
        printf("%s\n", nep_last_message());
    }
    RANK_CHECK(rank, strstr(nep_last_message(), "no GID of one kind at both ends") != NULL, "%s",
               nep_last_message());
    return 0;
}

/* The kernel reports the port a little after its link is up. */
static int wait_port(struct rank *rank, const char *device)
{
    char path[160], state[16] = "";
    uint64_t deadline_ns = nep_deadline_ns(60 * NEP_S);
    snprintf(path, sizeof path, "/sys/class/infiniband/%s/ports/1/state", device);
    do {
        FILE *file = fopen(path, "re");
        bool is_read = file != NULL && fgets(state, sizeof state, file) != NULL;
        if (file != NULL) {
            fclose(file);
        }
        RANK_CHECK(rank, is_read, "%s", path);
        usleep(10000);
    } while (strncmp(state, "4:", 2) != 0 && nep_left_ns(deadline_ns) > 0);
    RANK_CHECK(rank, strncmp(state, "4:", 2) == 0, "%s stays %s", device, state);
    return 0;
}

/* Two paths, one dies; all is closed; its cable is back; the same ranks connect again. */
static int connect_again(struct rank *rank, const struct nep_transport_params *params,
                         const struct nep_transport_ops *ops)
{
    struct nep_transport *transport;
    struct window window;
    if (open_two(rank, params, ops, &transport, &window) != 0) {
        return 1;
    }
    char device[NEP_VERBS_NAME];
    snprintf(device, sizeof device, "%s", inner(transport)->paths[1].device);
    int failed = body_path(rank, transport, &window);
    close_two(transport, &window);
    if (failed != 0 || barrier(rank) != 0) {
        return 1;
    }
    RANK_CHECK(rank, rank->rank != 0 || link_set(device, "up") == 0, "%s", device);
    if (wait_port(rank, device) != 0 || barrier(rank) != 0 ||
        open_two(rank, params, ops, &transport, &window) != 0) {
        return 1;
    }
    uint64_t number = 0, peer = 1 - rank->rank;
    for (uint32_t i = 0; i < 32 && failed == 0; i++) {
        failed = send_one(rank, transport, &window, i, &number);
    }
    failed = failed || wait_completed(rank, transport, (uint32_t)peer, number) != 0;
    for (uint32_t i = 0; i < 32 && failed == 0; i++) {
        failed = window_wait(rank, transport, &window, (uint32_t)peer, i);
    }
    const struct nep_verbs_peer *other = &inner(transport)->peers[peer];
    RANK_CHECK(rank, failed != 0 || other->num_alive == 2, "%u QPs live", other->num_alive);
    RANK_CHECK(rank, failed != 0 || (other->qps[0].posted > 0 && other->qps[1].posted > 0),
               "a path was not used");
    printf("rank %u connected again: 2 of 2 QPs live\n", rank->rank);
    failed = barrier(rank) | failed;
    close_two(transport, &window);
    return failed;
}

static int run_two(struct rank *rank)
{
    static _Thread_local struct nep_config config;
    const struct fault_case *wanted = rank->arg;
    const struct nep_transport_ops *ops;
    struct nep_transport_params params = {.topology = &rank->topology,
                                          .bootstrap = &rank->bootstrap,
                                          .config = &config,
                                          .timeout_ns = 60 * NEP_S,
                                          .sink = conformance_sink,
                                          .max_puts = 300};
    struct nep_transport *transport;
    struct window window;
    RANK_CHECK(rank, nep_config_load(&config) == NEP_OK, "%s", nep_last_message());
    if (wanted->body == body_path) { /* "again", too */
        config.verbs_paths = 2;
        config.verbs_split_bytes = 4 << 10;
    }
    config.verbs_qps = wanted->body == body_owner ? 2 : config.verbs_qps;
    config.verbs_revive_ns = 0; /* dead is dead */
    if (wanted->body == body_back) {
        config.verbs_paths = strcmp(wanted->name, "backs") == 0 ? 2 : 1;
        config.verbs_split_bytes = 4 << 10;
        config.verbs_revive_ns = 90 * NEP_S;
    }
    config.verbs_rnr_retry = wanted->body == body_srq ? 1 : config.verbs_rnr_retry;
    RANK_CHECK(rank, nep_transport_find("verbs", &ops, &params.args) == NEP_OK, "no verbs");
    if (strcmp(wanted->name, "refused") == 0) {
        config.verbs_gid = rank->rank; /* 0: link-local; 1: IPv4 */
        return refuse(rank, &params, ops);
    }
    if (strcmp(wanted->name, "again") == 0) {
        return connect_again(rank, &params, ops);
    }
    if (open_two(rank, &params, ops, &transport, &window) != 0) {
        return 1;
    }
    int failed = wanted->body(rank, transport, &window);
    close_two(transport, &window);
    return failed;
}

/* ---- cases without a peer ------------------------------------------------------------------- */

/* The calls and a protection domain of the first device; NULL. */
static struct ibv_pd *first_domain(struct nep_verbs_api *api)
{
    struct ibv_device **list;
    int num;
    if (nep_verbs_api_load(api) != NEP_OK || nep_verbs_api_devices(api, &list, &num) != NEP_OK) {
        return NULL;
    }
    struct ibv_context *context = api->open_device(list[0]);
    return context == NULL ? NULL : api->alloc_pd(context);
}

static int refused_memlock(void)
{
    const struct rlimit limit = {65536, 65536};
    struct nep_verbs_api api;
    struct ibv_pd *pd = first_domain(&api);
    if (pd == NULL || setrlimit(RLIMIT_MEMLOCK, &limit) != 0 || setuid(65534) != 0) {
        return 1;
    }
    size_t bytes = 1 << 20;
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    errno = 0;
    if (memory == MAP_FAILED || api.reg_mr(pd, memory, bytes, IBV_ACCESS_LOCAL_WRITE) != NULL) {
        return 1;
    }
    nep_verbs_register_failed("rxe0", "a window", bytes, errno);
    printf("%s\n", nep_last_message());
    return strstr(nep_last_message(), "may lock 65536 bytes") == NULL;
}

static int refused_dmabuf(void)
{
    struct nep_verbs_api api;
    struct ibv_pd *pd = first_domain(&api);
    int fd = memfd_create("no dma-buf", MFD_CLOEXEC);
    if (pd == NULL || fd < 0 || ftruncate(fd, 4096) != 0 || api.reg_dmabuf_mr == NULL) {
        return 1;
    }
    errno = 0;
    struct ibv_mr *mr = api.reg_dmabuf_mr(pd, 0, 4096, 0, fd, IBV_ACCESS_LOCAL_WRITE);
    printf("Soft-RoCE has no dma-buf, XRC or ODP; dma-buf: %s\n",
           mr == NULL ? strerror(errno) : "registered");
    return mr != NULL || errno == 0;
}

static int cost_of_registering(void)
{
    const size_t bytes = 16 << 20;
    struct nep_verbs_api api;
    struct ibv_pd *pd = first_domain(&api);
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    double ms[5];
    for (int i = 0; i < 5; i++) {
        uint64_t begin_ns = nep_now_ns();
        struct ibv_mr *mr = pd == NULL || memory == MAP_FAILED
                                ? NULL
                                : api.reg_mr(pd, memory, bytes, IBV_ACCESS_LOCAL_WRITE);
        if (mr == NULL) {
            fprintf(stderr, "%s\n", strerror(errno));
            return 1;
        }
        ms[i] = (double)(nep_now_ns() - begin_ns) / 1e6;
        api.dereg_mr(mr);
    }
    printf("registering 16 MiB: %.1f ms untouched, again %.1f %.1f %.1f %.1f\n", ms[0], ms[1],
           ms[2], ms[3], ms[4]);
    return 0;
}

int main(int argc, char **argv)
{
    static const struct fault_case cases[] = {
        {"rkey", body_rkey}, {"slot", body_slot}, {"owner", body_owner}, {"rnr", body_rnr},
        {"srq", body_srq},   {"cut", body_cut},   {"refused", NULL},     {"again", body_path},
        {"port", body_port}, {"path", body_path}, {"gone", body_gone},   {"back", body_back},
        {"backs", body_back}};
    const char *name = argc == 2 ? argv[1] : "";
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (strcmp(name, "memlock") == 0) {
        return refused_memlock();
    }
    if (strcmp(name, "dmabuf") == 0) {
        return refused_dmabuf();
    }
    if (strcmp(name, "registering") == 0) {
        return cost_of_registering();
    }
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        if (strcmp(name, cases[i].name) == 0) {
            uint32_t nodes[2] = {1, 1};
            struct ranks_params params = {
                .ranks_per_node = nodes, .num_nodes = 2, .seconds = 120, .threads = true};
            return ranks_run(&params, run_two, (void *)(uintptr_t)&cases[i]) != 0;
        }
    }
    fprintf(stderr, "usage: verbs_faults "
                    "rkey|slot|owner|rnr|srq|port|path|again|back|backs|gone|cut|refused|memlock|"
                    "dmabuf|registering\n");
    return 2;
}
