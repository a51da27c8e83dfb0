/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nep-place queue: replays the requests of a trace with Poisson arrivals through nep_queue, and
 * through two simple rules, first come first served at any free home and first come first served at
 * the least loaded home. A request holds a slot of its home for as many ticks as it has scored
 * tokens; rows are what its scored tokens cost from where it ran. All rules see the same arrivals.
 * Tenants are the domains. The reference is the oracle: homes chosen for all requests at once from
 * the scored tokens themselves, under the capacity limit.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "placement/map.h"
#include "placement/rng.h"
#include "tools/nep_place.h"

#define PASSES 8u /* times that every request arrives */

enum rule { NEAREP, FCFS, LEAST_LOADED, NUM_RULES };

static const char *const names[NUM_RULES] = {"nearep", "fcfs", "least_loaded"};

struct replay {
    struct place_args *args;
    struct nep_requests all;
    const struct nep_map *map;
    struct nep_map_shape shape;
    uint32_t num; /* arrivals */
    double *arrival;
    uint32_t *request;
    float *signature; /* [requests][nodes] rows per token from the signature */
    float *scored;    /* [requests][nodes] rows from the scored tokens */
    uint64_t *tokens; /* [requests] scored */
    double mean_tokens;
    uint64_t bound; /* ticks */
};

struct running {
    uint32_t arrival;
    double end; /* 0: free */
};

struct outcome {
    double rows;
    double mean_wait;
    double p99_wait;
    double max_wait;
    double jain;
};

static enum nep_status add_scores(const struct replay *r, uint64_t first, uint64_t count,
                                  float *scores)
{
    int32_t ids[NEP_TRACE_TOP_K_LIMIT];
    uint32_t top_k = nep_trace_top_k(r->all.trace);
    for (uint32_t l = 0; l < r->shape.num_layers; l++) {
        for (uint64_t t = first; t < first + count; t++) {
            nep_trace_ids(r->all.trace, t, l, ids);
            enum nep_status status = nep_map_home_scores(r->map, l, ids, 1, top_k, scores);
            if (status != NEP_OK) {
                return status;
            }
        }
    }
    return NEP_OK;
}

static enum nep_status score_requests(struct replay *r)
{
    uint32_t nodes = r->shape.num_nodes;
    double sum = 0.0;
    for (uint32_t i = 0; i < r->all.num; i++) {
        uint64_t first;
        uint64_t count;
        nep_trace_signature(r->all.trace, i, &first, &count);
        enum nep_status status = add_scores(r, first, count, &r->signature[(size_t)i * nodes]);
        for (uint32_t n = 0; n < nodes && count > 0; n++) {
            r->signature[(size_t)i * nodes + n] /= (float)count;
        }
        nep_trace_scored(r->all.trace, i, &first, &r->tokens[i]);
        if (status == NEP_OK) {
            status = add_scores(r, first, r->tokens[i], &r->scored[(size_t)i * nodes]);
        }
        if (status != NEP_OK) {
            return status;
        }
        sum += (double)r->tokens[i];
    }
    r->mean_tokens = sum / r->all.num;
    return NEP_OK;
}

static void draw_arrivals(struct replay *r, double load)
{
    struct nep_rng rng = nep_rng_seed(r->args->seed);
    double servers = (double)r->shape.num_nodes * (double)r->args->batch;
    double gap = r->mean_tokens / (servers * load);
    double now = 0.0;
    for (uint32_t i = 0; i < r->num; i++) {
        r->request[i] = i % r->all.num;
    }
    nep_rng_shuffle(&rng, r->request, r->num);
    for (uint32_t i = 0; i < r->num; i++) {
        now += -log(1.0 - nep_rng_unit(&rng)) * gap;
        r->arrival[i] = now;
    }
}

struct state {
    const struct replay *replay;
    enum rule rule;
    struct nep_queue *queue;
    struct running *running; /* [nodes][batch] */
    uint32_t *busy;          /* [nodes] */
    uint32_t head;           /* of the arrivals, for the simple rules */
    uint32_t arrived;
    double *wait;   /* [num] */
    double *served; /* [tenants] sum of wait + service over service, for fairness */
    double *asked;
    double rows;
};

static void start(struct state *s, uint32_t arrival, uint32_t home, double now)
{
    const struct replay *r = s->replay;
    struct running *slot = &s->running[(size_t)home * r->args->batch];
    while (slot->end != 0.0) {
        slot++;
    }
    uint32_t request = r->request[arrival];
    uint32_t tenant = nep_trace_request_at(r->all.trace, request)->domain;
    double service = (double)r->tokens[request] + 1.0;
    *slot = (struct running){arrival, now + service};
    s->busy[home]++;
    s->wait[arrival] = now - r->arrival[arrival];
    s->rows += (double)r->scored[(size_t)request * r->shape.num_nodes + home];
    s->served[tenant] += service;
    s->asked[tenant] += service + s->wait[arrival];
}

