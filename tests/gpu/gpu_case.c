/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every rank knows every rank's inputs, because all come from a key; so each checks its own outputs
 * alone. Graphs are captured at the first round and replayed with the routing of later ones.
 */
#include "tests/gpu/gpu_case.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dispatch/host/kernels.h"
#include "placement/placement.h"

enum { POISON = 0xee };

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
    gpu_must((int)cudaStreamSynchronize(NULL),
             "device memory"); /* the rank's does not wait for it */
    c->memory[c->num_memory++] = memory;
    return memory;
}

/* Memory that peers map, or not. */
static void *shared(struct gpu_case *c, uint64_t bytes, bool is_private)
{
    void *memory = NULL;
    if (is_private) {
        return device(c, bytes);
    }
    gpu_must_nep(nep_buffer_alloc(c->ep, bytes, &memory), "a buffer");
    return memory;
}

static void put(struct gpu_case *c, void *to, const void *from, uint64_t bytes)
{
    gpu_must((int)cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, c->world->stream),
             "put");
    gpu_must((int)cudaStreamSynchronize(c->world->stream), "put");
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
    s.is_x_private = nep_ref_rng_below(&rng, 3) == 0;
    s.is_out_private = nep_ref_rng_below(&rng, 3) == 0;
    s.is_y_private = nep_ref_rng_below(&rng, 3) == 0;
    s.has_bias = nep_ref_rng_below(&rng, 3) == 0;
    s.has_weights_back = s.layout == NEP_LAYOUT_RANK && nep_ref_rng_below(&rng, 2);
    s.is_overlapped = !s.is_graph && nep_ref_rng_below(&rng, 3) == 0;
    s.calls =
        (enum gpu_calls)nep_ref_rng_below(&rng, s.is_graph ? GPU_CALLS_COUNTS : GPU_NUM_CALLS);
    s.has_weights_late = s.layout != NEP_LAYOUT_RANK && nep_ref_rng_below(&rng, 3) == 0;
    s.has_weights = s.has_weights && !s.has_weights_late;
    s.has_columns = s.wire != s.dtype && nep_scales_row_bytes(s.hidden, s.scale) % 4 == 0 &&
                    nep_ref_rng_below(&rng, 2);
    return s;
}

