/* SPDX-License-Identifier: Apache-2.0 */
/* The oracle itself: formats by exhaustion, a group worked by hand, planted faults that must show.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/ref/ref.h"
#include "tests/unit/cmocka_all.h"

static float load1(enum nep_dtype dtype, uint16_t bits)
{
    float value;
    nep_ref_row_load(dtype, &bits, 1, &value);
    return value;
}

static uint16_t store1(enum nep_dtype dtype, float value)
{
    uint16_t bits;
    nep_ref_row_store(dtype, &value, 1, &bits);
    return bits;
}

/* Every finite value survives, and the middle between two neighbours goes to the even one. */
static void test_number_half_formats_round_to_even(void **state)
{
    (void)state;
    static const enum nep_dtype dtypes[] = {NEP_DTYPE_BF16, NEP_DTYPE_FP16};
    static const uint16_t infinity[] = {0x7f80, 0x7c00};
    for (int d = 0; d < 2; d++) {
        for (uint32_t bits = 0; bits < infinity[d]; bits++) {
            float value = load1(dtypes[d], (uint16_t)bits);
            assert_int_equal(store1(dtypes[d], value), bits);
            assert_int_equal(store1(dtypes[d], -value), bits | 0x8000);
            if (bits + 1 == infinity[d]) {
                continue;
            }
            double next = load1(dtypes[d], (uint16_t)(bits + 1));
            float middle = (float)(((double)value + next) / 2);
            assert_int_equal(store1(dtypes[d], middle), bits + (bits & 1));
            assert_int_equal(store1(dtypes[d], nextafterf(middle, 0.0f)), bits);
        }
        assert_true(isnan(load1(dtypes[d], store1(dtypes[d], NAN))));
        assert_true(isinf(load1(dtypes[d], store1(dtypes[d], 3.4e38f))));
        assert_int_equal(store1(dtypes[d], -INFINITY), infinity[d] | 0x8000);
    }
}

/* A block whose largest magnitude is 448 has scale 1, so that codes are those of the values. */
static void test_number_fp8_known_codes(void **state)
{
    (void)state;
    static const struct {
        float value;
        uint8_t code;
    } known[] = {{448.0f, 0x7e},  {1.0f, 0x38},     {-1.0f, 0xb8},     {0.0f, 0x00},
                 {0x1p-9f, 0x01}, {0x1p-6f, 0x08},  {17.0f, 0x58},     {19.0f, 0x5a},
                 {240.0f, 0x77},  {0x1p-10f, 0x00}, {0x1.8p-9f, 0x02}, {432.0f, 0x7e}};
    float row[128] = {0};
    uint8_t codes[128];
    float scale;
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        row[i] = known[i].value;
    }
    nep_ref_fp8_quantise(row, 128, codes, &scale);
    assert_true(scale == 1.0f);
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        assert_int_equal(codes[i], known[i].code);
    }
    float back[128];
    nep_ref_fp8_load(codes, &scale, 128, back);
    assert_true(back[0] == 448.0f && back[6] == 16.0f && back[2] == -1.0f);
}

/* Two ranks, two nodes, two slots each: rank 0 sends token 0 to slots 2 and 3, and token 1 to 1. */
static const uint32_t nodes[] = {0, 1};
static const uint32_t num_tokens[] = {2, 1};
static const uint32_t slots0[] = {3, 2, 1, NEP_REF_NONE};
static const uint32_t slots1[] = {2, 0};
static const uint32_t *const slots[] = {slots0, slots1};
static const float weights0[] = {0.5f, 0.25f, 2.0f, 9.0f};
static const float weights1[] = {1.0f, 1.0f};
static const float *const weights[] = {weights0, weights1};
static const float factor[] = {1.0f, 2.0f, 3.0f, 4.0f};

static void make_row(void *ctx, uint32_t rank, uint32_t token, void *row)
{
    float values[16];
    (void)ctx;
    for (int i = 0; i < 16; i++) {
        values[i] = (float)(1 + (int)token + 10 * (int)rank);
    }
    nep_ref_row_store(NEP_DTYPE_BF16, values, 16, row);
}

static struct nep_ref_group group_of(enum nep_layout layout)
{
    return (struct nep_ref_group){.num_ranks = 2,
                                  .num_nodes = 2,
                                  .node_of_rank = nodes,
                                  .slots_per_rank = 2,
                                  .top_k = 2,
                                  .hidden = 16,
                                  .max_tokens = 4,
                                  .dtype = NEP_DTYPE_BF16,
                                  .wire = NEP_DTYPE_BF16,
                                  .layout = layout,
                                  .num_tokens = num_tokens,
                                  .slots = slots,
                                  .weights = weights,
                                  .x_row = make_row,
                                  .factor = factor};
}

