/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One rank: fills inputs, meets the others, takes the time around dispatch, lets the stand-in
 * expert work, meets again, takes the time around combine, checks. Everything but the library's
 * calls is outside the timed parts. Inputs change in every iteration and outputs are poisoned
 * before it when verifying: rows left over from the iteration before would else pass.
 *
 * The time of an iteration is the slowest rank's own time from leaving the barrier to its end;
 * a common start would add the skew of the barrier, which with more ranks than cores is large. A
 * barrier also follows each timed part: with more ranks than cores the experts and checks of the
 * ranks that are done would else take the cores from those that are not.
 */
#include "perftest/rank.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "perftest/gpu.h"
#include "perftest/perf.h"
#include "perftest/results.h"

/* The culprit first, where the library knows one. Of all local ranks the first to know speaks. */
int nep_perf_fail(struct nep_perf_rank *rank, const char *what)
{
    char message[600];
    strncpy(message, nep_last_message(), sizeof(message) - 1);
    message[sizeof(message) - 1] = '\0';
    struct nep_perf_control *control = rank->seat->control;
    if (control != NULL) {
        atomic_store(&control->failed, 1);
        if (atomic_exchange(&control->reported, 1) != 0) {
            return NEP_PERF_FAILED;
        }
    }
    struct nep_fault fault = {.size = sizeof(fault), .rank = UINT32_MAX};
    if (rank->comm != NULL && nep_comm_fault(rank->comm, &fault) == NEP_OK &&
        fault.status != NEP_OK && fault.rank != UINT32_MAX) {
        return nep_perf_error(NEP_PERF_FAILED, "rank %u lost, seen by rank %u in %s: %s",
                              fault.rank, rank->seat->rank, what, fault.message);
    }
    return nep_perf_error(NEP_PERF_FAILED, "rank %u: %s: %s", rank->seat->rank, what, message);
}

static void *tensor(struct nep_perf_rank *rank, size_t bytes)
{
    void *buffer = NULL;
    if (!rank->options.is_mapped || rank->options.is_on_gpu) {
        if (posix_memalign(&buffer, 4096, bytes + 1) != 0) {
            return NULL;
        }
        return buffer;
    }
    return nep_buffer_alloc(rank->ep, bytes + 1, &buffer) == NEP_OK ? buffer : NULL;
}

static void tensor_free(struct nep_perf_rank *rank, void *buffer)
{
    if (!rank->options.is_mapped || rank->options.is_on_gpu) {
        free(buffer);
    } else if (buffer != NULL) {
        nep_buffer_free(rank->ep, buffer);
    }
}

struct sizes {
    size_t x;
    size_t rows;
    size_t expert; /* 0: in place */
    size_t y;
};

static struct sizes tensor_sizes(const struct nep_perf_rank *rank)
{
    const struct nep_perf_options *options = &rank->options;
    size_t payload = (size_t)options->hidden * nep_ref_dtype_bytes(options->dtype);
    size_t wire = (size_t)options->hidden * nep_ref_dtype_bytes(options->wire);
    struct sizes sizes = {.x = options->tokens * payload,
                          .rows = rank->capacity * wire,
                          .y = options->tokens * payload};
    sizes.expert = options->wire == options->dtype ? 0 : rank->capacity * payload;
    return sizes;
}

static bool lane_tensors(struct nep_perf_rank *rank, struct nep_perf_lane *lane)
{
    struct sizes sizes = tensor_sizes(rank);
    lane->x = tensor(rank, sizes.x);
    lane->y = tensor(rank, sizes.y);
    lane->rows.x = tensor(rank, sizes.rows);
    lane->expert = sizes.expert == 0 ? lane->rows.x : tensor(rank, sizes.expert);
    return lane->x != NULL && lane->y != NULL && lane->rows.x != NULL && lane->expert != NULL;
}

static void lane_free_tensors(struct nep_perf_rank *rank, struct nep_perf_lane *lane)
{
    if (lane->expert != lane->rows.x) {
        tensor_free(rank, lane->expert);
    }
    tensor_free(rank, lane->rows.x);
    tensor_free(rank, lane->x);
    tensor_free(rank, lane->y);
}

