// SPDX-License-Identifier: Apache-2.0
/*
 * Push: a warp takes a row (or a part of one, where there are few), reads it once, casts it to fp8
 * if asked, and stores it to all its final places in the outputs of this node's ranks. The first
 * part also stores what goes beside a row and writes down, sorted by rank, which rows combine will
 * add up for this token: positions are known here and nowhere else as cheaply.
 *
 * Plain 16-byte accesses, four in flight per thread. Rejected: bulk copies through shared memory,
 * at most 4 % faster in measurements, and not on sm_80; pulling by the receiver, which reads a row
 * once per destination and was 5 to 44 % slower.
 */
#include "dispatch/cuda/device/launch.cuh"
#include "dispatch/cuda/device/number.cuh"
#include "dispatch/cuda/device/wait.cuh"

namespace
{

enum { PUSH_THREADS = 1024, FLIGHT = 4 };

struct push_args {
    struct nep_cuda_group group;
    struct nep_cuda_routing routing;
    struct nep_wire wire;
    const char *x;
    const char *scales;
    const float *weight;
    uint32_t num_tokens;
    uint32_t parts;
    uint32_t units; /* 16-byte pieces of a payload row */
    uint32_t slots_per_rank;
    uint32_t top_k;
    bool is_rank_layout;
    bool is_cast;
    bool is_waiting;
};

/* A pair of a token as its lane holds it. */
struct target {
    uint32_t slot; /* NEP_SLOT_NONE: none */
    uint32_t rank;
    uint32_t pos;
    uint32_t first; /* lane that holds this row */
    bool has_row;   /* this lane does */
    char *row;      /* its place */
};

struct warp_item {
    uint32_t token;
    uint32_t part;
    uint32_t slot; /* as loaded ahead */
    uint32_t index;
};

__device__ __forceinline__ warp_item item_at(const push_args &a, uint64_t item)
{
    warp_item w;
    w.token = (uint32_t)(item / a.parts);
    w.part = (uint32_t)(item - (uint64_t)w.token * a.parts);
    w.slot = NEP_SLOT_NONE;
    w.index = 0;
    uint32_t lane = threadIdx.x % 32;
    if (w.token < a.num_tokens && lane < a.top_k) {
        uint64_t at = (uint64_t)w.token * a.top_k + lane;
        w.slot = a.routing.slots[at];
        w.index = a.routing.index[at];
    }
    return w;
}

__device__ __forceinline__ target find_target(const push_args &a, const warp_item &w,
                                              const uint32_t *first_rows,
                                              const struct nep_cuda_output *outs)
{
    target t;
    uint32_t lane = threadIdx.x % 32;
    t.slot = w.slot;
    bool is_used = w.slot != NEP_SLOT_NONE;
    t.rank = is_used ? w.slot / a.slots_per_rank : 0;
    t.first = lane;
    if (a.is_rank_layout) {
        t.first = __ffs(__match_any_sync(0xffffffffu, is_used ? t.rank : 0x80000000u + lane)) - 1;
    }
    t.has_row = is_used && t.first == lane;
    t.pos = 0;
    t.row = nullptr;
    if (is_used) {
        t.pos = first_rows[a.is_rank_layout ? t.rank : w.slot] + w.index;
        t.row =
            nep_window(a.group, t.rank) + outs[t.rank].x + (uint64_t)t.pos * a.wire.payload_bytes;
    }
    return t;
}

__device__ __forceinline__ char *lane_row(char *row, uint32_t lane)
{
    return (char *)__shfl_sync(0xffffffffu, (unsigned long long)row, lane);
}

/* Pieces [begin, end) of a row as it is. */
__device__ __forceinline__ void copy_row(const char *from, const target &t, uint32_t rows,
                                         uint32_t begin, uint32_t end)
{
    for (uint32_t c = begin + threadIdx.x % 32; c - threadIdx.x % 32 < end; c += 32 * FLIGHT) {
        uint4 v[FLIGHT];
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            if (c + 32 * i < end) {
                v[i] = nep_ld16(from + 16 * (uint64_t)(c + 32 * i));
            }
        }
        for (uint32_t m = rows; m != 0; m &= m - 1) {
            uint4 *to = (uint4 *)lane_row(t.row, __ffs(m) - 1);
#pragma unroll
            for (int i = 0; i < FLIGHT; i++) {
                if (c + 32 * i < end) {
                    to[c + 32 * i] = v[i];
                }
            }
        }
    }
}

