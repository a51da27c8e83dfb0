// SPDX-License-Identifier: Apache-2.0
/*
 * Copies between arrays that the node does not map and this rank's window, where its node reads and
 * writes: as many rows as came to this rank, which the host need not know.
 */
#include "dispatch/cuda/device/far.cuh"

namespace
{

enum { THREADS = 1024, FLIGHT = 4 };

struct copy_args {
    struct nep_far far;
    struct nep_far_copy copy;
    const uint64_t *num_rows;
    uint64_t most;
};

/* bytes is a multiple of 4 where both addresses are, of 16 likewise. */
__device__ void copy_all(const char *from, char *to, uint64_t bytes)
{
    uint64_t at = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint64_t step = (uint64_t)gridDim.x * blockDim.x;
    uint64_t all = bytes | (uint64_t)from | (uint64_t)to;
    if (all % 16 != 0) {
        for (uint64_t i = at; all % 4 == 0 && i < bytes / 4; i += step) {
            ((uint32_t *)to)[i] = ((const uint32_t *)from)[i];
        }
        for (uint64_t i = at; all % 4 != 0 && i < bytes; i += step) {
            to[i] = from[i];
        }
        return;
    }
    uint64_t units = bytes / 16;
    for (uint64_t i = at; i < units; i += FLIGHT * step) {
        uint4 v[FLIGHT];
#pragma unroll
        for (int j = 0; j < FLIGHT; j++) {
            if (i + j * step < units) {
                v[j] = nep_ld16(from + 16 * (i + j * step));
            }
        }
#pragma unroll
        for (int j = 0; j < FLIGHT; j++) {
            if (i + j * step < units) {
                ((uint4 *)to)[i + j * step] = v[j];
            }
        }
    }
}

__global__ void __launch_bounds__(THREADS, 1) copy_kernel(const __grid_constant__ copy_args a)
{
    if (nep_ld_relaxed_gpu(&a.far.state->run.status) != 0) {
        return;
    }
    uint64_t rows = *a.num_rows;
    if (rows > a.most) {
        if (threadIdx.x == 0) {
            nep_far_give_up(a.far,
                            NEP_CUDA_STATUS(NEP_CUDA_OVERFLOW, NEP_CUDA_PHASE_STAGE, a.far.rank));
        }
        return;
    }
    for (int i = 0; i < 6; i++) {
        if (a.copy.from[i] != nullptr) {
            copy_all(a.copy.from[i], a.copy.to[i], rows * a.copy.row_bytes[i]);
        }
    }
}

} // namespace

enum nep_status nep_cuda_load_far_copy(void)
{
    return nep_cuda_load_kernel((const void *)copy_kernel, "far copy");
}

extern "C" enum nep_status nep_cuda_far_copy(const struct nep_far *far,
                                             const struct nep_cuda_geometry *geometry,
                                             const struct nep_cuda_routing *routing,
                                             const struct nep_far_copy *copy, uint64_t most,
                                             struct CUstream_st *stream)
{
    copy_args args = {};
    args.far = *far;
    args.copy = *copy;
    args.num_rows = routing->received;
    args.most = most;
    copy_kernel<<<geometry->blocks, THREADS, geometry->shared_bytes, stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of far copy");
}
