/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whom a rank blames at its deadline, and who hears of it. Waits are made by steps that miss what
 * the test says, so that who waits for whom, and whose deadline passes first, is not a matter of
 * time.
 */
#include <string.h>

#include <unistd.h>

#include "base/clock.h"
#include "dispatch/ep.h"
#include "dispatch/wait.h"
#include "tests/multi/exact.h"
#include "tests/multi/harness.h"
#include "tests/unit/cmocka_all.h"

enum { RANKS = 4, LOOKED = 0 };

struct plan {
    bool (*check)(struct nep_multi_rank *rank, struct nep_comm *comm, struct nep_ep *ep,
                  struct nep_handle *handle);
    uint32_t misses[RANKS]; /* whom each rank waits for; UINT32_MAX: it does not wait */
    uint32_t first;         /* whose deadline passes */
    uint32_t culprit;       /* whom it must name */
};

/* Finds nothing, ever; says when it looks for the first time. */
static enum nep_status miss(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p,
                            bool *done_p)
{
    const struct plan *plan = handle->op.in.x;
    (void)progress_p;
    (void)done_p;
    nep_ep_miss(ep, "test", plan->misses[ep->rank], 1, 0);
    return NEP_OK;
}

/* The others are seen to wait before the deadline that matters begins. */
static void await_waits(struct nep_ep *ep, const struct plan *plan)
{
    for (uint32_t g = 0; g < ep->node_size; g++) {
        uint32_t rank = nep_ep_rank_at(ep, g);
        struct nep_region_head *head = (struct nep_region_head *)ep->window[rank];
        uint64_t deadline_ns = nep_deadline_ns(60 * NEP_S);
        while (rank != ep->rank && plan->misses[rank] != UINT32_MAX &&
               atomic_load(&head->awaits) == 0 && nep_left_ns(deadline_ns) != 0) {
        }
    }
}

/*
 * Stands still for longer than the deadline in its second look, and finds what it waits for in the
 * third.
 */
static enum nep_status stand_still(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p,
                                   bool *done_p)
{
    static _Thread_local uint32_t num_looks;
    (void)handle;
    (void)progress_p;
    nep_ep_miss(ep, "test", (ep->rank + 1) % RANKS, 1, 0);
    uint64_t until_ns = nep_deadline_ns(++num_looks == 2 ? 2 * ep->timeout_ns : 0);
    while (nep_left_ns(until_ns) != 0) {
        usleep(1000);
    }
    *done_p = num_looks == 3;
    return NEP_OK;
}

static bool stand_still_and_check(struct nep_multi_rank *rank, struct nep_comm *comm,
                                  struct nep_ep *ep, struct nep_handle *handle)
{
    (void)comm;
    nep_ep_set_timeout(ep, NEP_S / 5);
    if (nep_wait(ep, handle, stand_still) != NEP_OK) {
        nep_multi_fail(rank, "blames another for its own absence: %s", nep_last_message());
    }
    return nep_multi_barrier(rank);
}

static bool wait_and_check(struct nep_multi_rank *rank, struct nep_comm *comm, struct nep_ep *ep,
                           struct nep_handle *handle)
{
    const struct plan *plan = rank->arg;
    struct nep_fault fault = {.size = sizeof fault};
    if (plan->misses[rank->rank] == UINT32_MAX) {
        return nep_multi_barrier(rank);
    }
    if (rank->rank == plan->first) {
        await_waits(ep, plan);
        nep_ep_set_timeout(ep, 4 * NEP_S);
    }
    handle->op.in.x = plan;
    enum nep_status status = nep_wait(ep, handle, miss);
    nep_comm_fault(comm, &fault);
    if (status == NEP_OK || fault.rank != plan->culprit) {
        nep_multi_fail(rank, "names rank %u, not %u: %s", fault.rank, plan->culprit, fault.message);
    }
    return nep_multi_barrier(rank);
}

