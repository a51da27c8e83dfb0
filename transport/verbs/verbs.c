/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The verbs transport: reliable connections, WRITE_WITH_IMM, shared receive queues. See verbs.h for
 * its parts and docs/verbs.md for its promises.
 *
 * Closing: a rank that has all it needs may close while its last puts are on their way to others,
 * and destroying a QP would take them back. So close waits, bounded by the devices' own retry
 * budget, until they are acknowledged, and says farewell, so that those who stay do not report a
 * lost peer.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/bootstrap.h"
#include "transport/verbs/verbs.h"

extern const struct nep_transport_ops nep_verbs_ops;

uint64_t nep_verbs_budget_ns(const struct nep_config *config)
{
    uint32_t retry = config->verbs_retry;
    return (4096ull << config->verbs_ack_timeout) * (retry + 1);
}

uint64_t nep_verbs_patience_ns(const struct nep_config *config)
{
    uint64_t patience_ns = nep_verbs_budget_ns(config) * 2 + 100 * NEP_MS;
    return patience_ns < 5 * NEP_S ? patience_ns : 5 * NEP_S;
}

static enum nep_status check_config(const struct nep_config *config)
{
    const struct {
        const char *name;
        uint32_t value, least, most;
    } ranges[] = {
        {"NEP_VERBS_PATHS", config->verbs_paths, 1, NEP_VERBS_MAX_PATHS},
        {"NEP_VERBS_QPS", config->verbs_qps, 1, 8},
        {"NEP_VERBS_PATHS times NEP_VERBS_QPS", config->verbs_paths * config->verbs_qps, 1,
         NEP_VERBS_MAX_QPS},
        {"NEP_VERBS_SL", config->verbs_sl, 0, 15},
        {"NEP_VERBS_TC", config->verbs_tc, 0, 255},
        {"NEP_VERBS_ACK_TIMEOUT", config->verbs_ack_timeout, 1, 31},
        {"NEP_VERBS_RETRY", config->verbs_retry, 0, 7},
        {"NEP_VERBS_RNR_RETRY", config->verbs_rnr_retry, 0, 7},
        {"NEP_VERBS_DEPTH", config->verbs_depth, 8, 16384},
        {"NEP_VERBS_MTU", config->verbs_mtu == UINT32_MAX ? 4096 : config->verbs_mtu, 256, 4096},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++) {
        if (ranges[i].value < ranges[i].least || ranges[i].value > ranges[i].most) {
            return nep_fail(NEP_ERR_INVALID, "verbs: %s is %u, must be %u to %u", ranges[i].name,
                            ranges[i].value, ranges[i].least, ranges[i].most);
        }
    }
    if (config->verbs_chunk_bytes < 4096 || config->verbs_chunk_bytes % 4096 != 0) {
        return nep_fail(NEP_ERR_INVALID,
                        "verbs: NEP_VERBS_CHUNK is %llu, must be a multiple of "
                        "4096",
                        (unsigned long long)config->verbs_chunk_bytes);
    }
    return NEP_OK;
}

static enum nep_status verbs_probe(const struct nep_config *config)
{
    struct nep_verbs_api api;
    struct nep_verbs_port *ports;
    uint32_t num_ports;
    enum nep_status status = check_config(config);
    if (status == NEP_OK) {
        status = nep_verbs_api_load(&api);
    }
    if (status != NEP_OK) {
        return status;
    }
    const char *wanted = config->verbs_devices;
    bool is_file = wanted[0] == '/' || wanted[0] == '.';
    status = nep_verbs_ports_list(&api, is_file ? "auto" : wanted, &ports, &num_ports);
    if (status == NEP_OK) {
        free(ports);
    }
    nep_verbs_api_unload(&api);
    return status;
}

/* ---- closing -------------------------------------------------------------------------------- */

