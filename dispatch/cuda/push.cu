// SPDX-License-Identifier: Apache-2.0
/*
 * Push: a warp takes a row (or a part of one, where there are few), reads it once, casts it to fp8
 * if asked, and stores it to all its final places in the outputs of this node's ranks. The first
 * part also stores what goes beside a row and writes down, sorted by rank, which rows combine will
 * add up for this token: positions are known here and nowhere else as cheaply.
 *
 * Ranks whose outputs lie in memory that is not mapped pull their rows (pull.cu). For them a row is
 * stored once more, into the own staging area, unless it lies in mapped memory as it travels; so
 * are slots, indexes and weights, from which they find their rows.
 *
 * Plain 16-byte accesses, four in flight per thread. Rejected: bulk copies through shared memory,
 * at most 4 % faster in measurements, and not on sm_80; pulling by the receiver always, which reads
 * a row once per destination and was 5 to 44 % slower.
 *
 * It is long because both launches, with layout and without, share the moving of rows.
 */
#include "dispatch/cuda/device/layout.cuh"
#include "dispatch/cuda/device/number.cuh"
#include "dispatch/cuda/device/place.cuh"
#include "dispatch/cuda/device/rows.cuh"

namespace
{

enum { PUSH_THREADS = 1024 };

/* A push of so few pairs does layout's work itself, every block for itself: its own launch would
 * take longer. */
enum { ALONE_PAIRS = 1024 };

struct push_args {
    struct nep_cuda_group group;
    struct nep_cuda_routing routing;
    struct nep_place_args place;
    struct nep_cuda_output out;
    struct nep_cuda_staging staging;
    struct nep_wire wire;
    const char *x;
    const char *scales;
    const float *weights; /* [T][K]; NULL: 1 */
    uint32_t num_tokens;
    uint32_t parts;
    uint32_t units; /* 16-byte pieces of a payload row */
    uint32_t slots_per_rank;
    uint32_t top_k;
    uint32_t num_buckets;
    unsigned flags;
    bool is_rank_layout;
    bool is_cast;
    bool is_lent; /* rows lie in mapped memory: pulled from there */
};

struct warp_item {
    uint32_t token;
    uint32_t part;
    uint32_t slot; /* as loaded ahead */
    uint32_t index;
};

/* What a block knows about its operation, in shared memory: registers are for rows. */
struct block {
    struct nep_places places[NEP_CUDA_MAX_RANKS];
    uint64_t totals[NEP_CUDA_MAX_RANKS];
    bool is_short; /* an output is too small */
    /* staging areas of this operation; rows NULL: those who pull do it elsewhere */
    bool is_pulled; /* somebody pulls */
    char *rows;
    char *scales;
    uint64_t pairs; /* offset of this operation's [M][K] tables, in entries */
};

/* The same with what layout needs. */
struct alone_args {
    push_args push;
    layout_args layout;
};

__device__ __forceinline__ warp_item item_at(const push_args &a, const layout_tables &tables,
                                             uint64_t item)
{
    warp_item w;
    w.token = (uint32_t)(item / a.parts);
    w.part = (uint32_t)(item - (uint64_t)w.token * a.parts);
    w.slot = NEP_SLOT_NONE;
    w.index = 0;
    uint32_t lane = threadIdx.x % 32;
    if (w.token < a.num_tokens && lane < a.top_k) {
        uint64_t at = (uint64_t)w.token * a.top_k + lane;
        w.slot = tables.slots[at];
        w.index = tables.index[at];
    }
    return w;
}

/* The token's addends in the order of the tree: ranks ascending, k ascending inside. */
__device__ void store_terms(const push_args &a, const warp_item &w, const nep_target &t,
                            uint32_t rows, float weight)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t order = 0;
    bool is_last = true;
    for (uint32_t m = rows; m != 0; m &= m - 1) {
        uint32_t other = __ffs(m) - 1;
        uint32_t rank = __shfl_sync(0xffffffffu, t.rank, other);
        order += rank < t.rank || (rank == t.rank && other < lane);
        is_last = is_last && (rank != t.rank || other <= lane);
    }
    if (t.has_row) {
        bool is_end = order == __popc(rows) - 1;
        struct nep_cuda_term term;
        term.pos = t.pos;
        term.rank = (uint16_t)t.rank;
        term.ends = (uint16_t)(is_end    ? NEP_ENDS_NODE | NEP_ENDS_RANK
                               : is_last ? NEP_ENDS_RANK
                                         : 0);
        term.weight = a.is_rank_layout ? 1.0f : weight;
        term.k = lane;
        a.routing.terms[(uint64_t)w.token * a.top_k + order] = term;
    }
    if (lane == 0) {
        a.routing.num_terms[w.token] = __popc(rows);
    }
}

