/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels in plain C: the reference, and what runs where there is no other. Written for
 * reading. Sums go over blocks of columns, so that the three levels of the tree stay in a small
 * array while every term's row is read once. fmaf is the C library's: with hardware where the CPU
 * has it, exact in software where not. Rejected: product and sum in double, which rounds twice.
 */
#include <math.h>

#include "dispatch/host/kernels_impl.h"

#define COLUMNS 64

static float load(const void *row, size_t idx, enum nep_dtype dtype)
{
    if (dtype == NEP_DTYPE_FP32) {
        float value;
        memcpy(&value, (const char *)row + idx * sizeof value, sizeof value);
        return value;
    }
    uint16_t half;
    memcpy(&half, (const char *)row + idx * sizeof half, sizeof half);
    return dtype == NEP_DTYPE_BF16 ? nep_from_bf16(half) : nep_from_fp16(half);
}

static void store(void *row, size_t idx, float value, enum nep_dtype dtype)
{
    if (dtype == NEP_DTYPE_FP32) {
        value = nep_canonical(value);
        memcpy((char *)row + idx * sizeof value, &value, sizeof value);
        return;
    }
    uint16_t half = dtype == NEP_DTYPE_BF16 ? nep_to_bf16(value) : nep_to_fp16(value);
    memcpy((char *)row + idx * sizeof half, &half, sizeof half);
}

static float round_to(float value, enum nep_dtype dtype)
{
    switch (dtype) {
    case NEP_DTYPE_BF16:
        return nep_from_bf16(nep_to_bf16(value));
    case NEP_DTYPE_FP16:
        return nep_from_fp16(nep_to_fp16(value));
    default:
        return value;
    }
}

/* upper += round(lower), lower = +0: the end of a level. */
static void level_end(float *upper, float *lower, size_t num, enum nep_dtype dtype)
{
    for (size_t i = 0; i < num; i++) {
        upper[i] += round_to(lower[i], dtype);
        lower[i] = 0;
    }
}

void nep_sum_c_range(void *out, const struct nep_term *terms, uint32_t num_terms,
                     enum nep_dtype dtype, size_t begin, size_t end)
{
    for (size_t column = begin; column < end; column += COLUMNS) {
        size_t num = end - column < COLUMNS ? end - column : COLUMNS;
        float rank[COLUMNS] = {0};
        float node[COLUMNS] = {0};
        float home[COLUMNS] = {0};
        for (uint32_t t = 0; t < num_terms; t++) {
            uint32_t ends = t + 1 == num_terms ? NEP_ENDS_NODE : terms[t].ends;
            for (size_t i = 0; i < num && terms[t].weight != 0; i++) {
                rank[i] = fmaf(terms[t].weight, load(terms[t].row, column + i, dtype), rank[i]);
            }
            if (ends != 0) {
                level_end(node, rank, num, dtype);
            }
            if (ends & NEP_ENDS_NODE) {
                level_end(home, node, num, dtype);
            }
        }
        for (size_t i = 0; i < num; i++) {
            store(out, column + i, home[i], dtype);
        }
    }
}

/* Not inlined: between nep_fpenv_enter and leave. The same below. */
static __attribute__((noinline)) void sum_all(void *out, const struct nep_term *terms,
                                              uint32_t num_terms, enum nep_dtype dtype,
                                              size_t elements)
{
    nep_sum_c_range(out, terms, num_terms, dtype, 0, elements);
}

static void sum_bf16(void *out, const struct nep_term *terms, uint32_t num_terms, size_t elements)
{
    nep_fpenv env = nep_fpenv_enter();
    sum_all(out, terms, num_terms, NEP_DTYPE_BF16, elements);
    nep_fpenv_leave(env);
}

static void sum_fp16(void *out, const struct nep_term *terms, uint32_t num_terms, size_t elements)
{
    nep_fpenv env = nep_fpenv_enter();
    sum_all(out, terms, num_terms, NEP_DTYPE_FP16, elements);
    nep_fpenv_leave(env);
}

static void sum_fp32(void *out, const struct nep_term *terms, uint32_t num_terms, size_t elements)
{
    nep_fpenv env = nep_fpenv_enter();
    sum_all(out, terms, num_terms, NEP_DTYPE_FP32, elements);
    nep_fpenv_leave(env);
}

static void copy(void *dst, const void *src, size_t bytes)
{
    memcpy(dst, src, bytes);
}

static void push(void *const *dsts, uint32_t num, const void *src, size_t bytes)
{
    for (uint32_t i = 0; i < num; i++) {
        memcpy(dsts[i], src, bytes);
    }
}

static void cast_block(uint8_t *q, void *scales, const struct nep_cast *cast, size_t begin,
                       size_t end)
{
    float amax = 0;
    for (size_t i = begin; i < end; i++) {
        float abs = fabsf(load(cast->x, i, cast->dtype));
        amax = abs > amax ? abs : amax; /* false for a NaN */
    }
    float scale = nep_fp8_scale(amax, cast->kind);
    nep_fp8_scale_store(scales, begin / NEP_FP8_BLOCK, scale, cast->kind);
    for (size_t i = begin; i < end; i++) {
        q[i] = nep_to_e4m3(load(cast->x, i, cast->dtype) / scale);
    }
}

__attribute__((noinline)) void nep_cast_c_range(void *q, void *scales, const struct nep_cast *cast,
                                                size_t begin, size_t end)
{
    for (size_t block = begin; block < end; block += NEP_FP8_BLOCK) {
        size_t next = end - block < NEP_FP8_BLOCK ? end : block + NEP_FP8_BLOCK;
        cast_block(q, scales, cast, block, next);
    }
}

__attribute__((noinline)) void nep_uncast_c_range(void *x, const void *scales,
                                                  const struct nep_cast *cast, size_t begin,
                                                  size_t end)
{
    for (size_t i = begin; i < end; i++) {
        float scale = nep_fp8_scale_load(scales, i / NEP_FP8_BLOCK, cast->kind);
        store(x, i, nep_from_e4m3(((const uint8_t *)cast->q)[i]) * scale, cast->dtype);
    }
}

static void cast_fp8(void *q, void *scales, const void *x, enum nep_dtype dtype, size_t elements,
                     enum nep_scale kind)
{
    struct nep_cast cast = {.x = x, .dtype = dtype, .kind = kind};
    nep_fpenv env = nep_fpenv_enter();
    nep_cast_c_range(q, scales, &cast, 0, elements);
    nep_fpenv_leave(env);
}

static void uncast_fp8(void *x, enum nep_dtype dtype, const void *q, const void *scales,
                       size_t elements, enum nep_scale kind)
{
    struct nep_cast cast = {.q = q, .dtype = dtype, .kind = kind};
    nep_fpenv env = nep_fpenv_enter();
    nep_uncast_c_range(x, scales, &cast, 0, elements);
    nep_fpenv_leave(env);
}

/* The stores above are plain: the release that follows orders them. */
static void fence(void)
{
}

const struct nep_kernels nep_kernels_c = {
    .name = "c",
    .copy = copy,
    .push = push,
    .sum = {sum_bf16, sum_fp16, sum_fp32},
    .sum_final = {sum_bf16, sum_fp16, sum_fp32},
    .cast_fp8 = cast_fp8,
    .uncast_fp8 = uncast_fp8,
    .fence = fence,
};
