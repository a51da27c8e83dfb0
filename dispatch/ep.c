/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an ep is for its whole life, and what callers ask of it beside dispatch and combine. What
 * follows from who the members are is made in build.c, again when they change.
 */
#include "dispatch/device.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/log.h"
#include "dispatch/wait.h"
#include "dispatch/waits.h"
#include "transport/bootstrap.h"

enum nep_status nep_ep_check(struct nep_ep *ep)
{
    if (ep == NULL) {
        return nep_fail(NEP_ERR_INVALID, "the ep is NULL");
    }
    enum nep_status status = nep_comm_check(ep->comm);
    if (status == NEP_OK && ep->head == NULL && ep->device == NULL) {
        status = nep_fail(NEP_ERR_BROKEN, "this ep has no window: nep_comm_recover makes it");
    }
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

/* The whole number of an operation of which the immediate has 8 bits. */
static uint64_t whole_op(const struct nep_ep *ep, uint32_t imm)
{
    uint64_t completed = ep->completed_op;
    return completed + (uint64_t)(int64_t)(int8_t)(uint8_t)(nep_imm_op(imm) - completed);
}

enum nep_status nep_ep_put(struct nep_ep *ep, const struct nep_put *put, uint64_t *number_p)
{
    ep->stats.wire_messages++;
    ep->stats.wire_bytes += put->len;
    nep_ep_event(ep, NEP_EVENT_POST, put->dst, whole_op(ep, put->imm),
                 (uint64_t)put->imm << 32 | put->len);
    enum nep_status status = ep->comm->inter->ops->put(ep->comm->inter, put, number_p);
    return status == NEP_OK ? NEP_OK : nep_blame_put(ep, put->dst, status);
}

/* ---- creation ------------------------------------------------------------------------------- */

static void enlist(struct nep_comm *comm, struct nep_ep *ep)
{
    pthread_mutex_lock(&comm->lock);
    ep->next = comm->eps;
    comm->eps = ep;
    pthread_mutex_unlock(&comm->lock);
}

static void delist(struct nep_comm *comm, struct nep_ep *ep)
{
    pthread_mutex_lock(&comm->lock);
    struct nep_ep **at = &comm->eps;
    while (*at != NULL && *at != ep) {
        at = &(*at)->next;
    }
    if (*at != NULL) {
        *at = ep->next;
    }
    pthread_mutex_unlock(&comm->lock);
}

static enum nep_status make(struct nep_ep *ep, const struct nep_ep_params *params)
{
    struct nep_comm *comm = ep->comm;
    ep->timeout_ns = comm->timeout_ns;
    ep->params = *params;
    ep->params.map = NULL;
    enum nep_status status = nep_shape_init(&ep->shape, params, &comm->world, &comm->config);
    if (status == NEP_OK) {
        status = nep_kernels_select(comm->config.simd, &ep->kernels);
    }
    if (status == NEP_OK) {
        status = nep_waits_create(comm->world.num_ranks, &ep->waits);
    }
    if (status == NEP_OK) {
        uint64_t experts = (uint64_t)ep->shape.num_layers * ep->shape.num_experts;
        ep->load = calloc(experts, sizeof *ep->load);
        if (ep->load == NULL) {
            status = nep_fail(NEP_ERR_NO_MEMORY, "ep: no memory for the load of %llu experts",
                              (unsigned long long)experts);
        }
    }
    if (comm->is_joining && params->executor == NEP_EXECUTOR_CUDA && status == NEP_OK) {
        status = nep_fail(NEP_ERR_UNSUPPORTED, "a newcomer cannot join with tokens in GPU memory: "
                                               "make a new communicator");
    }
    if (comm->is_joining) {
        /* All that needs others is done by nep_comm_recover. */
        ep->first_map = (struct nep_map *)params->map;
        if (ep->first_map != NULL) {
            nep_map_retain(ep->first_map);
        }
        status = status == NEP_OK ? nep_comm_claim_ep(comm, &ep->number) : status;
        ep->has_number = status == NEP_OK;
        return status;
    }
    if (status == NEP_OK) {
        status = nep_maps_init(&ep->maps, params->map, &ep->shape,
                               &(struct nep_members){&comm->world, &comm->topology, comm->members});
    }
    /* A rank that refuses must not leave the others waiting, and the cause is best told by all. */
    status = nep_bootstrap_common(&comm->bootstrap, comm->topology.rank, comm->topology.num_ranks,
                                  status, comm->timeout_ns);
    return status == NEP_OK ? nep_ep_build(ep) : status;
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
    enlist(comm, ep);
    status = make(ep, &copy);
    if (status != NEP_OK) {
        nep_ep_destroy(ep);
        return status;
    }
    *ep_p = ep;
    return NEP_OK;
}

static void retired_destroy(struct nep_retired_pool **at)
{
    struct nep_retired_pool *retired = *at;
    *at = retired->next;
    munmap(retired->memory, retired->bytes);
    nep_pool_fini(&retired->pool);
    free(retired);
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
    delist(comm, ep);
    nep_ep_free_window(ep);
    nep_device_destroy(ep, comm->pid != getpid());
    if (ep->has_number) {
        nep_comm_release_ep(comm, ep->number);
    }
    nep_ep_free_tables(ep);
    while (ep->retired != NULL) {
        retired_destroy(&ep->retired);
    }
    nep_map_destroy(ep->first_map);
    nep_waits_destroy(ep->waits);
    free(ep->load);
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
    if (copy.executor == NEP_EXECUTOR_CUDA) {
        *memory_p = (struct nep_memory){.size = sizeof *memory_p};
        status = nep_device_memory(&plan, &copy, memory_p);
    }
    nep_plan_fini(&plan);
    return status;
}

enum nep_status nep_ep_stats(const struct nep_ep *ep, struct nep_stats *stats_p)
{
    if (ep == NULL || stats_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_ep_stats: an argument is NULL");
    }
    struct nep_stats stats = ep->stats;
    stats.size = sizeof stats;
    if (ep->device != NULL) {
        nep_device_stats(ep, &stats);
    }
    if (ep->head == NULL) {
        *stats_p = stats;
        return NEP_OK;
    }
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
    uint64_t tokens = (uint64_t)ep->comm->world.num_ranks * shape->max_tokens;
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

static enum nep_status refuse_ids(const char *what)
{
    return nep_fail(NEP_ERR_UNSUPPORTED,
                    "%s: the ids of this ep are in device memory, where they are not counted",
                    what);
}

enum nep_status nep_ep_load(const struct nep_ep *ep, uint32_t layer, uint64_t *pairs)
{
    if (ep == NULL || pairs == NULL || layer >= ep->shape.num_layers) {
        return nep_fail(NEP_ERR_INVALID,
                        "nep_ep_load: an argument is NULL, or there is no layer %u", layer);
    }
    if (ep->device != NULL) {
        return refuse_ids("nep_ep_load");
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
    if (status == NEP_OK && ep->device != NULL) {
        status = refuse_ids("nep_ep_record_start");
    }
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

static enum nep_status zero(struct nep_ep *ep, void *buffer, size_t bytes)
{
    if (ep->device != NULL) {
        return nep_device_zero(ep, buffer, bytes);
    }
    memset(buffer, 0, bytes);
    return NEP_OK;
}

/* Memory that peers do not map, zeroed. */
static enum nep_status take_private(struct nep_ep *ep, size_t bytes, void **buffer_p)
{
    size_t rounded = bytes == 0 ? 4096 : (bytes + 4095) / 4096 * 4096;
    void *buffer = NULL;
    enum nep_status status = NEP_OK;
    if (rounded >= bytes && ep->device != NULL) {
        status = nep_device_alloc(ep, rounded, &buffer);
    } else if (rounded >= bytes) {
        buffer = aligned_alloc(4096, rounded);
    }
    if (status == NEP_OK && buffer == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "no memory for a buffer of %zu bytes", bytes);
    }
    if (status == NEP_OK) {
        status = zero(ep, buffer, rounded);
        *buffer_p = buffer;
    }
    return status;
}

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
        status = take_private(ep, bytes, &buffer);
    } else {
        status = zero(ep, buffer, bytes);
    }
    if (status != NEP_OK) {
        nep_pool_give(&ep->pool, buffer);
        return status;
    }
    *buffer_p = buffer;
    return NEP_OK;
}

void nep_buffer_free(struct nep_ep *ep, void *buffer)
{
    if (ep == NULL || buffer == NULL || nep_pool_give(&ep->pool, buffer)) {
        return;
    }
    for (struct nep_retired_pool **at = &ep->retired; *at != NULL; at = &(*at)->next) {
        if (nep_pool_give(&(*at)->pool, buffer)) {
            if ((*at)->pool.num_blocks == 0) {
                retired_destroy(at);
            }
            return;
        }
    }
    if (ep->device != NULL) {
        nep_device_free(ep, buffer);
    } else {
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
    if (status == NEP_OK) {
        status = nep_maps_stage(&ep->maps, map, &ep->shape, op, version_p);
    }
    if (status == NEP_OK && ep->device != NULL) {
        status = nep_device_take_map(ep, &ep->maps.staged[ep->maps.num_staged - 1]);
    }
    return status;
}
