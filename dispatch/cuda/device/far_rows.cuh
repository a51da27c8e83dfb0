/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows of a dispatch over several nodes: what far_pack.cu and far_recv.cu share. Packing is here
 * as a whole, since blocks of the receiving kernel pack what slots did not hold. kScales: rows have
 * scales, which are cast or come with them; kernels without were 300 bytes of spills slower.
 */
#ifndef NEP_DISPATCH_CUDA_DEVICE_FAR_ROWS_CUH
#define NEP_DISPATCH_CUDA_DEVICE_FAR_ROWS_CUH

#include "dispatch/cuda/device/far.cuh"

namespace far_rows
{

enum { THREADS = 1024 };

struct dispatch_args {
    struct nep_far far;
    struct nep_far_routing routing;
    const uint32_t *slots;
    const uint32_t *index;
    const char *x;
    const char *scales;
    const float *weight;
    const uint64_t *totals;    /* [G] */
    struct nep_far_output out; /* of recv */
    struct nep_cuda_cell *cell;
    uint32_t num_tokens;
    uint32_t units;       /* 16-byte pieces of a dispatched payload */
    uint32_t own_parts;   /* of an own row */
    uint32_t tile_parts;  /* of a row of a tile */
    uint32_t pack_blocks; /* of recv: they pack what slots did not hold */
    bool is_cast;
    bool is_binding;
    bool is_whole; /* both halves in one launch */
};

/* What every row asks for, in shared memory. */
struct tables {
    char *near[NEP_FAR_MAX_RANKS];                /* [G] */
    struct nep_far_bind binds[NEP_FAR_MAX_RANKS]; /* [G] */
    uint8_t node_of_rank[NEP_FAR_MAX_RANKS];
    uint8_t local_of_rank[NEP_FAR_MAX_RANKS];
};

__device__ __forceinline__ void load_tables(const struct nep_far &far, tables &t)
{
    for (uint32_t r = threadIdx.x; r < far.num_ranks; r += blockDim.x) {
        t.node_of_rank[r] = (uint8_t)far.node_of_rank[r];
        t.local_of_rank[r] = (uint8_t)far.local_of_rank[r];
    }
}

/* By a block: outputs of the node, which must hold what place counted. False: gave up. */
__device__ __forceinline__ bool load_binds(const dispatch_args &a, uint64_t op, tables &t)
{
    const struct nep_far &far = a.far;
    bool is_there = true;
    for (uint32_t g = threadIdx.x; g < far.node_size; g += blockDim.x) {
        uint32_t rank = nep_far_rank_at(far, g);
        const struct nep_far_bind *bind =
            nep_far_bind_at(far, g, nep_far_region(far, g).out_bind, op);
        is_there =
            nep_near_wait(far, &bind->word, op + 1, NEP_FAR_PHASE_BIND, rank, far.timeout_ns);
        t.near[g] = far.near[g];
        t.binds[g] = *bind;
        if (is_there && a.totals[g] > t.binds[g].capacity) {
            nep_far_give_up(far, NEP_CUDA_STATUS(NEP_CUDA_OVERFLOW, NEP_CUDA_PHASE_BOUND, rank));
            is_there = false;
        }
    }
    return __syncthreads_and(is_there) != 0;
}

/* Blocks that do the same: this one's number among them. */
struct role {
    uint32_t block;
    uint32_t num;
};

/* A (token, k) as its lane holds it. */
struct pair {
    bool is_used;
    bool has_row;
    uint32_t g;
    uint32_t slot; /* on the node */
    uint32_t pos;
    float weight;
};

__device__ __forceinline__ uint32_t part_begin(const dispatch_args &a, uint32_t part,
                                               uint32_t parts)
{
    uint32_t per_part = ((a.units + parts - 1) / parts + 7) / 8 * 8; /* whole scales */
    return min(a.units, part * per_part);
}

/* Where lane k's copy of a source's row lies; rank layout: the first lane of a rank has the row. */
__device__ __forceinline__ pair make_pair(const dispatch_args &a, const uint32_t *first,
                                          bool is_used, uint32_t slot, uint32_t index, float weight)
{
    pair p;
    uint32_t lane = threadIdx.x % 32;
    bool is_rank = a.far.shape.layout == NEP_LAYOUT_RANK;
    p.is_used = is_used;
    p.slot = is_used ? slot : 0;
    p.g = p.slot / a.far.shape.slots_per_rank;
    p.weight = weight;
    uint32_t same = __match_any_sync(0xffffffffu, is_used ? p.g : 0x80000000u + lane);
    p.has_row = is_used && (!is_rank || (uint32_t)__ffs(same) - 1 == lane);
    p.pos = is_used ? first[is_rank ? p.g : p.slot] + index : 0;
    return p;
}

/* Places in the outputs of the ranks that `is_mine` allows. */
__device__ __forceinline__ nep_far_place place_of(const dispatch_args &a, const tables &t,
                                                  const pair &p, bool is_mine)
{
    nep_far_place place = {p.has_row && is_mine, nullptr};
    if (place.has_row) {
        const nep_far_bind &bind = t.binds[p.g];
        place.row = t.near[p.g] + bind.x + (uint64_t)p.pos * a.far.shape.wire.payload_bytes;
    }
    return place;
}

/* Whose scales a warp stores: each lane the row of its place. */
struct scale_target {
    uint32_t g;
    uint32_t pos;
    char *slot; /* not NULL: in a send slot, for all lanes */
};

__device__ __forceinline__ struct nep_scales_at scales_of(const dispatch_args &a, const tables &t,
                                                          const scale_target &to, uint32_t from)
{
    uint32_t g = __shfl_sync(0xffffffffu, to.g, from);
    uint32_t pos = __shfl_sync(0xffffffffu, to.pos, from);
    if (to.slot != nullptr) {
        return {to.slot, 4};
    }
    const nep_far_bind &bind = t.binds[g];
    return nep_wire_scales_at(&a.far.shape.wire, t.near[g] + bind.scales, pos, bind.capacity);
}

/* To all places of a warp: scales that came with a row, and a row that is cast. */
static __device__ inline void copy_scales(const dispatch_args &a, const tables &t, const char *from,
                                          scale_target to, uint32_t rows)
{
    nep_copy_scales(
        from, [&](uint32_t l) { return scales_of(a, t, to, l); }, rows, nullptr,
        a.far.shape.wire.scale_bytes);
}

static __device__ inline void cast_row(const dispatch_args &a, const tables &t, const char *from,
                                       char *row, scale_target to, uint32_t rows, uint32_t begin,
                                       uint32_t end)
{
    nep_cast_row(
        a.far.shape.wire, from, row, [&](uint32_t l) { return scales_of(a, t, to, l); }, rows,
        nullptr, nullptr, begin, end);
}

/* What lies beside a row at its receiver. */
__device__ inline void store_beside(const dispatch_args &a, const tables &t, const pair &p,
                                    const nep_far_place &place, uint32_t source, uint32_t token)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t top_k = a.far.shape.top_k;
    bool is_rank = a.far.shape.layout == NEP_LAYOUT_RANK;
    if (place.has_row) {
        const nep_far_bind &bind = t.binds[p.g];
        char *data = t.near[p.g];
        if (bind.source_rank != NEP_CUDA_NONE) {
            ((uint32_t *)(data + bind.source_rank))[p.pos] = source;
        }
        if (bind.source_token != NEP_CUDA_NONE) {
            ((uint32_t *)(data + bind.source_token))[p.pos] = token;
        }
        if (!is_rank && bind.topk_weights != NEP_CUDA_NONE) {
            ((float *)(data + bind.topk_weights))[p.pos] = p.weight;
        }
    }
    uint32_t rows = __ballot_sync(0xffffffffu, place.has_row);
    for (uint32_t m = is_rank ? rows : 0; m != 0; m &= m - 1) {
        uint32_t from = __ffs(m) - 1;
        uint32_t g = __shfl_sync(0xffffffffu, p.g, from);
        uint64_t at = (uint64_t)__shfl_sync(0xffffffffu, p.pos, from) * top_k + lane;
        const nep_far_bind &bind = t.binds[g];
        bool is_there = p.is_used && p.g == g;
        if (lane < top_k && bind.topk_slots != NEP_CUDA_NONE) {
            ((int32_t *)(t.near[g] + bind.topk_slots))[at] =
                is_there ? (int32_t)(p.slot - g * a.far.shape.slots_per_rank) : -1;
        }
        if (lane < top_k && bind.topk_weights != NEP_CUDA_NONE) {
            ((float *)(t.near[g] + bind.topk_weights))[at] = is_there ? p.weight : 0.0f;
        }
    }
}

