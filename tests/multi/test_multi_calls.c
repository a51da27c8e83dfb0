/* SPDX-License-Identifier: Apache-2.0 */
/* Calls that are refused, and a forked child, leave everything usable. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/multi/seat.h"
#include "tests/unit/cmocka_all.h"

/* ---- calls that are refused leave everything usable ------------------------------------------ */

enum { SEAT_SLOTS = SEAT_EXPERTS / SEAT_RANKS, SEAT_FLAGS = 8, ROWS_PER_FLAG = SEAT_ROWS / 8 };

/* What a step passes in: a copy of what is right, then one thing spoiled. */
struct arguments {
    struct nep_handle *handle;
    struct nep_tokens in;
    struct nep_rows rows;
    struct nep_expert_rows y;
    struct nep_tokens_out sum;
    void *stream;
};

enum call { SEND, COUNTS, RECV, AWAIT, COMBINE_SEND, COMBINE_RECV };
enum spoiled {
    NOTHING,
    HANDLE,       /* another one of the same ep */
    ID_TOO_LARGE, /* the first that does not exist */
    ID_NEGATIVE,  /* -2 */
    TOKENS,       /* one more than M */
    LAYER,        /* the ep has one */
    SCALES,       /* of rows that have none */
    STREAM,       /* on host memory */
    SIZE,         /* of a caller that knows no field */
    CAPACITY,     /* one row too few */
    WEIGHTS,      /* that come back, in an expert layout */
    NO_FLAGS,     /* of outputs that are being written */
    FEW_FLAGS,    /* for the rows that came */
    LATE,         /* flags that nobody raises */
    SUM_TOKENS    /* one fewer than were dispatched */
};

static const struct step {
    enum call call;
    enum spoiled spoiled;
    enum nep_status want;
} steps[] = {
    {COMBINE_SEND, NOTHING, NEP_ERR_INVALID}, /* nothing was dispatched */
    {AWAIT, LATE, NEP_ERR_INVALID},
    {RECV, NOTHING, NEP_ERR_INVALID},
    {COUNTS, NOTHING, NEP_ERR_INVALID},
    {SEND, ID_TOO_LARGE, NEP_ERR_INVALID},
    {SEND, ID_NEGATIVE, NEP_ERR_INVALID},
    {SEND, TOKENS, NEP_ERR_INVALID},
    {SEND, LAYER, NEP_ERR_INVALID},
    {SEND, SCALES, NEP_ERR_INVALID},
    {SEND, STREAM, NEP_ERR_UNSUPPORTED},
    {SEND, SIZE, NEP_ERR_INVALID},
    {SEND, NOTHING, NEP_OK},
    {SEND, HANDLE, NEP_ERR_BUSY},
    {SEND, NOTHING, NEP_ERR_BUSY},
    {COUNTS, NOTHING, NEP_OK},
    {RECV, CAPACITY, NEP_ERR_OVERFLOW},
    {RECV, NOTHING, NEP_OK},
    {AWAIT, STREAM, NEP_ERR_UNSUPPORTED},
    {AWAIT, SIZE, NEP_ERR_INVALID},
    {AWAIT, NO_FLAGS, NEP_ERR_INVALID},
    {AWAIT, FEW_FLAGS, NEP_ERR_INVALID},
    {AWAIT, LATE, NEP_ERR_TIMEOUT},
    {AWAIT, NOTHING, NEP_OK},
    {COMBINE_SEND, WEIGHTS, NEP_ERR_INVALID},
    {COMBINE_SEND, NOTHING, NEP_OK},
    {COMBINE_RECV, SUM_TOKENS, NEP_ERR_INVALID},
    {COMBINE_RECV, NOTHING, NEP_OK},
};

struct calls {
    struct seat *seat;
    struct nep_handle *other;
    struct nep_counts counts;
    uint16_t x[SEAT_TOKENS * SEAT_HIDDEN], rows[SEAT_ROWS * SEAT_HIDDEN];
    int32_t ids[SEAT_TOKENS * SEAT_TOP_K]; /* the seat's with one that is wrong */
    uint32_t flags[SEAT_SLOTS * SEAT_FLAGS];
};