static bool is_quiet(struct nep_verbs *verbs, struct nep_verbs_peer *peer)
{
    if (peer->qps == NULL || atomic_load(&peer->status) != NEP_OK || atomic_load(&peer->has_left)) {
        return true;
    }
    pthread_mutex_lock(&peer->lock);
    bool quiet = peer->posted == peer->next && peer->num_resend == 0;
    for (uint32_t q = 0; q < verbs->num_qps; q++) {
        quiet = quiet && (peer->qps[q].is_dead || peer->qps[q].posted == peer->qps[q].done);
    }
    pthread_mutex_unlock(&peer->lock);
    return quiet;
}

static void wait_quiet(struct nep_verbs *verbs, uint64_t deadline_ns)
{
    for (uint32_t r = 0; r < verbs->num_ranks; r++) {
        while (!is_quiet(verbs, &verbs->peers[r])) {
            if (nep_left_ns(deadline_ns) == 0) {
                nep_info("verbs: closed with messages to rank %u not acknowledged", r);
                return;
            }
            nep_verbs_progress(&verbs->transport);
            usleep(100);
        }
    }
}

static void say_farewell(struct nep_verbs *verbs)
{
    uint64_t deadline_ns = nep_deadline_ns(nep_verbs_patience_ns(verbs->params.config));
    wait_quiet(verbs, deadline_ns);
    for (uint32_t r = 0; r < verbs->num_ranks; r++) {
        struct nep_verbs_peer *peer = &verbs->peers[r];
        pthread_mutex_lock(&peer->lock);
        if (peer->qps != NULL && atomic_load(&peer->status) == NEP_OK &&
            !atomic_load(&peer->has_left)) {
            nep_verbs_peer_leave(verbs, peer);
        }
        pthread_mutex_unlock(&peer->lock);
    }
    wait_quiet(verbs, deadline_ns);
}

static void destroy(struct nep_verbs *verbs)
{
    nep_verbs_progress_stop(verbs);
    for (uint32_t w = 0; w < NEP_VERBS_MAX_WINDOWS; w++) {
        nep_verbs_gates_unbind(verbs, &verbs->windows[w]);
        nep_grants_free(&verbs->grants[w]);
    }
    nep_verbs_disconnect(verbs);
    for (uint32_t w = 0; w < NEP_VERBS_MAX_WINDOWS; w++) {
        nep_verbs_window_release(verbs, w);
    }
    for (uint32_t p = 0; p < verbs->num_paths; p++) {
        nep_verbs_path_close(verbs, &verbs->paths[p]);
    }
    for (uint32_t r = 0; verbs->peers != NULL && r < verbs->num_ranks; r++) {
        for (uint32_t n = 0; n <= NEP_VERBS_MAX_QPS; n++) {
            free(verbs->peers[r].parts[n].partials);
        }
        free(verbs->peers[r].ring);
        pthread_mutex_destroy(&verbs->peers[r].lock);
    }
    free(verbs->peers);
    pthread_mutex_destroy(&verbs->poll_lock);
    nep_verbs_api_unload(&verbs->api);
    free(verbs);
}

/* ---- creation ------------------------------------------------------------------------------- */

static enum nep_status make_peers(struct nep_verbs *verbs)
{
    const struct nep_topology *topology = verbs->params.topology;
    verbs->peers = calloc(verbs->num_ranks, sizeof *verbs->peers);
    if (verbs->peers == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for %u ranks", verbs->num_ranks);
    }
    for (uint32_t r = 0; r < verbs->num_ranks; r++) {
        struct nep_verbs_peer *peer = &verbs->peers[r];
        pthread_mutex_init(&peer->lock, NULL);
        peer->rank = r;
        peer->ask_fd = -1;
        peer->is_served =
            r != verbs->rank && (!verbs->params.node_only ||
                                 topology->node_of_rank[r] == topology->node_of_rank[verbs->rank]);
        atomic_init(&peer->last_heard_ns, nep_now_ns());
    }
    return NEP_OK;
}

