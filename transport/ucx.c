/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Transport `ucx`: the fabric between nodes over whatever UCX finds, TCP at least. Here are the
 * operations table, windows and the status of peers; ucx.h names the other files.
 *
 * Callers number windows and use a number again after a window is gone; each put carries how often
 * its number was made (`life`), so that a late one for an old window is refused, not written into
 * the new one.
 */
#include "transport/transport.h"

#if NEP_HAVE_UCX

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/backoff.h"
#include "base/clock.h"
#include "base/log.h"
#include "transport/bootstrap.h"
#include "transport/ucx.h"

enum { SILENT_BEATS = 4 };
static const uint64_t SILENT_NS = 5 * NEP_S;

static enum nep_status probe(const struct nep_config *config)
{
    (void)config;
    struct nep_ucx_lib lib;
    enum nep_status status = nep_ucx_lib_open(&lib);
    if (status == NEP_OK) {
        nep_debug("transport ucx: UCX %s", lib.ucp_get_version_string());
        nep_ucx_lib_close(&lib);
    }
    return status;
}

static void partials_free(struct nep_ucx_partial *partial)
{
    while (partial != NULL) {
        struct nep_ucx_partial *next = partial->next;
        free(partial);
        partial = next;
    }
}

static void ux_free(struct nep_ucx *ux)
{
    for (struct nep_ucx_block *block = ux->blocks; block != NULL;) {
        struct nep_ucx_block *next = block->next;
        free(block);
        block = next;
    }
    for (struct nep_ucx_recv *recv = ux->recvs; recv != NULL;) {
        struct nep_ucx_recv *next = recv->next_made;
        free(recv);
        recv = next;
    }
    for (struct nep_ucx_piece *piece = ux->pieces; piece != NULL;) {
        struct nep_ucx_piece *next = piece->next_made;
        free(piece);
        piece = next;
    }
    partials_free(ux->unused_partials);
    for (uint32_t i = 0; i < ux->num_ranks; i++) {
        partials_free(ux->peers[i].partials);
    }
    for (int i = 0; i < NEP_UCX_WINDOWS; i++) {
        free(ux->windows[i].bytes);
        nep_grants_free(&ux->windows[i].grants);
        nep_grants_free(&ux->windows[i].next_grants);
    }
    pthread_mutex_destroy(&ux->queue_lock);
    free(ux->peers);
    free(ux);
}

static void transport_close(struct nep_transport *transport)
{
    struct nep_ucx *ux = (struct nep_ucx *)transport;
    if (ux == NULL) {
        return;
    }
    if (ux->pid != (int)getpid()) {
        ux_free(ux); /* in a fork()ed child the connections are the parent's */
        return;
    }
    nep_ucx_thread_stop(ux);
    if (ux->worker != NULL) {
        nep_ucx_leave(ux);
    }
    for (uint32_t i = 0; i < NEP_UCX_WINDOWS; i++) {
        if (ux->windows[i].memory != NULL) {
            ux->lib.ucp_mem_unmap(ux->context, ux->windows[i].memory);
        }
    }
    nep_ucx_worker_close(ux);
    nep_ucx_lib_close(&ux->lib);
    ux_free(ux);
}

static enum nep_status ux_alloc(const struct nep_transport_params *params, struct nep_ucx **ux_p)
{
    struct nep_ucx *ux = calloc(1, sizeof *ux);
    struct nep_ucx_peer *peers = calloc(params->topology->num_ranks, sizeof *peers);
    if (ux == NULL || peers == NULL) {
        free(ux);
        free(peers);
        return nep_fail(NEP_ERR_NO_MEMORY, "transport ucx: no memory for %u ranks",
                        params->topology->num_ranks);
    }
    ux->params = *params;
    ux->rank = params->topology->rank;
    ux->num_ranks = params->topology->num_ranks;
    ux->peers = peers;
    ux->pid = (int)getpid();
    ux->wake_fd = -1;
    ux->beat_ns = UINT64_MAX;
    pthread_mutex_init(&ux->queue_lock, NULL);
    *ux_p = ux;
    return NEP_OK;
}

extern const struct nep_transport_ops nep_ucx_ops;

