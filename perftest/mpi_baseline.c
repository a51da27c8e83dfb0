/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The baseline: one row per (token, rank), packed into one send buffer, one MPI_Alltoallv each way.
 * Expert layout: routing data travels at the end of each row (one exchange less), rows are
 * scattered to their experts after arrival, and reduced in fp32 per received row before they go
 * back. Rank layout: routing data travels apart, so that rows land where the caller wants them and
 * leave from there; no scatter and no reduction. Buffers exist before the timed parts and are sized
 * by the most that this run needs.
 */
#include "perftest/mpi_baseline.h"

#include <math.h>
#include <mpi.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/clock.h"
#include "perftest/perf.h"

/* Beside each row: which of the token's choices live on the destination. */
struct meta {
    uint32_t token;
    uint32_t num;
    uint16_t slot[32];
    float weight[32];
};

struct nep_perf_mpi {
    struct nep_perf_rank *rank;
    const struct nep_perf_kernels *kernels;
    uint32_t num_ranks;
    uint32_t hidden;
    uint32_t top_k;
    uint32_t slots_per_rank;
    size_t payload;
    size_t meta_bytes; /* as much of struct meta as K needs */
    size_t row_bytes;  /* on the way out */
    bool is_rank_layout;
    const struct nep_ref_group *group; /* of the batch at hand */
    MPI_Datatype row_type;
    MPI_Datatype value_type;
    MPI_Datatype meta_type;
    int *send_counts;
    int *send_first;
    int *recv_counts;
    int *recv_first;
    int *cursor;
    uint32_t *slots; /* of the own tokens, [T][K] */
    uint32_t *where; /* [T][K] row in the send buffer of the i-th destination */
    uint16_t *dests; /* [T][K] destinations of a token */
    uint16_t *num_dests;
    char *x;
    char *y;
    char *send;
    char *recv;
    char *meta_send;
    char *meta_recv;
    char *expert;       /* expert layout: [pairs][H] */
    uint32_t *position; /* (received row, j) -> row in expert */
    uint32_t *slot_first;
    float *acc;
    uint64_t num_received;
    size_t rows_bytes; /* of where dispatched rows end up: expert, or recv */
    struct nep_perf_sample *samples;
    uint64_t num_samples;
    struct nep_ref_report report;
};

/* Touched before use, huge pages where the machine gives them. */
static void *big_alloc(size_t bytes)
{
    void *memory =
        mmap(NULL, bytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        MPI_Abort(MPI_COMM_WORLD, NEP_PERF_FAILED);
    }
    madvise(memory, bytes + 4096, MADV_HUGEPAGE);
    return memory;
}

static void *small_alloc(size_t num, size_t bytes)
{
    void *memory = calloc(num + 1, bytes);
    if (memory == NULL) {
        MPI_Abort(MPI_COMM_WORLD, NEP_PERF_FAILED);
    }
    return memory;
}

static void alloc_counts(struct nep_perf_mpi *mpi)
{
    mpi->send_counts = small_alloc(mpi->num_ranks, sizeof(int));
    mpi->send_first = small_alloc(mpi->num_ranks, sizeof(int));
    mpi->recv_counts = small_alloc(mpi->num_ranks, sizeof(int));
    mpi->recv_first = small_alloc(mpi->num_ranks, sizeof(int));
    mpi->cursor = small_alloc(mpi->num_ranks, sizeof(int));
    mpi->slot_first = small_alloc(mpi->slots_per_rank + 1, sizeof(uint32_t));
}

/* Most rows that arrive here: (token, rank) pairs, found by looking at all batches. */
static uint64_t most_received(struct nep_perf_mpi *mpi, uint64_t *pairs_p)
{
    const struct nep_perf_options *options = &mpi->rank->options;
    uint32_t me = mpi->rank->seat->rank;
    uint64_t batches = (uint64_t)options->warmup + options->iters;
    uint64_t most = 0;
    for (uint64_t batch = 0; batch < batches; batch++) {
        const struct nep_ref_group *group = nep_perf_plan_group(mpi->rank->plan, batch, true, me);
        uint64_t rows = 0;
        uint64_t pairs = 0;
        for (uint32_t r = 0; r < mpi->num_ranks; r++) {
            for (uint32_t t = 0; t < group->num_tokens[r]; t++) {
                uint64_t before = pairs;
                for (uint32_t k = 0; k < mpi->top_k; k++) {
                    uint32_t slot = group->slots[r][(size_t)t * mpi->top_k + k];
                    pairs += slot != NEP_REF_NONE && slot / mpi->slots_per_rank == me;
                }
                rows += pairs > before;
            }
        }
        most = rows > most ? rows : most;
        *pairs_p = pairs > *pairs_p ? pairs : *pairs_p;
    }
    return most;
}

