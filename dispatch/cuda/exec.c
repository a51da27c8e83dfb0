/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Creating and destroying what an ep and its handles have on a GPU, and telling what a kernel gave
 * up for. Everything is allocated here: no call of dispatch or combine allocates or, unless the
 * host asked for counts, waits.
 */
#include "dispatch/cuda/exec_far.h"

#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "transport/bootstrap.h"

enum { STATIC_SHARED = 20 * 1024, DEFAULT_SMS = 16 };

enum nep_status nep_device_enter(const struct nep_ep *ep, int *was_p)
{
    int now = -1;
    *was_p = -1;
    cudaError_t error = cudaGetDevice(&now);
    if (error == cudaSuccess && now != ep->device->ordinal) {
        *was_p = now;
        error = cudaSetDevice(ep->device->ordinal);
    }
    ep->device->group.timeout_ns = ep->timeout_ns;
    return nep_cuda_runtime_check(error, "the device of an ep");
}

void nep_device_leave(int was)
{
    if (was >= 0) {
        cudaSetDevice(was);
    }
}

/* ---- creation ------------------------------------------------------------------------------- */

static enum nep_status check_shape(const struct nep_ep *ep)
{
    const struct nep_topology *topology = ep->plan.topology;
    int num = 0;
    cudaError_t error = cudaGetDeviceCount(&num);
    if (error != cudaSuccess || num == 0) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "executor cuda: no GPU can be used here (CUDA says: %s): use executor host",
                        error != cudaSuccess ? cudaGetErrorString(error) : "there is none");
    }
    if (topology->num_ranks > NEP_CUDA_MAX_RANKS) {
        return nep_fail(NEP_ERR_UNSUPPORTED, "executor cuda: %u ranks; at most %d",
                        topology->num_ranks, NEP_CUDA_MAX_RANKS);
    }
    if (ep->maps.now.is_lost != NULL) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "executor cuda: seats of the communicator are empty: make a new one of the "
                        "ranks that are left");
    }
    if (ep->shape.format.payload_bytes % 16 != 0) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "executor cuda: dispatched rows have %u bytes; a multiple of 16 is needed",
                        ep->shape.format.payload_bytes);
    }
    return NEP_OK;
}

static enum nep_status find_geometry(struct nep_ep *ep, const struct nep_ep_params *params)
{
    struct nep_device *device = ep->device;
    uint32_t num_ranks = ep->plan.topology->num_ranks;
    uint32_t slots = num_ranks * ep->shape.slots_per_rank;
    int sms = 0, shared = 0, major = 0;
    cudaError_t error =
        cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device->ordinal);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                       device->ordinal);
    }
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device->ordinal);
    }
    enum nep_status status = nep_cuda_runtime_check(error, "attributes of the device");
    if (status != NEP_OK) {
        return status;
    }
    struct nep_cuda_limits limits = {(uint32_t)sms, device->windows.ranks_on_device,
                                     (uint32_t)(shared - STATIC_SHARED), major >= 9};
    device->shared_bytes = limits.shared_bytes;
    uint32_t most = (uint32_t)sms / limits.ranks_on_device;
    uint32_t num_sms = params->num_sms != 0 ? params->num_sms
                       : most < DEFAULT_SMS ? most
                                            : DEFAULT_SMS;
    bool is_rank_layout = ep->shape.layout == NEP_LAYOUT_RANK;
    return nep_cuda_geometry(&limits, num_sms, is_rank_layout ? num_ranks : slots,
                             num_ranks + ep->plan.topology->num_nodes + slots, &device->geometry);
}