void gpu_shape_print(const struct gpu_shape *s)
{
    printf("key %llx: %u ranks, %u SMs, L %u, E %u, K %u, H %u, M %u, align %u, layout %d, type %d "
           "wire %d scale %d calls %d%s%s%s%s%s%s%s%s%s%s%s%s\n",
           (unsigned long long)s->key, s->num_ranks, s->num_sms, s->slots_per_rank, s->num_experts,
           s->top_k, s->hidden, s->max_tokens, s->alignment, (int)s->layout, (int)s->dtype,
           (int)s->wire, (int)s->scale, (int)s->calls + (s->is_overlapped ? 10 : 0),
           s->is_cast_before ? " cast-before" : "", s->is_wild ? " wild" : "",
           s->has_weights ? " weights" : "", s->is_int64 ? " int64" : "",
           s->is_graph ? " graph" : "", s->is_x_private ? " x-private" : "",
           s->is_out_private ? " out-private" : "", s->is_y_private ? " y-private" : "",
           s->has_bias ? " bias" : "", s->has_weights_back ? " weights-back" : "",
           s->has_weights_late ? " weights-late" : "", s->has_columns ? " columns" : "");
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

uint64_t gpu_shape_bytes(const struct gpu_shape *s)
{
    uint64_t rows = capacity_of(s);
    uint64_t scales = nep_scales_row_bytes(s->hidden, s->scale);
    uint64_t k = s->layout == NEP_LAYOUT_RANK ? s->top_k : 1;
    uint64_t num = s->is_overlapped ? 2 : 1;
    return rows * ((1 + num) * y_row_bytes(s) + num * (scales + 16 * k + 16)) +
           s->max_tokens * (y_row_bytes(s) + scales) + 16 * 4096;
}

/* What the caller's row is made of. */
void gpu_case_x_row(void *ctx, uint32_t rank, uint32_t token, void *row)
{
    const struct gpu_case *c = ctx;
    uint64_t key = nep_ref_mix(c->shape.key, (uint64_t)rank << 32 | token);
    nep_ref_gen_row(key, c->shape.is_wild, c->shape.dtype, c->shape.hidden, row);
}

void gpu_case_bias_row(const struct gpu_case *c, uint32_t which, uint32_t token, void *row)
{
    uint64_t key = nep_ref_mix(c->shape.key + 99 + which, (uint64_t)c->world->rank << 32 | token);
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
    put(c, (void *)c->in.x, rows, s->max_tokens * stride);
    if (s->is_cast_before) {
        put(c, (void *)c->in.scales, all_scales, s->max_tokens * scales);
    }
    free(rows);
    free(all_scales);
    free(raw);
}

static void upload_bias(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    char *rows = host(s->max_tokens * y_row_bytes(s));
    for (uint32_t b = 0; b < 2; b++) {
        for (uint32_t t = 0; t < s->max_tokens; t++) {
            gpu_case_bias_row(c, b, t, rows + t * y_row_bytes(s));
        }
        void *bias = device(c, s->max_tokens * y_row_bytes(s));
        put(c, bias, rows, s->max_tokens * y_row_bytes(s));
        c->result.bias[b] = bias;
    }
    free(rows);
}

/* A map file: every expert has a copy, the other slots are copies of experts drawn. */
static void make_map(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    struct nep_ref_rng rng = {nep_ref_mix(s->key, 1)};
    uint32_t num_slots = s->slots_per_rank * s->num_ranks;
    uint32_t *expert = host(num_slots * sizeof *expert);
    char path[64];
    for (uint32_t i = 0; i < num_slots; i++) {
        expert[i] = i < s->num_experts ? i : nep_ref_rng_below(&rng, s->num_experts);
    }
    for (uint32_t i = num_slots; !s->is_full && i > 1; i--) {
        uint32_t j = nep_ref_rng_below(&rng, i);
        uint32_t swap = expert[j];
        expert[j] = expert[i - 1];
        expert[i - 1] = swap;
    }
    snprintf(path, sizeof path, "/tmp/gpu_case.%d.%u", (int)getpid(), c->world->rank);
    FILE *file = fopen(path, "w");
    gpu_must(file == NULL, path);
    uint32_t node_size = s->num_ranks / gpu_num_nodes(s);
    fprintf(file, "nepmap 1\nlayers 1 experts %u nodes %u ranks_per_node", s->num_experts,
            gpu_num_nodes(s));
    for (uint32_t n = 0; n < gpu_num_nodes(s); n++) {
        fprintf(file, "%c%u", n == 0 ? ' ' : ',', node_size);
    }
    fprintf(file, " slots_per_rank %u\n", s->slots_per_rank);
    for (uint32_t e = 0; e < s->num_experts; e++) {
        fprintf(file, "0 %u", e);
        for (uint32_t i = 0; i < num_slots; i++) {
            if (expert[i] == e) {
                fprintf(file, " %u:%u*%u", i / s->slots_per_rank, i % s->slots_per_rank,
                        1 + nep_ref_rng_below(&rng, 65535));
            }
        }
        fprintf(file, "\n");
    }
    fclose(file);
    gpu_must_nep(nep_map_load(path, &c->map), "map");
    gpu_must_nep(nep_map_copies(c->map, 0, &c->copies), "map");
    for (uint32_t r = 0; r < s->num_ranks; r++) {
        c->node_of_rank[r] = r / node_size;
    }
    c->copies.node_of_rank = c->node_of_rank;
    unlink(path);
    free(expert);
}

static void make_ep(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    const struct nep_ep_params params = {
        .size = sizeof params,
        .num_experts = s->num_experts,
        .slots_per_rank = s->slots_per_rank,
        .top_k = s->top_k,
        .hidden = s->hidden,
        .max_tokens = s->max_tokens,
        .dtype = s->dtype,
        .wire = s->wire,
        .layout = s->layout,
        .expert_alignment = s->alignment,
        .map = c->map,
        .pool_bytes = gpu_shape_bytes(s) + (4 << 20),
        .scale = s->scale,
        .executor = NEP_EXECUTOR_CUDA,
        .num_sms = s->num_sms,
        .outstanding = s->is_overlapped ? 2 : 1,
        .scale_order = s->has_columns ? NEP_SCALES_COLUMNS : NEP_SCALES_ROWS,
    };
    gpu_must_nep(nep_ep_create(c->world->comm, &params, &c->ep), "ep");
    gpu_must_nep(nep_handle_create(c->ep, &c->handle), "handle");
    gpu_must_nep(nep_wire_init(&c->wire, s->dtype, s->wire, s->hidden, s->scale), "wire");
    if (s->has_columns) {
        uint32_t block = gpu_is_fixed(s->layout) ? s->num_ranks * s->max_tokens : 0;
        gpu_must_nep(nep_wire_set_columns(&c->wire, block), "columns of scales");
    }
}

static struct nep_rows make_outputs(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    uint64_t rows = capacity_of(s);
    uint64_t k = s->layout == NEP_LAYOUT_RANK ? s->top_k : 1;
    bool is_private = s->is_out_private;
    struct nep_rows out = {
        .size = sizeof out,
        .x = shared(c, rows * c->wire.payload_bytes, is_private),
        .capacity = rows,
        .topk_weights = shared(c, rows * 4 * k, is_private),
        .source_rank = shared(c, rows * 4, is_private),
        .source_token = shared(c, rows * 4, is_private),
    };
    if (c->wire.scale_bytes != 0) {
        out.scales = shared(c, nep_wire_scales_bytes(&c->wire, rows), is_private);
    }
    if (s->layout == NEP_LAYOUT_RANK) {
        out.topk_slots = shared(c, rows * 4 * k, is_private);
    }
    return out;
}

static void make_buffers(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    uint64_t pairs = (uint64_t)s->max_tokens * s->top_k;
    uint64_t rows = capacity_of(s);
    uint64_t k = s->layout == NEP_LAYOUT_RANK ? s->top_k : 1;
    c->capacity = rows;
    c->ids_device = device(c, pairs * 8);
    c->weights_device = device(c, pairs * 4);
    c->in = (struct nep_tokens){
        .size = sizeof c->in,
        .x = shared(c, s->max_tokens * y_row_bytes(s), s->is_x_private),
        .topk_ids = c->ids_device,
        .id_type = s->is_int64 ? NEP_IDS_INT64 : NEP_IDS_INT32,
        .topk_weights = s->has_weights ? c->weights_device : NULL,
    };
    if (s->is_cast_before) {
        c->in.scales = shared(c, s->max_tokens * c->wire.scale_bytes, s->is_x_private);
    }
    c->out = make_outputs(c);
    c->expert =
        (struct nep_expert_rows){.size = sizeof c->expert,
                                 .y = shared(c, rows * y_row_bytes(s), s->is_y_private),
                                 .token_weights = s->has_weights_late ? c->weights_device : NULL};
    c->result = (struct nep_tokens_out){.size = sizeof c->result,
                                        .y = device(c, s->max_tokens * y_row_bytes(s))};
    if (s->has_weights_back) {
        c->back_weights = shared(c, rows * 4 * k, s->is_y_private);
        c->expert.topk_weights = c->back_weights;
        c->result.topk_weights = device(c, pairs * 4);
    }
    if (s->is_overlapped) {
        gpu_must_nep(nep_handle_create(c->ep, &c->handle2), "handle");
        c->out2 = make_outputs(c);
        c->result2 = c->result;
        c->result2.y = device(c, s->max_tokens * y_row_bytes(s));
    }
}

struct gpu_case *gpu_case_create(struct gpu_world *world, const struct gpu_shape *shape)
{
    struct gpu_case *c = host(sizeof *c);
    c->shape = *shape;
    c->world = world;
    make_map(c);
    make_ep(c);
    make_buffers(c);
    for (uint32_t r = 0; r < shape->num_ranks; r++) {
        uint64_t pairs = (uint64_t)shape->max_tokens * shape->top_k;
        c->ids[r] = host(pairs * 4);
        c->slots[r] = host(pairs * 4);
        c->weights[r] = host(pairs * 4);
    }
    upload_x(c);
    if (shape->has_bias) {
        upload_bias(c);
        memcpy(c->result2.bias, c->result.bias, sizeof c->result.bias);
    }
    gpu_world_meet(world);
    return c;
}

void gpu_case_destroy(struct gpu_case *c)
{
    gpu_must((int)cudaStreamSynchronize(c->world->stream), "end of a case");
    gpu_world_meet(c->world);
    for (uint32_t i = 0; i < 2; i++) {
        if (c->graphs[i] != NULL) {
            gpu_must((int)cudaGraphExecDestroy(c->graphs[i]), "graph");
        }
    }
    nep_handle_destroy(c->handle);
    nep_handle_destroy(c->handle2);
    nep_ep_destroy(c->ep);
    nep_map_destroy(c->map);
    for (uint32_t i = 0; i < c->num_memory; i++) {
        cudaFree(c->memory[i]);
    }
    for (uint32_t r = 0; r < c->shape.num_ranks; r++) {
        free(c->ids[r]);
        free(c->slots[r]);
        free(c->weights[r]);
        nep_ref_rows_free(&c->want[r]);
    }
    free(c);
}

/* One rank's tokens of a round. */
static void draw_rank(struct gpu_case *c, uint64_t round, uint32_t rank)
{
    const struct gpu_shape *s = &c->shape;
    /* The number of tokens is part of a graph. */
    struct nep_ref_rng count = {nep_ref_mix(s->key + 6, (s->is_graph ? 0 : round) << 16 | rank)};
    struct nep_ref_rng rng = {nep_ref_mix(s->key + 7, round << 16 | rank)};
    uint32_t num = nep_ref_rng_below(&count, s->max_tokens + 1);
    c->num_tokens[rank] = s->is_full ? s->max_tokens : num;
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
            weight = nep_ref_rng_below(&rng, 8) == 0 ? 0 : weight; /* such a row is left out */
            c->weights[rank][(uint64_t)t * s->top_k + k] = weight;
        }
        for (uint32_t k = 0; !s->is_full && k < s->top_k; k++) {
            ids[k] = nep_ref_rng_below(&rng, 10) == 0 ? -1 : ids[k];
        }
        nep_choose(&c->copies, rank, t, ids, s->top_k, c->slots[rank] + (uint64_t)t * s->top_k);
    }
}

