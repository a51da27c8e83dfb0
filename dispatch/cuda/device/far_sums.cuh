/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sums of a combine over several nodes: what far_reduce.cu and far_sum.cu share. Reducing is here
 * as a whole, since blocks of the summing kernel reduce what W slots did not hold. The tree and the
 * bits are those of docs/protocol.md.
 */
#ifndef NEP_DISPATCH_CUDA_DEVICE_FAR_SUMS_CUH
#define NEP_DISPATCH_CUDA_DEVICE_FAR_SUMS_CUH

#include "dispatch/cuda/device/far.cuh"

namespace far_sums
{

enum { THREADS = 768, FLIGHT = 8, MOST_ADDENDS = 32 };

struct combine_args {
    struct nep_far far;
    struct nep_far_routing routing;
    char *y;
    const char *bias[2];
    float *weights; /* [T][K]; NULL: they are not wanted here */
    struct nep_cuda_cell *cell;
    uint32_t num_tokens;
    uint32_t units;
    uint32_t own_parts;
    uint32_t tile_parts;
    uint32_t reduce_blocks; /* of sum: they do what slots did not hold */
    bool has_weights;       /* rows come with top-k weights, which are added up like them */
    bool is_whole;          /* both halves in one launch */
};

struct role {
    uint32_t block;
    uint32_t num;
};

struct addend {
    const char *row;
    float weight;
    uint32_t ends;
};

/* The three levels of the tree, for the elements of 16 bytes. */
template <class T> struct levels {
    float rank[T::num];
    float node[T::num];
    float home[T::num];

    __device__ __forceinline__ void start()
    {
#pragma unroll
        for (int i = 0; i < T::num; i++) {
            rank[i] = node[i] = home[i] = 0;
        }
    }
    __device__ __forceinline__ void add_bias(const uint4 &v)
    {
        float x[T::num];
        T::load(v, x);
#pragma unroll
        for (int i = 0; i < T::num; i++) {
            home[i] = __fadd_rn(home[i], x[i]);
        }
    }
    __device__ __forceinline__ void add(const uint4 &v, float weight, uint32_t ends)
    {
        float x[T::num];
        T::load(v, x);
        if (weight != 0) {
#pragma unroll
            for (int i = 0; i < T::num; i++) {
                rank[i] = __fmaf_rn(weight, x[i], rank[i]);
            }
        }
        if ((ends & NEP_ENDS_RANK) != 0) {
            T::round(rank);
#pragma unroll
            for (int i = 0; i < T::num; i++) {
                node[i] = __fadd_rn(node[i], rank[i]);
                rank[i] = 0;
            }
        }
        if ((ends & NEP_ENDS_NODE) != 0) {
            T::round(node);
#pragma unroll
            for (int i = 0; i < T::num; i++) {
                home[i] = __fadd_rn(home[i], node[i]);
                node[i] = 0;
            }
        }
    }
};

/* Columns [begin, end) of one sum, by a warp; eight rows in flight. kHome: into a.y; bias is added
 * before all others (its place follows from `to`: registers are short). */
template <class T, bool kHome>
__device__ __forceinline__ void sum_columns(const combine_args &a, const addend *addends,
                                            uint32_t num, char *to, uint32_t begin, uint32_t end)
{
    for (uint32_t column = begin + threadIdx.x % 32; column < end; column += 32) {
        levels<T> sum;
        sum.start();
        for (int b = 0; kHome && b < 2; b++) {
            if (a.bias[b] != nullptr) {
                sum.add_bias(nep_ld16(a.bias[b] + (to - a.y) + 16 * (uint64_t)column));
            }
        }
        for (uint32_t first = 0; first < num; first += FLIGHT) {
            uint4 v[FLIGHT];
#pragma unroll
            for (uint32_t i = 0; i < FLIGHT; i++) {
                if (first + i < num) {
                    v[i] = nep_ld16(addends[first + i].row + 16 * (uint64_t)column);
                }
            }
#pragma unroll
            for (uint32_t i = 0; i < FLIGHT; i++) {
                if (first + i < num) {
                    sum.add(v[i], addends[first + i].weight, addends[first + i].ends);
                }
            }
        }
        ((uint4 *)to)[column] = T::store(sum.home);
    }
}

/* Where each local rank's expert outputs lie, and NEP_FAR_MAX_RANKS behind that their weights; by a
 * block. False: gave up. */
__device__ inline bool find_rows(const combine_args &a, uint64_t op, const char **base)
{
    const struct nep_far &far = a.far;
    bool is_there = true;
    for (uint32_t g = threadIdx.x; g < far.node_size; g += blockDim.x) {
        const nep_far_bind *bind = nep_far_bind_at(far, g, nep_far_region(far, g).y_bind, op);
        is_there = nep_near_wait(far, &bind->word, op + 1, NEP_CUDA_PHASE_READY,
                                 nep_far_rank_at(far, g), far.timeout_ns);
        base[g] = is_there ? far.near[g] + bind->x : nullptr;
        if (a.has_weights && is_there) {
            base[NEP_FAR_MAX_RANKS + g] = far.near[g] + bind->topk_weights;
            if (bind->topk_weights == NEP_CUDA_NONE) {
                nep_far_give_up(far, NEP_CUDA_STATUS(NEP_CUDA_DISAGREE, NEP_CUDA_PHASE_READY,
                                                     nep_far_rank_at(far, g)));
                is_there = false;
            }
        }
    }
    return __syncthreads_and(is_there) != 0;
}

/* By a warp: the node's addends of a token into the table, from place `fill` on; returns the end.
 */
__device__ __forceinline__ uint32_t take_terms(const combine_args &a, const char *const *base,
                                               const struct nep_cuda_term *terms, uint32_t num,
                                               uint32_t fill, addend *addends)
{
    uint32_t lane = threadIdx.x % 32;
    if (lane < num) {
        struct nep_cuda_term term = terms[lane];
        addends[fill + lane].row = base[term.rank] + (uint64_t)term.pos * a.far.row_bytes;
        addends[fill + lane].weight = term.weight;
        addends[fill + lane].ends = term.ends;
    }
    return fill + num;
}

__device__ __forceinline__ uint32_t part_at(const combine_args &a, uint32_t part, uint32_t parts)
{
    uint32_t per_part = ((a.units + parts - 1) / parts + 31) / 32 * 32;
    return min(a.units, part * per_part);
}

/* ---- reduce --------------------------------------------------------------------------------- */

/* By two threads, a look across PCIe each: the tile may go, and its send slot is free. */
__device__ inline bool may_reduce(const combine_args &a, const role &r, uint32_t lane,
                                  uint32_t source, uint64_t number, uint64_t sequence)
{
    const struct nep_far &far = a.far;
    bool is_first = r.block == 0;
    if (threadIdx.x == 0 && number >= far.window) {
        const uint64_t *credit = nep_far_word(far, far.local, far.own.combine_credit, lane);
        return nep_far_wait_relayed(far, is_first, credit, &far.state->sums_credit[lane],
                                    number - far.window + 1, NEP_FAR_PHASE_CREDIT, source);
    }
    if (threadIdx.x == 32 && sequence >= far.window) {
        return nep_far_wait_relayed(far, is_first, &far.page->tiles_free[lane],
                                    &far.state->slot[lane], sequence - far.window + 1,
                                    NEP_FAR_PHASE_SLOT, source);
    }
    return true;
}

/*
 * The weights that came with a token's rows on this node, by a lane per k: in the order of the
 * terms, from 0, as dispatch/sums.c adds them.
 */
__device__ __forceinline__ float add_weights(const combine_args &a, const char *const *base,
                                             const struct nep_cuda_term *terms, uint32_t num,
                                             uint32_t lane)
{
    float sum = 0;
    for (uint32_t i = 0; i < num; i++) {
        struct nep_cuda_term term = terms[i];
        const float *row = (const float *)base[NEP_FAR_MAX_RANKS + term.rank] +
                           (uint64_t)term.pos * a.far.shape.top_k;
        sum = __fadd_rn(sum, *(const volatile float *)(row + lane));
    }
    return sum;
}

/* Where the weights behind a tile's rows lie. */
__device__ __forceinline__ float *tile_weights(const struct nep_far &far, char *tile,
                                               uint32_t num_rows, uint32_t row)
{
    return (float *)(tile + sizeof(struct nep_tile_msg) + (uint64_t)num_rows * far.row_bytes) +
           (uint64_t)row * far.shape.top_k;
}

/* In a loop of their own: the one over rows has no registers to spare. */
static __device__ __noinline__ void add_tile_weights(const combine_args &a, const role &r,
                                                     const char *const *base, uint64_t first,
                                                     uint32_t num, char *slot)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t top_k = a.far.shape.top_k;
    uint32_t stride = r.num * (THREADS / 32);
    for (uint32_t i = threadIdx.x / 32 * r.num + r.block; lane < top_k && i < num; i += stride) {
        uint64_t row = first + i;
        float sum =
            add_weights(a, base, a.routing.far_terms + row * top_k, a.routing.far_num[row], lane);
        tile_weights(a.far, slot, num, i)[lane] = __fadd_rn(0.0f, sum);
    }
}

