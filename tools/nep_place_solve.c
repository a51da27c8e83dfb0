/* SPDX-License-Identifier: Apache-2.0 */
/* nep-place solve, eval and slice. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "placement/bounds.h"
#include "placement/rng.h"
#include "placement/schedule.h"
#include "tools/nep_place.h"

static void show_progress(void *ctx, double done, uint64_t eta_ns)
{
    (void)ctx;
    fprintf(stderr, "\rsolving: %3.0f %%, %.1f s left   ", 100.0 * done, (double)eta_ns / 1e9);
    if (done >= 1.0) {
        fputc('\n', stderr);
    }
}

static int solve_and_save(struct place_args *args, const struct nep_trace *trace,
                          const struct nep_map *warm)
{
    uint32_t sizes[PLACE_MAX_NODES];
    struct nep_map_shape shape;
    int rc = place_shape(args, trace, args->replicas, sizes, &shape);
    if (rc != PLACE_GO_ON) {
        return rc;
    }
    struct nep_solve_params params = {.size = sizeof params,
                                      .shape = &shape,
                                      .num_threads = (uint32_t)args->threads,
                                      .max_imbalance = args->max_imbalance,
                                      .seed = args->seed,
                                      .time_limit_ns = (uint64_t)(args->time_limit * 1e9),
                                      .max_tokens = (uint32_t)args->max_tokens,
                                      .progress = isatty(STDERR_FILENO) ? show_progress : NULL,
                                      .warm = warm,
                                      .max_moves = args->max_moves};
    struct nep_map *map = NULL;
    uint64_t start = nep_now_ns();
    enum nep_status status = nep_map_solve(trace, &params, &map);
    double seconds = (double)(nep_now_ns() - start) / 1e9;
    if (status == NEP_OK) {
        status = nep_map_save(map, args->output);
    }
    if (status != NEP_OK) {
        nep_map_destroy(map);
        return place_failed(status, "solve");
    }
    int is_truncated = nep_map_is_truncated(map);
    uint64_t moved = 0;
    if (warm != NULL) {
        nep_map_diff(warm, map, NULL, 0,
                     &moved); /* counts them; that they do not fit is no fault */
        fprintf(args->out, "%llu of %llu copies moved\n", (unsigned long long)moved,
                (unsigned long long)shape.num_layers * shape.num_nodes * args->gpus_per_node *
                    shape.slots_per_rank);
        json_u64(&args->json, "moved_copies", moved);
    }
    fprintf(args->out,
            "%s: %u layers, %u experts on %u nodes of %llu, %u slots per rank, %.2f s%s\n",
            args->output, shape.num_layers, shape.num_experts, shape.num_nodes,
            (unsigned long long)args->gpus_per_node, shape.slots_per_rank, seconds,
            is_truncated ? ", truncated by the time limit" : "");
    json_text(&args->json, "map", args->output);
    json_u64(&args->json, "slots_per_rank", shape.slots_per_rank);
    json_double(&args->json, "solve_s", seconds);
    json_bool(&args->json, "truncated", is_truncated);
    nep_map_destroy(map);
    return PLACE_FINE;
}

int place_solve(struct place_args *args)
{
    struct nep_trace *trace = NULL;
    struct nep_map *warm = NULL;
    enum nep_status status = nep_trace_open(args->trace, &trace);
    if (status == NEP_OK && args->warm != NULL) {
        status = nep_map_load(args->warm, &warm);
    }
    int rc = status == NEP_OK ? solve_and_save(args, trace, warm) : place_failed(status, "solve");
    nep_map_destroy(warm);
    nep_trace_close(trace);
    return rc;
}

static enum nep_status choose_homes(const struct place_args *args,
                                    const struct nep_requests *requests, const struct nep_map *map,
                                    const struct nep_map_shape *shape, uint32_t *homes)
{
    if (strcmp(args->homes, "random") == 0) {
        return nep_homes_random(requests, shape, args->seed, homes);
    }
    return strcmp(args->homes, "oracle") == 0 ? nep_homes_oracle(requests, map, homes)
                                              : nep_homes_predict(requests, map, homes);
}

static enum nep_status count_rows(const struct place_args *args,
                                  const struct nep_requests *requests, const struct nep_map *map,
                                  const struct nep_map_shape *shape, const uint32_t *homes,
                                  uint64_t *rows_p)
{
    struct nep_schedule *schedule = NULL;
    enum nep_status status =
        nep_schedule_create(requests, homes, shape, (int)args->layer, &schedule);
    if (status == NEP_OK) {
        status = nep_schedule_remote_rows(schedule, map, (uint32_t)args->tokens, args->warmup,
                                          args->iters, rows_p);
    }
    nep_schedule_destroy(schedule);
    return status;
}