static MPI_Datatype bytes_type(size_t bytes)
{
    MPI_Datatype type;
    MPI_Type_contiguous((int)bytes, MPI_BYTE, &type);
    MPI_Type_commit(&type);
    return type;
}

struct nep_perf_mpi *nep_perf_mpi_create(struct nep_perf_rank *rank)
{
    const struct nep_perf_options *options = &rank->options;
    struct nep_perf_mpi *mpi = small_alloc(1, sizeof(*mpi));
    mpi->rank = rank;
    mpi->kernels = nep_perf_kernels();
    mpi->num_ranks = rank->seat->num_ranks;
    mpi->hidden = options->hidden;
    mpi->top_k = options->top_k;
    mpi->group = nep_perf_plan_group(rank->plan, 0, false, rank->seat->rank);
    mpi->slots_per_rank = mpi->group->slots_per_rank;
    mpi->is_rank_layout = options->layout == NEP_LAYOUT_RANK;
    mpi->payload = (size_t)options->hidden * sizeof(uint16_t);
    mpi->meta_bytes = offsetof(struct meta, weight) + options->top_k * sizeof(float);
    mpi->row_bytes = mpi->payload + (mpi->is_rank_layout ? 0 : mpi->meta_bytes);
    mpi->row_type = bytes_type(mpi->row_bytes);
    mpi->value_type = bytes_type(mpi->payload);
    mpi->meta_type = bytes_type(mpi->meta_bytes);
    alloc_counts(mpi);
    size_t pairs = (size_t)options->tokens * options->top_k;
    mpi->slots = small_alloc(pairs, sizeof(uint32_t));
    mpi->where = small_alloc(pairs, sizeof(uint32_t));
    mpi->dests = small_alloc(pairs, sizeof(uint16_t));
    mpi->num_dests = small_alloc(options->tokens, sizeof(uint16_t));
    uint64_t expert_rows = 0;
    uint64_t received = most_received(mpi, &expert_rows);
    mpi->x = big_alloc(options->tokens * mpi->payload);
    mpi->y = big_alloc(options->tokens * mpi->payload);
    mpi->send = big_alloc(pairs * mpi->row_bytes);
    mpi->recv = big_alloc(received * mpi->row_bytes);
    mpi->meta_send = big_alloc(pairs * mpi->meta_bytes);
    mpi->meta_recv = big_alloc(received * mpi->meta_bytes);
    mpi->rows_bytes = mpi->is_rank_layout ? received * mpi->row_bytes : expert_rows * mpi->payload;
    mpi->expert = mpi->is_rank_layout ? NULL : big_alloc(expert_rows * mpi->payload);
    mpi->position = small_alloc(received * mpi->top_k, sizeof(uint32_t));
    mpi->acc = aligned_alloc(64, ((size_t)mpi->hidden * 4 + 63) / 64 * 64);
    return mpi;
}

/* The process ends soon after; the large mappings go with it. */
void nep_perf_mpi_destroy(struct nep_perf_mpi *mpi)
{
    if (mpi == NULL) {
        return;
    }
    MPI_Type_free(&mpi->row_type);
    MPI_Type_free(&mpi->value_type);
    MPI_Type_free(&mpi->meta_type);
    free(mpi->samples);
    free(mpi->acc);
    free(mpi->position);
    free(mpi);
}

/* ---- dispatch ---- */

/* Destinations of every token and rows per destination. */
static void layout(struct nep_perf_mpi *mpi, uint32_t tokens)
{
    memset(mpi->send_counts, 0, mpi->num_ranks * sizeof(int));
    for (uint32_t t = 0; t < tokens; t++) {
        uint16_t *dests = mpi->dests + (size_t)t * mpi->top_k;
        uint16_t num = 0;
        for (uint32_t k = 0; k < mpi->top_k; k++) {
            uint32_t slot = mpi->slots[(size_t)t * mpi->top_k + k];
            if (slot == NEP_REF_NONE) {
                continue;
            }
            uint16_t dest = (uint16_t)(slot / mpi->slots_per_rank);
            uint16_t i = 0;
            while (i < num && dests[i] != dest) {
                i++;
            }
            if (i == num) {
                dests[num++] = dest;
                mpi->send_counts[dest]++;
            }
        }
        mpi->num_dests[t] = num;
    }
}

