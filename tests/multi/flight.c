/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One handle from send to complete, everything checked. Outputs are filled with ones before each
 * operation (NaN in every payload type), so that an element nobody wrote cannot pass.
 */
#include "tests/multi/flight.h"

#include <stdlib.h>
#include <string.h>

#include "placement/placement.h"

struct sizes {
    size_t x;
    size_t rows;
    size_t expert;
    size_t y;
};

static struct sizes sizes_of(const struct nep_multi_world *world)
{
    const struct nep_multi_shape *shape = &world->shape;
    size_t payload = (size_t)shape->hidden * nep_ref_dtype_bytes(shape->dtype);
    return (struct sizes){shape->max_tokens * payload,
                          world->capacity * shape->hidden * nep_ref_dtype_bytes(shape->wire),
                          world->capacity * payload, shape->max_tokens * payload};
}

uint64_t nep_multi_flight_bytes(const struct nep_multi_world *world)
{
    struct sizes sizes = sizes_of(world);
    return world->shape.is_private ? 0 : sizes.x + sizes.rows + sizes.expert + sizes.y + 8 * 4096;
}

static void *tensor(struct nep_multi_world *world, size_t bytes)
{
    void *buffer = NULL;
    if (world->shape.is_private) {
        return malloc(bytes + 1);
    }
    return nep_buffer_alloc(world->ep, bytes + 1, &buffer) == NEP_OK ? buffer : NULL;
}

static void tensor_free(struct nep_multi_world *world, void *buffer)
{
    if (world->shape.is_private) {
        free(buffer);
    } else if (buffer != NULL) {
        nep_buffer_free(world->ep, buffer);
    }
}

static bool create_rows(struct nep_multi_world *world, struct nep_multi_flight *flight)
{
    const struct nep_multi_shape *shape = &world->shape;
    uint64_t rows = world->capacity + 1;
    bool is_rank = shape->layout == NEP_LAYOUT_RANK;
    struct nep_rows *out = &flight->rows;
    *out = (struct nep_rows){.size = sizeof(*out), .capacity = world->capacity};
    out->x = tensor(world, sizes_of(world).rows);
    out->topk_weights = calloc(rows * (is_rank ? shape->top_k : 1), sizeof(float));
    out->topk_slots = is_rank ? calloc(rows * shape->top_k, sizeof(int32_t)) : NULL;
    out->source_rank = calloc(rows, sizeof(uint32_t));
    out->source_token = calloc(rows, sizeof(uint32_t));
    bool has_scales = shape->wire == NEP_DTYPE_FP8_E4M3;
    out->scales = has_scales ? calloc(rows * ((shape->hidden + 127) / 128), sizeof(float)) : NULL;
    return out->x != NULL && out->topk_weights != NULL && (!is_rank || out->topk_slots != NULL) &&
           out->source_rank != NULL && out->source_token != NULL &&
           (!has_scales || out->scales != NULL);
}

static bool create_group(struct nep_multi_world *world, struct nep_multi_flight *flight)
{
    uint32_t ranks = world->rank->num_ranks;
    size_t pairs = (size_t)world->shape.max_tokens * world->shape.top_k + 1;
    flight->group_tokens = calloc(ranks, sizeof(uint32_t));
    flight->slots = calloc(ranks, sizeof(uint32_t *));
    flight->group_weights = calloc(ranks, sizeof(float *));
    bool is_complete =
        flight->group_tokens != NULL && flight->slots != NULL && flight->group_weights != NULL;
    for (uint32_t r = 0; r < ranks && is_complete; r++) {
        flight->slots[r] = calloc(pairs, sizeof(uint32_t));
        flight->group_weights[r] = calloc(pairs, sizeof(float));
        is_complete = flight->slots[r] != NULL && flight->group_weights[r] != NULL;
    }
    return is_complete;
}

static void group_row(void *ctx, uint32_t rank, uint32_t token, void *row)
{
    const struct nep_multi_flight *flight = ctx;
    const struct nep_multi_shape *shape = &flight->world->shape;
    uint64_t key = nep_ref_mix(nep_ref_mix(shape->seed, flight->content), rank);
    nep_ref_gen_row(nep_ref_mix(key, token), shape->is_wild, shape->dtype, shape->hidden, row);
}

