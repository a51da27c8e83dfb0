/* SPDX-License-Identifier: Apache-2.0 */
/* The rendezvous over real sockets: what works, and what a rank is told when it does not. */
#include <signal.h>
#include <stdatomic.h>
#include <sys/wait.h>

#include "tests/unit/transport/group.h"

static uint32_t pattern(uint32_t rank, uint32_t round, uint32_t i)
{
    return rank * 2654435761u ^ round * 40503u ^ i * 97u;
}

static enum nep_status gather_once(struct group_rank *rank, uint32_t round, uint32_t num)
{
    uint32_t num_ranks = rank->run->num_ranks;
    uint32_t *mine = calloc(num + 1, sizeof *mine);
    uint32_t *all = malloc(((size_t)num * num_ranks + 1) * sizeof *all);
    memset(all, 0xa5, ((size_t)num * num_ranks + 1) * sizeof *all);
    for (uint32_t i = 0; i < num; i++) {
        mine[i] = pattern(rank->rank, round, i);
    }
    struct nep_bootstrap *b = &rank->bootstrap;
    enum nep_status status = b->allgather(b->ctx, mine, all, num * sizeof *mine, 20 * NEP_S);
    for (uint32_t i = 0; status == NEP_OK && i < num * num_ranks; i++) {
        if (all[i] != pattern(i / num, round, i % num)) {
            status = nep_fail(NEP_ERR_INTERNAL, "round %u element %u is wrong", round, i);
        }
    }
    if (all[(size_t)num * num_ranks] != 0xa5a5a5a5u) {
        status = nep_fail(NEP_ERR_INTERNAL, "round %u wrote too much", round);
    }
    free(mine);
    free(all);
    return status;
}

static enum nep_status gather_many(struct group_rank *rank)
{
    static const uint32_t counts[] = {0, 1, 3, 1000, 0, 100000, 2};
    enum nep_status status = NEP_OK;
    for (uint32_t round = 0; round < 7 && status == NEP_OK; round++) {
        status = gather_once(rank, round, counts[round]);
    }
    return status;
}

static void assert_all_fine(const struct group_run *run)
{
    uint32_t num_failed = 0;
    for (uint32_t r = 0; r < run->num_ranks; r++) {
        if (run->ranks[r].open_status != NEP_OK || run->ranks[r].status != NEP_OK) {
            print_error("rank %u: %s\n", r, run->ranks[r].message);
            num_failed++;
        }
    }
    assert_int_equal(num_failed, 0);
}

static void test_rendezvous_gather_brings_all_in_rank_order(void **state)
{
    (void)state;
    struct group_run run;
    const uint32_t sizes[] = {1, 2, 5, 16};
    for (int i = 0; i < 4; i++) {
        group_run(&run, sizes[i], 20 * NEP_S, gather_many, NULL, 0);
        assert_all_fine(&run);
    }
}

/* ---- the store ------------------------------------------------------------------------------ */

static enum nep_status wait_for_key(struct group_rank *rank)
{
    struct nep_bootstrap *b = &rank->bootstrap;
    char value[8] = "pppppp";
    size_t len = 99;
    enum nep_status status;
    if (rank->rank == 0) {
        usleep(30000);
        status = b->put(b->ctx, "first", "hello", 5, 60 * NEP_S);
        return status != NEP_OK ? status : b->put(b->ctx, "empty", "", 0, 60 * NEP_S);
    }
    status = b->get(b->ctx, "first", value, sizeof value, &len, 60 * NEP_S);
    if (status == NEP_OK && (len != 5 || memcmp(value, "hellop", 6) != 0)) {
        return nep_fail(NEP_ERR_INTERNAL, "got %zu bytes '%.6s'", len, value);
    }
    len = 99;
    status = status != NEP_OK ? status : b->get(b->ctx, "empty", NULL, 0, &len, 60 * NEP_S);
    return status == NEP_OK && len != 0 ? NEP_ERR_INTERNAL : status;
}

static void test_rendezvous_get_waits_for_put(void **state)
{
    (void)state;
    struct group_run run;
    group_run(&run, 4, 20 * NEP_S, wait_for_key, NULL, 0);
    assert_all_fine(&run);
}

enum { SWAPS_EACH = 50 };

/* Each rank raises one counter SWAPS_EACH times; the value holds who wrote it, so that a rank knows
 * its own success from another's. */
