// SPDX-License-Identifier: Apache-2.0
/*
 * Combine inside a node: every token's rows are read where they lie, in the expert outputs of this
 * node's ranks, and added up in the tree of docs/protocol.md: fp32, k ascending within a rank,
 * ranks ascending, rounded to the payload type after each level. The same bits as the host's
 * kernels.
 *
 * A warp takes 32 columns of 16 bytes and keeps eight loads per thread in flight, of several rows
 * or several columns. Where weights are all 1 and there is one row per rank (rank layout), the
 * lowest level is the row itself and is left out: adding +0 and rounding change nothing but a -0,
 * which the next level turns into +0 alike.
 *
 * Rejected: bulk copies into shared memory (3 to 6 % faster at the memory's ceiling only, slower
 * below it), and sums in the payload type's own arithmetic, which rounds at every step.
 */
#include "dispatch/cuda/device/launch.cuh"
#include "dispatch/cuda/device/number.cuh"
#include "dispatch/cuda/device/wait.cuh"

namespace
{

enum { FLIGHT = 8 };

/* Weights and two levels need more registers than 1024 threads can have. */
template <bool kWeighs> constexpr int num_threads = kWeighs ? 768 : 1024;

struct sum_args {
    struct nep_cuda_group group;
    struct nep_cuda_routing routing;
    struct nep_cuda_staging staging;
    struct nep_cuda_lend lend;
    char *y;
    const char *bias[2];
    float *weights;     /* [T][K]; NULL: they do not come back */
    const float *given; /* [T][K] in place of the terms' weights; or NULL */
    uint32_t row_bytes;
    uint32_t weights_bytes;
    unsigned flags;
    uint32_t num_tokens;
    uint32_t parts;
    uint32_t units;
    uint32_t top_k;
};

/* The three levels of a sum for the elements of 16 bytes. */
template <class T, bool kWeighs> struct levels {
    float rank[T::num];
    float node[T::num];

    __device__ __forceinline__ void start()
    {
#pragma unroll
        for (int i = 0; i < T::num; i++) {
            rank[i] = node[i] = 0;
        }
    }
    __device__ __forceinline__ void add(const uint4 &v, float weight, uint32_t ends)
    {
        float x[T::num];
        T::load(v, x);
        if constexpr (!kWeighs) {
#pragma unroll
            for (int i = 0; i < T::num; i++) {
                node[i] = __fadd_rn(node[i], x[i]);
            }
        } else {
            if (weight != 0) {
#pragma unroll
                for (int i = 0; i < T::num; i++) {
                    rank[i] = __fmaf_rn(weight, x[i], rank[i]);
                }
            }
            if (ends != 0) {
                T::round(rank);
#pragma unroll
                for (int i = 0; i < T::num; i++) {
                    node[i] = __fadd_rn(node[i], rank[i]);
                    rank[i] = 0;
                }
            }
        }
    }
    /* One node: home is +0 + round(node), which rounds no more. */
    __device__ __forceinline__ uint4 finish() const
    {
        return T::store(node);
    }
    /* Home with the caller's rows before the node's, as terms that end their node each. */
    __device__ __forceinline__ uint4 finish_biased(const char *const *bias, uint64_t at)
    {
        T::round(node);
#pragma unroll
        for (int i = 0; i < T::num; i++) {
            rank[i] = 0;
        }
#pragma unroll
        for (int b = 0; b < 2; b++) {
            if (bias[b] != nullptr) {
                float x[T::num];
                T::load(nep_ld16(bias[b] + at), x);
#pragma unroll
                for (int i = 0; i < T::num; i++) {
                    rank[i] = __fadd_rn(rank[i], x[i]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < T::num; i++) {
            rank[i] = __fadd_rn(rank[i], node[i]);
        }
        return T::store(rank);
    }
};

/* An addend as its warp reads it from shared memory: in registers there is no room. */
struct addend {
    const char *row;
    float weight;
    uint32_t ends;
};

/* The top-k weights that came with a token's rows, added up by a lane per k. */
__device__ __forceinline__ void sum_weights(const sum_args &a, const uint64_t *weight_base,
                                            uint32_t token, uint32_t num)
{
    uint32_t lane = threadIdx.x % 32;
    if (lane >= a.top_k) {
        return;
    }
    float node = 0;
    for (uint32_t i = 0; i < num; i++) {
        struct nep_cuda_term term = a.routing.terms[(uint64_t)token * a.top_k + i];
        const float *row = (const float *)weight_base[term.rank] + (uint64_t)term.pos * a.top_k;
        node = __fadd_rn(node, *(const volatile float *)(row + lane));
    }
    a.weights[(uint64_t)token * a.top_k + lane] = __fadd_rn(0.0f, node);
}

/* The addends of a token into the warp's table; returns how many. */
__device__ __forceinline__ uint32_t take_addends(const sum_args &a, const uint64_t *row_base,
                                                 uint32_t token, addend *addends)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t num = a.routing.num_terms[token];
    __syncwarp(); /* the last token's reads are done */
    if (lane < num) {
        struct nep_cuda_term term = a.routing.terms[(uint64_t)token * a.top_k + lane];
        addends[lane].row = (const char *)row_base[term.rank] + (uint64_t)term.pos * a.units * 16;
        addends[lane].weight =
            a.given != nullptr ? a.given[(uint64_t)token * a.top_k + term.k] : term.weight;
        addends[lane].ends = term.ends;
    }
    __syncwarp();
    return num;
}

/* kTerms rows times FLIGHT / kTerms columns in flight. More rows than kTerms: in batches, one
 * column at a time, so kTerms must be FLIGHT then. */
template <class T, bool kWeighs, int kTerms, bool kBias>
__device__ __forceinline__ void sum_columns(const sum_args &a, const addend *addends, uint32_t num,
                                            uint64_t row, uint32_t column, uint32_t end)
{
    constexpr int kColumns = FLIGHT / kTerms;
    levels<T, kWeighs> sum;
    uint32_t first = 0;
    sum.start();
    do {
        uint4 v[kColumns][kTerms];
#pragma unroll
        for (int i = 0; i < kTerms; i++) {
            if (first + i < num) {
                const char *row = addends[first + i].row + 16 * (uint64_t)column;
#pragma unroll
                for (int c = 0; c < kColumns; c++) {
                    if (column + 32 * c < end) {
                        v[c][i] = nep_ld16(row + 512 * c);
                    }
                }
            }
        }
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
#pragma unroll
            for (int i = 0; i < kTerms; i++) {
                if (first + i < num) {
                    sum.add(v[c][i], addends[first + i].weight, addends[first + i].ends);
                }
            }
            if (kColumns > 1 || first + kTerms >= num) {
                if (column + 32 * c < end) {
                    uint64_t at = (row + column + 32 * c) * 16;
                    *(uint4 *)(a.y + at) = kBias ? sum.finish_biased(a.bias, at) : sum.finish();
                }
                sum.start();
            }
        }
        first += kTerms;
    } while (first < num);
}

/* Begins or finds the operation; where every rank's rows are. False: give up. */
__device__ __forceinline__ bool prepare(const sum_args &a, uint64_t *op_p, uint64_t *row_base,
                                        uint64_t *weight_base)
{
    uint64_t op = 0;
    bool is_begun = (a.flags & NEP_CUDA_SUM_BEGUN) != 0;
    is_begun = is_begun ? nep_begin(a.group, a.routing.cell, &op) : nep_begin_next(a.group, &op);
    if (!__syncthreads_and(is_begun)) {
        return false;
    }
    *op_p = op;
    if ((a.flags & NEP_CUDA_SUM_SAYS) != 0 && blockIdx.x == 0) {
        nep_lend_all(a.group, nep_lend_of(a.lend, a.staging, a.row_bytes, a.weights_bytes, op), op);
    }
    if (!nep_wait_all(a.group, a.group.words.ready, op, NEP_CUDA_PHASE_READY)) {
        return false;
    }
    for (uint32_t r = threadIdx.x; r < a.group.num_ranks; r += blockDim.x) {
        const struct nep_cuda_lend lend = *nep_lend_at(a.group, a.group.rank, op, r);
        row_base[r] = (uint64_t)nep_window(a.group, r) + lend.rows;
        weight_base[r] = (uint64_t)nep_window(a.group, r) + lend.weights;
    }
    __syncthreads();
    return true;
}

template <class T, bool kWeighs, int kTerms, bool kBias>
__global__ void __launch_bounds__(num_threads<kWeighs>, 1)
    sum_kernel(const __grid_constant__ sum_args a)
{
    __shared__ uint64_t row_base[NEP_CUDA_MAX_RANKS];
    __shared__ uint64_t weight_base[NEP_CUDA_MAX_RANKS];
    __shared__ addend tables[num_threads<kWeighs> / 32][32];
    addend *addends = tables[threadIdx.x / 32];
    uint64_t op = 0;
    if (!prepare(a, &op, row_base, weight_base)) {
        return;
    }
    uint64_t stride = (uint64_t)gridDim.x * (blockDim.x / 32);
    uint64_t num_items = (uint64_t)a.num_tokens * a.parts;
    uint64_t item = (uint64_t)(threadIdx.x / 32) * gridDim.x + blockIdx.x;
    constexpr uint32_t kStep = 32 * (FLIGHT / kTerms);
    uint32_t steps = (a.units + kStep - 1) / kStep;
    uint32_t per_part = (steps + a.parts - 1) / a.parts * kStep;
    for (; item < num_items; item += stride) {
        uint32_t token = (uint32_t)(item / a.parts);
        uint32_t part = (uint32_t)(item % a.parts);
        uint32_t num = take_addends(a, row_base, token, addends);
        uint32_t begin = min(a.units, part * per_part);
        uint32_t end = min(a.units, begin + per_part);
        if (a.weights != nullptr && part == 0) {
            sum_weights(a, weight_base, token, num);
        }
        for (uint32_t column = begin; column < end; column += kStep) {
            sum_columns<T, kWeighs, kTerms, kBias>(a, addends, num, (uint64_t)token * a.units,
                                                   column + threadIdx.x % 32, end);
        }
    }
    if (!nep_is_last_block(a.routing.cell)) {
        return;
    }
    nep_tell_all(a.group, a.group.words.read, op);
    if (nep_wait_all(a.group, a.group.words.read, op, NEP_CUDA_PHASE_READ) && threadIdx.x == 0 &&
        (a.flags & NEP_CUDA_SUM_BEGUN) == 0) {
        nep_begun(a.group, a.routing.cell, op);
    }
}

using kernel_fn = void (*)(sum_args);

template <class T> kernel_fn kernel_of(bool weighs, bool has_bias, uint32_t most_terms)
{
    if (has_bias) {
        return sum_kernel<T, true, 8, true>;
    }
    if (weighs) {
        return sum_kernel<T, true, 8, false>;
    }
    return most_terms <= 2   ? sum_kernel<T, false, 2, false>
           : most_terms <= 4 ? sum_kernel<T, false, 4, false>
                             : sum_kernel<T, false, 8, false>;
}

kernel_fn find_kernel(enum nep_dtype dtype, bool weighs, bool has_bias, uint32_t most_terms)
{
    switch (dtype) {
    case NEP_DTYPE_FP16:
        return kernel_of<nep_fp16>(weighs, has_bias, most_terms);
    case NEP_DTYPE_FP32:
        return kernel_of<nep_fp32>(weighs, has_bias, most_terms);
    default:
        return kernel_of<nep_bf16>(weighs, has_bias, most_terms);
    }
}

} // namespace

enum nep_status nep_cuda_load_sum(void)
{
    const enum nep_dtype dtypes[] = {NEP_DTYPE_BF16, NEP_DTYPE_FP16, NEP_DTYPE_FP32};
    for (enum nep_dtype dtype : dtypes) {
        for (uint32_t i = 0; i < 5; i++) {
            const void *kernel = (const void *)find_kernel(dtype, i == 3, i == 4, 2u << i % 3);
            enum nep_status status = nep_cuda_load_kernel(kernel, "sum");
            if (status != NEP_OK) {
                return status;
            }
        }
    }
    return NEP_OK;
}

extern "C" enum nep_status nep_cuda_sum(const struct nep_cuda_combine *combine, unsigned flags,
                                        struct CUstream_st *stream)
{
    uint32_t bytes = combine->hidden * (combine->dtype == NEP_DTYPE_FP32 ? 4 : 2);
    uintptr_t all =
        (uintptr_t)combine->y | (uintptr_t)combine->bias[0] | (uintptr_t)combine->bias[1];
    if (combine->rows != NEP_CUDA_NONE) {
        all |= combine->rows;
    }
    if (combine->hidden % 16 != 0 || all % 16 != 0 || combine->dtype < NEP_DTYPE_BF16 ||
        combine->dtype > NEP_DTYPE_FP32) {
        return nep_fail(NEP_ERR_INVALID,
                        "sum of rows of %u elements of type %d at offset %llu to %p: bf16, fp16 or "
                        "fp32, and rows and bias at multiples of 16",
                        combine->hidden, (int)combine->dtype, (unsigned long long)combine->rows,
                        combine->y);
    }
    const struct nep_cuda_shape *shape = combine->shape;
    bool weighs = shape->layout != NEP_LAYOUT_RANK;
    bool has_bias = combine->bias[0] != nullptr || combine->bias[1] != nullptr;
    uint32_t num_ranks = combine->group->num_ranks;
    uint32_t most_terms = num_ranks < shape->top_k ? num_ranks : shape->top_k;
    sum_args args = {};
    args.group = *combine->group;
    args.routing = *combine->routing;
    args.staging = shape->staging;
    args.lend = {combine->rows, combine->weights};
    args.y = (char *)combine->y;
    args.bias[0] = (const char *)combine->bias[0];
    args.bias[1] = (const char *)combine->bias[1];
    args.weights = combine->topk_weights;
    args.given = combine->token_weights;
    args.row_bytes = bytes;
    args.weights_bytes = combine->has_weights ? shape->top_k * 4 : 0;
    args.flags = flags;
    args.num_tokens = combine->num_tokens;
    args.units = bytes / 16;
    args.top_k = shape->top_k;
    bool is_wide = weighs || has_bias; /* the kernels with eight rows in flight */
    uint32_t in_flight = is_wide || most_terms > 4 ? 1 : most_terms > 2 ? 2 : 4;
    args.parts =
        nep_cuda_row_parts(combine->geometry, combine->num_tokens, args.units, 32 * in_flight);
    kernel_fn kernel = find_kernel(combine->dtype, weighs, has_bias, most_terms);
    const struct nep_cuda_geometry *geometry = combine->geometry;
    uint32_t threads = is_wide ? num_threads<true> : num_threads<false>;
    uint64_t warps =
        ((uint64_t)args.num_tokens * args.parts + geometry->blocks - 1) / geometry->blocks;
    threads = warps <= 8 ? 256 : threads; /* few rows: few warps, which are there sooner */
    kernel<<<geometry->blocks, threads, geometry->shared_bytes, stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of sum");
}
