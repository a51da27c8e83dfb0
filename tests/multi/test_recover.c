/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Ranks are lost in the middle of operations; the others agree, go on, and later let a newcomer in.
 * Values are small integers, so that sums are exact in any order: every element is compared with
 * what the experts that live must give, and `present` with their weights, exactly. This file is
 * long because all tests drive one small engine: routing, experts, deaths, recovery, joining.
 */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "tests/multi/harness.h"
#include "tests/unit/cmocka_all.h"
#include "transport/rendezvous.h"

enum {
    MAX_RANKS = 64,
    SLOTS = 2,
    TOP_K = 3,
    HIDDEN = 64,
    TOKENS = 21,
    LAST_STEP = 14,
    STEP_WORD = 0, /* where the members are when a newcomer is let in */
    DEAD_WORD = 1, /* victims that have ended */
    SENT_WORD = 2  /* [deaths] ranks that have sent in the step in which one stops */
};

#define STOP_NS (300 * NEP_MS)

struct death {
    uint32_t rank;
    uint32_t step;
    int when; /* 0: before dispatch, 1: between its halves, 2: between those of combine */
};

struct plan {
    const char *intra;
    const char *inter;
    uint32_t num_nodes;
    uint32_t ranks_per_node[MAX_RANKS];
    uint32_t num_ranks;
    enum nep_layout layout;
    bool is_mapped;
    bool is_threads;
    uint64_t timeout_ns;
    struct death deaths[3];
    uint32_t num_deaths;
    uint32_t newcomer; /* seat that is taken again, UINT32_MAX: none */
    uint32_t join_step;
    bool is_renewed; /* the group is made again before every step, nobody being lost */
    char address[64];
};

struct seat {
    struct nep_multi_rank *rank;
    const struct plan *plan;
    struct nep_comm *comm;
    struct nep_ep *ep;
    struct nep_handle *handle;
    uint8_t is_live[MAX_RANKS];
    float *x, *rows, *y;
    float *present;
    uint32_t *source_rank;
    int32_t ids[TOKENS * TOP_K];
    float weights[TOKENS * TOP_K];
    uint64_t capacity;
    uint32_t base_step;
    uint64_t base_op;
    uint64_t failed_ns; /* when a step failed; 0: none since the last good one */
};

static uint32_t mix(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t z = a * 2654435761u ^ b * 2246822519u ^ c * 3266489917u;
    z = (z ^ z >> 15) * 2246822519u;
    return z ^ z >> 13;
}

static uint32_t num_experts(const struct plan *plan)
{
    return plan->num_ranks * SLOTS;
}

static void route(const struct plan *plan, uint32_t rank, uint32_t step, int32_t *ids,
                  float *weights)
{
    for (uint32_t i = 0; i < TOKENS * TOP_K; i++) {
        uint32_t first = mix(rank, step, i / TOP_K);
        ids[i] = (int32_t)((first + i % TOP_K * 5) % num_experts(plan));
        ids[i] = mix(rank + 7, step, i) % 11 == 0 ? -1 : ids[i];
        weights[i] = 0.25f * (float)(1 + mix(rank + 3, step, i) % 8);
    }
}

static float value(uint32_t rank, uint32_t step, uint32_t token, uint32_t h)
{
    return (float)((int)(mix(rank * 64 + h, step, token) % 17) - 8);
}

static float factor(int32_t expert)
{
    return (float)(1 + expert % 4);
}

/* ---- one seat ------------------------------------------------------------------------------- */

static void *buffer(struct seat *seat, size_t bytes)
{
    void *memory = NULL;
    if (!seat->plan->is_mapped) {
        return calloc(1, bytes);
    }
    return nep_buffer_alloc(seat->ep, bytes, &memory) == NEP_OK ? memory : NULL;
}

static void buffer_free(struct seat *seat, void *memory)
{
    if (seat->plan->is_mapped) {
        nep_buffer_free(seat->ep, memory);
    } else {
        free(memory);
    }
}

