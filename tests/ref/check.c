/* SPDX-License-Identifier: Apache-2.0 */
/* Every element against the oracle. A norm or a similarity is not a check. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/ref/ref.h"

__attribute__((format(printf, 2, 3))) static void wrong(struct nep_ref_report *report,
                                                        const char *fmt, ...)
{
    if (report->wrong++ == 0) {
        va_list args;
        va_start(args, fmt);
        vsnprintf(report->first, sizeof(report->first), fmt, args);
        va_end(args);
    }
}

static void compare_number(struct nep_ref_report *report, const char *what, uint64_t at,
                           uint64_t got, uint64_t want)
{
    report->elements++;
    if (got != want) {
        wrong(report, "%s[%llu] is %llu, must be %llu", what, (unsigned long long)at,
              (unsigned long long)got, (unsigned long long)want);
    }
}

void nep_ref_check_counts(const struct nep_ref_group *group, const struct nep_ref_rows *want,
                          const struct nep_counts *got, struct nep_ref_report *report)
{
    compare_number(report, "num_rows", 0, got->num_rows, want->num_rows);
    compare_number(report, "num_real_rows", 0, got->num_real_rows, want->num_real_rows);
    for (uint32_t local = 0; local < group->slots_per_rank; local++) {
        compare_number(report, "rows_per_slot", local, got->rows_per_slot[local],
                       want->rows_per_slot[local]);
        if (group->layout != NEP_LAYOUT_RANK && want->rows_per_slot[local] > 0) {
            compare_number(report, "first_row", local, got->first_row[local],
                           want->first_row[local]);
        }
    }
    for (uint32_t source = 0; source < group->num_ranks; source++) {
        compare_number(report, "rows_per_source", source, got->rows_per_source[source],
                       want->rows_per_source[source]);
    }
}

/* Counts elements of `size` bytes that differ. */
static void compare_elements(struct nep_ref_report *report, const void *got, const void *want,
                             size_t num, size_t size, const char *where)
{
    report->elements += num;
    if (memcmp(got, want, num * size) == 0) {
        return;
    }
    for (size_t i = 0; i < num; i++) {
        const unsigned char *a = (const unsigned char *)got + i * size;
        const unsigned char *b = (const unsigned char *)want + i * size;
        if (memcmp(a, b, size) != 0) {
            unsigned long long got_bits = 0;
            unsigned long long want_bits = 0;
            memcpy(&got_bits, a, size);
            memcpy(&want_bits, b, size);
            wrong(report, "%s, element %zu: bits 0x%llx, must be 0x%llx", where, i, got_bits,
                  want_bits);
        }
    }
}

static float weight_of(const struct nep_ref_group *group, uint32_t rank, size_t i)
{
    bool has = group->weights != NULL && group->weights[rank] != NULL;
    return has ? group->weights[rank][i] : 1.0f;
}

/* Slots and weights beside a row of the rank layout. */
static void check_row_topk(const struct nep_ref_group *group, uint32_t rank,
                           const struct nep_ref_row *row, const struct nep_rows *got,
                           struct nep_ref_report *report)
{
    for (uint32_t k = 0; k < group->top_k; k++) {
        size_t i = (size_t)row->token * group->top_k + k;
        uint32_t slot = group->slots[row->source][i];
        bool is_here = slot != NEP_REF_NONE && slot / group->slots_per_rank == rank;
        int32_t local = is_here ? (int32_t)(slot % group->slots_per_rank) : -1;
        float weight = is_here ? weight_of(group, row->source, i) : 0.0f;
        uint64_t at = row->idx * group->top_k + k;
        if (got->topk_slots != NULL) {
            compare_number(report, "topk_slots", at, (uint32_t)got->topk_slots[at],
                           (uint32_t)local);
        }
        if (got->topk_weights != NULL) {
            compare_elements(report, &got->topk_weights[at], &weight, 1, sizeof(float),
                             "topk_weights");
        }
    }
}

static void check_row(const struct nep_ref_group *group, uint32_t rank,
                      const struct nep_ref_row *row, const struct nep_rows *got,
                      struct nep_ref_report *report)
{
    if (got->source_rank != NULL) {
        compare_number(report, "source_rank", row->idx, got->source_rank[row->idx], row->source);
    }
    if (got->source_token != NULL) {
        compare_number(report, "source_token", row->idx, got->source_token[row->idx], row->token);
    }
    if (group->layout == NEP_LAYOUT_RANK) {
        check_row_topk(group, rank, row, got, report);
    } else if (got->topk_weights != NULL) {
        float weight = weight_of(group, row->source, (size_t)row->token * group->top_k + row->k);
        compare_elements(report, &got->topk_weights[row->idx], &weight, 1, sizeof(float),
                         "topk_weights");
    }
}

/* What a row must be on the wire: x itself, or quantised. buf holds raw, floats, bytes, scales. */
struct wire_row {
    char *raw;
    float *values;
    uint8_t *fp8;
    float *scales;
};