static struct arguments arguments_with(struct calls *calls, enum spoiled spoiled)
{
    struct seat *seat = calls->seat;
    struct arguments a = {
        .handle = spoiled == HANDLE ? calls->other : seat->handle,
        .in = seat_tokens(seat, calls->x, spoiled == SCALES ? calls->x : NULL),
        .rows = seat_rows(seat, calls->rows, NULL),
        .y = {.size = sizeof a.y, .y = calls->rows},
        .sum = {.size = sizeof a.sum, .num_tokens = SEAT_TOKENS, .y = calls->x},
        .stream = spoiled == STREAM ? calls->x : NULL,
    };
    if (spoiled == ID_TOO_LARGE || spoiled == ID_NEGATIVE) {
        memcpy(calls->ids, seat->ids, sizeof calls->ids);
        calls->ids[5] = spoiled == ID_NEGATIVE ? -2 : SEAT_EXPERTS;
        a.in.topk_ids = calls->ids;
    }
    a.in.num_tokens += spoiled == TOKENS;
    a.in.layer = spoiled == LAYER;
    a.in.size = spoiled == SIZE ? 4 : a.in.size;
    a.rows.capacity = spoiled == CAPACITY ? calls->counts.num_rows - 1 : a.rows.capacity;
    a.y.topk_weights = spoiled == WEIGHTS ? seat->weights : NULL;
    a.sum.num_tokens -= spoiled == SUM_TOKENS;
    return a;
}

/* Writes expert outputs, and says so flag by flag. */
static void *write_outputs(void *arg)
{
    struct calls *calls = arg;
    for (uint32_t i = 0; i < SEAT_SLOTS * SEAT_FLAGS; i++) {
        calls->rows[i] ^= 1;
        /* Release: pairs with the acquire in nep_combine_await. */
        __atomic_store_n(&calls->flags[i], 3, __ATOMIC_RELEASE);
    }
    return NULL;
}

/* Late: nobody writes. Else a thread does meanwhile. */
static enum nep_status await_outputs(struct calls *calls, enum spoiled spoiled)
{
    struct seat *seat = calls->seat;
    struct nep_written written = {
        .size = spoiled == SIZE ? 4 : sizeof written,
        .flags = spoiled == NO_FLAGS ? NULL : calls->flags,
        .flags_per_slot = SEAT_FLAGS,
        .rows_per_flag = spoiled == FEW_FLAGS ? 1 : ROWS_PER_FLAG,
        .least = 3,
    };
    void *stream = spoiled == STREAM ? calls->x : NULL;
    if (spoiled != NOTHING) {
        nep_ep_set_timeout(seat->ep, spoiled == LATE ? 20000000 : 0);
        enum nep_status status = nep_combine_await(seat->ep, seat->handle, &written, stream);
        nep_ep_set_timeout(seat->ep, 0);
        return status;
    }
    pthread_t writer;
    if (pthread_create(&writer, NULL, write_outputs, calls) != 0) {
        return NEP_ERR_INTERNAL;
    }
    enum nep_status status = nep_combine_await(seat->ep, seat->handle, &written, stream);
    for (uint32_t i = 0; i < calls->counts.rows_per_slot[0] / ROWS_PER_FLAG; i++) {
        calls->rows[i] ^= 1; /* read and written after the flag was seen */
    }
    pthread_join(writer, NULL);
    return status;
}

static enum nep_status do_call(struct calls *calls, const struct step *step)
{
    struct arguments a = arguments_with(calls, step->spoiled);
    struct nep_ep *ep = calls->seat->ep;
    switch (step->call) {
    case SEND:
        return nep_dispatch_send(ep, a.handle, &a.in, a.stream);
    case COUNTS:
        return nep_dispatch_counts(ep, a.handle, &calls->counts);
    case RECV:
        return nep_dispatch_recv(ep, a.handle, &a.rows, NULL);
    case AWAIT:
        return await_outputs(calls, step->spoiled);
    case COMBINE_SEND:
        return nep_combine_send(ep, a.handle, &a.y, NULL);
    default:
        return nep_combine_recv(ep, a.handle, &a.sum, NULL);
    }
}

