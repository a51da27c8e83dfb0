/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the random schedules do not vary: bias, weights that come back, opaque rows, fp8 that is
 * passed in, other scale kinds, maps staged while running, outputs that are too small, calls out of
 * order. 2 nodes of 2 ranks as threads. Expected values are stated here, from the routing alone.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/multi/harness.h"
#include "tests/unit/cmocka_all.h"

enum { RANKS = 4, TOKENS = 40, EXPERTS = 8, TOP_K = 3, HIDDEN = 144, MOST_ROWS = 4 * 40 * 3 };

/* A small generator, the same on every rank. */
static uint32_t mix(uint64_t seed, uint64_t a, uint64_t b)
{
    uint64_t z = seed + a * 0x9e3779b97f4a7c15ull + b * 0xd1342543de82ef95ull;
    z = (z ^ (z >> 29)) * 0xbf58476d1ce4e5b9ull;
    return (uint32_t)(z ^ (z >> 32));
}

/* Distinct experts, -1 now and then. */
static void route(uint64_t seed, uint32_t rank, int32_t *ids, float *weights)
{
    for (uint32_t t = 0; t < TOKENS; t++) {
        for (uint32_t k = 0; k < TOP_K; k++) {
            uint32_t at = t * TOP_K + k;
            ids[at] = (int32_t)((mix(seed, rank, t) + k * 3) % EXPERTS);
            if (mix(seed, rank + 100, at) % 9 == 0) {
                ids[at] = -1;
            }
            weights[at] = 0.25f * (float)(1 + mix(seed, rank + 200, at) % 8);
        }
    }
}

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

struct seat {
    struct nep_comm *comm;
    struct nep_ep *ep;
    struct nep_handle *handle;
    int32_t ids[TOKENS * TOP_K];
    float weights[TOKENS * TOP_K];
    uint32_t source_rank[MOST_ROWS];
    uint32_t source_token[MOST_ROWS];
    int32_t topk_slots[MOST_ROWS * TOP_K];
    float topk_weights[MOST_ROWS * TOP_K];
};

static bool open_seat(struct nep_multi_rank *rank, const struct nep_ep_params *params,
                      struct seat *seat)
{
    static const uint32_t sizes[] = {2, 2};
    struct nep_comm_params comm = {.size = sizeof comm,
                                   .rank = rank->rank,
                                   .num_ranks = RANKS,
                                   .bootstrap = &rank->bootstrap,
                                   .ranks_per_node = sizes,
                                   .num_nodes = 2,
                                   .timeout_ns = 60000000000ull};
    struct nep_ep_params full = *params;
    full.size = sizeof full;
    full.num_experts = EXPERTS;
    full.top_k = TOP_K;
    full.hidden = HIDDEN;
    full.max_tokens = TOKENS;
    full.pool_bytes = 8 << 20;
    if (nep_comm_create(&comm, &seat->comm) != NEP_OK ||
        nep_ep_create(seat->comm, &full, &seat->ep) != NEP_OK ||
        nep_handle_create(seat->ep, &seat->handle) != NEP_OK) {
        return nep_multi_fail(rank, "creation: %s", nep_last_message());
    }
    return true;
}

static void close_seat(struct seat *seat)
{
    nep_handle_destroy(seat->handle);
    nep_ep_destroy(seat->ep);
    nep_comm_destroy(seat->comm);
    free(seat);
}

static struct nep_tokens tokens_of(struct seat *seat, const void *x, const void *scales)
{
    return (struct nep_tokens){.size = sizeof(struct nep_tokens),
                               .num_tokens = TOKENS,
                               .x = x,
                               .scales = scales,
                               .topk_ids = seat->ids,
                               .topk_weights = seat->weights};
}

static struct nep_rows rows_of(struct seat *seat, void *x, void *scales)
{
    return (struct nep_rows){.size = sizeof(struct nep_rows),
                             .x = x,
                             .capacity = MOST_ROWS,
                             .scales = scales,
                             .topk_slots = seat->topk_slots,
                             .topk_weights = seat->topk_weights,
                             .source_rank = seat->source_rank,
                             .source_token = seat->source_token};
}

/* ---- rank layout: weights come back, two biases -------------------------------------------- */

