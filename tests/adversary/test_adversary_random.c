/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whole operations over fabrics that reorder, delay, split and repeat, each element against the
 * oracle. Shapes, groups, S and schedules are drawn; the default is what a run of the suite can
 * afford, NEP_TEST_SCALE=1000 does more than 100,000 operations. A failure prints the seed of its
 * configuration, which NEP_TEST_SEED repeats with NEP_TEST_SCALE=0.
 */
#include <stdio.h>
#include <stdlib.h>

#include "tests/multi/world.h"
#include "tests/unit/cmocka_all.h"
#include "transport/transport.h"

enum { STEPS = 120, CONFIGURATIONS = 24, PROCESSES = 6, RUN_SECONDS = 240 };

struct run {
    struct nep_multi_shape shape;
    uint64_t ops; /* counted by rank 0, where ranks are threads */
};

static void draw_shape(uint64_t seed, struct nep_multi_shape *shape)
{
    static const enum nep_layout layouts[] = {NEP_LAYOUT_EXPERT_PACKED, NEP_LAYOUT_RANK,
                                              NEP_LAYOUT_EXPERT_PADDED, NEP_LAYOUT_EXPERT_FRONT};
    static const uint32_t most_tokens[] = {4, 30, 30, 30, 700, 1500};
    struct nep_ref_rng rng = {seed};
    *shape = (struct nep_multi_shape){
        .name = "adversary", .inter = "adversary:loop", .seed = seed, .timeout_ns = 60000000000ull};
    shape->num_nodes = 2 + nep_ref_rng_below(&rng, 2);
    uint32_t ranks = 0;
    for (uint32_t n = 0; n < shape->num_nodes; n++) {
        shape->ranks_per_node[n] = 1 + nep_ref_rng_below(&rng, 3);
        ranks += shape->ranks_per_node[n];
    }
    shape->experts = 1 + nep_ref_rng_below(&rng, 4 * ranks);
    shape->top_k = 1 + nep_ref_rng_below(&rng, shape->experts < 6 ? shape->experts : 6);
    shape->hidden = 16 * (1 + nep_ref_rng_below(&rng, 6));
    shape->max_tokens = 1 + nep_ref_rng_below(&rng, most_tokens[nep_ref_rng_below(&rng, 6)]);
    shape->layout = layouts[nep_ref_rng_below(&rng, 4)];
    shape->outstanding = 1 + nep_ref_rng_below(&rng, 4);
    shape->is_private = nep_ref_rng_below(&rng, 2) == 0;
    shape->is_fixed_tokens = nep_ref_rng_below(&rng, 4) == 0;
    shape->is_wild = nep_ref_rng_below(&rng, 3) == 0;
    shape->has_replicas = nep_ref_rng_below(&rng, 3) == 0;
}

static void seed_adversary(uint64_t seed)
{
    char text[32];
    snprintf(text, sizeof text, "%u", (unsigned)(seed % 4000000000u));
    setenv("NEP_ADVERSARY_SEED", text, 1);
}

static bool random_rank(struct nep_multi_rank *rank)
{
    struct run *run = rank->arg;
    const struct nep_multi_shape *shape = &run->shape;
    struct nep_multi_world world;
    bool is_fine = nep_multi_world_create(rank, shape, shape->outstanding + 2, &world);
    uint32_t steps = shape->max_tokens > 100 ? STEPS / 6 : STEPS;
    is_fine = is_fine && nep_multi_random_schedule(&world, shape->seed, steps);
    if (is_fine && rank->rank == 0) {
        run->ops = world.num_ops;
    }
    is_fine = is_fine && nep_multi_barrier(rank);
    nep_multi_world_destroy(&world);
    return is_fine;
}

static void check(uint64_t seed, const struct nep_multi_result *result)
{
    if (result->num_failed != 0) {
        fail_msg("NEP_TEST_SEED=%llu NEP_TEST_SCALE=0: %s", (unsigned long long)seed,
                 result->error);
    }
}

