/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every rank knows every rank's inputs, because all come from a key; so each checks its own outputs
 * alone. A window: control words, x, its scales, the outputs of dispatch, the expert outputs.
 */
#include "tests/gpu/gpu_case.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch/host/kernels.h"

enum { POISON = 0xee };

static uint64_t line_up(uint64_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

static void *host(uint64_t bytes)
{
    void *memory = calloc(1, bytes + 1);
    gpu_must(memory == NULL, "host memory");
    return memory;
}

static void *device(struct gpu_case *c, uint64_t bytes)
{
    void *memory = NULL;
    gpu_must((int)cudaMalloc(&memory, bytes + 64), "device memory");
    gpu_must((int)cudaMemset(memory, 0, bytes + 64), "device memory");
    c->memory[c->num_memory++] = memory;
    return memory;
}

static void *device_copy(struct gpu_case *c, const void *from, uint64_t bytes)
{
    void *memory = device(c, bytes);
    gpu_must((int)cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice), "copy");
    return memory;
}

static void fetch(struct gpu_case *c, void *to, const void *from, uint64_t bytes)
{
    gpu_must((int)cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, c->world->stream),
             "fetch");
    gpu_must((int)cudaStreamSynchronize(c->world->stream), "fetch");
}

static void put(struct gpu_case *c, void *to, const void *from, uint64_t bytes)
{
    gpu_must((int)cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, c->world->stream),
             "put");
    gpu_must((int)cudaStreamSynchronize(c->world->stream), "put");
}

static bool gpu_is_fixed(enum nep_layout layout)
{
    return layout == NEP_LAYOUT_EXPERT_PADDED || layout == NEP_LAYOUT_EXPERT_FRONT;
}

struct gpu_shape gpu_shape_random(uint64_t key, uint32_t num_ranks)
{
    struct nep_ref_rng rng = {key};
    const enum nep_layout layouts[] = {NEP_LAYOUT_RANK, NEP_LAYOUT_EXPERT_PACKED,
                                       NEP_LAYOUT_EXPERT_PADDED, NEP_LAYOUT_EXPERT_FRONT};
    const enum nep_dtype dtypes[] = {NEP_DTYPE_BF16, NEP_DTYPE_FP16, NEP_DTYPE_FP32};
    const uint32_t alignments[] = {0, 1, 8, 128};
    struct gpu_shape s = {.key = nep_ref_rng_next(&rng), .num_ranks = num_ranks};
    s.slots_per_rank = 1 + nep_ref_rng_below(&rng, nep_ref_rng_below(&rng, 2) ? 40 : 6);
    uint32_t num_slots = s.slots_per_rank * num_ranks;
    s.num_experts = nep_ref_rng_below(&rng, 2) ? num_slots : 1 + nep_ref_rng_below(&rng, num_slots);
    s.top_k = 1 + nep_ref_rng_below(&rng, nep_ref_rng_below(&rng, 2) ? 32 : 9);
    s.layout = layouts[nep_ref_rng_below(&rng, 4)];
    if (gpu_is_fixed(s.layout) && s.top_k > s.num_experts) {
        s.top_k = s.num_experts;
    }
    s.hidden = 16 * (1 + nep_ref_rng_below(&rng, nep_ref_rng_below(&rng, 4) ? 64 : 460));
    s.max_tokens = 1 + nep_ref_rng_below(&rng, nep_ref_rng_below(&rng, 2) ? 300 : 20);
    s.alignment = alignments[nep_ref_rng_below(&rng, 4)];
    s.num_sms = 1 + nep_ref_rng_below(&rng, 16);
    s.dtype = dtypes[nep_ref_rng_below(&rng, 3)];
    s.wire = nep_ref_rng_below(&rng, 2) ? NEP_DTYPE_FP8_E4M3 : s.dtype;
    s.scale = (enum nep_scale)nep_ref_rng_below(&rng, 3);
    s.is_cast_before = s.wire != s.dtype && nep_ref_rng_below(&rng, 3) == 0;
    s.is_wild = nep_ref_rng_below(&rng, 2);
    s.has_weights = nep_ref_rng_below(&rng, 4) != 0;
    s.is_int64 = nep_ref_rng_below(&rng, 2);
    s.is_graph = nep_ref_rng_below(&rng, 2);
    return s;
}

