/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The course of a solve.
 *   1. Homes: balanced k-means of what requests activate.
 *   2. Per layer: experts to nodes, by regret, then swaps with exact differences (start.c, swap.c).
 *   3. Homes again, by the exact rows that every request would cost from every node; back to 2 with
 *      the placement as it is. Layers know each other only through the homes, which give the nodes
 *      of all layers one meaning; solved apart, their labels would be arbitrary.
 *   4. Second copies by marginal saving (cover.c), swaps of copies with the choice of copies held
 *      fixed, copies improved again, homes again.
 *   5. Ranks inside nodes (intra.c).
 * Layers of a step are independent jobs; every random number comes from (seed, layer, round), so
 * that the result depends neither on the number of threads nor on their timing.
 *
 * Rejected: one search over all layers and homes at once. The homes' differences would have to be
 * kept for every proposal, and two or three rounds come within half a point of its end.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/status.h"
#include "placement/cluster.h"
#include "placement/copy_swap.h"
#include "placement/parallel.h"
#include "placement/solver.h"

#define DEFAULT_IMBALANCE  1.10
#define DEFAULT_MAX_TOKENS 32768u
#define ROUNDS             4
/* Rows that a pair above a node's limit is worth in swaps: as good as a wall. Copies may buy it for
 * NEP_LOAD_PRICE. */
#define SWAP_PRICE 8.0
/* A pair between this share of the way to the limit and the limit costs so many rows: balance that
 * is cheap is taken, and rows that overload alone would earn are not. */
#define SOFT_FROM  0.3
#define SOFT_PRICE 0.15
/* Below so many scored tokens per layer, whole requests are sampled, and so many percent of the
 * tokens have their home drawn: what few requests prefer is known less well than what fires
 * together. */
#define SCARCE_TOKENS 16384u
#define SCARCE_DRAWN  80u
struct round {
    struct nep_solver *solver;
    uint32_t idx;
    int is_paper; /* the baseline: no search */
};

/* ---- set-up ---- */

static void share_out(uint32_t total, const struct nep_map_shape *shape, const uint32_t *most,
                      uint32_t *share)
{
    uint32_t given = 0;
    for (uint32_t n = 0; n < shape->num_nodes; n++) {
        share[n] = (uint32_t)((uint64_t)total * shape->ranks_per_node[n] / shape->num_ranks);
        given += share[n];
    }
    for (uint32_t n = 0; given < total; n = (n + 1) % shape->num_nodes) {
        if (share[n] < most[n]) {
            share[n]++;
            given++;
        }
    }
}

static enum nep_status alloc_solver(struct nep_solver *s, uint32_t max_tokens)
{
    uint32_t nodes = s->shape.num_nodes;
    s->slots = calloc(nodes, sizeof *s->slots);
    s->base_slots = calloc(nodes, sizeof *s->base_slots);
    s->homes = calloc((size_t)s->requests.num + 1, sizeof *s->homes);
    s->tokens = calloc((size_t)s->requests.num + 1, sizeof *s->tokens);
    s->layers = calloc(s->shape.num_layers, sizeof *s->layers);
    if (s->slots == NULL || s->base_slots == NULL || s->homes == NULL || s->tokens == NULL ||
        s->layers == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u layers, %u requests",
                        s->shape.num_layers, s->requests.num);
    }
    for (uint32_t n = 0; n < nodes; n++) {
        s->slots[n] = s->shape.ranks_per_node[n] * s->shape.slots_per_rank;
    }
    if (s->has_replicas) {
        share_out(s->shape.num_experts, &s->shape, s->slots, s->base_slots);
    } else {
        memcpy(s->base_slots, s->slots, nodes * sizeof *s->slots);
    }
    int is_scored = nep_sets_have_scored(&s->requests);
    uint64_t total = 0;
    uint64_t first;
    for (uint32_t i = 0; i < s->requests.num; i++) {
        s->tokens[i] = nep_sets_part(&s->requests, i, is_scored, &first);
        total += s->tokens[i];
    }
    if (total == 0) {
        return nep_fail(NEP_ERR_INVALID, "solver: the %u requests have no tokens", s->requests.num);
    }
    s->is_whole = total < SCARCE_TOKENS;
    s->drawn_homes = s->is_whole ? SCARCE_DRAWN : 0;
    for (uint32_t i = 0; i < s->requests.num && s->is_whole; i++) {
        total += nep_sets_part(&s->requests, i, 0, &first) - s->tokens[i];
    }
    s->stride = (uint32_t)((total + max_tokens - 1) / max_tokens);
    return NEP_OK;
}

