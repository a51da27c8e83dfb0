/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels for AVX2, FMA and F16C; nothing on other machines. This file alone is compiled with
 * these instructions, and its functions run only after nep_kernels_select has seen them: so nothing
 * here may be shared with other files except static functions.
 */
#if defined(__x86_64__)

#include <immintrin.h>

#include "dispatch/host/kernels_impl.h"

#define LANES 8

typedef __m256 vf;
typedef __m256i vi;
typedef struct {
    __m256i low;
    __m256i high;
} line;

#define VEC static inline __attribute__((always_inline))

VEC vf vf_zero(void)
{
    return _mm256_setzero_ps();
}
VEC vf vf_set1(float value)
{
    return _mm256_set1_ps(value);
}
VEC vf vf_load(const void *from)
{
    return _mm256_loadu_ps(from);
}
VEC vf vf_load_fp16(const void *from)
{
    return _mm256_cvtph_ps(_mm_loadu_si128(from));
}
VEC void vf_store_fp16(void *to, vf value)
{
    __m128i half = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(to, half);
}
VEC __m256i vf_pack_fp16(vf low, vf high)
{
    return _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
}
VEC vf vf_round_fp16(vf value)
{
    return _mm256_cvtph_ps(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}
VEC vf vf_fma(vf a, vf b, vf c)
{
    return _mm256_fmadd_ps(a, b, c);
}
VEC vf vf_add(vf a, vf b)
{
    return _mm256_add_ps(a, b);
}
VEC vf vf_mul(vf a, vf b)
{
    return _mm256_mul_ps(a, b);
}
VEC vf vf_div(vf a, vf b)
{
    return _mm256_div_ps(a, b);
}
VEC vf vf_abs(vf a)
{
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
}
VEC vf vf_min(vf a, vf b)
{
    return _mm256_min_ps(a, b);
}
/* b where either is a NaN. */
VEC vf vf_max_or_second(vf a, vf b)
{
    return _mm256_max_ps(a, b);
}
VEC float vf_reduce_max(vf a)
{
    __m128 max = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    max = _mm_max_ps(max, _mm_movehl_ps(max, max));
    max = _mm_max_ss(max, _mm_movehdup_ps(max));
    return _mm_cvtss_f32(max);
}
VEC vi vf_as_vi(vf a)
{
    return _mm256_castps_si256(a);
}
VEC vf vi_as_vf(vi a)
{
    return _mm256_castsi256_ps(a);
}
VEC vf vi_to_vf(vi a)
{
    return _mm256_cvtepi32_ps(a);
}
VEC vi vi_set1(int value)
{
    return _mm256_set1_epi32(value);
}
VEC vi vi_add(vi a, vi b)
{
    return _mm256_add_epi32(a, b);
}
VEC vi vi_sub(vi a, vi b)
{
    return _mm256_sub_epi32(a, b);
}
VEC vi vi_and(vi a, vi b)
{
    return _mm256_and_si256(a, b);
}
VEC vi vi_or(vi a, vi b)
{
    return _mm256_or_si256(a, b);
}
#define vi_shl(a, bits) _mm256_slli_epi32(a, bits)
#define vi_shr(a, bits) _mm256_srli_epi32(a, bits)
/* bf16 to nearest even in the upper halves, the lower ones cleared. */
VEC vi vi_round_bf16(vi bits)
{
    vi odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    vi up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_and_si256(up, _mm256_set1_epi32((int)0xffff0000u));
}
/* nan where value is a NaN, else other. */
VEC vi vi_where_nan(vf value, vi nan, vi other)
{
    vf mask = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(other, nan, _mm256_castps_si256(mask));
}
VEC vi vi_where_less(vf a, vf b, vi yes, vi no)
{
    vf mask = _mm256_cmp_ps(a, b, _CMP_LT_OQ);
    return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(mask));
}
VEC vi vi_where_equal(vi a, vi b, vi yes, vi no)
{
    return _mm256_blendv_epi8(no, yes, _mm256_cmpeq_epi32(a, b));
}
/* The lanes' low halves, packed; the lanes hold less than 2^16. */
VEC __m128i pack_u16(vi value)
{
    return _mm_packus_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
}
VEC vi vi_load(const void *from)
{
    return _mm256_loadu_si256(from);
}
VEC void vi_store(void *to, vi value)
{
    _mm256_storeu_si256(to, value);
}
VEC void vi_stream(void *to, vi value)
{
    _mm256_stream_si256(to, value);
}
VEC vi vi_load_u16(const void *from)
{
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(from));
}
VEC void vi_store_u16(void *to, vi value)
{
    _mm_storeu_si128(to, pack_u16(value));
}
VEC vi vi_load_u8(const void *from)
{
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(from));
}
VEC void vi_store_u8(void *to, vi value)
{
    __m128i half = pack_u16(value);
    _mm_storel_epi64(to, _mm_packus_epi16(half, half));
}
VEC line line_load(const void *from)
{
    const __m256i *at = from;
    return (line){_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
VEC void line_stream(void *to, line value)
{
    _mm256_stream_si256(to, value.low);
    _mm256_stream_si256((__m256i *)to + 1, value.high);
}

#include "dispatch/host/kernels_simd.h"

const struct nep_kernels nep_kernels_avx2 = KERNELS_TABLE("avx2");

#endif
