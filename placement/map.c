/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Placement maps: immutable, counted by reference, flattened per layer into the tables that
 * nep_choose reads. Every way to make one (contiguous, file, solver) goes through nep_map_build,
 * so that what a map promises is checked in one place: every expert has a copy, no slot holds two.
 *
 * Rejected: a dense table [layers][slots]. Its size follows from the header of a file and not from
 * what the file contains, so a hostile header could ask for any amount of memory.
 */
#include "placement/map.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"

enum nep_status nep_map_check_shape(struct nep_map_shape *shape)
{
    if (shape->num_layers == 0 || shape->num_layers > NEP_MAP_MAX_LAYERS ||
        shape->num_experts == 0 || shape->num_experts > NEP_MAP_MAX_EXPERTS ||
        shape->num_nodes == 0 || shape->num_nodes > NEP_MAP_MAX_RANKS ||
        shape->ranks_per_node == NULL) {
        return nep_fail(NEP_ERR_INVALID,
                        "map: %u layers (1 to %u), %u experts (1 to %u), %u nodes (1 to %u)%s",
                        shape->num_layers, NEP_MAP_MAX_LAYERS, shape->num_experts,
                        NEP_MAP_MAX_EXPERTS, shape->num_nodes, NEP_MAP_MAX_RANKS,
                        shape->ranks_per_node == NULL ? ", ranks_per_node is NULL" : "");
    }
    uint64_t ranks = 0;
    for (uint32_t n = 0; n < shape->num_nodes; n++) {
        if (shape->ranks_per_node[n] == 0) {
            return nep_fail(NEP_ERR_INVALID, "map: node %u has no ranks", n);
        }
        ranks += shape->ranks_per_node[n];
    }
    if (ranks > NEP_MAP_MAX_RANKS || (shape->num_ranks != 0 && shape->num_ranks != ranks)) {
        return nep_fail(NEP_ERR_INVALID,
                        "map: the nodes have %llu ranks together, num_ranks is %u (most: %u)",
                        (unsigned long long)ranks, shape->num_ranks, NEP_MAP_MAX_RANKS);
    }
    shape->num_ranks = (uint32_t)ranks;
    if (shape->slots_per_rank == 0) {
        shape->slots_per_rank = (shape->num_experts + shape->num_ranks - 1) / shape->num_ranks;
    }
    uint64_t slots = ranks * shape->slots_per_rank;
    if (slots < shape->num_experts || slots > NEP_MAP_MAX_SLOTS) {
        return nep_fail(NEP_ERR_INVALID,
                        "map: %u ranks of %u slots are %llu slots; %u experts need at least as "
                        "many, and %u is the limit",
                        shape->num_ranks, shape->slots_per_rank, (unsigned long long)slots,
                        shape->num_experts, NEP_MAP_MAX_SLOTS);
    }
    return NEP_OK;
}

static int entry_before(const void *a, const void *b)
{
    const struct nep_map_entry *x = a;
    const struct nep_map_entry *y = b;
    if (x->layer != y->layer) {
        return x->layer < y->layer ? -1 : 1;
    }
    if (x->expert != y->expert) {
        return x->expert < y->expert ? -1 : 1;
    }
    return x->slot < y->slot ? -1 : x->slot > y->slot;
}

static struct nep_map *map_alloc(const struct nep_map_shape *shape, size_t num_entries)
{
    struct nep_map *map = calloc(1, sizeof *map);
    if (map == NULL) {
        return NULL;
    }
    atomic_init(&map->refs, 1);
    map->shape = *shape;
    size_t layers = shape->num_layers;
    map->ranks_per_node = malloc(shape->num_nodes * sizeof *map->ranks_per_node);
    map->node_of_rank = malloc(shape->num_ranks * sizeof *map->node_of_rank);
    map->first = calloc(layers + 1, sizeof *map->first);
    map->begin = calloc(layers * ((size_t)shape->num_experts + 1), sizeof *map->begin);
    map->slot = malloc(num_entries * sizeof *map->slot);
    map->node = malloc(num_entries * sizeof *map->node);
    map->weight = malloc(num_entries * sizeof *map->weight);
    map->is_single = malloc(layers);
    if (map->ranks_per_node == NULL || map->node_of_rank == NULL || map->first == NULL ||
        map->begin == NULL || map->slot == NULL || map->node == NULL || map->weight == NULL ||
        map->is_single == NULL) {
        nep_map_destroy(map);
        return NULL;
    }
    memcpy(map->ranks_per_node, shape->ranks_per_node,
           shape->num_nodes * sizeof *map->ranks_per_node);
    map->shape.ranks_per_node = map->ranks_per_node;
    uint32_t rank = 0;
    for (uint32_t n = 0; n < shape->num_nodes; n++) {
        for (uint32_t i = 0; i < shape->ranks_per_node[n]; i++) {
            map->node_of_rank[rank++] = n;
        }
    }
    return map;
}

