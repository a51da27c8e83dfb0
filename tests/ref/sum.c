/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Combine, twice: by the tree that the library promises (the same bits), and in fp64 without any
 * rounding (so that the tree itself cannot be wrong unnoticed). Both start from the token's x row
 * and the factors: no row of the code under test enters.
 */
#include <stdlib.h>
#include <string.h>

#include "tests/ref/ref.h"
#include "tests/ref/simd.h"

struct nep_ref_scratch {
    uint32_t hidden;
    float *x;
    float *y;
    float *rank_acc;
    float *node_acc;
    float *home_acc;
    void *raw;
    uint8_t *fp8;
    float *scales;
};

struct nep_ref_scratch *nep_ref_scratch_create(uint32_t hidden)
{
    struct nep_ref_scratch *scratch = calloc(1, sizeof(*scratch));
    if (scratch == NULL) {
        return NULL;
    }
    scratch->hidden = hidden;
    float **rows[] = {&scratch->x, &scratch->y, &scratch->rank_acc, &scratch->node_acc,
                      &scratch->home_acc};
    bool is_complete = true;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        *rows[i] = calloc(hidden, sizeof(float));
        is_complete = is_complete && *rows[i] != NULL;
    }
    scratch->raw = calloc(hidden, 4);
    scratch->fp8 = calloc(hidden, 1);
    scratch->scales = calloc(hidden / 128 + 1, sizeof(float));
    if (!is_complete || scratch->raw == NULL || scratch->fp8 == NULL || scratch->scales == NULL) {
        nep_ref_scratch_destroy(scratch);
        return NULL;
    }
    return scratch;
}

void nep_ref_scratch_destroy(struct nep_ref_scratch *scratch)
{
    if (scratch == NULL) {
        return;
    }
    free(scratch->x);
    free(scratch->y);
    free(scratch->rank_acc);
    free(scratch->node_acc);
    free(scratch->home_acc);
    free(scratch->raw);
    free(scratch->fp8);
    free(scratch->scales);
    free(scratch);
}

/* The token as the experts see it: after the wire's quantisation. */
static void load_token(const struct nep_ref_group *group, uint32_t rank, uint32_t token,
                       struct nep_ref_scratch *scratch)
{
    group->x_row(group->x_ctx, rank, token, scratch->raw);
    nep_ref_row_load(group->dtype, scratch->raw, group->hidden, scratch->x);
    if (group->wire == NEP_DTYPE_FP8_E4M3) {
        nep_ref_fp8_quantise(scratch->x, group->hidden, scratch->fp8, scratch->scales);
        nep_ref_fp8_load(scratch->fp8, scratch->scales, group->hidden, scratch->x);
    }
}

static float weight_of(const struct nep_ref_group *group, uint32_t rank, size_t i)
{
    bool has = group->weights != NULL && group->weights[rank] != NULL;
    return has ? group->weights[rank][i] : 1.0f;
}

/* Adds what rank `dest` contributes to the token into node_acc; false when that is nothing. */
static bool add_rank(const struct nep_ref_group *group, uint32_t rank, uint32_t token,
                     uint32_t dest, struct nep_ref_scratch *scratch)
{
    const struct nep_ref_simd *simd = nep_ref_simd();
    uint32_t hidden = group->hidden;
    bool has_any = false;
    for (uint32_t k = 0; k < group->top_k; k++) {
        size_t i = (size_t)token * group->top_k + k;
        uint32_t slot = group->slots[rank][i];
        if (slot == NEP_REF_NONE || slot / group->slots_per_rank != dest) {
            continue;
        }
        if (!has_any) {
            memset(scratch->rank_acc, 0, hidden * sizeof(float));
            has_any = true;
        }
        simd->scale(scratch->x, group->factor[slot], hidden, scratch->y);
        nep_ref_row_round(group->dtype, scratch->y, hidden);
        if (weight_of(group, rank, i) != 0) {
            simd->fma(scratch->rank_acc, scratch->y, weight_of(group, rank, i), hidden);
        }
    }
    if (has_any) {
        nep_ref_row_round(group->dtype, scratch->rank_acc, hidden);
        simd->fma(scratch->node_acc, scratch->rank_acc, 1.0f, hidden);
    }
    return has_any;
}

void nep_ref_sum_tree(const struct nep_ref_group *group, uint32_t rank, uint32_t token,
                      struct nep_ref_scratch *scratch, void *y)
{
    uint32_t hidden = group->hidden;
    load_token(group, rank, token, scratch);
    memset(scratch->home_acc, 0, hidden * sizeof(float));
    for (uint32_t node = 0; node < group->num_nodes; node++) {
        bool has_any = false;
        memset(scratch->node_acc, 0, hidden * sizeof(float));
        for (uint32_t dest = 0; dest < group->num_ranks; dest++) {
            if (group->node_of_rank[dest] == node) {
                has_any = add_rank(group, rank, token, dest, scratch) || has_any;
            }
        }
        if (has_any) {
            nep_ref_row_round(group->dtype, scratch->node_acc, hidden);
            nep_ref_simd()->fma(scratch->home_acc, scratch->node_acc, 1.0f, hidden);
        }
    }
    nep_ref_row_store(group->dtype, scratch->home_acc, hidden, y);
}