/* Rank 0 says whom it blames, and that one hears it too, over a fabric as within a node. */
static bool tell_and_check(struct nep_multi_rank *rank, struct nep_comm *comm, struct nep_ep *ep,
                           struct nep_handle *handle)
{
    const struct plan *plan = rank->arg;
    (void)handle;
    if (rank->rank == 0) {
        nep_tell(ep, plan->culprit);
    }
    if (rank->rank == plan->culprit) {
        uint64_t deadline_ns = nep_deadline_ns(60 * NEP_S);
        while (atomic_load(&ep->head->fault) == 0 && nep_left_ns(deadline_ns) != 0) {
            comm->inter->ops->progress(comm->inter);
        }
        if (atomic_load(&ep->head->fault) != plan->culprit + 1) {
            nep_multi_fail(rank, "has not heard that it is blamed");
        }
    }
    return nep_multi_barrier(rank);
}

static bool body(struct nep_multi_rank *rank)
{
    const struct plan *plan = rank->arg;
    static const uint32_t ranks_per_node[] = {2, 2};
    struct nep_comm *comm = NULL;
    struct nep_ep *ep = NULL;
    struct nep_handle *handle = NULL;
    struct nep_exact exact = {
        .num_ranks = RANKS, .max_tokens = 4, .layout = NEP_LAYOUT_EXPERT_PACKED};
    struct nep_ep_params shape = nep_exact_params(&exact);
    struct nep_comm_params params = {.size = sizeof params,
                                     .rank = rank->rank,
                                     .num_ranks = RANKS,
                                     .bootstrap = &rank->bootstrap,
                                     .ranks_per_node = ranks_per_node,
                                     .num_nodes = 2,
                                     .intra = "loop",
                                     .inter = "loop",
                                     .timeout_ns = 100 * NEP_S};
    bool is_fine = nep_comm_create(&params, &comm) == NEP_OK &&
                   nep_ep_create(comm, &shape, &ep) == NEP_OK &&
                   nep_handle_create(ep, &handle) == NEP_OK;
    if (is_fine) {
        is_fine = plan->check(rank, comm, ep, handle);
    }
    nep_handle_destroy(handle);
    nep_ep_destroy(ep);
    nep_comm_destroy(comm);
    return is_fine || nep_multi_fail(rank, "%s", nep_last_message());
}

static void run(struct plan plan)
{
    struct nep_multi_result result;
    nep_multi_run_threads(RANKS, body, &plan, &result);
    if (result.error[0] != '\0') {
        fail_msg("%s", result.error);
    }
}

/* Rank 2 waits for its neighbour 3, which waits for rank 1 of the other node. */
static void test_blame_goes_to_whom_a_neighbour_waits_for(void **state)
{
    (void)state;
    run((struct plan){.check = wait_and_check,
                      .misses = {UINT32_MAX, UINT32_MAX, 3, 1},
                      .first = 2,
                      .culprit = 1});
}

/* A neighbour that does something else is the cause. */
static void test_blame_stays_with_a_neighbour_that_does_not_wait(void **state)
{
    (void)state;
    run((struct plan){.check = wait_and_check,
                      .misses = {UINT32_MAX, UINT32_MAX, 3, UINT32_MAX},
                      .first = 2,
                      .culprit = 3});
}

/* Two that wait for each other: whoever gives up names the other. */
static void test_blame_of_two_that_wait_for_each_other(void **state)
{
    (void)state;
    run((struct plan){.check = wait_and_check,
                      .misses = {UINT32_MAX, UINT32_MAX, 3, 2},
                      .first = 2,
                      .culprit = 3});
}

/* Nobody is blamed for the time in which the rank that waits did not look. */
static void test_own_absence_is_nobodys_fault(void **state)
{
    (void)state;
    run((struct plan){.check = stand_still_and_check});
}

static void test_who_is_blamed_hears_it(void **state)
{
    (void)state;
    run((struct plan){.check = tell_and_check, .culprit = 2});
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_blame_goes_to_whom_a_neighbour_waits_for),
        cmocka_unit_test(test_blame_stays_with_a_neighbour_that_does_not_wait),
        cmocka_unit_test(test_blame_of_two_that_wait_for_each_other),
        cmocka_unit_test(test_own_absence_is_nobodys_fault),
        cmocka_unit_test(test_who_is_blamed_hears_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
