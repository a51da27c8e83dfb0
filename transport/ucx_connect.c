/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From nothing to an endpoint per peer, and back. Every rank makes an endpoint to every peer
 * at creation and flushes it, so that an address that cannot be reached is an error of create with
 * the rank's number, not a timeout of the first dispatch. Rejected: connecting at the first put;
 * it saves file descriptors in groups of hundreds, and moves a 1 ms handshake and every network
 * misconfiguration onto the path of the first token.
 *
 * Leaving. A TCP connection that is torn down with data in flight loses it, and a peer that hears
 * nothing but a reset must call this rank dead. So close flushes, says goodbye, flushes again, all
 * within a short bound, and only then closes by force. A peer that does not answer costs the bound
 * once, not each.
 */
#if NEP_HAVE_UCX

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/backoff.h"
#include "base/clock.h"
#include "base/log.h"
#include "transport/bootstrap.h"
#include "transport/ucx.h"

enum { OLDEST_MAJOR = 1, OLDEST_MINOR = 13, MAX_ADDRESS = 1 << 16 };
/* A piece and its headers fit into UCX_TCP_RX_SEG_SIZE, 64 KiB by default. */
enum { TCP_PIECE_BYTES = 56 << 10, MAX_KEEPIDLE = 32767 }; /* seconds, of TCP */
static const uint64_t LEAVE_NS = 1 * NEP_S;

/* ---- context and worker ------------------------------------------------------------------- */

static enum nep_status fail_ucs(const struct nep_ucx *ux, const char *what, ucs_status_t status)
{
    enum nep_status mine = status == UCS_ERR_NO_MEMORY   ? NEP_ERR_NO_MEMORY
                           : status == UCS_ERR_NO_DEVICE ? NEP_ERR_UNSUPPORTED
                                                         : NEP_ERR_IO;
    return nep_fail(mine, "transport ucx, rank %u: %s: %s; `ucx_info -d` lists what UCX finds here",
                    ux->rank, what, ux->lib.ucs_status_string(status));
}

static void config_set(struct nep_ucx *ux, ucp_config_t *config, const char *name,
                       const char *value)
{
    /* The name without the transport is UCX 1.13's, the whole one that of UCX 1.22. */
    ucs_status_t status = ux->lib.ucp_config_modify(config, name + strlen("TCP_"), value);
    if (status != UCS_OK) {
        status = ux->lib.ucp_config_modify(config, name, value);
    }
    if (status != UCS_OK) {
        nep_info("transport ucx: UCX %s did not take UCX_%s=%s: %s",
                 ux->lib.ucp_get_version_string(), name, value, ux->lib.ucs_status_string(status));
    }
}

/*
 * Over TCP every piece is sent "short": written to the socket, what does not fit is copied. The
 * default leaves all above 8 KiB to zero-copy sends, which UCX 1.13 may complete twice when the
 * connection is reset meanwhile, and then ends the process by an assertion (found by killing ranks,
 * tests/multi/test_ucx.c). An idle connection is probed after the timeout only: UCX's own 16 s are
 * within what a starved host may be silent, and peer_status (ucx.c) judges that.
 */
static void config_adapt(struct nep_ucx *ux, ucp_config_t *config)
{
    char idle[32];
    uint64_t seconds = ux->params.timeout_ns / NEP_S + 1;
    snprintf(idle, sizeof idle, "%us",
             (unsigned)(seconds < 10             ? 10
                        : seconds > MAX_KEEPIDLE ? MAX_KEEPIDLE
                                                 : seconds));
    config_set(ux, config, "TCP_TX_SEG_SIZE", "64k");
    config_set(ux, config, "TCP_KEEPIDLE", idle);
}

static enum nep_status context_open(struct nep_ucx *ux)
{
    ucp_config_t *config;
    ucs_status_t status = ux->lib.ucp_config_read(NULL, NULL, &config);
    if (status != UCS_OK) {
        return fail_ucs(ux, "reading UCX's configuration", status);
    }
    config_adapt(ux, config);
    ucp_params_t params = {
        .field_mask =
            UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_ESTIMATED_NUM_EPS | UCP_PARAM_FIELD_NAME,
        .features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP,
        .estimated_num_eps = ux->num_ranks,
        .name = "nearep",
    };
    status = ux->lib.ucp_init_version(OLDEST_MAJOR, OLDEST_MINOR, &params, config, &ux->context);
    ux->lib.ucp_config_release(config);
    if (status != UCS_OK) {
        ux->context = NULL;
        return fail_ucs(ux, "ucp_init", status);
    }
    return NEP_OK;
}

