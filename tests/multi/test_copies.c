/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Experts with two copies, of which one dies: at the next dispatch, with the map that there was,
 * the other copy gets all its tokens, none loses any weight, and every element is right. Values are
 * small integers, so that sums are exact in any order.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/multi/harness.h"
#include "tests/unit/cmocka_all.h"
#include "transport/rendezvous.h"

enum {
    RANKS = 4,
    OWN = 2, /* experts of a rank; its other slots hold copies of those of the rank two before it */
    SLOTS = 2 * OWN,
    EXPERTS = RANKS * OWN,
    TOP_K = 3,
    TOKENS = 32,
    HIDDEN = 64,
    STEPS = 8,
    FATAL_STEP = 3,
    ROOM = RANKS * TOKENS * TOP_K
};

struct plan {
    const char *inter;
    uint32_t victim;
    char address[64];
};

struct rank_state {
    struct nep_multi_rank *rank;
    const struct plan *plan;
    struct nep_comm *comm;
    struct nep_ep *ep;
    struct nep_handle *handle;
    bool is_lost; /* the victim has gone */
    float x[TOKENS * HIDDEN], y[TOKENS * HIDDEN], present[TOKENS];
    float rows[ROOM * HIDDEN];
    int32_t ids[TOKENS * TOP_K];
    float weights[TOKENS * TOP_K];
};

static uint32_t mix(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t z = a * 2654435761u ^ b * 2246822519u ^ c * 3266489917u;
    z = (z ^ z >> 15) * 2246822519u;
    return z ^ z >> 13;
}

static void route(uint32_t rank, uint32_t step, int32_t *ids, float *weights)
{
    for (uint32_t i = 0; i < TOKENS * TOP_K; i++) {
        uint32_t first = mix(rank, step, i / TOP_K);
        ids[i] = (int32_t)((first + i % TOP_K * 3) % EXPERTS);
        weights[i] = 0.25f * (float)(1 + mix(rank + 3, step, i) % 8);
    }
}

static float factor(uint32_t expert)
{
    return (float)(1 + expert % 4);
}

static uint32_t expert_in(uint32_t rank, uint32_t slot)
{
    uint32_t owner = slot < OWN ? rank : (rank + RANKS - 2) % RANKS;
    return owner * OWN + slot % OWN;
}

static struct nep_map *make_map(void)
{
    FILE *file = tmpfile();
    if (file == NULL) {
        return NULL;
    }
    fprintf(file, "nepmap 1\nlayers 1 experts %d nodes 2 ranks_per_node 2,2 slots_per_rank %d\n",
            EXPERTS, SLOTS);
    for (uint32_t e = 0; e < EXPERTS; e++) {
        uint32_t owner = e / OWN, copy = (owner + 2) % RANKS;
        fprintf(file, "0 %u %u:%u %u:%u\n", e, owner, e % OWN, copy, OWN + e % OWN);
    }
    return nep_multi_map_read(file);
}

static bool open_rank(struct rank_state *state)
{
    static const uint32_t sizes[] = {2, 2};
    struct nep_map *map = make_map();
    struct nep_comm_params params = {.size = sizeof params,
                                     .rank = state->rank->rank,
                                     .num_ranks = RANKS,
                                     .rendezvous = state->plan->address,
                                     .ranks_per_node = sizes,
                                     .num_nodes = 2,
                                     .inter = state->plan->inter,
                                     .timeout_ns = 20000000000ull};
    struct nep_ep_params shape = {.size = sizeof shape,
                                  .num_experts = EXPERTS,
                                  .slots_per_rank = SLOTS,
                                  .top_k = TOP_K,
                                  .hidden = HIDDEN,
                                  .max_tokens = TOKENS,
                                  .dtype = NEP_DTYPE_FP32,
                                  .map = map};
    bool is_open = map != NULL && nep_comm_create(&params, &state->comm) == NEP_OK &&
                   nep_ep_create(state->comm, &shape, &state->ep) == NEP_OK &&
                   nep_handle_create(state->ep, &state->handle) == NEP_OK;
    nep_map_destroy(map); /* the ep holds it */
    return is_open || nep_multi_fail(state->rank, "creation: %s", nep_last_message());
}