static void make_wire_row(const struct nep_ref_group *group, const struct nep_ref_row *row,
                          struct wire_row *wire)
{
    group->x_row(group->x_ctx, row->source, row->token, wire->raw);
    if (group->wire == NEP_DTYPE_FP8_E4M3) {
        nep_ref_row_load(group->dtype, wire->raw, group->hidden, wire->values);
        nep_ref_fp8_quantise(wire->values, group->hidden, wire->fp8, wire->scales);
    }
}

void nep_ref_check_dispatch(const struct nep_ref_group *group, uint32_t rank,
                            const struct nep_ref_rows *want, const struct nep_rows *got,
                            struct nep_ref_report *report)
{
    bool is_fp8 = group->wire == NEP_DTYPE_FP8_E4M3;
    size_t row_bytes = nep_ref_wire_row_bytes(group);
    size_t size = nep_ref_dtype_bytes(group->wire);
    struct wire_row wire = {malloc((size_t)group->hidden * 4), malloc((size_t)group->hidden * 4),
                            malloc(group->hidden), malloc((size_t)group->hidden / 32 + 4)};
    if (wire.raw == NULL || wire.values == NULL || wire.fp8 == NULL || wire.scales == NULL) {
        wrong(report, "the oracle is out of memory");
        goto out;
    }
    for (uint64_t i = 0; i < want->num_real_rows; i++) {
        const struct nep_ref_row *row = &want->rows[i];
        char where[128];
        snprintf(where, sizeof(where), "rank %u, output row %llu (token %u of rank %u)", rank,
                 (unsigned long long)row->idx, row->token, row->source);
        make_wire_row(group, row, &wire);
        compare_elements(report, (const char *)got->x + row->idx * row_bytes,
                         is_fp8 ? (const void *)wire.fp8 : wire.raw, group->hidden, size, where);
        if (is_fp8) {
            uint32_t num = nep_ref_num_scales(group);
            compare_elements(report, (const float *)got->scales + row->idx * num, wire.scales, num,
                             4, where);
        }
        check_row(group, rank, row, got, report);
    }
out:
    free(wire.raw);
    free(wire.values);
    free(wire.fp8);
    free(wire.scales);
}

double nep_ref_bound(const struct nep_ref_group *group)
{
    if (group->dtype == NEP_DTYPE_FP16) {
        return 3.0 * 0x1p-11;
    }
    if (group->dtype == NEP_DTYPE_FP32) {
        return (double)(group->top_k + group->num_nodes + group->num_ranks) * 0x1p-24;
    }
    return 3.0 * 0x1p-8;
}

/* The fp64 oracle for one token. Below the smallest normal number each rounding errs by a fixed
 * amount instead of a fraction: hence the small constant, three levels of every contribution. */
static void check_bound(const struct nep_ref_group *group, const float *got, const double *exact,
                        const double *magnitude, const char *where, struct nep_ref_report *report)
{
    double bound = nep_ref_bound(group);
    double tiny = group->dtype == NEP_DTYPE_FP16 ? 0x1p-25 : 0x1p-134;
    double floor_error = tiny * (2.0 * group->top_k + 1.0);
    for (uint32_t i = 0; i < group->hidden; i++) {
        if (!(fabs((double)got[i] - exact[i]) <= bound * magnitude[i] + floor_error)) {
            wrong(report, "%s, element %u: %g, must be within %g of %g", where, i, (double)got[i],
                  bound * magnitude[i], exact[i]);
        }
    }
}

void nep_ref_check_combine(const struct nep_ref_group *group, uint32_t rank, const void *y,
                           struct nep_ref_report *report)
{
    size_t size = nep_ref_dtype_bytes(group->dtype);
    size_t row_bytes = size * group->hidden;
    struct nep_ref_scratch *scratch = nep_ref_scratch_create(group->hidden);
    char *want = malloc(row_bytes);
    float *got = malloc((size_t)group->hidden * sizeof(float));
    double *exact = malloc((size_t)group->hidden * sizeof(double));
    double *magnitude = malloc((size_t)group->hidden * sizeof(double));
    if (scratch == NULL || want == NULL || got == NULL || exact == NULL || magnitude == NULL) {
        wrong(report, "the oracle is out of memory");
        goto out;
    }
    for (uint32_t token = 0; token < group->num_tokens[rank]; token++) {
        char where[96];
        snprintf(where, sizeof(where), "rank %u, combined token %u", rank, token);
        const char *row = (const char *)y + token * row_bytes;
        nep_ref_sum_tree(group, rank, token, scratch, want);
        compare_elements(report, row, want, group->hidden, size, where);
        nep_ref_sum_exact(group, rank, token, scratch, exact, magnitude);
        nep_ref_row_load(group->dtype, row, group->hidden, got);
        check_bound(group, got, exact, magnitude, where, report);
    }
out:
    nep_ref_scratch_destroy(scratch);
    free(want);
    free(got);
    free(exact);
    free(magnitude);
}