static enum nep_status set_shape(struct nep_solver *s, const struct nep_map_shape *shape)
{
    enum nep_status status =
        nep_struct_copy(&s->shape, sizeof s->shape, shape, sizeof s->shape, "nep_map_shape");
    if (status != NEP_OK) {
        return status;
    }
    s->shape.num_layers = nep_trace_num_layers(s->requests.trace);
    s->shape.num_experts = nep_trace_num_experts(s->requests.trace);
    status = nep_map_check_shape(&s->shape);
    if (status != NEP_OK) {
        return status;
    }
    if (s->shape.num_experts > UINT16_MAX - 1 || s->shape.num_nodes > 4096) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "solver: %u experts and %u nodes; at most %u and 4096 are solved",
                        s->shape.num_experts, s->shape.num_nodes, UINT16_MAX - 1);
    }
    uint32_t least = (s->shape.num_experts + s->shape.num_ranks - 1) / s->shape.num_ranks;
    s->has_replicas = s->shape.slots_per_rank > least;
    return NEP_OK;
}

static enum nep_status set_params(struct nep_solver *s, const struct nep_solve_params *p)
{
    s->max_imbalance = p->max_imbalance == 0.0 ? DEFAULT_IMBALANCE : p->max_imbalance;
    if (!(s->max_imbalance >= 1.0 && s->max_imbalance <= 1e6)) {
        return nep_fail(NEP_ERR_INVALID,
                        "solver: max_imbalance is %g; it is max/mean and cannot be below 1",
                        p->max_imbalance);
    }
    s->requests.idx = p->requests;
    s->requests.num =
        p->requests == NULL ? nep_trace_num_requests(s->requests.trace) : p->num_requests;
    for (uint32_t i = 0; i < s->requests.num; i++) {
        if (nep_trace_request_at(s->requests.trace, nep_requests_at(&s->requests, i)) == NULL) {
            return nep_fail(NEP_ERR_INVALID, "solver: request %u of %u",
                            nep_requests_at(&s->requests, i),
                            nep_trace_num_requests(s->requests.trace));
        }
    }
    s->seed = p->seed;
    s->deadline_ns = p->time_limit_ns == 0 ? UINT64_MAX : nep_deadline_ns(p->time_limit_ns);
    s->progress = p->progress;
    s->progress_ctx = p->progress_ctx;
    s->warm = p->warm;
    s->max_moves = p->max_moves;
    s->num_threads = p->num_threads == 0 ? 1 : p->num_threads;
    s->max_proposals = p->max_proposals == 0 ? UINT64_MAX : p->max_proposals;
    return NEP_OK;
}

static enum nep_status load_layer(void *ctx, uint32_t idx)
{
    struct nep_solver *s = ctx;
    struct nep_solver_layer *layer = &s->layers[idx];
    enum nep_status status =
        nep_sets_sample(&s->requests, idx, s->stride, s->is_whole, &layer->sets);
    if (status != NEP_OK) {
        return status;
    }
    uint32_t slots = s->shape.num_ranks * s->shape.slots_per_rank;
    status = nep_layer_copies_init(&layer->copies, slots);
    layer->load = calloc(s->shape.num_experts, sizeof *layer->load);
    layer->cost = calloc((size_t)s->requests.num * s->shape.num_nodes + 1, sizeof *layer->cost);
    layer->limit = calloc(s->shape.num_nodes, sizeof *layer->limit);
    layer->entries = calloc(slots, sizeof *layer->entries);
    if (status != NEP_OK || layer->load == NULL || layer->cost == NULL || layer->limit == NULL ||
        layer->entries == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for layer %u", idx);
    }
    double total = 0.0;
    for (uint32_t e = 0; e < s->shape.num_experts; e++) {
        layer->load[e] = layer->sets.begin[e + 1] - layer->sets.begin[e];
        total += layer->load[e];
    }
    for (uint32_t n = 0; n < s->shape.num_nodes; n++) {
        layer->limit[n] =
            s->max_imbalance * total * s->shape.ranks_per_node[n] / s->shape.num_ranks + 1e-6;
    }
    return NEP_OK;
}

