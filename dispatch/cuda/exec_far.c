/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The region of the fabric is a window of the transports, as the host executor's is, so every
 * transport carries it: shm between emulated nodes, ucx and verbs between machines. It is pinned
 * and mapped for the GPU; tiles are staged in it. What ranks of a node tell each other lies in the
 * windows on the GPU. Not built: landing in memory of the GPU, where the transport reaches it. The
 * words must stay in host memory then, while a transport's window is one piece of memory; kernels
 * and proxy know the two apart already (`data` and `words` of struct nep_far).
 */
#include "dispatch/cuda/exec_far.h"

#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "dispatch/cuda/visibility.h"
#include "transport/bootstrap.h"

enum { RING = 256 };

/* ---- creation ------------------------------------------------------------------------------- */

enum nep_status nep_device_far_plan(struct nep_ep *ep, uint64_t staging_bytes)
{
    struct nep_device_far *far = calloc(1, sizeof *far);
    if (far == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for an ep");
    }
    ep->device->far = far;
    far->words = calloc(ep->node_size, sizeof *far->words);
    far->is_registered = calloc(ep->node_size, sizeof *far->is_registered);
    far->peers = calloc(ep->plan.topology->num_ranks, sizeof *far->peers);
    if (far->words == NULL || far->is_registered == NULL || far->peers == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for an ep");
    }
    return nep_far_plan_init(&far->plan, &ep->shape, ep->plan.topology, staging_bytes);
}

static enum nep_status collect(struct nep_ep *ep, enum nep_status status)
{
    struct nep_comm *comm = ep->comm;
    return nep_bootstrap_common(&comm->bootstrap, ep->rank, comm->topology.num_ranks, status,
                                comm->timeout_ns);
}

/* Collective: each rank of another node reaches its own slots alone. */
static enum nep_status make_inter_window(struct nep_ep *ep)
{
    struct nep_device_far *far = ep->device->far;
    struct nep_transport *inter = ep->comm->inter;
    uint32_t num_controls = far->plan.plan.regions[ep->rank].num_controls;
    void *base = far->words[ep->local];
    struct nep_grant *grants = calloc(3 * (uint64_t)num_controls, sizeof *grants);
    enum nep_status status =
        grants != NULL
            ? inter->ops->window_grant(inter, ep->number, grants,
                                       nep_plan_grants(&far->plan.plan, ep->rank, grants))
            : nep_fail(NEP_ERR_NO_MEMORY, "ep: no memory for %u grants", num_controls);
    free(grants);
    status = collect(ep, status);
    if (status == NEP_OK) {
        status = inter->ops->window_create(inter, ep->number, &base, far->plan.words_bytes);
        far->has_inter_window = status == NEP_OK;
    }
    return collect(ep, status);
}

/* Collective: memory that the transports know. */
static enum nep_status make_window(struct nep_ep *ep)
{
    struct nep_device_far *far = ep->device->far;
    struct nep_comm *comm = ep->comm;
    void *base = NULL;
    uint64_t bytes = far->plan.words_bytes;
    enum nep_status status = comm->intra->ops->window_create(comm->intra, ep->number, &base, bytes);
    far->has_intra_window = status == NEP_OK;
    for (uint32_t g = 0; status == NEP_OK && g < ep->node_size; g++) {
        far->words[g] =
            comm->intra->ops->peer_window(comm->intra, ep->number, nep_ep_rank_at(ep, g));
    }
    if (status == NEP_OK) {
        nep_fabric_fill_head(&far->plan.plan, ep->rank, base);
    }
    status = collect(ep, status);
    if (status == NEP_OK && comm->inter != comm->intra) {
        status = make_inter_window(ep);
    }
    return status;
}

/* Ranks that are threads of one process may share an address, which can be pinned once. */
static enum nep_status pin(struct nep_ep *ep, uint32_t local)
{
    struct nep_device_far *far = ep->device->far;
    cudaError_t error = cudaHostRegister(far->words[local], far->plan.words_bytes,
                                         cudaHostRegisterPortable | cudaHostRegisterMapped);
    far->is_registered[local] = error == cudaSuccess;
    if (error == cudaErrorHostMemoryAlreadyRegistered) {
        (void)cudaGetLastError();
        error = cudaSuccess;
    }
    return nep_cuda_runtime_check(error, "pinning the words of a node");
}

