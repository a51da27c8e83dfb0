/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Load only: the same answers as DeepSeek's EPLB (MIT, github.com/deepseek-ai/EPLB), written from
 * its rules. Packing: items by falling weight, each to the lightest pack with a free place, every
 * pack the same number of items; one item per pack is the identity. Copies: the next copy always
 * goes to the expert with the most load per copy. Where groups of experts divide evenly over nodes,
 * groups are packed to nodes first and copies are made inside each node; else the whole group of
 * ranks is treated as one node. Ties go to the lower index.
 *
 * It knows nothing of tokens; it is the baseline, and the answer where loads are all that is known.
 */
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "placement/map.h"

struct balance {
    const struct nep_map_shape *shape;
    uint32_t num_groups;
    uint32_t num_nodes; /* 1 for the global policy */
    uint32_t slots;     /* of all ranks */
    uint32_t *order;    /* scratch: [max(E, slots)] */
    uint32_t *pack_of;  /* scratch */
    uint32_t *used;     /* scratch: [packs] */
    double *load;       /* scratch: [packs] */
    double *weight;     /* scratch: [max(E, slots)] */
    uint32_t *expert;   /* [slots] experts node by node, then the result in slot order */
    uint32_t *copies;   /* [E] */
    uint32_t *result;   /* [slots] */
};

struct weighted {
    double weight;
    uint32_t idx;
};

static int heavier(const void *a, const void *b)
{
    const struct weighted *x = a;
    const struct weighted *y = b;
    if (x->weight != y->weight) {
        return x->weight > y->weight ? -1 : 1;
    }
    return x->idx < y->idx ? -1 : 1;
}

/* pack_of[i] for num items in num_packs packs of equal size. */
static enum nep_status pack(struct balance *b, const double *weight, uint32_t num,
                            uint32_t num_packs)
{
    uint32_t each = num / num_packs;
    if (each == 1) {
        for (uint32_t i = 0; i < num; i++) {
            b->pack_of[i] = i;
        }
        return NEP_OK;
    }
    struct weighted *items = malloc(((size_t)num + 1) * sizeof *items);
    if (items == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "balance: no memory for %u items", num);
    }
    for (uint32_t i = 0; i < num; i++) {
        items[i] = (struct weighted){weight[i], i};
    }
    qsort(items, num, sizeof *items, heavier);
    memset(b->used, 0, num_packs * sizeof *b->used);
    memset(b->load, 0, num_packs * sizeof *b->load);
    for (uint32_t i = 0; i < num; i++) {
        uint32_t best = UINT32_MAX;
        for (uint32_t p = 0; p < num_packs; p++) {
            if (b->used[p] < each && (best == UINT32_MAX || b->load[p] < b->load[best])) {
                best = p;
            }
        }
        b->pack_of[items[i].idx] = best;
        b->used[best]++;
        b->load[best] += items[i].weight;
    }
    free(items);
    return NEP_OK;
}

/* Writes num experts, with copies, to out: first each once, then copies in the order made. */
static void replicate(struct balance *b, const uint32_t *experts, uint32_t num, const double *load,
                      uint32_t num_slots, uint32_t *out)
{
    for (uint32_t i = 0; i < num; i++) {
        out[i] = experts[i];
        b->copies[experts[i]] = 1;
    }
    for (uint32_t s = num; s < num_slots; s++) {
        uint32_t best = experts[0];
        for (uint32_t i = 1; i < num; i++) {
            uint32_t e = experts[i];
            if (load[e] / b->copies[e] > load[best] / b->copies[best]) {
                best = e;
            }
        }
        out[s] = best;
        b->copies[best]++;
    }
}

static enum nep_status balance_layer(struct balance *b, const double *load)
{
    uint32_t experts = b->shape->num_experts;
    uint32_t group_size = experts / b->num_groups;
    for (uint32_t g = 0; g < b->num_groups; g++) {
        b->weight[g] = 0.0;
        for (uint32_t i = 0; i < group_size; i++) {
            b->weight[g] += load[g * group_size + i];
        }
    }
    enum nep_status status = pack(b, b->weight, b->num_groups, b->num_nodes);
    uint32_t node_slots = b->slots / b->num_nodes;
    uint32_t node_ranks = b->shape->num_ranks / b->num_nodes;
    uint32_t *node_of_group = b->order + experts; /* pack_of is used again below */
    memcpy(node_of_group, b->pack_of, b->num_groups * sizeof *node_of_group);
    for (uint32_t n = 0; n < b->num_nodes && status == NEP_OK; n++) {
        uint32_t num = 0;
        for (uint32_t e = 0; e < experts; e++) {
            if (node_of_group[e / group_size] == n) {
                b->order[num++] = e;
            }
        }
        uint32_t *here = &b->expert[n * node_slots];
        replicate(b, b->order, num, load, node_slots, here);
        for (uint32_t s = 0; s < node_slots; s++) {
            b->weight[s] = load[here[s]] / b->copies[here[s]];
        }
        status = pack(b, b->weight, node_slots, node_ranks);
        if (status != NEP_OK) {
            break;
        }
        memset(b->used, 0, node_ranks * sizeof *b->used);
        for (uint32_t s = 0; s < node_slots; s++) {
            uint32_t rank = n * node_ranks + b->pack_of[s];
            b->result[rank * b->shape->slots_per_rank + b->used[b->pack_of[s]]++] = here[s];
        }
    }
    return status;
}

