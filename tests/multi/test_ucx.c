/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Transport `ucx` when peers die, leave or lie. Where UCX is not here, test_transport.c checks that
 * this is said, and these tests have nothing to run.
 */
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cmocka_all.h"
#include "conformance.h"

#include "base/clock.h"

#if NEP_HAVE_UCX
#include "transport/ucx.h"

enum { SLOT = 4 << 20, SHORT = 64, VICTIM = 2, NUM_RANKS = 3, LEAVES = 10 };

static int put_bytes(struct rank *rank, struct nep_transport *transport,
                     const struct window *window, uint32_t dst, uint32_t len, uint32_t imm,
                     uint64_t *number_p)
{
    struct nep_put put = {.dst = dst,
                          .window = window->number,
                          .offset = window_landing(window, rank->rank),
                          .src = window_source(window, dst),
                          .len = len,
                          .imm = window_imm(window->number, imm)};
    enum nep_status status = transport->ops->put(transport, &put, number_p);
    RANK_CHECK(rank, status == NEP_OK, "%s", nep_last_message());
    return 0;
}

/* ---- a rank is killed --------------------------------------------------------------------- */

static int wait_lost(struct rank *rank, struct nep_transport *transport, uint32_t peer)
{
    uint64_t deadline_ns = nep_deadline_ns(60 * NEP_S);
    while (transport->ops->peer_status(transport, peer) == NEP_OK) {
        RANK_CHECK(rank, nep_now_ns() < deadline_ns, "rank %u is dead and nobody noticed", peer);
        usleep(1000);
    }
    RANK_CHECK(rank, transport->ops->peer_status(transport, peer) == NEP_ERR_PEER_LOST, "%s",
               nep_last_message());
    char name[16];
    snprintf(name, sizeof name, "rank %u", peer);
    RANK_CHECK(rank, strstr(nep_last_message(), name) != NULL, "not named: %s", nep_last_message());
    return 0;
}

/* Keeps puts of several MB on their way to the victim until it is known to be dead. */
static int survive(struct rank *rank, struct nep_transport *transport, const struct window *window)
{
    uint32_t other = 1 - rank->rank;
    uint64_t number = 0, last = 0;
    struct nep_put put = {.dst = VICTIM,
                          .window = window->number,
                          .offset = window_landing(window, rank->rank),
                          .src = window_source(window, VICTIM),
                          .len = SLOT,
                          .imm = window_imm(window->number, 0)};
    uint64_t deadline_ns = nep_deadline_ns(20 * NEP_S);
    while (transport->ops->put(transport, &put, &number) == NEP_OK) {
        last = number;
        RANK_CHECK(rank, nep_now_ns() < deadline_ns, "puts to a dead rank are taken");
        for (int i = 0; i < 100 && transport->ops->completed(transport, VICTIM) + 4 < last; i++) {
            usleep(100);
        }
    }
    if (wait_lost(rank, transport, VICTIM) != 0 ||
        /* Sources of puts to the dead are free again. */
        wait_completed(rank, transport, VICTIM, last) != 0) {
        return 1;
    }
    /* The living still reach each other. */
    fill(window_source(window, other), SLOT, rank->rank);
    if (put_bytes(rank, transport, window, other, SLOT, 1, &number) != 0 ||
        wait_completed(rank, transport, other, number) != 0 ||
        window_wait(rank, transport, window, other, 1) != 0) {
        return 1;
    }
    char *expected = malloc(SLOT);
    RANK_CHECK(rank, expected != NULL, "no memory");
    fill(expected, SLOT, other);
    int wrong = memcmp(expected, (char *)window->base + window_landing(window, other), SLOT);
    free(expected);
    RANK_CHECK(rank, wrong == 0, "bytes of rank %u are wrong", other);
    RANK_CHECK(rank, transport->ops->peer_status(transport, other) == NEP_OK, "%s",
               nep_last_message());
    /* A barrier of two: the window must stay until the other one has what was sent. */
    atomic_uint *num_done = rank->scratch;
    atomic_fetch_add(num_done, 1);
    while (atomic_load(num_done) != 2) {
        RANK_CHECK(rank, nep_now_ns() < deadline_ns + 20 * NEP_S, "the other survivor is gone");
        sched_yield();
    }
    return 0;
}

