/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the searches read instead of a trace: compact rows of distinct items per token, 16 bits
 * each, and for every item the tokens that hold it. Sampling takes every stride-th token of each
 * request, so that every request keeps its weight and no random numbers are needed.
 *
 * Rejected: folding equal (set, home) pairs into weighted ones. At top-8 of 256 hardly two tokens
 * are equal, and the weights would cost a load in the innermost loop.
 */
#include "placement/sets.h"

#include <stdlib.h>
#include <string.h>

#include "base/status.h"

enum nep_status nep_sets_init(struct nep_sets *sets, uint32_t num_tokens, uint32_t num_items,
                              uint32_t width)
{
    *sets = (struct nep_sets){.num_tokens = num_tokens, .num_items = num_items, .width = width};
    sets->items = malloc(((size_t)num_tokens * width + 1) * sizeof *sets->items);
    sets->len = calloc((size_t)num_tokens + 1, sizeof *sets->len);
    sets->home = malloc(((size_t)num_tokens + 1) * sizeof *sets->home);
    sets->begin = calloc((size_t)num_items + 2, sizeof *sets->begin);
    sets->tokens_of = malloc(((size_t)num_tokens * width + 1) * sizeof *sets->tokens_of);
    if (sets->items == NULL || sets->len == NULL || sets->home == NULL || sets->begin == NULL ||
        sets->tokens_of == NULL) {
        nep_sets_fini(sets);
        return nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u tokens of %u items",
                        num_tokens, width);
    }
    return NEP_OK;
}

void nep_sets_fini(struct nep_sets *sets)
{
    free(sets->items);
    free(sets->len);
    free(sets->home);
    free(sets->request);
    free(sets->begin);
    free(sets->tokens_of);
    memset(sets, 0, sizeof *sets);
}

enum nep_status nep_sets_index(struct nep_sets *sets)
{
    uint32_t *begin = sets->begin;
    memset(begin, 0, ((size_t)sets->num_items + 2) * sizeof *begin);
    for (uint32_t t = 0; t < sets->num_tokens; t++) {
        for (uint32_t i = 0; i < sets->len[t]; i++) {
            begin[sets->items[(size_t)t * sets->width + i] + 1]++;
        }
    }
    uint32_t *next = malloc(((size_t)sets->num_items + 1) * sizeof *next);
    if (next == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u items", sets->num_items);
    }
    next[0] = 0;
    for (uint32_t i = 0; i < sets->num_items; i++) {
        begin[i + 1] += begin[i];
        next[i + 1] = begin[i + 1];
    }
    for (uint32_t t = 0; t < sets->num_tokens; t++) {
        for (uint32_t i = 0; i < sets->len[t]; i++) {
            sets->tokens_of[next[sets->items[(size_t)t * sets->width + i]]++] = t;
        }
    }
    free(next);
    return NEP_OK;
}

static void put_token(const struct nep_trace *trace, uint64_t token, uint32_t layer,
                      struct nep_sets *sets, uint32_t at)
{
    int32_t ids[NEP_TRACE_TOP_K_LIMIT];
    nep_trace_ids(trace, token, layer, ids);
    uint16_t *items = &sets->items[(size_t)at * sets->width];
    uint8_t len = 0;
    for (uint32_t k = 0; k < sets->width; k++) {
        int is_new = ids[k] >= 0;
        for (uint8_t i = 0; i < len && is_new; i++) {
            is_new = items[i] != ids[k];
        }
        if (is_new) {
            items[len++] = (uint16_t)ids[k];
        }
    }
    sets->len[at] = len;
}

uint64_t nep_sets_part(const struct nep_requests *requests, uint32_t i, int is_scored,
                       uint64_t *first_p)
{
    uint32_t request = nep_requests_at(requests, i);
    const struct nep_trace_request *r = nep_trace_request_at(requests->trace, request);
    uint64_t count = (uint64_t)r->prefill_tokens + r->decode_tokens;
    *first_p = r->first_token;
    if (is_scored) {
        nep_trace_scored(requests->trace, request, first_p, &count);
    }
    return count;
}

int nep_sets_have_scored(const struct nep_requests *requests)
{
    uint64_t first;
    for (uint32_t i = 0; i < requests->num; i++) {
        if (nep_sets_part(requests, i, 1, &first) > 0) {
            return 1;
        }
    }
    return 0;
}

enum nep_status nep_sets_sample(const struct nep_requests *requests, uint32_t layer,
                                uint32_t stride, int is_whole, struct nep_sets *sets)
{
    const struct nep_trace *trace = requests->trace;
    int is_scored = !is_whole && nep_sets_have_scored(requests);
    uint64_t num = 0;
    uint64_t first;
    for (uint32_t i = 0; i < requests->num; i++) {
        num += (nep_sets_part(requests, i, is_scored, &first) + stride - 1) / stride;
    }
    if (num > UINT32_MAX / NEP_TRACE_TOP_K_LIMIT) {
        return nep_fail(NEP_ERR_INVALID, "solver: %llu tokens after taking one in %u; take fewer",
                        (unsigned long long)num, stride);
    }
    enum nep_status status =
        nep_sets_init(sets, (uint32_t)num, nep_trace_num_experts(trace), nep_trace_top_k(trace));
    if (status != NEP_OK) {
        return status;
    }
    sets->request = malloc((num + 1) * sizeof *sets->request);
    if (sets->request == NULL) {
        nep_sets_fini(sets);
        return nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %llu tokens",
                        (unsigned long long)num);
    }
    uint32_t at = 0;
    for (uint32_t i = 0; i < requests->num; i++) {
        uint64_t count = nep_sets_part(requests, i, is_scored, &first);
        for (uint64_t t = 0; t < count; t += stride) {
            sets->request[at] = i;
            sets->home[at] = NEP_NO_HOME;
            put_token(trace, first + t, layer, sets, at++);
        }
    }
    status = nep_sets_index(sets);
    if (status != NEP_OK) {
        nep_sets_fini(sets);
    }
    return status;
}
