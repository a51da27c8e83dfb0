/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nep-place compare: every method solved on train, scored on test, three times: all requests of
 * test, those of domains that train has (seen), those of domains that it has not (unseen); each set
 * is a stream of its own with its own homes. Domains are compared by name. The base of every change
 * is the contiguous map with random homes, the mean of 15 draws on that same set. Two references
 * say how much is left, and are not bounds: the map with copies solved on test itself, and the map
 * of train with each request at the home that its scored tokens like best. With several ranks a
 * node a third one shows what ranks inside nodes are worth: the same map packed by load there.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "placement/repack.h"
#include "placement/solver.h"
#include "placement/spectral.h"
#include "placement/stream.h"
#include "tools/nep_place.h"

#define BASE_DRAWS 15u

enum method {
    LINEAR,
    LINEAR_HOMES,
    EPLB,
    EPLB_REPLICAS,
    PAPER,
    SPECTRAL,
    NEAREP,
    NEAREP_REPLICAS,
    NEAREP_ONLINE,
    FIRST_REFERENCE,
    ORACLE_HOMES = FIRST_REFERENCE,
    SOLVED_ON_TEST,
    PACKED_INSIDE,
    NUM_METHODS
};

static const char *const names[NUM_METHODS] = {"linear",        "linear_homes",    "eplb",
                                               "eplb_replicas", "paper",           "spectral",
                                               "nearep",        "nearep_replicas", "nearep_online",
                                               "oracle_homes",  "solved_on_test",  "packed_inside"};

enum { ALL, SEEN, UNSEEN, NUM_SETS };

static const char *const set_names[NUM_SETS] = {"all", "seen", "unseen"};

struct cell {
    struct nep_score score; /* sums over seeds, then means */
    double least;           /* of the seeds' changes, in percent */
    double most;
    double moved;
};

struct compare {
    struct place_args *args;
    struct nep_trace *train;
    struct nep_trace *test;
    struct nep_requests sets[NUM_SETS];
    uint32_t *idx[NUM_SETS];
    uint32_t sizes[PLACE_MAX_NODES];
    struct nep_map_shape plain; /* slots without replicas */
    struct nep_map_shape more;  /* with */
    double base[NUM_SETS];
    double base_of_seed[NUM_SETS];
    struct cell cells[NUM_SETS][NUM_METHODS];
    double seconds[NUM_METHODS];
    struct nep_map *kept; /* with copies, of the seed under way */
    double kept_seconds;
    bool has_replicas;
};

static bool has_domain(const struct nep_trace *trace, const char *name)
{
    for (uint32_t i = 0; i < nep_trace_num_requests(trace); i++) {
        if (strcmp(nep_trace_domain(trace, nep_trace_request_at(trace, i)->domain), name) == 0) {
            return true;
        }
    }
    return false;
}

static enum nep_status split_test(struct compare *c)
{
    uint32_t num = nep_trace_num_requests(c->test);
    for (int s = 0; s < NUM_SETS; s++) {
        c->idx[s] = malloc(((size_t)num + 1) * sizeof *c->idx[s]);
        if (c->idx[s] == NULL) {
            return NEP_ERR_NO_MEMORY;
        }
        c->sets[s] = (struct nep_requests){c->test, c->idx[s], 0};
    }
    struct nep_trace_shape shape;
    nep_trace_get_shape(c->test, &shape);
    uint8_t *is_seen = calloc((size_t)shape.num_domains + 1, 1);
    if (is_seen == NULL) {
        return NEP_ERR_NO_MEMORY;
    }
    for (uint32_t d = 0; d < shape.num_domains; d++) {
        is_seen[d] = has_domain(c->train, nep_trace_domain(c->test, d));
    }
    for (uint32_t i = 0; i < num; i++) {
        int s = is_seen[nep_trace_request_at(c->test, i)->domain] ? SEEN : UNSEEN;
        c->idx[s][c->sets[s].num++] = i;
        c->idx[ALL][c->sets[ALL].num++] = i;
    }
    free(is_seen);
    return NEP_OK;
}