static int killed_body(struct rank *rank)
{
    struct nep_transport *transport;
    struct window window;
    enum nep_status status = conformance_open(rank, "ucx", 30 * NEP_S, &transport);
    RANK_CHECK(rank, status == NEP_OK, "%s", nep_last_message());
    if (window_open(rank, transport, 0, SLOT, &window) != 0) {
        return 1;
    }
    if (rank->rank == VICTIM) {
        uint64_t number;
        put_bytes(rank, transport, &window, 0, SLOT, 0, &number);
        usleep(*(useconds_t *)rank->arg);
        raise(SIGKILL);
    }
    int failed = survive(rank, transport, &window);
    window_close(transport, &window);
    uint64_t start_ns = nep_now_ns();
    transport->ops->close(transport);
    printf("rank %u closed beside a dead peer in %.3f s\n", rank->rank,
           (double)(nep_now_ns() - start_ns) / (double)NEP_S);
    return failed;
}

static void test_ucx_killed_rank_is_named_and_others_go_on(void **state)
{
    (void)state;
    if (RANKS_ONLY_THREADS) {
        printf("ranks are threads here and cannot be killed alone\n");
        return;
    }
    uint64_t random = ranks_seed("ucx, a killed rank");
    for (int i = 0; i < 4; i++) {
        useconds_t delay = i == 0 ? 0 : (useconds_t)(rank_random(&random) % 60000);
        struct ranks_params params = {.ranks_per_node = (uint32_t[]){1, 1, 1},
                                      .num_nodes = 3,
                                      .seconds = 120,
                                      .num_spare = 1};
        assert_int_equal(ranks_run(&params, killed_body, &delay), 0);
    }
}

/* ---- a rank stands still ------------------------------------------------------------------ */

static int stopped_body(struct rank *rank)
{
    struct nep_transport *transport;
    enum nep_status status = conformance_open(rank, "ucx", 15 * NEP_S, &transport);
    RANK_CHECK(rank, status == NEP_OK, "%s", nep_last_message());
    atomic_int *victim = rank->scratch;
    if (rank->rank == VICTIM) {
        atomic_store(victim, (int)getpid());
        usleep(100000000); /* stopped meanwhile, and killed at the end */
        return 1;
    }
    while (atomic_load(victim) == 0) {
        sched_yield();
    }
    if (rank->rank == 0) {
        kill(atomic_load(victim), SIGSTOP);
    }
    int failed = wait_lost(rank, transport, VICTIM);
    RANK_CHECK(rank, strstr(nep_last_message(), "heartbeat") != NULL, "%s", nep_last_message());
    RANK_CHECK(rank, transport->ops->peer_status(transport, 1 - rank->rank) == NEP_OK, "%s",
               nep_last_message());
    atomic_int *num_done = victim + 1;
    atomic_fetch_add(num_done, 1);
    while (atomic_load(num_done) < 2) {
        sched_yield();
    }
    transport->ops->close(transport); /* beside a peer that does not answer: bounded */
    if (rank->rank == 0) {
        kill(atomic_load(victim), SIGKILL);
    }
    return failed;
}

static void test_ucx_stopped_rank_misses_heartbeats(void **state)
{
    (void)state;
    struct ranks_params params = {
        .ranks_per_node = (uint32_t[]){1, 1, 1}, .num_nodes = 3, .seconds = 120, .num_spare = 1};
    assert_int_equal(ranks_run(&params, stopped_body, NULL), 0);
}

extern const struct nep_transport_ops nep_ucx_ops;

/* Silence is no proof of death before the timeout, nor is it one when this rank itself stood still.
 */