static enum nep_status worker_check(struct nep_ucx *ux)
{
    ucp_worker_attr_t attr = {.field_mask = UCP_WORKER_ATTR_FIELD_THREAD_MODE |
                                            UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER};
    ucs_status_t status = ux->lib.ucp_worker_query(ux->worker, &attr);
    if (status != UCS_OK) {
        return fail_ucs(ux, "ucp_worker_query", status);
    }
    if (attr.thread_mode == UCS_THREAD_MODE_SINGLE) {
        return nep_fail(
            NEP_ERR_UNSUPPORTED,
            "transport ucx: this UCX grants thread mode SINGLE only, and puts come from "
            "several threads");
    }
    if (attr.max_am_header < sizeof(struct nep_ucx_header)) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "transport ucx: headers of active messages hold %zu bytes, %zu are needed",
                        attr.max_am_header, sizeof(struct nep_ucx_header));
    }
    return NEP_OK;
}

enum nep_status nep_ucx_worker_open(struct nep_ucx *ux)
{
    enum nep_status result = context_open(ux);
    if (result != NEP_OK) {
        return result;
    }
    ucp_worker_params_t params = {
        .field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE | UCP_WORKER_PARAM_FIELD_FLAGS,
        .thread_mode = UCS_THREAD_MODE_SERIALIZED,
        .flags = UCP_WORKER_FLAG_IGNORE_REQUEST_LEAK, /* of peers that died during a rendezvous */
    };
    ucs_status_t status = ux->lib.ucp_worker_create(ux->context, &params, &ux->worker);
    if (status != UCS_OK) {
        ux->worker = NULL;
        return fail_ucs(ux, "ucp_worker_create", status);
    }
    result = worker_check(ux);
    if (result != NEP_OK) {
        return result;
    }
    status = ux->lib.ucp_worker_get_efd(ux->worker, &ux->worker_fd);
    if (status != UCS_OK) {
        return fail_ucs(ux, "no event file of the worker", status);
    }
    status = ux->lib.ucp_worker_get_address(ux->worker, &ux->address, &ux->address_len);
    if (status != UCS_OK || ux->address_len > MAX_ADDRESS) {
        return fail_ucs(ux, "no usable address of the worker", status);
    }
    ux->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (ux->wake_fd < 0) {
        return nep_fail(NEP_ERR_IO, "transport ucx: eventfd: %s", strerror(errno));
    }
    return nep_ucx_handlers_set(ux);
}

void nep_ucx_worker_close(struct nep_ucx *ux)
{
    if (ux->address != NULL) {
        ux->lib.ucp_worker_release_address(ux->worker, ux->address);
    }
    if (ux->worker != NULL) {
        ux->lib.ucp_worker_destroy(ux->worker);
    }
    if (ux->context != NULL) {
        ux->lib.ucp_cleanup(ux->context);
    }
    if (ux->wake_fd >= 0) {
        close(ux->wake_fd);
    }
}

/* ---- endpoints ---------------------------------------------------------------------------- */

static void on_failure(void *arg, ucp_ep_h ep, ucs_status_t status)
{
    (void)ep;
    nep_ucx_connection_fail(arg, status);
}

static enum nep_status endpoint_open(struct nep_ucx *ux, struct nep_ucx_peer *peer, int which,
                                     const void *address)
{
    ucp_ep_params_t params = {
        .field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER,
        .address = address,
        .err_mode = UCP_ERR_HANDLING_MODE_PEER,
        .err_handler = {.cb = on_failure, .arg = peer},
    };
    ucs_status_t status = ux->lib.ucp_ep_create(ux->worker, &params, &peer->eps[which]);
    if (status != UCS_OK) {
        peer->eps[which] = NULL;
        return nep_fail(NEP_ERR_IO, "transport ucx: rank %u found no way to rank %u: %s", ux->rank,
                        peer->rank, ux->lib.ucs_status_string(status));
    }
    peer->word = (struct nep_ucx_header){
        .pass = peer->pass_to, .src = ux->rank, .num_pieces = (uint32_t)which + 1};
    atomic_store(&peer->heard_ns, nep_now_ns());
    atomic_store(&peer->state, NEP_UCX_ALIVE);
    return NEP_OK;
}