static void poison(struct gpu_case *c, void *to, uint64_t bytes)
{
    if (to != NULL) {
        gpu_must((int)cudaMemsetAsync(to, POISON, bytes, c->world->stream), "poison");
    }
}

static void upload_round(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    uint32_t rank = c->world->rank;
    uint64_t pairs = (uint64_t)c->num_tokens[rank] * s->top_k;
    uint64_t k = s->layout == NEP_LAYOUT_RANK ? s->top_k : 1;
    int64_t *wide = host(pairs * 8);
    for (uint64_t i = 0; i < pairs; i++) {
        wide[i] = c->ids[rank][i];
    }
    put(c, c->ids_device, s->is_int64 ? (void *)wide : (void *)c->ids[rank],
        pairs * (s->is_int64 ? 8 : 4));
    put(c, c->weights_device, c->weights[rank], pairs * 4);
    free(wide);
    for (uint32_t i = 0; i < 2; i++) {
        const struct nep_rows *out = i == 0 ? &c->out : &c->out2;
        poison(c, out->x, c->capacity * c->wire.payload_bytes);
        poison(c, out->scales, nep_wire_scales_bytes(&c->wire, c->capacity));
        poison(c, out->topk_slots, c->capacity * 4 * k);
        poison(c, out->topk_weights, c->capacity * 4 * k);
        poison(c, out->source_rank, c->capacity * 4);
        poison(c, out->source_token, c->capacity * 4);
        poison(c, i == 0 ? c->result.y : c->result2.y, s->max_tokens * y_row_bytes(s));
    }
    poison(c, c->result.topk_weights, (uint64_t)s->max_tokens * s->top_k * 4);
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
        .num_nodes = gpu_num_nodes(s),
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
    c->in.num_tokens = c->num_tokens[c->world->rank];
    c->result.num_tokens = c->result2.num_tokens = c->in.num_tokens;
    upload_round(c);
    gpu_world_meet(c->world);
}