int nep_perf_rank_renew_tensors(struct nep_perf_rank *rank)
{
    bool is_complete = true;
    for (uint32_t s = 0; s < rank->options.outstanding && is_complete; s++) {
        lane_free_tensors(rank, &rank->lanes[s]);
        is_complete = lane_tensors(rank, &rank->lanes[s]);
    }
    return is_complete ? -1
                       : nep_perf_error(NEP_PERF_FAILED, "rank %u: out of memory for %llu rows",
                                        rank->seat->rank, (unsigned long long)rank->capacity);
}

static int lane_create(struct nep_perf_rank *rank, struct nep_perf_lane *lane)
{
    const struct nep_perf_options *options = &rank->options;
    uint64_t rows = rank->capacity + 1;
    uint64_t per_row = options->layout == NEP_LAYOUT_RANK ? options->top_k : 1;
    if (nep_handle_create(rank->ep, &lane->handle) != NEP_OK) {
        return nep_perf_fail(rank, "nep_handle_create");
    }
    lane->rows = (struct nep_rows){.size = sizeof(lane->rows), .capacity = rank->capacity};
    bool is_complete = lane_tensors(rank, lane);
    lane->ids = calloc((size_t)options->tokens * options->top_k + 1, sizeof(int32_t));
    lane->weights = calloc((size_t)options->tokens * options->top_k + 1, sizeof(float));
    lane->rows.topk_weights = calloc(rows * per_row, sizeof(float));
    lane->rows.source_rank = calloc(rows, sizeof(uint32_t));
    lane->rows.source_token = calloc(rows, sizeof(uint32_t));
    is_complete = is_complete && lane->ids != NULL && lane->weights != NULL &&
                  lane->rows.topk_weights != NULL && lane->rows.source_rank != NULL &&
                  lane->rows.source_token != NULL;
    if (options->layout == NEP_LAYOUT_RANK) {
        lane->rows.topk_slots = calloc(rows * per_row, sizeof(int32_t));
        is_complete = is_complete && lane->rows.topk_slots != NULL;
    }
    if (options->wire == NEP_DTYPE_FP8_E4M3) {
        lane->rows.scales = calloc(rows * ((options->hidden + 127) / 128), sizeof(float));
        is_complete = is_complete && lane->rows.scales != NULL;
    }
    return is_complete ? -1
                       : nep_perf_error(NEP_PERF_FAILED, "rank %u: out of memory for %llu rows",
                                        rank->seat->rank, (unsigned long long)rank->capacity);
}

static void lane_destroy(struct nep_perf_rank *rank, struct nep_perf_lane *lane)
{
    nep_handle_destroy(lane->handle);
    lane_free_tensors(rank, lane);
    free(lane->ids);
    free(lane->weights);
    free(lane->rows.topk_weights);
    free(lane->rows.topk_slots);
    free(lane->rows.source_rank);
    free(lane->rows.source_token);
    free(lane->rows.scales);
}

static int comm_create(struct nep_perf_rank *rank)
{
    const struct nep_perf_options *options = &rank->options;
    struct nep_comm_params params = {.size = sizeof(params),
                                     .rank = rank->seat->rank,
                                     .num_ranks = rank->seat->num_ranks,
                                     .bootstrap = &rank->seat->bootstrap,
                                     .intra = options->intra,
                                     .inter = options->inter};
    if (options->has_nodes) {
        params.ranks_per_node = options->ranks_per_node;
        params.num_nodes = options->num_nodes;
    }
    rank->topology.size = sizeof(rank->topology);
    if (nep_comm_create(&params, &rank->comm) != NEP_OK ||
        nep_comm_topology(rank->comm, &rank->topology) != NEP_OK) {
        return nep_perf_fail(rank, "nep_comm_create");
    }
    return -1;
}