/* A limit that the caller asked for and that one expert alone breaks is refused; the default limit
 * is kept as well as can be. Copies can split an expert's load, so only without them. */
static enum nep_status check_limit(const struct nep_solver *s)
{
    double most_share = 0.0;
    for (uint32_t n = 0; n < s->shape.num_nodes; n++) {
        double share = (double)s->shape.ranks_per_node[n] / s->shape.num_ranks;
        most_share = share > most_share ? share : most_share;
    }
    for (uint32_t l = 0; l < s->shape.num_layers && !s->has_replicas; l++) {
        const struct nep_solver_layer *layer = &s->layers[l];
        double total = layer->sets.begin[s->shape.num_experts];
        for (uint32_t e = 0; e < s->shape.num_experts; e++) {
            if (layer->load[e] > s->max_imbalance * total * most_share + 1.0) {
                return nep_fail(NEP_ERR_INVALID,
                                "solver: layer %u, expert %u has %.1f %% of the load, a node may "
                                "have %.1f %% (max_imbalance %.3f): allow more, or replicas",
                                l, e, 100.0 * layer->load[e] / total,
                                100.0 * s->max_imbalance * most_share, s->max_imbalance);
            }
        }
    }
    return NEP_OK;
}

static void fini_solver(struct nep_solver *s)
{
    for (uint32_t l = 0; s->layers != NULL && l < s->shape.num_layers; l++) {
        nep_sets_fini(&s->layers[l].sets);
        nep_layer_copies_fini(&s->layers[l].copies);
        free(s->layers[l].load);
        free(s->layers[l].cost);
        free(s->layers[l].limit);
        free(s->layers[l].entries);
    }
    free(s->slots);
    free(s->base_slots);
    free(s->homes);
    free(s->tokens);
    free(s->layers);
}

/* ---- one layer's steps ---- */

static double soft_share(const struct nep_solver *s)
{
    return (1.0 + SOFT_FROM * (s->max_imbalance - 1.0)) / s->max_imbalance;
}

static int is_late(const struct nep_solver *s)
{
    return s->deadline_ns != UINT64_MAX && nep_now_ns() >= s->deadline_ns;
}

void nep_solver_set_homes(const struct nep_solver *s, struct nep_sets *sets)
{
    for (uint32_t t = 0; t < sets->num_tokens; t++) {
        struct nep_rng rng = nep_rng_seed(t);
        int is_drawn = nep_rng_below(&rng, 100) < s->drawn_homes;
        sets->home[t] = (uint16_t)(is_drawn ? nep_rng_below(&rng, s->shape.num_nodes)
                                            : s->homes[sets->request[t]]);
    }
}

enum nep_status nep_solver_cost_homes(const struct nep_solver *s, struct nep_solver_layer *layer)
{
    const struct nep_cover_params params = {.sets = &layer->sets,
                                            .num_nodes = s->shape.num_nodes,
                                            .slots = s->slots,
                                            .limit = layer->limit};
    struct nep_cover cover;
    enum nep_status status = nep_cover_init(&cover, &params, &layer->copies);
    if (status == NEP_OK) {
        memset(layer->cost, 0, (size_t)s->requests.num * s->shape.num_nodes * sizeof *layer->cost);
        nep_cover_home_costs(&cover, layer->cost);
        nep_cover_fini(&cover);
    }
    return status;
}