static enum nep_status transport_create(const struct nep_transport_params *params,
                                        struct nep_transport **transport_p)
{
    struct nep_ucx *ux = NULL;
    enum nep_status status = ux_alloc(params, &ux);
    if (status == NEP_OK) {
        ux->transport.ops = &nep_ucx_ops;
        status = nep_ucx_lib_open(&ux->lib);
    }
    if (status == NEP_OK) {
        status = nep_ucx_worker_open(ux);
    }
    /* From here on every rank takes part in every exchange, whatever became of it. */
    status = nep_bootstrap_common(params->bootstrap, params->topology->rank,
                                  params->topology->num_ranks, status, params->timeout_ns);
    if (status == NEP_OK) {
        status = nep_ucx_connect(ux);
        /* Who could not connect has waited for a whole timeout: the others are told, and whoever
         * did not answer is not waited for once more. */
        uint64_t timeout_ns = status == NEP_OK ? params->timeout_ns : params->timeout_ns / 4;
        if (status == NEP_OK) {
            ux->beat_ns = nep_now_ns();
            status = nep_ucx_thread_start(ux);
        }
        status =
            nep_bootstrap_common(params->bootstrap, ux->rank, ux->num_ranks, status, timeout_ns);
    }
    if (status != NEP_OK) {
        transport_close(ux != NULL ? &ux->transport : NULL);
        return status;
    }
    *transport_p = &ux->transport;
    return NEP_OK;
}

/* ---- windows ------------------------------------------------------------------------------ */

static enum nep_status window_map(struct nep_ucx *ux, void *base, size_t bytes, ucp_mem_h *memory_p)
{
    ucp_mem_map_params_t params = {
        .field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH,
        .address = base,
        .length = bytes,
    };
    ucs_status_t status = ux->lib.ucp_mem_map(ux->context, &params, memory_p);
    if (status != UCS_OK) {
        return nep_fail(NEP_ERR_NO_MEMORY,
                        "transport ucx, rank %u: a window of %zu bytes could not be registered: %s "
                        "(is the limit of locked memory, ulimit -l, large enough?)",
                        ux->rank, bytes, ux->lib.ucs_status_string(status));
    }
    return NEP_OK;
}

/* What can fail here alone: everything but the exchange. *made: the window to be. */
static enum nep_status window_prepare(struct nep_ucx *ux, uint32_t number, void *base, size_t bytes,
                                      struct nep_ucx_window *made)
{
    if (base == NULL || bytes == 0) {
        return nep_fail(NEP_ERR_INVALID, "transport ucx makes no memory: a window needs a base");
    }
    if (number >= NEP_UCX_WINDOWS || atomic_load(&ux->windows[number].alive)) {
        return nep_fail(NEP_ERR_INVALID, "transport ucx: window %u is %s", number,
                        number >= NEP_UCX_WINDOWS ? "not a number below 64" : "in use");
    }
    enum nep_status status = nep_grants_check(&ux->windows[number].next_grants, bytes);
    if (status != NEP_OK) {
        return status;
    }
    made->base = base;
    made->bytes = calloc(ux->num_ranks, sizeof *made->bytes);
    if (made->bytes == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "transport ucx: no memory for a window's sizes");
    }
    return window_map(ux, base, bytes, &made->memory);
}

static enum nep_status window_grant(struct nep_transport *transport, uint32_t number,
                                    const struct nep_grant *grants, uint32_t num_grants)
{
    struct nep_ucx *ux = (struct nep_ucx *)transport;
    if (number >= NEP_UCX_WINDOWS) {
        return nep_fail(NEP_ERR_INVALID, "transport ucx: window %u is not a number below 64",
                        number);
    }
    return nep_grants_set(&ux->windows[number].next_grants, ux->num_ranks, grants, num_grants);
}

static void window_open(struct nep_ucx *ux, struct nep_ucx_window *window,
                        const struct nep_ucx_window *made)
{
    nep_ucx_hold(ux);
    free(window->bytes);
    window->base = made->base;
    window->bytes = made->bytes;
    window->memory = made->memory;
    window->num_receiving = 0;
    nep_grants_free(&window->grants);
    window->grants = window->next_grants;
    window->next_grants = (struct nep_grants){.num = NULL};
    /* Release: pairs with the acquires in ucx_recv.c, check_header, and in find_window. */
    atomic_store_explicit(&window->alive, true, memory_order_release);
    nep_ucx_release(ux);
}

static void window_destroy(struct nep_transport *transport, uint32_t number);

