/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A copy of expert e on node p saves a row for a token where e is alone on its remote node and p is
 * the token's home or is visited anyway. These marginal savings are kept exactly in a table that
 * changes only for the tokens that hold an expert whose copies change. Where e shares its remote
 * node with others, a copy at home saves nothing by itself but brings the row nearer to its end;
 * a fraction of credit (facts from GRACE-MoE's and our own trials) lets pairs of experts move
 * together.
 *
 * Load has a price: pairs above a node's limit cost `price` rows each, so that copies go where
 * there is room and hot experts shed load as part of the same choice. Rejected: slots reserved for
 * hot experts (costs 0.6 to 1.8 points of rows for the same balance).
 *
 * The choice of copies follows nep_choose at the level of nodes; ties that nep_choose breaks by a
 * hash of rank and token are broken by a hash of the token here.
 */
#include "placement/cover.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "placement/choose_impl.h"

#define MAX_K NEP_TRACE_TOP_K_LIMIT

enum nep_status nep_layer_copies_init(struct nep_layer_copies *copies, uint32_t cap)
{
    *copies = (struct nep_layer_copies){.cap = cap};
    copies->expert = malloc(((size_t)cap + 1) * sizeof *copies->expert);
    copies->node = malloc(((size_t)cap + 1) * sizeof *copies->node);
    if (copies->expert == NULL || copies->node == NULL) {
        nep_layer_copies_fini(copies);
        return nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u copies", cap);
    }
    return NEP_OK;
}

void nep_layer_copies_fini(struct nep_layer_copies *copies)
{
    free(copies->expert);
    free(copies->node);
    memset(copies, 0, sizeof *copies);
}

static size_t at(const struct nep_cover *cover, uint32_t expert, uint32_t node)
{
    return (size_t)expert * cover->params.num_nodes + node;
}

static void visit(struct nep_cover *cover, uint16_t node, uint16_t *visited, uint32_t *num_p)
{
    if (cover->stamp[node] != cover->now) {
        cover->stamp[node] = cover->now;
        visited[(*num_p)++] = node;
    }
}

/* Of the copies of an expert, one on a visited node, rotated by the hash; or UINT16_MAX. */
static uint16_t visited_copy(const struct nep_cover *cover, uint32_t expert, uint32_t hash)
{
    const uint16_t *list = &cover->list[at(cover, expert, 0)];
    uint32_t num = cover->num_copies[expert];
    uint32_t start = (uint32_t)(((uint64_t)hash * num) >> 32);
    for (uint32_t c = 0; c < num; c++) {
        uint16_t node = list[start + c < num ? start + c : start + c - num];
        if (cover->stamp[node] == cover->now) {
            return node;
        }
    }
    return UINT16_MAX;
}

/* The node that covers most of the items left; the first item's by hash when none covers two. */
static uint16_t cover_node(const struct nep_cover *cover, const uint16_t *items,
                           const uint8_t *left, uint32_t num_left, uint32_t hash)
{
    uint32_t first = items[left[0]];
    const uint16_t *list = &cover->list[at(cover, first, 0)];
    uint16_t best = list[((uint64_t)hash * cover->num_copies[first]) >> 32];
    uint32_t best_covers = 1;
    for (uint32_t i = 0; i + 1 < num_left; i++) {
        uint32_t expert = items[left[i]];
        for (uint32_t c = 0; c < cover->num_copies[expert]; c++) {
            uint16_t node = cover->list[at(cover, expert, c)];
            uint32_t covers = 0;
            for (uint32_t j = i; j < num_left; j++) {
                covers += cover->has[at(cover, items[left[j]], node)];
            }
            if (covers > best_covers) {
                best_covers = covers;
                best = node;
            }
        }
    }
    return best;
}

/* Where each item of a token goes from this home. Returns the distinct remote nodes. */
static uint32_t route(struct nep_cover *cover, uint32_t token, uint16_t home, uint16_t *to)
{
    const struct nep_sets *sets = cover->params.sets;
    const uint16_t *items = &sets->items[(size_t)token * sets->width];
    uint32_t len = sets->len[token];
    uint16_t visited[MAX_K];
    uint8_t left[MAX_K];
    uint32_t num_visited = 0;
    uint32_t num_left = 0;
    cover->now++;
    for (uint32_t i = 0; i < len; i++) {
        uint32_t expert = items[i];
        if (home != NEP_NO_HOME && cover->has[at(cover, expert, home)]) {
            to[i] = home;
        } else if (cover->num_copies[expert] == 1) {
            to[i] = cover->list[at(cover, expert, 0)];
            visit(cover, to[i], visited, &num_visited);
        } else {
            left[num_left++] = (uint8_t)i;
        }
    }
    while (num_left > 0) {
        uint32_t kept = 0;
        for (uint32_t i = 0; i < num_left; i++) {
            uint32_t expert = items[left[i]];
            to[left[i]] = visited_copy(cover, expert, nep_choose_hash(token * 64u + expert));
            if (to[left[i]] == UINT16_MAX) {
                left[kept++] = left[i];
            }
        }
        num_left = kept;
        if (num_left > 0) {
            visit(cover, cover_node(cover, items, left, num_left, nep_choose_hash(token)), visited,
                  &num_visited);
        }
    }
    return num_visited;
}

/* Adds (sign 1) or takes back (-1) what a token contributes to the tables. */
static void contribute(struct nep_cover *cover, uint32_t token, float sign)
{
    const struct nep_sets *sets = cover->params.sets;
    const uint16_t *items = &sets->items[(size_t)token * sets->width];
    const uint16_t *to = &cover->assigned[(size_t)token * sets->width];
    uint32_t len = sets->len[token];
    uint16_t home = sets->home[token];
    uint16_t visited[MAX_K];
    uint8_t count[MAX_K];
    uint8_t which[MAX_K];
    uint32_t num = 0;
    for (uint32_t i = 0; i < len; i++) {
        cover->load[to[i]] += sign;
        if (to[i] == home) {
            continue;
        }
        uint32_t v = 0;
        while (v < num && visited[v] != to[i]) {
            v++;
        }
        if (v == num) {
            visited[num] = to[i];
            count[num++] = 0;
        }
        count[v]++;
        which[i] = (uint8_t)v;
    }
    cover->cost += sign > 0 ? num : (uint64_t) - (int64_t)num;
    for (uint32_t i = 0; i < len; i++) {
        if (to[i] == home) {
            continue;
        }
        float *gain = &cover->gain[at(cover, items[i], 0)];
        float *moved = &cover->moved[at(cover, items[i], 0)];
        uint32_t together = count[which[i]];
        if (home != NEP_NO_HOME) {
            gain[home] += together == 1 ? sign : sign * 0.5f / (float)(together * together);
            moved[home] += sign;
        }
        for (uint32_t v = 0; v < num && together == 1; v++) {
            if (v != which[i]) {
                gain[visited[v]] += sign;
                moved[visited[v]] += sign;
            }
        }
    }
}

static void reroute(struct nep_cover *cover, uint32_t expert)
{
    const struct nep_sets *sets = cover->params.sets;
    for (uint32_t i = sets->begin[expert]; i < sets->begin[expert + 1]; i++) {
        uint32_t t = sets->tokens_of[i];
        contribute(cover, t, -1.0f);
        route(cover, t, sets->home[t], &cover->assigned[(size_t)t * sets->width]);
        contribute(cover, t, 1.0f);
    }
}

static void list_add(struct nep_cover *cover, uint32_t expert, uint32_t node)
{
    cover->has[at(cover, expert, node)] = 1;
    cover->list[at(cover, expert, cover->num_copies[expert]++)] = (uint16_t)node;
    cover->used[node]++;
}

void nep_cover_add(struct nep_cover *cover, uint32_t expert, uint32_t node)
{
    list_add(cover, expert, node);
    reroute(cover, expert);
}

void nep_cover_remove(struct nep_cover *cover, uint32_t expert, uint32_t node)
{
    uint16_t *list = &cover->list[at(cover, expert, 0)];
    uint32_t i = 0;
    while (list[i] != node) {
        i++;
    }
    /* Order is kept, so that removing and adding the last copy again changes nothing. */
    for (uint32_t last = --cover->num_copies[expert]; i < last; i++) {
        list[i] = list[i + 1];
    }
    cover->has[at(cover, expert, node)] = 0;
    cover->used[node]--;
    reroute(cover, expert);
}

enum nep_status nep_cover_init(struct nep_cover *cover, const struct nep_cover_params *params,
                               const struct nep_layer_copies *copies)
{
    const struct nep_sets *sets = params->sets;
    size_t table = (size_t)sets->num_items * params->num_nodes;
    *cover = (struct nep_cover){.params = *params};
    cover->has = calloc(table + 1, 1);
    cover->list = calloc(table + 1, sizeof *cover->list);
    cover->num_copies = calloc((size_t)sets->num_items + 1, sizeof *cover->num_copies);
    cover->used = calloc(params->num_nodes, sizeof *cover->used);
    cover->assigned = calloc((size_t)sets->num_tokens * sets->width + 1, sizeof *cover->assigned);
    cover->gain = calloc(table + 1, sizeof *cover->gain);
    cover->moved = calloc(table + 1, sizeof *cover->moved);
    cover->load = calloc(params->num_nodes, sizeof *cover->load);
    cover->stamp = calloc(params->num_nodes, sizeof *cover->stamp);
    if (cover->has == NULL || cover->list == NULL || cover->num_copies == NULL ||
        cover->used == NULL || cover->assigned == NULL || cover->gain == NULL ||
        cover->moved == NULL || cover->load == NULL || cover->stamp == NULL) {
        nep_cover_fini(cover);
        return nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u experts on %u nodes",
                        sets->num_items, params->num_nodes);
    }
    for (uint32_t c = 0; c < copies->num; c++) {
        list_add(cover, copies->expert[c], copies->node[c]);
    }
    for (uint32_t t = 0; t < sets->num_tokens; t++) {
        route(cover, t, sets->home[t], &cover->assigned[(size_t)t * sets->width]);
        contribute(cover, t, 1.0f);
    }
    return NEP_OK;
}

