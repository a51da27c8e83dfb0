/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Number formats, each by its definition: values are found by arithmetic on the quantum of the
 * format (2^(exponent - mantissa bits)) and nearbyint in the default rounding mode, ties to even.
 * Shifting bit fields about is faster and is what the library does; two ways of saying it is the
 * point. bf16 alone is done with bits (simd.c), because every run reads it by the hundred million.
 */
#include <math.h>
#include <string.h>

#include "tests/ref/ref.h"
#include "tests/ref/simd.h"

size_t nep_ref_dtype_bytes(enum nep_dtype dtype)
{
    switch (dtype) {
    case NEP_DTYPE_FP32:
        return 4;
    case NEP_DTYPE_FP8_E4M3:
        return 1;
    default:
        return 2;
    }
}

size_t nep_ref_wire_row_bytes(const struct nep_ref_group *group)
{
    return (size_t)group->hidden * nep_ref_dtype_bytes(group->wire);
}

uint32_t nep_ref_num_scales(const struct nep_ref_group *group)
{
    return group->wire == NEP_DTYPE_FP8_E4M3 ? (group->hidden + 127) / 128 : 0;
}

/* Rounds |value| to mantissa_bits, with subnormals below 2^min_exponent. */
static double quantum_round(double value, int mantissa_bits, int min_exponent)
{
    int exponent = value == 0.0 ? min_exponent : ilogb(value);
    if (exponent < min_exponent) {
        exponent = min_exponent;
    }
    double quantum = ldexp(1.0, exponent - mantissa_bits);
    return nearbyint(value / quantum) * quantum;
}

static uint16_t fp16_bits(float value)
{
    uint16_t sign = signbit(value) ? 0x8000 : 0;
    if (isnan(value)) {
        return sign | 0x7e00;
    }
    double rounded = isinf(value) ? INFINITY : quantum_round(fabs((double)value), 10, -14);
    if (rounded > 65504.0) {
        return sign | 0x7c00;
    }
    if (rounded < 0x1p-14) {
        return sign | (uint16_t)(rounded * 0x1p24);
    }
    int exponent = ilogb(rounded);
    uint16_t mantissa = (uint16_t)(ldexp(rounded, 10 - exponent) - 1024.0);
    return (uint16_t)(sign | ((uint16_t)(exponent + 15) << 10) | mantissa);
}

static float fp16_value(uint16_t bits)
{
    int exponent = (bits >> 10) & 31;
    double mantissa = bits & 1023;
    double value = exponent == 0 ? mantissa * 0x1p-24 : ldexp(1024.0 + mantissa, exponent - 25);
    if (exponent == 31) {
        value = mantissa != 0.0 ? NAN : INFINITY;
    }
    return (float)(bits & 0x8000 ? -value : value);
}

static float fp8_value(uint8_t bits)
{
    int exponent = (bits >> 3) & 15;
    double mantissa = bits & 7;
    double value = exponent == 0 ? mantissa * 0x1p-9 : ldexp(8.0 + mantissa, exponent - 10);
    if ((bits & 0x7f) == 0x7f) {
        value = NAN;
    }
    return (float)(bits & 0x80 ? -value : value);
}

static uint8_t fp8_bits(float value)
{
    uint8_t sign = signbit(value) ? 0x80 : 0;
    if (isnan(value)) {
        return sign | 0x7f;
    }
    double rounded = quantum_round(fmin(fabs((double)value), 448.0), 3, -6);
    if (rounded < 0x1p-6) {
        return sign | (uint8_t)(rounded * 0x1p9);
    }
    int exponent = ilogb(rounded);
    uint8_t mantissa = (uint8_t)(ldexp(rounded, 3 - exponent) - 8.0);
    return (uint8_t)(sign | (uint8_t)((exponent + 7) << 3) | mantissa);
}

void nep_ref_row_load(enum nep_dtype dtype, const void *row, uint32_t num, float *out)
{
    if (dtype == NEP_DTYPE_FP32) {
        memcpy(out, row, (size_t)num * sizeof(float));
    } else if (dtype == NEP_DTYPE_FP16) {
        for (uint32_t i = 0; i < num; i++) {
            out[i] = fp16_value(((const uint16_t *)row)[i]);
        }
    } else {
        nep_ref_simd()->bf16_load(row, num, out);
    }
}

void nep_ref_row_store(enum nep_dtype dtype, const float *row, uint32_t num, void *out)
{
    if (dtype == NEP_DTYPE_FP32) {
        memcpy(out, row, (size_t)num * sizeof(float));
    } else if (dtype == NEP_DTYPE_FP16) {
        for (uint32_t i = 0; i < num; i++) {
            ((uint16_t *)out)[i] = fp16_bits(row[i]);
        }
    } else {
        nep_ref_simd()->bf16_store(row, num, out);
    }
}

void nep_ref_row_round(enum nep_dtype dtype, float *row, uint32_t num)
{
    if (dtype == NEP_DTYPE_FP16) {
        for (uint32_t i = 0; i < num; i++) {
            row[i] = fp16_value(fp16_bits(row[i]));
        }
    } else if (dtype == NEP_DTYPE_BF16) {
        nep_ref_simd()->bf16_round(row, num);
    }
}

void nep_ref_fp8_quantise(const float *row, uint32_t num, uint8_t *out, float *scales)
{
    for (uint32_t first = 0; first < num; first += 128) {
        uint32_t end = first + 128 < num ? first + 128 : num;
        float amax = 0.0f;
        for (uint32_t i = first; i < end; i++) {
            amax = fmaxf(amax, fabsf(row[i]));
        }
        float factor = fmaxf(amax, 1e-4f) / 448.0f;
        scales[first / 128] = factor;
        for (uint32_t i = first; i < end; i++) {
            out[i] = fp8_bits(row[i] / factor);
        }
    }
}

void nep_ref_fp8_load(const uint8_t *row, const float *scales, uint32_t num, float *out)
{
    float values[256]; /* a row has many more elements than there are codes, and ldexp is slow */
    for (uint32_t code = 0; code < 256; code++) {
        values[code] = fp8_value((uint8_t)code);
    }
    for (uint32_t i = 0; i < num; i++) {
        out[i] = values[row[i]] * scales[i / 128];
    }
}
