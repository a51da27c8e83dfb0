/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Deaths, recovery, joining. A rank that is to die inside of a call counts what it gives to the
 * fabric: its transport's table of operations is replaced by a copy in which put and progress count
 * first. The library has nothing of this, and whatever transport it is does its own work.
 */
#include "tests/multi/mortals.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "dispatch/ep.h"
#include "tests/unit/cmocka_all.h"
#include "transport/rendezvous.h"

/* More than a thread stands still beside others, or one of those that live is blamed. */
#define STOP_NS (2 * NEP_S)

/* ---- dying ---------------------------------------------------------------------------------- */

/* Of this process: what it counts, on the way to its moment. */
static struct {
    struct nep_transport_ops ops; /* the copy */
    const struct nep_transport_ops *inner;
    struct mortals_seat *seat;
    const struct mortals_death *death; /* NULL: nothing is counted */
    uint32_t left;                     /* events until it dies */
} doom;

static void die(struct mortals_seat *seat, const struct mortals_death *death)
{
    size_t d = (size_t)(death - seat->plan->deaths);
    atomic_store(&nep_multi_words(seat->rank)[MORTALS_TIME_WORD + d], nep_now_ns());
    atomic_fetch_add(&nep_multi_words(seat->rank)[MORTALS_DEAD_WORD], 1);
    raise(SIGKILL);
}

static enum nep_status doomed_put(struct nep_transport *transport, const struct nep_put *put,
                                  uint64_t *number_p)
{
    const struct mortals_death *death = doom.death;
    if (death == NULL || death->moment.event != MORTALS_AT_PUT ||
        nep_imm_kind(put->imm) != death->moment.kind || doom.left-- > 0) {
        return doom.inner->put(transport, put, number_p);
    }
    if (death->moment.is_after) {
        (void)doom.inner->put(transport, put, number_p);
    }
    die(doom.seat, death);
    return NEP_ERR_INTERNAL;
}

static void doomed_progress(struct nep_transport *transport)
{
    if (doom.death != NULL && doom.death->moment.event == MORTALS_AT_LOOK && doom.left-- == 0) {
        die(doom.seat, doom.death);
    }
    doom.inner->progress(transport);
}

/* After a communicator was made, and made again: its transports are new. */
static void doom_attach(struct mortals_seat *seat)
{
    struct nep_transport *inter = seat->comm->inter;
    if (!seat->plan->is_threads && inter != NULL && inter->ops != &doom.ops) {
        doom.inner = inter->ops;
        doom.ops = *inter->ops;
        doom.ops.put = doomed_put;
        doom.ops.progress = doomed_progress;
        doom.seat = seat;
        inter->ops = &doom.ops;
    }
}

bool mortals_call_begins(struct mortals_seat *seat, uint32_t step, enum mortals_call call)
{
    const struct mortals_plan *plan = seat->plan;
    for (uint32_t d = 0; d < plan->num_deaths; d++) {
        const struct mortals_death *death = &plan->deaths[d];
        if (death->rank != mortals_number(seat) || death->step != step ||
            death->moment.call != call) {
            continue;
        }
        if (plan->is_threads) {
            return true;
        }
        if (death->moment.event == MORTALS_AT_CALL) {
            die(seat, death);
        }
        doom.left =
            death->moment.nth + death->moment.nth_of_node * (seat->comm->topology.num_nodes - 1);
        doom.death = death;
    }
    return false;
}

/*
 * Set-up and recovery have the communicator's deadline, which is long, and this one begins where
 * nobody else can be missing when it passes, however slow the machine is.
 */