static bool bias_and_weights(struct nep_multi_rank *rank)
{
    uint64_t seed = *(const uint64_t *)rank->arg;
    bool is_mapped = seed % 2 == 0;
    struct seat *seat = calloc(1, sizeof *seat);
    struct nep_ep_params params = {.layout = NEP_LAYOUT_RANK};
    if (seat == NULL || !open_seat(rank, &params, seat)) {
        return false;
    }
    route(seed, rank->rank, seat->ids, seat->weights);
    uint16_t *x = calloc(TOKENS * HIDDEN, 2), *bias[2], *sum = calloc(TOKENS * HIDDEN, 2);
    void *y = NULL, *w = NULL;
    bias[0] = calloc(TOKENS * HIDDEN, 2);
    bias[1] = calloc(TOKENS * HIDDEN, 2);
    if (is_mapped) {
        (void)nep_buffer_alloc(seat->ep, MOST_ROWS * HIDDEN * 2, &y);
        (void)nep_buffer_alloc(seat->ep, MOST_ROWS * TOP_K * 4, &w);
    } else {
        y = calloc(MOST_ROWS * HIDDEN, 2);
        w = calloc(MOST_ROWS * TOP_K, 4);
    }
    for (uint32_t i = 0; i < TOKENS * HIDDEN; i++) {
        x[i] = small_bf16((int)(mix(seed, rank->rank + 300, i) % 7) - 3);
        bias[0][i] = small_bf16((int)(i % 5));
        bias[1][i] = small_bf16(-(int)(i % 3));
        sum[i] = 0xffff;
    }
    struct nep_tokens in = tokens_of(seat, x, NULL);
    struct nep_rows rows = rows_of(seat, y, NULL);
    struct nep_counts counts;
    bool is_good = nep_dispatch(seat->ep, seat->handle, &in, &rows, NULL) == NEP_OK &&
                   nep_dispatch_counts(seat->ep, seat->handle, &counts) == NEP_OK;
    if (is_good) {
        memcpy(w, seat->topk_weights, counts.num_rows * TOP_K * sizeof(float));
    }
    float back[TOKENS * TOP_K];
    memset(back, 0xff, sizeof back);
    struct nep_expert_rows out = {.size = sizeof out, .y = y, .topk_weights = w};
    struct nep_tokens_out result = {.size = sizeof result,
                                    .num_tokens = TOKENS,
                                    .y = sum,
                                    .bias = {bias[0], bias[1]},
                                    .topk_weights = back};
    is_good = is_good && nep_combine(seat->ep, seat->handle, &out, &result, NULL) == NEP_OK;
    if (!is_good) {
        return nep_multi_fail(rank, "%s", nep_last_message());
    }
    for (uint32_t t = 0; t < TOKENS; t++) {
        bool visited[RANKS] = {false};
        uint32_t num = 0;
        for (uint32_t k = 0; k < TOP_K; k++) {
            int32_t id = seat->ids[t * TOP_K + k];
            float want = id < 0 ? 0.0f : seat->weights[t * TOP_K + k];
            if (back[t * TOP_K + k] != want) {
                return nep_multi_fail(rank, "token %u k %u: weight %g came back, not %g", t, k,
                                      (double)back[t * TOP_K + k], (double)want);
            }
            if (id >= 0 && !visited[id / 2]) {
                visited[id / 2] = true; /* 2 slots a rank, contiguous */
                num++;
            }
        }
        for (uint32_t h = 0; h < HIDDEN; h++) {
            uint32_t i = t * HIDDEN + h;
            /* every rank returns the row itself; all partial sums are exact here */
            float want = bf16_to_float(bias[0][i]) + bf16_to_float(bias[1][i]) +
                         (float)num * bf16_to_float(x[i]);
            if (bf16_to_float(sum[i]) != want) {
                return nep_multi_fail(rank, "token %u element %u: %g, not %g", t, h,
                                      (double)bf16_to_float(sum[i]), (double)want);
            }
        }
    }
    if (is_mapped) {
        nep_buffer_free(seat->ep, y);
        nep_buffer_free(seat->ep, w);
    } else {
        free(y);
        free(w);
    }
    free(x);
    free(bias[0]);
    free(bias[1]);
    free(sum);
    close_seat(seat);
    return true;
}

/* ---- opaque rows, and fp8 that is passed in: bytes arrive as they were ----------------------- */

struct bytes_case {
    uint64_t seed;
    struct nep_ep_params params;
    uint32_t row_bytes;
    uint32_t scale_bytes;
};

