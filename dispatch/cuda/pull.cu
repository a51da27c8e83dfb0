// SPDX-License-Identifier: Apache-2.0
/*
 * Pull: the way of rows into an output that peers do not map. Every source has published its slots,
 * indexes and weights in its staging area, and its rows there or in mapped memory of its own. A
 * warp takes a token of a source, finds the pairs that are this rank's, and copies the row once to
 * all its places here. One copy at the source and one here, none in between.
 *
 * Rejected: lists of moves written by the source, which would take a table of worst-case size.
 */
#include "dispatch/cuda/device/launch.cuh"
#include "dispatch/cuda/device/rows.cuh"

namespace
{

enum { PULL_THREADS = 1024 };

struct pull_args {
    struct nep_cuda_group group;
    struct nep_cuda_routing routing;
    struct nep_cuda_output out;
    struct nep_cuda_staging staging;
    uint32_t max_tokens;
    uint32_t parts;
    uint32_t units;
    uint32_t slots_per_rank;
    uint32_t top_k;
    struct nep_wire wire;
    enum nep_layout layout;
};

/* What a source has for this operation. */
struct source {
    const char *rows;
    const char *scales;
    const uint32_t *slots;
    const uint32_t *index;
    const float *weights;
    uint32_t num_tokens;
};

__device__ __forceinline__ source source_at(const pull_args &a, uint64_t op, uint32_t rank)
{
    const struct nep_cuda_message *message = nep_message_at(a.group, a.group.rank, op, rank);
    const char *window = nep_window(a.group, rank);
    uint64_t slot = op % a.staging.depth;
    uint64_t pairs = slot * a.max_tokens * a.top_k;
    source s;
    s.num_tokens = (uint32_t)message->num_tokens;
    s.rows = window + (message->x_offset != NEP_CUDA_NONE
                           ? message->x_offset
                           : a.staging.x + slot * a.max_tokens * (uint64_t)a.wire.payload_bytes);
    s.scales = window + (message->x_offset != NEP_CUDA_NONE
                             ? message->scales_offset
                             : a.staging.scales + slot * a.staging.scales_stride);
    s.slots = (const uint32_t *)(window + a.staging.slots) + pairs;
    s.index = (const uint32_t *)(window + a.staging.index) + pairs;
    s.weights = (const float *)(window + a.staging.weights) + pairs;
    return s;
}

/*
 * Where the rows of every source begin in the buckets of this rank: [R] of this rank's only bucket,
 * or [R][L]. Both are used as if they were the source's own table of first rows.
 */
__device__ void find_first(const pull_args &a, uint64_t op, uint32_t *first)
{
    uint32_t num_ranks = a.group.num_ranks;
    uint32_t num = a.layout == NEP_LAYOUT_RANK ? 1 : a.slots_per_rank;
    for (uint32_t l = threadIdx.x; l < num; l += blockDim.x) {
        uint32_t at = a.layout == NEP_LAYOUT_RANK ? a.group.rank
                                                  : num_ranks + a.group.rank * a.slots_per_rank + l;
        uint32_t next = a.layout == NEP_LAYOUT_RANK ? 0 : (uint32_t)a.routing.received[2 + l];
        for (uint32_t s = 0; s < num_ranks; s++) {
            const uint32_t *rows =
                (const uint32_t *)(nep_message_at(a.group, a.group.rank, op, s) + 1);
            first[s * num + l] = next;
            next += a.layout == NEP_LAYOUT_EXPERT_PADDED ? a.max_tokens : rows[at];
        }
    }
}

__device__ __forceinline__ void pull_item(const pull_args &a, const source &s, uint64_t item,
                                          const nep_rows_args &rows_args, const uint32_t *first)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t token = (uint32_t)(item / a.parts);
    uint32_t part = (uint32_t)(item - (uint64_t)token * a.parts);
    uint64_t at = (uint64_t)token * a.top_k + lane;
    uint32_t slot = lane < a.top_k ? s.slots[at] : NEP_SLOT_NONE;
    if (slot != NEP_SLOT_NONE && slot / a.slots_per_rank != a.group.rank) {
        slot = NEP_SLOT_NONE;
    }
    if (__ballot_sync(0xffffffffu, slot != NEP_SLOT_NONE) == 0) {
        return;
    }
    uint32_t index = slot != NEP_SLOT_NONE ? s.index[at] : 0;
    /* The table of first rows is this rank's alone. */
    const uint32_t *own =
        rows_args.is_rank_layout ? first - a.group.rank : first - a.group.rank * a.slots_per_rank;
    nep_target t = nep_find_target(rows_args, slot, index, own);
    uint32_t rows = __ballot_sync(0xffffffffu, t.has_row);
    uint32_t per_part = (a.units + a.parts - 1) / a.parts;
    uint32_t begin = min(a.units, part * per_part);
    uint32_t end = min(a.units, begin + per_part);
    if (part == 0) {
        nep_store_beside(rows_args, token, t, rows, lane < a.top_k ? s.weights[at] : 0.0f);
        if (a.wire.scale_bytes != 0) {
            nep_copy_scales(
                s.scales + (uint64_t)token * a.wire.scale_bytes,
                [&](uint32_t l) { return nep_target_scales(rows_args, t, l); }, rows, nullptr,
                a.wire.scale_bytes);
        }
    }
    nep_copy_row(s.rows + (uint64_t)token * a.wire.payload_bytes, t.row, rows, nullptr, begin, end);
}