/* 16 elements of the caller's row as floats. */
__device__ __forceinline__ void load_elements(const char *from, enum nep_dtype dtype, uint32_t unit,
                                              float *x)
{
    if (dtype == NEP_DTYPE_FP32) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            nep_fp32::load(((const uint4 *)from)[4 * (uint64_t)unit + i], x + 4 * i);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint4 v = ((const uint4 *)from)[2 * (uint64_t)unit + i];
        if (dtype == NEP_DTYPE_BF16) {
            nep_bf16::load(v, x + 8 * i);
        } else {
            nep_fp16::load(v, x + 8 * i);
        }
    }
}

/* By the lane whose piece begins a block. */
__device__ __forceinline__ void store_scale(const push_args &a, const target &t, uint32_t rows,
                                            const struct nep_cuda_output *outs, uint32_t unit,
                                            float scale)
{
    for (uint32_t m = rows; m != 0; m &= m - 1) {
        uint32_t from = __ffs(m) - 1;
        uint32_t rank = __shfl_sync(0xffffffffu, t.rank, from);
        uint32_t pos = __shfl_sync(0xffffffffu, t.pos, from);
        char *to =
            nep_window(a.group, rank) + outs[rank].scales + (uint64_t)pos * a.wire.scale_bytes;
        if (unit % 8 == 0) {
            uint32_t block = unit / 8;
            if (a.wire.scale == NEP_SCALE_UE8M0) {
                ((uint8_t *)to)[block] = (uint8_t)(__float_as_uint(scale) >> 23);
            } else {
                ((float *)to)[block] = scale;
            }
        }
    }
}

/* The same with the cast: a lane has 16 elements, eight lanes the 128 that share a scale. */
__device__ void cast_row(const push_args &a, const char *from, const target &t, uint32_t rows,
                         const struct nep_cuda_output *outs, uint32_t begin, uint32_t end)
{
    uint32_t lane = threadIdx.x % 32;
    for (uint32_t first = begin; first < end; first += 32) {
        uint32_t unit = first + lane;
        bool is_in = unit < end;
        float x[16];
        float amax = 0;
        if (is_in) {
            load_elements(from, a.wire.dtype, unit, x);
#pragma unroll
            for (int i = 0; i < 16; i++) {
                amax = fmaxf(amax, fabsf(x[i])); /* a NaN counts as 0 */
            }
        }
#pragma unroll
        for (int d = 1; d < 8; d <<= 1) {
            amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
        }
        float scale = nep_fp8_scale_of(amax, a.wire.scale);
        float inverse = __frcp_rn(scale);
        uint32_t q[4] = {0, 0, 0, 0};
        if (is_in) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                q[i / 2] |= nep_e4m3_pair(nep_fp8_divide(x[2 * i], scale, inverse),
                                          nep_fp8_divide(x[2 * i + 1], scale, inverse))
                            << (16 * (i % 2));
            }
        }
        for (uint32_t m = rows; m != 0; m &= m - 1) {
            uint4 *to = (uint4 *)lane_row(t.row, __ffs(m) - 1);
            if (is_in) {
                to[unit] = make_uint4(q[0], q[1], q[2], q[3]);
            }
        }
        store_scale(a, t, rows, outs, is_in ? unit : 1, scale);
    }
}