static enum nep_status train_loads(const struct nep_trace *trace, double *loads)
{
    int32_t ids[NEP_TRACE_TOP_K_LIMIT];
    struct nep_requests all = nep_requests_all(trace);
    int is_scored = nep_sets_have_scored(&all);
    for (uint32_t i = 0; i < all.num; i++) {
        uint64_t first;
        uint64_t count = nep_sets_part(&all, i, is_scored, &first);
        for (uint64_t t = first; t < first + count; t++) {
            for (uint32_t l = 0; l < nep_trace_num_layers(trace); l++) {
                nep_trace_ids(trace, t, l, ids);
                for (uint32_t k = 0; k < nep_trace_top_k(trace); k++) {
                    if (ids[k] >= 0) {
                        loads[(size_t)l * nep_trace_num_experts(trace) + (uint32_t)ids[k]] += 1.0;
                    }
                }
            }
        }
    }
    return NEP_OK;
}

static enum nep_status make_eplb(const struct compare *c, const struct nep_map_shape *shape,
                                 struct nep_map **map_p)
{
    double *loads = calloc((size_t)shape->num_layers * shape->num_experts, sizeof *loads);
    if (loads == NULL) {
        return NEP_ERR_NO_MEMORY;
    }
    enum nep_status status = train_loads(c->train, loads);
    if (status == NEP_OK) {
        status = nep_map_balance(shape, 1, loads, map_p);
    }
    free(loads);
    return status;
}

static enum nep_status make_packed(const struct compare *c, const struct nep_solve_params *params,
                                   struct nep_map **map_p)
{
    const struct nep_map_shape *shape = params->shape;
    double *loads = calloc((size_t)shape->num_layers * shape->num_experts, sizeof *loads);
    struct nep_map *map = NULL;
    enum nep_status status = loads == NULL ? NEP_ERR_NO_MEMORY : train_loads(c->train, loads);
    if (status == NEP_OK) {
        status = nep_map_solve(c->train, params, &map);
    }
    if (status == NEP_OK) {
        status = nep_map_repack(map, loads, map_p);
    }
    nep_map_destroy(map);
    free(loads);
    return status;
}

static enum nep_status make_map(const struct compare *c, enum method method, uint64_t seed,
                                struct nep_map **map_p)
{
    const struct place_args *args = c->args;
    bool is_more = method == NEAREP_REPLICAS || method == NEAREP_ONLINE ||
                   (method >= FIRST_REFERENCE && c->has_replicas);
    const struct nep_solve_params params = {.size = sizeof params,
                                            .shape = is_more ? &c->more : &c->plain,
                                            .num_threads = (uint32_t)args->threads,
                                            .max_imbalance = args->max_imbalance,
                                            .seed = seed,
                                            .max_tokens = (uint32_t)args->max_tokens};
    switch (method) {
    case EPLB:
        return make_eplb(c, &c->plain, map_p);
    case EPLB_REPLICAS:
        return make_eplb(c, &c->more, map_p);
    case PAPER:
        return nep_solve_paper(c->train, &params, map_p);
    case SPECTRAL: {
        struct nep_requests train = nep_requests_all(c->train);
        return nep_solve_spectral(&train, &c->plain, seed, map_p);
    }
    case NEAREP:
    case NEAREP_REPLICAS:
    case NEAREP_ONLINE:
    case ORACLE_HOMES:
        return nep_map_solve(c->train, &params, map_p);
    case SOLVED_ON_TEST:
        return nep_map_solve(c->test, &params, map_p);
    case PACKED_INSIDE:
        return make_packed(c, &params, map_p);
    default:
        return nep_map_contiguous(&c->plain, map_p);
    }
}

