// SPDX-License-Identifier: Apache-2.0
/* The resident kernel of fake_nic.h. */
#include "tests/gpu/fake_nic.h"

#include "dispatch/cuda/device/ptx.cuh"

namespace
{

/* A block alone is slowed down by whatever else the memory does: two, held to the port's speed. One
 * warp fetches the next entry meanwhile, as a port does. */
enum { THREADS = 1024, COPIERS = 992, FLIGHT = 8, HALVES = FAKE_NIC_HALVES, BYTES_PER_NS = 50 };

__device__ void copy(const fake_nic_entry &e, uint32_t half)
{
    uint64_t all = e.bytes / 16;
    uint64_t begin = all * half / HALVES;
    uint64_t units = all * (half + 1) / HALVES;
    for (uint64_t k = begin + threadIdx.x; k < units; k += COPIERS * FLIGHT) {
        uint4 v[FLIGHT];
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            if (k + i * COPIERS < units) {
                v[i] = nep_ld16(e.from + 16 * (k + i * COPIERS));
            }
        }
#pragma unroll
        for (int i = 0; i < FLIGHT; i++) {
            if (k + i * COPIERS < units) {
                ((uint4 *)e.to)[k + i * COPIERS] = v[i];
            }
        }
    }
    for (uint64_t b = units * 16 + threadIdx.x; half == HALVES - 1 && b < e.bytes; b += COPIERS) {
        e.to[b] = e.from[b];
    }
}

struct block {
    fake_nic_entry entries[2];
    uint32_t has[2];
    uint32_t copied; /* warps that are done with the entry at hand */
};

/* By one thread: looks for an entry until it is there or, with `until`, that many warps are done.
 */
__device__ void fetch(fake_nic_queue &queue, uint64_t next, uint64_t end_ns, uint32_t until,
                      block &b)
{
    fake_nic_entry *at = &queue.entries[next % FAKE_NIC_QUEUE];
    for (uint32_t looks = 1;; looks++) {
        if (nep_ld_acquire_sys(&at->seq) == next + 1) {
            b.entries[next % 2] = *at;
            b.has[next % 2] = 1;
            return;
        }
        bool is_over = until != 0 && *(volatile uint32_t *)&b.copied >= until;
        if (is_over || (looks % 16 == 0 &&
                        (nep_ld_acquire_sys(&queue.stop) != 0 || nep_globaltimer() > end_ns))) {
            return;
        }
    }
}

__global__ void __launch_bounds__(THREADS, 1) nic_kernel(fake_nic_queue *queues, uint64_t life_ns)
{
    __shared__ block b;
    fake_nic_queue &queue = queues[blockIdx.x / HALVES];
    uint32_t half = blockIdx.x % HALVES;
    uint64_t end_ns = nep_globaltimer() + life_ns;
    if (threadIdx.x < 2) {
        b.has[threadIdx.x] = 0;
    }
    __syncthreads();
    for (uint64_t next = 0;; next++) {
        if (threadIdx.x == 0) {
            if (b.has[next % 2] == 0) {
                fetch(queue, next, end_ns, 0, b);
            }
            b.copied = 0;
        }
        __syncthreads();
        if (b.has[next % 2] == 0) {
            return;
        }
        const fake_nic_entry &entry = b.entries[next % 2];
        uint64_t began = nep_globaltimer();
        if (threadIdx.x < COPIERS) {
            copy(entry, half);
            __syncwarp();
            if (threadIdx.x % 32 == 0) {
                atomicAdd(&b.copied, 1u);
            }
        } else if (threadIdx.x == COPIERS) {
            fetch(queue, next + 1, end_ns, COPIERS / 32, b);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            while (nep_globaltimer() - began < entry.bytes / BYTES_PER_NS) {
            }
            nep_st_release_sys(&queue.done[half], next + 1);
            b.has[next % 2] = 0;
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
