/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a shape costs, from the one place that computes it (nep_ep_memory). Where nodes differ in
 * size, so do their ranks' regions: the parts are those of the rank that needs most.
 */
#include <string.h>

#include "tools/nep_info.h"
#include "transport/topology.h"

struct costs {
    struct nep_memory most;
    uint32_t most_rank;
    uint64_t least_bytes;
};

static enum nep_status measure(const struct info *info, const struct nep_ep_params *shape,
                               struct costs *costs)
{
    costs->least_bytes = UINT64_MAX;
    /* Ranks of a node with equal lanes cost the same, but which are equal is region.c's business.
     */
    for (uint32_t r = 0; r < info->num_ranks; r++) {
        struct nep_topology_store *store;
        struct nep_topology topology;
        struct nep_memory memory = {.size = sizeof memory};
        enum nep_status status =
            nep_topology_from_sizes(info->ranks_per_node, info->num_nodes, r, &store, &topology);
        if (status != NEP_OK) {
            return status;
        }
        status = nep_ep_memory(shape, &topology, &memory);
        nep_topology_destroy(store);
        if (status != NEP_OK) {
            return status;
        }
        if (memory.region_bytes > costs->most.region_bytes) {
            costs->most = memory;
            costs->most_rank = r;
        }
        if (memory.region_bytes < costs->least_bytes) {
            costs->least_bytes = memory.region_bytes;
        }
    }
    return NEP_OK;
}

static void print(struct info *info, const struct nep_ep_params *shape, const struct costs *costs)
{
    const struct nep_memory *most = &costs->most;
    const struct {
        const char *label;
        const char *key;
        uint64_t bytes;
    } rows[] = {
        {"control words and COUNTS", "control_bytes", most->control_bytes},
        {"dispatch landing slots", "dispatch_landing_bytes", most->dispatch_landing_bytes},
        {"combine landing slots", "combine_landing_bytes", most->combine_landing_bytes},
        {"packed tiles going out", "send_bytes", most->send_bytes},
        {"tiles read on the node", "home_bytes", most->home_bytes},
        {"staging of private tensors", "staging_bytes", most->staging_bytes},
        {"region, all of these", "region_bytes", most->region_bytes},
        {"each handle, private", "handle_bytes", most->handle_bytes},
    };
    fprintf(info->out,
            "region of rank %u: %u ranks on %u nodes, %u tokens of %u, %u experts, top-%u, %u "
            "outstanding\n",
            costs->most_rank, info->num_ranks, info->num_nodes, shape->max_tokens, shape->hidden,
            shape->num_experts, shape->top_k, shape->outstanding == 0 ? 1 : shape->outstanding);
    json_open(&info->json, "region", '{');
    json_u64(&info->json, "rank", costs->most_rank);
    json_u64(&info->json, "least_region_bytes", costs->least_bytes);
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        fprintf(info->out, "  %-28s %14llu bytes %10.2f MiB\n", rows[i].label,
                (unsigned long long)rows[i].bytes, (double)rows[i].bytes / 1048576.0);
        json_u64(&info->json, rows[i].key, rows[i].bytes);
    }
    if (costs->least_bytes != most->region_bytes) {
        fprintf(info->out, "  nodes differ in size: the smallest region has %llu bytes\n",
                (unsigned long long)costs->least_bytes);
    }
    json_close(&info->json, '}');
}

int info_region(struct info *info)
{
    struct nep_ep_params shape = info->shape;
    struct nep_map *map = NULL;
    struct costs costs = {.most_rank = 0};
    enum nep_status status = NEP_OK;
    if (info->map != NULL) {
        struct nep_map_shape of_map = {.size = sizeof of_map};
        status = nep_map_load(info->map, &map);
        if (status == NEP_OK) {
            status = nep_map_get_shape(map, &of_map);
        }
        shape.map = map;
        shape.num_experts = of_map.num_experts;
        shape.slots_per_rank = of_map.slots_per_rank;
        shape.num_layers = of_map.num_layers;
    }
    if (status == NEP_OK) {
        status = measure(info, &shape, &costs);
    }
    if (status == NEP_OK) {
        print(info, &shape, &costs);
    }
    if (status == NEP_OK && map == NULL) {
        info_flat(info);
    }
    nep_map_destroy(map);
    return status == NEP_OK ? INFO_FINE : info_error(INFO_UNUSABLE, "%s", nep_last_message());
}
