/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every loop is written once, in plain C, and compiled twice: as it is, and with AVX2 and FMA
 * allowed. Both give the same bits: each operation is one IEEE operation (fmaf is fused by
 * definition, contraction is off), so the instructions cannot matter. Intrinsics would tie the
 * oracle to the ideas of the code under test; plain C keeps it readable as the statement of what
 * is right.
 */
#include "tests/ref/simd.h"

#include <math.h>
#include <string.h>

#define BODY static inline __attribute__((always_inline)) void

static inline __attribute__((always_inline)) uint32_t bf16_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    uint32_t nan = (bits >> 16) | 0x40u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
}

static inline __attribute__((always_inline)) float bf16_value(uint32_t half)
{
    uint32_t bits = half << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

BODY bf16_load(const uint16_t *restrict row, uint32_t num, float *restrict out)
{
    for (uint32_t i = 0; i < num; i++) {
        out[i] = bf16_value(row[i]);
    }
}

BODY bf16_store(const float *restrict row, uint32_t num, uint16_t *restrict out)
{
    for (uint32_t i = 0; i < num; i++) {
        out[i] = (uint16_t)bf16_bits(row[i]);
    }
}

BODY bf16_round(float *row, uint32_t num)
{
    for (uint32_t i = 0; i < num; i++) {
        row[i] = bf16_value(bf16_bits(row[i]));
    }
}

BODY scale(const float *restrict row, float factor, uint32_t num, float *restrict out)
{
    for (uint32_t i = 0; i < num; i++) {
        out[i] = row[i] * factor;
    }
}

BODY fma_row(float *restrict acc, const float *restrict row, float weight, uint32_t num)
{
    for (uint32_t i = 0; i < num; i++) {
        acc[i] = fmaf(weight, row[i], acc[i]);
    }
}

BODY fma64_row(double *restrict acc, double *restrict magnitude, const float *restrict row,
               float weight, uint32_t num)
{
    for (uint32_t i = 0; i < num; i++) {
        double term = (double)weight * (double)row[i];
        acc[i] += term;
        magnitude[i] += fabs(term);
    }
}

/* A 32-bit finaliser of the murmur family over a counter: one value in [-1, 1) per element. */
BODY gen_row(uint32_t key, uint32_t num, float *restrict out)
{
    for (uint32_t i = 0; i < num; i++) {
        uint32_t bits = i * 0x9e3779b1u + key;
        bits ^= bits >> 16;
        bits *= 0x85ebca6bu;
        bits ^= bits >> 13;
        bits *= 0xc2b2ae35u;
        bits ^= bits >> 16;
        out[i] = (float)(int32_t)bits * 0x1p-31f;
    }
}

#define VARIANT(name, attr)                                                                        \
    attr static void bf16_load_##name(const uint16_t *row, uint32_t num, float *out)               \
    {                                                                                              \
        bf16_load(row, num, out);                                                                  \
    }                                                                                              \
    attr static void bf16_store_##name(const float *row, uint32_t num, uint16_t *out)              \
    {                                                                                              \
        bf16_store(row, num, out);                                                                 \
    }                                                                                              \
    attr static void bf16_round_##name(float *row, uint32_t num)                                   \
    {                                                                                              \
        bf16_round(row, num);                                                                      \
    }                                                                                              \
    attr static void scale_##name(const float *row, float factor, uint32_t num, float *out)        \
    {                                                                                              \
        scale(row, factor, num, out);                                                              \
    }                                                                                              \
    attr static void fma_##name(float *acc, const float *row, float weight, uint32_t num)          \
    {                                                                                              \
        fma_row(acc, row, weight, num);                                                            \
    }                                                                                              \
    attr static void fma64_##name(double *acc, double *magnitude, const float *row, float weight,  \
                                  uint32_t num)                                                    \
    {                                                                                              \
        fma64_row(acc, magnitude, row, weight, num);                                               \
    }                                                                                              \
    attr static void gen_##name(uint32_t key, uint32_t num, float *out)                            \
    {                                                                                              \
        gen_row(key, num, out);                                                                    \
    }                                                                                              \
    static const struct nep_ref_simd simd_##name = {                                               \
        bf16_load_##name, bf16_store_##name, bf16_round_##name, scale_##name,                      \
        fma_##name,       fma64_##name,      gen_##name};

VARIANT(plain, )
#if defined(__x86_64__) && defined(__GNUC__)
VARIANT(avx2, __attribute__((target("avx2,fma"))))
#endif

const struct nep_ref_simd *nep_ref_simd(void)
{
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return &simd_avx2;
    }
#endif
    return &simd_plain;
}