/* Starts what can start now. */
static enum nep_status fill(struct state *s, double now)
{
    const struct replay *r = s->replay;
    for (uint32_t turn = 0; turn < r->shape.num_nodes * r->args->batch; turn++) {
        uint32_t home = turn % r->shape.num_nodes;
        if (s->rule == LEAST_LOADED) {
            for (uint32_t n = 0; n < r->shape.num_nodes; n++) {
                home = s->busy[n] < s->busy[home] ? n : home;
            }
        }
        if (s->busy[home] >= r->args->batch) {
            continue;
        }
        uint64_t id = UINT64_MAX;
        if (s->rule == NEAREP) {
            struct nep_micro_batch batch = {sizeof batch, &id, 1, 0};
            enum nep_status status = nep_queue_pop(s->queue, home, (uint64_t)now, &batch);
            if (status != NEP_OK) {
                return status;
            }
        } else if (s->head < s->arrived) {
            id = s->head++;
        }
        if (id != UINT64_MAX) {
            start(s, (uint32_t)id, home, now);
        }
    }
    return NEP_OK;
}

static enum nep_status arrive(struct state *s)
{
    const struct replay *r = s->replay;
    uint32_t request = r->request[s->arrived];
    enum nep_status status = NEP_OK;
    if (s->rule == NEAREP) {
        struct nep_request q = {
            sizeof q, s->arrived, nep_trace_request_at(r->all.trace, request)->domain,
            (uint32_t)r->tokens[request], &r->signature[(size_t)request * r->shape.num_nodes]};
        status = nep_queue_push(s->queue, &q, (uint64_t)r->arrival[s->arrived]);
    }
    s->arrived++;
    return status;
}

/* The next end of service, or INFINITY. */
static double next_end(const struct state *s, size_t *slot_p)
{
    double best = INFINITY;
    size_t slots = (size_t)s->replay->shape.num_nodes * s->replay->args->batch;
    for (size_t i = 0; i < slots; i++) {
        if (s->running[i].end != 0.0 && s->running[i].end < best) {
            best = s->running[i].end;
            *slot_p = i;
        }
    }
    return best;
}

static enum nep_status run(struct state *s)
{
    const struct replay *r = s->replay;
    enum nep_status status = NEP_OK;
    for (;;) {
        size_t slot = 0;
        double end = next_end(s, &slot);
        double arrival = s->arrived < r->num ? r->arrival[s->arrived] : INFINITY;
        if (status != NEP_OK || (isinf(end) && isinf(arrival))) {
            return status;
        }
        double now = end <= arrival ? end : arrival;
        if (end <= arrival) {
            if (s->rule == NEAREP) {
                status = nep_queue_finish(s->queue, s->running[slot].arrival);
            }
            s->running[slot].end = 0.0;
            s->busy[slot / r->args->batch]--;
        } else {
            status = arrive(s);
        }
        if (status == NEP_OK) {
            status = fill(s, now);
        }
    }
}

