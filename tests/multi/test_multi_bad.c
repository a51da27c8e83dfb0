/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bad input between ranks: everything is refused with a sentence that names what and who, on every
 * rank, and what was refused changed nothing.
 */
#include <signal.h>
#include <string.h>
#include <sys/resource.h>

#include "tests/multi/world.h"
#include "tests/unit/cmocka_all.h"
#include "transport/rendezvous.h"

static const struct nep_multi_shape plain = {.name = "plain",
                                             .num_nodes = 2,
                                             .ranks_per_node = {2, 1},
                                             .experts = 12,
                                             .top_k = 3,
                                             .hidden = 32,
                                             .max_tokens = 8,
                                             .layout = NEP_LAYOUT_EXPERT_PACKED,
                                             .is_fixed_tokens = true,
                                             .outstanding = 2,
                                             .intra = "loop",
                                             .inter = "loop",
                                             .timeout_ns = 20000000000ull,
                                             .seed = 7};

static void run(nep_multi_fn fn, void *arg)
{
    struct nep_multi_result result;
    nep_multi_run_threads(3, fn, arg, &result);
    if (result.num_failed != 0) {
        fail_msg("%s", result.error);
    }
}

/* The call must have failed so, with these words. */
static bool expect(struct nep_multi_rank *rank, const char *what, enum nep_status got,
                   enum nep_status want, const char *word, const char *other_word)
{
    const char *message = nep_last_message();
    if (got != want) {
        return nep_multi_fail(rank, "%s: %s (%s), must be %s", what, nep_status_name(got), message,
                              nep_status_name(want));
    }
    if (strstr(message, word) == NULL || strstr(message, other_word) == NULL) {
        return nep_multi_fail(rank, "%s: the message lacks '%s' or '%s': %s", what, word,
                              other_word, message);
    }
    return true;
}

static enum nep_status try_ep(struct nep_comm *comm, const struct nep_ep_params *params)
{
    struct nep_ep *ep = NULL;
    enum nep_status status = nep_ep_create(comm, params, &ep);
    if (status == NEP_OK) {
        nep_ep_destroy(ep);
    }
    return status;
}

static struct nep_comm *make_comm(struct nep_multi_rank *rank, const uint32_t *nodes, uint32_t num)
{
    struct nep_comm_params params = {.size = sizeof(params),
                                     .rank = rank->rank,
                                     .num_ranks = rank->num_ranks,
                                     .bootstrap = &rank->bootstrap,
                                     .ranks_per_node = nodes,
                                     .num_nodes = num,
                                     .intra = "loop",
                                     .inter = "loop",
                                     .timeout_ns = 20000000000ull};
    struct nep_comm *comm = NULL;
    if (nep_comm_create(&params, &comm) != NEP_OK) {
        nep_multi_fail(rank, "nep_comm_create: %s", nep_last_message());
        return NULL;
    }
    return comm;
}

static const struct nep_ep_params good_ep = {.size = sizeof(good_ep),
                                             .num_experts = 12,
                                             .top_k = 3,
                                             .hidden = 32,
                                             .max_tokens = 8,
                                             .pool_bytes = 1 << 20};

/* Rank 2 alone differs, field by field; every rank must say which field. */
static bool rank_differs(struct nep_multi_rank *rank)
{
    static const uint32_t nodes[] = {2, 1};
    struct nep_comm *comm = make_comm(rank, nodes, 2);
    if (comm == NULL) {
        return false;
    }
    bool is_fine = true;
    static const char *const names[] = {"hidden",     "top_k",  "num_experts",
                                        "max_tokens", "layout", "outstanding"};
    for (int field = 0; field < 6 && is_fine; field++) {
        struct nep_ep_params params = good_ep;
        if (rank->rank == 2) {
            params.hidden = field == 0 ? 64 : params.hidden;
            params.top_k = field == 1 ? 4 : params.top_k;
            params.num_experts = field == 2 ? 15 : params.num_experts;
            params.max_tokens = field == 3 ? 9 : params.max_tokens;
            params.layout = field == 4 ? NEP_LAYOUT_RANK : params.layout;
            params.outstanding = field == 5 ? 2 : params.outstanding;
        }
        is_fine =
            expect(rank, names[field], try_ep(comm, &params), NEP_ERR_MISMATCH, names[field], "2");
    }
    if (is_fine && try_ep(comm, &good_ep) != NEP_OK) {
        is_fine = nep_multi_fail(rank, "equal parameters: %s", nep_last_message());
    }
    is_fine = is_fine && nep_multi_barrier(rank);
    nep_comm_destroy(comm);
    return is_fine;
}

