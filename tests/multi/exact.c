/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/multi/exact.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SLOTS = NEP_EXACT_SLOTS, TOP_K = NEP_EXACT_TOP_K };

static uint32_t hidden_of(const struct nep_exact *exact)
{
    return exact->hidden != 0 ? exact->hidden : NEP_EXACT_HIDDEN;
}

struct nep_ep_params nep_exact_params(const struct nep_exact *exact)
{
    return (struct nep_ep_params){.size = sizeof(struct nep_ep_params),
                                  .num_experts = exact->num_ranks * SLOTS,
                                  .top_k = TOP_K,
                                  .hidden = hidden_of(exact),
                                  .max_tokens = exact->max_tokens,
                                  .dtype = NEP_DTYPE_FP32,
                                  .layout = exact->layout,
                                  .pool_bytes = 8 << 20};
}

static uint32_t mix(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t z = a * 2654435761u ^ b * 2246822519u ^ c * 3266489917u;
    z = (z ^ z >> 15) * 2246822519u;
    return z ^ z >> 13;
}

float nep_exact_value(uint32_t rank, uint32_t step, uint32_t token, uint32_t h)
{
    return (float)((int)(mix(rank * 64 + h, step, token) % 17) - 8);
}

static float factor(uint32_t expert)
{
    return (float)(1 + expert % 4);
}

/* ---- memory --------------------------------------------------------------------------------- */

bool nep_exact_make_tables(struct nep_exact *exact)
{
    size_t pairs = (size_t)exact->max_tokens * TOP_K + 1;
    if (nep_ep_max_rows(exact->ep, &exact->capacity) != NEP_OK) {
        return false;
    }
    exact->present = calloc(pairs, sizeof *exact->present);
    exact->ids = calloc(pairs, sizeof *exact->ids);
    exact->weights = calloc(pairs, sizeof *exact->weights);
    exact->source_rank = calloc(exact->capacity + 1, sizeof *exact->source_rank);
    exact->slots = calloc(exact->capacity * TOP_K + 1, sizeof *exact->slots);
    exact->slot_weights = calloc(exact->capacity * TOP_K + 1, sizeof *exact->slot_weights);
    return exact->present != NULL && exact->ids != NULL && exact->weights != NULL &&
           exact->source_rank != NULL && exact->slots != NULL && exact->slot_weights != NULL;
}

static float *buffer(struct nep_exact *exact, uint64_t num)
{
    void *memory = NULL;
    size_t bytes = (num + 1) * sizeof(float);
    if (!exact->is_mapped) {
        return calloc(1, bytes);
    }
    return nep_buffer_alloc(exact->ep, bytes, &memory) == NEP_OK ? memory : NULL;
}

static void free_buffers(struct nep_exact *exact)
{
    float **all[] = {&exact->x, &exact->y, &exact->rows};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        if (!exact->is_mapped) {
            free(*all[i]);
        } else if (*all[i] != NULL) {
            nep_buffer_free(exact->ep, *all[i]);
        }
        *all[i] = NULL;
    }
}

bool nep_exact_make_buffers(struct nep_exact *exact)
{
    uint32_t hidden = hidden_of(exact);
    free_buffers(exact);
    exact->x = buffer(exact, (uint64_t)exact->max_tokens * hidden);
    exact->y = buffer(exact, (uint64_t)exact->max_tokens * hidden);
    exact->rows = buffer(exact, exact->capacity * hidden);
    return exact->x != NULL && exact->y != NULL && exact->rows != NULL;
}

void nep_exact_free(struct nep_exact *exact)
{
    free_buffers(exact);
    free(exact->present);
    free(exact->ids);
    free(exact->weights);
    free(exact->source_rank);
    free(exact->slots);
    free(exact->slot_weights);
}

/* ---- a step --------------------------------------------------------------------------------- */

void nep_exact_fill(struct nep_exact *exact, uint32_t step, uint32_t num_tokens)
{
    uint32_t hidden = hidden_of(exact);
    uint32_t me = exact->rank, num_experts = exact->num_ranks * SLOTS;
    uint32_t drawn = mix(me + 11, step, 5) % (exact->max_tokens + 1);
    exact->num_tokens = num_tokens == UINT32_MAX ? drawn : num_tokens;
    for (uint32_t i = 0; i < exact->num_tokens * TOP_K; i++) {
        uint32_t first = mix(me, step, i / TOP_K);
        exact->ids[i] = (int32_t)((first + i % TOP_K * 3) % num_experts);
        exact->ids[i] = mix(me + 7, step, i) % 11 == 0 ? -1 : exact->ids[i];
        exact->weights[i] = 0.25f * (float)(1 + mix(me + 3, step, i) % 8);
    }
    for (uint32_t t = 0; t < exact->num_tokens; t++) {
        exact->present[t] = -1;
        for (uint32_t h = 0; h < hidden; h++) {
            exact->x[t * hidden + h] = nep_exact_value(me, step, t, h);
            exact->y[t * hidden + h] = 1e30f;
        }
    }
    memset(exact->rows, 0, exact->capacity * hidden * sizeof *exact->rows);
}

/* Experts, in place: each row times its expert's factor. */
static void run_slots(struct nep_exact *exact, const struct nep_counts *counts)
{
    uint32_t hidden = hidden_of(exact);
    uint64_t room = (uint64_t)exact->num_ranks * exact->max_tokens;
    for (uint32_t l = 0; l < SLOTS; l++) {
        bool is_padded = exact->layout == NEP_LAYOUT_EXPERT_PADDED;
        uint64_t first = is_padded ? l * room : counts->first_row[l];
        uint64_t num = is_padded ? room : counts->rows_per_slot[l];
        for (uint64_t i = first * hidden; i < (first + num) * hidden; i++) {
            exact->rows[i] *= factor(exact->rank * SLOTS + l);
        }
    }
}

