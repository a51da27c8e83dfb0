/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The online corrector. Per layer it keeps the last window of routed tokens with their homes; at an
 * update, a layer whose busiest node is above the threshold gets at most max_moves copies moved, by
 * the same exact search as the solver's, with overload priced so that balance comes first and the
 * cheapest way in rows is taken. A layer in balance is left alone: copies that move cost bytes.
 *
 * The change detector is Page-Hinkley (Page 1954) on the remote nodes per token of the windows: it
 * adds up what exceeds the running mean by more than a tolerance, and fires when the sum has risen
 * above its minimum by more than a threshold. It cannot be set off by one odd window.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "placement/adjust.h"

#define DEFAULT_WINDOW 768u
#define DEFAULT_MOVES  8u
#define DEFAULT_ABOVE  1.13
/* Correct to the middle of what is allowed, so that the next windows' noise stays below it. */
#define TARGET_SHARE 0.4
#define PRICE        1.0
/* Page-Hinkley, relative to the mean. */
#define PH_TOLERANCE 0.01
#define PH_THRESHOLD 0.10

struct window {
    uint16_t *items; /* [window_tokens][top_k], UINT16_MAX = unused */
    uint16_t *home;  /* [window_tokens] */
    uint32_t next;
    uint32_t filled;
};

struct nep_balance {
    struct nep_map *map;
    uint32_t top_k;
    uint32_t window_tokens;
    uint32_t max_moves;
    double act_above;
    struct window *windows; /* [num_layers] */
    uint32_t *tables;       /* [num_layers][slots] */
    uint64_t ph_count;
    double ph_mean;
    double ph_sum;
    double ph_least;
};

static enum nep_status check_params(const struct nep_balance_params *p, struct nep_balance *b)
{
    if (p->map == NULL || p->top_k == 0 || p->top_k > NEP_TRACE_TOP_K_LIMIT ||
        p->window_tokens > (1u << 24) || (p->act_above != 0.0 && !(p->act_above > 1.0)) ||
        p->map->shape.num_experts >= UINT16_MAX) {
        return nep_fail(NEP_ERR_INVALID,
                        "balance: map %s, top_k %u (1 to %d), window_tokens %u (most 2^24), "
                        "act_above %g (above 1)",
                        p->map == NULL ? "is NULL" : "given", p->top_k, NEP_TRACE_TOP_K_LIMIT,
                        p->window_tokens, p->act_above);
    }
    b->top_k = p->top_k;
    b->window_tokens = p->window_tokens == 0 ? DEFAULT_WINDOW : p->window_tokens;
    b->max_moves = p->max_moves == 0 ? DEFAULT_MOVES : p->max_moves;
    b->act_above = p->act_above == 0.0 ? DEFAULT_ABOVE : p->act_above;
    return NEP_OK;
}

enum nep_status nep_balance_create(const struct nep_balance_params *params,
                                   struct nep_balance **balance_p)
{
    struct nep_balance_params p;
    if (balance_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_balance_create: balance_p is NULL");
    }
    enum nep_status status =
        nep_struct_copy(&p, sizeof p, params, 2 * sizeof(void *) + 4, "nep_balance_params");
    if (status != NEP_OK) {
        return status;
    }
    struct nep_balance *b = calloc(1, sizeof *b);
    if (b == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "balance: no memory");
    }
    status = check_params(&p, b);
    if (status != NEP_OK) {
        free(b);
        return status;
    }
    nep_map_retain((struct nep_map *)p.map);
    b->map = (struct nep_map *)p.map;
    uint32_t layers = b->map->shape.num_layers;
    uint32_t slots = b->map->shape.num_ranks * b->map->shape.slots_per_rank;
    b->windows = calloc(layers, sizeof *b->windows);
    b->tables = malloc((size_t)layers * slots * sizeof *b->tables);
    int ok = b->windows != NULL && b->tables != NULL;
    for (uint32_t l = 0; l < layers && ok; l++) {
        b->windows[l].items = malloc((size_t)b->window_tokens * b->top_k * sizeof(uint16_t));
        b->windows[l].home = malloc(b->window_tokens * sizeof(uint16_t));
        ok = b->windows[l].items != NULL && b->windows[l].home != NULL;
        nep_adjust_table(b->map, l, &b->tables[(size_t)l * slots]);
    }
    if (!ok) {
        uint32_t tokens = b->window_tokens;
        nep_balance_destroy(b);
        return nep_fail(NEP_ERR_NO_MEMORY, "balance: no memory for %u windows of %u tokens", layers,
                        tokens);
    }
    *balance_p = b;
    return NEP_OK;
}

