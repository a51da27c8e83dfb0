/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who may write where in a window, as the device knows it. A gate is the part of the own window
 * that one peer may write, with one key for each of its QPs:
 *
 * - Its memory is registered for itself, so no key reaches further than the gate. (The window as a
 *   whole is registered too, since puts leave from it, but for this rank alone.)
 * - Where the device has memory windows that are bound to a QP (type 2B), the key is one of those,
 *   and good on that QP and no other. It does not matter then that all ranks see all keys. Where it
 *   has none, the key is the registration's: a rank that is broken is held to its own slots, one
 *   that uses a key of another rank is not.
 * - GPU memory is registered in whole buffers alone, so there the windows do both; a device without
 *   them leaves it open, and says so.
 *
 * Without grants there is one gate: all of the window, for all, with the window's own keys.
 *
 * Rejected: windows bound to the registration of the whole. It saves the gates' registrations, but
 * Soft-RoCE checks a window's QP and not its bounds, so no test could show that a gate holds. And a
 * protection domain for each peer, in which all memory that puts leave from had to be registered
 * again.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/bootstrap.h"
#include "transport/verbs/verbs.h"

/* What a rank tells of a gate; num_qps * num_chunks keys follow. */
struct card {
    uint64_t offset;
    uint64_t bytes;
    uint32_t rank; /* UINT32_MAX: for all */
    uint32_t is_valid;
};

static size_t num_keys(const struct nep_verbs *verbs, const struct nep_verbs_window *window)
{
    return verbs->num_qps * window->num_chunks;
}

/* The part of a gate in one piece of the window. */
static bool part_in(const struct nep_verbs *verbs, const struct nep_verbs_gate *gate, size_t chunk,
                    uint64_t *offset_p, uint64_t *bytes_p)
{
    uint64_t size = verbs->params.config->verbs_chunk_bytes;
    uint64_t begin = gate->offset > chunk * size ? gate->offset : chunk * size;
    uint64_t end = gate->offset + gate->bytes;
    end = end < (chunk + 1) * size ? end : (chunk + 1) * size;
    *offset_p = begin;
    *bytes_p = begin < end ? end - begin : 0;
    return begin < end;
}

/* ---- registrations -------------------------------------------------------------------------- */

static enum nep_status register_gate(struct nep_verbs *verbs, struct nep_verbs_window *window,
                                     struct nep_verbs_gate *gate)
{
    bool is_bound = verbs->has_bound_windows;
    unsigned access = nep_verbs_access(verbs) |
                      (unsigned)(is_bound ? IBV_ACCESS_MW_BIND : IBV_ACCESS_REMOTE_WRITE);
    gate->mrs = calloc(verbs->num_paths * window->num_chunks, sizeof(struct ibv_mr *));
    if (gate->mrs == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for registrations");
    }
    for (size_t i = 0; i < verbs->num_paths * window->num_chunks; i++) {
        struct nep_verbs_path *path = &verbs->paths[i / window->num_chunks];
        uint64_t offset, bytes;
        if (!part_in(verbs, gate, i % window->num_chunks, &offset, &bytes)) {
            continue;
        }
        gate->mrs[i] = verbs->api.reg_mr(path->pd, window->base + offset, bytes, access);
        if (gate->mrs[i] == NULL) {
            return nep_verbs_register_failed(path->device, "the slots of a peer", bytes, errno);
        }
    }
    return NEP_OK;
}

/* ---- memory windows ------------------------------------------------------------------------- */

/* Until there is room for one more request, or the QP is dead. Peer's lock held, let go of while it
 * waits. */
static bool wait_room(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint32_t qp_idx,
                      uint64_t deadline_ns)
{
    struct nep_verbs_qp *qp = &peer->qps[qp_idx];
    while (!qp->is_dead && qp->posted - qp->done >= verbs->depth && nep_left_ns(deadline_ns) > 0) {
        pthread_mutex_unlock(&peer->lock);
        nep_verbs_progress(&verbs->transport);
        usleep(20);
        pthread_mutex_lock(&peer->lock);
    }
    return !qp->is_dead && qp->posted - qp->done < verbs->depth;
}