/* The addends of a token on this node: ranks ascending, k ascending inside. */
__device__ inline void store_terms(const dispatch_args &a, const pair &p,
                                   struct nep_cuda_term *terms, uint32_t *num_p)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t rows = __ballot_sync(0xffffffffu, p.has_row);
    uint32_t order = 0;
    bool is_last = true;
    for (uint32_t m = rows; m != 0; m &= m - 1) {
        uint32_t other = __ffs(m) - 1;
        uint32_t g = __shfl_sync(0xffffffffu, p.g, other);
        order += g < p.g || (g == p.g && other < lane);
        is_last = is_last && (g != p.g || other <= lane);
    }
    if (p.has_row) {
        struct nep_cuda_term term = {};
        term.pos = p.pos;
        term.rank = (uint16_t)p.g;
        term.ends = (uint16_t)(order + 1 == __popc(rows) ? NEP_ENDS_NODE | NEP_ENDS_RANK
                               : is_last                 ? NEP_ENDS_RANK
                                                         : 0);
        term.weight = a.far.shape.layout == NEP_LAYOUT_RANK ? 1.0f : p.weight;
        terms[order] = term;
    }
    if (lane == 0) {
        *num_p = __popc(rows);
    }
}

template <bool kScales>
__device__ __forceinline__ const char *input_row(const dispatch_args &a, uint32_t token)
{
    uint32_t bytes =
        kScales && a.is_cast ? a.far.shape.wire.in_bytes : a.far.shape.wire.payload_bytes;
    return a.x + (uint64_t)token * bytes;
}