static void test_ucx_silent_rank_is_slow_before_it_is_lost(void **state)
{
    (void)state;
    static const struct {
        uint64_t silent_s;
        uint32_t own_beats; /* since it was heard */
        bool is_said;       /* in the log, as slow */
        enum nep_status status;
    } cases[] = {
        {4, 4, false, NEP_OK},  {6, 6, true, NEP_OK},
        {50, 50, true, NEP_OK}, {50, 2, false, NEP_OK},
        {70, 2, false, NEP_OK}, {70, 70, false, NEP_ERR_PEER_LOST},
        {70, 40, true, NEP_OK}, {91, 40, false, NEP_ERR_PEER_LOST},
    };
    struct nep_ucx *ux = calloc(1, sizeof *ux);
    ux->rank = 1;
    ux->num_ranks = NUM_RANKS;
    ux->params.timeout_ns = 60 * NEP_S;
    ux->peers = calloc(NUM_RANKS, sizeof *ux->peers);
    struct nep_ucx_peer *peer = &ux->peers[0];
    atomic_store(&peer->state, NEP_UCX_ALIVE);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint64_t heard_ns = nep_now_ns() - cases[i].silent_s * NEP_S;
        atomic_store(&peer->heard_ns, heard_ns);
        atomic_store(&peer->num_silent, cases[i].own_beats);
        assert_int_equal(nep_ucx_ops.peer_status(&ux->transport, 0), cases[i].status);
        assert_int_equal(atomic_load(&peer->said_heard_ns) == heard_ns, cases[i].is_said);
        assert_true(cases[i].status == NEP_OK ||
                    strstr(nep_last_message(), "rank 0 is lost: nothing heard") != NULL);
    }
    free(ux->peers);
    free(ux);
}

/* ---- a rank leaves ------------------------------------------------------------------------ */

/* Long and short puts go over connections of their own: each has the last word once. */
static int put_two(struct rank *rank, struct nep_transport *transport, struct window *window,
                   uint32_t dst, uint32_t last_len, uint64_t *number_p)
{
    fill(window_source(window, dst), SLOT, dst + 100);
    int failed = put_bytes(rank, transport, window, dst, SHORT, 9, number_p);
    return failed != 0 ? failed : put_bytes(rank, transport, window, dst, last_len, 9, number_p);
}

/* What was sent just before close arrives, and then the rank is said to have left. */
static int leave_once(struct rank *rank, uint32_t last_len)
{
    struct nep_transport *transport;
    struct window window;
    uint64_t number;
    enum nep_status status = conformance_open(rank, "ucx", 30 * NEP_S, &transport);
    RANK_CHECK(rank, status == NEP_OK, "%s", nep_last_message());
    if (window_open(rank, transport, 7, SLOT, &window) != 0) {
        return 1;
    }
    if (rank->rank == VICTIM) {
        for (uint32_t dst = 0; dst < VICTIM; dst++) {
            if (put_two(rank, transport, &window, dst, last_len, &number) != 0) {
                return 1;
            }
        }
        for (uint32_t dst = 0; dst < VICTIM; dst++) {
            if (wait_completed(rank, transport, dst, number) != 0) {
                return 1;
            }
        }
    } else {
        if (wait_lost(rank, transport, VICTIM) != 0) {
            return 1;
        }
        RANK_CHECK(rank, strstr(nep_last_message(), "closed") != NULL, "%s", nep_last_message());
        RANK_CHECK(rank, window_arrivals(&window, VICTIM, 9) == 2, "a last put is lost");
        char *expected = malloc(SLOT);
        RANK_CHECK(rank, expected != NULL, "no memory");
        fill(expected, SLOT, rank->rank + 100);
        int wrong =
            memcmp(expected, (char *)window.base + window_landing(&window, VICTIM), last_len);
        free(expected);
        RANK_CHECK(rank, wrong == 0, "the last put is damaged");
    }
    window_close(transport, &window);
    transport->ops->close(transport);
    return 0;
}

static int leaving_body(struct rank *rank)
{
    for (int i = 0; i < 2 * LEAVES; i++) {
        if (leave_once(rank, i % 2 == 0 ? SHORT : SLOT) != 0) {
            return 1;
        }
    }
    return 0;
}

static void test_ucx_leaving_rank_delivers_and_is_named(void **state)
{
    (void)state;
    struct ranks_params params = {.ranks_per_node = (uint32_t[]){1, 1, 1},
                                  .num_nodes = 3,
                                  .threads = RANKS_ONLY_THREADS,
                                  .seconds = 60};
    assert_int_equal(ranks_run(&params, leaving_body, NULL), 0);
}

/* ---- a rank lies -------------------------------------------------------------------------- */

enum { PASS_0 = 0x1234, PASS_2 = 0x4321 };

static uint32_t num_heard;

static void count_sink(void *base, uint32_t dst, uint32_t src, uint32_t imm)
{
    (void)base;
    (void)dst;
    (void)src;
    (void)imm;
    num_heard++;
}

