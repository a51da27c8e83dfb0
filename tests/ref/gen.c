/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Inputs from keys: any rank can make any row of any other rank, so nobody has to hold or send
 * them. splitmix64 (Steele, Lea, Flood 2014) for draws, a cheap counter hash for rows.
 */
#include <math.h>
#include <string.h>

#include "tests/ref/ref.h"
#include "tests/ref/simd.h"

uint64_t nep_ref_rng_next(struct nep_ref_rng *rng)
{
    uint64_t bits = (rng->state += 0x9e3779b97f4a7c15ull);
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ull;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebull;
    return bits ^ (bits >> 31);
}

double nep_ref_rng_unit(struct nep_ref_rng *rng)
{
    return (double)(nep_ref_rng_next(rng) >> 11) * 0x1p-53;
}

uint32_t nep_ref_rng_below(struct nep_ref_rng *rng, uint32_t n)
{
    return (uint32_t)(((nep_ref_rng_next(rng) >> 32) * n) >> 32);
}

uint64_t nep_ref_mix(uint64_t a, uint64_t b)
{
    struct nep_ref_rng rng = {a ^ (b * 0xd6e8feb86659fd93ull)};
    return nep_ref_rng_next(&rng);
}

/* bf16-representable values of exponents -133 (subnormal) to 60: products and sums stay finite. */
static float wild_value(struct nep_ref_rng *rng)
{
    uint64_t bits = nep_ref_rng_next(rng);
    double mantissa = 1.0 + (double)((bits >> 8) & 127) / 128.0;
    int exponent = (int)((bits >> 16) % 16);
    if (exponent == 0) {
        mantissa = (double)((bits >> 8) & 127); /* a subnormal, or zero */
        exponent = -133;
    } else if (exponent == 1) {
        exponent = (int)((bits >> 32) % 120) - 60;
    } else {
        exponent -= 8;
    }
    double value = ldexp(mantissa, exponent);
    return (float)(bits & 1 ? -value : value);
}

void nep_ref_gen_row(uint64_t key, bool wild, enum nep_dtype dtype, uint32_t hidden, void *row)
{
    float values[512];
    size_t bytes = nep_ref_dtype_bytes(dtype);
    struct nep_ref_rng rng = {key};
    for (uint32_t first = 0; first < hidden; first += 512) {
        uint32_t num = hidden - first < 512 ? hidden - first : 512;
        if (wild) {
            for (uint32_t i = 0; i < num; i++) {
                float value = wild_value(&rng);
                bool is_large = dtype == NEP_DTYPE_FP16 && fabsf(value) > 256.0f; /* sums of it */
                values[i] = is_large ? 256.0f : value;
            }
        } else {
            nep_ref_simd()->gen((uint32_t)nep_ref_rng_next(&rng), num, values);
        }
        nep_ref_row_store(dtype, values, num, (char *)row + (size_t)first * bytes);
    }
}

float nep_ref_expert_factor(uint32_t expert)
{
    return 0.5f + (float)((expert * 0x9e3779b1u) >> 8) * 0x1p-24f;
}
