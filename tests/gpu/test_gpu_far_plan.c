/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a rank of a GPU needs over several nodes, over random groups and shapes: equal on all ranks
 * where peers rely on it, tables that do not overlap, everybody who sends being known to whom it
 * sends; and the refusals.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cmocka_all.h"
#include "dispatch/cuda/far_plan.h"

enum { MOST_RANKS = 24, ROUNDS = 200 };

struct group {
    struct nep_topology topology;
    uint32_t node_of_rank[MOST_RANKS];
    uint32_t local_of_rank[MOST_RANKS];
    uint32_t node_ranks[4];
};

static uint64_t random_state = 20261124;

static uint32_t below(uint32_t num)
{
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(random_state >> 33) % num;
}

static void draw_group(struct group *group)
{
    memset(group, 0, sizeof *group);
    uint32_t nodes = 2 + below(3), num = 0;
    for (uint32_t n = 0; n < nodes; n++) {
        group->node_ranks[n] = 1 + below(6);
        for (uint32_t g = 0; g < group->node_ranks[n]; g++) {
            group->node_of_rank[num] = n;
            group->local_of_rank[num++] = g;
        }
    }
    group->topology = (struct nep_topology){.size = sizeof group->topology,
                                            .num_ranks = num,
                                            .num_nodes = nodes,
                                            .node_of_rank = group->node_of_rank,
                                            .local_of_rank = group->local_of_rank,
                                            .node_ranks = group->node_ranks};
}

static struct nep_shape draw_shape(uint32_t num_ranks)
{
    static const enum nep_layout layouts[] = {NEP_LAYOUT_RANK, NEP_LAYOUT_EXPERT_PACKED,
                                              NEP_LAYOUT_EXPERT_PADDED, NEP_LAYOUT_EXPERT_FRONT};
    struct nep_shape shape = {
        .slots_per_rank = 1 + below(9),
        .top_k = 1 + below(32),
        .hidden = 16 * (1 + below(50)),
        .max_tokens = 1 + below(700),
        .alignment = 1 + below(8),
        .outstanding = 1 + below(8),
        .dtype = NEP_DTYPE_BF16,
        .layout = layouts[below(4)],
    };
    shape.num_experts = num_ranks * shape.slots_per_rank;
    shape.row_bytes = 2 * shape.hidden;
    shape.weights_bytes = 4 * shape.top_k;
    enum nep_dtype wire = below(2) ? NEP_DTYPE_BF16 : NEP_DTYPE_FP8_E4M3;
    assert_int_equal(
        nep_wire_init(&shape.format, NEP_DTYPE_BF16, wire, shape.hidden, NEP_SCALE_FP32), NEP_OK);
    shape.wire_row_bytes = shape.format.row_bytes;
    return shape;
}

/* Areas follow one another, and the last one ends inside. */
static void check_area(const struct nep_far_plan *far, const struct nep_region *region)
{
    const struct nep_far_output *out = &far->out;
    const struct nep_wire *wire = &far->shape.format;
    uint64_t rows = out->capacity;
    assert_true(region->send_counts <= out->x && out->x % 16 == 0);
    assert_true(out->x + rows * wire->payload_bytes <= out->scales);
    assert_true(out->scales + rows * wire->scale_bytes <= out->topk_slots);
    assert_true(out->topk_slots + rows * 4 <= out->topk_weights);
    assert_true(out->topk_weights + rows * 4 <= out->source_rank);
    assert_true(out->source_rank + rows * 4 <= out->source_token);
    assert_true(out->source_token + rows * 4 <= far->y && far->y % 16 == 0);
    uint64_t areas = far->shape.window / NEP_FAR_TILES;
    uint64_t weights = far->shape.layout == NEP_LAYOUT_RANK ? far->shape.weights_bytes : 0;
    assert_true(areas >= far->shape.outstanding && far->shape.window <= NEP_FAR_MAX_WINDOW);
    assert_int_equal(far->shape.window & (far->shape.window - 1), 0);
    assert_true(far->y_rows * far->shape.row_bytes <= far->y_step && far->y_step % 16 == 0);
    assert_true(far->y + areas * far->y_step <= far->y_weights);
    assert_true(far->y_rows * weights <= far->y_weights_step);
    assert_true(far->y_weights + areas * far->y_weights_step <= far->near_bytes);
    assert_true(region->home <= far->words_bytes);
}

