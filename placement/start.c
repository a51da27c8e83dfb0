/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The first placement: how often the requests of each home use each expert (the U(d, e) of arXiv
 * 2604.23150, section 4.2), and experts taken in order of regret, the one that loses most by not
 * getting its best node first, under limits on slots and on load. The search only has to mend what
 * this cannot see: which experts fire together.
 */
#include "placement/solver.h"

#include <stdlib.h>

#include "base/status.h"

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

enum nep_status nep_start_place(const struct nep_solver *solver, struct nep_solver_layer *layer)
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