void nep_balance_destroy(struct nep_balance *balance)
{
    if (balance == NULL) {
        return;
    }
    for (uint32_t l = 0; balance->windows != NULL && l < balance->map->shape.num_layers; l++) {
        free(balance->windows[l].items);
        free(balance->windows[l].home);
    }
    free(balance->windows);
    free(balance->tables);
    nep_map_destroy(balance->map);
    free(balance);
}

enum nep_status nep_balance_observe(struct nep_balance *balance, uint32_t layer, uint32_t home,
                                    const int32_t *ids, uint32_t num_tokens)
{
    if (balance == NULL || (ids == NULL && num_tokens > 0)) {
        return nep_fail(NEP_ERR_INVALID, "nep_balance_observe: balance or ids is NULL");
    }
    const struct nep_map_shape *shape = &balance->map->shape;
    if (layer >= shape->num_layers || home >= shape->num_nodes) {
        return nep_fail(NEP_ERR_INVALID, "balance: layer %u of %u, home %u of %u", layer,
                        shape->num_layers, home, shape->num_nodes);
    }
    for (size_t i = 0; i < (size_t)num_tokens * balance->top_k; i++) {
        if (ids[i] < -1 || ids[i] >= (int32_t)shape->num_experts) {
            return nep_fail(NEP_ERR_INVALID, "balance: token %zu, k %zu: id %d of %u experts",
                            i / balance->top_k, i % balance->top_k, ids[i], shape->num_experts);
        }
    }
    struct window *w = &balance->windows[layer];
    for (uint32_t t = 0; t < num_tokens; t++) {
        uint16_t *items = &w->items[(size_t)w->next * balance->top_k];
        for (uint32_t k = 0; k < balance->top_k; k++) {
            items[k] = (uint16_t)ids[(size_t)t * balance->top_k + k]; /* -1 becomes UINT16_MAX */
        }
        w->home[w->next] = (uint16_t)home;
        w->next = w->next + 1 == balance->window_tokens ? 0 : w->next + 1;
        w->filled += w->filled < balance->window_tokens;
    }
    return NEP_OK;
}

static enum nep_status window_sets(const struct nep_balance *b, const struct window *w,
                                   struct nep_sets *sets)
{
    enum nep_status status = nep_sets_init(sets, w->filled, b->map->shape.num_experts, b->top_k);
    if (status != NEP_OK) {
        return status;
    }
    for (uint32_t t = 0; t < w->filled; t++) {
        uint16_t *items = &sets->items[(size_t)t * b->top_k];
        uint8_t len = 0;
        for (uint32_t k = 0; k < b->top_k; k++) {
            uint16_t item = w->items[(size_t)t * b->top_k + k];
            int is_new = item != UINT16_MAX;
            for (uint8_t i = 0; i < len && is_new; i++) {
                is_new = items[i] != item;
            }
            if (is_new) {
                items[len++] = item;
            }
        }
        sets->len[t] = len;
        sets->home[t] = w->home[t];
    }
    status = nep_sets_index(sets);
    if (status != NEP_OK) {
        nep_sets_fini(sets);
    }
    return status;
}