/* Every table written to its end: the others must not change. */
static void check_handle(const struct nep_far_plan *far, uint32_t rank)
{
    struct nep_far_routing routing;
    uint64_t tokens = far->shape.max_tokens, nodes = far->plan.topology->num_nodes;
    uint64_t bytes = nep_far_plan_handle(far, rank, NULL, &routing);
    char *memory = calloc(1, bytes);
    assert_non_null(memory);
    assert_int_equal(nep_far_plan_handle(far, rank, memory, &routing), bytes);
    memset(routing.node_tokens, 1, nodes * tokens * 4);
    memset(routing.row_of, 2, nodes * tokens * 4);
    memset(routing.home_terms, 3, tokens * far->shape.top_k * sizeof *routing.home_terms);
    assert_int_equal(((uint8_t *)routing.node_tokens)[nodes * tokens * 4 - 1], 1);
    assert_int_equal(((uint8_t *)routing.row_of)[nodes * tokens * 4 - 1], 2);
    assert_int_equal(*(uint8_t *)routing.home_num, 0);
    assert_int_equal(*(uint8_t *)routing.node_rows, 0);
    assert_true((char *)routing.schedule < memory + bytes);
    free(memory);
}

static void check_tables(const struct nep_far_plan *far, uint32_t rank)
{
    struct nep_far_tables tables;
    const struct nep_topology *topology = far->plan.topology;
    uint32_t num = topology->num_ranks, node = topology->node_of_rank[rank];
    uint64_t bytes = nep_far_plan_tables(far, NULL, &tables);
    char *memory = malloc(bytes);
    assert_non_null(memory);
    assert_int_equal(nep_far_plan_tables(far, memory, &tables), bytes);
    nep_far_plan_fill_tables(far, rank, &tables);
    for (uint32_t s = 0; s < num; s++) {
        if (topology->node_of_rank[s] != node && tables.landing[node * num + s] == rank) {
            assert_int_equal(tables.lane_source[tables.lane[node * num + s]], s);
        }
        assert_int_equal(tables.control[rank * num + s], nep_plan_control(&far->plan, rank, s));
        assert_int_equal(tables.node_rank[tables.node_first[topology->node_of_rank[s]] +
                                          tables.local_of_rank[s]],
                         s);
    }
    assert_memory_equal(tables.regions, far->plan.regions, num * sizeof *tables.regions);
    free(memory);
}

static void test_random(void **state)
{
    (void)state;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        struct group group;
        struct nep_far_plan far, other;
        uint8_t knows[MOST_RANKS][MOST_RANKS] = {{0}};
        draw_group(&group);
        struct nep_shape shape = draw_shape(group.topology.num_ranks);
        uint64_t staging = below(3) == 0 ? 0 : 1 + below(1 << 20);
        assert_int_equal(nep_far_plan_init(&far, &shape, &group.topology, staging), NEP_OK);
        for (uint32_t r = 0; r < group.topology.num_ranks; r++) {
            uint32_t peers[MOST_RANKS];
            group.topology.rank = r;
            assert_int_equal(nep_far_plan_init(&other, &shape, &group.topology, staging), NEP_OK);
            assert_int_equal(other.near_bytes, far.near_bytes);
            assert_int_equal(other.words_bytes, far.words_bytes);
            assert_int_equal(other.y, far.y);
            check_area(&other, &other.plan.regions[r]);
            check_handle(&other, r);
            check_tables(&other, r);
            uint32_t num = nep_far_plan_peers(&other, r, peers);
            for (uint32_t i = 0; i < num; i++) {
                knows[r][peers[i]] = 1;
            }
            nep_far_plan_fini(&other);
        }
        for (uint32_t a = 0; a < group.topology.num_ranks; a++) {
            for (uint32_t b = 0; b < group.topology.num_ranks; b++) {
                assert_int_equal(knows[a][b], knows[b][a]);
            }
        }
        nep_far_plan_fini(&far);
    }
}

static void test_refusals(void **state)
{
    (void)state;
    struct group group;
    struct nep_far_plan far;
    draw_group(&group);
    struct nep_shape shape = draw_shape(group.topology.num_ranks);
    group.topology.num_ranks = NEP_FAR_MAX_RANKS + 1;
    assert_int_equal(nep_far_plan_init(&far, &shape, &group.topology, 0), NEP_ERR_UNSUPPORTED);
    assert_non_null(strstr(nep_last_message(), "at most 64 on 16"));
}

static void test_tile_rows(void **state)
{
    (void)state;
    assert_int_equal(nep_far_tile_rows(1), 1);
    assert_int_equal(nep_far_tile_rows(32), 32);
    assert_int_equal(nep_far_tile_rows(33), 17);
    assert_int_equal(nep_far_tile_rows(128), 64);
    assert_int_equal(nep_far_tile_rows(511), 256);
    assert_int_equal(nep_far_tile_rows(4096), 256);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_tile_rows),
    };
    printf("seed %llu\n", (unsigned long long)random_state);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
