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
    const struct nep_wire *wire = &c->wire;
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

/* On the host and on the device. */
static uint64_t check_counts(struct gpu_case *c)
{
    uint32_t slots = c->shape.slots_per_rank;
    const struct nep_ref_rows *want = &c->want[c->world->rank];
    struct nep_counts counts;
    struct nep_counts there;
    struct nep_ref_report report = {0};
    gpu_must_nep(nep_dispatch_counts_device(c->ep, c->handle, &there), "counts on the device");
    uint32_t *rows = fetch(c, there.rows_per_slot, slots * 4);
    uint64_t *first = fetch(c, there.first_row, slots * 8);
    uint32_t *sources = fetch(c, there.rows_per_source, c->shape.num_ranks * 4);
    gpu_must_nep(nep_dispatch_counts(c->ep, c->handle, &counts), "counts");
    nep_ref_check_counts(&c->ref, want, &counts, &report);
    there.num_rows = counts.num_rows;
    there.num_real_rows = counts.num_real_rows;
    there.rows_per_slot = rows;
    there.first_row = first;
    there.rows_per_source = sources;
    nep_ref_check_counts(&c->ref, want, &there, &report);
    if (report.wrong != 0) {
        printf("counts: %s\n", report.first);
    }
    free(rows);
    free(first);
    free(sources);
    return report.wrong;
}

/* Rows of scales, from the columns that nearep.h describes where the case has some. */
static char *fetch_scales(struct gpu_case *c, uint64_t rows)
{
    const struct gpu_shape *s = &c->shape;
    uint64_t bytes = c->wire.scale_bytes;
    if (bytes == 0) {
        return NULL;
    }
    if (!s->has_columns) {
        return fetch(c, c->out.scales, rows * bytes);
    }
    bool is_fixed = gpu_is_fixed(s->layout);
    uint64_t in_matrix = is_fixed ? (uint64_t)s->num_ranks * s->max_tokens : c->out.capacity;
    uint64_t column = (in_matrix + 3) / 4 * 4;
    uint64_t matrices = is_fixed ? s->slots_per_rank : 1;
    char *all = fetch(c, c->out.scales, matrices * bytes * column);
    char *to = host(rows * bytes);
    for (uint64_t i = 0; i < rows; i++) {
        const char *matrix = all + i / in_matrix * bytes * column;
        for (uint64_t piece = 0; piece < bytes / 4; piece++) {
            memcpy(to + i * bytes + piece * 4, matrix + (piece * column + i % in_matrix) * 4, 4);
        }
    }
    free(all);
    return to;
}

uint64_t gpu_case_check_dispatch(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    const struct nep_wire *wire = &c->wire;
    uint64_t rows = c->want[c->world->rank].num_rows;
    uint64_t wrong = check_counts(c);
    struct nep_rows got = {.size = sizeof got, .capacity = rows};
    uint64_t k = s->layout == NEP_LAYOUT_RANK ? s->top_k : 1;
    got.x = fetch(c, c->out.x, rows * wire->payload_bytes);
    got.scales = fetch_scales(c, rows);
    got.topk_slots =
        s->layout == NEP_LAYOUT_RANK ? fetch(c, c->out.topk_slots, rows * 4 * k) : NULL;
    got.topk_weights = fetch(c, c->out.topk_weights, rows * 4 * k);
    got.source_rank = fetch(c, c->out.source_rank, rows * 4);
    got.source_token = fetch(c, c->out.source_token, rows * 4);
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
    free(got.topk_slots);
    free(got.topk_weights);
    free(got.source_rank);
    free(got.source_token);
    return wrong;
}