static enum nep_status make_state(struct nep_ep *ep)
{
    struct nep_device *device = ep->device;
    char *own = device->windows.base + ep->local * device->windows.stride;
    device->group = (struct nep_cuda_group){
        .base = device->windows.base,
        .stride = device->windows.stride,
        .num_ranks = ep->node_size,
        .rank = ep->local,
        .window = ep->shape.window,
        .words = device->plan.words,
        .timeout_ns = ep->comm->timeout_ns,
    };
    device->shape = (struct nep_cuda_shape){
        .num_ranks = ep->plan.topology->num_ranks,
        .rank = ep->rank,
        .slots_per_rank = ep->shape.slots_per_rank,
        .top_k = ep->shape.top_k,
        .max_tokens = ep->shape.max_tokens,
        .alignment = ep->shape.alignment,
        .num_nodes = ep->plan.topology->num_nodes,
        .layout = ep->shape.layout,
        .wire = ep->shape.format,
        .staging = device->plan.staging,
    };
    cudaError_t error = cudaMalloc((void **)&device->state, sizeof *device->state);
    device->group.state = device->state;
    if (error == cudaSuccess) {
        error = cudaHostAlloc((void **)&device->status_host, 2 * sizeof(uint64_t),
                              cudaHostAllocPortable | cudaHostAllocMapped);
    }
    if (error == cudaSuccess) {
        memset(device->status_host, 0, 2 * sizeof(uint64_t));
        device->group.status_host = device->status_host;
        error = cudaMemset(device->state, 0, sizeof *device->state);
    }
    if (error == cudaSuccess) {
        error = cudaMemset(own, 0, device->plan.words.bytes);
    }
    if (error == cudaSuccess) {
        error = cudaDeviceSynchronize(); /* before anyone is told that this rank is there */
    }
    nep_pool_init(&ep->pool, (uint8_t *)own + device->plan.pool, ep->shape.pool_bytes);
    return nep_cuda_runtime_check(error, "state of an ep on the device");
}

static enum nep_status make(struct nep_ep *ep, const struct nep_ep_params *params)
{
    struct nep_device *device = ep->device;
    struct nep_comm *comm = ep->comm;
    const struct nep_topology *topology = ep->plan.topology;
    uint64_t staging =
        params->staging_bytes != 0 ? params->staging_bytes : comm->config.staging_bytes;
    enum nep_status status = topology->num_nodes > 1 ? nep_device_far_plan(ep, staging) : NEP_OK;
    status = nep_bootstrap_common(&comm->bootstrap, ep->rank, topology->num_ranks, status,
                                  comm->timeout_ns);
    if (status != NEP_OK) {
        return status;
    }
    nep_cuda_plan_init(&device->plan, &ep->shape, topology->num_ranks, topology->num_nodes, 16,
                       staging, device->far != NULL ? device->far->plan.near_bytes : 0);
    status = nep_cuda_windows_create(comm, device->plan.bytes, &device->windows);
    if (status != NEP_OK) {
        return status; /* on all ranks alike */
    }
    status = find_geometry(ep, params);
    if (status == NEP_OK) {
        status = nep_cuda_load();
    }
    if (status == NEP_OK) {
        status = make_state(ep);
    }
    if (device->far != NULL) {
        status = nep_bootstrap_common(&comm->bootstrap, ep->rank, topology->num_ranks, status,
                                      comm->timeout_ns);
        if (status != NEP_OK) {
            return status;
        }
        status = nep_device_far_create(ep);
    }
    if (status == NEP_OK) {
        status = nep_device_take_map(ep, &ep->maps.now);
    }
    if (status == NEP_OK) {
        status = nep_handle_create_for(ep, &device->scratch);
    }
    if (status == NEP_OK) {
        status = nep_device_watch_start(ep);
    }
    return nep_bootstrap_common(&comm->bootstrap, ep->rank, topology->num_ranks, status,
                                comm->timeout_ns);
}

enum nep_status nep_device_create(struct nep_ep *ep, const struct nep_ep_params *params)
{
    int ordinal = 0;
    enum nep_status status = check_shape(ep);
    if (status == NEP_OK) {
        status = nep_cuda_runtime_check(cudaGetDevice(&ordinal), "the current device");
    }
    if (status == NEP_OK) {
        ep->device = calloc(1, sizeof *ep->device);
        status = ep->device != NULL ? NEP_OK : nep_fail(NEP_ERR_NO_MEMORY, "no memory for an ep");
    }
    status = nep_bootstrap_common(&ep->comm->bootstrap, ep->rank, ep->plan.topology->num_ranks,
                                  status, ep->comm->timeout_ns);
    if (status != NEP_OK) {
        return status;
    }
    ep->device->ordinal = ordinal;
    return make(ep, params);
}

