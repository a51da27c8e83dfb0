/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The one text of the choice of copies, for the host (choose.c) and for kernels: it uses plain
 * loads, 32-bit integers and at most 32 words of private memory, no library call and no recursion.
 * A kernel file defines NEP_CHOOSE_FN as `static __device__ __forceinline__` before including this.
 *
 * A token first takes what it cannot choose: experts with one copy fix the nodes that it visits
 * whatever happens. Copies at home come before those, because they cost no row at all. The rest is
 * a small set cover, solved greedily: the node that covers most of the experts left is visited
 * next. With two copies of a few experts the greedy answer is nearly always the best one, and it
 * needs no table per node: the loops run over the few experts that are left and their copies.
 *
 * Rejected: a bit mask of nodes per expert with popcounts. It is no faster for the few experts that
 * have several copies, bounds the number of nodes, and is one more table to keep on the device.
 */
#ifndef NEP_PLACEMENT_CHOOSE_IMPL_H
#define NEP_PLACEMENT_CHOOSE_IMPL_H

#include "placement/choose.h"

#ifndef NEP_CHOOSE_FN
#define NEP_CHOOSE_FN static inline
#endif

#define NEP_CHOOSE_MAX_K 32u

/* The 32-bit finalizer of MurmurHash3 (Appleby, public domain): every input bit reaches every
 * output bit. */
NEP_CHOOSE_FN uint32_t nep_choose_hash(uint32_t h)
{
    h ^= h >> 16;
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h *= 0xc2b2ae35u;
    h ^= h >> 16;
    return h;
}

/* Which copies compete in a draw: all, those on one node, or those on nodes already visited. */
struct nep_choose_set {
    uint32_t node;           /* or NEP_SLOT_NONE */
    uint64_t visited_mask;   /* bit node % 64 */
    const uint32_t *visited; /* exact list, NULL: all copies compete */
    uint32_t num_visited;
};

NEP_CHOOSE_FN int nep_choose_is_visited(const struct nep_choose_set *set, uint32_t node)
{
    if (((set->visited_mask >> (node & 63u)) & 1u) == 0) {
        return 0;
    }
    for (uint32_t i = 0; i < set->num_visited; i++) {
        if (set->visited[i] == node) {
            return 1;
        }
    }
    return 0;
}

NEP_CHOOSE_FN int nep_choose_competes(const struct nep_choose_set *set, uint32_t node)
{
    if (set->node != NEP_SLOT_NONE) {
        return node == set->node;
    }
    return set->visited == 0 || nep_choose_is_visited(set, node);
}

/* One of the competing copies [begin, end), by weight; NEP_SLOT_NONE when none competes. Returns
 * its index. */
NEP_CHOOSE_FN uint32_t nep_choose_draw(const struct nep_copies *copies, uint32_t begin,
                                       uint32_t end, const struct nep_choose_set *set,
                                       uint32_t hash)
{
    uint32_t total = 0;
    uint32_t num = 0;
    uint32_t last = NEP_SLOT_NONE;
    for (uint32_t c = begin; c < end; c++) {
        if (nep_choose_competes(set, copies->node[c])) {
            total += copies->weight[c];
            num++;
            last = c;
        }
    }
    if (num <= 1) {
        return last;
    }
    uint32_t left = (uint32_t)(((uint64_t)hash * total) >> 32);
    for (uint32_t c = begin; c < end; c++) {
        if (!nep_choose_competes(set, copies->node[c])) {
            continue;
        }
        if (left < copies->weight[c]) {
            return c;
        }
        left -= copies->weight[c];
    }
    return last;
}

/* A copy at the source's rank (lowest slot), else on its node (by weight); NEP_SLOT_NONE: neither.
 */
NEP_CHOOSE_FN uint32_t nep_choose_home(const struct nep_copies *copies, uint32_t source,
                                       uint32_t home, uint32_t begin, uint32_t end, uint32_t hash)
{
    uint32_t first = source * copies->slots_per_rank;
    int is_on_node = 0;
    for (uint32_t c = begin; c < end; c++) {
        if (copies->slot[c] - first < copies->slots_per_rank) {
            return c;
        }
        is_on_node |= copies->node[c] == home;
    }
    if (!is_on_node) {
        return NEP_SLOT_NONE;
    }
    const struct nep_choose_set set = {home, 0, 0, 0};
    return nep_choose_draw(copies, begin, end, &set, hash);
}

/* Of the experts left (positions), how many have a copy on this node. */
NEP_CHOOSE_FN uint32_t nep_choose_covers(const struct nep_copies *copies, const int32_t *ids,
                                         const uint8_t *left, uint32_t num_left, uint32_t node)
{
    uint32_t covers = 0;
    for (uint32_t i = 0; i < num_left; i++) {
        uint32_t expert = (uint32_t)ids[left[i]];
        for (uint32_t c = copies->begin[expert]; c < copies->begin[expert + 1]; c++) {
            if (copies->node[c] == node) {
                covers++;
                break;
            }
        }
    }
    return covers;
}

