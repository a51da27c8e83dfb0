/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sink on a region of its own: what ticks, what is dropped, near the wrap of 8 bits and of 32.
 * The group: 2 nodes of 2 ranks; the region is rank 0's, whose lane source is rank 2.
 */
#include <stdlib.h>
#include <string.h>

#include "dispatch/protocol.h"
#include "tests/unit/cmocka_all.h"
#include "transport/topology.h"

struct fixture {
    struct nep_topology_store *store;
    struct nep_topology topology;
    struct nep_shape shape;
    struct nep_plan plan;
    uint8_t *base;
    struct nep_region_head *head;
};

static struct nep_ep_params small(void)
{
    return (struct nep_ep_params){.size = sizeof(struct nep_ep_params),
                                  .num_experts = 8,
                                  .top_k = 2,
                                  .hidden = 16,
                                  .max_tokens = 4,
                                  .outstanding = 2,
                                  .pool_bytes = 4096};
}

static void open_region(struct fixture *f, const uint32_t *sizes, uint32_t num_nodes, uint32_t rank)
{
    struct nep_config config;
    struct nep_ep_params params = small();
    memset(f, 0, sizeof *f);
    assert_int_equal(nep_config_load_from(&config, (const char *const[]){NULL}), NEP_OK);
    assert_int_equal(nep_topology_from_sizes(sizes, num_nodes, rank, &f->store, &f->topology),
                     NEP_OK);
    assert_int_equal(nep_shape_init(&f->shape, &params, &f->topology, &config), NEP_OK);
    assert_int_equal(nep_plan_init(&f->plan, &f->shape, &f->topology), NEP_OK);
    const struct nep_region *region = &f->plan.regions[rank];
    f->base = aligned_alloc(4096, region->bytes);
    assert_non_null(f->base);
    memset(f->base, 0, region->bytes);
    f->head = (struct nep_region_head *)f->base;
    f->head->rank = rank;
    f->head->num_ranks = f->topology.num_ranks;
    f->head->window = f->shape.window;
    f->head->tile_slots = f->shape.tile_slots;
    f->head->region = *region;
    struct nep_directory *directory = (struct nep_directory *)(f->base + region->directory);
    for (uint32_t r = 0; r < f->topology.num_ranks; r++) {
        bool is_lane = f->topology.node_of_rank[r] != f->topology.node &&
                       nep_plan_landing(&f->plan, r, f->topology.node) == rank;
        directory[r] = (struct nep_directory){nep_plan_control(&f->plan, rank, r),
                                              is_lane ? nep_plan_lane(&f->plan, r, f->topology.node)
                                                      : UINT32_MAX,
                                              f->topology.node_of_rank[r], 0};
    }
}

static void close_region(struct fixture *f)
{
    free(f->base);
    nep_plan_fini(&f->plan);
    nep_topology_destroy(f->store);
}

static const uint32_t two_by_two[] = {2, 2};

static void test_imm_fields_survive(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 4096; i++) {
        uint32_t imm = nep_imm(i, (enum nep_kind)(i % 6), i * 7, i * 13, i * 5);
        assert_int_equal(nep_imm_generation(imm), i % 8);
        assert_int_equal(nep_imm_kind(imm), i % 6);
        assert_int_equal(nep_imm_ep(imm), i * 7 % 64);
        assert_int_equal(nep_imm_op(imm), i * 13 % 256);
        assert_int_equal(nep_imm_number(imm), i * 5 % 256);
        assert_int_equal(imm & 15, 0);
    }
}

/* Walks numbers across the wraps of 8 and 32 bits: each lands in its slot once, a repeat is
 * counted. */
static void test_sink_tiles_tick_across_wraps(void **state)
{
    (void)state;
    struct fixture f;
    open_region(&f, two_by_two, 2, 0);
    const uint64_t starts[] = {0, 250, (1ull << 32) - 6, (1ull << 40) + 251};
    uint64_t slots = f.shape.tile_slots;
    for (size_t i = 0; i < sizeof starts / sizeof starts[0]; i++) {
        for (uint64_t q = starts[i]; q < starts[i] + 16; q++) {
            nep_word_set(f.base, f.head->region.dispatch_read, 2, q);
            uint64_t ahead = q + slots - 1; /* the farthest that a credit allows */
            uint32_t imm = nep_imm(0, NEP_KIND_DISPATCH, 0, 0, ahead);
            uint64_t repeats = atomic_load(&f.head->duplicates);
            bool is_new =
                nep_word_get(f.base, f.head->region.dispatch_word, ahead % slots) != ahead + 1;
            nep_arrive(f.base, 0, 2, imm);
            assert_int_equal(nep_word_get(f.base, f.head->region.dispatch_word, ahead % slots),
                             ahead + 1);
            nep_arrive(f.base, 0, 2, imm);
            assert_int_equal(atomic_load(&f.head->duplicates), repeats + 1 + !is_new);
        }
    }
    assert_int_equal(atomic_load(&f.head->stale), 0);
    close_region(&f);
}

