/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An engine that takes in a new rank without standing still: the last rank dies in step 3, the
 * others go on without it; another process takes its seat, is prepared for while they compute, and
 * is let in between two steps. What the launcher starts is a supervisor; its child is the engine.
 */
#define _POSIX_C_SOURCE 200809L
#include <nearep.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

enum { TOKENS = 4, HIDDEN = 256, EXPERTS = 8, TOP_K = 2 };
enum { FATAL_STEP = 3, LOOK = 8 /* steps between two looks */, LAST_STEPS = 16, NEVER = 1 << 20 };

struct layer {
    struct nep_ep *ep;
    struct nep_handle *handle;
    float *x, *rows, *y;
    uint64_t capacity;
    void (*experts)(float *rows, uint64_t num_rows);
};

struct engine {
    struct nep_comm *comm;
    struct nep_topology group;
    struct layer moe, words; /* the model's, and what the ranks tell each other */
    uint32_t step, end_step;
    uint32_t num_live, num_vain;
    int is_growing;
};

static void check(enum nep_status status)
{
    if (status != NEP_OK) {
        fprintf(stderr, "%s: %s\n", nep_status_name(status), nep_last_message());
        exit(1);
    }
}

/* Tokens to their experts and home again. */
static enum nep_status pass(struct layer *l, const struct nep_tokens *in, float *present)
{
    struct nep_rows out = {.size = sizeof(out), .x = l->rows, .capacity = l->capacity};
    struct nep_counts counts = {.size = sizeof(counts)};
    struct nep_expert_rows outputs = {.size = sizeof(outputs), .y = l->rows};
    struct nep_tokens_out home = {
        .size = sizeof(home), .num_tokens = in->num_tokens, .y = l->y, .present = present};
    enum nep_status status = nep_dispatch(l->ep, l->handle, in, &out, NULL);
    if (status == NEP_OK) {
        status = nep_dispatch_counts(l->ep, l->handle, &counts);
    }
    if (status == NEP_OK) {
        l->experts(l->rows, counts.num_rows);
        status = nep_combine(l->ep, l->handle, &outputs, &home, NULL);
    }
    return status;
}

static void double_rows(float *rows, uint64_t num_rows)
{
    for (uint64_t i = 0; i < num_rows * HIDDEN; i++) {
        rows[i] *= 2;
    }
}

static enum nep_status run_step(struct engine *e)
{
    int32_t ids[TOKENS][TOP_K];
    float weights[TOKENS][TOP_K], present[TOKENS];
    for (int t = 0; t < TOKENS; t++) {
        for (int k = 0; k < TOP_K; k++) {
            ids[t][k] = ((int)e->step + t + 3 * k) % EXPERTS;
            weights[t][k] = 1.0f / TOP_K;
        }
        for (int i = 0; i < HIDDEN; i++) {
            e->moe.x[t * HIDDEN + i] = (float)(t + i);
        }
    }
    struct nep_tokens in = {.size = sizeof(in),
                            .num_tokens = TOKENS,
                            .x = e->moe.x,
                            .topk_ids = ids,
                            .topk_weights = &weights[0][0]};
    enum nep_status status = pass(&e->moe, &in, present);
    for (int i = 0; status == NEP_OK && i < TOKENS * HIDDEN; i++) {
        float part = present[i / HIDDEN]; /* less than 1 where experts are lost */
        if (e->moe.y[i] != 2 * part * e->moe.x[i]) {
            fprintf(stderr, "rank %u, step %u: element %d is wrong\n", e->group.rank, e->step, i);
            exit(1);
        }
    }
    return status;
}

/* ---- what all do at one step ---------------------------------------------------------------- */

enum word { STATE, STEP, NUM_WORDS };

/* The rank of expert 0 answers all with the least of what each said. */
static void answer(float *rows, uint64_t num_rows)
{
    for (int w = 0; w < NUM_WORDS; w++) {
        float least = (float)NEVER;
        for (uint64_t i = 0; i < num_rows; i++) {
            least = rows[i * HIDDEN + w] < least ? rows[i * HIDDEN + w] : least;
        }
        for (uint64_t i = 0; i < num_rows; i++) {
            rows[i * HIDDEN + w] = least;
        }
    }
}

/* Stands for an engine's scheduler, which tells all ranks what to do at which step. */
static enum nep_status confer(struct engine *e, int *state, uint32_t *step)
{
    int32_t expert_0 = 0;
    struct nep_tokens in = {
        .size = sizeof(in), .num_tokens = 1, .x = e->words.x, .topk_ids = &expert_0};
    e->words.x[STATE] = (float)*state;
    e->words.x[STEP] = (float)*step;
    enum nep_status status = pass(&e->words, &in, NULL);
    if (status == NEP_OK) {
        *state = (int)e->words.y[STATE];
        *step = (uint32_t)e->words.y[STEP];
    }
    return status;
}

/* After nep_comm_recover: the step that somebody has not done is what all do next. */
static enum nep_status settle(struct engine *e, const struct nep_recovery *recovery)
{
    int state = 0;
    enum nep_status status = confer(e, &state, &e->step);
    e->num_live = recovery->num_live;
    e->is_growing = 0;
    e->num_vain = 0;
    if (status == NEP_OK && e->num_live == e->group.num_ranks) {
        e->end_step = e->step + LAST_STEPS;
    }
    printf("rank %u: %u of %u ranks go on with step %u%s\n", e->group.rank, e->num_live,
           e->group.num_ranks, e->step, recovery->was_prepared ? ", as was prepared" : "");
    return status;
}

