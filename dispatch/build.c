/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Creating an ep is collective: equal parameters are agreed on first, then every rank makes its
 * window and fills in its head and directory, and a last agreement makes sure that all are there
 * before anyone puts. When the members change, the same is done again, with a new window: nothing
 * that was on its way to the old one can reach it. Rejected: clearing the old window and going on
 * in it. Regions grow where lanes move to fewer ranks, and every way in would have to be fenced.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "dispatch/device.h"
#include "transport/bootstrap.h"

/* ---- parameters ----------------------------------------------------------------------------- */

static enum nep_status agree(struct nep_ep *ep)
{
    const struct nep_shape *shape = &ep->shape;
    const struct nep_agree_field fields[] = {
        {"num_experts", shape->num_experts},
        {"slots_per_rank", shape->slots_per_rank},
        {"top_k", shape->top_k},
        {"hidden", shape->hidden},
        {"max_tokens", shape->max_tokens},
        {"dtype", shape->dtype},
        {"wire", shape->wire},
        {"scale", shape->format.scale},
        {"row_bytes", shape->format.payload_bytes},
        {"scale_bytes", shape->format.scale_bytes},
        {"scale_order", shape->format.scale_columns},
        {"layout", shape->layout},
        {"expert_alignment", shape->alignment},
        {"outstanding", shape->outstanding},
        {"num_layers", shape->num_layers},
        {"pool_bytes", shape->pool_bytes},
        {"digest of the map", ep->maps.now.digest},
        {"executor", ep->params.executor == NEP_EXECUTOR_CUDA},
        {"staging_bytes", ep->params.staging_bytes},
        {"number of the ep", ep->has_number ? ep->number : 0},
    };
    return nep_bootstrap_agree(&ep->comm->bootstrap, ep->comm->topology.num_ranks, "ep", fields,
                               sizeof fields / sizeof fields[0], ep->comm->timeout_ns);
}

/* ---- tables --------------------------------------------------------------------------------- */

static enum nep_status allocate(struct nep_ep *ep)
{
    const struct nep_topology *topology = ep->plan.topology;
    uint64_t num_ranks = topology->num_ranks, num_nodes = topology->num_nodes;
    uint64_t lanes = ep->region->num_lanes, window = ep->shape.window;
    uint64_t slots = ep->shape.slots_per_rank;
    struct {
        void *to;
        uint64_t num, bytes;
    } rows[] = {
        {&ep->window, num_ranks, sizeof *ep->window},
        {&ep->slot_at, num_ranks * slots, sizeof *ep->slot_at},
        {&ep->slot_local, ep->node_size * slots, sizeof *ep->slot_local},
        {&ep->counts_at, num_ranks, sizeof *ep->counts_at},
        {&ep->counts, num_ranks, nep_counts_ride_offset(&ep->shape, ep->node_size)},
        {&ep->counts_of_sums, num_nodes, sizeof *ep->counts_of_sums},
        {&ep->control_rank, ep->region->num_controls, sizeof *ep->control_rank},
        {&ep->dispatch_flows, num_nodes, sizeof *ep->dispatch_flows},
        {&ep->combine_flows, lanes + 1, sizeof *ep->combine_flows},
        {&ep->rings, ep->region->num_sends + 1, sizeof *ep->rings},
        {&ep->dispatch_in, num_ranks, sizeof *ep->dispatch_in},
        {&ep->combine_in, num_nodes, sizeof *ep->combine_in},
        {&ep->counts_put, ep->region->num_controls * window, sizeof *ep->counts_put},
        {&ep->staged, num_ranks, sizeof *ep->staged},
        {&ep->taken, (lanes + 1) * ep->node_size, sizeof *ep->taken},
        {&ep->push_at, ep->node_size, sizeof *ep->push_at},
        {&ep->cast_rows, NEP_PUSH_CHUNKS, ep->shape.wire_row_bytes},
        {&ep->lent, ep->node_size, sizeof *ep->lent},
        {&ep->batch, 1, sizeof *ep->batch},
        {&ep->awaited, (num_ranks + 63) / 64, sizeof *ep->awaited},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        void *table = calloc(rows[i].num, rows[i].bytes);
        if (table == NULL) {
            return nep_fail(NEP_ERR_NO_MEMORY, "ep: no memory for a table of %llu entries",
                            (unsigned long long)rows[i].num);
        }
        memcpy(rows[i].to, &table, sizeof table);
    }
    return nep_layout_init(&ep->layout, topology->num_ranks, topology->num_nodes,
                           ep->shape.slots_per_rank);
}

