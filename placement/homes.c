/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Homes of requests. The cost of a home is what will be paid for it: the distinct remote nodes that
 * the tokens of the signature would visit from there. The assignment under a token limit is a
 * generalised assignment problem; regret order (the request that loses most by not getting its best
 * node goes first) followed by moves and swaps that lower the cost comes within a fraction of a
 * percent of the optimum at this size and is deterministic.
 *
 * Rejected: similarity of expert histograms to cluster centres (the paper's signature, ELDR's
 * centroids). It needs vectors of layers x experts per request and measures something that nobody
 * pays for; the node-touch cost is num_nodes numbers and is the objective itself.
 */
#include "placement/homes.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "placement/map.h"
#include "placement/rng.h"

#define MAX_PASSES 8
/* Swaps are quadratic in the requests: only below this many. */
#define MAX_SWAP_REQUESTS 4096u

struct assign {
    const struct nep_homes_params *params;
    uint32_t *homes;
    uint64_t *load;
    uint64_t *limit;
};

struct nep_requests nep_requests_all(const struct nep_trace *trace)
{
    return (struct nep_requests){trace, NULL, nep_trace_num_requests(trace)};
}

static const float *cost_of(const struct nep_homes_params *params, uint32_t request)
{
    return &params->cost[(size_t)request * params->num_nodes];
}

static void set_limits(const struct nep_homes_params *params, uint64_t *limit)
{
    uint64_t tokens = 0;
    uint64_t ranks = 0;
    for (uint32_t i = 0; i < params->num_requests; i++) {
        tokens += params->tokens[i];
    }
    for (uint32_t n = 0; n < params->num_nodes; n++) {
        ranks += params->ranks_per_node[n];
    }
    for (uint32_t n = 0; n < params->num_nodes; n++) {
        double share = (double)tokens * params->ranks_per_node[n] / (double)ranks;
        limit[n] = (uint64_t)(share * (1.0 + NEP_HOMES_SLACK));
    }
}

static double fill_of(const struct assign *a, uint32_t node, uint64_t load)
{
    return (double)load / (double)(a->limit[node] + 1);
}

/* Where a request goes that fits nowhere: of the nodes relatively least loaded, give or take the
 * slack, the cheapest; among equals the one after `turn`. */
static uint32_t least_loaded(const struct assign *a, const float *cost, uint32_t turn)
{
    uint32_t nodes = a->params->num_nodes;
    double least = INFINITY;
    for (uint32_t n = 0; n < nodes; n++) {
        double fill = fill_of(a, n, a->load[n]);
        least = fill < least ? fill : least;
    }
    uint32_t best = UINT32_MAX;
    for (uint32_t i = 0; i < nodes; i++) {
        uint32_t n = (turn + i) % nodes;
        if (fill_of(a, n, a->load[n]) <= least + NEP_HOMES_SLACK &&
            (best == UINT32_MAX || (cost != NULL && cost[n] < cost[best]))) {
            best = n;
        }
    }
    return best;
}

static int fits(const struct assign *a, uint32_t node, uint64_t tokens)
{
    return a->load[node] + tokens <= a->limit[node];
}

struct by_regret {
    float regret;
    uint32_t request;
};

static int regret_before(const void *a, const void *b)
{
    const struct by_regret *x = a;
    const struct by_regret *y = b;
    if (x->regret != y->regret) {
        return x->regret > y->regret ? -1 : 1;
    }
    return x->request < y->request ? -1 : 1;
}

static void assign_by_regret(struct assign *a, struct by_regret *order)
{
    const struct nep_homes_params *params = a->params;
    for (uint32_t i = 0; i < params->num_requests; i++) {
        const float *cost = cost_of(params, i);
        float best = cost[0];
        float second = params->num_nodes > 1 ? cost[1] : cost[0];
        if (second < best) {
            float swap = best;
            best = second;
            second = swap;
        }
        for (uint32_t n = 2; n < params->num_nodes; n++) {
            if (cost[n] < best) {
                second = best;
                best = cost[n];
            } else if (cost[n] < second) {
                second = cost[n];
            }
        }
        order[i] = (struct by_regret){second - best, i};
    }
    qsort(order, params->num_requests, sizeof *order, regret_before);
    for (uint32_t i = 0; i < params->num_requests; i++) {
        uint32_t request = order[i].request;
        const float *cost = cost_of(params, request);
        uint32_t best = UINT32_MAX;
        for (uint32_t n = 0; n < params->num_nodes; n++) {
            if (fits(a, n, params->tokens[request]) &&
                (best == UINT32_MAX || cost[n] < cost[best])) {
                best = n;
            }
        }
        if (best == UINT32_MAX) {
            best = least_loaded(a, cost, 0);
        }
        a->homes[request] = best;
        a->load[best] += params->tokens[request];
    }
}

