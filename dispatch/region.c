/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Nothing here grows with E * M * H, nor with M beyond V tiles: so many slots per pair, credits
 * beyond.
 * The send ring of a direction is shared by dispatch and combine, since a rank runs one operation
 * after the other. Rejected: worst-case slots (6.6 GB at 64 ranks and 8192 tokens of 14 KiB).
 */
#include "dispatch/region.h"

#include <stdlib.h>
#include <string.h>

#include "dispatch/events.h"
#include "dispatch/protocol.h"
#include "transport/transport.h"

enum { STAGING_BYTES = 16 << 20, STAGING_ROWS = 256, ALIGN = 64, PAGE = 4096 };

static uint64_t round_up(uint64_t value, uint64_t to)
{
    return (value + to - 1) / to * to;
}

static void fill_landing(struct nep_plan *plan)
{
    const struct nep_topology *topology = plan->topology;
    uint32_t num_ranks = topology->num_ranks;
    uint32_t fill = 0;
    for (uint32_t n = 0; n < topology->num_nodes; n++) {
        plan->node_first[n] = fill;
        fill += topology->node_ranks[n];
    }
    plan->node_first[topology->num_nodes] = fill;
    for (uint32_t r = 0; r < num_ranks; r++) {
        uint32_t first = plan->node_first[topology->node_of_rank[r]];
        plan->node_rank[first + topology->local_of_rank[r]] = r;
    }
    for (uint32_t n = 0; n < topology->num_nodes; n++) {
        for (uint32_t s = 0; s < num_ranks; s++) {
            uint32_t local = topology->local_of_rank[s] % topology->node_ranks[n];
            uint64_t at = (uint64_t)n * num_ranks + s;
            bool own = topology->node_of_rank[s] == n;
            plan->landing[at] = own ? s : nep_plan_rank_at(plan, n, local);
            if (!own) {
                plan->lane[at] = plan->regions[plan->landing[at]].num_lanes++;
            }
        }
    }
}

/* Landing ranks F(rank, m) that are not lane sources of rank, before node `node`. */
static uint32_t num_extras(const struct nep_plan *plan, uint32_t rank, uint32_t node)
{
    uint32_t home = plan->topology->node_of_rank[rank];
    uint32_t num = 0;
    for (uint32_t m = 0; m < node; m++) {
        uint32_t far = nep_plan_landing(plan, rank, m);
        num += m != home && nep_plan_landing(plan, far, home) != rank;
    }
    return num;
}

uint32_t nep_plan_control(const struct nep_plan *plan, uint32_t rank, uint32_t source)
{
    uint32_t home = plan->topology->node_of_rank[rank];
    uint32_t far = plan->topology->node_of_rank[source];
    if (source == rank) {
        return 0;
    }
    if (far == home) {
        return UINT32_MAX;
    }
    if (nep_plan_landing(plan, source, home) == rank) {
        return 1 + nep_plan_lane(plan, source, home);
    }
    if (nep_plan_landing(plan, rank, far) == source) {
        return 1 + plan->regions[rank].num_lanes + num_extras(plan, rank, far);
    }
    return UINT32_MAX;
}

/* Takes num * bytes at the next multiple of 64. */
static uint64_t take(uint64_t *end, uint64_t num, uint64_t bytes)
{
    uint64_t offset = round_up(*end, ALIGN);
    *end = offset + num * bytes;
    return offset;
}