static void fill_tables(struct nep_ep *ep)
{
    ep->batch->shape = &ep->shape;
    ep->batch->kernels = ep->kernels;
    ep->batch->workers = ep->comm->workers;
    const struct nep_topology *topology = ep->plan.topology;
    uint32_t slots = ep->shape.slots_per_rank;
    for (uint32_t r = 0; r < topology->num_ranks; r++) {
        for (uint32_t l = 0; l < slots; l++) {
            ep->slot_at[(uint64_t)r * slots + l].rank = r;
            ep->slot_at[(uint64_t)r * slots + l].node = topology->node_of_rank[r];
        }
        uint32_t landing = nep_plan_landing(&ep->plan, r, ep->node);
        ep->counts_at[r].rank = landing;
        ep->counts_at[r].control = nep_plan_control(&ep->plan, landing, r);
        uint32_t control = nep_plan_control(&ep->plan, ep->rank, r);
        if (control != UINT32_MAX) {
            ep->control_rank[control] = r;
        }
        if (topology->node_of_rank[r] != ep->node &&
            nep_plan_landing(&ep->plan, r, ep->node) == ep->rank) {
            uint32_t lane = nep_plan_lane(&ep->plan, r, ep->node);
            ep->combine_flows[lane].dst = r;
            ep->combine_flows[lane].ring = lane;
        }
    }
    for (uint32_t i = 0; i < ep->node_size * slots; i++) {
        ep->slot_local[i] = (uint16_t)(i / slots);
    }
    for (uint32_t n = 0; n < topology->num_nodes; n++) {
        ep->dispatch_flows[n].dst = nep_plan_landing(&ep->plan, ep->rank, n);
        ep->dispatch_flows[n].ring = n == ep->node ? 0 : nep_plan_skip(ep->node, n);
    }
}

/* What the sink works from. Written before anyone can put: the agreement in `create` follows. */
static void fill_head(struct nep_ep *ep)
{
    const struct nep_topology *topology = ep->plan.topology;
    struct nep_region_head *head = ep->head;
    head->magic = NEP_REGION_MAGIC;
    head->rank = ep->rank;
    head->num_ranks = topology->num_ranks;
    head->window = ep->shape.window;
    head->tile_slots = ep->shape.tile_slots;
    head->generation = (uint32_t)ep->comm->generation;
    atomic_store_explicit(&head->completed, ep->completed_op, memory_order_relaxed);
    head->region = *ep->region;
    struct nep_event_ring *arrivals = nep_ep_arrivals(ep);
    arrivals->num = ep->comm->events->num != 0 ? NEP_ARRIVALS : 0;
    pthread_mutex_lock(&ep->comm->lock);
    ep->is_traced = true;
    pthread_mutex_unlock(&ep->comm->lock);
    struct nep_directory *directory =
        (struct nep_directory *)((uint8_t *)head + ep->region->directory);
    for (uint32_t r = 0; r < topology->num_ranks; r++) {
        directory[r].node = topology->node_of_rank[r];
        directory[r].control = nep_plan_control(&ep->plan, ep->rank, r);
        directory[r].lane = topology->node_of_rank[r] != ep->node &&
                                    nep_plan_landing(&ep->plan, r, ep->node) == ep->rank
                                ? nep_plan_lane(&ep->plan, r, ep->node)
                                : UINT32_MAX;
    }
}

/* ---- window --------------------------------------------------------------------------------- */

/* Over the fabric, each rank reaches its own slots alone. */
static enum nep_status make_inter_window(struct nep_ep *ep)
{
    struct nep_transport *inter = ep->comm->inter;
    void *base = ep->head;
    struct nep_grant *grants = calloc(3 * (uint64_t)ep->region->num_controls, sizeof *grants);
    enum nep_status status =
        grants != NULL
            ? inter->ops->window_grant(inter, ep->number, grants,
                                       nep_plan_grants(&ep->plan, ep->rank, grants))
            : nep_fail(NEP_ERR_NO_MEMORY, "ep: no memory for %u grants", ep->region->num_controls);
    free(grants);
    status = nep_bootstrap_common(&ep->comm->bootstrap, ep->rank, ep->plan.topology->num_ranks,
                                  status, ep->comm->timeout_ns);
    if (status == NEP_OK) {
        status = inter->ops->window_create(inter, ep->number, &base, ep->plan.window_bytes);
        ep->has_inter_window = status == NEP_OK;
    }
    return status;
}