static struct nep_ucx *make_receiver(char *memory, uint64_t bytes)
{
    struct nep_ucx *ux = calloc(1, sizeof *ux);
    ux->rank = 1;
    ux->num_ranks = NUM_RANKS;
    ux->params.sink = count_sink;
    ux->peers = calloc(NUM_RANKS, sizeof *ux->peers);
    ux->peers[0].pass_from = PASS_0;
    ux->peers[2].pass_from = PASS_2;
    ux->windows[3].base = memory;
    ux->windows[3].bytes = calloc(NUM_RANKS, sizeof(uint64_t));
    ux->windows[3].bytes[1] = bytes;
    ux->windows[3].life = 5;
    atomic_store(&ux->windows[3].alive, true);
    return ux;
}

static void test_ucx_forged_headers_write_nothing(void **state)
{
    (void)state;
    char memory[192], payload[64], untouched[192];
    memset(memory, 0x11, sizeof memory);
    memset(untouched, 0x11, sizeof untouched);
    memset(payload, 0x22, sizeof payload);
    char *window = memory + 64; /* guards on both sides */
    struct nep_ucx *ux = make_receiver(window, 64);
    const struct nep_ucx_header good = {
        .pass = PASS_0, .src = 0, .window = 3, .offset = 16, .len = 48, .life = 5, .num_pieces = 1};
    struct nep_ucx_header bad[12];
    for (int i = 0; i < 12; i++) {
        bad[i] = good;
    }
    bad[0].pass++;
    bad[1].src = 1; /* the receiver itself */
    bad[2].src = NUM_RANKS;
    bad[3].window = 4;
    bad[4].window = 64;
    bad[5].window = UINT32_MAX;
    bad[6].life = 6;    /* not made yet */
    bad[7].offset = 17; /* one byte too far */
    bad[8].offset = UINT64_MAX - 7;
    bad[9].len = 47; /* not what came */
    bad[10].num_pieces = 0;
    bad[11].src = UINT32_MAX;
    ucp_am_recv_param_t param = {.recv_attr = 0};
    num_heard = 0;
    for (int i = 0; i < 12; i++) {
        nep_ucx_on_put(ux, &bad[i], sizeof bad[i], payload, 48, &param);
        assert_int_equal(atomic_load(&ux->num_refused), i + 1);
    }
    nep_ucx_on_put(ux, &good, sizeof good - 1, payload, 48, &param);
    nep_ucx_on_put(ux, &good, 0, payload, 48, &param);
    assert_int_equal(atomic_load(&ux->num_refused), 14);
    /* A put for the window's former life is late, not a lie. */
    struct nep_ucx_header late = good;
    late.life = 4;
    late.src = 2;
    late.pass = PASS_2;
    nep_ucx_on_put(ux, &late, sizeof late, payload, 48, &param);
    assert_int_equal(atomic_load(&ux->num_refused), 15);
    assert_int_equal(num_heard, 0);
    assert_memory_equal(memory, untouched, sizeof memory);
    assert_true(atomic_load(&ux->peers[0].misbehaved));
    assert_false(atomic_load(&ux->peers[2].misbehaved));
    /* The good one is taken, so it was the lie that was refused. */
    assert_int_equal(nep_ucx_on_put(ux, &good, sizeof good, payload, 48, &param), UCS_OK);
    assert_int_equal(num_heard, 1);
    memset(untouched + 64 + 16, 0x22, 48);
    assert_memory_equal(memory, untouched, sizeof memory);
    free(ux->windows[3].bytes);
    free(ux->peers);
    free(ux);
}

/* Each rank writes its own slots, under its own name. */
/* Goodbyes of a peer with two connections, their ends before and after, in all orders that a
 * network can make of them: it has left when nothing of it can come any more, and not before. */
