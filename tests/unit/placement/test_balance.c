/* SPDX-License-Identifier: Apache-2.0 */
/* EPLB's rules stated a second time, and the online corrector on a stream that drifts. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "placement/map.h"
#include "placement/rng.h"
#include "placement/score.h"
#include "placement/stream.h"
#include "tests/unit/cmocka_all.h"

enum { E = 24, RANKS = 4, SLOTS = 8, P = RANKS * SLOTS };

/* The global policy, slowly: copies by hand, then packing by repeated search for the heaviest. */
static void state_rules(const double *load, uint32_t *expert_of_slot)
{
    uint32_t expert[P];
    uint32_t copies[E];
    for (uint32_t e = 0; e < E; e++) {
        expert[e] = e;
        copies[e] = 1;
    }
    for (uint32_t s = E; s < P; s++) {
        uint32_t best = 0;
        for (uint32_t e = 1; e < E; e++) {
            best = load[e] / copies[e] > load[best] / copies[best] ? e : best;
        }
        expert[s] = best;
        copies[best]++;
    }
    uint32_t pack[P];
    uint32_t used[RANKS] = {0};
    double sum[RANKS] = {0};
    uint8_t is_done[P] = {0};
    for (uint32_t step = 0; step < P; step++) {
        uint32_t item = P;
        for (uint32_t s = 0; s < P; s++) {
            double weight = load[expert[s]] / copies[expert[s]];
            if (!is_done[s] && (item == P || weight > load[expert[item]] / copies[expert[item]])) {
                item = s;
            }
        }
        uint32_t rank = RANKS;
        for (uint32_t r = 0; r < RANKS; r++) {
            if (used[r] < SLOTS && (rank == RANKS || sum[r] < sum[rank])) {
                rank = r;
            }
        }
        is_done[item] = 1;
        pack[item] = rank;
        used[rank]++;
        sum[rank] += load[expert[item]] / copies[expert[item]];
    }
    memset(used, 0, sizeof used);
    for (uint32_t s = 0; s < P; s++) {
        expert_of_slot[pack[s] * SLOTS + used[pack[s]]++] = expert[s];
    }
}

static void test_balance_follows_the_rules(void **state)
{
    (void)state;
    uint64_t seed = (uint64_t)time(NULL);
    print_message("seed %llu\n", (unsigned long long)seed);
    struct nep_rng rng = nep_rng_seed(seed);
    const uint32_t sizes[] = {2, 2};
    for (int round = 0; round < 200; round++) {
        double load[E];
        for (uint32_t e = 0; e < E; e++) {
            load[e] = nep_rng_below(&rng, round % 2 == 0 ? 4 : 100000);
        }
        uint32_t expected[P];
        state_rules(load, expected);
        struct nep_map_shape shape = {sizeof shape, 1, E, 2, RANKS, SLOTS, sizes};
        struct nep_map *map = NULL;
        assert_int_equal(nep_map_balance(&shape, 1, load, &map), NEP_OK);
        struct nep_copies copies;
        nep_map_copies(map, 0, &copies);
        for (uint32_t e = 0; e < E; e++) {
            for (uint32_t c = copies.begin[e]; c < copies.begin[e + 1]; c++) {
                assert_int_equal(expected[copies.slot[c]], e);
            }
        }
        assert_int_equal(copies.begin[E], P);
        nep_map_destroy(map);
    }
}

static void test_balance_groups_stay_on_their_node(void **state)
{
    (void)state;
    const uint32_t sizes[] = {2, 2};
    double load[E];
    for (uint32_t e = 0; e < E; e++) {
        load[e] = e * e;
    }
    struct nep_map_shape shape = {sizeof shape, 1, E, 2, RANKS, SLOTS, sizes};
    struct nep_map *map = NULL;
    assert_int_equal(nep_map_balance(&shape, 4, load, &map), NEP_OK);
    struct nep_copies copies;
    nep_map_copies(map, 0, &copies);
    for (uint32_t e = 0; e < E; e++) {
        for (uint32_t c = copies.begin[e]; c < copies.begin[e + 1]; c++) {
            assert_int_equal(copies.node[c], copies.node[copies.begin[e / 6 * 6]]);
        }
    }
    nep_map_destroy(map);
    load[3] = -1.0;
    map = NULL;
    assert_int_equal(nep_map_balance(&shape, 4, load, &map), NEP_ERR_INVALID);
    load[3] = 1.0;
    assert_int_equal(nep_map_balance(&shape, 5, load, &map), NEP_ERR_INVALID);
    assert_null(map);
}

