/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random small schedules over loop: shape, group, layout, S, tensors and order are all drawn. The
 * default is what a run of the suite can afford; NEP_TEST_SCALE=10000 does more than 10^6
 * operations. A failure prints the seed of its configuration, which NEP_TEST_SEED repeats with
 * NEP_TEST_SCALE=0.
 */
#include <stdio.h>

#include "tests/multi/world.h"
#include "tests/unit/cmocka_all.h"

enum { STEPS = 200, CONFIGURATIONS = 60 };

/* What run_rank gets; rank 0 counts. */
struct run {
    struct nep_multi_shape shape;
    uint64_t ops;
};

static void draw_shape(uint64_t seed, struct nep_multi_shape *shape)
{
    struct nep_ref_rng rng = {seed};
    static const enum nep_layout layouts[] = {NEP_LAYOUT_EXPERT_PACKED, NEP_LAYOUT_RANK,
                                              NEP_LAYOUT_EXPERT_PADDED, NEP_LAYOUT_EXPERT_FRONT};
    static const enum nep_dtype dtypes[] = {NEP_DTYPE_BF16, NEP_DTYPE_BF16, NEP_DTYPE_BF16,
                                            NEP_DTYPE_FP16, NEP_DTYPE_FP32};
    *shape = (struct nep_multi_shape){.name = "random",
                                      .intra = "loop",
                                      .inter = "loop",
                                      .seed = seed,
                                      .timeout_ns = 60000000000ull};
    shape->num_nodes = 1 + nep_ref_rng_below(&rng, 3);
    uint32_t ranks = 0;
    for (uint32_t n = 0; n < shape->num_nodes; n++) {
        shape->ranks_per_node[n] = 1 + nep_ref_rng_below(&rng, 3);
        ranks += shape->ranks_per_node[n];
    }
    shape->experts = 1 + nep_ref_rng_below(&rng, 4 * ranks);
    uint32_t most_k = shape->experts < 8 ? shape->experts : 8;
    shape->top_k = 1 + nep_ref_rng_below(&rng, most_k);
    shape->hidden = 16 * (1 + nep_ref_rng_below(&rng, 10));
    bool is_long = nep_ref_rng_below(&rng, 16) == 0;
    shape->max_tokens = 1 + nep_ref_rng_below(&rng, is_long ? 1500 : 12);
    shape->layout = layouts[nep_ref_rng_below(&rng, 4)];
    if (shape->layout == NEP_LAYOUT_EXPERT_PACKED && nep_ref_rng_below(&rng, 3) == 0) {
        shape->alignment = 1u << nep_ref_rng_below(&rng, 6);
    }
    shape->outstanding = 1 + nep_ref_rng_below(&rng, 4);
    shape->is_private = nep_ref_rng_below(&rng, 2) == 0;
    shape->is_fixed_tokens = nep_ref_rng_below(&rng, 4) == 0;
    shape->is_wild = nep_ref_rng_below(&rng, 3) == 0;
    shape->has_replicas = nep_ref_rng_below(&rng, 3) == 0;
    shape->dtype = dtypes[nep_ref_rng_below(&rng, 5)];
    bool is_fp8 = nep_ref_rng_below(&rng, 4) == 0;
    shape->wire = is_fp8 ? NEP_DTYPE_FP8_E4M3 : shape->dtype;
    shape->is_unweighted = nep_ref_rng_below(&rng, 8) == 0;
    shape->is_int64 = nep_ref_rng_below(&rng, 4) == 0;
    shape->is_late = shape->num_nodes == 1 && shape->layout != NEP_LAYOUT_RANK &&
                     nep_ref_rng_below(&rng, 2) == 0;
}

static bool run_rank(struct nep_multi_rank *rank)
{
    struct run *run = rank->arg;
    const struct nep_multi_shape *shape = &run->shape;
    struct nep_multi_world world;
    bool is_fine = nep_multi_world_create(rank, shape, shape->outstanding + 2, &world);
    uint32_t steps = shape->max_tokens > 100 ? STEPS / 10 : STEPS;
    is_fine = is_fine && nep_multi_random_schedule(&world, shape->seed, steps);
    if (is_fine && rank->rank == 0) {
        run->ops = world.num_ops;
    }
    is_fine = is_fine && nep_multi_barrier(rank);
    nep_multi_world_destroy(&world);
    return is_fine;
}

static void test_random_schedules_match(void **state)
{
    uint64_t seed = *(uint64_t *)*state;
    uint64_t num = nep_multi_scaled(CONFIGURATIONS);
    uint64_t ops = 0;
    struct run arg;
    for (uint64_t i = 0; i < num; i++) {
        struct nep_multi_result result;
        draw_shape(seed + i, &arg.shape);
        arg.ops = 0;
        nep_multi_run_threads(nep_multi_num_ranks(&arg.shape), run_rank, &arg, &result);
        if (result.num_failed != 0) {
            fail_msg("NEP_TEST_SEED=%llu NEP_TEST_SCALE=0: %s", (unsigned long long)(seed + i),
                     result.error);
        }
        ops += arg.ops;
    }
    printf("%llu operations in %llu configurations\n", (unsigned long long)ops,
           (unsigned long long)num);
}

int main(void)
{
    uint64_t seed = nep_multi_seed("test_multi_random");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(test_random_schedules_match, &seed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