static void test_ucx_leaving_takes_all_connections(void **state)
{
    (void)state;
    static const struct {
        const char *news; /* g: a goodbye, e: a connection ends */
        int states[5];    /* after each */
    } cases[] = {
        {"gg", {NEP_UCX_ALIVE, NEP_UCX_LEFT}},
        {"gege", {NEP_UCX_ALIVE, NEP_UCX_ALIVE, NEP_UCX_LEFT, NEP_UCX_LEFT}},
        {"ggee", {NEP_UCX_ALIVE, NEP_UCX_LEFT, NEP_UCX_LEFT, NEP_UCX_LEFT}},
        {"gee", {NEP_UCX_ALIVE, NEP_UCX_ALIVE, NEP_UCX_FAILED}}, /* killed between the two */
        {"e", {NEP_UCX_FAILED}},
    };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        char memory[64];
        struct nep_ucx *ux = make_receiver(memory, sizeof memory);
        struct nep_ucx_peer *peer = &ux->peers[0];
        struct nep_ucx_header word = {.pass = PASS_0, .src = 0, .num_pieces = 2};
        ucp_am_recv_param_t param = {0};
        peer->ux = ux;
        atomic_store(&peer->state, NEP_UCX_ALIVE);
        for (size_t i = 0; cases[c].news[i] != '\0'; i++) {
            if (cases[c].news[i] == 'g') {
                nep_ucx_on_leave(ux, &word, sizeof word, NULL, 0, &param);
            } else {
                nep_ucx_connection_fail(peer, UCS_ERR_CONNECTION_RESET);
            }
            if (atomic_load(&peer->state) != cases[c].states[i]) {
                fail_msg("%s, %zu: state %d", cases[c].news, i, atomic_load(&peer->state));
            }
        }
        free(ux->windows[3].bytes);
        free(ux->peers);
        free(ux);
    }
}

static void test_ucx_another_ranks_slots_are_refused(void **state)
{
    (void)state;
    char memory[64] = {0}, payload[16];
    memset(payload, 0x22, sizeof payload);
    struct nep_ucx *ux = make_receiver(memory, sizeof memory);
    const struct nep_grant list[] = {{0, 0, 16}, {2, 16, 16}, {0, 48, 16}};
    assert_int_equal(nep_grants_set(&ux->windows[3].grants, NUM_RANKS, list, 3), NEP_OK);
    static const struct {
        uint32_t pass, src, offset, len;
        bool is_right;
    } puts[] = {
        {PASS_0, 0, 0, 16, true},   {PASS_0, 0, 48, 16, true}, {PASS_2, 2, 20, 12, true},
        {PASS_0, 0, 63, 1, true},   {PASS_0, 0, 40, 0, true}, /* nothing, but an announcement */
        {PASS_0, 0, 16, 16, false},                           /* the other's */
        {PASS_0, 2, 16, 16, false},                           /* the same, under its name */
        {PASS_0, 0, 8, 16, false},                            /* half of it */
        {PASS_0, 0, 32, 16, false},                           /* nobody's */
        {PASS_0, 0, 47, 1, false},  {PASS_2, 2, 0, 16, false}, {PASS_2, 2, 15, 2, false},
        {PASS_2, 2, 31, 2, false},
    };
    ucp_am_recv_param_t param = {.recv_attr = 0};
    uint32_t num_right = 0, num_wrong = 0;
    num_heard = 0;
    for (size_t i = 0; i < sizeof puts / sizeof puts[0]; i++) {
        struct nep_ucx_header head = {.pass = puts[i].pass,
                                      .src = puts[i].src,
                                      .window = 3,
                                      .offset = puts[i].offset,
                                      .len = puts[i].len,
                                      .life = 5,
                                      .num_pieces = 1};
        char before[64];
        memcpy(before, memory, sizeof before);
        nep_ucx_on_put(ux, &head, sizeof head, payload, puts[i].len, &param);
        num_right += puts[i].is_right;
        num_wrong += !puts[i].is_right;
        assert_int_equal(num_heard, num_right);
        assert_int_equal(atomic_load(&ux->num_refused), num_wrong);
        if (!puts[i].is_right) {
            assert_memory_equal(memory, before, sizeof before);
        }
    }
    assert_true(atomic_load(&ux->peers[0].misbehaved));
    nep_grants_free(&ux->windows[3].grants);
    free(ux->windows[3].bytes);
    free(ux->peers);
    free(ux);
}

