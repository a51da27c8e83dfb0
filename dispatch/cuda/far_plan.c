/* SPDX-License-Identifier: Apache-2.0 */
/*
 * W = V = 2 S: a stream's next tile is packed while the last one travels, and the send halves of
 * small batches find slots for all that they have. Rejected: the host's slots (dispatch/shape.c),
 * which make pinned memory grow with the length of a batch.
 */
#include "dispatch/cuda/far_plan.h"

#include <string.h>

enum { PAGE = 4096, ALIGN = 256 };

static uint64_t take(uint64_t *end_p, uint64_t bytes)
{
    uint64_t at = (*end_p + ALIGN - 1) / ALIGN * ALIGN;
    *end_p = at + bytes;
    return at;
}

static enum nep_status check(const struct nep_topology *topology)
{
    if (topology->num_ranks > NEP_FAR_MAX_RANKS || topology->num_nodes > NEP_FAR_MAX_NODES) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "executor cuda: %u ranks on %u nodes; over several nodes at most %d on %d",
                        topology->num_ranks, topology->num_nodes, NEP_FAR_MAX_RANKS,
                        NEP_FAR_MAX_NODES);
    }
    return NEP_OK;
}

/* The same limit as nep_device_max_rows. */
static uint64_t most_rows(const struct nep_shape *shape, uint32_t num_ranks)
{
    uint64_t tokens = (uint64_t)num_ranks * shape->max_tokens;
    if (shape->layout == NEP_LAYOUT_RANK) {
        return tokens;
    }
    return nep_layout_is_fixed(shape->layout)
               ? tokens * shape->slots_per_rank
               : tokens * shape->top_k + (uint64_t)shape->slots_per_rank * (shape->alignment - 1);
}

static void place_staging(struct nep_far_plan *far, uint32_t num_ranks, uint64_t staging_bytes)
{
    const struct nep_shape *shape = &far->shape;
    uint64_t most = most_rows(shape, num_ranks);
    uint64_t per_k = shape->layout == NEP_LAYOUT_RANK ? shape->weights_bytes : 4;
    uint64_t row = shape->format.payload_bytes + shape->format.scale_bytes + 2 * per_k + 8;
    uint64_t fit = staging_bytes / row;
    uint64_t rows = fit < most ? fit : most;
    uint64_t *end = &far->near_bytes;
    far->out = (struct nep_far_output){
        .x = take(end, rows * shape->format.payload_bytes),
        .scales = take(end, nep_wire_scales_bytes(&shape->format, rows)),
        .topk_slots = take(end, rows * per_k),
        .topk_weights = take(end, rows * per_k),
        .source_rank = take(end, rows * 4),
        .source_token = take(end, rows * 4),
        .capacity = rows,
    };
    /* Expert outputs are read until their operation ends: an area for each that may be outstanding.
     * Outputs of dispatch are copied before the next one's may be written. */
    uint64_t depth = shape->window / NEP_FAR_TILES;
    uint64_t weights = shape->layout == NEP_LAYOUT_RANK ? shape->weights_bytes : 0;
    fit = staging_bytes / (depth * (shape->row_bytes + weights));
    far->y_rows = fit < most ? fit : most;
    far->y_step = (far->y_rows * shape->row_bytes + ALIGN - 1) / ALIGN * ALIGN;
    far->y_weights_step = (far->y_rows * weights + ALIGN - 1) / ALIGN * ALIGN;
    far->y = take(end, depth * far->y_step);
    far->y_weights = take(end, depth * far->y_weights_step);
    far->near_bytes = (*end + PAGE - 1) / PAGE * PAGE;
}

enum nep_status nep_far_plan_init(struct nep_far_plan *far, const struct nep_shape *shape,
                                  const struct nep_topology *topology, uint64_t staging_bytes)
{
    memset(far, 0, sizeof *far);
    enum nep_status status = check(topology);
    if (status != NEP_OK) {
        return status;
    }
    far->shape = *shape;
    far->shape.window = nep_far_window(shape->outstanding);
    far->shape.tile_slots = far->shape.window;
    far->shape.ride_rows = 0;
    far->shape.pool_bytes = 0;
    far->shape.meta_bytes = nep_far_meta_bytes(shape->top_k);
    far->shape.tile_rows = nep_far_tile_rows(shape->max_tokens);
    status = nep_plan_init(&far->plan, &far->shape, topology);
    if (status != NEP_OK) {
        return status;
    }
    for (uint32_t r = 0; r < topology->num_ranks; r++) {
        const struct nep_region *region = &far->plan.regions[r];
        /* Home tiles and staging are for memory that kernels do not share. */
        uint64_t words = (region->home + PAGE - 1) / PAGE * PAGE;
        far->words_bytes = words > far->words_bytes ? words : far->words_bytes;
        if (region->send_counts > far->near_bytes) {
            far->near_bytes = region->send_counts;
        }
    }
    place_staging(far, topology->num_ranks, staging_bytes);
    return NEP_OK;
}