/* A request larger than a node's limit fits nowhere; it may still go where it leaves no node fuller
 * than its own was. */
static int may_move(const struct assign *a, uint32_t from, uint32_t to, uint64_t tokens)
{
    return fits(a, to, tokens) ||
           fill_of(a, to, a->load[to] + tokens) <= fill_of(a, from, a->load[from]);
}

static int improve_moves(struct assign *a)
{
    const struct nep_homes_params *params = a->params;
    int moved = 0;
    for (uint32_t i = 0; i < params->num_requests; i++) {
        const float *cost = cost_of(params, i);
        uint32_t from = a->homes[i];
        uint32_t best = from;
        for (uint32_t n = 0; n < params->num_nodes; n++) {
            if (n != from && cost[n] < cost[best] && may_move(a, from, n, params->tokens[i])) {
                best = n;
            }
        }
        if (best != from) {
            a->load[from] -= params->tokens[i];
            a->load[best] += params->tokens[i];
            a->homes[i] = best;
            moved = 1;
        }
    }
    return moved;
}

/* May i and j exchange homes: neither node may end above its limit, unless the fuller of the two
 * gets no fuller. */
static int may_swap(const struct assign *a, uint32_t i, uint32_t j)
{
    uint64_t wi = a->params->tokens[i];
    uint64_t wj = a->params->tokens[j];
    uint32_t hi = a->homes[i];
    uint32_t hj = a->homes[j];
    uint64_t at_i = a->load[hi] - wi + wj;
    uint64_t at_j = a->load[hj] - wj + wi;
    return (at_i <= a->limit[hi] && at_j <= a->limit[hj]) ||
           fmax(fill_of(a, hi, at_i), fill_of(a, hj, at_j)) <=
               fmax(fill_of(a, hi, a->load[hi]), fill_of(a, hj, a->load[hj]));
}

static int improve_swaps(struct assign *a)
{
    const struct nep_homes_params *params = a->params;
    int swapped = 0;
    for (uint32_t i = 0; i < params->num_requests; i++) {
        const float *ci = cost_of(params, i);
        for (uint32_t j = i + 1; j < params->num_requests; j++) {
            const float *cj = cost_of(params, j);
            uint32_t hi = a->homes[i];
            uint32_t hj = a->homes[j];
            float gain = ci[hi] + cj[hj] - ci[hj] - cj[hi];
            if (hi == hj || !(gain > 1e-6f * (ci[hi] + cj[hj])) || !may_swap(a, i, j)) {
                continue;
            }
            a->load[hi] += params->tokens[j] - params->tokens[i];
            a->load[hj] += params->tokens[i] - params->tokens[j];
            a->homes[i] = hj;
            a->homes[j] = hi;
            swapped = 1;
        }
    }
    return swapped;
}

enum nep_status nep_homes_assign(const struct nep_homes_params *params, uint32_t *homes)
{
    struct by_regret *order = malloc(((size_t)params->num_requests + 1) * sizeof *order);
    uint64_t *load = calloc(2 * (size_t)params->num_nodes, sizeof *load);
    if (order == NULL || load == NULL) {
        free(order);
        free(load);
        return nep_fail(NEP_ERR_NO_MEMORY, "homes: no memory for %u requests",
                        params->num_requests);
    }
    struct assign a = {params, homes, load, load + params->num_nodes};
    set_limits(params, a.limit);
    assign_by_regret(&a, order);
    for (int pass = 0; pass < MAX_PASSES; pass++) {
        int changed = improve_moves(&a);
        if (params->num_requests <= MAX_SWAP_REQUESTS) {
            changed |= improve_swaps(&a);
        }
        if (!changed) {
            break;
        }
    }
    free(order);
    free(load);
    return NEP_OK;
}