/* Rows per token and max/mean load of nodes in a window, as routed now. */
static enum nep_status measure(const struct nep_balance *b, uint32_t layer,
                               const struct nep_sets *sets, double *remote_p, double *imbalance_p)
{
    const struct nep_map_shape *shape = &b->map->shape;
    double *load = calloc(shape->num_nodes, sizeof *load);
    uint32_t *slots = calloc(shape->num_nodes, sizeof *slots);
    struct nep_layer_copies list;
    enum nep_status status = nep_layer_copies_init(&list, shape->num_ranks * shape->slots_per_rank);
    struct nep_cover cover;
    if (status == NEP_OK && (load == NULL || slots == NULL)) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "balance: no memory");
    }
    if (status == NEP_OK) {
        nep_adjust_copies(b->map, layer, &list);
    }
    const struct nep_cover_params params = {
        .sets = sets, .num_nodes = shape->num_nodes, .slots = slots, .limit = load};
    if (status == NEP_OK) {
        status = nep_cover_init(&cover, &params, &list);
    }
    if (status == NEP_OK) {
        double most = 0.0;
        double total = 0.0;
        for (uint32_t n = 0; n < shape->num_nodes; n++) {
            double per_rank = cover.load[n] / shape->ranks_per_node[n];
            most = per_rank > most ? per_rank : most;
            total += cover.load[n];
        }
        *imbalance_p = total > 0.0 ? most * shape->num_ranks / total : 1.0;
        *remote_p = (double)cover.cost / sets->num_tokens;
        nep_cover_fini(&cover);
    }
    nep_layer_copies_fini(&list);
    free(load);
    free(slots);
    return status;
}

static enum nep_status correct_layer(struct nep_balance *b, uint32_t layer,
                                     struct nep_balance_result *result)
{
    const struct nep_map_shape *shape = &b->map->shape;
    struct nep_sets sets;
    double remote = 0.0;
    double imbalance = 1.0;
    uint32_t moved = 0;
    enum nep_status status = window_sets(b, &b->windows[layer], &sets);
    if (status != NEP_OK) {
        return status;
    }
    status = measure(b, layer, &sets, &remote, &imbalance);
    if (status == NEP_OK && imbalance > b->act_above) {
        const struct nep_adjust_params params = {
            .shape = shape,
            .sets = &sets,
            .max_imbalance = 1.0 + TARGET_SHARE * (b->act_above - 1.0),
            .price = PRICE,
            .least_gain = 0.5,
            .max_moves = b->max_moves,
        };
        status = nep_adjust_layer(
            &params, &b->tables[(size_t)layer * shape->num_ranks * shape->slots_per_rank], &moved);
    }
    nep_sets_fini(&sets);
    result->imbalance += imbalance;
    result->remote_nodes_per_token += remote;
    result->moved_copies += moved;
    return status;
}

static int is_drifting(struct nep_balance *b, double remote)
{
    b->ph_count++;
    b->ph_mean += (remote - b->ph_mean) / (double)b->ph_count;
    b->ph_sum += remote - b->ph_mean * (1.0 + PH_TOLERANCE);
    b->ph_least = b->ph_sum < b->ph_least ? b->ph_sum : b->ph_least;
    return b->ph_sum - b->ph_least > PH_THRESHOLD * b->ph_mean;
}

enum nep_status nep_balance_update(struct nep_balance *balance, struct nep_map **map_p,
                                   struct nep_balance_result *result_p)
{
    if (balance == NULL || map_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_balance_update: balance or map_p is NULL");
    }
    uint32_t layers = balance->map->shape.num_layers;
    struct nep_balance_result result = {.size = sizeof result};
    struct nep_map *map = NULL;
    uint32_t full = 0;
    enum nep_status status = NEP_OK;
    for (uint32_t l = 0; l < layers && status == NEP_OK; l++) {
        if (balance->windows[l].filled >= balance->window_tokens / 4) {
            full++;
            status = correct_layer(balance, l, &result);
        }
    }
    if (status == NEP_OK && result.moved_copies > 0) {
        status = nep_adjust_build(balance->map, balance->tables, &map);
    }
    if (status != NEP_OK) {
        return status;
    }
    if (map != NULL) {
        nep_map_destroy(balance->map);
        nep_map_retain(map);
        balance->map = map;
    }
    if (full > 0) {
        result.imbalance /= full;
        result.remote_nodes_per_token /= full;
        result.is_drifting = is_drifting(balance, result.remote_nodes_per_token);
    }
    *map_p = map;
    if (result_p != NULL) {
        *result_p = result;
    }
    return NEP_OK;
}
