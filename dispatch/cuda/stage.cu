// SPDX-License-Identifier: Apache-2.0
/*
 * Stage: expert outputs that lie in memory which peers do not map, copied into the staging area,
 * where sum reads them in place. The rows as they are: who needs which is not looked at here.
 * Ready: says that the rows may be read, as a kernel of its own, for a combine in two halves.
 */
#include "dispatch/cuda/device/launch.cuh"
#include "dispatch/cuda/device/wait.cuh"

namespace
{

enum { STAGE_THREADS = 1024, FLIGHT = 4 };

struct stage_args {
    struct nep_cuda_group group;
    struct nep_cuda_routing routing;
    struct nep_cuda_staging staging;
    const char *rows;
    const char *weights;
    uint32_t row_bytes;
    uint32_t weights_bytes; /* of a row; 0: there are none */
    uint32_t gaps;          /* slots with places of their own, packed inside; 0: rows are packed */
};

/* Which threads share a copy: this one's number, and how many there are. */
struct copiers {
    uint64_t at;
    uint64_t num;
};

/* bytes is a multiple of 4, and of 16 where both are aligned so. */
__device__ void copy_all(const char *from, char *to, uint64_t bytes, const copiers &threads)
{
    uint64_t at = threads.at;
    uint64_t step = threads.num;
    if ((bytes | (uint64_t)from | (uint64_t)to) % 16 != 0) {
        for (uint64_t i = at; i < bytes / 4; i += step) {
            ((uint32_t *)to)[i] = ((const uint32_t *)from)[i];
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

/* The rows of each slot alone: most places of this layout are empty. Blocks share the slots. */
__device__ void copy_slots(const stage_args &a, char *to)
{
    uint32_t parts = max(gridDim.x / a.gaps, 1u);
    for (uint32_t item = blockIdx.x; item < a.gaps * parts; item += gridDim.x) {
        uint32_t slot = item / parts;
        uint64_t first = a.routing.received[2 + slot] * a.row_bytes;
        uint64_t bytes = (uint64_t)a.routing.received_rows[slot] * a.row_bytes;
        copiers threads = {(uint64_t)(item % parts) * blockDim.x + threadIdx.x,
                           (uint64_t)parts * blockDim.x};
        copy_all(a.rows + first, to + first, bytes, threads);
    }
}

__global__ void __launch_bounds__(STAGE_THREADS, 1)
    stage_kernel(const __grid_constant__ stage_args a)
{
    uint64_t op = 0;
    if (!nep_begin_next(a.group, &op)) {
        return;
    }
    uint64_t rows = a.routing.received[0];
    uint64_t slot = op % a.staging.depth;
    char *window = nep_window(a.group, a.group.rank);
    if (rows > a.staging.y_rows) {
        if (threadIdx.x == 0) {
            nep_give_up(a.group, op,
                        NEP_CUDA_STATUS(NEP_CUDA_OVERFLOW, NEP_CUDA_PHASE_STAGE, a.group.rank));
        }
        return;
    }
    copiers threads = {(uint64_t)blockIdx.x * blockDim.x + threadIdx.x,
                       (uint64_t)gridDim.x * blockDim.x};
    char *to = window + a.staging.y + slot * a.staging.y_rows * a.row_bytes;
    if (a.gaps != 0) {
        copy_slots(a, to);
    } else {
        copy_all(a.rows, to, rows * a.row_bytes, threads);
    }
    if (a.weights_bytes != 0) {
        copy_all(a.weights,
                 window + a.staging.y_weights + slot * a.staging.y_rows * a.weights_bytes,
                 rows * a.weights_bytes, threads);
    }
    if (nep_is_last_block(a.routing.cell) && threadIdx.x == 0) {
        nep_begun(a.group, a.routing.cell, op);
    }
}

__global__ void ready_kernel(const __grid_constant__ struct nep_cuda_group group,
                             const struct nep_cuda_lend lend,
                             const __grid_constant__ struct nep_cuda_staging staging,
                             uint32_t row_bytes, uint32_t weights_bytes, struct nep_cuda_cell *cell,
                             bool is_begun)
{
    uint64_t op = 0;
    if (is_begun ? !nep_begin(group, cell, &op) : !nep_begin_next(group, &op)) {
        return;
    }
    nep_lend_all(group, nep_lend_of(lend, staging, row_bytes, weights_bytes, op), op);
    __syncthreads();
    if (threadIdx.x == 0) {
        nep_begun(group, cell, op);
    }
}

} // namespace

enum nep_status nep_cuda_load_stage(void)
{
    enum nep_status status = nep_cuda_load_kernel((const void *)ready_kernel, "ready");
    return status == NEP_OK ? nep_cuda_load_kernel((const void *)stage_kernel, "stage") : status;
}

extern "C" enum nep_status nep_cuda_stage(const struct nep_cuda_combine *combine,
                                          struct CUstream_st *stream)
{
    const struct nep_cuda_shape *shape = combine->shape;
    stage_args args = {};
    args.group = *combine->group;
    args.routing = *combine->routing;
    args.staging = shape->staging;
    args.rows = (const char *)combine->in;
    args.weights = (const char *)combine->in_weights;
    args.row_bytes = combine->hidden * (combine->dtype == NEP_DTYPE_FP32 ? 4 : 2);
    args.weights_bytes = combine->has_weights ? shape->top_k * 4 : 0;
    args.gaps = shape->layout == NEP_LAYOUT_EXPERT_FRONT ? shape->slots_per_rank : 0;
    const struct nep_cuda_geometry *geometry = combine->geometry;
    stage_kernel<<<geometry->blocks, STAGE_THREADS, geometry->shared_bytes, stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of stage");
}

extern "C" enum nep_status nep_cuda_ready(const struct nep_cuda_combine *combine, int is_begun,
                                          struct CUstream_st *stream)
{
    const struct nep_cuda_shape *shape = combine->shape;
    const struct nep_cuda_lend lend = {combine->rows, combine->weights};
    ready_kernel<<<1, NEP_CUDA_MAX_RANKS, 0, stream>>>(
        *combine->group, lend, shape->staging,
        combine->hidden * (combine->dtype == NEP_DTYPE_FP32 ? 4 : 2),
        combine->has_weights ? shape->top_k * 4 : 0, combine->routing->cell, is_begun != 0);
    return nep_cuda_check(cudaGetLastError(), "launch of ready");
}
