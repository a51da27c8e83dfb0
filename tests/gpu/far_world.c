/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Everything is allocated before the fake NIC's kernel starts and freed after it ended: freeing
 * waits for the device.
 */
#include "tests/gpu/far_world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"

void far_must(int error, const char *what)
{
    if (error != 0) {
        printf("%s: %s\n", what, cudaGetErrorString((cudaError_t)error));
        fflush(stdout);
        _exit(3);
    }
}

static uint64_t round_up(uint64_t bytes, uint64_t to)
{
    return (bytes + to - 1) / to * to;
}

static void *device(struct far_rank *r, uint64_t bytes)
{
    void *memory = NULL;
    far_must((int)cudaMalloc(&memory, bytes + 64), "device memory");
    /* On this stream: the default one is not ordered with it. */
    far_must((int)cudaMemsetAsync(memory, 0, bytes + 64, r->stream), "device memory");
    r->memory[r->num_memory++] = memory;
    return memory;
}

void far_put(struct far_rank *r, void *to, const void *from, uint64_t bytes)
{
    far_must((int)cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, r->stream), "put");
    far_must((int)cudaStreamSynchronize(r->stream), "put");
}

static void *table(struct far_rank *r, const void *from, uint64_t bytes)
{
    void *memory = device(r, bytes);
    far_put(r, memory, from, bytes);
    return memory;
}

void far_meet(struct far_rank *r)
{
    pthread_barrier_wait(&r->world->barrier);
}

double far_max(struct far_rank *r, double value)
{
    far_meet(r);
    r->world->values[r->rank] = value;
    far_meet(r);
    double most = value;
    for (uint32_t i = 0; i < r->world->num_ranks; i++) {
        most = r->world->values[i] > most ? r->world->values[i] : most;
    }
    far_meet(r);
    return most;
}

/* ---- shapes and places ---------------------------------------------------------------------- */

/* One operation is outstanding, so all slots are for it. */
static uint32_t tiles_of(const struct far_shape *s)
{
    return s->tiles != 0 ? s->tiles : NEP_FAR_TILES;
}

static void make_plan(struct far_rank *r)
{
    const struct far_world *w = r->world;
    const struct far_shape *s = &w->shape;
    r->topology = (struct nep_topology){
        .size = sizeof r->topology,
        .num_ranks = w->num_ranks,
        .num_nodes = s->num_nodes,
        .rank = r->rank,
        .node = w->node_of_rank[r->rank],
        .local = w->local_of_rank[r->rank],
        .node_of_rank = w->node_of_rank,
        .local_of_rank = w->local_of_rank,
        .node_ranks = s->node_ranks,
    };
    r->shape = (struct nep_shape){
        .num_experts = w->num_ranks * s->slots_per_rank,
        .slots_per_rank = s->slots_per_rank,
        .top_k = s->top_k,
        .hidden = s->hidden,
        .max_tokens = s->max_tokens,
        .alignment = s->alignment > 1 ? s->alignment : 1,
        .outstanding = 1,
        .window = tiles_of(s),
        .tile_slots = tiles_of(s),
        .num_layers = 1,
        .dtype = s->dtype,
        .wire = s->wire,
        .layout = s->layout,
        .row_bytes = s->hidden * (uint32_t)nep_ref_dtype_bytes(s->dtype),
        .weights_bytes = s->top_k * 4,
        .meta_bytes = nep_far_meta_bytes(s->top_k),
        .tile_rows = s->max_tokens < s->tile_rows ? s->max_tokens : s->tile_rows,
    };
    far_must(nep_wire_init(&r->shape.format, s->dtype, s->wire, s->hidden, NEP_SCALE_FP32) !=
                 NEP_OK,
             "wire");
    r->shape.wire_row_bytes = r->shape.format.row_bytes;
    far_must(nep_plan_init(&r->plan, &r->shape, &r->topology) != NEP_OK, "plan");
}