/*
 * Flushes all endpoints, until the deadline. status[NEP_UCX_EPS * i + e] becomes what UCX says of
 * endpoint e of peer i: UCS_INPROGRESS where it did not finish.
 */
static void flush_all(struct nep_ucx *ux, uint64_t timeout_ns, void **requests,
                      ucs_status_t *status)
{
    ucp_request_param_t none = {0};
    uint32_t num_open = 0, num = NEP_UCX_EPS * ux->num_ranks;
    for (uint32_t i = 0; i < num; i++) {
        struct nep_ucx_peer *peer = &ux->peers[i / NEP_UCX_EPS];
        ucp_ep_h ep = peer->close_ep ? NULL : peer->eps[i % NEP_UCX_EPS];
        requests[i] = ep != NULL ? ux->lib.ucp_ep_flush_nbx(ep, &none) : NULL;
        status[i] = UCS_PTR_IS_PTR(requests[i]) ? UCS_INPROGRESS : UCS_PTR_STATUS(requests[i]);
        num_open += UCS_PTR_IS_PTR(requests[i]);
    }
    struct nep_backoff backoff;
    nep_backoff_init(&backoff, timeout_ns, 0);
    uint64_t deadline_ns = nep_deadline_ns(timeout_ns); /* also while other things move */
    do {
        if (nep_ucx_pump(ux) != 0) {
            nep_backoff_reset(&backoff);
        }
        for (uint32_t i = 0; i < num; i++) {
            if (status[i] == UCS_INPROGRESS) {
                status[i] = ux->lib.ucp_request_check_status(requests[i]);
                num_open -= status[i] != UCS_INPROGRESS;
            }
        }
    } while (num_open != 0 && nep_now_ns() < deadline_ns && nep_backoff_pause(&backoff));
    for (uint32_t i = 0; i < num; i++) {
        if (UCS_PTR_IS_PTR(requests[i])) {
            ux->lib.ucp_request_free(requests[i]);
        }
    }
}

/*
 * What carries active messages to the peer, in UCX's own words: "tcp/eth0". UCX 1.13 tells that
 * only in a text for people; where the text is not as expected the answer is "", and puts go whole.
 */
static void find_carrier(struct nep_ucx *ux, struct nep_ucx_peer *peer, char *name, size_t cap)
{
    char *text = NULL;
    size_t len = 0;
    FILE *out = open_memstream(&text, &len);
    name[0] = '\0';
    if (out == NULL) {
        return;
    }
    ux->lib.ucp_ep_print_info(peer->eps[NEP_UCX_BULK], out);
    if (fclose(out) != 0) {
        free(text);
        return;
    }
    /* "#  lane[0]:  1:tcp/eth0.0 md[0]  -> md[0]/tcp/sysdev[255] am am_bw#0 keepalive wireup" */
    char *rest = text;
    for (char *line; (line = strsep(&rest, "\n")) != NULL;) {
        char *lane = strstr(line, "lane[");
        char *colon = lane != NULL && strstr(lane, " am ") != NULL ? strchr(lane, ':') : NULL;
        colon = colon != NULL ? strchr(colon + 1, ':') : NULL;
        if (colon != NULL) {
            snprintf(name, cap, "%.*s", (int)strcspn(colon + 1, " "), colon + 1);
            break;
        }
    }
    free(text);
}

static void choose_pieces(struct nep_ucx *ux)
{
    for (uint32_t i = 0; i < ux->num_ranks; i++) {
        struct nep_ucx_peer *peer = &ux->peers[i];
        char carrier[64];
        if (peer->eps[NEP_UCX_BULK] == NULL) {
            continue;
        }
        find_carrier(ux, peer, carrier, sizeof carrier);
        peer->piece_bytes = strncmp(carrier, "tcp/", 4) == 0 ? TCP_PIECE_BYTES : UINT32_MAX;
        nep_debug("transport ucx: rank %u reaches rank %u over %s", ux->rank, i,
                  carrier[0] != '\0' ? carrier : "something that UCX does not name");
    }
}