/* Swaps of single copies; empty slots take part as items without tokens. *total_p: rows in the end,
 * loads at their prices. */
static enum nep_status swap_experts(const struct nep_solver *s, struct nep_solver_layer *layer,
                                    struct nep_rng *rng, uint64_t max_proposals, double *total_p)
{
    uint32_t slots = 0;
    for (uint32_t n = 0; n < s->shape.num_nodes; n++) {
        slots += s->base_slots[n];
    }
    uint16_t *group = malloc(((size_t)slots + 1) * sizeof *group);
    double *weight = calloc((size_t)slots + 1, sizeof *weight);
    uint32_t *free_slots = malloc(s->shape.num_nodes * sizeof *free_slots);
    enum nep_status status = NEP_OK;
    struct nep_swap swap = {0};
    if (group == NULL || weight == NULL || free_slots == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u slots", slots);
        goto out;
    }
    memcpy(free_slots, s->base_slots, s->shape.num_nodes * sizeof *free_slots);
    for (uint32_t c = 0; c < layer->copies.num; c++) {
        uint32_t e = layer->copies.expert[c];
        group[e] = layer->copies.node[c];
        weight[e] = layer->load[e];
        free_slots[group[e]]--;
    }
    uint32_t at = s->shape.num_experts;
    for (uint32_t n = 0; n < s->shape.num_nodes; n++) {
        for (uint32_t i = 0; i < free_slots[n]; i++) {
            group[at++] = (uint16_t)n;
        }
    }
    const struct nep_swap_params params = {.sets = &layer->sets,
                                           .num_slots = slots,
                                           .num_groups = s->shape.num_nodes,
                                           .weight = weight,
                                           .limit = layer->limit,
                                           .price = SWAP_PRICE,
                                           .soft_share = soft_share(s),
                                           .soft_price = SOFT_PRICE};
    status = nep_swap_init(&swap, &params, group);
    if (status == NEP_OK) {
        nep_swap_run(&swap, rng, max_proposals, s->deadline_ns);
        *total_p = nep_swap_total(&swap);
        for (uint32_t c = 0; c < layer->copies.num; c++) {
            layer->copies.node[c] = swap.group[layer->copies.expert[c]];
        }
    }
out:
    nep_swap_fini(&swap);
    free(group);
    free(weight);
    free(free_slots);
    return status;
}

/* Starts and searches, several times where that is worth it; the cheapest end is kept. */
static enum nep_status start_layer(const struct nep_solver *s, struct nep_solver_layer *layer,
                                   uint64_t seed, struct nep_rng *rng)
{
    uint32_t starts = nep_start_count(s);
    struct nep_layer_copies best;
    double best_total = INFINITY;
    enum nep_status status = nep_layer_copies_init(&best, layer->copies.cap);
    for (uint32_t i = 0; i < starts && status == NEP_OK && !(i > 0 && is_late(s)); i++) {
        double total = 0.0;
        status = nep_start_place(s, layer, seed + ((uint64_t)i << 48), 0);
        if (status == NEP_OK) {
            status = swap_experts(s, layer, rng, s->max_proposals / starts, &total);
        }
        if (status == NEP_OK && total < best_total) {
            struct nep_layer_copies other = best;
            best = layer->copies;
            layer->copies = other;
            best_total = total;
        }
    }
    struct nep_layer_copies other = layer->copies;
    if (status == NEP_OK) {
        layer->copies = best;
    } else {
        other = best;
    }
    nep_layer_copies_fini(&other);
    return status;
}

static enum nep_status place_layer(void *ctx, uint32_t idx)
{
    const struct round *round = ctx;
    const struct nep_solver *s = round->solver;
    struct nep_solver_layer *layer = &s->layers[idx];
    struct nep_rng rng = nep_rng_seed(s->seed ^ ((uint64_t)idx << 32) ^ round->idx);
    nep_solver_set_homes(s, &layer->sets);
    enum nep_status status = NEP_OK;
    if (round->is_paper) {
        status = nep_start_place(s, layer, s->seed ^ idx, 1);
    } else if (round->idx == 0) {
        status = start_layer(s, layer, s->seed ^ idx, &rng);
    } else {
        double total;
        status = swap_experts(s, layer, &rng, s->max_proposals, &total);
    }
    return status == NEP_OK ? nep_solver_cost_homes(s, layer) : status;
}

