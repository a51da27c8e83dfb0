/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The schedule is a list of tokens per rank, in the order of requests. Everything else is
 * arithmetic on the iteration's number, so that any iteration of any rank can be computed alone and
 * nep-perf's processes agree without talking.
 */
#include "placement/schedule.h"

#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "placement/map.h"

struct nep_schedule {
    const struct nep_trace *trace;
    uint32_t num_ranks;
    uint32_t top_k;
    uint32_t num_layers;
    int layer;
    uint64_t *begin;  /* [num_ranks + 1] into tokens */
    uint64_t *tokens; /* of the trace */
};

/* The rank where each request enters; counts tokens per rank in begin[rank + 1]. */
static enum nep_status enter(struct nep_schedule *s, const struct nep_requests *requests,
                             const uint32_t *homes, const struct nep_map_shape *shape,
                             uint32_t *rank_of)
{
    uint32_t *next = calloc(2 * (size_t)shape->num_nodes, sizeof *next);
    if (next == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "schedule: no memory for %u nodes", shape->num_nodes);
    }
    uint32_t *first_rank = next + shape->num_nodes;
    for (uint32_t n = 1; n < shape->num_nodes; n++) {
        first_rank[n] = first_rank[n - 1] + shape->ranks_per_node[n - 1];
    }
    enum nep_status status = NEP_OK;
    for (uint32_t i = 0; i < requests->num; i++) {
        uint32_t request = nep_requests_at(requests, i);
        if (homes[i] >= shape->num_nodes || nep_trace_request_at(s->trace, request) == NULL) {
            status = nep_fail(NEP_ERR_INVALID, "schedule: request %u, home %u of %u nodes", request,
                              homes[i], shape->num_nodes);
            break;
        }
        uint64_t first;
        uint64_t count;
        nep_trace_scored(s->trace, request, &first, &count);
        uint32_t home = homes[i];
        rank_of[i] = first_rank[home] + next[home];
        next[home] = (next[home] + 1) % shape->ranks_per_node[home];
        s->begin[rank_of[i] + 1] += count;
    }
    free(next);
    return status;
}

static enum nep_status fill(struct nep_schedule *s, const struct nep_requests *requests,
                            const uint32_t *rank_of)
{
    for (uint32_t r = 0; r < s->num_ranks; r++) {
        s->begin[r + 1] += s->begin[r];
    }
    s->tokens = malloc((s->begin[s->num_ranks] + 1) * sizeof *s->tokens);
    uint64_t *at = malloc(s->num_ranks * sizeof *at);
    if (s->tokens == NULL || at == NULL) {
        free(at);
        return nep_fail(NEP_ERR_NO_MEMORY, "schedule: no memory for %llu tokens",
                        (unsigned long long)s->begin[s->num_ranks]);
    }
    memcpy(at, s->begin, s->num_ranks * sizeof *at);
    for (uint32_t i = 0; i < requests->num; i++) {
        uint64_t first;
        uint64_t count;
        nep_trace_scored(s->trace, nep_requests_at(requests, i), &first, &count);
        for (uint64_t t = 0; t < count; t++) {
            s->tokens[at[rank_of[i]]++] = first + t;
        }
    }
    free(at);
    return NEP_OK;
}

enum nep_status nep_schedule_create(const struct nep_requests *requests, const uint32_t *homes,
                                    const struct nep_map_shape *shape, int layer,
                                    struct nep_schedule **schedule_p)
{
    const struct nep_trace *trace = requests->trace;
    if (layer != NEP_SCHEDULE_ALL_LAYERS &&
        (layer < 0 || (uint32_t)layer >= nep_trace_num_layers(trace))) {
        return nep_fail(NEP_ERR_INVALID, "schedule: layer %d, the trace has %u", layer,
                        nep_trace_num_layers(trace));
    }
    struct nep_map_shape checked = *shape;
    enum nep_status status = nep_map_check_shape(&checked);
    if (status != NEP_OK) {
        return status;
    }
    struct nep_schedule *s = calloc(1, sizeof *s);
    uint32_t *rank_of = malloc(((size_t)requests->num + 1) * sizeof *rank_of);
    if (s == NULL || rank_of == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "schedule: no memory");
        goto out;
    }
    *s = (struct nep_schedule){
        .trace = trace,
        .num_ranks = checked.num_ranks,
        .top_k = nep_trace_top_k(trace),
        .num_layers = nep_trace_num_layers(trace),
        .layer = layer,
        .begin = calloc((size_t)checked.num_ranks + 1, sizeof *s->begin),
    };
    if (s->begin == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "schedule: no memory");
        goto out;
    }
    status = enter(s, requests, homes, &checked, rank_of);
    if (status == NEP_OK) {
        status = fill(s, requests, rank_of);
    }