static void test_rows_by_hand_match(void **state)
{
    (void)state;
    struct nep_ref_rows rows;
    struct nep_ref_group group = group_of(NEP_LAYOUT_EXPERT_PACKED);
    assert_true(nep_ref_rows_build(&group, 1, &rows));
    assert_int_equal(rows.num_rows, 3);
    assert_int_equal(rows.rows_per_slot[0], 2);
    assert_int_equal(rows.rows_per_slot[1], 1);
    assert_int_equal(rows.first_row[1], 2);
    assert_int_equal(rows.rows[0].source, 0);
    assert_int_equal(rows.rows[1].source, 1);
    assert_int_equal(rows.rows[2].k, 0);
    nep_ref_rows_free(&rows);
    group.expert_alignment = 4;
    assert_true(nep_ref_rows_build(&group, 1, &rows));
    assert_int_equal(rows.first_row[1], 4);
    assert_int_equal(rows.num_rows, 8);
    nep_ref_rows_free(&rows);
    group.layout = NEP_LAYOUT_EXPERT_PADDED;
    assert_true(nep_ref_rows_build(&group, 1, &rows));
    assert_int_equal(rows.num_rows, 16);
    assert_int_equal(rows.rows[1].idx, 4); /* slot 0, source 1 */
    assert_int_equal(rows.rows[2].idx, 8); /* slot 1, source 0 */
    nep_ref_rows_free(&rows);
    group.layout = NEP_LAYOUT_RANK;
    assert_true(nep_ref_rows_build(&group, 1, &rows));
    assert_int_equal(rows.num_rows, 2);
    nep_ref_rows_free(&rows);
    struct nep_ref_traffic traffic = {0};
    nep_ref_traffic_add(&group, 0, &traffic);
    assert_int_equal(traffic.remote_nodes, 1);
    assert_int_equal(traffic.remote_pairs, 2);
    assert_int_equal(traffic.tokens_local, 1);
}

/* Token 0 of rank 0: x = 1: 0.5 * 4 + 0.25 * 3 = 2.75. */
static void test_sum_by_hand_matches(void **state)
{
    (void)state;
    struct nep_ref_group group = group_of(NEP_LAYOUT_RANK);
    struct nep_ref_scratch *scratch = nep_ref_scratch_create(16);
    uint16_t y[2][16];
    double exact[16];
    double magnitude[16];
    nep_ref_sum_tree(&group, 0, 0, scratch, y[0]);
    nep_ref_sum_tree(&group, 0, 1, scratch, y[1]);
    nep_ref_sum_exact(&group, 0, 0, scratch, exact, magnitude);
    assert_true(load1(NEP_DTYPE_BF16, y[0][15]) == 2.75f);
    assert_true(load1(NEP_DTYPE_BF16, y[1][0]) == 8.0f); /* x = 2, factor 2, weight 2 */
    assert_true(exact[3] == 2.75 && magnitude[3] == 2.75);
    nep_ref_scratch_destroy(scratch);
    struct nep_ref_report report = {0};
    nep_ref_check_combine(&group, 0, y, &report);
    assert_int_equal(report.wrong, 0);
    y[1][7] ^= 1; /* the last bit: the tree sees it, the bound does not */
    nep_ref_check_combine(&group, 0, y, &report);
    assert_int_equal(report.wrong, 1);
    y[1][7] ^= 0x41;
    nep_ref_check_combine(&group, 0, y, &report);
    assert_int_equal(report.wrong, 3);
}

static void test_check_dispatch_planted_fault_found(void **state)
{
    (void)state;
    struct nep_ref_group group = group_of(NEP_LAYOUT_EXPERT_PACKED);
    struct nep_ref_rows rows;
    uint16_t x[3][16];
    uint32_t source_rank[] = {0, 1, 0};
    uint32_t source_token[] = {0, 0, 0};
    float row_weights[] = {0.25f, 1.0f, 0.5f};
    struct nep_rows got = {.size = sizeof(got),
                           .x = x,
                           .capacity = 3,
                           .topk_weights = row_weights,
                           .source_rank = source_rank,
                           .source_token = source_token};
    assert_true(nep_ref_rows_build(&group, 1, &rows));
    for (int i = 0; i < 3; i++) {
        make_row(NULL, source_rank[i], 0, x[i]);
    }
    struct nep_ref_report report = {0};
    nep_ref_check_dispatch(&group, 1, &rows, &got, &report);
    assert_int_equal(report.wrong, 0);
    assert_int_equal(report.elements, 3 * 16 + 3 * 3);
    x[2][9] ^= 1;
    source_token[1] = 1;
    row_weights[0] = 0.5f;
    nep_ref_check_dispatch(&group, 1, &rows, &got, &report);
    assert_int_equal(report.wrong, 3);
    nep_ref_rows_free(&rows);
}

/* Three nodes of one rank; expert 0 on rank 1 alone, expert 1 on ranks 1 and 2, expert 2 on 0
 * and 2.
 */
static void test_choice_rules_broken_found(void **state)
{
    (void)state;
    static const uint32_t node_of_rank[] = {0, 1, 2};
    static const uint32_t begin[] = {0, 1, 3, 5};
    static const uint32_t copies_slot[] = {2, 3, 4, 0, 5};
    struct nep_ref_copies copies = {3, 3, 2, node_of_rank, begin, copies_slot};
    int32_t ids[] = {0, 1, 2, -1};
    uint32_t good[] = {2, 3, 0, NEP_REF_NONE};
    assert_null(nep_ref_choice_check(&copies, 0, ids, 4, good));
    uint32_t away[] = {2, 3, 5, NEP_REF_NONE};
    assert_non_null(nep_ref_choice_check(&copies, 0, ids, 4, away));
    uint32_t more_nodes[] = {2, 4, 0, NEP_REF_NONE};
    assert_non_null(nep_ref_choice_check(&copies, 0, ids, 4, more_nodes));
    uint32_t no_copy[] = {3, 3, 0, NEP_REF_NONE};
    assert_non_null(nep_ref_choice_check(&copies, 0, ids, 4, no_copy));
    uint32_t unused[] = {2, 3, 0, 1};
    assert_non_null(nep_ref_choice_check(&copies, 0, ids, 4, unused));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_number_half_formats_round_to_even),
        cmocka_unit_test(test_number_fp8_known_codes),
        cmocka_unit_test(test_rows_by_hand_match),
        cmocka_unit_test(test_sum_by_hand_matches),
        cmocka_unit_test(test_check_dispatch_planted_fault_found),
        cmocka_unit_test(test_choice_rules_broken_found),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