__global__ void __launch_bounds__(PULL_THREADS, 1) pull_kernel(const __grid_constant__ pull_args a)
{
    extern __shared__ uint32_t first[];
    __shared__ struct nep_places places[NEP_CUDA_MAX_RANKS];
    uint64_t op = 0;
    bool is_begun = nep_begin(a.group, a.routing.cell, &op);
    if (!__syncthreads_and(is_begun) ||
        !nep_wait_all(a.group, a.group.words.pushed, op, NEP_CUDA_PHASE_PUSHED)) {
        return;
    }
    if (threadIdx.x == 0) {
        places[a.group.rank] = nep_own_places(a.out);
    }
    find_first(a, op, first);
    __syncthreads();
    uint32_t per_source = a.layout == NEP_LAYOUT_RANK ? 1 : a.slots_per_rank;
    uint64_t stride = (uint64_t)gridDim.x * (blockDim.x / 32);
    /* Readers begin at different sources; the own rank's rows are there already. */
    for (uint32_t i = 1; i < a.group.num_ranks; i++) {
        uint32_t rank = (a.group.rank + i) % a.group.num_ranks;
        source s = source_at(a, op, rank);
        const nep_rows_args rows_args = {places,  rank,   a.slots_per_rank,
                                         a.top_k, a.wire, a.layout == NEP_LAYOUT_RANK};
        uint64_t num_items = (uint64_t)s.num_tokens * a.parts;
        for (uint64_t item = (uint64_t)(threadIdx.x / 32) * gridDim.x + blockIdx.x;
             item < num_items; item += stride) {
            pull_item(a, s, item, rows_args, first + rank * per_source);
        }
    }
}

} // namespace

enum nep_status nep_cuda_load_pull(void)
{
    return nep_cuda_load_kernel((const void *)pull_kernel, "pull");
}

extern "C" enum nep_status nep_cuda_pull(const struct nep_cuda_dispatch *dispatch,
                                         struct CUstream_st *stream)
{
    const struct nep_cuda_shape *shape = dispatch->shape;
    const struct nep_cuda_geometry *geometry = dispatch->geometry;
    pull_args args = {};
    args.group = *dispatch->group;
    args.routing = *dispatch->routing;
    args.out = *dispatch->out;
    args.staging = shape->staging;
    args.max_tokens = shape->max_tokens;
    args.units = shape->wire.payload_bytes / 16;
    args.parts =
        nep_cuda_row_parts(geometry, dispatch->in->num_tokens, args.units, 32 * NEP_ROWS_FLIGHT);
    args.slots_per_rank = shape->slots_per_rank;
    args.top_k = shape->top_k;
    args.wire = shape->wire;
    args.layout = shape->layout;
    pull_kernel<<<geometry->blocks, PULL_THREADS, geometry->shared_bytes, stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of pull");
}