static void exchange_counts(struct nep_perf_mpi *mpi)
{
    MPI_Alltoall(mpi->send_counts, 1, MPI_INT, mpi->recv_counts, 1, MPI_INT, MPI_COMM_WORLD);
    int sent = 0;
    int received = 0;
    for (uint32_t r = 0; r < mpi->num_ranks; r++) {
        mpi->send_first[r] = mpi->cursor[r] = sent;
        mpi->recv_first[r] = received;
        sent += mpi->send_counts[r];
        received += mpi->recv_counts[r];
    }
    mpi->num_received = (uint64_t)received;
}

static void pack(struct nep_perf_mpi *mpi, uint32_t tokens, const float *weights)
{
    for (uint32_t t = 0; t < tokens; t++) {
        size_t first = (size_t)t * mpi->top_k;
        for (uint16_t i = 0; i < mpi->num_dests[t]; i++) {
            uint32_t dest = mpi->dests[first + i];
            uint32_t row = (uint32_t)mpi->cursor[dest]++;
            struct meta meta = {.token = t};
            for (uint32_t k = 0; k < mpi->top_k; k++) {
                uint32_t slot = mpi->slots[first + k];
                if (slot != NEP_REF_NONE && slot / mpi->slots_per_rank == dest) {
                    meta.slot[meta.num] = (uint16_t)(slot % mpi->slots_per_rank);
                    meta.weight[meta.num++] = weights[first + k];
                }
            }
            char *to = mpi->send + row * mpi->row_bytes;
            memcpy(to, mpi->x + t * mpi->payload, mpi->payload);
            char *beside =
                mpi->is_rank_layout ? mpi->meta_send + row * mpi->meta_bytes : to + mpi->payload;
            memcpy(beside, &meta, mpi->meta_bytes);
            mpi->where[first + i] = row;
        }
    }
}

static void load_meta(const struct nep_perf_mpi *mpi, uint64_t row, struct meta *meta)
{
    const char *from = mpi->is_rank_layout ? mpi->meta_recv + row * mpi->meta_bytes
                                           : mpi->recv + row * mpi->row_bytes + mpi->payload;
    memcpy(meta, from, mpi->meta_bytes);
}

/* Count, prefix sum, copy: rows grouped by expert, as a grouped matrix multiply reads them. */
static void scatter(struct nep_perf_mpi *mpi)
{
    uint32_t *first = mpi->slot_first;
    struct meta meta;
    memset(first, 0, (mpi->slots_per_rank + 1) * sizeof(*first));
    for (uint64_t row = 0; row < mpi->num_received; row++) {
        load_meta(mpi, row, &meta);
        for (uint32_t j = 0; j < meta.num; j++) {
            first[meta.slot[j] + 1]++;
        }
    }
    for (uint32_t slot = 0; slot < mpi->slots_per_rank; slot++) {
        first[slot + 1] += first[slot];
    }
    for (uint64_t row = 0; row < mpi->num_received; row++) {
        load_meta(mpi, row, &meta);
        for (uint32_t j = 0; j < meta.num; j++) {
            uint32_t to = first[meta.slot[j]]++;
            mpi->position[row * mpi->top_k + j] = to;
            memcpy(mpi->expert + to * mpi->payload, mpi->recv + row * mpi->row_bytes, mpi->payload);
        }
    }
}

static void dispatch(struct nep_perf_mpi *mpi, uint32_t tokens, const float *weights)
{
    layout(mpi, tokens);
    exchange_counts(mpi);
    pack(mpi, tokens, weights);
    MPI_Alltoallv(mpi->send, mpi->send_counts, mpi->send_first, mpi->row_type, mpi->recv,
                  mpi->recv_counts, mpi->recv_first, mpi->row_type, MPI_COMM_WORLD);
    if (mpi->is_rank_layout) {
        MPI_Alltoallv(mpi->meta_send, mpi->send_counts, mpi->send_first, mpi->meta_type,
                      mpi->meta_recv, mpi->recv_counts, mpi->recv_first, mpi->meta_type,
                      MPI_COMM_WORLD);
    } else {
        scatter(mpi);
    }
}

