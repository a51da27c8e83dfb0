// SPDX-License-Identifier: Apache-2.0
/*
 * Copies between arrays that the node does not map and this rank's window, where its node reads and
 * writes: the rows that came to this rank, which the host need not know. What lies between the rows
 * of slots stays as it is.
 */
#include "dispatch/cuda/device/far.cuh"

namespace
{

enum { THREADS = 1024, FLIGHT = 4 };

struct copy_args {
    struct nep_far far;
    struct nep_far_copy copy;
    const uint64_t *received;      /* of struct nep_cuda_routing */
    const uint32_t *received_rows; /* likewise */
    uint64_t most;
};

struct segment {
    uint64_t first;
    uint64_t rows;
};

__device__ __forceinline__ uint32_t num_segments(const copy_args &a)
{
    uint32_t slots = a.far.shape.slots_per_rank;
    switch (a.far.shape.layout) {
    case NEP_LAYOUT_RANK:
        return 1;
    case NEP_LAYOUT_EXPERT_PADDED:
        return a.copy.is_dispatched ? slots * a.far.num_ranks : 1;
    default:
        return slots;
    }
}

/* Rows that follow one another: all, those of a slot, or those of a slot and source. */
__device__ inline segment segment_at(const copy_args &a, uint32_t i)
{
    if (num_segments(a) == 1 && a.far.shape.layout != NEP_LAYOUT_EXPERT_PACKED &&
        a.far.shape.layout != NEP_LAYOUT_EXPERT_FRONT) {
        return {0, a.received[0]};
    }
    if (a.far.shape.layout != NEP_LAYOUT_EXPERT_PADDED) {
        return {a.received[2 + i], a.received_rows[i]};
    }
    uint32_t slot = i / a.far.num_ranks;
    uint32_t source = i % a.far.num_ranks;
    /* The dispatch has just ended: its COUNTS are there until the next but one begins. */
    const uint32_t *tables =
        (const uint32_t *)(nep_far_counts_at(a.far, source, a.far.state->run.op - 1) + 1);
    return {a.received[2 + slot] + (uint64_t)source * a.far.shape.max_tokens,
            tables[a.far.node_size + a.far.local * a.far.shape.slots_per_rank + slot]};
}

/* bytes is a multiple of 4 where both addresses are, of 16 likewise. */
__device__ void copy_all(const char *from, char *to, uint64_t bytes, uint64_t at, uint64_t step)
{
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

/* Scales in columns, which differ with the number of rows that each side has room for. */
__device__ void copy_columns(const copy_args &a, const segment &s, uint64_t at, uint64_t step)
{
    const struct nep_wire &wire = a.far.shape.wire;
    uint64_t num = s.rows * (wire.scale_bytes / 4);
    for (uint64_t i = at; i < num; i += step) {
        uint64_t row = s.first + i % s.rows;
        struct nep_scales_at from =
            nep_wire_scales_at(&wire, (char *)a.copy.from[NEP_FAR_SCALES], row, a.copy.capacity[0]);
        struct nep_scales_at to =
            nep_wire_scales_at(&wire, a.copy.to[NEP_FAR_SCALES], row, a.copy.capacity[1]);
        *(uint32_t *)(to.first + i / s.rows * to.step) =
            *(const uint32_t *)(from.first + i / s.rows * from.step);
    }
}

__global__ void __launch_bounds__(THREADS, 1) copy_kernel(const __grid_constant__ copy_args a)
{
    if (nep_ld_relaxed_gpu(&a.far.state->run.status) != 0) {
        return;
    }
    if (a.received[0] > a.most) {
        if (threadIdx.x == 0) {
            nep_far_give_up(a.far,
                            NEP_CUDA_STATUS(NEP_CUDA_OVERFLOW, NEP_CUDA_PHASE_STAGE, a.far.rank));
        }
        return;
    }
    uint32_t op_area = nep_far_area(a.far, a.far.state->begun); /* in a send half */
    /* Few segments: all blocks share each. Many: a block takes one. */
    uint32_t num = num_segments(a);
    bool is_shared = num < gridDim.x;
    uint64_t at = is_shared ? (uint64_t)blockIdx.x * blockDim.x + threadIdx.x : threadIdx.x;
    uint64_t step = is_shared ? (uint64_t)gridDim.x * blockDim.x : blockDim.x;
    for (uint32_t s = is_shared ? 0 : blockIdx.x; s < num; s += is_shared ? 1 : gridDim.x) {
        segment segment = segment_at(a, s);
        for (int i = 0; i < 6; i++) {
            bool is_scales = a.copy.is_dispatched && i == NEP_FAR_SCALES;
            if (is_scales && a.copy.from[i] != nullptr && a.far.shape.wire.scale_columns != 0) {
                copy_columns(a, segment, at, step);
            } else if (a.copy.from[i] != nullptr) {
                uint64_t offset = segment.first * a.copy.row_bytes[i];
                uint64_t area = i < 2 ? a.copy.to_step[i] * op_area : 0;
                copy_all(a.copy.from[i] + offset, a.copy.to[i] + area + offset,
                         segment.rows * a.copy.row_bytes[i], at, step);
            }
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
    args.received = routing->received;
    args.received_rows = routing->received_rows;
    args.most = most;
    copy_kernel<<<geometry->blocks, THREADS, geometry->shared_bytes, stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of far copy");
}
