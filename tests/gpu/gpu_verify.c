/* SPDX-License-Identifier: Apache-2.0 */
/* The looking at every element, for gpu_case.h. */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch/host/kernels.h"
#include "tests/gpu/gpu_case.h"

static void *host(uint64_t bytes)
{
    void *memory = calloc(1, bytes + 1);
    gpu_must(memory == NULL, "host memory");
    return memory;
}

static char *own_window(struct gpu_case *c)
{
    return c->world->base + c->world->rank * c->world->stride;
}

static void *fetch(struct gpu_case *c, const void *from, uint64_t bytes)
{
    void *to = host(bytes);
    gpu_must((int)cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, c->world->stream),
             "fetch");
    gpu_must((int)cudaStreamSynchronize(c->world->stream), "fetch");
    return to;
}

static uint64_t y_row_bytes(const struct gpu_shape *s)
{
    return (uint64_t)s->hidden * nep_ref_dtype_bytes(s->dtype);
}

static const struct nep_kernels *host_kernels(void)
{
    const struct nep_kernels *kernels = NULL;
    gpu_must(nep_kernels_select("auto", &kernels) != NEP_OK, "host kernels");
    return kernels;
}

static uint64_t differ(const void *got, const void *want, uint64_t bytes, uint64_t size,
                       const char *what, uint64_t row)
{
    uint64_t wrong = 0;
    if (memcmp(got, want, bytes) == 0) {
        return 0;
    }
    for (uint64_t i = 0; i < bytes; i += size) {
        if (memcmp((const char *)got + i, (const char *)want + i, size) != 0 && wrong++ == 0) {
            uint32_t is = 0;
            uint32_t must = 0;
            memcpy(&is, (const char *)got + i, size);
            memcpy(&must, (const char *)want + i, size);
            printf("%s, row %llu, element %llu: 0x%x, must be 0x%x\n", what,
                   (unsigned long long)row, (unsigned long long)(i / size), is, must);
        }
    }
    return wrong;
}

/* Payload and scales of every row against the host's cast or the input itself; rows that carry no
 * token are poison still. */
static uint64_t check_payload(struct gpu_case *c, const char *x, const char *scales,
                              const char *what)
{
    const struct gpu_shape *s = &c->shape;
    const struct nep_wire *wire = &c->cuda_shape.wire;
    const struct nep_ref_rows *want = &c->want[c->world->rank];
    const struct nep_kernels *kernels = host_kernels();
    char *raw = host(y_row_bytes(s));
    char *payload = host(y_row_bytes(s));
    char *own_scales = host(nep_scales_row_bytes(s->hidden, s->scale));
    char *poison = host(wire->payload_bytes);
    memset(poison, 0xee, wire->payload_bytes);
    uint64_t wrong = 0;
    uint64_t next = 0;
    for (uint64_t i = 0; i < want->num_real_rows; i++) {
        const struct nep_ref_row *row = &want->rows[i];
        gpu_case_x_row(c, row->source, row->token, raw);
        if (s->wire == s->dtype) {
            memcpy(payload, raw, wire->payload_bytes);
        } else {
            kernels->cast_fp8(payload, own_scales, raw, s->dtype, s->hidden, s->scale);
        }
        for (; next < row->idx; next++) {
            wrong += differ(x + next * wire->payload_bytes, poison, wire->payload_bytes, 1,
                            "a row without token", next);
        }
        next = row->idx + 1;
        wrong += differ(x + row->idx * wire->payload_bytes, payload, wire->payload_bytes,
                        nep_ref_dtype_bytes(s->wire), what, row->idx);
        if (scales != NULL && wire->scale_bytes != 0) {
            wrong += differ(scales + row->idx * wire->scale_bytes, own_scales, wire->scale_bytes,
                            nep_scale_bytes(s->scale), "scales", row->idx);
        }
    }
    free(raw);
    free(payload);
    free(own_scales);
    free(poison);
    return wrong;
}