static enum nep_status weigh(const struct nep_requests *requests, uint64_t **tokens_p)
{
    uint64_t *tokens = malloc(((size_t)requests->num + 1) * sizeof *tokens);
    if (tokens == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "homes: no memory for %u requests", requests->num);
    }
    for (uint32_t i = 0; i < requests->num; i++) {
        uint64_t first;
        /* What is known when the home is chosen: the length of the signature, not of the answer. */
        nep_trace_signature(requests->trace, nep_requests_at(requests, i), &first, &tokens[i]);
        tokens[i] = tokens[i] == 0 ? 1 : tokens[i];
    }
    *tokens_p = tokens;
    return NEP_OK;
}

enum nep_status nep_homes_random(const struct nep_requests *requests,
                                 const struct nep_map_shape *shape, uint64_t seed, uint32_t *homes)
{
    uint64_t *tokens;
    enum nep_status status = weigh(requests, &tokens);
    if (status != NEP_OK) {
        return status;
    }
    uint64_t *load = calloc(2 * (size_t)shape->num_nodes, sizeof *load);
    uint32_t *order = malloc(((size_t)requests->num + shape->num_nodes + 1) * sizeof *order);
    if (load == NULL || order == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "homes: no memory for %u requests", requests->num);
        goto out;
    }
    const struct nep_homes_params params = {requests->num, shape->num_nodes, shape->ranks_per_node,
                                            tokens, NULL};
    struct assign a = {&params, homes, load, load + shape->num_nodes};
    set_limits(&params, a.limit);
    struct nep_rng rng = nep_rng_seed(seed);
    for (uint32_t i = 0; i < requests->num; i++) {
        order[i] = i;
    }
    nep_rng_shuffle(&rng, order, requests->num);
    uint32_t *open = order + requests->num;
    for (uint32_t i = 0; i < requests->num; i++) {
        uint32_t num_open = 0;
        for (uint32_t n = 0; n < shape->num_nodes; n++) {
            if (fits(&a, n, tokens[order[i]])) {
                open[num_open++] = n;
            }
        }
        uint32_t node = num_open > 0
                            ? open[nep_rng_below(&rng, num_open)]
                            : least_loaded(&a, NULL, nep_rng_below(&rng, shape->num_nodes));
        homes[order[i]] = node;
        load[node] += tokens[order[i]];
    }
out:
    free(load);
    free(order);
    free(tokens);
    return status;
}

struct coster {
    const struct nep_map *map;
    uint32_t *first_rank; /* [num_nodes] */
    uint32_t *stamp;      /* [num_nodes] */
    uint32_t now;
};

static void coster_fini(struct coster *c)
{
    free(c->first_rank);
    free(c->stamp);
}

static enum nep_status coster_init(struct coster *c, const struct nep_map *map)
{
    uint32_t nodes = map->shape.num_nodes;
    *c = (struct coster){map, calloc(nodes, sizeof(uint32_t)), calloc(nodes, sizeof(uint32_t)), 0};
    if (c->first_rank == NULL || c->stamp == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "homes: no memory for %u nodes", nodes);
    }
    for (uint32_t n = 1; n < nodes; n++) {
        c->first_rank[n] = c->first_rank[n - 1] + map->shape.ranks_per_node[n - 1];
    }
    return NEP_OK;
}

/* Adds, for every possible home, the remote nodes of one token. */
static void add_cost(struct coster *c, const struct nep_copies *copies, const int32_t *ids,
                     uint32_t k, float *cost)
{
    uint32_t slots[NEP_TRACE_TOP_K_LIMIT];
    int is_single = 1;
    for (uint32_t i = 0; i < k; i++) {
        is_single &= ids[i] < 0 || copies->begin[ids[i] + 1] - copies->begin[ids[i]] == 1;
    }
    for (uint32_t home = 0; home < copies->num_nodes; home++) {
        uint32_t distinct = 0;
        c->now++;
        if (is_single) {
            for (uint32_t i = 0; i < k; i++) {
                slots[i] = ids[i] < 0 ? NEP_SLOT_NONE : copies->begin[ids[i]];
            }
        } else {
            nep_choose(copies, c->first_rank[home], 0, ids, k, slots);
        }
        for (uint32_t i = 0; i < k; i++) {
            if (slots[i] == NEP_SLOT_NONE) {
                continue;
            }
            uint32_t node = is_single ? copies->node[slots[i]]
                                      : copies->node_of_rank[slots[i] / copies->slots_per_rank];
            distinct += c->stamp[node] != c->now;
            c->stamp[node] = c->now;
        }
        if (!is_single) {
            cost[home] += (float)(distinct - (c->stamp[home] == c->now));
            continue;
        }
        for (uint32_t h = 0; h < copies->num_nodes; h++) {
            cost[h] += (float)(distinct - (c->stamp[h] == c->now));
        }
        return;
    }
}