/* Binds the window of one QP to a part of a gate; its key. 0: the QP is dead, and needs none. */
static enum nep_status bind_part(struct nep_verbs *verbs, const struct nep_verbs_gate *gate,
                                 uint32_t qp_idx, struct ibv_mw *mw,
                                 const struct ibv_mw_bind_info *info, uint64_t deadline_ns,
                                 uint32_t *key_p)
{
    struct nep_verbs_peer *peer = &verbs->peers[gate->rank];
    struct nep_verbs_qp *qp = &peer->qps[qp_idx];
    uint32_t key = ibv_inc_rkey(mw->rkey);
    pthread_mutex_lock(&peer->lock);
    bool is_posted = wait_room(verbs, peer, qp_idx, deadline_ns);
    if (is_posted) {
        nep_verbs_peer_bind(verbs, peer, qp_idx, mw, key, info);
    }
    uint64_t number = qp->posted;
    while (is_posted && !qp->is_dead && qp->done < number && nep_left_ns(deadline_ns) > 0) {
        pthread_mutex_unlock(&peer->lock);
        nep_verbs_progress(&verbs->transport);
        usleep(20);
        pthread_mutex_lock(&peer->lock);
    }
    bool is_dead = qp->is_dead, is_done = is_posted && qp->done >= number;
    qp->stays_dead = qp->stays_dead || is_dead; /* nothing could be written by it */
    pthread_mutex_unlock(&peer->lock);
    *key_p = is_dead ? 0 : key;
    return is_dead || is_done
               ? NEP_OK
               : nep_fail(NEP_ERR_TIMEOUT,
                          "verbs: %s has not bound a memory window for rank %u in %.3f s",
                          verbs->paths[qp->path].device,
                          nep_transport_name(&verbs->params, gate->rank),
                          (double)verbs->params.timeout_ns / 1e9);
}

static enum nep_status bind_gate(struct nep_verbs *verbs, struct nep_verbs_window *window,
                                 struct nep_verbs_gate *gate)
{
    uint64_t deadline_ns = nep_deadline_ns(verbs->params.timeout_ns);
    gate->mws = calloc(num_keys(verbs, window), sizeof(struct ibv_mw *));
    if (gate->mws == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for memory windows");
    }
    for (size_t i = 0; i < num_keys(verbs, window); i++) {
        uint32_t qp_idx = (uint32_t)(i / window->num_chunks);
        size_t chunk = i % window->num_chunks;
        uint32_t path_idx = verbs->peers[gate->rank].qps[qp_idx].path;
        size_t mr = path_idx * window->num_chunks + chunk;
        uint64_t offset, bytes;
        if (!part_in(verbs, gate, chunk, &offset, &bytes)) {
            continue;
        }
        gate->mws[i] = verbs->api.alloc_mw(verbs->paths[path_idx].pd, IBV_MW_TYPE_2);
        if (gate->mws[i] == NULL) {
            return nep_fail(NEP_ERR_NO_MEMORY, "verbs: %s: no memory window for rank %u: %s",
                            verbs->paths[path_idx].device,
                            nep_transport_name(&verbs->params, gate->rank), strerror(errno));
        }
        struct ibv_mw_bind_info info = {.mr = gate->mrs != NULL ? gate->mrs[mr] : window->mrs[mr],
                                        .addr = (uintptr_t)window->base + offset,
                                        .length = bytes,
                                        .mw_access_flags = IBV_ACCESS_REMOTE_WRITE};
        enum nep_status status =
            bind_part(verbs, gate, qp_idx, gate->mws[i], &info, deadline_ns, &gate->keys[i]);
        if (status != NEP_OK) {
            return status;
        }
    }
    return NEP_OK;
}

/* ---- gates ---------------------------------------------------------------------------------- */