__device__ __forceinline__ void copy_scales(const push_args &a, const warp_item &w, const target &t,
                                            uint32_t rows, const struct nep_cuda_output *outs)
{
    const char *from = a.scales + (uint64_t)w.token * a.wire.scale_bytes;
    uint32_t lane = threadIdx.x % 32;
    bool is_wide = (a.wire.scale_bytes | (uint64_t)a.scales) % 4 == 0;
    for (uint32_t m = rows; m != 0; m &= m - 1) {
        uint32_t source = __ffs(m) - 1;
        uint32_t rank = __shfl_sync(0xffffffffu, t.rank, source);
        uint32_t pos = __shfl_sync(0xffffffffu, t.pos, source);
        char *to =
            nep_window(a.group, rank) + outs[rank].scales + (uint64_t)pos * a.wire.scale_bytes;
        for (uint32_t i = lane; is_wide && i < a.wire.scale_bytes / 4; i += 32) {
            ((uint32_t *)to)[i] = ((const uint32_t *)from)[i];
        }
        for (uint32_t i = lane; !is_wide && i < a.wire.scale_bytes; i += 32) {
            to[i] = from[i];
        }
    }
}

/* What lies beside the rows at their receivers. */
__device__ void store_beside(const push_args &a, const warp_item &w, const target &t, uint32_t rows,
                             const struct nep_cuda_output *outs, float weight)
{
    uint32_t lane = threadIdx.x % 32;
    if (t.has_row) {
        const struct nep_cuda_output &out = outs[t.rank];
        char *window = nep_window(a.group, t.rank);
        if (out.source_rank != NEP_CUDA_NONE) {
            ((uint32_t *)(window + out.source_rank))[t.pos] = a.group.rank;
        }
        if (out.source_token != NEP_CUDA_NONE) {
            ((uint32_t *)(window + out.source_token))[t.pos] = w.token;
        }
        if (!a.is_rank_layout && out.topk_weights != NEP_CUDA_NONE) {
            ((float *)(window + out.topk_weights))[t.pos] = weight;
        }
    }
    if (!a.is_rank_layout) {
        return;
    }
    for (uint32_t m = rows; m != 0; m &= m - 1) {
        uint32_t from = __ffs(m) - 1;
        uint32_t rank = __shfl_sync(0xffffffffu, t.rank, from);
        uint64_t at = (uint64_t)__shfl_sync(0xffffffffu, t.pos, from) * a.top_k + lane;
        const struct nep_cuda_output &out = outs[rank];
        char *window = nep_window(a.group, rank);
        bool is_there = t.slot != NEP_SLOT_NONE && t.rank == rank;
        if (lane < a.top_k && out.topk_slots != NEP_CUDA_NONE) {
            ((int32_t *)(window + out.topk_slots))[at] =
                is_there ? (int32_t)(t.slot - rank * a.slots_per_rank) : -1;
        }
        if (lane < a.top_k && out.topk_weights != NEP_CUDA_NONE) {
            ((float *)(window + out.topk_weights))[at] = is_there ? weight : 0.0f;
        }
    }
}

/* The token's addends in the order of the tree: ranks ascending, k ascending inside. */
__device__ void store_terms(const push_args &a, const warp_item &w, const target &t, uint32_t rows,
                            float weight)
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
        term.reserved = 0;
        a.routing.terms[(uint64_t)w.token * a.top_k + order] = term;
    }
    if (lane == 0) {
        a.routing.num_terms[w.token] = __popc(rows);
    }
}

__device__ __forceinline__ void push_item(const push_args &a, const warp_item &w,
                                          const uint32_t *first_rows,
                                          const struct nep_cuda_output *outs)
{
    uint32_t lane = threadIdx.x % 32;
    target t = find_target(a, w, first_rows, outs);
    uint32_t rows = __ballot_sync(0xffffffffu, t.has_row);
    uint32_t per_part = (a.units + a.parts - 1) / a.parts;
    if (a.is_cast) {
        per_part = (per_part + 7) / 8 * 8; /* blocks of one scale stay together */
    }
    uint32_t begin = min(a.units, w.part * per_part);
    uint32_t end = min(a.units, begin + per_part);
    uint32_t row_bytes = a.is_cast ? a.wire.in_bytes : a.wire.payload_bytes;
    const char *from = a.x + (uint64_t)w.token * row_bytes;
    if (w.part == 0) {
        float weight = 1.0f;
        if (a.weight != nullptr && lane < a.top_k) {
            weight = a.weight[(uint64_t)w.token * a.top_k + lane];
        }
        store_terms(a, w, t, rows, weight);
        store_beside(a, w, t, rows, outs, weight);
        if (a.scales != nullptr && !a.is_cast) {
            copy_scales(a, w, t, rows, outs);
        }
    }
    if (rows == 0) {
        return;
    }
    if (a.is_cast) {
        cast_row(a, from, t, rows, outs, begin, end);
    } else {
        copy_row(from, t, rows, begin, end);
    }
}