static bool make_buffers(struct seat *seat)
{
    if (nep_ep_max_rows(seat->ep, &seat->capacity) != NEP_OK) {
        return false;
    }
    seat->x = buffer(seat, TOKENS * HIDDEN * sizeof(float));
    seat->y = buffer(seat, TOKENS * HIDDEN * sizeof(float));
    seat->rows = buffer(seat, seat->capacity * HIDDEN * sizeof(float));
    seat->present = calloc(TOKENS, sizeof(float));
    seat->source_rank = calloc(seat->capacity, sizeof(uint32_t));
    return seat->x != NULL && seat->y != NULL && seat->rows != NULL;
}

static bool open_seat(struct seat *seat, struct nep_multi_rank *rank, uint32_t number, bool joins)
{
    const struct plan *plan = rank->arg;
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
    struct nep_ep_params shape = {.size = sizeof shape,
                                  .num_experts = num_experts(plan),
                                  .top_k = TOP_K,
                                  .hidden = HIDDEN,
                                  .max_tokens = TOKENS,
                                  .dtype = NEP_DTYPE_FP32,
                                  .layout = plan->layout,
                                  .pool_bytes = 8 << 20};
    if (nep_comm_create(&params, &seat->comm) != NEP_OK ||
        nep_ep_create(seat->comm, &shape, &seat->ep) != NEP_OK) {
        return nep_multi_fail(rank, "seat %u: %s", number, nep_last_message());
    }
    memset(seat->is_live, 1, plan->num_ranks);
    return true;
}

static bool finish_seat(struct seat *seat)
{
    return (nep_handle_create(seat->ep, &seat->handle) == NEP_OK && make_buffers(seat)) ||
           nep_multi_fail(seat->rank, "handle and buffers: %s", nep_last_message());
}

static void close_seat(struct seat *seat)
{
    buffer_free(seat, seat->x);
    buffer_free(seat, seat->y);
    buffer_free(seat, seat->rows);
    free(seat->present);
    free(seat->source_rank);
    nep_handle_destroy(seat->handle);
    nep_ep_destroy(seat->ep);
    nep_comm_destroy(seat->comm);
}

static uint32_t my_number(const struct seat *seat)
{
    struct nep_topology topology = {.size = sizeof topology};
    nep_comm_topology(seat->comm, &topology);
    return topology.rank;
}

/* The stand-in experts, in place: each row times its expert's factor (rank layout: weighted sum).
 */
static void run_experts(struct seat *seat, const struct nep_counts *counts, const int32_t *slots,
                        const float *weights)
{
    uint32_t me = my_number(seat);
    for (uint32_t l = 0; seat->plan->layout != NEP_LAYOUT_RANK && l < SLOTS; l++) {
        for (uint32_t i = 0; seat->plan->layout == NEP_LAYOUT_EXPERT_PACKED &&
                             i < counts->rows_per_slot[l] * HIDDEN;
             i++) {
            seat->rows[counts->first_row[l] * HIDDEN + i] *= factor((int32_t)(me * SLOTS + l));
        }
        uint64_t room = (uint64_t)seat->plan->num_ranks * TOKENS * HIDDEN;
        for (uint64_t i = 0; seat->plan->layout == NEP_LAYOUT_EXPERT_PADDED && i < room; i++) {
            seat->rows[l * room + i] *= factor((int32_t)(me * SLOTS + l));
        }
    }
    for (uint64_t r = 0; seat->plan->layout == NEP_LAYOUT_RANK && r < counts->num_rows; r++) {
        float scale = 0;
        for (uint32_t k = 0; k < TOP_K; k++) {
            int32_t slot = slots[r * TOP_K + k];
            scale += slot >= 0 ? weights[r * TOP_K + k] * factor((int32_t)(me * SLOTS) + slot) : 0;
        }
        for (uint32_t h = 0; h < HIDDEN; h++) {
            seat->rows[r * HIDDEN + h] *= scale;
        }
    }
}

