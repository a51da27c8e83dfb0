/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Casts to and from fp8: every code, random bits of every type against an oracle that searches the
 * nearest of the 253 finite codes, blocks with infinities and NaNs, short last blocks, the three
 * kinds of scales, and the error of a round trip.
 */
#include "tests/unit/dispatch/kernels_ref.h"

#include <float.h>

#define MAX_ELEMENTS 700
#define MAX_SCALES   ((MAX_ELEMENTS + 127) / 128)

/* e4m3 by its definition: no infinities, 0x7f is NaN. */
static double code_value(unsigned code)
{
    double sign = code & 0x80 ? -1 : 1;
    int exponent = (int)(code >> 3 & 15);
    double mantissa = code & 7;
    if ((code & 0x7f) == 0x7f) {
        return NAN;
    }
    return sign * (exponent == 0 ? ldexp(mantissa, -9) : ldexp(8 + mantissa, exponent - 10));
}

/* The nearest code, the even one of two equally near, by looking at all. */
static unsigned code_nearest(float value)
{
    if (isnan(value)) {
        return 0x7f;
    }
    double abs = fabs((double)value);
    unsigned best = 0;
    for (unsigned code = 1; code < 0x7f; code++) {
        double distance = fabs(code_value(code) - abs);
        double least = fabs(code_value(best) - abs);
        if (distance < least || (distance == least && code % 2 == 0)) {
            best = code;
        }
    }
    best = isinf(value) ? 0x7e : best;
    return best | (signbit(value) ? 0x80 : 0);
}

static float scale_of(float amax, enum nep_scale kind)
{
    float scale = fminf(fmaxf(amax, 1e-4f), FLT_MAX) / 448;
    if (kind == NEP_SCALE_FP32) {
        return scale;
    }
    int exponent;
    double fraction = frexp(scale, &exponent);
    return (float)ldexp(1, fraction == 0.5 ? exponent - 1 : exponent);
}

static float scale_stored(const void *scales, size_t block, enum nep_scale kind)
{
    if (kind == NEP_SCALE_UE8M0) {
        return (float)ldexp(1, ((const uint8_t *)scales)[block] - 127);
    }
    float scale;
    memcpy(&scale, (const char *)scales + 4 * block, 4);
    return scale;
}

static float element(const void *x, size_t idx, int dtype)
{
    return (float)ref_decode(ref_load(x, idx, dtype), &ref_formats[dtype]);
}

static void check_cast(const unsigned char *q, const void *scales, const void *x, int dtype,
                       size_t elements, enum nep_scale kind)
{
    for (size_t begin = 0; begin < elements; begin += 128) {
        size_t end = begin + 128 < elements ? begin + 128 : elements;
        float amax = 0;
        for (size_t i = begin; i < end; i++) {
            amax = fmaxf(amax, fabsf(element(x, i, dtype)));
        }
        float scale = scale_of(amax, kind);
        assert_true(scale_stored(scales, begin / 128, kind) == scale);
        for (size_t i = begin; i < end; i++) {
            float value = element(x, i, dtype);
            unsigned want = code_nearest(value / scale);
            if (q[i] != want) {
                fail_msg("%s element %zu, %a by %a: %02x, want %02x", ref_names[dtype], i,
                         (double)value, (double)scale, q[i], want);
            }
        }
    }
}

static void random_row(void *x, size_t elements, int dtype, uint64_t *seed, bool modest)
{
    for (size_t i = 0; i < elements; i++) {
        uint32_t bits = (uint32_t)(ref_random(seed) >> 32);
        if (modest) {
            double value = ldexp((double)bits / 4294967296.0 - 0.5, (int)(bits % 13) - 6);
            bits = ref_encode(ref_quantise(value, &ref_formats[dtype]), &ref_formats[dtype]);
        }
        ref_store(x, i, bits, dtype);
    }
}

static void test_kernels_cast_fp8_random_rows_equal_oracle(void **state)
{
    (void)state;
    uint64_t seed = ref_seed("cast");
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    unsigned char x[MAX_ELEMENTS * 4 + 16], q[MAX_ELEMENTS + 17], scales[MAX_SCALES * 4 + 5];
    for (int round = 0; round < 180; round++) {
        int dtype = round % 3;
        enum nep_scale kind = (enum nep_scale)(round / 3 % 3);
        size_t elements = ref_below(&seed, MAX_ELEMENTS + 1);
        unsigned char *from = x + ref_below(&seed, 16), *to = q + ref_below(&seed, 16);
        random_row(from, elements, dtype, &seed, round & 1);
        for (int k = 0; k < num_tables; k++) {
            memset(q, 0xa5, sizeof q);
            memset(scales, 0xa5, sizeof scales);
            tables[k]->cast_fp8(to, scales + 1, from, (enum nep_dtype)(NEP_DTYPE_BF16 + dtype),
                                elements, kind);
            check_cast(to, scales + 1, from, dtype, elements, kind);
            assert_int_equal(to[elements], 0xa5);
            assert_int_equal(scales[1 + nep_scales_row_bytes(elements, kind)], 0xa5);
        }
    }
}