void gpu_shape_print(const struct gpu_shape *s)
{
    printf("key %llx: %u ranks, %u SMs, L %u, E %u, K %u, H %u, M %u, align %u, layout %d, type %d "
           "wire %d scale %d%s%s%s%s%s\n",
           (unsigned long long)s->key, s->num_ranks, s->num_sms, s->slots_per_rank, s->num_experts,
           s->top_k, s->hidden, s->max_tokens, s->alignment, (int)s->layout, (int)s->dtype,
           (int)s->wire, (int)s->scale, s->is_cast_before ? " cast-before" : "",
           s->is_wild ? " wild" : "", s->has_weights ? " weights" : "", s->is_int64 ? " int64" : "",
           s->is_graph ? " graph" : "");
}

static uint64_t capacity_of(const struct gpu_shape *s)
{
    uint64_t pairs = (uint64_t)s->num_ranks * s->max_tokens;
    if (s->layout == NEP_LAYOUT_RANK) {
        return pairs;
    }
    if (gpu_is_fixed(s->layout)) {
        return pairs * s->slots_per_rank;
    }
    return pairs * s->top_k + (uint64_t)s->slots_per_rank * (s->alignment + 1);
}

static uint64_t y_row_bytes(const struct gpu_shape *s)
{
    return (uint64_t)s->hidden * nep_ref_dtype_bytes(s->dtype);
}

/* Lays out a window; fills c where it is not NULL. */
static uint64_t plan(const struct gpu_shape *s, struct gpu_case *c)
{
    uint64_t rows = capacity_of(s);
    uint64_t scales = nep_scales_row_bytes(s->hidden, s->scale);
    uint64_t at = nep_cuda_words_plan(s->num_ranks, s->slots_per_rank).bytes;
    uint64_t x = at;
    at = line_up(at + s->max_tokens * y_row_bytes(s));
    uint64_t in_scales = at;
    at = line_up(at + s->max_tokens * scales);
    struct nep_cuda_output out = {.capacity = rows};
    out.x = at;
    at = line_up(at + rows * y_row_bytes(s));
    out.scales = at;
    at = line_up(at + rows * scales);
    uint64_t *const beside[] = {&out.topk_slots, &out.topk_weights, &out.source_rank,
                                &out.source_token};
    for (uint32_t i = 0; i < 4; i++) {
        *beside[i] = at;
        at = line_up(at + rows * 4 * (i < 2 ? s->top_k : 1));
    }
    if (c != NULL) {
        c->x_offset = x;
        c->in_scales_offset = in_scales;
        c->y_offset = at;
        c->out = out;
        c->rows_capacity = rows;
    }
    return line_up(at + rows * y_row_bytes(s));
}

uint64_t gpu_shape_window_bytes(const struct gpu_shape *shape)
{
    return plan(shape, NULL);
}

/* What the caller's row is made of. */
void gpu_case_x_row(void *ctx, uint32_t rank, uint32_t token, void *row)
{
    const struct gpu_case *c = ctx;
    uint64_t key = nep_ref_mix(c->shape.key, (uint64_t)rank << 32 | token);
    nep_ref_gen_row(key, c->shape.is_wild, c->shape.dtype, c->shape.hidden, row);
}

/* Row as it travels: payload and scales. */
static void wire_row(struct gpu_case *c, const struct nep_kernels *kernels, uint32_t rank,
                     uint32_t token, void *raw, void *payload, void *scales)
{
    gpu_case_x_row(c, rank, token, raw);
    if (c->shape.wire == c->shape.dtype) {
        memcpy(payload, raw, y_row_bytes(&c->shape));
    } else {
        kernels->cast_fp8(payload, scales, raw, c->shape.dtype, c->shape.hidden, c->shape.scale);
    }
}

static const struct nep_kernels *host_kernels(void)
{
    const struct nep_kernels *kernels = NULL;
    gpu_must(nep_kernels_select("auto", &kernels) != NEP_OK, "host kernels");
    return kernels;
}

static void upload_x(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    const struct nep_kernels *kernels = host_kernels();
    uint64_t scales = nep_scales_row_bytes(s->hidden, s->scale);
    uint64_t stride = s->is_cast_before ? s->hidden : y_row_bytes(s);
    char *rows = host(s->max_tokens * stride);
    char *all_scales = host(s->max_tokens * scales);
    char *raw = host(y_row_bytes(s));
    for (uint32_t t = 0; t < s->max_tokens; t++) {
        if (s->is_cast_before) {
            wire_row(c, kernels, c->world->rank, t, raw, rows + t * stride,
                     all_scales + t * scales);
        } else {
            gpu_case_x_row(c, c->world->rank, t, rows + t * stride);
        }
    }
    char *window = c->world->base + c->world->rank * c->world->stride;
    put(c, window + c->x_offset, rows, s->max_tokens * stride);
    put(c, window + c->in_scales_offset, all_scales, s->max_tokens * scales);
    free(rows);
    free(all_scales);
    free(raw);
}