/* A part of an own row to its places. */
template <bool kScales>
__device__ __forceinline__ void move_input(const dispatch_args &a, const tables &t, uint32_t token,
                                           const nep_far_place &place, const scale_target &to,
                                           uint32_t part, uint32_t parts)
{
    uint32_t scale_bytes = a.far.shape.wire.scale_bytes;
    uint32_t begin = part_begin(a, part, parts);
    uint32_t end = part_begin(a, part + 1, parts);
    uint32_t rows = __ballot_sync(0xffffffffu, place.has_row);
    if (kScales && a.is_cast) {
        cast_row(a, t, input_row<kScales>(a, token), place.row, to, rows, begin, end);
        return;
    }
    nep_copy_row(input_row<kScales>(a, token), place.row, rows, nullptr, begin, end);
    if (kScales && part == 0 && scale_bytes != 0) {
        copy_scales(a, t, a.scales + (uint64_t)token * scale_bytes, to, rows);
    }
}

/* ---- pack ----------------------------------------------------------------------------------- */

/* A tile's numbers beside row `row`, by a warp: token, slots on that node, weights, indexes. */
__device__ inline void store_meta(const dispatch_args &a, const tables &tab, uint32_t node,
                                  uint32_t token, char *meta)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t top_k = a.far.shape.top_k;
    uint16_t *slots = (uint16_t *)(meta + 4);
    float *weights = (float *)(meta + 4 + (top_k + 1) / 2 * 4);
    uint32_t *index = (uint32_t *)(weights + top_k);
    if (lane == 0) {
        *(uint32_t *)meta = token;
        slots[top_k - 1 + top_k % 2] = 0xffff; /* the pad of an odd K */
    }
    __syncwarp();
    if (lane < top_k) {
        uint64_t at = (uint64_t)token * top_k + lane;
        uint32_t slot = a.slots[at];
        uint32_t per_rank = a.far.shape.slots_per_rank;
        bool is_there = slot != NEP_SLOT_NONE && tab.node_of_rank[slot / per_rank] == node;
        slots[lane] =
            is_there ? (uint16_t)(tab.local_of_rank[slot / per_rank] * per_rank + slot % per_rank)
                     : 0xffff;
        weights[lane] = a.weight != nullptr ? a.weight[at] : 1.0f;
        index[lane] = is_there ? a.index[at] : 0;
    }
}