/* The keys of the registrations behind a gate, its own or the window's. */
static void fill_keys(const struct nep_verbs *verbs, const struct nep_verbs_window *window,
                      struct nep_verbs_gate *gate)
{
    struct ibv_mr *const *mrs = gate->mrs != NULL ? gate->mrs : window->mrs;
    for (size_t i = 0; i < num_keys(verbs, window); i++) {
        size_t path_idx = i / window->num_chunks % verbs->num_paths; /* QP q is on path q mod P */
        const struct ibv_mr *mr = mrs[path_idx * window->num_chunks + i % window->num_chunks];
        gate->keys[i] = mr != NULL ? mr->rkey : 0;
    }
}

static enum nep_status make_gate(struct nep_verbs *verbs, struct nep_verbs_window *window,
                                 struct nep_verbs_gate *gate)
{
    enum nep_status status = NEP_OK;
    gate->keys = calloc(num_keys(verbs, window), sizeof *gate->keys);
    if (gate->keys == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for keys");
    }
    if (gate->rank == UINT32_MAX) {
        fill_keys(verbs, window, gate);
        return NEP_OK;
    }
    if (!window->is_device) {
        status = register_gate(verbs, window, gate);
    }
    if (status == NEP_OK && verbs->has_bound_windows) {
        return bind_gate(verbs, window, gate);
    }
    if (status == NEP_OK) {
        fill_keys(verbs, window, gate);
    }
    return status;
}

static enum nep_status plan_gates(struct nep_verbs *verbs, struct nep_verbs_window *window,
                                  const struct nep_grants *grants)
{
    uint32_t num = 0;
    for (uint32_t r = 0; window->is_guarded && r < verbs->num_ranks; r++) {
        num += verbs->peers[r].is_served ? grants->num[r] : 0;
    }
    window->gates = calloc(num + 1, sizeof *window->gates);
    if (window->gates == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for what %u ranks may write",
                        verbs->num_ranks);
    }
    if (!window->is_guarded) {
        window->gates[window->num_gates++] =
            (struct nep_verbs_gate){.rank = UINT32_MAX, .bytes = window->bytes};
        return NEP_OK;
    }
    for (uint32_t r = 0; r < verbs->num_ranks; r++) {
        for (uint32_t i = 0; verbs->peers[r].is_served && i < grants->num[r]; i++) {
            const struct nep_grant *grant = &grants->of[r][i];
            window->gates[window->num_gates++] =
                (struct nep_verbs_gate){.rank = r, .offset = grant->offset, .bytes = grant->bytes};
        }
    }
    return NEP_OK;
}

enum nep_status nep_verbs_gates_make(struct nep_verbs *verbs, struct nep_verbs_window *window,
                                     const struct nep_grants *grants)
{
    uint64_t begin_ns = nep_now_ns();
    enum nep_status status = plan_gates(verbs, window, grants);
    for (uint32_t g = 0; status == NEP_OK && g < window->num_gates; g++) {
        status = make_gate(verbs, window, &window->gates[g]);
    }
    if (status == NEP_OK && window->is_guarded) {
        nep_info("verbs: rank %u: %u slots of a window guarded by registrations%s, in %.1f ms",
                 verbs->rank, window->num_gates,
                 verbs->has_bound_windows ? " and memory windows" : " alone",
                 (double)(nep_now_ns() - begin_ns) / 1e6);
    }
    return status;
}

bool nep_verbs_can_guard(const struct nep_verbs *verbs, const struct nep_verbs_window *window,
                         const struct nep_grants *grants)
{
    if (grants->num == NULL || !verbs->params.config->verbs_guard) {
        return false;
    }
    if (window->is_device && !verbs->has_bound_windows) {
        nep_info("verbs: %s has no memory windows of type 2B: a window of GPU memory is open to "
                 "all ranks of the communicator",
                 verbs->paths[0].device);
        return false;
    }
    return true;
}

void nep_verbs_gates_unbind(struct nep_verbs *verbs, struct nep_verbs_window *window)
{
    for (uint32_t g = 0; g < window->num_gates; g++) {
        struct nep_verbs_gate *gate = &window->gates[g];
        for (size_t i = 0; gate->mws != NULL && i < num_keys(verbs, window); i++) {
            if (gate->mws[i] != NULL) {
                verbs->api.dealloc_mw(gate->mws[i]);
            }
        }
        free(gate->mws);
        gate->mws = NULL;
    }
}