static enum nep_status pin_all(struct nep_ep *ep)
{
    enum nep_status status = collect(ep, pin(ep, ep->local)); /* owners first */
    for (uint32_t g = 0; status == NEP_OK && g < ep->node_size; g++) {
        if (g != ep->local) {
            status = pin(ep, g);
        }
    }
    return status;
}

/* Pinned, zeroed, mapped. */
static enum nep_status take_pinned(void *to, size_t bytes)
{
    void *memory = NULL;
    enum nep_status status = nep_cuda_runtime_check(
        cudaHostAlloc(&memory, bytes, cudaHostAllocPortable | cudaHostAllocMapped),
        "pinned memory of the proxy");
    if (status == NEP_OK) {
        memset(memory, 0, bytes);
        memcpy(to, &memory, sizeof memory);
    }
    return status;
}

/* Tables are made on the host at addresses of the GPU's copy. */
static enum nep_status make_tables(struct nep_ep *ep)
{
    struct nep_device_far *here = ep->device->far;
    struct nep_far *far = &here->far;
    struct nep_far_tables tables, there;
    uint32_t node_size = ep->node_size;
    uint64_t numbers = nep_far_plan_tables(&here->plan, NULL, &tables);
    uint64_t state = (numbers + 255) / 256 * 256;
    uint64_t producer = state + (sizeof(struct nep_far_state) + 255) / 256 * 256;
    uint64_t pointers = producer + 256;
    uint64_t bytes = pointers + 3 * (uint64_t)node_size * sizeof(char *);
    char *memory = calloc(1, bytes);
    enum nep_status status =
        memory != NULL ? nep_cuda_runtime_check(cudaMalloc(&here->memory, bytes), "tables of an ep")
                       : nep_fail(NEP_ERR_NO_MEMORY, "no memory for an ep");
    if (status != NEP_OK) {
        free(memory);
        return status;
    }
    char *device = here->memory;
    nep_far_plan_tables(&here->plan, memory, &tables);
    nep_far_plan_tables(&here->plan, device, &there);
    nep_far_plan_fill_tables(&here->plan, ep->rank, &tables);
    char **words = (char **)(memory + pointers), **data = words + node_size;
    char **near = data + node_size;
    for (uint32_t g = 0; status == NEP_OK && g < node_size; g++) {
        void *mapped = NULL;
        status = nep_cuda_runtime_check(cudaHostGetDevicePointer(&mapped, here->words[g], 0),
                                        "pinned words on the device");
        words[g] = data[g] = mapped;
        near[g] = ep->device->windows.base + g * ep->device->windows.stride + ep->device->plan.far;
    }
    far->stuck = (uint64_t *)(near[ep->local] + here->plan.plan.regions[ep->rank].staged);
    far->completed = (uint64_t *)(words[ep->local] + offsetof(struct nep_region_head, completed));
    if (status == NEP_OK) {
        status = nep_cuda_runtime_check(cudaMemcpy(device, memory, bytes, cudaMemcpyHostToDevice),
                                        "tables of an ep");
    }
    free(memory);
    far->node_of_rank = there.node_of_rank;
    far->local_of_rank = there.local_of_rank;
    far->node_first = there.node_first;
    far->node_rank = there.node_rank;
    far->landing = there.landing;
    far->lane = there.lane;
    far->lane_source = there.lane_source;
    far->control = there.control;
    far->regions = there.regions;
    far->state = (struct nep_far_state *)(device + state);
    far->ring.producer = (struct nep_ring_producer *)(device + producer);
    far->words = (char *const *)(device + pointers);
    far->data = far->words + node_size;
    far->near = far->data + node_size;
    return status;
}

static void fill_numbers(struct nep_ep *ep)
{
    struct nep_device_far *here = ep->device->far;
    const struct nep_topology *topology = ep->plan.topology;
    const struct nep_region *region = &here->plan.plan.regions[ep->rank];
    here->far = (struct nep_far){
        .num_ranks = topology->num_ranks,
        .rank = ep->rank,
        .num_nodes = topology->num_nodes,
        .node = ep->node,
        .node_size = ep->node_size,
        .local = ep->local,
        .node_begin = here->plan.plan.node_first[ep->node],
        .tile_rows = here->plan.shape.tile_rows,
        .meta_bytes = here->plan.shape.meta_bytes,
        .row_bytes = ep->shape.row_bytes,
        .window = here->plan.shape.window,
        .tiles = NEP_FAR_TILES,
        .num_lanes = region->num_lanes,
        .num_controls = region->num_controls,
        .shape = ep->device->shape,
        .dtype = ep->shape.dtype,
        .own = *region,
        .status_host = ep->device->status_host,
        .timeout_ns = ep->timeout_ns,
    };
}

