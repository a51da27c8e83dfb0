// SPDX-License-Identifier: Apache-2.0
/*
 * Sum: a rank's own tokens from its node's rows and the other nodes' rows, nodes ascending. Tokens
 * are summed in chunks of a tile's rows, so that at most two tiles of each node are needed at once:
 * a tile's slot is free when the chunk that holds its last row is done.
 */
#include "dispatch/cuda/device/far_counts.cuh"
#include "dispatch/cuda/device/far_sums.cuh"

using namespace far_sums;

namespace
{

/* Rows of a node's list that belong to tokens before `token`. */
__device__ uint32_t rows_before(const combine_args &a, uint32_t node, uint32_t token)
{
    uint32_t end = a.routing.node_rows[node];
    if (token >= a.num_tokens) {
        return end;
    }
    /* The next token that has a row is near as a rule; a search takes a load after another. */
    const uint32_t *row_of = a.routing.row_of + (uint64_t)node * a.far.shape.max_tokens + token;
    uint32_t rows[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        rows[i] = token + i < a.num_tokens ? row_of[i] : end;
    }
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        if (rows[i] != NEP_SLOT_NONE) {
            return rows[i];
        }
    }
    const uint32_t *tokens = a.routing.node_tokens + (uint64_t)node * a.far.shape.max_tokens;
    uint32_t begin = 0;
    while (begin < end) {
        uint32_t middle = (begin + end) / 2;
        if (tokens[middle] < token) {
            begin = middle + 1;
        } else {
            end = middle;
        }
    }
    return begin;
}

__device__ __forceinline__ char *sums_tile(const combine_args &a, uint32_t node, uint64_t number)
{
    const struct nep_far &far = a.far;
    const struct nep_region &region = far.own;
    uint64_t idx = (uint64_t)nep_far_skip(far.node, node) * far.window + nep_far_slot(far, number);
    return far.data[far.local] + region.combine_landing + idx * region.combine_tile_bytes;
}

/* By one thread: the tiles of a node that hold its rows of tokens [begin, end). */
__device__ __noinline__ bool wait_sums(const combine_args &a, const role &r, uint64_t op,
                                       uint32_t node, uint32_t begin, uint32_t end)
{
    const struct nep_far &far = a.far;
    uint32_t first = rows_before(a, node, begin);
    uint32_t last = rows_before(a, node, end);
    uint32_t landing = nep_far_landing(far, far.rank, node);
    for (uint32_t t = first / far.tile_rows; first < last && t <= (last - 1) / far.tile_rows; t++) {
        uint64_t number = far.state->next_in[node] + t;
        uint64_t idx = (uint64_t)node * far.window + nep_far_slot(far, number);
        const uint64_t *word = nep_far_word(far, far.local, far.own.combine_word, idx);
        /* Acquire: pairs with the release in raise() of the sink. */
        if (!nep_far_wait_relayed(far, r.block == 0, word, &far.state->sums_seen[node], number + 1,
                                  NEP_FAR_PHASE_SUMS, landing)) {
            return false;
        }
        const struct nep_tile_msg *msg = (const struct nep_tile_msg *)sums_tile(a, node, number);
        if (msg->op != op || msg->number != number || msg->source != landing ||
            msg->first_row != t * far.tile_rows) {
            nep_far_give_up(far, NEP_CUDA_STATUS(NEP_CUDA_DISAGREE, NEP_FAR_PHASE_SUMS, landing));
            return false;
        }
    }
    return true;
}

/* By a warp: a token's addends, nodes ascending; returns how many. */
__device__ uint32_t take_token(const combine_args &a, const char *const *base, uint32_t token,
                               addend *addends)
{
    const struct nep_far &far = a.far;
    uint32_t fill = 0;
    for (uint32_t n = 0; n < far.num_nodes; n++) {
        if (n == far.node) {
            fill = take_terms(a, base, a.routing.home_terms + (uint64_t)token * far.shape.top_k,
                              a.routing.home_num[token], fill, addends);
            continue;
        }
        uint32_t row = a.routing.row_of[(uint64_t)n * far.shape.max_tokens + token];
        if (row == NEP_SLOT_NONE) {
            continue;
        }
        if (threadIdx.x % 32 == 0) {
            uint64_t number = far.state->next_in[n] + row / far.tile_rows;
            addends[fill].row = sums_tile(a, n, number) + sizeof(struct nep_tile_msg) +
                                (uint64_t)(row % far.tile_rows) * far.row_bytes;
            addends[fill].weight = 1.0f;
            addends[fill].ends = NEP_ENDS_RANK | NEP_ENDS_NODE;
        }
        fill++;
    }
    return fill;
}

