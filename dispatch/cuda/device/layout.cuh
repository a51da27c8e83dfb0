/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Route and layout: ids become slots, slots become counts and, for every row, the number of rows of
 * this rank that lie before it in its bucket (a rank, or a slot). One launch, nothing cleared.
 *
 * Blocks own consecutive tokens, warps consecutive tokens of their block, lanes consecutive (token,
 * k) pairs: order in the machine is order in the output. Inside a warp __match_any_sync finds the
 * lanes of one bucket; warps are added up in shared memory; blocks in words of (epoch, count) that
 * validate themselves. A block reads its predecessors only, which were scheduled before it, so it
 * needs no co-residency. Atomics only count, where order cannot show.
 *
 * Rejected: sorting pairs by bucket, three passes over memory; and a cursor per bucket that rows
 * fetch from atomically, which is fast and gives another order every time.
 */
#ifndef NEP_DISPATCH_CUDA_DEVICE_LAYOUT_CUH
#define NEP_DISPATCH_CUDA_DEVICE_LAYOUT_CUH

#include "dispatch/cuda/device/launch.cuh"
#include "dispatch/cuda/device/wait.cuh"

#define NEP_CHOOSE_FN static __device__ __forceinline__
#include "placement/choose_impl.h"

namespace
{

struct layout_args {
    struct nep_cuda_group group;
    struct nep_cuda_routing routing;
    struct nep_cuda_input in;
    struct nep_cuda_output out;
    uint32_t num_ranks; /* R on all nodes: the group's, if there is one node */
    uint32_t rank;
    uint32_t slots_per_rank;
    uint32_t top_k;
    uint32_t num_nodes;
    uint32_t num_buckets;
    bool is_rank_layout;
    bool is_bound;
    bool is_quiet; /* counts alone: nothing begins */
};

/* Where slots and indexes go: global, or shared where a block does this for itself. */
struct layout_tables {
    uint32_t *slots; /* [T][K] */
    uint32_t *index;
    bool is_filled; /* slots are there before layout_block */
};

/* Sections of the counts. */
__device__ __forceinline__ uint32_t node_section(const layout_args &a)
{
    return a.num_ranks;
}

__device__ __forceinline__ uint32_t slot_section(const layout_args &a)
{
    return a.num_ranks + a.num_nodes;
}

__device__ __forceinline__ uint32_t num_counts(const layout_args &a)
{
    return slot_section(a) + a.num_ranks * a.slots_per_rank;
}

__device__ __forceinline__ int32_t take_id(const layout_args &a, uint64_t op, uint64_t at,
                                           bool *is_bad_p = nullptr)
{
    int64_t id = a.in.id_type == NEP_IDS_INT64 ? ((const int64_t *)a.in.ids)[at]
                                               : ((const int32_t *)a.in.ids)[at];
    if (id < -1 || id >= (int64_t)a.in.copies.num_experts) {
        nep_give_up(a.group, op, NEP_CUDA_STATUS(NEP_CUDA_BAD_ID, NEP_CUDA_PHASE_LAYOUT, at));
        if (is_bad_p != nullptr) {
            *is_bad_p = true;
        }
        return -1;
    }
    return (int32_t)id;
}

/* Experts with one copy need no choice: their slots are looked up while pairs are counted. */
__device__ __forceinline__ bool is_looked_up(const layout_args &a, const layout_tables &tb)
{
    return a.in.ids != nullptr && a.in.copies.is_single && !tb.is_filled;
}

/* By a block that does all of it: ids and the table of slots into the cache, for fill_slots. */
__device__ __forceinline__ void prefetch_ids(const layout_args &a)
{
    const uint32_t kLine = 128;
    uint32_t bytes = a.in.num_tokens * a.top_k * (a.in.id_type == NEP_IDS_INT64 ? 8 : 4);
    uint32_t at = threadIdx.x * kLine;
    uint32_t other = (blockDim.x - 1 - threadIdx.x) * kLine;
    if (a.in.ids != nullptr && at < bytes) {
        nep_prefetch((const char *)a.in.ids + at);
    }
    if (a.in.ids != nullptr && a.in.copies.is_single && other < a.in.copies.num_experts * 4) {
        nep_prefetch((const char *)a.in.copies.slot + other);
    }
}

/* No id is read after fill_slots. */
__device__ __forceinline__ bool needs_no_choice(const layout_args &a)
{
    return a.in.ids == nullptr || a.in.copies.is_single;
}

/* Slots that need no choice, a pair per thread. False: an id does not exist, and this rank gave up.
 * A barrier must follow. */
__device__ __forceinline__ bool fill_slots(const layout_args &a, const layout_tables &tb,
                                           uint64_t op)
{
    uint32_t pairs = a.in.num_tokens * a.top_k;
    bool is_bad = false;
    for (uint32_t i = threadIdx.x; i < pairs; i += blockDim.x) {
        if (a.in.ids == nullptr) {
            tb.slots[i] = a.routing.slots[i];
        } else if (a.in.copies.is_single) {
            int32_t id = take_id(a, op, i, &is_bad);
            tb.slots[i] = id < 0 ? NEP_SLOT_NONE : a.in.copies.slot[id];
        }
    }
    return !is_bad;
}

/* Slots of the block's tokens [begin, end), where there is a choice. */
__device__ void route(const layout_args &a, const layout_tables &tb, uint64_t op, uint32_t begin,
                      uint32_t end)
{
    if (needs_no_choice(a)) {
        return;
    }
    for (uint32_t t = begin + threadIdx.x; t < end; t += blockDim.x) {
        int32_t ids[NEP_CHOOSE_MAX_K];
        for (uint32_t k = 0; k < a.top_k; k++) {
            ids[k] = take_id(a, op, (uint64_t)t * a.top_k + k);
        }
        nep_choose_one(&a.in.copies, a.rank, t, ids, a.top_k, tb.slots + (uint64_t)t * a.top_k);
    }
    __syncthreads();
}

/* One pair of a warp's step. */
struct pair {
    uint32_t at; /* into slots and index */
    uint32_t slot;
    uint32_t bucket; /* NEP_SLOT_NONE: no row begins here */
    uint32_t first;  /* lane that holds the row of this pair */
};

/* Lanes of the warp that hold the same key; every lane takes part. */
__device__ __forceinline__ uint32_t same(uint32_t key)
{
    return __match_any_sync(0xffffffffu, key);
}

/* What a pair is known by: an id, or its slot; -1: there is none. Loaded one step ahead. */
__device__ __forceinline__ int32_t peek(const layout_args &a, const layout_tables &tb, uint64_t op,
                                        uint32_t token, uint32_t end)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t t = token + lane / a.top_k;
    if (lane / a.top_k >= 32 / a.top_k || t >= end) {
        return -1;
    }
    uint64_t at = (uint64_t)t * a.top_k + lane % a.top_k;
    return is_looked_up(a, tb) ? take_id(a, op, at) : (int32_t)tb.slots[at];
}

