/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The transports' contract, over every transport of the list. One that this machine cannot run must
 * say so at probe and again at create; that is its test then.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cmocka_all.h"
#include "conformance.h"

#include "base/clock.h"
#include "base/config.h"

static const struct nep_transport_ops *ops_under_test(const char *name)
{
    const struct nep_transport_ops *ops;
    const char *args;
    assert_int_equal(nep_transport_find(name, &ops, &args), NEP_OK);
    return ops;
}

static bool is_here(const char *name)
{
    struct nep_config config;
    assert_int_equal(nep_config_load(&config), NEP_OK);
    enum nep_status status = ops_under_test(name)->probe(&config);
    if (status == NEP_OK) {
        return true;
    }
    assert_int_equal(status, NEP_ERR_UNSUPPORTED);
    assert_true(strlen(nep_last_message()) > 20);
    printf("%s is not here: %s\n", name, nep_last_message());
    return false;
}

static int refused_body(struct rank *rank)
{
    struct nep_transport *transport = NULL;
    enum nep_status status = conformance_open(rank, rank->arg, NEP_S, &transport);
    RANK_CHECK(rank, status == NEP_ERR_UNSUPPORTED, "create: %d", status);
    RANK_CHECK(rank, transport == NULL, "an output was written");
    return 0;
}

static void run(const char *name, bool threads, const uint32_t *ranks_per_node, uint32_t num_nodes)
{
    struct conformance test = {
        .name = name,
        .seed = ranks_seed(name),
        .num_rounds = 12,
        .slot_bytes = 6 * 400000,
        .repeats = strncmp(name, "adversary", 9) == 0,
    };
    struct ranks_params params = {.ranks_per_node = ranks_per_node,
                                  .num_nodes = num_nodes,
                                  .threads = threads || RANKS_ONLY_THREADS,
                                  .seconds = 240};
    if (is_here(name)) {
        assert_int_equal(ranks_run(&params, conformance_body, &test), 0);
    } else {
        assert_int_equal(ranks_run(&params, refused_body, (void *)(uintptr_t)name), 0);
    }
}

static void test_transport_loop_threads_keeps_contract(void **state)
{
    (void)state;
    run("loop", true, (uint32_t[]){3}, 1);
}

static void test_transport_shm_processes_keeps_contract(void **state)
{
    (void)state;
    run("shm", false, (uint32_t[]){4}, 1);
}

static void test_transport_ucx_processes_keeps_contract(void **state)
{
    (void)state;
    run("ucx", false, (uint32_t[]){2, 1}, 2);
}

static void test_transport_ucx_threads_keeps_contract(void **state)
{
    (void)state;
    run("ucx", true, (uint32_t[]){1, 1}, 2);
}

/* Over Soft-RoCE when tests/vm runs this program in its guest. */
static void test_transport_verbs_processes_keeps_contract(void **state)
{
    (void)state;
    run("verbs", false, (uint32_t[]){2, 1}, 2);
}

static void test_transport_verbs_threads_keeps_contract(void **state)
{
    (void)state;
    run("verbs", true, (uint32_t[]){1, 1}, 2);
}

static void test_transport_list_entries_are_complete(void **state)
{
    (void)state;
    struct nep_config config;
    assert_int_equal(nep_config_load(&config), NEP_OK);
    for (const struct nep_transport_ops *const *at = nep_transport_list; *at != NULL; at++) {
        const struct nep_transport_ops *ops = *at;
        assert_non_null(ops->name);
        assert_ptr_equal(ops_under_test(ops->name), ops);
        if (ops->probe(&config) != NEP_OK) {
            continue;
        }
        assert_true(ops->create && ops->close && ops->window_create && ops->window_destroy);
        assert_true(ops->put && ops->progress && ops->completed && ops->peer_status && ops->stats);
        assert_true(ops->peer_window && ops->window_retire && ops->abandon);
        /* What the bits say is what the entries do. */
        assert_int_equal(ops->put == nep_unsupported_put, (ops->caps & NEP_CAP_FABRIC) == 0);
    }
}

static void test_transport_find_unknown_lists_names(void **state)
{
    (void)state;
    const struct nep_transport_ops *ops = NULL;
    const char *args = NULL;
    assert_int_equal(nep_transport_find("carrier-pigeon", &ops, &args), NEP_ERR_NOT_FOUND);
    assert_null(ops);
    assert_non_null(strstr(nep_last_message(), "shm"));
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_transport_list_entries_are_complete),
        cmocka_unit_test(test_transport_find_unknown_lists_names),
        cmocka_unit_test(test_transport_loop_threads_keeps_contract),
        cmocka_unit_test(test_transport_shm_processes_keeps_contract),
        cmocka_unit_test(test_transport_ucx_processes_keeps_contract),
        cmocka_unit_test(test_transport_ucx_threads_keeps_contract),
        cmocka_unit_test(test_transport_verbs_processes_keeps_contract),
        cmocka_unit_test(test_transport_verbs_threads_keeps_contract),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
