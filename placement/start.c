/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The first placement: how often the requests of each home use each expert (the U(d, e) of arXiv
 * 2604.23150, section 4.2), and experts taken in order of regret, the one that loses most by not
 * getting its best node first, under limits on slots and on load. The search only has to mend what
 * this cannot see: which experts fire together.
 *
 * Where tokens are scarce, it starts from that instead: spectral groups of the layer, named after
 * the homes whose requests use them most, with no limit on load, which the search then mends. Which
 * experts fire together holds for requests never seen; who uses them is known less well. (dsv2lite,
 * five seeds: 0.2 to 0.4 points on an unseen domain, 0.3 to 0.7 on all requests.) Groups drawn anew
 * lead the search to other ends, and with few tokens it is quick: of several, the cheapest is kept.
 */
#include "placement/solver.h"

#include <stdlib.h>

#include "base/status.h"
#include "placement/spectral.h"

/* Spectral groups need several experts each to mean something; and E x E x N is what they cost, as
 * the vectors of all nodes are multiplied by the table of pairs. */
#define LEAST_GROUP   4u
#define MOST_SPECTRAL (1ull << 20)
#define STARTS        4u

struct regret {
    double regret;
    uint32_t expert;
};

static int regret_before(const void *a, const void *b)
{
    const struct regret *x = a;
    const struct regret *y = b;
    if (x->regret != y->regret) {
        return x->regret > y->regret ? -1 : 1;
    }
    return x->expert < y->expert ? -1 : 1;
}

/* usage: [E][N]. */
static void count_usage(const struct nep_sets *sets, uint32_t nodes, uint32_t *usage)
{
    for (uint32_t t = 0; t < sets->num_tokens; t++) {
        if (sets->home[t] == NEP_NO_HOME) {
            continue;
        }
        for (uint32_t i = 0; i < sets->len[t]; i++) {
            usage[(size_t)sets->items[(size_t)t * sets->width + i] * nodes + sets->home[t]]++;
        }
    }
}

static double regret_of(const uint32_t *usage, uint32_t nodes)
{
    uint32_t best = 0;
    uint32_t second = 0;
    for (uint32_t n = 0; n < nodes; n++) {
        if (usage[n] >= best) {
            second = best;
            best = usage[n];
        } else if (usage[n] > second) {
            second = usage[n];
        }
    }
    return (double)best - second;
}

/* Most used node with room for the load; else the least loaded node with a slot. */
static uint32_t pick_node(const struct nep_solver *solver, const struct nep_solver_layer *layer,
                          const uint32_t *usage, const uint32_t *used, const double *load,
                          double weight)
{
    uint32_t best = UINT32_MAX;
    uint32_t lightest = UINT32_MAX;
    for (uint32_t n = 0; n < solver->shape.num_nodes; n++) {
        if (used[n] >= solver->base_slots[n]) {
            continue;
        }
        if (lightest == UINT32_MAX ||
            load[n] / layer->limit[n] < load[lightest] / layer->limit[lightest]) {
            lightest = n;
        }
        if (load[n] + weight <= layer->limit[n] && (best == UINT32_MAX || usage[n] > usage[best])) {
            best = n;
        }
    }
    return best != UINT32_MAX ? best : lightest;
}

static enum nep_status place_by_usage(const struct nep_solver *solver,
                                      struct nep_solver_layer *layer)
{
    uint32_t nodes = solver->shape.num_nodes;
    uint32_t experts = solver->shape.num_experts;
    uint32_t *usage = calloc((size_t)experts * nodes, sizeof *usage);
    struct regret *order = malloc(experts * sizeof *order);
    uint32_t *used = calloc(nodes, sizeof *used);
    double *load = calloc(nodes, sizeof *load);
    enum nep_status status = NEP_OK;
    if (usage == NULL || order == NULL || used == NULL || load == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u experts", experts);
        goto out;
    }
    count_usage(&layer->sets, nodes, usage);
    for (uint32_t e = 0; e < experts; e++) {
        order[e] = (struct regret){regret_of(&usage[(size_t)e * nodes], nodes), e};
    }
    qsort(order, experts, sizeof *order, regret_before);
    layer->copies.num = 0;
    for (uint32_t i = 0; i < experts; i++) {
        uint32_t e = order[i].expert;
        uint32_t n =
            pick_node(solver, layer, &usage[(size_t)e * nodes], used, load, layer->load[e]);
        used[n]++;
        load[n] += layer->load[e];
        layer->copies.expert[layer->copies.num] = (uint16_t)e;
        layer->copies.node[layer->copies.num++] = (uint16_t)n;
    }
out:
    free(usage);
    free(order);
    free(used);
    free(load);
    return status;
}