/* The top-k weights of tokens [begin, end) that came back, nodes ascending; in a loop of their own,
 * as in reduce. */
__device__ __noinline__ void add_token_weights(const combine_args &a, const role &r,
                                               const char *const *base, uint32_t begin,
                                               uint32_t end)
{
    const struct nep_far &far = a.far;
    uint32_t lane = threadIdx.x % 32;
    uint32_t top_k = far.shape.top_k;
    uint32_t stride = r.num * (THREADS / 32);
    for (uint32_t token = begin + threadIdx.x / 32 * r.num + r.block; lane < top_k && token < end;
         token += stride) {
        float sum = 0;
        for (uint32_t n = 0; n < far.num_nodes; n++) {
            if (n == far.node) {
                uint32_t num = a.routing.home_num[token];
                const struct nep_cuda_term *terms = a.routing.home_terms + (uint64_t)token * top_k;
                sum = num != 0 ? __fadd_rn(sum, add_weights(a, base, terms, num, lane)) : sum;
                continue;
            }
            uint32_t row = a.routing.row_of[(uint64_t)n * far.shape.max_tokens + token];
            if (row != NEP_SLOT_NONE) {
                uint32_t t = row / far.tile_rows;
                uint32_t rows = min(far.tile_rows, a.routing.node_rows[n] - t * far.tile_rows);
                char *tile = sums_tile(a, n, far.state->next_in[n] + t);
                const float *weights = tile_weights(far, tile, rows, row % far.tile_rows);
                sum = __fadd_rn(sum, *(const volatile float *)(weights + lane));
            }
        }
        a.weights[(uint64_t)token * top_k + lane] = sum;
    }
}

/* By a block: tiles whose rows are all of tokens before `end` have been read. */
__device__ void release_sums(const combine_args &a, uint32_t end)
{
    const struct nep_far &far = a.far;
    /* The last threads: the first ones tell the node. */
    uint32_t n = blockDim.x - 1 - threadIdx.x;
    if (n >= far.num_nodes || n == far.node) {
        return;
    }
    uint32_t rows = rows_before(a, n, end);
    uint32_t tiles = end == a.num_tokens ? nep_far_tiles(far, rows) : rows / far.tile_rows;
    /* Release: pairs with the acquire in the proxy's duty. */
    nep_st_release_sys(nep_far_word(far, far.local, far.own.combine_read, n),
                       far.state->next_in[n] + tiles);
}

/* The last chunk, where nobody reduces meanwhile: blocks then arrive once in place of twice. */
__device__ __forceinline__ bool is_left_to_finish(const combine_args &a, uint32_t end)
{
    return end == a.num_tokens && a.reduce_blocks == 0;
}

/* Tokens of one chunk; false: gave up. */
template <class T>
__device__ bool sum_chunk(const combine_args &a, const role &r, const char *const *base,
                          addend *addends, uint64_t op, uint32_t chunk)
{
    const struct nep_far &far = a.far;
    uint32_t begin = chunk * far.tile_rows;
    uint32_t end = min(a.num_tokens, begin + far.tile_rows);
    bool is_there = true;
    if (threadIdx.x < far.num_nodes && threadIdx.x != far.node) {
        is_there = wait_sums(a, r, op, threadIdx.x, begin, end);
    }
    if (__syncthreads_and(is_there) == 0) {
        return false;
    }
    if (threadIdx.x == 0 && r.block == 0) {
        nep_far_stamp(far, NEP_FAR_AT_SUMS_HERE);
    }
    uint32_t num = (end - begin) * a.own_parts;
    uint32_t stride = r.num * (THREADS / 32);
    for (uint32_t i = threadIdx.x / 32 * r.num + r.block; i < num; i += stride) {
        uint32_t token = begin + i / a.own_parts;
        uint32_t part = i % a.own_parts;
        __syncwarp();
        uint32_t addend_end = take_token(a, base, token, addends);
        __syncwarp();
        sum_columns<T, true>(a, addends, addend_end, a.y + (uint64_t)token * far.row_bytes,
                             part_at(a, part, a.own_parts), part_at(a, part + 1, a.own_parts));
    }
    if (a.weights != nullptr) {
        add_token_weights(a, r, base, begin, end);
    }
    if (is_left_to_finish(a, end)) {
        return true;
    }
    if (nep_far_is_last(&a.routing.chunks[chunk], r.num)) {
        release_sums(a, end);
    }
    return true;
}

