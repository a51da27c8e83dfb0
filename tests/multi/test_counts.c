/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A rank whose COUNTS cannot be true is refused by name before a row moves, and the deadline of one
 * ep is kept. Two nodes of one rank: rank 1 sends, its COUNTS are changed where they arrived in
 * rank 0's region, then rank 0 goes on.
 */
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "dispatch/counts.h"
#include "tests/multi/world.h"
#include "tests/unit/cmocka_all.h"

enum { TOKENS = 6, HIDDEN = 32, TOP_K = 2, EXPERTS = 4, ROWS = 2 * TOKENS * TOP_K };

static const struct nep_multi_shape shape = {.name = "forged",
                                             .num_nodes = 2,
                                             .ranks_per_node = {1, 1},
                                             .experts = EXPERTS,
                                             .top_k = TOP_K,
                                             .hidden = HIDDEN,
                                             .max_tokens = TOKENS,
                                             .layout = NEP_LAYOUT_EXPERT_PACKED,
                                             .intra = "loop",
                                             .inter = "loop",
                                             .timeout_ns = 20000000000ull,
                                             .seed = 8};

enum lie { NOTHING, OFFSET, ROWS_OF_A_RANK, ROWS_OF_A_SLOT, SLOTS_PAST_32_BITS, TOKENS_TOO_MANY };

struct plan {
    enum lie lie;
    const char *word; /* of the sentence; NULL: the operation succeeds */
};

static void tell(const struct nep_ep *ep, struct nep_counts_msg *msg, enum lie lie)
{
    uint32_t *per_rank = (uint32_t *)nep_counts_rows_per_rank(msg);
    uint32_t *per_slot = (uint32_t *)nep_counts_rows_per_slot(ep, msg);
    switch (lie) {
    case NOTHING:
        break;
    case OFFSET:
        msg->ride_offset = 1u << 30;
        break;
    case ROWS_OF_A_RANK:
        per_rank[0] = msg->num_rows + 1;
        break;
    case ROWS_OF_A_SLOT:
        per_slot[1] += msg->num_rows * TOP_K + 1;
        break;
    case SLOTS_PAST_32_BITS: /* which add up to a small number modulo 2^32 */
        per_slot[0] = 1u << 31;
        per_slot[1] = 1u << 31;
        break;
    case TOKENS_TOO_MANY:
        msg->num_tokens = TOKENS + 1;
        break;
    }
}

/* Until rank 1's COUNTS of operation 0 are here. */
static struct nep_counts_msg *arrived(struct nep_ep *ep)
{
    uint64_t deadline_ns = nep_now_ns() + 10000 * NEP_MS;
    const struct nep_counts_msg *msg = NULL;
    while (msg == NULL && nep_now_ns() < deadline_ns) {
        ep->comm->inter->ops->progress(ep->comm->inter);
        msg = nep_counts_find(ep, 1, 0);
        nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    }
    return (struct nep_counts_msg *)msg;
}

struct call {
    struct nep_handle *handle;
    struct nep_tokens in;
    struct nep_rows out;
    float x[TOKENS * HIDDEN], weights[TOKENS * TOP_K], rows[ROWS * HIDDEN];
    int32_t ids[TOKENS * TOP_K];
};

static bool prepare(struct nep_multi_rank *rank, struct nep_ep *ep, struct call *call)
{
    memset(call, 0, sizeof *call);
    for (uint32_t i = 0; i < TOKENS * TOP_K; i++) {
        call->ids[i] = (int32_t)(i % EXPERTS);
        call->weights[i] = 0.5f;
    }
    for (uint32_t i = 0; i < TOKENS * HIDDEN; i++) {
        call->x[i] = 1.0f;
    }
    call->in = (struct nep_tokens){.size = sizeof call->in,
                                   .num_tokens = TOKENS,
                                   .x = call->x,
                                   .topk_ids = call->ids,
                                   .topk_weights = call->weights};
    call->out = (struct nep_rows){.size = sizeof call->out, .x = call->rows, .capacity = ROWS};
    return nep_handle_create(ep, &call->handle) == NEP_OK ||
           nep_multi_fail(rank, "nep_handle_create: %s", nep_last_message());
}

static bool says(struct nep_multi_rank *rank, enum nep_status got, enum nep_status want,
                 const char *word, const char *who)
{
    const char *message = got == NEP_OK ? "" : nep_last_message();
    if (got == want && strstr(message, word) != NULL && strstr(message, who) != NULL) {
        return true;
    }
    return nep_multi_fail(rank, "%s (%s); must be %s and name '%s' and '%s'", nep_status_name(got),
                          message, nep_status_name(want), word, who);
}

