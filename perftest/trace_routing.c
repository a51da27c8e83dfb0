/* SPDX-License-Identifier: Apache-2.0 */
/* A thin layer: which token enters where is placement/schedule.h's to say, as for nep-place. */
#include "perftest/trace_routing.h"

#include <stdlib.h>
#include <string.h>

#include "perftest/perf.h"
#include "placement/schedule.h"

struct nep_perf_trace {
    const struct nep_perf_options *options;
    struct nep_topology topology;
    struct nep_trace *trace;
    struct nep_schedule *schedule;
};

int nep_perf_trace_open(struct nep_perf_options *options, const struct nep_topology *topology,
                        struct nep_perf_trace **trace_p)
{
    struct nep_perf_trace *trace = calloc(1, sizeof(*trace));
    if (trace == NULL) {
        return nep_perf_error(NEP_PERF_FAILED, "out of memory");
    }
    trace->options = options;
    trace->topology = *topology;
    if (nep_trace_open(options->trace, &trace->trace) != NEP_OK) {
        int rc = nep_perf_error(NEP_PERF_USAGE, "--routing trace:%s: %s", options->trace,
                                nep_last_message());
        free(trace);
        return rc;
    }
    options->experts = nep_trace_num_experts(trace->trace);
    options->top_k = nep_trace_top_k(trace->trace);
    uint32_t layers = nep_trace_num_layers(trace->trace);
    if (options->layer >= (int32_t)layers) {
        int rc = nep_perf_error(NEP_PERF_USAGE, "--layer %d: the trace has layers 0 to %u",
                                options->layer, layers - 1);
        nep_perf_trace_close(trace);
        return rc;
    }
    *trace_p = trace;
    return -1;
}

/* Homes by the options: random draws, or predicted from each request's signature and the map. */
static enum nep_status assign_homes(const struct nep_perf_trace *trace, const struct nep_map *map,
                                    const struct nep_map_shape *shape,
                                    const struct nep_requests *requests, uint32_t *homes)
{
    const char *kind = trace->options->homes;
    bool is_predicted = kind != NULL ? strcmp(kind, "predicted") == 0 : trace->options->map != NULL;
    return is_predicted ? nep_homes_predict(requests, map, homes)
                        : nep_homes_random(requests, shape, trace->options->seed, homes);
}

static struct nep_map_shape shape_of(const struct nep_perf_trace *trace)
{
    return (struct nep_map_shape){.size = sizeof(struct nep_map_shape),
                                  .num_layers = nep_trace_num_layers(trace->trace),
                                  .num_experts = trace->options->experts,
                                  .num_nodes = trace->topology.num_nodes,
                                  .num_ranks = trace->topology.num_ranks,
                                  .ranks_per_node = trace->topology.node_ranks};
}

int nep_perf_trace_schedule(struct nep_perf_trace *trace, const struct nep_map *map)
{
    struct nep_map_shape shape = shape_of(trace);
    struct nep_requests requests = nep_requests_all(trace->trace);
    struct nep_map *contiguous = NULL;
    uint32_t *homes = calloc((size_t)requests.num + 1, sizeof(*homes));
    enum nep_status status = homes == NULL ? NEP_ERR_NO_MEMORY : NEP_OK;
    if (status == NEP_OK && map == NULL) {
        status = nep_map_contiguous(&shape, &contiguous);
        map = contiguous;
    }
    if (status == NEP_OK) {
        status = assign_homes(trace, map, &shape, &requests, homes);
    }
    if (status == NEP_OK) {
        int layer = trace->options->layer < 0 ? NEP_SCHEDULE_ALL_LAYERS : trace->options->layer;
        status = nep_schedule_create(&requests, homes, &shape, layer, &trace->schedule);
    }
    free(homes);
    nep_map_destroy(contiguous);
    if (status != NEP_OK) {
        return nep_perf_error(NEP_PERF_USAGE, "--routing trace:%s: %s", trace->options->trace,
                              nep_last_message());
    }
    return -1;
}

void nep_perf_trace_close(struct nep_perf_trace *trace)
{
    if (trace == NULL) {
        return;
    }
    nep_schedule_destroy(trace->schedule);
    nep_trace_close(trace->trace);
    free(trace);
}

uint32_t nep_perf_trace_num_layers(const struct nep_perf_trace *trace)
{
    return nep_trace_num_layers(trace->trace);
}

uint32_t nep_perf_trace_layer(const struct nep_perf_trace *trace, uint64_t batch)
{
    return nep_schedule_layer(trace->schedule, batch);
}

uint32_t nep_perf_trace_ids(const struct nep_perf_trace *trace, uint32_t rank, uint64_t batch,
                            uint32_t num_tokens, int32_t *ids)
{
    return nep_schedule_ids(trace->schedule, rank, batch, num_tokens, ids);
}

enum nep_status nep_perf_trace_remote_rows(const struct nep_perf_trace *trace,
                                           const struct nep_map *map, uint64_t first, uint64_t num,
                                           uint64_t *rows_p)
{
    struct nep_map *contiguous = NULL;
    struct nep_map_shape shape = shape_of(trace);
    enum nep_status status = map != NULL ? NEP_OK : nep_map_contiguous(&shape, &contiguous);
    if (status == NEP_OK) {
        status = nep_schedule_remote_rows(trace->schedule, map != NULL ? map : contiguous,
                                          trace->options->tokens, first, num, rows_p);
    }
    nep_map_destroy(contiguous);
    return status;
}
