/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One rank of a group that group.py does harm to: it computes step after step, compares every
 * element, goes on when others are lost, lets newcomers in, and says on standard output, a JSON
 * object a line, what happened and when (CLOCK_MONOTONIC, as Python's time.monotonic_ns).
 *
 * Values are small integers, so that sums are exact in any order, and what a token must give
 * follows from who lives. What all ranks have to do at one step (let newcomers in, end) is a word
 * in the store that the lowest rank sets before a step that all look at only LOOK steps later:
 * nobody begins that one before the lowest rank has begun the step after it set the word.
 *
 * It is long because it is a whole engine: routing, experts, oracle, recovery, joining.
 */
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "nearep.h"
#include "transport/rendezvous.h"

enum {
    MAX_RANKS = 64,
    SLOTS = 2,
    TOP_K = 3,
    HIDDEN = 64,
    LOOK = 8,
    FAILED = 1,
    WRONG = 3,
    OUT = 4
};

struct options {
    uint32_t rank;
    uint32_t num_ranks;
    char host[128];
    uint16_t port;
    uint32_t sizes[MAX_RANKS];
    uint32_t num_nodes; /* 0: as the machine says */
    const char *inter;
    uint32_t tokens;
    uint64_t timeout_ns;
    uint64_t wait_ns; /* deadline of each call of the ep; 0: timeout_ns */
    bool is_rank_layout;
    bool is_mapped;
    bool joins;
};

/* What all ranks do at one step; in the store, one for each generation. */
struct plan {
    uint64_t start_step;
    uint64_t join_step; /* UINT64_MAX: nobody is to be let in, as the next */
    uint64_t end_step;
    uint32_t num_joining;
    uint32_t reserved;
};

struct seat {
    struct options options;
    struct nep_rendezvous_client *client;
    struct nep_bootstrap store;
    struct nep_comm *comm;
    struct nep_ep *ep;
    struct nep_handle *handle;
    uint8_t is_live[MAX_RANKS];
    uint64_t generation;
    uint64_t step;
    uint64_t base_step;
    uint64_t base_op;
    bool is_fresh; /* no step of this generation is done yet */
    uint64_t capacity;
    float *x, *rows, *y;
    float *present;
    int32_t *slots;
    float *slot_weights;
    int32_t *ids;
    float *weights;
};

static volatile sig_atomic_t must_end;

static void on_term(int number)
{
    (void)number;
    must_end = 1;
}

/* {"e": event, "t": ns, ...} */
static void say(const char *event, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void say(const char *event, const char *fmt, ...)
{
    va_list args;
    printf("{\"e\": \"%s\", \"t\": %" PRIu64, event, nep_now_ns());
    va_start(args, fmt);
    vprintf(fmt, args);
    va_end(args);
    printf("}\n");
    fflush(stdout);
}

static int fail(const struct seat *seat, const char *what)
{
    fprintf(stderr, "rank %u, step %" PRIu64 ": %s: %s\n", seat->options.rank, seat->step, what,
            nep_last_message());
    return FAILED;
}

/* ---- what a step computes ------------------------------------------------------------------- */

static uint32_t mix(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t z = a * 2654435761u ^ b * 2246822519u ^ c * 3266489917u;
    z = (z ^ z >> 15) * 2246822519u;
    return z ^ z >> 13;
}

static float value(uint32_t rank, uint32_t step, uint32_t token, uint32_t h)
{
    return (float)((int)(mix(rank * 64 + h, step, token) % 17) - 8);
}

static float factor(uint32_t expert)
{
    return (float)(1 + expert % 4);
}

/* Tokens of this rank in this step: also none, and all that fit. */
static uint32_t fill(struct seat *seat)
{
    uint32_t me = seat->options.rank, step = (uint32_t)seat->step;
    uint32_t num_experts = seat->options.num_ranks * SLOTS;
    uint32_t num = mix(me + 11, step, 5) % (seat->options.tokens + 1);
    for (uint32_t i = 0; i < num * TOP_K; i++) {
        uint32_t first = mix(me, step, i / TOP_K);
        seat->ids[i] = (int32_t)((first + i % TOP_K * 3) % num_experts);
        seat->ids[i] = mix(me + 7, step, i) % 11 == 0 ? -1 : seat->ids[i];
        seat->weights[i] = 0.25f * (float)(1 + mix(me + 3, step, i) % 8);
    }
    for (uint32_t t = 0; t < num; t++) {
        seat->present[t] = -1;
        for (uint32_t h = 0; h < HIDDEN; h++) {
            seat->x[t * HIDDEN + h] = value(me, step, t, h);
            seat->y[t * HIDDEN + h] = 1e30f;
        }
    }
    return num;
}

/* The stand-in experts, in place: each row times its expert's factor (rank layout: weighted). */
static void run_experts(struct seat *seat, const struct nep_counts *counts)
{
    uint32_t first = seat->options.rank * SLOTS;
    for (uint32_t l = 0; !seat->options.is_rank_layout && l < SLOTS; l++) {
        for (uint64_t i = 0; i < counts->rows_per_slot[l] * (uint64_t)HIDDEN; i++) {
            seat->rows[counts->first_row[l] * HIDDEN + i] *= factor(first + l);
        }
    }
    for (uint64_t r = 0; seat->options.is_rank_layout && r < counts->num_rows; r++) {
        float scale = 0;
        for (uint32_t k = 0; k < TOP_K; k++) {
            int32_t slot = seat->slots[r * TOP_K + k];
            scale +=
                slot < 0 ? 0 : seat->slot_weights[r * TOP_K + k] * factor(first + (uint32_t)slot);
        }
        for (uint32_t h = 0; h < HIDDEN; h++) {
            seat->rows[r * HIDDEN + h] *= scale;
        }
    }
}

/* What token t must give: the factor of its input, and `present`. */
static void expected(const struct seat *seat, uint32_t t, float *scale_p, float *present_p)
{
    const int32_t *ids = seat->ids + t * TOP_K;
    uint64_t ranks = 0;
    *scale_p = *present_p = 0;
    for (uint32_t k = 0; k < TOP_K; k++) {
        uint32_t owner = ids[k] < 0 ? 0 : (uint32_t)ids[k] / SLOTS;
        if (ids[k] >= 0 && seat->is_live[owner]) {
            *scale_p += seat->weights[t * TOP_K + k] * factor((uint32_t)ids[k]);
            *present_p += seat->weights[t * TOP_K + k];
            ranks |= 1ull << owner;
        }
    }
    if (seat->options.is_rank_layout) {
        *present_p = (float)__builtin_popcountll(ranks);
    }
}

static bool is_right(const struct seat *seat, uint32_t num_tokens)
{
    for (uint32_t t = 0; t < num_tokens; t++) {
        float scale, present;
        expected(seat, t, &scale, &present);
        bool is_fine = seat->present[t] == present;
        for (uint32_t h = 0; h < HIDDEN; h++) {
            float want = scale * value(seat->options.rank, (uint32_t)seat->step, t, h);
            is_fine = is_fine && seat->y[t * HIDDEN + h] == want;
        }
        if (!is_fine) {
            say("wrong", ", \"step\": %" PRIu64 ", \"token\": %u, \"present\": %g, \"not\": %g",
                seat->step, t, (double)seat->present[t], (double)present);
            return false;
        }
    }
    return true;
}

static enum nep_status run_step(struct seat *seat, uint32_t num_tokens)
{
    struct nep_tokens in = {.size = sizeof in,
                            .num_tokens = num_tokens,
                            .x = seat->x,
                            .topk_ids = seat->ids,
                            .topk_weights = seat->weights};
    struct nep_rows out = {.size = sizeof out,
                           .x = seat->rows,
                           .capacity = seat->capacity,
                           .topk_slots = seat->slots,
                           .topk_weights = seat->slot_weights};
    struct nep_counts counts = {.size = sizeof counts};
    struct nep_expert_rows back = {.size = sizeof back, .y = seat->rows};
    struct nep_tokens_out sum = {
        .size = sizeof sum, .num_tokens = num_tokens, .y = seat->y, .present = seat->present};
    enum nep_status status = nep_dispatch(seat->ep, seat->handle, &in, &out, NULL);
    if (status == NEP_OK) {
        status = nep_dispatch_counts(seat->ep, seat->handle, &counts);
    }
    if (status == NEP_OK) {
        run_experts(seat, &counts);
        status = nep_combine(seat->ep, seat->handle, &back, &sum, NULL);
    }
    return status;
}

/* ---- memory --------------------------------------------------------------------------------- */

static float *buffer(struct seat *seat, uint64_t num)
{
    void *memory = NULL;
    size_t bytes = (num + 1) * sizeof(float);
    if (!seat->options.is_mapped) {
        return calloc(1, bytes);
    }
    return nep_buffer_alloc(seat->ep, bytes, &memory) == NEP_OK ? memory : NULL;
}

static void buffers_free(struct seat *seat)
{
    float **all[] = {&seat->x, &seat->y, &seat->rows};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        if (!seat->options.is_mapped) {
            free(*all[i]);
        } else if (*all[i] != NULL) {
            nep_buffer_free(seat->ep, *all[i]);
        }
        *all[i] = NULL;
    }
}

/* Anew after each change of the group: only fresh memory of the pool is mapped by the others. */
static bool buffers_make(struct seat *seat)
{
    buffers_free(seat);
    seat->x = buffer(seat, (uint64_t)seat->options.tokens * HIDDEN);
    seat->y = buffer(seat, (uint64_t)seat->options.tokens * HIDDEN);
    seat->rows = buffer(seat, seat->capacity * HIDDEN);
    return seat->x != NULL && seat->y != NULL && seat->rows != NULL;
}

static bool tables_make(struct seat *seat)
{
    size_t num = (size_t)seat->options.tokens * TOP_K + 1;
    if (nep_ep_max_rows(seat->ep, &seat->capacity) != NEP_OK) {
        return false;
    }
    seat->present = calloc(num, sizeof *seat->present);
    seat->ids = calloc(num, sizeof *seat->ids);
    seat->weights = calloc(num, sizeof *seat->weights);
    seat->slots = calloc(seat->capacity * TOP_K + 1, sizeof *seat->slots);
    seat->slot_weights = calloc(seat->capacity * TOP_K + 1, sizeof *seat->slot_weights);
    return seat->present != NULL && seat->ids != NULL && seat->weights != NULL &&
           seat->slots != NULL && seat->slot_weights != NULL;
}

/* ---- the group ------------------------------------------------------------------------------ */

static enum nep_status open_seat(struct seat *seat)
{
    const struct options *options = &seat->options;
    struct nep_rendezvous_params meet = {.host = options->host,
                                         .port = options->port,
                                         .num_ranks = options->num_ranks,
                                         .rank = options->rank,
                                         .timeout_ns = options->timeout_ns,
                                         .is_newcomer = options->joins};
    enum nep_status status = nep_rendezvous_client_open(&meet, &seat->client);
    if (status != NEP_OK) {
        return status;
    }
    nep_rendezvous_client_bootstrap(seat->client, &seat->store);
    struct nep_comm_params params = {.size = sizeof params,
                                     .rank = options->rank,
                                     .num_ranks = options->num_ranks,
                                     .bootstrap = &seat->store,
                                     .ranks_per_node =
                                         options->num_nodes > 0 ? options->sizes : NULL,
                                     .num_nodes = options->num_nodes,
                                     .inter = options->inter,
                                     .timeout_ns = options->timeout_ns,
                                     .joins = options->joins};
    struct nep_ep_params shape = {.size = sizeof shape,
                                  .num_experts = options->num_ranks * SLOTS,
                                  .top_k = TOP_K,
                                  .hidden = HIDDEN,
                                  .max_tokens = options->tokens,
                                  .dtype = NEP_DTYPE_FP32,
                                  .layout = options->is_rank_layout ? NEP_LAYOUT_RANK
                                                                    : NEP_LAYOUT_EXPERT_PACKED,
                                  .pool_bytes = 4 << 20};
    status = nep_comm_create(&params, &seat->comm);
    if (status == NEP_OK) {
        status = nep_ep_create(seat->comm, &shape, &seat->ep);
    }
    memset(seat->is_live, 1, options->num_ranks);
    return status;
}

static void close_seat(struct seat *seat)
{
    buffers_free(seat);
    free(seat->present);
    free(seat->ids);
    free(seat->weights);
    free(seat->slots);
    free(seat->slot_weights);
    nep_handle_destroy(seat->handle);
    nep_ep_destroy(seat->ep);
    nep_comm_destroy(seat->comm);
    nep_rendezvous_client_close(seat->client);
}

static void plan_key(const struct seat *seat, char key[64])
{
    snprintf(key, 64, "chaos/plan/%" PRIu64, seat->generation);
}

/* The plan of this generation; waits for it where nobody has made it yet. */
static bool plan_get(const struct seat *seat, struct plan *plan)
{
    char key[64];
    size_t len = 0;
    plan_key(seat, key);
    return seat->store.get(seat->store.ctx, key, plan, sizeof *plan, &len,
                           4 * seat->options.timeout_ns) == 0 &&
           len == sizeof *plan;
}

/* Whoever is first makes it: the step with which this generation begins, and nothing else. */
static bool plan_make(const struct seat *seat)
{
    char key[64];
    struct plan plan = {.start_step = seat->step, .join_step = UINT64_MAX, .end_step = UINT64_MAX};
    size_t len = 0;
    plan_key(seat, key);
    return seat->store.cas(seat->store.ctx, key, "", 0, &plan, sizeof plan, &plan, sizeof plan,
                           &len, seat->options.timeout_ns) == 0;
}

/* The lowest rank that lives decides what is done LOOK steps later. */
static bool plan_decide(struct seat *seat, struct plan *plan)
{
    uint32_t num_new = 0;
    char key[64];
    struct plan before = *plan;
    if (must_end != 0 && plan->end_step == UINT64_MAX) {
        plan->end_step = seat->step + LOOK;
    }
    if (plan->join_step == UINT64_MAX && nep_comm_newcomers(seat->comm, &num_new) == NEP_OK &&
        num_new > 0) {
        plan->join_step = seat->step + LOOK;
        plan->num_joining = num_new;
    }
    plan_key(seat, key);
    return memcmp(&before, plan, sizeof before) == 0 ||
           seat->store.put(seat->store.ctx, key, plan, sizeof *plan, seat->options.timeout_ns) == 0;
}

static bool is_lowest(const struct seat *seat)
{
    uint32_t first = 0;
    while (seat->is_live[first] == 0) {
        first++;
    }
    return first == seat->options.rank;
}

/* Who lives, the generation, and the step that all are to do next. */
static bool take(struct seat *seat, const struct nep_recovery *recovery, bool was_new)
{
    uint64_t first = 0, next = 0;
    struct plan plan;
    memcpy(seat->is_live, recovery->is_live, seat->options.num_ranks);
    seat->generation = recovery->generation;
    if (nep_ep_resume(seat->ep, &first, &next) != NEP_OK) {
        return false;
    }
    seat->step = seat->base_step + (first - seat->base_op) / 2;
    if (was_new ? !plan_get(seat, &plan) : !plan_make(seat)) {
        return false;
    }
    seat->step = was_new ? plan.start_step : seat->step;
    seat->base_step = seat->step;
    seat->base_op = next;
    seat->is_fresh = true;
    if (was_new && (nep_handle_create(seat->ep, &seat->handle) != NEP_OK || !tables_make(seat))) {
        return false;
    }
    say("recovered", ", \"generation\": %" PRIu64 ", \"live\": %u, \"step\": %" PRIu64,
        seat->generation, recovery->num_live, seat->step);
    return buffers_make(seat);
}

/* 0, or how the program is to end. */
static int recover(struct seat *seat, uint32_t num_joining, bool is_new)
{
    struct nep_recover_params params = {.size = sizeof params, .num_joining = num_joining};
    struct nep_recovery recovery = {.size = sizeof recovery};
    uint64_t deadline_ns = nep_deadline_ns(10 * seat->options.timeout_ns + 20 * NEP_S);
    for (;;) {
        enum nep_status status = nep_comm_recover(seat->comm, &params, &recovery);
        if (status == NEP_OK) {
            return take(seat, &recovery, is_new) ? 0 : fail(seat, "after recovery");
        }
        if (strstr(nep_last_message(), "was decided without rank") != NULL) {
            say("out", ", \"step\": %" PRIu64, seat->step);
            return OUT;
        }
        params.num_joining = 0; /* it may have died: who is there is let in all the same */
        say("again", ", \"status\": %d", (int)status);
        fprintf(stderr, "rank %u: nep_comm_recover: %s\n", seat->options.rank, nep_last_message());
        if (nep_left_ns(deadline_ns) == 0) {
            return fail(seat, "nep_comm_recover");
        }
        usleep(1000);
    }
}

/* What all do at this step. 0: go on; < 0: this is the end. */
static int look(struct seat *seat)
{
    struct plan plan;
    if (!plan_get(seat, &plan) || (is_lowest(seat) && !plan_decide(seat, &plan))) {
        return fail(seat, "the store");
    }
    if (seat->step == plan.join_step) {
        return recover(seat, plan.num_joining, false);
    }
    return seat->step == plan.end_step ? -1 : 0;
}

static bool is_fault(enum nep_status status)
{
    return status == NEP_ERR_PEER_LOST || status == NEP_ERR_TIMEOUT || status == NEP_ERR_BROKEN;
}

static void say_fault(struct seat *seat, enum nep_status status)
{
    struct nep_fault fault = {.size = sizeof fault};
    nep_comm_fault(seat->comm, &fault);
    fprintf(stderr, "rank %u, step %" PRIu64 ": %s\n", seat->options.rank, seat->step,
            fault.message);
    say("fault", ", \"status\": %d, \"rank\": %d, \"step\": %" PRIu64, (int)status, (int)fault.rank,
        seat->step);
}

static int run(struct seat *seat)
{
    for (;;) {
        uint64_t generation = seat->generation;
        int rc = seat->step % LOOK == 0 ? look(seat) : 0;
        if (rc != 0) {
            return rc < 0 ? 0 : rc;
        }
        if (generation != seat->generation) {
            continue; /* newcomers were let in; the step may be another */
        }
        uint32_t num_tokens = fill(seat);
        enum nep_status status = run_step(seat, num_tokens);
        if (status == NEP_OK) {
            if (!is_right(seat, num_tokens)) {
                return WRONG;
            }
            if (seat->is_fresh) {
                say("good", ", \"generation\": %" PRIu64 ", \"step\": %" PRIu64, seat->generation,
                    seat->step);
                seat->is_fresh = false;
            }
            seat->step++;
            continue;
        }
        if (!is_fault(status)) {
            return fail(seat, "a step");
        }
        say_fault(seat, status);
        rc = recover(seat, 0, false);
        if (rc != 0) {
            return rc;
        }
    }
}

/* ---- the program ---------------------------------------------------------------------------- */

static bool parse_sizes(const char *text, struct options *options)
{
    options->num_ranks = 0;
    bool is_real = text[0] == '='; /* so many ranks, where they are */
    for (const char *at = text + is_real; *at != '\0' && options->num_nodes < MAX_RANKS;) {
        char *end;
        uint32_t size = (uint32_t)strtoul(at, &end, 10);
        if (end == at || size == 0 || options->num_ranks + size > MAX_RANKS) {
            return false;
        }
        options->sizes[options->num_nodes++] = size;
        options->num_ranks += size;
        at = *end == ',' ? end + 1 : end;
    }
    options->num_nodes = is_real ? 0 : options->num_nodes;
    return options->num_ranks > 1;
}

static bool parse(int argc, char **argv, struct options *options)
{
    *options = (struct options){.tokens = 16, .timeout_ns = 5 * NEP_S};
    if (argc < 5) {
        return false;
    }
    const char *colon = strrchr(argv[2], ':');
    options->rank = (uint32_t)strtoul(argv[1], NULL, 10);
    options->inter = argv[4];
    for (int i = 5; i < argc; i++) {
        bool has_value = i + 1 < argc;
        if (strcmp(argv[i], "--joins") == 0) {
            options->joins = true;
        } else if (strcmp(argv[i], "--rank-layout") == 0) {
            options->is_rank_layout = true;
        } else if (strcmp(argv[i], "--mapped") == 0) {
            options->is_mapped = true;
        } else if (strcmp(argv[i], "--tokens") == 0 && has_value) {
            options->tokens = (uint32_t)strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "--timeout-ms") == 0 && has_value) {
            options->timeout_ns = strtoull(argv[++i], NULL, 10) * NEP_MS;
        } else if (strcmp(argv[i], "--wait-ms") == 0 && has_value) {
            options->wait_ns = strtoull(argv[++i], NULL, 10) * NEP_MS;
        } else {
            return false;
        }
    }
    if (colon == NULL || (size_t)(colon - argv[2]) >= sizeof options->host) {
        return false;
    }
    memcpy(options->host, argv[2], (size_t)(colon - argv[2]));
    options->port = (uint16_t)strtoul(colon + 1, NULL, 10);
    return parse_sizes(argv[3], options) && options->rank < options->num_ranks;
}