/* Rows [first, first + num) of the node's list into a send slot. */
template <bool kScales>
__device__ inline void fill_tile(const dispatch_args &a, const tables &tab, const role &r,
                                 uint32_t node, uint32_t first, uint32_t num, char *slot)
{
    const uint32_t *tokens =
        a.routing.node_tokens + (uint64_t)node * a.far.shape.max_tokens + first;
    char *payload = slot + nep_far_payload(a.far, num);
    uint32_t lane = threadIdx.x % 32;
    uint32_t stride = r.num * (THREADS / 32);
    for (uint32_t i = threadIdx.x / 32 * r.num + r.block; i < num * a.tile_parts; i += stride) {
        uint32_t row = i / a.tile_parts;
        uint32_t part = i % a.tile_parts;
        uint32_t token = tokens[row];
        char *to = payload + (uint64_t)row * a.far.shape.wire.row_bytes;
        nep_far_place place = {lane == 0, to};
        move_input<kScales>(a, tab, token, place, {0, 0, to + a.far.shape.wire.payload_bytes}, part,
                            a.tile_parts);
        if (part == 0) {
            store_meta(a, tab, node, token,
                       slot + sizeof(struct nep_tile_msg) + (uint64_t)row * a.far.meta_bytes);
        }
    }
}

/* By two threads, a look across PCIe each: the tile may go, and its send slot is free. */
__device__ inline bool may_pack(const dispatch_args &a, const role &r, uint32_t node,
                                uint64_t number, uint32_t ring, uint64_t sequence)
{
    const struct nep_far &far = a.far;
    bool is_first = r.block == 0;
    if (threadIdx.x == 0 && number >= far.window) {
        const uint64_t *credit = nep_far_word(far, far.local, far.own.dispatch_credit, node);
        return nep_far_wait_relayed(far, is_first, credit, &far.state->credit[node],
                                    number - far.window + 1, NEP_FAR_PHASE_CREDIT,
                                    nep_far_landing(far, far.rank, node));
    }
    if (threadIdx.x == 32 && sequence >= far.window) {
        return nep_far_wait_relayed(far, is_first, &far.page->tiles_free[ring],
                                    &far.state->slot[ring], sequence - far.window + 1,
                                    NEP_FAR_PHASE_SLOT, nep_far_landing(far, far.rank, node));
    }
    return true;
}

/* The stream to a node: in the send half, or a launch that does both. */
__device__ __forceinline__ nep_far_stream stream_ahead(const dispatch_args &a, uint64_t op,
                                                       uint32_t node)
{
    uint64_t planned = a.far.state->next_tile[node];
    if (a.is_whole) { /* nothing is outstanding */
        uint32_t ring = nep_far_skip(a.far.node, node);
        return {planned, a.far.state->next_send[ring], a.far.window};
    }
    const struct nep_far_op *oldest = nep_far_oldest(a.far, op);
    return nep_far_stream_ahead(a.far, planned,
                                oldest != nullptr ? oldest->first_tile[node] : planned,
                                nep_far_skip(a.far.node, node));
}

/* What a launch that did the send half's work, too, or the send half left. */
__device__ __forceinline__ nep_far_stream stream_left(const dispatch_args &a, uint64_t op,
                                                      uint32_t node)
{
    if (a.is_whole) {
        return stream_ahead(a, op, node);
    }
    return nep_far_stream_left(a.far, op,
                               a.far.state->ops[nep_far_slot(a.far, op)].first_tile[node],
                               nep_far_skip(a.far.node, node));
}

