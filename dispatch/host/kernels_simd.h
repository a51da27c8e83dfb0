/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The vector kernels, one text for all instruction sets. The including file defines the vector
 * types (vf: floats, vi: 32-bit integers), LANES, and the small functions used here: vf_* and vi_*,
 * line_load / line_stream for 64 bytes. dtype and kind are constants wherever these are inlined.
 *
 * Sums: a block of VECS vectors of columns goes through all terms with the three levels of the tree
 * in registers; every row is read once, front to back, by as many streams as there are terms. The
 * hardware's prefetchers stop at pages and lose count of so many streams, so each row is prefetched
 * SUM_AHEAD bytes ahead. Rounding is done in integers: vcvtneps2bf16 flushes denormals.
 */
#ifndef NEP_DISPATCH_HOST_KERNELS_SIMD_H
#define NEP_DISPATCH_HOST_KERNELS_SIMD_H

#include "dispatch/host/kernels_impl.h"

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#ifndef VECS
#define VECS 4
#endif
#ifndef SUM_AHEAD
#define SUM_AHEAD 2048
#endif
#define LINE 64
/* Below this a copy stays in the caches: partial lines and the fence cost more than they save. */
#define STREAM_MIN 512

/* ---- conversions, by dtype --------------------------------------------------------------- */

INLINE size_t v_bytes(enum nep_dtype dtype)
{
    return dtype == NEP_DTYPE_FP32 ? 4 : 2;
}

INLINE vf v_load(const void *row, size_t idx, enum nep_dtype dtype)
{
    const char *from = (const char *)row + idx * v_bytes(dtype);
    switch (dtype) {
    case NEP_DTYPE_BF16:
        return vi_as_vf(vi_shl(vi_load_u16(from), 16));
    case NEP_DTYPE_FP16:
        return vf_load_fp16(from);
    default:
        return vf_load(from);
    }
}

/* The bits of a float rounded to bf16, as a float. */
INLINE vi v_round_bf16(vf value)
{
    vi bits = vf_as_vi(value);
    vi odd = vi_and(vi_shr(bits, 16), vi_set1(1));
    vi rounded = vi_add(vi_add(bits, vi_set1(0x7fff)), odd);
    rounded = vi_and(rounded, vi_set1((int)0xffff0000u));
    return vi_where_nan(value, vi_set1(0x7fff0000), rounded);
}

INLINE vf v_round(vf value, enum nep_dtype dtype)
{
    switch (dtype) {
    case NEP_DTYPE_BF16:
        return vi_as_vf(v_round_bf16(value));
    case NEP_DTYPE_FP16:
        return vf_round_fp16(value);
    default:
        return value;
    }
}

INLINE void v_store(void *row, size_t idx, vf value, enum nep_dtype dtype)
{
    char *to = (char *)row + idx * v_bytes(dtype);
    if (dtype == NEP_DTYPE_BF16) {
        vi_store_u16(to, vi_shr(v_round_bf16(value), 16));
        return;
    }
    value = vi_as_vf(vi_where_nan(value, vi_set1(0x7fffffff), vf_as_vi(value)));
    if (dtype == NEP_DTYPE_FP16) {
        vf_store_fp16(to, value);
    } else {
        vf_store(to, value);
    }
}

/* ---- sums --------------------------------------------------------------------------------- */

INLINE void sum_block(void *out, const struct nep_term *terms, uint32_t num_terms,
                      enum nep_dtype dtype, size_t column, int num_vecs, bool ahead)
{
    vf rank[VECS], node[VECS], home[VECS];
    UNROLL
    for (int v = 0; v < num_vecs; v++) {
        rank[v] = node[v] = home[v] = vf_zero();
    }
    for (uint32_t t = 0; t < num_terms; t++) {
        const void *row = terms[t].row;
        vf weight = vf_set1(terms[t].weight);
        uint32_t ends = t + 1 == num_terms ? NEP_ENDS_NODE : terms[t].ends;
        if (ahead) {
            UNROLL
            for (size_t byte = 0; byte < (size_t)num_vecs * LANES * v_bytes(dtype); byte += LINE) {
                __builtin_prefetch((const char *)row + column * v_bytes(dtype) + SUM_AHEAD + byte);
            }
        }
        UNROLL
        for (int v = 0; v < num_vecs; v++) {
            rank[v] = vf_fma(weight, v_load(row, column + (size_t)v * LANES, dtype), rank[v]);
        }
        if (ends == 0) {
            continue;
        }
        UNROLL
        for (int v = 0; v < num_vecs; v++) {
            node[v] = vf_add(node[v], v_round(rank[v], dtype));
            rank[v] = vf_zero();
        }
        if (ends & NEP_ENDS_NODE) {
            UNROLL
            for (int v = 0; v < num_vecs; v++) {
                home[v] = vf_add(home[v], v_round(node[v], dtype));
                node[v] = vf_zero();
            }
        }
    }
    UNROLL
    for (int v = 0; v < num_vecs; v++) {
        v_store(out, column + (size_t)v * LANES, home[v], dtype);
    }
}