static uint64_t check_counts(struct gpu_case *c)
{
    uint32_t slots = c->shape.slots_per_rank;
    const struct nep_ref_rows *want = &c->want[c->world->rank];
    uint64_t *received = fetch(c, c->routing.received, (2 + slots) * 8);
    uint32_t *rows = fetch(c, c->routing.received_rows, (slots + c->shape.num_ranks) * 4);
    struct nep_counts counts = {.size = sizeof counts};
    struct nep_ref_report report = {0};
    counts.num_rows = received[0];
    counts.num_real_rows = received[1];
    counts.rows_per_slot = rows;
    counts.first_row = received + 2;
    counts.rows_per_source = rows + slots;
    nep_ref_check_counts(&c->ref, want, &counts, &report);
    if (report.wrong != 0) {
        printf("counts: %s\n", report.first);
    }
    free(received);
    free(rows);
    return report.wrong;
}

uint64_t gpu_case_check_dispatch(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    const struct nep_wire *wire = &c->cuda_shape.wire;
    uint64_t rows = c->want[c->world->rank].num_rows;
    const struct nep_cuda_output *out = &c->out;
    char *window = own_window(c);
    uint64_t wrong = check_counts(c);
    struct nep_rows got = {.size = sizeof got, .capacity = rows};
    uint64_t k = s->layout == NEP_LAYOUT_RANK ? s->top_k : 1;
    got.x = fetch(c, window + out->x, rows * wire->payload_bytes);
    got.scales = fetch(c, window + out->scales, rows * wire->scale_bytes);
    int32_t *slots = fetch(c, window + out->topk_slots, rows * 4 * k);
    got.topk_slots = s->layout == NEP_LAYOUT_RANK ? slots : NULL;
    got.topk_weights = fetch(c, window + out->topk_weights, rows * 4 * k);
    got.source_rank = fetch(c, window + out->source_rank, rows * 4);
    got.source_token = fetch(c, window + out->source_token, rows * 4);
    wrong += check_payload(c, got.x, got.scales, "dispatched");
    /* The oracle's own quantiser knows one kind of scales and no infinities, which wild numbers
     * become in fp16. */
    bool is_cast = s->wire != s->dtype;
    bool is_known =
        !is_cast || (s->scale == NEP_SCALE_FP32 && !(s->is_wild && s->dtype == NEP_DTYPE_FP16));
    if (is_known && !(s->is_full && s->hidden > 4096)) {
        struct nep_ref_report report = {0};
        nep_ref_check_dispatch(&c->ref, c->world->rank, &c->want[c->world->rank], &got, &report);
        if (report.wrong != 0) {
            printf("oracle: %s\n", report.first);
        }
        wrong += report.wrong;
    }
    free(got.x);
    free(got.scales);
    free(slots);
    free(got.topk_weights);
    free(got.source_rank);
    free(got.source_token);
    return wrong;
}

uint64_t gpu_case_check_pull(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    const struct nep_wire *wire = &c->cuda_shape.wire;
    const struct nep_ref_rows *want = &c->want[c->world->rank];
    if (s->wire != s->dtype) {
        return 0; /* inputs hold no scales behind their rows */
    }
    struct nep_cuda_move *moves = host(want->num_real_rows * sizeof *moves);
    const void *sources[NEP_CUDA_MAX_RANKS];
    for (uint32_t r = 0; r < s->num_ranks; r++) {
        sources[r] = c->world->base + r * c->world->stride + c->x_offset;
    }
    for (uint64_t i = 0; i < want->num_real_rows; i++) {
        moves[i] = (struct nep_cuda_move){want->rows[i].source, want->rows[i].token,
                                          (uint32_t)want->rows[i].idx, 0};
    }
    char *memory = NULL;
    uint32_t num = (uint32_t)want->num_real_rows;
    uint64_t bytes = num * sizeof *moves;
    gpu_must((int)cudaMalloc((void **)&memory, bytes + sizeof sources + 64), "moves");
    gpu_must((int)cudaMemcpy(memory, moves, bytes, cudaMemcpyHostToDevice), "moves");
    gpu_must((int)cudaMemcpy(memory + bytes, sources, sizeof sources, cudaMemcpyHostToDevice),
             "moves");
    gpu_must((int)cudaMemcpy(memory + bytes + sizeof sources, &num, 4, cudaMemcpyHostToDevice),
             "moves");
    char *x = own_window(c) + c->out.x;
    gpu_must((int)cudaMemsetAsync(x, 0xee, want->num_rows * wire->payload_bytes, c->world->stream),
             "poison");
    struct nep_cuda_pull pull = {
        .geometry = &c->geometry,
        .sources = (const void *const *)(memory + bytes),
        .stride = wire->payload_bytes,
        .moves = (const struct nep_cuda_move *)memory,
        .num_moves = (const uint32_t *)(memory + bytes + sizeof sources),
        .max_moves = num,
        .payload_bytes = wire->payload_bytes,
        .x = x,
        .state = c->group.state,
    };
    gpu_must(nep_cuda_pull(&pull, c->world->stream) != NEP_OK, nep_last_message());
    char *got = fetch(c, x, want->num_rows * wire->payload_bytes);
    uint64_t wrong = check_payload(c, got, NULL, "pulled");
    free(got);
    free(moves);
    cudaFree(memory);
    return wrong;
}