static uint64_t capacity_of(const struct far_world *w)
{
    const struct far_shape *s = &w->shape;
    uint64_t tokens = (uint64_t)w->num_ranks * s->max_tokens;
    if (s->layout == NEP_LAYOUT_RANK) {
        return tokens;
    }
    if (s->layout == NEP_LAYOUT_EXPERT_PADDED) {
        return tokens * s->slots_per_rank;
    }
    uint64_t most = s->top_k < s->slots_per_rank ? s->top_k : s->slots_per_rank;
    return tokens * most + (uint64_t)s->slots_per_rank * (s->alignment + 1);
}

/* Behind the region: outputs, then expert outputs. Returns the bytes of a window. */
static uint64_t place_outputs(struct far_rank *r)
{
    const struct far_shape *s = &r->world->shape;
    uint64_t rows = capacity_of(r->world);
    uint64_t at = 0;
    for (uint32_t i = 0; i < r->world->num_ranks; i++) {
        at = r->plan.regions[i].bytes > at ? r->plan.regions[i].bytes : at;
    }
    struct nep_far_output out = {.capacity = rows};
    struct {
        uint64_t *to;
        uint64_t bytes;
    } arrays[] = {
        {&out.x, rows * r->shape.format.payload_bytes},
        {&out.scales, rows * r->shape.format.scale_bytes},
        {&out.topk_slots, rows * 4 * s->top_k},
        {&out.topk_weights, rows * 4 * s->top_k},
        {&out.source_rank, rows * 4},
        {&out.source_token, rows * 4},
        {&r->y_offset, rows * r->shape.row_bytes},
    };
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) {
        *arrays[i].to = at = round_up(at, 256);
        at += arrays[i].bytes;
    }
    r->out = out;
    return round_up(at, 2 << 20);
}

static void make_tables(struct far_rank *r)
{
    struct far_world *w = r->world;
    const struct nep_plan *plan = &r->plan;
    uint32_t num = w->num_ranks;
    uint32_t nodes = w->shape.num_nodes;
    uint32_t node_size = w->shape.node_ranks[r->topology.node];
    struct nep_far *far = &r->far;
    const struct nep_region *own = &plan->regions[r->rank];
    uint32_t *control = calloc((uint64_t)num * num, sizeof *control);
    uint32_t lane_source[FAR_MOST_RANKS] = {0};
    char *words[FAR_MOST_RANKS], *data[FAR_MOST_RANKS], *near[FAR_MOST_RANKS];
    for (uint32_t a = 0; a < num; a++) {
        for (uint32_t b = 0; b < num; b++) {
            control[a * num + b] = nep_plan_control(plan, a, b);
        }
        if (w->node_of_rank[a] != r->topology.node &&
            nep_plan_landing(plan, a, r->topology.node) == r->rank) {
            lane_source[nep_plan_lane(plan, a, r->topology.node)] = a;
            r->peers[r->num_peers++] = a;
        }
    }
    for (uint32_t g = 0; g < node_size; g++) {
        uint32_t rank = nep_plan_rank_at(plan, r->topology.node, g);
        words[g] = (char *)w->words[rank];
        near[g] = w->near + rank * w->stride;
        data[g] = w->shape.is_staged ? words[g] : near[g];
    }
    far->num_controls = own->num_controls;
    far->num_lanes = own->num_lanes;
    far->own = *own;
    far->node_begin = plan->node_first[r->topology.node];
    far->stuck = (uint64_t *)(near[r->topology.local] + own->staged);
    far->node_of_rank = table(r, w->node_of_rank, num * 4);
    far->local_of_rank = table(r, w->local_of_rank, num * 4);
    far->node_first = table(r, plan->node_first, (nodes + 1) * 4);
    far->node_rank = table(r, plan->node_rank, num * 4);
    far->landing = table(r, plan->landing, (uint64_t)nodes * num * 4);
    far->lane = table(r, plan->lane, (uint64_t)nodes * num * 4);
    far->lane_source = table(r, lane_source, sizeof lane_source);
    far->control = table(r, control, (uint64_t)num * num * 4);
    far->regions = table(r, plan->regions, num * sizeof *plan->regions);
    far->words = table(r, words, node_size * sizeof *words);
    far->data = table(r, data, node_size * sizeof *data);
    far->near = table(r, near, node_size * sizeof *near);
    free(control);
}