static bool bytes_arrive(struct nep_multi_rank *rank)
{
    const struct bytes_case *c = rank->arg;
    struct seat *seat = calloc(1, sizeof *seat);
    if (seat == NULL || !open_seat(rank, &c->params, seat)) {
        return false;
    }
    route(c->seed, rank->rank, seat->ids, seat->weights);
    uint8_t *x = malloc((size_t)TOKENS * c->row_bytes);
    uint8_t *scales = malloc((size_t)TOKENS * c->scale_bytes + 1);
    uint8_t *out = malloc((size_t)MOST_ROWS * c->row_bytes);
    uint8_t *out_scales = malloc((size_t)MOST_ROWS * c->scale_bytes + 1);
    for (uint32_t i = 0; i < TOKENS * c->row_bytes; i++) {
        x[i] = (uint8_t)mix(c->seed, rank->rank, 7 * i);
    }
    for (uint32_t i = 0; i < TOKENS * c->scale_bytes; i++) {
        scales[i] = (uint8_t)mix(c->seed, rank->rank + 50, 7 * i);
    }
    memset(out, 0xa5, (size_t)MOST_ROWS * c->row_bytes);
    struct nep_tokens in = tokens_of(seat, x, c->scale_bytes != 0 ? scales : NULL);
    struct nep_rows rows = rows_of(seat, out, c->scale_bytes != 0 ? out_scales : NULL);
    struct nep_counts counts;
    if (nep_dispatch(seat->ep, seat->handle, &in, &rows, NULL) != NEP_OK ||
        nep_dispatch_counts(seat->ep, seat->handle, &counts) != NEP_OK) {
        return nep_multi_fail(rank, "%s", nep_last_message());
    }
    for (uint64_t i = 0; i < counts.num_rows; i++) {
        uint32_t source = seat->source_rank[i], token = seat->source_token[i];
        for (uint32_t b = 0; b < c->row_bytes; b++) {
            if (out[i * c->row_bytes + b] !=
                (uint8_t)mix(c->seed, source, 7ull * (token * c->row_bytes + b))) {
                return nep_multi_fail(rank, "row %llu (token %u of rank %u): byte %u differs",
                                      (unsigned long long)i, token, source, b);
            }
        }
        for (uint32_t b = 0; b < c->scale_bytes; b++) {
            if (out_scales[i * c->scale_bytes + b] !=
                (uint8_t)mix(c->seed, source + 50, 7ull * (token * c->scale_bytes + b))) {
                return nep_multi_fail(rank, "row %llu: byte %u of its scales differs",
                                      (unsigned long long)i, b);
            }
        }
    }
    free(x);
    free(scales);
    free(out);
    free(out_scales);
    close_seat(seat);
    return true;
}

/* ---- maps staged while running --------------------------------------------------------------- */

/* Experts rotated by `by` slots. */
static struct nep_map *rotated(uint32_t by)
{
    char path[] = "/tmp/nep-map-XXXXXX";
    int fd = mkstemp(path);
    FILE *file = fd >= 0 ? fdopen(fd, "w") : NULL;
    if (file == NULL) {
        return NULL;
    }
    fprintf(file, "nepmap 1\nlayers 1 experts %d nodes 2 ranks_per_node 2,2 slots_per_rank 2\n",
            EXPERTS);
    for (uint32_t e = 0; e < EXPERTS; e++) {
        uint32_t slot = (e + by) % EXPERTS;
        fprintf(file, "0 %u %u:%u\n", e, slot / 2, slot % 2);
    }
    fclose(file);
    struct nep_map *map = NULL;
    if (nep_map_load(path, &map) != NEP_OK) {
        fprintf(stderr, "%s\n", nep_last_message());
    }
    remove(path);
    return map;
}

