/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A group grows while it computes: a newcomer's part is prepared beside the operations, and all
 * change over at a step. Killed meanwhile, it harms nobody, and the next one is let in. Every
 * element of every step is compared.
 */
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/clock.h"
#include "tests/multi/exact.h"
#include "tests/multi/harness.h"
#include "tests/unit/cmocka_all.h"
#include "transport/rendezvous.h"

enum {
    SEATS = 4,
    EMPTY = 2, /* the seat that is left and taken again */
    TOKENS = 21,
    LOOK = 3, /* steps after which all have seen a word that was set before a step */
    LEAVE_STEP = 2,
    MOST_NEWCOMERS = 2
};

/* Words that all ranks share. Each newcomer has its own, one after the other. */
enum { BEGUN = 0, READY = 8, SWITCH = 16, PID = 24, PAST = 32, OVER = 40, DEAD = 48 };

enum end_of_first { JOINS, KILLED_AT_ONCE, KILLED_WHEN_READY, MEMBER_KILLED, NEVER_COMES };

struct plan {
    const char *intra;
    const char *inter;
    enum nep_layout layout;
    bool is_mapped;
    bool is_threads;
    bool is_spoilt; /* an ep is made after the beginning: nothing prepared may be used */
    enum end_of_first end;
    char address[64];
};

struct seat {
    struct nep_multi_rank *rank;
    const struct plan *plan;
    struct nep_comm *comm;
    struct nep_exact exact;
    uint32_t step;
    uint32_t base_step;
    uint64_t base_op;
    uint32_t newcomer; /* the one that is let in next */
    bool has_begun;
};

static _Atomic uint64_t *word(struct seat *seat, uint32_t which, uint32_t idx)
{
    return &nep_multi_words(seat->rank)[which + idx];
}

static bool open_seat(struct seat *seat, struct nep_multi_rank *rank, uint32_t number, bool joins)
{
    static const uint32_t ranks_per_node[] = {2, 2};
    const struct plan *plan = rank->arg;
    memset(seat, 0, sizeof *seat);
    seat->rank = rank;
    seat->plan = plan;
    struct nep_comm_params params = {.size = sizeof params,
                                     .rank = number,
                                     .num_ranks = SEATS,
                                     .rendezvous = plan->address,
                                     .ranks_per_node = ranks_per_node,
                                     .num_nodes = 2,
                                     .intra = plan->intra,
                                     .inter = plan->inter,
                                     .timeout_ns = 12 * NEP_S,
                                     .joins = joins};
    seat->exact = (struct nep_exact){.rank = number,
                                     .num_ranks = SEATS,
                                     .max_tokens = TOKENS,
                                     .layout = plan->layout,
                                     .is_mapped = plan->is_mapped};
    struct nep_ep_params shape = nep_exact_params(&seat->exact);
    if (nep_comm_create(&params, &seat->comm) != NEP_OK ||
        nep_ep_create(seat->comm, &shape, &seat->exact.ep) != NEP_OK) {
        return nep_multi_fail(rank, "seat %u: %s", number, nep_last_message());
    }
    memset(seat->exact.is_live, 1, SEATS);
    return true;
}

static bool finish_seat(struct seat *seat)
{
    return (nep_handle_create(seat->exact.ep, &seat->exact.handle) == NEP_OK &&
            nep_exact_make_tables(&seat->exact) && nep_exact_make_buffers(&seat->exact)) ||
           nep_multi_fail(seat->rank, "handle and buffers: %s", nep_last_message());
}

static void close_seat(struct seat *seat)
{
    nep_exact_free(&seat->exact);
    nep_handle_destroy(seat->exact.handle);
    nep_ep_destroy(seat->exact.ep);
    nep_comm_destroy(seat->comm);
}

/* ---- the group changes ---------------------------------------------------------------------- */

static bool recover(struct seat *seat, const struct nep_recover_params *params,
                    struct nep_recovery *recovery)
{
    uint64_t first = 0, next = 0;
    *recovery = (struct nep_recovery){.size = sizeof *recovery};
    if (nep_comm_recover(seat->comm, params, recovery) != NEP_OK ||
        nep_ep_resume(seat->exact.ep, &first, &next) != NEP_OK) {
        return nep_multi_fail(seat->rank, "step %u: %s", seat->step, nep_last_message());
    }
    memcpy(seat->exact.is_live, recovery->is_live, SEATS);
    seat->step = seat->base_step + (uint32_t)((first - seat->base_op) / 2);
    seat->base_step = seat->step;
    seat->base_op = next;
    return nep_exact_make_buffers(&seat->exact);
}