void gpu_case_swap(struct gpu_case *c)
{
    struct nep_handle *handle = c->handle;
    struct nep_rows out = c->out;
    struct nep_tokens_out result = c->result;
    c->handle = c->handle2;
    c->out = c->out2;
    c->result = c->result2;
    c->handle2 = handle;
    c->out2 = out;
    c->result2 = result;
}

/* A whole call behind an operation that is outstanding: its send half is done, no more. */
static void must_be_busy(enum nep_status status, const char *what)
{
    gpu_must_nep(status == NEP_ERR_BUSY ? NEP_OK : NEP_ERR_INTERNAL, what);
}

/* Both send halves before both complete halves; the second's outputs are bound if the calls say so,
 * or the second is called as a whole. */
static void dispatch_two(struct gpu_case *c)
{
    void *stream = c->world->stream;
    bool is_bound = c->shape.calls == GPU_CALLS_BOUND;
    struct nep_counts counts;
    gpu_must_nep(nep_handle_bind_output(c->handle2, is_bound ? &c->out2 : NULL), "bind");
    gpu_must_nep(nep_dispatch_send(c->ep, c->handle, &c->in, stream), "dispatch 1, send");
    if (c->shape.calls == GPU_CALLS_WHOLE) {
        must_be_busy(nep_dispatch(c->ep, c->handle2, &c->in, &c->out2, stream), "dispatch 2");
    } else {
        gpu_must_nep(nep_dispatch_send(c->ep, c->handle2, &c->in, stream), "dispatch 2, send");
    }
    if (c->shape.calls == GPU_CALLS_COUNTS) {
        gpu_must_nep(nep_dispatch_counts(c->ep, c->handle2, &counts), "counts");
    }
    gpu_must_nep(nep_dispatch_recv(c->ep, c->handle, &c->out, stream), "dispatch 1, recv");
    gpu_must_nep(nep_dispatch_recv(c->ep, c->handle2, &c->out2, stream), "dispatch 2, recv");
}