static enum nep_status raise_counter(struct group_rank *rank)
{
    struct nep_bootstrap *b = &rank->bootstrap;
    uint32_t have[2] = {0, 0};
    size_t have_len = 0;
    enum nep_status status = NEP_OK;
    for (int i = 0; i < SWAPS_EACH && status == NEP_OK;) {
        uint32_t next[2] = {have[0] + 1, rank->rank};
        status = b->cas(b->ctx, "counter", have, have_len, next, sizeof next, have, sizeof have,
                        &have_len, 60 * NEP_S);
        if (status == NEP_OK && have_len != sizeof have) {
            return nep_fail(NEP_ERR_INTERNAL, "%zu bytes stand", have_len);
        }
        /* A failed swap returns what stands, which another rank may just have made equal to next
         * but for the writer. */
        i += memcmp(have, next, sizeof next) == 0;
    }
    uint32_t last[2] = {0, 0};
    if (status == NEP_OK) {
        status = gather_once(rank, 1, 1);
    }
    if (status == NEP_OK) {
        status = b->get(b->ctx, "counter", last, sizeof last, &have_len, 60 * NEP_S);
    }
    if (status == NEP_OK && last[0] != SWAPS_EACH * rank->run->num_ranks) {
        return nep_fail(NEP_ERR_INTERNAL, "the counter is %u", last[0]);
    }
    return status;
}

static void test_rendezvous_cas_loses_no_update(void **state)
{
    (void)state;
    struct group_run run;
    group_run(&run, 6, 20 * NEP_S, raise_counter, NULL, 0);
    assert_all_fine(&run);
}

struct getter {
    struct nep_bootstrap *bootstrap;
    enum nep_status status;
    uint64_t value;
};

static void *get_main(void *arg)
{
    struct getter *getter = arg;
    size_t len;
    struct nep_bootstrap *b = getter->bootstrap;
    getter->status = b->get(b->ctx, "late", &getter->value, 8, &len, 60 * NEP_S);
    return NULL;
}

/* Two threads of a rank wait for a key while a third gathers and puts it. */
static enum nep_status call_from_threads(struct group_rank *rank)
{
    struct getter getters[2] = {{&rank->bootstrap, NEP_ERR_INTERNAL, 0},
                                {&rank->bootstrap, NEP_ERR_INTERNAL, 0}};
    pthread_t threads[2];
    uint64_t value = 4711;
    for (int i = 0; i < 2; i++) {
        pthread_create(&threads[i], NULL, get_main, &getters[i]);
    }
    usleep(10000);
    enum nep_status status = gather_many(rank);
    if (status == NEP_OK && rank->rank == 0) {
        status = rank->bootstrap.put(rank->bootstrap.ctx, "late", &value, 8, 60 * NEP_S);
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        if (status == NEP_OK && (getters[i].status != NEP_OK || getters[i].value != value)) {
            status = NEP_ERR_INTERNAL;
        }
    }
    return status;
}

static void test_rendezvous_waiting_get_holds_up_nobody(void **state)
{
    (void)state;
    struct group_run run;
    group_run(&run, 3, 20 * NEP_S, call_from_threads, NULL, 0);
    assert_all_fine(&run);
}

/* ---- limits and deadlines ------------------------------------------------------------------- */

static enum nep_status exceed_limits(struct group_rank *rank)
{
    struct nep_bootstrap *b = &rank->bootstrap;
    char *big = calloc(1, 8u << 20);
    char key[400];
    size_t len = 7;
    memset(key, 'k', sizeof key);
    key[sizeof key - 1] = '\0';
    int wrong = b->put(b->ctx, "big", big, 8u << 20, 10 * NEP_S) != NEP_ERR_INVALID;
    wrong |= (b->put(b->ctx, key, "x", 1, 10 * NEP_S) != NEP_ERR_INVALID) << 1;
    wrong |= (b->put(b->ctx, "", "x", 1, 10 * NEP_S) != NEP_ERR_INVALID) << 2;
    wrong |= (b->allgather(b->ctx, big, big, 8u << 20, 10 * NEP_S) != NEP_ERR_OVERFLOW) << 3;
    wrong |= (b->put(b->ctx, "small", "12345678", 8, 10 * NEP_S) != NEP_OK) << 4;
    wrong |= (b->get(b->ctx, "small", big, 7, &len, 10 * NEP_S) != NEP_ERR_OVERFLOW) << 5;
    wrong |= (strstr(nep_last_message(), "has 8 bytes, the caller's buffer 7") == NULL) << 6;
    wrong |= (len != 7 || big[0] != 0) << 7;
    wrong |= (b->get(b->ctx, "never put", big, 8, &len, 2 * NEP_S) != NEP_ERR_TIMEOUT) << 8;
    wrong |= (strstr(nep_last_message(), "'never put'") == NULL) << 9;
    /* And the connection still works. */
    wrong |= (b->get(b->ctx, "small", big, 8, &len, 10 * NEP_S) != NEP_OK || len != 8) << 10;
    free(big);
    return wrong == 0 ? NEP_OK : nep_fail(NEP_ERR_INTERNAL, "wrong: %x", wrong);
}

