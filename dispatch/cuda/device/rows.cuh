/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows and what lies beside them, to their final places: by their source (push) or by their
 * receiver (pull). A warp has a token, a lane one of its pairs; rows of a token are copied from one
 * source to all places at once.
 */
#ifndef NEP_DISPATCH_CUDA_DEVICE_ROWS_CUH
#define NEP_DISPATCH_CUDA_DEVICE_ROWS_CUH

#include "dispatch/cuda/device/move.cuh"
#include "dispatch/cuda/device/wait.cuh"

/* Outputs of a rank as this one reaches them. x NULL: not at all, that rank pulls. */
struct nep_places {
    char *x;
    char *scales;
    int32_t *topk_slots;
    float *topk_weights;
    uint32_t *source_rank;
    uint32_t *source_token;
    uint64_t capacity; /* rows */
};

/* What a warp knows about the rows at hand. */
struct nep_rows_args {
    const struct nep_places *places; /* [R] in shared memory */
    uint32_t source;                 /* rank whose tokens these are */
    uint32_t slots_per_rank;
    uint32_t top_k;
    const struct nep_wire &wire;
    bool is_rank_layout;
};

/* A pair of a token as its lane holds it. */
struct nep_target {
    uint32_t slot; /* NEP_SLOT_NONE: none */
    uint32_t rank;
    uint32_t pos;
    bool has_row; /* this lane holds its row */
    char *row;    /* its place; NULL: not reached from here */
};

static __device__ __forceinline__ struct nep_places
nep_places_at(const struct nep_cuda_group &group, uint64_t op, uint32_t rank)
{
    const struct nep_cuda_bind *bind = nep_bind_at(group, group.rank, op, rank);
    char *window = nep_window(group, rank);
    struct nep_places places;
    places.x = bind->x != NEP_CUDA_NONE ? window + bind->x : nullptr;
    places.scales = bind->scales != NEP_CUDA_NONE ? window + bind->scales : nullptr;
    places.topk_slots =
        bind->topk_slots != NEP_CUDA_NONE ? (int32_t *)(window + bind->topk_slots) : nullptr;
    places.topk_weights =
        bind->topk_weights != NEP_CUDA_NONE ? (float *)(window + bind->topk_weights) : nullptr;
    places.source_rank =
        bind->source_rank != NEP_CUDA_NONE ? (uint32_t *)(window + bind->source_rank) : nullptr;
    places.source_token =
        bind->source_token != NEP_CUDA_NONE ? (uint32_t *)(window + bind->source_token) : nullptr;
    places.capacity = bind->capacity;
    return places;
}

static __device__ __forceinline__ struct nep_places
nep_own_places(const struct nep_cuda_output &out)
{
    return {out.x,           out.scales,       out.topk_slots, out.topk_weights,
            out.source_rank, out.source_token, out.capacity};
}

/* slot and first_row + index are this lane's pair. Every lane takes part. */
static __device__ __forceinline__ nep_target nep_find_target(const nep_rows_args &a, uint32_t slot,
                                                             uint32_t index,
                                                             const uint32_t *first_rows)
{
    nep_target t;
    uint32_t lane = threadIdx.x % 32;
    uint32_t first = lane;
    bool is_used = slot != NEP_SLOT_NONE;
    t.slot = slot;
    t.rank = is_used ? slot / a.slots_per_rank : 0;
    if (a.is_rank_layout) {
        first = __ffs(__match_any_sync(0xffffffffu, is_used ? t.rank : 0x80000000u + lane)) - 1;
    }
    t.has_row = is_used && first == lane;
    t.pos = 0;
    t.row = nullptr;
    if (is_used) {
        t.pos = first_rows[a.is_rank_layout ? t.rank : slot] + index;
        char *x = a.places[t.rank].x;
        t.row = x != nullptr ? x + (uint64_t)t.pos * a.wire.payload_bytes : nullptr;
    }
    return t;
}

/* Where the scales of the row that lane `from` holds go. */
static __device__ __forceinline__ struct nep_scales_at
nep_target_scales(const nep_rows_args &a, const nep_target &t, uint32_t from)
{
    const struct nep_places &places = a.places[__shfl_sync(0xffffffffu, t.rank, from)];
    uint32_t pos = __shfl_sync(0xffffffffu, t.pos, from);
    return nep_wire_scales_at(&a.wire, places.scales, pos, places.capacity);
}

/* What lies beside the rows at their receivers. weight: of this lane's pair. */
static __device__ __forceinline__ void nep_store_beside(const nep_rows_args &a, uint32_t token,
                                                        const nep_target &t, uint32_t rows,
                                                        float weight)
{
    uint32_t lane = threadIdx.x % 32;
    if ((rows >> lane & 1) != 0) {
        const struct nep_places &places = a.places[t.rank];
        if (places.source_rank != nullptr) {
            places.source_rank[t.pos] = a.source;
        }
        if (places.source_token != nullptr) {
            places.source_token[t.pos] = token;
        }
        if (!a.is_rank_layout && places.topk_weights != nullptr) {
            places.topk_weights[t.pos] = weight;
        }
    }
    if (!a.is_rank_layout) {
        return;
    }
    for (uint32_t m = rows; m != 0; m &= m - 1) {
        uint32_t from = __ffs(m) - 1;
        uint32_t rank = __shfl_sync(0xffffffffu, t.rank, from);
        uint64_t at = (uint64_t)__shfl_sync(0xffffffffu, t.pos, from) * a.top_k + lane;
        const struct nep_places &places = a.places[rank];
        bool is_there = t.slot != NEP_SLOT_NONE && t.rank == rank;
        if (lane < a.top_k && places.topk_slots != nullptr) {
            places.topk_slots[at] = is_there ? (int32_t)(t.slot - rank * a.slots_per_rank) : -1;
        }
        if (lane < a.top_k && places.topk_weights != nullptr) {
            places.topk_weights[at] = is_there ? weight : 0.0f;
        }
    }
}

#endif