/* The seat's rank has closed, and goes. */
static bool shrink(struct seat *seat)
{
    uint8_t is_lost[SEATS] = {0};
    struct nep_recovery recovery;
    is_lost[EMPTY] = 1;
    struct nep_recover_params params = {.size = sizeof params, .is_lost = is_lost};
    return recover(seat, &params, &recovery) &&
           (recovery.num_live == SEATS - 1 || nep_multi_fail(seat->rank, "it was not removed"));
}

/* Makes an ep that nothing was prepared for. */
static bool spoil(struct seat *seat)
{
    struct nep_ep *ep = NULL;
    struct nep_ep_params shape = nep_exact_params(&seat->exact);
    if (nep_ep_create(seat->comm, &shape, &ep) != NEP_OK) {
        return nep_multi_fail(seat->rank, "a second ep: %s", nep_last_message());
    }
    return true;
}

static bool begin(struct seat *seat)
{
    uint32_t is_ready = 2;
    enum nep_status before = nep_comm_grow_ready(seat->comm, &is_ready);
    if (before == NEP_OK || nep_comm_grow_begin(seat->comm, NULL) != NEP_OK) {
        return nep_multi_fail(seat->rank, "begin: %s", nep_last_message());
    }
    seat->has_begun = true;
    atomic_fetch_add(word(seat, BEGUN, seat->newcomer), 1);
    return true;
}

static uint32_t lowest(const struct seat *seat)
{
    return seat->exact.is_live[0] ? 0 : 1;
}

static uint32_t num_live(const struct seat *seat)
{
    uint32_t num = 0;
    for (uint32_t r = 0; r < SEATS; r++) {
        num += seat->exact.is_live[r] != 0;
    }
    return num;
}

/* Returns when its end can be seen. */
static void kill_and_see(pid_t pid)
{
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    struct pollfd pollfd = {.fd = fd, .events = POLLIN};
    kill(pid, SIGKILL);
    if (fd >= 0) {
        poll(&pollfd, 1, 20000);
        close(fd);
    }
}

/* The lowest rank kills the newcomer, where that is the plan, and names the step of the change. */
static void arrange(struct seat *seat)
{
    const struct plan *plan = seat->plan;
    bool is_first = seat->newcomer == 0;
    bool all_ready = atomic_load(word(seat, READY, seat->newcomer)) == num_live(seat);
    bool all_begun = atomic_load(word(seat, BEGUN, seat->newcomer)) == num_live(seat);
    pid_t pid = (pid_t)atomic_load(word(seat, PID, seat->newcomer));
    if (atomic_load(word(seat, SWITCH, seat->newcomer)) != 0) {
        return;
    }
    if (is_first && plan->end == KILLED_AT_ONCE && all_begun && pid != 0) {
        kill_and_see(pid);
        atomic_store(word(seat, SWITCH, seat->newcomer), UINT64_MAX);
    } else if (is_first && plan->end == NEVER_COMES && all_begun) {
        atomic_store(word(seat, SWITCH, seat->newcomer), UINT64_MAX);
    } else if (all_ready && !(is_first && plan->end == KILLED_AT_ONCE)) {
        if (is_first && plan->end == KILLED_WHEN_READY) {
            kill_and_see(pid);
        }
        atomic_store(word(seat, SWITCH, seat->newcomer), seat->step + LOOK);
    }
}

static bool change_over(struct seat *seat)
{
    struct nep_recovery recovery;
    bool is_dead = seat->newcomer == 0 && seat->plan->end == KILLED_WHEN_READY;
    uint32_t step = seat->step;
    if (!recover(seat, NULL, &recovery)) {
        return false;
    }
    if (recovery.num_live != SEATS - (uint32_t)is_dead || seat->step != step ||
        recovery.was_prepared != (!is_dead && !seat->plan->is_spoilt)) {
        return nep_multi_fail(seat->rank, "%u live after step %u, now %u, prepared: %u",
                              recovery.num_live, step, seat->step, recovery.was_prepared);
    }
    seat->newcomer++;
    seat->has_begun = false;
    return true;
}

