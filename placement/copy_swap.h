/* SPDX-License-Identifier: Apache-2.0 */
/* Swaps of copies of experts while every token keeps the copies that it chose. */
#ifndef NEP_PLACEMENT_COPY_SWAP_H
#define NEP_PLACEMENT_COPY_SWAP_H

#include "placement/cover.h"
#include "placement/swap.h"

struct nep_copy_swap {
    struct nep_sets sets; /* tokens in terms of copies */
    uint32_t *label;      /* [copies] its expert */
    double *weight;       /* [copies] */
    struct nep_swap swap; /* items are indexes into the list of copies */
};

/* limit: [num_nodes], must outlive it. */
enum nep_status nep_copy_swap_init(struct nep_copy_swap *cs, const struct nep_cover *cover,
                                   const struct nep_layer_copies *copies, const double *limit,
                                   double price);
void nep_copy_swap_fini(struct nep_copy_swap *cs);

#endif