/* Every expert has a copy; the other slots are copies of experts drawn. */
static void make_copies(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    struct nep_ref_rng rng = {nep_ref_mix(s->key, 1)};
    uint32_t num_slots = s->slots_per_rank * s->num_ranks;
    uint32_t *expert = host(num_slots * sizeof *expert);
    c->copy_begin = host((s->num_experts + 1) * sizeof(uint32_t));
    c->copy_slot = host(num_slots * sizeof(uint32_t));
    c->copy_node = host(num_slots * sizeof(uint32_t));
    c->copy_weight = host(num_slots * sizeof(uint16_t));
    c->node_of_rank = host(s->num_ranks * sizeof(uint32_t));
    for (uint32_t i = 0; i < num_slots; i++) {
        expert[i] = i < s->num_experts ? i : nep_ref_rng_below(&rng, s->num_experts);
    }
    for (uint32_t i = num_slots; !s->is_full && i > 1; i--) {
        uint32_t j = nep_ref_rng_below(&rng, i);
        uint32_t swap = expert[j];
        expert[j] = expert[i - 1];
        expert[i - 1] = swap;
    }
    uint32_t num = 0;
    for (uint32_t e = 0; e < s->num_experts; e++) {
        c->copy_begin[e] = num;
        for (uint32_t i = 0; i < num_slots; i++) {
            if (expert[i] == e) {
                c->copy_weight[num] = (uint16_t)(1 + nep_ref_rng_below(&rng, 65535));
                c->copy_slot[num++] = i;
            }
        }
    }
    c->copy_begin[s->num_experts] = num;
    free(expert);
}

static struct nep_copies host_copies(const struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    return (struct nep_copies){
        .num_experts = s->num_experts,
        .num_ranks = s->num_ranks,
        .num_nodes = 1,
        .slots_per_rank = s->slots_per_rank,
        .begin = c->copy_begin,
        .slot = c->copy_slot,
        .node = c->copy_node,
        .weight = c->copy_weight,
        .node_of_rank = c->node_of_rank,
        .is_single = s->num_experts == s->num_ranks * s->slots_per_rank,
    };
}

static void make_group(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    struct gpu_world *world = c->world;
    c->group = (struct nep_cuda_group){
        .base = world->base,
        .stride = world->stride,
        .num_ranks = s->num_ranks,
        .rank = world->rank,
        .words = nep_cuda_words_plan(s->num_ranks, s->slots_per_rank),
        .state = device(c, sizeof(struct nep_cuda_state)),
        .timeout_ns = 5000000000ull,
    };
    c->cuda_shape = (struct nep_cuda_shape){
        .slots_per_rank = s->slots_per_rank,
        .top_k = s->top_k,
        .max_tokens = s->max_tokens,
        .alignment = s->alignment,
        .num_nodes = 1,
        .layout = s->layout,
    };
    enum nep_dtype dtype = s->is_cast_before ? NEP_DTYPE_FP8_E4M3 : s->dtype;
    gpu_must(nep_wire_init(&c->cuda_shape.wire, dtype, s->wire, s->hidden, s->scale) != NEP_OK,
             "wire");
    int sms = 0;
    int shared = 0;
    gpu_must((int)cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0), "SMs");
    gpu_must((int)cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0),
             "shared memory");
    /* 20 KiB of it are static in the largest kernel. */
    struct nep_cuda_limits limits = {(uint32_t)sms, s->num_ranks, (uint32_t)shared - 20 * 1024};
    uint32_t num_slots = s->num_ranks * s->slots_per_rank;
    uint32_t buckets = s->layout == NEP_LAYOUT_RANK ? s->num_ranks : num_slots;
    gpu_must(nep_cuda_geometry(&limits, s->num_sms, buckets, s->num_ranks + 1 + num_slots,
                               &c->geometry) != NEP_OK,
             "geometry");
}

