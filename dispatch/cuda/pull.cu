// SPDX-License-Identifier: Apache-2.0
/*
 * Pull: rows from where they lie, a tile's landing slot or another rank's input, to their places in
 * this rank's output, by a list that is made elsewhere. For what cannot be pushed: rows of other
 * nodes, and outputs that peers do not map. The sources were acquired before this launch.
 */
#include "dispatch/cuda/device/launch.cuh"
#include "dispatch/cuda/device/ptx.cuh"

namespace
{

enum { PULL_THREADS = 1024, FLIGHT = 4 };

__device__ __forceinline__ void pull_bytes(const char *from, char *to, uint32_t bytes,
                                           uint32_t lane)
{
    bool is_wide = (bytes | (uint64_t)from | (uint64_t)to) % 4 == 0;
    for (uint32_t i = lane; is_wide && i < bytes / 4; i += 32) {
        ((uint32_t *)to)[i] = ((const uint32_t *)from)[i];
    }
    for (uint32_t i = lane; !is_wide && i < bytes; i += 32) {
        to[i] = from[i];
    }
}

__global__ void __launch_bounds__(PULL_THREADS, 1)
    pull_kernel(const __grid_constant__ struct nep_cuda_pull a)
{
    if (nep_ld_relaxed_gpu(&a.state->status) != 0) {
        return;
    }
    uint32_t lane = threadIdx.x % 32;
    uint32_t stride = gridDim.x * (blockDim.x / 32);
    uint32_t num = min(*a.num_moves, a.max_moves);
    uint32_t units = a.payload_bytes / 16;
    for (uint32_t i = threadIdx.x / 32 * gridDim.x + blockIdx.x; i < num; i += stride) {
        struct nep_cuda_move move = a.moves[i];
        const char *from = (const char *)a.sources[move.source] + move.row * a.stride;
        uint4 *to = (uint4 *)((char *)a.x + (uint64_t)move.pos * a.payload_bytes);
        for (uint32_t c = lane; c < units; c += 32 * FLIGHT) {
            uint4 v[FLIGHT];
#pragma unroll
            for (int j = 0; j < FLIGHT; j++) {
                if (c + 32 * j < units) {
                    v[j] = nep_ld16(from + 16 * (uint64_t)(c + 32 * j));
                }
            }
#pragma unroll
            for (int j = 0; j < FLIGHT; j++) {
                if (c + 32 * j < units) {
                    to[c + 32 * j] = v[j];
                }
            }
        }
        if (a.scale_bytes != 0) {
            pull_bytes(from + a.payload_bytes,
                       (char *)a.scales + (uint64_t)move.pos * a.scale_bytes, a.scale_bytes, lane);
        }
    }
}

} // namespace

enum nep_status nep_cuda_load_pull(void)
{
    return nep_cuda_load_kernel((const void *)pull_kernel, "pull");
}

extern "C" enum nep_status nep_cuda_pull(const struct nep_cuda_pull *pull,
                                         struct CUstream_st *stream)
{
    if ((pull->payload_bytes | pull->stride | (uintptr_t)pull->x) % 16 != 0) {
        return nep_fail(NEP_ERR_INVALID,
                        "pull: rows of %u bytes, %llu apart, to %p: all must be multiples of 16",
                        pull->payload_bytes, (unsigned long long)pull->stride, pull->x);
    }
    const struct nep_cuda_geometry *geometry = pull->geometry;
    pull_kernel<<<geometry->blocks, PULL_THREADS, geometry->shared_bytes, stream>>>(*pull);
    return nep_cuda_check(cudaGetLastError(), "launch of pull");
}