/* By a block: R1, COUNTS of all ranks. Long before the end: words across PCIe take their time. */
__device__ __noinline__ bool hear_all(const combine_args &a, uint64_t op)
{
    const struct nep_far &far = a.far;
    bool is_there = true;
    for (uint32_t s = threadIdx.x; s < far.num_ranks; s += blockDim.x) {
        const uint64_t *word = nep_far_counts_word(far, s, op);
        is_there = far.node_of_rank[s] == far.node
                       ? nep_near_wait(far, word, op + 1, NEP_CUDA_PHASE_COUNTS, s, far.timeout_ns)
                       : nep_far_wait(far, word, op + 1, NEP_CUDA_PHASE_COUNTS, s);
        const struct nep_counts_msg *msg = nep_far_counts_at(far, s, op);
        uint32_t weights = a.has_weights ? NEP_WEIGHTS_BACK : NEP_WEIGHTS_HELD;
        if (is_there && (msg->op != op || msg->source != s || msg->kind != NEP_KIND_COMBINE ||
                         msg->has_weights != weights)) {
            nep_far_give_up(far, NEP_CUDA_STATUS(NEP_CUDA_DISAGREE, NEP_CUDA_PHASE_COUNTS, s));
            is_there = false;
        }
    }
    return __syncthreads_and(is_there) != 0;
}

/* By the last block, when R1 holds: the node's end of reading, then the end of the operation. */
__device__ __noinline__ void finish(const combine_args &a, uint64_t op)
{
    const struct nep_far &far = a.far;
    if (threadIdx.x == 0) {
        nep_far_stamp(far, NEP_FAR_AT_SUMMED);
    }
    nep_near_tell(far, op + 1);
    if (a.num_tokens != 0 && is_left_to_finish(a, a.num_tokens)) {
        release_sums(a, a.num_tokens);
    }
    if (!nep_near_met(far, op + 1, NEP_CUDA_PHASE_READ)) {
        return;
    }
    for (uint32_t n = threadIdx.x; n < far.num_nodes; n += blockDim.x) {
        far.state->next_in[n] += n != far.node ? nep_far_tiles(far, a.routing.node_rows[n]) : 0;
    }
    for (uint32_t l = threadIdx.x; l < far.num_lanes; l += blockDim.x) {
        nep_far_stream_end(far, a.is_whole, op, &far.state->next_sums[l], l, tiles_of(a, l));
    }
    if (threadIdx.x == 0) {
        far.state->run.op = op + 1;
        far.state->begun = a.is_whole ? op + 1 : far.state->begun;
        /* Release: pairs with the sink's acquire: its window of numbers moves on. */
        nep_st_release_sys(far.completed, op + 1);
        nep_far_stamp(far, NEP_FAR_AT_SUM_MET);
    }
}

/* By all blocks. base: find_rows. */
template <class T>
__device__ void sum_all(const combine_args &a, const char *const *base, addend *addends,
                        uint64_t op)
{
    const struct nep_far &far = a.far;
    if (threadIdx.x == 0 && blockIdx.x == 0) {
        nep_far_stamp(far, NEP_FAR_AT_SUM);
    }
    bool is_done = true;
    if (blockIdx.x < a.reduce_blocks) {
        role r = {blockIdx.x, a.reduce_blocks};
        is_done = reduce_rest<T>(a, r, base, addends, op);
    } else {
        role r = {blockIdx.x - a.reduce_blocks, gridDim.x - a.reduce_blocks};
        uint32_t chunks = nep_far_tiles(far, a.num_tokens);
        is_done = r.block != r.num - 1 || hear_all(a, op);
        for (uint32_t c = 0; is_done && c < chunks; c++) {
            is_done = sum_chunk<T>(a, r, base, addends, op, c);
        }
    }
    if (is_done && nep_far_is_last(&far.state->arrived, gridDim.x)) {
        finish(a, op);
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1) sum_kernel(const __grid_constant__ combine_args a)
{
    __shared__ const char *base[2 * NEP_FAR_MAX_RANKS];
    __shared__ addend tables[THREADS / 32][MOST_ADDENDS];
    if (nep_ld_relaxed_gpu(&a.far.state->run.status) != 0) {
        return;
    }
    uint64_t op = nep_ld_relaxed_gpu(&a.far.state->run.op);
    if (find_rows(a, op, base)) {
        sum_all<T>(a, base, tables[threadIdx.x / 32], op);
    }
}

/* By one block: one look across PCIe at every credit, and at what is complete of tiles and COUNTS,
 * before it is asked for. */
__device__ __noinline__ void look_ahead(const struct nep_far &far)
{
    /* Acquire: pairs with raise() of the sink, and with the proxy's page; handed on here. */
    for (uint32_t l = threadIdx.x; l < far.num_lanes; l += blockDim.x) {
        nep_ring_raise_near(&far.state->sums_credit[l],
                            nep_ring_load(nep_far_word(far, far.local, far.own.combine_credit, l)));
    }
    uint32_t other = blockDim.x - 1 - threadIdx.x;
    if (other < far.num_lanes) {
        nep_ring_raise_near(&far.state->slot[other], nep_ring_load(&far.page->tiles_free[other]));
    } else if (other - far.num_lanes < far.num_controls) {
        uint32_t control = other - far.num_lanes;
        nep_ring_raise_near(&far.state->counts_free[control],
                            nep_ring_load(&far.page->counts_free[control]));
    }
}

struct whole_args {
    combine_args sums;
    far_counts::counts_args counts;
};

/* A combine in one call, in one launch: a block per control offers; the first one says that rows
 * may be read. */
template <class T>
__global__ void __launch_bounds__(THREADS, 1) whole_kernel(const __grid_constant__ whole_args a)
{
    __shared__ const char *base[2 * NEP_FAR_MAX_RANKS];
    __shared__ addend tables[THREADS / 32][MOST_ADDENDS];
    const struct nep_far &far = a.sums.far;
    if (nep_ld_relaxed_gpu(&far.state->run.status) != 0) {
        return;
    }
    uint64_t op = nep_ld_relaxed_gpu(&far.state->run.op);
    role r = {blockIdx.x, gridDim.x};
    addend *addends = tables[threadIdx.x / 32];
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        nep_far_stamp(far, NEP_FAR_AT_OFFER);
    }
    if (blockIdx.x == gridDim.x - 1) {
        look_ahead(far);
    }
    far_counts::tell_controls(a.counts, blockIdx.x, gridDim.x, op);
    if (!find_rows(a.sums, op, base)) {
        return;
    }
    if (threadIdx.x == 0 && blockIdx.x == 0) {
        nep_far_stamp(far, NEP_FAR_AT_ROWS_HERE);
    }
    if (reduce_first<T>(a.sums, r, base, addends, op)) {
        sum_all<T>(a.sums, base, addends, op);
    }
}