/* What peers find their rows by. */
__device__ __forceinline__ void stage_pairs(const push_args &a, const warp_item &w, const block &b,
                                            float weight)
{
    uint32_t lane = threadIdx.x % 32;
    if (!b.is_pulled || lane >= a.top_k) {
        return;
    }
    char *window = nep_window(a.group, a.group.rank);
    uint64_t at = b.pairs + (uint64_t)w.token * a.top_k + lane;
    ((uint32_t *)(window + a.staging.slots))[at] = w.slot;
    ((uint32_t *)(window + a.staging.index))[at] = w.index;
    ((float *)(window + a.staging.weights))[at] = weight;
}

/* Terms and what lies beside rows, by different parts where there are several. */
template <bool kCast>
__device__ __forceinline__ void
push_beside(const push_args &a, const warp_item &w, const nep_target &t, uint32_t all,
            uint32_t rows, const nep_rows_args &rows_args, const block &b, char *more_scales)
{
    uint32_t lane = threadIdx.x % 32;
    bool is_second = w.part == (a.parts > 1 ? 1 : 0);
    if (w.part != 0 && !is_second) {
        return;
    }
    float weight = 1.0f;
    if (lane < a.top_k && a.weights != nullptr) {
        weight = a.weights[(uint64_t)w.token * a.top_k + lane];
    }
    if (w.part == 0) {
        store_terms(a, w, t, all, weight);
        if (!kCast && a.scales != nullptr) {
            nep_copy_scales(
                a.scales + (uint64_t)w.token * a.wire.scale_bytes,
                [&](uint32_t l) { return nep_target_scales(rows_args, t, l); }, rows, more_scales,
                a.wire.scale_bytes);
        }
    }
    if (is_second) {
        nep_store_beside(rows_args, w.token, t, rows, weight);
        stage_pairs(a, w, b, weight);
    }
}

/* Pieces of a row that a part has. Cast: blocks of one scale stay together. */
template <bool kCast> __device__ __forceinline__ uint32_t part_units(const push_args &a)
{
    uint32_t units = (a.units + a.parts - 1) / a.parts;
    return kCast ? (units + 7) / 8 * 8 : units;
}

template <bool kCast>
__device__ __forceinline__ void push_item(const push_args &a, const warp_item &w,
                                          const uint32_t *first_rows,
                                          const nep_rows_args &rows_args, const block &b)
{
    nep_target t = nep_find_target(rows_args, w.slot, w.index, first_rows);
    uint32_t all = __ballot_sync(0xffffffffu, t.has_row);
    uint32_t rows = __ballot_sync(0xffffffffu, t.has_row && t.row != nullptr);
    char *more = nullptr;
    char *more_scales = nullptr;
    if (rows != all && b.rows != nullptr) {
        more = b.rows + (uint64_t)w.token * a.wire.payload_bytes;
        more_scales =
            a.wire.scale_bytes != 0 ? b.scales + (uint64_t)w.token * a.wire.scale_bytes : nullptr;
    }
    push_beside<kCast>(a, w, t, all, rows, rows_args, b, more_scales);
    if (rows == 0 && more == nullptr) {
        return;
    }
    uint32_t per_part = part_units<kCast>(a);
    uint32_t begin = min(a.units, w.part * per_part);
    uint32_t end = min(a.units, begin + per_part);
    const char *from = a.x + (uint64_t)w.token * (kCast ? a.wire.in_bytes : a.wire.payload_bytes);
    if constexpr (kCast) {
        nep_cast_row(
            a.wire, from, t.row, [&](uint32_t l) { return nep_target_scales(rows_args, t, l); },
            rows, more, more_scales, begin, end);
    } else {
        nep_copy_row(from, t.row, rows, more, begin, end);
    }
}

