/* SPDX-License-Identifier: Apache-2.0 */
/* What a run found, gathered from all ranks, for people and as JSON. */
#ifndef NEP_PERFTEST_RESULTS_H
#define NEP_PERFTEST_RESULTS_H

#include <stdio.h>

#include "perftest/rank.h"

struct nep_perf_times {
    double p50_us;
    double p99_us;
    double max_us;
};

/* What the baseline's blocks brought; samples as those of the rank, pair by pair. */
struct nep_perf_baseline {
    const char *name;
    const struct nep_perf_sample *samples;
    uint64_t num_samples;
    uint32_t pairs;
    uint64_t wrong; /* elements of this rank */
    /* bytes once through memory, per second, of this rank while all ranks run */
    double read_rate;
    double write_rate;
};

struct nep_perf_summary {
    struct nep_perf_times dispatch;
    struct nep_perf_times combine;
    struct nep_perf_times total;
    double wire_bytes; /* per rank and iteration, both ways */
    double wire_floor_bytes;
    double wire_messages;
    double intra_bytes;
    double wire_bytes_max_node; /* per iteration */
    double remote_nodes_per_token;
    double remote_ranks_per_token;
    double remote_pairs_per_token;
    double local_token_share;
    double imbalance_rank;
    double imbalance_node;
    double header_bytes;
    uint64_t remote_rows;
    uint64_t remote_rows_back;
    uint64_t floor_rows;
    bool has_predicted;
    uint64_t predicted_rows; /* by the schedule that nep-place shares */
    uint64_t tokens;
    uint64_t elements;
    uint64_t wrong;
    char first_wrong[256];
    uint64_t digest;
    bool is_traffic_wrong;
    double *waits_ms; /* [R waiting][phases][R awaited]; NULL with very many ranks */
    double outage_ms; /* the longest from noticing a loss to the end of the next iteration */
    /* with a baseline */
    bool has_baseline;
    const char *baseline_name;
    struct nep_perf_times baseline_total;
    struct nep_perf_times baseline_dispatch;
    struct nep_perf_times baseline_combine;
    double speedup;
    double speedup_pairs; /* median of the ratios of alternating blocks */
    double ratios[64];
    uint32_t pairs;
    double byte_floor_us;
    double copy_rates[2]; /* read, write: bytes a second of all ranks together */
};

/* Collective: who waited for whom. */
bool nep_perf_waits_gather(struct nep_perf_rank *rank, struct nep_perf_summary *summary);
void nep_perf_waits_json(FILE *out, const struct nep_perf_rank *rank,
                         const struct nep_perf_summary *summary);
void nep_perf_lost_json(FILE *out, const struct nep_perf_rank *rank,
                        const struct nep_perf_summary *summary);

/* Collective: gathers, and the first rank that lives writes. baseline NULL: none. Exit status. */
int nep_perf_results(struct nep_perf_rank *rank, const struct nep_perf_baseline *baseline);

void nep_perf_report_text(FILE *out, const struct nep_perf_rank *rank,
                          const struct nep_perf_summary *summary);
void nep_perf_report_json(FILE *out, const struct nep_perf_rank *rank,
                          const struct nep_perf_summary *summary);

#endif
