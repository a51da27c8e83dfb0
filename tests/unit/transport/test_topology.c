/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/transport/group.h"
#include "transport/topology.h"

static void test_topology_from_sizes_uneven_nodes(void **state)
{
    (void)state;
    const uint32_t sizes[] = {1, 2, 5};
    struct nep_topology_store *store;
    struct nep_topology t;
    assert_int_equal(nep_topology_from_sizes(sizes, 3, 4, &store, &t), NEP_OK);
    assert_int_equal(t.num_ranks, 8);
    assert_int_equal(t.num_nodes, 3);
    assert_int_equal(t.rank, 4);
    assert_int_equal(t.node, 2);
    assert_int_equal(t.local, 1);
    const uint32_t node_of[] = {0, 1, 1, 2, 2, 2, 2, 2}, local_of[] = {0, 0, 1, 0, 1, 2, 3, 4};
    for (uint32_t r = 0; r < 8; r++) {
        assert_int_equal(t.node_of_rank[r], node_of[r]);
        assert_int_equal(t.local_of_rank[r], local_of[r]);
        assert_int_equal(nep_topology_rank_at(&t, node_of[r], local_of[r]), r);
        /* Landing: local index mod the node's size, as protocol.md 1 says. */
        for (uint32_t n = 0; n < 3; n++) {
            uint32_t first = n == 0 ? 0 : n == 1 ? 1 : 3;
            assert_int_equal(nep_topology_landing(&t, r, n), first + local_of[r] % sizes[n]);
        }
    }
    assert_true(nep_topology_rank_at(&t, 0, 1) == UINT32_MAX);
    assert_true(nep_topology_rank_at(&t, 3, 0) == UINT32_MAX);
    nep_topology_destroy(store);
    nep_topology_destroy(NULL);
}

static void test_topology_from_sizes_impossible_is_refused(void **state)
{
    (void)state;
    struct nep_topology_store *store = NULL;
    struct nep_topology t;
    const uint32_t empty[] = {2, 0}, huge[] = {UINT32_MAX, UINT32_MAX}, fine[] = {2};
    assert_int_equal(nep_topology_from_sizes(empty, 2, 0, &store, &t), NEP_ERR_INVALID);
    assert_says(nep_last_message(), "node 1 of 2 has no ranks");
    assert_int_equal(nep_topology_from_sizes(huge, 2, 0, &store, &t), NEP_ERR_INVALID);
    assert_int_equal(nep_topology_from_sizes(fine, 1, 2, &store, &t), NEP_ERR_INVALID);
    assert_int_equal(nep_topology_from_sizes(fine, 0, 0, &store, &t), NEP_ERR_INVALID);
    assert_null(store);
}

struct expectation {
    const char *nodes[8]; /* NEP_NODE by rank, "" unset */
    const uint32_t *sizes;
    uint32_t num_nodes; /* of sizes */
    uint32_t node_of_rank[8];
    const char *says; /* of the failure */
};

static enum nep_status create(struct group_rank *rank)
{
    const struct expectation *expected = rank->run->arg;
    struct nep_comm_params params = {
        .size = sizeof params, .ranks_per_node = expected->sizes, .num_nodes = expected->num_nodes};
    char variable[80];
    const char *const variables[] = {variable, NULL};
    struct nep_config config;
    struct nep_topology_store *store = NULL;
    struct nep_topology t;
    snprintf(variable, sizeof variable, "NEP_NODE=%s", expected->nodes[rank->rank]);
    enum nep_status status = nep_config_load_from(&config, variables);
    if (status == NEP_OK) {
        status = nep_topology_create(&params, &config, &rank->bootstrap, rank->rank,
                                     rank->run->num_ranks, 5 * NEP_S, &store, &t);
    }
    if (status != NEP_OK) {
        return status;
    }
    for (uint32_t r = 0; r < rank->run->num_ranks; r++) {
        if (t.node_of_rank[r] != expected->node_of_rank[r]) {
            status = nep_fail(NEP_ERR_INTERNAL, "rank %u sees rank %u on node %u", rank->rank, r,
                              t.node_of_rank[r]);
        }
    }
    if (t.node != expected->node_of_rank[rank->rank] || t.rank != rank->rank) {
        status = nep_fail(NEP_ERR_INTERNAL, "rank %u is on node %u", rank->rank, t.node);
    }
    nep_topology_destroy(store);
    return status;
}

