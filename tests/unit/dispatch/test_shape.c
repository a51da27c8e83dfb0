/* SPDX-License-Identifier: Apache-2.0 */
/* Impossible shapes are refused with the field and the limit; pools and flows keep their books. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch/flow.h"
#include "dispatch/pool.h"
#include "dispatch/shape.h"
#include "tests/unit/cmocka_all.h"
#include "transport/topology.h"

static enum nep_status try_shape(struct nep_ep_params params, struct nep_shape *shape)
{
    static const uint32_t sizes[] = {2, 2};
    struct nep_config config;
    struct nep_topology_store *store;
    struct nep_topology topology;
    assert_int_equal(nep_config_load_from(&config, (const char *const[]){NULL}), NEP_OK);
    assert_int_equal(nep_topology_from_sizes(sizes, 2, 0, &store, &topology), NEP_OK);
    enum nep_status status = nep_shape_init(shape, &params, &topology, &config);
    nep_topology_destroy(store);
    return status;
}

static struct nep_ep_params good(void)
{
    return (struct nep_ep_params){.size = sizeof(struct nep_ep_params),
                                  .num_experts = 9,
                                  .top_k = 3,
                                  .hidden = 32,
                                  .max_tokens = 300};
}

static void test_shape_defaults_are_filled(void **state)
{
    (void)state;
    struct nep_shape shape;
    assert_int_equal(try_shape(good(), &shape), NEP_OK);
    assert_int_equal(shape.slots_per_rank, 3); /* ceil(9 / 4) */
    assert_int_equal(shape.window, 2);
    assert_int_equal(shape.dtype, NEP_DTYPE_BF16);
    assert_int_equal(shape.layout, NEP_LAYOUT_EXPERT_PACKED);
    assert_int_equal(shape.tile_rows, 64);
    assert_int_equal(shape.row_bytes, 64);
    assert_int_equal(shape.meta_bytes, 24); /* 4 + 2 * 4 (three 16-bit slots and a pad) + 12 */
}

/* W for each tile of the largest batch, of which 8 count; numbers of tiles wrap at 256. */
static void test_shape_tile_slots_follow_batch_and_window(void **state)
{
    (void)state;
    static const struct {
        uint32_t max_tokens, outstanding, rows, slots;
    } rows[] = {
        {1, 1, 1, 2},    {64, 1, 64, 2},    {65, 1, 64, 4},    {512, 1, 64, 16}, {8192, 1, 64, 16},
        {128, 2, 64, 8}, {4096, 4, 64, 64}, {4096, 8, 64, 64}, {7, 8, 7, 16},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct nep_ep_params params = good();
        struct nep_shape shape;
        params.max_tokens = rows[i].max_tokens;
        params.outstanding = rows[i].outstanding;
        assert_int_equal(try_shape(params, &shape), NEP_OK);
        assert_int_equal(shape.tile_rows, rows[i].rows);
        assert_int_equal(shape.tile_slots, rows[i].slots);
    }
}

static void test_shape_impossible_names_the_field(void **state)
{
    (void)state;
    struct nep_ep_params base = good();
    const struct {
        const char *word;
        size_t offset;
        uint32_t value;
    } rows[] = {
        {"num_experts", offsetof(struct nep_ep_params, num_experts), 0},
        {"top_k", offsetof(struct nep_ep_params, top_k), 0},
        {"top_k", offsetof(struct nep_ep_params, top_k), 33},
        {"hidden", offsetof(struct nep_ep_params, hidden), 24},
        {"hidden", offsetof(struct nep_ep_params, hidden), 0},
        {"max_tokens", offsetof(struct nep_ep_params, max_tokens), 0},
        {"max_tokens", offsetof(struct nep_ep_params, max_tokens), UINT32_MAX},
        {"outstanding", offsetof(struct nep_ep_params, outstanding), 9},
        {"slots", offsetof(struct nep_ep_params, slots_per_rank), 2},
        {"dtype", offsetof(struct nep_ep_params, dtype), NEP_DTYPE_FP8_E4M3},
        {"layout", offsetof(struct nep_ep_params, layout), 9},
        {"row_bytes", offsetof(struct nep_ep_params, row_bytes), 64},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct nep_ep_params params = base;
        struct nep_shape shape;
        memcpy((uint8_t *)&params + rows[i].offset, &rows[i].value, sizeof rows[i].value);
        enum nep_status status = try_shape(params, &shape);
        assert_true(status == NEP_ERR_INVALID || status == NEP_ERR_UNSUPPORTED);
        if (strstr(nep_last_message(), rows[i].word) == NULL) {
            fail_msg("\"%s\" does not name %s", nep_last_message(), rows[i].word);
        }
    }
}