void nep_far_plan_fini(struct nep_far_plan *far)
{
    nep_plan_fini(&far->plan);
}

uint64_t nep_far_plan_handle(const struct nep_far_plan *far, uint32_t rank, char *memory,
                             struct nep_far_routing *routing)
{
    const struct nep_topology *topology = far->plan.topology;
    uint64_t tokens = far->shape.max_tokens;
    uint64_t pairs = tokens * far->shape.top_k;
    uint64_t lanes = far->plan.regions[rank].num_lanes + 1;
    uint64_t node_slots =
        (uint64_t)topology->node_ranks[topology->node_of_rank[rank]] * far->shape.slots_per_rank;
    uint64_t tiles = tokens / far->shape.tile_rows + 2;
    uint64_t end = 0;
    struct {
        uint64_t bytes;
        void *to;
    } tables[] = {
        {topology->num_nodes * tokens * 4, &routing->node_tokens},
        {topology->num_nodes * tokens * 4, &routing->row_of},
        {topology->num_nodes * 4, &routing->node_rows},
        {topology->num_ranks * node_slots * 4, &routing->first},
        {topology->num_ranks * sizeof(struct nep_far_in), &routing->in},
        {pairs * sizeof(struct nep_cuda_term), &routing->home_terms},
        {tokens * 4, &routing->home_num},
        {lanes * pairs * sizeof(struct nep_cuda_term), &routing->far_terms},
        {lanes * tokens * 4, &routing->far_num},
        {tiles * 4, &routing->chunks},
        {lanes * tiles * 8, &routing->schedule},
    };
    for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++) {
        uint64_t at = take(&end, tables[i].bytes);
        char *table = memory != NULL ? memory + at : NULL;
        memcpy(tables[i].to, &table, sizeof table);
    }
    return end;
}

uint64_t nep_far_plan_tables(const struct nep_far_plan *far, char *memory,
                             struct nep_far_tables *tables)
{
    const struct nep_topology *topology = far->plan.topology;
    uint64_t num = topology->num_ranks, nodes = topology->num_nodes;
    uint64_t end = 0;
    struct {
        uint64_t bytes;
        void *to;
    } rows[] = {
        {num * 4, &tables->node_of_rank},
        {num * 4, &tables->local_of_rank},
        {(nodes + 1) * 4, &tables->node_first},
        {num * 4, &tables->node_rank},
        {nodes * num * 4, &tables->landing},
        {nodes * num * 4, &tables->lane},
        {num * 4, &tables->lane_source},
        {num * num * 4, &tables->control},
        {num * sizeof(struct nep_region), &tables->regions},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        uint64_t at = take(&end, rows[i].bytes);
        char *table = memory != NULL ? memory + at : NULL;
        memcpy(rows[i].to, &table, sizeof table);
    }
    return end;
}

void nep_far_plan_fill_tables(const struct nep_far_plan *far, uint32_t rank,
                              const struct nep_far_tables *tables)
{
    const struct nep_plan *plan = &far->plan;
    const struct nep_topology *topology = plan->topology;
    uint64_t num = topology->num_ranks, nodes = topology->num_nodes;
    uint32_t node = topology->node_of_rank[rank];
    memcpy(tables->node_of_rank, topology->node_of_rank, num * 4);
    memcpy(tables->local_of_rank, topology->local_of_rank, num * 4);
    memcpy(tables->node_first, plan->node_first, (nodes + 1) * 4);
    memcpy(tables->node_rank, plan->node_rank, num * 4);
    memcpy(tables->landing, plan->landing, nodes * num * 4);
    memcpy(tables->lane, plan->lane, nodes * num * 4);
    memcpy(tables->regions, plan->regions, num * sizeof *plan->regions);
    memset(tables->lane_source, 0, num * 4);
    for (uint32_t a = 0; a < num; a++) {
        for (uint32_t b = 0; b < num; b++) {
            tables->control[a * num + b] = nep_plan_control(plan, a, b);
        }
        if (topology->node_of_rank[a] != node && nep_plan_landing(plan, a, node) == rank) {
            tables->lane_source[nep_plan_lane(plan, a, node)] = a;
        }
    }
}

uint32_t nep_far_plan_peers(const struct nep_far_plan *far, uint32_t rank, uint32_t *peers)
{
    const struct nep_plan *plan = &far->plan;
    const struct nep_topology *topology = plan->topology;
    uint32_t node = topology->node_of_rank[rank];
    uint32_t num = 0;
    for (uint32_t r = 0; r < topology->num_ranks; r++) {
        uint32_t other = topology->node_of_rank[r];
        if (other != node &&
            (nep_plan_landing(plan, r, node) == rank || nep_plan_landing(plan, rank, other) == r)) {
            peers[num++] = r;
        }
    }
    return num;
}