static enum nep_status open_paths(struct nep_verbs *verbs)
{
    enum nep_status status = NEP_OK;
    verbs->has_bound_windows = true;
    for (uint32_t p = 0; status == NEP_OK && p < verbs->num_paths; p++) {
        status = nep_verbs_path_open(verbs, &verbs->paths[p]);
        verbs->has_bound_windows &= verbs->paths[p].has_bound_windows;
    }
    return status;
}

static void print_choice(const struct nep_verbs *verbs)
{
    for (uint32_t p = 0; p < verbs->num_paths; p++) {
        const struct nep_verbs_path *path = &verbs->paths[p];
        char text[48] = "";
        enum nep_verbs_gid_kind kind = NEP_VERBS_GID_NUM_KINDS;
        if (nep_verbs_gid_agree(&path->gids, &path->gids, &kind) == NEP_OK) {
            nep_verbs_gid_text(path->gids.raw[kind], text);
        }
        nep_info("verbs: rank %u path %u: %s port %u (NUMA node %d), %s %s, MTU %u, %u receives, "
                 "%u completions, send queues of %u",
                 verbs->rank, p, path->device, path->port, path->numa,
                 nep_verbs_gid_kind_name(kind), text, 128u << path->port_attr.active_mtu,
                 path->srq_depth, path->cq_depth, verbs->depth);
    }
}

/* All that is this rank's alone, up to devices open; then everybody's result is compared. */
static enum nep_status set_up(struct nep_verbs *verbs)
{
    enum nep_status status = nep_verbs_paths_choose(verbs);
    if (status != NEP_OK) {
        return status;
    }
    status = open_paths(verbs);
    status = nep_bootstrap_common(verbs->params.bootstrap, verbs->rank, verbs->num_ranks, status,
                                  verbs->params.timeout_ns);
    if (status == NEP_OK) {
        status = nep_verbs_connect(verbs);
    }
    if (status == NEP_OK) {
        nep_verbs_door_try(verbs);
        status = nep_bootstrap_common(verbs->params.bootstrap, verbs->rank, verbs->num_ranks,
                                      nep_verbs_progress_start(verbs), verbs->params.timeout_ns);
    }
    if (status == NEP_OK) {
        print_choice(verbs);
    }
    return status;
}

enum nep_status nep_verbs_create_with(const struct nep_verbs_api *api,
                                      const struct nep_transport_params *params,
                                      struct nep_transport **transport_p)
{
    const struct nep_config *config = params->config;
    struct nep_verbs *verbs = calloc(1, sizeof *verbs);
    if (verbs == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for the transport");
    }
    verbs->transport.ops = &nep_verbs_ops;
    verbs->params = *params;
    verbs->api = *api;
    verbs->rank = params->topology->rank;
    verbs->num_ranks = params->topology->num_ranks;
    verbs->num_paths = config->verbs_paths;
    verbs->num_qps = config->verbs_paths * config->verbs_qps;
    verbs->depth = config->verbs_depth;
    verbs->max_message_bytes = UINT32_MAX;
    verbs->wake_fd = verbs->try_fd = -1;
    for (uint32_t i = 0; i + 1 < NEP_VERBS_REFILL; i++) {
        verbs->receives[i].next = &verbs->receives[i + 1];
    }
    if (getrandom(&verbs->key, sizeof verbs->key, 0) != sizeof verbs->key) {
        verbs->key = nep_now_ns() << 16 ^ (uint64_t)getpid(); /* unlike that of other runs */
    }
    pthread_mutex_init(&verbs->poll_lock, NULL);
    enum nep_status status = check_config(config);
    if (status != NEP_OK) {
        verbs->num_paths = 0;
    } else {
        status = make_peers(verbs);
    }
    const struct nep_agree_field fields[] = {{"NEP_VERBS_PATHS", config->verbs_paths},
                                             {"NEP_VERBS_QPS", config->verbs_qps},
                                             {"NEP_VERBS_CHUNK", config->verbs_chunk_bytes}};
    status = nep_bootstrap_common(params->bootstrap, verbs->rank, verbs->num_ranks, status,
                                  params->timeout_ns);
    if (status == NEP_OK) {
        status = nep_bootstrap_agree(params->bootstrap, verbs->num_ranks, "verbs", fields,
                                     sizeof fields / sizeof fields[0], params->timeout_ns);
    }
    if (status == NEP_OK) {
        status = set_up(verbs);
    }
    if (status != NEP_OK) {
        destroy(verbs);
        return status;
    }
    *transport_p = &verbs->transport;
    return NEP_OK;
}