INLINE void sum_row(void *out, const struct nep_term *terms, uint32_t num_terms, size_t elements,
                    enum nep_dtype dtype)
{
    const size_t step = VECS * LANES;
    const size_t ahead = SUM_AHEAD / v_bytes(dtype);
    size_t column = 0;
    for (; column + ahead + step <= elements; column += step) {
        sum_block(out, terms, num_terms, dtype, column, VECS, true);
    }
    for (; column + step <= elements; column += step) {
        sum_block(out, terms, num_terms, dtype, column, VECS, false);
    }
    for (; column + LANES <= elements; column += LANES) {
        sum_block(out, terms, num_terms, dtype, column, 1, false);
    }
    if (column < elements) {
        nep_sum_c_range(out, terms, num_terms, dtype, column, elements);
    }
}

/* Not inlined: between nep_fpenv_enter and leave. */
#define DEFINE_SUM(name, dtype)                                                                    \
    static __attribute__((noinline)) void name##_row(void *out, const struct nep_term *terms,      \
                                                     uint32_t num_terms, size_t elements)          \
    {                                                                                              \
        sum_row(out, terms, num_terms, elements, dtype);                                           \
    }                                                                                              \
    static void name(void *out, const struct nep_term *terms, uint32_t num_terms, size_t elements) \
    {                                                                                              \
        nep_fpenv env = nep_fpenv_enter();                                                         \
        name##_row(out, terms, num_terms, elements);                                               \
        nep_fpenv_leave(env);                                                                      \
    }
DEFINE_SUM(sum_bf16, NEP_DTYPE_BF16)
DEFINE_SUM(sum_fp16, NEP_DTYPE_FP16)
DEFINE_SUM(sum_fp32, NEP_DTYPE_FP32)

/* ---- moving rows -------------------------------------------------------------------------- */

static void copy(void *dst, const void *src, size_t bytes)
{
    char *to = dst;
    const char *from = src;
    if (bytes >= STREAM_MIN) {
        /* whole lines of dst past the caches, the ragged ends through them */
        size_t head = (size_t)(-(uintptr_t)to & (LINE - 1));
        memcpy(to, from, head);
        to += head;
        from += head;
        bytes -= head;
        for (; bytes >= 4 * LINE; bytes -= 4 * LINE, to += 4 * LINE, from += 4 * LINE) {
            line a = line_load(from);
            line b = line_load(from + LINE);
            line c = line_load(from + 2 * LINE);
            line d = line_load(from + 3 * LINE);
            line_stream(to, a);
            line_stream(to + LINE, b);
            line_stream(to + 2 * LINE, c);
            line_stream(to + 3 * LINE, d);
        }
        for (; bytes >= LINE; bytes -= LINE, to += LINE, from += LINE) {
            line_stream(to, line_load(from));
        }
    }
    memcpy(to, from, bytes);
}

static void push(void *const *dsts, uint32_t num, const void *src, size_t bytes)
{
    for (uint32_t i = 0; i < num; i++) {
        copy(dsts[i], src, bytes);
    }
}

/* Pairs with the streaming stores above; the caller's release store follows it. */
static void fence(void)
{
    _mm_sfence();
}

/* ---- fp8 ---------------------------------------------------------------------------------- */

/* As nep_to_e4m3: the code in the low byte of each lane. */
INLINE vi v_to_e4m3(vf value)
{
    vi sign = vi_and(vi_shr(vf_as_vi(value), 24), vi_set1(0x80));
    vf abs = vf_min(vf_abs(value), vf_set1(NEP_E4M3_MAX));
    vi bits = vf_as_vi(abs);
    vi odd = vi_and(vi_shr(bits, 20), vi_set1(1));
    vi normal = vi_add(vi_add(bits, vi_set1(0x7ffff - ((127 - 7) << 23))), odd);
    normal = vi_shr(normal, 20);
    vi small = vi_sub(vf_as_vi(vf_add(abs, vf_set1(0x1p14f))), vf_as_vi(vf_set1(0x1p14f)));
    vi code = vi_or(sign, vi_where_less(abs, vf_set1(0x1p-6f), small, normal));
    return vi_where_nan(value, vi_set1(NEP_NAN_E4M3), code);
}

