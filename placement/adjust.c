/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Steepest descent with a budget: at every step the best swap of two copies and the best
 * replacement of one copy by another are compared per copy moved, and the better one is made. What
 * stays put keeps its slot, because the table of slots itself is changed; only what moves costs
 * bytes. With the price of overload high, the same steps restore balance; with it low, they follow
 * the traffic. Where many copies move, looking at all of them for every step takes too long: then
 * they are looked at in turn, and whatever gains enough is done at once (nep_adjust_turn); the
 * caller lowers what is enough.
 *
 * Rejected: solving anew and matching the result to the old map. It rewrites nearly every slot for
 * a few points of rows (a solve's labels and ties are arbitrary), and a limit on moves would cut it
 * somewhere in the middle of something worse than both.
 */
#include "placement/adjust.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "placement/copy_swap.h"

#define MOST_SWEEPS 64u

struct nep_adjust {
    struct nep_adjust_params params;
    uint32_t *table;
    uint32_t *node_slots; /* [num_nodes] */
    uint32_t *first_slot; /* [num_nodes + 1] */
    double *limit;        /* [num_nodes] */
    struct nep_layer_copies copies;
    struct nep_cover cover;
};

static uint32_t find_slot(const struct nep_adjust *a, uint32_t expert, uint32_t node)
{
    for (uint32_t s = a->first_slot[node]; s < a->first_slot[node + 1]; s++) {
        if (a->table[s] == expert) {
            return s;
        }
    }
    return NEP_SLOT_EMPTY;
}

static enum nep_status adjust_init(struct nep_adjust *a)
{
    const struct nep_map_shape *shape = a->params.shape;
    const struct nep_sets *sets = a->params.sets;
    uint32_t nodes = shape->num_nodes;
    a->node_slots = calloc(nodes, sizeof *a->node_slots);
    a->first_slot = calloc((size_t)nodes + 1, sizeof *a->first_slot);
    a->limit = calloc(nodes, sizeof *a->limit);
    if (a->node_slots == NULL || a->first_slot == NULL || a->limit == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "adjust: no memory for %u nodes", nodes);
    }
    double pairs = sets->begin[sets->num_items];
    for (uint32_t n = 0; n < nodes; n++) {
        a->first_slot[n + 1] = a->first_slot[n] + shape->ranks_per_node[n] * shape->slots_per_rank;
        a->node_slots[n] = a->first_slot[n + 1] - a->first_slot[n];
        a->limit[n] = a->params.max_imbalance * pairs * shape->ranks_per_node[n] / shape->num_ranks;
    }
    enum nep_status status = nep_layer_copies_init(&a->copies, a->first_slot[nodes]);
    for (uint32_t n = 0; n < nodes && status == NEP_OK; n++) {
        for (uint32_t s = a->first_slot[n]; s < a->first_slot[n + 1]; s++) {
            if (a->table[s] == NEP_SLOT_EMPTY) {
                continue;
            }
            if (find_slot(a, a->table[s], n) != s) {
                a->node_slots[n]--; /* a second copy on the same node stays out of it */
                continue;
            }
            a->copies.expert[a->copies.num] = (uint16_t)a->table[s];
            a->copies.node[a->copies.num++] = (uint16_t)n;
        }
    }
    const struct nep_cover_params params = {.sets = sets,
                                            .num_nodes = nodes,
                                            .slots = a->node_slots,
                                            .limit = a->limit,
                                            .price = a->params.price};
    return status == NEP_OK ? nep_cover_init(&a->cover, &params, &a->copies) : status;
}

static void adjust_fini(struct nep_adjust *a)
{
    nep_cover_fini(&a->cover);
    nep_layer_copies_fini(&a->copies);
    free(a->node_slots);
    free(a->first_slot);
    free(a->limit);
}

struct replacement {
    uint32_t out; /* NEP_SLOT_EMPTY: an empty slot is filled */
    uint32_t in;
    uint32_t node;
    double gain; /* rows, overload at its price */
};

/* Tries to replace every copy that is not the last of its expert; the cover is unchanged after. */
static void best_replacement(struct nep_adjust *a, struct replacement *best)
{
    struct nep_cover *cover = &a->cover;
    uint32_t nodes = cover->params.num_nodes;
    double before = nep_cover_total(cover);
    *best = (struct replacement){.gain = 0.0};
    for (uint32_t i = 0; i < cover->params.sets->num_items * nodes; i++) {
        uint32_t expert = i / nodes;
        uint32_t node = i % nodes;
        if (!cover->has[i] || cover->num_copies[expert] < 2) {
            continue;
        }
        nep_cover_remove(cover, expert, node);
        uint32_t other = expert;
        if (nep_cover_best(cover, node, expert, &other) > 0.0) {
            nep_cover_add(cover, other, node);
            double gain = before - nep_cover_total(cover);
            if (gain > best->gain) {
                *best = (struct replacement){expert, other, node, gain};
            }
            nep_cover_remove(cover, other, node);
        }
        nep_cover_add(cover, expert, node);
    }
    for (uint32_t n = 0; n < nodes; n++) {
        uint32_t other;
        if (cover->used[n] < cover->params.slots[n] &&
            nep_cover_best(cover, n, NEP_SLOT_EMPTY, &other) > 0.0) {
            nep_cover_add(cover, other, n);
            double gain = before - nep_cover_total(cover);
            if (gain > best->gain) {
                *best = (struct replacement){NEP_SLOT_EMPTY, other, n, gain};
            }
            nep_cover_remove(cover, other, n);
        }
    }
}

