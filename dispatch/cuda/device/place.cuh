/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From all COUNTS to positions, by one block: where the rows of this rank begin in every bucket of
 * every rank of the group, and how many rows come here from whom. place is a kernel of its own
 * where the host asks for counts before outputs are known; else every block of push does this for
 * itself, which costs less than a launch.
 */
#ifndef NEP_DISPATCH_CUDA_DEVICE_PLACE_CUH
#define NEP_DISPATCH_CUDA_DEVICE_PLACE_CUH

#include "dispatch/cuda/device/wait.cuh"

struct nep_place_args {
    uint32_t slots_per_rank;
    uint32_t max_tokens;
    uint32_t alignment;
    enum nep_layout layout;
    uint64_t digest; /* of the map */
};

/* What a block works out, and where it puts it. */
struct nep_place {
    const struct nep_cuda_group &group;
    const struct nep_cuda_routing &routing;
    const struct nep_place_args &args;
    uint64_t op;
    uint32_t *first;  /* [buckets], shared or global */
    uint64_t *totals; /* [R] */
};

static inline struct nep_place_args nep_place_args_of(const struct nep_cuda_dispatch *dispatch)
{
    const struct nep_cuda_shape *shape = dispatch->shape;
    return {shape->slots_per_rank, shape->max_tokens, shape->alignment > 1 ? shape->alignment : 1,
            shape->layout, dispatch->in->digest};
}

static __device__ __forceinline__ const uint32_t *
nep_rows_per_rank(const struct nep_cuda_group &group, uint64_t op, uint32_t source)
{
    return (const uint32_t *)(nep_message_at(group, group.rank, op, source) + 1);
}

/* The sum over a warp of the lanes before this one; *total_p: of all. */
static __device__ __forceinline__ uint32_t nep_warp_scan(uint32_t value, uint32_t *total_p)
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
static __device__ __forceinline__ uint32_t nep_add_sources(const nep_place &p, uint32_t number,
                                                           uint32_t *all_p, uint32_t *before_p)
{
    uint32_t all = 0;
    uint32_t before = 0;
    uint32_t most = 0;
#pragma unroll 8
    for (uint32_t s = 0; s < p.group.num_ranks; s++) {
        uint32_t rows = nep_rows_per_rank(p.group, p.op, s)[number];
        all += rows;
        before += s < p.group.rank ? rows : 0;
        most = max(most, rows);
    }
    *all_p = all;
    *before_p = before;
    return most;
}

/*
 * By one warp: where this rank's rows begin in the buckets of rank `to` (p.first), or, with
 * is_here, what comes to this rank (p.routing.received). Returns the rows of that rank's output,
 * padding included; *real_p: those that carry a token, UINT64_MAX where a slot is crowded.
 */
static __device__ inline uint64_t nep_place_rank(const nep_place &p, uint32_t to, bool is_here,
                                                 uint64_t *real_p)
{
    const nep_place_args &a = p.args;
    uint32_t lane = threadIdx.x % 32;
    uint32_t num_ranks = p.group.num_ranks;
    uint32_t slots = a.slots_per_rank;
    bool is_fixed = a.layout == NEP_LAYOUT_EXPERT_PADDED || a.layout == NEP_LAYOUT_EXPERT_FRONT;
    uint32_t end = 0;
    uint64_t pairs = 0;
    if (a.layout == NEP_LAYOUT_RANK) {
        uint32_t before;
        nep_add_sources(p, to, &end, &before);
        *real_p = end;
        if (!is_here) {
            p.first[to] = before;
            return end;
        }
    }
    for (uint32_t chunk = 0; chunk < slots; chunk += 32) {
        uint32_t l = chunk + lane;
        bool is_slot = l < slots;
        uint32_t all = 0;
        uint32_t before = 0;
        bool is_crowded = false;
        if (is_slot) {
            uint32_t most = nep_add_sources(p, num_ranks + to * slots + l, &all, &before);
            /* A token that chooses a slot twice may need more room than a source has. */
            is_crowded = is_fixed && most > a.max_tokens;
            if (is_crowded) {
                nep_give_up(p.group, p.op,
                            NEP_CUDA_STATUS(NEP_CUDA_CROWDED, NEP_CUDA_PHASE_COUNTS, to));
            }
        }
        if (__any_sync(0xffffffffu, is_crowded)) {
            *real_p = UINT64_MAX;
            return 0;
        }
        uint32_t total;
        uint32_t room = (all + a.alignment - 1) / a.alignment * a.alignment;
        uint32_t start = end + nep_warp_scan(room, &total);
        if (a.layout == NEP_LAYOUT_EXPERT_PACKED) {
            end += total;
        } else {
            start = a.layout == NEP_LAYOUT_RANK ? 0 : l * num_ranks * a.max_tokens;
            before = a.layout == NEP_LAYOUT_EXPERT_FRONT ? before : p.group.rank * a.max_tokens;
        }
        if (is_slot && is_here) {
            p.routing.received[2 + l] = start;
            p.routing.received_rows[l] = all;
        } else if (is_slot) {
            p.first[to * slots + l] = start + before;
        }
        if (is_here) {
            nep_warp_scan(all, &total);
            pairs += total;
        }
    }
    *real_p = a.layout == NEP_LAYOUT_RANK ? end : pairs;
    return is_fixed ? (uint64_t)slots * num_ranks * a.max_tokens : end;
}

/* By the block: first rows and totals. COUNTS of all ranks are here; False: they do not agree, or
 * a slot is crowded. A barrier must follow. */
static __device__ inline bool nep_place_first(const nep_place &p)
{
    bool agrees = true;
    for (uint32_t to = threadIdx.x / 32; to < p.group.num_ranks; to += blockDim.x / 32) {
        const struct nep_cuda_message *message = nep_message_at(p.group, p.group.rank, p.op, to);
        uint64_t is_of = message->op;
        uint64_t digest = message->digest;
        uint64_t real = 0;
        uint64_t rows = nep_place_rank(p, to, false, &real);
        p.totals[to] = rows;
        agrees = agrees && real != UINT64_MAX;
        if (is_of != p.op || digest != p.args.digest) {
            nep_give_up(p.group, p.op,
                        NEP_CUDA_STATUS(NEP_CUDA_DISAGREE, NEP_CUDA_PHASE_COUNTS, to));
            agrees = false;
        }
    }
    return agrees;
}

/* By the block: what comes to this rank, for the host, for pull and for stage. */
static __device__ inline void nep_place_received(const nep_place &p)
{
    uint32_t num_ranks = p.group.num_ranks;
    uint32_t slots = p.args.slots_per_rank;
    uint32_t lane = threadIdx.x % 32;
    uint32_t warp = threadIdx.x / 32;
    uint32_t num_warps = blockDim.x / 32;
    if (warp == 0) {
        uint64_t real = 0;
        uint64_t rows = nep_place_rank(p, p.group.rank, true, &real);
        if (lane == 0) {
            p.routing.received[0] = rows;
            p.routing.received[1] = real;
        }
    }
    for (uint32_t s = warp == 0 ? num_warps - 1 : warp - 1; s < num_ranks; s += num_warps) {
        const uint32_t *rows = nep_rows_per_rank(p.group, p.op, s);
        uint32_t sum = 0;
        for (uint32_t l = lane; l < slots; l += 32) {
            sum += rows[num_ranks + p.group.rank * slots + l];
        }
        sum = __reduce_add_sync(0xffffffffu, sum);
        if (lane == 0) {
            p.routing.received_rows[slots + s] =
                p.args.layout == NEP_LAYOUT_RANK ? rows[p.group.rank] : sum;
        }
    }
}

#endif
