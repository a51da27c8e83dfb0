/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The moves between two maps. A slot that changes is filled from a copy in the old map, the nearest
 * one; a copy that stays put in both maps is never overwritten and is taken first. A move may go
 * when no other move still reads the slot that it overwrites; what is left when none may go are
 * rings, and the reader of one of them is staged: its expert is read aside first.
 */
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "placement/adjust.h"

struct diff {
    const struct nep_map *from;
    const struct nep_map *to;
    uint32_t slots;
    uint32_t *old_table; /* [slots] */
    uint32_t *new_table;
    uint32_t *readers;          /* [slots] moves that still read the slot */
    struct nep_map_move *moves; /* [slots] of the layer */
    uint8_t *is_done;           /* beside moves */
    uint32_t num;
};

/* 0 best: same rank and staying, ... */
static uint32_t distance(const struct diff *d, uint32_t slot, uint32_t to)
{
    const struct nep_map *map = d->from;
    uint32_t rank = slot / map->shape.slots_per_rank;
    uint32_t to_rank = to / map->shape.slots_per_rank;
    uint32_t far = rank == to_rank                                         ? 0
                   : map->node_of_rank[rank] == map->node_of_rank[to_rank] ? 2
                                                                           : 4;
    return far + (d->new_table[slot] != d->old_table[slot]);
}

static void collect(struct diff *d, uint32_t layer)
{
    struct nep_copies copies;
    nep_map_copies(d->from, layer, &copies);
    nep_adjust_table(d->from, layer, d->old_table);
    nep_adjust_table(d->to, layer, d->new_table);
    memset(d->readers, 0, d->slots * sizeof *d->readers);
    d->num = 0;
    for (uint32_t s = 0; s < d->slots; s++) {
        uint32_t e = d->new_table[s];
        if (e == NEP_SLOT_EMPTY || e == d->old_table[s]) {
            continue;
        }
        uint32_t best = copies.slot[copies.begin[e]];
        for (uint32_t c = copies.begin[e] + 1; c < copies.begin[e + 1]; c++) {
            if (distance(d, copies.slot[c], s) < distance(d, best, s)) {
                best = copies.slot[c];
            }
        }
        d->readers[best]++;
        d->is_done[d->num] = 0;
        d->moves[d->num++] = (struct nep_map_move){layer, e, best, s, 0};
    }
}

static void emit(struct diff *d, uint32_t i, struct nep_map_move *moves, uint64_t capacity,
                 uint64_t *num_p)
{
    if (*num_p < capacity) {
        moves[*num_p] = d->moves[i];
    }
    (*num_p)++;
    d->is_done[i] = 1;
}

static void order(struct diff *d, struct nep_map_move *moves, uint64_t capacity, uint64_t *num_p)
{
    uint32_t left = d->num;
    while (left > 0) {
        uint32_t before = left;
        for (uint32_t i = 0; i < d->num; i++) {
            if (!d->is_done[i] && d->readers[d->moves[i].to_slot] == 0) {
                if (!d->moves[i].is_staged) {
                    d->readers[d->moves[i].from_slot]--;
                }
                emit(d, i, moves, capacity, num_p);
                left--;
            }
        }
        if (left < before) {
            continue;
        }
        /* Only rings are left: reading one move's source aside opens its ring. */
        for (uint32_t i = 0; i < d->num; i++) {
            if (!d->is_done[i] && !d->moves[i].is_staged) {
                d->moves[i].is_staged = 1;
                d->readers[d->moves[i].from_slot]--;
                break;
            }
        }
    }
}

static enum nep_status check(const struct nep_map *from, const struct nep_map *to,
                             const uint64_t *num_p)
{
    if (from == NULL || to == NULL || num_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "map diff: from, to or num_p is NULL");
    }
    const struct nep_map_shape *a = &from->shape;
    const struct nep_map_shape *b = &to->shape;
    if (a->num_layers != b->num_layers || a->num_experts != b->num_experts ||
        a->num_nodes != b->num_nodes || a->slots_per_rank != b->slots_per_rank ||
        memcmp(a->ranks_per_node, b->ranks_per_node, a->num_nodes * sizeof(uint32_t)) != 0) {
        return nep_fail(NEP_ERR_MISMATCH,
                        "map diff: %u layers, %u experts, %u nodes, %u slots per rank against %u, "
                        "%u, %u, %u, or other nodes",
                        a->num_layers, a->num_experts, a->num_nodes, a->slots_per_rank,
                        b->num_layers, b->num_experts, b->num_nodes, b->slots_per_rank);
    }
    return NEP_OK;
}

enum nep_status nep_map_diff(const struct nep_map *from, const struct nep_map *to,
                             struct nep_map_move *moves, uint64_t capacity, uint64_t *num_p)
{
    enum nep_status status = check(from, to, num_p);
    if (status == NEP_OK && moves == NULL && capacity > 0) {
        status = nep_fail(NEP_ERR_INVALID, "map diff: moves is NULL, capacity %llu",
                          (unsigned long long)capacity);
    }
    if (status != NEP_OK) {
        return status;
    }
    uint32_t slots = from->shape.num_ranks * from->shape.slots_per_rank;
    struct diff d = {.from = from, .to = to, .slots = slots};
    d.old_table = malloc(slots * sizeof *d.old_table);
    d.new_table = malloc(slots * sizeof *d.new_table);
    d.readers = malloc(slots * sizeof *d.readers);
    d.moves = malloc(slots * sizeof *d.moves);
    d.is_done = malloc(slots);
    uint64_t num = 0;
    if (d.old_table == NULL || d.new_table == NULL || d.readers == NULL || d.moves == NULL ||
        d.is_done == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "map diff: no memory for %u slots", slots);
    }
    for (uint32_t l = 0; status == NEP_OK && l < from->shape.num_layers; l++) {
        collect(&d, l);
        order(&d, moves, capacity, &num);
    }
    free(d.old_table);
    free(d.new_table);
    free(d.readers);
    free(d.moves);
    free(d.is_done);
    if (status != NEP_OK) {
        return status;
    }
    *num_p = num;
    return num <= capacity ? NEP_OK
                           : nep_fail(NEP_ERR_OVERFLOW, "map diff: %llu moves, room for %llu",
                                      (unsigned long long)num, (unsigned long long)capacity);
}

int nep_map_pays(double rows_saved_per_token, double row_bytes, double token_layers,
                 uint64_t num_moves, double expert_bytes)
{
    return rows_saved_per_token * row_bytes * token_layers >
           1.25 * (double)num_moves * expert_bytes;
}