/* Waits until every endpoint works. */
static enum nep_status flush_peers(struct nep_ucx *ux, uint64_t deadline_ns, void **requests,
                                   ucs_status_t *flushed)
{
    flush_all(ux, nep_left_ns(deadline_ns), requests, flushed);
    for (uint32_t i = 0; i < NEP_UCX_EPS * ux->num_ranks; i++) {
        if (flushed[i] != UCS_OK) {
            return nep_fail(flushed[i] == UCS_INPROGRESS ? NEP_ERR_TIMEOUT : NEP_ERR_IO,
                            "transport ucx: rank %u could not connect to rank %u: %s (UCX_TLS and "
                            "UCX_NET_DEVICES narrow what UCX tries)",
                            ux->rank, i / NEP_UCX_EPS, ux->lib.ucs_status_string(flushed[i]));
        }
    }
    return NEP_OK;
}

static enum nep_status connect_peers(struct nep_ucx *ux, const char *addresses, size_t stride,
                                     void **requests, ucs_status_t *flushed)
{
    const struct nep_topology *topology = ux->params.topology;
    for (uint32_t i = 0; i < ux->num_ranks; i++) {
        ux->peers[i].ux = ux;
        ux->peers[i].rank = i;
    }
    enum nep_status result = NEP_OK;
    uint64_t deadline_ns = nep_deadline_ns(ux->params.timeout_ns);
    for (int e = NEP_UCX_BULK; result == NEP_OK && e < NEP_UCX_EPS; e++) {
        for (uint32_t i = 0; result == NEP_OK && i < ux->num_ranks; i++) {
            bool here = topology->node_of_rank[i] == topology->node;
            bool is_cut = ux->peers[i].piece_bytes != UINT32_MAX; /* known of BULK */
            if (i != ux->rank && !(ux->params.node_only && !here) &&
                (e == NEP_UCX_BULK || is_cut)) {
                result = endpoint_open(ux, &ux->peers[i], e, addresses + i * stride);
            }
        }
        if (result == NEP_OK) {
            result = flush_peers(ux, deadline_ns, requests, flushed);
        }
        if (result == NEP_OK && e == NEP_UCX_BULK) {
            choose_pieces(ux);
        }
    }
    return result;
}

struct hello {
    uint32_t address_len;
    uint8_t key[NEP_UCX_KEY_BYTES];
};

/* What a rank says of itself before its address: checked, and taken. *stride_p: the longest. */
static enum nep_status take_hellos(struct nep_ucx *ux, const struct nep_ucx_keys *keys,
                                   const struct hello *hellos, size_t *stride_p)
{
    enum nep_status result = NEP_OK;
    *stride_p = 0;
    for (uint32_t i = 0; result == NEP_OK && i < ux->num_ranks; i++) {
        if (hellos[i].address_len == 0 || hellos[i].address_len > MAX_ADDRESS) {
            return nep_fail(NEP_ERR_MISMATCH, "rank %u announced a ucx address of %u bytes", i,
                            hellos[i].address_len);
        }
        *stride_p = hellos[i].address_len > *stride_p ? hellos[i].address_len : *stride_p;
        if (i != ux->rank) {
            result = nep_ucx_pass_agree(ux, keys, i, hellos[i].key);
        }
    }
    return result;
}