static uint32_t make_replacement(struct nep_adjust *a, const struct replacement *r)
{
    uint32_t slot = find_slot(a, r->out, r->node);
    if (slot == NEP_SLOT_EMPTY) {
        return 0;
    }
    if (r->out != NEP_SLOT_EMPTY) {
        nep_cover_remove(&a->cover, r->out, r->node);
    }
    nep_cover_add(&a->cover, r->in, r->node);
    a->table[slot] = r->in;
    return 1;
}

/* The search has swapped x and y (its group[] is after that): the table and the cover follow. */
static void make_swap(struct nep_adjust *a, const struct nep_copy_swap *cs, uint32_t x, uint32_t y)
{
    uint32_t x_node = cs->swap.group[y];
    uint32_t y_node = cs->swap.group[x];
    uint32_t x_slot = find_slot(a, cs->label[x], x_node);
    uint32_t y_slot = find_slot(a, cs->label[y], y_node);
    a->table[x_slot] = cs->label[y];
    a->table[y_slot] = cs->label[x];
    /* Added before removed: an expert is never without a copy. */
    nep_cover_add(&a->cover, cs->label[x], y_node);
    nep_cover_add(&a->cover, cs->label[y], x_node);
    nep_cover_remove(&a->cover, cs->label[x], x_node);
    nep_cover_remove(&a->cover, cs->label[y], y_node);
}

/* Every copy that is not its expert's last gives way, in turn, to the one that is worth most there,
 * if that gains; empty slots are filled. */
static void replace_in_turn(struct nep_adjust *a, double least, uint32_t most, uint32_t *moved_p)
{
    struct nep_cover *cover = &a->cover;
    uint32_t nodes = cover->params.num_nodes;
    uint32_t all = cover->params.sets->num_items * nodes;
    for (uint32_t i = 0; i < all && *moved_p < most; i++) {
        uint32_t expert = i / nodes;
        uint32_t node = i % nodes;
        if (!cover->has[i] || cover->num_copies[expert] < 2) {
            continue;
        }
        double before = nep_cover_total(cover);
        nep_cover_remove(cover, expert, node);
        uint32_t other = expert;
        double lost = nep_cover_total(cover) - before;
        if (nep_cover_best(cover, node, expert, &other) >= lost + least) {
            nep_cover_add(cover, other, node);
            if (before - nep_cover_total(cover) >= least) {
                a->table[find_slot(a, expert, node)] = other;
                (*moved_p)++;
                continue;
            }
            nep_cover_remove(cover, other, node);
        }
        nep_cover_add(cover, expert, node);
    }
    for (uint32_t n = 0; n < nodes; n++) {
        uint32_t other = 0;
        while (*moved_p < most && nep_cover_best(cover, n, NEP_SLOT_EMPTY, &other) >= least) {
            a->table[find_slot(a, NEP_SLOT_EMPTY, n)] = other;
            nep_cover_add(cover, other, n);
            (*moved_p)++;
        }
    }
}

/* Every copy in turn is swapped with its best partner, if that gains `least` per copy moved. The
 * best swap of all first would take many times longer for the same rows. */
static enum nep_status swap_in_turn(struct nep_adjust *a, double least, uint32_t most,
                                    uint32_t *moved_p)
{
    struct nep_copy_swap cs;
    nep_cover_get(&a->cover, &a->copies);
    enum nep_status status =
        nep_copy_swap_init(&cs, &a->cover, &a->copies, a->limit, a->params.price);
    if (status != NEP_OK) {
        return status;
    }
    int is_better = 1;
    for (uint32_t sweep = 0; is_better && sweep < MOST_SWEEPS; sweep++) {
        is_better = 0;
        for (uint32_t x = 0; x < a->copies.num && *moved_p + 2 <= most; x++) {
            uint32_t y;
            if (nep_swap_best_of(&cs.swap, x, 2.0 * least, &y)) {
                make_swap(a, &cs, x, y);
                *moved_p += 2;
                is_better = 1;
            }
        }
    }
    nep_copy_swap_fini(&cs);
    return NEP_OK;
}

enum nep_status nep_adjust_turn(struct nep_adjust *adjust, double least, uint32_t most,
                                uint32_t *moved_p)
{
    uint32_t moved = 0;
    enum nep_status status = NEP_OK;
    if (adjust->params.sets->num_tokens > 0) {
        replace_in_turn(adjust, least, most, &moved);
        status = swap_in_turn(adjust, least, most, &moved);
    }
    if (status == NEP_OK && moved > 0) {
        replace_in_turn(adjust, least, most, &moved);
    }
    *moved_p = moved;
    return status;
}