/* ---- the stand-in expert, not timed ---- */

static float factor_of(const struct nep_perf_mpi *mpi, uint32_t slot)
{
    return mpi->group->factor[(size_t)mpi->rank->seat->rank * mpi->slots_per_rank + slot];
}

static void scale_row(const struct nep_perf_mpi *mpi, char *row, float factor)
{
    mpi->kernels->scale(mpi->acc, (const uint16_t *)(const void *)row, factor, mpi->hidden);
    mpi->kernels->store(mpi->acc, (uint16_t *)(void *)row, mpi->hidden);
}

static void expert_layout_experts(struct nep_perf_mpi *mpi)
{
    uint32_t row = 0;
    for (uint32_t slot = 0; slot < mpi->slots_per_rank; slot++) {
        for (; row < mpi->slot_first[slot]; row++) { /* after scatter: where the slot ends */
            scale_row(mpi, mpi->expert + row * mpi->payload, factor_of(mpi, slot));
        }
    }
}

static void rank_layout_experts(struct nep_perf_mpi *mpi)
{
    struct meta meta;
    for (uint64_t row = 0; row < mpi->num_received; row++) {
        load_meta(mpi, row, &meta);
        float factor = 0.0f;
        for (uint32_t j = 0; j < meta.num; j++) {
            factor += meta.weight[j] * factor_of(mpi, meta.slot[j]);
        }
        scale_row(mpi, mpi->recv + row * mpi->payload, factor);
    }
}

/* ---- combine ---- */

/* Per received row: the weighted fp32 sum over local experts, packed densely from the front. */
static void reduce(struct nep_perf_mpi *mpi)
{
    struct meta meta;
    for (uint64_t row = 0; row < mpi->num_received; row++) {
        load_meta(mpi, row, &meta); /* before the row is overwritten: row * payload <= row_bytes */
        for (uint32_t j = 0; j < meta.num; j++) {
            const char *from = mpi->expert + mpi->position[row * mpi->top_k + j] * mpi->payload;
            const uint16_t *values = (const uint16_t *)(const void *)from;
            if (j == 0) {
                mpi->kernels->scale(mpi->acc, values, meta.weight[j], mpi->hidden);
            } else {
                mpi->kernels->axpy(mpi->acc, values, meta.weight[j], mpi->hidden);
            }
        }
        mpi->kernels->store(mpi->acc, (uint16_t *)(void *)(mpi->recv + row * mpi->payload),
                            mpi->hidden);
    }
}

static void sum(struct nep_perf_mpi *mpi, uint32_t tokens)
{
    for (uint32_t t = 0; t < tokens; t++) {
        if (mpi->num_dests[t] == 0) {
            memset(mpi->y + t * mpi->payload, 0, mpi->payload);
            continue;
        }
        for (uint16_t i = 0; i < mpi->num_dests[t]; i++) {
            const char *from = mpi->send + mpi->where[(size_t)t * mpi->top_k + i] * mpi->payload;
            const uint16_t *values = (const uint16_t *)(const void *)from;
            if (i == 0) {
                mpi->kernels->scale(mpi->acc, values, 1.0f, mpi->hidden);
            } else {
                mpi->kernels->axpy(mpi->acc, values, 1.0f, mpi->hidden);
            }
        }
        mpi->kernels->store(mpi->acc, (uint16_t *)(void *)(mpi->y + t * mpi->payload), mpi->hidden);
    }
}

static void combine(struct nep_perf_mpi *mpi, uint32_t tokens)
{
    if (!mpi->is_rank_layout) {
        reduce(mpi);
    }
    MPI_Alltoallv(mpi->recv, mpi->recv_counts, mpi->recv_first, mpi->value_type, mpi->send,
                  mpi->send_counts, mpi->send_first, mpi->value_type, MPI_COMM_WORLD);
    sum(mpi, tokens);
}

/* Against fp64: its sums have one rounding level less than the library's tree, so the same bound.
 */