/* What makes arrivals visible. No transport's window reaches memory of a GPU yet. */
static enum nep_status choose_visibility(struct nep_ep *ep)
{
    struct nep_visibility_facts facts = {.reaches_device = false, .num_devices = 1};
    enum nep_visibility visibility;
    char why[256];
    int ordinal = ep->device->ordinal;
    cudaError_t error =
        cudaDeviceGetAttribute(&facts.gpudirect, cudaDevAttrGPUDirectRDMASupported, ordinal);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&facts.writes_ordering,
                                       cudaDevAttrGPUDirectRDMAWritesOrdering, ordinal);
    }
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&facts.flush_options,
                                       cudaDevAttrGPUDirectRDMAFlushWritesOptions, ordinal);
    }
    enum nep_status status = nep_cuda_runtime_check(error, "attributes of the device");
    if (status == NEP_OK) {
        status = nep_visibility_choose(&facts, ep->comm->config.cuda_visibility, &visibility, why,
                                       sizeof why);
    }
    if (status == NEP_OK) {
        nep_info("rank %u: arrivals from other nodes: %s", ep->rank, why);
    }
    return status;
}

static enum nep_status start_proxy(struct nep_ep *ep)
{
    struct nep_device_far *here = ep->device->far;
    struct nep_fabric_proxy_params fabric = {
        .plan = &here->plan.plan,
        .inter = ep->comm->inter,
        .window = ep->number,
        .words = here->words[ep->local],
        .node_words = here->words,
        .data = here->words[ep->local],
        .page = here->page,
    };
    enum nep_status status = nep_fabric_proxy_create(&fabric, &here->fabric);
    if (status != NEP_OK) {
        return status;
    }
    here->num_peers = nep_far_plan_peers(&here->plan, ep->rank, here->peers);
    struct nep_proxy_params params = {
        .ring = here->far.ring,
        .transport = ep->comm->inter,
        .post = nep_fabric_proxy_post,
        .duty = nep_fabric_proxy_duty,
        .ctx = here->fabric,
        .peers = here->peers,
        .num_peers = here->num_peers,
        .spin_ns = ep->comm->config.proxy_spin_ns,
    };
    params.ring.shared = here->ring;
    return nep_proxy_start(&params, &here->proxy);
}

/* Launches that kernels of several nodes cannot make are known now. */
static enum nep_status check_geometry(const struct nep_ep *ep)
{
    const struct nep_device_far *here = ep->device->far;
    uint32_t blocks = ep->device->geometry.blocks;
    uint32_t tiles =
        (ep->shape.max_tokens + here->plan.shape.tile_rows - 1) / here->plan.shape.tile_rows;
    uint64_t bytes = (uint64_t)ep->node_size * (1 + ep->shape.slots_per_rank) * 4;
    if (tiles > NEP_FAR_TILES && blocks < 2) {
        return nep_fail(NEP_ERR_INVALID,
                        "executor cuda: %u tokens are more than %d tiles of %u: over several nodes "
                        "num_sms must be 2 at least, some pack while others receive",
                        ep->shape.max_tokens, NEP_FAR_TILES, here->plan.shape.tile_rows);
    }
    if (bytes > ep->device->shared_bytes) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "executor cuda: %u slots on each of %u ranks of a node need %llu bytes of "
                        "shared memory; a block of this device has %u",
                        ep->shape.slots_per_rank, ep->node_size, (unsigned long long)bytes,
                        ep->device->shared_bytes);
    }
    return NEP_OK;
}