void nep_ref_sum_exact(const struct nep_ref_group *group, uint32_t rank, uint32_t token,
                       struct nep_ref_scratch *scratch, double *y, double *magnitude)
{
    const struct nep_ref_simd *simd = nep_ref_simd();
    load_token(group, rank, token, scratch);
    memset(y, 0, group->hidden * sizeof(double));
    memset(magnitude, 0, group->hidden * sizeof(double));
    for (uint32_t k = 0; k < group->top_k; k++) {
        size_t i = (size_t)token * group->top_k + k;
        uint32_t slot = group->slots[rank][i];
        if (slot == NEP_REF_NONE || weight_of(group, rank, i) == 0) {
            continue;
        }
        simd->scale(scratch->x, group->factor[slot], group->hidden, scratch->y);
        nep_ref_row_round(group->dtype, scratch->y, group->hidden);
        simd->fma64(y, magnitude, scratch->y, weight_of(group, rank, i), group->hidden);
    }
}

/* Row idx of the output of dispatch as floats. */
static void load_output(const struct nep_ref_group *group, const struct nep_rows *rows,
                        uint64_t idx, float *out)
{
    const char *row = (const char *)rows->x + idx * nep_ref_wire_row_bytes(group);
    if (group->wire == NEP_DTYPE_FP8_E4M3) {
        const float *scales = (const float *)rows->scales + idx * nep_ref_num_scales(group);
        nep_ref_fp8_load((const uint8_t *)row, scales, group->hidden, out);
    } else {
        nep_ref_row_load(group->dtype, row, group->hidden, out);
    }
}

static void store_y(const struct nep_ref_group *group, uint64_t idx, const float *row, void *y)
{
    size_t bytes = (size_t)group->hidden * nep_ref_dtype_bytes(group->dtype);
    nep_ref_row_store(group->dtype, row, group->hidden, (char *)y + idx * bytes);
}

static void expert_rank_row(const struct nep_ref_group *group, uint32_t rank, uint64_t idx,
                            const struct nep_rows *rows, struct nep_ref_scratch *scratch)
{
    memset(scratch->rank_acc, 0, group->hidden * sizeof(float));
    for (uint32_t k = 0; k < group->top_k; k++) {
        int32_t local = rows->topk_slots[idx * group->top_k + k];
        if (local < 0 || (uint32_t)local >= group->slots_per_rank) {
            continue;
        }
        float factor = group->factor[(size_t)rank * group->slots_per_rank + (uint32_t)local];
        nep_ref_simd()->scale(scratch->x, factor, group->hidden, scratch->y);
        nep_ref_row_round(group->dtype, scratch->y, group->hidden);
        nep_ref_simd()->fma(scratch->rank_acc, scratch->y,
                            rows->topk_weights[idx * group->top_k + k], group->hidden);
    }
}

/* The source of row i of a padded block is i / M; rows past its count carry nothing. */
static void expert_slot(const struct nep_ref_group *group, uint32_t rank, uint32_t local,
                        const struct nep_counts *counts, const struct nep_rows *rows, void *y,
                        struct nep_ref_scratch *scratch)
{
    float factor = group->factor[(size_t)rank * group->slots_per_rank + local];
    bool is_padded = group->layout == NEP_LAYOUT_EXPERT_PADDED;
    uint64_t num =
        is_padded ? (uint64_t)group->num_ranks * group->max_tokens : counts->rows_per_slot[local];
    for (uint64_t i = 0; i < num; i++) {
        uint64_t idx = counts->first_row[local] + i;
        if (idx >= counts->num_rows) {
            return;
        }
        load_output(group, rows, idx, scratch->x);
        nep_ref_simd()->scale(scratch->x, factor, group->hidden, scratch->y);
        store_y(group, idx, scratch->y, y);
    }
}

bool nep_ref_expert_apply(const struct nep_ref_group *group, uint32_t rank,
                          const struct nep_counts *counts, const struct nep_rows *rows, void *y)
{
    struct nep_ref_scratch *scratch = nep_ref_scratch_create(group->hidden);
    if (scratch == NULL) {
        return false;
    }
    if (group->layout == NEP_LAYOUT_RANK) {
        for (uint64_t idx = 0; idx < counts->num_rows; idx++) {
            load_output(group, rows, idx, scratch->x);
            expert_rank_row(group, rank, idx, rows, scratch);
            store_y(group, idx, scratch->rank_acc, y);
        }
    } else {
        for (uint32_t local = 0; local < group->slots_per_rank; local++) {
            expert_slot(group, rank, local, counts, rows, y, scratch);
        }
    }
    nep_ref_scratch_destroy(scratch);
    return true;
}