static void combine_two(struct gpu_case *c)
{
    void *stream = c->world->stream;
    gpu_must_nep(nep_combine_send(c->ep, c->handle, &c->expert, stream), "combine 1, send");
    if (c->shape.calls == GPU_CALLS_WHOLE) {
        must_be_busy(nep_combine(c->ep, c->handle2, &c->expert, &c->result2, stream), "combine 2");
    } else {
        gpu_must_nep(nep_combine_send(c->ep, c->handle2, &c->expert, stream), "combine 2, send");
    }
    gpu_must_nep(nep_combine_recv(c->ep, c->handle, &c->result, stream), "combine 1, recv");
    gpu_must_nep(nep_combine_recv(c->ep, c->handle2, &c->result2, stream), "combine 2, recv");
}

void gpu_case_dispatch(struct gpu_case *c)
{
    void *stream = c->world->stream;
    if (c->shape.is_overlapped) {
        dispatch_two(c);
        return;
    }
    if (c->shape.calls == GPU_CALLS_WHOLE) {
        gpu_must_nep(nep_dispatch(c->ep, c->handle, &c->in, &c->out, stream), "dispatch");
        return;
    }
    bool is_bound = c->shape.calls == GPU_CALLS_BOUND;
    gpu_must_nep(nep_handle_bind_output(c->handle, is_bound ? &c->out : NULL), "bind");
    gpu_must_nep(nep_dispatch_send(c->ep, c->handle, &c->in, stream), "dispatch, send");
    if (c->shape.calls == GPU_CALLS_COUNTS) {
        struct nep_counts counts;
        gpu_must_nep(nep_dispatch_counts(c->ep, c->handle, &counts), "counts");
        c->out.capacity = counts.num_rows; /* exactly as many as there are */
    }
    gpu_must_nep(nep_dispatch_recv(c->ep, c->handle, &c->out, stream), "dispatch, recv");
}

void gpu_case_combine(struct gpu_case *c)
{
    void *stream = c->world->stream;
    if (c->shape.is_overlapped) {
        combine_two(c);
        return;
    }
    if (c->shape.calls == GPU_CALLS_WHOLE) {
        gpu_must_nep(nep_combine(c->ep, c->handle, &c->expert, &c->result, stream), "combine");
        return;
    }
    gpu_must_nep(nep_combine_send(c->ep, c->handle, &c->expert, stream), "combine, send");
    gpu_must_nep(nep_combine_recv(c->ep, c->handle, &c->result, stream), "combine, recv");
}