static void fill_words(struct nep_region *region, const struct nep_plan *plan, uint32_t rank)
{
    const struct nep_topology *topology = plan->topology;
    uint64_t num_ranks = topology->num_ranks;
    uint64_t num_nodes = topology->num_nodes;
    uint64_t window = plan->shape->window;
    uint64_t slots = plan->shape->tile_slots;
    uint64_t node_ranks = topology->node_ranks[topology->node_of_rank[rank]];
    uint64_t lanes = region->num_lanes;
    uint64_t end = sizeof(struct nep_region_head);
    region->directory = take(&end, num_ranks, sizeof(struct nep_directory));
    region->counts_word = take(&end, region->num_controls * window, 8);
    region->dispatch_word = take(&end, lanes * slots, 8);
    region->combine_word = take(&end, num_nodes * slots, 8);
    region->dispatch_read = take(&end, num_ranks, 8);
    region->combine_read = take(&end, num_nodes, 8);
    region->dispatch_credit = take(&end, num_nodes, 8);
    region->dispatch_sent = take(&end, num_nodes, 8);
    region->combine_credit = take(&end, lanes, 8);
    region->combine_sent = take(&end, lanes, 8);
    region->home_word = take(&end, slots, 8);
    region->out_bind = take(&end, window, sizeof(struct nep_bind));
    region->y_bind = take(&end, window, sizeof(struct nep_bind));
    region->pushed = take(&end, node_ranks, 8);
    region->staged = take(&end, num_ranks, 8);
    region->taken = take(&end, (lanes + 1) * node_ranks, 8);
    region->arrivals = take(&end, 1, NEP_ARRIVALS_BYTES);
    region->words_end = end;
}

static void fill_data(struct nep_region *region, const struct nep_plan *plan)
{
    const struct nep_shape *shape = plan->shape;
    uint64_t num_ranks = plan->topology->num_ranks;
    uint64_t others = plan->topology->num_nodes - 1;
    uint64_t window = shape->window;
    uint64_t slots = shape->tile_slots;
    uint64_t end = round_up(region->words_end, PAGE);
    region->counts = take(&end, region->num_controls * window, region->counts_bytes);
    region->send_counts = take(&end, region->num_controls * window, region->send_counts_bytes);
    region->dispatch_landing = take(&end, region->num_lanes * slots, region->dispatch_tile_bytes);
    region->combine_landing = take(&end, others * slots, region->combine_tile_bytes);
    region->send = take(&end, region->num_sends * slots, region->send_tile_bytes);
    region->home = take(&end, slots, region->dispatch_tile_bytes);
    region->staging = take(&end, num_ranks * region->staging_rows, shape->row_bytes);
    region->staging_weights = take(&end, num_ranks * region->staging_rows, shape->weights_bytes);
    region->bytes = round_up(end, PAGE);
}

static void fill_region(struct nep_plan *plan, uint32_t rank)
{
    const struct nep_topology *topology = plan->topology;
    const struct nep_shape *shape = plan->shape;
    struct nep_region *region = &plan->regions[rank];
    uint32_t others = topology->num_nodes - 1;
    region->num_controls = 1 + region->num_lanes + num_extras(plan, rank, topology->num_nodes);
    region->num_sends = region->num_lanes > others ? region->num_lanes : others;
    region->counts_bytes =
        nep_counts_bytes(shape, topology->node_ranks[topology->node_of_rank[rank]]);
    region->send_counts_bytes = plan->most_counts_bytes;
    region->dispatch_tile_bytes = nep_tile_bytes(shape, NEP_KIND_DISPATCH);
    region->combine_tile_bytes = nep_tile_bytes(shape, NEP_KIND_COMBINE);
    region->send_tile_bytes = region->dispatch_tile_bytes > region->combine_tile_bytes
                                  ? region->dispatch_tile_bytes
                                  : region->combine_tile_bytes;
    uint64_t rows = STAGING_BYTES / ((uint64_t)topology->num_ranks * shape->row_bytes);
    uint64_t most = shape->max_tokens < STAGING_ROWS ? shape->max_tokens : STAGING_ROWS;
    rows = rows > most ? most : rows;
    /* On one node a token's rows may be staged unweighed, all before the first is taken. */
    bool may_be_raw = topology->num_nodes == 1 && shape->layout != NEP_LAYOUT_RANK;
    uint64_t least = may_be_raw && shape->top_k > 2 ? shape->top_k : 2;
    region->staging_rows = (uint32_t)(rows < least ? least : rows);
    fill_words(region, plan, rank);
    fill_data(region, plan);
}