/* Waits for COUNTS and for outputs at once: by different threads. */
__device__ __forceinline__ bool wait_for_all(const push_args &a, bool is_begun, uint64_t op)
{
    uint32_t half = threadIdx.x / NEP_CUDA_MAX_RANKS;
    uint32_t rank = threadIdx.x % NEP_CUDA_MAX_RANKS;
    bool is_there = is_begun;
    if (is_begun && rank < a.group.num_ranks && half == 0 &&
        (a.flags & NEP_CUDA_PUSH_PLACES) != 0) {
        is_there = nep_wait_word(a.group,
                                 nep_word_at(a.group, a.group.rank, a.group.words.counts, op, rank),
                                 op, NEP_CUDA_PHASE_COUNTS, rank);
    } else if (is_begun && rank < a.group.num_ranks && half == 1) {
        is_there = nep_wait_word(a.group,
                                 nep_word_at(a.group, a.group.rank, a.group.words.bound, op, rank),
                                 op, NEP_CUDA_PHASE_BOUND, rank);
    }
    return __syncthreads_and(is_there) != 0;
}

/* By the block: outputs of all ranks, and where rows are staged. */
__device__ __forceinline__ void find_places(const push_args &a, uint64_t op, block &b)
{
    /* The last threads: the first ones' warps work out positions meanwhile. */
    uint32_t r = blockDim.x - 1 - threadIdx.x;
    if (r < a.group.num_ranks) {
        b.places[r] = r == a.group.rank ? nep_own_places(a.out) : nep_places_at(a.group, op, r);
    }
    if (threadIdx.x == 0) {
        uint64_t slot = op % a.staging.depth;
        uint64_t row = slot * a.place.max_tokens;
        char *window = nep_window(a.group, a.group.rank);
        b.is_short = b.is_pulled = false;
        b.pairs = row * a.top_k;
        b.rows = a.is_lent ? nullptr : window + a.staging.x + row * a.wire.payload_bytes;
        b.scales = window + a.staging.scales + slot * a.staging.scales_stride;
    }
}

/* By all threads of a block, before rows move: positions, outputs, staging. False: give up. */
__device__ __forceinline__ bool prepare(const push_args &a, bool is_begun, uint64_t op,
                                        uint32_t *first_rows, block &b)
{
    uint32_t num_ranks = a.group.num_ranks;
    bool agrees = true;
    if (is_begun && (a.flags & NEP_CUDA_PUSH_BINDS) != 0 && blockIdx.x == 0) {
        nep_bind_all(a.group, a.out, op);
    }
    if (!wait_for_all(a, is_begun, op)) {
        return false;
    }
    find_places(a, op, b);
    if ((a.flags & NEP_CUDA_PUSH_PLACES) != 0) {
        agrees = nep_place_first({a.group, a.routing, a.place, op, first_rows, b.totals});
    } else {
        for (uint32_t i = threadIdx.x; i < a.num_buckets; i += blockDim.x) {
            first_rows[i] = a.routing.first[i];
        }
        for (uint32_t r = threadIdx.x; r < num_ranks; r += blockDim.x) {
            b.totals[r] = a.routing.totals[r];
        }
    }
    if (!__syncthreads_and(agrees)) {
        return false;
    }
    if (threadIdx.x < num_ranks) {
        uint32_t r = threadIdx.x;
        if (b.places[r].x == nullptr && b.totals[r] != 0) {
            b.is_pulled = true;
        }
        if (b.totals[r] > b.places[r].capacity) {
            nep_give_up(a.group, op, NEP_CUDA_STATUS(NEP_CUDA_OVERFLOW, NEP_CUDA_PHASE_BOUND, r));
            b.is_short = true;
        }
    }
    __syncthreads();
    return !b.is_short;
}

