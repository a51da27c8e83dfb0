/* SPDX-License-Identifier: Apache-2.0 */
/* Homes and the schedule on the shipped sample, against the rule written a second time. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "placement/map.h"
#include "placement/rng.h"
#include "placement/schedule.h"
#include "tests/unit/cmocka_all.h"
#include "tests/unit/placement/demo.h"

static void check_balance(const uint32_t *homes, const struct nep_map_shape *shape)
{
    uint64_t load[8] = {0};
    uint64_t total = 0;
    for (uint32_t i = 0; i < nep_trace_num_requests(trace); i++) {
        uint64_t first;
        uint64_t count;
        nep_trace_scored(trace, i, &first, &count);
        assert_true(homes[i] < shape->num_nodes);
        load[homes[i]] += count;
        total += count;
    }
    for (uint32_t n = 0; n < shape->num_nodes; n++) {
        double share = (double)total * shape->ranks_per_node[n] / shape->num_ranks;
        /* 5 % and one request of 128 tokens where it does not divide */
        assert_true((double)load[n] <= share * 1.05 + 128);
    }
}

static void test_homes_random_and_predicted_are_balanced(void **state)
{
    (void)state;
    uint64_t seed = (uint64_t)time(NULL);
    print_message("seed %llu\n", (unsigned long long)seed);
    const uint32_t sizes[] = {2, 1, 3};
    struct nep_map_shape shape = {sizeof shape, 7, 256, 3, 0, 0, sizes};
    struct nep_map *map = NULL;
    assert_int_equal(nep_map_contiguous(&shape, &map), NEP_OK);
    assert_int_equal(nep_map_get_shape(map, &shape), NEP_OK);
    struct nep_requests all = nep_requests_all(trace);
    uint32_t *homes = malloc(all.num * sizeof *homes);
    uint32_t *again = malloc(all.num * sizeof *again);
    assert_int_equal(nep_homes_random(&all, &shape, seed, homes), NEP_OK);
    check_balance(homes, &shape);
    assert_int_equal(nep_homes_random(&all, &shape, seed, again), NEP_OK);
    assert_memory_equal(homes, again, all.num * sizeof *homes);
    assert_int_equal(nep_homes_predict(&all, map, homes), NEP_OK);
    check_balance(homes, &shape);
    assert_memory_not_equal(homes, again, all.num * sizeof *homes);
    free(homes);
    free(again);
    nep_map_destroy(map);
}

static void test_schedule_follows_the_rule(void **state)
{
    (void)state;
    const uint32_t sizes[] = {2, 3};
    struct nep_map_shape shape = {sizeof shape, 7, 256, 2, 5, 0, sizes};
    struct nep_requests all = nep_requests_all(trace);
    uint32_t *homes = malloc(all.num * sizeof *homes);
    assert_int_equal(nep_homes_random(&all, &shape, 3, homes), NEP_OK);
    struct nep_schedule *schedule = NULL;
    assert_int_equal(nep_schedule_create(&all, homes, &shape, NEP_SCHEDULE_ALL_LAYERS, &schedule),
                     NEP_OK);
    /* Rank 3 is the second of node 1: it takes requests 1, 4, 7, ... of that home. */
    uint64_t *stream = malloc(nep_trace_num_tokens(trace) * sizeof *stream);
    uint64_t length = 0;
    uint32_t of_home = 0;
    for (uint32_t i = 0; i < all.num; i++) {
        if (homes[i] != 1 || of_home++ % 3 != 1) {
            continue;
        }
        const struct nep_trace_request *r = nep_trace_request_at(trace, i);
        for (uint32_t t = 0; t < r->decode_tokens; t++) {
            stream[length++] = r->first_token + r->prefill_tokens + t;
        }
    }
    assert_true(length > 0);
    assert_int_equal(nep_schedule_length(schedule, 3), length);
    static const uint64_t iterations[] = {0, 1, 6, 7, 1000003};
    for (size_t i = 0; i < 5; i++) {
        int32_t got[100 * 8];
        int32_t expected[8];
        memset(got, 0x77, sizeof got);
        assert_int_equal(nep_schedule_ids(schedule, 3, iterations[i], 100, got), 100);
        assert_int_equal(nep_schedule_layer(schedule, iterations[i]), iterations[i] % 7);
        for (uint64_t t = 0; t < 100; t++) {
            nep_trace_ids(trace, stream[(iterations[i] * 100 + t) % length],
                          (uint32_t)(iterations[i] % 7), expected);
            assert_memory_equal(&got[t * 8], expected, sizeof expected);
        }
    }
    free(stream);
    free(homes);
    nep_schedule_destroy(schedule);
}

