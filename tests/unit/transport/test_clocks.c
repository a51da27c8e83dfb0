/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Clocks of ranks that are taken for those of other machines: their first exchange is changed on
 * the way. All read one clock in truth, so the answer is known: nobody is ahead.
 */
#include "tests/unit/transport/group.h"
#include "transport/clocks.h"

enum { NUM_RANKS = 4 };

/* A bootstrap around another, in which some ranks say in their first exchange that they are
 * elsewhere. */
struct elsewhere {
    const struct nep_bootstrap *inner;
    uint32_t num_exchanges;
    uint8_t where; /* 0: here */
};

static int allgather(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns)
{
    struct elsewhere *from = ctx;
    uint8_t mine[512];
    assert_true(bytes <= sizeof mine);
    memcpy(mine, in, bytes);
    if (from->num_exchanges++ == 0) {
        mine[bytes - 1] ^= from->where; /* its end: the status, if any, stands before it */
    }
    return from->inner->allgather(from->inner->ctx, mine, out, bytes, timeout_ns);
}

struct found {
    uint8_t where[NUM_RANKS];
    struct nep_clock clock[NUM_RANKS];
    uint32_t num_exchanges[NUM_RANKS];
};

static enum nep_status align(struct group_rank *rank)
{
    struct found *found = rank->run->arg;
    struct elsewhere elsewhere = {.inner = &rank->bootstrap, .where = found->where[rank->rank]};
    struct nep_bootstrap bootstrap = {
        .size = sizeof bootstrap, .ctx = &elsewhere, .allgather = allgather};
    memset(&found->clock[rank->rank], 0xa5, sizeof found->clock[0]);
    enum nep_status status = nep_clocks_align(&bootstrap, rank->rank, rank->run->num_ranks,
                                              20 * NEP_S, &found->clock[rank->rank]);
    found->num_exchanges[rank->rank] = elsewhere.num_exchanges;
    return status;
}

static void run(struct found *found)
{
    struct group_run run;
    group_run(&run, NUM_RANKS, 20 * NEP_S, align, found, 0);
    for (uint32_t r = 0; r < NUM_RANKS; r++) {
        if (run.ranks[r].open_status != NEP_OK || run.ranks[r].status != NEP_OK) {
            fail_msg("rank %u: %s", r, run.ranks[r].message);
        }
        assert_int_equal(found->num_exchanges[r], found->num_exchanges[0]);
        assert_true(found->clock[r].measured_ns <= nep_now_ns());
    }
}

static void test_clocks_of_one_machine_are_one(void **state)
{
    (void)state;
    struct found found = {.where = {0}};
    run(&found);
    for (uint32_t r = 0; r < NUM_RANKS; r++) {
        assert_int_equal(found.clock[r].ahead_ns, 0);
        assert_int_equal(found.clock[r].error_ns, 0);
    }
    assert_int_equal(found.num_exchanges[0], 1);
}

static void test_clocks_elsewhere_are_enclosed(void **state)
{
    (void)state;
    struct found found = {.where = {1, 0, 0, 2}}; /* rank 0 is alone where it is */
    run(&found);
    for (uint32_t r = 0; r < NUM_RANKS; r++) {
        int64_t ahead_ns = found.clock[r].ahead_ns;
        uint64_t error_ns = found.clock[r].error_ns;
        /* The bound holds: in truth it is 0 ahead. Between them lie gathers, which take time. */
        assert_true((uint64_t)(ahead_ns < 0 ? -ahead_ns : ahead_ns) <= error_ns);
        assert_true(error_ns > 0);
    }
    assert_true(found.num_exchanges[0] > NEP_CLOCK_ROUNDS);
}

static int refuse(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns)
{
    (void)ctx;
    (void)in;
    (void)out;
    (void)bytes;
    (void)timeout_ns;
    return -1;
}

static void test_clocks_failed_exchange_is_said(void **state)
{
    (void)state;
    struct nep_bootstrap bootstrap = {.size = sizeof bootstrap, .allgather = refuse};
    struct nep_clock clock = {.ahead_ns = 5, .error_ns = 6, .measured_ns = 7};
    assert_int_not_equal(nep_clocks_align(&bootstrap, 0, 2, NEP_S, &clock), NEP_OK);
    assert_says(nep_last_message(), "clocks");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_clocks_of_one_machine_are_one),
        cmocka_unit_test(test_clocks_elsewhere_are_enclosed),
        cmocka_unit_test(test_clocks_failed_exchange_is_said),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