bool mortals_expect_stop(struct mortals_seat *seat, uint32_t step)
{
    const struct mortals_plan *plan = seat->plan;
    uint32_t num_live = 0;
    for (uint32_t r = 0; r < plan->num_ranks; r++) {
        num_live += seat->exact.is_live[r];
    }
    for (uint32_t d = 0; plan->is_threads && d < plan->num_deaths; d++) {
        if (plan->deaths[d].step != step || !seat->exact.is_live[plan->deaths[d].rank]) {
            continue;
        }
        _Atomic uint64_t *sent = &nep_multi_words(seat->rank)[MORTALS_SENT_WORD + d];
        uint64_t deadline_ns = nep_deadline_ns(plan->timeout_ns);
        atomic_fetch_add(sent, 1);
        while (atomic_load(sent) < num_live - 1) {
            if (nep_left_ns(deadline_ns) == 0) {
                return nep_multi_fail(seat->rank, "step %u: %u of %u have sent", step,
                                      (uint32_t)atomic_load(sent), num_live - 1);
            }
            usleep(100);
        }
        nep_ep_set_timeout(seat->exact.ep, STOP_NS);
    }
    return true;
}

/* ---- one seat ------------------------------------------------------------------------------- */

static bool open_seat(struct mortals_seat *seat, struct nep_multi_rank *rank, uint32_t number,
                      bool joins)
{
    const struct mortals_plan *plan = rank->arg;
    memset(seat, 0, sizeof *seat);
    seat->rank = rank;
    seat->plan = plan;
    struct nep_comm_params params = {.size = sizeof params,
                                     .rank = number,
                                     .num_ranks = plan->num_ranks,
                                     .rendezvous = plan->address,
                                     .ranks_per_node = plan->ranks_per_node,
                                     .num_nodes = plan->num_nodes,
                                     .intra = plan->intra,
                                     .inter = plan->inter,
                                     .timeout_ns = plan->timeout_ns,
                                     .joins = joins};
    seat->exact = (struct nep_exact){.rank = number,
                                     .num_ranks = plan->num_ranks,
                                     .max_tokens = plan->num_tokens,
                                     .hidden = plan->hidden,
                                     .layout = plan->layout};
    struct nep_ep_params shape = nep_exact_params(&seat->exact);
    uint64_t begin_ns = nep_now_ns();
    if (nep_comm_create(&params, &seat->comm) != NEP_OK ||
        nep_ep_create(seat->comm, &shape, &seat->exact.ep) != NEP_OK) {
        return nep_multi_fail(rank, "seat %u: %s", number, nep_last_message());
    }
    seat->made_ns = nep_now_ns() - begin_ns;
    doom_attach(seat);
    memset(seat->exact.is_live, 1, plan->num_ranks);
    return true;
}

static bool finish_seat(struct mortals_seat *seat, uint64_t generation)
{
    bool is_made = nep_handle_create(seat->exact.ep, &seat->exact.handle) == NEP_OK &&
                   mortals_buffers_make(seat);
    return (is_made || nep_multi_fail(seat->rank, "handle and buffers: %s", nep_last_message())) &&
           mortals_buffers_enrol(seat, generation);
}

static void close_seat(struct mortals_seat *seat)
{
    mortals_buffers_free(seat);
    nep_handle_destroy(seat->exact.handle);
    nep_ep_destroy(seat->exact.ep);
    mortals_registered_free(seat);
    nep_comm_destroy(seat->comm);
}

/* ---- the group changes ---------------------------------------------------------------------- */

static bool recover(struct mortals_seat *seat, uint32_t *step_p, uint32_t num_joining)
{
    struct nep_recover_params params = {.size = sizeof params, .num_joining = num_joining};
    struct nep_recovery recovery = {.size = sizeof recovery};
    enum nep_status status = NEP_ERR_TIMEOUT;
    for (int i = 0; i < 6 && status != NEP_OK; i++) {
        status = nep_comm_recover(seat->comm, &params, &recovery);
    }
    if (status != NEP_OK) {
        return nep_multi_fail(seat->rank, "no recovery: %s", nep_last_message());
    }
    doom_attach(seat);
    memcpy(seat->exact.is_live, recovery.is_live, seat->plan->num_ranks);
    if (!mortals_buffers_enrol(seat, recovery.generation)) {
        return false;
    }
    nep_ep_set_timeout(seat->exact.ep, 0);
    uint64_t first = 0, next = 0;
    if (nep_ep_resume(seat->exact.ep, &first, &next) != NEP_OK) {
        return nep_multi_fail(seat->rank, "%s", nep_last_message());
    }
    *step_p = seat->base_step + (uint32_t)((first - seat->base_op) / 2);
    seat->base_step = *step_p;
    seat->base_op = next;
    return true;
}