static void cost_request(struct coster *c, const struct nep_trace *trace, uint64_t first,
                         uint64_t count, float *cost)
{
    int32_t ids[NEP_TRACE_TOP_K_LIMIT];
    uint32_t top_k = nep_trace_top_k(trace);
    struct nep_copies copies;
    for (uint32_t layer = 0; layer < c->map->shape.num_layers; layer++) {
        nep_map_copies(c->map, layer, &copies);
        for (uint64_t t = 0; t < count; t++) {
            nep_trace_ids(trace, first + t, layer, ids);
            add_cost(c, &copies, ids, top_k, cost);
        }
    }
}

static enum nep_status homes_from(const struct nep_requests *requests, const struct nep_map *map,
                                  int is_oracle, uint32_t *homes)
{
    const struct nep_map_shape *shape = &map->shape;
    enum nep_status status = nep_trace_match(requests->trace, map);
    if (status != NEP_OK) {
        return status;
    }
    uint64_t *tokens;
    status = weigh(requests, &tokens);
    if (status != NEP_OK) {
        return status;
    }
    struct coster c;
    status = coster_init(&c, map);
    float *cost = calloc((size_t)requests->num * shape->num_nodes + 1, sizeof *cost);
    if (status == NEP_OK && cost == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "homes: no memory for %u requests", requests->num);
    }
    if (status != NEP_OK) {
        goto out;
    }
    for (uint32_t i = 0; i < requests->num; i++) {
        uint64_t first;
        uint64_t count;
        uint32_t request = nep_requests_at(requests, i);
        if (is_oracle) {
            nep_trace_scored(requests->trace, request, &first, &count);
        } else {
            nep_trace_signature(requests->trace, request, &first, &count);
        }
        cost_request(&c, requests->trace, first, count, &cost[(size_t)i * shape->num_nodes]);
    }
    const struct nep_homes_params params = {requests->num, shape->num_nodes, shape->ranks_per_node,
                                            tokens, cost};
    status = nep_homes_assign(&params, homes);
out:
    coster_fini(&c);
    free(cost);
    free(tokens);
    return status;
}

enum nep_status nep_homes_predict(const struct nep_requests *requests, const struct nep_map *map,
                                  uint32_t *homes)
{
    return homes_from(requests, map, 0, homes);
}

enum nep_status nep_homes_oracle(const struct nep_requests *requests, const struct nep_map *map,
                                 uint32_t *homes)
{
    return homes_from(requests, map, 1, homes);
}

enum nep_status nep_map_home_scores(const struct nep_map *map, uint32_t layer, const int32_t *ids,
                                    uint32_t num_tokens, uint32_t top_k, float *scores)
{
    struct nep_copies copies;
    if (map == NULL || scores == NULL || (ids == NULL && num_tokens > 0)) {
        return nep_fail(NEP_ERR_INVALID, "home scores: map, ids or scores is NULL");
    }
    if (top_k == 0 || top_k > NEP_TRACE_TOP_K_LIMIT) {
        return nep_fail(NEP_ERR_INVALID, "home scores: top_k %u (1 to %d)", top_k,
                        NEP_TRACE_TOP_K_LIMIT);
    }
    enum nep_status status = nep_map_copies(map, layer, &copies);
    if (status != NEP_OK) {
        return status;
    }
    for (size_t i = 0; i < (size_t)num_tokens * top_k; i++) {
        if (ids[i] < -1 || ids[i] >= (int32_t)copies.num_experts) {
            return nep_fail(NEP_ERR_INVALID, "home scores: token %zu, k %zu: id %d of %u experts",
                            i / top_k, i % top_k, ids[i], copies.num_experts);
        }
    }
    struct coster c;
    status = coster_init(&c, map);
    if (status == NEP_OK) {
        for (uint32_t t = 0; t < num_tokens; t++) {
            add_cost(&c, &copies, &ids[(size_t)t * top_k], top_k, scores);
        }
    }
    coster_fini(&c);
    return status;
}