/* FNV-1a over words; entries are sorted, so equal maps have equal digests. */
static uint64_t digest_words(uint64_t digest, const uint32_t *words, size_t num)
{
    for (size_t i = 0; i < num; i++) {
        digest = (digest ^ words[i]) * 0x100000001b3ull;
        digest ^= digest >> 29;
    }
    return digest;
}

static const char *line_name(const struct nep_map_entry *entry, char *buffer /* [24] */)
{
    buffer[0] = '\0';
    if (entry->line != 0) {
        snprintf(buffer, 24, "line %u: ", entry->line);
    }
    return buffer;
}

/* Checks one layer's sorted entries: experts all there, slots in range and used once. */
static enum nep_status check_layer(const struct nep_map_shape *shape, uint32_t layer,
                                   const struct nep_map_entry *entries, size_t num,
                                   uint32_t *used /* [slots]: layer + 1 where taken */)
{
    uint32_t slots = shape->num_ranks * shape->slots_per_rank;
    uint32_t next = 0;
    char buffer[24];
    for (size_t i = 0; i < num; i++) {
        const struct nep_map_entry *entry = &entries[i];
        if (entry->expert >= shape->num_experts || entry->slot >= slots || entry->weight == 0) {
            return nep_fail(NEP_ERR_INVALID,
                            "map: layer %u, expert %u (of %u) at slot %u (of %u), weight %u", layer,
                            entry->expert, shape->num_experts, entry->slot, slots, entry->weight);
        }
        if (entry->expert > next) {
            break;
        }
        next = entry->expert + 1;
        if (used[entry->slot] == layer + 1) {
            return nep_fail(NEP_ERR_INVALID,
                            "%smap: layer %u, rank %u slot %u is given twice, the second time to "
                            "expert %u",
                            line_name(entry, buffer), layer, entry->slot / shape->slots_per_rank,
                            entry->slot % shape->slots_per_rank, entry->expert);
        }
        used[entry->slot] = layer + 1;
    }
    if (next != shape->num_experts) {
        return nep_fail(NEP_ERR_INVALID, "map: layer %u, expert %u has no copy", layer, next);
    }
    return NEP_OK;
}

static void fill_layer(struct nep_map *map, uint32_t layer, const struct nep_map_entry *entries,
                       size_t num)
{
    size_t first = map->first[layer];
    uint32_t *begin = &map->begin[(size_t)layer * (map->shape.num_experts + 1)];
    for (size_t i = 0; i < num; i++) {
        begin[entries[i].expert + 1] = (uint32_t)i + 1;
        map->slot[first + i] = entries[i].slot;
        map->node[first + i] = map->node_of_rank[entries[i].slot / map->shape.slots_per_rank];
        map->weight[first + i] = entries[i].weight;
        const uint32_t words[4] = {layer, entries[i].expert, entries[i].slot, entries[i].weight};
        map->digest = digest_words(map->digest, words, 4);
    }
    map->is_single[layer] = num == map->shape.num_experts;
    map->first[layer + 1] = first + num;
}

enum nep_status nep_map_build(const struct nep_map_shape *shape, struct nep_map_entry *entries,
                              size_t num_entries, struct nep_map **map_p)
{
    int is_sorted = 1;
    for (size_t i = 1; i < num_entries && is_sorted; i++) {
        is_sorted = entry_before(&entries[i - 1], &entries[i]) < 0;
    }
    if (!is_sorted) {
        qsort(entries, num_entries, sizeof *entries, entry_before);
    }
    uint32_t *used = calloc((size_t)shape->num_ranks * shape->slots_per_rank, sizeof *used);
    struct nep_map *map = map_alloc(shape, num_entries);
    enum nep_status status = NEP_OK;
    if (used == NULL || map == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "map: no memory for %u layers, %zu copies",
                          shape->num_layers, num_entries);
        goto out;
    }
    const uint32_t words[5] = {shape->num_layers, shape->num_experts, shape->num_nodes,
                               shape->num_ranks, shape->slots_per_rank};
    map->digest = digest_words(0xcbf29ce484222325ull, words, 5);
    map->digest = digest_words(map->digest, map->ranks_per_node, shape->num_nodes);
    size_t at = 0;
    for (uint32_t layer = 0; layer < shape->num_layers && status == NEP_OK; layer++) {
        size_t end = at;
        while (end < num_entries && entries[end].layer == layer) {
            end++;
        }
        status = check_layer(shape, layer, entries + at, end - at, used);
        if (status == NEP_OK) {
            fill_layer(map, layer, entries + at, end - at);
        }
        at = end;
    }
    if (status == NEP_OK && at != num_entries) {
        status =
            nep_fail(NEP_ERR_INVALID, "map: layer %u of %u", entries[at].layer, shape->num_layers);
    }