bool nep_multi_flight_create(struct nep_multi_world *world, struct nep_multi_flight *flight)
{
    const struct nep_multi_shape *shape = &world->shape;
    struct sizes sizes = sizes_of(world);
    size_t pairs = (size_t)shape->max_tokens * shape->top_k + 1;
    flight->world = world;
    if (nep_handle_create(world->ep, &flight->handle) != NEP_OK) {
        return nep_multi_fail(world->rank, "nep_handle_create: %s", nep_last_message());
    }
    flight->x = tensor(world, sizes.x);
    flight->y = tensor(world, sizes.y);
    flight->expert = tensor(world, sizes.expert);
    flight->ids = calloc(pairs, sizeof(int32_t));
    flight->ids64 = calloc(pairs, sizeof(int64_t));
    flight->weights = calloc(pairs, sizeof(float));
    if (!create_rows(world, flight) || !create_group(world, flight) || flight->x == NULL ||
        flight->y == NULL || flight->expert == NULL || flight->ids == NULL ||
        flight->ids64 == NULL || flight->weights == NULL) {
        return nep_multi_fail(world->rank, "out of memory, or nep_buffer_alloc: %s",
                              nep_last_message());
    }
    flight->group = (struct nep_ref_group){
        .num_ranks = world->rank->num_ranks,
        .num_nodes = world->topology.num_nodes,
        .node_of_rank = world->topology.node_of_rank,
        .slots_per_rank = world->slots_per_rank,
        .top_k = shape->top_k,
        .hidden = shape->hidden,
        .max_tokens = shape->max_tokens,
        .expert_alignment = shape->alignment,
        .dtype = shape->dtype,
        .wire = shape->wire,
        .layout = shape->layout,
        .num_tokens = flight->group_tokens,
        .slots = (const uint32_t *const *)flight->slots,
        .weights = shape->is_unweighted ? NULL : (const float *const *)flight->group_weights,
        .x_row = group_row,
        .x_ctx = flight,
        .factor = world->factor};
    return true;
}

void nep_multi_flight_destroy(struct nep_multi_world *world, struct nep_multi_flight *flight)
{
    nep_handle_destroy(flight->handle);
    tensor_free(world, flight->x);
    tensor_free(world, flight->y);
    tensor_free(world, flight->expert);
    tensor_free(world, flight->rows.x);
    free(flight->rows.topk_weights);
    free(flight->rows.topk_slots);
    free(flight->rows.source_rank);
    free(flight->rows.source_token);
    free(flight->rows.scales);
    free(flight->ids);
    free(flight->ids64);
    free(flight->weights);
    for (uint32_t r = 0;
         r < world->rank->num_ranks && flight->slots != NULL && flight->group_weights != NULL;
         r++) {
        free(flight->slots[r]);
        free(flight->group_weights[r]);
    }
    free(flight->slots);
    free(flight->group_weights);
    free(flight->group_tokens);
}

/* Ids of one token: distinct, one in eight unused, now and then all unused. */
static void draw_token(const struct nep_multi_shape *shape, struct nep_ref_rng *rng, int32_t *ids)
{
    bool is_empty = nep_ref_rng_below(rng, 32) == 0;
    for (uint32_t k = 0; k < shape->top_k; k++) {
        ids[k] = -1;
        if (is_empty || nep_ref_rng_below(rng, 8) == 0) {
            continue;
        }
        int32_t id = (int32_t)nep_ref_rng_below(rng, shape->experts);
        for (uint32_t tries = 0; tries < shape->experts; tries++) {
            uint32_t j = 0;
            while (j < k && ids[j] != id) {
                j++;
            }
            if (j == k) {
                ids[k] = id;
                break;
            }
            id = (id + 1) % (int32_t)shape->experts;
        }
    }
}

/* Everything of rank `rank` in dispatch `number`; returns T. */
static uint32_t draw_rank(const struct nep_multi_world *world, uint64_t number, uint32_t rank,
                          int32_t *ids, float *weights)
{
    const struct nep_multi_shape *shape = &world->shape;
    struct nep_ref_rng rng = {nep_ref_mix(nep_ref_mix(shape->seed, number), rank)};
    uint32_t tokens = shape->max_tokens;
    tokens = number < shape->num_calm && tokens > 20 ? 20 : tokens;
    if (!shape->is_fixed_tokens) {
        tokens = nep_ref_rng_below(&rng, 4) == 0 ? 0 : nep_ref_rng_below(&rng, tokens + 1);
    }
    for (uint32_t t = 0; t < tokens; t++) {
        draw_token(shape, &rng, ids + (size_t)t * shape->top_k);
        for (uint32_t k = 0; k < shape->top_k; k++) {
            weights[(size_t)t * shape->top_k + k] = (float)nep_ref_rng_unit(&rng);
        }
    }
    return tokens;
}