template <class T>
__device__ inline void sum_tile(const combine_args &a, const role &r, const char *const *base,
                                addend *addends, uint64_t first, uint32_t num, char *slot)
{
    uint32_t stride = r.num * (THREADS / 32);
    uint32_t top_k = a.far.shape.top_k;
    for (uint32_t i = threadIdx.x / 32 * r.num + r.block; i < num * a.tile_parts; i += stride) {
        uint64_t row = first + i / a.tile_parts;
        uint32_t part = i % a.tile_parts;
        __syncwarp();
        uint32_t end = take_terms(a, base, a.routing.far_terms + row * top_k,
                                  a.routing.far_num[row], 0, addends);
        __syncwarp();
        sum_columns<T, false>(a, addends, end,
                              slot + sizeof(struct nep_tile_msg) +
                                  (uint64_t)(i / a.tile_parts) * a.far.row_bytes,
                              part_at(a, part, a.tile_parts), part_at(a, part + 1, a.tile_parts));
    }
    if (a.has_weights) {
        add_tile_weights(a, r, base, first, num, slot);
    }
}

/* The stream to a lane source: in the send half, or a launch that does both. */
__device__ __forceinline__ nep_far_stream stream_ahead(const combine_args &a, uint64_t op,
                                                       uint32_t lane)
{
    uint64_t planned = a.far.state->next_sums[lane];
    if (a.is_whole) { /* nothing is outstanding */
        return {planned, a.far.state->next_send[lane], a.far.window};
    }
    const struct nep_far_op *oldest = nep_far_oldest(a.far, op);
    return nep_far_stream_ahead(a.far, planned,
                                oldest != nullptr ? oldest->first_sums[lane] : planned, lane);
}