void nep_device_destroy(struct nep_ep *ep, bool is_child)
{
    struct nep_device *device = ep->device;
    int was = -1;
    if (device == NULL) {
        return;
    }
    nep_device_watch_stop(ep, is_child);
    if (device->scratch != NULL) {
        nep_device_handle_destroy(device->scratch, is_child);
        free(device->scratch);
    }
    bool is_entered = !is_child && nep_device_enter(ep, &was) == NEP_OK;
    nep_device_far_destroy(ep, is_child);
    if (is_entered) {
        for (uint32_t i = 0; i < 1 + NEP_MAX_STAGED; i++) {
            cudaFree(device->maps[i].memory);
        }
        cudaFree(device->state);
        cudaFreeHost(device->status_host);
        nep_cuda_windows_destroy(&device->windows);
        nep_device_leave(was);
    }
    for (uint32_t i = 0; i < 1 + NEP_MAX_STAGED; i++) {
        free(device->maps[i].copies);
    }
    free(device);
    ep->device = NULL;
}

/* ---- handles -------------------------------------------------------------------------------- */

static void *carve(char **at_p, uint64_t bytes)
{
    uintptr_t at = ((uintptr_t)*at_p + 255) / 256 * 256;
    *at_p = (char *)at + bytes;
    return (void *)at;
}

enum nep_status nep_device_handle_create(struct nep_handle *handle)
{
    const struct nep_ep *ep = handle->ep;
    const struct nep_device *device = ep->device;
    uint64_t pairs = (uint64_t)ep->shape.max_tokens * ep->shape.top_k;
    uint64_t num_ranks = ep->plan.topology->num_ranks;
    uint64_t slots_here = ep->shape.slots_per_rank;
    uint64_t slots = num_ranks * slots_here;
    uint64_t counts = num_ranks + ep->plan.topology->num_nodes + slots;
    int was = -1;
    struct nep_device_handle *here = calloc(1, sizeof *here);
    if (here == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for a handle");
    }
    enum nep_status status = nep_device_enter(ep, &was);
    cudaError_t error =
        status == NEP_OK ? cudaMalloc(&here->memory, device->plan.handle_bytes) : cudaSuccess;
    if (status == NEP_OK && error == cudaSuccess) {
        error = cudaHostAlloc(&here->pinned, (2 + slots_here) * 8 + (slots_here + num_ranks) * 4,
                              cudaHostAllocPortable);
    }
    if (status == NEP_OK && error == cudaSuccess) {
        error = cudaMemset(here->memory, 0, device->plan.handle_bytes);
    }
    if (status == NEP_OK && error == cudaSuccess) {
        error = cudaDeviceSynchronize();
    }
    if (status == NEP_OK) {
        status = nep_cuda_runtime_check(error, "device memory of a handle");
    }
    if (status != NEP_OK) {
        cudaFree(here->memory);
        cudaFreeHost(here->pinned);
        nep_device_leave(was);
        free(here);
        return status;
    }
    nep_device_leave(was);
    char *at = here->memory;
    here->routing.cell = carve(&at, sizeof(struct nep_cuda_cell));
    here->routing.slots = carve(&at, pairs * 4);
    here->routing.index = carve(&at, pairs * 4);
    here->routing.weights = carve(&at, pairs * 4);
    here->routing.counts = carve(&at, counts * 4);
    here->routing.first = carve(&at, (slots + num_ranks) * 4);
    here->routing.totals = carve(&at, num_ranks * 8);
    here->routing.terms = carve(&at, pairs * sizeof(struct nep_cuda_term));
    here->routing.num_terms = carve(&at, (uint64_t)ep->shape.max_tokens * 4);
    here->routing.block_counts = carve(&at, 16 * counts * 8);
    here->routing.received = carve(&at, (2 + slots_here) * 8);
    here->routing.received_rows = carve(&at, (slots_here + num_ranks) * 4);
    handle->device = here;
    if (device->far != NULL) {
        status = nep_device_far_handle_create(handle);
    }
    if (status != NEP_OK) {
        nep_device_handle_destroy(handle, false);
    }
    return status;
}