static void test_rendezvous_limits_are_refused_and_harmless(void **state)
{
    (void)state;
    struct group_run run;
    group_run(&run, 1, 5 * NEP_S, exceed_limits, NULL, 0);
    assert_all_fine(&run);
}

static enum nep_status gather_soon(struct group_rank *rank)
{
    uint32_t all[GROUP_MOST];
    struct nep_bootstrap *b = &rank->bootstrap;
    /* Long enough for all but the absent, on a busy machine too. */
    return b->allgather(b->ctx, &rank->rank, all, 4, 6 * NEP_S);
}

static void test_rendezvous_absent_ranks_are_named_on_every_rank(void **state)
{
    (void)state;
    struct group_run run;
    uint64_t start = nep_now_ns();
    group_run(&run, 6, 20 * NEP_S, gather_soon, NULL, 1u << 1 | 1u << 3 | 1u << 4);
    assert_true(nep_now_ns() - start < 30 * NEP_S);
    for (uint32_t r = 0; r < 6; r++) {
        if (r == 0 || r == 2 || r == 5) {
            assert_int_equal(run.ranks[r].status, NEP_ERR_TIMEOUT);
            assert_says(run.ranks[r].message,
                        "of 6 ranks, these did not join within 6s: rank 1, 3-4");
        }
    }
}

/* All join, then rank 2 does nothing until the others have their answers. */
static enum nep_status one_stays_away(struct group_rank *rank)
{
    uint32_t all[GROUP_MOST];
    struct nep_bootstrap *b = &rank->bootstrap;
    atomic_uint *num_answered = rank->run->arg;
    enum nep_status status = b->allgather(b->ctx, &rank->rank, all, 4, 60 * NEP_S);
    if (status != NEP_OK) {
        return status;
    }
    if (rank->rank == 2) {
        while (atomic_load(num_answered) < 3) {
            usleep(1000);
        }
        return NEP_ERR_TIMEOUT;
    }
    status = gather_soon(rank);
    atomic_fetch_add(num_answered, 1);
    return status;
}

static void test_rendezvous_rank_that_does_not_come_is_named(void **state)
{
    (void)state;
    struct group_run run;
    atomic_uint num_answered = 0;
    group_run(&run, 4, 60 * NEP_S, one_stays_away, &num_answered, 0);
    for (uint32_t r = 0; r < 4; r++) {
        assert_int_equal(run.ranks[r].status, NEP_ERR_TIMEOUT);
        if (r != 2) {
            assert_says(run.ranks[r].message,
                        "joined but did not come to exchange 1 within 6s: rank 2");
        }
    }
}

static enum nep_status gather_unlike(struct group_rank *rank)
{
    uint64_t mine = 0, all[GROUP_MOST];
    struct nep_bootstrap *b = &rank->bootstrap;
    return b->allgather(b->ctx, &mine, all, rank->rank == 3 ? 8 : 4, 5 * NEP_S);
}

static void test_rendezvous_unlike_exchanges_are_named(void **state)
{
    (void)state;
    struct group_run run;
    group_run(&run, 5, 5 * NEP_S, gather_unlike, NULL, 0);
    for (uint32_t r = 0; r < 5; r++) {
        assert_int_equal(run.ranks[r].status, NEP_ERR_MISMATCH);
        assert_says(run.ranks[r].message, "4 bytes (number 0) on ranks 0-2, 4, 8 bytes (number 0) "
                                          "on rank 3");
    }
}

static enum nep_status one_leaves(struct group_rank *rank)
{
    if (rank->rank == 1) {
        usleep(50000);
        nep_rendezvous_client_close(rank->client);
        rank->client = NULL;
        return NEP_ERR_PEER_LOST;
    }
    uint32_t all[GROUP_MOST];
    return rank->bootstrap.allgather(rank->bootstrap.ctx, &rank->rank, all, 4, 20 * NEP_S);
}

