/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A rank is killed in the middle of operations. The survivors must come back with an error that
 * names it, well before the harness loses patience; their other communicator, which the victim was
 * not part of, must work on; nothing may be left in /dev/shm.
 */
#include <dirent.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "tests/multi/world.h"
#include "tests/unit/cmocka_all.h"

enum { RANKS = 4, VICTIM = 2, OPS_BEFORE = 5 };

static const struct nep_multi_shape whole = {.name = "whole",
                                             .num_nodes = 2,
                                             .ranks_per_node = {2, 2},
                                             .experts = 16,
                                             .top_k = 4,
                                             .hidden = 64,
                                             .max_tokens = 300,
                                             .layout = NEP_LAYOUT_EXPERT_PACKED,
                                             .is_fixed_tokens = true,
                                             .intra = "shm",
                                             .inter = "shm",
                                             .timeout_ns = 5000000000ull,
                                             .seed = 11};
static const struct nep_multi_shape survivors = {.name = "survivors",
                                                 .num_nodes = 2,
                                                 .ranks_per_node = {2, 1},
                                                 .experts = 9,
                                                 .top_k = 2,
                                                 .hidden = 32,
                                                 .max_tokens = 20,
                                                 .layout = NEP_LAYOUT_RANK,
                                                 .intra = "shm",
                                                 .inter = "shm",
                                                 .timeout_ns = 20000000000ull,
                                                 .seed = 12};

struct plan {
    struct nep_multi_shared *shared; /* of the survivors */
    int when; /* 0: before send, 1: between the halves of dispatch, 2: of combine */
};

static bool round_trip(struct nep_multi_world *world, uint64_t number)
{
    struct nep_multi_flight *flight = &world->flights[0];
    return nep_multi_dispatch_send(world, flight, number, false) &&
           nep_multi_dispatch_recv(world, flight) && nep_multi_combine_send(world, flight) &&
           nep_multi_combine_recv(world, flight);
}

/* Up to where it dies; checks nothing, since the others send what they like by now. */
static bool victim(struct nep_multi_world *world, int when)
{
    struct nep_multi_flight *flight = &world->flights[0];
    bool is_fine = true;
    if (when >= 1) {
        is_fine = nep_multi_dispatch_send(world, flight, OPS_BEFORE, false);
    }
    if (when == 2) {
        struct nep_expert_rows in = {.size = sizeof(in), .y = flight->expert};
        is_fine = is_fine &&
                  nep_dispatch_recv(world->ep, flight->handle, &flight->rows, NULL) == NEP_OK &&
                  nep_combine_send(world->ep, flight->handle, &in, NULL) == NEP_OK;
    }
    if (is_fine) {
        raise(SIGKILL);
    }
    return nep_multi_fail(world->rank, "the victim failed before its end: %s", nep_last_message());
}

/* Goes on until the library reports; the fault must name the victim. */
static bool survive(struct nep_multi_rank *rank, struct nep_multi_world *world)
{
    struct nep_multi_flight *flight = &world->flights[0];
    struct nep_tokens in = {.size = sizeof(in),
                            .x = flight->x,
                            .topk_ids = flight->ids,
                            .topk_weights = flight->weights};
    enum nep_status status = NEP_OK;
    for (int i = 0; i < 4 && status == NEP_OK; i++) {
        struct nep_expert_rows rows = {.size = sizeof(rows), .y = flight->expert};
        struct nep_tokens_out out = {.size = sizeof(out), .y = flight->y};
        status = nep_dispatch(world->ep, flight->handle, &in, &flight->rows, NULL);
        if (status == NEP_OK) {
            status = nep_combine(world->ep, flight->handle, &rows, &out, NULL);
        }
    }
    struct nep_fault fault = {.size = sizeof(fault)};
    if (status != NEP_ERR_PEER_LOST && status != NEP_ERR_TIMEOUT && status != NEP_ERR_BROKEN) {
        return nep_multi_fail(rank, "a rank is gone, but: %s: %s", nep_status_name(status),
                              nep_last_message());
    }
    if (nep_comm_fault(world->comm, &fault) != NEP_OK || fault.rank != VICTIM ||
        strstr(fault.message, "rank 2") == NULL) {
        return nep_multi_fail(rank, "the fault names rank %u: %s", fault.rank, fault.message);
    }
    if (nep_dispatch_send(world->ep, flight->handle, &in, NULL) >= 0) {
        return nep_multi_fail(rank, "a harmed communicator took another dispatch");
    }
    return true;
}

static bool run_rank(struct nep_multi_rank *rank)
{
    const struct plan *plan = rank->arg;
    bool is_victim = rank->rank == VICTIM;
    struct nep_multi_world world;
    struct nep_multi_world other;
    struct nep_multi_rank seat;
    bool is_fine = nep_multi_world_create(rank, &whole, 1, &world);
    if (is_fine && !is_victim) {
        nep_multi_seat(&seat, rank->rank - (rank->rank > VICTIM), RANKS - 1, plan->shared, NULL);
        is_fine = nep_multi_world_create(&seat, &survivors, 2, &other);
    }
    for (uint64_t op = 1; op < OPS_BEFORE && is_fine; op++) {
        is_fine = round_trip(&world, op);
        is_fine = is_fine && (is_victim || round_trip(&other, op));
    }
    if (!is_fine) {
        return nep_multi_fail(rank, "before the fault"); /* the first error stays */
    }
    /* What the victim posted last may still be on its way in its own process: it must not end
     * before. */
    if (!nep_multi_barrier(rank)) {
        return false;
    }
    if (is_victim) {
        return victim(&world, plan->when);
    }
    is_fine = survive(rank, &world);
    if (is_fine && !(round_trip(&other, 100) && nep_multi_random_schedule(&other, 5, 40))) {
        is_fine = nep_multi_fail(rank, "the other communicator is harmed too");
    }
    nep_multi_world_destroy(&world); /* must return although a peer is gone */
    is_fine = is_fine && nep_multi_barrier(&seat);
    nep_multi_world_destroy(&other);
    return is_fine;
}

static int count_shm(void)
{
    DIR *dir = opendir("/dev/shm");
    int num = 0;
    for (struct dirent *entry; dir != NULL && (entry = readdir(dir)) != NULL;) {
        num += strstr(entry->d_name, "nep") != NULL;
    }
    if (dir != NULL) {
        closedir(dir);
    }
    return num;
}

static void run(int when)
{
    struct plan plan = {nep_multi_shared_create(), when};
    struct nep_multi_result result;
    int before = count_shm();
    nep_multi_run_processes(RANKS, run_rank, &plan, 90, &result);
    nep_multi_shared_destroy(plan.shared);
    if (result.num_failed != 1 || result.error[0] != '\0') { /* the victim alone */
        fail_msg("%u ranks failed: %s", result.num_failed, result.error);
    }
    assert_int_equal(count_shm(), before);
}

static void test_rank_killed_before_dispatch_named(void **state)
{
    (void)state;
    run(0);
}

static void test_rank_killed_in_dispatch_named(void **state)
{
    (void)state;
    run(1);
}

static void test_rank_killed_in_combine_named(void **state)
{
    (void)state;
    run(2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rank_killed_before_dispatch_named),
        cmocka_unit_test(test_rank_killed_in_dispatch_named),
        cmocka_unit_test(test_rank_killed_in_combine_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
