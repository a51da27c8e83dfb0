/* SPDX-License-Identifier: Apache-2.0 */
/*
 * COUNTS over several nodes and what follows from them, by one block: what far_counts.cu launches
 * by itself, and the kernels that do a whole dispatch or combine.
 */
#ifndef NEP_DISPATCH_CUDA_DEVICE_FAR_COUNTS_CUH
#define NEP_DISPATCH_CUDA_DEVICE_FAR_COUNTS_CUH

#include "dispatch/cuda/device/far.cuh"

namespace far_counts
{

enum { MOST_WARPS = 32 };

struct counts_args {
    struct nep_far far;
    struct nep_far_routing routing;
    const uint32_t *slots;
    const uint32_t *counts;
    struct nep_far_output out;
    uint64_t y;
    uint64_t y_weights;
    uint64_t y_step;
    uint64_t weights_step;
    uint64_t digest; /* of the map */
    uint32_t num_tokens;
    uint32_t kind;
    bool is_bound;
};

__device__ __forceinline__ bool goes_to(const counts_args &a, uint32_t token, uint32_t node)
{
    const uint32_t *slots = a.slots + (uint64_t)token * a.far.shape.top_k;
    uint32_t is_there = 0;
    /* No early end: loads of all k are in flight together. */
#pragma unroll 8
    for (uint32_t k = 0; k < a.far.shape.top_k; k++) {
        uint32_t slot = slots[k];
        uint32_t rank = slot != NEP_SLOT_NONE ? slot / a.far.shape.slots_per_rank : a.far.rank;
        is_there |= slot != NEP_SLOT_NONE && a.far.node_of_rank[rank] == node ? 1 : 0;
    }
    return is_there != 0;
}

/* By a block: tokens that go to the node, ascending, and the inverse. Returns how many. */
__device__ inline uint32_t list_tokens(const counts_args &a, uint32_t node)
{
    __shared__ uint32_t warp_rows[MOST_WARPS];
    uint32_t *tokens = a.routing.node_tokens + (uint64_t)node * a.far.shape.max_tokens;
    uint32_t *row_of = a.routing.row_of + (uint64_t)node * a.far.shape.max_tokens;
    uint32_t lane = threadIdx.x % 32;
    uint32_t warp = threadIdx.x / 32;
    uint32_t num = 0;
    for (uint32_t first = 0; first < a.num_tokens; first += blockDim.x) {
        uint32_t token = first + threadIdx.x;
        bool is_row = token < a.num_tokens && goes_to(a, token, node);
        uint32_t mask = __ballot_sync(0xffffffffu, is_row);
        if (lane == 0) {
            warp_rows[warp] = __popc(mask);
        }
        __syncthreads();
        uint32_t before = num;
        for (uint32_t w = 0; w < blockDim.x / 32; w++) {
            uint32_t rows = warp_rows[w];
            before += w < warp ? rows : 0;
            num += rows;
        }
        uint32_t row = before + __popc(mask & ((1u << lane) - 1));
        if (is_row) {
            tokens[row] = token;
        }
        if (token < a.num_tokens) {
            row_of[token] = is_row ? row : NEP_SLOT_NONE;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        a.routing.node_rows[node] = num;
    }
    __syncthreads();
    return num;
}

/* By a block: head and tables of a message to `node`. */
__device__ inline void fill(const counts_args &a, uint32_t node, uint64_t op, uint32_t num_rows,
                            uint32_t num_tiles, uint64_t tiles_end, struct nep_counts_msg *msg)
{
    const struct nep_far &far = a.far;
    uint32_t slots = far.shape.slots_per_rank;
    uint32_t first = far.node_first[node];
    uint32_t ranks = far.node_first[node + 1] - first;
    bool is_dispatch = a.kind == NEP_KIND_DISPATCH;
    uint32_t bytes = (uint32_t)sizeof *msg + (is_dispatch ? ranks * (1 + slots) * 4 : 0);
    if (threadIdx.x == 0) {
        struct nep_counts_msg m = {};
        m.op = op;
        m.map_digest = a.digest;
        m.tiles_end = tiles_end;
        m.source = far.rank;
        m.kind = a.kind;
        m.num_tokens = a.num_tokens;
        m.num_rows = num_rows;
        m.num_tiles = num_tiles;
        m.bytes = bytes;
        m.has_weights =
            !is_dispatch && a.y_weights != NEP_CUDA_NONE ? NEP_WEIGHTS_BACK : NEP_WEIGHTS_HELD;
        *msg = m;
    }
    uint32_t *rows = (uint32_t *)(msg + 1);
    const uint32_t *slot_counts = a.counts + far.num_ranks + far.num_nodes;
    for (uint32_t i = threadIdx.x; is_dispatch && i < ranks * (1 + slots); i += blockDim.x) {
        uint32_t g = i < ranks ? i : (i - ranks) / slots;
        uint32_t rank = far.node_rank[first + g];
        rows[i] = i < ranks ? a.counts[rank] : slot_counts[rank * slots + (i - ranks) % slots];
    }
}

/* The message and buffers of this rank, to its node. */
__device__ inline void publish(const counts_args &a, uint64_t op)
{
    const struct nep_far &far = a.far;
    const struct nep_region &region = far.own;
    uint64_t slot = nep_far_slot(far, op);
    char *own = far.near[far.local];
    bool is_dispatch = a.kind == NEP_KIND_DISPATCH;
    fill(a, far.node, op, 0, 0, 0,
         (struct nep_counts_msg *)(own + region.counts + slot * region.counts_bytes));
    __syncthreads();
    if (threadIdx.x == 32) { /* at once: a second release would wait for the first's store */
        nep_st_release_sys((uint64_t *)(own + region.counts_word) + slot, op + 1);
    } else if (threadIdx.x == 0) {
        if (is_dispatch && a.is_bound) {
            nep_far_bind_own(far, region.out_bind, a.out, op);
        } else if (!is_dispatch) {
            struct nep_far_output rows = {};
            rows.x = a.y + a.y_step * nep_far_area(far, op);
            rows.topk_weights = a.y_weights != NEP_CUDA_NONE
                                    ? a.y_weights + a.weights_step * nep_far_area(far, op)
                                    : NEP_CUDA_NONE;
            nep_far_bind_own(far, region.y_bind, rows, op);
        }
    }
    __syncthreads(); /* this block waits for these words itself, next */
}

/* For statistics: tokens that stay on their node. After everything that others wait for. */
[[maybe_unused]] static __device__ __noinline__ void count_local(const counts_args &a)
{
    __shared__ uint32_t num;
    if (threadIdx.x == 0) {
        num = 0;
    }
    __syncthreads();
    for (uint32_t t = threadIdx.x; t < a.num_tokens; t += blockDim.x) {
        const uint32_t *slots = a.slots + (uint64_t)t * a.far.shape.top_k;
        bool leaves = false;
        for (uint32_t k = 0; k < a.far.shape.top_k; k++) {
            uint32_t slot = slots[k];
            leaves =
                leaves || (slot != NEP_SLOT_NONE &&
                           a.far.node_of_rank[slot / a.far.shape.slots_per_rank] != a.far.node);
        }
        if (!leaves) {
            atomicAdd(&num, 1u);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        a.far.state->tokens_local += num;
        nep_st_relaxed_sys(&a.far.page->tokens_local, a.far.state->tokens_local);
    }
}

/* By a block, which all look at once: a loop would load one after the other. */
__device__ inline uint32_t rank_of_control(const nep_far &far, uint32_t control)
{
    __shared__ uint32_t found;
    if (threadIdx.x < far.num_ranks &&
        far.control[far.rank * far.num_ranks + threadIdx.x] == control) {
        found = threadIdx.x;
    }
    __syncthreads();
    return found;
}

/* To a rank of another node; false: gave up. */
__device__ inline void send(const counts_args &a, uint32_t dst, uint64_t op, uint32_t num_rows,
                            uint64_t first_tile)
{
    __shared__ bool is_free;
    const struct nep_far &far = a.far;
    const struct nep_region &region = far.own;
    uint32_t control = far.control[far.rank * far.num_ranks + dst];
    uint64_t idx = (uint64_t)control * far.window + nep_far_slot(far, op);
    if (threadIdx.x == 0) {
        is_free =
            op < far.window || nep_far_wait_relayed(far, true, &far.page->counts_free[control],
                                                    &far.state->counts_free[control],
                                                    op - far.window + 1, NEP_FAR_PHASE_SLOT, dst);
    }
    __syncthreads();
    if (!is_free) {
        return;
    }
    uint32_t tiles = nep_far_tiles(far, num_rows);
    fill(a, far.node_of_rank[dst], op, num_rows, tiles, first_tile + tiles,
         (struct nep_counts_msg *)(far.data[far.local] + region.send_counts +
                                   idx * region.send_counts_bytes));
    __syncthreads();
    if (threadIdx.x == 0) {
        nep_far_post(far, nep_ring_command(NEP_KIND_COUNTS, control, a.kind, op, 0));
        nep_far_stamp(far, NEP_FAR_AT_COUNTS_POSTED);
    }
}

/* ---- place ---------------------------------------------------------------------------------- */

struct place_args {
    struct nep_far far;
    struct nep_far_routing routing;
    struct nep_cuda_routing base;
    uint64_t digest;
};

__device__ __forceinline__ bool has_fixed_slots(const struct nep_far &far)
{
    return far.shape.layout == NEP_LAYOUT_EXPERT_PADDED ||
           far.shape.layout == NEP_LAYOUT_EXPERT_FRONT;
}

/* All COUNTS are here. By a block. */
__device__ inline bool wait_counts(const struct nep_far &far, uint64_t op)
{
    bool is_there = true;
    for (uint32_t s = threadIdx.x; s < far.num_ranks; s += blockDim.x) {
        const uint64_t *word = nep_far_counts_word(far, s, op);
        is_there = far.node_of_rank[s] == far.node
                       ? nep_near_wait(far, word, op + 1, NEP_CUDA_PHASE_COUNTS, s, far.timeout_ns)
                       : nep_far_wait(far, word, op + 1, NEP_CUDA_PHASE_COUNTS, s);
    }
    return __syncthreads_and(is_there) != 0;
}

__device__ __forceinline__ const uint32_t *tables_of(const struct nep_far &far, uint32_t source,
                                                     uint64_t op)
{
    return (const uint32_t *)(nep_far_counts_at(far, source, op) + 1);
}

/* A slot of a fixed size gets more of one source than it has room for: an id came twice. */
__device__ __forceinline__ bool is_crowded(const struct nep_far &far, uint32_t section,
                                           uint32_t rows)
{
    return section != 0 && has_fixed_slots(far) && rows > far.shape.max_tokens;
}

/* A thread per bucket: rows of earlier sources; the sum over all into totals. */
__device__ inline void add_sources(const place_args &a, const uint32_t *const *tables,
                                   uint32_t num_buckets, uint32_t section, uint32_t *totals)
{
    for (uint32_t b = threadIdx.x; b < num_buckets; b += blockDim.x) {
        uint32_t sum = 0;
        for (uint32_t s = 0; s < a.far.num_ranks; s += 8) {
            uint32_t rows[8];
#pragma unroll
            for (uint32_t i = 0; i < 8; i++) {
                rows[i] = s + i < a.far.num_ranks ? tables[s + i][section + b] : 0;
            }
#pragma unroll
            for (uint32_t i = 0; i < 8; i++) {
                if (s + i < a.far.num_ranks) {
                    a.routing.first[(s + i) * num_buckets + b] = sum;
                }
                if (is_crowded(a.far, section, rows[i])) {
                    uint32_t g = b / a.far.shape.slots_per_rank;
                    nep_far_give_up(a.far, NEP_CUDA_STATUS(NEP_CUDA_CROWDED, NEP_CUDA_PHASE_COUNTS,
                                                           nep_far_rank_at(a.far, g)));
                }
                sum += rows[i];
            }
        }
        totals[b] = sum;
    }
}

/* A warp per rank of the node: where its slots begin. Returns its rows, padding included. */
__device__ inline uint64_t place_slots(const place_args &a, uint32_t g, uint32_t *totals)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t slots = a.far.shape.slots_per_rank;
    uint32_t align = a.far.shape.alignment > 1 ? a.far.shape.alignment : 1;
    bool is_padded = has_fixed_slots(a.far);
    bool is_rank = a.far.shape.layout == NEP_LAYOUT_RANK;
    uint32_t end = 0;
    uint64_t real = 0;
    for (uint32_t chunk = 0; chunk < slots; chunk += 32) {
        uint32_t l = chunk + lane;
        uint32_t all = l < slots ? totals[g * slots + l] : 0;
        uint32_t room = (all + align - 1) / align * align;
        uint32_t sum = room;
        for (uint32_t d = 1; d < 32; d <<= 1) {
            uint32_t other = __shfl_up_sync(0xffffffffu, sum, d);
            sum += lane >= d ? other : 0;
        }
        uint32_t start = is_rank     ? 0
                         : is_padded ? l * a.far.num_ranks * a.far.shape.max_tokens
                                     : end + sum - room;
        end += __shfl_sync(0xffffffffu, sum, 31);
        real += __reduce_add_sync(0xffffffffu, all);
        if (l < slots) {
            if (g == a.far.local) {
                a.base.received[2 + l] = start;
                a.base.received_rows[l] = all;
            }
            totals[g * slots + l] = start;
        }
    }
    if (g == a.far.local && lane == 0 && !is_rank) {
        a.base.received[1] = real;
    }
    return is_padded ? (uint64_t)slots * a.far.num_ranks * a.far.shape.max_tokens : end;
}

__device__ inline void count_sources(const place_args &a, uint64_t op)
{
    const struct nep_far &far = a.far;
    uint32_t slots = far.shape.slots_per_rank;
    for (uint32_t s = threadIdx.x; s < far.num_ranks; s += blockDim.x) {
        const struct nep_counts_msg *msg = nep_far_counts_at(far, s, op);
        const uint32_t *rows = (const uint32_t *)(msg + 1);
        uint32_t here = rows[far.local];
        if (far.shape.layout != NEP_LAYOUT_RANK) {
            here = 0;
#pragma unroll 8
            for (uint32_t l = 0; l < slots; l++) {
                here += rows[far.node_size + far.local * slots + l];
            }
        }
        a.base.received_rows[slots + s] = here;
        bool is_far = far.node_of_rank[s] != far.node;
        a.routing.in[s].rows = is_far ? msg->num_rows : 0;
        a.routing.in[s].tiles = is_far ? msg->num_tiles : 0;
        a.routing.in[s].first_tile = is_far ? msg->tiles_end - msg->num_tiles : 0;
        if (msg->op != op || msg->source != s || msg->kind != NEP_KIND_DISPATCH ||
            msg->num_rows > far.shape.max_tokens || msg->map_digest != a.digest) {
            nep_far_give_up(far, NEP_CUDA_STATUS(NEP_CUDA_DISAGREE, NEP_CUDA_PHASE_COUNTS, s));
        }
    }
}

/* By a block; totals: shared, [G * L], in the rank layout [G] behind it. False: gave up. */
[[maybe_unused]] static __device__ __noinline__ bool place(const place_args &a, uint64_t op,
                                                           uint32_t *totals)
{
    __shared__ const uint32_t *tables[NEP_FAR_MAX_RANKS];
    const struct nep_far &far = a.far;
    if (threadIdx.x == 0) {
        nep_far_stamp(far, NEP_FAR_AT_PLACE);
    }
    if (!wait_counts(far, op)) {
        return false;
    }
    if (threadIdx.x == 0) {
        nep_far_stamp(far, NEP_FAR_AT_COUNTS_HERE);
    }
    bool is_rank = far.shape.layout == NEP_LAYOUT_RANK;
    uint32_t slots = far.shape.slots_per_rank;
    uint32_t node_slots = far.node_size * slots;
    uint32_t *rank_totals = totals + node_slots;
    for (uint32_t s = threadIdx.x; s < far.num_ranks; s += blockDim.x) {
        tables[s] = tables_of(far, s, op);
    }
    __syncthreads();
    /* Rows per slot always, since they are reported; `first` of the layout's own buckets last. */
    add_sources(a, tables, node_slots, far.node_size, totals);
    __syncthreads();
    if (is_rank) {
        add_sources(a, tables, far.node_size, 0, rank_totals);
        __syncthreads();
    }
    for (uint32_t g = threadIdx.x / 32; g < far.node_size; g += blockDim.x / 32) {
        uint64_t rows = place_slots(a, g, totals);
        rows = is_rank ? rank_totals[g] : rows;
        if (threadIdx.x % 32 == 0) {
            a.base.totals[g] = rows; /* compared with the outputs when those are known */
        }
        if (threadIdx.x % 32 == 0 && g == far.local) {
            a.base.received[0] = rows;
            if (is_rank) {
                a.base.received[1] = rows;
            }
        }
    }
    __syncthreads();
    bool is_padded = far.shape.layout == NEP_LAYOUT_EXPERT_PADDED;
    for (uint32_t i = threadIdx.x; !is_rank && i < far.num_ranks * node_slots; i += blockDim.x) {
        uint32_t own = is_padded ? i / node_slots * far.shape.max_tokens : a.routing.first[i];
        a.routing.first[i] = totals[i % node_slots] + own;
    }
    count_sources(a, op);
    if (threadIdx.x == 0) {
        nep_far_stamp(far, NEP_FAR_AT_PLACED);
    }
    return true;
}

inline counts_args dispatch_counts(const struct nep_far_dispatch *d, unsigned flags)
{
    counts_args args = {};
    args.far = *d->far;
    args.routing = *d->far_routing;
    args.slots = d->routing->slots;
    args.counts = d->routing->counts;
    args.is_bound = (flags & NEP_FAR_BINDS) != 0;
    if (args.is_bound) {
        args.out = *d->out;
    }
    args.digest = d->in->digest;
    args.num_tokens = d->in->num_tokens;
    args.kind = NEP_KIND_DISPATCH;
    return args;
}

inline counts_args combine_counts(const struct nep_far_combine *c)
{
    counts_args args = {};
    args.far = *c->far;
    args.routing = *c->far_routing;
    args.counts = c->routing->counts;
    args.y = c->rows;
    args.y_weights = c->weights;
    args.y_step = c->rows_step;
    args.weights_step = c->weights_step;
    args.num_tokens = c->num_tokens;
    args.kind = NEP_KIND_COMBINE;
    return args;
}

inline place_args place_args_of(const struct nep_far_dispatch *d)
{
    place_args args = {};
    args.far = *d->far;
    args.routing = *d->far_routing;
    args.base = *d->routing;
    args.digest = d->in->digest;
    return args;
}

/* Shared memory of a launch that places: as much as the kernels beside it, since an SM that changes
 * its split stalls. */
inline uint32_t place_bytes(const struct nep_far *far, const struct nep_cuda_geometry *geometry)
{
    uint32_t bytes = far->node_size * (1 + far->shape.slots_per_rank) * 4;
    return bytes < geometry->shared_bytes ? geometry->shared_bytes : bytes;
}

/* By a block: COUNTS of a dispatch to all nodes. */
[[maybe_unused]] static __device__ __noinline__ void
tell_nodes(const counts_args &a, uint32_t first, uint32_t step, uint64_t op)
{
    const struct nep_far &far = a.far;
    for (uint32_t node = first; node < far.num_nodes; node += step) {
        if (node == far.node) {
            publish(a, op);
            continue;
        }
        uint32_t rows = list_tokens(a, node);
        if (threadIdx.x == 0) {
            /* Release, after a barrier: pairs with the acquire in wait_listed of the same launch.
             */
            nep_ring_raise_near(&far.state->listed[node], op + 1);
            nep_far_stamp(far, NEP_FAR_AT_LISTED);
        }
        send(a, nep_far_landing(far, far.rank, node), op, rows, far.state->next_tile[node]);
        __syncthreads(); /* shared words are used again */
    }
}

/* By a block: COUNTS of a combine; control 0 is this rank. */
__device__ inline void tell_controls(const counts_args &a, uint32_t first, uint32_t step,
                                     uint64_t op)
{
    const struct nep_far &far = a.far;
    for (uint32_t control = first; control < far.num_controls; control += step) {
        if (control == 0) {
            publish(a, op);
            continue;
        }
        uint32_t dst = rank_of_control(far, control);
        bool is_summed = nep_far_landing(far, dst, far.node) == far.rank;
        uint32_t lane = is_summed ? nep_far_lane(far, dst, far.node) : 0;
        send(a, dst, op, is_summed ? a.routing.in[dst].rows : 0,
             is_summed ? far.state->next_sums[lane] : 0);
        __syncthreads(); /* shared words are used again */
    }
}

} // namespace far_counts

#endif
