/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The vector kernels, one text for all instruction sets. The including file defines the vector
 * types (vf: floats, vi: 32-bit integers), LANES, and the small functions used here: vf_* and vi_*,
 * line_load / line_stream for 64 bytes. dtype and kind are constants wherever these are inlined.
 *
 * Sums: a block of VECS vectors of columns goes through all terms with the three levels of the tree
 * in registers; every row is read once, front to back, by as many streams as there are terms. The
 * hardware's prefetchers stop at pages and lose count of so many streams, so each row is prefetched
 * SUM_AHEAD bytes ahead. Measured (docs/performance-kernels.md): 256 bytes beat 2 KiB, blocks of 4
 * vectors beat 8, and results that nobody reads soon are better streamed past the caches. Rejected:
 * vcvtneps2bf16, which flushes denormals; so bf16 is rounded in integers.
 */
#ifndef NEP_DISPATCH_HOST_KERNELS_SIMD_H
#define NEP_DISPATCH_HOST_KERNELS_SIMD_H

#include "dispatch/host/kernels_impl.h"

#ifdef LANES /* nothing without the definitions that this text needs */

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#define VECS      4
#define SUM_AHEAD 256
#define LINE      64
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

/*
 * Between levels a NaN only has to stay one. Those of bf16 rows and those that arithmetic makes
 * have lower halves of 0, which vi_round_bf16 keeps; sum_row keeps weights away that are NaNs.
 */
INLINE vf v_round(vf value, enum nep_dtype dtype)
{
    switch (dtype) {
    case NEP_DTYPE_BF16:
        return vi_as_vf(vi_round_bf16(vf_as_vi(value)));
    case NEP_DTYPE_FP16:
        return vf_round_fp16(value);
    default:
        return value;
    }
}

/* The rounded bits of a result, in the upper halves; a NaN becomes the one of kernels.h. */
INLINE vi v_result_bf16(vf value)
{
    return vi_where_nan(value, vi_set1(0x7fff0000), vi_round_bf16(vf_as_vi(value)));
}

INLINE vf v_result(vf value)
{
    return vi_as_vf(vi_where_nan(value, vi_set1(NEP_NAN_BITS), vf_as_vi(value)));
}

INLINE void v_store(void *row, size_t idx, vf value, enum nep_dtype dtype)
{
    char *to = (char *)row + idx * v_bytes(dtype);
    switch (dtype) {
    case NEP_DTYPE_BF16:
        vi_store_u16(to, vi_shr(v_result_bf16(value), 16));
        break;
    case NEP_DTYPE_FP16:
        vf_store_fp16(to, v_result(value));
        break;
    default:
        vi_store(to, vf_as_vi(v_result(value)));
        break;
    }
}

/*
 * Two vectors of neighbouring columns; which vector has which column is the type's affair, the same
 * for load and store. bf16: the even columns and the odd ones, one instruction each.
 */
INLINE void v_load_pair(const void *row, size_t idx, enum nep_dtype dtype, vf *pair)
{
    if (dtype == NEP_DTYPE_BF16) {
        vi both = vi_load((const char *)row + idx * 2);
        pair[0] = vi_as_vf(vi_shl(both, 16));
        pair[1] = vi_as_vf(vi_and(both, vi_set1((int)0xffff0000u)));
    } else {
        pair[0] = v_load(row, idx, dtype);
        pair[1] = v_load(row, idx + LANES, dtype);
    }
}

INLINE void v_put(void *to, vi value, bool stream)
{
    if (stream) {
        vi_stream(to, value);
    } else {
        vi_store(to, value);
    }
}

/* stream: past the caches; the address is then a multiple of the vector's size. */
INLINE void v_store_pair(void *row, size_t idx, const vf *pair, enum nep_dtype dtype, bool stream)
{
    char *to = (char *)row + idx * v_bytes(dtype);
    switch (dtype) {
    case NEP_DTYPE_BF16:
        v_put(to, vi_or(vi_shr(v_result_bf16(pair[0]), 16), v_result_bf16(pair[1])), stream);
        break;
    case NEP_DTYPE_FP16:
        v_put(to, vf_pack_fp16(v_result(pair[0]), v_result(pair[1])), stream);
        break;
    default:
        v_put(to, vf_as_vi(v_result(pair[0])), stream);
        v_put(to + LANES * 4, vf_as_vi(v_result(pair[1])), stream);
        break;
    }
}

/* ---- sums --------------------------------------------------------------------------------- */

/* upper += round(lower), lower = +0. */
INLINE void level_end(vf *upper, vf *lower, int num_vecs, enum nep_dtype dtype)
{
    UNROLL
    for (int v = 0; v < num_vecs; v++) {
        upper[v] = vf_add(upper[v], v_round(lower[v], dtype));
        lower[v] = vf_zero();
    }
}