/* After all of it: what the one dispatch left in the counters. */
static bool check_load(struct nep_multi_rank *rank, struct calls *calls)
{
    struct seat *seat = calls->seat;
    uint64_t most = 0, load[SEAT_EXPERTS], want[SEAT_EXPERTS] = {0};
    if (nep_ep_max_rows(seat->ep, &most) != NEP_OK ||
        most != SEAT_RANKS * SEAT_TOKENS * SEAT_TOP_K || most < calls->counts.num_rows) {
        return nep_multi_fail(rank, "at most %llu rows", (unsigned long long)most);
    }
    if (nep_ep_load(seat->ep, 1, load) != NEP_ERR_INVALID ||
        nep_ep_load(seat->ep, 0, load) != NEP_OK) {
        return nep_multi_fail(rank, "nep_ep_load: %s", nep_last_message());
    }
    for (uint32_t i = 0; i < SEAT_TOKENS * SEAT_TOP_K; i++) {
        if (seat->ids[i] >= 0) {
            want[seat->ids[i]]++;
        }
    }
    return memcmp(load, want, sizeof load) == 0 ||
           nep_multi_fail(rank, "the load per expert is not that of the one dispatch");
}

static bool refused_calls(struct nep_multi_rank *rank)
{
    struct calls *calls = calloc(1, sizeof *calls);
    struct seat *seat = calloc(1, sizeof *seat);
    struct nep_ep_params params = {.outstanding = 1};
    if (calls == NULL || seat == NULL || !seat_open(rank, &params, seat) ||
        nep_handle_create(seat->ep, &calls->other) != NEP_OK) {
        return false;
    }
    calls->seat = seat;
    seat_route(*(const uint64_t *)rank->arg, rank->rank, seat->ids, seat->weights);
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        enum nep_status got = do_call(calls, &steps[i]);
        if (got != steps[i].want) {
            return nep_multi_fail(rank, "step %zu: %s, not %s: %s", i, nep_status_name(got),
                                  nep_status_name(steps[i].want), nep_last_message());
        }
    }
    bool is_good = check_load(rank, calls);
    nep_handle_destroy(calls->other);
    seat_close(seat);
    free(calls);
    return is_good;
}

/* ---- a forked child ----------------------------------------------------------------------------
 */

static bool forked_child(struct nep_multi_rank *rank)
{
    struct seat *seat = calloc(1, sizeof *seat);
    struct nep_ep_params params = {0};
    if (seat == NULL || !seat_open(rank, &params, seat)) {
        return false;
    }
    int status = 0;
    if (rank->rank == 0) {
        pid_t pid = fork();
        if (pid == 0) {
            struct nep_stats stats;
            struct nep_tokens in = {.size = sizeof in};
            bool is_refused =
                nep_dispatch_send(seat->ep, seat->handle, &in, NULL) == NEP_ERR_BROKEN &&
                strstr(nep_last_message(), "fork") != NULL &&
                nep_ep_stats(seat->ep, &stats) == NEP_OK;
            seat_close(seat);
            _exit(is_refused ? 0 : 1);
        }
        if (pid < 0 || waitpid(pid, &status, 0) != pid || status != 0) {
            return nep_multi_fail(rank, "the child ended with %d", status);
        }
    }
    if (!nep_multi_barrier(rank)) {
        return false;
    }
    /* The parent is unharmed: a dispatch without tokens is a dispatch. */
    struct nep_tokens in = {.size = sizeof in};
    struct nep_rows out = {.size = sizeof out};
    if (nep_dispatch(seat->ep, seat->handle, &in, &out, NULL) != NEP_OK) {
        return nep_multi_fail(rank, "after the child: %s", nep_last_message());
    }
    bool is_good = nep_multi_barrier(rank);
    seat_close(seat);
    return is_good;
}

/* ---- tests ---- */

static void test_calls_refused_leave_the_ep_usable(void **state)
{
    (void)state;
    uint64_t seed = nep_multi_seed("refused");
    seat_run(refused_calls, &seed);
}

static void test_fork_child_is_refused_and_harmless(void **state)
{
    (void)state;
    seat_run_processes(forked_child, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_calls_refused_leave_the_ep_usable),
        cmocka_unit_test(test_fork_child_is_refused_and_harmless),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
