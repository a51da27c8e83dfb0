// SPDX-License-Identifier: Apache-2.0
/*
 * From all COUNTS to positions: where the rows of this rank begin in every bucket of every rank of
 * the group, and how many rows come here from whom. One block: the tables have R * (R + R * L)
 * numbers, and a second launch on the caller's stream is cheaper than every block of push doing
 * this again. An output that is too small is found here, by every rank alike, before a row moves.
 */
#include "dispatch/cuda/device/launch.cuh"
#include "dispatch/cuda/device/wait.cuh"

namespace
{

enum { PLACE_THREADS = 1024 };

struct place_args {
    struct nep_cuda_group group;
    struct nep_cuda_routing routing;
    uint32_t slots_per_rank;
    uint32_t max_tokens;
    uint32_t alignment;
    enum nep_layout layout;
};

__device__ __forceinline__ const struct nep_cuda_message *message_of(const place_args &a,
                                                                     uint64_t op, uint32_t source)
{
    return (const struct nep_cuda_message *)nep_message_at(a.group, a.group.rank, op, source);
}

__device__ __forceinline__ const uint32_t *rows_per_rank(const struct nep_cuda_message *message)
{
    return (const uint32_t *)(message + 1);
}

/* The sum over a warp of the lanes before this one; *total_p: of all. */
__device__ __forceinline__ uint32_t warp_scan(uint32_t value, uint32_t *total_p)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t sum = value;
#pragma unroll
    for (uint32_t d = 1; d < 32; d <<= 1) {
        uint32_t other = __shfl_up_sync(0xffffffffu, sum, d);
        sum += lane >= d ? other : 0;
    }
    *total_p = __shfl_sync(0xffffffffu, sum, 31);
    return sum - value;
}

/* Rows of one bucket: of all sources, and of those before this rank; returns the most of one. */
__device__ __forceinline__ uint32_t add_sources(const place_args &a, uint64_t op, uint32_t number,
                                                uint32_t *all_p, uint32_t *before_p)
{
    uint32_t all = 0;
    uint32_t before = 0;
    uint32_t most = 0;
#pragma unroll 8
    for (uint32_t s = 0; s < a.group.num_ranks; s++) {
        uint32_t rows = rows_per_rank(message_of(a, op, s))[number];
        all += rows;
        before += s < a.group.rank ? rows : 0;
        most = max(most, rows);
    }
    *all_p = all;
    *before_p = before;
    return most;
}

/* By one warp: buckets of rank `to`. Returns the rows of its output, padding included. */
__device__ uint64_t place_rank(const place_args &a, uint64_t op, uint32_t to, uint64_t *real_p)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t num_ranks = a.group.num_ranks;
    uint32_t slots = a.slots_per_rank;
    bool is_here = to == a.group.rank;
    bool is_fixed = a.layout == NEP_LAYOUT_EXPERT_PADDED || a.layout == NEP_LAYOUT_EXPERT_FRONT;
    uint32_t end = 0;
    uint64_t pairs = 0;
    if (a.layout == NEP_LAYOUT_RANK) {
        uint32_t before;
        add_sources(a, op, to, &end, &before);
        if (lane == 0) {
            a.routing.first[to] = before;
        }
    }
    for (uint32_t chunk = 0; chunk < slots; chunk += 32) {
        uint32_t l = chunk + lane;
        bool is_slot = l < slots;
        uint32_t all = 0;
        uint32_t before = 0;
        if (is_slot) {
            uint32_t most = add_sources(a, op, num_ranks + to * slots + l, &all, &before);
            /* A token that chooses a slot twice may need more room than a source has. */
            if (is_fixed && most > a.max_tokens) {
                nep_give_up(a.group, NEP_CUDA_STATUS(NEP_CUDA_OVERFLOW, NEP_CUDA_PHASE_COUNTS, to));
            }
        }
        uint32_t total;
        uint32_t room = (all + a.alignment - 1) / a.alignment * a.alignment;
        uint32_t start = end + warp_scan(room, &total);
        if (a.layout == NEP_LAYOUT_EXPERT_PACKED) {
            end += total;
        } else {
            start = a.layout == NEP_LAYOUT_RANK ? 0 : l * num_ranks * a.max_tokens;
            before = a.layout == NEP_LAYOUT_EXPERT_FRONT ? before : a.group.rank * a.max_tokens;
        }
        if (is_slot && a.layout != NEP_LAYOUT_RANK) {
            a.routing.first[to * slots + l] = start + before;
        }
        if (is_slot && is_here) {
            a.routing.received[2 + l] = start;
            a.routing.received_rows[l] = all;
        }
        warp_scan(all, &total);
        pairs += total;
    }
    *real_p = a.layout == NEP_LAYOUT_RANK ? end : pairs;
    return is_fixed ? (uint64_t)slots * num_ranks * a.max_tokens : end;
}

