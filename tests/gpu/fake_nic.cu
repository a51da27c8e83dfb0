// SPDX-License-Identifier: Apache-2.0
/* The resident kernel of fake_nic.h. */
#include "tests/gpu/fake_nic.h"

#include "dispatch/cuda/device/ptx.cuh"

namespace
{

/* A block alone is slowed down by whatever else the memory does: two, held to the port's speed. */
enum { THREADS = 1024, FLIGHT = 8, HALVES = FAKE_NIC_HALVES, BYTES_PER_NS = 50 };

__device__ void copy(const fake_nic_entry &e, uint32_t half)
{
    uint64_t all = e.bytes / 16;
    uint64_t begin = all * half / HALVES;
    uint64_t units = all * (half + 1) / HALVES;
    for (uint64_t k = begin + threadIdx.x; k < units; k += THREADS * FLIGHT) {
        uint4 v[FLIGHT];
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            if (k + i * THREADS < units) {
                v[i] = nep_ld16(e.from + 16 * (k + i * THREADS));
            }
        }
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            if (k + i * THREADS < units) {
                ((uint4 *)e.to)[k + i * THREADS] = v[i];
            }
        }
    }
    for (uint64_t b = units * 16 + threadIdx.x; half == HALVES - 1 && b < e.bytes; b += THREADS) {
        e.to[b] = e.from[b];
    }
}

__global__ void __launch_bounds__(THREADS, 1) nic_kernel(fake_nic_queue *queues, uint64_t life_ns)
{
    __shared__ fake_nic_entry entry;
    __shared__ int is_there;
    uint64_t began = 0;
    fake_nic_queue &queue = queues[blockIdx.x / HALVES];
    uint32_t half = blockIdx.x % HALVES;
    uint64_t start = nep_globaltimer();
    for (uint64_t next = 0;; next++) {
        if (threadIdx.x == 0) {
            fake_nic_entry *at = &queue.entries[next % FAKE_NIC_QUEUE];
            is_there = 0;
            for (uint32_t looks = 1; is_there == 0; looks++) {
                is_there = nep_ld_acquire_sys(&at->seq) == next + 1;
                if (looks % 16 == 0 &&
                    (nep_ld_acquire_sys(&queue.stop) != 0 || nep_globaltimer() - start > life_ns)) {
                    break;
                }
            }
            if (is_there) {
                entry = *at;
                began = nep_globaltimer();
            }
        }
        __syncthreads();
        if (!is_there) {
            return;
        }
        copy(entry, half);
        __syncthreads();
        if (threadIdx.x == 0) {
            while (nep_globaltimer() - began < entry.bytes / BYTES_PER_NS) {
            }
            nep_st_release_sys(&queue.done[half], next + 1);
        }
    }
}

} // namespace

extern "C" int fake_nic_launch(struct fake_nic_queue *queues, uint32_t num_ranks, uint64_t life_ns,
                               struct CUstream_st *stream)
{
    nic_kernel<<<num_ranks * HALVES, THREADS, 0, stream>>>(queues, life_ns);
    return (int)cudaGetLastError();
}
