/* SPDX-License-Identifier: Apache-2.0 */
/* nep-place: solves, scores and explains placement maps. */
#include "tools/nep_place.h"

#include <errno.h>
#include <math.h>
#include <string.h>

int place_shape(const struct place_args *args, const struct nep_trace *trace, double replicas,
                uint32_t *sizes, struct nep_map_shape *shape)
{
    uint32_t experts = nep_trace_num_experts(trace);
    uint32_t ranks = (uint32_t)(args->nodes * args->gpus_per_node);
    for (uint32_t n = 0; n < args->nodes; n++) {
        sizes[n] = (uint32_t)args->gpus_per_node;
    }
    *shape = (struct nep_map_shape){.size = sizeof *shape,
                                    .num_layers = nep_trace_num_layers(trace),
                                    .num_experts = experts,
                                    .num_nodes = (uint32_t)args->nodes,
                                    .num_ranks = ranks,
                                    .slots_per_rank = (experts + ranks - 1) / ranks,
                                    .ranks_per_node = sizes};
    if (replicas > 0.0) {
        double slots = experts * (1.0 + replicas / 100.0) / ranks;
        if (fabs(slots - round(slots)) > 1e-6) {
            return place_error(PLACE_UNUSABLE,
                               "%u experts and %g %% replicas on %u ranks are %.3f slots per rank, "
                               "which must be a whole number",
                               experts, replicas, ranks, slots);
        }
        shape->slots_per_rank = (uint32_t)round(slots);
    }
    return PLACE_GO_ON;
}

void place_json_score(struct json_out *json, const struct nep_score *score, double base)
{
    json_double(json, "remote_nodes_per_token", score->remote_nodes_per_token);
    if (base > 0.0) {
        json_double(json, "change_pct", 100.0 * (score->remote_nodes_per_token / base - 1.0));
    }
    json_double(json, "imbalance_node", score->imbalance_node);
    json_double(json, "imbalance_rank", score->imbalance_rank);
    json_double(json, "ranks_per_token", score->ranks_per_token);
    json_double(json, "local_token_share", score->local_share);
}

int main(int argc, char **argv)
{
    static struct place_args args;
    int status = place_args_parse(argc, argv, &args);
    if (status != PLACE_GO_ON) {
        return status;
    }
    static const struct {
        const char *name;
        int (*run)(struct place_args *args);
    } commands[] = {
        {"solve", place_solve},   {"eval", place_eval},   {"compare", place_compare},
        {"report", place_report}, {"queue", place_queue}, {"slice", place_slice},
    };
    json_open(&args.json, NULL, '{');
    json_text(&args.json, "version", nep_version_string());
    json_text(&args.json, "command", args.command);
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        if (strcmp(args.command, commands[i].name) == 0) {
            status = commands[i].run(&args);
        }
    }
    json_close(&args.json, '}');
    if (fflush(args.out) != 0) {
        nep_out_file_drop(&args.json_file);
        return place_error(PLACE_FAILED, "cannot write: %s", strerror(errno));
    }
    if (args.json.file == NULL) {
        return status;
    }
    fputc('\n', args.json.file);
    if (status != PLACE_FINE) {
        nep_out_file_drop(&args.json_file); /* no results, no file */
    } else if (nep_out_file_commit(&args.json_file) != NEP_OK) {
        return place_error(PLACE_FAILED, "--json %s", nep_last_message());
    }
    return status;
}
