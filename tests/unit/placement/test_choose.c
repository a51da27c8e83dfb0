/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nep_choose against its rules, stated here a second time and slowly, and against the smallest
 * number of remote nodes found by trying every combination of copies.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "placement/choose.h"
#include "placement/map.h"
#include "placement/rng.h"
#include "tests/unit/cmocka_all.h"

#define MAX_K 6

static struct nep_map *random_map(struct nep_rng *rng, uint32_t nodes, uint32_t ranks,
                                  uint32_t slots, uint32_t experts)
{
    uint32_t sizes[16];
    for (uint32_t n = 0; n < nodes; n++) {
        sizes[n] = ranks;
    }
    struct nep_map_shape shape = {sizeof shape, 1, experts, nodes, nodes * ranks, slots, sizes};
    uint32_t total = nodes * ranks * slots;
    uint32_t *order = malloc(total * sizeof *order);
    struct nep_map_entry *entries = malloc(total * sizeof *entries);
    for (uint32_t i = 0; i < total; i++) {
        order[i] = i;
    }
    nep_rng_shuffle(rng, order, total);
    uint32_t num = 0;
    for (uint32_t i = 0; i < total; i++) {
        uint32_t expert = i < experts ? i : nep_rng_below(rng, experts);
        if (i < experts || nep_rng_below(rng, 10) < 7) {
            entries[num++] = (struct nep_map_entry){0, expert, order[i],
                                                    (uint16_t)(1 + nep_rng_below(rng, 5)), 0};
        }
    }
    struct nep_map *map = NULL;
    assert_int_equal(nep_map_build(&shape, entries, num, &map), NEP_OK);
    free(order);
    free(entries);
    return map;
}

static uint32_t remote_nodes(const struct nep_copies *copies, uint32_t source,
                             const uint32_t *slots, uint32_t k)
{
    uint32_t num = 0;
    for (uint32_t n = 0; n < copies->num_nodes; n++) {
        int is_used = 0;
        for (uint32_t i = 0; i < k; i++) {
            is_used |= slots[i] != NEP_SLOT_NONE &&
                       copies->node_of_rank[slots[i] / copies->slots_per_rank] == n;
        }
        num += is_used && n != copies->node_of_rank[source];
    }
    return num;
}

static uint32_t best_remote(const struct nep_copies *copies, uint32_t source, const int32_t *ids,
                            uint32_t k, uint32_t at, uint32_t *slots)
{
    if (at == k) {
        return remote_nodes(copies, source, slots, k);
    }
    if (ids[at] < 0) {
        slots[at] = NEP_SLOT_NONE;
        return best_remote(copies, source, ids, k, at + 1, slots);
    }
    uint32_t best = UINT32_MAX;
    for (uint32_t c = copies->begin[ids[at]]; c < copies->begin[ids[at] + 1]; c++) {
        slots[at] = copies->slot[c];
        uint32_t here = best_remote(copies, source, ids, k, at + 1, slots);
        best = here < best ? here : best;
    }
    return best;
}

static int has_copy(const struct nep_copies *copies, int32_t id, uint32_t node, uint32_t rank)
{
    for (uint32_t c = copies->begin[id]; c < copies->begin[id + 1]; c++) {
        uint32_t r = copies->slot[c] / copies->slots_per_rank;
        if ((rank == UINT32_MAX || r == rank) && copies->node_of_rank[r] == node) {
            return 1;
        }
    }
    return 0;
}

static int holds(const struct nep_copies *copies, int32_t id, uint32_t slot)
{
    for (uint32_t c = copies->begin[id]; c < copies->begin[id + 1]; c++) {
        if (copies->slot[c] == slot) {
            return 1;
        }
    }
    return 0;
}

/* Every rule that one token's answer must keep. Returns remote nodes - the smallest possible. */
static uint32_t check_token(const struct nep_copies *copies, uint32_t source, uint32_t token,
                            const int32_t *ids, uint32_t k)
{
    uint32_t slots[MAX_K];
    uint32_t again[MAX_K];
    uint32_t scratch[MAX_K];
    uint32_t home = copies->node_of_rank[source];
    memset(slots, 0xee, sizeof slots);
    memset(again, 0x11, sizeof again);
    nep_choose(copies, source, token, ids, k, slots);
    nep_choose(copies, source, token, ids, k, again);
    assert_memory_equal(slots, again, k * sizeof *slots);
    for (uint32_t i = 0; i < k; i++) {
        if (ids[i] < 0) {
            assert_int_equal(slots[i], NEP_SLOT_NONE);
            continue;
        }
        assert_true(holds(copies, ids[i], slots[i]));
        uint32_t rank = slots[i] / copies->slots_per_rank;
        if (has_copy(copies, ids[i], home, source)) {
            assert_int_equal(rank, source);
        } else if (has_copy(copies, ids[i], home, UINT32_MAX)) {
            assert_int_equal(copies->node_of_rank[rank], home);
        }
    }
    uint32_t mine = remote_nodes(copies, source, slots, k);
    uint32_t best = best_remote(copies, source, ids, k, 0, scratch);
    assert_true(mine >= best);
    /* Greedy set cover: at most H(k) times the best; H(6) = 2.45. */
    assert_true(mine <= best * 2.45 + 1e-9);
    return mine - best;
}

