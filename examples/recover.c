/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Steps of an engine that goes on when a rank dies: the last rank ends in the middle of step 3, the
 * others recover, do the step again without its experts, and renormalise what is left of a token.
 */
#include <nearep.h>
#include <stdio.h>
#include <stdlib.h>

enum { TOKENS = 4, HIDDEN = 256, EXPERTS = 8, TOP_K = 2, STEPS = 8, FATAL_STEP = 3 };

struct engine {
    struct nep_comm *comm;
    struct nep_ep *ep;
    struct nep_handle *handle;
    struct nep_topology group;
    float *x, *rows, *y;
    uint64_t capacity;
    float present[TOKENS];
    uint32_t first_step; /* which step began with which operation: two operations a step */
    uint64_t first_op;
};

static void check(enum nep_status status)
{
    if (status != NEP_OK) {
        fprintf(stderr, "%s: %s\n", nep_status_name(status), nep_last_message());
        exit(1);
    }
}

/* One layer. Any failure of dispatch or combine goes back to the loop. */
static enum nep_status run_step(struct engine *e, uint32_t step)
{
    int32_t ids[TOKENS][TOP_K];
    float weights[TOKENS][TOP_K];
    for (int t = 0; t < TOKENS; t++) {
        for (int k = 0; k < TOP_K; k++) {
            ids[t][k] = ((int)step + t + 3 * k) % EXPERTS;
            weights[t][k] = 1.0f / TOP_K;
        }
        for (int i = 0; i < HIDDEN; i++) {
            e->x[t * HIDDEN + i] = (float)(t + i);
        }
    }
    struct nep_tokens in = {.size = sizeof(in),
                            .num_tokens = TOKENS,
                            .x = e->x,
                            .topk_ids = ids,
                            .topk_weights = &weights[0][0]};
    struct nep_rows out = {.size = sizeof(out), .x = e->rows, .capacity = e->capacity};
    struct nep_counts counts = {.size = sizeof(counts)};
    enum nep_status status = nep_dispatch_send(e->ep, e->handle, &in, NULL);
    if (step == FATAL_STEP && e->group.rank + 1 == e->group.num_ranks) {
        _Exit(0); /* in the middle of an operation, without a word to anybody */
    }
    if (status == NEP_OK) {
        status = nep_dispatch_recv(e->ep, e->handle, &out, NULL);
    }
    if (status == NEP_OK) {
        status = nep_dispatch_counts(e->ep, e->handle, &counts);
    }
    if (status != NEP_OK) {
        return status;
    }
    for (uint64_t i = 0; i < counts.num_rows * HIDDEN; i++) {
        e->rows[i] *= 2; /* the experts */
    }
    struct nep_expert_rows outputs = {.size = sizeof(outputs), .y = e->rows};
    struct nep_tokens_out home = {
        .size = sizeof(home), .num_tokens = TOKENS, .y = e->y, .present = e->present};
    return nep_combine(e->ep, e->handle, &outputs, &home, NULL);
}

/* Goes on with who is left. Returns the step that all are to do next. */
static uint32_t recover(struct engine *e)
{
    struct nep_recovery recovery = {.size = sizeof(recovery)};
    uint64_t first_op, next_op;
    enum nep_status status = NEP_ERR_TIMEOUT;
    for (int i = 0; i < 3 && status != NEP_OK; i++) {
        status = nep_comm_recover(e->comm, NULL, &recovery); /* again if one more is lost */
    }
    check(status);
    check(nep_ep_resume(e->ep, &first_op, &next_op));
    e->first_step += (uint32_t)((first_op - e->first_op) / 2);
    e->first_op = next_op;
    printf("rank %u: %u of %u ranks go on with step %u\n", e->group.rank, recovery.num_live,
           e->group.num_ranks, e->first_step);
    return e->first_step;
}

static int num_wrong(const struct engine *e)
{
    int wrong = 0;
    for (int t = 0; t < TOKENS; t++) {
        for (int i = 0; i < HIDDEN && e->present[t] > 0; i++) { /* 0: all its experts are lost */
            float y = e->y[t * HIDDEN + i] / e->present[t];     /* renormalised */
            wrong += y != 2 * e->x[t * HIDDEN + i];
        }
    }
    return wrong;
}

int main(void)
{
    struct engine e = {.group = {.size = sizeof(e.group)}};
    struct nep_comm_params seat = {.size = sizeof(seat)};
    struct nep_ep_params shape = {.size = sizeof(shape),
                                  .num_experts = EXPERTS,
                                  .top_k = TOP_K,
                                  .hidden = HIDDEN,
                                  .max_tokens = TOKENS,
                                  .dtype = NEP_DTYPE_FP32};
    void *x, *rows, *y;
    check(nep_comm_create(&seat, &e.comm));
    check(nep_comm_topology(e.comm, &e.group));
    check(nep_ep_create(e.comm, &shape, &e.ep));
    check(nep_handle_create(e.ep, &e.handle));
    e.capacity = (uint64_t)e.group.num_ranks * TOKENS * TOP_K;
    check(nep_buffer_alloc(e.ep, TOKENS * HIDDEN * sizeof(float), &x));
    check(nep_buffer_alloc(e.ep, e.capacity * HIDDEN * sizeof(float), &rows));
    check(nep_buffer_alloc(e.ep, TOKENS * HIDDEN * sizeof(float), &y));
    e.x = x;
    e.rows = rows;
    e.y = y;
    int wrong = 0;
    for (uint32_t step = 0; step < STEPS;) {
        enum nep_status status = run_step(&e, step);
        if (status == NEP_ERR_PEER_LOST || status == NEP_ERR_TIMEOUT || status == NEP_ERR_BROKEN) {
            fprintf(stderr, "rank %u, step %u: %s\n", e.group.rank, step, nep_last_message());
            step = recover(&e);
            continue;
        }
        check(status);
        wrong += num_wrong(&e);
        step++;
    }
    printf("rank %u: %d wrong\n", e.group.rank, wrong);
    nep_buffer_free(e.ep, x);
    nep_buffer_free(e.ep, rows);
    nep_buffer_free(e.ep, y);
    nep_handle_destroy(e.handle);
    nep_ep_destroy(e.ep);
    nep_comm_destroy(e.comm);
    return wrong != 0;
}