static void test_ep_unequal_parameters_named(void **state)
{
    (void)state;
    run(rank_differs, NULL);
}

static bool rank_impossible(struct nep_multi_rank *rank)
{
    static const uint32_t nodes[] = {2, 1};
    struct nep_comm *comm = make_comm(rank, nodes, 2);
    if (comm == NULL) {
        return false;
    }
    bool is_fine = true;
    for (int i = 0; i < 9 && is_fine; i++) {
        struct nep_ep_params params = good_ep;
        const char *word = "";
        switch (i) {
        case 0:
            params.top_k = 33, word = "33";
            break;
        case 1:
            params.top_k = 0, word = "top_k";
            break;
        case 2:
            params.hidden = 17, word = "17";
            break;
        case 3:
            params.hidden = 0, word = "hidden";
            break;
        case 4:
            params.num_experts = 0, word = "expert";
            break;
        case 5:
            params.max_tokens = 0, word = "max_tokens";
            break;
        case 6:
            params.outstanding = 9, word = "9";
            break;
        case 7:
            params.slots_per_rank = 2, word = "2"; /* 3 ranks of 2 slots hold no 12 experts */
            break;
        default:
            params.layout = (enum nep_layout)77, word = "77";
            break;
        }
        is_fine =
            expect(rank, "impossible shape", try_ep(comm, &params), NEP_ERR_INVALID, word, "");
    }
    is_fine = is_fine && nep_multi_barrier(rank);
    nep_comm_destroy(comm);
    return is_fine;
}

static void test_ep_impossible_shape_refused(void **state)
{
    (void)state;
    run(rank_impossible, NULL);
}

static bool round_trip(struct nep_multi_world *world, uint64_t number)
{
    struct nep_multi_flight *flight = &world->flights[0];
    return nep_multi_dispatch_send(world, flight, number, false) &&
           nep_multi_dispatch_recv(world, flight) && nep_multi_combine_send(world, flight) &&
           nep_multi_combine_recv(world, flight);
}

static enum nep_status send_raw(struct nep_multi_world *world, uint32_t tokens, const int32_t *ids)
{
    struct nep_multi_flight *flight = &world->flights[0];
    struct nep_tokens in = {.size = sizeof(in),
                            .num_tokens = tokens,
                            .x = flight->x,
                            .topk_ids = ids,
                            .topk_weights = flight->weights};
    return nep_dispatch_send(world->ep, flight->handle, &in, NULL);
}

/* Refused calls, on one rank or on all, must leave the ep as it was: a round trip follows each. */
static bool rank_bad_calls(struct nep_multi_rank *rank)
{
    struct nep_multi_world world;
    if (!nep_multi_world_create(rank, &plain, 2, &world) || !round_trip(&world, 1)) {
        return false;
    }
    int32_t ids[8 * 3];
    for (int i = 0; i < 24; i++) {
        ids[i] = i % 12;
    }
    bool is_fine = true;
    if (rank->rank == 1) {
        ids[3 * 5 + 1] = 12;
        is_fine =
            expect(rank, "id too large", send_raw(&world, 8, ids), NEP_ERR_INVALID, "12", "5");
        ids[3 * 5 + 1] = -2;
        is_fine = is_fine && expect(rank, "id too small", send_raw(&world, 8, ids), NEP_ERR_INVALID,
                                    "-2", "5");
        is_fine = is_fine && expect(rank, "too many tokens", send_raw(&world, 9, ids),
                                    NEP_ERR_INVALID, "9", "8");
    }
    is_fine = is_fine && round_trip(&world, 2) && nep_multi_check_stats(&world) &&
              nep_multi_barrier(rank);
    nep_multi_world_destroy(&world);
    return is_fine;
}

static void test_dispatch_bad_ids_refused(void **state)
{
    (void)state;
    run(rank_bad_calls, NULL);
}