static void test_topology_create_finds_names_and_sizes(void **state)
{
    (void)state;
    const uint32_t two_two[] = {2, 2}, one_three[] = {1, 3}, five[] = {5};
    struct expectation cases[] = {
        /* Threads of one process share memory. */
        {{"", "", "", ""}, NULL, 0, {0, 0, 0, 0}, NULL},
        /* Nodes are numbered by their lowest rank, whatever their names. */
        {{"z", "a", "z", "a"}, NULL, 0, {0, 1, 0, 1}, NULL},
        {{"z", "", "", "z"}, NULL, 0, {0, 1, 1, 0}, NULL},
        {{"", "", "", ""}, two_two, 2, {0, 0, 1, 1}, NULL},
        /* Sizes given in the call go before names. */
        {{"a", "a", "a", "a"}, one_three, 2, {0, 1, 1, 1}, NULL},
        {{"", "", "", ""}, five, 1, {0}, "1 nodes of 5 ranks in all, but the group has 4"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct group_run run;
        group_run(&run, 4, 5 * NEP_S, create, &cases[i], 0);
        for (int r = 0; r < 4; r++) {
            if (cases[i].says != NULL) {
                assert_int_equal(run.ranks[r].status, NEP_ERR_INVALID);
                assert_says(run.ranks[r].message, cases[i].says);
            } else if (run.ranks[r].status != NEP_OK) {
                fail_msg("case %zu: %s", i, run.ranks[r].message);
            }
        }
    }
}

/* Ranks 0 and 1 as they are, rank 2's place changed on its way: another machine. */
struct forged {
    struct nep_bootstrap real;
    size_t at; /* byte of rank 2's place to change */
};

static int forged_allgather(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns)
{
    struct forged *forged = ctx;
    int result = forged->real.allgather(forged->real.ctx, in, out, bytes, timeout_ns);
    if (result == 0) {
        ((char *)out)[2 * bytes + forged->at] ^= 1;
    }
    return result;
}

static enum nep_status create_forged(struct group_rank *rank)
{
    const uint32_t three[] = {3};
    const size_t *at = rank->run->arg;
    struct forged forged = {rank->bootstrap, at[0]};
    struct nep_bootstrap bootstrap = {
        .size = sizeof bootstrap, .ctx = &forged, .allgather = forged_allgather};
    struct nep_comm_params params = {.size = sizeof params};
    const char *const nothing[] = {NULL};
    struct nep_config config;
    struct nep_topology_store *store = NULL;
    struct nep_topology t;
    if (at[1]) {
        params.ranks_per_node = three;
        params.num_nodes = 1;
    }
    nep_config_load_from(&config, nothing);
    enum nep_status status =
        nep_topology_create(&params, &config, &bootstrap, rank->rank, 3, 5 * NEP_S, &store, &t);
    if (status == NEP_OK && (t.node_of_rank[1] != 0 || t.node_of_rank[2] != 1)) {
        status = NEP_ERR_INTERNAL;
    }
    nep_topology_destroy(store);
    return status;
}

static void test_topology_ranks_without_shared_memory_are_parted(void **state)
{
    (void)state;
    /* Bytes of the boot id, the IPC namespace and the device of /dev/shm. */
    const struct {
        size_t at;
        const char *says;
    } cases[] = {{3, "different machines"}, {40, "different IPC"}, {48, "different /dev/shm"}};
    for (int i = 0; i < 3; i++) {
        size_t detect[2] = {cases[i].at, 0}, joined[2] = {cases[i].at, 1};
        struct group_run run;
        group_run(&run, 3, 5 * NEP_S, create_forged, detect, 0);
        for (int r = 0; r < 3; r++) {
            assert_int_equal(run.ranks[r].status, NEP_OK);
        }
        group_run(&run, 3, 5 * NEP_S, create_forged, joined, 0);
        for (int r = 0; r < 3; r++) {
            assert_int_equal(run.ranks[r].status, NEP_ERR_INVALID);
            assert_says(run.ranks[r].message, "puts ranks 0 and 2 on node 0");
            assert_says(run.ranks[r].message, cases[i].says);
        }
    }
}

static void test_topology_cores_are_usable_ones(void **state)
{
    (void)state;
    uint32_t num = nep_topology_num_cores();
    assert_true(num >= 1 && num <= (uint32_t)sysconf(_SC_NPROCESSORS_CONF));
    assert_int_equal(nep_topology_progress_core(0, 0, -1), -1);
    /* More lanes than cores: nobody gets one of its own. */
    assert_int_equal(nep_topology_progress_core(0, num + 1, -1), -1);
    int core = nep_topology_progress_core(0, 1, -1);
    assert_true(core >= -1 && core < sysconf(_SC_NPROCESSORS_CONF));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_topology_from_sizes_uneven_nodes),
        cmocka_unit_test(test_topology_from_sizes_impossible_is_refused),
        cmocka_unit_test(test_topology_create_finds_names_and_sizes),
        cmocka_unit_test(test_topology_ranks_without_shared_memory_are_parted),
        cmocka_unit_test(test_topology_cores_are_usable_ones),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