enum nep_status nep_device_far_create(struct nep_ep *ep)
{
    struct nep_device_far *here = ep->device->far;
    char *own = ep->device->windows.base + ep->local * ep->device->windows.stride;
    enum nep_status status = make_window(ep);
    if (status != NEP_OK) {
        return status; /* on all ranks alike */
    }
    status = pin_all(ep);
    fill_numbers(ep);
    if (status == NEP_OK) {
        status = choose_visibility(ep);
    }
    if (status == NEP_OK) {
        status = check_geometry(ep);
    }
    if (status == NEP_OK) {
        status = nep_cuda_far_load();
    }
    if (status == NEP_OK) {
        status = take_pinned(&here->page, sizeof *here->page);
    }
    if (status == NEP_OK) {
        status = take_pinned(&here->ring, nep_ring_bytes(RING));
    }
    if (status == NEP_OK) {
        status = make_tables(ep);
    }
    if (status == NEP_OK) {
        cudaError_t error = cudaMemset(own + ep->device->plan.far, 0,
                                       here->plan.plan.regions[ep->rank].send_counts);
        error = error == cudaSuccess ? cudaDeviceSynchronize() : error;
        status = nep_cuda_runtime_check(error, "words of a node on the device");
    }
    if (status != NEP_OK) {
        return status;
    }
    here->far.page = here->page;
    here->far.ring.shared = here->ring;
    here->far.ring.size = RING;
    /* Layout, which is the same kernel with one node, shares the status. */
    ep->device->group.state = &here->far.state->run;
    return start_proxy(ep);
}

static void let_go(struct nep_ep *ep)
{
    struct nep_device_far *here = ep->device->far;
    struct nep_comm *comm = ep->comm;
    nep_proxy_stop(here->proxy);
    nep_fabric_proxy_destroy(here->fabric);
    for (uint32_t g = 0; g < ep->node_size; g++) {
        if (here->is_registered != NULL && here->is_registered[g]) {
            cudaHostUnregister(here->words[g]);
        }
    }
    if (here->has_inter_window) {
        comm->inter->ops->window_destroy(comm->inter, ep->number);
    }
    if (here->has_intra_window) {
        comm->intra->ops->window_destroy(comm->intra, ep->number);
    }
    cudaFree(here->memory);
    cudaFreeHost(here->page);
    cudaFreeHost(here->ring);
}

void nep_device_far_destroy(struct nep_ep *ep, bool is_child)
{
    struct nep_device_far *here = ep->device->far;
    if (here == NULL) {
        return;
    }
    if (!is_child) {
        let_go(ep);
    }
    nep_far_plan_fini(&here->plan);
    free(here->words);
    free(here->is_registered);
    free(here->peers);
    free(here);
    ep->device->far = NULL;
}

void nep_device_stats(const struct nep_ep *ep, struct nep_stats *stats)
{
    const struct nep_device_far *here = ep->device->far;
    if (here == NULL) {
        return;
    }
    struct nep_region_head *head = (struct nep_region_head *)here->words[ep->local];
    struct nep_fabric_stats put = nep_fabric_proxy_stats(here->fabric);
    stats->tokens_local += __atomic_load_n(&here->page->tokens_local, __ATOMIC_RELAXED);
    stats->remote_rows += put.rows;
    stats->remote_rows_back += put.rows_back;
    stats->wire_bytes += put.bytes;
    stats->wire_messages += put.messages;
    stats->duplicates += atomic_load_explicit(&head->duplicates, memory_order_relaxed);
    stats->stale += atomic_load_explicit(&head->stale, memory_order_relaxed);
}

/* ---- handles -------------------------------------------------------------------------------- */

enum nep_status nep_device_far_handle_create(struct nep_handle *handle)
{
    const struct nep_ep *ep = handle->ep;
    const struct nep_far_plan *plan = &ep->device->far->plan;
    struct nep_device_handle *here = handle->device;
    uint64_t bytes = nep_far_plan_handle(plan, ep->rank, NULL, &here->far);
    int was = -1;
    enum nep_status status = nep_device_enter(ep, &was);
    if (status == NEP_OK) {
        cudaError_t error = cudaMalloc(&here->far_memory, bytes);
        if (error == cudaSuccess) {
            error = cudaMemset(here->far_memory, 0, bytes);
        }
        error = error == cudaSuccess ? cudaDeviceSynchronize() : error;
        status = nep_cuda_runtime_check(error, "device memory of a handle");
    }
    nep_device_leave(was);
    nep_far_plan_handle(plan, ep->rank, here->far_memory, &here->far);
    return status;
}

void nep_device_far_handle_destroy(struct nep_handle *handle)
{
    cudaFree(handle->device->far_memory);
}