static enum nep_status make_window(struct nep_ep *ep)
{
    struct nep_comm *comm = ep->comm;
    void *base = NULL;
    enum nep_status status =
        comm->intra->ops->window_create(comm->intra, ep->number, &base, ep->plan.window_bytes);
    if (status != NEP_OK) {
        return status;
    }
    ep->head = base;
    for (uint32_t g = 0; g < ep->node_size; g++) {
        uint32_t rank = nep_ep_rank_at(ep, g);
        ep->window[rank] = comm->intra->ops->peer_window(comm->intra, ep->number, rank);
    }
    ep->has_intra_window = true;
    nep_pool_init(&ep->pool, (uint8_t *)base + ep->plan.pool_offset, ep->shape.pool_bytes);
    fill_head(ep);
    if (comm->inter != NULL && comm->inter != comm->intra) {
        status = make_inter_window(ep);
    }
    return status;
}

/* ---- the whole ------------------------------------------------------------------------------ */

static enum nep_status make_maps(struct nep_ep *ep)
{
    const struct nep_comm *comm = ep->comm;
    struct nep_members members = {&comm->world, &comm->made->topology, comm->members};
    return ep->maps.num_versions == 0
               ? nep_maps_init(&ep->maps, ep->first_map, &ep->shape, &members)
               : nep_maps_renew(&ep->maps, &ep->shape, &members);
}

/* What this rank does alone. */
static enum nep_status prepare(struct nep_ep *ep)
{
    struct nep_comm *comm = ep->comm;
    const struct nep_topology *topology = &comm->made->topology;
    ep->rank = topology->rank;
    ep->node = topology->node;
    ep->local = topology->local;
    ep->node_size = topology->node_ranks[topology->node];
    enum nep_status status = ep->has_no_maps ? NEP_OK : make_maps(ep);
    if (status == NEP_OK) {
        status = nep_plan_init(&ep->plan, &ep->shape, topology);
    }
    if (status == NEP_OK) {
        ep->plan.num_seats = comm->world.num_ranks;
        ep->region = &ep->plan.regions[ep->rank];
        status = allocate(ep);
    }
    return status;
}

enum nep_status nep_ep_build(struct nep_ep *ep)
{
    struct nep_comm *comm = ep->comm;
    uint32_t num_ranks = comm->topology.num_ranks, rank = comm->topology.rank;
    enum nep_status status =
        nep_bootstrap_common(&comm->bootstrap, rank, num_ranks, prepare(ep), comm->timeout_ns);
    if (status == NEP_OK) {
        status = agree(ep);
    }
    if (status == NEP_OK && !ep->has_number) {
        status = nep_comm_claim_ep(comm, &ep->number);
        ep->has_number = status == NEP_OK;
    }
    if (status != NEP_OK) {
        return status;
    }
    fill_tables(ep);
    if (ep->params.executor == NEP_EXECUTOR_CUDA) {
        return nep_device_create(ep, &ep->params);
    }
    status = make_window(ep);
    return nep_bootstrap_common(&comm->bootstrap, rank, num_ranks, status, comm->timeout_ns);
}

enum { NUM_TABLES = 20 };

static void list_tables(struct nep_ep *ep, void *tables[NUM_TABLES])
{
    void *all[] = {&ep->window,        &ep->slot_at,        &ep->slot_local,   &ep->counts_at,
                   &ep->counts,        &ep->counts_of_sums, &ep->control_rank, &ep->dispatch_flows,
                   &ep->combine_flows, &ep->rings,          &ep->dispatch_in,  &ep->combine_in,
                   &ep->counts_put,    &ep->staged,         &ep->taken,        &ep->push_at,
                   &ep->cast_rows,     &ep->lent,           &ep->batch,        &ep->awaited};
    _Static_assert(sizeof all / sizeof all[0] == NUM_TABLES, "as many as there are");
    memcpy(tables, all, sizeof all);
}

void nep_ep_free_tables(struct nep_ep *ep)
{
    void *tables[NUM_TABLES];
    nep_layout_fini(&ep->layout);
    memset(&ep->layout, 0, sizeof ep->layout);
    list_tables(ep, tables);
    for (size_t i = 0; i < NUM_TABLES; i++) {
        void *table;
        memcpy(&table, tables[i], sizeof table);
        free(table);
        memset(tables[i], 0, sizeof table);
    }
    nep_plan_fini(&ep->plan);
    memset(&ep->plan, 0, sizeof ep->plan);
}

