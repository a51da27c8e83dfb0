/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the tests of the kernels share: number formats from their definition (precision, exponents),
 * in double arithmetic, apart from the bit tricks under test; random bits; every table that this
 * machine runs.
 */
#ifndef NEP_TESTS_KERNELS_REF_H
#define NEP_TESTS_KERNELS_REF_H

#include "tests/unit/cmocka_all.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "dispatch/host/kernels.h"

#define REF_NUM_DTYPES 3

/* A binary format: precision with the hidden bit, least and greatest exponent of 1.x * 2^e. */
struct ref_format {
    int precision;
    int exponent_min;
    int exponent_max;
};

static const struct ref_format ref_formats[REF_NUM_DTYPES] = {
    {8, -126, 127}, /* bf16 */
    {11, -14, 15},  /* fp16 */
    {24, -126, 127} /* fp32 */
};

static const char *const ref_names[REF_NUM_DTYPES] = {"bf16", "fp16", "fp32"};

static inline size_t ref_bytes(int dtype)
{
    return dtype == 2 ? 4 : 2;
}

/* Nearest even in a format; beyond its greatest value: infinity. Doubles hold all of it exactly. */
static inline double ref_quantise(double value, const struct ref_format *format)
{
    if (value == 0 || isnan(value) || isinf(value)) {
        return value;
    }
    int exponent = ilogb(value);
    if (exponent < format->exponent_min) {
        exponent = format->exponent_min;
    }
    int ulp = exponent - format->precision + 1;
    double rounded = ldexp(nearbyint(ldexp(value, -ulp)), ulp);
    double limit = ldexp(1, format->exponent_max + 1);
    return fabs(rounded) >= limit ? copysign(INFINITY, value) : rounded;
}

/* The bits of a value that the format holds exactly; every NaN is all ones but the sign. */
static inline uint32_t ref_encode(double value, const struct ref_format *format)
{
    int mantissa_bits = format->precision - 1;
    int width = format->precision == 8 ? 16 : format->precision == 11 ? 16 : 32;
    int bias = format->exponent_max;
    uint32_t sign = (uint32_t)(signbit(value) != 0) << (width - 1);
    uint32_t infinity = (uint32_t)(2 * bias + 1) << mantissa_bits;
    if (isnan(value)) {
        return infinity | ((1u << mantissa_bits) - 1);
    }
    if (isinf(value)) {
        return sign | infinity;
    }
    int exponent = value == 0 ? format->exponent_min : ilogb(value);
    if (exponent < format->exponent_min) {
        exponent = format->exponent_min;
    }
    uint32_t mantissa = (uint32_t)ldexp(fabs(value), mantissa_bits - exponent);
    uint32_t hidden = 1u << mantissa_bits;
    if (mantissa < hidden) {
        return sign | mantissa; /* denormal or zero */
    }
    return sign | ((uint32_t)(exponent + bias) << mantissa_bits) | (mantissa - hidden);
}

static inline double ref_decode(uint32_t bits, const struct ref_format *format)
{
    int mantissa_bits = format->precision - 1;
    int width = format->precision == 24 ? 32 : 16;
    int bias = format->exponent_max;
    double sign = bits >> (width - 1) & 1 ? -1.0 : 1.0;
    int exponent = (int)(bits >> mantissa_bits & (uint32_t)(2 * bias + 1));
    double fraction = ldexp(bits & ((1u << mantissa_bits) - 1), -mantissa_bits);
    if (exponent == 2 * bias + 1) {
        return fraction != 0 ? NAN : copysign(INFINITY, sign);
    }
    if (exponent == 0) {
        return sign * ldexp(fraction, format->exponent_min);
    }
    return sign * ldexp(1 + fraction, exponent - bias);
}

static inline uint32_t ref_load(const void *row, size_t idx, int dtype)
{
    uint16_t half;
    uint32_t bits;
    if (dtype == 2) {
        memcpy(&bits, (const char *)row + idx * 4, 4);
        return bits;
    }
    memcpy(&half, (const char *)row + idx * 2, 2);
    return half;
}

static inline void ref_store(void *row, size_t idx, uint32_t bits, int dtype)
{
    uint16_t half = (uint16_t)bits;
    if (dtype == 2) {
        memcpy((char *)row + idx * 4, &bits, 4);
    } else {
        memcpy((char *)row + idx * 2, &half, 2);
    }
}

static inline float ref_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* xorshift64*, Vigna 2016. */
static inline uint64_t ref_random(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 2685821657736338717ull;
}

static inline uint32_t ref_below(uint64_t *state, uint32_t limit)
{
    return (uint32_t)((ref_random(state) >> 32) * limit >> 32);
}

/* A fresh seed, or NEP_TEST_SEED to repeat one; printed. */
static inline uint64_t ref_seed(const char *test)
{
    const char *given = getenv("NEP_TEST_SEED");
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t seed = given != NULL ? strtoull(given, NULL, 0)
                                  : (uint64_t)now.tv_nsec * 2654435761u + (uint64_t)now.tv_sec;
    seed = seed != 0 ? seed : 1;
    printf("%s: NEP_TEST_SEED=%llu\n", test, (unsigned long long)seed);
    return seed;
}

/* The tables that run here, plain C first; what is missing is one printed line. */
static inline int ref_tables(const struct nep_kernels **tables)
{
    static const char *const names[] = {"c", "avx2", "avx512"};
    int num = 0;
    for (int i = 0; i < 3; i++) {
        enum nep_status status = nep_kernels_select(names[i], &tables[num]);
        if (status == NEP_OK) {
            num++;
        } else {
            assert_int_equal(status, NEP_ERR_UNSUPPORTED);
            printf("%s is not compared: %s\n", names[i], nep_last_message());
        }
    }
    return num;
}

#endif
