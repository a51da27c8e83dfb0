/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Swapping a (in group p) with b (in q) changes the cost by
 *   - remove_gain[a] - remove_gain[b] + add_cost[q][a] + add_cost[p][b] + pair[a][b] + pair[b][a]:
 * tokens with only a leave p when a was alone there, and come to q when nobody was there; tokens
 * with both change nothing, which the two pair terms restore, because such a token was counted as
 * leaving p (a alone) without b arriving. The tables change only when a swap is accepted, in the
 * tokens that hold a or b. This is the classical gain bookkeeping of Kernighan-Lin and
 * Fiduccia-Mattheyses, for the hypergraph objective "connectivity - 1" with the homes as fixed
 * pins.
 *
 * The search takes, for every item in random order, its best partner if that improves. Annealing,
 * tabu lists and restarts gained less than a point for ten times the time.
 *
 * Load is a limit, not an objective: a swap may not raise the overload (load above the groups'
 * limits), and one that lowers it is worth `price` per pair. What the overload of two groups could
 * be worth at most bounds a swap's value, so that few swaps need the loads looked at.
 */
#include "placement/swap.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/status.h"

static int32_t *pair_row(const struct nep_swap *swap, uint32_t item)
{
    return &swap->pair[(size_t)item * swap->params.sets->num_items];
}

static int32_t *add_row(const struct nep_swap *swap, uint32_t group)
{
    return &swap->add_cost[(size_t)group * swap->params.num_slots];
}

/* The item is alone in its remote group for this token: by = 1, or no longer: -1. */
static void set_alone(struct nep_swap *swap, const uint16_t *items, uint32_t len, uint32_t item,
                      int32_t by)
{
    swap->remove_gain[item] += by;
    int32_t *row = pair_row(swap, item);
    for (uint32_t i = 0; i < len; i++) {
        row[items[i]] += by;
    }
}

static uint32_t find_other(const struct nep_swap *swap, const uint16_t *items, uint32_t len,
                           uint32_t item, uint32_t group)
{
    for (uint32_t i = 0; i < len; i++) {
        if (items[i] != item && swap->group[items[i]] == group) {
            return items[i];
        }
    }
    return item; /* not reached: the counts say that there is one */
}

static void leave(struct nep_swap *swap, uint32_t token, uint32_t item, uint32_t group)
{
    const struct nep_sets *sets = swap->params.sets;
    const uint16_t *items = &sets->items[(size_t)token * sets->width];
    uint32_t len = sets->len[token];
    uint8_t *count = &swap->count[(size_t)token * swap->params.num_groups + group];
    if (sets->home[token] != group) {
        if (*count == 1) {
            set_alone(swap, items, len, item, -1);
            int32_t *row = add_row(swap, group);
            for (uint32_t i = 0; i < len; i++) {
                row[items[i]]++;
            }
            swap->cost--;
        } else if (*count == 2) {
            set_alone(swap, items, len, find_other(swap, items, len, item, group), 1);
        }
    }
    (*count)--;
}

static void enter(struct nep_swap *swap, uint32_t token, uint32_t item, uint32_t group)
{
    const struct nep_sets *sets = swap->params.sets;
    const uint16_t *items = &sets->items[(size_t)token * sets->width];
    uint32_t len = sets->len[token];
    uint8_t *count = &swap->count[(size_t)token * swap->params.num_groups + group];
    if (sets->home[token] != group) {
        if (*count == 0) {
            set_alone(swap, items, len, item, 1);
            int32_t *row = add_row(swap, group);
            for (uint32_t i = 0; i < len; i++) {
                row[items[i]]--;
            }
            swap->cost++;
        } else if (*count == 1) {
            set_alone(swap, items, len, find_other(swap, items, len, item, group), -1);
        }
    }
    (*count)++;
}

static void move_item(struct nep_swap *swap, uint32_t item, uint16_t to)
{
    const struct nep_sets *sets = swap->params.sets;
    uint16_t from = swap->group[item];
    if (item < sets->num_items) {
        for (uint32_t i = sets->begin[item]; i < sets->begin[item + 1]; i++) {
            leave(swap, sets->tokens_of[i], item, from);
            enter(swap, sets->tokens_of[i], item, to);
        }
    }
    swap->load[from] -= swap->params.weight[item];
    swap->load[to] += swap->params.weight[item];
    swap->group[item] = to;
}

void nep_swap_apply(struct nep_swap *swap, uint32_t a, uint32_t b)
{
    uint16_t group_a = swap->group[a];
    uint16_t group_b = swap->group[b];
    move_item(swap, a, group_b);
    move_item(swap, b, group_a);
}

