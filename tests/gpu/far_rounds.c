/* SPDX-License-Identifier: Apache-2.0 */
/* Rounds of far_world.h: inputs from a key, the kernels, and every element against the oracle. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/far_world.h"

enum { POISON = 0xee };

static void *fetch(struct far_rank *r, const void *from, uint64_t bytes)
{
    void *to = malloc(bytes + 1);
    far_must(to == NULL, "host memory");
    far_must((int)cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, r->stream), "fetch");
    far_must((int)cudaStreamSynchronize(r->stream), "fetch");
    return to;
}

/* ---- rounds --------------------------------------------------------------------------------- */

static void x_row(void *ctx, uint32_t rank, uint32_t token, void *row)
{
    const struct far_world *w = ctx;
    nep_ref_gen_row(nep_ref_mix(w->shape.key, (uint64_t)rank << 32 | token), false, w->shape.dtype,
                    w->shape.hidden, row);
}

/* Slots of a token are distinct; some are unused. */
static void draw_rank(struct far_world *w, uint64_t round, uint32_t rank)
{
    const struct far_shape *s = &w->shape;
    struct nep_ref_rng rng = {nep_ref_mix(s->key + 7, round << 16 | rank)};
    uint32_t num_slots = w->num_ranks * s->slots_per_rank;
    w->num_tokens[rank] = s->is_full ? s->max_tokens : nep_ref_rng_below(&rng, s->max_tokens + 1);
    for (uint64_t at = 0; at < (uint64_t)w->num_tokens[rank] * s->top_k; at++) {
        uint32_t k = (uint32_t)(at % s->top_k);
        uint32_t *slots = w->slots[rank] + at - k;
        uint32_t i = 0;
        do {
            slots[k] = nep_ref_rng_below(&rng, num_slots);
            for (i = 0; i < k && slots[i] != slots[k]; i++) {
            }
        } while (i < k);
        if (!s->is_full && nep_ref_rng_below(&rng, 8) == 0) {
            slots[k] = NEP_REF_NONE;
        }
        w->weights[rank][at] = (float)(nep_ref_rng_unit(&rng) * 2 - 0.5);
    }
}

/* What the layout kernel leaves, by the host. */
static void upload_layout(struct far_rank *r)
{
    struct far_world *w = r->world;
    const struct far_shape *s = &w->shape;
    uint32_t num = w->num_ranks, per_rank = s->slots_per_rank;
    uint32_t num_counts = num * (1 + per_rank) + s->num_nodes;
    uint64_t pairs = (uint64_t)w->num_tokens[r->rank] * s->top_k;
    uint32_t *index = calloc(pairs + 1, 4);
    uint32_t *counts = calloc(num_counts, 4);
    uint32_t *slot_counts = counts + num + s->num_nodes;
    for (uint32_t t = 0; t < w->num_tokens[r->rank]; t++) {
        const uint32_t *slots = w->slots[r->rank] + (uint64_t)t * s->top_k;
        uint64_t ranks = 0;
        for (uint32_t k = 0; k < s->top_k; k++) {
            if (slots[k] == NEP_REF_NONE) {
                continue;
            }
            uint32_t to = slots[k] / per_rank;
            index[(uint64_t)t * s->top_k + k] =
                s->layout == NEP_LAYOUT_RANK ? counts[to] : slot_counts[slots[k]];
            slot_counts[slots[k]]++;
            ranks |= 1ull << to;
        }
        for (uint32_t to = 0; to < num; to++) {
            counts[to] += ranks >> to & 1;
        }
    }
    far_put(r, r->routing.slots, w->slots[r->rank], pairs * 4);
    far_put(r, r->routing.index, index, pairs * 4);
    far_put(r, r->routing.counts, counts, num_counts * 4);
    far_put(r, (void *)r->in.weight, w->weights[r->rank], pairs * 4);
    free(index);
    free(counts);
}

void far_draw(struct far_rank *r, uint64_t round)
{
    struct far_world *w = r->world;
    const struct far_shape *s = &w->shape;
    far_meet(r);
    draw_rank(w, round, r->rank);
    far_meet(r);
    if (r->rank == 0) {
        w->ref = (struct nep_ref_group){
            .num_ranks = w->num_ranks,
            .num_nodes = s->num_nodes,
            .node_of_rank = w->node_of_rank,
            .slots_per_rank = s->slots_per_rank,
            .top_k = s->top_k,
            .hidden = s->hidden,
            .max_tokens = s->max_tokens,
            .expert_alignment = s->alignment,
            .dtype = s->dtype,
            .wire = s->wire,
            .layout = s->layout,
            .num_tokens = w->num_tokens,
            .slots = (const uint32_t *const *)w->slots,
            .weights = (const float *const *)w->weights,
            .x_row = x_row,
            .x_ctx = w,
            .factor = w->factor,
        };
    }
    r->in.num_tokens = r->combine.num_tokens = w->num_tokens[r->rank];
    uint64_t bytes = (uint64_t)r->in.num_tokens * r->shape.row_bytes;
    uint8_t *x = malloc(bytes + 1);
    for (uint32_t t = 0; t < r->in.num_tokens; t++) {
        x_row(w, r->rank, t, x + (uint64_t)t * r->shape.row_bytes);
    }
    far_put(r, (void *)r->in.x, x, bytes);
    free(x);
    upload_layout(r);
    char *window = w->near + r->rank * w->stride;
    far_must((int)cudaMemsetAsync(window + r->out.x, POISON, w->stride - r->out.x, r->stream),
             "poison");
    far_must((int)cudaMemsetAsync(r->combine.y, POISON,
                                  (uint64_t)s->max_tokens * r->shape.row_bytes, r->stream),
             "poison");
    far_must((int)cudaStreamSynchronize(r->stream), "poison");
    far_meet(r);
}