/* How much the requests of each home use the experts of each group. [N][N] */
static void count_groups(const struct nep_solver *solver, const struct nep_sets *sets,
                         const uint16_t *group, uint64_t *usage)
{
    uint32_t nodes = solver->shape.num_nodes;
    for (uint32_t t = 0; t < sets->num_tokens; t++) {
        uint32_t home = solver->homes[sets->request[t]];
        for (uint32_t i = 0; i < sets->len[t]; i++) {
            usage[(size_t)group[sets->items[(size_t)t * sets->width + i]] * nodes + home]++;
        }
    }
}

static int is_free(const uint16_t *to, uint32_t nodes, uint32_t node)
{
    for (uint32_t g = 0; g < nodes; g++) {
        if (to[g] == node) {
            return 0;
        }
    }
    return 1;
}

/* Gives each group the free node of its size whose requests use it most. to_p: [N] */
static void name_groups(const struct nep_solver *solver, const uint64_t *usage, uint16_t *to)
{
    uint32_t nodes = solver->shape.num_nodes;
    const uint32_t *slots = solver->base_slots;
    for (uint32_t g = 0; g < nodes; g++) {
        to[g] = UINT16_MAX;
    }
    for (uint32_t round = 0; round < nodes; round++) {
        uint32_t best_group = UINT32_MAX;
        uint32_t best_node = 0;
        for (uint32_t g = 0; g < nodes; g++) {
            for (uint32_t n = 0; n < nodes && to[g] == UINT16_MAX; n++) {
                if (is_free(to, nodes, n) && slots[g] == slots[n] &&
                    (best_group == UINT32_MAX ||
                     usage[(size_t)g * nodes + n] >
                         usage[(size_t)best_group * nodes + best_node])) {
                    best_group = g;
                    best_node = n;
                }
            }
        }
        to[best_group] = (uint16_t)best_node;
    }
}

static enum nep_status place_by_groups(const struct nep_solver *solver,
                                       struct nep_solver_layer *layer, uint64_t seed)
{
    uint32_t nodes = solver->shape.num_nodes;
    uint32_t experts = solver->shape.num_experts;
    uint16_t *group = calloc(experts, sizeof *group);
    uint64_t *usage = calloc((size_t)nodes * nodes, sizeof *usage);
    uint16_t *to = calloc(nodes, sizeof *to);
    enum nep_status status = NEP_OK;
    if (group == NULL || usage == NULL || to == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u experts", experts);
        goto out;
    }
    status = nep_spectral_layer(&layer->sets, nodes, solver->base_slots, seed, group);
    if (status != NEP_OK) {
        goto out;
    }
    count_groups(solver, &layer->sets, group, usage);
    name_groups(solver, usage, to);
    layer->copies.num = 0;
    for (uint32_t e = 0; e < experts; e++) {
        layer->copies.expert[layer->copies.num] = (uint16_t)e;
        layer->copies.node[layer->copies.num++] = to[group[e]];
    }
out:
    free(group);
    free(usage);
    free(to);
    return status;
}

static int is_spectral(const struct nep_solver *solver)
{
    uint64_t experts = solver->shape.num_experts;
    uint64_t nodes = solver->shape.num_nodes;
    return solver->is_whole && experts >= nodes * LEAST_GROUP &&
           experts * experts * nodes <= MOST_SPECTRAL;
}

uint32_t nep_start_count(const struct nep_solver *solver)
{
    return is_spectral(solver) ? STARTS : 1;
}

enum nep_status nep_start_place(const struct nep_solver *solver, struct nep_solver_layer *layer,
                                uint64_t seed, int is_paper)
{
    return !is_paper && is_spectral(solver) ? place_by_groups(solver, layer, seed)
                                            : place_by_usage(solver, layer);
}