static int ep_create(struct nep_perf_rank *rank)
{
    const struct nep_perf_options *options = &rank->options;
    struct sizes sizes = tensor_sizes(rank);
    struct nep_ep_params params = {.size = sizeof(params),
                                   .num_experts = options->experts,
                                   .top_k = options->top_k,
                                   .hidden = options->hidden,
                                   .max_tokens = options->tokens > 0 ? options->tokens : 1,
                                   .dtype = options->dtype,
                                   .wire = options->wire,
                                   .layout = options->layout,
                                   .expert_alignment = options->alignment,
                                   .outstanding = options->outstanding,
                                   .map = nep_perf_plan_map(rank->plan)};
    params.pool_bytes = 1 << 20;
    if (options->is_on_gpu) {
        params.executor = NEP_EXECUTOR_CUDA;
        params.num_sms = options->num_sms;
        params.pool_bytes +=
            options->is_mapped ? nep_perf_gpu_bytes(rank) * options->outstanding : 0;
        params.staging_bytes = options->is_mapped ? 1 << 20 : 0;
    } else if (options->is_mapped) {
        params.pool_bytes += (sizes.x + sizes.rows + sizes.expert + sizes.y + 8 * 4096) *
                             (uint64_t)options->outstanding;
    }
    if (nep_ep_create(rank->comm, &params, &rank->ep) != NEP_OK) {
        return nep_perf_fail(rank, "nep_ep_create");
    }
    return -1;
}

/* A slow rank is waited for, ten times as long as one that is waited for otherwise. */
static void survive(struct nep_perf_rank *rank)
{
    nep_perf_seat_survive(rank->seat);
    nep_ep_set_timeout(rank->ep, 10 * rank->seat->timeout_ns);
}

int nep_perf_rank_create(const struct nep_perf_options *options, struct nep_perf_seat *seat,
                         struct nep_perf_rank *rank)
{
    memset(rank, 0, sizeof(*rank));
    rank->options = *options;
    rank->seat = seat;
    int rc = comm_create(rank);
    if (rc == -1) {
        rc = nep_perf_plan_create(&rank->options, &rank->topology, &rank->plan);
    }
    if (rc != -1) {
        if (seat->control != NULL) {
            atomic_store(&seat->control->failed, 1);
        }
        return rc;
    }
    rank->capacity = nep_perf_plan_max_rows(rank->plan);
    rank->pairs =
        calloc((size_t)nep_perf_plan_num_layers(rank->plan) * seat->num_ranks, sizeof(uint64_t));
    rc = rank->pairs != NULL ? ep_create(rank) : nep_perf_error(NEP_PERF_FAILED, "out of memory");
    for (uint32_t s = 0; s < options->outstanding && rc == -1; s++) {
        rc = lane_create(rank, &rank->lanes[s]);
    }
    if (rc == -1 && options->is_on_gpu && nep_perf_gpu_create(rank) != NEP_OK) {
        rc = nep_perf_fail(rank, "tensors on the device");
    }
    if (rc == -1 && options->is_continued) {
        survive(rank);
    }
    return rc;
}

void nep_perf_rank_destroy(struct nep_perf_rank *rank)
{
    nep_perf_gpu_destroy(rank);
    for (uint32_t s = 0; s < rank->options.outstanding && rank->ep != NULL; s++) {
        lane_destroy(rank, &rank->lanes[s]);
    }
    nep_ep_destroy(rank->ep);
    nep_perf_plan_destroy(rank->plan);
    nep_comm_destroy(rank->comm);
    free(rank->samples);
    free(rank->request_keys);
    free(rank->pairs);
}

/* ---- one iteration ---- */