/* The node that covers most experts left; among equals the first in an order that the hash rotates.
 * NEP_SLOT_NONE when no node covers two. */
NEP_CHOOSE_FN uint32_t nep_choose_cover(const struct nep_copies *copies, const int32_t *ids,
                                        const uint8_t *left, uint32_t num_left, uint32_t hash)
{
    uint32_t best = NEP_SLOT_NONE;
    uint32_t best_covers = 1;
    uint32_t best_order = 0;
    uint32_t rotate = (uint32_t)(((uint64_t)hash * copies->num_nodes) >> 32);
    for (uint32_t i = 0; i < num_left; i++) {
        uint32_t expert = (uint32_t)ids[left[i]];
        for (uint32_t c = copies->begin[expert]; c < copies->begin[expert + 1]; c++) {
            uint32_t node = copies->node[c];
            uint32_t covers = nep_choose_covers(copies, ids, left, num_left, node);
            uint32_t order = node >= rotate ? node - rotate : node + copies->num_nodes - rotate;
            if (covers > best_covers ||
                (covers == best_covers && best != NEP_SLOT_NONE && order < best_order)) {
                best = node;
                best_covers = covers;
                best_order = order;
            }
        }
    }
    return best;
}

/* Experts left after home copies and single copies: those on visited nodes, then the cover. */
NEP_CHOOSE_FN void nep_choose_rest(const struct nep_copies *copies, uint32_t seed,
                                   const int32_t *ids, uint32_t *slots, uint8_t *left,
                                   uint32_t num_left, struct nep_choose_set *set, uint32_t *visited)
{
    for (;;) {
        uint32_t kept = 0;
        for (uint32_t i = 0; i < num_left; i++) {
            uint32_t expert = (uint32_t)ids[left[i]];
            uint32_t c = nep_choose_draw(copies, copies->begin[expert], copies->begin[expert + 1],
                                         set, nep_choose_hash(seed ^ expert));
            if (c == NEP_SLOT_NONE) {
                left[kept++] = left[i];
            } else {
                slots[left[i]] = copies->slot[c];
            }
        }
        num_left = kept;
        if (num_left == 0) {
            return;
        }
        uint32_t node = num_left == 1
                            ? NEP_SLOT_NONE
                            : nep_choose_cover(copies, ids, left, num_left, nep_choose_hash(seed));
        if (node == NEP_SLOT_NONE) {
            break;
        }
        visited[set->num_visited++] = node;
        set->visited_mask |= 1ull << (node & 63u);
    }
    const struct nep_choose_set all = {NEP_SLOT_NONE, 0, 0, 0};
    for (uint32_t i = 0; i < num_left; i++) {
        uint32_t expert = (uint32_t)ids[left[i]];
        uint32_t c = nep_choose_draw(copies, copies->begin[expert], copies->begin[expert + 1], &all,
                                     nep_choose_hash(seed ^ expert));
        slots[left[i]] = copies->slot[c];
    }
}

NEP_CHOOSE_FN void nep_choose_one(const struct nep_copies *copies, uint32_t source, uint32_t token,
                                  const int32_t *ids, uint32_t k, uint32_t *slots)
{
    if (copies->is_single) {
        for (uint32_t i = 0; i < k; i++) {
            slots[i] = ids[i] < 0 ? NEP_SLOT_NONE : copies->slot[ids[i]];
        }
        return;
    }
    uint32_t home = copies->node_of_rank[source];
    uint32_t seed = nep_choose_hash(nep_choose_hash(source + 0x9e3779b9u) ^ token);
    uint32_t visited[NEP_CHOOSE_MAX_K];
    uint8_t left[NEP_CHOOSE_MAX_K];
    uint32_t num_left = 0;
    struct nep_choose_set set = {NEP_SLOT_NONE, 0, visited, 0};
    for (uint32_t i = 0; i < k; i++) {
        if (ids[i] < 0) {
            slots[i] = NEP_SLOT_NONE;
            continue;
        }
        uint32_t expert = (uint32_t)ids[i];
        uint32_t begin = copies->begin[expert];
        uint32_t end = copies->begin[expert + 1];
        uint32_t c = begin;
        if (end - begin > 1) {
            c = nep_choose_home(copies, source, home, begin, end, nep_choose_hash(seed ^ expert));
            if (c == NEP_SLOT_NONE) {
                left[num_left++] = (uint8_t)i;
                continue;
            }
        }
        slots[i] = copies->slot[c];
        uint32_t node = copies->node[c];
        if (node != home && !nep_choose_is_visited(&set, node)) {
            visited[set.num_visited++] = node;
            set.visited_mask |= 1ull << (node & 63u);
        }
    }
    if (num_left > 0) {
        nep_choose_rest(copies, seed, ids, slots, left, num_left, &set, visited);
    }
}

#endif
