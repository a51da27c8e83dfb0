/* SPDX-License-Identifier: Apache-2.0 */
/*
 * --on-fault continue: the benchmark's own barriers and gathers among those who live, and what a
 * rank does when the library reports a loss. A barrier is a number per rank, so one that is gone
 * cannot leave it half full; who waits for a rank that the parent saw end leaves the barrier and
 * recovers, as those do whose operation failed.
 */
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "perftest/perf.h"
#include "perftest/rank.h"

static bool lives(const struct nep_perf_seat *seat, uint32_t rank)
{
    return seat->is_live == NULL || seat->is_live[rank] != 0;
}

bool nep_perf_seat_is_first(const struct nep_perf_seat *seat)
{
    uint32_t first = 0;
    while (first < seat->rank && !lives(seat, first)) {
        first++;
    }
    return first == seat->rank;
}

static bool is_somebody_gone(const struct nep_perf_seat *seat)
{
    for (uint32_t r = 0; r < seat->num_ranks; r++) {
        if (lives(seat, r) && atomic_load(&seat->control->is_gone[r]) != 0) {
            return true;
        }
    }
    return false;
}

static bool survivors_barrier(struct nep_perf_seat *seat)
{
    struct nep_perf_control *control = seat->control;
    uint64_t deadline_ns = nep_deadline_ns(10 * seat->timeout_ns);
    uint64_t round = ++seat->round;
    /* release: pairs with the acquire below, on the others */
    atomic_store_explicit(&control->round_of[seat->rank], round, memory_order_release);
    for (uint32_t r = 0; r < seat->num_ranks; r++) {
        /* acquire: what rank r did before its barrier is before what follows here */
        while (lives(seat, r) &&
               atomic_load_explicit(&control->round_of[r], memory_order_acquire) < round) {
            sched_yield();
            seat->must_recover = is_somebody_gone(seat);
            if (seat->must_recover || atomic_load(&control->failed) != 0) {
                return false;
            }
            if (nep_left_ns(deadline_ns) == 0) {
                nep_perf_error(NEP_PERF_FAILED, "rank %u: rank %u did not reach the barrier",
                               seat->rank, r);
                return false;
            }
        }
    }
    return true;
}

void nep_perf_seat_survive(struct nep_perf_seat *seat)
{
    seat->barrier = survivors_barrier;
}

void nep_perf_seat_renew(struct nep_perf_seat *seat, uint64_t generation, const uint8_t *is_live)
{
    seat->is_live = is_live;
    seat->must_recover = false;
    seat->round = generation << 32; /* above whatever was reached before */
}

bool nep_perf_seat_store_gather(struct nep_perf_seat *seat, const void *in, void *out, size_t bytes)
{
    const struct nep_bootstrap *store = &seat->bootstrap;
    char key[64];
    uint64_t number = seat->num_gathers++;
    snprintf(key, sizeof(key), "perf/%llu/%u", (unsigned long long)number, seat->rank);
    bool is_fine = store->put(store->ctx, key, in, bytes, seat->timeout_ns) == 0;
    memset(out, 0, bytes * seat->num_ranks);
    for (uint32_t r = 0; r < seat->num_ranks && is_fine; r++) {
        size_t len = 0;
        snprintf(key, sizeof(key), "perf/%llu/%u", (unsigned long long)number, r);
        if (lives(seat, r)) {
            is_fine = store->get(store->ctx, key, (char *)out + r * bytes, bytes, &len,
                                 seat->timeout_ns) == 0 &&
                      len == bytes;
        }
    }
    if (!is_fine) {
        nep_perf_error(NEP_PERF_FAILED, "rank %u: results of another rank did not come: %s",
                       seat->rank, nep_last_message());
    }
    return is_fine;
}

/* ---- a loss --------------------------------------------------------------------------------- */

int nep_perf_trouble(struct nep_perf_rank *rank, const char *what)
{
    struct nep_fault fault = {.size = sizeof(fault), .rank = UINT32_MAX};
    bool is_fault = rank->comm != NULL && nep_comm_fault(rank->comm, &fault) == NEP_OK &&
                    (fault.status == NEP_ERR_PEER_LOST || fault.status == NEP_ERR_TIMEOUT);
    if (rank->options.is_continued && is_fault) {
        return NEP_PERF_RECOVER;
    }
    return nep_perf_fail(rank, what);
}

int nep_perf_rank_recover(struct nep_perf_rank *rank, uint32_t *iteration_p)
{
    struct nep_recovery recovery = {.size = sizeof(recovery)};
    struct nep_recover_params params = {.size = sizeof(params),
                                        .timeout_ns = 10 * rank->seat->timeout_ns};
    uint64_t first_op = 0, next_op = 0, begin_ns = nep_now_ns();
    enum nep_status status = NEP_ERR_TIMEOUT;
    for (int i = 0; i < 5 && status != NEP_OK; i++) {
        status = nep_comm_recover(rank->comm, &params, &recovery);
    }
    if (status != NEP_OK || nep_ep_resume(rank->ep, &first_op, &next_op) != NEP_OK) {
        atomic_store(&rank->seat->control->failed, 1);
        return nep_perf_error(NEP_PERF_FAILED, "rank %u: nep_comm_recover: %s", rank->seat->rank,
                              nep_last_message());
    }
    uint64_t per_iteration = 2 * (uint64_t)rank->options.outstanding;
    uint32_t again = rank->base_iteration + (uint32_t)((first_op - rank->base_op) / per_iteration);
    rank->base_iteration = *iteration_p = again;
    rank->base_op = next_op;
    rank->num_recoveries++;
    rank->recover_ns += nep_now_ns() - begin_ns;
    nep_perf_plan_set_live(rank->plan, recovery.is_live);
    rank->is_blind = nep_perf_plan_map(rank->plan) != NULL;
    nep_perf_seat_renew(rank->seat, recovery.generation, recovery.is_live);
    if (nep_perf_seat_is_first(rank->seat)) {
        fprintf(stderr, "nep-perf: %u of %u ranks go on with iteration %u%s\n", recovery.num_live,
                rank->seat->num_ranks, again,
                rank->is_blind && rank->options.is_verified
                    ? "; with a map elements are not verified from here on"
                    : "");
    }
    return nep_perf_rank_renew_tensors(rank);
}