static void choose_slots(const struct nep_multi_world *world, uint32_t rank, uint32_t tokens,
                         const int32_t *ids, uint32_t *slots)
{
    uint32_t k = world->shape.top_k;
    struct nep_copies copies;
    bool has_map = world->map != NULL && nep_map_copies(world->map, 0, &copies) == NEP_OK;
    for (uint32_t t = 0; t < tokens; t++) {
        if (has_map) {
            nep_choose(&copies, rank, t, ids + (size_t)t * k, k, slots + (size_t)t * k);
            continue;
        }
        for (uint32_t i = 0; i < k; i++) {
            int32_t id = ids[(size_t)t * k + i];
            slots[(size_t)t * k + i] = id < 0 ? NEP_REF_NONE : (uint32_t)id;
        }
    }
}

/* ids of the own rank come last, so that flight->ids holds them. */
static void draw_group(struct nep_multi_world *world, struct nep_multi_flight *flight)
{
    uint32_t ranks = world->rank->num_ranks;
    for (uint32_t i = 1; i <= ranks; i++) {
        uint32_t r = (world->rank->rank + i) % ranks;
        flight->group_tokens[r] =
            draw_rank(world, flight->number, r, flight->ids, flight->group_weights[r]);
        choose_slots(world, r, flight->group_tokens[r], flight->ids, flight->slots[r]);
    }
    uint32_t me = world->rank->rank;
    flight->num_tokens = flight->group_tokens[me];
    memcpy(flight->weights, flight->group_weights[me],
           (size_t)flight->num_tokens * world->shape.top_k * sizeof(float));
}

bool nep_multi_dispatch_send(struct nep_multi_world *world, struct nep_multi_flight *flight,
                             uint64_t number, bool cached)
{
    struct sizes sizes = sizes_of(world);
    flight->content = number;
    if (!cached) {
        flight->number = number;
        draw_group(world, flight);
    }
    flight->group.weights = /* a late combine has set others */
        world->shape.is_unweighted ? NULL : (const float *const *)flight->group_weights;
    for (uint32_t t = 0; t < flight->num_tokens; t++) {
        size_t payload = sizes.x / world->shape.max_tokens;
        group_row(flight, world->rank->rank, t, (char *)flight->x + t * payload);
    }
    memset(flight->rows.x, 0xff, sizes.rows);
    memset(flight->rows.source_rank, 0xff, world->capacity * sizeof(uint32_t));
    memset(flight->rows.source_token, 0xff, world->capacity * sizeof(uint32_t));
    for (size_t i = 0; i < (size_t)flight->num_tokens * world->shape.top_k; i++) {
        flight->ids64[i] = flight->ids[i];
    }
    const void *ids = world->shape.is_int64 ? (const void *)flight->ids64 : flight->ids;
    struct nep_tokens in = {.size = sizeof(in),
                            .num_tokens = flight->num_tokens,
                            .x = flight->x,
                            .topk_ids = cached ? NULL : ids,
                            .id_type = world->shape.is_int64 ? NEP_IDS_INT64 : NEP_IDS_INT32,
                            .topk_weights = world->shape.is_unweighted ? NULL : flight->weights};
    if (nep_dispatch_send(world->ep, flight->handle, &in, NULL) != NEP_OK) {
        return nep_multi_fail(world->rank, "nep_dispatch_send: %s", nep_last_message());
    }
    nep_ref_traffic_add(&flight->group, world->rank->rank, &world->traffic);
    flight->state = NEP_FLIGHT_OUT;
    flight->sent = ++world->num_sent;
    return true;
}

bool nep_multi_dispatch_recv(struct nep_multi_world *world, struct nep_multi_flight *flight)
{
    uint32_t me = world->rank->rank;
    flight->counts.size = sizeof(flight->counts);
    if (nep_dispatch_counts(world->ep, flight->handle, &flight->counts) != NEP_OK ||
        nep_dispatch_recv(world->ep, flight->handle, &flight->rows, NULL) != NEP_OK) {
        return nep_multi_fail(world->rank, "nep_dispatch_recv: %s", nep_last_message());
    }
    struct nep_ref_rows want;
    struct nep_ref_report report = {0};
    if (!nep_ref_rows_build(&flight->group, me, &want)) {
        return nep_multi_fail(world->rank, "out of memory for the oracle");
    }
    nep_ref_check_counts(&flight->group, &want, &flight->counts, &report);
    nep_ref_check_dispatch(&flight->group, me, &want, &flight->rows, &report);
    nep_ref_rows_free(&want);
    flight->state = NEP_FLIGHT_HERE;
    world->num_ops++;
    world->elements += report.elements;
    return report.wrong == 0 ||
           nep_multi_fail(world->rank, "dispatch %llu (seed %llu, %s): %llu wrong: %s",
                          (unsigned long long)flight->content,
                          (unsigned long long)world->shape.seed, world->shape.name,
                          (unsigned long long)report.wrong, report.first);
}

