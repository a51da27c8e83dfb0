/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Ranks are lost between the calls of a step; the others agree, go on, and later let a newcomer in.
 * test_deaths.c has the deaths inside of calls.
 */
#include "base/clock.h"
#include "tests/multi/mortals.h"
#include "tests/unit/cmocka_all.h"

static void test_recover_shm_every_phase(void **state)
{
    (void)state;
    const enum mortals_call calls[] = {MORTALS_DISPATCH_SEND, MORTALS_DISPATCH_RECV,
                                       MORTALS_COMBINE_RECV};
    for (int when = 0; when < 3; when++) {
        mortals_run((struct mortals_plan){.intra = "shm",
                                          .inter = "shm",
                                          .num_nodes = 2,
                                          .ranks_per_node = {3, 2},
                                          .layout = NEP_LAYOUT_EXPERT_PACKED,
                                          .memory = MORTALS_POOL,
                                          .timeout_ns = 20000000000ull,
                                          .deaths = {{1, 3, {.call = calls[when]}}},
                                          .num_deaths = 1,
                                          .newcomer = UINT32_MAX});
    }
}

static void test_recover_three_deaths_and_a_node(void **state)
{
    (void)state;
    mortals_run((struct mortals_plan){.intra = "shm",
                                      .inter = "shm",
                                      .num_nodes = 3,
                                      .ranks_per_node = {2, 1, 2},
                                      .layout = NEP_LAYOUT_RANK,
                                      .timeout_ns = 20000000000ull,
                                      .deaths = {{2, 2, {.call = MORTALS_DISPATCH_RECV}},
                                                 {0, 5, {.call = MORTALS_COMBINE_RECV}},
                                                 {4, 8, {.call = MORTALS_DISPATCH_SEND}}},
                                      .num_deaths = 3,
                                      .newcomer = UINT32_MAX});
}

static void test_recover_ucx_and_newcomer(void **state)
{
    (void)state;
    mortals_run((struct mortals_plan){.intra = "shm",
                                      .inter = "ucx",
                                      .num_nodes = 2,
                                      .ranks_per_node = {2, 2},
                                      .layout = NEP_LAYOUT_EXPERT_PADDED,
                                      .memory = MORTALS_POOL,
                                      .timeout_ns = 20000000000ull,
                                      .deaths = {{3, 3, {.call = MORTALS_DISPATCH_RECV}}},
                                      .num_deaths = 1,
                                      .newcomer = 3,
                                      .join_step = 8});
}

static void test_recover_shm_newcomer_replaces_rank_0(void **state)
{
    (void)state;
    mortals_run((struct mortals_plan){.intra = "shm",
                                      .inter = "shm",
                                      .num_nodes = 2,
                                      .ranks_per_node = {2, 2},
                                      .layout = NEP_LAYOUT_EXPERT_PACKED,
                                      .memory = MORTALS_POOL,
                                      .timeout_ns = 20000000000ull,
                                      .deaths = {{0, 3, {.call = MORTALS_COMBINE_RECV}}},
                                      .num_deaths = 1,
                                      .newcomer = 0,
                                      .join_step = 8});
}

static void test_recover_threads_that_stop(void **state)
{
    (void)state;
    mortals_run((struct mortals_plan){.intra = "loop",
                                      .inter = "loop",
                                      .num_nodes = 2,
                                      .ranks_per_node = {3, 3},
                                      .layout = NEP_LAYOUT_EXPERT_PACKED,
                                      .memory = MORTALS_POOL,
                                      .is_threads = true,
                                      .timeout_ns = 60 * NEP_S,
                                      .deaths = {{4, 3, {.call = MORTALS_DISPATCH_SEND}},
                                                 {0, 6, {.call = MORTALS_DISPATCH_SEND}}},
                                      .num_deaths = 2,
                                      .newcomer = UINT32_MAX});
}

