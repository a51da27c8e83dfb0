/* SPDX-License-Identifier: Apache-2.0 */
#include "placement/repack.h"

#include <stdlib.h>

#include "base/status.h"

struct item {
    double load;
    uint32_t expert;
};

static int heaviest(const void *a, const void *b)
{
    const struct item *x = a;
    const struct item *y = b;
    if (x->load != y->load) {
        return x->load > y->load ? -1 : 1;
    }
    return x->expert < y->expert ? -1 : x->expert > y->expert;
}

/* Packs the items of one node; used and load: [ranks], zero. */
static void pack(const struct nep_map_shape *shape, uint32_t layer, uint32_t node,
                 uint32_t first_rank, struct item *items, uint32_t num, uint32_t *used,
                 double *load, struct nep_map_entry *entries)
{
    qsort(items, num, sizeof *items, heaviest);
    for (uint32_t i = 0; i < num; i++) {
        uint32_t best = UINT32_MAX;
        for (uint32_t r = 0; r < shape->ranks_per_node[node]; r++) {
            if (used[r] < shape->slots_per_rank && (best == UINT32_MAX || load[r] < load[best])) {
                best = r;
            }
        }
        uint32_t slot = (first_rank + best) * shape->slots_per_rank + used[best]++;
        load[best] += items[i].load;
        entries[i] = (struct nep_map_entry){layer, items[i].expert, slot, 1, 0};
    }
}

enum nep_status nep_map_repack(const struct nep_map *map, const double *loads,
                               struct nep_map **map_p)
{
    const struct nep_map_shape *shape = &map->shape;
    uint32_t slots = shape->num_ranks * shape->slots_per_rank;
    struct nep_map_entry *entries = malloc((size_t)shape->num_layers * slots * sizeof *entries);
    struct item *items = malloc(slots * sizeof *items);
    uint32_t *used = calloc(shape->num_ranks, sizeof *used);
    double *load = calloc(shape->num_ranks, sizeof *load);
    enum nep_status status = NEP_OK;
    size_t at = 0;
    if (entries == NULL || items == NULL || used == NULL || load == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "repack: no memory for %u slots", slots);
    }
    for (uint32_t l = 0; l < shape->num_layers && status == NEP_OK; l++) {
        struct nep_copies copies;
        uint32_t first_rank = 0;
        nep_map_copies(map, l, &copies);
        for (uint32_t r = 0; r < shape->num_ranks; r++) {
            used[r] = 0;
            load[r] = 0.0;
        }
        for (uint32_t n = 0; n < shape->num_nodes; n++) {
            uint32_t num = 0;
            for (uint32_t e = 0; e < shape->num_experts; e++) {
                for (uint32_t c = copies.begin[e]; c < copies.begin[e + 1]; c++) {
                    if (copies.node[c] == n) {
                        uint32_t shares = copies.begin[e + 1] - copies.begin[e];
                        double whole = loads[(size_t)l * shape->num_experts + e];
                        items[num++] = (struct item){whole / shares, e};
                    }
                }
            }
            pack(shape, l, n, first_rank, items, num, &used[first_rank], &load[first_rank],
                 &entries[at]);
            at += num;
            first_rank += shape->ranks_per_node[n];
        }
    }
    if (status == NEP_OK) {
        status = nep_map_build(shape, entries, at, map_p);
    }
    free(entries);
    free(items);
    free(used);
    free(load);
    return status;
}
