/* SPDX-License-Identifier: Apache-2.0 */
/* The words of the command ring on the device: what dispatch/cuda/ring.h is written in. */
#ifndef NEP_DISPATCH_CUDA_DEVICE_RING_CUH
#define NEP_DISPATCH_CUDA_DEVICE_RING_CUH

#include "dispatch/cuda/device/ptx.cuh"

#define NEP_RING_FN static __device__ inline

static __device__ __forceinline__ uint64_t nep_ring_load(const uint64_t *word)
{
    return nep_ld_acquire_sys(word);
}

static __device__ __forceinline__ uint64_t nep_ring_peek(const uint64_t *word)
{
    uint64_t value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}

static __device__ __forceinline__ void nep_ring_store(uint64_t *word, uint64_t value)
{
    nep_st_release_sys(word, value);
}

static __device__ __forceinline__ uint64_t nep_ring_ticket(uint64_t *head)
{
    return atomicAdd((unsigned long long *)head, 1ull);
}

static __device__ __forceinline__ uint64_t nep_ring_load_near(const uint64_t *word)
{
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}

/* Raises; release: who loads it near may overwrite what the shared tail freed. */
static __device__ __forceinline__ void nep_ring_raise_near(uint64_t *word, uint64_t value)
{
    asm volatile("red.release.gpu.global.max.u64 [%0], %1;" : : "l"(word), "l"(value) : "memory");
}

static __device__ __forceinline__ void nep_ring_relax(void)
{
}

static __device__ __forceinline__ uint64_t nep_ring_now(void)
{
    return nep_globaltimer();
}

#endif