uint64_t gpu_case_check_layout(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    const uint32_t *slots = c->slots[c->world->rank];
    uint64_t tokens = c->num_tokens[c->world->rank];
    uint64_t num_ranks = s->num_ranks;
    uint64_t num_slots = num_ranks * s->slots_per_rank;
    uint64_t sizes[] = {num_ranks * 4, 4 * gpu_num_nodes(s), num_slots * 4, tokens * num_ranks,
                        tokens * s->top_k * 4};
    uint64_t end = 0;
    uint64_t at[5];
    for (uint32_t i = 0; i < 5; i++) {
        at[i] = end;
        end += (sizes[i] + 15) / 16 * 16;
    }
    char *there = NULL;
    char *want = host(end);
    gpu_must((int)cudaMalloc((void **)&there, end + 16), "counts of a layout");
    gpu_must((int)cudaMemsetAsync(there, 0, end, c->world->stream), "counts of a layout");
    const struct nep_layout_counts counts = {.size = sizeof counts,
                                             .rows_per_rank = (uint32_t *)(there + at[0]),
                                             .rows_per_node = (uint32_t *)(there + at[1]),
                                             .rows_per_slot = (uint32_t *)(there + at[2]),
                                             .is_token_in_rank = (uint8_t *)(there + at[3]),
                                             .topk_slots = (uint32_t *)(there + at[4]),
                                             .stream = c->world->stream};
    struct nep_tokens in = c->in;
    in.topk_ids = c->ids_device;
    gpu_must_nep(nep_ep_layout(c->ep, &in, &counts), "layout");
    for (uint64_t t = 0; t < tokens; t++) {
        uint64_t nodes = 0;
        for (uint32_t k = 0; k < s->top_k; k++) {
            uint32_t slot = slots[t * s->top_k + k];
            memcpy(want + at[4] + (t * s->top_k + k) * 4, &slot, 4);
            if (slot != NEP_SLOT_NONE) {
                ((uint32_t *)(want + at[2]))[slot]++;
                want[at[3] + t * num_ranks + slot / s->slots_per_rank] = 1;
                nodes |= 1ull << c->node_of_rank[slot / s->slots_per_rank];
            }
        }
        for (uint64_t r = 0; r < num_ranks; r++) {
            ((uint32_t *)(want + at[0]))[r] += (uint32_t)want[at[3] + t * num_ranks + r];
        }
        for (uint32_t n = 0; n < gpu_num_nodes(s); n++) {
            ((uint32_t *)(want + at[1]))[n] += nodes >> n & 1;
        }
    }
    char *got = fetch(c, there, end);
    uint64_t wrong = 0;
    for (uint32_t i = 0; i < 5; i++) {
        wrong += differ(got + at[i], want + at[i], sizes[i], i == 3 ? 1 : 4, "layout alone", i);
    }
    cudaFree(there);
    free(got);
    free(want);
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
    gpu_must((int)cudaMemcpyAsync((void *)c->expert.y, rows, want->num_rows * bytes,
                                  cudaMemcpyHostToDevice, c->world->stream),
             "expert outputs");
    if (c->back_weights != NULL) { /* those that came with the rows */
        gpu_must((int)cudaMemcpyAsync(c->back_weights, c->out.topk_weights,
                                      want->num_rows * c->shape.top_k * 4, cudaMemcpyDeviceToDevice,
                                      c->world->stream),
                 "weights");
    }
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

/* The addends of a token in order, bias before them, their rows in `rows`. */
static uint32_t take_terms(struct gpu_case *c, uint64_t round, uint32_t token, const uint64_t *at,
                           char *rows, struct nep_term *terms)
{
    const struct gpu_shape *s = &c->shape;
    const uint32_t *slots = c->slots[c->world->rank] + (uint64_t)token * s->top_k;
    const float *weights = c->weights[c->world->rank] + (uint64_t)token * s->top_k;
    bool is_rank_layout = s->layout == NEP_LAYOUT_RANK;
    uint32_t num = 0;
    for (; s->has_bias && num < 2; num++) {
        char *row = rows + num * y_row_bytes(s);
        gpu_case_bias_row(c, num, token, row);
        terms[num] = (struct nep_term){row, 1.0f, NEP_ENDS_NODE | NEP_ENDS_RANK};
    }
    uint32_t first = num; /* of a node */
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
            bool has_weight = !is_rank_layout && (s->has_weights || s->has_weights_late);
            terms[num++] = (struct nep_term){row, has_weight ? weights[k] : 1.0f, 0};
        }
        if (has_any) {
            terms[num - 1].ends = NEP_ENDS_RANK;
        }
        bool ends_node = r + 1 == s->num_ranks || c->node_of_rank[r + 1] != c->node_of_rank[r];
        if (ends_node && num != first) {
            terms[num - 1].ends = NEP_ENDS_RANK | NEP_ENDS_NODE;
            first = num;
        }
    }
    return num;
}