static enum nep_status window_create(struct nep_transport *transport, uint32_t number,
                                     void **base_p, size_t bytes)
{
    struct nep_ucx *ux = (struct nep_ucx *)transport;
    const struct nep_bootstrap *bootstrap = ux->params.bootstrap;
    uint64_t timeout_ns = ux->params.timeout_ns;
    struct nep_ucx_window made = {.base = NULL};
    enum nep_status status = window_prepare(ux, number, *base_p, bytes, &made);
    status = nep_bootstrap_common(bootstrap, ux->rank, ux->num_ranks, status, timeout_ns);
    if (status == NEP_OK) {
        uint64_t mine = bytes;
        status = nep_bootstrap_allgather(bootstrap, &mine, made.bytes, sizeof mine, timeout_ns,
                                         "sizes of a ucx window");
    }
    if (number < NEP_UCX_WINDOWS) {
        nep_ucx_hold(ux);
        ux->windows[number].life++; /* also after a failure: the same on all ranks */
        nep_ucx_release(ux);
    }
    if (status != NEP_OK) {
        if (made.memory != NULL) {
            ux->lib.ucp_mem_unmap(ux->context, made.memory);
        }
        free(made.bytes);
        return status;
    }
    window_open(ux, &ux->windows[number], &made);
    /* A peer that returns from here may put at once, so all must have got this far. */
    status = nep_bootstrap_common(bootstrap, ux->rank, ux->num_ranks, NEP_OK, timeout_ns);
    if (status != NEP_OK) {
        window_destroy(transport, number);
    }
    return status;
}

static struct nep_ucx_window *find_window(struct nep_ucx *ux, uint32_t number)
{
    if (number >= NEP_UCX_WINDOWS) {
        return NULL;
    }
    struct nep_ucx_window *window = &ux->windows[number];
    /* Acquire: pairs with the release in window_open. */
    return atomic_load_explicit(&window->alive, memory_order_acquire) ? window : NULL;
}

/* A rendezvous may still write into the window: from a peer that broke the rule, or that died. */
static void wait_for_receives(struct nep_ucx *ux, struct nep_ucx_window *window, uint32_t number)
{
    struct nep_backoff backoff;
    nep_backoff_init(&backoff, ux->params.timeout_ns < NEP_S ? ux->params.timeout_ns : NEP_S, 0);
    while (window->num_receiving != 0 && nep_backoff_pause(&backoff)) {
        nep_ucx_pump(ux);
    }
    if (window->num_receiving == 0) {
        return;
    }
    /* The connections of those peers are cut: what must not happen is a write into freed memory. */
    nep_warn(
        "transport ucx, rank %u: window %u is destroyed while %u puts arrive; their senders are "
        "cut off",
        ux->rank, number, window->num_receiving);
    for (struct nep_ucx_recv *recv = ux->recvs; recv != NULL; recv = recv->next_made) {
        if (recv->window == window) {
            nep_ucx_peer_fail(&ux->peers[recv->header.src], UCS_ERR_CANCELED);
        }
    }
    nep_backoff_init(&backoff, NEP_S, 0);
    while (window->num_receiving != 0 && nep_backoff_pause(&backoff)) {
        nep_ucx_pump(ux);
    }
}

static void window_destroy(struct nep_transport *transport, uint32_t number)
{
    struct nep_ucx *ux = (struct nep_ucx *)transport;
    struct nep_ucx_window *window = find_window(ux, number);
    if (window == NULL || ux->pid != (int)getpid()) {
        return;
    }
    nep_ucx_hold(ux);
    atomic_store(&window->alive, false);
    wait_for_receives(ux, window, number);
    ucp_mem_h memory = window->memory;
    window->memory = NULL;
    nep_ucx_release(ux);
    if (memory != NULL) {
        ux->lib.ucp_mem_unmap(ux->context, memory);
    }
}

static void *peer_window(struct nep_transport *transport, uint32_t number, uint32_t rank)
{
    struct nep_ucx *ux = (struct nep_ucx *)transport;
    struct nep_ucx_window *window = find_window(ux, number);
    return window != NULL && rank == ux->rank ? window->base : NULL;
}

/* ---- puts --------------------------------------------------------------------------------- */

