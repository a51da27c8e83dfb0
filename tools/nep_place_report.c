/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nep-place report: one HTML page, everything inline (no script, no network), drawn as SVG: what a
 * map changed, for people. Before and after are scored on the same requests, each with the homes
 * that it would predict; the contiguous map has random homes, as a plain installation would.
 */
#include <stdlib.h>
#include <string.h>

#include "placement/map.h"
#include "tools/nep_place.h"

#define BINS 64u /* of the co-activation picture, at most */

struct side {
    const char *name;
    const struct nep_map *map;
    struct nep_score score;
    double *remote_of_layer;
    uint64_t *traffic;
    uint64_t *rank_load;
    uint32_t *homes;
};

struct report {
    FILE *file;
    struct nep_requests all;
    struct nep_map_shape shape;
    struct side before;
    struct side after;
};

static void put_text(FILE *file, const char *text)
{
    for (; *text != '\0'; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '<' || c == '>' || c == '&' || c == '"') {
            fprintf(file, "&#%u;", c);
        } else {
            fputc(c < ' ' ? ' ' : c, file);
        }
    }
}

/* ---- drawing ---- */

static void draw_heat(FILE *file, const char *title, const double *values, uint32_t n)
{
    double most = 0.0;
    for (size_t i = 0; i < (size_t)n * n; i++) {
        most = values[i] > most ? values[i] : most;
    }
    uint32_t cell = n > 32 ? 4 : 256 / n;
    fprintf(file, "<figure><svg width=\"%u\" height=\"%u\" shape-rendering=\"crispEdges\">",
            n * cell, n * cell);
    for (uint32_t y = 0; y < n; y++) {
        for (uint32_t x = 0; x < n; x++) {
            double share = most > 0.0 ? values[(size_t)y * n + x] / most : 0.0;
            fprintf(file,
                    "<rect x=\"%u\" y=\"%u\" width=\"%u\" height=\"%u\" "
                    "fill=\"hsl(215,70%%,%.0f%%)\"><title>%u to %u: %.0f</title></rect>",
                    x * cell, y * cell, cell, cell, 96.0 - 71.0 * share, y, x,
                    values[(size_t)y * n + x]);
        }
    }
    fprintf(file, "</svg><figcaption>%s (darkest: %.0f)</figcaption></figure>\n", title, most);
}

/* Two bars for each of n: before and after. */
static void draw_bars(FILE *file, const double *before, const double *after, uint32_t n)
{
    double most = 1e-9;
    for (uint32_t i = 0; i < n; i++) {
        most = before[i] > most ? before[i] : most;
        most = after[i] > most ? after[i] : most;
    }
    uint32_t width = n > 60 ? 4 : 9;
    fprintf(file, "<svg width=\"%u\" height=\"180\">", n * (2 * width + 4) + 10);
    for (uint32_t i = 0; i < n; i++) {
        double heights[2] = {150.0 * before[i] / most, 150.0 * after[i] / most};
        for (uint32_t s = 0; s < 2; s++) {
            fprintf(file,
                    "<rect x=\"%u\" y=\"%.1f\" width=\"%u\" height=\"%.1f\" "
                    "fill=\"%s\"><title>%u: %.3f</title></rect>",
                    i * (2 * width + 4) + s * width, 160.0 - heights[s], width, heights[s],
                    s == 0 ? "#b9b9b9" : "#2b6cb0", i, s == 0 ? before[i] : after[i]);
        }
    }
    fprintf(file, "<line x1=\"0\" y1=\"160\" x2=\"2000\" y2=\"160\" stroke=\"#555\"/></svg>"
                  "<p class=\"key\">grey: before, blue: after</p>\n");
}

/* ---- the parts ---- */

/* In percent of the rows before. */
static double change_of(const struct report *r, const struct nep_score *score)
{
    double before = r->before.score.remote_nodes_per_token;
    return before > 0.0 ? 100.0 * (score->remote_nodes_per_token / before - 1.0) : 0.0;
}

static void part_summary(const struct report *r)
{
    const struct nep_score *b = &r->before.score;
    const struct nep_score *a = &r->after.score;
    fprintf(r->file,
            "<p class=\"big\">%+.1f %% rows between nodes</p>\n<table><tr><th></th><th>before</th>"
            "<th>after</th></tr>\n"
            "<tr><td>remote nodes per token and layer</td><td>%.3f</td><td>%.3f</td></tr>\n"
            "<tr><td>tokens that leave their node not at all</td><td>%.1f %%</td><td>%.1f "
            "%%</td></tr>\n"
            "<tr><td>ranks per token</td><td>%.3f</td><td>%.3f</td></tr>\n"
            "<tr><td>busiest node over mean</td><td>%.3f</td><td>%.3f</td></tr>\n"
            "<tr><td>busiest rank over mean</td><td>%.3f</td><td>%.3f</td></tr></table>\n",
            change_of(r, a), b->remote_nodes_per_token, a->remote_nodes_per_token,
            100.0 * b->local_share, 100.0 * a->local_share, b->ranks_per_token, a->ranks_per_token,
            b->imbalance_node, a->imbalance_node, b->imbalance_rank, a->imbalance_rank);
}

