/* SPDX-License-Identifier: Apache-2.0 */
/* Launch geometry: numbers alone, no GPU. */
#include <string.h>

#include "cmocka_all.h"

#include "dispatch/cuda/cuda_phases.h"

static const struct nep_cuda_limits h100 = {132, 8, 227 * 1024, 1};

static void test_geometry_all_ranks_together_fit(void **state)
{
    (void)state;
    struct nep_cuda_geometry g;
    assert_int_equal(nep_cuda_geometry(&h100, 16, 8, 8 + 1 + 256, &g), NEP_OK);
    assert_int_equal(g.blocks, 16);
    assert_int_equal(g.threads, 1024);
    assert_true(g.shared_bytes > h100.shared_bytes / 2);
    assert_true(g.shared_bytes <= h100.shared_bytes);
    assert_int_equal(g.layout_threads % 32, 0);
    assert_true(g.layout_blocks >= 1 && g.layout_blocks <= 16);
}

static void test_geometry_too_many_sms_refused(void **state)
{
    (void)state;
    struct nep_cuda_geometry g = {.blocks = 77};
    assert_int_equal(nep_cuda_geometry(&h100, 17, 8, 265, &g), NEP_ERR_INVALID);
    assert_non_null(strstr(nep_last_message(), "1 to 16"));
    assert_int_equal(nep_cuda_geometry(&h100, 0, 8, 265, &g), NEP_ERR_INVALID);
    assert_int_equal(nep_cuda_geometry(&h100, UINT32_MAX, 8, 265, &g), NEP_ERR_INVALID);
    assert_int_equal(g.blocks, 77);
}

static void test_geometry_many_slots_fewer_warps_then_refused(void **state)
{
    (void)state;
    struct nep_cuda_geometry g;
    uint32_t last = 17;
    for (uint32_t slots = 64; slots < 100000; slots *= 2) {
        enum nep_status status = nep_cuda_geometry(&h100, 8, slots, slots + 9, &g);
        if (status != NEP_OK) {
            assert_int_equal(status, NEP_ERR_UNSUPPORTED);
            assert_true(slots > 16384);
            return;
        }
        assert_true(g.layout_threads / 32 <= last && g.layout_threads >= 32);
        assert_true(g.layout_shared_bytes <= h100.shared_bytes);
        assert_int_equal(g.layout_shared_bytes, 4 * (slots + 9 + g.layout_threads / 32 * slots));
        last = g.layout_threads / 32;
    }
    fail_msg("no number of slots was refused");
}

static void test_geometry_parts_busiest_warp_has_least(void **state)
{
    (void)state;
    struct nep_cuda_geometry g;
    assert_int_equal(nep_cuda_geometry(&h100, 16, 8, 265, &g), NEP_OK);
    assert_int_equal(nep_cuda_row_parts(&g, 4096, 896, 128), 1);
    assert_int_equal(nep_cuda_row_parts(&g, 128, 896, 128), 4);
    assert_int_equal(nep_cuda_row_parts(&g, 1, 896, 128), 7);
    assert_int_equal(nep_cuda_row_parts(&g, 0, 1, 128), 1);
    for (uint32_t rows = 1; rows < 5000; rows++) {
        uint32_t parts = nep_cuda_row_parts(&g, rows, 896, 128);
        uint64_t cost = (rows * parts + 511) / 512 * ((896 + parts - 1) / parts);
        assert_true(parts >= 1 && parts <= 7);
        for (uint32_t other = 1; other <= 7; other++) {
            assert_true(cost <= (rows * other + 511) / 512 * ((896 + other - 1) / other));
        }
    }
}

static void test_words_areas_do_not_overlap(void **state)
{
    (void)state;
    for (uint32_t ranks = 1; ranks <= NEP_CUDA_MAX_RANKS; ranks++) {
        for (uint32_t window = 2; window <= 16; window *= 2) {
            struct nep_cuda_words w = nep_cuda_words_plan(ranks, 3 * ranks, window);
            uint64_t slots = (uint64_t)window * ranks;
            const uint64_t begins[] = {w.counts, w.bound, w.pushed, w.ready,   w.read,
                                       w.fault,  w.bind,  w.lend,   w.message, w.bytes};
            const uint64_t bytes[] = {slots * 8,  slots * 8,  slots * 8,
                                      slots * 8,  slots * 8,  ranks * 8,
                                      slots * 64, slots * 16, slots * w.message_bytes};
            for (uint32_t i = 0; i < 9; i++) {
                assert_true(begins[i] + bytes[i] <= begins[i + 1] && begins[i] % 128 == 0);
            }
            assert_true(w.message_bytes >= 48 + (ranks + 3 * ranks * ranks) * 4);
            assert_true(w.bytes % 4096 == 0);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_geometry_all_ranks_together_fit),
        cmocka_unit_test(test_geometry_too_many_sms_refused),
        cmocka_unit_test(test_geometry_many_slots_fewer_warps_then_refused),
        cmocka_unit_test(test_geometry_parts_busiest_warp_has_least),
        cmocka_unit_test(test_words_areas_do_not_overlap),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