static bool staged_maps(struct nep_multi_rank *rank)
{
    uint64_t seed = *(const uint64_t *)rank->arg;
    struct seat *seat = calloc(1, sizeof *seat);
    struct nep_ep_params params = {.layout = NEP_LAYOUT_RANK};
    if (seat == NULL || !open_seat(rank, &params, seat)) {
        return false;
    }
    route(seed, rank->rank, seat->ids, seat->weights);
    uint16_t *x = calloc(TOKENS * HIDDEN, 2), *out = calloc(MOST_ROWS * HIDDEN, 2);
    struct nep_map *maps[] = {rotated(3), rotated(5)};
    uint32_t versions[2];
    if (maps[0] == NULL || maps[1] == NULL ||
        nep_ep_stage_map(seat->ep, maps[0], 2, &versions[0]) != NEP_OK ||
        nep_ep_stage_map(seat->ep, maps[1], 3, &versions[1]) != NEP_OK ||
        nep_ep_stage_map(seat->ep, maps[1], 3, NULL) != NEP_ERR_INVALID) {
        return nep_multi_fail(rank, "staging: %s", nep_last_message());
    }
    nep_map_destroy(maps[0]); /* the ep holds them */
    nep_map_destroy(maps[1]);
    static const uint32_t rotation[] = {0, 0, 3, 5, 5};
    for (uint32_t op = 0; op < 5; op++) {
        struct nep_tokens in = tokens_of(seat, x, NULL);
        struct nep_rows rows = rows_of(seat, out, NULL);
        struct nep_counts counts;
        struct nep_map_state state;
        if (nep_dispatch(seat->ep, seat->handle, &in, &rows, NULL) != NEP_OK ||
            nep_dispatch_counts(seat->ep, seat->handle, &counts) != NEP_OK ||
            nep_ep_map_state(seat->ep, &state) != NEP_OK) {
            return nep_multi_fail(rank, "op %u: %s", op, nep_last_message());
        }
        uint32_t want_version = op < 2 ? 0 : op < 3 ? versions[0] : versions[1];
        if (state.version != want_version || state.oldest_held != want_version) {
            return nep_multi_fail(rank, "op %u: version %u, oldest %u", op, state.version,
                                  state.oldest_held);
        }
        for (uint64_t i = 0; i < counts.num_rows; i++) {
            int32_t ids[TOKENS * TOP_K];
            float weights[TOKENS * TOP_K];
            route(seed, seat->source_rank[i], ids, weights);
            for (uint32_t k = 0; k < TOP_K; k++) {
                int32_t id = ids[seat->source_token[i] * TOP_K + k];
                uint32_t slot = id < 0 ? UINT32_MAX : ((uint32_t)id + rotation[op]) % EXPERTS;
                int32_t want = id >= 0 && slot / 2 == rank->rank ? (int32_t)(slot % 2) : -1;
                if (seat->topk_slots[i * TOP_K + k] != want) {
                    return nep_multi_fail(rank, "op %u row %llu k %u: slot %d, not %d", op,
                                          (unsigned long long)i, k, seat->topk_slots[i * TOP_K + k],
                                          want);
                }
            }
        }
    }
    free(x);
    free(out);
    close_seat(seat);
    return true;
}

/* A rank that stages another map is named by all, within the operation. */
static bool staged_differently(struct nep_multi_rank *rank)
{
    uint64_t seed = *(const uint64_t *)rank->arg;
    struct seat *seat = calloc(1, sizeof *seat);
    struct nep_ep_params params = {.layout = NEP_LAYOUT_RANK};
    if (seat == NULL || !open_seat(rank, &params, seat)) {
        return false;
    }
    route(seed, rank->rank, seat->ids, seat->weights);
    uint16_t *x = calloc(TOKENS * HIDDEN, 2), *out = calloc(MOST_ROWS * HIDDEN, 2);
    struct nep_map *map = rotated(rank->rank == 2 ? 1 : 3);
    struct nep_tokens in = tokens_of(seat, x, NULL);
    struct nep_rows rows = rows_of(seat, out, NULL);
    enum nep_status status = nep_ep_stage_map(seat->ep, map, 0, NULL);
    nep_map_destroy(map);
    if (status == NEP_OK) {
        status = nep_dispatch(seat->ep, seat->handle, &in, &rows, NULL);
    }
    if (status != NEP_ERR_MISMATCH && status != NEP_ERR_PEER_LOST) {
        return nep_multi_fail(rank, "status %d: %s", (int)status, nep_last_message());
    }
    if (rank->rank != 2 && strstr(nep_last_message(), "rank 2") == NULL) {
        return nep_multi_fail(rank, "rank 2 is not named: %s", nep_last_message());
    }
    bool is_good = nep_multi_barrier(rank);
    free(x);
    free(out);
    close_seat(seat);
    return is_good;
}

/* ---- calls that are refused leave everything usable ------------------------------------------ */

