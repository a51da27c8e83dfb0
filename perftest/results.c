/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Gathers and reduces. Percentiles are of the slowest rank of each iteration: the group moves at
 * its pace. Sorting is exact; no histogram.
 */
#include "perftest/results.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/out_file.h"
#include "perftest/perf.h"

/* What every rank brings; plain numbers, so that it can be gathered as bytes. */
struct record {
    struct nep_stats stats;
    uint64_t tokens;
    uint64_t tokens_local;
    uint64_t remote_nodes;
    uint64_t remote_ranks;
    uint64_t remote_pairs;
    uint64_t wrong;
    uint64_t elements;
    uint64_t digest;
    uint64_t outage_ns;
    double read_rate;
    double write_rate;
    uint64_t moved_read; /* bytes that this rank must read and write at least, by its rows */
    uint64_t moved_written;
    char first[256];
};

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;
    return (x > y) - (x < y);
}

static struct nep_perf_times percentiles(double *us, uint64_t num)
{
    qsort(us, num, sizeof(*us), compare_double);
    uint64_t p99 = (uint64_t)ceil(0.99 * (double)num);
    return (struct nep_perf_times){us[num / 2], us[p99 > 0 ? p99 - 1 : 0], us[num - 1]};
}

/* all: [R][num] samples. worst: [num] per iteration: dispatch, combine or both, of the slowest. */
static void slowest(const struct nep_perf_sample *all, uint32_t num_ranks, uint64_t num, int what,
                    double *worst)
{
    for (uint64_t i = 0; i < num; i++) {
        worst[i] = 0.0;
        for (uint32_t r = 0; r < num_ranks; r++) {
            const struct nep_perf_sample *sample = &all[r * num + i];
            uint64_t ns =
                (what & 1 ? sample->dispatch_ns : 0) + (what & 2 ? sample->combine_ns : 0);
            double us = (double)ns * 1e-3;
            worst[i] = us > worst[i] ? us : worst[i];
        }
    }
}

/* Three percentile sets of gathered samples; totals: the slowest total of each iteration, unsorted.
 */
static bool times_of(struct nep_perf_rank *rank, const struct nep_perf_sample *samples,
                     uint64_t num, struct nep_perf_times times[3], double *totals)
{
    uint32_t ranks = rank->seat->num_ranks;
    struct nep_perf_sample *all = calloc(num * ranks + 1, sizeof(*all));
    double *worst = calloc(num + 1, sizeof(*worst));
    bool is_fine = all != NULL && worst != NULL &&
                   nep_perf_seat_allgather(rank->seat, samples, all, num * sizeof(*samples));
    for (int what = 1; what <= 3 && is_fine; what++) {
        slowest(all, ranks, num, what, worst);
        if (what == 3) {
            memcpy(totals, worst, num * sizeof(*worst));
        }
        times[what - 1] = percentiles(worst, num);
    }
    free(all);
    free(worst);
    return is_fine;
}

/* max / mean over ranks and over nodes of one layer's pairs. */
static void imbalance(const struct nep_topology *topology, const uint64_t *pairs, double *rank_p,
                      double *node_p)
{
    uint64_t sum = 0;
    uint64_t most_rank = 0;
    uint64_t most_node = 0;
    for (uint32_t n = 0; n < topology->num_nodes; n++) {
        uint64_t on_node = 0;
        for (uint32_t r = 0; r < topology->num_ranks; r++) {
            if (topology->node_of_rank[r] == n) {
                on_node += pairs[r];
                most_rank = pairs[r] > most_rank ? pairs[r] : most_rank;
            }
        }
        sum += on_node;
        most_node = on_node > most_node ? on_node : most_node;
    }
    *rank_p = sum > 0 ? (double)most_rank * topology->num_ranks / (double)sum : 0.0;
    *node_p = sum > 0 ? (double)most_node * topology->num_nodes / (double)sum : 0.0;
}

/* Mean over the layers that had tokens. */
static bool imbalance_all(struct nep_perf_rank *rank, struct nep_perf_summary *summary)
{
    uint32_t ranks = rank->seat->num_ranks;
    uint32_t layers = nep_perf_plan_num_layers(rank->plan);
    size_t num = (size_t)layers * ranks;
    uint64_t *all = calloc(num * ranks, sizeof(*all));
    if (all == NULL || !nep_perf_seat_allgather(rank->seat, rank->pairs, all, num * sizeof(*all))) {
        free(all);
        return false;
    }
    uint32_t used = 0;
    for (uint32_t layer = 0; layer < layers; layer++) {
        uint64_t *sum = all + (size_t)layer * ranks;
        for (uint32_t source = 1; source < ranks; source++) {
            for (uint32_t r = 0; r < ranks; r++) {
                sum[r] += all[source * num + (size_t)layer * ranks + r];
            }
        }
        double on_rank;
        double on_node;
        imbalance(&rank->topology, sum, &on_rank, &on_node);
        if (on_rank > 0.0) {
            summary->imbalance_rank += on_rank;
            summary->imbalance_node += on_node;
            used++;
        }
    }
    if (used > 0) {
        summary->imbalance_rank /= used;
        summary->imbalance_node /= used;
    }
    free(all);
    return true;
}