/* One step: the better of a swap and a replacement. *is_done_p: nothing pays any more. */
static enum nep_status one_step(struct nep_adjust *a, uint32_t *moved_p, int *is_done_p)
{
    struct replacement r;
    struct nep_copy_swap cs;
    uint32_t x;
    uint32_t y;
    double value = 0.0;
    uint32_t left = a->params.max_moves - *moved_p;
    best_replacement(a, &r);
    nep_cover_get(&a->cover, &a->copies);
    enum nep_status status =
        nep_copy_swap_init(&cs, &a->cover, &a->copies, a->limit, a->params.price);
    if (status != NEP_OK) {
        return status;
    }
    int is_swap = left >= 2 && nep_swap_best(&cs.swap, &x, &y, &value) && -value / 2.0 > r.gain &&
                  -value / 2.0 > a->params.least_gain;
    *is_done_p = 1;
    if (is_swap) {
        make_swap(a, &cs, x, y);
        *moved_p += 2;
        *is_done_p = 0;
    } else if (r.gain > a->params.least_gain) {
        *is_done_p = make_replacement(a, &r) == 0;
        *moved_p += !*is_done_p;
    }
    nep_copy_swap_fini(&cs);
    return NEP_OK;
}

enum nep_status nep_adjust_layer(const struct nep_adjust_params *params, uint32_t *expert_of_slot,
                                 uint32_t *moved_p)
{
    struct nep_adjust a = {.params = *params, .table = expert_of_slot};
    enum nep_status status = adjust_init(&a);
    uint32_t moved = 0;
    int is_done = params->sets->num_tokens == 0;
    while (status == NEP_OK && !is_done && moved < params->max_moves) {
        status = one_step(&a, &moved, &is_done);
    }
    adjust_fini(&a);
    *moved_p = moved;
    return status;
}

enum nep_status nep_adjust_create(const struct nep_adjust_params *params, uint32_t *expert_of_slot,
                                  struct nep_adjust **adjust_p)
{
    struct nep_adjust *a = calloc(1, sizeof *a);
    if (a == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "adjust: no memory");
    }
    *a = (struct nep_adjust){.params = *params, .table = expert_of_slot};
    enum nep_status status = adjust_init(a);
    if (status != NEP_OK) {
        nep_adjust_destroy(a);
        return status;
    }
    *adjust_p = a;
    return NEP_OK;
}

void nep_adjust_destroy(struct nep_adjust *adjust)
{
    if (adjust != NULL) {
        adjust_fini(adjust);
        free(adjust);
    }
}

void nep_adjust_copies(const struct nep_map *map, uint32_t layer, struct nep_layer_copies *list)
{
    struct nep_copies copies;
    nep_map_copies(map, layer, &copies);
    list->num = 0;
    for (uint32_t e = 0; e < copies.num_experts; e++) {
        for (uint32_t c = copies.begin[e]; c < copies.begin[e + 1]; c++) {
            if (c == copies.begin[e] || copies.node[c] != copies.node[c - 1]) {
                list->expert[list->num] = (uint16_t)e;
                list->node[list->num++] = (uint16_t)copies.node[c];
            }
        }
    }
}

void nep_adjust_table(const struct nep_map *map, uint32_t layer, uint32_t *expert_of_slot)
{
    uint32_t slots = map->shape.num_ranks * map->shape.slots_per_rank;
    struct nep_copies copies;
    nep_map_copies(map, layer, &copies);
    for (uint32_t s = 0; s < slots; s++) {
        expert_of_slot[s] = NEP_SLOT_EMPTY;
    }
    for (uint32_t e = 0; e < copies.num_experts; e++) {
        for (uint32_t c = copies.begin[e]; c < copies.begin[e + 1]; c++) {
            expert_of_slot[copies.slot[c]] = e;
        }
    }
}

enum nep_status nep_adjust_build(const struct nep_map *map, const uint32_t *tables,
                                 struct nep_map **map_p)
{
    uint32_t slots = map->shape.num_ranks * map->shape.slots_per_rank;
    size_t total = (size_t)map->shape.num_layers * slots;
    struct nep_map_entry *entries = malloc((total + 1) * sizeof *entries);
    uint16_t *weight = malloc((slots + 1ull) * sizeof *weight);
    enum nep_status status = NEP_OK;
    size_t num = 0;
    if (entries == NULL || weight == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "map: no memory for %zu slots", total);
        goto out;
    }
    for (uint32_t l = 0; l < map->shape.num_layers; l++) {
        struct nep_copies copies;
        nep_map_copies(map, l, &copies);
        for (uint32_t s = 0; s < slots; s++) {
            weight[s] = 1;
        }
        for (uint32_t c = 0; c < copies.begin[copies.num_experts]; c++) {
            weight[copies.slot[c]] = copies.weight[c];
        }
        for (uint32_t s = 0; s < slots; s++) {
            uint32_t e = tables[(size_t)l * slots + s];
            if (e != NEP_SLOT_EMPTY) {
                entries[num++] = (struct nep_map_entry){l, e, s, weight[s], 0};
            }
        }
    }
    status = nep_map_build(&map->shape, entries, num, map_p);
out:
    free(entries);
    free(weight);
    return status;
}