/* S = 2: a third send is refused and the two others complete right. */
static bool rank_busy(struct nep_multi_rank *rank)
{
    struct nep_multi_world world;
    if (!nep_multi_world_create(rank, &plain, 3, &world)) {
        return false;
    }
    bool is_fine = nep_multi_dispatch_send(&world, &world.flights[0], 1, false) &&
                   nep_multi_dispatch_send(&world, &world.flights[1], 2, false);
    struct nep_multi_flight *third = &world.flights[2];
    struct nep_tokens in = {.size = sizeof(in),
                            .num_tokens = 0,
                            .x = third->x,
                            .topk_ids = third->ids,
                            .topk_weights = third->weights};
    is_fine =
        is_fine && expect(rank, "S + 1", nep_dispatch_send(world.ep, third->handle, &in, NULL),
                          NEP_ERR_BUSY, "2", "");
    struct nep_multi_flight *later = &world.flights[1];
    is_fine = is_fine && expect(rank, "out of order",
                                nep_dispatch_recv(world.ep, later->handle, &later->rows, NULL),
                                NEP_ERR_BUSY, "operation 1", "operation 0");
    is_fine = is_fine && nep_multi_complete(&world, &world.flights[0]) &&
              nep_multi_complete(&world, &world.flights[1]) && round_trip(&world, 3) &&
              nep_multi_barrier(rank);
    nep_multi_world_destroy(&world);
    return is_fine;
}

static void test_dispatch_outstanding_limit_refused(void **state)
{
    (void)state;
    run(rank_busy, NULL);
}

/* An output that is too small: the message has the number, and a larger one then works. */
static bool rank_overflow(struct nep_multi_rank *rank)
{
    struct nep_multi_world world;
    if (!nep_multi_world_create(rank, &plain, 1, &world)) {
        return false;
    }
    struct nep_multi_flight *flight = &world.flights[0];
    bool is_fine = nep_multi_dispatch_send(&world, flight, 1, false);
    struct nep_counts counts = {.size = sizeof(counts)};
    if (is_fine && nep_dispatch_counts(world.ep, flight->handle, &counts) != NEP_OK) {
        is_fine = nep_multi_fail(rank, "nep_dispatch_counts: %s", nep_last_message());
    }
    if (is_fine && counts.num_rows > 0) {
        char number[32];
        snprintf(number, sizeof(number), "%llu", (unsigned long long)counts.num_rows);
        struct nep_rows small = flight->rows;
        small.capacity = counts.num_rows - 1;
        is_fine =
            expect(rank, "small output", nep_dispatch_recv(world.ep, flight->handle, &small, NULL),
                   NEP_ERR_OVERFLOW, number, "");
    }
    is_fine = is_fine && nep_multi_dispatch_recv(&world, flight) &&
              nep_multi_combine_send(&world, flight) && nep_multi_combine_recv(&world, flight) &&
              nep_multi_barrier(rank);
    nep_multi_world_destroy(&world);
    return is_fine;
}

static void test_dispatch_small_output_refused(void **state)
{
    (void)state;
    run(rank_overflow, NULL);
}

/* Halves in the wrong order. */
static bool rank_wrong_order(struct nep_multi_rank *rank)
{
    struct nep_multi_world world;
    if (!nep_multi_world_create(rank, &plain, 1, &world)) {
        return false;
    }
    struct nep_multi_flight *flight = &world.flights[0];
    struct nep_expert_rows in = {.size = sizeof(in), .y = flight->expert};
    struct nep_tokens_out out = {.size = sizeof(out), .num_tokens = 8, .y = flight->y};
    bool is_fine = nep_combine_send(world.ep, flight->handle, &in, NULL) < 0 &&
                   nep_combine_recv(world.ep, flight->handle, &out, NULL) < 0 &&
                   nep_dispatch_recv(world.ep, flight->handle, &flight->rows, NULL) < 0 &&
                   send_raw(&world, 8, NULL) < 0; /* no routing held yet */
    if (!is_fine) {
        nep_multi_fail(rank, "a half in the wrong order was taken");
    }
    is_fine = is_fine && nep_multi_dispatch_send(&world, flight, 1, false);
    if (is_fine && nep_combine_send(world.ep, flight->handle, &in, NULL) >= 0) {
        is_fine = nep_multi_fail(rank, "combine before dispatch was complete");
    }
    is_fine = is_fine && nep_multi_dispatch_recv(&world, flight) &&
              nep_multi_combine_send(&world, flight);
    out.num_tokens = 7;
    if (is_fine && nep_combine_recv(world.ep, flight->handle, &out, NULL) != NEP_ERR_INVALID) {
        is_fine = nep_multi_fail(rank, "combine into another number of tokens was taken");
    }
    is_fine = is_fine && nep_multi_combine_recv(&world, flight) && nep_multi_barrier(rank);
    nep_multi_world_destroy(&world);
    return is_fine;
}

