/* SPDX-License-Identifier: Apache-2.0 */
/* Bias, weights that come back, opaque rows, fp8 that is passed in, other scale kinds. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/multi/seat.h"
#include "tests/unit/cmocka_all.h"

static float bf16_to_float(uint16_t value)
{
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* Small integers and halves are exact in bf16. */
static uint16_t small_bf16(int value)
{
    float number = (float)value * 0.5f;
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* ---- rank layout: weights come back, two biases -------------------------------------------- */

struct sums_case {
    uint64_t seed;
    bool is_mapped;
    uint32_t num_bias;
    bool has_weights;
};

enum { SUM_ELEMENTS = SEAT_TOKENS * SEAT_HIDDEN };

struct sums {
    uint16_t x[SUM_ELEMENTS], bias[2][SUM_ELEMENTS], sum[SUM_ELEMENTS];
    float back[SEAT_TOKENS * SEAT_TOP_K];
    void *y; /* rows of dispatch, handed back as they are */
    float *weights;
};

static struct sums *sums_create(const struct sums_case *c, const struct nep_multi_rank *rank,
                                struct seat *seat)
{
    struct sums *sums = calloc(1, sizeof *sums);
    size_t rows_bytes = SEAT_ROWS * SEAT_HIDDEN * 2, weights_bytes = SEAT_ROWS * SEAT_TOP_K * 4;
    void *weights = NULL;
    if (sums == NULL) {
        return NULL;
    }
    if (c->is_mapped) {
        (void)nep_buffer_alloc(seat->ep, rows_bytes, &sums->y);
        (void)nep_buffer_alloc(seat->ep, weights_bytes, &weights);
    } else {
        sums->y = calloc(1, rows_bytes);
        weights = calloc(1, weights_bytes);
    }
    sums->weights = weights;
    for (uint32_t i = 0; i < SUM_ELEMENTS; i++) {
        sums->x[i] = small_bf16((int)(seat_mix(c->seed, rank->rank + 300, i) % 7) - 3);
        sums->bias[0][i] = small_bf16((int)(i % 5));
        sums->bias[1][i] = small_bf16(-(int)(i % 3));
        sums->sum[i] = 0xffff;
    }
    memset(sums->back, 0xff, sizeof sums->back);
    return sums;
}

static void sums_destroy(const struct sums_case *c, struct seat *seat, struct sums *sums)
{
    if (c->is_mapped) {
        nep_buffer_free(seat->ep, sums->y);
        nep_buffer_free(seat->ep, sums->weights);
    } else {
        free(sums->y);
        free(sums->weights);
    }
    free(sums);
}

static bool go_and_return(struct nep_multi_rank *rank, const struct sums_case *c, struct seat *seat,
                          struct sums *sums)
{
    struct nep_tokens in = seat_tokens(seat, sums->x, NULL);
    struct nep_rows rows = seat_rows(seat, sums->y, NULL);
    struct nep_counts counts;
    struct nep_expert_rows out = {.size = sizeof out, .y = sums->y};
    struct nep_tokens_out result = {
        .size = sizeof result, .num_tokens = SEAT_TOKENS, .y = sums->sum};
    for (uint32_t i = 0; i < c->num_bias; i++) {
        result.bias[i] = sums->bias[i];
    }
    bool is_good = nep_dispatch(seat->ep, seat->handle, &in, &rows, NULL) == NEP_OK &&
                   nep_dispatch_counts(seat->ep, seat->handle, &counts) == NEP_OK;
    if (is_good && c->has_weights) {
        memcpy(sums->weights, seat->topk_weights, counts.num_rows * SEAT_TOP_K * sizeof(float));
        out.topk_weights = sums->weights;
        result.topk_weights = sums->back;
    }
    is_good = is_good && nep_combine(seat->ep, seat->handle, &out, &result, NULL) == NEP_OK;
    return is_good || nep_multi_fail(rank, "%s", nep_last_message());
}

/* Every rank returns the row itself, so a sum has one for each rank visited; all are exact. */
static bool check_token(struct nep_multi_rank *rank, const struct sums_case *c,
                        const struct seat *seat, const struct sums *sums, uint32_t t)
{
    bool visited[SEAT_RANKS] = {false};
    uint32_t num = 0;
    for (uint32_t k = 0; k < SEAT_TOP_K; k++) {
        uint32_t at = t * SEAT_TOP_K + k;
        int32_t id = seat->ids[at];
        float want = id < 0 ? 0.0f : seat->weights[at];
        if (c->has_weights && sums->back[at] != want) {
            return nep_multi_fail(rank, "token %u k %u: weight %g came back, not %g", t, k,
                                  (double)sums->back[at], (double)want);
        }
        if (id >= 0 && !visited[id / 2]) {
            visited[id / 2] = true; /* 2 slots a rank, contiguous */
            num++;
        }
    }
    for (uint32_t i = t * SEAT_HIDDEN; i < (t + 1) * SEAT_HIDDEN; i++) {
        float want = (float)num * bf16_to_float(sums->x[i]);
        for (uint32_t b = 0; b < c->num_bias; b++) {
            want += bf16_to_float(sums->bias[b][i]);
        }
        if (bf16_to_float(sums->sum[i]) != want) {
            return nep_multi_fail(rank, "token %u element %u: %g, not %g", t, i % SEAT_HIDDEN,
                                  (double)bf16_to_float(sums->sum[i]), (double)want);
        }
    }
    return true;
}

static bool bias_and_weights(struct nep_multi_rank *rank)
{
    const struct sums_case *c = rank->arg;
    struct seat *seat = calloc(1, sizeof *seat);
    struct nep_ep_params params = {.layout = NEP_LAYOUT_RANK};
    if (seat == NULL || !seat_open(rank, &params, seat)) {
        return false;
    }
    seat_route(c->seed, rank->rank, seat->ids, seat->weights);
    struct sums *sums = sums_create(c, rank, seat);
    bool is_good = sums != NULL && go_and_return(rank, c, seat, sums);
    for (uint32_t t = 0; is_good && t < SEAT_TOKENS; t++) {
        is_good = check_token(rank, c, seat, sums, t);
    }
    if (sums != NULL) {
        sums_destroy(c, seat, sums);
    }
    seat_close(seat);
    return is_good;
}

/* ---- opaque rows, and fp8 that is passed in: bytes arrive as they were ----------------------- */

struct bytes_case {
    uint64_t seed;
    struct nep_ep_params params;
    uint32_t row_bytes;
    uint32_t scale_bytes;
};

/* Byte b of row i's scales: in rows, or in the columns that nearep.h describes. */
static uint8_t scale_byte(const struct bytes_case *c, const uint8_t *scales, uint64_t i, uint32_t b)
{
    if (c->params.scale_order == NEP_SCALES_ROWS) {
        return scales[i * c->scale_bytes + b];
    }
    bool is_fixed = c->params.layout == NEP_LAYOUT_EXPERT_FRONT;
    uint64_t rows = is_fixed ? SEAT_RANKS * SEAT_TOKENS : SEAT_ROWS;
    uint64_t column = (rows + 3) / 4 * 4;
    const uint8_t *matrix = scales + i / rows * c->scale_bytes * column;
    return matrix[(b / 4 * column + i % rows) * 4 + b % 4];
}

static bool bytes_arrive(struct nep_multi_rank *rank)
{
    const struct bytes_case *c = rank->arg;
    struct seat *seat = calloc(1, sizeof *seat);
    if (seat == NULL || !seat_open(rank, &c->params, seat)) {
        return false;
    }
    seat_route(c->seed, rank->rank, seat->ids, seat->weights);
    uint8_t *x = malloc((size_t)SEAT_TOKENS * c->row_bytes);
    uint8_t *scales = malloc((size_t)SEAT_TOKENS * c->scale_bytes + 1);
    uint8_t *out = malloc((size_t)SEAT_ROWS * c->row_bytes);
    uint8_t *out_scales = malloc((size_t)SEAT_ROWS * c->scale_bytes + 1);
    for (uint32_t i = 0; i < SEAT_TOKENS * c->row_bytes; i++) {
        x[i] = (uint8_t)seat_mix(c->seed, rank->rank, 7 * i);
    }
    for (uint32_t i = 0; i < SEAT_TOKENS * c->scale_bytes; i++) {
        scales[i] = (uint8_t)seat_mix(c->seed, rank->rank + 50, 7 * i);
    }
    memset(out, 0xa5, (size_t)SEAT_ROWS * c->row_bytes);
    struct nep_tokens in = seat_tokens(seat, x, c->scale_bytes != 0 ? scales : NULL);
    struct nep_rows rows = seat_rows(seat, out, c->scale_bytes != 0 ? out_scales : NULL);
    struct nep_counts counts;
    if (nep_dispatch(seat->ep, seat->handle, &in, &rows, NULL) != NEP_OK ||
        nep_dispatch_counts(seat->ep, seat->handle, &counts) != NEP_OK) {
        return nep_multi_fail(rank, "%s", nep_last_message());
    }
    for (uint64_t i = 0; i < counts.num_rows; i++) {
        uint32_t source = seat->source_rank[i], token = seat->source_token[i];
        for (uint32_t b = 0; b < c->row_bytes; b++) {
            if (out[i * c->row_bytes + b] !=
                (uint8_t)seat_mix(c->seed, source, 7ull * (token * c->row_bytes + b))) {
                return nep_multi_fail(rank, "row %llu (token %u of rank %u): byte %u differs",
                                      (unsigned long long)i, token, source, b);
            }
        }
        for (uint32_t b = 0; b < c->scale_bytes; b++) {
            if (scale_byte(c, out_scales, i, b) !=
                (uint8_t)seat_mix(c->seed, source + 50, 7ull * (token * c->scale_bytes + b))) {
                return nep_multi_fail(rank, "row %llu: byte %u of its scales differs",
                                      (unsigned long long)i, b);
            }
        }
    }
    free(x);
    free(scales);
    free(out);
    free(out_scales);
    seat_close(seat);
    return true;
}

/* ---- tests ---- */

static void test_combine_bias_and_weights_return(void **state)
{
    (void)state;
    uint64_t seed = nep_multi_seed("bias");
    struct sums_case cases[] = {
        {seed, true, 2, true},      {seed + 1, false, 2, true},  {seed + 2, true, 1, false},
        {seed + 3, false, 0, true}, {seed + 4, false, 1, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        seat_run(bias_and_weights, &cases[i]);
    }
}

static void test_dispatch_bytes_pass_through(void **state)
{
    (void)state;
    uint64_t seed = nep_multi_seed("bytes");
    struct bytes_case cases[] = {
        {seed, {.layout = NEP_LAYOUT_RANK, .wire = NEP_DTYPE_OPAQUE, .row_bytes = 33}, 33, 0},
        {seed,
         {.wire = NEP_DTYPE_OPAQUE, .row_bytes = SEAT_HIDDEN / 2, .scale_bytes = SEAT_HIDDEN / 16},
         SEAT_HIDDEN / 2,
         SEAT_HIDDEN / 16},
        {seed, {.wire = NEP_DTYPE_FP8_E4M3}, SEAT_HIDDEN, 8},
        {seed, {.wire = NEP_DTYPE_FP8_E4M3, .scale = NEP_SCALE_POW2}, SEAT_HIDDEN, 8},
        {seed, {.wire = NEP_DTYPE_FP8_E4M3, .scale = NEP_SCALE_UE8M0}, SEAT_HIDDEN, 2},
        {seed,
         {.wire = NEP_DTYPE_OPAQUE,
          .row_bytes = SEAT_HIDDEN / 2,
          .scale_bytes = 12,
          .scale_order = NEP_SCALES_COLUMNS},
         SEAT_HIDDEN / 2,
         12},
        {seed,
         {.layout = NEP_LAYOUT_RANK, .wire = NEP_DTYPE_FP8_E4M3, .scale_order = NEP_SCALES_COLUMNS},
         SEAT_HIDDEN,
         8},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        seat_run(bytes_arrive, &cases[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_combine_bias_and_weights_return),
        cmocka_unit_test(test_dispatch_bytes_pass_through),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