static void make_far(struct far_rank *r)
{
    struct far_world *w = r->world;
    const struct far_shape *s = &w->shape;
    struct nep_far *far = &r->far;
    *far = (struct nep_far){
        .num_ranks = w->num_ranks,
        .rank = r->rank,
        .num_nodes = s->num_nodes,
        .node = r->topology.node,
        .node_size = s->node_ranks[r->topology.node],
        .local = r->topology.local,
        .tile_rows = r->shape.tile_rows,
        .meta_bytes = r->shape.meta_bytes,
        .row_bytes = r->shape.row_bytes,
        .window = r->shape.window,
        .tiles = tiles_of(s),
        .dtype = s->dtype,
        .timeout_ns = s->timeout_ns,
    };
    far->shape = (struct nep_cuda_shape){
        .slots_per_rank = s->slots_per_rank,
        .top_k = s->top_k,
        .max_tokens = s->max_tokens,
        .alignment = s->alignment,
        .num_nodes = s->num_nodes,
        .layout = s->layout,
        .wire = r->shape.format,
    };
    make_tables(r);
    struct nep_region_head *head = (struct nep_region_head *)w->words[r->rank];
    nep_fabric_fill_head(&r->plan, r->rank, w->words[r->rank]);
    far->completed = (uint64_t *)&head->completed;
    far_must((int)cudaHostAlloc((void **)&far->page, sizeof *far->page, cudaHostAllocMapped),
             "page");
    memset(far->page, 0, sizeof *far->page);
    far_must((int)cudaHostAlloc((void **)&far->ring.shared, nep_ring_bytes(FAR_RING),
                                cudaHostAllocMapped),
             "ring");
    memset(far->ring.shared, 0, nep_ring_bytes(FAR_RING));
    far_must((int)cudaHostAlloc((void **)&r->status_host, 64, cudaHostAllocMapped), "status");
    *r->status_host = 0;
    far->status_host = r->status_host;
    far->ring.producer = device(r, sizeof *far->ring.producer);
    far->ring.size = FAR_RING;
    far->state = device(r, sizeof *far->state);
}

static void make_routing(struct far_rank *r)
{
    struct far_world *w = r->world;
    const struct far_shape *s = &w->shape;
    uint64_t tokens = s->max_tokens;
    uint64_t pairs = tokens * s->top_k;
    uint64_t lanes = r->far.num_lanes + 1;
    uint64_t slots = s->slots_per_rank;
    uint64_t node_size = r->far.node_size;
    r->routing = (struct nep_cuda_routing){
        .cell = device(r, sizeof(struct nep_cuda_cell)),
        .slots = device(r, pairs * 4),
        .index = device(r, pairs * 4),
        .counts = device(r, (w->num_ranks * (1 + slots) + s->num_nodes) * 4),
        .totals = device(r, w->num_ranks * 8),
        .received = device(r, (2 + slots) * 8),
        .received_rows = device(r, (slots + w->num_ranks) * 4),
    };
    r->far_routing = (struct nep_far_routing){
        .node_tokens = device(r, s->num_nodes * tokens * 4),
        .row_of = device(r, s->num_nodes * tokens * 4),
        .node_rows = device(r, s->num_nodes * 4),
        .first = device(r, w->num_ranks * node_size * slots * 4),
        .in = device(r, w->num_ranks * sizeof(struct nep_far_in)),
        .home_terms = device(r, pairs * sizeof(struct nep_cuda_term)),
        .home_num = device(r, tokens * 4),
        .far_terms = device(r, lanes * pairs * sizeof(struct nep_cuda_term)),
        .far_num = device(r, lanes * tokens * 4),
        .chunks = device(r, (tokens / r->shape.tile_rows + 2) * 4),
        .schedule = device(r, lanes * (tokens / r->shape.tile_rows + 2) * 8),
    };
    r->in = (struct nep_cuda_input){
        .x = device(r, tokens * r->shape.row_bytes),
        .weight = device(r, pairs * 4),
    };
    int sms = 0, shared = 0;
    far_must((int)cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0), "SMs");
    far_must((int)cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0),
             "shared memory");
    /* Two SMs per rank are the fake NIC's. */
    struct nep_cuda_limits limits = {.device_sms = (uint32_t)sms - FAKE_NIC_HALVES * w->num_ranks,
                                     .ranks_on_device = w->num_ranks,
                                     .shared_bytes = (uint32_t)shared - 20 * 1024};
    far_must(nep_cuda_geometry(&limits, s->num_sms, 1, 1, &r->geometry) != NEP_OK,
             nep_last_message());
    r->dispatch = (struct nep_far_dispatch){&r->far, &r->geometry, &r->in,
                                            &r->out, &r->routing,  &r->far_routing};
    r->combine = (struct nep_far_combine){
        .far = &r->far,
        .geometry = &r->geometry,
        .routing = &r->routing,
        .far_routing = &r->far_routing,
        .rows = r->y_offset,
        .weights = NEP_CUDA_NONE,
        .y = device(r, tokens * r->shape.row_bytes),
    };
}