static enum nep_status check(const struct nep_map_shape *shape, uint32_t num_groups)
{
    if (num_groups == 0 || shape->num_experts % num_groups != 0) {
        return nep_fail(NEP_ERR_INVALID, "balance: %u experts are not a multiple of %u groups",
                        shape->num_experts, num_groups);
    }
    for (uint32_t n = 1; n < shape->num_nodes; n++) {
        if (shape->ranks_per_node[n] != shape->ranks_per_node[0]) {
            return nep_fail(NEP_ERR_UNSUPPORTED,
                            "balance: node %u has %u ranks, node 0 has %u; EPLB's rules need equal "
                            "nodes, nep_map_solve does not",
                            n, shape->ranks_per_node[n], shape->ranks_per_node[0]);
        }
    }
    return NEP_OK;
}

static enum nep_status run(struct balance *b, const double *loads, struct nep_map **map_p)
{
    uint32_t layers = b->shape->num_layers;
    size_t num = (size_t)layers * b->slots;
    struct nep_map_entry *entries = malloc(num * sizeof *entries);
    if (entries == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "balance: no memory for %zu copies", num);
    }
    enum nep_status status = NEP_OK;
    for (uint32_t l = 0; l < layers && status == NEP_OK; l++) {
        status = balance_layer(b, &loads[(size_t)l * b->shape->num_experts]);
        for (uint32_t s = 0; s < b->slots; s++) {
            entries[(size_t)l * b->slots + s] = (struct nep_map_entry){l, b->result[s], s, 1, 0};
        }
    }
    if (status == NEP_OK) {
        status = nep_map_build(b->shape, entries, num, map_p);
    }
    free(entries);
    return status;
}

enum nep_status nep_map_balance(const struct nep_map_shape *shape, uint32_t num_groups,
                                const double *loads, struct nep_map **map_p)
{
    struct nep_map_shape s;
    enum nep_status status = nep_struct_copy(&s, sizeof s, shape, sizeof s, "nep_map_shape");
    if (status == NEP_OK) {
        status = nep_map_check_shape(&s);
    }
    if (status == NEP_OK) {
        status = check(&s, num_groups);
    }
    if (status != NEP_OK) {
        return status;
    }
    if (loads == NULL || map_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_map_balance: loads or map_p is NULL");
    }
    size_t num = (size_t)s.num_layers * s.num_experts;
    for (size_t i = 0; i < num; i++) {
        if (!(loads[i] >= 0.0 && loads[i] < 1e300)) {
            return nep_fail(NEP_ERR_INVALID, "balance: layer %zu, expert %zu has load %g",
                            i / s.num_experts, i % s.num_experts, loads[i]);
        }
    }
    struct balance b = {.shape = &s, .num_groups = num_groups, .num_nodes = 1};
    b.slots = s.num_ranks * s.slots_per_rank;
    if (num_groups % s.num_nodes == 0) {
        b.num_nodes = s.num_nodes;
    } else {
        b.num_groups = 1;
    }
    size_t most = (size_t)b.slots + s.num_experts + num_groups;
    b.order = malloc(most * sizeof *b.order);
    b.pack_of = malloc(most * sizeof *b.pack_of);
    b.used = malloc(most * sizeof *b.used);
    b.load = malloc(most * sizeof *b.load);
    b.weight = malloc(most * sizeof *b.weight);
    b.expert = malloc(most * sizeof *b.expert);
    b.copies = calloc(most, sizeof *b.copies);
    b.result = malloc(most * sizeof *b.result);
    if (b.order == NULL || b.pack_of == NULL || b.used == NULL || b.load == NULL ||
        b.weight == NULL || b.expert == NULL || b.copies == NULL || b.result == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "balance: no memory for %u slots", b.slots);
    } else {
        status = run(&b, loads, map_p);
    }
    free(b.order);
    free(b.pack_of);
    free(b.used);
    free(b.load);
    free(b.weight);
    free(b.expert);
    free(b.copies);
    free(b.result);
    return status;
}