static void adopt_tables(struct nep_ep *ep, struct nep_ep *made)
{
    void *to[NUM_TABLES], *from[NUM_TABLES];
    list_tables(ep, to);
    list_tables(made, from);
    for (size_t i = 0; i < NUM_TABLES; i++) {
        memcpy(to[i], from[i], sizeof(void *));
        memset(from[i], 0, sizeof(void *));
    }
    ep->layout = made->layout;
    memset(&made->layout, 0, sizeof made->layout);
    ep->plan = made->plan;
    memset(&made->plan, 0, sizeof made->plan);
    ep->plan.shape = ep->batch->shape = &ep->shape;
}

enum nep_status nep_ep_adopt(struct nep_ep *ep, struct nep_ep *made)
{
    struct nep_comm *comm = ep->comm;
    adopt_tables(ep, made);
    ep->rank = made->rank;
    ep->node = made->node;
    ep->local = made->local;
    ep->node_size = made->node_size;
    ep->region = made->region;
    ep->pool = made->pool;
    memset(&made->pool, 0, sizeof made->pool);
    ep->next_op = made->next_op;
    ep->completed_op = made->completed_op;
    ep->first_op = made->first_op;
    ep->has_intra_window = made->has_intra_window;
    ep->has_inter_window = made->has_inter_window;
    made->has_intra_window = made->has_inter_window = made->is_traced = false;
    pthread_mutex_lock(&comm->lock);
    ep->head = made->head;
    ep->is_traced = true;
    pthread_mutex_unlock(&comm->lock);
    made->head = NULL;
    enum nep_status status = make_maps(ep);
    return status == NEP_OK ? nep_ep_renew_handles(ep) : status;
}

/* A trace no longer looks into the region; what arrived there stays in it. */
static void leave_trace(struct nep_ep *ep)
{
    struct nep_comm *comm = ep->comm;
    pthread_mutex_lock(&comm->lock);
    if (ep->is_traced) {
        ep->is_traced = false;
        nep_events_move(nep_ep_arrivals(ep), comm->events, comm->members);
    }
    pthread_mutex_unlock(&comm->lock);
}

void nep_ep_free_window(struct nep_ep *ep)
{
    struct nep_comm *comm = ep->comm;
    bool is_child = comm->pid != getpid(); /* the fabric's threads are the parent's */
    if (!is_child) {
        leave_trace(ep);
    }
    if (ep->has_inter_window && !is_child) {
        comm->inter->ops->window_destroy(comm->inter, ep->number);
    }
    nep_pool_fini(&ep->pool);
    nep_buffers_fini(ep);
    if (ep->has_intra_window) {
        comm->intra->ops->window_destroy(comm->intra, ep->number);
    }
    ep->has_inter_window = ep->has_intra_window = false;
    ep->head = NULL;
}

/* Callers may hold buffers of the pool: their memory stays, at the same address. */
static void retire_window(struct nep_ep *ep)
{
    const struct nep_pool *pool = &ep->pool;
    const struct nep_pool_block *last =
        pool->num_blocks != 0 ? &pool->blocks[pool->num_blocks - 1] : NULL;
    struct nep_retired_pool *retired = last != NULL ? calloc(1, sizeof *retired) : NULL;
    if (retired == NULL) {
        if (last != NULL) {
            nep_warn("no memory to keep the buffers of an ep: they must not be used any more");
        }
        nep_ep_free_window(ep);
        return;
    }
    struct nep_comm *comm = ep->comm;
    leave_trace(ep);
    if (ep->has_inter_window) {
        comm->inter->ops->window_destroy(comm->inter, ep->number);
    }
    nep_buffers_fini(ep);
    retired->pool = *pool;
    retired->memory = pool->base;
    retired->bytes = last->offset + last->bytes;
    comm->intra->ops->window_retire(comm->intra, ep->number, ep->plan.pool_offset, retired->bytes);
    retired->next = ep->retired;
    ep->retired = retired;
    memset(&ep->pool, 0, sizeof ep->pool);
    ep->has_inter_window = ep->has_intra_window = false;
    ep->head = NULL;
}

void nep_ep_unbuild(struct nep_ep *ep)
{
    if (ep->has_intra_window) {
        retire_window(ep);
    }
    nep_ep_free_tables(ep);
    memset(ep->in_flight, 0, sizeof ep->in_flight);
    ep->is_broken = false;
}