static void start_proxy(struct far_rank *r)
{
    struct far_world *w = r->world;
    for (uint32_t g = 0; g < r->far.node_size; g++) {
        r->node_words[g] = w->words[nep_plan_rank_at(&r->plan, r->topology.node, g)];
    }
    r->nic = fake_nic_create(&w->nic, r->rank);
    struct nep_fabric_proxy_params fabric = {
        .plan = &r->plan,
        .inter = r->nic,
        .words = w->words[r->rank],
        .node_words = r->node_words,
        .data = w->words[r->rank], /* the fake NIC reads offsets in it */
        .page = r->far.page,
    };
    far_must(r->nic == NULL || nep_fabric_proxy_create(&fabric, &r->fabric) != NEP_OK, "proxy");
    struct nep_proxy_params params = {
        .ring = r->far.ring,
        .transport = r->nic,
        .post = nep_fabric_proxy_post,
        .duty = nep_fabric_proxy_duty,
        .ctx = r->fabric,
        .peers = r->peers,
        .num_peers = r->num_peers,
        .spin_ns = 100 * NEP_MS,
    };
    far_must(nep_proxy_start(&params, &r->proxy) != NEP_OK, "proxy");
}

static void *run_rank(void *arg)
{
    struct far_rank *r = arg;
    struct far_world *w = r->world;
    far_must((int)cudaSetDevice(0), "device");
    far_must((int)cudaStreamCreateWithFlags(&r->stream, cudaStreamNonBlocking), "stream");
    r->peers = calloc(FAR_MOST_RANKS, sizeof *r->peers);
    make_far(r);
    make_routing(r);
    far_must((int)cudaStreamSynchronize(r->stream), "set-up");
    far_meet(r);
    if (r->rank == 0) {
        far_must((int)cudaDeviceSynchronize(), "set-up");
        far_must(w->shape.is_staged
                     ? 0
                     : fake_nic_launch(w->nic.queues, w->num_ranks, 25 * NEP_S, w->nic_stream),
                 "fake NIC");
    }
    far_meet(r);
    start_proxy(r);
    far_meet(r);
    w->fn(r);
    far_must((int)cudaStreamSynchronize(r->stream), "end");
    far_meet(r);
    nep_proxy_stop(r->proxy);
    nep_fabric_proxy_destroy(r->fabric);
    __atomic_store_n(&w->nic.queues[r->rank].stop, 1, __ATOMIC_RELEASE);
    far_meet(r);
    far_must((int)cudaDeviceSynchronize(), "end");
    r->nic->ops->close(r->nic);
    for (uint32_t i = 0; i < r->num_memory; i++) {
        cudaFree(r->memory[i]);
    }
    cudaFreeHost(r->far.page);
    cudaFreeHost(r->far.ring.shared);
    cudaFreeHost(r->status_host);
    cudaStreamDestroy(r->stream);
    nep_plan_fini(&r->plan);
    free(r->peers);
    return NULL;
}

