/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Creating an ep is collective: equal parameters are agreed on first, then every rank makes its
 * window and fills in its head and directory, and a last agreement makes sure that all are there
 * before anyone puts.
 */
#include "dispatch/ep.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "dispatch/wait.h"
#include "transport/bootstrap.h"

enum nep_status nep_ep_check(struct nep_ep *ep)
{
    if (ep == NULL) {
        return nep_fail(NEP_ERR_INVALID, "the ep is NULL");
    }
    enum nep_status status = nep_comm_check(ep->comm);
    if (status == NEP_OK && ep->is_broken) {
        status = nep_fail(NEP_ERR_BROKEN, "an operation of this ep failed: destroy it");
    }
    return status;
}

void nep_ep_forget(struct nep_ep *ep, struct nep_handle *handle)
{
    if (handle->state == NEP_HANDLE_DISPATCHING || handle->state == NEP_HANDLE_COMBINING) {
        if (!ep->is_broken) {
            nep_warn("handle %u is destroyed in the middle of operation %llu: its ep is of no "
                     "further use",
                     handle->id, (unsigned long long)handle->op.number);
        }
        ep->in_flight[handle->op.number % ep->shape.outstanding] = NULL;
        ep->is_broken = true;
    }
    struct nep_handle **at = &ep->handles;
    while (*at != NULL && *at != handle) {
        at = &(*at)->next;
    }
    if (*at != NULL) {
        *at = handle->next;
    }
}

enum nep_status nep_ep_put(struct nep_ep *ep, const struct nep_put *put, uint64_t *number_p)
{
    ep->stats.wire_messages++;
    ep->stats.wire_bytes += put->len;
    enum nep_status status = ep->comm->inter->ops->put(ep->comm->inter, put, number_p);
    return status == NEP_OK ? NEP_OK : nep_blame_put(ep, put->dst, status);
}

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
        {"layout", shape->layout},
        {"expert_alignment", shape->alignment},
        {"outstanding", shape->outstanding},
        {"num_layers", shape->num_layers},
        {"pool_bytes", shape->pool_bytes},
        {"digest of the map", ep->maps.now.digest},
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
        {&ep->load, (uint64_t)ep->shape.num_layers * ep->shape.num_experts, sizeof *ep->load},
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
    head->generation = 0;
    head->region = *ep->region;
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
    nep_pool_init(&ep->pool, (uint8_t *)base + ep->plan.pool_offset, ep->shape.pool_bytes);
    fill_head(ep);
    if (comm->inter != NULL && comm->inter != comm->intra) {
        status =
            comm->inter->ops->window_create(comm->inter, ep->number, &base, ep->plan.window_bytes);
        ep->has_inter_window = status == NEP_OK;
    }
    return status;
}

static enum nep_status make(struct nep_ep *ep, const struct nep_ep_params *params)
{
    struct nep_comm *comm = ep->comm;
    const struct nep_topology *topology = &comm->topology;
    ep->rank = topology->rank;
    ep->node = topology->node;
    ep->local = topology->local;
    ep->node_size = topology->node_ranks[topology->node];
    enum nep_status status = nep_shape_init(&ep->shape, params, topology, &comm->config);
    if (status == NEP_OK) {
        status = nep_maps_init(&ep->maps, params->map, &ep->shape, topology);
    }
    if (status == NEP_OK) {
        status = nep_kernels_select(comm->config.simd, &ep->kernels);
    }
    if (status == NEP_OK) {
        status = nep_plan_init(&ep->plan, &ep->shape, topology);
    }
    if (status == NEP_OK) {
        ep->region = &ep->plan.regions[ep->rank];
        status = allocate(ep);
    }
    /* A rank that refuses must not leave the others waiting, and the cause is best told by all. */
    status = nep_bootstrap_common(&comm->bootstrap, ep->rank, topology->num_ranks, status,
                                  comm->timeout_ns);
    if (status == NEP_OK) {
        status = agree(ep);
    }
    if (status == NEP_OK) {
        status = nep_comm_claim_ep(comm, &ep->number);
        ep->has_number = status == NEP_OK;
    }
    if (status != NEP_OK) {
        return status;
    }
    fill_tables(ep);
    status = make_window(ep);
    return nep_bootstrap_common(&comm->bootstrap, ep->rank, topology->num_ranks, status,
                                comm->timeout_ns);
}