/* A map solved on everything but one domain, then that domain alone. */
static void test_balance_online_restores_balance_under_drift(void **state)
{
    (void)state;
    struct nep_trace *trace = NULL;
    assert_int_equal(nep_trace_open("data/demo256.nept", &trace), NEP_OK);
    uint32_t train[84];
    uint32_t test[84];
    struct nep_requests unseen = {trace, test, 0};
    uint32_t num_train = 0;
    for (uint32_t i = 0; i < nep_trace_num_requests(trace); i++) {
        const char *name = nep_trace_domain(trace, nep_trace_request_at(trace, i)->domain);
        if (strcmp(name, "chinese") == 0) {
            test[unseen.num++] = i;
        } else {
            train[num_train++] = i;
        }
    }
    const uint32_t sizes[] = {1, 1, 1, 1};
    struct nep_map_shape shape = {sizeof shape, 0, 0, 4, 0, 72, sizes};
    struct nep_solve_params params = {
        .size = sizeof params, .shape = &shape, .requests = train, .num_requests = num_train};
    struct nep_map *map = NULL;
    assert_int_equal(nep_map_solve(trace, &params, &map), NEP_OK);
    uint32_t homes[84];
    struct nep_score fixed;
    struct nep_score online;
    uint64_t moved = 0;
    assert_int_equal(nep_homes_predict(&unseen, map, homes), NEP_OK);
    assert_int_equal(nep_score_map(&unseen, map, homes, &fixed, NULL), NEP_OK);
    assert_int_equal(nep_stream_score(&unseen, map, homes, &online, &moved), NEP_OK);
    print_message("imbalance %.3f, online %.3f; remote %.3f, online %.3f; moved %llu\n",
                  fixed.imbalance_node, online.imbalance_node, fixed.remote_nodes_per_token,
                  online.remote_nodes_per_token, (unsigned long long)moved);
    assert_int_equal(online.num_tokens, fixed.num_tokens);
    assert_true(moved > 0);
    assert_true(online.imbalance_node - 1.0 < 0.75 * (fixed.imbalance_node - 1.0));
    assert_true(online.remote_nodes_per_token < 1.05 * fixed.remote_nodes_per_token);
    nep_map_destroy(map);
    nep_trace_close(trace);
}

static void test_balance_wrong_observations_are_refused(void **state)
{
    (void)state;
    const uint32_t sizes[] = {1, 1};
    struct nep_map_shape shape = {sizeof shape, 1, 4, 2, 2, 2, sizes};
    struct nep_map *map = NULL;
    assert_int_equal(nep_map_contiguous(&shape, &map), NEP_OK);
    struct nep_balance_params params = {.size = sizeof params, .map = map};
    struct nep_balance *balance = NULL;
    assert_int_equal(nep_balance_create(&params, &balance), NEP_ERR_INVALID);
    params.top_k = 2;
    assert_int_equal(nep_balance_create(&params, &balance), NEP_OK);
    const int32_t ids[] = {0, 3, -1, 4};
    assert_int_equal(nep_balance_observe(balance, 0, 0, ids, 2), NEP_ERR_INVALID);
    assert_int_equal(nep_balance_observe(balance, 1, 0, ids, 1), NEP_ERR_INVALID);
    assert_int_equal(nep_balance_observe(balance, 0, 2, ids, 1), NEP_ERR_INVALID);
    assert_int_equal(nep_balance_observe(balance, 0, 1, ids, 1), NEP_OK);
    struct nep_map *next = (void *)0x5a;
    assert_int_equal(nep_balance_update(balance, &next, NULL), NEP_OK);
    assert_null(next);
    assert_int_equal(nep_balance_create(&params, NULL), NEP_ERR_INVALID);
    assert_int_equal(nep_balance_create(NULL, &balance), NEP_ERR_INVALID);
    assert_int_equal(nep_balance_observe(NULL, 0, 1, ids, 1), NEP_ERR_INVALID);
    assert_int_equal(nep_balance_observe(balance, 0, 1, NULL, 1), NEP_ERR_INVALID);
    assert_int_equal(nep_balance_update(NULL, &next, NULL), NEP_ERR_INVALID);
    assert_int_equal(nep_balance_update(balance, NULL, NULL), NEP_ERR_INVALID);
    float scores[2] = {0};
    assert_int_equal(nep_map_home_scores(NULL, 0, ids, 1, 2, scores), NEP_ERR_INVALID);
    assert_int_equal(nep_map_home_scores(map, 0, NULL, 1, 2, scores), NEP_ERR_INVALID);
    assert_int_equal(nep_map_home_scores(map, 0, ids, 1, 2, NULL), NEP_ERR_INVALID);
    const double loads[4] = {1, 2, 3, 4};
    assert_int_equal(nep_map_balance(&shape, 1, NULL, &next), NEP_ERR_INVALID);
    assert_int_equal(nep_map_balance(&shape, 1, loads, NULL), NEP_ERR_INVALID);
    nep_balance_destroy(balance);
    nep_map_destroy(map);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_balance_follows_the_rules),
        cmocka_unit_test(test_balance_groups_stay_on_their_node),
        cmocka_unit_test(test_balance_online_restores_balance_under_drift),
        cmocka_unit_test(test_balance_wrong_observations_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