/* By the block, a warp per source: how many rows come here from it. */
__device__ void count_sources(const place_args &a, uint64_t op)
{
    uint32_t num_ranks = a.group.num_ranks;
    uint32_t lane = threadIdx.x % 32;
    for (uint32_t s = threadIdx.x / 32; s < num_ranks; s += blockDim.x / 32) {
        const uint32_t *rows = rows_per_rank(message_of(a, op, s));
        uint32_t sum = 0;
        for (uint32_t l = lane; l < a.slots_per_rank; l += 32) {
            sum += rows[num_ranks + a.group.rank * a.slots_per_rank + l];
        }
        sum = __reduce_add_sync(0xffffffffu, sum);
        if (lane == 0) {
            a.routing.received_rows[a.slots_per_rank + s] =
                a.layout == NEP_LAYOUT_RANK ? rows[a.group.rank] : sum;
        }
    }
}

__global__ void __launch_bounds__(PLACE_THREADS) place_kernel(const __grid_constant__ place_args a)
{
    uint64_t op = 0;
    if (!nep_begin(a.group, &op)) {
        return;
    }
    uint64_t slot = op % NEP_CUDA_SLOTS_IN_USE * a.group.num_ranks;
    if (!nep_wait_all(a.group, a.group.words.counts, slot, op, NEP_CUDA_PHASE_COUNTS)) {
        return;
    }
    for (uint32_t to = threadIdx.x / 32; to < a.group.num_ranks; to += blockDim.x / 32) {
        const struct nep_cuda_message *message = message_of(a, op, to);
        if (message->op != op) {
            nep_give_up(a.group, NEP_CUDA_STATUS(NEP_CUDA_DISAGREE, NEP_CUDA_PHASE_COUNTS, to));
            continue;
        }
        uint64_t real = 0;
        uint64_t rows = place_rank(a, op, to, &real);
        if (rows > message->out.capacity) {
            nep_give_up(a.group, NEP_CUDA_STATUS(NEP_CUDA_OVERFLOW, NEP_CUDA_PHASE_COUNTS, to));
        }
        if (to == a.group.rank && threadIdx.x % 32 == 0) {
            a.routing.received[0] = rows;
            a.routing.received[1] = real;
        }
    }
    count_sources(a, op);
}

} // namespace

enum nep_status nep_cuda_load_place(void)
{
    return nep_cuda_load_kernel((const void *)place_kernel, "place");
}

extern "C" enum nep_status nep_cuda_place(const struct nep_cuda_dispatch *dispatch,
                                          struct CUstream_st *stream)
{
    const struct nep_cuda_shape *shape = dispatch->shape;
    place_args args = {};
    args.group = *dispatch->group;
    args.routing = *dispatch->routing;
    args.slots_per_rank = shape->slots_per_rank;
    args.max_tokens = shape->max_tokens;
    args.alignment = shape->alignment > 1 ? shape->alignment : 1;
    args.layout = shape->layout;
    /* Shared memory that keeps a kernel of another rank, which this one may wait for, elsewhere. */
    place_kernel<<<1, PLACE_THREADS, dispatch->geometry->shared_bytes, stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of place");
}

extern "C" enum nep_status nep_cuda_load(void)
{
    enum nep_status (*const loads[])(void) = {nep_cuda_load_layout, nep_cuda_load_place,
                                              nep_cuda_load_push, nep_cuda_load_pull,
                                              nep_cuda_load_sum};
    for (auto load : loads) {
        enum nep_status status = load();
        if (status != NEP_OK) {
            return status;
        }
    }
    return NEP_OK;
}