static void test_rendezvous_rank_that_leaves_is_named_at_once(void **state)
{
    (void)state;
    struct group_run run;
    uint64_t start = nep_now_ns();
    group_run(&run, 4, 20 * NEP_S, one_leaves, NULL, 0);
    for (uint32_t r = 0; r < 4; r++) {
        assert_int_equal(run.ranks[r].status, NEP_ERR_PEER_LOST);
        if (r != 1) {
            assert_says(run.ranks[r].message, "rank 1 (host ");
            assert_says(run.ranks[r].message, "has left the group");
        }
    }
    assert_true(nep_now_ns() - start < 15 * NEP_S);
}

/* ---- addresses ------------------------------------------------------------------------------ */

static void test_rendezvous_unix_socket_and_taken_address(void **state)
{
    (void)state;
    struct nep_rendezvous_server *server = NULL, *second = NULL;
    struct nep_rendezvous_client *client = NULL;
    char host[64];
    uint16_t port = 0;
    snprintf(host, sizeof host, "@nearep-test-%ld", (long)getpid());
    struct nep_rendezvous_params params = {.host = host, .num_ranks = 1, .timeout_ns = 5 * NEP_S};
    assert_int_equal(nep_rendezvous_server_start(&params, &server, &port), NEP_OK);
    assert_int_equal(nep_rendezvous_server_start(&params, &second, &port), NEP_ERR_BUSY);
    assert_null(second);
    assert_int_equal(nep_rendezvous_client_open(&params, &client), NEP_OK);
    nep_rendezvous_client_close(client);
    nep_rendezvous_server_stop(server);
    params.host = "192.0.2.1"; /* TEST-NET: nobody's */
    params.port = 4000;
    assert_int_equal(nep_rendezvous_server_start(&params, &server, &port), NEP_ERR_NOT_FOUND);
    params.host = "no.such.host.invalid";
    params.timeout_ns = 200 * NEP_MS;
    assert_int_equal(nep_rendezvous_client_open(&params, &client), NEP_ERR_TIMEOUT);
    assert_says(nep_last_message(), "no.such.host.invalid");
    params.num_ranks = 0;
    assert_int_equal(nep_rendezvous_server_start(&params, &server, &port), NEP_ERR_INVALID);
    nep_rendezvous_server_stop(NULL);
    nep_rendezvous_client_close(NULL);
}

static void test_rendezvous_released_server_serves_until_last_client(void **state)
{
    (void)state;
    struct nep_rendezvous_server *server = NULL;
    struct nep_rendezvous_client *clients[2] = {NULL, NULL};
    struct nep_bootstrap bootstraps[2];
    struct nep_rendezvous_params params = {
        .host = "127.0.0.1", .num_ranks = 2, .timeout_ns = 5 * NEP_S};
    assert_int_equal(nep_rendezvous_server_start(&params, &server, &params.port), NEP_OK);
    for (uint32_t r = 0; r < 2; r++) {
        params.rank = r;
        assert_int_equal(nep_rendezvous_client_open(&params, &clients[r]), NEP_OK);
        nep_rendezvous_client_bootstrap(clients[r], &bootstraps[r]);
    }
    nep_rendezvous_server_release(server);
    assert_int_equal(bootstraps[0].put(bootstraps[0].ctx, "k", "v", 1, 60 * NEP_S), NEP_OK);
    nep_rendezvous_client_close(clients[0]);
    char value;
    size_t len;
    assert_int_equal(bootstraps[1].get(bootstraps[1].ctx, "k", &value, 1, &len, 60 * NEP_S),
                     NEP_OK);
    assert_true(len == 1 && value == 'v');
    nep_rendezvous_client_close(clients[1]);
    /* Its address is free again, at the latest when the thread has run. */
    params.rank = 0;
    enum nep_status status = NEP_ERR_BUSY;
    uint64_t deadline = nep_deadline_ns(10 * NEP_S);
    while (status == NEP_ERR_BUSY && nep_left_ns(deadline) != 0) {
        status = nep_rendezvous_server_start(&params, &server, &params.port);
        usleep(1000);
    }
    assert_int_equal(status, NEP_OK);
    nep_rendezvous_server_stop(server);
}