static void test_sink_outside_window_is_stale(void **state)
{
    (void)state;
    struct fixture f;
    open_region(&f, two_by_two, 2, 0);
    nep_word_set(f.base, f.head->region.dispatch_read, 2, 1000);
    nep_arrive(f.base, 0, 2, nep_imm(0, NEP_KIND_DISPATCH, 0, 0, 999));
    nep_arrive(f.base, 0, 2, nep_imm(0, NEP_KIND_DISPATCH, 0, 0, 1000 + f.shape.tile_slots));
    atomic_store(&f.head->completed, 77);
    nep_arrive(f.base, 0, 2, nep_imm(0, NEP_KIND_COUNTS, 0, 76, 0));
    assert_int_equal(atomic_load(&f.head->stale), 3);
    for (uint32_t w = 0; w < f.shape.tile_slots; w++) {
        assert_int_equal(nep_word_get(f.base, f.head->region.dispatch_word, w), 0);
    }
    close_region(&f);
}

/* Ranks that never send such a message here, other generations, unknown kinds and ranks. */
static void test_sink_strangers_are_dropped(void **state)
{
    (void)state;
    struct fixture f;
    open_region(&f, two_by_two, 2, 0);
    uint8_t *before = malloc(f.head->region.bytes);
    assert_non_null(before);
    const struct {
        uint32_t src, imm;
    } rows[] = {
        {3, nep_imm(0, NEP_KIND_DISPATCH, 0, 0, 0)}, /* lands at rank 1 */
        {1, nep_imm(0, NEP_KIND_COUNTS, 0, 0, 0)},   /* of this node */
        {0, nep_imm(0, NEP_KIND_COUNTS, 0, 0, 0)},   /* itself */
        {4, nep_imm(0, NEP_KIND_COUNTS, 0, 0, 0)},
        {UINT32_MAX, nep_imm(0, NEP_KIND_COUNTS, 0, 0, 0)},
        {2, nep_imm(1, NEP_KIND_COUNTS, 0, 0, 0)},
        {2, nep_imm(0, (enum nep_kind)7, 0, 0, 0)},
        {3, nep_imm(0, NEP_KIND_COMBINE_CREDIT, 0, 0, 1)},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        atomic_store(&f.head->stale, 0);
        memcpy(before, f.base, f.head->region.bytes);
        nep_arrive(f.base, 0, rows[i].src, rows[i].imm);
        assert_int_equal(atomic_load(&f.head->stale), 1);
        atomic_store(&f.head->stale, 0);
        assert_memory_equal(before, f.base, f.head->region.bytes);
    }
    free(before);
    close_region(&f);
}

static void test_sink_credits_only_rise(void **state)
{
    (void)state;
    struct fixture f;
    open_region(&f, two_by_two, 2, 0);
    const struct nep_region *region = &f.head->region;
    nep_word_set(f.base, region->dispatch_sent, 1, 300);
    nep_word_set(f.base, region->dispatch_credit, 1, 290);
    nep_arrive(f.base, 0, 2, nep_imm(0, NEP_KIND_DISPATCH_CREDIT, 0, 0, 299));
    assert_int_equal(nep_word_get(f.base, region->dispatch_credit, 1), 299);
    nep_arrive(f.base, 0, 2, nep_imm(0, NEP_KIND_DISPATCH_CREDIT, 0, 0, 295)); /* older */
    nep_arrive(f.base, 0, 2, nep_imm(0, NEP_KIND_DISPATCH_CREDIT, 0, 0, 301)); /* never sent */
    assert_int_equal(nep_word_get(f.base, region->dispatch_credit, 1), 299);
    assert_int_equal(atomic_load(&f.head->stale), 2);
    close_region(&f);
}