void nep_cover_fini(struct nep_cover *cover)
{
    free(cover->has);
    free(cover->list);
    free(cover->num_copies);
    free(cover->used);
    free(cover->assigned);
    free(cover->gain);
    free(cover->moved);
    free(cover->load);
    free(cover->stamp);
    memset(cover, 0, sizeof *cover);
}

static double above(double load, double limit)
{
    return load > limit ? load - limit : 0.0;
}

/* What a node's load costs, in rows. */
static double load_cost(const struct nep_cover *cover, uint32_t node, double added)
{
    const struct nep_cover_params *params = &cover->params;
    double load = cover->load[node] + added;
    return params->price * above(load, params->limit[node]) +
           params->soft_price * above(load, params->soft_share * params->limit[node]);
}

/* What one more copy is worth: rows saved, and the load that it brings here and takes from the
 * expert's copies, taken to come from them evenly. */
static double worth(const struct nep_cover *cover, uint32_t expert, uint32_t node)
{
    double moved = cover->moved[at(cover, expert, node)];
    double value = cover->gain[at(cover, expert, node)];
    value -= load_cost(cover, node, moved) - load_cost(cover, node, 0.0);
    uint32_t num = cover->num_copies[expert];
    for (uint32_t c = 0; c < num; c++) {
        uint16_t from = cover->list[at(cover, expert, c)];
        value += load_cost(cover, from, 0.0) - load_cost(cover, from, -moved / num);
    }
    return value;
}

