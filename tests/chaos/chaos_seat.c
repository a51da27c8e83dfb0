/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One rank of a group that group.py does harm to: it computes step after step, compares every
 * element, goes on when others are lost, lets newcomers in, and says on standard output, a JSON
 * object a line, what happened and when (CLOCK_MONOTONIC, as Python's time.monotonic_ns).
 *
 * What all ranks have to do at one step (let newcomers in, end) is a word
 * in the store that the lowest rank sets before a step that all look at only LOOK steps later:
 * nobody begins that one before the lowest rank has begun the step after it set the word.
 *
 * Newcomers are let in while all compute (nep_comm_grow_begin); with --waits while all wait.
 */
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "tests/multi/exact.h"
#include "transport/rendezvous.h"

enum { MAX_RANKS = NEP_EXACT_RANKS, LOOK = 8, FAILED = 1, WRONG = 3, OUT = 4 };

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
    bool waits; /* newcomers are let in while all wait */
};

/* What all ranks do at one step; in the store, one for each generation. */
struct plan {
    uint64_t start_step;
    uint64_t grow_step; /* the larger group is begun; UINT64_MAX: not, as the next */
    uint64_t join_step; /* newcomers are let in */
    uint64_t end_step;
    uint32_t num_joining;
    uint32_t reserved;
};

struct seat {
    struct options options;
    struct nep_rendezvous_client *client;
    struct nep_bootstrap store;
    struct nep_comm *comm;
    struct nep_exact exact;
    uint64_t generation;
    uint64_t step;
    uint64_t base_step;
    uint64_t base_op;
    uint64_t good_ns;  /* when the last step was over */
    uint64_t call_ns;  /* of the last nep_comm_recover */
    uint64_t calm_ns;  /* gap_ns until newcomers were begun with */
    uint64_t gap_ns;   /* longest time between two, since the last change of the group */
    uint32_t num_vain; /* preparations for newcomers that were begun again, since then */
    bool is_fresh;     /* no step of this generation is done yet */
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
    seat->exact = (struct nep_exact){.rank = options->rank,
                                     .num_ranks = options->num_ranks,
                                     .max_tokens = options->tokens,
                                     .layout = options->is_rank_layout ? NEP_LAYOUT_RANK
                                                                       : NEP_LAYOUT_EXPERT_PACKED,
                                     .is_mapped = options->is_mapped};
    struct nep_ep_params shape = nep_exact_params(&seat->exact);
    status = nep_comm_create(&params, &seat->comm);
    if (status == NEP_OK) {
        status = nep_ep_create(seat->comm, &shape, &seat->exact.ep);
    }
    memset(seat->exact.is_live, 1, options->num_ranks);
    return status;
}

static void close_seat(struct seat *seat)
{
    nep_exact_free(&seat->exact);
    nep_handle_destroy(seat->exact.handle);
    nep_ep_destroy(seat->exact.ep);
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
    struct plan plan = {.start_step = seat->step,
                        .grow_step = UINT64_MAX,
                        .join_step = UINT64_MAX,
                        .end_step = UINT64_MAX};
    size_t len = 0;
    plan_key(seat, key);
    return seat->store.cas(seat->store.ctx, key, "", 0, &plan, sizeof plan, &plan, sizeof plan,
                           &len, seat->options.timeout_ns) == 0;
}

/*
 * Newcomers are prepared for first, then let in; those that died meanwhile are forgotten. Over a
 * link so slow that preparing beside the operations comes to nothing twice they are let in while
 * all wait.
 */
static void plan_newcomers(struct seat *seat, struct plan *plan)
{
    uint32_t num_new = 0, is_ready = 0;
    bool is_growing = plan->grow_step != UINT64_MAX && seat->step > plan->grow_step;
    enum nep_status status =
        is_growing ? nep_comm_grow_ready(seat->comm, &is_ready) : NEP_ERR_NOT_FOUND;
    if (status == NEP_OK) {
        plan->join_step = is_ready ? seat->step + LOOK : UINT64_MAX;
        return;
    }
    if ((plan->grow_step != UINT64_MAX && !is_growing) ||
        nep_comm_newcomers(seat->comm, &num_new) != NEP_OK || num_new == 0) {
        return;
    }
    plan->num_joining = num_new;
    seat->num_vain += is_growing;
    bool all_wait = seat->options.waits || seat->num_vain >= 2;
    if (is_growing) {
        say("vain", ", \"times\": %u, \"newcomers\": %u", seat->num_vain, num_new);
    }
    *(all_wait ? &plan->join_step : &plan->grow_step) = seat->step + LOOK;
}

/* The lowest rank that lives decides what is done LOOK steps later. */
static bool plan_decide(struct seat *seat, struct plan *plan)
{
    char key[64];
    struct plan before = *plan;
    if (must_end != 0 && plan->end_step == UINT64_MAX) {
        plan->end_step = seat->step + LOOK;
    }
    if (plan->join_step == UINT64_MAX) {
        plan_newcomers(seat, plan);
    }
    plan_key(seat, key);
    return memcmp(&before, plan, sizeof before) == 0 ||
           seat->store.put(seat->store.ctx, key, plan, sizeof *plan, seat->options.timeout_ns) == 0;
}

