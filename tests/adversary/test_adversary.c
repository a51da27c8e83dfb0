/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The contract of transport.h over the adversary, around every fabric that is here: the body is the
 * one that the fabrics themselves pass (tests/multi/conformance.c). And that the adversary is one:
 * puts must be seen to overtake each other and to come again, else the tests under it prove
 * nothing.
 */
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "cmocka_all.h"
#include "conformance.h"

#include "base/clock.h"

static bool is_here(const char *name)
{
    struct nep_config config;
    const struct nep_transport_ops *ops;
    const char *args;
    assert_int_equal(nep_config_load(&config), NEP_OK);
    assert_int_equal(nep_transport_find(name, &ops, &args), NEP_OK);
    enum nep_status status = ops->probe(&config);
    if (status != NEP_OK) {
        assert_int_equal(status, NEP_ERR_UNSUPPORTED);
        printf("%s is not here: %s\n", name, nep_last_message());
    }
    return status == NEP_OK;
}

static int refused_body(struct rank *rank)
{
    struct nep_transport *transport = NULL;
    enum nep_status status = conformance_open(rank, rank->arg, NEP_S, &transport);
    RANK_CHECK(rank, status < 0, "create: %d", status);
    RANK_CHECK(rank, transport == NULL, "an output was written");
    RANK_CHECK(rank, strlen(nep_last_message()) > 20, "no sentence");
    return 0;
}

static void run(const char *name, bool threads, const uint32_t *ranks_per_node, uint32_t num_nodes)
{
    struct conformance test = {
        .name = name,
        .seed = ranks_seed(name),
        .num_rounds = 12,
        .slot_bytes = 6 * 100000,
        .repeats = true,
    };
    struct ranks_params params = {.ranks_per_node = ranks_per_node,
                                  .num_nodes = num_nodes,
                                  .threads = threads,
                                  .seconds = 240};
    const char *inner = strchr(name, ':') != NULL ? strchr(name, ':') + 1 : "shm";
    rank_fn body = is_here(inner) ? conformance_body : refused_body;
    void *arg = is_here(inner) ? (void *)&test : (void *)(uintptr_t)name;
    assert_int_equal(ranks_run(&params, body, arg), 0);
}

static void test_adversary_loop_threads_keeps_contract(void **state)
{
    (void)state;
    run("adversary:loop", true, (uint32_t[]){2, 1}, 2);
}

static void test_adversary_shm_processes_keeps_contract(void **state)
{
    (void)state;
    run("adversary:shm", false, (uint32_t[]){2, 2}, 2);
}

static void test_adversary_plain_threads_keeps_contract(void **state)
{
    (void)state;
    run("adversary", true, (uint32_t[]){1, 1}, 2);
}

static void test_adversary_ucx_threads_keeps_contract(void **state)
{
    (void)state;
    run("adversary:ucx", true, (uint32_t[]){2, 1}, 2);
}

static void test_adversary_of_adversary_is_refused(void **state)
{
    (void)state;
    struct ranks_params params = {
        .ranks_per_node = (uint32_t[]){1}, .num_nodes = 1, .threads = true, .seconds = 60};
    assert_int_equal(ranks_run(&params, refused_body, (void *)(uintptr_t) "adversary:adversary"),
                     0);
    assert_int_equal(ranks_run(&params, refused_body, (void *)(uintptr_t) "adversary:pigeon"), 0);
}

static void test_adversary_caps_are_those_of_the_inner(void **state)
{
    (void)state;
    assert_true(nep_transport_caps("adversary:shm") & NEP_CAP_MAPPED);
    assert_true(nep_transport_caps("adversary") & NEP_CAP_MAPPED);
    assert_false(nep_transport_caps("adversary:ucx") & NEP_CAP_MAPPED);
    assert_false(nep_transport_caps("adversary") & NEP_CAP_ORDERED);
}

/* ---- it must be as bad as it says ----------------------------------------------------------- */

enum { NUM_PUTS = 200, PUT_BYTES = 16384 };

/* In a window: how many arrived, and for each immediate its place in the order and its count. */
struct log {
    _Atomic uint32_t num;
    _Atomic uint32_t order[NUM_PUTS];
    _Atomic uint32_t times[NUM_PUTS];
    char bytes[NUM_PUTS][PUT_BYTES];
};

static void log_sink(void *base, uint32_t dst, uint32_t src, uint32_t imm)
{
    struct log *log = base;
    imm >>= 4;
    (void)dst;
    (void)src;
    if (atomic_fetch_add(&log->times[imm], 1) == 0) {
        atomic_store(&log->order[imm], atomic_fetch_add(&log->num, 1));
    }
}