static bool check_step(struct seat *seat, uint32_t step)
{
    uint32_t me = my_number(seat);
    for (uint32_t t = 0; t < TOKENS; t++) {
        float scale = 0, weight = 0, ranks = 0;
        for (uint32_t k = 0; k < TOP_K; k++) {
            int32_t id = seat->ids[t * TOP_K + k];
            bool is_new = id >= 0 && seat->is_live[id / SLOTS];
            scale += is_new ? seat->weights[t * TOP_K + k] * factor(id) : 0;
            weight += is_new ? seat->weights[t * TOP_K + k] : 0;
            for (uint32_t i = 0; i < k; i++) {
                is_new = is_new && (seat->ids[t * TOP_K + i] < 0 ||
                                    seat->ids[t * TOP_K + i] / SLOTS != id / SLOTS);
            }
            ranks += is_new;
        }
        float want = seat->plan->layout == NEP_LAYOUT_RANK ? ranks : weight;
        if (seat->present[t] != want) {
            return nep_multi_fail(seat->rank, "step %u, token %u: present %g, not %g", step, t,
                                  (double)seat->present[t], (double)want);
        }
        for (uint32_t h = 0; h < HIDDEN; h++) {
            if (seat->y[t * HIDDEN + h] != scale * value(me, step, t, h)) {
                return nep_multi_fail(seat->rank, "step %u, token %u, element %u: %g, not %g", step,
                                      t, h, (double)seat->y[t * HIDDEN + h],
                                      (double)(scale * value(me, step, t, h)));
            }
        }
    }
    return true;
}

static bool die(struct seat *seat, uint32_t step, int when)
{
    const struct plan *plan = seat->plan;
    for (uint32_t d = 0; d < plan->num_deaths; d++) {
        if (plan->deaths[d].rank != my_number(seat) || plan->deaths[d].step != step ||
            plan->deaths[d].when != when) {
            continue;
        }
        if (!plan->is_threads) {
            atomic_fetch_add(&nep_multi_words(seat->rank)[DEAD_WORD], 1);
            raise(SIGKILL);
        }
        return true;
    }
    return false;
}

/*
 * A thread that stops is found by the deadline alone. It begins where all others have sent, so that
 * nobody else can be missing when it passes, however slow the machine is; set-up and recovery have
 * the communicator's, which is long.
 */
static bool expect_stop(struct seat *seat, uint32_t step)
{
    const struct plan *plan = seat->plan;
    uint32_t num_live = 0;
    for (uint32_t r = 0; r < plan->num_ranks; r++) {
        num_live += seat->is_live[r];
    }
    for (uint32_t d = 0; plan->is_threads && d < plan->num_deaths; d++) {
        if (plan->deaths[d].step != step || !seat->is_live[plan->deaths[d].rank]) {
            continue;
        }
        _Atomic uint64_t *sent = &nep_multi_words(seat->rank)[SENT_WORD + d];
        uint64_t deadline_ns = nep_deadline_ns(plan->timeout_ns);
        atomic_fetch_add(sent, 1);
        while (atomic_load(sent) < num_live - 1) {
            if (nep_left_ns(deadline_ns) == 0) {
                return nep_multi_fail(seat->rank, "step %u: %u of %u have sent", step,
                                      (uint32_t)atomic_load(sent), num_live - 1);
            }
            usleep(100);
        }
        nep_ep_set_timeout(seat->ep, STOP_NS);
    }
    return true;
}