/* Rows for one expert of all ranks that live. */
static uint32_t rows_of(const struct rank_state *state, uint32_t expert, uint32_t step)
{
    int32_t ids[TOKENS * TOP_K];
    float weights[TOKENS * TOP_K];
    uint32_t num = 0;
    for (uint32_t r = 0; r < RANKS; r++) {
        route(r, step, ids, weights);
        for (uint32_t i = 0; i < TOKENS * TOP_K; i++) {
            num += ids[i] == (int32_t)expert && !(state->is_lost && r == state->plan->victim);
        }
    }
    return num;
}

/* A slot whose other copy is lost has all rows of its expert; one with two copies at most these. */
static bool check_rows(struct rank_state *state, const struct nep_counts *counts, uint32_t step)
{
    uint32_t me = state->rank->rank, victim = state->plan->victim;
    for (uint32_t l = 0; l < SLOTS; l++) {
        uint32_t all = rows_of(state, expert_in(me, l), step), here = counts->rows_per_slot[l];
        bool is_last = state->is_lost && (me + 2) % RANKS == victim;
        if (here > all || (is_last && here != all)) {
            return nep_multi_fail(state->rank, "step %u, slot %u: %u rows of %u, %s copy", step, l,
                                  here, all, is_last ? "the last" : "one");
        }
    }
    return true;
}

static bool check_tokens(struct rank_state *state)
{
    for (uint32_t t = 0; t < TOKENS; t++) {
        float scale = 0, weight = 0;
        for (uint32_t k = 0; k < TOP_K; k++) {
            scale += state->weights[t * TOP_K + k] * factor((uint32_t)state->ids[t * TOP_K + k]);
            weight += state->weights[t * TOP_K + k];
        }
        if (state->present[t] != weight) {
            return nep_multi_fail(state->rank, "token %u: %g of %g is there", t,
                                  (double)state->present[t], (double)weight);
        }
        for (uint32_t h = 0; h < HIDDEN; h++) {
            if (state->y[t * HIDDEN + h] != scale * state->x[t * HIDDEN + h]) {
                return nep_multi_fail(state->rank, "token %u, element %u: %g, not %g", t, h,
                                      (double)state->y[t * HIDDEN + h],
                                      (double)(scale * state->x[t * HIDDEN + h]));
            }
        }
    }
    return true;
}

static enum nep_status run_step(struct rank_state *state, uint32_t step, struct nep_counts *counts)
{
    uint32_t me = state->rank->rank;
    route(me, step, state->ids, state->weights);
    for (uint32_t i = 0; i < TOKENS * HIDDEN; i++) {
        state->x[i] = (float)((int)(mix(me, step, i) % 17) - 8);
        state->y[i] = 1e30f;
    }
    struct nep_tokens in = {.size = sizeof in,
                            .num_tokens = TOKENS,
                            .x = state->x,
                            .topk_ids = state->ids,
                            .topk_weights = state->weights};
    struct nep_rows out = {.size = sizeof out, .x = state->rows, .capacity = ROOM};
    struct nep_expert_rows back = {.size = sizeof back, .y = state->rows};
    struct nep_tokens_out sum = {
        .size = sizeof sum, .num_tokens = TOKENS, .y = state->y, .present = state->present};
    enum nep_status status = nep_dispatch_send(state->ep, state->handle, &in, NULL);
    if (me == state->plan->victim && step == FATAL_STEP) {
        raise(SIGKILL); /* in the middle of an operation */
    }
    status = status == NEP_OK ? nep_dispatch_recv(state->ep, state->handle, &out, NULL) : status;
    status = status == NEP_OK ? nep_dispatch_counts(state->ep, state->handle, counts) : status;
    for (uint32_t l = 0; status == NEP_OK && l < SLOTS; l++) {
        float *rows = state->rows + counts->first_row[l] * HIDDEN;
        for (uint64_t i = 0; i < counts->rows_per_slot[l] * (uint64_t)HIDDEN; i++) {
            rows[i] *= factor(expert_in(me, l));
        }
    }
    return status == NEP_OK ? nep_combine(state->ep, state->handle, &back, &sum, NULL) : status;
}