static void make_world(struct far_world *w, const struct far_shape *shape)
{
    w->shape = *shape;
    for (uint32_t n = 0; n < shape->num_nodes; n++) {
        for (uint32_t g = 0; g < shape->node_ranks[n]; g++) {
            w->node_of_rank[w->num_ranks] = n;
            w->local_of_rank[w->num_ranks++] = g;
        }
    }
    for (uint32_t i = 0; i < w->num_ranks; i++) {
        struct far_rank *r = w->ranks[i] = calloc(1, sizeof *r);
        r->world = w;
        r->rank = i;
        make_plan(r);
        uint64_t bytes = place_outputs(r);
        w->stride = bytes > w->stride ? bytes : w->stride;
        for (uint32_t p = 0; p < w->num_ranks; p++) {
            const struct nep_region *region = &r->plan.regions[p];
            uint64_t words = shape->is_staged ? region->bytes : region->words_end;
            w->words_bytes = words > w->words_bytes ? words : w->words_bytes;
        }
        w->slots[i] = malloc((uint64_t)shape->max_tokens * shape->top_k * 4);
        w->weights[i] = malloc((uint64_t)shape->max_tokens * shape->top_k * 4);
    }
    w->factor = malloc((uint64_t)w->num_ranks * shape->slots_per_rank * 4);
    for (uint32_t i = 0; i < w->num_ranks * shape->slots_per_rank; i++) {
        w->factor[i] = nep_ref_expert_factor(i);
    }
    far_must((int)cudaMalloc((void **)&w->near, w->stride * w->num_ranks), "windows");
    far_must((int)cudaMemset(w->near, 0, w->stride * w->num_ranks), "windows");
    far_must((int)cudaHostAlloc((void **)&w->nic.queues, w->num_ranks * sizeof *w->nic.queues,
                                cudaHostAllocMapped),
             "queues");
    memset(w->nic.queues, 0, w->num_ranks * sizeof *w->nic.queues);
    w->nic.num_ranks = w->num_ranks;
    w->nic.sink = nep_arrive;
    w->nic.seed = shape->nic_seed;
    w->nic.is_staged = shape->is_staged;
    for (uint32_t i = 0; i < w->num_ranks; i++) {
        far_must((int)cudaHostAlloc((void **)&w->words[i], w->words_bytes, cudaHostAllocMapped),
                 "words");
        memset(w->words[i], 0, w->words_bytes);
        w->nic.words[i] = (char *)w->words[i];
        w->nic.data[i] = shape->is_staged ? (char *)w->words[i] : w->near + i * w->stride;
    }
    far_must((int)cudaStreamCreateWithFlags(&w->nic_stream, cudaStreamNonBlocking), "stream");
    pthread_barrier_init(&w->barrier, NULL, w->num_ranks);
}

uint64_t far_world_run(const struct far_shape *shape, far_rank_fn fn, void *ctx)
{
    struct far_world *w = calloc(1, sizeof *w);
    pthread_t threads[FAR_MOST_RANKS];
    uint64_t wrong = 0;
    far_must(nep_cuda_far_load() != NEP_OK, nep_last_message());
    make_world(w, shape);
    w->fn = fn;
    w->ctx = ctx;
    for (uint32_t i = 0; i < w->num_ranks; i++) {
        far_must(pthread_create(&threads[i], NULL, run_rank, w->ranks[i]), "thread");
    }
    for (uint32_t i = 0; i < w->num_ranks; i++) {
        pthread_join(threads[i], NULL);
        wrong += w->ranks[i]->wrong;
        cudaFreeHost(w->words[i]);
        free(w->slots[i]);
        free(w->weights[i]);
        free(w->ranks[i]);
    }
    pthread_barrier_destroy(&w->barrier);
    cudaFree(w->near);
    cudaFreeHost(w->nic.queues);
    cudaStreamDestroy(w->nic_stream);
    free(w->factor);
    free(w);
    return wrong;
}