using whole_fn = void (*)(whole_args);

whole_fn find_whole(enum nep_dtype dtype)
{
    switch (dtype) {
    case NEP_DTYPE_FP16:
        return whole_kernel<nep_fp16>;
    case NEP_DTYPE_FP32:
        return whole_kernel<nep_fp32>;
    default:
        return whole_kernel<nep_bf16>;
    }
}

kernel_fn find_kernel(enum nep_dtype dtype)
{
    switch (dtype) {
    case NEP_DTYPE_FP16:
        return sum_kernel<nep_fp16>;
    case NEP_DTYPE_FP32:
        return sum_kernel<nep_fp32>;
    default:
        return sum_kernel<nep_bf16>;
    }
}

} // namespace

enum nep_status nep_cuda_load_far_sum(void)
{
    const enum nep_dtype dtypes[] = {NEP_DTYPE_BF16, NEP_DTYPE_FP16, NEP_DTYPE_FP32};
    enum nep_status status = NEP_OK;
    for (uint32_t i = 0; status == NEP_OK && i < 3; i++) {
        status = nep_cuda_load_kernel((const void *)find_kernel(dtypes[i]), "far sum");
        if (status == NEP_OK) {
            status = nep_cuda_load_kernel((const void *)find_whole(dtypes[i]), "far combine");
        }
    }
    return status;
}

enum nep_status nep_cuda_load_far_counts(void);
enum nep_status nep_cuda_load_far_pack(void);
enum nep_status nep_cuda_load_far_copy(void);
enum nep_status nep_cuda_load_far_recv(void);
enum nep_status nep_cuda_load_far_reduce(void);

extern "C" enum nep_status nep_cuda_far_load(void)
{
    enum nep_status (*const loads[])(void) = {nep_cuda_load_far_counts, nep_cuda_load_far_pack,
                                              nep_cuda_load_far_recv,   nep_cuda_load_far_reduce,
                                              nep_cuda_load_far_copy,   nep_cuda_load_far_sum};
    for (auto load : loads) {
        enum nep_status status = load();
        if (status != NEP_OK) {
            return status;
        }
    }
    return NEP_OK;
}

extern "C" enum nep_status nep_cuda_far_sum(const struct nep_far_combine *c,
                                            struct CUstream_st *stream)
{
    return launch(c, find_kernel(c->far->dtype), stream);
}

extern "C" enum nep_status nep_cuda_far_combine(const struct nep_far_combine *c,
                                                struct CUstream_st *stream)
{
    whole_args args = {};
    enum nep_status status = fill(c, &args.sums);
    if (status != NEP_OK) {
        return status;
    }
    args.sums.is_whole = true;
    args.counts = far_counts::combine_counts(c);
    auto kernel = find_whole(c->far->dtype);
    kernel<<<c->geometry->blocks, THREADS, c->geometry->shared_bytes, stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of far combine");
}