/* The step that all do again: a message of the one before may have been lost with the victim. */
static bool recover(struct rank_state *state, uint32_t *step_p)
{
    struct nep_fault fault = {.size = sizeof fault};
    struct nep_recovery recovery = {.size = sizeof recovery};
    uint64_t first = 0, next = 0;
    nep_comm_fault(state->comm, &fault);
    if (fault.rank != state->plan->victim) {
        return nep_multi_fail(state->rank, "names rank %u: %s", fault.rank, fault.message);
    }
    if (nep_comm_recover(state->comm, NULL, &recovery) != NEP_OK ||
        recovery.num_live != RANKS - 1 || nep_ep_resume(state->ep, &first, &next) != NEP_OK) {
        return nep_multi_fail(state->rank, "no recovery: %s", nep_last_message());
    }
    state->is_lost = true;
    *step_p = (uint32_t)(first / 2);
    return *step_p <= FATAL_STEP || nep_multi_fail(state->rank, "step %u is next", *step_p);
}

static bool run_rank(struct nep_multi_rank *rank)
{
    struct rank_state *state = calloc(1, sizeof *state);
    state->rank = rank;
    state->plan = rank->arg;
    bool is_fine = open_rank(state);
    for (uint32_t step = 0; is_fine && step < STEPS;) {
        struct nep_counts counts = {.size = sizeof counts};
        enum nep_status status = run_step(state, step, &counts);
        if (status != NEP_OK) {
            is_fine = !state->is_lost && step <= FATAL_STEP
                          ? recover(state, &step)
                          : nep_multi_fail(rank, "step %u: %s", step, nep_last_message());
            continue;
        }
        is_fine = check_rows(state, &counts, step) && check_tokens(state);
        step++;
    }
    if (is_fine && !state->is_lost) {
        is_fine = nep_multi_fail(rank, "nothing was lost");
    }
    if (is_fine) {
        nep_handle_destroy(state->handle);
        nep_ep_destroy(state->ep);
        nep_comm_destroy(state->comm);
    }
    free(state);
    return is_fine;
}

static void run(const char *inter, uint32_t victim)
{
    struct plan plan = {.inter = inter, .victim = victim};
    struct nep_rendezvous_params params = {.host = "127.0.0.1", .num_ranks = RANKS};
    struct nep_multi_result result;
    uint16_t port = 0;
    pid_t server = nep_multi_serve(&params, &port);
    assert_true(server > 0);
    snprintf(plan.address, sizeof plan.address, "127.0.0.1:%u", port);
    nep_multi_run_processes(RANKS, run_rank, &plan, 90, &result);
    nep_multi_serve_end(server);
    if (result.num_failed != 1 || result.error[0] != '\0') { /* the victim */
        fail_msg("%u ranks failed: %s", result.num_failed, result.error);
    }
}

static void test_copies_over_shm_the_other_takes_all(void **state)
{
    (void)state;
    for (uint32_t victim = 0; victim < RANKS; victim++) {
        run("shm", victim);
    }
}

static void test_copies_over_the_adversary_the_other_takes_all(void **state)
{
    (void)state;
    run("adversary:shm", 1);
    run("adversary:shm", 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_copies_over_shm_the_other_takes_all),
        cmocka_unit_test(test_copies_over_the_adversary_the_other_takes_all),
    };
#ifdef __SANITIZE_THREAD__
    (void)tests;
    return 0; /* it would take what orders two processes for races */
#else
    return cmocka_run_group_tests(tests, NULL, NULL);
#endif
}