static void test_sink_leave_keeps_the_first_culprit(void **state)
{
    (void)state;
    struct fixture f;
    open_region(&f, two_by_two, 2, 0);
    nep_arrive(f.base, 0, 2, nep_imm(0, NEP_KIND_LEAVE, 0, 0x123 >> 8, 0x123 & 255));
    nep_arrive(f.base, 0, 2, nep_imm(0, NEP_KIND_LEAVE, 0, 0, 1));
    assert_int_equal(atomic_load(&f.head->fault), 0x123 + 1);
    close_region(&f);
}

/* For every group: who lands what, each slot used by one pair alone, no two arrays overlap. */
static void test_plan_indexes_are_unique(void **state)
{
    (void)state;
    static const uint32_t groups[][5] = {{1},       {4},       {2, 2},         {1, 2, 5},
                                         {5, 2, 1}, {3, 3, 3}, {1, 1, 1, 1, 1}};
    static const uint32_t nums[] = {1, 1, 2, 3, 3, 3, 5};
    for (size_t i = 0; i < sizeof nums / sizeof nums[0]; i++) {
        struct fixture f;
        open_region(&f, groups[i], nums[i], 0);
        uint32_t num_ranks = f.topology.num_ranks;
        for (uint32_t y = 0; y < num_ranks; y++) {
            const struct nep_region *region = &f.plan.regions[y];
            uint32_t node = f.topology.node_of_rank[y];
            uint8_t controls[64] = {0}, lanes[64] = {0};
            uint32_t num_controls = 0, num_lanes = 0;
            for (uint32_t x = 0; x < num_ranks; x++) {
                uint32_t control = nep_plan_control(&f.plan, y, x);
                bool is_far = f.topology.node_of_rank[x] != node;
                bool lands = is_far && nep_plan_landing(&f.plan, x, node) == y;
                bool is_landing =
                    is_far && nep_plan_landing(&f.plan, y, f.topology.node_of_rank[x]) == x;
                assert_int_equal(control != UINT32_MAX, x == y || lands || is_landing);
                if (control != UINT32_MAX) {
                    assert_in_range(control, 0, region->num_controls - 1);
                    assert_int_equal(controls[control]++, 0);
                    num_controls++;
                }
                if (lands) {
                    uint32_t lane = nep_plan_lane(&f.plan, x, node);
                    assert_in_range(lane, 0, region->num_lanes - 1);
                    assert_int_equal(lanes[lane]++, 0);
                    num_lanes++;
                }
            }
            assert_int_equal(num_controls, region->num_controls);
            assert_int_equal(num_lanes, region->num_lanes);
            assert_true(region->words_end <= region->counts);
            assert_true(region->bytes <= f.plan.pool_offset);
        }
        close_region(&f);
    }
}

/* The budget of the project: 64 ranks of 8, 128 tokens of 7168 bf16, both directions. */
static void test_plan_memory_is_in_budget(void **state)
{
    (void)state;
    uint32_t sizes[8] = {8, 8, 8, 8, 8, 8, 8, 8};
    struct nep_topology_store *store;
    struct nep_topology topology;
    assert_int_equal(nep_topology_from_sizes(sizes, 8, 9, &store, &topology), NEP_OK);
    struct nep_ep_params params = {
        .size = sizeof params, .num_experts = 256, .top_k = 8, .hidden = 7168, .max_tokens = 128};
    struct nep_memory memory;
    assert_int_equal(nep_ep_memory(&params, &topology, &memory), NEP_OK);
    assert_true(memory.region_bytes < 128ull << 20);
    assert_true(memory.staging_bytes <= 16ull << 20);
    assert_int_equal(memory.region_bytes, memory.control_bytes + memory.dispatch_landing_bytes +
                                              memory.combine_landing_bytes + memory.send_bytes +
                                              memory.home_bytes + memory.staging_bytes);
    nep_topology_destroy(store);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_imm_fields_survive),
        cmocka_unit_test(test_sink_tiles_tick_across_wraps),
        cmocka_unit_test(test_sink_outside_window_is_stale),
        cmocka_unit_test(test_sink_strangers_are_dropped),
        cmocka_unit_test(test_sink_credits_only_rise),
        cmocka_unit_test(test_sink_leave_keeps_the_first_culprit),
        cmocka_unit_test(test_plan_indexes_are_unique),
        cmocka_unit_test(test_plan_memory_is_in_budget),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