/* What a launch that did the send half's work, too, or the send half left. */
__device__ __forceinline__ nep_far_stream stream_left(const combine_args &a, uint64_t op,
                                                      uint32_t lane)
{
    if (a.is_whole) {
        return stream_ahead(a, op, lane);
    }
    return nep_far_stream_left(a.far, op,
                               a.far.state->ops[nep_far_slot(a.far, op)].first_sums[lane], lane);
}

template <class T>
__device__ inline bool reduce_tile(const combine_args &a, const role &r, const char *const *base,
                                   addend *addends, uint64_t op, uint32_t lane,
                                   const nep_far_stream &stream, uint32_t t)
{
    const struct nep_far &far = a.far;
    const struct nep_region &region = far.own;
    uint32_t source = far.lane_source[lane];
    uint64_t number = stream.number + t;
    uint64_t sequence = stream.sequence + t;
    if (__syncthreads_and(may_reduce(a, r, lane, source, number, sequence)) == 0) {
        return false;
    }
    uint32_t first = t * far.tile_rows;
    uint32_t num = min(far.tile_rows, a.routing.in[source].rows - first);
    char *slot = far.data[far.local] + region.send +
                 (lane * far.window + nep_far_slot(far, sequence)) * region.send_tile_bytes;
    sum_tile<T>(a, r, base, addends, (uint64_t)lane * far.shape.max_tokens + first, num, slot);
    if (nep_far_is_last(&far.state->packed[lane][nep_far_slot(far, number)], r.num) &&
        threadIdx.x == 0) {
        struct nep_tile_msg msg = {};
        msg.op = op;
        msg.number = number;
        msg.source = far.rank;
        msg.kind = NEP_KIND_COMBINE;
        msg.first_row = first;
        msg.num_rows = num;
        *(struct nep_tile_msg *)slot = msg;
        uint32_t rows = num | (a.has_weights ? NEP_FAR_HAS_WEIGHTS : 0);
        bool is_posted =
            nep_far_post(far, nep_ring_command(NEP_KIND_COMBINE, lane, rows, op, number));
        nep_far_stamp(far, NEP_FAR_AT_REDUCED);
        return is_posted;
    }
    return true;
}