/* One node: the tokens of a warp's step that have a slot at all, in one addition. */
__device__ __forceinline__ void count_tokens(const layout_args &a, bool is_used, uint32_t in_step,
                                             uint32_t *counts)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t used = __ballot_sync(0xffffffffu, is_used);
    uint32_t mine = (a.top_k == 32 ? ~0u : (1u << a.top_k) - 1) << in_step * a.top_k;
    bool is_first = is_used && __ffs(used & mine) - 1 == lane;
    uint32_t tokens = __popc(__ballot_sync(0xffffffffu, is_first));
    if (lane == 0 && tokens != 0) {
        atomicAdd(&counts[node_section(a)], tokens);
    }
}

__device__ __forceinline__ pair take_pair(const layout_args &a, const layout_tables &tb,
                                          uint32_t token, uint32_t end, int32_t peeked,
                                          uint32_t *counts)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t in_step = lane / a.top_k;
    pair p;
    p.at = (token + in_step) * a.top_k + lane % a.top_k;
    p.slot = (uint32_t)peeked; /* -1 is NEP_SLOT_NONE */
    if (is_looked_up(a, tb)) {
        p.slot = peeked < 0 ? NEP_SLOT_NONE : a.in.copies.slot[peeked];
        if (in_step < 32 / a.top_k && token + in_step < end) {
            tb.slots[p.at] = p.slot;
        }
    }
    bool is_used = p.slot != NEP_SLOT_NONE;
    uint32_t rank = is_used ? p.slot / a.slots_per_rank : 0;
    uint32_t node = is_used && a.num_nodes > 1 ? a.in.copies.node_of_rank[rank] : 0;
    /* Keys of unused lanes differ from all others, and from each other. */
    uint32_t lonely = 0x80000000u + lane;
    uint32_t rank_mask = same(is_used ? in_step * a.num_ranks + rank : lonely);
    uint32_t node_mask = 0;
    if (a.num_nodes > 1) {
        node_mask = same(is_used ? in_step * a.num_nodes + node : lonely);
    }
    p.first = __ffs(rank_mask) - 1;
    bool is_first = is_used && p.first == lane;
    if (is_first) {
        atomicAdd(&counts[rank], 1u);
    }
    if (a.num_nodes == 1) {
        count_tokens(a, is_used, in_step, counts);
    } else if (is_used && __ffs(node_mask) - 1 == lane) {
        atomicAdd(&counts[node_section(a) + node], 1u);
    }
    if (is_used) {
        atomicAdd(&counts[slot_section(a) + p.slot], 1u);
    }
    if (!a.is_rank_layout) {
        p.first = lane;
    }
    p.bucket = !is_used           ? NEP_SLOT_NONE
               : a.is_rank_layout ? (is_first ? rank : NEP_SLOT_NONE)
                                  : p.slot;
    return p;
}