INLINE vf v_from_e4m3(vi q)
{
    vi sign = vi_shl(vi_and(q, vi_set1(0x80)), 24);
    vi rest = vi_and(q, vi_set1(0x7f));
    vi normal = vi_add(vi_shl(rest, 20), vi_set1((127 - 7) << 23));
    vf small = vf_mul(vi_to_vf(rest), vf_set1(0x1p-9f));
    vi bits = vi_where_equal(vi_and(rest, vi_set1(0x78)), vi_set1(0), vf_as_vi(small), normal);
    bits = vi_where_equal(rest, vi_set1(NEP_NAN_E4M3), vi_set1(NEP_NAN_BITS), vi_or(bits, sign));
    return vi_as_vf(bits);
}

INLINE void cast_blocks(uint8_t *q, void *scales, const struct nep_cast *cast, size_t elements,
                        enum nep_dtype dtype)
{
    for (size_t begin = 0; begin < elements; begin += NEP_FP8_BLOCK) {
        if (elements - begin < NEP_FP8_BLOCK) {
            nep_cast_c_range(q, scales, cast, begin, elements);
            return;
        }
        vf amax = vf_zero();
        for (size_t i = begin; i < begin + NEP_FP8_BLOCK; i += LANES) {
            amax = vf_max_or_second(vf_abs(v_load(cast->x, i, dtype)), amax);
        }
        float scale = nep_fp8_scale(vf_reduce_max(amax), cast->kind);
        nep_fp8_scale_store(scales, begin / NEP_FP8_BLOCK, scale, cast->kind);
        for (size_t i = begin; i < begin + NEP_FP8_BLOCK; i += LANES) {
            vf quotient = vf_div(v_load(cast->x, i, dtype), vf_set1(scale));
            vi_store_u8(q + i, v_to_e4m3(quotient));
        }
    }
}

INLINE void uncast_blocks(void *x, const void *scales, const struct nep_cast *cast, size_t elements,
                          enum nep_dtype dtype)
{
    const uint8_t *q = cast->q;
    size_t whole = elements - elements % LANES;
    for (size_t i = 0; i < whole; i += LANES) {
        vf scale = vf_set1(nep_fp8_scale_load(scales, i / NEP_FP8_BLOCK, cast->kind));
        v_store(x, i, vf_mul(v_from_e4m3(vi_load_u8(q + i)), scale), dtype);
    }
    nep_uncast_c_range(x, scales, cast, whole, elements);
}

static __attribute__((noinline)) void cast_row(void *q, void *scales, const struct nep_cast *cast,
                                               size_t elements)
{
    switch (cast->dtype) {
    case NEP_DTYPE_BF16:
        cast_blocks(q, scales, cast, elements, NEP_DTYPE_BF16);
        break;
    case NEP_DTYPE_FP16:
        cast_blocks(q, scales, cast, elements, NEP_DTYPE_FP16);
        break;
    default:
        cast_blocks(q, scales, cast, elements, NEP_DTYPE_FP32);
        break;
    }
}

static __attribute__((noinline)) void uncast_row(void *x, const void *scales,
                                                 const struct nep_cast *cast, size_t elements)
{
    switch (cast->dtype) {
    case NEP_DTYPE_BF16:
        uncast_blocks(x, scales, cast, elements, NEP_DTYPE_BF16);
        break;
    case NEP_DTYPE_FP16:
        uncast_blocks(x, scales, cast, elements, NEP_DTYPE_FP16);
        break;
    default:
        uncast_blocks(x, scales, cast, elements, NEP_DTYPE_FP32);
        break;
    }
}

static void cast_fp8(void *q, void *scales, const void *x, enum nep_dtype dtype, size_t elements,
                     enum nep_scale kind)
{
    struct nep_cast cast = {.x = x, .dtype = dtype, .kind = kind};
    nep_fpenv env = nep_fpenv_enter();
    cast_row(q, scales, &cast, elements);
    nep_fpenv_leave(env);
}

static void uncast_fp8(void *x, enum nep_dtype dtype, const void *q, const void *scales,
                       size_t elements, enum nep_scale kind)
{
    struct nep_cast cast = {.q = q, .dtype = dtype, .kind = kind};
    nep_fpenv env = nep_fpenv_enter();
    uncast_row(x, scales, &cast, elements);
    nep_fpenv_leave(env);
}

#define KERNELS_TABLE(isa)                                                                         \
    {                                                                                              \
        .name = isa, .copy = copy, .push = push, .sum = {sum_bf16, sum_fp16, sum_fp32},            \
        .cast_fp8 = cast_fp8, .uncast_fp8 = uncast_fp8, .fence = fence,                            \
    }

#endif