static void test_adversary_threads_random_schedules_match(void **state)
{
    uint64_t seed = *(uint64_t *)*state, ops = 0, num = nep_multi_scaled(CONFIGURATIONS);
    for (uint64_t i = 0; i < num; i++) {
        struct nep_multi_result result;
        struct run run = {.ops = 0};
        draw_shape(seed + i, &run.shape);
        seed_adversary(seed + i);
        nep_multi_run_threads(nep_multi_num_ranks(&run.shape), random_rank, &run, &result);
        check(seed + i, &result);
        ops += run.ops;
    }
    printf("%llu operations in %llu configurations\n", (unsigned long long)ops,
           (unsigned long long)num);
}

static const char *ucx_or(const char *other)
{
    struct nep_config config;
    const struct nep_transport_ops *ops;
    const char *args;
    assert_int_equal(nep_config_load(&config), NEP_OK);
    assert_int_equal(nep_transport_find("ucx", &ops, &args), NEP_OK);
    if (ops->probe(&config) == NEP_OK) {
        return "adversary:ucx";
    }
    printf("ucx is not here: %s\n", nep_last_message());
    return other;
}

static void test_adversary_processes_random_schedules_match(void **state)
{
    uint64_t seed = *(uint64_t *)*state, num = nep_multi_scaled(PROCESSES);
    const char *const fabrics[] = {"adversary:shm", ucx_or("adversary"), "adversary"};
    for (uint64_t i = 0; i < num; i++) {
        struct nep_multi_result result;
        struct run run = {.ops = 0};
        draw_shape(seed + i, &run.shape);
        seed_adversary(seed + i);
        run.shape.inter = fabrics[i % 3];
        nep_multi_run_processes(nep_multi_num_ranks(&run.shape), random_rank, &run, RUN_SECONDS,
                                &result);
        check(seed + i, &result);
    }
}

/* Dispatches and combines in turn, one handle. */
static bool calm_rank(struct nep_multi_rank *rank)
{
    const struct run *run = rank->arg;
    struct nep_multi_world world;
    bool is_fine = nep_multi_world_create(rank, &run->shape, 1, &world);
    for (uint64_t n = 0; is_fine && n < run->shape.num_calm + 3; n++) {
        is_fine = nep_multi_dispatch_send(&world, world.flights, n, false) &&
                  nep_multi_dispatch_recv(&world, world.flights) &&
                  nep_multi_combine_send(&world, world.flights) &&
                  nep_multi_combine_recv(&world, world.flights);
    }
    is_fine = is_fine && nep_multi_barrier(rank);
    nep_multi_world_destroy(&world);
    return is_fine;
}

/*
 * Operations of one tile need no CREDIT. When the numbers of a stream have gone beyond what eight
 * bits tell apart, the first large operation needs one, and its bits must still mean the right
 * number (model: traffic=burst).
 */
static void test_adversary_first_credit_after_a_long_calm_counts(void **state)
{
    uint64_t seed = *(uint64_t *)*state;
    struct run run = {.shape = {.name = "calm",
                                .num_nodes = 2,
                                .ranks_per_node = {1, 1},
                                .experts = 4,
                                .top_k = 4,
                                .hidden = 16,
                                .max_tokens = 2000,
                                .layout = NEP_LAYOUT_RANK,
                                .outstanding = 1,
                                .is_fixed_tokens = true,
                                .num_calm = 300,
                                .inter = "adversary:loop",
                                .seed = seed,
                                .timeout_ns = 20000000000ull}};
    struct nep_multi_result result;
    nep_multi_run_threads(2, calm_rank, &run, &result);
    check(seed, &result);
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    uint64_t seed = nep_multi_seed("test_adversary_random");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(test_adversary_first_credit_after_a_long_calm_counts, &seed),
        cmocka_unit_test_prestate(test_adversary_threads_random_schedules_match, &seed),
        cmocka_unit_test_prestate(test_adversary_processes_random_schedules_match, &seed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