/* The tiles of all lanes that slots hold, in rounds: they wait for operations that this rank has
 * completed alone. */
template <class T>
__device__ inline bool reduce_first(const combine_args &a, const role &r, const char *const *base,
                                    addend *addends, uint64_t op)
{
    const struct nep_far &far = a.far;
    bool is_left = true;
    for (uint32_t t = 0; is_left; t++) {
        is_left = false;
        for (uint32_t i = 0; i < far.num_lanes; i++) {
            uint32_t lane = (far.rank + i) % far.num_lanes;
            nep_far_stream stream = stream_ahead(a, op, lane);
            if (t >= stream.sent ||
                t >= nep_far_tiles(far, a.routing.in[far.lane_source[lane]].rows)) {
                continue;
            }
            is_left = true;
            if (!reduce_tile<T>(a, r, base, addends, op, lane, stream, t)) {
                return false;
            }
        }
    }
    return true;
}

/*
 * The rest. Homes take tiles in the order of their tokens, not in rounds, so no lane may wait for
 * another: one thread chooses any lane whose credit and slot are there and writes it into the
 * schedule, which all blocks of the role follow.
 */
__device__ inline bool is_ready(const combine_args &a, uint64_t op, uint32_t lane, uint32_t t)
{
    const struct nep_far &far = a.far;
    nep_far_stream stream = stream_left(a, op, lane);
    uint64_t number = stream.number + t;
    uint64_t sequence = stream.sequence + t;
    const uint64_t *credit = nep_far_word(far, far.local, far.own.combine_credit, lane);
    /* Acquire: pairs with raise() of the sink, and with the proxy's page. */
    return nep_ring_load(credit) + far.window > number &&
           nep_ring_load(&far.page->tiles_free[lane]) + far.window > sequence;
}

__device__ __forceinline__ uint32_t tiles_of(const combine_args &a, uint32_t lane)
{
    return nep_far_tiles(a.far, a.routing.in[a.far.lane_source[lane]].rows);
}

/* By one thread: the next entry; next[lane] is that lane's next tile. False: gave up. */
__device__ inline bool choose(const combine_args &a, uint64_t op, uint32_t entry, uint32_t *next)
{
    const struct nep_far &far = a.far;
    uint64_t beat = nep_ring_peek(&far.ring.shared->heartbeat);
    for (uint64_t start = nep_globaltimer();;) {
        uint32_t waits = 0;
        for (uint32_t i = 1; i <= far.num_lanes; i++) {
            uint32_t lane = (entry + i) % far.num_lanes;
            if (next[lane] >= tiles_of(a, lane)) {
                continue;
            }
            waits = lane;
            if (is_ready(a, op, lane, next[lane])) {
                uint64_t value = (op + 1) << 32 | lane << 20 | next[lane]++;
                nep_ring_store(&a.routing.schedule[entry], value);
                return true;
            }
        }
        enum nep_ring_end end = NEP_RING_DONE;
        if (nep_ring_peek(far.stuck) != 0) {
            end = NEP_RING_STUCK;
        } else if (nep_ring_load(&far.ring.shared->fault) != 0) {
            end = NEP_RING_FAULT;
        } else if (nep_globaltimer() - start > far.timeout_ns) {
            bool is_alive = nep_ring_peek(&far.ring.shared->heartbeat) != beat;
            end = is_alive ? NEP_RING_EXPIRED : NEP_RING_STALE;
        }
        if (end != NEP_RING_DONE) {
            return nep_far_ended(far, end, NEP_FAR_PHASE_CREDIT, far.lane_source[waits]);
        }
    }
}