static void part_traffic(const struct report *r)
{
    uint32_t n = r->shape.num_nodes;
    double *values = calloc((size_t)n * n, sizeof *values);
    fprintf(r->file,
            "<h2>Rows from each home (down) to each node (across)</h2><div class=\"row\">");
    for (int s = 0; s < 2 && values != NULL; s++) {
        const struct side *side = s == 0 ? &r->before : &r->after;
        for (size_t i = 0; i < (size_t)n * n; i++) {
            values[i] = (double)side->traffic[i];
        }
        draw_heat(r->file, side->name, values, n);
    }
    fprintf(r->file, "</div>");
    free(values);
}

/* Experts in the order of their first slots, pairs of one token counted into bins. */
static void count_pairs(const struct report *r, const struct nep_map *map, uint32_t layer,
                        uint32_t bins, double *values)
{
    struct nep_copies copies;
    int32_t ids[NEP_TRACE_TOP_K_LIMIT];
    uint32_t top_k = nep_trace_top_k(r->all.trace);
    uint32_t slots = map->shape.num_ranks * map->shape.slots_per_rank;
    nep_map_copies(map, layer, &copies);
    memset(values, 0, (size_t)bins * bins * sizeof *values);
    for (uint64_t t = 0; t < nep_trace_num_tokens(r->all.trace); t += 4) {
        nep_trace_ids(r->all.trace, t, layer, ids);
        for (uint32_t i = 0; i < top_k; i++) {
            for (uint32_t j = 0; j < top_k; j++) {
                if (i != j && ids[i] >= 0 && ids[j] >= 0) {
                    uint64_t y = copies.slot[copies.begin[ids[i]]] * (uint64_t)bins / slots;
                    uint64_t x = copies.slot[copies.begin[ids[j]]] * (uint64_t)bins / slots;
                    values[y * bins + x] += 1.0;
                }
            }
        }
    }
}

static void part_pairs(const struct report *r)
{
    uint32_t layer = r->shape.num_layers / 2;
    uint32_t bins = r->shape.num_experts < BINS ? r->shape.num_experts : BINS;
    double *values = calloc((size_t)bins * bins, sizeof *values);
    fprintf(r->file,
            "<h2>Experts that fire together, layer %u, in the order of their slots</h2>"
            "<p>Dark blocks on the diagonal are nodes whose experts share tokens.</p>"
            "<div class=\"row\">",
            layer);
    for (int s = 0; s < 2 && values != NULL; s++) {
        const struct side *side = s == 0 ? &r->before : &r->after;
        count_pairs(r, side->map, layer, bins, values);
        draw_heat(r->file, side->name, values, bins);
    }
    fprintf(r->file, "</div>");
    free(values);
}

static void part_bars(const struct report *r)
{
    uint32_t ranks = r->shape.num_ranks;
    double *b = calloc((size_t)ranks * 2, sizeof *b);
    if (b == NULL) {
        return;
    }
    double *a = b + ranks;
    for (uint32_t l = 0; l < r->shape.num_layers; l++) {
        for (uint32_t i = 0; i < ranks; i++) {
            b[i] += (double)r->before.rank_load[(size_t)l * ranks + i];
            a[i] += (double)r->after.rank_load[(size_t)l * ranks + i];
        }
    }
    fprintf(r->file, "<h2>Load of each rank, all layers</h2>");
    draw_bars(r->file, b, a, ranks);
    fprintf(r->file, "<h2>Remote nodes per token, layer by layer</h2>");
    draw_bars(r->file, r->before.remote_of_layer, r->after.remote_of_layer, r->shape.num_layers);
    free(b);
}

/* ---- what the limit on load costs ---- */

struct point {
    double limit; /* 0: the map of the report */
    double change;
    double imbalance;
};

static double scale(double value, double least, double most, double length)
{
    return most > least ? (value - least) / (most - least) * length : 0.5 * length;
}

/* Busiest node across, rows between nodes up; the limit beside each point, the map of the report in
 * red. */