/* NEP_OK, a failure of the library, or 1: this rank is to stop here. */
static int run_step(struct seat *seat, uint32_t step)
{
    uint32_t me = my_number(seat);
    int32_t *slots = calloc(seat->capacity * TOP_K, sizeof *slots);
    float *weights = calloc(seat->capacity * TOP_K, sizeof *weights);
    route(seat->plan, me, step, seat->ids, seat->weights);
    for (uint32_t i = 0; i < TOKENS * HIDDEN; i++) {
        seat->x[i] = value(me, step, i / HIDDEN, i % HIDDEN);
        seat->y[i] = 1e30f;
    }
    memset(seat->rows, 0, seat->capacity * HIDDEN * sizeof(float));
    struct nep_tokens in = {.size = sizeof in,
                            .num_tokens = TOKENS,
                            .x = seat->x,
                            .topk_ids = seat->ids,
                            .topk_weights = seat->weights};
    struct nep_rows out = {.size = sizeof out,
                           .x = seat->rows,
                           .capacity = seat->capacity,
                           .source_rank = seat->source_rank,
                           .topk_slots = slots,
                           .topk_weights = weights};
    struct nep_counts counts = {.size = sizeof counts};
    struct nep_expert_rows back = {.size = sizeof back, .y = seat->rows};
    struct nep_tokens_out sum = {
        .size = sizeof sum, .num_tokens = TOKENS, .y = seat->y, .present = seat->present};
    int status = die(seat, step, 0) ? 1 : nep_dispatch_send(seat->ep, seat->handle, &in, NULL);
    if (status == NEP_OK && !expect_stop(seat, step)) {
        status = NEP_ERR_INTERNAL;
    }
    if (status == NEP_OK) {
        status = die(seat, step, 1) ? 1 : nep_dispatch_recv(seat->ep, seat->handle, &out, NULL);
    }
    if (status == NEP_OK) {
        status = nep_dispatch_counts(seat->ep, seat->handle, &counts);
    }
    if (status == NEP_OK) {
        run_experts(seat, &counts, slots, weights);
        status = nep_combine_send(seat->ep, seat->handle, &back, NULL);
    }
    if (status == NEP_OK) {
        status = die(seat, step, 2) ? 1 : nep_combine_recv(seat->ep, seat->handle, &sum, NULL);
    }
    free(slots);
    free(weights);
    return status;
}

/* ---- the group changes ---------------------------------------------------------------------- */

static bool recover(struct seat *seat, uint32_t *step_p, uint32_t num_joining)
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
    memcpy(seat->is_live, recovery.is_live, seat->plan->num_ranks);
    nep_ep_set_timeout(seat->ep, 0);
    uint64_t first = 0, next = 0;
    if (nep_ep_resume(seat->ep, &first, &next) != NEP_OK) {
        return nep_multi_fail(seat->rank, "%s", nep_last_message());
    }
    *step_p = seat->base_step + (uint32_t)((first - seat->base_op) / 2);
    seat->base_step = *step_p;
    seat->base_op = next;
    return true;
}

static bool fault_is_a_victim(struct seat *seat, uint32_t step)
{
    struct nep_fault fault = {.size = sizeof fault};
    nep_comm_fault(seat->comm, &fault);
    for (uint32_t d = 0; d < seat->plan->num_deaths; d++) {
        if (seat->plan->deaths[d].rank == fault.rank) {
            return true;
        }
    }
    return nep_multi_fail(seat->rank, "step %u: the fault names rank %u: %s", step, fault.rank,
                          fault.message);
}

static bool run_steps(struct seat *seat, uint32_t step)
{
    const struct plan *plan = seat->plan;
    bool is_joined = seat->base_step != 0;
    while (step < LAST_STEP) {
        if (plan->newcomer != UINT32_MAX && step == plan->join_step && !is_joined) {
            atomic_store(&nep_multi_words(seat->rank)[STEP_WORD], step);
            is_joined = true;
            if (!recover(seat, &step, 1)) {
                return false;
            }
            if (step != plan->join_step || !seat->is_live[plan->newcomer]) {
                return nep_multi_fail(seat->rank, "the newcomer was not let in");
            }
        }
        uint32_t before = step;
        if (plan->is_renewed && (!recover(seat, &step, 0) || step != before)) {
            return nep_multi_fail(seat->rank, "step %u became step %u", before, step);
        }
        int status = run_step(seat, step);
        if (status == 1) {
            return true;
        }
        if (status != NEP_OK) {
            seat->failed_ns = nep_now_ns();
            if (!fault_is_a_victim(seat, step) || !recover(seat, &step, 0)) {
                return false;
            }
            continue;
        }
        if (seat->failed_ns != 0 && my_number(seat) == plan->deaths[0].rank + 1) {
            print_message("%u ranks, %s between nodes: first good step %.1f ms after the failure\n",
                          plan->num_ranks, plan->inter,
                          (double)(nep_now_ns() - seat->failed_ns) / 1e6);
        }
        seat->failed_ns = 0;
        if (!check_step(seat, step)) {
            return false;
        }
        step++;
    }
    return true;
}