double nep_cover_best(const struct nep_cover *cover, uint32_t node, uint32_t but,
                      uint32_t *expert_p)
{
    double best = 0.0;
    if (cover->used[node] >= cover->params.slots[node]) {
        return 0.0;
    }
    for (uint32_t e = 0; e < cover->params.sets->num_items; e++) {
        /* Most would draw nothing, where experts and nodes are many. */
        if (e == but || cover->moved[at(cover, e, node)] == 0.0f ||
            cover->has[at(cover, e, node)]) {
            continue;
        }
        double value = worth(cover, e, node);
        if (value > best + 1e-6) {
            best = value;
            *expert_p = e;
        }
    }
    return best;
}

void nep_cover_fill(struct nep_cover *cover)
{
    for (;;) {
        double best = 0.0;
        uint32_t best_expert = 0;
        uint32_t best_node = 0;
        for (uint32_t n = 0; n < cover->params.num_nodes; n++) {
            uint32_t expert = 0;
            double value = nep_cover_best(cover, n, UINT32_MAX, &expert);
            if (value > best) {
                best = value;
                best_expert = expert;
                best_node = n;
            }
        }
        if (best <= 0.0) {
            return;
        }
        nep_cover_add(cover, best_expert, best_node);
    }
}

double nep_cover_total(const struct nep_cover *cover)
{
    double total = (double)cover->cost;
    for (uint32_t n = 0; n < cover->params.num_nodes; n++) {
        total += load_cost(cover, n, 0.0);
    }
    return total;
}