static void test_schedule_remote_rows_are_counted(void **state)
{
    (void)state;
    const uint32_t sizes[] = {1, 1, 1, 1};
    struct nep_map_shape shape = {sizeof shape, 7, 256, 4, 4, 64, sizes};
    struct nep_map *map = NULL;
    assert_int_equal(nep_map_contiguous(&shape, &map), NEP_OK);
    struct nep_requests all = nep_requests_all(trace);
    uint32_t *homes = malloc(all.num * sizeof *homes);
    assert_int_equal(nep_homes_random(&all, &shape, 4, homes), NEP_OK);
    struct nep_schedule *schedule = NULL;
    assert_int_equal(nep_schedule_create(&all, homes, &shape, 2, &schedule), NEP_OK);
    uint64_t rows = 0;
    assert_int_equal(nep_schedule_remote_rows(schedule, map, 10, 5, 3, &rows), NEP_OK);
    uint64_t expected = 0;
    for (uint64_t i = 5; i < 8; i++) {
        for (uint32_t rank = 0; rank < 4; rank++) {
            int32_t ids[10 * 8];
            assert_int_equal(nep_schedule_ids(schedule, rank, i, 10, ids), 10);
            for (int t = 0; t < 10; t++) {
                uint32_t mask = 0;
                for (int k = 0; k < 8; k++) {
                    mask |= 1u << (ids[t * 8 + k] / 64);
                }
                expected += (uint64_t)__builtin_popcount(mask & ~(1u << rank));
            }
        }
    }
    assert_int_equal(rows, expected);
    free(homes);
    nep_schedule_destroy(schedule);
    nep_map_destroy(map);
}

static void test_schedule_impossible_arguments_are_refused(void **state)
{
    (void)state;
    const uint32_t sizes[] = {1, 1};
    struct nep_map_shape shape = {sizeof shape, 7, 256, 2, 2, 0, sizes};
    struct nep_requests all = nep_requests_all(trace);
    uint32_t *homes = calloc(all.num, sizeof *homes);
    struct nep_schedule *schedule = NULL;
    assert_int_equal(nep_schedule_create(&all, homes, &shape, 7, &schedule), NEP_ERR_INVALID);
    homes[5] = 2;
    assert_int_equal(nep_schedule_create(&all, homes, &shape, 0, &schedule), NEP_ERR_INVALID);
    homes[5] = 0;
    assert_int_equal(nep_schedule_create(&all, homes, &shape, 0, &schedule), NEP_OK);
    int32_t ids[8];
    assert_int_equal(nep_schedule_ids(schedule, 1, 0, 1, ids), 0);
    shape.num_experts = 128;
    struct nep_map *map = NULL;
    assert_int_equal(nep_map_contiguous(&shape, &map), NEP_OK);
    uint64_t rows;
    assert_int_equal(nep_schedule_remote_rows(schedule, map, 1, 0, 1, &rows), NEP_ERR_MISMATCH);
    assert_int_equal(nep_homes_predict(&all, map, homes), NEP_ERR_MISMATCH);
    nep_map_destroy(map);
    nep_schedule_destroy(schedule);
    free(homes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_homes_random_and_predicted_are_balanced),
        cmocka_unit_test(test_schedule_follows_the_rule),
        cmocka_unit_test(test_schedule_remote_rows_are_counted),
        cmocka_unit_test(test_schedule_impossible_arguments_are_refused),
    };
    return cmocka_run_group_tests(tests, open_demo, close_demo);
}