template <class T>
__device__ __noinline__ bool reduce_rest(const combine_args &a, const role &r,
                                         const char *const *base, addend *addends, uint64_t op)
{
    __shared__ uint32_t next[NEP_FAR_MAX_RANKS];
    __shared__ uint64_t chosen;
    const struct nep_far &far = a.far;
    uint32_t entries = 0;
    for (uint32_t l = 0; l < far.num_lanes; l++) {
        uint32_t tiles = tiles_of(a, l);
        uint32_t sent = stream_left(a, op, l).sent;
        entries += tiles > sent ? tiles - sent : 0;
        next[l] = sent; /* the same by every thread */
    }
    __syncthreads();
    for (uint32_t e = 0; e < entries; e++) {
        bool is_there = true;
        if (threadIdx.x == 0) {
            is_there = (r.block != 0 || choose(a, op, e, next)) &&
                       nep_near_wait(far, &a.routing.schedule[e], (op + 1) << 32,
                                     NEP_FAR_PHASE_CREDIT, far.rank, 2 * far.timeout_ns);
            chosen = is_there ? nep_ring_load(&a.routing.schedule[e]) : 0;
        }
        if (__syncthreads_and(is_there) == 0) {
            return false;
        }
        uint32_t lane = (uint32_t)(chosen >> 20) & 4095;
        if (!reduce_tile<T>(a, r, base, addends, op, lane, stream_left(a, op, lane),
                            (uint32_t)chosen & 0xfffff)) {
            return false;
        }
        __syncthreads(); /* `chosen` is used again */
    }
    return true;
}

using kernel_fn = void (*)(combine_args);

inline enum nep_status fill(const struct nep_far_combine *c, combine_args *args_p)
{
    const struct nep_far *far = c->far;
    const struct nep_cuda_geometry *geometry = c->geometry;
    uintptr_t all = (uintptr_t)c->y | c->rows | (uintptr_t)c->bias[0] | (uintptr_t)c->bias[1];
    if ((far->row_bytes | all) % 16 != 0) {
        return nep_fail(NEP_ERR_INVALID,
                        "combine: rows of %u bytes at offset %llu to %p: multiples of 16 are "
                        "needed",
                        far->row_bytes, (unsigned long long)c->rows, c->y);
    }
    /* A source may have max_tokens, whatever this rank has. */
    bool is_long = far->shape.max_tokens > far->tiles * far->tile_rows;
    if (is_long && geometry->blocks < 2) {
        return nep_fail(NEP_ERR_INVALID,
                        "combine: %u tokens are more than %u tiles of %u, which needs two SMs at "
                        "least: some reduce while others sum",
                        far->shape.max_tokens, far->tiles, far->tile_rows);
    }
    combine_args args = {};
    args.far = *far;
    args.routing = *c->far_routing;
    args.y = (char *)c->y;
    args.bias[0] = (const char *)c->bias[0];
    args.bias[1] = (const char *)c->bias[1];
    args.weights = c->topk_weights;
    args.has_weights = c->weights != NEP_CUDA_NONE;
    args.cell = c->routing->cell;
    args.num_tokens = c->num_tokens;
    args.units = far->row_bytes / 16;
    uint32_t chunk = c->num_tokens < far->tile_rows ? c->num_tokens : far->tile_rows;
    args.own_parts = nep_cuda_row_parts(geometry, chunk, args.units, 32);
    args.tile_parts = args.own_parts;
    args.reduce_blocks = is_long ? geometry->blocks / 2 : 0;
    *args_p = args;
    return NEP_OK;
}

inline enum nep_status launch(const struct nep_far_combine *c, kernel_fn kernel,
                              struct CUstream_st *stream)
{
    combine_args args;
    enum nep_status status = fill(c, &args);
    if (status != NEP_OK) {
        return status;
    }
    kernel<<<c->geometry->blocks, THREADS, c->geometry->shared_bytes, stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of far combine");
}

} // namespace far_sums

#endif
