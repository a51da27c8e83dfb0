/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of the kernels share: scalar conversions (the definition of every rounding), the
 * floating-point environment, and the tables themselves. Only dispatch/host/kernels*.c include it.
 */
#ifndef NEP_DISPATCH_HOST_KERNELS_IMPL_H
#define NEP_DISPATCH_HOST_KERNELS_IMPL_H

#include <float.h>
#include <stdbool.h>
#include <string.h>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "dispatch/host/kernels.h"

#define NEP_NAN_BITS 0x7fffffffu /* the one NaN of fp32 results; the 16-bit types: 0x7fff */
#define NEP_NAN16    0x7fffu
#define NEP_NAN_E4M3 0x7fu
#define NEP_E4M3_MAX 448.0f
#define NEP_AMAX_MIN 1e-4f

extern const struct nep_kernels nep_kernels_c;
extern const struct nep_kernels nep_kernels_avx2;
extern const struct nep_kernels nep_kernels_avx512;

/* A cast as one argument. x of a cast is the source, of an uncast the destination. */
struct nep_cast {
    const void *x;
    const void *q;
    enum nep_dtype dtype;
    enum nep_scale kind;
};

/*
 * Elements [begin, end) in plain C, in the environment as it is: also the tails of the vector
 * kernels. begin of a cast is a multiple of NEP_FP8_BLOCK.
 */
void nep_sum_c_range(void *out, const struct nep_term *terms, uint32_t num_terms,
                     enum nep_dtype dtype, size_t begin, size_t end);
void nep_cast_c_range(void *q, void *scales, const struct nep_cast *cast, size_t begin, size_t end);
void nep_uncast_c_range(void *x, const void *scales, const struct nep_cast *cast, size_t begin,
                        size_t end);

static inline uint32_t nep_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float nep_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline bool nep_bits_nan(uint32_t bits)
{
    return (bits & 0x7fffffffu) > 0x7f800000u;
}

static inline float nep_from_bf16(uint16_t half)
{
    return nep_float((uint32_t)half << 16);
}

static inline uint16_t nep_to_bf16(float value)
{
    uint32_t bits = nep_bits(value);
    if (nep_bits_nan(bits)) {
        return NEP_NAN16;
    }
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline float nep_from_fp16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t rest = half & 0x7fffu;
    if (rest >= 0x7c00u) { /* infinity, NaN */
        return nep_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    }
    if (rest < 0x400u) { /* denormals are multiples of 2^-24 */
        return nep_float(sign | nep_bits((float)rest * 0x1p-24f));
    }
    return nep_float(sign | ((rest << 13) + ((127u - 15u) << 23)));
}

static inline uint16_t nep_to_fp16(float value)
{
    uint32_t bits = nep_bits(value);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    uint32_t abs = bits & 0x7fffffffu;
    if (abs > 0x7f800000u) {
        return NEP_NAN16;
    }
    if (abs >= 0x477ff000u) { /* 65520: from here to infinity */
        return sign | 0x7c00u;
    }
    if (abs < 0x38800000u) { /* below 2^-14: the sum with 2^-1 rounds to multiples of 2^-24 */
        return (uint16_t)(sign | (nep_bits(nep_float(abs) + 0.5f) - 0x3f000000u));
    }
    abs += 0xfffu + (abs >> 13 & 1);
    return (uint16_t)(sign | (abs - ((127u - 15u) << 23)) >> 13);
}

static inline float nep_canonical(float value)
{
    return nep_bits_nan(nep_bits(value)) ? nep_float(NEP_NAN_BITS) : value;
}

/* e4m3 without infinities: 4 bits of exponent, bias 7; 0x7e is 448, 0x7f NaN. */
static inline uint8_t nep_to_e4m3(float value)
{
    uint32_t bits = nep_bits(value);
    uint8_t sign = (uint8_t)(bits >> 24 & 0x80u);
    uint32_t abs = bits & 0x7fffffffu;
    if (abs > 0x7f800000u) {
        return NEP_NAN_E4M3;
    }
    if (abs >= 0x43e00000u) { /* 448 and more */
        return sign | 0x7e;
    }
    if (abs < 0x3c800000u) { /* below 2^-6: the sum with 2^14 rounds to multiples of 2^-9 */
        return (uint8_t)(sign | (nep_bits(nep_float(abs) + 0x1p14f) - nep_bits(0x1p14f)));
    }
    abs += 0x7ffffu + (abs >> 20 & 1);
    return (uint8_t)(sign | (abs - ((127u - 7u) << 23)) >> 20);
}