/* Fills the tables from the placement. Absent groups are found by subtraction: add_cost starts as
 * "all tokens of the item", and every visited or home group takes its tokens away. */
static void fill_tables(struct nep_swap *swap)
{
    const struct nep_sets *sets = swap->params.sets;
    uint32_t groups = swap->params.num_groups;
    for (uint32_t g = 0; g < groups; g++) {
        int32_t *row = add_row(swap, g);
        for (uint32_t i = 0; i < sets->num_items; i++) {
            row[i] = (int32_t)(sets->begin[i + 1] - sets->begin[i]);
        }
    }
    for (uint32_t t = 0; t < sets->num_tokens; t++) {
        const uint16_t *items = &sets->items[(size_t)t * sets->width];
        uint32_t len = sets->len[t];
        uint8_t *count = &swap->count[(size_t)t * groups];
        uint16_t home = sets->home[t];
        for (uint32_t i = 0; i < len; i++) {
            count[swap->group[items[i]]]++;
        }
        int is_home_seen = home == NEP_NO_HOME;
        for (uint32_t i = 0; i < len; i++) {
            uint16_t g = swap->group[items[i]];
            int is_first = 1;
            for (uint32_t j = 0; j < i && is_first; j++) {
                is_first = swap->group[items[j]] != g;
            }
            if (!is_first) {
                continue;
            }
            is_home_seen |= g == home;
            int32_t *row = add_row(swap, g);
            for (uint32_t j = 0; j < len; j++) {
                row[items[j]]--;
            }
            if (g != home) {
                swap->cost++;
                if (count[g] == 1) {
                    set_alone(swap, items, len, items[i], 1);
                }
            }
        }
        if (!is_home_seen) {
            int32_t *row = add_row(swap, home);
            for (uint32_t j = 0; j < len; j++) {
                row[items[j]]--;
            }
        }
    }
}

enum nep_status nep_swap_init(struct nep_swap *swap, const struct nep_swap_params *params,
                              const uint16_t *group)
{
    const struct nep_sets *sets = params->sets;
    size_t groups = params->num_groups;
    size_t slots = params->num_slots;
    *swap = (struct nep_swap){.params = *params};
    swap->group = malloc((slots + 1) * sizeof *swap->group);
    swap->load = calloc(groups, sizeof *swap->load);
    swap->count = calloc(sets->num_tokens * groups + 1, 1);
    swap->remove_gain = calloc(slots + 1, sizeof *swap->remove_gain);
    swap->add_cost = calloc(groups * slots + 1, sizeof *swap->add_cost);
    swap->pair = calloc((size_t)sets->num_items * sets->num_items + 1, sizeof *swap->pair);
    if (swap->group == NULL || swap->load == NULL || swap->count == NULL ||
        swap->remove_gain == NULL || swap->add_cost == NULL || swap->pair == NULL) {
        nep_swap_fini(swap);
        return nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u items in %u groups",
                        sets->num_items, params->num_groups);
    }
    memcpy(swap->group, group, slots * sizeof *group);
    for (size_t i = 0; i < slots; i++) {
        swap->load[group[i]] += params->weight[i];
    }
    fill_tables(swap);
    return NEP_OK;
}

void nep_swap_fini(struct nep_swap *swap)
{
    free(swap->group);
    free(swap->load);
    free(swap->count);
    free(swap->remove_gain);
    free(swap->add_cost);
    free(swap->pair);
    memset(swap, 0, sizeof *swap);
}

static double above(double load, double limit)
{
    return load > limit ? load - limit : 0.0;
}

static double over(const struct nep_swap *swap, uint32_t group, double added)
{
    return above(swap->load[group] + added, swap->params.limit[group]);
}

/* What a group's load costs, in rows. */
static double load_cost(const struct nep_swap *swap, uint32_t group, double added)
{
    const struct nep_swap_params *params = &swap->params;
    double load = swap->load[group] + added;
    return params->price * above(load, params->limit[group]) +
           params->soft_price * above(load, params->soft_share * params->limit[group]);
}

double nep_swap_total(const struct nep_swap *swap)
{
    double total = (double)swap->cost;
    for (uint32_t g = 0; g < swap->params.num_groups; g++) {
        total += load_cost(swap, g, 0.0);
    }
    return total;
}

/* Changes when a and b swap: the return value of the overload, *cost_p of what the loads cost. */
static double over_delta(const struct nep_swap *swap, uint32_t a, uint32_t b, double *cost_p)
{
    double shift = swap->params.weight[b] - swap->params.weight[a];
    uint32_t p = swap->group[a];
    uint32_t q = swap->group[b];
    *cost_p = load_cost(swap, p, shift) - load_cost(swap, p, 0.0) + load_cost(swap, q, -shift) -
              load_cost(swap, q, 0.0);
    return over(swap, p, shift) - over(swap, p, 0.0) + over(swap, q, -shift) - over(swap, q, 0.0);
}

