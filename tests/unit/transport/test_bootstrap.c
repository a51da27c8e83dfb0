/* SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/transport/group.h"

/* ---- agree ---------------------------------------------------------------------------------- */

static enum nep_status agree_all(struct group_rank *rank)
{
    const uint64_t *odd = rank->run->arg; /* values of the second field, by rank */
    struct nep_agree_field fields[] = {
        {"hidden", 7168}, {"experts", odd[rank->rank]}, {"top_k", 8}};
    return nep_bootstrap_agree(&rank->bootstrap, rank->run->num_ranks, "ep 2", fields, 3,
                               5 * NEP_S);
}

static void test_bootstrap_agree_equal_is_fine(void **state)
{
    (void)state;
    uint64_t values[5] = {256, 256, 256, 256, 256};
    struct group_run run;
    group_run(&run, 5, 5 * NEP_S, agree_all, values, 0);
    for (int r = 0; r < 5; r++) {
        assert_int_equal(run.ranks[r].status, NEP_OK);
    }
}

static void test_bootstrap_agree_difference_is_named_on_every_rank(void **state)
{
    (void)state;
    const struct {
        uint64_t values[8];
        const char *says;
    } cases[] = {
        {{256, 256, 256, 256, 256, 256, 256, 64},
         "ep 2: experts differs: 256 on ranks 0-6, 64 on rank 7;"},
        {{1, 2, 2, 2, 2, 2, 2, 2}, "experts differs: 1 on rank 0, 2 on ranks 1-7;"},
        {{9, 8, 9, 9, 8, 9, 9, 9}, "experts differs: 9 on ranks 0, 2-3, 5-7, 8 on ranks 1, 4;"},
        {{1, 2, 3, 4, 5, 6, 7, 8},
         "1 on rank 0, 2 on rank 1, 3 on rank 2, 4 on rank 3, and others;"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct group_run run;
        group_run(&run, 8, 5 * NEP_S, agree_all, (void *)cases[i].values, 0);
        for (int r = 0; r < 8; r++) {
            assert_int_equal(run.ranks[r].status, NEP_ERR_MISMATCH);
            assert_says(run.ranks[r].message, cases[i].says);
        }
    }
}

static enum nep_status agree_config(struct group_rank *rank)
{
    const char *const same[] = {NULL};
    const char *const odd[] = {"NEP_INTER=shm", NULL};
    struct nep_config config;
    enum nep_status status = nep_config_load_from(&config, rank->rank == 2 ? odd : same);
    return status != NEP_OK ? status
                            : nep_bootstrap_agree_config(&rank->bootstrap, rank->run->num_ranks,
                                                         &config, 5 * NEP_S);
}

static void test_bootstrap_agree_config_shows_words(void **state)
{
    (void)state;
    struct group_run run;
    group_run(&run, 3, 5 * NEP_S, agree_config, NULL, 0);
    for (int r = 0; r < 3; r++) {
        assert_int_equal(run.ranks[r].status, NEP_ERR_MISMATCH);
        assert_says(run.ranks[r].message,
                    "configuration: NEP_INTER differs: auto on ranks 0-1, shm on rank 2");
    }
}

/* ---- how much is exchanged ------------------------------------------------------------------ */

enum { SMALL = 16 };

struct counted {
    struct nep_bootstrap inner;
    size_t most_bytes;
    uint32_t num_gathers;
};

static int counted_allgather(void *ctx, const void *in, void *out, size_t bytes,
                             uint64_t timeout_ns)
{
    struct counted *counted = ctx;
    counted->num_gathers++;
    counted->most_bytes = bytes > counted->most_bytes ? bytes : counted->most_bytes;
    return counted->inner.allgather(counted->inner.ctx, in, out, bytes, timeout_ns);
}

/* One that agrees, one where all are ready. */
static enum nep_status exchange_twice(struct group_rank *rank)
{
    struct counted counted = {.inner = rank->bootstrap};
    struct nep_bootstrap bootstrap = rank->bootstrap;
    const struct nep_agree_field fields[] = {{"hidden", 7168}, {"experts", 256}, {"top_k", 8}};
    bootstrap.ctx = &counted;
    bootstrap.allgather = counted_allgather;
    enum nep_status status =
        nep_bootstrap_agree(&bootstrap, rank->run->num_ranks, "ep 2", fields, 3, 5 * NEP_S);
    if (status == NEP_OK) {
        status =
            nep_bootstrap_common(&bootstrap, rank->rank, rank->run->num_ranks, NEP_OK, 5 * NEP_S);
    }
    return status == NEP_OK && (counted.num_gathers != 2 || counted.most_bytes > SMALL)
               ? nep_fail(NEP_ERR_INTERNAL, "%u exchanges of up to %zu bytes", counted.num_gathers,
                          counted.most_bytes)
               : status;
}

/* What all ranks wait for grows with the square of their number: nothing large where all is well.
 */
static void test_bootstrap_exchanges_little_where_all_is_well(void **state)
{
    (void)state;
    struct group_run run;
    group_run(&run, 4, 5 * NEP_S, exchange_twice, NULL, 0);
    for (int r = 0; r < 4; r++) {
        assert_string_equal(run.ranks[r].status == NEP_OK ? "" : run.ranks[r].message, "");
    }
}

/* ---- common --------------------------------------------------------------------------------- */

static enum nep_status common_all(struct group_rank *rank)
{
    const int *failures = rank->run->arg;
    enum nep_status mine = NEP_OK;
    if (failures[rank->rank] != 0) {
        mine = nep_fail((enum nep_status)failures[rank->rank], "no room for %u slots",
                        100 + rank->rank);
    }
    return nep_bootstrap_common(&rank->bootstrap, rank->rank, rank->run->num_ranks, mine,
                                5 * NEP_S);
}

static void test_bootstrap_common_failure_reaches_those_that_succeeded(void **state)
{
    (void)state;
    int none[4] = {0}, one[4] = {0, 0, NEP_ERR_NO_MEMORY, 0},
        two[4] = {0, NEP_ERR_IO, 0, NEP_ERR_NO_MEMORY};
    struct group_run run;
    group_run(&run, 4, 5 * NEP_S, common_all, none, 0);
    for (int r = 0; r < 4; r++) {
        assert_int_equal(run.ranks[r].status, NEP_OK);
    }
    group_run(&run, 4, 5 * NEP_S, common_all, one, 0);
    for (int r = 0; r < 4; r++) {
        assert_int_equal(run.ranks[r].status, NEP_ERR_NO_MEMORY);
        assert_says(run.ranks[r].message,
                    r == 2 ? "no room for 102 slots" : "rank 2 failed: no room for 102 slots");
    }
    group_run(&run, 4, 5 * NEP_S, common_all, two, 0);
    for (int r = 0; r < 4; r++) {
        assert_int_equal(run.ranks[r].status, r == 3 ? NEP_ERR_NO_MEMORY : NEP_ERR_IO);
    }
    assert_string_equal(run.ranks[1].message, "no room for 101 slots");
    assert_says(run.ranks[0].message, "rank 1 (and 1 other rank) failed: no room for 101");
    assert_string_equal(run.ranks[3].message, "no room for 103 slots");
}

/* ---- a caller's bootstrap ------------------------------------------------------------------- */

static int broken_allgather(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns)
{
    (void)ctx, (void)in, (void)out, (void)bytes, (void)timeout_ns;
    return 17;
}

static int alone_allgather(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns)
{
    (void)ctx, (void)timeout_ns;
    memcpy(out, in, bytes);
    return 0;
}

static void test_bootstrap_callers_failure_is_named(void **state)
{
    (void)state;
    struct nep_bootstrap bootstrap = {.size = sizeof bootstrap, .allgather = broken_allgather};
    uint32_t in = 1, out[2];
    assert_int_equal(nep_bootstrap_allgather(&bootstrap, &in, out, 4, NEP_S, "keys"), NEP_ERR_IO);
    assert_says(nep_last_message(), "allgather of 4 bytes (keys) returned 17");
}

static void test_bootstrap_open_takes_callers_functions_or_refuses(void **state)
{
    (void)state;
    struct nep_bootstrap mine = {.size = sizeof mine, .allgather = alone_allgather}, out;
    struct nep_comm_params params = {
        .size = sizeof params, .rank = 0, .num_ranks = 1, .bootstrap = &mine};
    struct nep_config config;
    struct nep_rendezvous_client *owned = (void *)&mine;
    const char *const nothing[] = {NULL};
    uint32_t rank = 9, num_ranks = 9;
    assert_int_equal(nep_config_load_from(&config, nothing), NEP_OK);
    assert_int_equal(nep_bootstrap_open(&params, &config, NEP_S, &out, &rank, &num_ranks, &owned),
                     NEP_OK);
    assert_null(owned);
    assert_int_equal(rank, 0);
    assert_int_equal(num_ranks, 1);
    nep_bootstrap_close(owned);
    mine.allgather = NULL;
    assert_int_equal(nep_bootstrap_open(&params, &config, NEP_S, &out, &rank, &num_ranks, &owned),
                     NEP_ERR_INVALID);
    mine.allgather = alone_allgather;
    params.rank = 1;
    assert_int_equal(nep_bootstrap_open(&params, &config, NEP_S, &out, &rank, &num_ranks, &owned),
                     NEP_ERR_INVALID);
    assert_says(nep_last_message(), "rank 1 of 1");
    params.num_ranks = 2;
    params.bootstrap = NULL;
    assert_int_equal(nep_bootstrap_open(&params, &config, NEP_S, &out, &rank, &num_ranks, &owned),
                     NEP_ERR_INVALID);
    assert_says(nep_last_message(), "NEP_RENDEZVOUS");
}

/* ---- meeting as a launcher's ranks would ----------------------------------------------------- */

struct seat {
    pthread_t thread;
    struct nep_comm_params params;
    uint64_t timeout_ns;
    int times;
    enum nep_status status;
    char message[1024];
};

static void *seat_main(void *arg)
{
    struct seat *seat = arg;
    struct nep_config config;
    const char *const nothing[] = {NULL};
    seat->status = nep_config_load_from(&config, nothing);
    for (int i = 0; i < seat->times && seat->status == NEP_OK; i++) {
        struct nep_bootstrap bootstrap;
        struct nep_rendezvous_client *owned;
        uint32_t rank, num_ranks, all[8];
        seat->status = nep_bootstrap_open(&seat->params, &config, seat->timeout_ns, &bootstrap,
                                          &rank, &num_ranks, &owned);
        if (seat->status != NEP_OK) {
            break;
        }
        seat->status =
            nep_bootstrap_allgather(&bootstrap, &rank, all, sizeof rank, seat->timeout_ns, "ranks");
        for (uint32_t r = 0; seat->status == NEP_OK && r < num_ranks; r++) {
            seat->status = all[r] == r ? NEP_OK : NEP_ERR_INTERNAL;
        }
        nep_bootstrap_close(owned);
    }
    snprintf(seat->message, sizeof seat->message, "%s", nep_last_message());
    return NULL;
}

static uint16_t free_port(void)
{
    struct nep_rendezvous_server *server = NULL;
    uint16_t port = 0;
    struct nep_rendezvous_params params = {.host = "127.0.0.1", .num_ranks = 1};
    assert_int_equal(nep_rendezvous_server_start(&params, &server, &port), NEP_OK);
    nep_rendezvous_server_stop(server);
    return port;
}

static void test_bootstrap_open_rank_0_serves_many_communicators_in_turn(void **state)
{
    (void)state;
    struct seat seats[4];
    char address[32];
    snprintf(address, sizeof address, "127.0.0.1:%u", free_port());
    for (uint32_t r = 0; r < 4; r++) {
        seats[r] = (struct seat){.params = {.size = sizeof seats[r].params,
                                            .rank = r,
                                            .num_ranks = 4,
                                            .rendezvous = address},
                                 .timeout_ns = 10 * NEP_S,
                                 .times = 20};
        assert_int_equal(pthread_create(&seats[r].thread, NULL, seat_main, &seats[r]), 0);
    }
    for (uint32_t r = 0; r < 4; r++) {
        pthread_join(seats[r].thread, NULL);
        if (seats[r].status != NEP_OK) {
            fail_msg("rank %u: %s", r, seats[r].message);
        }
    }
}

static void test_bootstrap_open_nobody_there_ends_at_deadline(void **state)
{
    (void)state;
    struct seat seat = {.params = {.size = sizeof seat.params, .rank = 1, .num_ranks = 2},
                        .timeout_ns = 300 * NEP_MS,
                        .times = 1};
    char address[32];
    snprintf(address, sizeof address, "127.0.0.1:%u", free_port());
    seat.params.rendezvous = address;
    uint64_t start = nep_now_ns();
    seat_main(&seat);
    assert_int_equal(seat.status, NEP_ERR_TIMEOUT);
    assert_says(seat.message, "rank 1 found no rendezvous within 300ms");
    assert_true(nep_now_ns() - start < 30 * NEP_S);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bootstrap_agree_equal_is_fine),
        cmocka_unit_test(test_bootstrap_agree_difference_is_named_on_every_rank),
        cmocka_unit_test(test_bootstrap_agree_config_shows_words),
        cmocka_unit_test(test_bootstrap_exchanges_little_where_all_is_well),
        cmocka_unit_test(test_bootstrap_common_failure_reaches_those_that_succeeded),
        cmocka_unit_test(test_bootstrap_callers_failure_is_named),
        cmocka_unit_test(test_bootstrap_open_takes_callers_functions_or_refuses),
        cmocka_unit_test(test_bootstrap_open_rank_0_serves_many_communicators_in_turn),
        cmocka_unit_test(test_bootstrap_open_nobody_there_ends_at_deadline),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