/* The row that a warp moves first, into the cache: the memory has nothing else to do while counts
 * are worked out and ranks wait for each other. */
template <bool kCast> __device__ __forceinline__ void prefetch_first(const push_args &a)
{
    const uint32_t kLine = 128;
    uint64_t item = (uint64_t)(threadIdx.x / 32) * gridDim.x + blockIdx.x;
    uint32_t token = (uint32_t)(item / a.parts);
    if (token >= a.num_tokens) {
        return;
    }
    uint32_t row_bytes = kCast ? a.wire.in_bytes : a.wire.payload_bytes;
    uint32_t part_bytes = part_units<kCast>(a) * (row_bytes / a.units);
    uint32_t begin = min(row_bytes, (uint32_t)(item % a.parts) * part_bytes);
    uint32_t end = min(row_bytes, begin + part_bytes);
    const char *row = a.x + (uint64_t)token * row_bytes;
    for (uint32_t at = begin + threadIdx.x % 32 * kLine; at < end; at += 32 * kLine) {
        nep_prefetch(row + at);
    }
}

/* From where positions can be worked out to the end. */
template <bool kCast>
__device__ __forceinline__ void push_rows(const push_args &a, const layout_tables &tables,
                                          bool is_begun, bool is_beginner, uint64_t op,
                                          uint32_t *first_rows, block &b)
{
    /* Rows go round the blocks first: a few tokens then keep every SM busy. */
    uint64_t stride = (uint64_t)gridDim.x * (blockDim.x / 32);
    uint64_t num_items = (uint64_t)a.num_tokens * a.parts;
    uint64_t item = (uint64_t)(threadIdx.x / 32) * gridDim.x + blockIdx.x;
    warp_item next = item_at(a, tables, item); /* while others are waited for */
    if (!prepare(a, is_begun, op, first_rows, b)) {
        return;
    }
    const nep_rows_args rows_args = {b.places, a.group.rank, a.slots_per_rank,
                                     a.top_k,  a.wire,       a.is_rank_layout};
    for (; item < num_items; item += stride) {
        warp_item now = next;
        next = item_at(a, tables, item + stride);
        push_item<kCast>(a, now, first_rows, rows_args, b);
    }
    uint32_t ticket = nep_arrive(a.routing.cell);
    if (ticket == 0 && (a.flags & NEP_CUDA_PUSH_PLACES) != 0) {
        /* By the block that has nothing else to do, while the others end. */
        nep_place_received({a.group, a.routing, a.place, op, first_rows, b.totals});
    }
    if (ticket != gridDim.x - 1) {
        return;
    }
    nep_tell_all(a.group, a.group.words.pushed, op);
    if (is_beginner && threadIdx.x == 0) {
        nep_begun(a.group, a.routing.cell, op);
    }
    if ((a.flags & NEP_CUDA_PUSH_WAITS) != 0) {
        nep_wait_all(a.group, a.group.words.pushed, op, NEP_CUDA_PHASE_PUSHED);
    }
}

template <bool kCast>
__global__ void __launch_bounds__(PUSH_THREADS, 1) push_kernel(const __grid_constant__ push_args a)
{
    extern __shared__ uint32_t first_rows[];
    __shared__ block b;
    uint64_t op = 0;
    nep_wait_for_previous();
    prefetch_first<kCast>(a);
    bool is_begun = nep_begin(a.group, a.routing.cell, &op);
    push_rows<kCast>(a, {a.routing.slots, a.routing.index, true}, is_begun, false, op, first_rows,
                     b);
}

