/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A small engine whose results are known exactly whoever lives: routing, experts that multiply, an
 * oracle. Values are small integers, so that sums are exact in any order, and what a token must
 * give follows from who lives. For tests in which the group changes.
 */
#ifndef NEP_TESTS_EXACT_H
#define NEP_TESTS_EXACT_H

#include <stdbool.h>

#include "nearep.h"

enum { NEP_EXACT_RANKS = 64, NEP_EXACT_SLOTS = 2, NEP_EXACT_TOP_K = 3, NEP_EXACT_HIDDEN = 64 };

/* Where the hook of a step is called: before dispatch, between its halves, between combine's. */
enum nep_exact_when { NEP_EXACT_BEFORE, NEP_EXACT_DISPATCH, NEP_EXACT_COMBINE };

struct nep_exact {
    uint32_t rank;
    uint32_t num_ranks; /* seats */
    uint32_t max_tokens;
    uint32_t hidden;        /* 0: NEP_EXACT_HIDDEN */
    enum nep_layout layout; /* rank, packed or padded */
    bool is_mapped;         /* buffers of the ep's pool */
    struct nep_ep *ep;
    struct nep_handle *handle;
    uint8_t is_live[NEP_EXACT_RANKS];
    /* May be NULL; then the calls in one piece are made. Not NEP_OK: the step ends with that. */
    int (*hook)(void *ctx, enum nep_exact_when when);
    void *ctx;
    uint64_t capacity;
    uint32_t num_tokens; /* of the step */
    float *x, *rows, *y;
    float *present;
    uint32_t *source_rank;
    int32_t *slots;
    float *slot_weights;
    int32_t *ids;
    float *weights;
};

/* The shape, for nep_ep_create. */
struct nep_ep_params nep_exact_params(const struct nep_exact *exact);
/* Tables, once there is an ep. False: no memory. */
bool nep_exact_make_tables(struct nep_exact *exact);
/* Buffers, anew: after each change of the group, as only fresh memory of the pool is mapped. */
bool nep_exact_make_buffers(struct nep_exact *exact);
void nep_exact_free(struct nep_exact *exact); /* tables and buffers, before the ep goes */
/* The parts of a step, for those who make the calls: inputs and poisoned outputs (num_tokens:
 * UINT32_MAX: none to max_tokens, as the step says), and what stands in for the experts. */
void nep_exact_fill(struct nep_exact *exact, uint32_t step, uint32_t num_tokens);
void nep_exact_run_experts(struct nep_exact *exact, const struct nep_counts *counts);
/* What a rank sends: of this token, this element. */
float nep_exact_value(uint32_t rank, uint32_t step, uint32_t token, uint32_t h);
/* One dispatch and one combine. num_tokens: UINT32_MAX: none to max_tokens, as the step says.
 * Returns the status of the library, or what the hook returned. */
int nep_exact_step(struct nep_exact *exact, uint32_t step, uint32_t num_tokens);
/* Whether every element and `present` are right; false with a sentence. */
bool nep_exact_is_right(const struct nep_exact *exact, uint32_t step, char *text, size_t cap);

#endif