__global__ void __launch_bounds__(PUSH_THREADS, 1) push_kernel(const __grid_constant__ push_args a)
{
    extern __shared__ uint32_t first_rows[];
    __shared__ struct nep_cuda_output outs[NEP_CUDA_MAX_RANKS];
    uint64_t op = 0;
    if (!nep_begin(a.group, &op)) {
        return;
    }
    uint32_t num_ranks = a.group.num_ranks;
    uint32_t num_buckets = a.is_rank_layout ? num_ranks : num_ranks * a.slots_per_rank;
    for (uint32_t i = threadIdx.x; i < num_buckets; i += blockDim.x) {
        first_rows[i] = a.routing.first[i];
    }
    for (uint32_t r = threadIdx.x; r < num_ranks; r += blockDim.x) {
        outs[r] =
            ((const struct nep_cuda_message *)nep_message_at(a.group, a.group.rank, op, r))->out;
    }
    __syncthreads();
    /* Rows go round the blocks first: a few tokens then keep every SM busy. */
    uint64_t stride = (uint64_t)gridDim.x * (blockDim.x / 32);
    uint64_t num_items = (uint64_t)a.num_tokens * a.parts;
    uint64_t item = (uint64_t)(threadIdx.x / 32) * gridDim.x + blockIdx.x;
    warp_item next = item_at(a, item);
    for (; item < num_items; item += stride) {
        warp_item now = next;
        next = item_at(a, item + stride);
        push_item(a, now, first_rows, outs);
    }
    if (!nep_is_last_block(a.group)) {
        return;
    }
    nep_tell_all(a.group, a.group.words.pushed, 0, op);
    if (a.is_waiting) {
        nep_wait_all(a.group, a.group.words.pushed, 0, op, NEP_CUDA_PHASE_PUSHED);
    }
}

} // namespace

enum nep_status nep_cuda_load_push(void)
{
    return nep_cuda_load_kernel((const void *)push_kernel, "push");
}

extern "C" enum nep_status nep_cuda_push(const struct nep_cuda_dispatch *dispatch, int is_waiting,
                                         struct CUstream_st *stream)
{
    const struct nep_cuda_shape *shape = dispatch->shape;
    const struct nep_cuda_input *in = dispatch->in;
    const struct nep_wire *wire = &shape->wire;
    if (wire->payload_bytes % 16 != 0 || ((uintptr_t)in->x | dispatch->out->x) % 16 != 0) {
        return nep_fail(NEP_ERR_INVALID,
                        "push: rows of %u bytes at %p to offset %llu: all must be multiples of 16",
                        wire->payload_bytes, in->x, (unsigned long long)dispatch->out->x);
    }
    push_args args = {};
    args.group = *dispatch->group;
    args.routing = *dispatch->routing;
    args.wire = *wire;
    args.x = (const char *)in->x;
    args.scales = (const char *)in->scales;
    args.weight = in->weight;
    args.num_tokens = in->num_tokens;
    args.units = wire->payload_bytes / 16;
    args.is_cast = wire->type != wire->dtype && in->scales == nullptr;
    args.parts = nep_cuda_row_parts(dispatch->geometry, in->num_tokens, args.units,
                                    args.is_cast ? 32 : 32 * FLIGHT);
    args.slots_per_rank = shape->slots_per_rank;
    args.top_k = shape->top_k;
    args.is_rank_layout = shape->layout == NEP_LAYOUT_RANK;
    args.is_waiting = is_waiting != 0;
    const struct nep_cuda_geometry *geometry = dispatch->geometry;
    push_kernel<<<geometry->blocks, PUSH_THREADS, geometry->shared_bytes, stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of push");
}