/* Goes on with those who live and those who are let in. */
static enum nep_status change(struct engine *e, uint32_t num_joining)
{
    struct nep_recover_params params = {.size = sizeof(params), .num_joining = num_joining};
    struct nep_recovery recovery = {.size = sizeof(recovery)};
    enum nep_status status = NEP_ERR_TIMEOUT;
    for (int i = 0; i < 3 && status != NEP_OK; i++) {
        status = nep_comm_recover(e->comm, &params, &recovery);
        params.num_joining = 0; /* again, if one more is lost: whoever is there */
    }
    check(status);
    return settle(e, &recovery);
}

enum { FAILED = -1, NOT_YET = 0, READY = 1 };

/* Between two steps, the same on all ranks: is it time to let somebody in? */
static enum nep_status look(struct engine *e)
{
    uint32_t is_ready = 0, num_new = 0;
    int state = NOT_YET;
    if (e->is_growing && nep_comm_grow_ready(e->comm, &is_ready) != NEP_OK) {
        state = FAILED; /* the newcomer died, or is too slow; nobody else is harmed */
    } else if (!e->is_growing) {
        check(nep_comm_newcomers(e->comm, &num_new));
    }
    state = is_ready || num_new > 0 ? READY : state;
    enum nep_status status = confer(e, &state, &e->step);
    if (status == NEP_OK && state == FAILED) {
        e->is_growing = 0; /* a later look begins again */
        e->num_vain++;
    } else if (status == NEP_OK && state == READY && e->is_growing) {
        status = change(e, 0); /* takes what was prepared */
    } else if (status == NEP_OK && state == READY && e->num_vain >= 2) {
        status = change(e, 1); /* failed twice: all wait while it is made */
    } else if (status == NEP_OK && state == READY) {
        status = nep_comm_grow_begin(e->comm, NULL); /* for one newcomer, while steps go on */
        e->is_growing = status == NEP_OK;
    }
    return status;
}

/* ---- the whole ------------------------------------------------------------------------------ */

static void make_ep(struct engine *e, struct layer *l, uint32_t num_tokens, uint32_t top_k)
{
    struct nep_ep_params shape = {.size = sizeof(shape),
                                  .num_experts = EXPERTS,
                                  .top_k = top_k,
                                  .hidden = HIDDEN,
                                  .max_tokens = num_tokens,
                                  .dtype = NEP_DTYPE_FP32};
    l->capacity = (uint64_t)e->group.num_ranks * num_tokens * top_k;
    check(nep_ep_create(e->comm, &shape, &l->ep));
}

/* A newcomer can make these once it is in. */
static void make_handle(struct layer *l, uint32_t num_tokens)
{
    void *x, *rows, *y;
    check(nep_handle_create(l->ep, &l->handle));
    check(nep_buffer_alloc(l->ep, num_tokens * HIDDEN * sizeof(float), &x));
    check(nep_buffer_alloc(l->ep, l->capacity * HIDDEN * sizeof(float), &rows));
    check(nep_buffer_alloc(l->ep, num_tokens * HIDDEN * sizeof(float), &y));
    l->x = x;
    l->rows = rows;
    l->y = y;
}

static void destroy(struct layer *l)
{
    nep_buffer_free(l->ep, l->x);
    nep_buffer_free(l->ep, l->rows);
    nep_buffer_free(l->ep, l->y);
    nep_handle_destroy(l->handle);
    nep_ep_destroy(l->ep);
}

static int run(uint32_t joins)
{
    struct engine e = {.group = {.size = sizeof(e.group)}, .end_step = NEVER};
    struct nep_comm_params seat = {.size = sizeof(seat), .joins = joins};
    struct nep_recovery recovery = {.size = sizeof(recovery)};
    enum nep_status status = NEP_OK;
    e.moe.experts = double_rows;
    e.words.experts = answer;
    check(nep_comm_create(&seat, &e.comm));
    check(nep_comm_topology(e.comm, &e.group));
    make_ep(&e, &e.moe, TOKENS, TOP_K); /* in the same order on all */
    make_ep(&e, &e.words, 1, 1);
    if (joins) {
        check(nep_comm_recover(e.comm, NULL, &recovery)); /* until the others let it in */
    }
    e.num_live = e.group.num_ranks;
    make_handle(&e.moe, TOKENS);
    make_handle(&e.words, 1);
    if (joins) {
        e.step = NEVER; /* has no say in it */
        status = settle(&e, &recovery);
    }
    while (status != NEP_OK || e.step < e.end_step) {
        if (status == NEP_ERR_PEER_LOST || status == NEP_ERR_TIMEOUT || status == NEP_ERR_BROKEN) {
            fprintf(stderr, "rank %u, step %u: %s\n", e.group.rank, e.step, nep_last_message());
            status = change(&e, 0);
            continue;
        }
        check(status);
        if (!joins && e.step == FATAL_STEP && e.group.rank + 1 == e.group.num_ranks) {
            raise(SIGKILL);
        }
        if (e.step % LOOK == 0 && e.num_live < e.group.num_ranks) {
            status = look(&e);
        }
        if (status == NEP_OK && e.step < e.end_step) {
            status = run_step(&e);
            e.step += status == NEP_OK;
        }
    }
    printf("rank %u: %u of %u ranks at the end\n", e.group.rank, e.num_live, e.group.num_ranks);
    destroy(&e.moe);
    destroy(&e.words);
    nep_comm_destroy(e.comm);
    return 0;
}

int main(void)
{
    int status = 0;
    for (uint32_t joins = 0; joins < 2; joins++) {
        fflush(stdout);
        pid_t engine = fork(); /* before the library is used: nothing of it may be forked */
        if (engine == 0) {
            return run(joins);
        }
        if (engine < 0 || waitpid(engine, &status, 0) != engine) {
            return 1;
        }
        if (!WIFSIGNALED(status)) {
            return WEXITSTATUS(status);
        }
    }
    return 1;
}