void nep_device_handle_destroy(struct nep_handle *handle, bool is_child)
{
    struct nep_device_handle *here = handle->device;
    int was = -1;
    if (here == NULL) {
        return;
    }
    if (!is_child && nep_device_enter(handle->ep, &was) == NEP_OK) {
        nep_device_far_handle_destroy(handle);
        cudaFree(here->memory);
        cudaFreeHost(here->pinned);
        nep_device_leave(was);
    }
    free(here);
    handle->device = NULL;
}

/* ---- maps ----------------------------------------------------------------------------------- */

static uint64_t map_bytes(const struct nep_copies *copies)
{
    uint64_t num = copies->begin[copies->num_experts];
    return ((uint64_t)copies->num_experts + 1 + num * 2 + copies->num_ranks) * 4 +
           (num * 2 + 3) / 4 * 4;
}

static const void *put(char **to_p, char **device_p, const void *from, uint64_t bytes)
{
    const void *at = *device_p;
    memcpy(*to_p, from, bytes);
    *to_p += (bytes + 3) / 4 * 4;
    *device_p += (bytes + 3) / 4 * 4;
    return at;
}

static void put_layer(char **to_p, char **device_p, const struct nep_copies *copies,
                      struct nep_copies *here)
{
    uint64_t num = copies->begin[copies->num_experts];
    *here = *copies;
    here->begin = put(to_p, device_p, copies->begin, ((uint64_t)copies->num_experts + 1) * 4);
    here->slot = put(to_p, device_p, copies->slot, num * 4);
    here->node = put(to_p, device_p, copies->node, num * 4);
    here->weight = put(to_p, device_p, copies->weight, num * 2);
    here->node_of_rank = put(to_p, device_p, copies->node_of_rank, (uint64_t)copies->num_ranks * 4);
}

/* The place of the oldest version that can be in use no more. */
static struct nep_device_map *free_map(struct nep_ep *ep)
{
    struct nep_device_map *maps = ep->device->maps;
    struct nep_device_map *oldest = &maps[0];
    for (uint32_t i = 0; i < 1 + NEP_MAX_STAGED; i++) {
        if (maps[i].memory == NULL) {
            return &maps[i];
        }
        oldest = maps[i].version < oldest->version ? &maps[i] : oldest;
    }
    return oldest;
}

enum nep_status nep_device_take_map(struct nep_ep *ep, const struct nep_map_version *version)
{
    uint32_t layers = ep->shape.num_layers;
    uint64_t bytes = 0;
    int was = -1;
    for (uint32_t l = 0; l < layers; l++) {
        bytes += map_bytes(&version->copies[l]);
    }
    struct nep_device_map map = {.version = version->version};
    char *tables = malloc(bytes);
    map.copies = calloc(layers, sizeof *map.copies);
    enum nep_status status =
        tables != NULL && map.copies != NULL
            ? nep_device_enter(ep, &was)
            : nep_fail(NEP_ERR_NO_MEMORY, "no memory for a map of %u layers", layers);
    if (status == NEP_OK) {
        status = nep_cuda_runtime_check(cudaMalloc(&map.memory, bytes), "device memory of a map");
    }
    if (status == NEP_OK) {
        char *to = tables;
        char *at = map.memory;
        for (uint32_t l = 0; l < layers; l++) {
            put_layer(&to, &at, &version->copies[l], &map.copies[l]);
        }
        status = nep_cuda_runtime_check(
            cudaMemcpy(map.memory, tables, bytes, cudaMemcpyHostToDevice), "tables of a map");
    }
    if (status == NEP_OK) {
        /* Kernels that use the oldest tables may still be running: cudaFree waits for them. */
        struct nep_device_map *to = free_map(ep);
        cudaFree(to->memory);
        free(to->copies);
        *to = map;
    } else {
        cudaFree(map.memory);
        free(map.copies);
    }
    nep_device_leave(was);
    free(tables);
    return status;
}

