/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a window on a GPU holds, computed in one place, so that every rank knows every offset. The
 * staging areas are the only part that grows with M: rows of tokens that lie in memory which peers
 * do not map wait there for their readers (S * M rows), and expert outputs from such memory
 * (staging_bytes). Rejected: tiles under credits as between nodes, which would keep SMs of both
 * sides busy with each other.
 */
#include <stdlib.h>
#include <string.h>

#include "dispatch/cuda/exec.h"
#include "dispatch/cuda/far_plan.h"

static uint64_t take(uint64_t *end_p, uint64_t bytes)
{
    uint64_t at = (*end_p + 255) / 256 * 256;
    *end_p = at + bytes;
    return at;
}

uint64_t nep_device_max_rows(const struct nep_shape *shape, uint32_t num_ranks)
{
    uint64_t tokens = (uint64_t)num_ranks * shape->max_tokens;
    switch (shape->layout) {
    case NEP_LAYOUT_RANK:
        return tokens;
    case NEP_LAYOUT_EXPERT_PADDED:
    case NEP_LAYOUT_EXPERT_FRONT:
        return tokens * shape->slots_per_rank;
    default:
        return tokens * shape->top_k + (uint64_t)shape->slots_per_rank * (shape->alignment - 1);
    }
}

static void plan_staging(struct nep_cuda_plan *plan, const struct nep_shape *shape,
                         uint32_t num_ranks, uint64_t staging_bytes, uint64_t *end_p)
{
    struct nep_cuda_staging *to = &plan->staging;
    uint64_t depth = shape->outstanding;
    uint64_t tokens = shape->max_tokens;
    uint64_t pairs = tokens * shape->top_k;
    uint64_t weights = shape->layout == NEP_LAYOUT_RANK ? shape->weights_bytes : 0;
    to->depth = shape->outstanding;
    to->x = take(end_p, depth * tokens * shape->format.payload_bytes);
    to->scales_stride = (tokens * shape->format.scale_bytes + 15) / 16 * 16;
    to->scales = take(end_p, depth * to->scales_stride);
    to->slots = take(end_p, depth * pairs * 4);
    to->index = take(end_p, depth * pairs * 4);
    to->weights = take(end_p, depth * pairs * 4);
    uint64_t most = nep_device_max_rows(shape, num_ranks);
    uint64_t fit = staging_bytes / (depth * (shape->row_bytes + weights));
    to->y_rows = fit < most ? fit : most;
    to->y = take(end_p, depth * to->y_rows * shape->row_bytes);
    to->y_weights = take(end_p, depth * to->y_rows * weights);
}

/* The same order as nep_device_handle_create carves. */
static uint64_t handle_bytes(const struct nep_shape *shape, uint32_t num_ranks, uint32_t num_nodes,
                             uint32_t layout_blocks)
{
    uint64_t pairs = (uint64_t)shape->max_tokens * shape->top_k;
    uint64_t slots = (uint64_t)num_ranks * shape->slots_per_rank;
    uint64_t counts = num_ranks + num_nodes + slots;
    uint64_t end = 0;
    take(&end, sizeof(struct nep_cuda_cell));
    take(&end, pairs * 4);
    take(&end, pairs * 4);
    take(&end, pairs * 4);
    take(&end, counts * 4);
    take(&end, (slots + num_ranks) * 4);
    take(&end, num_ranks * 8);
    take(&end, pairs * sizeof(struct nep_cuda_term));
    take(&end, (uint64_t)shape->max_tokens * 4);
    take(&end, layout_blocks * counts * 8);
    take(&end, (2 + (uint64_t)shape->slots_per_rank) * 8);
    take(&end, ((uint64_t)shape->slots_per_rank + num_ranks) * 4);
    return (end + 255) / 256 * 256;
}

void nep_cuda_plan_init(struct nep_cuda_plan *plan, const struct nep_shape *shape,
                        uint32_t num_ranks, uint32_t num_nodes, uint32_t layout_blocks,
                        uint64_t staging_bytes, uint64_t far_bytes)
{
    memset(plan, 0, sizeof *plan);
    plan->words = nep_cuda_words_plan(num_ranks, shape->slots_per_rank, shape->window);
    uint64_t end = plan->words.bytes;
    if (num_nodes == 1) {
        plan_staging(plan, shape, num_ranks, staging_bytes, &end);
    } else {
        plan->far = take(&end, far_bytes);
    }
    plan->pool = (end + 4095) / 4096 * 4096;
    plan->bytes = plan->pool + shape->pool_bytes;
    plan->handle_bytes = handle_bytes(shape, num_ranks, num_nodes, layout_blocks);
}

enum nep_status nep_device_memory(const struct nep_plan *plan, const struct nep_ep_params *params,
                                  struct nep_memory *memory)
{
    struct nep_cuda_plan here;
    const struct nep_topology *topology = plan->topology;
    struct nep_config config;
    enum nep_status status = nep_config_load(&config);
    if (status != NEP_OK) {
        return status;
    }
    uint64_t staging = params->staging_bytes != 0 ? params->staging_bytes : config.staging_bytes;
    struct nep_far_plan far = {.near_bytes = 0};
    struct nep_far_routing routing;
    if (topology->num_nodes > 1) {
        status = nep_far_plan_init(&far, plan->shape, topology, staging);
    }
    if (status != NEP_OK) {
        return status;
    }
    nep_cuda_plan_init(&here, plan->shape, topology->num_ranks, topology->num_nodes, 16, staging,
                       far.near_bytes);
    memory->control_bytes = here.words.bytes;
    memory->staging_bytes = here.pool - here.words.bytes;
    memory->region_bytes = here.pool;
    memory->handle_bytes = here.handle_bytes;
    if (topology->num_nodes > 1) {
        const struct nep_region *region = &far.plan.regions[topology->rank];
        memory->dispatch_landing_bytes = region->combine_landing - region->dispatch_landing;
        memory->combine_landing_bytes = region->send - region->combine_landing;
        memory->send_bytes = region->home - region->send;
        memory->control_bytes += region->dispatch_landing;
        memory->region_bytes += far.words_bytes;
        memory->handle_bytes += nep_far_plan_handle(&far, topology->rank, NULL, &routing);
        nep_far_plan_fini(&far);
    }
    return NEP_OK;
}