int main(int argc, char **argv)
{
    struct seat seat;
    memset(&seat, 0, sizeof seat);
    if (!parse(argc, argv, &seat.options)) {
        fprintf(stderr, "usage: chaos_seat RANK HOST:PORT SIZES INTER [--joins] [--rank-layout] "
                        "[--mapped] [--tokens N] [--timeout-ms N] [--wait-ms N]\n"
                        "SIZES: ranks of each node, 2,2; or =4: four ranks where they are\n");
        return 2;
    }
    signal(SIGTERM, on_term);
    if (open_seat(&seat) != NEP_OK) {
        return fail(&seat, "creation");
    }
    nep_ep_set_timeout(seat.ep, seat.options.wait_ns);
    int rc = 0;
    if (seat.options.joins) {
        say("asks", ", \"rank\": %u", seat.options.rank);
        rc = recover(&seat, 0, true);
    } else if (nep_handle_create(seat.ep, &seat.handle) != NEP_OK || !tables_make(&seat) ||
               !buffers_make(&seat) || !plan_make(&seat)) {
        rc = fail(&seat, "handle, buffers and plan");
    }
    seat.is_fresh = true;
    if (rc == 0) {
        say("ready", ", \"rank\": %u", seat.options.rank);
        rc = run(&seat);
    }
    if (rc == 0 || rc == OUT) {
        close_seat(&seat);
    }
    if (rc == 0) {
        say("end", ", \"steps\": %" PRIu64 ", \"generation\": %" PRIu64, seat.step,
            seat.generation);
    }
    return rc;
}
