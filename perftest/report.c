/* SPDX-License-Identifier: Apache-2.0 */
/*
 * For people: times, then what went over the wire and why not less. The ladder of rows per token
 * (per expert, per rank, per node) is what the library is about, so it is shown with what was sent
 * beside it. For programs: one JSON object whose keys are fixed in docs/cli.md.
 */
#include "perftest/perf.h"
#include "perftest/results.h"
#include "tools/flat.h"

static void print_times(FILE *out, const char *name, const struct nep_perf_times *times)
{
    fprintf(out, "  %-22s %10.1f %10.1f %10.1f\n", name, times->p50_us, times->p99_us,
            times->max_us);
}

static void print_shape(FILE *out, const struct nep_perf_rank *rank)
{
    const struct nep_perf_options *options = &rank->options;
    const struct nep_topology *topology = &rank->topology;
    fprintf(out, "nep-perf ep: %u ranks on %u node%s (", topology->num_ranks, topology->num_nodes,
            topology->num_nodes == 1 ? "" : "s");
    for (uint32_t n = 0; n < topology->num_nodes && n < 16; n++) {
        fprintf(out, "%s%u", n > 0 ? "," : "", topology->node_ranks[n]);
    }
    fprintf(out, "%s), %u tokens a rank, hidden %u, %u experts, top-%u\n",
            topology->num_nodes > 16 ? ",..." : "", options->tokens, options->hidden,
            options->experts, options->top_k);
    fprintf(out, "  routing %s, %s placement, %s layout%s, %s, wire %s, %s tensors, seed %llu\n",
            options->routing, options->map != NULL ? options->map : "contiguous",
            nep_perf_layout_name(options),
            options->layout == NEP_LAYOUT_EXPERT_PADDED ? " (padded)" : "",
            nep_perf_dtype_name(options->dtype), nep_perf_dtype_name(options->wire),
            options->is_mapped ? "mapped" : "private", (unsigned long long)options->seed);
}

static void print_row(FILE *out, const struct nep_perf_summary *summary, const char *name,
                      double rows_per_token)
{
    double per_row = summary->remote_nodes_per_token > 0.0
                         ? summary->wire_floor_bytes / summary->remote_nodes_per_token
                         : 0.0;
    fprintf(out, "  %-34s %8.3f %12.1f\n", name, rows_per_token, rows_per_token * per_row / 1024);
}

/* The rule of docs/performance.md: what flat would cost more, against what it was worth there. */
static void print_flat(FILE *out, const struct nep_perf_rank *rank,
                       const struct nep_perf_summary *summary)
{
    double more = summary->remote_ranks_per_token - summary->remote_nodes_per_token;
    if (rank->topology.num_nodes == rank->topology.num_ranks ||
        summary->remote_nodes_per_token == 0.0) {
        return;
    }
    double kib = more * summary->wire_floor_bytes / summary->remote_nodes_per_token / 1024;
    flat_print(out, kib);
}

static void print_wire(FILE *out, const struct nep_perf_rank *rank,
                       const struct nep_perf_summary *summary)
{
    if (rank->topology.num_nodes == 1) {
        fprintf(out, "\nOne node: nothing crosses a wire; %.1f KiB a rank moved between ranks.\n",
                summary->intra_bytes / 1024);
        return;
    }
    fprintf(out, "\n  To other nodes, both ways           rows/token  KiB/rank/iteration\n");
    print_row(out, summary, "one row per (token, expert)", summary->remote_pairs_per_token);
    print_row(out, summary, "one row per (token, rank)", summary->remote_ranks_per_token);
    print_row(out, summary, "one row per (token, node): floor", summary->remote_nodes_per_token);
    double sent = summary->tokens > 0 ? (double)summary->remote_rows / (double)summary->tokens : 0;
    fprintf(out, "  %-34s %8.3f %12.1f   floor + %.1f KiB (%.2f %%) of headers\n", "sent by nearep",
            sent, summary->wire_bytes / 1024, summary->header_bytes / 1024,
            summary->wire_floor_bytes > 0.0
                ? 100.0 * summary->header_bytes / summary->wire_floor_bytes
                : 0.0);
    double saved = summary->wire_bytes > 0.0
                       ? summary->remote_pairs_per_token * summary->wire_floor_bytes /
                             (summary->remote_nodes_per_token * summary->wire_bytes)
                       : 0.0;
    fprintf(out,
            "  %.1f %% of tokens stay on their node; the others have an expert elsewhere, and each "
            "such\n  node must see the token once: with this placement no protocol can send fewer "
            "rows.\n",
            100.0 * summary->local_token_share);
    if (saved > 0.0) {
        fprintf(out, "  That is %.2f times fewer bytes than one row per (token, expert).", saved);
    }
    fprintf(out, " Busiest node: %.1f KiB.\n", summary->wire_bytes_max_node / 1024);
    print_flat(out, rank, summary);
}