/* The last survivor that names it says how long that took. */
static void note_named(struct mortals_seat *seat, uint32_t d)
{
    const struct mortals_death *death = &seat->plan->deaths[d];
    _Atomic uint64_t *words = nep_multi_words(seat->rank);
    uint64_t took_ns = nep_now_ns() - atomic_load(&words[MORTALS_TIME_WORD + d]);
    uint64_t slowest_ns = atomic_load(&words[MORTALS_SLOWEST_WORD + d]);
    uint32_t num_survivors = 0;
    while (took_ns > slowest_ns &&
           !atomic_compare_exchange_weak(&words[MORTALS_SLOWEST_WORD + d], &slowest_ns, took_ns)) {
    }
    for (uint32_t r = 0; r < seat->plan->num_ranks; r++) {
        num_survivors += seat->exact.is_live[r] && r != death->rank;
    }
    if (atomic_fetch_add(&words[MORTALS_NAMED_WORD + d], 1) + 1 == num_survivors &&
        death->moment.name != NULL) {
        print_message("      %s: rank %u, named by all others (%u) after %.0f ms\n",
                      death->moment.name, death->rank, num_survivors,
                      (double)atomic_load(&words[MORTALS_SLOWEST_WORD + d]) / 1e6);
    }
}

/* The fault must name the one that died last, and a process that is gone is no timeout. */
static bool check_fault(struct mortals_seat *seat, uint32_t step)
{
    const struct mortals_plan *plan = seat->plan;
    struct nep_fault fault = {.size = sizeof fault};
    nep_comm_fault(seat->comm, &fault);
    uint32_t d = 0;
    while (d < plan->num_deaths && !seat->exact.is_live[plan->deaths[d].rank]) {
        d++;
    }
    if (d == plan->num_deaths || plan->deaths[d].rank != fault.rank ||
        (!plan->is_threads && fault.status != NEP_ERR_PEER_LOST)) {
        return nep_multi_fail(seat->rank, "step %u: the fault (%s) names rank %u: %s", step,
                              nep_status_name(fault.status), fault.rank, fault.message);
    }
    note_named(seat, d);
    return true;
}

static bool let_in(struct mortals_seat *seat, uint32_t *step_p)
{
    atomic_store(&nep_multi_words(seat->rank)[MORTALS_STEP_WORD], *step_p);
    if (!recover(seat, step_p, 1)) {
        return false;
    }
    if (*step_p != seat->plan->join_step || !seat->exact.is_live[seat->plan->newcomer]) {
        return nep_multi_fail(seat->rank, "the newcomer was not let in");
    }
    return true;
}

static void step_is_good(struct mortals_seat *seat)
{
    const struct mortals_plan *plan = seat->plan;
    if (seat->failed_ns != 0 && mortals_number(seat) == plan->deaths[0].rank + 1) {
        print_message("%u ranks, %s between nodes: first good step %.1f ms after the failure; made "
                      "at first in %.1f ms\n",
                      plan->num_ranks, plan->inter, (double)(nep_now_ns() - seat->failed_ns) / 1e6,
                      (double)seat->made_ns / 1e6);
    }
    seat->failed_ns = 0;
}