/* Rows before each row inside its warp, into index; the warp's totals into hist. */
__device__ void index_in_warp(const layout_args &a, const layout_tables &tb, uint64_t op,
                              uint32_t begin, uint32_t end, uint32_t *hist, uint32_t *counts)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t step = 32 / a.top_k;
    int32_t next = peek(a, tb, op, begin, end);
    for (uint32_t token = begin; token < end; token += step) {
        int32_t now = next;
        next = peek(a, tb, op, token + step, end);
        pair p = take_pair(a, tb, token, end, now, counts);
        bool has_row = p.bucket != NEP_SLOT_NONE;
        uint32_t mask = same(has_row ? p.bucket : 0x80000000u + lane);
        uint32_t before = has_row ? hist[p.bucket] : 0;
        uint32_t index = before + __popc(mask & ((1u << lane) - 1));
        __syncwarp();
        if (has_row && __ffs(mask) - 1 == lane) {
            hist[p.bucket] = before + __popc(mask);
        }
        __syncwarp();
        index = __shfl_sync(0xffffffffu, index, p.first);
        if (p.slot != NEP_SLOT_NONE) {
            tb.index[p.at] = index;
        }
    }
}

/* What earlier blocks counted under this number; false: expired. Eight loads in flight. */
__device__ bool count_before(const layout_args &a, uint64_t op, uint64_t epoch, uint32_t block,
                             uint32_t number, uint32_t *before_p)
{
    const uint64_t *words = a.routing.block_counts + number;
    uint32_t sum = 0;
    for (uint32_t first = 0; first < block; first += 8) {
        uint64_t start = 0;
        for (;;) {
            uint64_t value[8];
            bool is_there = true;
            uint32_t part = 0;
#pragma unroll
            for (uint32_t i = 0; i < 8; i++) {
                value[i] = epoch << 32;
                if (first + i < block) {
                    value[i] = nep_ld_relaxed_gpu(words + (uint64_t)(first + i) * num_counts(a));
                }
            }
#pragma unroll
            for (uint32_t i = 0; i < 8; i++) {
                is_there = is_there && value[i] >> 32 == (epoch & 0xffffffffu);
                part += (uint32_t)value[i];
            }
            if (is_there) {
                sum += part;
                break;
            }
            if (start == 0) {
                start = nep_globaltimer();
            } else if (nep_globaltimer() - start > a.group.timeout_ns) {
                nep_give_up(a.group, op,
                            NEP_CUDA_STATUS(NEP_CUDA_EXPIRED, NEP_CUDA_PHASE_LAYOUT, a.group.rank));
                return false;
            }
        }
    }
    *before_p = sum;
    return true;
}

