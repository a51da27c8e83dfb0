// SPDX-License-Identifier: Apache-2.0
/*
 * Expert outputs that are still being written when combine is called: one block waits for the flags
 * of whoever writes them, before the kernels that read. Waiting row by row inside of those was
 * rejected: blocks that wait hold SMs, which are what the writer is short of.
 */
#include "dispatch/cuda/device/launch.cuh"
#include "dispatch/cuda/device/wait.cuh"

namespace
{

enum { WRITTEN_THREADS = 256 };

struct written_args {
    struct nep_cuda_group group;
    const uint32_t *received_rows; /* [L] */
    struct nep_written written;
    uint32_t num_slots;
};

/* As nep_wait_word, but the writer is no rank that could have given up. */
__device__ bool wait_flag(const struct nep_cuda_group &group, const uint32_t *flag, uint32_t least)
{
    uint64_t start = 0;
    for (uint32_t i = 0; nep_ld_acquire_gpu_u32(flag) < least; i++) {
        if (i % 16 != 15) {
            continue;
        }
        uint64_t now = nep_globaltimer();
        start = start == 0 ? now : start;
        if (now - start > group.timeout_ns) {
            nep_give_up(group, nep_ld_relaxed_gpu(&group.state->op) + 1,
                        NEP_CUDA_STATUS(NEP_CUDA_EXPIRED, NEP_CUDA_PHASE_WRITTEN, group.rank));
            return false;
        }
        if (nep_is_stuck(group)) {
            return false;
        }
    }
    return true;
}

/* The end of the launch hands what was acquired to the kernels that follow. */
__global__ void __launch_bounds__(WRITTEN_THREADS)
    written_kernel(const __grid_constant__ written_args a)
{
    const struct nep_written &w = a.written;
    uint64_t num = (uint64_t)a.num_slots * w.flags_per_slot;
    for (uint64_t i = threadIdx.x; i < num; i += blockDim.x) {
        uint32_t rows = a.received_rows[i / w.flags_per_slot];
        uint64_t first = i % w.flags_per_slot * w.rows_per_flag;
        bool is_used = w.rows_per_flag != 0 ? first < rows : i % w.flags_per_slot == 0 && rows != 0;
        if (is_used && !wait_flag(a.group, w.flags + i, w.least)) {
            return;
        }
    }
}

} // namespace

enum nep_status nep_cuda_load_written(void)
{
    return nep_cuda_load_kernel((const void *)written_kernel, "written");
}

extern "C" enum nep_status nep_cuda_await_written(const struct nep_cuda_group *group,
                                                  const struct nep_cuda_routing *routing,
                                                  const struct nep_written *written,
                                                  uint32_t num_slots, struct CUstream_st *stream)
{
    written_args args = {*group, routing->received_rows, *written, num_slots};
    written_kernel<<<1, WRITTEN_THREADS, 0, stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of written");
}
