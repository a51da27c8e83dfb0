/* SPDX-License-Identifier: Apache-2.0 */
/* Moves between maps, carried out on tables: the old one must become the new one. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "placement/adjust.h"
#include "placement/map.h"
#include "placement/rng.h"
#include "tests/unit/cmocka_all.h"

enum { LAYERS = 3, EXPERTS = 10, RANKS = 5, SLOTS = 3, P = RANKS * SLOTS };

static const uint32_t sizes[] = {2, 3};

static struct nep_map *random_map(struct nep_rng *rng)
{
    struct nep_map_shape shape = {sizeof shape, LAYERS, EXPERTS, 2, RANKS, SLOTS, sizes};
    struct nep_map_entry entries[LAYERS * P];
    uint32_t num = 0;
    for (uint32_t l = 0; l < LAYERS; l++) {
        uint32_t order[P];
        for (uint32_t i = 0; i < P; i++) {
            order[i] = i;
        }
        nep_rng_shuffle(rng, order, P);
        for (uint32_t i = 0; i < P; i++) {
            uint32_t e = i < EXPERTS ? i : nep_rng_below(rng, EXPERTS);
            if (i < EXPERTS || nep_rng_below(rng, 2) == 0) {
                entries[num++] = (struct nep_map_entry){l, e, order[i], 1, 0};
            }
        }
    }
    struct nep_map *map = NULL;
    assert_int_equal(nep_map_build(&shape, entries, num, &map), NEP_OK);
    return map;
}

/* Carries the moves of a layer out on a table of contents. */
static void carry_out(const struct nep_map_move *moves, uint64_t num, uint32_t layer,
                      uint32_t *table)
{
    uint32_t aside[P];
    for (uint64_t i = 0; i < num; i++) {
        if (moves[i].layer == layer && moves[i].is_staged) {
            aside[moves[i].to_slot] = table[moves[i].from_slot];
        }
    }
    for (uint64_t i = 0; i < num; i++) {
        if (moves[i].layer == layer) {
            uint32_t to = moves[i].to_slot;
            table[to] = moves[i].is_staged ? aside[to] : table[moves[i].from_slot];
            assert_int_equal(table[to], moves[i].expert);
        }
    }
}

static void test_diff_moves_make_the_new_map(void **state)
{
    (void)state;
    uint64_t seed = (uint64_t)time(NULL);
    print_message("seed %llu\n", (unsigned long long)seed);
    struct nep_rng rng = nep_rng_seed(seed);
    for (int round = 0; round < 500; round++) {
        struct nep_map *from = random_map(&rng);
        struct nep_map *to = random_map(&rng);
        struct nep_map_move moves[LAYERS * P];
        uint64_t num = 0;
        uint64_t again = 0;
        assert_int_equal(nep_map_diff(from, to, moves, LAYERS * P, &num), NEP_OK);
        assert_int_equal(nep_map_diff(from, to, NULL, 0, &again),
                         num == 0 ? NEP_OK : NEP_ERR_OVERFLOW);
        assert_int_equal(num, again);
        for (uint32_t l = 0; l < LAYERS; l++) {
            uint32_t table[P];
            uint32_t expected[P];
            nep_adjust_table(from, l, table);
            nep_adjust_table(to, l, expected);
            carry_out(moves, num, l, table);
            for (uint32_t s = 0; s < P; s++) {
                if (expected[s] != NEP_SLOT_EMPTY) {
                    assert_int_equal(table[s], expected[s]);
                }
            }
        }
        assert_int_equal(nep_map_diff(from, from, moves, 0, &num), NEP_OK);
        assert_int_equal(num, 0);
        nep_map_destroy(from);
        nep_map_destroy(to);
    }
}

static void test_diff_other_shapes_are_refused(void **state)
{
    (void)state;
    struct nep_map_shape shape = {sizeof shape, 1, 4, 2, RANKS, 1, sizes};
    struct nep_map *a = NULL;
    struct nep_map *b = NULL;
    uint64_t num = 7;
    assert_int_equal(nep_map_contiguous(&shape, &a), NEP_OK);
    shape.num_layers = 2;
    assert_int_equal(nep_map_contiguous(&shape, &b), NEP_OK);
    assert_int_equal(nep_map_diff(a, b, NULL, 0, &num), NEP_ERR_MISMATCH);
    assert_int_equal(nep_map_diff(NULL, b, NULL, 0, &num), NEP_ERR_INVALID);
    assert_int_equal(nep_map_diff(a, a, NULL, 1, &num), NEP_ERR_INVALID);
    assert_int_equal(num, 7);
    nep_map_destroy(a);
    nep_map_destroy(b);
}

static void test_diff_pays_when_rows_outweigh_experts(void **state)
{
    (void)state;
    assert_true(nep_map_pays(0.5, 28672.0, 1e6, 100, 88e6));
    assert_false(nep_map_pays(0.5, 28672.0, 1e5, 100, 88e6));
    assert_false(nep_map_pays(-0.1, 28672.0, 1e9, 0, 88e6));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_diff_moves_make_the_new_map),
        cmocka_unit_test(test_diff_other_shapes_are_refused),
        cmocka_unit_test(test_diff_pays_when_rows_outweigh_experts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
