/* SPDX-License-Identifier: Apache-2.0 */
/* Choosing a table, moving rows, and the caller's floating-point environment. */
#include "tests/unit/dispatch/kernels_ref.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#define MAX_BYTES 5000
#define ROOM      5248 /* a multiple of 64, with at least 192 bytes more */

static void test_kernels_select_auto_is_the_widest(void **state)
{
    (void)state;
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    const struct nep_kernels *chosen = NULL;
    assert_int_equal(nep_kernels_select("auto", &chosen), NEP_OK);
    assert_ptr_equal(chosen, tables[num_tables - 1]);
    assert_int_equal(nep_kernels_select("c", &chosen), NEP_OK);
    assert_string_equal(chosen->name, "c");
}

static void test_kernels_select_unknown_name_is_refused(void **state)
{
    (void)state;
    static const char *const names[] = {"", "sse", "avx", "AVX2", "avx2 ", "avx5120"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const struct nep_kernels *chosen = NULL;
        assert_int_equal(nep_kernels_select(names[i], &chosen), NEP_ERR_INVALID);
        assert_null(chosen);
        assert_non_null(strstr(nep_last_message(), "avx512, avx2 or c"));
    }
}

static void fill(unsigned char *to, size_t bytes, uint64_t *seed)
{
    for (size_t i = 0; i < bytes; i++) {
        to[i] = (unsigned char)(ref_random(seed) >> 56);
    }
}

/* The row arrived, and nothing around it changed. */
static void check_row(const unsigned char *room, size_t offset, const unsigned char *row,
                      size_t bytes)
{
    for (size_t i = 0; i < ROOM; i++) {
        bool inside = i >= offset && i < offset + bytes;
        assert_int_equal(room[i], inside ? row[i - offset] : 0xa5);
    }
}

static void test_kernels_copy_any_length_and_place_is_exact(void **state)
{
    (void)state;
    uint64_t seed = ref_seed("copy");
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    unsigned char *src = malloc(ROOM), *dst = malloc(ROOM);
    assert_non_null(src);
    assert_non_null(dst);
    fill(src, ROOM, &seed);
    for (int round = 0; round < 2000; round++) {
        size_t bytes = round < 700 ? (size_t)round : ref_below(&seed, MAX_BYTES + 1);
        size_t from = ref_below(&seed, 64), to = ref_below(&seed, 128);
        const struct nep_kernels *table = tables[round % num_tables];
        memset(dst, 0xa5, ROOM);
        table->copy(dst + to, src + from, bytes);
        table->fence();
        check_row(dst, to, src + from, bytes);
    }
    free(dst);
    free(src);
}

static void test_kernels_push_reaches_every_place(void **state)
{
    (void)state;
    uint64_t seed = ref_seed("push");
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    unsigned char *src = malloc(ROOM), *rooms = aligned_alloc(64, (size_t)NEP_PUSH_MAX * ROOM);
    assert_non_null(src);
    assert_non_null(rooms);
    fill(src, ROOM, &seed);
    for (int round = 0; round < 200; round++) {
        uint32_t num = ref_below(&seed, NEP_PUSH_MAX + 1);
        size_t bytes = ref_below(&seed, MAX_BYTES + 1), from = ref_below(&seed, 64);
        size_t shared = round & 2 ? 64 : ref_below(&seed, 128);
        size_t offsets[NEP_PUSH_MAX];
        void *dsts[NEP_PUSH_MAX];
        memset(rooms, 0xa5, (size_t)NEP_PUSH_MAX * ROOM);
        for (uint32_t i = 0; i < num; i++) {
            offsets[i] = round & 1 ? shared : ref_below(&seed, 128);
            dsts[i] = rooms + (size_t)i * ROOM + offsets[i];
        }
        const struct nep_kernels *table = tables[round % num_tables];
        table->push(dsts, num, src + from, bytes);
        table->fence();
        for (uint32_t i = 0; i < NEP_PUSH_MAX; i++) {
            check_row(rooms + (size_t)i * ROOM, i < num ? offsets[i] : 0, src + from,
                      i < num ? bytes : 0);
        }
    }
    free(rooms);
    free(src);
}

#if defined(__SSE2__)

/* Flush to zero, denormals are zero, round up: what a program built with fast-math may run in. */
#define HOSTILE (0x1f80u | 0x8040u | 0x4000u)

static void test_kernels_hostile_environment_changes_nothing(void **state)
{
    (void)state;
    uint64_t seed = ref_seed("environment");
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    enum { NUM = 333, TERMS = 5 };
    static uint32_t rows[TERMS][NUM];
    unsigned char want[NUM * 4], got[NUM * 4], want_q[NUM], got_q[NUM];
    float want_scales[3], got_scales[3];
    for (int round = 0; round < 60; round++) {
        struct nep_term terms[TERMS];
        int dtype = round % 3;
        for (int t = 0; t < TERMS; t++) {
            for (size_t i = 0; i < NUM; i++) {
                /* about half of the values are denormals */
                uint32_t bits = (uint32_t)(ref_random(&seed) >> 32);
                rows[t][i] = bits & 1 ? bits & 0x803f803f : bits & 0xbfffbfff;
            }
            terms[t] = (struct nep_term){rows[t], t & 1 ? 0.7f : 1, (uint32_t)t & 3};
        }
        const struct nep_kernels *table = tables[round / 3 % num_tables];
        enum nep_dtype type = (enum nep_dtype)(NEP_DTYPE_BF16 + dtype);
        enum nep_scale kind = round & 1 ? NEP_SCALE_FP32 : NEP_SCALE_POW2;
        table->sum[dtype](want, terms, TERMS, NUM);
        table->cast_fp8(want_q, want_scales, rows[0], type, NUM, kind);
        unsigned before = _mm_getcsr();
        _mm_setcsr(HOSTILE);
        table->sum[dtype](got, terms, TERMS, NUM);
        table->cast_fp8(got_q, got_scales, rows[0], type, NUM, kind);
        unsigned after = _mm_getcsr();
        _mm_setcsr(before);
        assert_int_equal(after & ~0x3fu, HOSTILE);
        assert_memory_equal(got, want, NUM * ref_bytes(dtype));
        assert_memory_equal(got_q, want_q, NUM);
        assert_memory_equal(got_scales, want_scales, sizeof want_scales);
        _mm_setcsr(HOSTILE);
        table->uncast_fp8(got, type, want_q, want_scales, NUM, kind);
        _mm_setcsr(before);
        table->uncast_fp8(want, type, want_q, want_scales, NUM, kind);
        assert_memory_equal(got, want, NUM * ref_bytes(dtype));
    }
}

#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kernels_select_auto_is_the_widest),
        cmocka_unit_test(test_kernels_select_unknown_name_is_refused),
        cmocka_unit_test(test_kernels_copy_any_length_and_place_is_exact),
        cmocka_unit_test(test_kernels_push_reaches_every_place),
#if defined(__SSE2__)
        cmocka_unit_test(test_kernels_hostile_environment_changes_nothing),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