static void add_record(struct nep_perf_summary *summary, const struct record *record)
{
    summary->wire_bytes += (double)record->stats.wire_bytes;
    summary->wire_messages += (double)record->stats.wire_messages;
    summary->intra_bytes += (double)record->stats.intra_bytes;
    summary->remote_rows += record->stats.remote_rows;
    summary->remote_rows_back += record->stats.remote_rows_back;
    summary->tokens += record->tokens;
    summary->floor_rows += record->remote_nodes;
    summary->remote_ranks_per_token += (double)record->remote_ranks;
    summary->remote_pairs_per_token += (double)record->remote_pairs;
    summary->local_token_share += (double)record->tokens_local;
    summary->elements += record->elements;
    summary->digest += record->digest;
    summary->outage_ms = fmax(summary->outage_ms, (double)record->outage_ns * 1e-6);
    if (summary->wrong == 0 && record->wrong > 0) {
        memcpy(summary->first_wrong, record->first, sizeof(record->first));
    }
    summary->wrong += record->wrong;
    summary->copy_rates[0] += record->read_rate;
    summary->copy_rates[1] += record->write_rate;
}

static void reduce_records(const struct nep_perf_rank *rank, const struct record *records,
                           struct nep_perf_summary *summary)
{
    const struct nep_perf_options *options = &rank->options;
    uint32_t ranks = rank->seat->num_ranks;
    double iters = (double)rank->num_samples;
    uint64_t moved_read = 0;
    uint64_t moved_written = 0;
    for (uint32_t r = 0; r < ranks; r++) {
        add_record(summary, &records[r]);
        moved_read += records[r].moved_read;
        moved_written += records[r].moved_written;
        summary->is_traffic_wrong |= records[r].stats.remote_rows != records[r].remote_nodes ||
                                     records[r].stats.tokens_local != records[r].tokens_local;
    }
    summary->is_traffic_wrong |= summary->remote_rows_back != summary->floor_rows;
    bool is_once = rank->num_samples == options->iters; /* not with the blocks of a baseline */
    summary->has_predicted =
        is_once && nep_perf_plan_predicted_rows(rank->plan, &summary->predicted_rows);
    summary->is_traffic_wrong |=
        summary->has_predicted && summary->predicted_rows != summary->floor_rows;
    for (uint32_t n = 0; n < rank->topology.num_nodes; n++) {
        double bytes = 0.0;
        for (uint32_t r = 0; r < ranks; r++) {
            bytes += rank->topology.node_of_rank[r] == n ? (double)records[r].stats.wire_bytes : 0;
        }
        summary->wire_bytes_max_node = fmax(summary->wire_bytes_max_node, bytes / iters);
    }
    double row_out = (double)options->hidden * (double)nep_ref_dtype_bytes(options->wire);
    if (options->wire == NEP_DTYPE_FP8_E4M3) {
        row_out += 4.0 * ((options->hidden + 127) / 128);
    }
    double row_back = (double)options->hidden * (double)nep_ref_dtype_bytes(options->dtype);
    double tokens = summary->tokens > 0 ? (double)summary->tokens : 1.0;
    summary->wire_floor_bytes = (double)summary->floor_rows * (row_out + row_back) / iters / ranks;
    summary->wire_bytes /= iters * ranks;
    summary->wire_messages /= iters * ranks;
    summary->intra_bytes /= iters * ranks;
    summary->header_bytes = summary->wire_bytes - summary->wire_floor_bytes;
    summary->remote_nodes_per_token = (double)summary->floor_rows / tokens;
    summary->remote_ranks_per_token /= tokens;
    summary->remote_pairs_per_token /= tokens;
    summary->local_token_share /= tokens;
    if (summary->copy_rates[0] > 0.0) {
        summary->byte_floor_us = 1e6 / iters *
                                 ((double)moved_read / summary->copy_rates[0] +
                                  (double)moved_written / summary->copy_rates[1]);
    }
}

static bool reduce_baseline(struct nep_perf_rank *rank, const struct nep_perf_baseline *baseline,
                            const double *own_totals, struct nep_perf_summary *summary)
{
    struct nep_perf_times times[3];
    uint64_t num = baseline->num_samples;
    double *totals = calloc(num + 1, sizeof(*totals));
    double *pair = calloc(num + 1, sizeof(*pair));
    bool is_fine =
        totals != NULL && pair != NULL && times_of(rank, baseline->samples, num, times, totals);
    if (is_fine) {
        uint64_t in_block = num / baseline->pairs;
        summary->has_baseline = true;
        summary->baseline_name = baseline->name;
        summary->pairs = baseline->pairs;
        for (uint32_t p = 0; p < baseline->pairs && p < 64; p++) {
            memcpy(pair, own_totals + p * in_block, in_block * sizeof(*pair));
            double own = percentiles(pair, in_block).p50_us;
            memcpy(pair, totals + p * in_block, in_block * sizeof(*pair));
            summary->ratios[p] = percentiles(pair, in_block).p50_us / own;
        }
        double sorted[64];
        memcpy(sorted, summary->ratios, sizeof(sorted));
        summary->speedup_pairs = percentiles(sorted, baseline->pairs).p50_us;
        summary->baseline_dispatch = times[0];
        summary->baseline_combine = times[1];
        summary->baseline_total = times[2];
        summary->speedup = times[2].p50_us / summary->total.p50_us;
    }
    free(totals);
    free(pair);
    return is_fine;
}