enum nep_status nep_plan_init(struct nep_plan *plan, const struct nep_shape *shape,
                              const struct nep_topology *topology)
{
    uint64_t num_ranks = topology->num_ranks;
    uint64_t num_nodes = topology->num_nodes;
    memset(plan, 0, sizeof *plan);
    plan->topology = topology;
    plan->num_seats = topology->num_ranks;
    plan->shape = shape;
    plan->landing = calloc(num_nodes * num_ranks, sizeof *plan->landing);
    plan->lane = calloc(num_nodes * num_ranks, sizeof *plan->lane);
    plan->node_first = calloc(num_nodes + 1, sizeof *plan->node_first);
    plan->node_rank = calloc(num_ranks, sizeof *plan->node_rank);
    plan->regions = calloc(num_ranks, sizeof *plan->regions);
    if (plan->landing == NULL || plan->lane == NULL || plan->node_first == NULL ||
        plan->node_rank == NULL || plan->regions == NULL) {
        nep_plan_fini(plan);
        return nep_fail(NEP_ERR_NO_MEMORY, "ep: no memory for the plan of %u ranks",
                        topology->num_ranks);
    }
    fill_landing(plan);
    for (uint32_t n = 0; n < topology->num_nodes; n++) {
        uint64_t bytes = nep_counts_bytes(shape, topology->node_ranks[n]);
        plan->most_counts_bytes = bytes > plan->most_counts_bytes ? bytes : plan->most_counts_bytes;
    }
    for (uint32_t r = 0; r < topology->num_ranks; r++) {
        fill_region(plan, r);
        if (plan->regions[r].bytes > plan->pool_offset) {
            plan->pool_offset = plan->regions[r].bytes;
        }
    }
    plan->window_bytes = plan->pool_offset + shape->pool_bytes;
    return NEP_OK;
}

void nep_plan_fini(struct nep_plan *plan)
{
    free(plan->landing);
    free(plan->lane);
    free(plan->node_first);
    free(plan->node_rank);
    free(plan->regions);
    memset(plan, 0, sizeof *plan);
}

uint32_t nep_plan_grants(const struct nep_plan *plan, uint32_t rank, struct nep_grant *grants)
{
    const struct nep_topology *topology = plan->topology;
    const struct nep_region *region = &plan->regions[rank];
    uint32_t home = topology->node_of_rank[rank], num = 0;
    uint64_t counts_bytes = plan->shape->window * region->counts_bytes;
    uint64_t dispatch_bytes = plan->shape->tile_slots * region->dispatch_tile_bytes;
    uint64_t combine_bytes = plan->shape->tile_slots * region->combine_tile_bytes;
    for (uint32_t s = 0; s < topology->num_ranks; s++) {
        uint32_t far = topology->node_of_rank[s];
        uint32_t control = nep_plan_control(plan, rank, s);
        if (far == home || control == UINT32_MAX) {
            continue;
        }
        grants[num++] =
            (struct nep_grant){s, region->counts + control * counts_bytes, counts_bytes};
        if (nep_plan_landing(plan, s, home) == rank) {
            uint64_t lane = nep_plan_lane(plan, s, home);
            grants[num++] = (struct nep_grant){s, region->dispatch_landing + lane * dispatch_bytes,
                                               dispatch_bytes};
        }
        if (nep_plan_landing(plan, rank, far) == s) {
            uint64_t idx = nep_plan_skip(home, far);
            grants[num++] =
                (struct nep_grant){s, region->combine_landing + idx * combine_bytes, combine_bytes};
        }
    }
    return num;
}

void nep_plan_memory(const struct nep_plan *plan, uint32_t rank, struct nep_memory *memory)
{
    const struct nep_region *region = &plan->regions[rank];
    memory->region_bytes = region->bytes;
    memory->control_bytes = region->dispatch_landing;
    memory->dispatch_landing_bytes = region->combine_landing - region->dispatch_landing;
    memory->combine_landing_bytes = region->send - region->combine_landing;
    memory->send_bytes = region->home - region->send;
    memory->home_bytes = region->staging - region->home;
    memory->staging_bytes = region->bytes - region->staging;
}