static void check(struct nep_perf_mpi *mpi)
{
    uint32_t me = mpi->rank->seat->rank;
    struct nep_ref_group group = *mpi->group;
    group.wire = group.dtype; /* the baseline casts nothing */
    struct nep_ref_scratch *scratch = nep_ref_scratch_create(mpi->hidden);
    double *exact = small_alloc(mpi->hidden, sizeof(double));
    double *magnitude = small_alloc(mpi->hidden, sizeof(double));
    float *got = small_alloc(mpi->hidden, sizeof(float));
    for (uint32_t t = 0; t < group.num_tokens[me] && scratch != NULL; t++) {
        nep_ref_sum_exact(&group, me, t, scratch, exact, magnitude);
        nep_ref_row_load(NEP_DTYPE_BF16, mpi->y + t * mpi->payload, mpi->hidden, got);
        for (uint32_t i = 0; i < mpi->hidden; i++) {
            double error = fabs((double)got[i] - exact[i]);
            mpi->report.wrong += !(error <= 4.0 * 0x1p-8 * magnitude[i]);
        }
    }
    nep_ref_scratch_destroy(scratch);
    free(exact);
    free(magnitude);
    free(got);
}

/* As for the library's outputs: what nobody wrote must not pass, and both start from dirty lines.
 */
static void poison(struct nep_perf_mpi *mpi)
{
    memset(mpi->is_rank_layout ? mpi->recv : mpi->expert, 0xff, mpi->rows_bytes);
    memset(mpi->y, 0xff, mpi->rank->options.tokens * mpi->payload);
}

static int iteration(struct nep_perf_mpi *mpi, uint64_t batch, struct nep_perf_sample *sample)
{
    uint32_t me = mpi->rank->seat->rank;
    if (mpi->rank->options.is_verified) {
        poison(mpi);
    }
    mpi->group = nep_perf_plan_group(mpi->rank->plan, batch, false, me);
    uint32_t tokens = mpi->group->num_tokens[me];
    memcpy(mpi->slots, mpi->group->slots[me], (size_t)tokens * mpi->top_k * sizeof(uint32_t));
    for (uint32_t t = 0; t < tokens; t++) {
        nep_perf_plan_row(mpi->rank->plan, me, batch, t, mpi->x + t * mpi->payload);
    }
    if (!mpi->rank->seat->barrier(mpi->rank->seat)) {
        return NEP_PERF_FAILED;
    }
    uint64_t start_ns = nep_now_ns();
    dispatch(mpi, tokens, mpi->group->weights[me]);
    sample->dispatch_ns = nep_now_ns() - start_ns;
    if (!mpi->rank->seat->barrier(mpi->rank->seat)) {
        return NEP_PERF_FAILED;
    }
    if (mpi->is_rank_layout) {
        rank_layout_experts(mpi);
    } else {
        expert_layout_experts(mpi);
    }
    if (!mpi->rank->seat->barrier(mpi->rank->seat)) {
        return NEP_PERF_FAILED;
    }
    start_ns = nep_now_ns();
    combine(mpi, tokens);
    sample->combine_ns = nep_now_ns() - start_ns;
    if (!mpi->rank->seat->barrier(mpi->rank->seat)) {
        return NEP_PERF_FAILED;
    }
    if (mpi->rank->options.is_verified) {
        check(mpi);
    }
    return -1;
}

int nep_perf_mpi_block(struct nep_perf_mpi *mpi, uint32_t warmup, uint32_t iters)
{
    void *grown = realloc(mpi->samples, (mpi->num_samples + iters) * sizeof(*mpi->samples));
    if (grown == NULL) {
        return nep_perf_error(NEP_PERF_FAILED, "out of memory for %u samples", iters);
    }
    mpi->samples = grown;
    uint32_t most = mpi->rank->options.warmup;
    uint32_t first = most > warmup ? most - warmup : 0;
    for (uint32_t i = 0; i < warmup + iters; i++) {
        struct nep_perf_sample sample;
        int rc = iteration(mpi, first + i, &sample);
        if (rc != -1) {
            return rc;
        }
        if (i >= warmup) {
            mpi->samples[mpi->num_samples++] = sample;
        }
    }
    return -1;
}

void nep_perf_mpi_results(const struct nep_perf_mpi *mpi, struct nep_perf_baseline *baseline)
{
    baseline->samples = mpi->samples;
    baseline->num_samples = mpi->num_samples;
    baseline->wrong = mpi->report.wrong;
}