/* Layout and push in one launch. Every block finds all slots and indexes in its own shared memory;
 * the first one sends COUNTS and keeps what outlives the launch. */
template <bool kCast>
__global__ void __launch_bounds__(PUSH_THREADS, 1)
    alone_kernel(const __grid_constant__ alone_args args)
{
    extern __shared__ uint32_t first_rows[];
    __shared__ block b;
    const push_args &a = args.push;
    uint32_t pairs = a.num_tokens * a.top_k;
    const layout_tables tables = {first_rows + a.num_buckets,
                                  first_rows + a.num_buckets + ALONE_PAIRS, true};
    uint64_t op = 0;
    prefetch_ids(args.layout);
    bool is_begun = nep_begin_next(a.group, &op);
    is_begun = fill_slots(args.layout, tables, op) && is_begun;
    if (!__syncthreads_and(is_begun)) {
        return;
    }
    /* Not before, when what layout needs would stand in line behind rows; the block that sends
     * COUNTS does it after that. */
    if (blockIdx.x != 0) {
        prefetch_first<kCast>(a);
    }
    layout_block(args.layout, tables, op, 0, tables.index + ALONE_PAIRS, 0, 1, blockIdx.x == 0);
    if (!__syncthreads_and(!nep_is_stuck(a.group))) {
        return;
    }
    if (blockIdx.x == 0) {
        prefetch_first<kCast>(a);
    }
    for (uint32_t i = threadIdx.x; blockIdx.x == 0 && i < pairs; i += blockDim.x) {
        a.routing.slots[i] = tables.slots[i];
        a.routing.index[i] = tables.index[i];
    }
    push_rows<kCast>(a, tables, true, true, op, first_rows, b);
}

/* What ends a dispatch whose push did not wait. */
__global__ void await_kernel(const __grid_constant__ struct nep_cuda_group group,
                             const struct nep_cuda_cell *cell)
{
    uint64_t op = 0;
    if (nep_begin(group, cell, &op)) {
        nep_wait_all(group, group.words.pushed, op, NEP_CUDA_PHASE_PUSHED);
    }
}

} // namespace

enum nep_status nep_cuda_load_push(void)
{
    enum nep_status status = nep_cuda_load_kernel((const void *)await_kernel, "await");
    if (status == NEP_OK) {
        status = nep_cuda_load_kernel((const void *)push_kernel<true>, "push with a cast");
    }
    if (status == NEP_OK) {
        status = nep_cuda_load_kernel((const void *)push_kernel<false>, "push");
    }
    if (status == NEP_OK) {
        status = nep_cuda_load_kernel((const void *)alone_kernel<true>, "push of few with a cast");
    }
    return status == NEP_OK ? nep_cuda_load_kernel((const void *)alone_kernel<false>, "push of few")
                            : status;
}

/* Fills args; refuses rows that are not aligned. */
static enum nep_status fill(const struct nep_cuda_dispatch *dispatch, unsigned flags,
                            push_args *args_p)
{
    const struct nep_cuda_shape *shape = dispatch->shape;
    const struct nep_cuda_input *in = dispatch->in;
    const struct nep_wire *wire = &shape->wire;
    if (wire->payload_bytes % 16 != 0 ||
        ((uintptr_t)in->x | (uintptr_t)dispatch->out->x) % 16 != 0) {
        return nep_fail(NEP_ERR_INVALID,
                        "rows of %u bytes at %p to %p: all must be multiples of 16 on a GPU",
                        wire->payload_bytes, in->x, (void *)dispatch->out->x);
    }
    push_args args = {};
    args.weights = dispatch->routing->weights;
    args.group = *dispatch->group;
    args.routing = *dispatch->routing;
    args.place = nep_place_args_of(dispatch);
    args.out = *dispatch->out;
    args.staging = shape->staging;
    args.wire = *wire;
    args.x = (const char *)in->x;
    args.scales = (const char *)in->scales;
    args.num_tokens = in->num_tokens;
    args.units = wire->payload_bytes / 16;
    args.is_cast = wire->type != wire->dtype && in->scales == nullptr;
    args.is_lent = in->x_offset != NEP_CUDA_NONE;
    args.parts = nep_cuda_row_parts(dispatch->geometry, in->num_tokens, args.units,
                                    args.is_cast ? 32 : 32 * NEP_ROWS_FLIGHT);
    args.slots_per_rank = shape->slots_per_rank;
    args.top_k = shape->top_k;
    args.is_rank_layout = shape->layout == NEP_LAYOUT_RANK;
    args.num_buckets =
        dispatch->group->num_ranks * (args.is_rank_layout ? 1 : shape->slots_per_rank);
    args.flags = flags;
    *args_p = args;
    return NEP_OK;
}