/* Adds one seed's score. Linear comes first and is the base of the others. */
static void add_score(struct compare *c, enum method method, int set, const struct nep_score *score,
                      double moved)
{
    struct cell *cell = &c->cells[set][method];
    if (method == LINEAR) {
        c->base_of_seed[set] = score->remote_nodes_per_token;
    }
    double base = c->base_of_seed[set];
    double change = base > 0.0 ? 100.0 * (score->remote_nodes_per_token / base - 1.0) : 0.0;
    bool is_first = cell->score.num_tokens == 0;
    cell->least = is_first || change < cell->least ? change : cell->least;
    cell->most = is_first || change > cell->most ? change : cell->most;
    cell->score.num_tokens = score->num_tokens;
    cell->score.remote_nodes_per_token += score->remote_nodes_per_token;
    cell->score.ranks_per_token += score->ranks_per_token;
    cell->score.local_share += score->local_share;
    cell->score.imbalance_node += score->imbalance_node;
    cell->score.imbalance_rank += score->imbalance_rank;
    cell->moved += moved;
}

static enum nep_status score_set(struct compare *c, enum method method, int set,
                                 const struct nep_map *map, uint64_t seed)
{
    const struct nep_requests *requests = &c->sets[set];
    struct nep_score score;
    uint64_t moved = 0;
    enum nep_status status = NEP_OK;
    uint32_t *homes = calloc((size_t)requests->num + 1, sizeof *homes);
    if (homes == NULL) {
        return NEP_ERR_NO_MEMORY;
    }
    if (method == LINEAR || method == EPLB || method == EPLB_REPLICAS) {
        status = nep_score_random_homes(requests, map, BASE_DRAWS, 1000 * seed, &score);
    } else {
        status = method == ORACLE_HOMES ? nep_homes_oracle(requests, map, homes)
                                        : nep_homes_predict(requests, map, homes);
        if (status == NEP_OK && method == NEAREP_ONLINE) {
            status = nep_stream_score(requests, map, homes, &score, &moved);
        } else if (status == NEP_OK) {
            status = nep_score_map(requests, map, homes, &score, NULL);
        }
    }
    free(homes);
    if (status == NEP_OK) {
        add_score(c, method, set, &score, (double)moved);
    }
    return status;
}

/* --methods is a list of names with commas between them; linear, the base, is always run. */
static bool is_named(const char *list, const char *name)
{
    size_t length = strlen(name);
    for (const char *at = list; at != NULL; at = strchr(at, ',')) {
        at += *at == ',';
        if (strncmp(at, name, length) == 0 && (at[length] == ',' || at[length] == '\0')) {
            return true;
        }
    }
    return list == NULL;
}

static int check_methods(const char *list)
{
    for (const char *at = list; at != NULL && *at != '\0';) {
        size_t length = strcspn(at, ",");
        bool is_known = false;
        for (int m = 0; m < NUM_METHODS; m++) {
            is_known |= strlen(names[m]) == length && strncmp(names[m], at, length) == 0;
        }
        if (!is_known) {
            return place_error(PLACE_UNUSABLE,
                               "--methods: \"%.*s\" is not a method; see "
                               "docs/placement.md",
                               (int)length, at);
        }
        at += length + (at[length] == ',');
    }
    return PLACE_GO_ON;
}

static bool is_run(const struct compare *c, enum method method)
{
    if (method != LINEAR && !is_named(c->args->methods, names[method])) {
        return false;
    }
    if (method == NEAREP_ONLINE) {
        return c->args->is_online;
    }
    if (method == PACKED_INSIDE) {
        return c->args->gpus_per_node > 1;
    }
    return c->has_replicas || (method != EPLB_REPLICAS && method != NEAREP_REPLICAS);
}

/* The map with copies is solved once a seed, for all methods that only use it in other ways. */
static enum nep_status find_map(struct compare *c, enum method method, uint64_t seed,
                                struct nep_map **map_p)
{
    if ((method == NEAREP_ONLINE || method == ORACLE_HOMES) && c->kept != NULL) {
        nep_map_retain(c->kept);
        *map_p = c->kept;
        c->seconds[method] += c->kept_seconds;
        return NEP_OK;
    }
    uint64_t start = nep_now_ns();
    enum nep_status status = make_map(c, method, seed, map_p);
    double seconds = (double)(nep_now_ns() - start) / 1e9;
    c->seconds[method] += seconds;
    if (status == NEP_OK && method == NEAREP_REPLICAS) {
        nep_map_retain(*map_p);
        c->kept = *map_p;
        c->kept_seconds = seconds;
    }
    return status;
}

