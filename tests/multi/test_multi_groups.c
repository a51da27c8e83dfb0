/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Shapes that once broke somebody: odd groups, the limits of K and H, empty ranks, all layouts,
 * mapped and private tensors, split halves. Each runs a random schedule as threads over loop, and
 * the smaller ones as processes over shm too.
 */
#include <string.h>

#include "tests/multi/world.h"
#include "tests/unit/cmocka_all.h"

#define EXPERT NEP_LAYOUT_EXPERT_PACKED
#define PADDED NEP_LAYOUT_EXPERT_PADDED
#define RANK   NEP_LAYOUT_RANK

static const struct nep_multi_shape shapes[] = {
    {.name = "2 nodes of 2, expert",
     .num_nodes = 2,
     .ranks_per_node = {2, 2},
     .experts = 16,
     .top_k = 4,
     .hidden = 64,
     .max_tokens = 9,
     .layout = EXPERT},
    {.name = "2 nodes of 2, rank",
     .num_nodes = 2,
     .ranks_per_node = {2, 2},
     .experts = 16,
     .top_k = 4,
     .hidden = 64,
     .max_tokens = 9,
     .layout = RANK},
    {.name = "2 nodes of 2, padded",
     .num_nodes = 2,
     .ranks_per_node = {2, 2},
     .experts = 16,
     .top_k = 4,
     .hidden = 64,
     .max_tokens = 9,
     .layout = PADDED},
    {.name = "nodes of 1, 2 and 5, expert",
     .num_nodes = 3,
     .ranks_per_node = {1, 2, 5},
     .experts = 37,
     .top_k = 6,
     .hidden = 48,
     .max_tokens = 33,
     .layout = EXPERT,
     .outstanding = 2},
    {.name = "nodes of 5, 1 and 2, rank",
     .num_nodes = 3,
     .ranks_per_node = {5, 1, 2},
     .experts = 37,
     .top_k = 6,
     .hidden = 48,
     .max_tokens = 33,
     .layout = RANK,
     .outstanding = 2},
    {.name = "nodes of 1, 2 and 5, private",
     .num_nodes = 3,
     .ranks_per_node = {1, 2, 5},
     .experts = 37,
     .top_k = 6,
     .hidden = 48,
     .max_tokens = 33,
     .layout = EXPERT,
     .is_private = true},
    {.name = "nodes of 1, 2 and 5, private, rank",
     .num_nodes = 3,
     .ranks_per_node = {1, 2, 5},
     .experts = 37,
     .top_k = 6,
     .hidden = 48,
     .max_tokens = 33,
     .layout = RANK,
     .is_private = true,
     .outstanding = 3},
    {.name = "one rank",
     .num_nodes = 1,
     .ranks_per_node = {1},
     .experts = 5,
     .top_k = 3,
     .hidden = 16,
     .max_tokens = 7,
     .layout = EXPERT},
    {.name = "three ranks on one node",
     .num_nodes = 1,
     .ranks_per_node = {3},
     .experts = 10,
     .top_k = 3,
     .hidden = 32,
     .max_tokens = 20,
     .layout = EXPERT,
     .alignment = 8},
    {.name = "weights with combine, mapped",
     .num_nodes = 1,
     .ranks_per_node = {4},
     .experts = 24,
     .top_k = 6,
     .hidden = 48,
     .max_tokens = 33,
     .layout = PADDED,
     .is_late = true,
     .outstanding = 2},
    {.name = "weights with combine, private, K 32, M 3",
     .num_nodes = 1,
     .ranks_per_node = {3},
     .experts = 60,
     .top_k = 32,
     .hidden = 48,
     .max_tokens = 3,
     .layout = EXPERT,
     .is_late = true,
     .is_private = true},
    {.name = "weights with combine, private, more than a ring",
     .num_nodes = 1,
     .ranks_per_node = {3},
     .experts = 12,
     .top_k = 5,
     .hidden = 32,
     .max_tokens = 400,
     .layout = EXPERT,
     .is_unweighted = true,
     .is_late = true,
     .is_private = true,
     .is_fixed_tokens = true},
    {.name = "three nodes of one",
     .num_nodes = 3,
     .ranks_per_node = {1, 1, 1},
     .experts = 10,
     .top_k = 3,
     .hidden = 32,
     .max_tokens = 20,
     .layout = RANK},
    {.name = "H 16, K 1",
     .num_nodes = 2,
     .ranks_per_node = {3, 2},
     .experts = 11,
     .top_k = 1,
     .hidden = 16,
     .max_tokens = 40,
     .layout = EXPERT,
     .outstanding = 4},
    {.name = "K 32",
     .num_nodes = 2,
     .ranks_per_node = {2, 3},
     .experts = 64,
     .top_k = 32,
     .hidden = 128,
     .max_tokens = 12,
     .layout = EXPERT},
    {.name = "K 32, rank",
     .num_nodes = 2,
     .ranks_per_node = {2, 3},
     .experts = 64,
     .top_k = 32,
     .hidden = 128,
     .max_tokens = 12,
     .layout = RANK,
     .is_wild = true},
    {.name = "M 1",
     .num_nodes = 2,
     .ranks_per_node = {2, 2},
     .experts = 8,
     .top_k = 2,
     .hidden = 16,
     .max_tokens = 1,
     .layout = EXPERT},
    {.name = "fewer experts than ranks",
     .num_nodes = 2,
     .ranks_per_node = {3, 3},
     .experts = 4,
     .top_k = 4,
     .hidden = 32,
     .max_tokens = 15,
     .layout = EXPERT},
    {.name = "several tiles",
     .num_nodes = 2,
     .ranks_per_node = {2, 2},
     .experts = 16,
     .top_k = 4,
     .hidden = 32,
     .max_tokens = 700,
     .layout = EXPERT,
     .is_fixed_tokens = true},
    {.name = "several tiles, rank, private",
     .num_nodes = 2,
     .ranks_per_node = {1, 2},
     .experts = 16,
     .top_k = 4,
     .hidden = 32,
     .max_tokens = 700,
     .layout = RANK,
     .is_private = true,
     .outstanding = 2},
    {.name = "replicas",
     .num_nodes = 3,
     .ranks_per_node = {2, 1, 3},
     .experts = 23,
     .top_k = 5,
     .hidden = 32,
     .max_tokens = 20,
     .layout = EXPERT,
     .has_replicas = true,
     .outstanding = 2},
    {.name = "all magnitudes",
     .num_nodes = 2,
     .ranks_per_node = {2, 2},
     .experts = 16,
     .top_k = 8,
     .hidden = 256,
     .max_tokens = 16,
     .layout = EXPERT,
     .is_wild = true},
};