/* The columns of a block, and how they are read and written: constants in each call. */
struct block {
    enum nep_dtype dtype;
    int num_vecs; /* VECS or 1 */
    bool ahead;   /* prefetch */
    bool stream;
};

INLINE void block_load(vf *x, const void *row, size_t column, const struct block block)
{
    if (block.num_vecs == 1) {
        x[0] = v_load(row, column, block.dtype);
        return;
    }
    UNROLL
    for (int v = 0; v + 1 < block.num_vecs; v += 2) {
        v_load_pair(row, column + (size_t)v * LANES, block.dtype, x + v);
    }
}

INLINE void block_store(void *out, size_t column, const vf *home, const struct block block)
{
    if (block.num_vecs == 1) {
        v_store(out, column, home[0], block.dtype);
        return;
    }
    UNROLL
    for (int v = 0; v + 1 < block.num_vecs; v += 2) {
        v_store_pair(out, column + (size_t)v * LANES, home + v, block.dtype, block.stream);
    }
}

INLINE void block_prefetch(const void *row, size_t column, const struct block block)
{
    const char *from = (const char *)row + column * v_bytes(block.dtype) + SUM_AHEAD;
    for (size_t byte = 0; byte < VECS * LANES * v_bytes(block.dtype); byte += LINE) {
        __builtin_prefetch(from + byte);
    }
}

INLINE void sum_block(void *out, const struct nep_term *terms, uint32_t num_terms, size_t column,
                      const struct block block)
{
    vf rank[VECS], node[VECS], home[VECS], x[VECS];
    bool first = true; /* the next term is the first of its rank */
    UNROLL
    for (int v = 0; v < block.num_vecs; v++) {
        rank[v] = node[v] = home[v] = vf_zero();
    }
    for (uint32_t t = 0; t < num_terms; t++) {
        uint32_t ends = t + 1 == num_terms ? NEP_ENDS_NODE : terms[t].ends;
        if (block.ahead) {
            block_prefetch(terms[t].row, column, block);
        }
        block_load(x, terms[t].row, column, block);
        if (first && ends != 0 && terms[t].weight == 1) {
            /* a rank of one row as it is, or a partial: rounding would give it back */
            UNROLL
            for (int v = 0; v < block.num_vecs; v++) {
                node[v] = vf_add(node[v], x[v]);
            }
        } else {
            UNROLL
            for (int v = 0; v < block.num_vecs; v++) {
                rank[v] = vf_fma(vf_set1(terms[t].weight), x[v], rank[v]);
            }
            first = ends != 0;
            if (first) {
                level_end(node, rank, block.num_vecs, block.dtype);
            }
        }
        if (ends & NEP_ENDS_NODE) {
            level_end(home, node, block.num_vecs, block.dtype);
        }
    }
    block_store(out, column, home, block);
}

enum { MOST_KEPT = 80 }; /* more than a sum of the library has */

/* Leaves out terms of weight 0; what they end, the term before them ends. */
static uint32_t keep_terms(struct nep_term *kept, const struct nep_term *terms, uint32_t num_terms)
{
    uint32_t num = 0;
    for (uint32_t t = 0; t < num_terms; t++) {
        if (terms[t].weight != 0) {
            kept[num++] = terms[t];
        } else if (num > 0) {
            kept[num - 1].ends |= terms[t].ends;
        }
    }
    return num;
}

/* Here and not in sum_block, whose loop is the dearer by a fifth with a question in each turn. */
INLINE void sum_row(void *out, const struct nep_term *terms, uint32_t num_terms, size_t elements,
                    enum nep_dtype dtype, bool stream)
{
    struct nep_term kept[MOST_KEPT];
    bool has_zero = false, needs_c = false;
    const size_t step = VECS * LANES;
    const size_t ahead = SUM_AHEAD / v_bytes(dtype);
    size_t column = 0;
    for (uint32_t t = 0; t < num_terms; t++) {
        has_zero |= terms[t].weight == 0;
        needs_c |= nep_bits_nan(nep_bits(terms[t].weight)); /* see v_round */
    }
    if (needs_c || (has_zero && num_terms > MOST_KEPT)) {
        nep_sum_c_range(out, terms, num_terms, dtype, 0, elements); /* rare */
        return;
    }
    if (has_zero) {
        num_terms = keep_terms(kept, terms, num_terms);
        terms = kept;
    }
    for (; column + ahead + step <= elements; column += step) {
        sum_block(out, terms, num_terms, column, (struct block){dtype, VECS, true, stream});
    }
    for (; column + step <= elements; column += step) {
        sum_block(out, terms, num_terms, column, (struct block){dtype, VECS, false, stream});
    }
    for (; column + LANES <= elements; column += LANES) {
        sum_block(out, terms, num_terms, column, (struct block){dtype, 1, false, false});
    }
    if (column < elements) {
        nep_sum_c_range(out, terms, num_terms, dtype, column, elements);
    }
}