enum nep_status nep_ep_create(struct nep_comm *comm, const struct nep_ep_params *params,
                              struct nep_ep **ep_p)
{
    struct nep_ep_params copy;
    enum nep_status status = nep_comm_check(comm);
    if (status == NEP_OK && ep_p == NULL) {
        status = nep_fail(NEP_ERR_INVALID, "nep_ep_create: ep_p is NULL");
    }
    if (status == NEP_OK) {
        status = nep_struct_copy(&copy, sizeof copy, params, sizeof copy.size, "nep_ep_params");
    }
    if (status != NEP_OK) {
        return status;
    }
    struct nep_ep *ep = calloc(1, sizeof *ep);
    if (ep == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for an ep");
    }
    ep->comm = comm;
    status = make(ep, &copy);
    if (status != NEP_OK) {
        nep_ep_destroy(ep);
        return status;
    }
    *ep_p = ep;
    return NEP_OK;
}

void nep_ep_destroy(struct nep_ep *ep)
{
    if (ep == NULL) {
        return;
    }
    if (ep->handles != NULL) {
        nep_warn("an ep is destroyed before its handles: they must not be used any more");
    }
    struct nep_comm *comm = ep->comm;
    bool is_child = comm->pid != getpid(); /* the fabric's threads are the parent's */
    if (ep->has_inter_window && !is_child) {
        comm->inter->ops->window_destroy(comm->inter, ep->number);
    }
    nep_pool_fini(&ep->pool);
    if (ep->head != NULL) {
        comm->intra->ops->window_destroy(comm->intra, ep->number);
    }
    if (ep->has_number) {
        nep_comm_release_ep(comm, ep->number);
    }
    nep_layout_fini(&ep->layout);
    void *tables[] = {ep->window,       ep->slot_at,        ep->slot_local,    ep->counts_at,
                      ep->control_rank, ep->dispatch_flows, ep->combine_flows, ep->rings,
                      ep->dispatch_in,  ep->combine_in,     ep->counts_put,    ep->staged,
                      ep->taken,        ep->push_at,        ep->cast_rows,     ep->lent,
                      ep->batch,        ep->load,           ep->awaited};
    for (size_t i = 0; i < sizeof tables / sizeof tables[0]; i++) {
        free(tables[i]);
    }
    nep_plan_fini(&ep->plan);
    nep_maps_fini(&ep->maps);
    nep_recorder_destroy(ep->recorder);
    free(ep);
}

/* ---- what it costs, what it did ------------------------------------------------------------- */

enum nep_status nep_ep_memory(const struct nep_ep_params *params,
                              const struct nep_topology *topology, struct nep_memory *memory_p)
{
    struct nep_ep_params copy;
    struct nep_config config;
    struct nep_shape shape;
    struct nep_plan plan;
    if (topology == NULL || memory_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_ep_memory: an argument is NULL");
    }
    enum nep_status status =
        nep_struct_copy(&copy, sizeof copy, params, sizeof copy.size, "nep_ep_params");
    if (status == NEP_OK) {
        status = nep_config_load(&config);
    }
    if (status == NEP_OK) {
        status = nep_shape_init(&shape, &copy, topology, &config);
    }
    if (status == NEP_OK) {
        status = nep_plan_init(&plan, &shape, topology);
    }
    if (status != NEP_OK) {
        return status;
    }
    memset(memory_p, 0, sizeof *memory_p);
    memory_p->size = sizeof *memory_p;
    nep_plan_memory(&plan, topology->rank, memory_p);
    memory_p->handle_bytes = nep_handle_bytes(&plan, topology->rank);
    nep_plan_fini(&plan);
    return NEP_OK;
}

enum nep_status nep_ep_stats(const struct nep_ep *ep, struct nep_stats *stats_p)
{
    if (ep == NULL || stats_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_ep_stats: an argument is NULL");
    }
    struct nep_stats stats = ep->stats;
    stats.size = sizeof stats;
    stats.duplicates = atomic_load_explicit(&ep->head->duplicates, memory_order_relaxed);
    stats.stale = atomic_load_explicit(&ep->head->stale, memory_order_relaxed);
    *stats_p = stats;
    return NEP_OK;
}

enum nep_status nep_ep_max_rows(const struct nep_ep *ep, uint64_t *rows_p)
{
    if (ep == NULL || rows_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_ep_max_rows: an argument is NULL");
    }
    const struct nep_shape *shape = &ep->shape;
    uint64_t tokens = (uint64_t)ep->plan.topology->num_ranks * shape->max_tokens;
    uint64_t padding = (uint64_t)shape->slots_per_rank * (shape->alignment - 1);
    switch (shape->layout) {
    case NEP_LAYOUT_RANK:
        *rows_p = tokens;
        break;
    case NEP_LAYOUT_EXPERT_PADDED:
    case NEP_LAYOUT_EXPERT_FRONT:
        *rows_p = tokens * shape->slots_per_rank;
        break;
    default:
        *rows_p = tokens * shape->top_k + padding;
        break;
    }
    return NEP_OK;
}