static void test_pool_random_use_never_overlaps(void **state)
{
    (void)state;
    enum { BYTES = 64 * 4096, NUM = 40 };
    uint8_t *memory = aligned_alloc(4096, BYTES);
    assert_non_null(memory);
    struct nep_pool pool;
    nep_pool_init(&pool, memory, BYTES);
    uint8_t *held[NUM] = {0};
    size_t sizes[NUM] = {0};
    unsigned seed = 20261124;
    printf("seed %u\n", seed);
    for (int step = 0; step < 20000; step++) {
        int i = rand_r(&seed) % NUM;
        if (held[i] != NULL) {
            for (size_t b = 0; b < sizes[i]; b += 512) {
                assert_int_equal(held[i][b], i + 1);
            }
            assert_true(nep_pool_holds(&pool, held[i], sizes[i]));
            assert_true(nep_pool_give(&pool, held[i]));
            assert_false(nep_pool_holds(&pool, held[i], 1));
            held[i] = NULL;
        } else {
            sizes[i] = 1 + (size_t)rand_r(&seed) % (5 * 4096);
            void *buffer;
            assert_int_equal(nep_pool_take(&pool, sizes[i], &buffer), NEP_OK);
            held[i] = buffer;
            if (buffer != NULL) {
                memset(held[i], i + 1, sizes[i]);
            }
        }
    }
    nep_pool_fini(&pool);
    free(memory);
}

/* One tile an operation: sender and receiver agree that no credit message is ever needed. */
static void test_flow_single_tiles_need_no_credit(void **state)
{
    (void)state;
    for (uint32_t outstanding = 1; outstanding <= NEP_MAX_OUTSTANDING; outstanding++) {
        uint32_t window = 2 * outstanding;
        struct nep_flow flow = {0};
        struct nep_inflow inflow = {0};
        for (uint64_t op = 0; op < 1000; op++) {
            if (op >= outstanding) {
                nep_flow_complete(&flow, op - outstanding, window);
            }
            nep_flow_begin(&flow, op, window, 1);
            assert_true(nep_flow_may_send(&flow, 0, window));
            flow.next++;
            assert_true(nep_inflow_begin(&inflow, op, window, flow.planned, 1));
            assert_false(nep_inflow_needs_credit(&inflow, window));
        }
    }
}

static void test_flow_many_tiles_stop_at_the_window(void **state)
{
    (void)state;
    struct nep_flow flow = {0};
    struct nep_inflow inflow = {0};
    nep_flow_begin(&flow, 0, 2, 5);
    assert_true(nep_inflow_begin(&inflow, 0, 2, 5, 5));
    assert_true(nep_inflow_needs_credit(&inflow, 2));
    flow.next = 2;
    assert_false(nep_flow_may_send(&flow, 0, 2));
    assert_true(nep_flow_may_send(&flow, 1, 2));
    assert_false(nep_inflow_begin(&inflow, 1, 2, 9, 5)); /* an end that does not follow */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shape_defaults_are_filled),
        cmocka_unit_test(test_shape_tile_slots_follow_batch_and_window),
        cmocka_unit_test(test_shape_impossible_names_the_field),
        cmocka_unit_test(test_pool_random_use_never_overlaps),
        cmocka_unit_test(test_flow_single_tiles_need_no_credit),
        cmocka_unit_test(test_flow_many_tiles_stop_at_the_window),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