static enum nep_status swap_copies(const struct nep_solver *s, struct nep_solver_layer *layer,
                                   const struct nep_cover *cover, struct nep_rng *rng)
{
    struct nep_copy_swap cs;
    enum nep_status status =
        nep_copy_swap_init(&cs, cover, &layer->copies, layer->limit, SWAP_PRICE);
    if (status == NEP_OK) {
        nep_swap_run(&cs.swap, rng, s->max_proposals, s->deadline_ns);
        memcpy(layer->copies.node, cs.swap.group, layer->copies.num * sizeof *layer->copies.node);
        nep_copy_swap_fini(&cs);
    }
    return status;
}

static enum nep_status copy_layer(void *ctx, uint32_t idx)
{
    const struct round *round = ctx;
    const struct nep_solver *s = round->solver;
    struct nep_solver_layer *layer = &s->layers[idx];
    struct nep_rng rng = nep_rng_seed(s->seed ^ ((uint64_t)idx << 32) ^ (1000 + round->idx));
    nep_solver_set_homes(s, &layer->sets);
    const struct nep_cover_params params = {.sets = &layer->sets,
                                            .num_nodes = s->shape.num_nodes,
                                            .slots = s->slots,
                                            .limit = layer->limit,
                                            .price = NEP_LOAD_PRICE,
                                            .soft_share = soft_share(s),
                                            .soft_price = SOFT_PRICE};
    struct nep_cover cover;
    enum nep_status status = NEP_OK;
    for (int step = 0; step < 4 && status == NEP_OK && !is_late(s); step++) {
        status = nep_cover_init(&cover, &params, &layer->copies);
        if (status != NEP_OK) {
            return status;
        }
        nep_cover_fill(&cover);
        if (step > 0) {
            nep_cover_improve(&cover, 1);
        }
        nep_cover_get(&cover, &layer->copies);
        if (step < 3) {
            status = swap_copies(s, layer, &cover, &rng);
        }
        nep_cover_fini(&cover);
    }
    return status == NEP_OK ? nep_solver_cost_homes(s, layer) : status;
}

static enum nep_status intra_layer(void *ctx, uint32_t idx)
{
    const struct round *round = ctx;
    struct nep_solver_layer *layer = &round->solver->layers[idx];
    nep_solver_set_homes(round->solver, &layer->sets);
    return nep_intra_place(round->solver, layer, idx);
}

/* ---- the course ---- */

enum nep_status nep_solver_assign_homes(struct nep_solver *s)
{
    uint32_t nodes = s->shape.num_nodes;
    size_t num = (size_t)s->requests.num * nodes;
    float *cost = malloc((num + 1) * sizeof *cost);
    if (cost == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u requests", s->requests.num);
    }
    for (size_t i = 0; i < num; i++) {
        uint64_t sum = 0;
        for (uint32_t l = 0; l < s->shape.num_layers; l++) {
            sum += s->layers[l].cost[i];
        }
        cost[i] = (float)sum;
    }
    const struct nep_homes_params params = {s->requests.num, nodes, s->shape.ranks_per_node,
                                            s->tokens, cost};
    enum nep_status status = nep_homes_assign(&params, s->homes);
    free(cost);
    return status;
}

enum nep_status nep_solver_step(struct nep_solver *s, nep_job_fn fn, void *ctx, double done)
{
    enum nep_status status = nep_parallel_run(s->num_threads, s->shape.num_layers, fn, ctx);
    if (status == NEP_OK && s->progress != NULL) {
        double spent = (double)(nep_now_ns() - s->start_ns);
        s->progress(s->progress_ctx, done, (uint64_t)(spent * (1.0 - done) / done));
    }
    return status;
}