void nep_cover_improve(struct nep_cover *cover, uint32_t passes)
{
    uint32_t nodes = cover->params.num_nodes;
    for (uint32_t pass = 0; pass < passes; pass++) {
        int is_better = 0;
        for (uint32_t i = 0; i < cover->params.sets->num_items * nodes; i++) {
            uint32_t expert = i / nodes;
            uint32_t node = i % nodes;
            if (!cover->has[i] || cover->num_copies[expert] < 2) {
                continue;
            }
            double before = nep_cover_total(cover);
            nep_cover_remove(cover, expert, node);
            uint32_t other = expert;
            nep_cover_best(cover, node, UINT32_MAX, &other);
            nep_cover_add(cover, other, node);
            if (nep_cover_total(cover) < before - 0.5) {
                is_better = 1;
            } else if (other != expert) {
                nep_cover_remove(cover, other, node);
                nep_cover_add(cover, expert, node);
            }
        }
        if (!is_better) {
            return;
        }
    }
}

void nep_cover_get(const struct nep_cover *cover, struct nep_layer_copies *copies)
{
    copies->num = 0;
    for (uint32_t e = 0; e < cover->params.sets->num_items; e++) {
        for (uint32_t c = 0; c < cover->num_copies[e]; c++) {
            copies->expert[copies->num] = (uint16_t)e;
            copies->node[copies->num++] = cover->list[at(cover, e, c)];
        }
    }
}

void nep_cover_home_costs(struct nep_cover *cover, uint32_t *cost)
{
    const struct nep_sets *sets = cover->params.sets;
    uint32_t nodes = cover->params.num_nodes;
    uint16_t to[MAX_K];
    for (uint32_t t = 0; t < sets->num_tokens; t++) {
        const uint16_t *items = &sets->items[(size_t)t * sets->width];
        uint32_t *row = &cost[(size_t)sets->request[t] * nodes];
        int is_single = 1;
        for (uint32_t i = 0; i < sets->len[t]; i++) {
            is_single &= cover->num_copies[items[i]] == 1;
        }
        if (!is_single) {
            for (uint32_t n = 0; n < nodes; n++) {
                row[n] += route(cover, t, (uint16_t)n, to);
            }
            continue;
        }
        /* Without a choice, the visited nodes do not depend on the home. */
        uint32_t distinct = route(cover, t, NEP_NO_HOME, to);
        for (uint32_t n = 0; n < nodes; n++) {
            row[n] += distinct - (cover->stamp[n] == cover->now);
        }
    }
}