static enum nep_status put_check(struct nep_ucx *ux, const struct nep_put *put,
                                 const struct nep_ucx_window *window)
{
    if (put->dst >= ux->num_ranks ||
        (put->dst != ux->rank &&
         atomic_load_explicit(&ux->peers[put->dst].state, memory_order_relaxed) == NEP_UCX_NONE)) {
        return nep_fail(NEP_ERR_INVALID, "put to rank %u, which transport ucx does not serve here",
                        put->dst);
    }
    if (window == NULL) {
        return nep_fail(NEP_ERR_INVALID, "put into window %u, which does not exist", put->window);
    }
    uint64_t there = window->bytes[put->dst];
    if (put->offset > there || put->len > there - put->offset) {
        return nep_fail(NEP_ERR_INVALID,
                        "put of %u bytes at offset %llu ends outside window %u of rank %u (%llu "
                        "bytes)",
                        put->len, (unsigned long long)put->offset, put->window, put->dst,
                        (unsigned long long)there);
    }
    uint64_t from = (uint64_t)((uintptr_t)put->src - (uintptr_t)window->base);
    uint64_t here = window->bytes[ux->rank];
    if (put->len != 0 && (from > here || put->len > here - from)) {
        return nep_fail(NEP_ERR_INVALID, "put of %u bytes whose source is not in window %u",
                        put->len, put->window);
    }
    return NEP_OK;
}

static uint64_t put_to_self(struct nep_ucx *ux, const struct nep_put *put,
                            const struct nep_ucx_window *window)
{
    struct nep_ucx_peer *self = &ux->peers[ux->rank];
    if (put->len != 0) {
        memmove((char *)window->base + put->offset, put->src, put->len);
    }
    atomic_fetch_add_explicit(&ux->num_arrivals, 1, memory_order_relaxed);
    ux->params.sink(window->base, ux->rank, ux->rank, put->imm);
    /* The source is free already, whichever number this gets. */
    return atomic_fetch_add(&self->completed, 1) + 1;
}

static void abandon(struct nep_transport *transport, uint32_t rank)
{
    struct nep_ucx *ux = (struct nep_ucx *)transport;
    nep_ucx_hold(ux);
    nep_ucx_peer_fail(&ux->peers[rank], UCS_ERR_CANCELED); /* closed by force, nothing is flushed */
    nep_ucx_pump(ux);
    nep_ucx_release(ux);
}

static enum nep_status peer_status(struct nep_transport *transport, uint32_t rank);

static enum nep_status transport_put(struct nep_transport *transport, const struct nep_put *put,
                                     uint64_t *number_p)
{
    struct nep_ucx *ux = (struct nep_ucx *)transport;
    struct nep_ucx_window *window = find_window(ux, put->window);
    enum nep_status status = put_check(ux, put, window);
    if (status != NEP_OK) {
        return status;
    }
    if (put->dst == ux->rank) {
        *number_p = put_to_self(ux, put, window);
    } else {
        if (atomic_load_explicit(&ux->peers[put->dst].state, memory_order_relaxed) !=
            NEP_UCX_ALIVE) {
            return peer_status(transport, put->dst);
        }
        status = nep_ucx_send_push(ux, put, number_p);
        if (status != NEP_OK) {
            return status;
        }
        uint32_t moved;
        nep_ucx_try_pump(ux, &moved);
        if (atomic_load_explicit(&ux->num_in_flight, memory_order_relaxed) != 0) {
            nep_ucx_wake(ux);
        }
    }
    atomic_fetch_add_explicit(&ux->num_puts, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&ux->num_bytes, put->len, memory_order_relaxed);
    return NEP_OK;
}

static void progress(struct nep_transport *transport)
{
    uint32_t moved;
    nep_ucx_try_pump((struct nep_ucx *)transport, &moved);
}

static uint64_t completed(struct nep_transport *transport, uint32_t dst)
{
    struct nep_ucx *ux = (struct nep_ucx *)transport;
    /* Acquire: pairs with the release in ucx_send.c, send_complete. */
    return atomic_load_explicit(&ux->peers[dst].completed, memory_order_acquire);
}

/* Time in which this rank itself stood still and sent no heartbeats does not count, up to half a
 * timeout: as in base/backoff.h. */