/*
 * By a block that knows all totals: COUNTS, and outputs if known, to every rank; one node. A warp
 * per rank stores its message and then its words, so that none waits for the others' stores.
 */
__device__ void send_counts(const layout_args &a, const uint32_t *totals, uint64_t op)
{
    uint32_t num_ranks = a.group.num_ranks;
    uint32_t num = num_ranks + num_ranks * a.slots_per_rank;
    uint32_t lane = threadIdx.x % 32;
    uint32_t num_warps = blockDim.x / 32;
    /* The last warps: the first ones have buckets to add up. */
    for (uint32_t r = num_warps - 1 - threadIdx.x / 32; r < num_ranks; r += num_warps) {
        struct nep_cuda_message *head = nep_message_at(a.group, r, op, a.group.rank);
        uint32_t *rows = (uint32_t *)(head + 1);
        if (lane == 0) {
            *head = {op, a.in.digest, a.in.num_tokens, a.in.x_offset, a.in.scales_offset, 0};
        } else if (lane == 1 && a.is_bound) {
            nep_bind_store(a.group, a.out, op, r);
        }
        for (uint32_t i = lane; i < num; i += 32) {
            rows[i] = totals[i < num_ranks ? i : slot_section(a) + i - num_ranks];
        }
        __syncwarp();
        if (lane < (a.is_bound ? 2 : 1)) {
            uint64_t offset = lane == 0 ? a.group.words.counts : a.group.words.bound;
            /* Release: pairs with the acquire in nep_wait_word there. */
            nep_st_release_sys(nep_word_at(a.group, r, offset, op, a.group.rank), op);
        }
    }
}

/* The weights of a fresh routing stay with it; a held one takes new ones where there are some. */
__device__ void keep_weights(const layout_args &a, uint32_t block, uint32_t num_blocks)
{
    if (a.in.weight == nullptr && a.in.ids == nullptr) {
        return;
    }
    uint32_t pairs = a.in.num_tokens * a.top_k;
    for (uint32_t i = block * blockDim.x + threadIdx.x; i < pairs; i += num_blocks * blockDim.x) {
        a.routing.weights[i] = a.in.weight != nullptr ? a.in.weight[i] : 1.0f;
    }
}

/*
 * All of it, by one block of num_blocks; shared: counts and a histogram per warp. Only the block
 * that says so sends COUNTS. Ends without a barrier.
 */