static bool run_steps(struct mortals_seat *seat, uint32_t step)
{
    const struct mortals_plan *plan = seat->plan;
    bool is_joined = seat->base_step != 0;
    while (step < plan->last_step) {
        if (plan->newcomer != UINT32_MAX && step == plan->join_step && !is_joined) {
            is_joined = true;
            if (!let_in(seat, &step)) {
                return false;
            }
        }
        uint32_t before = step;
        if (plan->is_renewed && (!recover(seat, &step, 0) || step != before)) {
            return nep_multi_fail(seat->rank, "step %u became step %u", before, step);
        }
        int status = mortals_step_run(seat, step);
        if (status == 1) {
            return true;
        }
        if (status != NEP_OK) {
            seat->failed_ns = nep_now_ns();
            if (!check_fault(seat, step) || !recover(seat, &step, 0)) {
                return false;
            }
            continue;
        }
        step_is_good(seat);
        if (!mortals_step_check(seat, step)) {
            return false;
        }
        step++;
    }
    return true;
}

static bool run_newcomer(struct nep_multi_rank *rank)
{
    const struct mortals_plan *plan = rank->arg;
    _Atomic uint64_t *words = nep_multi_words(rank);
    for (int i = 0; i < 60000 && atomic_load(&words[MORTALS_STEP_WORD]) == 0; i++) {
        usleep(1000);
    }
    struct mortals_seat seat;
    struct nep_recovery recovery = {.size = sizeof recovery};
    if (!open_seat(&seat, rank, plan->newcomer, true)) {
        return false;
    }
    if (nep_comm_recover(seat.comm, NULL, &recovery) != NEP_OK) {
        return nep_multi_fail(rank, "the newcomer: %s", nep_last_message());
    }
    memcpy(seat.exact.is_live, recovery.is_live, plan->num_ranks);
    uint64_t first;
    nep_ep_resume(seat.exact.ep, &first, &seat.base_op);
    seat.base_step = (uint32_t)atomic_load(&words[MORTALS_STEP_WORD]);
    bool is_fine = finish_seat(&seat, recovery.generation) && run_steps(&seat, seat.base_step);
    close_seat(&seat);
    return is_fine;
}

static bool run_rank(struct nep_multi_rank *rank)
{
    const struct mortals_plan *plan = rank->arg;
    struct mortals_seat seat;
    if (rank->rank == plan->num_ranks) {
        return run_newcomer(rank);
    }
    bool is_fine = open_seat(&seat, rank, rank->rank, false) && finish_seat(&seat, 0);
    is_fine = is_fine && run_steps(&seat, 0);
    if (is_fine) {
        close_seat(&seat);
    }
    return is_fine;
}

static uint32_t or_else(uint32_t given, uint32_t usual)
{
    return given != 0 ? given : usual;
}

void mortals_run(struct mortals_plan plan)
{
    struct nep_multi_result result;
    uint16_t port = 0;
    for (uint32_t n = 0; n < plan.num_nodes; n++) {
        plan.num_ranks += plan.ranks_per_node[n];
    }
    plan.num_tokens = or_else(plan.num_tokens, 21);
    plan.hidden = or_else(plan.hidden, 64);
    plan.last_step = or_else(plan.last_step, 14);
    struct nep_rendezvous_params params = {.host = "127.0.0.1", .num_ranks = plan.num_ranks};
    pid_t server = nep_multi_serve(&params, &port);
    assert_true(server > 0);
    snprintf(plan.address, sizeof plan.address, "127.0.0.1:%u", port);
    uint32_t num = plan.num_ranks + (plan.newcomer != UINT32_MAX);
    if (plan.is_threads) {
        nep_multi_run_threads(num, run_rank, &plan, &result);
    } else {
        nep_multi_run_processes(num, run_rank, &plan, or_else(plan.seconds, 90), &result);
    }
    nep_multi_serve_end(server);
    uint32_t num_dead = plan.is_threads ? 0 : plan.num_deaths;
    if (result.num_failed != num_dead || result.error[0] != '\0') {
        fail_msg("%u ranks failed, %u were to die: %s", result.num_failed, num_dead, result.error);
    }
}