static void make_device(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    uint64_t pairs = (uint64_t)s->max_tokens * s->top_k;
    uint32_t num_slots = s->num_ranks * s->slots_per_rank;
    uint32_t num_counts = s->num_ranks + 1 + num_slots;
    c->routing = (struct nep_cuda_routing){
        .slots = device(c, pairs * 4),
        .index = device(c, pairs * 4),
        .counts = device(c, num_counts * 4),
        .first = device(c, num_slots * 4),
        .terms = device(c, pairs * sizeof(struct nep_cuda_term)),
        .num_terms = device(c, s->max_tokens * 4),
        .block_counts = device(c, (uint64_t)c->geometry.layout_blocks * num_counts * 8),
        .received = device(c, (2 + s->slots_per_rank) * 8),
        .received_rows = device(c, (s->slots_per_rank + s->num_ranks) * 4),
    };
    struct nep_copies copies = host_copies(c);
    uint32_t num = c->copy_begin[s->num_experts];
    copies.begin = device_copy(c, c->copy_begin, (s->num_experts + 1) * 4);
    copies.slot = device_copy(c, c->copy_slot, num * 4);
    copies.node = device_copy(c, c->copy_node, num * 4);
    copies.weight = device_copy(c, c->copy_weight, num * 2);
    copies.node_of_rank = device_copy(c, c->node_of_rank, s->num_ranks * 4);
    char *window = c->world->base + c->world->rank * c->world->stride;
    c->ids_device = device(c, pairs * 8);
    c->weights_device = device(c, pairs * 4);
    c->in = (struct nep_cuda_input){
        .x = window + c->x_offset,
        .scales = s->is_cast_before ? window + c->in_scales_offset : NULL,
        .ids = c->ids_device,
        .weight = s->has_weights ? c->weights_device : NULL,
        .id_type = s->is_int64 ? NEP_IDS_INT64 : NEP_IDS_INT32,
        .copies = copies,
    };
    c->dispatch = (struct nep_cuda_dispatch){&c->group, &c->cuda_shape, &c->geometry,
                                             &c->in,    &c->out,        &c->routing};
    c->combine = (struct nep_cuda_combine){
        .group = &c->group,
        .shape = &c->cuda_shape,
        .geometry = &c->geometry,
        .routing = &c->routing,
        .rows = c->y_offset,
        .y = device(c, s->max_tokens * y_row_bytes(s)),
        .dtype = s->dtype,
        .hidden = s->hidden,
    };
}

struct gpu_case *gpu_case_create(struct gpu_world *world, const struct gpu_shape *shape)
{
    struct gpu_case *c = host(sizeof *c);
    c->shape = *shape;
    c->world = world;
    plan(shape, c);
    make_copies(c);
    make_group(c);
    make_device(c);
    gpu_must(nep_cuda_load() != NEP_OK, nep_last_message());
    for (uint32_t r = 0; r < shape->num_ranks; r++) {
        uint64_t pairs = (uint64_t)shape->max_tokens * shape->top_k;
        c->ids[r] = host(pairs * 4);
        c->slots[r] = host(pairs * 4);
        c->weights[r] = host(pairs * 4);
    }
    char *window = world->base + world->rank * world->stride;
    gpu_must((int)cudaMemset(window, 0, c->group.words.bytes), "words");
    gpu_must((int)cudaDeviceSynchronize(), "words");
    upload_x(c);
    gpu_world_meet(world);
    return c;
}

void gpu_case_destroy(struct gpu_case *c)
{
    gpu_must((int)cudaStreamSynchronize(c->world->stream), "end of a case");
    gpu_world_meet(c->world);
    for (uint32_t i = 0; i < c->num_memory; i++) {
        cudaFree(c->memory[i]);
    }
    for (uint32_t r = 0; r < c->shape.num_ranks; r++) {
        free(c->ids[r]);
        free(c->slots[r]);
        free(c->weights[r]);
        nep_ref_rows_free(&c->want[r]);
    }
    free(c->copy_begin);
    free(c->copy_slot);
    free(c->copy_node);
    free(c->copy_weight);
    free(c->node_of_rank);
    free(c);
}