/* ---- memory --------------------------------------------------------------------------------- */

enum nep_status nep_device_zero(struct nep_ep *ep, void *buffer, uint64_t bytes)
{
    int was = -1;
    enum nep_status status = nep_device_enter(ep, &was);
    if (status == NEP_OK) {
        cudaError_t error = cudaMemset(buffer, 0, bytes);
        /* The caller's stream may not wait for the one that cudaMemset uses. */
        error = error == cudaSuccess ? cudaStreamSynchronize(NULL) : error;
        status = nep_cuda_runtime_check(error, "zeros in a buffer");
    }
    nep_device_leave(was);
    return status;
}

enum nep_status nep_device_alloc(struct nep_ep *ep, uint64_t bytes, void **buffer_p)
{
    int was = -1;
    void *buffer = NULL;
    enum nep_status status = nep_device_enter(ep, &was);
    if (status == NEP_OK) {
        status = nep_cuda_runtime_check(cudaMalloc(&buffer, bytes == 0 ? 1 : bytes),
                                        "private device memory of a buffer");
    }
    nep_device_leave(was);
    if (status == NEP_OK) {
        *buffer_p = buffer;
    }
    return status;
}

void nep_device_free(struct nep_ep *ep, void *buffer)
{
    int was = -1;
    if (nep_device_enter(ep, &was) == NEP_OK) {
        cudaFree(buffer);
        nep_device_leave(was);
    }
}

/* ---- faults --------------------------------------------------------------------------------- */

static const char *phase_name(uint64_t phase)
{
    static const char *const names[] = {"",
                                        "layout",
                                        "counts",
                                        "pushed rows",
                                        "expert outputs",
                                        "reading of expert outputs",
                                        "output binding",
                                        "staging",
                                        "its expert outputs to be written"};
    static const char *const far_names[] = {"a send slot's completion", "a tile's credit",
                                            "room in the command ring", "a tile of rows",
                                            "a tile of sums",           "output binding"};
    uint64_t far = phase - NEP_FAR_PHASE_SLOT;
    if (far < sizeof far_names / sizeof far_names[0]) {
        return far_names[far];
    }
    return phase < sizeof names / sizeof names[0] ? names[phase] : "an unknown phase";
}

/* The proxy, or the fabric: true if it is theirs. */
static bool fill_far_fault(const struct nep_ep *ep, uint64_t status, struct nep_fault *fault)
{
    unsigned long long op = (unsigned long long)fault->op;
    if (status >> 56 == NEP_CUDA_PROXY_STALE) {
        fault->status = NEP_ERR_TIMEOUT;
        snprintf(fault->message, sizeof fault->message,
                 "the proxy thread of rank %u stands still: a kernel waited in operation %llu for "
                 "%s, and nothing was posted for half of the timeout of %.3f s",
                 fault->rank, op, fault->phase, (double)ep->timeout_ns / 1e9);
        return true;
    }
    if (status >> 56 == NEP_CUDA_FABRIC_FAULT) {
        fault->status = NEP_ERR_PEER_LOST;
        snprintf(fault->message, sizeof fault->message,
                 "rank %u is lost to the fabric: operation %llu of rank %u waited for %s",
                 fault->rank, op, ep->rank, fault->phase);
        return true;
    }
    return false;
}