void nep_verbs_gates_free(struct nep_verbs *verbs, struct nep_verbs_window *window)
{
    nep_verbs_gates_unbind(verbs, window);
    for (uint32_t g = 0; g < window->num_gates; g++) {
        struct nep_verbs_gate *gate = &window->gates[g];
        for (size_t i = 0; gate->mrs != NULL && i < verbs->num_paths * window->num_chunks; i++) {
            if (gate->mrs[i] != NULL) {
                verbs->api.dereg_mr(gate->mrs[i]);
            }
        }
        free(gate->mrs);
        free(gate->keys);
    }
    free(window->gates);
    window->gates = NULL;
    window->num_gates = 0;
}

/* ---- exchange ------------------------------------------------------------------------------- */

/* Takes the gates that rank r has for this rank. */
static enum nep_status take_gates(struct nep_verbs *verbs, struct nep_verbs_window *window,
                                  uint32_t r, const uint8_t *cards, uint32_t num_cards, size_t size)
{
    struct nep_verbs_remote *remote = &window->remotes[r];
    size_t keys = num_keys(verbs, window);
    for (uint32_t c = 0; c < num_cards; c++) {
        struct card card;
        memcpy(&card, cards + c * size, sizeof card);
        if (card.is_valid == 0 || (card.rank != verbs->rank && card.rank != UINT32_MAX)) {
            continue;
        }
        if (remote->num_ways == NEP_MAX_GRANTS || card.offset > remote->bytes ||
            card.bytes > remote->bytes - card.offset) {
            return nep_fail(NEP_ERR_MISMATCH,
                            "verbs: rank %u lets this rank write %llu bytes at "
                            "%llu of its window of %llu",
                            nep_transport_name(&verbs->params, r), (unsigned long long)card.bytes,
                            (unsigned long long)card.offset, (unsigned long long)remote->bytes);
        }
        uint32_t *to = window->rkeys + ((size_t)r * NEP_MAX_GRANTS + remote->num_ways) * keys;
        memcpy(to, cards + c * size + sizeof card, keys * sizeof *to);
        remote->ways[remote->num_ways++] = (struct nep_verbs_way){card.offset, card.bytes, to};
    }
    return NEP_OK;
}

enum nep_status nep_verbs_gates_exchange(struct nep_verbs *verbs, struct nep_verbs_window *window,
                                         uint32_t num_cards)
{
    size_t keys = num_keys(verbs, window);
    size_t size = (sizeof(struct card) + keys * sizeof(uint32_t) + 7) / 8 * 8;
    uint8_t *mine = calloc(num_cards, size);
    uint8_t *all = calloc((size_t)verbs->num_ranks * num_cards, size);
    window->rkeys = calloc((size_t)verbs->num_ranks * NEP_MAX_GRANTS * keys, sizeof *window->rkeys);
    enum nep_status status = NEP_OK;
    if (mine == NULL || all == NULL || window->rkeys == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for %u cards of %zu bytes",
                          verbs->num_ranks * num_cards, size);
    }
    status = nep_bootstrap_common(verbs->params.bootstrap, verbs->rank, verbs->num_ranks, status,
                                  verbs->params.timeout_ns);
    for (uint32_t g = 0; status == NEP_OK && g < window->num_gates; g++) {
        const struct nep_verbs_gate *gate = &window->gates[g];
        struct card card = {gate->offset, gate->bytes, gate->rank, 1};
        memcpy(mine + g * size, &card, sizeof card);
        memcpy(mine + g * size + sizeof card, gate->keys, keys * sizeof *gate->keys);
    }
    if (status == NEP_OK) {
        status = nep_bootstrap_allgather(verbs->params.bootstrap, mine, all, num_cards * size,
                                         verbs->params.timeout_ns, "verbs window keys");
    }
    for (uint32_t r = 0; status == NEP_OK && r < verbs->num_ranks; r++) {
        status = take_gates(verbs, window, r, all + (size_t)r * num_cards * size, num_cards, size);
    }
    free(mine);
    free(all);
    return status;
}