/* What was prepared for a newcomer that is dead, or never comes, fails or is dropped; nobody is
 * harmed. */
static bool give_up(struct seat *seat)
{
    struct nep_fault fault = {.size = sizeof fault};
    nep_comm_fault(seat->comm, &fault);
    if (fault.status != NEP_OK || nep_comm_grow_begin(seat->comm, NULL) != NEP_OK) {
        return nep_multi_fail(seat->rank, "after a newcomer's death: %s", nep_last_message());
    }
    seat->newcomer++;
    atomic_fetch_add(word(seat, BEGUN, seat->newcomer), 1);
    return true;
}

/* What is to be done before this step. */
static bool look(struct seat *seat)
{
    const struct plan *plan = seat->plan;
    if (seat->step == LEAVE_STEP && seat->exact.is_live[EMPTY]) {
        return shrink(seat);
    }
    if (seat->step <= LEAVE_STEP || num_live(seat) != SEATS - 1) {
        return true;
    }
    if (!seat->has_begun && (!begin(seat) || (plan->is_spoilt && !spoil(seat)))) {
        return false;
    }
    uint32_t is_ready = 0;
    enum nep_status status = nep_comm_grow_ready(seat->comm, &is_ready);
    bool was_counted = (atomic_load(word(seat, PAST, seat->newcomer)) >> seat->exact.rank & 1) != 0;
    /* A newcomer with one ep more than was prepared for is refused. */
    bool is_refused = plan->is_spoilt && status == NEP_ERR_MISMATCH;
    status = is_refused ? NEP_OK : status;
    if (status == NEP_OK && (is_ready == 1 || is_refused) && !was_counted) {
        atomic_fetch_or(word(seat, PAST, seat->newcomer), 1ull << seat->exact.rank);
        atomic_fetch_add(word(seat, READY, seat->newcomer), 1);
    }
    if (status != NEP_OK && !(seat->newcomer == 0 && plan->end == KILLED_AT_ONCE)) {
        return nep_multi_fail(seat->rank, "step %u: %s", seat->step, nep_last_message());
    }
    if (seat->exact.rank == lowest(seat)) {
        arrange(seat);
    }
    uint64_t at = atomic_load(word(seat, SWITCH, seat->newcomer));
    return at == UINT64_MAX ? give_up(seat) : at != seat->step || change_over(seat);
}

/* ---- ranks ---------------------------------------------------------------------------------- */

static bool is_victim(const struct seat *seat)
{
    return seat->plan->end == MEMBER_KILLED && seat->exact.rank == SEATS - 1;
}

/* A member that is to die does so once all have begun, in the middle of a step. */
static int die(void *ctx, enum nep_exact_when when)
{
    struct seat *seat = ctx;
    if (is_victim(seat) && when == NEP_EXACT_DISPATCH &&
        atomic_load(word(seat, BEGUN, 0)) == SEATS - 1) {
        atomic_store(word(seat, DEAD, 0), 1);
        raise(SIGKILL);
    }
    return NEP_OK;
}

/* The others go on without it; what was prepared is not used. */
static bool lose(struct seat *seat, int status)
{
    struct nep_recovery recovery;
    struct nep_fault fault = {.size = sizeof fault};
    nep_comm_fault(seat->comm, &fault);
    if (seat->plan->end != MEMBER_KILLED || fault.rank != SEATS - 1) {
        return nep_multi_fail(seat->rank, "step %u, status %d: %s", seat->step, status,
                              fault.message);
    }
    return recover(seat, NULL, &recovery);
}

/* All steps until some after the newcomer was let in. */
static bool run_steps(struct seat *seat)
{
    const struct plan *plan = seat->plan;
    uint64_t deadline_ns = nep_deadline_ns(80 * NEP_S);
    uint32_t num_together = 0;
    char text[160];
    while (num_together < 5) {
        if (nep_left_ns(deadline_ns) == 0) {
            return nep_multi_fail(seat->rank, "the newcomer is not ready after %u steps",
                                  seat->step);
        }
        if (plan->end == MEMBER_KILLED && !seat->exact.is_live[SEATS - 1] &&
            seat->step > seat->base_step + 5) {
            return true; /* seen to go on */
        }
        if (!look(seat)) {
            return false;
        }
        int status = nep_exact_step(&seat->exact, seat->step, TOKENS);
        if (status != NEP_OK) {
            if (!lose(seat, status)) {
                return false;
            }
            continue;
        }
        if (!nep_exact_is_right(&seat->exact, seat->step, text, sizeof text)) {
            return nep_multi_fail(seat->rank, "%s", text);
        }
        num_together += seat->step > LEAVE_STEP && num_live(seat) == SEATS;
        seat->step++;
    }
    return true;
}