/* Mean over layers, of the scored tokens; said, and not failed, where there is none. */
static void print_bound(struct place_args *args, const struct nep_requests *requests,
                        const struct nep_map_shape *shape)
{
    double sum = 0.0;
    for (uint32_t l = 0; l < shape->num_layers; l++) {
        struct nep_sets sets;
        double distinct = 0.0;
        enum nep_status status = nep_sets_sample(requests, l, 1, 0, &sets);
        if (status == NEP_OK) {
            status = nep_bound_distinct(&sets, shape->num_nodes, &distinct);
            nep_sets_fini(&sets);
        }
        if (status != NEP_OK) {
            fprintf(args->out, "no bound: %s\n", nep_last_message());
            json_null(&args->json, "bound_remote_nodes_per_token");
            return;
        }
        sum += distinct - 1.0;
    }
    fprintf(args->out, "bound: no map without copies has less than %.4f, whatever the homes\n",
            sum / shape->num_layers);
    json_double(&args->json, "bound_remote_nodes_per_token", sum / shape->num_layers);
}

static enum nep_status eval(struct place_args *args, const struct nep_trace *trace,
                            const struct nep_map *map)
{
    struct nep_map_shape shape;
    struct nep_requests all = nep_requests_all(trace);
    struct nep_score score;
    uint64_t rows = 0;
    nep_map_get_shape(map, &shape);
    uint32_t *homes = calloc((size_t)all.num + 1, sizeof *homes);
    double *layers = calloc(shape.num_layers, sizeof *layers);
    if (homes == NULL || layers == NULL) {
        free(homes);
        free(layers);
        return NEP_ERR_NO_MEMORY;
    }
    const struct nep_score_details details = {.remote_of_layer = layers};
    enum nep_status status = nep_trace_match(trace, map);
    if (status == NEP_OK) {
        status = choose_homes(args, &all, map, &shape, homes);
    }
    if (status == NEP_OK) {
        status = nep_score_map(&all, map, homes, &score, &details);
    }
    if (status == NEP_OK) {
        status = count_rows(args, &all, map, &shape, homes, &rows);
    }
    if (status == NEP_OK) {
        fprintf(args->out,
                "homes %s: %.4f remote nodes per token, %.1f %% of tokens stay local, imbalance "
                "%.3f of nodes, %.3f of ranks; remote_rows %llu in iterations %llu to %llu of %llu "
                "tokens per rank\n",
                args->homes, score.remote_nodes_per_token, 100.0 * score.local_share,
                score.imbalance_node, score.imbalance_rank, (unsigned long long)rows,
                (unsigned long long)args->warmup,
                (unsigned long long)(args->warmup + args->iters - 1),
                (unsigned long long)args->tokens);
        json_text(&args->json, "homes", args->homes);
        place_json_score(&args->json, &score, 0.0);
        json_u64(&args->json, "scored_tokens", score.num_tokens);
        json_u64(&args->json, "remote_rows", rows);
        if (args->has_bound) {
            print_bound(args, &all, &shape);
        }
        json_open(&args->json, "layers", '[');
        for (uint32_t l = 0; l < shape.num_layers; l++) {
            json_double(&args->json, NULL, layers[l]);
        }
        json_close(&args->json, ']');
    }
    free(homes);
    free(layers);
    return status;
}

int place_eval(struct place_args *args)
{
    if (strcmp(args->homes, "predicted") != 0 && strcmp(args->homes, "random") != 0 &&
        strcmp(args->homes, "oracle") != 0) {
        return place_error(PLACE_UNUSABLE, "--homes %s: it is predicted, random or oracle",
                           args->homes);
    }
    struct nep_trace *trace = NULL;
    struct nep_map *map = NULL;
    enum nep_status status = nep_trace_open(args->trace, &trace);
    if (status == NEP_OK) {
        status = nep_map_load(args->map, &map);
    }
    if (status == NEP_OK) {
        status = eval(args, trace, map);
    }
    nep_map_destroy(map);
    nep_trace_close(trace);
    return status == NEP_OK ? PLACE_FINE : place_failed(status, "eval");
}

/* ---- slice ---- */