static void test_rendezvous_end_of_server_is_named(void **state)
{
    (void)state;
    struct nep_rendezvous_server *server = NULL;
    struct nep_rendezvous_client *client = NULL;
    struct nep_bootstrap b;
    struct nep_rendezvous_params params = {
        .host = "127.0.0.1", .num_ranks = 2, .timeout_ns = 5 * NEP_S, .is_rank_0 = true};
    uint32_t mine = 0, all[2];
    assert_int_equal(nep_rendezvous_server_start(&params, &server, &params.port), NEP_OK);
    assert_int_equal(nep_rendezvous_client_open(&params, &client), NEP_OK);
    nep_rendezvous_client_bootstrap(client, &b);
    nep_rendezvous_server_stop(server);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(b.allgather(b.ctx, &mine, all, 4, 5 * NEP_S), NEP_ERR_PEER_LOST);
        assert_says(nep_last_message(), "(served by rank 0) is gone");
    }
    nep_rendezvous_client_close(client);
    /* Closing what has failed, or fails at the goodbye, keeps the sentence of the cause. */
    assert_int_equal(nep_rendezvous_server_start(&params, &server, &params.port), NEP_OK);
    assert_int_equal(nep_rendezvous_client_open(&params, &client), NEP_OK);
    nep_rendezvous_server_stop(server);
    nep_fail(NEP_ERR_MISMATCH, "the cause");
    nep_rendezvous_client_close(client);
    assert_string_equal(nep_last_message(), "the cause");
}

/* A process forked from the one that serves, as data loaders are, holds all its sockets. */
static void test_rendezvous_forked_process_disturbs_nothing(void **state)
{
    (void)state;
    struct nep_rendezvous_server *server = NULL;
    struct nep_rendezvous_client *first = NULL;
    struct nep_bootstrap b;
    int fds[2];
    assert_int_equal(pipe(fds), 0);
    struct nep_rendezvous_params params = {
        .host = "127.0.0.1", .num_ranks = 1, .timeout_ns = 10 * NEP_S};
    assert_int_equal(nep_rendezvous_server_start(&params, &server, &params.port), NEP_OK);
    assert_int_equal(nep_rendezvous_client_open(&params, &first), NEP_OK);
    pid_t pid = fork();
    if (pid == 0) {
        /* In the child the connection is of no use, and closing it does not end the parent's. */
        uint32_t one = 1, two;
        nep_rendezvous_client_bootstrap(first, &b);
        bool is_refused = b.allgather(b.ctx, &one, &two, 4, NEP_S) == NEP_ERR_BROKEN;
        nep_rendezvous_client_close(first);
        ssize_t written = write(fds[1], &is_refused, sizeof is_refused);
        (void)written;
        pause();
        _exit(0);
    }
    bool is_refused = false;
    uint32_t mine = 7, all = 0;
    assert_int_equal(read(fds[0], &is_refused, sizeof is_refused), sizeof is_refused);
    assert_true(is_refused);
    nep_rendezvous_client_bootstrap(first, &b);
    assert_int_equal(b.allgather(b.ctx, &mine, &all, 4, 60 * NEP_S), NEP_OK);
    nep_rendezvous_client_close(first);
    for (int i = 0; i < 20; i++) {
        struct nep_rendezvous_client *client = NULL;
        all = 0;
        assert_int_equal(nep_rendezvous_client_open(&params, &client), NEP_OK);
        nep_rendezvous_client_bootstrap(client, &b);
        assert_int_equal(b.allgather(b.ctx, &mine, &all, 4, 60 * NEP_S), NEP_OK);
        assert_int_equal(all, 7);
        nep_rendezvous_client_close(client);
    }
    nep_rendezvous_server_stop(server);
    /* Its address is free, though the forked process has it too. */
    assert_int_equal(nep_rendezvous_server_start(&params, &server, &params.port), NEP_OK);
    nep_rendezvous_server_stop(server);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    close(fds[0]);
    close(fds[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rendezvous_gather_brings_all_in_rank_order),
        cmocka_unit_test(test_rendezvous_get_waits_for_put),
        cmocka_unit_test(test_rendezvous_cas_loses_no_update),
        cmocka_unit_test(test_rendezvous_waiting_get_holds_up_nobody),
        cmocka_unit_test(test_rendezvous_limits_are_refused_and_harmless),
        cmocka_unit_test(test_rendezvous_absent_ranks_are_named_on_every_rank),
        cmocka_unit_test(test_rendezvous_rank_that_does_not_come_is_named),
        cmocka_unit_test(test_rendezvous_unlike_exchanges_are_named),
        cmocka_unit_test(test_rendezvous_rank_that_leaves_is_named_at_once),
        cmocka_unit_test(test_rendezvous_unix_socket_and_taken_address),
        cmocka_unit_test(test_rendezvous_released_server_serves_until_last_client),
        cmocka_unit_test(test_rendezvous_forked_process_disturbs_nothing),
        cmocka_unit_test(test_rendezvous_end_of_server_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