/* Every rank gave back the weights that it got with a row: the sum is the token's own weight. */
static uint64_t check_weights(struct gpu_case *c)
{
    const struct gpu_shape *s = &c->shape;
    uint64_t pairs = (uint64_t)c->num_tokens[c->world->rank] * s->top_k;
    if (c->back_weights == NULL) {
        return 0;
    }
    float *got = fetch(c, c->result.topk_weights, pairs * 4);
    float *want = host(pairs * 4);
    for (uint64_t i = 0; i < pairs; i++) {
        bool is_used = c->slots[c->world->rank][i] != NEP_SLOT_NONE;
        float weight = s->has_weights ? c->weights[c->world->rank][i] : 1.0f;
        want[i] = is_used ? weight + 0.0f : 0.0f;
    }
    uint64_t wrong = differ(got, want, pairs * 4, 4, "weights back", 0);
    free(got);
    free(want);
    return wrong;
}

uint64_t gpu_case_check_combine(struct gpu_case *c, uint64_t round)
{
    const struct gpu_shape *s = &c->shape;
    const struct nep_kernels *kernels = host_kernels();
    uint32_t num_tokens = c->num_tokens[c->world->rank];
    uint64_t bytes = y_row_bytes(s);
    char *y = fetch(c, c->result.y, s->max_tokens * bytes);
    uint64_t *at = find_rows(c, s->layout == NEP_LAYOUT_RANK ? s->num_ranks : s->top_k);
    char *rows = host(34 * bytes);
    char *want = host(bytes);
    struct nep_term terms[34];
    uint64_t wrong = check_weights(c);
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

/* Runs `calls`, from a graph that is captured once. */
static void run(struct gpu_case *c, uint32_t which, void (*calls)(struct gpu_case *))
{
    struct CUstream_st *stream = c->world->stream;
    if (!c->shape.is_graph) {
        calls(c);
        return;
    }
    if (c->graphs[which] == NULL) {
        cudaGraph_t graph = NULL;
        cudaGraphExec_t exec = NULL;
        gpu_must((int)cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
        calls(c);
        gpu_must((int)cudaStreamEndCapture(stream, &graph), "capture");
        gpu_must((int)cudaGraphInstantiate(&exec, graph, 0), "graph");
        gpu_must((int)cudaGraphDestroy(graph), "graph");
        c->graphs[which] = exec;
        gpu_world_meet(c->world);
    }
    gpu_must((int)cudaGraphLaunch(c->graphs[which], stream), "graph");
    gpu_must((int)cudaStreamSynchronize(stream), "graph");
}

uint64_t gpu_case_round(struct gpu_case *c, uint64_t round)
{
    uint64_t wrong = 0;
    struct nep_fault fault;
    gpu_case_draw(c, round);
    c->out.capacity = c->capacity;
    run(c, 0, gpu_case_dispatch);
    wrong += gpu_case_check_dispatch(c);
    if (c->shape.is_overlapped) {
        gpu_case_swap(c);
        wrong += gpu_case_check_dispatch(c);
        gpu_case_swap(c);
    }
    wrong += gpu_case_check_layout(c);
    gpu_case_fill_y(c, round);
    gpu_world_meet(c->world);
    run(c, 1, gpu_case_combine);
    wrong += gpu_case_check_combine(c, round);
    if (c->shape.is_overlapped) {
        gpu_case_swap(c);
        wrong += gpu_case_check_combine(c, round);
        gpu_case_swap(c);
    }
    gpu_must_nep(nep_comm_fault(c->world->comm, &fault), "fault");
    if (fault.status != NEP_OK) {
        printf("rank %u: %s\n", c->world->rank, fault.message);
        wrong++;
    }
    return wrong;
}