static void fill_lane(struct nep_perf_rank *rank, struct nep_perf_lane *lane)
{
    const struct nep_perf_options *options = &rank->options;
    size_t payload = (size_t)options->hidden * nep_ref_dtype_bytes(options->dtype);
    /* Outputs first: the inputs are what was written last, as after a real layer. */
    if (options->is_verified) {
        struct sizes sizes = tensor_sizes(rank);
        memset(lane->rows.x, 0xff, sizes.rows);
        memset(lane->y, 0xff, sizes.y);
        memset(lane->rows.source_rank, 0xff, rank->capacity * sizeof(uint32_t));
        memset(lane->rows.source_token, 0xff, rank->capacity * sizeof(uint32_t));
    }
    lane->num_tokens =
        nep_perf_plan_routing(rank->plan, rank->seat->rank, lane->batch, lane->ids, lane->weights);
    for (uint32_t t = 0; t < lane->num_tokens; t++) {
        nep_perf_plan_row(rank->plan, rank->seat->rank, lane->batch, t,
                          (char *)lane->x + t * payload);
    }
}

static int dispatch(struct nep_perf_rank *rank)
{
    for (uint32_t s = 0; s < rank->options.outstanding; s++) {
        struct nep_perf_lane *lane = &rank->lanes[s];
        struct nep_tokens in = {.size = sizeof(in),
                                .num_tokens = lane->num_tokens,
                                .layer = nep_perf_plan_map_layer(rank->plan, lane->batch),
                                .x = lane->x,
                                .topk_ids = lane->ids,
                                .topk_weights = lane->weights,
                                .request_keys = rank->request_keys};
        if (nep_dispatch_send(rank->ep, lane->handle, &in, NULL) != NEP_OK) {
            return nep_perf_trouble(rank, "nep_dispatch_send");
        }
    }
    for (uint32_t s = 0; s < rank->options.outstanding; s++) {
        struct nep_perf_lane *lane = &rank->lanes[s];
        lane->counts.size = sizeof(lane->counts);
        if (nep_dispatch_counts(rank->ep, lane->handle, &lane->counts) != NEP_OK) {
            return nep_perf_trouble(rank, "nep_dispatch_counts");
        }
        if (nep_dispatch_recv(rank->ep, lane->handle, &lane->rows, NULL) != NEP_OK) {
            return nep_perf_trouble(rank, "nep_dispatch_recv");
        }
    }
    return -1;
}

static int combine(struct nep_perf_rank *rank)
{
    for (uint32_t s = 0; s < rank->options.outstanding; s++) {
        struct nep_perf_lane *lane = &rank->lanes[s];
        struct nep_expert_rows in = {.size = sizeof(in), .y = lane->expert};
        if (nep_combine_send(rank->ep, lane->handle, &in, NULL) != NEP_OK) {
            return nep_perf_trouble(rank, "nep_combine_send");
        }
    }
    for (uint32_t s = 0; s < rank->options.outstanding; s++) {
        struct nep_perf_lane *lane = &rank->lanes[s];
        struct nep_tokens_out out = {
            .size = sizeof(out), .num_tokens = lane->num_tokens, .y = lane->y};
        if (nep_combine_recv(rank->ep, lane->handle, &out, NULL) != NEP_OK) {
            return nep_perf_trouble(rank, "nep_combine_recv");
        }
    }
    return -1;
}

static void report_text(struct nep_ref_report *report, const char *text)
{
    if (report->wrong++ == 0) {
        strncpy(report->first, text, sizeof(report->first) - 1);
    }
}

static int check_dispatch(struct nep_perf_rank *rank, struct nep_perf_lane *lane)
{
    uint32_t me = rank->seat->rank;
    const struct nep_ref_group *group = nep_perf_plan_group(rank->plan, lane->batch, true, me);
    struct nep_ref_rows want;
    if (!nep_ref_rows_build(group, me, &want)) {
        return nep_perf_error(NEP_PERF_FAILED, "rank %u: out of memory for the oracle", me);
    }
    nep_ref_check_counts(group, &want, &lane->counts, &rank->report);
    nep_ref_check_dispatch(group, me, &want, &lane->rows, &rank->report);
    nep_ref_rows_free(&want);
    const char *broken = nep_perf_plan_check_choice(rank->plan, me);
    if (broken != NULL) {
        report_text(&rank->report, broken);
    }
    return -1;
}