static int has_label(const struct nep_swap *swap, uint32_t label, uint32_t group, uint32_t but)
{
    for (uint32_t i = 0; i < swap->params.sets->num_items; i++) {
        if (i != but && swap->params.label[i] == label && swap->group[i] == group) {
            return 1;
        }
    }
    return 0;
}

static int may_swap(const struct nep_swap *swap, uint32_t a, uint32_t b)
{
    if (swap->params.label == NULL) {
        return 1;
    }
    uint32_t items = swap->params.sets->num_items;
    return (a >= items || !has_label(swap, swap->params.label[a], swap->group[b], a)) &&
           (b >= items || !has_label(swap, swap->params.label[b], swap->group[a], b));
}

/* The best partner of a; *best_p: what must be beaten, then the value found. */
static uint32_t best_partner(const struct nep_swap *swap, uint32_t a, double *best_p)
{
    const struct nep_swap_params *params = &swap->params;
    uint32_t items = params->sets->num_items;
    uint32_t p = swap->group[a];
    const int32_t *add_p = add_row(swap, p);
    const int32_t *pair_a = a < items ? pair_row(swap, a) : NULL;
    int32_t gain_a = swap->remove_gain[a];
    double over_p = load_cost(swap, p, 0.0);
    uint32_t found = UINT32_MAX;
    for (uint32_t b = 0; b < params->num_slots; b++) {
        uint32_t q = swap->group[b];
        if (q == p) {
            continue;
        }
        int32_t delta = add_p[b] - gain_a - swap->remove_gain[b];
        if (a < items) {
            delta += add_row(swap, q)[a];
            if (b < items) {
                delta += pair_a[b] + pair_row(swap, b)[a];
            }
        } else if (b >= items) {
            continue;
        }
        if (delta - over_p - load_cost(swap, q, 0.0) >= *best_p) {
            continue;
        }
        double more_cost;
        if (over_delta(swap, a, b, &more_cost) > 1e-9) {
            continue;
        }
        double value = delta + more_cost;
        if (value < *best_p && may_swap(swap, a, b)) {
            *best_p = value;
            found = b;
        }
    }
    return found;
}

uint64_t nep_swap_run(struct nep_swap *swap, struct nep_rng *rng, uint64_t max_proposals,
                      uint64_t deadline_ns)
{
    uint32_t slots = swap->params.num_slots;
    uint32_t *order = malloc(((size_t)slots + 1) * sizeof *order);
    uint64_t proposals = 0;
    if (order == NULL || swap->params.num_groups < 2) {
        free(order);
        return 0;
    }
    for (uint32_t i = 0; i < slots; i++) {
        order[i] = i;
    }
    int is_better = 1;
    while (is_better && proposals < max_proposals) {
        is_better = 0;
        nep_rng_shuffle(rng, order, slots);
        for (uint32_t i = 0; i < slots && proposals < max_proposals; i++) {
            if (deadline_ns != UINT64_MAX && nep_now_ns() >= deadline_ns) {
                free(order);
                return proposals;
            }
            double best = -0.5;
            uint32_t b = best_partner(swap, order[i], &best);
            proposals += slots;
            if (b != UINT32_MAX) {
                nep_swap_apply(swap, order[i], b);
                is_better = 1;
            }
        }
    }
    free(order);
    return proposals;
}

int nep_swap_best_of(struct nep_swap *swap, uint32_t a, double least, uint32_t *b_p)
{
    double best = -least;
    uint32_t b = best_partner(swap, a, &best);
    if (b == UINT32_MAX) {
        return 0;
    }
    nep_swap_apply(swap, a, b);
    *b_p = b;
    return 1;
}

int nep_swap_best(struct nep_swap *swap, uint32_t *a_p, uint32_t *b_p, double *value_p)
{
    double best = -0.5;
    uint32_t best_a = UINT32_MAX;
    uint32_t best_b = UINT32_MAX;
    for (uint32_t a = 0; a < swap->params.num_slots; a++) {
        uint32_t b = best_partner(swap, a, &best);
        if (b != UINT32_MAX) {
            best_a = a;
            best_b = b;
        }
    }
    if (best_a == UINT32_MAX) {
        return 0;
    }
    nep_swap_apply(swap, best_a, best_b);
    *a_p = best_a;
    *b_p = best_b;
    *value_p = best;
    return 1;
}
