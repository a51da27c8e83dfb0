/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Number formats on the device: 16 bytes of a row as floats and back, and the fp8 cast. The same
 * bits as dispatch/host/kernels.h asks for; tests/gpu compares every element with the host's.
 */
#ifndef NEP_DISPATCH_CUDA_DEVICE_NUMBER_CUH
#define NEP_DISPATCH_CUDA_DEVICE_NUMBER_CUH

#include "dispatch/cuda/cuda_phases.h"
#include "dispatch/cuda/device/ptx.cuh"

/* Elements of 16 bytes, by type: loads, stores, and the rounding after each level of a sum. */
struct nep_bf16 {
    static const int num = 8;
    static __device__ __forceinline__ void load(const uint4 &v, float *x)
    {
        const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[2 * i] = __uint_as_float(word[i] << 16);
            x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
        }
    }
    static __device__ __forceinline__ uint4 store(const float *x)
    {
        return make_uint4(nep_cvt_bf16x2(x[0], x[1]), nep_cvt_bf16x2(x[2], x[3]),
                          nep_cvt_bf16x2(x[4], x[5]), nep_cvt_bf16x2(x[6], x[7]));
    }
    static __device__ __forceinline__ void round(float *x)
    {
        load(store(x), x);
    }
};

struct nep_fp16 {
    static const int num = 8;
    static __device__ __forceinline__ void load(const uint4 &v, float *x)
    {
        const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[2 * i] = nep_cvt_from_fp16((uint16_t)word[i]);
            x[2 * i + 1] = nep_cvt_from_fp16((uint16_t)(word[i] >> 16));
        }
    }
    static __device__ __forceinline__ uint4 store(const float *x)
    {
        return make_uint4(nep_cvt_fp16x2(x[0], x[1]), nep_cvt_fp16x2(x[2], x[3]),
                          nep_cvt_fp16x2(x[4], x[5]), nep_cvt_fp16x2(x[6], x[7]));
    }
    static __device__ __forceinline__ void round(float *x)
    {
        load(store(x), x);
    }
};

struct nep_fp32 {
    static const int num = 4;
    static __device__ __forceinline__ void load(const uint4 &v, float *x)
    {
        x[0] = __uint_as_float(v.x);
        x[1] = __uint_as_float(v.y);
        x[2] = __uint_as_float(v.z);
        x[3] = __uint_as_float(v.w);
    }
    static __device__ __forceinline__ uint32_t canonical(float x)
    {
        return x == x ? __float_as_uint(x) : 0x7fffffffu;
    }
    static __device__ __forceinline__ uint4 store(const float *x)
    {
        return make_uint4(canonical(x[0]), canonical(x[1]), canonical(x[2]), canonical(x[3]));
    }
    static __device__ __forceinline__ void round(float *)
    {
    }
};

/* The scale of a block from its greatest magnitude; amax is no NaN. */
static __device__ __forceinline__ float nep_fp8_scale_of(float amax, enum nep_scale kind)
{
    const float most = 3.402823466e38f; /* an infinity counts as the largest finite number */
    float scale = __fdiv_rn(fminf(fmaxf(amax, 1e-4f), most), 448.0f);
    if (kind != NEP_SCALE_FP32) {
        scale = __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0x7f800000u);
    }
    return scale;
}

/*
 * x / scale, correctly rounded, in three operations (Markstein 1990): inverse is 1 / scale,
 * correctly rounded. Where the remainder is lost to underflow the quotient is so small that it
 * becomes a zero of fp8 either way. A zero keeps its sign; an infinity or a NaN stays what it is.
 */
static __device__ __forceinline__ float nep_fp8_divide(float x, float scale, float inverse)
{
    float quotient = __fmul_rn(x, inverse);
    float remainder = __fmaf_rn(-quotient, scale, x);
    float better = __fmaf_rn(remainder, inverse, quotient);
    bool is_regular = fabsf(quotient) < __uint_as_float(0x7f800000u) && quotient != 0;
    return is_regular ? better : quotient;
}

static __device__ __forceinline__ uint32_t nep_e4m3_pair(float low, float high)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    return nep_cvt_e4m3x2(low, high);
#else
    uint32_t pair = 0;
    const float value[2] = {low, high};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t bits = __float_as_uint(value[i]);
        uint32_t abs = bits & 0x7fffffffu;
        uint32_t q = bits >> 24 & 0x80u;
        if (abs > 0x7f800000u) {
            q = 0x7f;
        } else if (abs >= 0x43e00000u) { /* 448 and more */
            q |= 0x7e;
        } else if (abs < 0x3c800000u) { /* below 2^-6: the sum with 2^14 rounds to 2^-9 */
            q |= __float_as_uint(__fadd_rn(__uint_as_float(abs), 16384.0f)) - 0x46800000u;
        } else {
            q |= (abs + 0x7ffffu + (abs >> 20 & 1) - (120u << 23)) >> 20;
        }
        pair |= q << (8 * i);
    }
    return pair;
#endif
}

#endif