static void print_baseline(FILE *out, const struct nep_perf_summary *summary)
{
    if (!summary->has_baseline) {
        return;
    }
    fprintf(out, "\n  baseline %s\n", summary->baseline_name);
    print_times(out, "dispatch", &summary->baseline_dispatch);
    print_times(out, "combine", &summary->baseline_combine);
    print_times(out, "total", &summary->baseline_total);
    fprintf(out, "  nearep is %.2f times faster (median of %u alternating pairs:",
            summary->speedup_pairs, summary->pairs);
    for (uint32_t p = 0; p < summary->pairs && p < 64; p++) {
        fprintf(out, " %.2f", summary->ratios[p]);
    }
    fprintf(out, ")\n");
    if (summary->byte_floor_us > 0.0) {
        fprintf(out,
                "  byte floor %.1f us at read %.1f and write %.1f GB/s of this run: nearep at "
                "%.0f %%, baseline at %.0f %% of it\n",
                summary->byte_floor_us, summary->copy_rates[0] * 1e-9,
                summary->copy_rates[1] * 1e-9,
                100.0 * summary->byte_floor_us / summary->total.p50_us,
                100.0 * summary->byte_floor_us / summary->baseline_total.p50_us);
    }
}

void nep_perf_report_text(FILE *out, const struct nep_perf_rank *rank,
                          const struct nep_perf_summary *summary)
{
    print_shape(out, rank);
    fprintf(out,
            "\n  us, slowest rank              p50        p99        max   (%llu iterations)\n",
            (unsigned long long)rank->num_samples);
    print_times(out, "dispatch", &summary->dispatch);
    print_times(out, "combine", &summary->combine);
    print_times(out, "total", &summary->total);
    print_wire(out, rank, summary);
    fprintf(out, "  Load, max / mean: %.3f over ranks, %.3f over nodes.\n", summary->imbalance_rank,
            summary->imbalance_node);
    print_baseline(out, summary);
    if (rank->options.is_verified) {
        fprintf(out, "\n  Verified: %llu elements of dispatch and combine, %llu wrong.",
                (unsigned long long)summary->elements, (unsigned long long)summary->wrong);
    } else {
        fprintf(out, "\n  Not verified (--verify).");
    }
    fprintf(out, " Digest %016llx\n", (unsigned long long)summary->digest);
    fflush(out);
}

static void json_string(FILE *out, const char *name, const char *value)
{
    if (value == NULL) {
        fprintf(out, "    \"%s\": null,\n", name);
        return;
    }
    fprintf(out, "    \"%s\": \"", name);
    for (const char *c = value; *c != '\0'; c++) {
        if (*c == '"' || *c == '\\') {
            fprintf(out, "\\%c", *c);
        } else if ((unsigned char)*c < 0x20) {
            fprintf(out, "\\u%04x", (unsigned)*c);
        } else {
            fputc(*c, out);
        }
    }
    fprintf(out, "\",\n");
}

static void json_times(FILE *out, const char *name, const struct nep_perf_times *times)
{
    fprintf(out, "  \"%s\": {\"p50\": %.3f, \"p99\": %.3f, \"max\": %.3f},\n", name, times->p50_us,
            times->p99_us, times->max_us);
}

