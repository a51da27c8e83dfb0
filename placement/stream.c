/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Continuous batching: up to ACTIVE requests decode at once, a token each per step, in the order of
 * the list; a request that ends makes room for the next. After every EVERY tokens the corrector
 * may move copies, and what comes after is routed by the new map. What is scored is what was
 * routed, each token once, by the map of its time.
 *
 * A request that comes brings its signature, which chose its home: the corrector sees of it the
 * share of the window that the request is going to have, as it would have seen the prefill. So it
 * need not wait for the first tokens of a new domain to be routed badly.
 */
#include "placement/stream.h"

#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "placement/map.h"

#define ACTIVE 64u
#define WINDOW 768u
#define EVERY  128u

struct active {
    uint64_t next;
    uint64_t left;
    uint32_t request;
    uint32_t source;
    uint32_t home;
};

struct stream {
    const struct nep_requests *requests;
    const uint32_t *homes;
    const struct nep_map_shape *shape;
    struct nep_map *map;
    struct nep_balance *balance;
    uint32_t *turn;            /* [num_nodes] rank that the next request of the home enters at */
    uint32_t *first_rank;      /* [num_nodes] */
    struct nep_copies *copies; /* [num_layers] of the map */
    uint64_t *load;            /* [num_layers][num_ranks] */
    uint64_t remote;
    uint64_t local;
    uint64_t ranks;
    uint64_t tokens;
    uint64_t moved;
    struct active active[ACTIVE];
    uint32_t num_active;
    uint64_t since; /* tokens that the corrector saw since its last update */
    uint32_t next_request;
};

/* Returns where those that came begin. */
static uint32_t admit(struct stream *s)
{
    uint32_t num_old = s->num_active;
    while (s->num_active < ACTIVE && s->next_request < s->requests->num) {
        uint32_t i = s->next_request++;
        struct active *a = &s->active[s->num_active];
        a->request = nep_requests_at(s->requests, i);
        nep_trace_scored(s->requests->trace, a->request, &a->next, &a->left);
        a->home = s->homes[i];
        a->source = s->first_rank[a->home] + s->turn[a->home];
        s->turn[a->home] = (s->turn[a->home] + 1) % s->shape->ranks_per_node[a->home];
        s->num_active += a->left > 0;
    }
    return num_old;
}

static void count(struct stream *s, uint32_t layer, uint32_t home, const uint32_t *slots,
                  uint32_t top_k)
{
    const struct nep_copies *copies = &s->copies[layer];
    uint32_t nodes = 0;
    uint32_t ranks = 0;
    for (uint32_t k = 0; k < top_k; k++) {
        if (slots[k] == NEP_SLOT_NONE) {
            continue;
        }
        uint32_t rank = slots[k] / copies->slots_per_rank;
        uint32_t node = copies->node_of_rank[rank];
        s->load[(size_t)layer * copies->num_ranks + rank]++;
        int is_new_rank = 1;
        int is_new_node = node != home;
        for (uint32_t j = 0; j < k; j++) {
            if (slots[j] != NEP_SLOT_NONE) {
                uint32_t other = slots[j] / copies->slots_per_rank;
                is_new_rank &= other != rank;
                is_new_node &= copies->node_of_rank[other] != node;
            }
        }
        nodes += (uint32_t)is_new_node;
        ranks += (uint32_t)is_new_rank;
    }
    s->remote += nodes;
    s->local += nodes == 0;
    s->ranks += ranks;
}

static enum nep_status route_token(struct stream *s, struct active *a)
{
    const struct nep_trace *trace = s->requests->trace;
    uint32_t top_k = nep_trace_top_k(trace);
    int32_t ids[NEP_TRACE_TOP_K_LIMIT];
    uint32_t slots[NEP_TRACE_TOP_K_LIMIT];
    for (uint32_t l = 0; l < s->shape->num_layers; l++) {
        nep_trace_ids(trace, a->next, l, ids);
        nep_choose(&s->copies[l], a->source, (uint32_t)a->next, ids, top_k, slots);
        count(s, l, a->home, slots, top_k);
        enum nep_status status = nep_balance_observe(s->balance, l, a->home, ids, 1);
        if (status != NEP_OK) {
            return status;
        }
    }
    a->next++;
    a->left--;
    s->tokens++;
    return NEP_OK;
}

static void set_copies(struct stream *s)
{
    for (uint32_t l = 0; l < s->shape->num_layers; l++) {
        nep_map_copies(s->map, l, &s->copies[l]);
    }
}

static enum nep_status update(struct stream *s)
{
    struct nep_map *next = NULL;
    struct nep_balance_result result;
    enum nep_status status = nep_balance_update(s->balance, &next, &result);
    if (status == NEP_OK && next != NULL) {
        nep_map_destroy(s->map);
        s->map = next;
        s->moved += result.moved_copies;
        set_copies(s);
    }
    return status;
}

