/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A fabric that does everything its contract leaves open. "adversary:shm" holds every put for a
 * random time, so that puts overtake each other; lets the bytes of large ones land in parts, in any
 * order, and announces once after all of them; then, before it calls a put complete, it sends some
 * again, bytes and announcement, as a fail-over would. What it wraps does the rest.
 *
 * A thread delivers, since a rank that has left its call must still be heard; calls of progress
 * deliver too, so that both ways are taken. The seed is NEP_ADVERSARY_SEED; threads still make runs
 * differ.
 *
 * Parts need memory that is mapped. A fabric that only puts announces each put, and an announcement
 * before the last part would be a lie: there, puts stay whole, and only announcements come again.
 */
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "transport/adversary.h"
#include "transport/bootstrap.h"

extern const struct nep_transport_ops nep_adversary_ops;

static enum nep_status adversary_probe(const struct nep_config *config)
{
    (void)config;
    return NEP_OK; /* what it wraps is asked at create, where it is known */
}

static void adversary_close(struct nep_transport *transport)
{
    struct nep_adversary *adversary = (struct nep_adversary *)transport;
    if (adversary->has_thread) {
        nep_adversary_flush(adversary, UINT32_MAX);
        pthread_mutex_lock(&adversary->lock);
        adversary->is_closing = true;
        pthread_cond_broadcast(&adversary->changed);
        pthread_mutex_unlock(&adversary->lock);
        pthread_join(adversary->thread, NULL);
    }
    if (adversary->inner != NULL) {
        adversary->inner->ops->close(adversary->inner);
    }
    while (adversary->held != NULL) {
        struct nep_adversary_held *next = adversary->held->next;
        free(adversary->held);
        adversary->held = next;
    }
    pthread_cond_destroy(&adversary->changed);
    pthread_mutex_destroy(&adversary->lock);
    free(adversary->lanes);
    free(adversary);
}

static enum nep_status open_inner(struct nep_adversary *adversary,
                                  const struct nep_transport_params *params)
{
    struct nep_transport_params inside = *params;
    const char *name = params->args[0] != '\0' ? params->args : NEP_TRANSPORT_WRAPPED;
    const struct nep_transport_ops *ops;
    /* a put may come three times */
    inside.max_puts = params->max_puts * 3;
    enum nep_status status = nep_transport_find(name, &ops, &inside.args);
    if (status == NEP_OK && (ops->caps & NEP_CAP_WRAPPER) != 0) {
        status =
            nep_fail(NEP_ERR_INVALID, "adversary wraps a transport that moves bytes, not %s", name);
    }
    if (status == NEP_OK && (ops->caps & NEP_CAP_FABRIC) == 0) {
        status = nep_fail(NEP_ERR_UNSUPPORTED, "adversary: %s cannot put", name);
    }
    if (status == NEP_OK) {
        status = ops->probe(params->config);
    }
    /* Creation is collective: nobody goes on into it alone. */
    status = nep_bootstrap_common(params->bootstrap, params->topology->rank,
                                  params->topology->num_ranks, status, params->timeout_ns);
    if (status == NEP_OK) {
        status = ops->create(&inside, &adversary->inner);
    }
    if (status == NEP_OK) {
        adversary->is_mapped = (ops->caps & NEP_CAP_MAPPED) != 0;
    }
    return status;
}

static enum nep_status start_thread(struct nep_adversary *adversary)
{
    int failed = pthread_create(&adversary->thread, NULL, nep_adversary_main, adversary);
    if (failed != 0) {
        return nep_fail(NEP_ERR_NO_MEMORY, "adversary: no thread to deliver: %s", strerror(failed));
    }
    adversary->has_thread = true;
    return NEP_OK;
}

static enum nep_status adversary_create(const struct nep_transport_params *params,
                                        struct nep_transport **transport_p)
{
    uint32_t rank = params->topology->rank;
    struct nep_adversary *adversary = calloc(1, sizeof *adversary);
    if (adversary == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "adversary: no memory");
    }
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&adversary->lock, NULL);
    pthread_cond_init(&adversary->changed, &clock);
    pthread_condattr_destroy(&clock);
    adversary->lanes = calloc(params->topology->num_ranks, sizeof *adversary->lanes);
    adversary->num_lanes = params->topology->num_ranks;
    /* Ranks differ, runs of one seed do not, as far as threads let them. */
    adversary->random = (uint64_t)params->config->adversary_seed << 32 | rank;
    enum nep_status status = adversary->lanes != NULL
                                 ? open_inner(adversary, params)
                                 : nep_fail(NEP_ERR_NO_MEMORY, "adversary: no memory");
    if (status == NEP_OK) {
        adversary->ops = nep_adversary_ops;
        adversary->ops.caps |= adversary->inner->ops->caps & NEP_CAP_MAPPED;
        adversary->transport.ops = &adversary->ops;
        status = start_thread(adversary);
    }
    if (status != NEP_OK) {
        adversary_close(&adversary->transport);
        return status;
    }
    nep_info("rank %u: adversary over %s, NEP_ADVERSARY_SEED=%u", rank, adversary->inner->ops->name,
             params->config->adversary_seed);
    *transport_p = &adversary->transport;
    return NEP_OK;
}