static enum nep_status verbs_create(const struct nep_transport_params *params,
                                    struct nep_transport **transport_p)
{
    struct nep_verbs_api api = {0};
    enum nep_status status = nep_verbs_api_load(&api);
    /* A rank without the library says so to those that have it. */
    status = nep_bootstrap_common(params->bootstrap, params->topology->rank,
                                  params->topology->num_ranks, status, params->timeout_ns);
    if (status == NEP_OK) {
        return nep_verbs_create_with(&api, params, transport_p);
    }
    nep_verbs_api_unload(&api);
    return status;
}

/* Nobody's memory is mapped but the own. */
static void *verbs_peer_window(struct nep_transport *transport, uint32_t window, uint32_t rank)
{
    struct nep_verbs *verbs = (struct nep_verbs *)transport;
    return window < NEP_VERBS_MAX_WINDOWS && rank == verbs->rank ? verbs->windows[window].base
                                                                 : NULL;
}

static void verbs_stats(struct nep_transport *transport, struct nep_transport_stats *stats)
{
    struct nep_verbs *verbs = (struct nep_verbs *)transport;
    stats->puts = stats->put_bytes = stats->work_requests = 0;
    for (uint32_t r = 0; r < verbs->num_ranks; r++) {
        struct nep_verbs_peer *peer = &verbs->peers[r];
        pthread_mutex_lock(&peer->lock);
        stats->puts += peer->next;
        stats->put_bytes += peer->put_bytes;
        stats->work_requests += peer->num_requests;
        pthread_mutex_unlock(&peer->lock);
    }
    stats->arrivals = atomic_load(&verbs->arrivals);
    stats->retries = atomic_load(&verbs->retries);
    stats->refused = atomic_load(&verbs->stale);
}

static void verbs_close(struct nep_transport *transport)
{
    struct nep_verbs *verbs = (struct nep_verbs *)transport;
    struct nep_transport_stats stats;
    say_farewell(verbs);
    verbs_stats(transport, &stats);
    nep_info("verbs: rank %u sent %llu puts of %llu bytes in all as %llu requests, %llu again; "
             "%llu arrived, %llu came too late; %llu QPs came back",
             verbs->rank, (unsigned long long)stats.puts, (unsigned long long)stats.put_bytes,
             (unsigned long long)stats.work_requests, (unsigned long long)stats.retries,
             (unsigned long long)stats.arrivals, (unsigned long long)stats.refused,
             (unsigned long long)atomic_load(&verbs->revivals));
    destroy(verbs);
}

const struct nep_transport_ops nep_verbs_ops = {
    .name = "verbs",
    .caps = NEP_CAP_FABRIC | NEP_CAP_THREAD | NEP_CAP_SILENT,
    .probe = verbs_probe,
    .create = verbs_create,
    .close = verbs_close,
    .window_create = nep_verbs_window_create,
    .window_grant = nep_verbs_window_grant,
    .window_destroy = nep_verbs_window_destroy,
    .window_retire = nep_unsupported_window_retire,
    .peer_window = verbs_peer_window,
    .put = nep_verbs_put,
    .progress = nep_verbs_progress,
    .completed = nep_verbs_completed,
    .peer_status = nep_verbs_peer_status,
    .abandon = nep_verbs_abandon,
    .stats = verbs_stats,
};
