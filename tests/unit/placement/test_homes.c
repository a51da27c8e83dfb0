/* SPDX-License-Identifier: Apache-2.0 */
/* Homes of requests: the limit is kept where it can be, and where a request is larger than it, the
 * home is still the best of the empty ones. */
#include <string.h>

#include "placement/homes.h"
#include "placement/rng.h"
#include "tests/unit/cmocka_all.h"

enum { NODES = 4, MOST = 40 };

static const uint32_t sizes[NODES] = {1, 1, 1, 1};

static void assign(uint32_t num, const uint64_t *tokens, const float (*cost)[NODES],
                   uint32_t *homes)
{
    const struct nep_homes_params params = {num, NODES, sizes, tokens, &cost[0][0]};
    memset(homes, 0xff, num * sizeof *homes);
    assert_int_equal(nep_homes_assign(&params, homes), NEP_OK);
}

static void test_homes_oversized_requests_get_their_best_of_the_empty(void **state)
{
    (void)state;
    const uint64_t tokens[] = {400, 900, 1000};
    const float cost[][NODES] = {
        {9.0f, 9.0f, 9.0f, 1.0f}, {9.0f, 9.0f, 2.0f, 1.0f}, {9.0f, 3.0f, 9.0f, 9.0f}};
    uint32_t homes[3];
    assign(3, tokens, cost, homes);
    assert_int_equal(homes[0], 3); /* 0 loses 8 without it, 1 only one */
    assert_int_equal(homes[1], 2);
    assert_int_equal(homes[2], 1);
}

/* No node is filled above the limit when requests are small against it, and an exchange or a move
 * that both keeps to the limits and is cheaper is never left. */
static void test_homes_small_requests_keep_the_limit(void **state)
{
    (void)state;
    struct nep_rng rng = nep_rng_seed(5);
    for (int round = 0; round < 200; round++) {
        uint64_t tokens[MOST];
        float cost[MOST][NODES];
        uint32_t homes[MOST];
        uint64_t load[NODES] = {0};
        uint64_t sum = 0;
        for (uint32_t i = 0; i < MOST; i++) {
            tokens[i] = 20 + nep_rng_below(&rng, 5);
            sum += tokens[i];
            for (uint32_t n = 0; n < NODES; n++) {
                cost[i][n] = (float)nep_rng_below(&rng, 1000);
            }
        }
        assign(MOST, tokens, (const float(*)[NODES])cost, homes);
        for (uint32_t i = 0; i < MOST; i++) {
            assert_true(homes[i] < NODES);
            load[homes[i]] += tokens[i];
        }
        for (uint32_t n = 0; n < NODES; n++) {
            assert_true((double)load[n] <= (1.0 + NEP_HOMES_SLACK) * (double)sum / NODES);
        }
        for (uint32_t i = 0; i < MOST; i++) {
            for (uint32_t n = 0; n < NODES; n++) {
                assert_false((double)(load[n] + tokens[i]) <
                                 (1.0 + NEP_HOMES_SLACK) * (double)sum / NODES - 1.0 &&
                             cost[i][n] < cost[i][homes[i]]);
            }
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_homes_oversized_requests_get_their_best_of_the_empty),
        cmocka_unit_test(test_homes_small_requests_keep_the_limit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