static bool run_newcomer(struct nep_multi_rank *rank)
{
    const struct plan *plan = rank->arg;
    _Atomic uint64_t *words = nep_multi_words(rank);
    for (int i = 0; i < 60000 && atomic_load(&words[STEP_WORD]) == 0; i++) {
        usleep(1000);
    }
    struct seat seat;
    struct nep_recovery recovery = {.size = sizeof recovery};
    if (!open_seat(&seat, rank, plan->newcomer, true)) {
        return false;
    }
    if (nep_comm_recover(seat.comm, NULL, &recovery) != NEP_OK) {
        return nep_multi_fail(rank, "the newcomer: %s", nep_last_message());
    }
    memcpy(seat.is_live, recovery.is_live, plan->num_ranks);
    uint64_t first;
    nep_ep_resume(seat.ep, &first, &seat.base_op);
    seat.base_step = (uint32_t)atomic_load(&words[STEP_WORD]);
    bool is_fine = finish_seat(&seat) && run_steps(&seat, seat.base_step);
    close_seat(&seat);
    return is_fine;
}

static bool run_rank(struct nep_multi_rank *rank)
{
    const struct plan *plan = rank->arg;
    struct seat seat;
    if (rank->rank == plan->num_ranks) {
        return run_newcomer(rank);
    }
    bool is_fine = open_seat(&seat, rank, rank->rank, false) && finish_seat(&seat);
    is_fine = is_fine && run_steps(&seat, 0);
    if (is_fine) {
        close_seat(&seat);
    }
    return is_fine;
}

static void run(struct plan plan)
{
    struct nep_multi_result result;
    uint16_t port = 0;
    for (uint32_t n = 0; n < plan.num_nodes; n++) {
        plan.num_ranks += plan.ranks_per_node[n];
    }
    struct nep_rendezvous_params params = {.host = "127.0.0.1", .num_ranks = plan.num_ranks};
    pid_t server = nep_multi_serve(&params, &port);
    assert_true(server > 0);
    snprintf(plan.address, sizeof plan.address, "127.0.0.1:%u", port);
    uint32_t num = plan.num_ranks + (plan.newcomer != UINT32_MAX);
    if (plan.is_threads) {
        nep_multi_run_threads(num, run_rank, &plan, &result);
    } else {
        nep_multi_run_processes(num, run_rank, &plan, 90, &result);
    }
    nep_multi_serve_end(server);
    uint32_t num_dead = plan.is_threads ? 0 : plan.num_deaths;
    if (result.num_failed != num_dead || result.error[0] != '\0') {
        fail_msg("%u ranks failed: %s", result.num_failed, result.error);
    }
}

/* ---- cases ---------------------------------------------------------------------------------- */

static void test_recover_shm_every_phase(void **state)
{
    (void)state;
    for (int when = 0; when < 3; when++) {
        run((struct plan){.intra = "shm",
                          .inter = "shm",
                          .num_nodes = 2,
                          .ranks_per_node = {3, 2},
                          .layout = NEP_LAYOUT_EXPERT_PACKED,
                          .is_mapped = true,
                          .timeout_ns = 20000000000ull,
                          .deaths = {{1, 3, when}},
                          .num_deaths = 1,
                          .newcomer = UINT32_MAX});
    }
}

static void test_recover_three_deaths_and_a_node(void **state)
{
    (void)state;
    run((struct plan){.intra = "shm",
                      .inter = "shm",
                      .num_nodes = 3,
                      .ranks_per_node = {2, 1, 2},
                      .layout = NEP_LAYOUT_RANK,
                      .timeout_ns = 20000000000ull,
                      .deaths = {{2, 2, 1}, {0, 5, 2}, {4, 8, 0}},
                      .num_deaths = 3,
                      .newcomer = UINT32_MAX});
}