static int put_all(struct rank *rank, struct nep_transport *transport, struct log *mine)
{
    uint64_t number = 0;
    for (uint32_t imm = 0; imm < NUM_PUTS; imm++) {
        struct nep_put put = {.dst = 1,
                              .window = 0,
                              .offset = (uint64_t)((char *)mine->bytes[imm] - (char *)mine),
                              .src = mine->bytes[imm],
                              .len = PUT_BYTES,
                              .imm = imm << 4}; /* below are the transport's bits */
        memset(mine->bytes[imm], (int)imm, PUT_BYTES);
        RANK_CHECK(rank, transport->ops->put(transport, &put, &number) == NEP_OK, "%s",
                   nep_last_message());
    }
    /* No progress from here on: the adversary's own thread has to deliver. */
    uint64_t deadline_ns = nep_deadline_ns(60 * NEP_S);
    while (transport->ops->completed(transport, 1) < number) {
        RANK_CHECK(rank, nep_now_ns() < deadline_ns, "a put is held for ever");
        sched_yield();
    }
    struct nep_transport_stats stats;
    transport->ops->stats(transport, &stats);
    RANK_CHECK(rank, stats.puts == NUM_PUTS && stats.put_bytes == NUM_PUTS * (uint64_t)PUT_BYTES,
               "%llu puts of %llu bytes counted", (unsigned long long)stats.puts,
               (unsigned long long)stats.put_bytes);
    RANK_CHECK(rank, stats.retries > 0, "nothing was repeated");
    return 0;
}

static int look(struct rank *rank, const struct log *log)
{
    uint32_t num_late = 0, num_repeats = 0;
    for (uint32_t imm = 0; imm < NUM_PUTS; imm++) {
        uint32_t times = atomic_load(&log->times[imm]);
        RANK_CHECK(rank, times >= 1, "put %u is complete and was not announced", imm);
        num_repeats += times - 1;
        num_late += imm > 0 && atomic_load(&log->order[imm]) < atomic_load(&log->order[imm - 1]);
        for (uint32_t i = 0; i < PUT_BYTES; i++) {
            RANK_CHECK(rank, log->bytes[imm][i] == (char)imm, "put %u byte %u", imm, i);
        }
    }
    printf("adversary: %u of %u puts were overtaken by their successor, %u repeats\n", num_late,
           NUM_PUTS, num_repeats);
    RANK_CHECK(rank, num_late > NUM_PUTS / 10, "%u late", num_late);
    RANK_CHECK(rank, num_repeats > 0, "no repeats");
    return 0;
}

static int badness_body(struct rank *rank)
{
    static _Thread_local struct nep_config config;
    const struct nep_transport_ops *ops;
    struct nep_transport *transport;
    struct nep_transport_params params = {.topology = &rank->topology,
                                          .bootstrap = &rank->bootstrap,
                                          .config = &config,
                                          .timeout_ns = 30 * NEP_S,
                                          .sink = log_sink,
                                          .max_puts = NUM_PUTS};
    RANK_CHECK(rank, nep_config_load(&config) == NEP_OK, "%s", nep_last_message());
    config.adversary_seed = (uint32_t) * (const uint64_t *)rank->arg;
    enum nep_status status = nep_transport_find("adversary:shm", &ops, &params.args);
    status = status == NEP_OK ? ops->create(&params, &transport) : status;
    RANK_CHECK(rank, status == NEP_OK, "%s", nep_last_message());
    void *base = NULL;
    status = transport->ops->window_create(transport, 0, &base, sizeof(struct log));
    RANK_CHECK(rank, status == NEP_OK, "%s", nep_last_message());
    int failed = rank->rank == 0 ? put_all(rank, transport, base) : 0;
    failed |= barrier(rank);
    failed |= rank->rank == 1 ? look(rank, base) : 0;
    failed |= barrier(rank);
    transport->ops->window_destroy(transport, 0);
    transport->ops->close(transport);
    return failed;
}

static void test_adversary_puts_overtake_and_repeat(void **state)
{
    (void)state;
    uint64_t seed = ranks_seed("adversary");
    struct ranks_params params = {
        .ranks_per_node = (uint32_t[]){1, 1}, .num_nodes = 2, .threads = true, .seconds = 120};
    assert_int_equal(ranks_run(&params, badness_body, &seed), 0);
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_adversary_puts_overtake_and_repeat),
        cmocka_unit_test(test_adversary_caps_are_those_of_the_inner),
        cmocka_unit_test(test_adversary_of_adversary_is_refused),
        cmocka_unit_test(test_adversary_loop_threads_keeps_contract),
        cmocka_unit_test(test_adversary_shm_processes_keeps_contract),
        cmocka_unit_test(test_adversary_plain_threads_keeps_contract),
        cmocka_unit_test(test_adversary_ucx_threads_keeps_contract),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