static void test_handle_wrong_order_refused(void **state)
{
    (void)state;
    run(rank_wrong_order, NULL);
}

/* Three ranks are expected, two come: both are told who is missing. */
static bool rank_joins(struct nep_multi_rank *rank)
{
    if (rank->rank == 2) {
        return true;
    }
    struct nep_comm_params params = {.size = sizeof(params),
                                     .rank = rank->rank,
                                     .num_ranks = 3,
                                     .rendezvous = rank->arg,
                                     .intra = "loop",
                                     .inter = "loop",
                                     .timeout_ns = 1000000000ull};
    struct nep_comm *comm = NULL;
    enum nep_status status = nep_comm_create(&params, &comm);
    return expect(rank, "a rank never joins", status, NEP_ERR_TIMEOUT, "rank", "2");
}

static void test_comm_rank_never_joins_named(void **state)
{
    (void)state;
    struct nep_rendezvous_server *server = NULL;
    uint16_t port = 0;
    char address[64];
    struct nep_rendezvous_params params = {.host = "127.0.0.1", .num_ranks = 3};
    assert_int_equal(nep_rendezvous_server_start(&params, &server, &port), NEP_OK);
    snprintf(address, sizeof(address), "127.0.0.1:%u", port);
    run(rank_joins, address);
    nep_rendezvous_server_stop(server);
}

/* Rank 1 may make no shared memory: all ranks fail, and the others name it. */
static bool rank_no_memory(struct nep_multi_rank *rank)
{
    static const uint32_t nodes[] = {2, 1};
    struct nep_comm_params params = {.size = sizeof(params),
                                     .rank = rank->rank,
                                     .num_ranks = rank->num_ranks,
                                     .bootstrap = &rank->bootstrap,
                                     .ranks_per_node = nodes,
                                     .num_nodes = 2,
                                     .intra = "shm",
                                     .inter = "shm",
                                     .timeout_ns = 20000000000ull};
    struct nep_comm *comm = NULL;
    if (nep_comm_create(&params, &comm) != NEP_OK) {
        return nep_multi_fail(rank, "nep_comm_create: %s", nep_last_message());
    }
    struct rlimit limit = {4096, 4096};
    struct nep_ep_params ep_params = good_ep;
    if (rank->rank == 1) {
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &limit);
    }
    enum nep_status status = try_ep(comm, &ep_params);
    const char *message = nep_last_message();
    bool is_fine = status < 0 && (rank->rank == 1 || strstr(message, "rank 1") != NULL);
    if (!is_fine) {
        nep_multi_fail(rank, "no room for the region on rank 1: %s: %s", nep_status_name(status),
                       message);
    }
    nep_comm_destroy(comm);
    return is_fine;
}

static void test_ep_no_shared_memory_named(void **state)
{
    (void)state;
    struct nep_multi_result result;
    nep_multi_run_processes(3, rank_no_memory, NULL, 60, &result);
    if (result.num_failed != 0) {
        fail_msg("%s", result.error);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ep_unequal_parameters_named),
        cmocka_unit_test(test_ep_impossible_shape_refused),
        cmocka_unit_test(test_dispatch_bad_ids_refused),
        cmocka_unit_test(test_dispatch_outstanding_limit_refused),
        cmocka_unit_test(test_dispatch_small_output_refused),
        cmocka_unit_test(test_handle_wrong_order_refused),
        cmocka_unit_test(test_comm_rank_never_joins_named),
        cmocka_unit_test(test_ep_no_shared_memory_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