out:
    free(used);
    if (status != NEP_OK) {
        nep_map_destroy(map);
        return status;
    }
    *map_p = map;
    return NEP_OK;
}

enum nep_status nep_map_contiguous(const struct nep_map_shape *shape, struct nep_map **map_p)
{
    struct nep_map_shape s;
    enum nep_status status = nep_struct_copy(&s, sizeof s, shape, sizeof s, "nep_map_shape");
    if (status == NEP_OK) {
        status = nep_map_check_shape(&s);
    }
    if (status != NEP_OK) {
        return status;
    }
    if (map_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_map_contiguous: map_p is NULL");
    }
    size_t num = (size_t)s.num_layers * s.num_experts;
    struct nep_map_entry *entries = malloc(num * sizeof *entries);
    if (entries == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "map: no memory for %u layers of %u experts",
                        s.num_layers, s.num_experts);
    }
    for (size_t i = 0; i < num; i++) {
        uint32_t expert = (uint32_t)(i % s.num_experts);
        entries[i] = (struct nep_map_entry){(uint32_t)(i / s.num_experts), expert, expert, 1, 0};
    }
    status = nep_map_build(&s, entries, num, map_p);
    free(entries);
    return status;
}

enum nep_status nep_map_get_shape(const struct nep_map *map, struct nep_map_shape *shape_p)
{
    if (map == NULL || shape_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_map_get_shape: map or shape_p is NULL");
    }
    *shape_p = map->shape;
    shape_p->size = sizeof *shape_p;
    return NEP_OK;
}

enum nep_status nep_map_copies(const struct nep_map *map, uint32_t layer,
                               struct nep_copies *copies_p)
{
    if (layer >= map->shape.num_layers) {
        return nep_fail(NEP_ERR_INVALID, "map: layer %u of %u", layer, map->shape.num_layers);
    }
    size_t first = map->first[layer];
    *copies_p = (struct nep_copies){
        .num_experts = map->shape.num_experts,
        .num_ranks = map->shape.num_ranks,
        .num_nodes = map->shape.num_nodes,
        .slots_per_rank = map->shape.slots_per_rank,
        .begin = &map->begin[(size_t)layer * (map->shape.num_experts + 1)],
        .slot = &map->slot[first],
        .node = &map->node[first],
        .weight = &map->weight[first],
        .node_of_rank = map->node_of_rank,
        .is_single = map->is_single[layer],
    };
    return NEP_OK;
}

enum nep_status nep_trace_match(const struct nep_trace *trace, const struct nep_map *map)
{
    if (nep_trace_num_experts(trace) != map->shape.num_experts ||
        nep_trace_num_layers(trace) != map->shape.num_layers) {
        return nep_fail(NEP_ERR_MISMATCH,
                        "the trace has %u layers of %u experts, the map %u layers of %u experts",
                        nep_trace_num_layers(trace), nep_trace_num_experts(trace),
                        map->shape.num_layers, map->shape.num_experts);
    }
    return NEP_OK;
}

int nep_map_is_truncated(const struct nep_map *map)
{
    return map->is_truncated;
}

uint64_t nep_map_digest(const struct nep_map *map)
{
    return map->digest;
}

void nep_map_retain(struct nep_map *map)
{
    /* Relaxed: whoever retains already holds a reference, nothing is published by this. */
    atomic_fetch_add_explicit(&map->refs, 1, memory_order_relaxed);
}

void nep_map_destroy(struct nep_map *map)
{
    /* Release pairs with the acquire half of the last holder's decrement: all their reads are done
     * before the memory goes. */
    if (map == NULL || atomic_fetch_sub_explicit(&map->refs, 1, memory_order_acq_rel) != 1) {
        return;
    }
    free(map->ranks_per_node);
    free(map->node_of_rank);
    free(map->first);
    free(map->begin);
    free(map->slot);
    free(map->node);
    free(map->weight);
    free(map->is_single);
    free(map);
}