static bool refused_calls(struct nep_multi_rank *rank)
{
    uint64_t seed = *(const uint64_t *)rank->arg;
    struct seat *seat = calloc(1, sizeof *seat);
    struct nep_ep_params params = {.outstanding = 1};
    struct nep_handle *other = NULL;
    if (seat == NULL || !open_seat(rank, &params, seat) ||
        nep_handle_create(seat->ep, &other) != NEP_OK) {
        return false;
    }
    route(seed, rank->rank, seat->ids, seat->weights);
    uint16_t *x = calloc(TOKENS * HIDDEN, 2), *out = calloc(MOST_ROWS * HIDDEN, 2);
    struct nep_tokens in = tokens_of(seat, x, NULL);
    struct nep_rows rows = rows_of(seat, out, NULL);
    struct nep_expert_rows y = {.size = sizeof y, .y = out};
    struct nep_tokens_out sum = {.size = sizeof sum, .num_tokens = TOKENS, .y = x};
    struct nep_counts counts;
    int32_t kept = seat->ids[5];
#define REFUSED(call, want)                                                                        \
    do {                                                                                           \
        enum nep_status got = (call);                                                              \
        if (got != (want)) {                                                                       \
            return nep_multi_fail(rank, "%s: %d, not %d: %s", #call, (int)got, (int)(want),        \
                                  nep_last_message());                                             \
        }                                                                                          \
    } while (0)
    REFUSED(nep_combine_send(seat->ep, seat->handle, &y, NULL), NEP_ERR_INVALID);
    REFUSED(nep_dispatch_recv(seat->ep, seat->handle, &rows, NULL), NEP_ERR_INVALID);
    REFUSED(nep_dispatch_counts(seat->ep, seat->handle, &counts), NEP_ERR_INVALID);
    seat->ids[5] = EXPERTS;
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_ERR_INVALID);
    seat->ids[5] = -2;
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_ERR_INVALID);
    seat->ids[5] = kept;
    in.num_tokens = TOKENS + 1;
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_ERR_INVALID);
    in.num_tokens = TOKENS;
    in.layer = 1;
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_ERR_INVALID);
    in.layer = 0;
    in.scales = x;
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_ERR_INVALID);
    in.scales = NULL;
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, x), NEP_ERR_UNSUPPORTED);
    in.size = 4;
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_ERR_INVALID);
    in.size = sizeof in;

    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_OK);
    REFUSED(nep_dispatch_send(seat->ep, other, &in, NULL), NEP_ERR_BUSY);
    REFUSED(nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_ERR_BUSY);
    REFUSED(nep_dispatch_counts(seat->ep, seat->handle, &counts), NEP_OK);
    rows.capacity = counts.num_rows - 1;
    REFUSED(nep_dispatch_recv(seat->ep, seat->handle, &rows, NULL), NEP_ERR_OVERFLOW);
    rows.capacity = counts.num_rows;
    REFUSED(nep_dispatch_recv(seat->ep, seat->handle, &rows, NULL), NEP_OK);
    y.topk_weights = seat->weights;
    REFUSED(nep_combine_send(seat->ep, seat->handle, &y, NULL), NEP_ERR_INVALID);
    y.topk_weights = NULL;
    REFUSED(nep_combine_send(seat->ep, seat->handle, &y, NULL), NEP_OK);
    sum.num_tokens = TOKENS - 1;
    REFUSED(nep_combine_recv(seat->ep, seat->handle, &sum, NULL), NEP_ERR_INVALID);
    sum.num_tokens = TOKENS;
    REFUSED(nep_combine_recv(seat->ep, seat->handle, &sum, NULL), NEP_OK);
    uint64_t most = 0, load[EXPERTS], want[EXPERTS] = {0};
    REFUSED(nep_ep_max_rows(seat->ep, &most), NEP_OK);
    if (most != RANKS * TOKENS * TOP_K || most < counts.num_rows) {
        return nep_multi_fail(rank, "at most %llu rows", (unsigned long long)most);
    }
    REFUSED(nep_ep_load(seat->ep, 1, load), NEP_ERR_INVALID);
    REFUSED(nep_ep_load(seat->ep, 0, load), NEP_OK);
    for (uint32_t i = 0; i < TOKENS * TOP_K; i++) {
        if (seat->ids[i] >= 0) {
            want[seat->ids[i]]++;
        }
    }
    if (memcmp(load, want, sizeof load) != 0) {
        return nep_multi_fail(rank, "the load per expert is not that of the one dispatch");
    }
#undef REFUSED
    nep_handle_destroy(other);
    free(x);
    free(out);
    close_seat(seat);
    return true;
}

/* ---- a forked child ----------------------------------------------------------------------------
 */