static enum nep_status run_method(struct compare *c, enum method method, uint64_t seed)
{
    struct nep_map *map = NULL;
    enum nep_status status = find_map(c, method, seed, &map);
    for (int s = 0; s < NUM_SETS && status == NEP_OK; s++) {
        if (c->sets[s].num > 0) {
            status = score_set(c, method, s, map, seed);
        }
    }
    nep_map_destroy(map);
    return status;
}

static void average(struct compare *c)
{
    double n = (double)c->args->seeds;
    for (int m = 0; m < NUM_METHODS; m++) {
        c->seconds[m] /= n;
        for (int s = 0; s < NUM_SETS; s++) {
            struct nep_score *score = &c->cells[s][m].score;
            score->remote_nodes_per_token /= n;
            score->ranks_per_token /= n;
            score->local_share /= n;
            score->imbalance_node /= n;
            score->imbalance_rank /= n;
            c->cells[s][m].moved /= n;
        }
    }
    for (int s = 0; s < NUM_SETS; s++) {
        c->base[s] = c->cells[s][LINEAR].score.remote_nodes_per_token;
    }
}

static void write_methods(struct compare *c, int set, const char *name, int first, int end)
{
    struct json_out *json = &c->args->json;
    json_open(json, name, '{');
    for (int m = first; m < end; m++) {
        if (!is_run(c, m) || c->sets[set].num == 0) {
            continue;
        }
        json_open(json, names[m], '{');
        place_json_score(json, &c->cells[set][m].score, c->base[set]);
        json_double(json, "change_pct_least", c->cells[set][m].least);
        json_double(json, "change_pct_most", c->cells[set][m].most);
        json_double(json, "solve_s", c->seconds[m]);
        if (m == NEAREP_ONLINE) {
            json_double(json, "moved_copies", c->cells[set][m].moved);
        }
        json_close(json, '}');
    }
    json_close(json, '}');
}

static void write_json(struct compare *c, int set)
{
    write_methods(c, set, "methods", 0, FIRST_REFERENCE);
    write_methods(c, set, "references", FIRST_REFERENCE, NUM_METHODS);
}

static void print_results(struct compare *c)
{
    FILE *out = c->args->out;
    struct json_out *json = &c->args->json;
    fprintf(out,
            "change of remote nodes per token (%%) / imbalance of nodes; base: linear, mean of "
            "%u draws of homes\n%-16s",
            BASE_DRAWS, "method");
    for (int s = 0; s < NUM_SETS; s++) {
        char head[32];
        snprintf(head, sizeof head, "%s (%u)", set_names[s], c->sets[s].num);
        fprintf(out, " %18s", head);
    }
    fprintf(out, " %8s\n", "solve s");
    for (int m = 0; m < NUM_METHODS; m++) {
        if (!is_run(c, m)) {
            continue;
        }
        fprintf(out, "%s%-16s", m == FIRST_REFERENCE ? "references, not bounds:\n" : "", names[m]);
        for (int s = 0; s < NUM_SETS; s++) {
            const struct nep_score *score = &c->cells[s][m].score;
            if (c->sets[s].num == 0) {
                fprintf(out, " %18s", "-");
                continue;
            }
            fprintf(out, "    %+6.1f / %-6.3f",
                    100.0 * (score->remote_nodes_per_token / c->base[s] - 1.0),
                    score->imbalance_node);
        }
        fprintf(out, " %8.3f", c->seconds[m]);
        if (c->args->gpus_per_node > 1 && c->sets[ALL].num > 0) {
            fprintf(out, "  ranks per token %.2f, imbalance of ranks %.3f",
                    c->cells[ALL][m].score.ranks_per_token, c->cells[ALL][m].score.imbalance_rank);
        }
        if (m == NEAREP_ONLINE) {
            fprintf(out, "  moved copies %.0f", c->cells[ALL][m].moved);
        }
        if (c->args->seeds > 1) {
            fprintf(out, "  all, %llu seeds: %+.1f to %+.1f", (unsigned long long)c->args->seeds,
                    c->cells[ALL][m].least, c->cells[ALL][m].most);
        }
        fputc('\n', out);
    }
    json_u64(json, "seeds", c->args->seeds);
    json_u64(json, "nodes", c->plain.num_nodes);
    json_u64(json, "gpus_per_node", c->args->gpus_per_node);
    json_double(json, "replicas_pct", c->args->replicas);
    write_json(c, ALL);
    for (int s = SEEN; s < NUM_SETS; s++) {
        json_open(json, set_names[s], '{');
        json_u64(json, "requests", c->sets[s].num);
        write_json(c, s);
        json_close(json, '}');
    }
}