static bool is_lost(uint64_t silent_ns, uint32_t own_beats, uint64_t timeout_ns)
{
    if (silent_ns <= timeout_ns) {
        return false;
    }
    return own_beats >= timeout_ns / 8 * 7 / NEP_S || silent_ns - timeout_ns > timeout_ns / 2;
}

/*
 * A process that gets no core, or whose packets wait for a kernel that gets none, is as silent as
 * one whose cable was pulled: only the deadline tells them apart. Until then it is slow, and said
 * to be, once in a silence. Found by ranks at nice -20 on busy cores: the kernel's network threads
 * run at nice 0, and no packet of a host moved for more than 5 s.
 */
static enum nep_status silence(struct nep_ucx *ux, struct nep_ucx_peer *peer, uint32_t name)
{
    uint64_t heard_ns = atomic_load_explicit(&peer->heard_ns, memory_order_relaxed);
    uint64_t now_ns = nep_now_ns();
    uint64_t silent_ns = now_ns > heard_ns ? now_ns - heard_ns : 0;
    uint32_t own_beats = atomic_load_explicit(&peer->num_silent, memory_order_relaxed);
    if (silent_ns <= SILENT_NS || own_beats <= SILENT_BEATS) {
        return NEP_OK;
    }
    double seconds = (double)silent_ns / (double)NEP_S;
    if (is_lost(silent_ns, own_beats, ux->params.timeout_ns)) {
        return nep_fail(NEP_ERR_PEER_LOST,
                        "rank %u is lost: nothing heard for %.1f s, with a heartbeat due every "
                        "second: its host, its link or its process stands still",
                        name, seconds);
    }
    if (atomic_exchange_explicit(&peer->said_heard_ns, heard_ns, memory_order_relaxed) !=
        heard_ns) {
        nep_warn(
            "rank %u is slow: nothing heard for %.1f s, with a heartbeat due every second: its "
            "host, its link or its process stands still or gets no core; it counts as lost "
            "after %.1f s",
            name, seconds, (double)ux->params.timeout_ns / (double)NEP_S);
    }
    return NEP_OK;
}

static enum nep_status peer_status(struct nep_transport *transport, uint32_t rank)
{
    struct nep_ucx *ux = (struct nep_ucx *)transport;
    struct nep_ucx_peer *peer = &ux->peers[rank];
    if (rank == ux->rank) {
        return NEP_OK;
    }
    uint32_t name = nep_transport_name(&ux->params, rank);
    /* Acquire: pairs with the release in ucx_send.c, nep_ucx_peer_fail. */
    switch (atomic_load_explicit(&peer->state, memory_order_acquire)) {
    case NEP_UCX_LEFT:
        return nep_fail(NEP_ERR_PEER_LOST, "rank %u has closed its transport ucx", name);
    case NEP_UCX_FAILED:
        return nep_fail(NEP_ERR_PEER_LOST, "rank %u is lost: its UCX endpoint failed: %s", name,
                        ux->lib.ucs_status_string((ucs_status_t)atomic_load(&peer->failure)));
    default:
        break;
    }
    if (atomic_load_explicit(&peer->misbehaved, memory_order_relaxed)) {
        return nep_fail(NEP_ERR_FORMAT,
                        "rank %u sent a put that does not fit this rank's windows; it was dropped",
                        name);
    }
    return silence(ux, peer, name);
}

static void stats(struct nep_transport *transport, struct nep_transport_stats *stats_p)
{
    struct nep_ucx *ux = (struct nep_ucx *)transport;
    *stats_p = (struct nep_transport_stats){
        .puts = atomic_load(&ux->num_puts),
        .put_bytes = atomic_load(&ux->num_bytes),
        .work_requests = atomic_load(&ux->num_messages),
        .arrivals = atomic_load(&ux->num_arrivals),
        .refused = atomic_load(&ux->num_refused),
    };
}

const struct nep_transport_ops nep_ucx_ops = {
    .name = "ucx",
    .caps = NEP_CAP_FABRIC | NEP_CAP_THREAD,
    .probe = probe,
    .create = transport_create,
    .close = transport_close,
    .window_create = window_create,
    .window_grant = window_grant,
    .window_destroy = window_destroy,
    .window_retire = nep_unsupported_window_retire,
    .peer_window = peer_window,
    .put = transport_put,
    .progress = progress,
    .completed = completed,
    .peer_status = peer_status,
    .abandon = abandon,
    .stats = stats,
};

#endif