static int write_json(const struct nep_perf_rank *rank, const struct nep_perf_summary *summary)
{
    struct nep_out_file out;
    enum nep_status status = nep_out_file_open_arg(&out, rank->options.json);
    if (status == NEP_OK) {
        nep_perf_report_json(out.file, rank, summary);
        status = nep_out_file_commit(&out);
    }
    return status == NEP_OK ? NEP_PERF_OK
                            : nep_perf_error(NEP_PERF_FAILED, "--json %s", nep_last_message());
}

/* Least traffic with memory: dispatch reads each token once and writes each row once; combine reads
 * each row once and writes each token once. */
static void fill_record(const struct nep_perf_rank *rank, const struct nep_perf_baseline *baseline,
                        struct record *record)
{
    const struct nep_ref_traffic *traffic = &rank->traffic;
    const struct nep_perf_options *options = &rank->options;
    uint64_t payload = (uint64_t)options->hidden * nep_ref_dtype_bytes(options->dtype);
    uint64_t wire = (uint64_t)options->hidden * nep_ref_dtype_bytes(options->wire);
    *record = (struct record){.stats = rank->stats,
                              .tokens = traffic->tokens,
                              .tokens_local = traffic->tokens_local,
                              .remote_nodes = traffic->remote_nodes,
                              .remote_ranks = traffic->remote_ranks,
                              .remote_pairs = traffic->remote_pairs,
                              .wrong = rank->report.wrong,
                              .elements = rank->report.elements,
                              .outage_ns = rank->outage_ns,
                              .digest = rank->digest};
    record->moved_read = traffic->tokens * payload + rank->rows_moved * payload;
    record->moved_written = rank->rows_moved * wire + traffic->tokens * payload;
    memcpy(record->first, rank->report.first, sizeof(record->first));
    if (baseline != NULL) {
        record->wrong += baseline->wrong;
        record->read_rate = baseline->read_rate;
        record->write_rate = baseline->write_rate;
    }
}

static int verdict(const struct nep_perf_rank *rank, const struct nep_perf_summary *summary)
{
    if (!rank->options.is_verified) {
        return NEP_PERF_OK;
    }
    bool is_first = nep_perf_seat_is_first(rank->seat);
    int rc = NEP_PERF_OK;
    if (summary->wrong > 0) {
        rc = NEP_PERF_FAILED;
        if (is_first) {
            nep_perf_error(rc, "%llu wrong elements; the first: %s",
                           (unsigned long long)summary->wrong, summary->first_wrong);
        }
    }
    /* Iterations that were done twice are counted twice. */
    if (summary->is_traffic_wrong && rank->num_recoveries == 0) {
        rc = NEP_PERF_FAILED;
        if (is_first) {
            nep_perf_error(rc,
                           "rows sent to other nodes are %llu out and %llu back as counted by the "
                           "library; this routing needs %llu",
                           (unsigned long long)summary->remote_rows,
                           (unsigned long long)summary->remote_rows_back,
                           (unsigned long long)summary->floor_rows);
        }
    }
    return rc;
}

int nep_perf_results(struct nep_perf_rank *rank, const struct nep_perf_baseline *baseline)
{
    uint32_t ranks = rank->seat->num_ranks;
    struct nep_perf_summary summary = {0};
    struct nep_perf_times times[3];
    struct record record;
    fill_record(rank, baseline, &record);
    struct record *records = calloc(ranks, sizeof(*records));
    double *totals = calloc(rank->num_samples + 1, sizeof(*totals));
    int rc = NEP_PERF_FAILED;
    if (records == NULL || totals == NULL ||
        !nep_perf_seat_allgather(rank->seat, &record, records, sizeof(record)) ||
        !times_of(rank, rank->samples, rank->num_samples, times, totals)) {
        goto out;
    }
    summary.dispatch = times[0];
    summary.combine = times[1];
    summary.total = times[2];
    reduce_records(rank, records, &summary);
    if (!imbalance_all(rank, &summary) || !nep_perf_waits_gather(rank, &summary) ||
        (baseline != NULL && !reduce_baseline(rank, baseline, totals, &summary))) {
        goto out;
    }
    rc = verdict(rank, &summary);
    if (nep_perf_seat_is_first(rank->seat)) {
        const char *json = rank->options.json;
        if (json == NULL || strcmp(json, "-") != 0) {
            nep_perf_report_text(stdout, rank, &summary);
        }
        int written = json != NULL ? write_json(rank, &summary) : NEP_PERF_OK;
        rc = rc != NEP_PERF_OK ? rc : written;
    }
out:
    free(summary.waits_ms);
    free(records);
    free(totals);
    return rc;
}