static bool run_newcomer(struct nep_multi_rank *rank)
{
    const struct plan *plan = rank->arg;
    uint32_t number = rank->rank - SEATS;
    struct seat seat = {.rank = rank};
    if (plan->end == MEMBER_KILLED || (number == 0 && plan->end == NEVER_COMES)) {
        return true;
    }
    /* The second comes when the first is out of the way, if it ever is; else it is not needed. */
    uint64_t deadline_ns = nep_deadline_ns(80 * NEP_S);
    while (atomic_load(word(&seat, BEGUN, number)) == 0) {
        if (atomic_load(word(&seat, OVER, 0)) != 0 || nep_left_ns(deadline_ns) == 0) {
            return true;
        }
        usleep(500);
    }
    struct nep_recovery recovery = {.size = sizeof recovery};
    if (!open_seat(&seat, rank, EMPTY, true)) {
        return false;
    }
    seat.newcomer = number;
    atomic_store(word(&seat, PID, number), (uint64_t)getpid());
    if (plan->is_spoilt && !spoil(&seat)) {
        return false;
    }
    if (nep_comm_recover(seat.comm, NULL, &recovery) != NEP_OK) {
        return nep_multi_fail(rank, "newcomer %u: %s", number, nep_last_message());
    }
    memcpy(seat.exact.is_live, recovery.is_live, SEATS);
    uint64_t first = 0;
    nep_ep_resume(seat.exact.ep, &first, &seat.base_op);
    seat.step = seat.base_step = (uint32_t)atomic_load(word(&seat, SWITCH, number));
    if (recovery.was_prepared != !plan->is_spoilt) {
        return nep_multi_fail(rank, "newcomer %u: prepared: %u", number, recovery.was_prepared);
    }
    bool is_fine = finish_seat(&seat) && run_steps(&seat);
    close_seat(&seat);
    return is_fine;
}

static bool run_rank(struct nep_multi_rank *rank)
{
    struct seat seat;
    if (rank->rank >= SEATS) {
        return run_newcomer(rank);
    }
    bool is_fine = open_seat(&seat, rank, rank->rank, false) && finish_seat(&seat);
    seat.exact.ctx = &seat;
    seat.exact.hook = is_fine && seat.plan->end == MEMBER_KILLED ? die : NULL;
    char text[160];
    while (is_fine && rank->rank == EMPTY && seat.step < LEAVE_STEP) {
        is_fine = nep_exact_step(&seat.exact, seat.step, TOKENS) == NEP_OK &&
                  nep_exact_is_right(&seat.exact, seat.step, text, sizeof text);
        seat.step++;
    }
    if (is_fine && rank->rank != EMPTY) {
        is_fine = run_steps(&seat);
        atomic_store(word(&seat, OVER, 0), 1);
    }
    if (is_fine) {
        close_seat(&seat);
    }
    return is_fine;
}

static void run(struct plan plan)
{
    struct nep_multi_result result;
    uint16_t port = 0;
    struct nep_rendezvous_params params = {.host = "127.0.0.1", .num_ranks = SEATS};
    pid_t server = nep_multi_serve(&params, &port);
    assert_true(server > 0);
    snprintf(plan.address, sizeof plan.address, "127.0.0.1:%u", port);
    uint32_t num = SEATS + MOST_NEWCOMERS;
    if (plan.is_threads) {
        nep_multi_run_threads(num, run_rank, &plan, &result);
    } else {
        nep_multi_run_processes(num, run_rank, &plan, 100, &result);
    }
    nep_multi_serve_end(server);
    uint32_t num_dead =
        plan.end == KILLED_AT_ONCE || plan.end == KILLED_WHEN_READY || plan.end == MEMBER_KILLED;
    if (result.num_failed != num_dead || result.error[0] != '\0') {
        fail_msg("%u ranks failed: %s", result.num_failed, result.error);
    }
}

/* ---- cases ---------------------------------------------------------------------------------- */