/* What two ranks agree on is one number for each way, and another one for every other pair. */
static void test_ucx_passes_are_of_a_pair_and_a_way(void **state)
{
    (void)state;
    struct nep_ucx ranks[NUM_RANKS];
    struct nep_ucx_keys keys[NUM_RANKS];
    for (uint32_t r = 0; r < NUM_RANKS; r++) {
        ranks[r] = (struct nep_ucx){.rank = r, .num_ranks = NUM_RANKS};
        ranks[r].peers = calloc(NUM_RANKS, sizeof *ranks[r].peers);
        assert_int_equal(nep_ucx_keys_make(&keys[r]), NEP_OK);
    }
    uint32_t seen[NUM_RANKS * NUM_RANKS], num = 0;
    for (uint32_t r = 0; r < NUM_RANKS; r++) {
        for (uint32_t p = 0; p < NUM_RANKS; p++) {
            if (p != r) {
                assert_int_equal(nep_ucx_pass_agree(&ranks[r], &keys[r], p, keys[p].open), NEP_OK);
                seen[num++] = ranks[r].peers[p].pass_to;
            }
        }
    }
    for (uint32_t r = 0; r < NUM_RANKS; r++) {
        for (uint32_t p = 0; p < NUM_RANKS; p++) {
            assert_int_equal(ranks[r].peers[p].pass_to, ranks[p].peers[r].pass_from);
        }
    }
    for (uint32_t i = 0; i < num; i++) {
        for (uint32_t j = 0; j < i; j++) {
            assert_int_not_equal(seen[i], seen[j]); /* by chance: once in 2^28 runs */
        }
    }
    static const uint8_t no_key[NEP_UCX_KEY_BYTES];
    assert_int_equal(nep_ucx_pass_agree(&ranks[0], &keys[0], 1, no_key), NEP_ERR_MISMATCH);
    for (uint32_t r = 0; r < NUM_RANKS; r++) {
        free(ranks[r].peers);
    }
}

/* Pieces in any order, those of two puts mixed: each put is announced with its last piece. */
static void test_ucx_pieces_out_of_order_announce_once(void **state)
{
    (void)state;
    char memory[64] = {0}, payload[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    struct nep_ucx *ux = make_receiver(memory, 64);
    struct nep_ucx_header piece = {.pass = PASS_2, .src = 2, .window = 3, .len = 8, .life = 5};
    static const struct {
        uint32_t put, offset, num_heard;
    } order[] = {{7, 16, 0}, {8, 32, 0}, {7, 0, 0}, {8, 40, 1}, {7, 8, 2}};
    ucp_am_recv_param_t param = {.recv_attr = 0};
    num_heard = 0;
    for (size_t i = 0; i < sizeof order / sizeof order[0]; i++) {
        piece.put = order[i].put;
        piece.num_pieces = order[i].put == 7 ? 3 : 2;
        piece.offset = order[i].offset;
        nep_ucx_on_put(ux, &piece, sizeof piece, payload, 8, &param);
        assert_int_equal(num_heard, order[i].num_heard);
    }
    for (int i = 0; i < 24; i++) {
        assert_int_equal(memory[i], i % 8 + 1);
    }
    assert_null(ux->peers[2].partials);
    while (ux->unused_partials != NULL) {
        struct nep_ucx_partial *next = ux->unused_partials->next;
        free(ux->unused_partials);
        ux->unused_partials = next;
    }
    free(ux->windows[3].bytes);
    free(ux->peers);
    free(ux);
}
#endif

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
#if NEP_HAVE_UCX
    struct nep_ucx_lib lib;
    if (nep_ucx_lib_open(&lib) != NEP_OK) {
        printf("UCX is not here: %s\n", nep_last_message());
        return 0;
    }
    nep_ucx_lib_close(&lib);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ucx_forged_headers_write_nothing),
        cmocka_unit_test(test_ucx_leaving_takes_all_connections),
        cmocka_unit_test(test_ucx_another_ranks_slots_are_refused),
        cmocka_unit_test(test_ucx_passes_are_of_a_pair_and_a_way),
        cmocka_unit_test(test_ucx_pieces_out_of_order_announce_once),
        cmocka_unit_test(test_ucx_killed_rank_is_named_and_others_go_on),
        cmocka_unit_test(test_ucx_stopped_rank_misses_heartbeats),
        cmocka_unit_test(test_ucx_silent_rank_is_slow_before_it_is_lost),
        cmocka_unit_test(test_ucx_leaving_rank_delivers_and_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
#else
    printf("this build has no transport ucx; test_transport checks that it says so\n");
    return 0;
#endif
}