enum nep_status nep_ep_load(const struct nep_ep *ep, uint32_t layer, uint64_t *pairs)
{
    if (ep == NULL || pairs == NULL || layer >= ep->shape.num_layers) {
        return nep_fail(NEP_ERR_INVALID,
                        "nep_ep_load: an argument is NULL, or there is no layer %u", layer);
    }
    memcpy(pairs, ep->load + (uint64_t)layer * ep->shape.num_experts,
           ep->shape.num_experts * sizeof *pairs);
    return NEP_OK;
}

enum nep_status nep_ep_record_start(struct nep_ep *ep, const struct nep_recorder_params *params)
{
    struct nep_recorder_params copy;
    struct nep_recorder *recorder = NULL;
    enum nep_status status = nep_ep_check(ep);
    if (status == NEP_OK) {
        status =
            nep_struct_copy(&copy, sizeof copy, params, sizeof copy.size, "nep_recorder_params");
    }
    if (status == NEP_OK) {
        status = nep_recorder_create(&copy, &ep->shape, &recorder);
    }
    if (status == NEP_OK) {
        nep_recorder_destroy(ep->recorder);
        ep->recorder = recorder;
    }
    return status;
}

enum nep_status nep_ep_record_save(struct nep_ep *ep, const char *path, uint64_t *num_tokens_p)
{
    if (ep == NULL || path == NULL || ep->recorder == NULL) {
        return nep_fail(NEP_ERR_INVALID,
                        "nep_ep_record_save: no path, or nothing is recorded: call "
                        "nep_ep_record_start first");
    }
    return nep_recorder_save(ep->recorder, path, num_tokens_p);
}

void nep_ep_record_stop(struct nep_ep *ep)
{
    if (ep != NULL) {
        nep_recorder_destroy(ep->recorder);
        ep->recorder = NULL;
    }
}

/* ---- buffers -------------------------------------------------------------------------------- */

enum nep_status nep_buffer_alloc(struct nep_ep *ep, size_t bytes, void **buffer_p)
{
    enum nep_status status = nep_ep_check(ep);
    if (status == NEP_OK && buffer_p == NULL) {
        status = nep_fail(NEP_ERR_INVALID, "nep_buffer_alloc: buffer_p is NULL");
    }
    void *buffer = NULL;
    if (status == NEP_OK) {
        status = nep_pool_take(&ep->pool, bytes, &buffer);
    }
    if (status != NEP_OK) {
        return status;
    }
    if (buffer == NULL) {
        if (!ep->pool.is_said) {
            nep_warn("the pool of mapped memory (%llu bytes) has no room for %zu more: private "
                     "memory is used, rows move once more; raise pool_bytes or NEP_POOL",
                     (unsigned long long)ep->pool.bytes, bytes);
            ep->pool.is_said = true;
        }
        size_t rounded = bytes == 0 ? 4096 : (bytes + 4095) / 4096 * 4096;
        buffer = rounded >= bytes ? aligned_alloc(4096, rounded) : NULL;
        if (buffer == NULL) {
            return nep_fail(NEP_ERR_NO_MEMORY, "no memory for a buffer of %zu bytes", bytes);
        }
        memset(buffer, 0, rounded);
    }
    *buffer_p = buffer;
    return NEP_OK;
}

void nep_buffer_free(struct nep_ep *ep, void *buffer)
{
    if (ep != NULL && buffer != NULL && !nep_pool_give(&ep->pool, buffer)) {
        free(buffer);
    }
}

/* ---- maps ----------------------------------------------------------------------------------- */

enum nep_status nep_ep_map_state(const struct nep_ep *ep, struct nep_map_state *state_p)
{
    if (ep == NULL || state_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_ep_map_state: an argument is NULL");
    }
    const struct nep_maps *maps = &ep->maps;
    struct nep_map_state state = {
        .size = sizeof state,
        .next_op = ep->next_op,
        .version = maps->now.version,
        .newest = maps->num_versions - 1,
        .oldest_held = maps->now.version,
    };
    for (const struct nep_handle *handle = ep->handles; handle != NULL; handle = handle->next) {
        if (handle->has_routing && handle->map_version < state.oldest_held) {
            state.oldest_held = handle->map_version;
        }
    }
    *state_p = state;
    return NEP_OK;
}

enum nep_status nep_ep_stage_map(struct nep_ep *ep, const struct nep_map *map, uint64_t op,
                                 uint32_t *version_p)
{
    enum nep_status status = nep_ep_check(ep);
    if (status == NEP_OK && op < ep->next_op) {
        status = nep_fail(NEP_ERR_INVALID,
                          "a map is staged for operation %llu, but operation %llu is the next one",
                          (unsigned long long)op, (unsigned long long)ep->next_op);
    }
    return status == NEP_OK
               ? nep_maps_stage(&ep->maps, map, &ep->shape, ep->plan.topology, op, version_p)
               : status;
}