/* New weights for all ranks' tokens, which the combine alone brings. */
static void draw_late_weights(const struct nep_multi_world *world, struct nep_multi_flight *flight)
{
    for (uint32_t r = 0; r < world->rank->num_ranks; r++) {
        size_t pairs = (size_t)flight->group_tokens[r] * world->shape.top_k;
        struct nep_ref_rng rng = {
            nep_ref_mix(nep_ref_mix(world->shape.seed + 1, flight->content), r)};
        for (size_t i = 0; i < pairs; i++) {
            flight->group_weights[r][i] = (float)nep_ref_rng_unit(&rng) - 0.25f;
        }
        if (r == world->rank->rank) {
            memcpy(flight->weights, flight->group_weights[r], pairs * sizeof(float));
        }
    }
    flight->group.weights = (const float *const *)flight->group_weights;
}

bool nep_multi_combine_send(struct nep_multi_world *world, struct nep_multi_flight *flight)
{
    memset(flight->expert, 0xff, sizes_of(world).expert);
    memset(flight->y, 0xff, sizes_of(world).y);
    if (!nep_ref_expert_apply(&flight->group, world->rank->rank, &flight->counts, &flight->rows,
                              flight->expert)) {
        return nep_multi_fail(world->rank, "out of memory for the expert");
    }
    struct nep_expert_rows in = {.size = sizeof(in), .y = flight->expert};
    if (world->shape.is_late) {
        draw_late_weights(world, flight);
        in.token_weights = flight->weights;
    }
    if (nep_combine_send(world->ep, flight->handle, &in, NULL) != NEP_OK) {
        return nep_multi_fail(world->rank, "nep_combine_send: %s", nep_last_message());
    }
    flight->state = NEP_FLIGHT_BACK;
    flight->sent = ++world->num_sent;
    return true;
}

bool nep_multi_combine_recv(struct nep_multi_world *world, struct nep_multi_flight *flight)
{
    struct nep_tokens_out out = {
        .size = sizeof(out), .num_tokens = flight->num_tokens, .y = flight->y};
    if (nep_combine_recv(world->ep, flight->handle, &out, NULL) != NEP_OK) {
        return nep_multi_fail(world->rank, "nep_combine_recv: %s", nep_last_message());
    }
    struct nep_ref_report report = {0};
    nep_ref_check_combine(&flight->group, world->rank->rank, flight->y, &report);
    flight->state = NEP_FLIGHT_IDLE;
    world->num_ops++;
    world->elements += report.elements;
    return report.wrong == 0 ||
           nep_multi_fail(world->rank, "combine %llu (seed %llu, %s): %llu wrong: %s",
                          (unsigned long long)flight->content,
                          (unsigned long long)world->shape.seed, world->shape.name,
                          (unsigned long long)report.wrong, report.first);
}

static bool is_outstanding(const struct nep_multi_flight *flight)
{
    return flight->state == NEP_FLIGHT_OUT || flight->state == NEP_FLIGHT_BACK;
}

static struct nep_multi_flight *oldest(struct nep_multi_world *world)
{
    struct nep_multi_flight *found = NULL;
    for (uint32_t f = 0; f < world->num_flights; f++) {
        struct nep_multi_flight *flight = &world->flights[f];
        if (is_outstanding(flight) && (found == NULL || flight->sent < found->sent)) {
            found = flight;
        }
    }
    return found;
}

bool nep_multi_complete(struct nep_multi_world *world, struct nep_multi_flight *flight)
{
    while (is_outstanding(flight)) {
        struct nep_multi_flight *first = oldest(world);
        bool is_fine = first->state == NEP_FLIGHT_OUT ? nep_multi_dispatch_recv(world, first)
                                                      : nep_multi_combine_recv(world, first);
        if (!is_fine) {
            return false;
        }
    }
    return true;
}
