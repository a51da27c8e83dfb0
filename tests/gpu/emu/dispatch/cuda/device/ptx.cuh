/* SPDX-License-Identifier: Apache-2.0 */
/* dispatch/cuda/device/ptx.cuh for the CPU (tests/gpu/emu/emu.h): the same names, at least as
 * strong. */
#ifndef NEP_DISPATCH_CUDA_DEVICE_PTX_CUH
#define NEP_DISPATCH_CUDA_DEVICE_PTX_CUH

#include <stdint.h>
#include <time.h>

static inline uint64_t nep_ld_acquire_sys(const uint64_t *word)
{
    emu::look();
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static inline uint32_t nep_ld_acquire_gpu_u32(const uint32_t *word)
{
    emu::look();
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static inline void nep_st_release_sys(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static inline uint64_t nep_ld_relaxed_gpu(const uint64_t *word)
{
    emu::look();
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static inline void nep_st_relaxed_sys(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

static inline void nep_st_relaxed_gpu(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

static inline uint32_t nep_add_acq_rel_gpu(uint32_t *word, uint32_t value)
{
    return __atomic_fetch_add(word, value, __ATOMIC_ACQ_REL);
}

static inline uint32_t nep_inc_acq_rel_gpu(uint32_t *word, uint32_t last)
{
    uint32_t old = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(word, &old, old >= last ? 0 : old + 1, false,
                                        __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
    }
    return old;
}

static inline void nep_prefetch(const void *)
{
}

static inline uint4 nep_ld16(const void *from)
{
    return *(const uint4 *)from; /* which must be aligned here, too */
}

static inline void nep_let_next_start(void)
{
}

static inline void nep_wait_for_previous(void)
{
}

static inline uint64_t nep_globaltimer(void)
{
    struct timespec now;
    emu::look();
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static inline uint32_t emu_bf16(float x)
{
    uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

static inline uint32_t nep_cvt_bf16x2(float low, float high)
{
    return emu_bf16(low) | emu_bf16(high) << 16;
}

/* By adding a number whose last place is that of the result: the addition rounds to even. */
static inline uint32_t emu_fp16(float x)
{
    uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, abs = bits & 0x7fffffffu;
    if (abs > 0x7f800000u) {
        return 0x7fffu;
    }
    if (abs >= 0x477ff000u) { /* 65520: rounds to infinity */
        return sign | 0x7c00u;
    }
    if (abs < 0x38800000u) { /* below 2^-14: multiples of 2^-24 */
        return sign | (__float_as_uint(__uint_as_float(abs) + 0.5f) - 0x3f000000u);
    }
    return sign | ((abs + 0xfffu + (abs >> 13 & 1) - (112u << 23)) >> 13);
}

static inline uint32_t nep_cvt_fp16x2(float low, float high)
{
    return emu_fp16(low) | emu_fp16(high) << 16;
}

static inline float nep_cvt_from_fp16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, abs = half & 0x7fffu;
    if (abs >= 0x7c00u) {
        return __uint_as_float(sign | 0x7f800000u | (abs & 0x3ffu) << 13);
    }
    float x = abs < 0x400u ? (float)abs * 0x1p-24f : __uint_as_float((abs << 13) + (112u << 23));
    return __uint_as_float(__float_as_uint(x) | sign);
}

#endif