/* Gathers all addresses, each in a place of *stride_p bytes. */
static enum nep_status gather_addresses(struct nep_ucx *ux, char **addresses_p, size_t *stride_p)
{
    struct hello mine = {.address_len = (uint32_t)ux->address_len};
    struct nep_ucx_keys keys;
    struct hello *hellos = calloc(ux->num_ranks, sizeof *hellos);
    enum nep_status result =
        hellos != NULL
            ? nep_ucx_keys_make(&keys)
            : nep_fail(NEP_ERR_NO_MEMORY, "transport ucx: no memory for %u ranks", ux->num_ranks);
    if (result != NEP_OK) {
        free(hellos);
        return result;
    }
    memcpy(mine.key, keys.open, sizeof mine.key);
    result = nep_bootstrap_allgather(ux->params.bootstrap, &mine, hellos, sizeof mine,
                                     ux->params.timeout_ns, "ucx address lengths");
    size_t stride = 0;
    if (result == NEP_OK) {
        result = take_hellos(ux, &keys, hellos, &stride);
    }
    nep_ucx_keys_forget(&keys);
    free(hellos);
    if (result != NEP_OK) {
        return result;
    }
    char *own = calloc(1, stride);
    char *all = calloc(ux->num_ranks, stride);
    if (own == NULL || all == NULL) {
        result =
            nep_fail(NEP_ERR_NO_MEMORY, "transport ucx: no memory for %u addresses", ux->num_ranks);
    } else {
        memcpy(own, ux->address, ux->address_len);
        result = nep_bootstrap_allgather(ux->params.bootstrap, own, all, stride,
                                         ux->params.timeout_ns, "ucx addresses");
    }
    free(own);
    if (result != NEP_OK) {
        free(all);
        return result;
    }
    *addresses_p = all;
    *stride_p = stride;
    return NEP_OK;
}

enum nep_status nep_ucx_connect(struct nep_ucx *ux)
{
    char *addresses = NULL;
    size_t stride = 0;
    enum nep_status result = gather_addresses(ux, &addresses, &stride);
    if (result != NEP_OK) {
        return result;
    }
    void **requests = calloc((size_t)NEP_UCX_EPS * ux->num_ranks, sizeof *requests);
    ucs_status_t *flushed = calloc((size_t)NEP_UCX_EPS * ux->num_ranks, sizeof *flushed);
    if (requests != NULL && flushed != NULL) {
        result = connect_peers(ux, addresses, stride, requests, flushed);
    } else {
        result =
            nep_fail(NEP_ERR_NO_MEMORY, "transport ucx: no memory for %u peers", ux->num_ranks);
    }
    free(requests);
    free(flushed);
    free(addresses);
    return result;
}

/* ---- leaving ------------------------------------------------------------------------------ */

/* On each connection: it says that nothing more comes on this one. */
static void say_goodbye(struct nep_ucx *ux)
{
    ucp_request_param_t none = {0};
    for (uint32_t i = 0; i < NEP_UCX_EPS * ux->num_ranks; i++) {
        struct nep_ucx_peer *peer = &ux->peers[i / NEP_UCX_EPS];
        ucp_ep_h ep = peer->close_ep ? NULL : peer->eps[i % NEP_UCX_EPS];
        if (ep == NULL) {
            continue;
        }
        void *request = ux->lib.ucp_am_send_nbx(ep, NEP_UCX_AM_LEAVE, &peer->word,
                                                sizeof peer->word, NULL, 0, &none);
        if (UCS_PTR_IS_PTR(request)) {
            ux->lib.ucp_request_free(request);
        }
    }
}

void nep_ucx_leave(struct nep_ucx *ux)
{
    uint64_t half_ns = ux->params.timeout_ns / 2;
    uint64_t deadline_ns = nep_deadline_ns(half_ns < LEAVE_NS ? half_ns : LEAVE_NS);
    void **requests = calloc((size_t)NEP_UCX_EPS * ux->num_ranks, sizeof *requests);
    ucs_status_t *flushed = calloc((size_t)NEP_UCX_EPS * ux->num_ranks, sizeof *flushed);
    nep_ucx_hold(ux);
    if (requests != NULL && flushed != NULL) {
        nep_ucx_pump(ux);
        flush_all(ux, nep_left_ns(deadline_ns), requests, flushed);
        say_goodbye(ux);
        flush_all(ux, nep_left_ns(deadline_ns), requests, flushed);
    }
    for (uint32_t i = 0; i < ux->num_ranks; i++) {
        struct nep_ucx_peer *peer = &ux->peers[i];
        if (nep_ucx_peer_is_open(peer)) {
            peer->close_ep = true;
            ux->num_to_close++;
        }
    }
    nep_ucx_close_failed(ux);
    /* Closing by force completes at once what was in flight; a few rounds deliver that. */
    for (int i = 0; i < 1000 && nep_ucx_pump(ux) != 0; i++) {
    }
    nep_ucx_release(ux);
    free(requests);
    free(flushed);
}

#endif
