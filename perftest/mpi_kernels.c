/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The baseline's row loops: plain C that compilers vectorise well, compiled for three instruction
 * sets and chosen at run time, so that the baseline is not handicapped against the library's
 * hand-written kernels. A build with -march=native of one variant would be as fast and not
 * portable.
 */
#include <string.h>

#include "perftest/mpi_baseline.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE float value_of(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

INLINE void axpy(float *restrict acc, const uint16_t *restrict row, float weight, uint32_t num)
{
    for (uint32_t i = 0; i < num; i++) {
        acc[i] += weight * value_of(row[i]);
    }
}

INLINE void scale(float *restrict acc, const uint16_t *restrict row, float weight, uint32_t num)
{
    for (uint32_t i = 0; i < num; i++) {
        acc[i] = weight * value_of(row[i]);
    }
}

INLINE void store(const float *restrict acc, uint16_t *restrict row, uint32_t num)
{
    for (uint32_t i = 0; i < num; i++) {
        uint32_t bits;
        memcpy(&bits, &acc[i], sizeof(bits));
        row[i] = (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
}

INLINE uint64_t read_all(const uint64_t *words, size_t num)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < num; i++) {
        sum += words[i];
    }
    return sum;
}

static void fill_plain(uint64_t *words, size_t num, const uint64_t *row, size_t row_words)
{
    for (size_t first = 0; first + row_words <= num; first += row_words) {
        memcpy(words + first, row, row_words * sizeof(*words));
    }
}

#define VARIANT(name, attr, fill)                                                                  \
    attr static void axpy_##name(float *acc, const uint16_t *row, float weight, uint32_t num)      \
    {                                                                                              \
        axpy(acc, row, weight, num);                                                               \
    }                                                                                              \
    attr static void scale_##name(float *acc, const uint16_t *row, float weight, uint32_t num)     \
    {                                                                                              \
        scale(acc, row, weight, num);                                                              \
    }                                                                                              \
    attr static void store_##name(const float *acc, uint16_t *row, uint32_t num)                   \
    {                                                                                              \
        store(acc, row, num);                                                                      \
    }                                                                                              \
    attr static uint64_t read_##name(const uint64_t *words, size_t num)                            \
    {                                                                                              \
        return read_all(words, num);                                                               \
    }                                                                                              \
    static const struct nep_perf_kernels kernels_##name = {axpy_##name, scale_##name,              \
                                                           store_##name, read_##name, fill};

VARIANT(plain, , fill_plain)

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void fill_avx2(uint64_t *words, size_t num,
                                                      const uint64_t *row, size_t row_words)
{
    for (size_t first = 0; first + row_words <= num; first += row_words) {
        for (size_t i = 0; i < row_words; i += 4) {
            _mm256_stream_si256((__m256i *)(void *)(words + first + i),
                                _mm256_loadu_si256((const __m256i *)(const void *)(row + i)));
        }
    }
    _mm_sfence();
}

VARIANT(avx2, __attribute__((target("avx2,fma"))), fill_avx2)
#if defined(__clang__)
#define AVX512 "avx512f,avx512bw,avx512vl,avx512dq"
#else
#define AVX512 "avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"
#endif
VARIANT(avx512, __attribute__((target(AVX512))), fill_avx2)
#endif

const struct nep_perf_kernels *nep_perf_kernels(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        return &kernels_avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return &kernels_avx2;
    }
#endif
    return &kernels_plain;
}