/* The time that it prints should not grow much with the number of ranks. */
static void test_recover_many_threads(void **state)
{
    (void)state;
    for (uint32_t nodes = 1; nodes <= 8; nodes *= 8) {
        struct mortals_plan plan = {.intra = "loop",
                                    .inter = "loop",
                                    .num_nodes = nodes,
                                    .layout = NEP_LAYOUT_EXPERT_PACKED,
                                    .is_threads = true,
                                    .timeout_ns = 60 * NEP_S,
                                    .deaths = {{3, 3, {.call = MORTALS_DISPATCH_SEND}}},
                                    .num_deaths = 1,
                                    .newcomer = UINT32_MAX};
        for (uint32_t n = 0; n < nodes; n++) {
            plan.ranks_per_node[n] = 8;
        }
        mortals_run(plan);
    }
}

/* The generation's 3 bits in an immediate go round, and nothing is taken for something else. */
static void test_recover_more_generations_than_bits(void **state)
{
    (void)state;
    mortals_run((struct mortals_plan){.intra = "shm",
                                      .inter = "ucx",
                                      .num_nodes = 2,
                                      .ranks_per_node = {2, 1},
                                      .layout = NEP_LAYOUT_EXPERT_PACKED,
                                      .memory = MORTALS_POOL,
                                      .timeout_ns = 20000000000ull,
                                      .newcomer = UINT32_MAX,
                                      .is_renewed = true});
}

/* Memory of the callers' own: in every phase of a loss, and where a newcomer brings some. */
static void test_recover_registered_memory(void **state)
{
    (void)state;
    const enum mortals_call calls[] = {MORTALS_DISPATCH_SEND, MORTALS_DISPATCH_RECV,
                                       MORTALS_COMBINE_RECV};
    for (int when = 0; when < 3; when++) {
        mortals_run((struct mortals_plan){
            .intra = "shm",
            .inter = "shm",
            .num_nodes = 2,
            .ranks_per_node = {3, 2},
            .layout = when == 1 ? NEP_LAYOUT_RANK : NEP_LAYOUT_EXPERT_PACKED,
            .memory = MORTALS_REGISTERED,
            .timeout_ns = 20 * NEP_S,
            .deaths = {{1, 3, {.call = calls[when]}}, {4, 6, {.call = calls[(when + 1) % 3]}}},
            .num_deaths = 2,
            .newcomer = UINT32_MAX});
    }
    mortals_run((struct mortals_plan){.intra = "shm",
                                      .inter = "shm",
                                      .num_nodes = 2,
                                      .ranks_per_node = {2, 2},
                                      .layout = NEP_LAYOUT_EXPERT_PACKED,
                                      .memory = MORTALS_REGISTERED,
                                      .timeout_ns = 20 * NEP_S,
                                      .deaths = {{3, 3, {.call = MORTALS_DISPATCH_RECV}}},
                                      .num_deaths = 1,
                                      .newcomer = 3,
                                      .join_step = 8});
}

static void test_recover_registered_memory_of_threads(void **state)
{
    (void)state;
    mortals_run((struct mortals_plan){.intra = "loop",
                                      .inter = "loop",
                                      .num_nodes = 2,
                                      .ranks_per_node = {2, 2},
                                      .layout = NEP_LAYOUT_EXPERT_PACKED,
                                      .memory = MORTALS_REGISTERED,
                                      .is_threads = true,
                                      .timeout_ns = 60 * NEP_S,
                                      .newcomer = UINT32_MAX,
                                      .is_renewed = true});
}

int main(void)
{
    const struct CMUnitTest processes[] = {
        cmocka_unit_test(test_recover_shm_every_phase),
        cmocka_unit_test(test_recover_three_deaths_and_a_node),
        cmocka_unit_test(test_recover_shm_newcomer_replaces_rank_0),
        cmocka_unit_test(test_recover_ucx_and_newcomer),
        cmocka_unit_test(test_recover_more_generations_than_bits),
        cmocka_unit_test(test_recover_registered_memory),
    };
    const struct CMUnitTest threads[] = {
        cmocka_unit_test(test_recover_threads_that_stop),
        cmocka_unit_test(test_recover_many_threads),
        cmocka_unit_test(test_recover_registered_memory_of_threads),
    };
#ifdef __SANITIZE_THREAD__
    (void)processes;
    return cmocka_run_group_tests(threads, NULL, NULL);
#else
    return cmocka_run_group_tests(processes, NULL, NULL) +
           cmocka_run_group_tests(threads, NULL, NULL);
#endif
}
