// SPDX-License-Identifier: Apache-2.0
/* Kernels of gpu_ring.h. The ring itself is the library's. */
#include "tests/gpu/gpu_ring.h"

#include "dispatch/cuda/ring.h"

namespace
{

__device__ __forceinline__ nep_ring ring_of(const gpu_ring_args &a)
{
    return {a.shared, a.producer, GPU_RING_SIZE};
}

__device__ void give_up(const gpu_ring_args &a, enum nep_ring_end end, uint64_t op,
                        uint64_t waited_ns)
{
    if (atomicCAS((unsigned long long *)&a.state->status, 0ull,
                  (unsigned long long)end << 32 | op) == 0) {
        a.state->waited_ns = waited_ns;
    }
}

__global__ void ping_kernel(const __grid_constant__ gpu_ring_args a, uint32_t num)
{
    nep_ring ring = ring_of(a);
    for (uint32_t i = 0; i < num; i++) {
        uint64_t begin = nep_globaltimer();
        long long ticks = clock64();
        enum nep_ring_end end =
            nep_ring_post(&ring, nep_ring_command(1, 0, 0, i, i), nullptr, a.timeout_ns);
        if (end == NEP_RING_DONE) {
            end = nep_ring_wait(&ring, a.word, i + 1, nullptr, a.timeout_ns);
        }
        if (end != NEP_RING_DONE) {
            give_up(a, end, i, nep_globaltimer() - begin);
            return;
        }
        a.state->latency_ns[i % GPU_RING_LATENCIES] = (uint32_t)(clock64() - ticks);
    }
}

__global__ void load_kernel(const __grid_constant__ gpu_ring_args a, uint32_t num)
{
    uint64_t sum = 0;
    uint64_t begin = nep_globaltimer();
    long long ticks = clock64();
    for (uint32_t i = 0; i < num; i++) {
        sum += nep_ld_acquire_sys(a.word);
    }
    ticks = clock64() - ticks;
    begin = nep_globaltimer() - begin;
    a.state->latency_ns[0] = (uint32_t)(begin / num);
    a.state->latency_ns[1] = (uint32_t)(ticks * 1000 / (long long)begin); /* MHz */
    a.state->seen = sum;
}

__global__ void flood_kernel(const __grid_constant__ gpu_ring_args a, uint32_t num)
{
    nep_ring ring = ring_of(a);
    for (uint32_t i = 0; i < num; i++) {
        enum nep_ring_end end = nep_ring_post(
            &ring, nep_ring_command(2, blockIdx.x, i % 4096, i, i), &a.state->status, a.timeout_ns);
        if (end != NEP_RING_DONE) {
            give_up(a, end, i, 0);
            return;
        }
    }
}

__device__ __forceinline__ uint4 pattern(uint64_t op, uint32_t i)
{
    uint32_t x = ((uint32_t)op * 0x9e3779b1u ^ i) * 0x85ebca6bu;
    x ^= x >> 13;
    return make_uint4(x, x + 1, x ^ 0x55, (uint32_t)op);
}

__global__ void __launch_bounds__(256) send_kernel(const __grid_constant__ gpu_ring_args a)
{
    if (nep_ld_relaxed_gpu(&a.state->status) != 0) {
        return;
    }
    uint64_t op = nep_ld_relaxed_gpu(&a.state->op) + 1;
    uint32_t units = a.bytes / 16;
    uint4 *slot = (uint4 *)(a.slots + (op & 1) * a.bytes);
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < units;
         i += gridDim.x * blockDim.x) {
        slot[i] = pattern(op, i);
    }
    __syncthreads();
    if (threadIdx.x != 0 || nep_add_acq_rel_gpu(&a.state->arrived, 1) != gridDim.x - 1) {
        return;
    }
    a.state->arrived = 0;
    a.state->op = op;
    a.state->begin_ns = nep_globaltimer();
    nep_ring ring = ring_of(a);
    enum nep_ring_end end =
        nep_ring_post(&ring, nep_ring_command(3, 0, 0, op, op), nullptr, a.timeout_ns);
    if (end != NEP_RING_DONE) {
        give_up(a, end, op, nep_globaltimer() - a.state->begin_ns);
    }
}

__global__ void __launch_bounds__(256) recv_kernel(const __grid_constant__ gpu_ring_args a)
{
    __shared__ int is_there;
    if (nep_ld_relaxed_gpu(&a.state->status) != 0) {
        return;
    }
    uint64_t op = nep_ld_relaxed_gpu(&a.state->op);
    if (threadIdx.x == 0) {
        nep_ring ring = ring_of(a);
        uint64_t begin = nep_globaltimer();
        /* One block looks across PCIe, the others at what it relays. */
        enum nep_ring_end end =
            blockIdx.x == 0
                ? nep_ring_wait(&ring, a.word, op, &a.state->status, a.timeout_ns)
                : nep_ring_wait_near(&a.state->seen, op, &a.state->status, 2 * a.timeout_ns);
        is_there = end == NEP_RING_DONE;
        if (blockIdx.x == 0 && is_there) {
            uint64_t now = nep_globaltimer();
            a.state->latency_ns[op % GPU_RING_LATENCIES] = (uint32_t)(now - a.state->begin_ns);
            nep_st_release_sys(&a.state->seen, op);
        } else if (!is_there && end != NEP_RING_STUCK) {
            give_up(a, end, op, nep_globaltimer() - begin);
        }
    }
    __syncthreads();
    if (!is_there) {
        return;
    }
    uint32_t units = a.bytes / 16;
    uint64_t wrong = 0;
    const char *tile = a.landing + (op & 1) * a.bytes;
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < units;
         i += gridDim.x * blockDim.x) {
        uint4 v = nep_ld16(tile + 16 * (uint64_t)i);
        uint4 w = pattern(op, i);
        wrong += v.x != w.x || v.y != w.y || v.z != w.z || v.w != w.w;
    }
    if (wrong != 0) {
        atomicAdd((unsigned long long *)&a.state->wrong, (unsigned long long)wrong);
    }
}

} // namespace

extern "C" {

int gpu_ring_ping(const struct gpu_ring_args *args, uint32_t num, struct CUstream_st *stream)
{
    ping_kernel<<<1, 1, 0, stream>>>(*args, num);
    return (int)cudaGetLastError();
}

int gpu_ring_flood(const struct gpu_ring_args *args, uint32_t blocks, uint32_t num,
                   struct CUstream_st *stream)
{
    flood_kernel<<<blocks, 1, 0, stream>>>(*args, num);
    return (int)cudaGetLastError();
}

int gpu_ring_load_cost(const struct gpu_ring_args *args, uint32_t num, struct CUstream_st *stream)
{
    load_kernel<<<1, 1, 0, stream>>>(*args, num);
    return (int)cudaGetLastError();
}

int gpu_ring_send(const struct gpu_ring_args *args, struct CUstream_st *stream)
{
    send_kernel<<<GPU_RING_BLOCKS, 256, 0, stream>>>(*args);
    return (int)cudaGetLastError();
}

int gpu_ring_recv(const struct gpu_ring_args *args, struct CUstream_st *stream)
{
    recv_kernel<<<GPU_RING_BLOCKS, 256, 0, stream>>>(*args);
    return (int)cudaGetLastError();
}

} // extern "C"