static int less(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void sum_up(struct state *s, uint32_t tenants, struct outcome *o)
{
    uint32_t num = s->replay->num;
    double sum = 0.0;
    double squares = 0.0;
    uint32_t n = 0;
    *o = (struct outcome){.rows = s->rows};
    for (uint32_t i = 0; i < num; i++) {
        o->mean_wait += s->wait[i] / num;
    }
    qsort(s->wait, num, sizeof *s->wait, less);
    o->p99_wait = s->wait[(uint64_t)num * 99 / 100];
    o->max_wait = s->wait[num - 1];
    for (uint32_t t = 0; t < tenants; t++) {
        if (s->asked[t] > 0.0) {
            double x = s->served[t] / s->asked[t]; /* speed: 1 when nothing waited */
            sum += x;
            squares += x * x;
            n++;
        }
    }
    o->jain = n == 0 ? 1.0 : sum * sum / (n * squares);
}

static enum nep_status run_rule(struct replay *r, enum rule rule, struct outcome *o)
{
    struct nep_trace_shape trace;
    nep_trace_get_shape(r->all.trace, &trace);
    size_t slots = (size_t)r->shape.num_nodes * r->args->batch;
    struct state s = {.replay = r, .rule = rule};
    s.running = calloc(slots, sizeof *s.running);
    s.busy = calloc(r->shape.num_nodes, sizeof *s.busy);
    s.wait = calloc((size_t)r->num + 1, sizeof *s.wait);
    s.served = calloc(2 * (size_t)trace.num_domains + 1, sizeof *s.served);
    enum nep_status status = NEP_OK;
    if (s.running == NULL || s.busy == NULL || s.wait == NULL || s.served == NULL) {
        status = NEP_ERR_NO_MEMORY;
    } else {
        s.asked = s.served + trace.num_domains;
        struct nep_queue_params params = {.size = sizeof params,
                                          .num_homes = r->shape.num_nodes,
                                          .home_slots = (uint32_t)r->args->batch,
                                          .capacity = r->num,
                                          .num_tenants = trace.num_domains,
                                          .max_age_ns = r->bound};
        status = rule == NEAREP ? nep_queue_create(&params, &s.queue) : NEP_OK;
    }
    if (status == NEP_OK) {
        status = run(&s);
    }
    if (status == NEP_OK) {
        sum_up(&s, trace.num_domains, o);
    }
    nep_queue_destroy(s.queue);
    free(s.running);
    free(s.busy);
    free(s.wait);
    free(s.served);
    return status;
}

static enum nep_status oracle_rows(struct replay *r, double *rows_p)
{
    uint32_t *homes = calloc((size_t)r->all.num + 1, sizeof *homes);
    if (homes == NULL) {
        return NEP_ERR_NO_MEMORY;
    }
    enum nep_status status = nep_homes_oracle(&r->all, r->map, homes);
    double rows = 0.0;
    for (uint32_t i = 0; i < r->all.num; i++) {
        rows += (double)r->scored[(size_t)i * r->shape.num_nodes + homes[i]];
    }
    free(homes);
    *rows_p = rows * PASSES;
    return status;
}

static enum nep_status replay(struct replay *r, double load)
{
    double oracle = 0.0;
    enum nep_status status = score_requests(r);
    if (status != NEP_OK) {
        return status;
    }
    draw_arrivals(r, load);
    r->bound = (uint64_t)(r->args->max_age * r->mean_tokens);
    status = oracle_rows(r, &oracle);
    struct json_out *json = &r->args->json;
    fprintf(r->args->out,
            "%u arrivals at load %.2f, %u homes of %llu slots, age bound %llu ticks (a tick is a "
            "token)\n%-14s %16s %10s %10s %10s %8s\n",
            r->num, load, r->shape.num_nodes, (unsigned long long)r->args->batch,
            (unsigned long long)r->bound, "rule", "rows over oracle", "mean wait", "p99 wait",
            "max wait", "Jain");
    json_double(json, "load", load);
    json_u64(json, "age_bound", r->bound);
    json_open(json, "rules", '{');
    for (int rule = 0; rule < NUM_RULES && status == NEP_OK; rule++) {
        struct outcome o = {0};
        status = run_rule(r, rule, &o);
        if (status != NEP_OK) {
            break;
        }
        double over = oracle > 0.0 ? 100.0 * (o.rows / oracle - 1.0) : 0.0;
        fprintf(r->args->out, "%-14s %+14.2f %% %10.1f %10.1f %10.1f %8.4f\n", names[rule], over,
                o.mean_wait, o.p99_wait, o.max_wait, o.jain);
        json_open(json, names[rule], '{');
        json_double(json, "rows_over_oracle_pct", over);
        json_double(json, "mean_wait", o.mean_wait);
        json_double(json, "p99_wait", o.p99_wait);
        json_double(json, "max_wait", o.max_wait);
        json_double(json, "jain", o.jain);
        json_close(json, '}');
    }
    json_close(json, '}');
    return status;
}

int place_queue(struct place_args *args)
{
    double load = 0.0;
    char rest = 0;
    if (sscanf(args->arrivals, "poisson:%lf%c", &load, &rest) != 1 || !(load > 0.0 && load < 1.0)) {
        return place_error(
            PLACE_UNUSABLE,
            "--arrivals %s: it is poisson:RATE with RATE the load, above 0 and below "
            "1",
            args->arrivals);
    }
    struct nep_trace *trace = NULL;
    struct nep_map *map = NULL;
    struct replay r = {.args = args};
    enum nep_status status = nep_trace_open(args->trace, &trace);
    if (status == NEP_OK) {
        status = nep_map_load(args->map, &map);
    }
    if (status == NEP_OK) {
        status = nep_trace_match(trace, map);
    }
    if (status == NEP_OK && nep_trace_num_tokens(trace) == 0) {
        nep_map_destroy(map);
        nep_trace_close(trace);
        return place_error(PLACE_UNUSABLE, "%s has no tokens", args->trace);
    }
    if (status == NEP_OK) {
        nep_map_get_shape(map, &r.shape);
        r.map = map;
        r.all = nep_requests_all(trace);
        r.num = r.all.num * PASSES;
        size_t table = (size_t)r.all.num * r.shape.num_nodes;
        r.arrival = calloc(r.num, sizeof *r.arrival);
        r.request = calloc(r.num, sizeof *r.request);
        r.signature = calloc(table, sizeof *r.signature);
        r.scored = calloc(table, sizeof *r.scored);
        r.tokens = calloc(r.all.num, sizeof *r.tokens);
        status = r.arrival == NULL || r.request == NULL || r.signature == NULL ||
                         r.scored == NULL || r.tokens == NULL
                     ? NEP_ERR_NO_MEMORY
                     : replay(&r, load);
    }
    free(r.arrival);
    free(r.request);
    free(r.signature);
    free(r.scored);
    free(r.tokens);
    nep_map_destroy(map);
    nep_trace_close(trace);
    return status == NEP_OK ? PLACE_FINE : place_failed(status, "queue");
}