static bool forge(struct nep_multi_rank *rank)
{
    const struct plan *plan = rank->arg;
    struct nep_multi_world world;
    struct call call;
    if (!nep_multi_world_create(rank, &shape, 0, &world) || !prepare(rank, world.ep, &call)) {
        return false;
    }
    nep_ep_set_timeout(world.ep, 10000 * NEP_MS);
    bool is_fine = true;
    if (rank->rank == 1) {
        is_fine = nep_dispatch_send(world.ep, call.handle, &call.in, NULL) == NEP_OK ||
                  nep_multi_fail(rank, "send: %s", nep_last_message());
    }
    is_fine = is_fine && nep_multi_barrier(rank);
    if (is_fine && rank->rank == 0) {
        struct nep_counts_msg *msg = arrived(world.ep);
        if (msg == NULL) {
            return nep_multi_fail(rank, "COUNTS of rank 1 did not come");
        }
        tell(world.ep, msg, plan->lie);
        enum nep_status status = nep_dispatch(world.ep, call.handle, &call.in, &call.out, NULL);
        is_fine = plan->word == NULL ? says(rank, status, NEP_OK, "", "")
                                     : says(rank, status, NEP_ERR_MISMATCH, plan->word, "rank 1");
    } else if (is_fine) { /* all that it waits for may have come before rank 0 gave up */
        enum nep_status status = nep_dispatch_recv(world.ep, call.handle, &call.out, NULL);
        is_fine = status == NEP_OK || plan->word != NULL ||
                  nep_multi_fail(rank, "rank 1 got %s", nep_status_name(status));
    }
    is_fine = is_fine && nep_multi_barrier(rank);
    nep_handle_destroy(call.handle);
    nep_multi_world_destroy(&world);
    return is_fine;
}

/*
 * Rank 1's COUNTS are right when rank 0 takes them, and become every lie afterwards: what was
 * checked is what is used.
 */
static bool change_after_taking(struct nep_multi_rank *rank)
{
    struct nep_multi_world world;
    struct call call;
    if (!nep_multi_world_create(rank, &shape, 0, &world) || !prepare(rank, world.ep, &call)) {
        return false;
    }
    bool is_fine = nep_dispatch_send(world.ep, call.handle, &call.in, NULL) == NEP_OK ||
                   nep_multi_fail(rank, "send: %s", nep_last_message());
    is_fine = is_fine && nep_multi_barrier(rank);
    if (is_fine && rank->rank == 0) {
        struct nep_counts_msg *msg = arrived(world.ep);
        bool is_taken = false;
        if (msg == NULL || nep_counts_take(world.ep, call.handle, &is_taken) != NEP_OK ||
            !is_taken) {
            return nep_multi_fail(rank, "COUNTS of rank 1: %s", nep_last_message());
        }
        msg->ride_rows = UINT32_MAX;
        msg->num_tiles = UINT32_MAX;
        for (enum lie lie = OFFSET; lie <= TOKENS_TOO_MANY; lie++) {
            tell(world.ep, msg, lie);
        }
    }
    is_fine = is_fine && (nep_dispatch_recv(world.ep, call.handle, &call.out, NULL) == NEP_OK ||
                          nep_multi_fail(rank, "recv: %s", nep_last_message()));
    /* Elements are bf16, two to a word of all ones; half of the (token, k) of both come to each. */
    uint32_t num = 0, all = TOKENS * TOP_K * HIDDEN / 2;
    for (uint32_t i = 0; i < ROWS * HIDDEN; i++) {
        num += call.rows[i] == 1.0f;
    }
    if (is_fine && num != all) {
        is_fine = nep_multi_fail(rank, "%u words are right, not %u", num, all);
    }
    is_fine = is_fine && nep_multi_barrier(rank);
    nep_handle_destroy(call.handle);
    nep_multi_world_destroy(&world);
    return is_fine;
}

static void run(nep_multi_fn fn, void *arg)
{
    struct nep_multi_result result;
    nep_multi_run_threads(2, fn, arg, &result);
    if (result.num_failed != 0) {
        fail_msg("%s", result.error);
    }
}