static void draw_curve(FILE *file, const struct point *points, uint32_t num)
{
    const double width = 520.0;
    const double height = 200.0;
    struct point least = points[0];
    struct point most = points[0];
    for (uint32_t i = 1; i < num; i++) {
        least.change = points[i].change < least.change ? points[i].change : least.change;
        most.change = points[i].change > most.change ? points[i].change : most.change;
        least.imbalance =
            points[i].imbalance < least.imbalance ? points[i].imbalance : least.imbalance;
        most.imbalance =
            points[i].imbalance > most.imbalance ? points[i].imbalance : most.imbalance;
    }
    fprintf(file,
            "<svg width=\"640\" height=\"270\"><path d=\"M60 15V235H600\" fill=\"none\" "
            "stroke=\"#555\"/><text x=\"2\" y=\"30\">%+.1f %%</text><text x=\"2\" "
            "y=\"229\">%+.1f %%</text><text x=\"60\" y=\"255\">%.3f</text><text x=\"560\" "
            "y=\"255\">%.3f</text><text x=\"220\" y=\"255\">busiest node over mean</text>",
            most.change, least.change, least.imbalance, most.imbalance);
    for (uint32_t i = 0; i < num; i++) {
        double x = 70.0 + scale(points[i].imbalance, least.imbalance, most.imbalance, width);
        double y = 225.0 - scale(points[i].change, least.change, most.change, height);
        char name[32] = "this map";
        if (points[i].limit > 0.0) {
            snprintf(name, sizeof name, "%.2f", points[i].limit);
        }
        fprintf(file,
                "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"><title>%s: %+.1f %% rows, "
                "busiest node %.3f</title></circle><text x=\"%.1f\" y=\"%.1f\">%s</text>\n",
                x, y, points[i].limit > 0.0 ? "#2b6cb0" : "#c53030", name, points[i].change,
                points[i].imbalance, x - (x > 540.0 ? 62.0 : -7.0), y - 5.0, name);
    }
    fprintf(file, "</svg>");
}

/* Solved anew on this trace under a limit; 0: it cannot be kept, and the page says so. */
static enum nep_status solve_at(const struct report *r, const struct place_args *args, double limit,
                                struct point *point_p, int *is_solved_p)
{
    const struct nep_solve_params params = {.size = sizeof params,
                                            .shape = &r->shape,
                                            .max_imbalance = limit,
                                            .seed = args->seed,
                                            .max_tokens = 8192};
    struct nep_map *map = NULL;
    struct nep_score score;
    enum nep_status status = nep_map_solve(r->all.trace, &params, &map);
    *is_solved_p = status == NEP_OK;
    if (status == NEP_ERR_INVALID) {
        fprintf(r->file, "<p>%.2f: ", limit);
        put_text(r->file, nep_last_message());
        fprintf(r->file, "</p>\n");
        return NEP_OK;
    }
    uint32_t *homes = calloc((size_t)r->all.num + 1, sizeof *homes);
    if (status == NEP_OK) {
        status = homes == NULL ? NEP_ERR_NO_MEMORY : nep_homes_predict(&r->all, map, homes);
    }
    if (status == NEP_OK) {
        status = nep_score_map(&r->all, map, homes, &score, NULL);
    }
    if (status == NEP_OK) {
        *point_p = (struct point){limit, change_of(r, &score), score.imbalance_node};
    }
    nep_map_destroy(map);
    free(homes);
    return status;
}

static enum nep_status part_sweep(const struct report *r, const struct place_args *args)
{
    static const double limits[] = {1.02, 1.05, 1.10, 1.20, 1.40};
    enum { NUM = sizeof limits / sizeof limits[0] };
    struct point points[NUM + 1] = {
        {0.0, change_of(r, &r->after.score), r->after.score.imbalance_node}};
    uint32_t num = 1;
    enum nep_status status = NEP_OK;
    fprintf(r->file, "<h2>What the limit on load costs</h2><p>Rows between nodes against before; "
                     "each point solved anew on this trace, the limit beside it.</p>\n");
    for (int i = 0; i < NUM && status == NEP_OK; i++) {
        int is_solved = 0;
        status = solve_at(r, args, limits[i], &points[num], &is_solved);
        num += (uint32_t)is_solved;
    }
    if (status == NEP_OK) {
        draw_curve(r->file, points, num);
    }
    return status;
}

static enum nep_status write_page(const struct report *r, const struct place_args *args)
{
    FILE *file = r->file;
    fprintf(file,
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>nearep: "
            "placement</title><style>body{font:15px/1.5 sans-serif;max-width:60em;margin:2em "
            "auto;padding:0 1em;color:#222}table{border-collapse:collapse}td,th{padding:.2em "
            ".8em;border-bottom:1px solid #ccc;text-align:right}td:first-child{text-align:left}"
            ".big{font-size:2.4em;margin:.3em 0;color:#2b6cb0}.row{display:flex;gap:2em;"
            "flex-wrap:wrap}figure{margin:0}svg{max-width:100%%}.key{color:#666;margin:0}</style>"
            "</head><body><h1>Experts near tokens</h1><p>");
    put_text(file, nep_trace_model(r->all.trace));
    fprintf(file,
            ": %u layers of %u experts, top-%u, on %u nodes with %u ranks, %u slots each; %llu "
            "scored tokens of %u requests. Before: ",
            r->shape.num_layers, r->shape.num_experts, nep_trace_top_k(r->all.trace),
            r->shape.num_nodes, r->shape.num_ranks, r->shape.slots_per_rank,
            (unsigned long long)r->after.score.num_tokens, r->all.num);
    put_text(file, r->before.name);
    fprintf(file, ". After: ");
    put_text(file, r->after.name);
    fprintf(file, ".</p>\n");
    part_summary(r);
    part_traffic(r);
    part_pairs(r);
    part_bars(r);
    enum nep_status status = part_sweep(r, args);
    fprintf(file, "</body></html>\n");
    return status;
}