/* Few rows: few warps, which are there sooner; enough to wait for all ranks at once. */
static uint32_t threads_for(const push_args &args, const struct nep_cuda_geometry *geometry)
{
    uint64_t warps =
        ((uint64_t)args.num_tokens * args.parts + geometry->blocks - 1) / geometry->blocks;
    return warps <= 8 ? 256 : PUSH_THREADS;
}

extern "C" enum nep_status nep_cuda_push(const struct nep_cuda_dispatch *dispatch, unsigned flags,
                                         struct CUstream_st *stream)
{
    push_args args;
    enum nep_status status = fill(dispatch, flags, &args);
    if (status != NEP_OK) {
        return status;
    }
    auto kernel = args.is_cast ? push_kernel<true> : push_kernel<false>;
    return nep_cuda_check(nep_cuda_launch_early<push_args>(kernel, args, *dispatch->geometry,
                                                           threads_for(args, dispatch->geometry),
                                                           stream),
                          "launch of push");
}

extern "C" int nep_cuda_is_few(const struct nep_cuda_dispatch *dispatch)
{
    const struct nep_cuda_shape *shape = dispatch->shape;
    uint64_t ranks = dispatch->group->num_ranks;
    uint64_t slots = ranks * shape->slots_per_rank;
    uint64_t buckets = shape->layout == NEP_LAYOUT_RANK ? ranks : slots;
    uint64_t words =
        buckets + 2 * ALONE_PAIRS + ranks + shape->num_nodes + slots + PUSH_THREADS / 32 * buckets;
    return shape->num_nodes == 1 &&
           (uint64_t)dispatch->in->num_tokens * shape->top_k <= ALONE_PAIRS &&
           words * 4 <= dispatch->geometry->shared_bytes;
}

extern "C" enum nep_status nep_cuda_push_few(const struct nep_cuda_dispatch *dispatch,
                                             unsigned flags, struct CUstream_st *stream)
{
    alone_args args = {};
    enum nep_status status = fill(dispatch, flags | NEP_CUDA_PUSH_PLACES, &args.push);
    if (status != NEP_OK) {
        return status;
    }
    const struct nep_cuda_geometry *geometry = dispatch->geometry;
    args.layout = layout_args_of(dispatch);
    if (dispatch->in->ids != nullptr || dispatch->in->weight != nullptr) {
        args.push.weights = dispatch->in->weight; /* those held are still being written */
    }
    auto kernel = args.push.is_cast ? alone_kernel<true> : alone_kernel<false>;
    kernel<<<geometry->blocks, threads_for(args.push, geometry), geometry->shared_bytes, stream>>>(
        args);
    return nep_cuda_check(cudaGetLastError(), "launch of a push of few");
}

extern "C" enum nep_status nep_cuda_await(const struct nep_cuda_dispatch *dispatch,
                                          struct CUstream_st *stream)
{
    await_kernel<<<1, NEP_CUDA_MAX_RANKS, dispatch->geometry->shared_bytes, stream>>>(
        *dispatch->group, dispatch->routing->cell);
    return nep_cuda_check(cudaGetLastError(), "launch of await");
}