__device__ __forceinline__ void layout_block(const layout_args &a, const layout_tables &tb,
                                             uint64_t op, uint64_t epoch, uint32_t *shared,
                                             uint32_t block, uint32_t num_blocks, bool is_sender)
{
    uint32_t warp = threadIdx.x / 32;
    uint32_t num_warps = blockDim.x / 32;
    uint32_t *counts = shared;
    uint32_t *hists = shared + num_counts(a);
    for (uint32_t i = threadIdx.x; i < num_counts(a) + num_warps * a.num_buckets; i += blockDim.x) {
        shared[i] = 0;
    }
    uint32_t step = 32 / a.top_k;
    uint32_t warps = num_blocks * num_warps;
    uint32_t per_warp = ((a.in.num_tokens + warps - 1) / warps + step - 1) / step * step;
    uint32_t block_begin = min(a.in.num_tokens, block * num_warps * per_warp);
    uint32_t block_end = min(a.in.num_tokens, block_begin + num_warps * per_warp);
    uint32_t begin = min(block_end, block_begin + warp * per_warp);
    uint32_t end = min(block_end, begin + per_warp);
    __syncthreads();
    route(a, tb, op, block_begin, block_end);
    index_in_warp(a, tb, op, begin, end, hists + warp * a.num_buckets, counts);
    __syncthreads();
    bool is_told = is_sender && !a.is_quiet;
    /* One look at memory less where all ids have been looked at before the last barrier. */
    bool is_fine = tb.is_filled && needs_no_choice(a);
    if (num_blocks == 1 && is_told && (is_fine || !nep_is_stuck(a.group))) {
        send_counts(a, counts, op); /* these are all: no block comes before */
    }
    for (uint32_t i = threadIdx.x; num_blocks > 1 && i < num_counts(a); i += blockDim.x) {
        nep_st_relaxed_gpu(a.routing.block_counts + (uint64_t)block * num_counts(a) + i,
                           epoch << 32 | counts[i]);
    }
    bool is_last = block == num_blocks - 1;
    uint32_t bucket_section = a.is_rank_layout ? 0 : slot_section(a);
    for (uint32_t i = threadIdx.x; i < num_counts(a); i += blockDim.x) {
        bool is_bucket = i >= bucket_section && i - bucket_section < a.num_buckets;
        uint32_t before = 0;
        if ((!is_bucket && !is_last) || !count_before(a, op, epoch, block, i, &before)) {
            continue;
        }
        uint32_t run = before;
        for (uint32_t w = 0; is_bucket && w < num_warps; w++) {
            uint32_t *cell = &hists[w * a.num_buckets + i - bucket_section];
            uint32_t rows = *cell;
            *cell = run;
            run += rows;
        }
        if (before != 0) {
            counts[i] += before;
        }
        if (is_last && is_sender) {
            a.routing.counts[i] = counts[i];
        }
    }
    __syncthreads();
    if (num_blocks > 1 && is_last && is_told && !nep_is_stuck(a.group)) {
        send_counts(a, counts, op);
    }
    if (is_sender || num_blocks > 1) {
        keep_weights(a, block, num_blocks);
    }
    for (uint64_t p = (uint64_t)begin * a.top_k + threadIdx.x % 32; p < (uint64_t)end * a.top_k;
         p += 32) {
        uint32_t slot = tb.slots[p];
        if (slot != NEP_SLOT_NONE) {
            uint32_t bucket = a.is_rank_layout ? slot / a.slots_per_rank : slot;
            tb.index[p] += hists[warp * a.num_buckets + bucket];
        }
    }
}

/* What a launch passes; out may be NULL. */
inline layout_args layout_args_of(const struct nep_cuda_dispatch *dispatch)
{
    const struct nep_cuda_shape *shape = dispatch->shape;
    layout_args args = {};
    args.group = *dispatch->group;
    args.routing = *dispatch->routing;
    args.in = *dispatch->in;
    args.is_bound = dispatch->out != nullptr;
    if (args.is_bound) {
        args.out = *dispatch->out;
    }
    args.num_ranks = shape->num_ranks;
    args.rank = shape->rank;
    args.slots_per_rank = shape->slots_per_rank;
    args.top_k = shape->top_k;
    args.num_nodes = shape->num_nodes;
    args.is_rank_layout = shape->layout == NEP_LAYOUT_RANK;
    args.num_buckets = shape->num_ranks * (args.is_rank_layout ? 1 : shape->slots_per_rank);
    return args;
}

} // namespace

#endif