static void fill_fault(const struct nep_ep *ep, uint64_t status, struct nep_fault *fault)
{
    uint64_t phase = status >> 48 & 0xff;
    uint64_t who = status & 0xffffffffffffull;
    unsigned long long op = (unsigned long long)fault->op;
    snprintf(fault->phase, sizeof fault->phase, "%s", phase_name(phase));
    fault->rank = (uint32_t)who;
    if (fill_far_fault(ep, status, fault)) {
        fault->node = fault->rank < ep->plan.topology->num_ranks
                          ? ep->plan.topology->node_of_rank[fault->rank]
                          : UINT32_MAX;
        return;
    }
    switch (status >> 56) {
    case NEP_CUDA_EXPIRED:
        fault->status = NEP_ERR_TIMEOUT;
        fault->expected = ep->node_size;
        fault->idle_ns = ep->timeout_ns;
        snprintf(
            fault->message, sizeof fault->message,
            phase == NEP_CUDA_PHASE_WRITTEN
                ? "expert outputs of rank %u were not written: the timeout of %.3f s passed while "
                  "a "
                  "kernel of rank %u waited for their flags, before operation %llu (%s; rank %u)"
                : "rank %u is lost, slow or stuck: the timeout of %.3f s passed; a kernel of rank "
                  "%u waited in operation %llu for %s of rank %u",
            fault->rank, (double)ep->timeout_ns / 1e9, ep->rank, op, fault->phase, fault->rank);
        break;
    case NEP_CUDA_LOST:
        fault->status = NEP_ERR_PEER_LOST;
        snprintf(fault->message, sizeof fault->message,
                 "rank %u is lost: it ended; a kernel of rank %u waited for it in operation %llu",
                 fault->rank, ep->rank, op);
        break;
    case NEP_CUDA_BAD_ID:
        fault->status = NEP_ERR_INVALID;
        fault->rank = phase == NEP_CUDA_PHASE_LAYOUT ? ep->rank : (uint32_t)who;
        snprintf(fault->message, sizeof fault->message,
                 phase == NEP_CUDA_PHASE_LAYOUT
                     ? "operation %llu: topk_ids has an id out of range at token %llu, k %llu"
                     : "operation %llu: rank %llu has an id out of range in its topk_ids",
                 op,
                 (unsigned long long)(phase == NEP_CUDA_PHASE_LAYOUT ? who / ep->shape.top_k : who),
                 (unsigned long long)(who % ep->shape.top_k));
        break;
    case NEP_CUDA_OVERFLOW:
        fault->status = NEP_ERR_OVERFLOW;
        snprintf(fault->message, sizeof fault->message,
                 phase == NEP_CUDA_PHASE_STAGE
                     ? "operation %llu: expert outputs of rank %u lie in memory that peers do not "
                       "map, and are more rows than the staging area holds: take their memory from "
                       "nep_buffer_alloc, or raise staging_bytes (NEP_STAGING)"
                     : "operation %llu: the output of rank %u is too small for the rows that came: "
                       "ask nep_dispatch_counts, or size it with nep_ep_max_rows",
                 op, fault->rank);
        break;
    case NEP_CUDA_CROWDED:
        fault->status = NEP_ERR_INVALID;
        snprintf(fault->message, sizeof fault->message,
                 "operation %llu: a slot of rank %u would get more rows from one rank than the "
                 "padded layout's %u: a token names an expert twice",
                 op, fault->rank, ep->shape.max_tokens);
        break;
    default:
        fault->status = NEP_ERR_MISMATCH;
        snprintf(fault->message, sizeof fault->message,
                 "operation %llu of rank %u meets another operation, or another map, of rank %u",
                 op, ep->rank, fault->rank);
        break;
    }
    fault->node = fault->rank < ep->plan.topology->num_ranks
                      ? ep->plan.topology->node_of_rank[fault->rank]
                      : UINT32_MAX;
}

bool nep_device_fault(const struct nep_ep *ep, struct nep_fault *fault)
{
    if (ep->device == NULL || ep->device->status_host == NULL) {
        return false;
    }
    /* Acquire: pairs with the release in nep_give_up; the operation's number is beside it. */
    uint64_t status = __atomic_load_n(ep->device->status_host, __ATOMIC_ACQUIRE);
    if (status == 0) {
        return false;
    }
    memset(fault, 0, sizeof *fault);
    fault->size = sizeof *fault;
    fault->op = ep->device->status_host[1] - 1; /* kernels count from 1 */
    fill_fault(ep, status, fault);
    return true;
}