out:
    free(rank_of);
    if (status != NEP_OK) {
        nep_schedule_destroy(s);
        return status;
    }
    *schedule_p = s;
    return NEP_OK;
}

void nep_schedule_destroy(struct nep_schedule *schedule)
{
    if (schedule == NULL) {
        return;
    }
    free(schedule->begin);
    free(schedule->tokens);
    free(schedule);
}

uint64_t nep_schedule_length(const struct nep_schedule *schedule, uint32_t rank)
{
    return rank < schedule->num_ranks ? schedule->begin[rank + 1] - schedule->begin[rank] : 0;
}

uint32_t nep_schedule_layer(const struct nep_schedule *schedule, uint64_t iteration)
{
    return schedule->layer >= 0 ? (uint32_t)schedule->layer
                                : (uint32_t)(iteration % schedule->num_layers);
}

uint32_t nep_schedule_ids(const struct nep_schedule *schedule, uint32_t rank, uint64_t iteration,
                          uint32_t num_tokens, int32_t *ids)
{
    uint64_t length = nep_schedule_length(schedule, rank);
    if (length == 0) {
        return 0;
    }
    const uint64_t *tokens = &schedule->tokens[schedule->begin[rank]];
    uint32_t layer = nep_schedule_layer(schedule, iteration);
    uint64_t at = (iteration % length) * num_tokens % length;
    for (uint32_t t = 0; t < num_tokens; t++) {
        nep_trace_ids(schedule->trace, tokens[at], layer, &ids[(size_t)t * schedule->top_k]);
        at = at + 1 == length ? 0 : at + 1;
    }
    return num_tokens;
}

static uint32_t token_rows(const struct nep_copies *copies, uint32_t rank, uint32_t token,
                           const int32_t *ids, uint32_t top_k)
{
    uint32_t slots[NEP_TRACE_TOP_K_LIMIT];
    uint32_t seen[NEP_TRACE_TOP_K_LIMIT];
    uint32_t num = 0;
    nep_choose(copies, rank, token, ids, top_k, slots);
    for (uint32_t k = 0; k < top_k; k++) {
        if (slots[k] == NEP_SLOT_NONE) {
            continue;
        }
        uint32_t node = copies->node_of_rank[slots[k] / copies->slots_per_rank];
        uint32_t i = 0;
        while (i < num && seen[i] != node) {
            i++;
        }
        if (i == num && node != copies->node_of_rank[rank]) {
            seen[num++] = node;
        }
    }
    return num;
}

enum nep_status nep_schedule_remote_rows(const struct nep_schedule *schedule,
                                         const struct nep_map *map, uint32_t num_tokens,
                                         uint64_t first_iteration, uint64_t num_iterations,
                                         uint64_t *rows_p)
{
    enum nep_status status = nep_trace_match(schedule->trace, map);
    if (status == NEP_OK && map->shape.num_ranks != schedule->num_ranks) {
        status = nep_fail(NEP_ERR_MISMATCH, "schedule: made for %u ranks, the map has %u",
                          schedule->num_ranks, map->shape.num_ranks);
    }
    if (status != NEP_OK) {
        return status;
    }
    int32_t *ids = malloc(((size_t)num_tokens * schedule->top_k + 1) * sizeof *ids);
    if (ids == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "schedule: no memory for %u tokens", num_tokens);
    }
    uint64_t rows = 0;
    for (uint64_t i = first_iteration; i < first_iteration + num_iterations; i++) {
        struct nep_copies copies;
        nep_map_copies(map, nep_schedule_layer(schedule, i), &copies);
        for (uint32_t rank = 0; rank < schedule->num_ranks; rank++) {
            uint32_t num = nep_schedule_ids(schedule, rank, i, num_tokens, ids);
            for (uint32_t t = 0; t < num; t++) {
                rows += token_rows(&copies, rank, t, &ids[(size_t)t * schedule->top_k],
                                   schedule->top_k);
            }
        }
    }
    free(ids);
    *rows_p = rows;
    return NEP_OK;
}