static enum nep_status copy_request(const struct nep_trace *trace, uint32_t request,
                                    struct nep_trace_writer *writer)
{
    const struct nep_trace_request *r = nep_trace_request_at(trace, request);
    uint64_t tokens = (uint64_t)r->prefill_tokens + r->decode_tokens;
    uint32_t layers = nep_trace_num_layers(trace);
    uint32_t top_k = nep_trace_top_k(trace);
    int32_t *ids = malloc((tokens * layers * top_k + 1) * sizeof *ids);
    if (ids == NULL) {
        return NEP_ERR_NO_MEMORY;
    }
    for (uint64_t t = 0; t < tokens; t++) {
        for (uint32_t l = 0; l < layers; l++) {
            nep_trace_ids(trace, r->first_token + t, l, &ids[(t * layers + l) * top_k]);
        }
    }
    enum nep_status status = nep_trace_writer_add(writer, r, ids);
    free(ids);
    return status;
}

static bool is_wanted(const struct place_args *args, const struct nep_trace *trace,
                      uint32_t request)
{
    const char *domain = nep_trace_domain(trace, nep_trace_request_at(trace, request)->domain);
    return (args->leave_out == NULL || strcmp(domain, args->leave_out) != 0) &&
           (args->only == NULL || strcmp(domain, args->only) == 0);
}

static enum nep_status write_slice(const struct place_args *args, const struct nep_trace *trace,
                                   struct nep_trace_writer *writer, uint32_t *num_p)
{
    uint32_t num = nep_trace_num_requests(trace);
    uint32_t *order = malloc(((size_t)num + 1) * sizeof *order);
    uint8_t *is_train = calloc((size_t)num + 1, 1);
    struct nep_trace_shape shape;
    nep_trace_get_shape(trace, &shape);
    uint32_t *of_domain = calloc((size_t)shape.num_domains + 1, sizeof *of_domain);
    enum nep_status status =
        order == NULL || is_train == NULL || of_domain == NULL ? NEP_ERR_NO_MEMORY : NEP_OK;
    if (status == NEP_OK) {
        struct nep_rng rng = nep_rng_seed(args->seed);
        for (uint32_t i = 0; i < num; i++) {
            order[i] = i;
        }
        nep_rng_shuffle(&rng, order, num);
        /* Of every domain two in three, so that the mix stays the same. */
        for (uint32_t i = 0; i < num; i++) {
            uint32_t domain = nep_trace_request_at(trace, order[i])->domain;
            is_train[order[i]] = of_domain[domain]++ % 3 != 2;
        }
    }
    for (uint32_t i = 0; i < num && status == NEP_OK; i++) {
        bool is_in = strcmp(args->requests, "all") == 0 ||
                     (strcmp(args->requests, "train") == 0) == (is_train[i] != 0);
        if (is_in && is_wanted(args, trace, i)) {
            status = copy_request(trace, i, writer);
            (*num_p)++;
        }
    }
    free(order);
    free(is_train);
    free(of_domain);
    return status;
}

int place_slice(struct place_args *args)
{
    if (strcmp(args->requests, "all") != 0 && strcmp(args->requests, "train") != 0 &&
        strcmp(args->requests, "test") != 0) {
        return place_error(PLACE_UNUSABLE, "--part %s: it is all, train or test", args->requests);
    }
    struct nep_trace *trace = NULL;
    struct nep_trace_writer *writer = NULL;
    struct nep_trace_shape shape;
    uint32_t num = 0;
    enum nep_status status = nep_trace_open(args->trace, &trace);
    if (status != NEP_OK) {
        return place_failed(status, "slice");
    }
    nep_trace_get_shape(trace, &shape);
    const char **domains = calloc((size_t)shape.num_domains + 1, sizeof *domains);
    for (uint32_t d = 0; domains != NULL && d < shape.num_domains; d++) {
        domains[d] = nep_trace_domain(trace, d);
    }
    status = domains == NULL
                 ? NEP_ERR_NO_MEMORY
                 : nep_trace_writer_create(&shape, nep_trace_model(trace), domains, &writer);
    if (status == NEP_OK) {
        status = write_slice(args, trace, writer, &num);
    }
    if (status == NEP_OK) {
        status = nep_trace_writer_save(writer, args->output);
    }
    nep_trace_writer_destroy(writer);
    nep_trace_close(trace);
    free(domains);
    if (status != NEP_OK) {
        return place_failed(status, "slice");
    }
    fprintf(args->out, "%s: %u of %u requests\n", args->output, num, shape.num_requests);
    json_u64(&args->json, "requests", num);
    return PLACE_FINE;
}