static const struct plan over_shm = {
    .intra = "shm", .inter = "shm", .layout = NEP_LAYOUT_EXPERT_PACKED, .is_mapped = true};
static const struct plan over_ucx = {
    .intra = "shm", .inter = "ucx", .layout = NEP_LAYOUT_EXPERT_PADDED, .is_mapped = true};

static void test_grow_newcomer_is_prepared_and_taken(void **state)
{
    (void)state;
    run(over_shm);
    run(over_ucx);
}

static void test_grow_newcomer_killed_while_it_is_prepared(void **state)
{
    (void)state;
    struct plan plan = over_shm;
    plan.end = KILLED_AT_ONCE;
    run(plan);
    plan = over_ucx;
    plan.end = KILLED_AT_ONCE;
    run(plan);
}

static void test_grow_newcomer_killed_when_all_are_ready(void **state)
{
    (void)state;
    struct plan plan = over_shm;
    plan.end = KILLED_WHEN_READY;
    run(plan);
    plan = over_ucx;
    plan.end = KILLED_WHEN_READY;
    run(plan);
}

static void test_grow_member_killed_while_it_is_prepared(void **state)
{
    (void)state;
    struct plan plan = over_shm;
    plan.end = MEMBER_KILLED;
    run(plan);
}

static void test_grow_newcomer_never_comes(void **state)
{
    (void)state;
    struct plan plan = over_shm;
    plan.end = NEVER_COMES;
    run(plan);
}

static void test_grow_another_ep_makes_everything_anew(void **state)
{
    (void)state;
    struct plan plan = over_shm;
    plan.is_spoilt = true;
    run(plan);
}

static void test_grow_threads(void **state)
{
    (void)state;
    run((struct plan){.intra = "loop",
                      .inter = "loop",
                      .layout = NEP_LAYOUT_RANK,
                      .is_mapped = true,
                      .is_threads = true});
}

static bool refuse(struct nep_multi_rank *rank)
{
    struct nep_comm *comm = NULL;
    uint32_t is_ready = 0;
    uint16_t port = 0;
    char address[64];
    struct nep_rendezvous_params served = {.host = "127.0.0.1", .num_ranks = 1};
    pid_t server = nep_multi_serve(&served, &port);
    snprintf(address, sizeof address, "127.0.0.1:%u", port);
    struct nep_comm_params params = {
        .size = sizeof params, .num_ranks = 1, .rendezvous = address, .timeout_ns = 30 * NEP_S};
    bool is_fine = nep_comm_create(&params, &comm) == NEP_OK &&
                   nep_comm_grow_begin(NULL, NULL) == NEP_ERR_INVALID &&
                   nep_comm_grow_ready(NULL, &is_ready) == NEP_ERR_INVALID &&
                   nep_comm_grow_ready(comm, NULL) == NEP_ERR_INVALID &&
                   nep_comm_grow_ready(comm, &is_ready) == NEP_ERR_NOT_FOUND &&
                   nep_comm_grow_begin(comm, NULL) == NEP_ERR_INVALID; /* no seat is empty */
    nep_comm_destroy(comm);
    nep_multi_serve_end(server);
    return is_fine || nep_multi_fail(rank, "%s", nep_last_message());
}

static void test_grow_refuses(void **state)
{
    (void)state;
    struct nep_multi_result result;
    nep_multi_run_threads(1, refuse, NULL, &result);
    assert_int_equal(result.num_failed, 0);
}

int main(void)
{
    const struct CMUnitTest processes[] = {
        cmocka_unit_test(test_grow_newcomer_is_prepared_and_taken),
        cmocka_unit_test(test_grow_newcomer_killed_while_it_is_prepared),
        cmocka_unit_test(test_grow_newcomer_killed_when_all_are_ready),
        cmocka_unit_test(test_grow_member_killed_while_it_is_prepared),
        cmocka_unit_test(test_grow_newcomer_never_comes),
        cmocka_unit_test(test_grow_another_ep_makes_everything_anew),
        cmocka_unit_test(test_grow_refuses),
    };
    const struct CMUnitTest threads[] = {cmocka_unit_test(test_grow_threads)};
#ifdef __SANITIZE_THREAD__
    (void)processes;
    return cmocka_run_group_tests(threads, NULL, NULL);
#else
    return cmocka_run_group_tests(processes, NULL, NULL) +
           cmocka_run_group_tests(threads, NULL, NULL);
#endif
}
