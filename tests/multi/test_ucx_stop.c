/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Transport `ucx` where a rank stops in the set-up: after the exchange of addresses it does nothing
 * any more. The others wait for it once, in connecting, and not a second time in the exchange that
 * tells of it.
 */
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "cmocka_all.h"
#include "conformance.h"

#include "base/clock.h"

#if NEP_HAVE_UCX
#include "transport/ucx.h"

enum { VICTIM = 2 };
enum { GATHER_ADDRESSES = 3, GATHER_OUTCOME = 4, STILL_S = 5 };

struct still {
    struct nep_bootstrap inner;
    struct rank *rank;
    uint32_t num_gathers;
    uint64_t outcome_ns; /* how long the exchange of outcomes was to wait at most */
};

static int still_allgather(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns)
{
    struct still *still = ctx;
    int result = still->inner.allgather(still->inner.ctx, in, out, bytes, timeout_ns);
    still->num_gathers++;
    if (still->num_gathers == GATHER_OUTCOME) {
        still->outcome_ns = timeout_ns;
    }
    atomic_int *num_done = still->rank->scratch;
    while (still->rank->rank == VICTIM && still->num_gathers == GATHER_ADDRESSES &&
           atomic_load(num_done) != 2) {
        usleep(1000);
    }
    return result;
}

static int still_body(struct rank *rank)
{
    struct still still = {.inner = rank->bootstrap, .rank = rank};
    rank->bootstrap.ctx = &still;
    rank->bootstrap.allgather = still_allgather;
    struct nep_transport *transport;
    enum nep_status status = conformance_open(rank, "ucx", STILL_S * NEP_S, &transport);
    char message[NEP_MESSAGE_BYTES];
    nep_message_save(message);
    rank->bootstrap = still.inner;
    atomic_fetch_add((atomic_int *)rank->scratch, 1);
    if (rank->rank == VICTIM) {
        return 0;
    }
    RANK_CHECK(rank, status != NEP_OK, "connects to a rank that does nothing");
    RANK_CHECK(rank, strstr(message, "could not connect to rank") != NULL, "%s", message);
    RANK_CHECK(rank, still.outcome_ns <= STILL_S * NEP_S / 4, "waits for %.3f s more",
               (double)still.outcome_ns / 1e9);
    return 0;
}

static void test_ucx_rank_that_stops_in_the_set_up_is_waited_for_once(void **state)
{
    (void)state;
    struct ranks_params params = {
        .ranks_per_node = (uint32_t[]){1, 1, 1}, .num_nodes = 3, .seconds = 120, .num_spare = 1};
    assert_int_equal(ranks_run(&params, still_body, NULL), 0);
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
        cmocka_unit_test(test_ucx_rank_that_stops_in_the_set_up_is_waited_for_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
#else
    printf("this build has no transport ucx; test_transport checks that it says so\n");
    return 0;
#endif
}
