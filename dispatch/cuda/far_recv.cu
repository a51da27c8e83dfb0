// SPDX-License-Identifier: Apache-2.0
/*
 * Receive: own rows go once to their final places in the outputs of this node; rows of other nodes
 * are read where they landed, by each rank that needs them, and stored once. Nobody forwards.
 *
 * Tiles of an operation go in rounds, every stream's tile t in round t, in packing and in reading:
 * so a tile waits for credits of earlier rounds alone, and all ranks together never wait in a ring.
 */
#include "dispatch/cuda/device/far_counts.cuh"
#include "dispatch/cuda/device/far_rows.cuh"

using namespace far_rows;

namespace
{

template <bool kScales>
__device__ void push_home(const dispatch_args &a, const tables &t, const role &r)
{
    const struct nep_far &far = a.far;
    bool is_rank = far.shape.layout == NEP_LAYOUT_RANK;
    uint32_t buckets = far.node_size * (is_rank ? 1 : far.shape.slots_per_rank);
    const uint32_t *first = a.routing.first + far.rank * buckets;
    uint32_t lane = threadIdx.x % 32;
    uint32_t top_k = far.shape.top_k;
    uint32_t per_rank = far.shape.slots_per_rank;
    uint64_t stride = (uint64_t)r.num * (THREADS / 32);
    uint64_t num = (uint64_t)a.num_tokens * a.own_parts;
    for (uint64_t i = threadIdx.x / 32 * r.num + r.block; i < num; i += stride) {
        uint32_t token = (uint32_t)(i / a.own_parts);
        uint32_t part = (uint32_t)(i % a.own_parts);
        uint64_t at = (uint64_t)token * top_k + lane;
        uint32_t slot = lane < top_k ? a.slots[at] : NEP_SLOT_NONE;
        bool is_used = slot != NEP_SLOT_NONE && t.node_of_rank[slot / per_rank] == far.node;
        uint32_t on_node =
            is_used ? t.local_of_rank[slot / per_rank] * per_rank + slot % per_rank : 0;
        float weight = is_used && a.weight != nullptr ? a.weight[at] : 1.0f;
        pair p = make_pair(a, first, is_used, on_node, is_used ? a.index[at] : 0, weight);
        nep_far_place place = place_of(a, t, p, true);
        if (part == 0) {
            store_terms(a, p, a.routing.home_terms + (uint64_t)token * top_k,
                        a.routing.home_num + token);
            store_beside(a, t, p, place, far.rank, token);
        }
        if (__any_sync(0xffffffffu, place.has_row)) {
            move_input<kScales>(a, t, token, place, {p.g, p.pos, nullptr}, part, a.own_parts);
        }
    }
}

/* A round: the tiles t of all sources. In shared memory. */
struct tiles {
    const char *tile[NEP_FAR_MAX_RANKS];
    uint32_t rows[NEP_FAR_MAX_RANKS]; /* 0: this source has no such tile */
    uint32_t begin[NEP_FAR_MAX_RANKS + 1];
};

/* This rank's copy of a row that landed; the landing rank also writes down what combine adds up. */
template <bool kScales>
__device__ void pull_row(const dispatch_args &a, const tables &t, uint32_t source,
                         uint32_t first_row, uint32_t row, uint32_t num, uint32_t part,
                         const char *tile)
{
    const struct nep_far &far = a.far;
    const struct nep_wire &wire = far.shape.wire;
    bool is_rank = far.shape.layout == NEP_LAYOUT_RANK;
    uint32_t top_k = far.shape.top_k;
    uint32_t buckets = far.node_size * (is_rank ? 1 : far.shape.slots_per_rank);
    const char *meta = tile + sizeof(struct nep_tile_msg) + (uint64_t)row * far.meta_bytes;
    const uint16_t *slots = (const uint16_t *)(meta + 4);
    const float *weights = (const float *)(meta + 4 + (top_k + 1) / 2 * 4);
    const uint32_t *index = (const uint32_t *)(weights + top_k);
    uint32_t lane = threadIdx.x % 32;
    bool is_k = lane < top_k;
    uint32_t slot = is_k ? slots[lane] : 0xffff;
    pair p = make_pair(a, a.routing.first + source * buckets, slot != 0xffff, slot,
                       is_k ? index[lane] : 0, is_k ? weights[lane] : 0.0f);
    nep_far_place place = place_of(a, t, p, p.g == far.local);
    if (part == 0) {
        if (nep_far_landing(far, source, far.node) == far.rank) {
            uint64_t at = (uint64_t)nep_far_lane(far, source, far.node) * far.shape.max_tokens +
                          first_row + row;
            store_terms(a, p, a.routing.far_terms + at * top_k, a.routing.far_num + at);
        }
        store_beside(a, t, p, place, source, *(const uint32_t *)meta);
    }
    uint32_t rows = __ballot_sync(0xffffffffu, place.has_row);
    if (rows == 0) {
        return;
    }
    const char *from = tile + nep_far_payload(far, num) + (uint64_t)row * wire.row_bytes;
    nep_copy_row(from, place.row, rows, nullptr, part_begin(a, part, a.tile_parts),
                 part_begin(a, part + 1, a.tile_parts));
    if (kScales && part == 0 && wire.scale_bytes != 0) {
        copy_scales(a, t, from + wire.payload_bytes, {p.g, p.pos, nullptr}, rows);
    }
}

/* By one thread: waits for tile t of a source, and notes where it lies. False: gave up. */
__device__ bool find_tile(const dispatch_args &a, const role &r, uint64_t op, uint32_t source,
                          uint32_t t, tiles &round)
{
    const struct nep_far &far = a.far;
    const struct nep_far_in in = a.routing.in[source];
    uint32_t landing = nep_far_landing(far, source, far.node);
    uint32_t local = far.local_of_rank[landing];
    const struct nep_region &region = far.regions[landing];
    uint64_t number = in.first_tile + t;
    uint64_t idx =
        (uint64_t)nep_far_lane(far, source, far.node) * far.window + nep_far_slot(far, number);
    /* Acquire: pairs with the release in raise() of the sink. */
    if (!nep_far_wait_relayed(
            far, r.block == 0, nep_far_word(far, local, region.dispatch_word, idx),
            &far.state->tile_seen[source], number + 1, NEP_FAR_PHASE_TILE, source)) {
        return false;
    }
    const char *tile = far.data[local] + region.dispatch_landing + idx * region.dispatch_tile_bytes;
    const struct nep_tile_msg *msg = (const struct nep_tile_msg *)tile;
    uint32_t num = min(far.tile_rows, in.rows - t * far.tile_rows);
    if (msg->op != op || msg->number != number || msg->source != source || msg->num_rows != num) {
        nep_far_give_up(far, NEP_CUDA_STATUS(NEP_CUDA_DISAGREE, NEP_FAR_PHASE_TILE, source));
        return false;
    }
    round.tile[source] = tile;
    round.rows[source] = num;
    return true;
}

/* By a block: a warp per source waits. Returns the rows of the round, or UINT32_MAX: gave up. */
__device__ uint32_t find_round(const dispatch_args &a, const role &r, uint64_t op, uint32_t t,
                               tiles &round)
{
    bool is_there = true;
    for (uint32_t s = threadIdx.x / 32; s < a.far.num_ranks; s += THREADS / 32) {
        if (threadIdx.x % 32 == 0) {
            round.rows[s] = 0;
            is_there = is_there && (t >= a.routing.in[s].tiles || find_tile(a, r, op, s, t, round));
        }
    }
    if (__syncthreads_and(is_there) == 0) {
        return UINT32_MAX;
    }
    if (threadIdx.x == 0) {
        uint32_t rows = 0;
        for (uint32_t s = 0; s < a.far.num_ranks; s++) {
            round.begin[s] = rows;
            rows += round.rows[s];
        }
        round.begin[a.far.num_ranks] = rows;
        if (r.block == 0 && rows != 0) {
            nep_far_stamp(a.far, NEP_FAR_AT_TILE_HERE);
        }
    }
    __syncthreads();
    return round.begin[a.far.num_ranks];
}

/* By a block: the most tiles that a source has in this operation. */
__device__ uint32_t count_rounds(const dispatch_args &a)
{
    __shared__ uint32_t most;
    if (threadIdx.x < 32) {
        uint32_t tiles = 0;
        for (uint32_t s = threadIdx.x; s < a.far.num_ranks; s += 32) {
            tiles = max(tiles, a.routing.in[s].tiles);
        }
        tiles = __reduce_max_sync(0xffffffffu, tiles);
        if (threadIdx.x == 0) {
            most = tiles;
        }
    }
    __syncthreads();
    return most;
}

/* By a block: the tiles of round t have been read by this rank. */
__device__ void release_round(const dispatch_args &a, const tiles &round, uint32_t t)
{
    const struct nep_far &far = a.far;
    /* The last threads: the first ones tell the node. */
    uint32_t s = blockDim.x - 1 - threadIdx.x;
    if (s < far.num_ranks && round.rows[s] != 0) {
        /* Release: read; pairs with the acquire in the proxy's duty. */
        nep_st_release_sys(nep_far_word(far, far.local, far.own.dispatch_read, s),
                           a.routing.in[s].first_tile + t + 1);
    }
}

/* All rounds. Where nobody packs meanwhile, the last one is left to finish(): blocks then arrive
 * once in place of twice. False: gave up. */
template <bool kScales>
__device__ bool read_all(const dispatch_args &a, const tables &tab, const role &r, uint64_t op,
                         uint32_t rounds, tiles &round)
{
    const struct nep_far &far = a.far;
    for (uint32_t t = 0; t < rounds; t++) {
        uint32_t rows = find_round(a, r, op, t, round);
        if (rows == UINT32_MAX) {
            return false;
        }
        uint32_t stride = r.num * (THREADS / 32);
        uint32_t source = 0;
        for (uint32_t i = threadIdx.x / 32 * r.num + r.block; i < rows * a.tile_parts;
             i += stride) {
            uint32_t row = i / a.tile_parts;
            while (row >= round.begin[source + 1]) {
                source++;
            }
            pull_row<kScales>(a, tab, source, t * far.tile_rows, row - round.begin[source],
                              round.rows[source], i % a.tile_parts, round.tile[source]);
        }
        if (t + 1 == rounds && a.pack_blocks == 0) {
            break;
        }
        if (nep_far_is_last(&far.state->read[nep_far_slot(far, t)], r.num)) {
            release_round(a, round, t);
        }
        __syncthreads(); /* `round` is filled in again */
    }
    return true;
}

/* By the last block: all of this rank is done; waits for the node, and ends the operation. */
__device__ void finish(const dispatch_args &a, uint64_t op, uint32_t rounds, const tiles &round)
{
    const struct nep_far &far = a.far;
    nep_near_tell(far, op + 1);
    if (rounds != 0 && a.pack_blocks == 0) {
        release_round(a, round, rounds - 1);
    }
    if (!nep_near_met(far, op + 1, NEP_CUDA_PHASE_PUSHED)) {
        return;
    }
    for (uint32_t n = threadIdx.x; n < far.num_nodes; n += blockDim.x) {
        if (n != far.node) {
            nep_far_stream_end(far, a.is_whole, op, &far.state->next_tile[n],
                               nep_far_skip(far.node, n),
                               nep_far_tiles(far, a.routing.node_rows[n]));
        }
    }
    if (threadIdx.x == 0) {
        far.state->run.op = op + 1;
        far.state->begun = a.is_whole ? op + 1 : far.state->begun;
        /* Release: pairs with the sink's acquire: its window of numbers moves on. */
        nep_st_release_sys(far.completed, op + 1);
        nep_far_stamp(far, NEP_FAR_AT_MET);
    }
}

/* By all blocks, when positions are known. tab: load_tables. */
template <bool kScales> __device__ void receive(const dispatch_args &a, tables &tab, uint64_t op)
{
    const struct nep_far &far = a.far;
    if (a.is_binding && blockIdx.x == 0 && threadIdx.x == 0) {
        nep_far_bind_own(far, far.own.out_bind, a.out, op);
    }
    if (!load_binds(a, op, tab)) {
        return;
    }
    if (threadIdx.x == 0 && blockIdx.x == 0) {
        nep_far_stamp(far, NEP_FAR_AT_RECV);
    }
    __syncthreads();
    bool is_done = true;
    __shared__ tiles round;
    uint32_t rounds = count_rounds(a);
    if (blockIdx.x < a.pack_blocks) {
        role r = {blockIdx.x, a.pack_blocks};
        is_done = pack<kScales>(a, tab, r, op, true);
    } else {
        role r = {blockIdx.x - a.pack_blocks, gridDim.x - a.pack_blocks};
        push_home<kScales>(a, tab, r);
        if (r.block == 0 && threadIdx.x == 0) {
            nep_far_stamp(far, NEP_FAR_AT_PUSHED);
        }
        is_done = read_all<kScales>(a, tab, r, op, rounds, round);
        if (r.block == 0 && threadIdx.x == 0) {
            nep_far_stamp(far, NEP_FAR_AT_READ);
        }
    }
    if (!is_done) {
        return; /* recorded: nobody counts on this block */
    }
    if (nep_far_is_last(&far.state->arrived, gridDim.x)) {
        finish(a, op, rounds, round);
    }
}

template <bool kScales>
__global__ void __launch_bounds__(THREADS, 1) recv_kernel(const __grid_constant__ dispatch_args a)
{
    __shared__ tables tab;
    if (nep_ld_relaxed_gpu(&a.far.state->run.status) != 0) {
        return;
    }
    load_tables(a.far, tab);
    receive<kScales>(a, tab, nep_ld_relaxed_gpu(&a.far.state->run.op));
}

struct whole_args {
    dispatch_args rows;
    far_counts::counts_args counts;
    far_counts::place_args place;
};

/* By a block: until positions are there, which the own node's block works out. */
__device__ bool wait_placed(const struct nep_far &far, uint64_t op)
{
    bool is_there =
        threadIdx.x != 0 || nep_near_wait(far, &far.state->placed, op + 1, NEP_CUDA_PHASE_COUNTS,
                                          far.rank, 2 * far.timeout_ns);
    return __syncthreads_and(is_there) != 0;
}

/* By a block: until the lists of all nodes are there, which a block each makes. */
__device__ bool wait_listed(const struct nep_far &far, uint64_t op)
{
    bool is_there = true;
    for (uint32_t n = threadIdx.x; n < far.num_nodes; n += blockDim.x) {
        is_there =
            n == far.node || nep_near_wait(far, &far.state->listed[n], op + 1,
                                           NEP_CUDA_PHASE_LAYOUT, far.rank, 2 * far.timeout_ns);
    }
    return __syncthreads_and(is_there) != 0;
}

/*
 * By one block, before it waits for lists: one look across PCIe at every credit, and at what is
 * complete of tiles and COUNTS. What was there is then known near when it is asked for, which is
 * the rule.
 */
__device__ void look_ahead(const struct nep_far &far)
{
    uint32_t n = threadIdx.x / 32;
    uint32_t what = threadIdx.x % 32;
    if (what > 2 || n >= far.num_nodes || n == far.node) {
        return;
    }
    uint32_t ring = nep_far_skip(far.node, n);
    uint32_t control = far.control[far.rank * far.num_ranks + nep_far_landing(far, far.rank, n)];
    const uint64_t *word = what == 0   ? nep_far_word(far, far.local, far.own.dispatch_credit, n)
                           : what == 1 ? &far.page->tiles_free[ring]
                                       : &far.page->counts_free[control];
    uint64_t *near = what == 0   ? &far.state->credit[n]
                     : what == 1 ? &far.state->slot[ring]
                                 : &far.state->counts_free[control];
    /* Acquire: pairs with raise() of the sink, and with the proxy's page; the raise hands it on. */
    nep_ring_raise_near(near, nep_ring_load(word));
}

/* Blocks that pack: where there are enough, not those that send COUNTS, who are late. */
__device__ __forceinline__ role find_packer(const struct nep_far &far, uint32_t placer)
{
    if (gridDim.x >= 2 * far.num_nodes) {
        uint32_t first = far.num_nodes;
        return {blockIdx.x - first, blockIdx.x < first ? 0 : gridDim.x - first};
    }
    return {blockIdx.x - (blockIdx.x > placer), blockIdx.x == placer ? 0 : gridDim.x - 1};
}

/*
 * A dispatch in one call, in one launch: a block per node sends COUNTS; the own node's block then
 * works out positions while the others pack. Launches of their own for that took as long as the
 * hand-overs to the fabric; one block for all of it took longer still.
 */
template <bool kScales>
__global__ void __launch_bounds__(THREADS, 1) whole_kernel(const __grid_constant__ whole_args a)
{
    extern __shared__ uint32_t totals[];
    __shared__ tables tab;
    const struct nep_far &far = a.rows.far;
    if (nep_ld_relaxed_gpu(&far.state->run.status) != 0) {
        if (blockIdx.x == 0 && threadIdx.x == 0) {
            nep_far_repeat(far);
        }
        return;
    }
    uint64_t op = nep_ld_relaxed_gpu(&far.state->run.op);
    load_tables(far, tab);
    __syncthreads();
    uint32_t placer = far.node % gridDim.x;
    if (blockIdx.x == placer && threadIdx.x == 0) {
        nep_far_stamp(far, NEP_FAR_AT_COUNTS);
    }
    role packer = find_packer(far, placer);
    if (packer.num != 0 && packer.block == packer.num - 1) {
        look_ahead(far);
    }
    far_counts::tell_nodes(a.counts, blockIdx.x, gridDim.x, op);
    if (blockIdx.x == placer) {
        if (!far_counts::place(a.place, op, totals)) {
            return;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            /* Release: pairs with the acquire in wait_placed. */
            nep_ring_raise_near(&far.state->placed, op + 1);
        }
        far_counts::count_local(a.counts);
    } else {
        bool is_packed = packer.num == 0 ||
                         (wait_listed(far, op) && pack<kScales>(a.rows, tab, packer, op, false));
        if (!is_packed || !wait_placed(far, op)) {
            return;
        }
    }
    receive<kScales>(a.rows, tab, op);
}

} // namespace

