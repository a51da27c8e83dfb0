/* SPDX-License-Identifier: Apache-2.0 */
/* Calls that are refused, and a forked child, leave everything usable. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/multi/seat.h"
#include "tests/unit/cmocka_all.h"

/* ---- calls that are refused leave everything usable ------------------------------------------ */

static bool refused_calls(struct nep_multi_rank *rank)
{
    uint64_t seed = *(const uint64_t *)rank->arg;
    struct seat *seat = calloc(1, sizeof *seat);
    struct nep_ep_params params = {.outstanding = 1};
    struct nep_handle *other = NULL;
    if (seat == NULL || !seat_open(rank, &params, seat) ||
        nep_handle_create(seat->ep, &other) != NEP_OK) {
        return false;
    }
    seat_route(seed, rank->rank, seat->ids, seat->weights);
    uint16_t *x = calloc(SEAT_TOKENS * SEAT_HIDDEN, 2), *out = calloc(SEAT_ROWS * SEAT_HIDDEN, 2);
    struct nep_tokens in = seat_tokens(seat, x, NULL);
    struct nep_rows rows = seat_rows(seat, out, NULL);
    struct nep_expert_rows y = {.size = sizeof y, .y = out};
    struct nep_tokens_out sum = {.size = sizeof sum, .num_tokens = SEAT_TOKENS, .y = x};
    struct nep_counts counts;
    int32_t kept = seat->ids[5];
#define REFUSED(call, want)                                                                        \
    do {                                                                                           \
        enum nep_status got = (call);                                                              \
        if (got != (want)) {                                                                       \
            return nep_multi_fail(rank, "%s: %d, not %d: %s", #call, (int)got, (int)(want),        \
                                  nep_last_message());                                             \
        }                                                                                          \
    } while (0)
    REFUSED(nep_combine_send(seat->ep, seat->handle, &y, NULL), NEP_ERR_INVALID);
    REFUSED(nep_dispatch_recv(seat->ep, seat->handle, &rows, NULL), NEP_ERR_INVALID);
    REFUSED(nep_dispatch_counts(seat->ep, seat->handle, &counts), NEP_ERR_INVALID);
    seat->ids[5] = SEAT_EXPERTS;
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_ERR_INVALID);
    seat->ids[5] = -2;
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_ERR_INVALID);
    seat->ids[5] = kept;
    in.num_tokens = SEAT_TOKENS + 1;
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_ERR_INVALID);
    in.num_tokens = SEAT_TOKENS;
    in.layer = 1;
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_ERR_INVALID);
    in.layer = 0;
    in.scales = x;
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_ERR_INVALID);
    in.scales = NULL;
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, x), NEP_ERR_UNSUPPORTED);
    in.size = 4;
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_ERR_INVALID);
    in.size = sizeof in;

    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_OK);
    REFUSED(nep_dispatch_send(seat->ep, other, &in, NULL), NEP_ERR_BUSY);
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_ERR_BUSY);
    REFUSED(nep_dispatch_counts(seat->ep, seat->handle, &counts), NEP_OK);
    rows.capacity = counts.num_rows - 1;
    REFUSED(nep_dispatch_recv(seat->ep, seat->handle, &rows, NULL), NEP_ERR_OVERFLOW);
    rows.capacity = counts.num_rows;
    REFUSED(nep_dispatch_recv(seat->ep, seat->handle, &rows, NULL), NEP_OK);
    y.topk_weights = seat->weights;
    REFUSED(nep_combine_send(seat->ep, seat->handle, &y, NULL), NEP_ERR_INVALID);
    y.topk_weights = NULL;
    y.token_weights = seat->weights; /* several nodes */
    REFUSED(nep_combine_send(seat->ep, seat->handle, &y, NULL), NEP_ERR_UNSUPPORTED);
    y.token_weights = NULL;
    REFUSED(nep_combine_send(seat->ep, seat->handle, &y, NULL), NEP_OK);
    sum.num_tokens = SEAT_TOKENS - 1;
    REFUSED(nep_combine_recv(seat->ep, seat->handle, &sum, NULL), NEP_ERR_INVALID);
    sum.num_tokens = SEAT_TOKENS;
    REFUSED(nep_combine_recv(seat->ep, seat->handle, &sum, NULL), NEP_OK);
    uint64_t most = 0, load[SEAT_EXPERTS], want[SEAT_EXPERTS] = {0};
    REFUSED(nep_ep_max_rows(seat->ep, &most), NEP_OK);
    if (most != SEAT_RANKS * SEAT_TOKENS * SEAT_TOP_K || most < counts.num_rows) {
        return nep_multi_fail(rank, "at most %llu rows", (unsigned long long)most);
    }
    REFUSED(nep_ep_load(seat->ep, 1, load), NEP_ERR_INVALID);
    REFUSED(nep_ep_load(seat->ep, 0, load), NEP_OK);
    for (uint32_t i = 0; i < SEAT_TOKENS * SEAT_TOP_K; i++) {
        if (seat->ids[i] >= 0) {
            want[seat->ids[i]]++;
        }
    }
    if (memcmp(load, want, sizeof load) != 0) {
        return nep_multi_fail(rank, "the load per expert is not that of the one dispatch");
    }
#undef REFUSED
    nep_handle_destroy(other);
    free(x);
    free(out);
    seat_close(seat);
    return true;
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