static void test_counts_that_cannot_be_true_refused(void **state)
{
    (void)state;
    static struct plan plans[] = {{NOTHING, NULL},
                                  {OFFSET, "offset of its rows"},
                                  {ROWS_OF_A_RANK, "rows of one rank"},
                                  {ROWS_OF_A_SLOT, "rows of all slots"},
                                  {SLOTS_PAST_32_BITS, "rows of all slots"},
                                  {TOKENS_TOO_MANY, "tokens"}};
    for (size_t i = 0; i < sizeof plans / sizeof plans[0]; i++) {
        run(forge, &plans[i]);
    }
}

static void test_counts_that_change_after_they_were_checked(void **state)
{
    (void)state;
    run(change_after_taking, NULL);
}

/* Rank 1 does not come: rank 0 says so by the deadline of its ep, not the communicator's 20 s. */
static bool waits(struct nep_multi_rank *rank)
{
    struct nep_multi_world world;
    struct call call;
    if (!nep_multi_world_create(rank, &shape, 0, &world) || !prepare(rank, world.ep, &call)) {
        return false;
    }
    bool is_fine = true;
    if (rank->rank == 0) {
        nep_ep_set_timeout(world.ep, 60 * NEP_MS);
        enum nep_status status = nep_dispatch(world.ep, call.handle, &call.in, &call.out, NULL);
        is_fine = says(rank, status, NEP_ERR_TIMEOUT, "timeout of 0.060 s", "rank 1");
    }
    is_fine = is_fine && nep_multi_barrier(rank);
    nep_handle_destroy(call.handle);
    nep_multi_world_destroy(&world);
    return is_fine;
}

static void test_timeout_of_one_ep(void **state)
{
    (void)state;
    run(waits, NULL);
}

static _Atomic(struct nep_region_head *) head_of_0;

struct blame {
    bool is_late;      /* rank 0 has hardly waited when it is blamed */
    bool is_passed_on; /* it named rank 1 */
};

/*
 * Another rank blames rank 0, which waits for rank 1 itself: after half a deadline in which it
 * looked all the time the blame goes on to rank 1; before that rank 0 may be the one that came
 * late, and takes it.
 */
static bool blamed(struct nep_multi_rank *rank)
{
    struct blame *blame = rank->arg;
    struct nep_multi_world world;
    struct call call;
    if (!nep_multi_world_create(rank, &shape, 0, &world) || !prepare(rank, world.ep, &call)) {
        return false;
    }
    if (rank->rank == 0) {
        atomic_store(&head_of_0, world.ep->head);
    }
    bool is_fine = nep_multi_barrier(rank);
    if (is_fine && rank->rank == 0) {
        nep_ep_set_timeout(world.ep, blame->is_late ? 100 * NEP_S : 4 * NEP_S);
        enum nep_status status = nep_dispatch(world.ep, call.handle, &call.in, &call.out, NULL);
        blame->is_passed_on = strstr(nep_last_message(), "was taken for the cause") != NULL;
        is_fine = blame->is_passed_on
                      ? says(rank, status, NEP_ERR_PEER_LOST, "rank 0, which waits for it",
                             "rank 1 is slow or stuck")
                      : says(rank, status, NEP_ERR_PEER_LOST, "another rank found it",
                             "rank 0 is lost or stuck");
    } else if (is_fine) {
        nanosleep(&(struct timespec){.tv_sec = blame->is_late ? 0 : 2, .tv_nsec = 500000000}, NULL);
        atomic_store(&atomic_load(&head_of_0)->fault, 1);
    }
    is_fine = is_fine && nep_multi_barrier(rank);
    nep_handle_destroy(call.handle);
    nep_multi_world_destroy(&world);
    return is_fine;
}

static void test_blame_stays_with_a_rank_that_came_late(void **state)
{
    (void)state;
    struct blame late = {.is_late = true};
    run(blamed, &late);
    assert_false(late.is_passed_on);
}

/* On a busy machine rank 0 may stand still itself meanwhile, and is rightly blamed then: again. */
static void test_blame_goes_on_to_whom_the_blamed_waits_for(void **state)
{
    (void)state;
    struct blame blame = {.is_late = false};
    for (int i = 0; i < 10 && !blame.is_passed_on; i++) {
        run(blamed, &blame);
    }
    assert_true(blame.is_passed_on);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_counts_that_cannot_be_true_refused),
        cmocka_unit_test(test_counts_that_change_after_they_were_checked),
        cmocka_unit_test(test_timeout_of_one_ep),
        cmocka_unit_test(test_blame_stays_with_a_rank_that_came_late),
        cmocka_unit_test(test_blame_goes_on_to_whom_the_blamed_waits_for),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
