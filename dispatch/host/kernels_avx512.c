/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels for AVX-512 F, BW, VL and DQ; nothing on other machines. This file alone is compiled
 * with these instructions, and its functions run only after nep_kernels_select has seen them: so
 * nothing here may be shared with other files except static functions.
 */
#if defined(__x86_64__)

#include <immintrin.h>

#include "dispatch/host/kernels_impl.h"

#define LANES 16

typedef __m512 vf;
typedef __m512i vi;
typedef __m512i line;

#define VEC static inline __attribute__((always_inline))

VEC vf vf_zero(void)
{
    return _mm512_setzero_ps();
}
VEC vf vf_set1(float value)
{
    return _mm512_set1_ps(value);
}
VEC vf vf_load(const void *from)
{
    return _mm512_loadu_ps(from);
}
VEC vf vf_load_fp16(const void *from)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256(from));
}
VEC void vf_store_fp16(void *to, vf value)
{
    __m256i half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(to, half);
}
VEC __m512i vf_pack_fp16(vf low, vf high)
{
    __m256i a = _mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256i b = _mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}
VEC vf vf_round_fp16(vf value)
{
    return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
VEC vf vf_fma(vf a, vf b, vf c)
{
    return _mm512_fmadd_ps(a, b, c);
}
VEC vf vf_add(vf a, vf b)
{
    return _mm512_add_ps(a, b);
}
VEC vf vf_mul(vf a, vf b)
{
    return _mm512_mul_ps(a, b);
}
VEC vf vf_div(vf a, vf b)
{
    return _mm512_div_ps(a, b);
}
VEC vf vf_abs(vf a)
{
    return _mm512_abs_ps(a);
}
VEC vf vf_min(vf a, vf b)
{
    return _mm512_min_ps(a, b);
}
/* b where either is a NaN. */
VEC vf vf_max_or_second(vf a, vf b)
{
    return _mm512_max_ps(a, b);
}
VEC float vf_reduce_max(vf a)
{
    return _mm512_reduce_max_ps(a);
}
VEC vi vf_as_vi(vf a)
{
    return _mm512_castps_si512(a);
}
VEC vf vi_as_vf(vi a)
{
    return _mm512_castsi512_ps(a);
}
VEC vf vi_to_vf(vi a)
{
    return _mm512_cvtepi32_ps(a);
}
VEC vi vi_set1(int value)
{
    return _mm512_set1_epi32(value);
}
VEC vi vi_add(vi a, vi b)
{
    return _mm512_add_epi32(a, b);
}
VEC vi vi_sub(vi a, vi b)
{
    return _mm512_sub_epi32(a, b);
}
VEC vi vi_and(vi a, vi b)
{
    return _mm512_and_si512(a, b);
}
VEC vi vi_or(vi a, vi b)
{
    return _mm512_or_si512(a, b);
}
#define vi_shl(a, bits) _mm512_slli_epi32(a, bits)
#define vi_shr(a, bits) _mm512_srli_epi32(a, bits)
/*
 * bf16 to nearest even in the upper halves, the lower ones cleared: half up, then the ties, whose
 * lower half has become 0, to even. One instruction less than adding the odd bit.
 */
VEC vi vi_round_bf16(vi bits)
{
    vi up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
    __mmask16 tie = _mm512_testn_epi32_mask(up, _mm512_set1_epi32(0xffff));
    up = _mm512_and_si512(up, _mm512_set1_epi32((int)0xffff0000u));
    return _mm512_mask_and_epi32(up, tie, up, _mm512_set1_epi32((int)0xfffe0000u));
}
/* nan where value is a NaN, else other. */
VEC vi vi_where_nan(vf value, vi nan, vi other)
{
    return _mm512_mask_mov_epi32(other, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), nan);
}
VEC vi vi_where_less(vf a, vf b, vi yes, vi no)
{
    return _mm512_mask_mov_epi32(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes);
}
VEC vi vi_where_equal(vi a, vi b, vi yes, vi no)
{
    return _mm512_mask_mov_epi32(no, _mm512_cmpeq_epi32_mask(a, b), yes);
}
VEC vi vi_load(const void *from)
{
    return _mm512_loadu_si512(from);
}
VEC void vi_store(void *to, vi value)
{
    _mm512_storeu_si512(to, value);
}
VEC void vi_stream(void *to, vi value)
{
    _mm512_stream_si512(to, value);
}
VEC vi vi_load_u16(const void *from)
{
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(from));
}
VEC void vi_store_u16(void *to, vi value)
{
    _mm256_storeu_si256(to, _mm512_cvtepi32_epi16(value));
}
VEC vi vi_load_u8(const void *from)
{
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(from));
}
VEC void vi_store_u8(void *to, vi value)
{
    _mm_storeu_si128(to, _mm512_cvtepi32_epi8(value));
}
VEC line line_load(const void *from)
{
    return _mm512_loadu_si512(from);
}
VEC void line_stream(void *to, line value)
{
    _mm512_stream_si512(to, value);
}

#include "dispatch/host/kernels_simd.h"

const struct nep_kernels nep_kernels_avx512 = KERNELS_TABLE("avx512");

#endif