static void json_config(FILE *out, const struct nep_perf_rank *rank)
{
    const struct nep_perf_options *options = &rank->options;
    fprintf(out, "  \"config\": {\n");
    json_string(out, "version", nep_version_string());
    json_string(out, "routing", options->routing);
    json_string(out, "map", options->map);
    json_string(out, "homes", options->homes);
    json_string(out, "layout", nep_perf_layout_name(options));
    json_string(out, "dtype", nep_perf_dtype_name(options->dtype));
    json_string(out, "wire", nep_perf_dtype_name(options->wire));
    json_string(out, "memory", options->is_mapped ? "mapped" : "private");
    json_string(out, "executor", options->executor);
    json_string(out, "intra", options->intra);
    json_string(out, "inter", options->inter);
    json_string(out, "on_fault", options->on_fault);
    fprintf(out, "    \"ranks_per_node\": [");
    for (uint32_t n = 0; n < rank->topology.num_nodes; n++) {
        fprintf(out, "%s%u", n > 0 ? ", " : "", rank->topology.node_ranks[n]);
    }
    fprintf(out,
            "],\n    \"ranks\": %u, \"nodes\": %u, \"threads\": %s, \"padded\": %s,\n"
            "    \"tokens\": %u, \"hidden\": %u, \"experts\": %u, \"top_k\": %u, \"layer\": %d,\n"
            "    \"outstanding\": %u, \"iters\": %u, \"warmup\": %u, \"seed\": %llu, \"verify\": "
            "%s\n  },\n",
            rank->topology.num_ranks, rank->topology.num_nodes,
            options->is_threads ? "true" : "false",
            options->layout == NEP_LAYOUT_EXPERT_PADDED ? "true" : "false", options->tokens,
            options->hidden, options->experts, options->top_k, options->layer, options->outstanding,
            options->iters, options->warmup, (unsigned long long)options->seed,
            options->is_verified ? "true" : "false");
}

static void json_baseline(FILE *out, const struct nep_perf_summary *summary)
{
    if (!summary->has_baseline) {
        return;
    }
    json_times(out, "baseline_dispatch_us", &summary->baseline_dispatch);
    json_times(out, "baseline_combine_us", &summary->baseline_combine);
    json_times(out, "baseline_total_us", &summary->baseline_total);
    fprintf(out, "  \"speedup\": %.4f,\n  \"speedup_pairs_median\": %.4f,\n  \"speedup_pairs\": [",
            summary->speedup, summary->speedup_pairs);
    for (uint32_t p = 0; p < summary->pairs && p < 64; p++) {
        fprintf(out, "%s%.4f", p > 0 ? ", " : "", summary->ratios[p]);
    }
    fprintf(out, "],\n  \"byte_floor_us\": %.3f,\n  \"byte_floor_pct\": %.2f,\n",
            summary->byte_floor_us, 100.0 * summary->byte_floor_us / summary->total.p50_us);
    fprintf(out, "  \"read_bytes_per_s\": %.0f,\n  \"write_bytes_per_s\": %.0f,\n",
            summary->copy_rates[0], summary->copy_rates[1]);
}

void nep_perf_report_json(FILE *out, const struct nep_perf_rank *rank,
                          const struct nep_perf_summary *summary)
{
    fprintf(out, "{\n");
    json_times(out, "dispatch_us", &summary->dispatch);
    json_times(out, "combine_us", &summary->combine);
    json_times(out, "total_us", &summary->total);
    json_baseline(out, summary);
    fprintf(out,
            "  \"wire_bytes_per_rank\": %.3f,\n  \"wire_floor_bytes_per_rank\": %.3f,\n"
            "  \"wire_bytes_max_node\": %.3f,\n  \"wire_messages_per_rank\": %.3f,\n"
            "  \"intra_bytes_per_rank\": %.3f,\n  \"remote_rows\": %llu,\n"
            "  \"remote_rows_back\": %llu,\n  \"remote_nodes_per_token\": %.6f,\n"
            "  \"remote_ranks_per_token\": %.6f,\n  \"remote_experts_per_token\": %.6f,\n"
            "  \"local_token_share\": %.6f,\n  \"imbalance_rank\": %.6f,\n"
            "  \"imbalance_node\": %.6f,\n",
            summary->wire_bytes, summary->wire_floor_bytes, summary->wire_bytes_max_node,
            summary->wire_messages, summary->intra_bytes, (unsigned long long)summary->remote_rows,
            (unsigned long long)summary->remote_rows_back, summary->remote_nodes_per_token,
            summary->remote_ranks_per_token, summary->remote_pairs_per_token,
            summary->local_token_share, summary->imbalance_rank, summary->imbalance_node);
    if (summary->has_predicted) {
        fprintf(out, "  \"predicted_remote_rows\": %llu,\n",
                (unsigned long long)summary->predicted_rows);
    }
    if (rank->options.is_verified) {
        fprintf(out, "  \"wrong_elements\": %llu,\n", (unsigned long long)summary->wrong);
    } else {
        fprintf(out, "  \"wrong_elements\": null,\n");
    }
    nep_perf_waits_json(out, rank, summary);
    nep_perf_lost_json(out, rank, summary);
    json_config(out, rank);
    fprintf(out, "  \"output_digest\": \"%016llx\"\n}\n", (unsigned long long)summary->digest);
    fflush(out);
}