static void test_choose_random_maps_keeps_the_rules(void **state)
{
    (void)state;
    uint64_t seed = (uint64_t)time(NULL);
    print_message("seed %llu\n", (unsigned long long)seed);
    struct nep_rng rng = nep_rng_seed(seed);
    uint64_t over = 0;
    uint64_t tokens = 0;
    for (int round = 0; round < 150; round++) {
        uint32_t nodes = 1 + nep_rng_below(&rng, 6);
        uint32_t ranks = 1 + nep_rng_below(&rng, 3);
        uint32_t experts = 4 + nep_rng_below(&rng, 20);
        uint32_t slots = (experts + nodes * ranks - 1) / (nodes * ranks) + nep_rng_below(&rng, 4);
        struct nep_map *map = random_map(&rng, nodes, ranks, slots, experts);
        struct nep_copies copies;
        assert_int_equal(nep_map_copies(map, 0, &copies), NEP_OK);
        for (uint32_t t = 0; t < 60; t++) {
            int32_t ids[MAX_K];
            uint32_t k = nep_rng_below(&rng, MAX_K + 1);
            for (uint32_t i = 0; i < k; i++) {
                ids[i] = (int32_t)nep_rng_below(&rng, experts + 1) - 1;
            }
            over += check_token(&copies, nep_rng_below(&rng, nodes * ranks), t, ids, k);
            tokens++;
        }
        nep_map_destroy(map);
    }
    print_message("greedy above the best: %llu nodes over %llu tokens\n", (unsigned long long)over,
                  (unsigned long long)tokens);
    /* Many copies each, worse than any real map: still within 5 % of a node a token. */
    assert_true(over * 20 < tokens);
}

/* Two remote copies, nothing else: shares follow the weights. */
static void test_choose_weights_share_the_tokens(void **state)
{
    (void)state;
    const uint32_t begin[] = {0, 2};
    const uint32_t slot[] = {1, 2};
    const uint32_t node[] = {1, 2};
    const uint16_t weight[] = {1, 3};
    const uint32_t node_of_rank[] = {0, 1, 2};
    const struct nep_copies copies = {1, 3, 3, 1, begin, slot, node, weight, node_of_rank, 0};
    int32_t id = 0;
    uint32_t at_two = 0;
    for (uint32_t t = 0; t < 20000; t++) {
        uint32_t chosen;
        nep_choose(&copies, 0, t, &id, 1, &chosen);
        at_two += chosen == 2;
    }
    /* 15000 expected, standard deviation 61: ten of them. */
    assert_in_range(at_two, 14390, 15610);
}

static void test_choose_single_copies_are_looked_up(void **state)
{
    (void)state;
    const uint32_t sizes[] = {2, 2};
    struct nep_map_shape shape = {sizeof shape, 1, 8, 2, 4, 0, sizes};
    struct nep_map *map;
    assert_int_equal(nep_map_contiguous(&shape, &map), NEP_OK);
    struct nep_copies copies;
    assert_int_equal(nep_map_copies(map, 0, &copies), NEP_OK);
    assert_true(copies.is_single);
    const int32_t ids[] = {7, -1, 0, 3};
    uint32_t slots[4];
    nep_choose(&copies, 1, 5, ids, 4, slots);
    const uint32_t expected[] = {7, NEP_SLOT_NONE, 0, 3};
    assert_memory_equal(slots, expected, sizeof slots);
    nep_map_destroy(map);
}

/* No assertion on time; the figure is for people. E = 256, K = 8, 8 nodes, 32 replicas. */
static void test_choose_cost_is_printed(void **state)
{
    (void)state;
    struct nep_rng rng = nep_rng_seed(1);
    struct nep_map *map = random_map(&rng, 8, 1, 36, 256);
    struct nep_copies copies;
    assert_int_equal(nep_map_copies(map, 0, &copies), NEP_OK);
    enum { NUM = 4096, ROUNDS = 8 };
    int32_t *ids = malloc(NUM * 8 * sizeof *ids);
    for (uint32_t i = 0; i < NUM * 8; i++) {
        ids[i] = (int32_t)nep_rng_below(&rng, 256);
    }
    uint32_t slots[8];
    uint32_t sum = 0;
    uint64_t best = UINT64_MAX;
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t start = nep_now_ns();
        for (uint32_t t = 0; t < NUM; t++) {
            nep_choose(&copies, t % 8, t, &ids[t * 8], 8, slots);
            sum += slots[0];
        }
        uint64_t spent = nep_now_ns() - start;
        best = spent < best ? spent : best;
    }
    print_message("nep_choose: %.0f ns a token (check %u)\n", (double)best / NUM, sum);
    assert_true(sum > 0);
    free(ids);
    nep_map_destroy(map);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_choose_random_maps_keeps_the_rules),
        cmocka_unit_test(test_choose_weights_share_the_tokens),
        cmocka_unit_test(test_choose_single_copies_are_looked_up),
        cmocka_unit_test(test_choose_cost_is_printed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