static bool run_rank(struct nep_multi_rank *rank)
{
    const struct nep_multi_shape *shape = rank->arg;
    struct nep_multi_world world;
    uint32_t flights = shape->outstanding + 1;
    bool is_fine = nep_multi_world_create(rank, shape, flights, &world) &&
                   nep_multi_random_schedule(&world, shape->seed, 60);
    /* A peer may still read this rank's memory in its last operation. */
    is_fine = is_fine && nep_multi_barrier(rank);
    nep_multi_world_destroy(&world);
    return is_fine;
}

static void run(const struct nep_multi_shape *base, uint64_t seed, bool as_threads)
{
    struct nep_multi_shape shape = *base;
    struct nep_multi_result result;
    uint32_t ranks = nep_multi_num_ranks(&shape);
    shape.seed = seed;
    shape.intra = as_threads ? "loop" : "shm";
    shape.inter = as_threads ? "loop" : "shm";
    shape.timeout_ns = 60000000000ull;
    if (as_threads) {
        nep_multi_run_threads(ranks, run_rank, &shape, &result);
    } else {
        nep_multi_run_processes(ranks, run_rank, &shape, 120, &result);
    }
    if (result.num_failed != 0) {
        fail_msg("%s as %s, seed %llu: %s", shape.name, as_threads ? "threads" : "processes",
                 (unsigned long long)seed, result.error);
    }
}

static void test_groups_threads_match(void **state)
{
    uint64_t seed = *(uint64_t *)*state;
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        run(&shapes[i], seed + i, true);
    }
}

static void test_groups_processes_match(void **state)
{
    uint64_t seed = *(uint64_t *)*state;
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        run(&shapes[i], seed + i, false);
    }
}

/* 64 ranks as threads, 8 emulated nodes of 8. */
static void test_groups_64_ranks_match(void **state)
{
    struct nep_multi_shape shape = {.name = "64 ranks",
                                    .num_nodes = 8,
                                    .ranks_per_node = {8, 8, 8, 8, 8, 8, 8, 8},
                                    .experts = 256,
                                    .top_k = 8,
                                    .hidden = 64,
                                    .max_tokens = 16,
                                    .layout = EXPERT,
                                    .is_fixed_tokens = true};
    run(&shape, *(uint64_t *)*state, true);
    shape.layout = RANK;
    run(&shape, *(uint64_t *)*state + 1, true);
}

int main(void)
{
    uint64_t seed = nep_multi_seed("test_multi_groups");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(test_groups_threads_match, &seed),
        cmocka_unit_test_prestate(test_groups_processes_match, &seed),
        cmocka_unit_test_prestate(test_groups_64_ranks_match, &seed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