enum nep_status nep_cuda_load_far_recv(void)
{
    const void *const kernels[] = {
        (const void *)whole_kernel<true>, (const void *)whole_kernel<false>,
        (const void *)recv_kernel<true>, (const void *)recv_kernel<false>};
    enum nep_status status = NEP_OK;
    for (int i = 0; status == NEP_OK && i < 4; i++) {
        status = nep_cuda_load_kernel(kernels[i], i < 2 ? "far dispatch" : "far receive");
    }
    return status;
}

/* Refuses rows that are not aligned; the rest is pack's to refuse. */
static enum nep_status fill(const struct nep_far_dispatch *d, dispatch_args *args_p)
{
    if (d->out->x % 16 != 0) {
        return nep_fail(NEP_ERR_INVALID, "far receive: rows at offset %llu; a multiple of 16",
                        (unsigned long long)d->out->x);
    }
    *args_p = make_args(d);
    args_p->out = *d->out;
    return NEP_OK;
}

extern "C" enum nep_status nep_cuda_far_recv(const struct nep_far_dispatch *d, unsigned flags,
                                             struct CUstream_st *stream)
{
    dispatch_args args;
    enum nep_status status = fill(d, &args);
    if (status != NEP_OK) {
        return status;
    }
    args.is_binding = (flags & NEP_FAR_BINDS) != 0;
    auto kernel = has_scales(args) ? recv_kernel<true> : recv_kernel<false>;
    kernel<<<d->geometry->blocks, THREADS, d->geometry->shared_bytes, stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of far receive");
}

extern "C" enum nep_status nep_cuda_far_dispatch(const struct nep_far_dispatch *d,
                                                 struct CUstream_st *stream)
{
    whole_args args;
    enum nep_status status = nep_cuda_far_check(d);
    if (status == NEP_OK) {
        status = fill(d, &args.rows);
    }
    if (status != NEP_OK) {
        return status;
    }
    args.rows.is_whole = true;
    args.counts = far_counts::dispatch_counts(d, NEP_FAR_BINDS);
    args.place = far_counts::place_args_of(d);
    auto kernel = has_scales(args.rows) ? whole_kernel<true> : whole_kernel<false>;
    kernel<<<d->geometry->blocks, THREADS, far_counts::place_bytes(d->far, d->geometry), stream>>>(
        args);
    return nep_cuda_check(cudaGetLastError(), "launch of far dispatch");
}