/* Values on, and next to, the middles between codes: amax 448 makes the scale 1. */
static void test_kernels_cast_fp8_ties_go_to_even(void **state)
{
    (void)state;
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    float x[128], scales[1];
    unsigned char q[128];
    for (unsigned code = 0; code < 0x7e; code++) {
        for (size_t i = 0; i < 128; i++) {
            double middle = (code_value(code) + code_value(code + 1)) / 2;
            float value = (float)middle;
            value = i % 3 == 0 ? value : nextafterf(value, i % 3 == 1 ? 0 : INFINITY);
            x[i] = i & 1 ? -value : value;
        }
        x[127] = 448;
        for (int k = 0; k < num_tables; k++) {
            tables[k]->cast_fp8(q, scales, x, NEP_DTYPE_FP32, 128, NEP_SCALE_FP32);
            assert_true(scales[0] == 1);
            check_cast(q, scales, x, 2, 128, NEP_SCALE_FP32);
        }
    }
}

static void test_kernels_cast_fp8_infinity_saturates_and_nan_stays(void **state)
{
    (void)state;
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    static const float specials[] = {INFINITY, -INFINITY, NAN, -0.0f, FLT_MAX, FLT_TRUE_MIN};
    for (size_t s = 0; s < sizeof specials / sizeof specials[0]; s++) {
        for (int k = 0; k < 3 * num_tables; k++) {
            enum nep_scale kind = (enum nep_scale)(k / num_tables);
            float x[300], scales[3];
            unsigned char q[300];
            for (size_t i = 0; i < 300; i++) {
                x[i] = i % 67 == 13 ? specials[s] : (float)i - 150;
            }
            tables[k % num_tables]->cast_fp8(q, scales, x, NEP_DTYPE_FP32, 300, kind);
            check_cast(q, scales, x, 2, 300, kind);
        }
    }
}

static void test_kernels_uncast_fp8_every_code_and_scale_equals_oracle(void **state)
{
    (void)state;
    uint64_t seed = ref_seed("uncast");
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    unsigned char q[643], x[643 * 4 + 1], scales[6 * 4];
    for (int round = 0; round < 540; round++) {
        int dtype = round % 3;
        enum nep_scale kind = (enum nep_scale)(round / 3 % 3);
        size_t elements = 643 - ref_below(&seed, 64);
        for (size_t i = 0; i < elements; i++) {
            q[i] = (unsigned char)(i + (size_t)round);
        }
        for (size_t i = 0; i < sizeof scales; i++) {
            scales[i] = (unsigned char)(ref_random(&seed) >> 56);
        }
        for (int k = 0; k < num_tables; k++) {
            memset(x, 0xa5, sizeof x);
            tables[k]->uncast_fp8(x, (enum nep_dtype)(NEP_DTYPE_BF16 + dtype), q, scales, elements,
                                  kind);
            assert_int_equal(x[elements * ref_bytes(dtype)], 0xa5);
            for (size_t i = 0; i < elements; i++) {
                bool none = kind == NEP_SCALE_UE8M0 && scales[i / 128] == 255;
                float scale = none ? NAN : scale_stored(scales, i / 128, kind);
                float product = (float)code_value(q[i]) * scale;
                const struct ref_format *format = &ref_formats[dtype];
                assert_int_equal(ref_load(x, i, dtype),
                                 ref_encode(ref_quantise(product, format), format));
            }
        }
    }
}

/* Half a step of 3 bits of mantissa, or half of the least step of the block. */
static void test_kernels_fp8_round_trip_is_near(void **state)
{
    (void)state;
    uint64_t seed = ref_seed("round trip");
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    float x[MAX_ELEMENTS], back[MAX_ELEMENTS], scales[MAX_SCALES];
    unsigned char q[MAX_ELEMENTS];
    for (int round = 0; round < 90; round++) {
        enum nep_scale kind = (enum nep_scale)(round % 3);
        const struct nep_kernels *table = tables[round / 3 % num_tables];
        random_row(x, MAX_ELEMENTS, 2, &seed, true);
        table->cast_fp8(q, scales, x, NEP_DTYPE_FP32, MAX_ELEMENTS, kind);
        table->uncast_fp8(back, NEP_DTYPE_FP32, q, scales, MAX_ELEMENTS, kind);
        for (size_t i = 0; i < MAX_ELEMENTS; i++) {
            double scale = scale_stored(scales, i / 128, kind);
            double bound = fmax(fabs((double)x[i]) / 16, scale * 0x1p-10) * 1.0001;
            assert_true(fabs((double)back[i] - (double)x[i]) <= bound);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kernels_cast_fp8_random_rows_equal_oracle),
        cmocka_unit_test(test_kernels_cast_fp8_ties_go_to_even),
        cmocka_unit_test(test_kernels_cast_fp8_infinity_saturates_and_nan_stays),
        cmocka_unit_test(test_kernels_uncast_fp8_every_code_and_scale_equals_oracle),
        cmocka_unit_test(test_kernels_fp8_round_trip_is_near),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