static enum nep_status open_traces(struct compare *c)
{
    enum nep_status status = nep_trace_open(c->args->train, &c->train);
    if (status == NEP_OK) {
        status = nep_trace_open(c->args->test, &c->test);
    }
    if (status == NEP_OK && c->args->is_shuffled) {
        status = nep_trace_shuffle(c->args->seed, &c->train);
    }
    if (status == NEP_OK && c->args->is_shuffled) {
        status = nep_trace_shuffle(c->args->seed + 1, &c->test);
    }
    return status;
}

static int check_traces(const struct compare *c)
{
    if (nep_trace_num_experts(c->train) != nep_trace_num_experts(c->test) ||
        nep_trace_num_layers(c->train) != nep_trace_num_layers(c->test) ||
        nep_trace_top_k(c->train) != nep_trace_top_k(c->test)) {
        return place_error(PLACE_UNUSABLE,
                           "train has %u layers, %u experts, top-k %u; test has %u, %u, %u: they "
                           "are not of one model",
                           nep_trace_num_layers(c->train), nep_trace_num_experts(c->train),
                           nep_trace_top_k(c->train), nep_trace_num_layers(c->test),
                           nep_trace_num_experts(c->test), nep_trace_top_k(c->test));
    }
    if (nep_trace_num_requests(c->train) == 0 || nep_trace_num_requests(c->test) == 0) {
        return place_error(PLACE_UNUSABLE, "train has %u requests, test has %u",
                           nep_trace_num_requests(c->train), nep_trace_num_requests(c->test));
    }
    return PLACE_GO_ON;
}

static int compare(struct compare *c)
{
    int rc = check_traces(c);
    if (rc == PLACE_GO_ON) {
        rc = check_methods(c->args->methods);
    }
    if (rc == PLACE_GO_ON) {
        rc = place_shape(c->args, c->train, 0.0, c->sizes, &c->plain);
    }
    if (rc == PLACE_GO_ON) {
        rc = place_shape(c->args, c->train, c->args->replicas, c->sizes, &c->more);
    }
    if (rc != PLACE_GO_ON) {
        return rc;
    }
    c->has_replicas = c->more.slots_per_rank > c->plain.slots_per_rank;
    enum nep_status status = split_test(c);
    for (uint64_t s = 0; s < c->args->seeds && status == NEP_OK; s++) {
        for (int m = 0; m < NUM_METHODS && status == NEP_OK; m++) {
            status = is_run(c, m) ? run_method(c, m, c->args->seed + s) : NEP_OK;
        }
        nep_map_destroy(c->kept);
        c->kept = NULL;
    }
    if (status != NEP_OK) {
        return place_failed(status, "compare");
    }
    average(c);
    print_results(c);
    return PLACE_FINE;
}

int place_compare(struct place_args *args)
{
    static struct compare c;
    c.args = args;
    enum nep_status status = open_traces(&c);
    if (status == NEP_OK && args->replicas < 0.0) {
        /* The usual share where it comes out whole, else none. */
        double slots =
            nep_trace_num_experts(c.train) * 1.125 / (double)(args->nodes * args->gpus_per_node);
        args->replicas = slots == floor(slots) ? 12.5 : 0.0;
    }
    int rc = status == NEP_OK ? compare(&c) : place_failed(status, "compare");
    for (int s = 0; s < NUM_SETS; s++) {
        free(c.idx[s]);
    }
    nep_trace_close(c.train);
    nep_trace_close(c.test);
    return rc;
}
