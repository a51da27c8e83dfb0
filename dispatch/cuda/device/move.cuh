/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The moving of one row by one warp: read once, stored to all its places, cast to fp8 if asked. A
 * lane holds one place; the mask says which lanes do. `more` is one more copy, or NULL.
 * scales(lane), by all lanes, says where those of that lane's place go: worked out when they are
 * stored, since kernels that move rows have no register to spare. Plain 16-byte accesses, four in
 * flight per thread.
 */
#ifndef NEP_DISPATCH_CUDA_DEVICE_MOVE_CUH
#define NEP_DISPATCH_CUDA_DEVICE_MOVE_CUH

#include "dispatch/cuda/cuda_phases.h"
#include "dispatch/cuda/device/number.cuh"
#include "dispatch/cuda/device/ptx.cuh"

enum { NEP_ROWS_FLIGHT = 4 };

static __device__ __forceinline__ char *nep_lane_row(char *row, uint32_t lane)
{
    return (char *)__shfl_sync(0xffffffffu, (unsigned long long)row, lane);
}

/* Pieces [begin, end) of a row as it is. */
static __device__ __forceinline__ void nep_copy_row(const char *from, char *row, uint32_t rows,
                                                    char *more, uint32_t begin, uint32_t end)
{
    for (uint32_t c = begin + threadIdx.x % 32; c - threadIdx.x % 32 < end;
         c += 32 * NEP_ROWS_FLIGHT) {
        uint4 v[NEP_ROWS_FLIGHT];
#pragma unroll
        for (int i = 0; i < NEP_ROWS_FLIGHT; i++) {
            if (c + 32 * i < end) {
                v[i] = nep_ld16(from + 16 * (uint64_t)(c + 32 * i));
            }
        }
        for (uint32_t m = rows; m != 0; m &= m - 1) {
            uint4 *to = (uint4 *)nep_lane_row(row, __ffs(m) - 1);
#pragma unroll
            for (int i = 0; i < NEP_ROWS_FLIGHT; i++) {
                if (c + 32 * i < end) {
                    to[c + 32 * i] = v[i];
                }
            }
        }
        if (more != nullptr) {
#pragma unroll
            for (int i = 0; i < NEP_ROWS_FLIGHT; i++) {
                if (c + 32 * i < end) {
                    ((uint4 *)more)[c + 32 * i] = v[i];
                }
            }
        }
    }
}

/* 16 elements of a caller's row as floats. */
static __device__ __forceinline__ void nep_load_elements(const char *from, enum nep_dtype dtype,
                                                         uint32_t unit, float *x)
{
    if (dtype == NEP_DTYPE_FP32) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            nep_fp32::load(((const uint4 *)from)[4 * (uint64_t)unit + i], x + 4 * i);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint4 v = ((const uint4 *)from)[2 * (uint64_t)unit + i];
        if (dtype == NEP_DTYPE_BF16) {
            nep_bf16::load(v, x + 8 * i);
        } else {
            nep_fp16::load(v, x + 8 * i);
        }
    }
}

static __device__ __forceinline__ void nep_put_scale(const struct nep_wire &wire,
                                                     const struct nep_scales_at &at, uint32_t block,
                                                     float scale)
{
    if (wire.scale == NEP_SCALE_UE8M0) {
        ((uint8_t *)at.first)[block / 4 * at.step + block % 4] =
            (uint8_t)(__float_as_uint(scale) >> 23);
    } else {
        *(float *)(at.first + block * at.step) = scale;
    }
}

/* Pieces [begin, end), begin a multiple of 8, with the cast: a lane has 16 elements, eight lanes
 * the 128 that share a scale. */
template <class Scales>
static __device__ __forceinline__ void
nep_cast_row(const struct nep_wire &wire, const char *from, char *row, const Scales &scales,
             uint32_t rows, char *more, char *more_scales, uint32_t begin, uint32_t end)
{
    uint32_t lane = threadIdx.x % 32;
    for (uint32_t first = begin; first < end; first += 32) {
        uint32_t unit = first + lane;
        bool is_in = unit < end;
        bool is_scale = is_in && unit % 8 == 0;
        float x[16];
        float amax = 0;
        if (is_in) {
            nep_load_elements(from, wire.dtype, unit, x);
#pragma unroll
            for (int i = 0; i < 16; i++) {
                amax = fmaxf(amax, fabsf(x[i])); /* a NaN counts as 0 */
            }
        }
#pragma unroll
        for (int d = 1; d < 8; d <<= 1) {
            amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
        }
        float scale = nep_fp8_scale_of(amax, wire.scale);
        float inverse = __frcp_rn(scale);
        uint32_t q[4] = {0, 0, 0, 0};
        if (is_in) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                q[i / 2] |= nep_e4m3_pair(nep_fp8_divide(x[2 * i], scale, inverse),
                                          nep_fp8_divide(x[2 * i + 1], scale, inverse))
                            << (16 * (i % 2));
            }
        }
        for (uint32_t m = rows; m != 0; m &= m - 1) {
            uint4 *to = (uint4 *)nep_lane_row(row, __ffs(m) - 1);
            if (is_in) {
                to[unit] = make_uint4(q[0], q[1], q[2], q[3]);
            }
            struct nep_scales_at at = scales(__ffs(m) - 1);
            if (is_scale) {
                nep_put_scale(wire, at, unit / 8, scale);
            }
        }
        if (more != nullptr && is_in) {
            ((uint4 *)more)[unit] = make_uint4(q[0], q[1], q[2], q[3]);
        }
        if (more_scales != nullptr && is_scale) {
            nep_put_scale(wire, {more_scales, 4}, unit / 8, scale);
        }
    }
}

/* A row's scales to one place. */
static __device__ __forceinline__ void
nep_copy_scales_to(const char *from, const struct nep_scales_at &to, uint32_t bytes)
{
    uint32_t lane = threadIdx.x % 32;
    bool is_wide = (bytes | (uint64_t)from | (uint64_t)to.first) % 4 == 0;
    for (uint32_t i = lane; is_wide && i < bytes / 4; i += 32) {
        *(uint32_t *)(to.first + i * to.step) = ((const uint32_t *)from)[i];
    }
    for (uint32_t i = lane; !is_wide && i < bytes; i += 32) {
        to.first[i / 4 * to.step + i % 4] = from[i];
    }
}

/* The same to the places of all lanes of `rows`. */
template <class Scales>
static __device__ __forceinline__ void nep_copy_scales(const char *from, const Scales &scales,
                                                       uint32_t rows, char *more, uint32_t bytes)
{
    for (uint32_t m = rows; m != 0; m &= m - 1) {
        nep_copy_scales_to(from, scales(__ffs(m) - 1), bytes);
    }
    if (more != nullptr) {
        nep_copy_scales_to(from, {more, 4}, bytes);
    }
}

#endif
