/* SPDX-License-Identifier: Apache-2.0 */
/*
 * With several copies per expert the cost of a swap depends on how tokens would choose afterwards.
 * Holding every token's choice fixed turns copies into plain items with exact differences, and what
 * it finds is an upper bound of the true cost: when tokens choose anew, they can only do better.
 */
#include "placement/copy_swap.h"

#include <stdlib.h>
#include <string.h>

#include "base/status.h"

enum nep_status nep_copy_swap_init(struct nep_copy_swap *cs, const struct nep_cover *cover,
                                   const struct nep_layer_copies *copies, const double *limit,
                                   double price)
{
    const struct nep_sets *experts = cover->params.sets;
    uint32_t nodes = cover->params.num_nodes;
    memset(cs, 0, sizeof *cs);
    enum nep_status status =
        nep_sets_init(&cs->sets, experts->num_tokens, copies->num, experts->width);
    if (status != NEP_OK) {
        return status;
    }
    uint32_t *copy_at = malloc((size_t)experts->num_items * nodes * sizeof *copy_at);
    cs->label = malloc(((size_t)copies->num + 1) * sizeof *cs->label);
    cs->weight = calloc((size_t)copies->num + 1, sizeof *cs->weight);
    if (copy_at == NULL || cs->label == NULL || cs->weight == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u copies", copies->num);
        goto out;
    }
    for (uint32_t c = 0; c < copies->num; c++) {
        copy_at[(size_t)copies->expert[c] * nodes + copies->node[c]] = c;
        cs->label[c] = copies->expert[c];
    }
    for (uint32_t t = 0; t < experts->num_tokens; t++) {
        cs->sets.len[t] = experts->len[t];
        cs->sets.home[t] = experts->home[t];
        for (uint32_t i = 0; i < experts->len[t]; i++) {
            size_t at = (size_t)t * experts->width + i;
            uint32_t c = copy_at[(size_t)experts->items[at] * nodes + cover->assigned[at]];
            cs->sets.items[at] = (uint16_t)c;
            cs->weight[c] += 1.0;
        }
    }
    status = nep_sets_index(&cs->sets);
    if (status == NEP_OK) {
        const struct nep_swap_params params = {.sets = &cs->sets,
                                               .num_slots = copies->num,
                                               .num_groups = nodes,
                                               .weight = cs->weight,
                                               .limit = limit,
                                               .price = price,
                                               .soft_share = cover->params.soft_share,
                                               .soft_price = cover->params.soft_price,
                                               .label = cs->label};
        status = nep_swap_init(&cs->swap, &params, copies->node);
    }
out:
    free(copy_at);
    if (status != NEP_OK) {
        nep_copy_swap_fini(cs);
    }
    return status;
}

void nep_copy_swap_fini(struct nep_copy_swap *cs)
{
    nep_swap_fini(&cs->swap);
    nep_sets_fini(&cs->sets);
    free(cs->label);
    free(cs->weight);
    memset(cs, 0, sizeof *cs);
}