static enum nep_status solve_cold(struct nep_solver *s, int is_paper)
{
    struct round round = {s, 0, is_paper};
    uint32_t rounds = is_paper ? 1 : ROUNDS;
    double share = s->has_replicas ? 0.35 : 0.8; /* of the time, by the rounds without copies */
    enum nep_status status =
        nep_cluster_homes(&s->requests, &s->shape, NEP_CLUSTER_ALL, s->seed, s->homes);
    for (; round.idx < rounds && status == NEP_OK && !(round.idx > 0 && is_late(s)); round.idx++) {
        status = nep_solver_step(s, place_layer, &round, 0.05 + share * (round.idx + 1) / rounds);
        if (status == NEP_OK && !is_paper) {
            status = nep_solver_assign_homes(s);
        }
    }
    if (status == NEP_OK && s->has_replicas && !is_paper) {
        status = nep_solver_step(s, copy_layer, &round, 0.9);
        if (status == NEP_OK) {
            status = nep_solver_assign_homes(s);
        }
    }
    return status == NEP_OK ? nep_solver_step(s, intra_layer, &round, 1.0) : status;
}

/* ---- the map ---- */

static enum nep_status build(const struct nep_solver *s, struct nep_map **map_p)
{
    size_t num = 0;
    for (uint32_t l = 0; l < s->shape.num_layers; l++) {
        num += s->layers[l].num_entries;
    }
    struct nep_map_entry *entries = malloc((num + 1) * sizeof *entries);
    if (entries == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %zu copies", num);
    }
    size_t at = 0;
    for (uint32_t l = 0; l < s->shape.num_layers; l++) {
        memcpy(&entries[at], s->layers[l].entries, s->layers[l].num_entries * sizeof *entries);
        at += s->layers[l].num_entries;
    }
    enum nep_status status = nep_map_build(&s->shape, entries, num, map_p);
    free(entries);
    return status;
}

static enum nep_status solve(const struct nep_trace *trace, const struct nep_solve_params *params,
                             int is_paper, struct nep_map **map_p)
{
    struct nep_solve_params p;
    struct nep_solver s = {.requests = {.trace = trace}, .start_ns = nep_now_ns()};
    enum nep_status status =
        nep_struct_copy(&p, sizeof p, params, 2 * sizeof(void *), "nep_solve_params");
    if (status != NEP_OK) {
        return status;
    }
    if (trace == NULL || map_p == NULL || p.shape == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_map_solve: trace, params->shape or map_p is NULL");
    }
    status = set_params(&s, &p);
    if (status == NEP_OK) {
        status = set_shape(&s, p.shape);
    }
    uint32_t max_tokens = s.warm != NULL ? NEP_WARM_MAX_TOKENS : DEFAULT_MAX_TOKENS;
    if (status == NEP_OK) {
        status = alloc_solver(&s, p.max_tokens == 0 ? max_tokens : p.max_tokens);
    }
    if (status == NEP_OK) {
        status = nep_parallel_run(s.num_threads, s.shape.num_layers, load_layer, &s);
    }
    if (status == NEP_OK && p.max_imbalance != 0.0) {
        status = check_limit(&s);
    }
    if (status == NEP_OK) {
        status = s.warm != NULL ? nep_solve_warm(&s) : solve_cold(&s, is_paper);
    }
    if (status == NEP_OK) {
        status = build(&s, map_p);
    }
    if (status == NEP_OK) {
        (*map_p)->is_truncated = is_late(&s);
    }
    fini_solver(&s);
    return status;
}

enum nep_status nep_map_solve(const struct nep_trace *trace, const struct nep_solve_params *params,
                              struct nep_map **map_p)
{
    return solve(trace, params, 0, map_p);
}

enum nep_status nep_solve_paper(const struct nep_trace *trace,
                                const struct nep_solve_params *params, struct nep_map **map_p)
{
    return solve(trace, params, 1, map_p);
}