/* Sanitizers may run kernels of two streams one after the other. With one rank a node none waits
 * for a launch that has not ended, if all go in step. */
static void step(struct far_rank *r, enum nep_status status)
{
    far_must(status != NEP_OK, nep_last_message());
    if (r->world->shape.is_lockstep) {
        far_must((int)cudaStreamSynchronize(r->stream), "kernels");
        far_meet(r);
    }
}

void far_dispatch(struct far_rank *r)
{
    if (r->world->shape.is_whole) {
        step(r, nep_cuda_far_dispatch(&r->dispatch, r->stream));
        return;
    }
    step(r, nep_cuda_far_counts(&r->dispatch, NEP_FAR_BINDS, r->stream));
    step(r, nep_cuda_far_pack(&r->dispatch, r->stream));
    step(r, nep_cuda_far_place(&r->dispatch, r->stream));
    step(r, nep_cuda_far_recv(&r->dispatch, 0, r->stream));
}

void far_combine(struct far_rank *r)
{
    if (r->world->shape.is_whole) {
        step(r, nep_cuda_far_combine(&r->combine, r->stream));
        return;
    }
    step(r, nep_cuda_far_offer(&r->combine, r->stream));
    step(r, nep_cuda_far_reduce(&r->combine, r->stream));
    step(r, nep_cuda_far_sum(&r->combine, r->stream));
}

uint64_t far_status(struct far_rank *r)
{
    far_must((int)cudaStreamSynchronize(r->stream), "kernels");
    uint64_t *status = fetch(r, &r->far.state->run.status, 8);
    uint64_t value = *status;
    free(status);
    return value;
}

/* ---- looking -------------------------------------------------------------------------------- */

static uint64_t report_of(struct far_rank *r, const struct nep_ref_report *report, const char *what)
{
    if (report->wrong != 0) {
        printf("rank %u, %s: %llu wrong: %s\n", r->rank, what, (unsigned long long)report->wrong,
               report->first);
    }
    return report->wrong;
}

static void fetch_counts(struct far_rank *r, struct nep_counts *counts)
{
    uint32_t slots = r->world->shape.slots_per_rank;
    uint64_t *received = fetch(r, r->routing.received, (2 + slots) * 8);
    uint32_t *rows = fetch(r, r->routing.received_rows, (slots + r->world->num_ranks) * 4);
    *counts = (struct nep_counts){
        .size = sizeof *counts,
        .num_rows = received[0],
        .num_real_rows = received[1],
        .rows_per_slot = rows,
        .first_row = received + 2,
        .rows_per_source = rows + slots,
    };
}

uint64_t far_check_dispatch(struct far_rank *r)
{
    struct far_world *w = r->world;
    const struct nep_wire *wire = &r->shape.format;
    char *window = w->near + r->rank * w->stride;
    struct nep_ref_rows want = {0};
    struct nep_ref_report report = {0};
    struct nep_counts counts;
    far_must(!nep_ref_rows_build(&w->ref, r->rank, &want), "oracle");
    fetch_counts(r, &counts);
    nep_ref_check_counts(&w->ref, &want, &counts, &report);
    uint64_t wrong = report_of(r, &report, "counts");
    uint64_t rows = want.num_rows;
    bool is_rank = w->shape.layout == NEP_LAYOUT_RANK;
    uint64_t k = is_rank ? w->shape.top_k : 1;
    struct nep_rows got = {.size = sizeof got, .capacity = rows};
    got.x = fetch(r, window + r->out.x, rows * wire->payload_bytes);
    got.scales = fetch(r, window + r->out.scales, rows * wire->scale_bytes);
    int32_t *slots = fetch(r, window + r->out.topk_slots, rows * 4 * k);
    got.topk_slots = is_rank ? slots : NULL;
    got.topk_weights = fetch(r, window + r->out.topk_weights, rows * 4 * k);
    got.source_rank = fetch(r, window + r->out.source_rank, rows * 4);
    got.source_token = fetch(r, window + r->out.source_token, rows * 4);
    memset(&report, 0, sizeof report);
    nep_ref_check_dispatch(&w->ref, r->rank, &want, &got, &report);
    wrong += report_of(r, &report, "dispatch");
    if (wrong == 0) {
        uint8_t *y = calloc(1, rows * r->shape.row_bytes + 1);
        far_must(!nep_ref_expert_apply(&w->ref, r->rank, &counts, &got, y), "experts");
        far_put(r, window + r->y_offset, y, rows * r->shape.row_bytes);
        free(y);
    }
    free(got.x);
    free(got.scales);
    free(slots);
    free(got.topk_weights);
    free(got.source_rank);
    free(got.source_token);
    free((void *)counts.rows_per_slot);
    free((uint64_t *)counts.first_row - 2);
    nep_ref_rows_free(&want);
    return wrong;
}

uint64_t far_check_combine(struct far_rank *r)
{
    struct nep_ref_report report = {0};
    void *y = fetch(r, r->combine.y, (uint64_t)r->in.num_tokens * r->shape.row_bytes);
    nep_ref_check_combine(&r->world->ref, r->rank, y, &report);
    free(y);
    return report_of(r, &report, "combine");
}