/* ---- scoring ---- */

static enum nep_status score_side(const struct report *r, const struct place_args *args,
                                  struct side *side, bool is_plain)
{
    size_t nodes = r->shape.num_nodes;
    side->remote_of_layer = calloc(r->shape.num_layers, sizeof *side->remote_of_layer);
    side->traffic = calloc(nodes * nodes, sizeof *side->traffic);
    side->rank_load =
        calloc((size_t)r->shape.num_layers * r->shape.num_ranks, sizeof *side->rank_load);
    side->homes = calloc((size_t)r->all.num + 1, sizeof *side->homes);
    if (side->remote_of_layer == NULL || side->traffic == NULL || side->rank_load == NULL ||
        side->homes == NULL) {
        return NEP_ERR_NO_MEMORY;
    }
    enum nep_status status = is_plain
                                 ? nep_homes_random(&r->all, &r->shape, args->seed, side->homes)
                                 : nep_homes_predict(&r->all, side->map, side->homes);
    const struct nep_score_details details = {side->remote_of_layer, side->traffic,
                                              side->rank_load};
    return status == NEP_OK ? nep_score_map(&r->all, side->map, side->homes, &side->score, &details)
                            : status;
}

static void side_fini(struct side *side)
{
    free(side->remote_of_layer);
    free(side->traffic);
    free(side->rank_load);
    free(side->homes);
}

static enum nep_status make_report(struct report *r, const struct place_args *args)
{
    enum nep_status status = score_side(r, args, &r->before, args->before == NULL);
    if (status == NEP_OK) {
        status = score_side(r, args, &r->after, false);
    }
    return status == NEP_OK ? write_page(r, args) : status;
}

int place_report(struct place_args *args)
{
    struct nep_trace *trace = NULL;
    struct nep_map *after = NULL;
    struct nep_map *before = NULL;
    struct report r = {0};
    enum nep_status status = nep_trace_open(args->trace, &trace);
    if (status == NEP_OK) {
        status = nep_map_load(args->map, &after);
    }
    if (status == NEP_OK) {
        status = nep_trace_match(trace, after);
    }
    if (status == NEP_OK) {
        nep_map_get_shape(after, &r.shape);
        struct nep_map_shape plain = r.shape;
        plain.slots_per_rank = 0;
        status = args->before == NULL ? nep_map_contiguous(&plain, &before)
                                      : nep_map_load(args->before, &before);
    }
    if (status == NEP_OK && (before->shape.num_nodes != r.shape.num_nodes ||
                             before->shape.num_ranks != r.shape.num_ranks)) {
        nep_map_destroy(after);
        nep_map_destroy(before);
        nep_trace_close(trace);
        return place_error(PLACE_UNUSABLE, "%s and %s have other numbers of nodes or ranks",
                           args->before, args->map);
    }
    int rc = PLACE_GO_ON;
    if (status == NEP_OK) {
        r.all = nep_requests_all(trace);
        r.before =
            (struct side){.name = args->before != NULL ? args->before : "contiguous, random homes",
                          .map = before};
        r.after = (struct side){.name = args->map, .map = after};
        static struct nep_out_file file;
        status = nep_out_file_open(&file, args->output);
        if (status == NEP_OK) {
            r.file = file.file;
            status = make_report(&r, args);
        }
        if (status != NEP_OK) {
            nep_out_file_drop(&file);
        } else if (nep_out_file_commit(&file) != NEP_OK) {
            rc = place_error(PLACE_FAILED, "%s", nep_last_message());
        }
    }
    if (rc == PLACE_GO_ON && status == NEP_OK) {
        fprintf(args->out, "%s\n", args->output);
        json_text(&args->json, "report", args->output);
        json_double(&args->json, "remote_before", r.before.score.remote_nodes_per_token);
        json_double(&args->json, "remote_after", r.after.score.remote_nodes_per_token);
        rc = PLACE_FINE;
    }
    side_fini(&r.before);
    side_fini(&r.after);
    nep_map_destroy(after);
    nep_map_destroy(before);
    nep_trace_close(trace);
    return rc == PLACE_GO_ON ? place_failed(status, "report") : rc;
}