/* The rows are not inlined: they stand between nep_fpenv_enter and leave. */
#define DEFINE_SUM(name, dtype)                                                                    \
    static __attribute__((noinline)) void name##_row(void *out, const struct nep_term *terms,      \
                                                     uint32_t num_terms, size_t elements)          \
    {                                                                                              \
        sum_row(out, terms, num_terms, elements, dtype, false);                                    \
    }                                                                                              \
    static __attribute__((noinline)) void name##_row_final(                                        \
        void *out, const struct nep_term *terms, uint32_t num_terms, size_t elements)              \
    {                                                                                              \
        sum_row(out, terms, num_terms, elements, dtype, true);                                     \
    }                                                                                              \
    static void name(void *out, const struct nep_term *terms, uint32_t num_terms, size_t elements) \
    {                                                                                              \
        nep_fpenv env = nep_fpenv_enter();                                                         \
        name##_row(out, terms, num_terms, elements);                                               \
        nep_fpenv_leave(env);                                                                      \
    }                                                                                              \
    static void name##_final(void *out, const struct nep_term *terms, uint32_t num_terms,          \
                             size_t elements)                                                      \
    {                                                                                              \
        nep_fpenv env = nep_fpenv_enter();                                                         \
        if ((uintptr_t)out % LINE == 0) {                                                          \
            name##_row_final(out, terms, num_terms, elements);                                     \
        } else {                                                                                   \
            name##_row(out, terms, num_terms, elements);                                           \
        }                                                                                          \
        nep_fpenv_leave(env);                                                                      \
    }
DEFINE_SUM(sum_bf16, NEP_DTYPE_BF16)
DEFINE_SUM(sum_fp16, NEP_DTYPE_FP16)
DEFINE_SUM(sum_fp32, NEP_DTYPE_FP32)

/* ---- moving rows -------------------------------------------------------------------------- */

/* The bytes before the next line of an address. */
INLINE size_t line_head(const void *at)
{
    return (size_t)(-(uintptr_t)at & (LINE - 1));
}

/* No prefetch: the hardware's follows one stream, and ours only slowed it. */
static void copy(void *dst, const void *src, size_t bytes)
{
    char *to = dst;
    const char *from = src;
    if (bytes >= STREAM_MIN) {
        /* whole lines of dst past the caches, the ragged ends through them */
        size_t head = line_head(dst);
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

/* Places that lie alike relative to lines, as rows of one output do. */
static bool places_alike(void *const *dsts, uint32_t num)
{
    uintptr_t differing = 0;
    for (uint32_t i = 1; i < num; i++) {
        differing |= (uintptr_t)dsts[i] ^ (uintptr_t)dsts[0];
    }
    return differing % LINE == 0;
}

/* Four lines to each place in turn: a sixth faster than one place after the other. */
static void push(void *const *dsts, uint32_t num, const void *src, size_t bytes)
{
    const char *from = src;
    if (num < 2 || bytes < STREAM_MIN || !places_alike(dsts, num)) {
        for (uint32_t i = 0; i < num; i++) {
            copy(dsts[i], src, bytes);
        }
        return;
    }
    size_t head = line_head(dsts[0]);
    size_t at = head;
    for (; at + 4 * LINE <= bytes; at += 4 * LINE) {
        line a = line_load(from + at);
        line b = line_load(from + at + LINE);
        line c = line_load(from + at + 2 * LINE);
        line d = line_load(from + at + 3 * LINE);
        for (uint32_t i = 0; i < num; i++) {
            char *to = (char *)dsts[i] + at;
            line_stream(to, a);
            line_stream(to + LINE, b);
            line_stream(to + 2 * LINE, c);
            line_stream(to + 3 * LINE, d);
        }
    }
    for (uint32_t i = 0; i < num; i++) {
        memcpy(dsts[i], from, head);
        memcpy((char *)dsts[i] + at, from + at, bytes - at);
    }
}

/* Pairs with the streaming stores above; the caller's release store follows it. */
static void fence(void)
{
    _mm_sfence();
}

#include "dispatch/host/kernels_simd_fp8.h"

#define KERNELS_TABLE(isa)                                                                         \
    {                                                                                              \
        .name = isa, .copy = copy, .push = push, .sum = {sum_bf16, sum_fp16, sum_fp32},            \
        .sum_final = {sum_bf16_final, sum_fp16_final, sum_fp32_final}, .cast_fp8 = cast_fp8,       \
        .uncast_fp8 = uncast_fp8, .fence = fence,                                                  \
    }

#endif
#endif
