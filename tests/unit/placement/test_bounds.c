/* SPDX-License-Identifier: Apache-2.0 */
/* The bound against the best of all placements, found by trying them. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "placement/bounds.h"
#include "placement/rng.h"
#include "tests/unit/cmocka_all.h"

enum { E = 8, TOKENS = 40 };

static double mean_distinct(const struct nep_sets *sets, const uint32_t *node)
{
    uint32_t sum = 0;
    for (uint32_t t = 0; t < sets->num_tokens; t++) {
        uint32_t mask = 0;
        for (uint32_t i = 0; i < sets->len[t]; i++) {
            mask |= 1u << node[sets->items[t * sets->width + i]];
        }
        sum += (uint32_t)__builtin_popcount(mask);
    }
    return (double)sum / sets->num_tokens;
}

static double best(const struct nep_sets *sets, uint32_t nodes, uint32_t *node, uint32_t *used,
                   uint32_t at)
{
    if (at == E) {
        return mean_distinct(sets, node);
    }
    double least = 1e9;
    for (uint32_t n = 0; n < nodes; n++) {
        if (used[n] < E / nodes) {
            used[n]++;
            node[at] = n;
            double here = best(sets, nodes, node, used, at + 1);
            least = here < least ? here : least;
            used[n]--;
        }
    }
    return least;
}

static void test_bound_is_below_the_best_placement(void **state)
{
    (void)state;
    uint64_t seed = (uint64_t)time(NULL);
    print_message("seed %llu\n", (unsigned long long)seed);
    struct nep_rng rng = nep_rng_seed(seed);
    double tightest = 0.0;
    for (int round = 0; round < 60; round++) {
        uint32_t k = 1 + nep_rng_below(&rng, 5);
        uint32_t nodes = round % 2 == 0 ? 2 : 4;
        struct nep_sets sets;
        assert_int_equal(nep_sets_init(&sets, TOKENS, E, k), NEP_OK);
        for (uint32_t t = 0; t < TOKENS; t++) {
            uint32_t order[E];
            for (uint32_t i = 0; i < E; i++) {
                order[i] = i;
            }
            nep_rng_shuffle(&rng, order, E);
            sets.len[t] = (uint8_t)k;
            for (uint32_t i = 0; i < k; i++) {
                /* half of the rounds with strong structure */
                sets.items[t * k + i] =
                    (uint16_t)(round % 4 < 2 ? order[i] : (order[0] / 4 * 4 + i) % E);
            }
        }
        assert_int_equal(nep_sets_index(&sets), NEP_OK);
        uint32_t node[E];
        uint32_t used[E] = {0};
        double least = best(&sets, nodes, node, used, 0);
        double bound = 0.0;
        assert_int_equal(nep_bound_distinct(&sets, nodes, &bound), NEP_OK);
        assert_true(bound >= 1.0 - 1e-9);
        assert_true(bound <= least + 1e-9);
        tightest = bound / least > tightest ? bound / least : tightest;
        nep_sets_fini(&sets);
    }
    print_message("tightest: %.3f of the best\n", tightest);
    assert_true(tightest > 0.8);
}

static void test_bound_where_it_does_not_hold_is_refused(void **state)
{
    (void)state;
    struct nep_sets sets;
    double bound = -1.0;
    assert_int_equal(nep_sets_init(&sets, 2, E, 2), NEP_OK);
    const uint16_t items[] = {0, 1, 2, 3};
    memcpy(sets.items, items, sizeof items);
    sets.len[0] = 2;
    sets.len[1] = 1;
    assert_int_equal(nep_sets_index(&sets), NEP_OK);
    assert_int_equal(nep_bound_distinct(&sets, 2, &bound), NEP_ERR_UNSUPPORTED);
    sets.len[1] = 2;
    assert_int_equal(nep_bound_distinct(&sets, 3, &bound), NEP_ERR_UNSUPPORTED);
    assert_true(bound == -1.0);
    nep_sets_fini(&sets);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bound_is_below_the_best_placement),
        cmocka_unit_test(test_bound_where_it_does_not_hold_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
