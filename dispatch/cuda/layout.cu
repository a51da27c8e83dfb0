// SPDX-License-Identifier: Apache-2.0
/* Layout as a kernel: the work is in device/layout.cuh. */
#include "dispatch/cuda/device/layout.cuh"

namespace
{

enum { LAYOUT_MAX_THREADS = 512 };

__global__ void __launch_bounds__(LAYOUT_MAX_THREADS)
    layout_kernel(const __grid_constant__ layout_args a)
{
    extern __shared__ uint32_t shared[];
    uint64_t op = 0;
    uint64_t epoch = nep_ld_relaxed_gpu(&a.routing.cell->epoch) + 1;
    nep_let_next_start();
    bool is_begun = nep_begin_next(a.group, &op);
    if (!__syncthreads_and(is_begun)) { /* the same answer for all threads of a block */
        return;
    }
    const layout_tables tables = {a.routing.slots, a.routing.index, false};
    layout_block(a, tables, op, epoch, shared, blockIdx.x, gridDim.x, blockIdx.x == gridDim.x - 1);
    if (nep_is_last_block(a.routing.cell) && threadIdx.x == 0) {
        a.routing.cell->epoch = epoch;
        if (!a.is_quiet) {
            nep_begun(a.group, a.routing.cell, op);
        }
    }
}

/* A thread per token and rank. */
__global__ void is_in_kernel(const uint32_t *slots, uint32_t num_tokens, uint32_t top_k,
                             uint32_t num_ranks, uint32_t slots_per_rank, uint8_t *is_in)
{
    uint64_t num = (uint64_t)num_tokens * num_ranks;
    for (uint64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < num; i += gridDim.x * blockDim.x) {
        const uint32_t *of = slots + i / num_ranks * top_k;
        uint8_t is = 0;
        for (uint32_t k = 0; k < top_k; k++) {
            is |= of[k] != NEP_SLOT_NONE && of[k] / slots_per_rank == i % num_ranks;
        }
        is_in[i] = is;
    }
}

} // namespace

enum nep_status nep_cuda_load_layout(void)
{
    enum nep_status status = nep_cuda_load_kernel((const void *)is_in_kernel, "is_in");
    return status == NEP_OK ? nep_cuda_load_kernel((const void *)layout_kernel, "layout") : status;
}

static enum nep_status launch(const struct nep_cuda_dispatch *dispatch, bool is_quiet,
                              struct CUstream_st *stream)
{
    const struct nep_cuda_shape *shape = dispatch->shape;
    uint32_t num_ranks = dispatch->shape->num_ranks;
    if (dispatch->in->num_tokens > shape->max_tokens || shape->top_k == 0 ||
        shape->top_k > NEP_CHOOSE_MAX_K || num_ranks > NEP_CUDA_MAX_RANKS) {
        return nep_fail(NEP_ERR_INVALID,
                        "layout of %u tokens (at most %u), top-%u (at most %u), %u ranks (at most "
                        "%u)",
                        dispatch->in->num_tokens, shape->max_tokens, shape->top_k, NEP_CHOOSE_MAX_K,
                        num_ranks, NEP_CUDA_MAX_RANKS);
    }
    layout_args args = layout_args_of(dispatch);
    args.is_quiet = is_quiet;
    const struct nep_cuda_geometry *geometry = dispatch->geometry;
    /* One pair per thread and two steps at least; a single block waits for no other. */
    uint64_t pairs = (uint64_t)dispatch->in->num_tokens * shape->top_k;
    uint64_t blocks = (pairs + 2 * geometry->layout_threads - 1) / (2 * geometry->layout_threads);
    if (blocks < 1 || blocks > geometry->layout_blocks) {
        blocks = blocks < 1 ? 1 : geometry->layout_blocks;
    }
    layout_kernel<<<(uint32_t)blocks, geometry->layout_threads, geometry->layout_shared_bytes,
                    stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of layout");
}

extern "C" enum nep_status nep_cuda_layout(const struct nep_cuda_dispatch *dispatch,
                                           struct CUstream_st *stream)
{
    return launch(dispatch, false, stream);
}

extern "C" enum nep_status nep_cuda_count(const struct nep_cuda_dispatch *dispatch,
                                          struct CUstream_st *stream)
{
    return launch(dispatch, true, stream);
}

extern "C" enum nep_status nep_cuda_is_in(const struct nep_cuda_dispatch *dispatch, uint8_t *is_in,
                                          struct CUstream_st *stream)
{
    const struct nep_cuda_geometry *geometry = dispatch->geometry;
    is_in_kernel<<<geometry->blocks, 256, 0, stream>>>(
        dispatch->routing->slots, dispatch->in->num_tokens, dispatch->shape->top_k,
        dispatch->shape->num_ranks, dispatch->shape->slots_per_rank, is_in);
    return nep_cuda_check(cudaGetLastError(), "launch of is_in");
}