static enum nep_status adversary_window_create(struct nep_transport *transport, uint32_t window,
                                               void **base_p, size_t bytes)
{
    struct nep_adversary *adversary = (struct nep_adversary *)transport;
    if (window >= NEP_ADVERSARY_WINDOWS) {
        return nep_fail(NEP_ERR_INTERNAL, "adversary: window %u is impossible", window);
    }
    enum nep_status status =
        adversary->inner->ops->window_create(adversary->inner, window, base_p, bytes);
    if (status == NEP_OK) {
        adversary->window_bytes[window] = bytes;
    }
    return status;
}

static enum nep_status adversary_window_grant(struct nep_transport *transport, uint32_t window,
                                              const struct nep_grant *grants, uint32_t num_grants)
{
    struct nep_adversary *adversary = (struct nep_adversary *)transport;
    return adversary->inner->ops->window_grant(adversary->inner, window, grants, num_grants);
}

static void adversary_window_destroy(struct nep_transport *transport, uint32_t window)
{
    struct nep_adversary *adversary = (struct nep_adversary *)transport;
    nep_adversary_flush(adversary, window);
    adversary->window_bytes[window] = 0;
    adversary->inner->ops->window_destroy(adversary->inner, window);
}

static void adversary_window_retire(struct nep_transport *transport, uint32_t window,
                                    size_t keep_offset, size_t keep_bytes)
{
    struct nep_adversary *adversary = (struct nep_adversary *)transport;
    nep_adversary_flush(adversary, window);
    adversary->window_bytes[window] = 0;
    adversary->inner->ops->window_retire(adversary->inner, window, keep_offset, keep_bytes);
}

static void *adversary_peer_window(struct nep_transport *transport, uint32_t window, uint32_t rank)
{
    struct nep_adversary *adversary = (struct nep_adversary *)transport;
    return adversary->inner->ops->peer_window(adversary->inner, window, rank);
}

/* What the inner fabric would refuse must be refused now, not when it is delivered. */
static enum nep_status check_put(struct nep_adversary *adversary, const struct nep_put *put)
{
    bool known = put->window < NEP_ADVERSARY_WINDOWS && put->dst < adversary->num_lanes;
    uint64_t bytes = known ? adversary->window_bytes[put->window] : 0;
    if (bytes == 0 || put->offset > bytes || put->len > bytes - put->offset ||
        (adversary->is_mapped &&
         adversary->inner->ops->peer_window(adversary->inner, put->window, put->dst) == NULL)) {
        return nep_fail(NEP_ERR_INTERNAL,
                        "adversary: a put of %u bytes at %llu of window %u of rank %u", put->len,
                        (unsigned long long)put->offset, put->window, put->dst);
    }
    return NEP_OK;
}

static enum nep_status adversary_put(struct nep_transport *transport, const struct nep_put *put,
                                     uint64_t *number_p)
{
    struct nep_adversary *adversary = (struct nep_adversary *)transport;
    enum nep_status status = check_put(adversary, put);
    return status == NEP_OK ? nep_adversary_hold(adversary, put, number_p) : status;
}

static void adversary_progress(struct nep_transport *transport)
{
    struct nep_adversary *adversary = (struct nep_adversary *)transport;
    /* Who finds the lock taken leaves the work to the other: progress never blocks. */
    if (pthread_mutex_trylock(&adversary->lock) == 0) {
        nep_adversary_deliver(adversary);
        pthread_mutex_unlock(&adversary->lock);
    }
    adversary->inner->ops->progress(adversary->inner);
}

static uint64_t adversary_completed(struct nep_transport *transport, uint32_t dst)
{
    struct nep_adversary *adversary = (struct nep_adversary *)transport;
    pthread_mutex_lock(&adversary->lock);
    uint64_t completed = adversary->lanes[dst].completed;
    pthread_mutex_unlock(&adversary->lock);
    return completed;
}

static enum nep_status adversary_peer_status(struct nep_transport *transport, uint32_t rank)
{
    struct nep_adversary *adversary = (struct nep_adversary *)transport;
    return adversary->inner->ops->peer_status(adversary->inner, rank);
}

static void adversary_abandon(struct nep_transport *transport, uint32_t rank)
{
    struct nep_adversary *adversary = (struct nep_adversary *)transport;
    adversary->inner->ops->abandon(adversary->inner, rank);
}

static void adversary_stats(struct nep_transport *transport, struct nep_transport_stats *stats)
{
    struct nep_adversary *adversary = (struct nep_adversary *)transport;
    adversary->inner->ops->stats(adversary->inner, stats);
    pthread_mutex_lock(&adversary->lock);
    /* What the caller put, once each; what the fabric saw of it stays in work_requests. */
    stats->puts = adversary->num_puts;
    stats->put_bytes = adversary->put_bytes;
    stats->retries += adversary->num_repeats;
    pthread_mutex_unlock(&adversary->lock);
}

const struct nep_transport_ops nep_adversary_ops = {
    .name = "adversary",
    .caps = NEP_CAP_FABRIC | NEP_CAP_THREAD | NEP_CAP_WRAPPER,
    .probe = adversary_probe,
    .create = adversary_create,
    .close = adversary_close,
    .window_create = adversary_window_create,
    .window_grant = adversary_window_grant,
    .window_destroy = adversary_window_destroy,
    .window_retire = adversary_window_retire,
    .peer_window = adversary_peer_window,
    .put = adversary_put,
    .progress = adversary_progress,
    .completed = adversary_completed,
    .peer_status = adversary_peer_status,
    .abandon = adversary_abandon,
    .stats = adversary_stats,
};
