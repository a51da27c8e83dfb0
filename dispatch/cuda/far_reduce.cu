// SPDX-License-Identifier: Apache-2.0
/*
 * Reduce: for each source of another node that lands here, this node's rows of each of its tokens,
 * read in place, summed and rounded, one row back, in tiles. Here the tiles that slots hold, which
 * wait for operations that this rank has completed alone.
 */
#include "dispatch/cuda/device/far_sums.cuh"

using namespace far_sums;

namespace
{

/* By the last block: the operation has begun. */
__device__ void end_send(const combine_args &a, uint64_t op)
{
    const struct nep_far &far = a.far;
    nep_far_begun(
        far, op, a.cell, far.state->next_sums, far.num_lanes,
        [&](uint32_t lane, uint32_t *ring_p) {
            *ring_p = lane;
            return tiles_of(a, lane);
        },
        [&](uint32_t lane) { return stream_ahead(a, op, lane); });
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1) reduce_kernel(const __grid_constant__ combine_args a)
{
    __shared__ const char *base[2 * NEP_FAR_MAX_RANKS];
    __shared__ addend tables[THREADS / 32][MOST_ADDENDS];
    if (nep_ld_relaxed_gpu(&a.far.state->run.status) != 0) {
        return;
    }
    uint64_t op = nep_ld_relaxed_gpu(&a.far.state->begun);
    role r = {blockIdx.x, gridDim.x};
    if (threadIdx.x == 0 && blockIdx.x == 0) {
        nep_far_stamp(a.far, NEP_FAR_AT_REDUCE);
    }
    if (find_rows(a, op, base)) {
        if (threadIdx.x == 0 && blockIdx.x == 0) {
            nep_far_stamp(a.far, NEP_FAR_AT_ROWS_HERE);
        }
        if (reduce_first<T>(a, r, base, tables[threadIdx.x / 32], op) &&
            nep_far_is_last(&a.far.state->arrived, gridDim.x)) {
            end_send(a, op);
        }
    }
}

kernel_fn find_kernel(enum nep_dtype dtype)
{
    switch (dtype) {
    case NEP_DTYPE_FP16:
        return reduce_kernel<nep_fp16>;
    case NEP_DTYPE_FP32:
        return reduce_kernel<nep_fp32>;
    default:
        return reduce_kernel<nep_bf16>;
    }
}

} // namespace

enum nep_status nep_cuda_load_far_reduce(void)
{
    const enum nep_dtype dtypes[] = {NEP_DTYPE_BF16, NEP_DTYPE_FP16, NEP_DTYPE_FP32};
    enum nep_status status = NEP_OK;
    for (uint32_t i = 0; status == NEP_OK && i < 3; i++) {
        status = nep_cuda_load_kernel((const void *)find_kernel(dtypes[i]), "far reduce");
    }
    return status;
}

extern "C" enum nep_status nep_cuda_far_reduce(const struct nep_far_combine *c,
                                               struct CUstream_st *stream)
{
    return launch(c, find_kernel(c->far->dtype), stream);
}
