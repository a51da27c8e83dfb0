/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every piece of PTX of the kernels, with its scope and order in its name. Words that cross ranks
 * are 64-bit and monotone: written by a release of system scope, read by an acquire of system
 * scope. Peers' rows are never read by non-coherent loads.
 */
#ifndef NEP_DISPATCH_CUDA_DEVICE_PTX_CUH
#define NEP_DISPATCH_CUDA_DEVICE_PTX_CUH

#include <stdint.h>

static __device__ __forceinline__ uint64_t nep_ld_acquire_sys(const uint64_t *word)
{
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}

/* A word of whoever writes expert outputs, on this device. */
static __device__ __forceinline__ uint32_t nep_ld_acquire_gpu_u32(const uint32_t *word)
{
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

static __device__ __forceinline__ void nep_st_release_sys(uint64_t *word, uint64_t value)
{
    asm volatile("st.release.sys.global.u64 [%0], %1;" : : "l"(word), "l"(value) : "memory");
}

/* Among blocks of one launch: the value is in the word itself, so no order is needed. */
static __device__ __forceinline__ uint64_t nep_ld_relaxed_gpu(const uint64_t *word)
{
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}

static __device__ __forceinline__ void nep_st_relaxed_sys(uint64_t *word, uint64_t value)
{
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" : : "l"(word), "l"(value) : "memory");
}

static __device__ __forceinline__ void nep_st_relaxed_gpu(uint64_t *word, uint64_t value)
{
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" : : "l"(word), "l"(value) : "memory");
}

/* Arrival of a block: releases what the block did and acquires what earlier ones did. */
static __device__ __forceinline__ uint32_t nep_add_acq_rel_gpu(uint32_t *word, uint32_t value)
{
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(word), "r"(value)
                 : "memory");
    return old;
}

/* The same, and from `last` back to 0. */
static __device__ __forceinline__ uint32_t nep_inc_acq_rel_gpu(uint32_t *word, uint32_t last)
{
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(word), "r"(last)
                 : "memory");
    return old;
}

/* Into the second-level cache, for later. */
static __device__ __forceinline__ void nep_prefetch(const void *from)
{
    asm volatile("prefetch.global.L2 [%0];" : : "l"(from));
}

/* 16 bytes that are not read again soon by this SM. Coherent, weak. */
static __device__ __forceinline__ uint4 nep_ld16(const void *from)
{
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

/*
 * Programmatic dependent launch (sm_90): the next kernel of the stream may be set up now; and, in
 * that kernel, what the one before it did is complete and visible from here on. Without the launch
 * attribute both do nothing.
 */
static __device__ __forceinline__ void nep_let_next_start(void)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}

static __device__ __forceinline__ void nep_wait_for_previous(void)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

/* Nanoseconds of the device's clock; its step is up to a microsecond. */
static __device__ __forceinline__ uint64_t nep_globaltimer(void)
{
    uint64_t ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
}

/* Two floats to bf16, nearest even, NaN to 0x7fff; low is the first element. */
static __device__ __forceinline__ uint32_t nep_cvt_bf16x2(float low, float high)
{
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

static __device__ __forceinline__ uint32_t nep_cvt_fp16x2(float low, float high)
{
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

static __device__ __forceinline__ float nep_cvt_from_fp16(uint16_t half)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
/* Two floats to e4m3, nearest even, saturating, NaN to 0x7f; low is the first element. */
static __device__ __forceinline__ uint32_t nep_cvt_e4m3x2(float low, float high)
{
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

#endif