/* Tile t of the stream to a node; false: gave up. */
template <bool kScales>
__device__ inline bool pack_tile(const dispatch_args &a, const tables &tab, const role &r,
                                 uint64_t op, uint32_t node, const nep_far_stream &stream,
                                 uint32_t t, uint32_t rows)
{
    const struct nep_far &far = a.far;
    const struct nep_region &region = far.own;
    uint32_t ring = nep_far_skip(far.node, node);
    uint64_t number = stream.number + t;
    uint64_t sequence = stream.sequence + t;
    if (__syncthreads_and(may_pack(a, r, node, number, ring, sequence)) == 0) {
        return false;
    }
    uint32_t first = t * far.tile_rows;
    uint32_t num = min(far.tile_rows, rows - first);
    char *slot = far.data[far.local] + region.send +
                 (ring * far.window + nep_far_slot(far, sequence)) * region.send_tile_bytes;
    fill_tile<kScales>(a, tab, r, node, first, num, slot);
    if (nep_far_is_last(&far.state->packed[ring][nep_far_slot(far, number)], r.num) &&
        threadIdx.x == 0) {
        struct nep_tile_msg msg = {};
        msg.op = op;
        msg.number = number;
        msg.source = far.rank;
        msg.kind = NEP_KIND_DISPATCH;
        msg.first_row = first;
        msg.num_rows = num;
        *(struct nep_tile_msg *)slot = msg;
        bool is_posted =
            nep_far_post(far, nep_ring_command(NEP_KIND_DISPATCH, node, num, op, number));
        nep_far_stamp(far, NEP_FAR_AT_PACKED);
        return is_posted;
    }
    return true;
}

/* All streams in rounds, what slots hold or (is_rest) what that left; each node begins with its
 * neighbour. */
template <bool kScales>
__device__ inline bool pack(const dispatch_args &a, const tables &tab, const role &r, uint64_t op,
                            bool is_rest)
{
    const struct nep_far &far = a.far;
    bool is_left = true;
    for (uint32_t t = 0; is_left; t++) {
        is_left = false;
        for (uint32_t i = 1; i < far.num_nodes; i++) {
            uint32_t node = (far.node + i) % far.num_nodes;
            uint32_t rows = a.routing.node_rows[node];
            if (t >= nep_far_tiles(far, rows)) {
                continue;
            }
            nep_far_stream stream = is_rest ? stream_left(a, op, node) : stream_ahead(a, op, node);
            is_left = is_left || is_rest || t < stream.sent;
            if (is_rest == (t < stream.sent)) {
                continue;
            }
            if (!pack_tile<kScales>(a, tab, r, op, node, stream, t, rows)) {
                return false;
            }
        }
    }
    return true;
}

} // namespace far_rows

/* Whether rows and group are such that kernels can move them (far_pack.cu). */
enum nep_status nep_cuda_far_check(const struct nep_far_dispatch *d);

namespace far_rows
{

inline dispatch_args make_args(const struct nep_far_dispatch *d)
{
    dispatch_args args = {};
    const struct nep_far *far = d->far;
    const struct nep_wire *wire = &far->shape.wire;
    args.far = *far;
    args.routing = *d->far_routing;
    args.slots = d->routing->slots;
    args.index = d->routing->index;
    args.x = (const char *)d->in->x;
    args.scales = (const char *)d->in->scales;
    args.weight = d->routing->weights != nullptr ? d->routing->weights : d->in->weight;
    args.totals = d->routing->totals;
    args.num_tokens = d->in->num_tokens;
    args.units = wire->payload_bytes / 16;
    args.is_cast = wire->type != wire->dtype && d->in->scales == nullptr;
    uint32_t least = args.is_cast ? 32 : 32 * NEP_ROWS_FLIGHT;
    args.own_parts = nep_cuda_row_parts(d->geometry, args.num_tokens, args.units, least);
    uint32_t rows = args.num_tokens < far->tile_rows ? args.num_tokens : far->tile_rows;
    args.tile_parts = nep_cuda_row_parts(d->geometry, rows, args.units, 32 * NEP_ROWS_FLIGHT);
    /* Operations outstanding before may have taken the slots. */
    uint32_t most = far->window > far->tiles ? far->shape.max_tokens : args.num_tokens;
    bool is_long = most > far->tiles * far->tile_rows;
    args.cell = d->routing->cell;
    args.pack_blocks = is_long && d->geometry->blocks > 1 ? d->geometry->blocks / 2 : 0;
    return args;
}

/* Whether a dispatch needs the kernels with kScales. */
inline bool has_scales(const dispatch_args &args)
{
    return args.is_cast || args.far.shape.wire.scale_bytes != 0;
}

} // namespace far_rows

#endif