static void test_recover_ucx_and_newcomer(void **state)
{
    (void)state;
    run((struct plan){.intra = "shm",
                      .inter = "ucx",
                      .num_nodes = 2,
                      .ranks_per_node = {2, 2},
                      .layout = NEP_LAYOUT_EXPERT_PADDED,
                      .is_mapped = true,
                      .timeout_ns = 20000000000ull,
                      .deaths = {{3, 3, 1}},
                      .num_deaths = 1,
                      .newcomer = 3,
                      .join_step = 8});
}

static void test_recover_shm_newcomer_replaces_rank_0(void **state)
{
    (void)state;
    run((struct plan){.intra = "shm",
                      .inter = "shm",
                      .num_nodes = 2,
                      .ranks_per_node = {2, 2},
                      .layout = NEP_LAYOUT_EXPERT_PACKED,
                      .is_mapped = true,
                      .timeout_ns = 20000000000ull,
                      .deaths = {{0, 3, 2}},
                      .num_deaths = 1,
                      .newcomer = 0,
                      .join_step = 8});
}

static void test_recover_threads_that_stop(void **state)
{
    (void)state;
    run((struct plan){.intra = "loop",
                      .inter = "loop",
                      .num_nodes = 2,
                      .ranks_per_node = {3, 3},
                      .layout = NEP_LAYOUT_EXPERT_PACKED,
                      .is_mapped = true,
                      .is_threads = true,
                      .timeout_ns = 60 * NEP_S,
                      .deaths = {{4, 3, 0}, {0, 6, 0}},
                      .num_deaths = 2,
                      .newcomer = UINT32_MAX});
}

/* The time that it prints should not grow much with the number of ranks. */
static void test_recover_many_threads(void **state)
{
    (void)state;
    for (uint32_t nodes = 1; nodes <= 8; nodes *= 8) {
        struct plan plan = {.intra = "loop",
                            .inter = "loop",
                            .num_nodes = nodes,
                            .layout = NEP_LAYOUT_EXPERT_PACKED,
                            .is_threads = true,
                            .timeout_ns = 60 * NEP_S,
                            .deaths = {{3, 3, 0}},
                            .num_deaths = 1,
                            .newcomer = UINT32_MAX};
        for (uint32_t n = 0; n < nodes; n++) {
            plan.ranks_per_node[n] = 8;
        }
        run(plan);
    }
}

/* The generation's 3 bits in an immediate go round, and nothing is taken for something else. */
static void test_recover_more_generations_than_bits(void **state)
{
    (void)state;
    run((struct plan){.intra = "shm",
                      .inter = "ucx",
                      .num_nodes = 2,
                      .ranks_per_node = {2, 1},
                      .layout = NEP_LAYOUT_EXPERT_PACKED,
                      .is_mapped = true,
                      .timeout_ns = 20000000000ull,
                      .newcomer = UINT32_MAX,
                      .is_renewed = true});
}

int main(void)
{
    const struct CMUnitTest processes[] = {
        cmocka_unit_test(test_recover_shm_every_phase),
        cmocka_unit_test(test_recover_three_deaths_and_a_node),
        cmocka_unit_test(test_recover_shm_newcomer_replaces_rank_0),
        cmocka_unit_test(test_recover_ucx_and_newcomer),
        cmocka_unit_test(test_recover_more_generations_than_bits),
    };
    const struct CMUnitTest threads[] = {
        cmocka_unit_test(test_recover_threads_that_stop),
        cmocka_unit_test(test_recover_many_threads),
    };
#ifdef __SANITIZE_THREAD__
    (void)processes;
    return cmocka_run_group_tests(threads, NULL, NULL);
#else
    return cmocka_run_group_tests(processes, NULL, NULL) +
           cmocka_run_group_tests(threads, NULL, NULL);
#endif
}
