/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Numbers near every border: operations and tiles are counted in 64 bits, travel as 8, and must not
 * care where they are. All counters of a fresh ep are set ahead, alike on all ranks, as if so much
 * had happened before; then random operations run over the border, every element against the
 * oracle. The counts of an operation (32 bits) have a limit that creation checks.
 */
#include <string.h>

#include "dispatch/ep.h"
#include "tests/multi/world.h"
#include "tests/unit/cmocka_all.h"

enum { STEPS = 80 };

static const struct nep_multi_shape shapes[] = {
    {.name = "packed",
     .num_nodes = 2,
     .ranks_per_node = {2, 2},
     .experts = 8,
     .top_k = 3,
     .hidden = 32,
     .max_tokens = 1100, /* five tiles: credits travel */
     .layout = NEP_LAYOUT_EXPERT_PACKED,
     .outstanding = 2,
     .inter = "adversary:loop",
     .seed = 5,
     .timeout_ns = 30000000000ull},
    {.name = "private",
     .num_nodes = 3,
     .ranks_per_node = {1, 2, 1},
     .experts = 8,
     .top_k = 2,
     .hidden = 32,
     .max_tokens = 600,
     .layout = NEP_LAYOUT_RANK,
     .is_private = true,
     .seed = 6,
     .timeout_ns = 30000000000ull},
};

struct plan {
    const struct nep_multi_shape *shape;
    uint64_t start;
};

static void shift_words(struct nep_ep *ep, uint64_t offset, uint64_t num, uint64_t start)
{
    for (uint64_t i = 0; i < num; i++) {
        nep_word_set(ep->head, offset, i, start);
    }
}

static void shift_flow(struct nep_flow *flow, uint64_t start)
{
    flow->planned = flow->next = flow->implicit = start;
    for (size_t i = 0; i < sizeof flow->end / sizeof flow->end[0]; i++) {
        flow->end[i] = start;
    }
}

static void shift_inflow(struct nep_inflow *inflow, uint64_t start)
{
    inflow->planned = inflow->next = inflow->announced = start;
    for (size_t i = 0; i < sizeof inflow->end / sizeof inflow->end[0]; i++) {
        inflow->end[i] = start;
    }
}

/* As if `start` operations, and tiles of every stream, were behind this rank. */
static void shift(struct nep_ep *ep, uint64_t start)
{
    const struct nep_region *region = ep->region;
    uint32_t num_ranks = ep->plan.topology->num_ranks, num_nodes = ep->plan.topology->num_nodes;
    ep->next_op = ep->completed_op = start;
    atomic_store(&ep->head->completed, start);
    for (uint32_t n = 0; n < num_nodes; n++) {
        shift_flow(&ep->dispatch_flows[n], start);
        shift_inflow(&ep->combine_in[n], start);
    }
    for (uint32_t l = 0; l < region->num_lanes; l++) {
        shift_flow(&ep->combine_flows[l], start);
    }
    for (uint32_t r = 0; r < num_ranks; r++) {
        shift_inflow(&ep->dispatch_in[r], start);
    }
    shift_words(ep, region->dispatch_read, num_ranks, start);
    shift_words(ep, region->combine_read, num_nodes, start);
    shift_words(ep, region->dispatch_credit, num_nodes, start);
    shift_words(ep, region->dispatch_sent, num_nodes, start);
    shift_words(ep, region->combine_credit, region->num_lanes, start);
    shift_words(ep, region->combine_sent, region->num_lanes, start);
}

static bool run_rank(struct nep_multi_rank *rank)
{
    const struct plan *plan = rank->arg;
    struct nep_multi_world world;
    bool is_fine = nep_multi_world_create(rank, plan->shape, 3, &world);
    if (is_fine) {
        shift(world.ep, plan->start);
        is_fine = nep_multi_barrier(rank) && nep_multi_random_schedule(&world, plan->start, STEPS);
    }
    uint64_t end = is_fine ? world.ep->completed_op : 0;
    if (is_fine && end < plan->start + 8) {
        is_fine = nep_multi_fail(rank, "only %llu operations crossed the border",
                                 (unsigned long long)(end - plan->start));
    }
    if (is_fine) {
        nep_multi_world_destroy(&world);
    }
    return is_fine;
}

static void run(uint64_t start)
{
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        struct plan plan = {&shapes[i], start};
        struct nep_multi_result result;
        nep_multi_run_threads(nep_multi_num_ranks(plan.shape), run_rank, &plan, &result);
        if (result.num_failed != 0) {
            fail_msg("%s from %llu on: %u ranks failed: %s", shapes[i].name,
                     (unsigned long long)start, result.num_failed, result.error);
        }
    }
}

static void test_wrap_8_bits_of_the_immediate(void **state)
{
    (void)state;
    run(250);
}

static void test_wrap_31_and_32_bits(void **state)
{
    (void)state;
    run((1ull << 31) - 6);
    run((1ull << 32) - 6);
}

static void test_wrap_sign_of_64_bits(void **state)
{
    (void)state;
    run((1ull << 63) - 6);
}

/* 2^32 rows of one rank do not fit the counts: refused, with the number. */
static void test_wrap_rows_beyond_32_bits_refused(void **state)
{
    (void)state;
    static uint32_t nodes[4096], locals[4096], sizes[1] = {4096};
    for (uint32_t r = 0; r < 4096; r++) {
        locals[r] = r;
    }
    struct nep_topology topology = {.size = sizeof topology,
                                    .num_ranks = 4096,
                                    .num_nodes = 1,
                                    .node_of_rank = nodes,
                                    .local_of_rank = locals,
                                    .node_ranks = sizes};
    struct nep_ep_params params = {.size = sizeof params,
                                   .num_experts = 4096,
                                   .top_k = 1,
                                   .hidden = 16,
                                   .max_tokens = 1 << 20};
    struct nep_memory memory = {.size = sizeof memory};
    assert_int_equal(nep_ep_memory(&params, &topology, &memory), NEP_ERR_INVALID);
    assert_non_null(strstr(nep_last_message(), "more than 2^32"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_wrap_8_bits_of_the_immediate),
        cmocka_unit_test(test_wrap_31_and_32_bits),
        cmocka_unit_test(test_wrap_sign_of_64_bits),
        cmocka_unit_test(test_wrap_rows_beyond_32_bits_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