/* One rank's tokens of a round. */
static void draw_rank(struct gpu_case *c, uint64_t round, uint32_t rank)
{
    const struct gpu_shape *s = &c->shape;
    struct nep_ref_rng rng = {nep_ref_mix(s->key + 7, round << 16 | rank)};
    uint32_t num = nep_ref_rng_below(&rng, s->max_tokens + 1);
    c->num_tokens[rank] = s->is_full ? s->max_tokens : num;
    struct nep_copies copies = host_copies(c);
    /* These layouts have room for a token's slots once. */
    bool is_once = s->is_full || gpu_is_fixed(s->layout);
    for (uint32_t t = 0; t < c->num_tokens[rank]; t++) {
        int32_t *ids = c->ids[rank] + (uint64_t)t * s->top_k;
        for (uint32_t k = 0; k < s->top_k; k++) {
            uint32_t i = 0;
            do {
                ids[k] = (int32_t)nep_ref_rng_below(&rng, s->num_experts);
                for (i = 0; i < k && !(is_once && ids[i] == ids[k]); i++) {
                }
            } while (i < k);
            float weight = (float)(nep_ref_rng_unit(&rng) * 2 - 0.5);
            c->weights[rank][(uint64_t)t * s->top_k + k] = weight;
        }
        for (uint32_t k = 0; !s->is_full && k < s->top_k; k++) {
            ids[k] = nep_ref_rng_below(&rng, 10) == 0 ? -1 : ids[k];
        }
        nep_choose(&copies, rank, t, ids, s->top_k, c->slots[rank] + (uint64_t)t * s->top_k);
    }
}

static void upload_round(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    uint32_t rank = c->world->rank;
    uint64_t pairs = (uint64_t)c->num_tokens[rank] * s->top_k;
    int64_t *wide = host(pairs * 8);
    for (uint64_t i = 0; i < pairs; i++) {
        wide[i] = c->ids[rank][i];
    }
    put(c, c->ids_device, s->is_int64 ? (void *)wide : (void *)c->ids[rank],
        pairs * (s->is_int64 ? 8 : 4));
    put(c, c->weights_device, c->weights[rank], pairs * 4);
    free(wide);
    char *window = c->world->base + rank * c->world->stride;
    gpu_must(
        (int)cudaMemsetAsync(window + c->out.x, POISON, c->y_offset - c->out.x, c->world->stream),
        "poison");
    gpu_must((int)cudaMemsetAsync(c->combine.y, POISON, s->max_tokens * y_row_bytes(s),
                                  c->world->stream),
             "poison");
    gpu_must((int)cudaStreamSynchronize(c->world->stream), "poison");
}

void gpu_case_draw(struct gpu_case *c, uint64_t round)
{
    const struct gpu_shape *s = &c->shape;
    for (uint32_t r = 0; r < s->num_ranks; r++) {
        draw_rank(c, round, r);
    }
    c->ref = (struct nep_ref_group){
        .num_ranks = s->num_ranks,
        .num_nodes = 1,
        .node_of_rank = c->node_of_rank,
        .slots_per_rank = s->slots_per_rank,
        .top_k = s->top_k,
        .hidden = s->hidden,
        .max_tokens = s->max_tokens,
        .expert_alignment = s->alignment,
        .dtype = s->dtype,
        .wire = s->wire,
        .layout = s->layout,
        .num_tokens = c->num_tokens,
        .slots = (const uint32_t *const *)c->slots,
        .weights = s->has_weights ? (const float *const *)c->weights : NULL,
        .x_row = gpu_case_x_row,
        .x_ctx = c,
    };
    for (uint32_t r = 0; r < s->num_ranks; r++) {
        nep_ref_rows_free(&c->want[r]);
        gpu_must(!nep_ref_rows_build(&c->ref, r, &c->want[r]), "memory of the oracle");
    }
    c->in.num_tokens = c->combine.num_tokens = c->num_tokens[c->world->rank];
    upload_round(c);
    gpu_world_meet(c->world);
}

void gpu_case_dispatch(struct gpu_case *c)
{
    gpu_must(nep_cuda_layout(&c->dispatch, c->world->stream) != NEP_OK, nep_last_message());
    gpu_must(nep_cuda_place(&c->dispatch, c->world->stream) != NEP_OK, nep_last_message());
    gpu_must(nep_cuda_push(&c->dispatch, 1, c->world->stream) != NEP_OK, nep_last_message());
}

void gpu_case_combine(struct gpu_case *c)
{
    gpu_must(nep_cuda_sum(&c->combine, c->world->stream) != NEP_OK, nep_last_message());
}

uint64_t gpu_case_status(struct gpu_case *c)
{
    struct nep_cuda_state state;
    fetch(c, &state, c->group.state, sizeof state);
    return state.status;
}
