/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Local search by swaps of two items between groups: fewest distinct groups per token, the token's
 * home not counted, with exact differences in constant time per proposal. Items are experts, or
 * copies of experts; groups are nodes, or the ranks of one node.
 */
#ifndef NEP_PLACEMENT_SWAP_H
#define NEP_PLACEMENT_SWAP_H

#include "placement/rng.h"
#include "placement/sets.h"

struct nep_swap_params {
    const struct nep_sets *sets; /* homes set */
    uint32_t num_slots; /* items and empty slots: items from sets->num_items on are empty */
    uint32_t num_groups;
    const double *weight; /* [num_slots]: load of an item; empty slots 0 */
    const double *limit;  /* [num_groups]: load that a group should not pass */
    double price;         /* rows that a pair above a limit is worth; no swap raises the overload */
    double soft_share; /* of the limit; a pair between that and the limit costs soft_price rows */
    double soft_price;
    const uint32_t *label; /* [num_slots] or NULL: two items of one label never share a group */
};

struct nep_swap {
    struct nep_swap_params params;
    uint16_t *group;      /* [num_slots]: the placement; capacities are what it starts with */
    double *load;         /* [num_groups] */
    uint8_t *count;       /* [num_tokens][num_groups] items of the token in the group */
    int32_t *remove_gain; /* [num_slots] tokens for which the item is alone in its remote group */
    int32_t *add_cost;    /* [num_groups][num_slots] tokens that would visit the group newly */
    int32_t *pair; /* [num_items][num_items]: tokens where row is alone and column is there */
    uint64_t cost; /* distinct remote groups over all tokens */
};

/* group: [num_slots], copied. */
enum nep_status nep_swap_init(struct nep_swap *swap, const struct nep_swap_params *params,
                              const uint16_t *group);
void nep_swap_fini(struct nep_swap *swap);
/* Until a sweep over all items finds nothing better, max_proposals pairs were looked at, or
 * deadline_ns (of nep_now_ns) passed. Returns the number looked at. */
uint64_t nep_swap_run(struct nep_swap *swap, struct nep_rng *rng, uint64_t max_proposals,
                      uint64_t deadline_ns);
/* Makes the best swap of item a that is worth more than `least`; 0: there is none. */
int nep_swap_best_of(struct nep_swap *swap, uint32_t a, double least, uint32_t *b_p);
/* Finds and applies the best single swap; 0: none improves. *value_p: its change of cost with the
 * overload at its price. */
int nep_swap_best(struct nep_swap *swap, uint32_t *a_p, uint32_t *b_p, double *value_p);
/* Distinct remote groups, with the loads at their prices. */
double nep_swap_total(const struct nep_swap *swap);
void nep_swap_apply(struct nep_swap *swap, uint32_t a, uint32_t b);

#endif