/* The rank layout: each row times the weighted sum of its experts' factors. */
static void run_rows(struct nep_exact *exact, const struct nep_counts *counts)
{
    uint32_t hidden = hidden_of(exact);
    for (uint64_t r = 0; r < counts->num_rows; r++) {
        float scale = 0;
        for (uint32_t k = 0; k < TOP_K; k++) {
            int32_t slot = exact->slots[r * TOP_K + k];
            scale += slot < 0 ? 0
                              : exact->slot_weights[r * TOP_K + k] *
                                    factor(exact->rank * SLOTS + (uint32_t)slot);
        }
        for (uint32_t h = 0; h < hidden; h++) {
            exact->rows[r * hidden + h] *= scale;
        }
    }
}

void nep_exact_run_experts(struct nep_exact *exact, const struct nep_counts *counts)
{
    if (exact->layout == NEP_LAYOUT_RANK) {
        run_rows(exact, counts);
    } else {
        run_slots(exact, counts);
    }
}

static int at(struct nep_exact *exact, enum nep_exact_when when)
{
    return exact->hook != NULL ? exact->hook(exact->ctx, when) : NEP_OK;
}

static int dispatch(struct nep_exact *exact, struct nep_counts *counts)
{
    struct nep_tokens in = {.size = sizeof in,
                            .num_tokens = exact->num_tokens,
                            .x = exact->x,
                            .topk_ids = exact->ids,
                            .topk_weights = exact->weights};
    struct nep_rows out = {.size = sizeof out,
                           .x = exact->rows,
                           .capacity = exact->capacity,
                           .source_rank = exact->source_rank,
                           .topk_slots = exact->slots,
                           .topk_weights = exact->slot_weights};
    int status = at(exact, NEP_EXACT_BEFORE);
    if (status == NEP_OK && exact->hook == NULL) {
        status = nep_dispatch(exact->ep, exact->handle, &in, &out, NULL);
    } else if (status == NEP_OK) {
        status = nep_dispatch_send(exact->ep, exact->handle, &in, NULL);
        status = status == NEP_OK ? at(exact, NEP_EXACT_DISPATCH) : status;
        status =
            status == NEP_OK ? nep_dispatch_recv(exact->ep, exact->handle, &out, NULL) : status;
    }
    return status == NEP_OK ? (int)nep_dispatch_counts(exact->ep, exact->handle, counts) : status;
}

static int combine(struct nep_exact *exact)
{
    struct nep_expert_rows back = {.size = sizeof back, .y = exact->rows};
    struct nep_tokens_out sum = {.size = sizeof sum,
                                 .num_tokens = exact->num_tokens,
                                 .y = exact->y,
                                 .present = exact->present};
    if (exact->hook == NULL) {
        return nep_combine(exact->ep, exact->handle, &back, &sum, NULL);
    }
    int status = nep_combine_send(exact->ep, exact->handle, &back, NULL);
    status = status == NEP_OK ? at(exact, NEP_EXACT_COMBINE) : status;
    return status == NEP_OK ? (int)nep_combine_recv(exact->ep, exact->handle, &sum, NULL) : status;
}

int nep_exact_step(struct nep_exact *exact, uint32_t step, uint32_t num_tokens)
{
    struct nep_counts counts = {.size = sizeof counts};
    nep_exact_fill(exact, step, num_tokens);
    int status = dispatch(exact, &counts);
    if (status != NEP_OK) {
        return status;
    }
    nep_exact_run_experts(exact, &counts);
    return combine(exact);
}

/* ---- the oracle ----------------------------------------------------------------------------- */

/* What token t must give: the factor of its input, and `present`. */
static void expect(const struct nep_exact *exact, uint32_t t, float *scale_p, float *present_p)
{
    const int32_t *ids = exact->ids + t * TOP_K;
    uint64_t ranks = 0;
    *scale_p = *present_p = 0;
    for (uint32_t k = 0; k < TOP_K; k++) {
        uint32_t owner = ids[k] < 0 ? 0 : (uint32_t)ids[k] / SLOTS;
        if (ids[k] >= 0 && exact->is_live[owner]) {
            *scale_p += exact->weights[t * TOP_K + k] * factor((uint32_t)ids[k]);
            *present_p += exact->weights[t * TOP_K + k];
            ranks |= 1ull << owner;
        }
    }
    if (exact->layout == NEP_LAYOUT_RANK) {
        *present_p = (float)__builtin_popcountll(ranks);
    }
}

bool nep_exact_is_right(const struct nep_exact *exact, uint32_t step, char *text, size_t cap)
{
    uint32_t hidden = hidden_of(exact);
    for (uint32_t t = 0; t < exact->num_tokens; t++) {
        float scale, present;
        expect(exact, t, &scale, &present);
        if (exact->present[t] != present) {
            snprintf(text, cap, "step %u, token %u: present %g, not %g", step, t,
                     (double)exact->present[t], (double)present);
            return false;
        }
        for (uint32_t h = 0; h < hidden; h++) {
            float is = exact->y[t * hidden + h],
                  want = scale * nep_exact_value(exact->rank, step, t, h);
            if (is != want) {
                snprintf(text, cap, "step %u, token %u, element %u: %g, not %g", step, t, h,
                         (double)is, (double)want);
                return false;
            }
        }
    }
    return true;
}