/* Order matters inside a row and between rows; ranks and batches are summed. */
static uint64_t digest_bytes(uint64_t key, const void *bytes, size_t num)
{
    uint64_t hash = key;
    for (size_t i = 0; i + 8 <= num; i += 8) {
        uint64_t word;
        memcpy(&word, (const char *)bytes + i, 8);
        hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
        hash ^= hash >> 29;
    }
    return hash;
}

static int after_dispatch(struct nep_perf_rank *rank, bool is_timed)
{
    uint32_t me = rank->seat->rank;
    for (uint32_t s = 0; s < rank->options.outstanding; s++) {
        struct nep_perf_lane *lane = &rank->lanes[s];
        int rc = rank->options.is_verified && !rank->is_blind ? check_dispatch(rank, lane) : -1;
        if (rc != -1) {
            return rc;
        }
        const struct nep_ref_group *group = nep_perf_plan_group(rank->plan, lane->batch, false, me);
        if (!nep_ref_expert_apply(group, me, &lane->counts, &lane->rows, lane->expert)) {
            return nep_perf_error(NEP_PERF_FAILED, "rank %u: out of memory for the expert", me);
        }
        if (is_timed) {
            uint32_t layer = nep_perf_plan_layer(rank->plan, lane->batch);
            rank->traffic.pairs_per_rank = rank->pairs + (size_t)layer * rank->seat->num_ranks;
            nep_ref_traffic_add(group, me, &rank->traffic);
            rank->rows_moved += lane->counts.num_real_rows;
        }
    }
    return -1;
}

static void after_combine(struct nep_perf_rank *rank, bool is_timed)
{
    uint32_t me = rank->seat->rank;
    size_t payload = (size_t)rank->options.hidden * nep_ref_dtype_bytes(rank->options.dtype);
    for (uint32_t s = 0; s < rank->options.outstanding; s++) {
        struct nep_perf_lane *lane = &rank->lanes[s];
        const struct nep_ref_group *group = nep_perf_plan_group(rank->plan, lane->batch, false, me);
        if (rank->options.is_verified && !rank->is_blind) {
            nep_ref_check_combine(group, me, lane->y, &rank->report);
        }
        if (is_timed) {
            rank->digest +=
                digest_bytes(nep_ref_mix(me, lane->batch), lane->y, lane->num_tokens * payload);
        }
    }
}

/* Adds (sign 1) or subtracts (sign -1) the library's counters. */
static void add_stats(struct nep_perf_rank *rank, int sign)
{
    struct nep_stats now = {.size = sizeof(now)};
    if (nep_ep_stats(rank->ep, &now) != NEP_OK) {
        return;
    }
    uint64_t *sum = &rank->stats.dispatches;
    const uint64_t *add = &now.dispatches;
    size_t num = (sizeof(now) - offsetof(struct nep_stats, dispatches)) / sizeof(uint64_t);
    for (size_t i = 0; i < num; i++) {
        sum[i] += sign > 0 ? add[i] : 0 - add[i];
    }
}

/* -1, or why not to go on. */
static int barrier(struct nep_perf_rank *rank)
{
    if (rank->seat->barrier(rank->seat)) {
        return -1;
    }
    return rank->seat->must_recover ? NEP_PERF_RECOVER : NEP_PERF_FAILED;
}

/* The timed parts, where tokens are. */
static int timed(struct nep_perf_rank *rank, bool is_combine, uint64_t *ns_p)
{
    if (rank->gpu != NULL) {
        enum nep_status status =
            is_combine ? nep_perf_gpu_combine(rank, ns_p) : nep_perf_gpu_dispatch(rank, ns_p);
        return status == NEP_OK ? -1
                                : nep_perf_fail(rank, is_combine ? "nep_combine" : "nep_dispatch");
    }
    uint64_t start_ns = nep_now_ns();
    int rc = is_combine ? combine(rank) : dispatch(rank);
    *ns_p = nep_now_ns() - start_ns;
    return rc;
}

/* Between host and device; nothing where tokens are on the host. */
static int move(struct nep_perf_rank *rank, enum nep_status (*way)(struct nep_perf_rank *))
{
    return rank->gpu == NULL || way(rank) == NEP_OK ? -1 : nep_perf_fail(rank, "copies");
}