static inline float nep_from_e4m3(uint8_t q)
{
    uint32_t sign = (uint32_t)(q & 0x80u) << 24;
    uint32_t rest = q & 0x7fu;
    if (rest == NEP_NAN_E4M3) {
        return nep_float(NEP_NAN_BITS);
    }
    if (rest < 8) {
        return nep_float(sign | nep_bits((float)rest * 0x1p-9f));
    }
    return nep_float(sign | ((rest << 20) + ((127u - 7u) << 23)));
}

/* The scale of a block from its greatest magnitude. */
static inline float nep_fp8_scale(float amax, enum nep_scale kind)
{
    float clamped = amax < NEP_AMAX_MIN ? NEP_AMAX_MIN : amax > FLT_MAX ? FLT_MAX : amax;
    float scale = clamped / NEP_E4M3_MAX;
    if (kind == NEP_SCALE_FP32) {
        return scale;
    }
    return nep_float((nep_bits(scale) + 0x7fffffu) & 0x7f800000u);
}

static inline void nep_fp8_scale_store(void *scales, size_t block, float scale, enum nep_scale kind)
{
    if (kind == NEP_SCALE_UE8M0) {
        ((uint8_t *)scales)[block] = (uint8_t)(nep_bits(scale) >> 23);
    } else {
        memcpy((char *)scales + block * sizeof scale, &scale, sizeof scale);
    }
}

static inline float nep_fp8_scale_load(const void *scales, size_t block, enum nep_scale kind)
{
    if (kind == NEP_SCALE_UE8M0) {
        /* 0 stands for 2^-127, a denormal float, and 255 for NaN, as in the OCP MX format */
        uint32_t exponent = ((const uint8_t *)scales)[block];
        return nep_float(exponent == 0     ? 0x00400000u
                         : exponent == 255 ? NEP_NAN_BITS
                                           : exponent << 23);
    }
    float scale;
    memcpy(&scale, (const char *)scales + block * sizeof scale, sizeof scale);
    return scale;
}

/*
 * The environment of a kernel: nearest even, nothing flushed, nothing trapped. enter returns what
 * leave restores. The arithmetic between them must be in a function that is not inlined here, or
 * the compiler may move it across: these are not barriers to it.
 */
#if defined(__SSE2__)
typedef unsigned nep_fpenv;
static inline nep_fpenv nep_fpenv_enter(void)
{
    nep_fpenv old = _mm_getcsr();
    if ((old & ~0x3fu) != 0x1f80u) { /* all but the sticky flags */
        _mm_setcsr(0x1f80u);
    }
    return old;
}
static inline void nep_fpenv_leave(nep_fpenv old)
{
    if ((old & ~0x3fu) != 0x1f80u) {
        _mm_setcsr(old);
    }
}
#elif defined(__aarch64__)
typedef uint64_t nep_fpenv;
static inline nep_fpenv nep_fpenv_enter(void)
{
    nep_fpenv old;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    if (old != 0) {
        __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0) : "memory");
    }
    return old;
}
static inline void nep_fpenv_leave(nep_fpenv old)
{
    if (old != 0) {
        __asm__ volatile("msr fpcr, %0" : : "r"(old) : "memory");
    }
}
#else
#include <fenv.h>
typedef int nep_fpenv;
static inline nep_fpenv nep_fpenv_enter(void)
{
    int old = fegetround();
    if (old != FE_TONEAREST) {
        fesetround(FE_TONEAREST);
    }
    return old;
}
static inline void nep_fpenv_leave(nep_fpenv old)
{
    if (old != FE_TONEAREST) {
        fesetround(old);
    }
}
#endif

#endif