static bool is_lowest(const struct seat *seat)
{
    uint32_t first = 0;
    while (seat->exact.is_live[first] == 0) {
        first++;
    }
    return first == seat->options.rank;
}

/* Who lives, the generation, and the step that all are to do next. */
static bool take(struct seat *seat, const struct nep_recovery *recovery, bool was_new)
{
    uint64_t first = 0, next = 0;
    struct plan plan;
    memcpy(seat->exact.is_live, recovery->is_live, seat->options.num_ranks);
    seat->generation = recovery->generation;
    seat->num_vain = 0;
    if (nep_ep_resume(seat->exact.ep, &first, &next) != NEP_OK) {
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
    if (was_new && (nep_handle_create(seat->exact.ep, &seat->exact.handle) != NEP_OK ||
                    !nep_exact_make_tables(&seat->exact))) {
        return false;
    }
    say("recovered", ", \"generation\": %" PRIu64 ", \"live\": %u, \"step\": %" PRIu64,
        seat->generation, recovery->num_live, seat->step);
    return nep_exact_make_buffers(&seat->exact);
}

/* 0, or how the program is to end. */
static int recover(struct seat *seat, uint32_t num_joining, bool is_new)
{
    struct nep_recover_params params = {.size = sizeof params, .num_joining = num_joining};
    struct nep_recovery recovery = {.size = sizeof recovery};
    uint64_t deadline_ns = nep_deadline_ns(10 * seat->options.timeout_ns + 20 * NEP_S);
    for (;;) {
        uint64_t begin_ns = nep_now_ns();
        enum nep_status status = nep_comm_recover(seat->comm, &params, &recovery);
        seat->call_ns = nep_now_ns() - begin_ns;
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
    if (seat->step == (seat->options.waits ? plan.join_step : plan.grow_step)) {
        seat->calm_ns = seat->gap_ns;
        seat->gap_ns = 0;
    }
    if (seat->step == plan.join_step) {
        return recover(seat, plan.num_joining, false);
    }
    struct nep_grow_params params = {.size = sizeof params, .num_joining = plan.num_joining};
    if (seat->step == plan.grow_step && nep_comm_grow_begin(seat->comm, &params) != NEP_OK) {
        return fail(seat, "nep_comm_grow_begin");
    }
    return seat->step == plan.end_step ? -1 : 0;
}

/* The longest time between two good steps. */
static void keep_gap(struct seat *seat)
{
    uint64_t now_ns = nep_now_ns(), gap_ns = now_ns - seat->good_ns;
    seat->gap_ns = seat->good_ns != 0 && gap_ns > seat->gap_ns ? gap_ns : seat->gap_ns;
    seat->good_ns = now_ns;
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
        char text[128];
        enum nep_status status =
            (enum nep_status)nep_exact_step(&seat->exact, (uint32_t)seat->step, UINT32_MAX);
        if (status == NEP_OK) {
            if (!nep_exact_is_right(&seat->exact, (uint32_t)seat->step, text, sizeof text)) {
                say("wrong", ", \"what\": \"%s\"", text);
                return WRONG;
            }
            keep_gap(seat);
            if (seat->is_fresh) {
                say("good",
                    ", \"generation\": %" PRIu64 ", \"step\": %" PRIu64
                    ", \"gap\": %g, \"calm\": %g, \"call\": %g",
                    seat->generation, seat->step, (double)seat->gap_ns / 1e9,
                    (double)seat->calm_ns / 1e9, (double)seat->call_ns / 1e9);
                seat->is_fresh = false;
                seat->gap_ns = 0;
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
        } else if (strcmp(argv[i], "--waits") == 0) {
            options->waits = true;
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
        fprintf(stderr, "usage: chaos_seat RANK HOST:PORT SIZES INTER [--joins] [--waits] "
                        "[--rank-layout] [--mapped] [--tokens N] [--timeout-ms N] [--wait-ms N]\n"
                        "SIZES: ranks of each node, 2,2; or =4: four ranks where they are\n");
        return 2;
    }
    signal(SIGTERM, on_term);
    if (open_seat(&seat) != NEP_OK) {
        return fail(&seat, "creation");
    }
    nep_ep_set_timeout(seat.exact.ep, seat.options.wait_ns);
    int rc = 0;
    if (seat.options.joins) {
        say("asks", ", \"rank\": %u", seat.options.rank);
        rc = recover(&seat, 0, true);
    } else if (nep_handle_create(seat.exact.ep, &seat.exact.handle) != NEP_OK ||
               !nep_exact_make_tables(&seat.exact) || !nep_exact_make_buffers(&seat.exact) ||
               !plan_make(&seat)) {
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