static int iteration(struct nep_perf_rank *rank, uint64_t number, bool is_timed)
{
    for (uint32_t s = 0; s < rank->options.outstanding; s++) {
        rank->lanes[s].batch = number * rank->options.outstanding + s;
        fill_lane(rank, &rank->lanes[s]);
    }
    struct nep_perf_sample sample;
    int rc = move(rank, nep_perf_gpu_upload);
    rc = rc == -1 ? barrier(rank) : rc;
    rc = rc == -1 ? timed(rank, false, &sample.dispatch_ns) : rc;
    rc = rc == -1 ? barrier(rank) : rc;
    rc = rc == -1 ? move(rank, nep_perf_gpu_fetch_rows) : rc;
    rc = rc == -1 ? after_dispatch(rank, is_timed) : rc;
    rc = rc == -1 ? move(rank, nep_perf_gpu_put_experts) : rc;
    rc = rc == -1 ? barrier(rank) : rc;
    rc = rc == -1 ? timed(rank, true, &sample.combine_ns) : rc;
    rc = rc == -1 ? barrier(rank) : rc;
    rc = rc == -1 ? move(rank, nep_perf_gpu_fetch_results) : rc;
    if (rc != -1) {
        return rc;
    }
    after_combine(rank, is_timed);
    if (is_timed) {
        rank->samples[rank->num_samples++] = sample;
    }
    return -1;
}

int nep_perf_rank_block(struct nep_perf_rank *rank, uint32_t warmup, uint32_t iters)
{
    uint64_t need = rank->num_samples + iters;
    if (need > rank->most_samples) {
        void *grown = realloc(rank->samples, need * sizeof(*rank->samples));
        if (grown == NULL) {
            return nep_perf_error(NEP_PERF_FAILED, "out of memory for %u samples", iters);
        }
        rank->samples = grown;
        rank->most_samples = need;
    }
    int rc = -1;
    uint32_t total = warmup + iters;
    /* Timed iterations keep their number whatever the warm-up of this block is. */
    uint32_t first = rank->options.warmup > warmup ? rank->options.warmup - warmup : 0;
    for (uint32_t i = 0; i < total && rc == -1; i++) {
        if (i == warmup) {
            add_stats(rank, -1);
        }
        rc = iteration(rank, first + i, i >= warmup);
        if (rc == NEP_PERF_RECOVER) {
            rank->lost_ns = rank->lost_ns == 0 ? nep_now_ns() : rank->lost_ns;
            rc = nep_perf_rank_recover(rank, &i);
            /* Iterations that some rank did not end are done, and counted, again. */
            rank->num_samples = i > warmup ? i - warmup : 0;
            i--;
        } else if (rank->lost_ns != 0) {
            uint64_t outage_ns = nep_now_ns() - rank->lost_ns;
            rank->outage_ns = outage_ns > rank->outage_ns ? outage_ns : rank->outage_ns;
            rank->lost_ns = 0;
        }
    }
    if (rc == -1) {
        add_stats(rank, 1);
    }
    return rc;
}

int nep_perf_rank_main(const struct nep_perf_options *options, struct nep_perf_seat *seat)
{
    struct nep_perf_rank rank;
    int rc = nep_perf_rank_create(options, seat, &rank);
    if (rc == -1) {
        rc = nep_perf_record_start(&rank);
    }
    if (rc == -1) {
        rc = nep_perf_rank_block(&rank, rank.options.warmup, rank.options.iters);
    }
    if (rc == -1) {
        rc = nep_perf_record_save(&rank);
    }
    if (rc == -1) {
        rc = nep_perf_metrics(&rank);
    }
    if (rc == -1) {
        rc = nep_perf_results(&rank, NULL);
    }
    if (rc > NEP_PERF_OK && seat->control != NULL) {
        atomic_store(&seat->control->failed, 1);
    }
    nep_perf_rank_destroy(&rank);
    return rc;
}
