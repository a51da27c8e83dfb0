/* SPDX-License-Identifier: Apache-2.0 */
/* Tables in perftest's columns, and JSON. */
#include <string.h>

#include "base/out_file.h"
#include "perftest/put.h"

static const char rule[] = "--------------------------------------------------------------------"
                           "-------------------";

static bool is_plain(const struct nep_perf_put_side *side)
{
    return !side->options->is_announced && (side->transport->ops->caps & NEP_CAP_SILENT) != 0;
}

static double shown(const struct nep_perf_put_side *side, double bytes_per_s)
{
    return side->options->is_gbits ? bytes_per_s * 8 / 1e9 : bytes_per_s / (1 << 20);
}

void nep_perf_put_banner(FILE *out, const struct nep_perf_put_side *side)
{
    const struct nep_perf_put_options *options = side->options;
    const struct nep_config *config = &side->config;
    bool is_verbs = strcmp(side->transport->ops->name, "verbs") == 0;
    fprintf(out, "%s\n                    nep-perf put %s\n", rule,
            options->is_lat ? "latency" : "bandwidth");
    fprintf(out, " Transport       : %-12s Messages        : %s\n", options->transport,
            is_plain(side) ? "plain writes" : "announced");
    if (!options->is_lat) {
        fprintf(out, " Depth           : %-12u Signalled       : every list\n", options->depth);
    }
    if (is_verbs) {
        fprintf(out, " Paths           : %-12u QPs per path    : %u\n", config->verbs_paths,
                config->verbs_qps);
        fprintf(out, " Ack timeout     : %-12u Retries         : %u\n", config->verbs_ack_timeout,
                config->verbs_retry);
    }
    fprintf(out, "%s\n", rule);
    if (options->is_lat) {
        fprintf(out, " #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    "
                     "t_avg[usec]    t_stdev[usec]   99%% percentile[usec]   99.9%% "
                     "percentile[usec]\n");
    } else if (options->is_gbits) {
        fprintf(out, " #bytes     #iterations    BW peak[Gb/sec]    BW average[Gb/sec]   "
                     "MsgRate[Mpps]\n");
    } else {
        fprintf(out, " #bytes     #iterations    BW peak[MiB/sec]    BW average[MiB/sec]   "
                     "MsgRate[Mpps]\n");
    }
}

void nep_perf_put_row(FILE *out, const struct nep_perf_put_side *side,
                      const struct nep_perf_put_result *result)
{
    if (side->options->is_lat) {
        fprintf(out,
                " %-7llu %-10u          %-7.2f        %-7.2f      %-7.2f           %-7.2f        "
                "%-7.2f         %-7.2f                 %-7.2f\n",
                (unsigned long long)result->size, result->iters, result->min, result->max,
                result->typical, result->mean, result->stdev, result->p99, result->p999);
    } else {
        fprintf(out, " %-7llu    %-10u       %-7.2f            %-7.2f              %-7.6f\n",
                (unsigned long long)result->size, result->iters, shown(side, result->peak),
                shown(side, result->average), result->messages / 1e6);
    }
    if (side->options->is_verified) {
        fprintf(out, "   verified: %llu bytes of %u messages, %llu wrong\n",
                (unsigned long long)result->verified, side->num_slots,
                (unsigned long long)result->wrong);
    }
}

static void write_result(FILE *file, const struct nep_perf_put_side *side,
                         const struct nep_perf_put_result *result)
{
    fprintf(file, "{\"bytes\": %llu, \"iterations\": %u, ", (unsigned long long)result->size,
            result->iters);
    if (side->options->is_lat) {
        fprintf(file,
                "\"t_min_us\": %.3f, \"t_max_us\": %.3f, \"t_typical_us\": %.3f, \"t_avg_us\": "
                "%.3f, \"t_stdev_us\": %.3f, \"t_99_us\": %.3f, \"t_99_9_us\": %.3f, ",
                result->min, result->max, result->typical, result->mean, result->stdev, result->p99,
                result->p999);
    } else {
        fprintf(file,
                "\"bw_peak_mib_s\": %.3f, \"bw_average_mib_s\": %.3f, \"bw_average_gbit_s\": "
                "%.4f, \"msg_rate_mpps\": %.6f, ",
                result->peak / (1 << 20), result->average / (1 << 20), result->average * 8 / 1e9,
                result->messages / 1e6);
    }
    if (side->options->is_verified) {
        fprintf(file, "\"verified_bytes\": %llu, \"wrong\": %llu}",
                (unsigned long long)result->verified, (unsigned long long)result->wrong);
    } else {
        fprintf(file, "\"verified_bytes\": 0, \"wrong\": null}");
    }
}

int nep_perf_put_json(const struct nep_perf_put_side *side,
                      const struct nep_perf_put_result *results, uint32_t num_results)
{
    const struct nep_perf_put_options *options = side->options;
    struct nep_out_file out;
    if (nep_out_file_open_arg(&out, options->json) != NEP_OK) {
        return nep_perf_error(NEP_PERF_FAILED, "--json %s", nep_last_message());
    }
    FILE *file = out.file;
    struct nep_transport_stats stats = {0};
    side->transport->ops->stats(side->transport, &stats);
    fprintf(file,
            "{\"test\": \"%s\", \"transport\": \"%s\", \"announced\": %s, \"depth\": %u, "
            "\"paths\": %u, \"qps\": %u, \"seed\": %llu, \"puts\": %llu, \"work_requests\": %llu, "
            "\"retries\": %llu, \"results\": [",
            options->is_lat ? "lat" : "bw", options->transport, is_plain(side) ? "false" : "true",
            options->depth, side->config.verbs_paths, side->config.verbs_qps,
            (unsigned long long)options->seed, (unsigned long long)stats.puts,
            (unsigned long long)stats.work_requests, (unsigned long long)stats.retries);
    for (uint32_t i = 0; i < num_results; i++) {
        fprintf(file, "%s", i > 0 ? ", " : "");
        write_result(file, side, &results[i]);
    }
    fprintf(file, "]}\n");
    if (nep_out_file_commit(&out) != NEP_OK) {
        return nep_perf_error(NEP_PERF_FAILED, "--json %s", nep_last_message());
    }
    return NEP_PERF_OK;
}
