/* SPDX-License-Identifier: Apache-2.0 */
/* Token sets: the experts (or copies) that each token of a sample needs, and the reverse index. */
#ifndef NEP_PLACEMENT_SETS_H
#define NEP_PLACEMENT_SETS_H

#include "placement/homes.h"

#define NEP_NO_HOME UINT16_MAX

struct nep_sets {
    uint32_t num_tokens;
    uint32_t num_items;
    uint32_t width;    /* most items of a token */
    uint16_t *items;   /* [num_tokens][width], the first len[t] are valid and distinct */
    uint8_t *len;      /* [num_tokens] */
    uint16_t *home;    /* [num_tokens]: a group, or NEP_NO_HOME */
    uint32_t *request; /* [num_tokens]: index into the list of requests; NULL where not needed */
    uint32_t *begin;   /* [num_items + 1] into tokens_of */
    uint32_t *tokens_of;
};

/* Every stride-th token of every request, of one layer: of the scored part, or is_whole of the
 * whole request (as where no request has a scored part). Homes are left unset. */
enum nep_status nep_sets_sample(const struct nep_requests *requests, uint32_t layer,
                                uint32_t stride, int is_whole, struct nep_sets *sets);
/* Room for num_tokens tokens; the caller fills items, len and home, then calls nep_sets_index. */
enum nep_status nep_sets_init(struct nep_sets *sets, uint32_t num_tokens, uint32_t num_items,
                              uint32_t width);
/* Builds begin and tokens_of. May be called again after items changed. */
enum nep_status nep_sets_index(struct nep_sets *sets);
void nep_sets_fini(struct nep_sets *sets);

/* The tokens of a request that speak for it: scored ones, or all. Returns how many. */
uint64_t nep_sets_part(const struct nep_requests *requests, uint32_t i, int is_scored,
                       uint64_t *first_p);
int nep_sets_have_scored(const struct nep_requests *requests);

#endif