/* After a token that the corrector saw. */
static enum nep_status seen(struct stream *s)
{
    if (++s->since < EVERY) {
        return NEP_OK;
    }
    s->since = 0;
    return update(s);
}

/* Token t of the `share` that the corrector sees of a signature, evenly spaced. */
static enum nep_status show_token(struct stream *s, const struct active *a, uint64_t t,
                                  uint64_t share)
{
    const struct nep_trace *trace = s->requests->trace;
    int32_t ids[NEP_TRACE_TOP_K_LIMIT];
    uint64_t first;
    uint64_t count;
    nep_trace_signature(trace, a->request, &first, &count);
    uint64_t num = count < share ? count : share;
    if (t >= num) {
        return NEP_OK;
    }
    enum nep_status status = NEP_OK;
    for (uint32_t l = 0; l < s->shape->num_layers && status == NEP_OK; l++) {
        nep_trace_ids(trace, first + t * count / num, l, ids);
        status = nep_balance_observe(s->balance, l, a->home, ids, 1);
    }
    return status == NEP_OK ? seen(s) : status;
}

/* The requests from `begin` on have come; in turn, so that no window is of one of them alone. */
static enum nep_status show_signatures(struct stream *s, uint32_t begin)
{
    enum nep_status status = NEP_OK;
    uint64_t share = begin < s->num_active ? WINDOW / s->num_active : 0;
    for (uint64_t t = 0; t < share && status == NEP_OK; t++) {
        for (uint32_t i = begin; i < s->num_active && status == NEP_OK; i++) {
            status = show_token(s, &s->active[i], t, share);
        }
    }
    return status;
}

static enum nep_status run(struct stream *s)
{
    enum nep_status status = show_signatures(s, admit(s));
    while (s->num_active > 0 && status == NEP_OK) {
        for (uint32_t i = 0; i < s->num_active && status == NEP_OK; i++) {
            status = route_token(s, &s->active[i]);
            status = status == NEP_OK ? seen(s) : status;
        }
        uint32_t kept = 0;
        for (uint32_t i = 0; i < s->num_active; i++) {
            if (s->active[i].left > 0) {
                s->active[kept++] = s->active[i];
            }
        }
        s->num_active = kept;
        status = status == NEP_OK ? show_signatures(s, admit(s)) : status;
    }
    return status;
}

static void finish(const struct stream *s, struct nep_score *score)
{
    double passes = (double)s->tokens * s->shape->num_layers;
    passes = passes == 0.0 ? 1.0 : passes;
    *score = (struct nep_score){.num_tokens = s->tokens,
                                .remote_nodes_per_token = (double)s->remote / passes,
                                .ranks_per_token = (double)s->ranks / passes,
                                .local_share = (double)s->local / passes};
    for (uint32_t l = 0; l < s->shape->num_layers; l++) {
        double node;
        double rank;
        nep_score_imbalance(s->shape, &s->load[(size_t)l * s->shape->num_ranks], &node, &rank);
        score->imbalance_node += node / s->shape->num_layers;
        score->imbalance_rank += rank / s->shape->num_layers;
    }
}

enum nep_status nep_stream_score(const struct nep_requests *requests, const struct nep_map *map,
                                 const uint32_t *homes, struct nep_score *score_p,
                                 uint64_t *moved_p)
{
    const struct nep_map_shape *shape = &map->shape;
    struct nep_map_shape own = *shape; /* the first map may go while the stream runs */
    enum nep_status status = nep_trace_match(requests->trace, map);
    if (status != NEP_OK) {
        return status;
    }
    struct stream *s = calloc(1, sizeof *s);
    if (s == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "stream: no memory");
    }
    *s = (struct stream){.requests = requests, .homes = homes, .shape = &own};
    nep_map_retain((struct nep_map *)map);
    s->map = (struct nep_map *)map;
    s->turn = calloc(2 * (size_t)own.num_nodes, sizeof *s->turn);
    s->copies = calloc(own.num_layers, sizeof *s->copies);
    s->load = calloc((size_t)own.num_layers * own.num_ranks, sizeof *s->load);
    const struct nep_balance_params params = {.size = sizeof params,
                                              .map = map,
                                              .top_k = nep_trace_top_k(requests->trace),
                                              .window_tokens = WINDOW};
    status = s->turn == NULL || s->copies == NULL || s->load == NULL
                 ? nep_fail(NEP_ERR_NO_MEMORY, "stream: no memory")
                 : nep_balance_create(&params, &s->balance);
    if (status == NEP_OK) {
        s->first_rank = s->turn + own.num_nodes;
        for (uint32_t n = 1; n < own.num_nodes; n++) {
            s->first_rank[n] = s->first_rank[n - 1] + own.ranks_per_node[n - 1];
        }
        set_copies(s);
        status = run(s);
    }
    if (status == NEP_OK) {
        finish(s, score_p);
        *moved_p = s->moved;
    }
    nep_balance_destroy(s->balance);
    nep_map_destroy(s->map);
    free(s->turn);
    free(s->copies);
    free(s->load);
    free(s);
    return status;
}