static bool forked_child(struct nep_multi_rank *rank)
{
    struct seat *seat = calloc(1, sizeof *seat);
    struct nep_ep_params params = {0};
    if (seat == NULL || !open_seat(rank, &params, seat)) {
        return false;
    }
    int status = 0;
    if (rank->rank == 0) {
        pid_t pid = fork();
        if (pid == 0) {
            struct nep_stats stats;
            struct nep_tokens in = {.size = sizeof in};
            bool is_refused =
                nep_dispatch_send(seat->ep, seat->handle, &in, NULL) == NEP_ERR_BROKEN &&
                strstr(nep_last_message(), "fork") != NULL &&
                nep_ep_stats(seat->ep, &stats) == NEP_OK;
            close_seat(seat);
            _exit(is_refused ? 0 : 1);
        }
        if (pid < 0 || waitpid(pid, &status, 0) != pid || status != 0) {
            return nep_multi_fail(rank, "the child ended with %d", status);
        }
    }
    if (!nep_multi_barrier(rank)) {
        return false;
    }
    /* The parent is unharmed: a dispatch without tokens is a dispatch. */
    struct nep_tokens in = {.size = sizeof in};
    struct nep_rows out = {.size = sizeof out};
    if (nep_dispatch(seat->ep, seat->handle, &in, &out, NULL) != NEP_OK) {
        return nep_multi_fail(rank, "after the child: %s", nep_last_message());
    }
    close_seat(seat);
    return true;
}

/* ---- tests ------------------------------------------------------------------------------------
 */

static void run(nep_multi_fn fn, void *arg)
{
    struct nep_multi_result result;
    nep_multi_run_threads(RANKS, fn, arg, &result);
    if (result.num_failed != 0) {
        fail_msg("%u ranks failed: %s", result.num_failed, result.error);
    }
}

static void test_combine_bias_and_weights_return(void **state)
{
    (void)state;
    uint64_t seed = nep_multi_seed("bias") & ~1ull;
    for (uint64_t i = 0; i < 2; i++) {
        uint64_t one = seed + i; /* even: mapped, odd: private */
        run(bias_and_weights, &one);
    }
}

static void test_dispatch_bytes_pass_through(void **state)
{
    (void)state;
    uint64_t seed = nep_multi_seed("bytes");
    struct bytes_case cases[] = {
        {seed, {.layout = NEP_LAYOUT_RANK, .wire = NEP_DTYPE_OPAQUE, .row_bytes = 33}, 33, 0},
        {seed,
         {.wire = NEP_DTYPE_OPAQUE, .row_bytes = HIDDEN / 2, .scale_bytes = HIDDEN / 16},
         HIDDEN / 2,
         HIDDEN / 16},
        {seed, {.wire = NEP_DTYPE_FP8_E4M3}, HIDDEN, 8},
        {seed, {.wire = NEP_DTYPE_FP8_E4M3, .scale = NEP_SCALE_POW2}, HIDDEN, 8},
        {seed, {.wire = NEP_DTYPE_FP8_E4M3, .scale = NEP_SCALE_UE8M0}, HIDDEN, 2},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        run(bytes_arrive, &cases[i]);
    }
}

static void test_map_staged_counts_from_its_op(void **state)
{
    (void)state;
    uint64_t seed = nep_multi_seed("maps");
    run(staged_maps, &seed);
}

static void test_map_staged_differently_names_the_rank(void **state)
{
    (void)state;
    uint64_t seed = nep_multi_seed("maps that differ");
    run(staged_differently, &seed);
}

static void test_calls_refused_leave_the_ep_usable(void **state)
{
    (void)state;
    uint64_t seed = nep_multi_seed("refused");
    run(refused_calls, &seed);
}

static void test_fork_child_is_refused_and_harmless(void **state)
{
    (void)state;
    struct nep_multi_result result;
    nep_multi_run_processes(RANKS, forked_child, NULL, 60, &result);
    if (result.num_failed != 0) {
        fail_msg("%u ranks failed: %s", result.num_failed, result.error);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_combine_bias_and_weights_return),
        cmocka_unit_test(test_dispatch_bytes_pass_through),
        cmocka_unit_test(test_map_staged_counts_from_its_op),
        cmocka_unit_test(test_map_staged_differently_names_the_rank),
        cmocka_unit_test(test_calls_refused_leave_the_ep_usable),
        cmocka_unit_test(test_fork_child_is_refused_and_harmless),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