/* ---- combine -------------------------------------------------------------------------------- */

/* Expert output `idx` of a rank; a few rows of a wild case hold infinities and NaN. */
static void y_row(struct gpu_case *c, uint64_t round, uint32_t rank, uint64_t idx, void *row)
{
    const struct gpu_shape *s = &c->shape;
    uint64_t key = nep_ref_mix(s->key + round, (uint64_t)(rank + 1) << 40 | idx);
    nep_ref_gen_row(key, s->is_wild, s->dtype, s->hidden, row);
    const uint32_t odd[] = {0x7f800000u, 0xff800000u, 0x7fc00001u, 0xffa00000u, 0x80000000u};
    for (uint32_t i = 0; s->is_wild && i < 5; i++) {
        uint64_t at = nep_ref_mix(key, i) % s->hidden;
        uint32_t half = s->dtype == NEP_DTYPE_FP16 ? odd[i] >> 16 & 0xfc00u : odd[i] >> 16;
        if (s->dtype == NEP_DTYPE_FP32) {
            memcpy((char *)row + at * 4, &odd[i], 4);
        } else {
            memcpy((char *)row + at * 2, &half, 2);
        }
    }
}

void gpu_case_fill_y(struct gpu_case *c, uint64_t round)
{
    const struct nep_ref_rows *want = &c->want[c->world->rank];
    uint64_t bytes = y_row_bytes(&c->shape);
    char *rows = host(want->num_rows * bytes);
    for (uint64_t i = 0; i < want->num_real_rows; i++) {
        y_row(c, round, c->world->rank, want->rows[i].idx, rows + want->rows[i].idx * bytes);
    }
    gpu_must((int)cudaMemcpyAsync(own_window(c) + c->y_offset, rows, want->num_rows * bytes,
                                  cudaMemcpyHostToDevice, c->world->stream),
             "expert outputs");
    gpu_must((int)cudaStreamSynchronize(c->world->stream), "expert outputs");
    free(rows);
}

/* Where the rows of this rank's tokens are: [T][K or R] of the oracle's numbers. */
static uint64_t *find_rows(struct gpu_case *c, uint32_t width)
{
    const struct gpu_shape *s = &c->shape;
    uint64_t *at = host((uint64_t)s->max_tokens * width * 8);
    for (uint32_t r = 0; r < s->num_ranks; r++) {
        for (uint64_t i = 0; i < c->want[r].num_real_rows; i++) {
            const struct nep_ref_row *row = &c->want[r].rows[i];
            if (row->source == c->world->rank) {
                at[(uint64_t)row->token * width + (s->layout == NEP_LAYOUT_RANK ? r : row->k)] =
                    row->idx;
            }
        }
    }
    return at;
}

