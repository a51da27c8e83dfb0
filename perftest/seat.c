/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The barrier spins for a moment, then yields: with more ranks than cores a pure spin would cost
 * scheduler slices and the measurement would be of those. It looks at `failed` and at the deadline
 * only when it yields.
 */
#include "perftest/seat.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "perftest/perf.h"

static bool wait_round(struct nep_perf_control *control, uint32_t round, uint64_t timeout_ns)
{
    uint64_t deadline_ns = nep_deadline_ns(timeout_ns);
    /* acquire: pairs with the release in memory_barrier, whoever arrives last */
    for (uint32_t i = 0; atomic_load_explicit(&control->round, memory_order_acquire) == round;
         i++) {
        if (i < 100) {
            continue;
        }
        sched_yield();
        if (atomic_load_explicit(&control->failed, memory_order_relaxed) != 0 ||
            (i % 256 == 0 && nep_left_ns(deadline_ns) == 0)) {
            return false;
        }
    }
    return true;
}

/* rounds: false on failure or deadline. */
static bool memory_barrier(struct nep_perf_control *control, uint32_t num_ranks,
                           uint64_t timeout_ns)
{
    uint32_t round = atomic_load_explicit(&control->round, memory_order_relaxed);
    /* acq_rel: everything before the barrier on any rank is before everything after it */
    if (atomic_fetch_add_explicit(&control->arrived, 1, memory_order_acq_rel) + 1 == num_ranks) {
        atomic_store_explicit(&control->arrived, 0, memory_order_relaxed);
        /* release: pairs with the acquire in wait_round */
        atomic_fetch_add_explicit(&control->round, 1, memory_order_release);
        return true;
    }
    return wait_round(control, round, timeout_ns);
}

static bool seat_memory_barrier(struct nep_perf_seat *seat)
{
    if (memory_barrier(seat->control, seat->num_ranks, seat->timeout_ns)) {
        return true;
    }
    bool is_first = atomic_exchange(&seat->control->reported, 1) == 0;
    uint32_t lost = atomic_load(&seat->control->lost_rank);
    if (is_first && lost == 0) {
        nep_perf_error(NEP_PERF_FAILED, "rank %u: %u of %u ranks reached the barrier in time",
                       seat->rank, atomic_load(&seat->control->arrived), seat->num_ranks);
    }
    return false;
}

int nep_perf_threads_allgather(void *ctx, const void *in, void *out, size_t bytes,
                               uint64_t timeout_ns)
{
    struct nep_perf_seat *seat = ctx;
    struct nep_perf_control *control = seat->control;
    atomic_store(&control->gather[seat->rank], in);
    if (!memory_barrier(control, seat->num_ranks, timeout_ns)) {
        return -1;
    }
    for (uint32_t r = 0; r < seat->num_ranks; r++) {
        memcpy((char *)out + r * bytes, atomic_load(&control->gather[r]), bytes);
    }
    return memory_barrier(control, seat->num_ranks, timeout_ns) ? 0 : -1;
}

void nep_perf_seat_memory(struct nep_perf_seat *seat, struct nep_perf_control *control,
                          uint32_t rank, uint32_t num_ranks, uint64_t timeout_ns)
{
    *seat = (struct nep_perf_seat){.rank = rank,
                                   .num_ranks = num_ranks,
                                   .timeout_ns = timeout_ns,
                                   .control = control,
                                   .barrier = seat_memory_barrier};
    seat->bootstrap = (struct nep_bootstrap){
        .size = sizeof(seat->bootstrap), .ctx = seat, .allgather = nep_perf_threads_allgather};
}

/* The rendezvous says which rank is missing; that of threads has no words of its own. */
static int gather_failed(const struct nep_perf_seat *seat)
{
    return nep_perf_error(0, "rank %u: a gather of results failed: %s", seat->rank,
                          nep_last_message());
}

bool nep_perf_seat_allgather(struct nep_perf_seat *seat, const void *in, void *out, size_t bytes)
{
    if (seat->is_live != NULL) {
        return nep_perf_seat_store_gather(seat, in, out, bytes);
    }
    /* In pieces: a rendezvous need not take messages of any size. */
    const size_t piece = 32768;
    char stage_in[32768];
    if (bytes <= piece) {
        int rc = seat->bootstrap.allgather(seat->bootstrap.ctx, in, out, bytes, seat->timeout_ns);
        return rc == 0 || gather_failed(seat) != 0;
    }
    size_t num = seat->num_ranks;
    char *stage_out = malloc(num * piece);
    bool is_fine = stage_out != NULL;
    for (size_t first = 0; first < bytes && is_fine; first += piece) {
        size_t part = bytes - first < piece ? bytes - first : piece;
        memcpy(stage_in, (const char *)in + first, part);
        is_fine = seat->bootstrap.allgather(seat->bootstrap.ctx, stage_in, stage_out, part,
                                            seat->timeout_ns) == 0;
        for (size_t r = 0; r < num && is_fine; r++) {
            memcpy((char *)out + r * bytes + first, stage_out + r * part, part);
        }
    }
    free(stage_out);
    if (!is_fine) {
        gather_failed(seat);
    }
    return is_fine;
}

bool nep_perf_seat_gather_barrier(struct nep_perf_seat *seat)
{
    char in = 0;
    char out[1024];
    return nep_perf_seat_allgather(seat, &in, out, 1);
}