/* The addends of a token in order, their rows in `rows`. */
static uint32_t take_terms(struct gpu_case *c, uint64_t round, uint32_t token, const uint64_t *at,
                           char *rows, struct nep_term *terms)
{
    const struct gpu_shape *s = &c->shape;
    const uint32_t *slots = c->slots[c->world->rank] + (uint64_t)token * s->top_k;
    const float *weights = c->weights[c->world->rank] + (uint64_t)token * s->top_k;
    bool is_rank_layout = s->layout == NEP_LAYOUT_RANK;
    uint32_t num = 0;
    for (uint32_t r = 0; r < s->num_ranks; r++) {
        bool has_any = false;
        for (uint32_t k = 0; k < s->top_k; k++) {
            if (slots[k] == NEP_SLOT_NONE || slots[k] / s->slots_per_rank != r ||
                (is_rank_layout && has_any)) {
                continue;
            }
            has_any = true;
            char *row = rows + num * y_row_bytes(s);
            y_row(c, round, r,
                  at[is_rank_layout ? (uint64_t)token * s->num_ranks + r
                                    : (uint64_t)token * s->top_k + k],
                  row);
            bool has_weight = !is_rank_layout && s->has_weights;
            terms[num++] = (struct nep_term){row, has_weight ? weights[k] : 1.0f, 0};
        }
        if (has_any) {
            terms[num - 1].ends = NEP_ENDS_RANK;
        }
    }
    return num;
}

uint64_t gpu_case_check_combine(struct gpu_case *c, uint64_t round)
{
    const struct gpu_shape *s = &c->shape;
    const struct nep_kernels *kernels = host_kernels();
    uint32_t num_tokens = c->num_tokens[c->world->rank];
    uint64_t bytes = y_row_bytes(s);
    char *y = fetch(c, c->combine.y, s->max_tokens * bytes);
    uint64_t *at = find_rows(c, s->layout == NEP_LAYOUT_RANK ? s->num_ranks : s->top_k);
    char *rows = host(32 * bytes);
    char *want = host(bytes);
    struct nep_term terms[32];
    uint64_t wrong = 0;
    for (uint32_t t = 0; t < s->max_tokens; t++) {
        if (t < num_tokens) {
            uint32_t num = take_terms(c, round, t, at, rows, terms);
            kernels->sum[s->dtype - NEP_DTYPE_BF16](want, terms, num, s->hidden);
        } else {
            memset(want, 0xee, bytes);
        }
        wrong += differ(y + t * bytes, want, bytes, nep_ref_dtype_bytes(s->dtype), "combined", t);
    }
    free(y);
    free(at);
    free(rows);
    free(want);
    return wrong;
}

/* Records the kernels of `phases` and runs them from a graph. */
static void run(struct gpu_case *c, void (*phases)(struct gpu_case *))
{
    if (!c->shape.is_graph) {
        phases(c);
        return;
    }
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    struct CUstream_st *stream = c->world->stream;
    gpu_must((int)cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    phases(c);
    gpu_must((int)cudaStreamEndCapture(stream, &graph), "capture");
    gpu_must((int)cudaGraphInstantiate(&exec, graph, 0), "graph");
    gpu_world_meet(c->world);
    gpu_must((int)cudaGraphLaunch(exec, stream), "graph");
    gpu_must((int)cudaStreamSynchronize(stream), "graph");
    gpu_must((int)cudaGraphExecDestroy(exec), "graph");
    gpu_must((int)cudaGraphDestroy(graph), "graph");
}

uint64_t gpu_case_round(struct gpu_case *c, uint64_t round)
{
    uint64_t wrong = 0;
    gpu_case_draw(c, round);
    run(c, gpu_case_dispatch);
    wrong += gpu_case_check_dispatch(c);
    wrong += gpu_case_check_pull(c);
    gpu_case_fill_y(c, round);
    gpu_world_meet(c->world);
    run(c, gpu_case_combine);
    wrong += gpu_case_check_combine(c, round);
    uint64_t status = gpu_case_status(c);
    if (status != 0) {
        printf("rank %u: status %llx\n", c->world->rank, (unsigned long long)status);
        wrong++;
    }
    return wrong;
}
