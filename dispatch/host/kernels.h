/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inner loops of the host executor: moving rows, summing rows, casting to fp8. One table of
 * functions per instruction set, chosen once at run time; all tables give the same bits, and plain
 * C is the reference that the others are compared to.
 *
 * Rows may lie at any address (no alignment is needed; 64 bytes is fastest) and must not overlap
 * the output, except that a term may lie exactly at `out`. Any thread; no state. Results do not
 * depend on the caller's rounding mode or flush-to-zero settings: the functions compute in the
 * default environment and restore the caller's.
 */
#ifndef NEP_DISPATCH_HOST_KERNELS_H
#define NEP_DISPATCH_HOST_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* Most destinations of one push. */
#define NEP_PUSH_MAX 32
/* Elements that share one fp8 scale; the last block of a row may be shorter. */
#define NEP_FP8_BLOCK 128

enum {
    NEP_ENDS_RANK = 1, /* last term of its rank */
    NEP_ENDS_NODE = 2, /* last term of its node; includes NEP_ENDS_RANK */
};

/* One addend of a sum. A row may itself be a partial sum: weight 1. */
struct nep_term {
    const void *row;
    float weight;
    uint32_t ends; /* NEP_ENDS_*; the last term of an array ends its rank and its node anyway */
};

/*
 * out[e] = the sum tree of docs/protocol.md, per element, in fp32:
 *   rank += weight * row[e], fused, from +0, terms in array order; where the weight is 0 the row
 *   is left out, whatever it holds;
 *   at the end of a rank  node += round(rank), rank = +0;
 *   at the end of a node  home += round(node), node = +0;
 *   out = round(home).
 * round is to the payload type, nearest even, denormals kept, overflow to infinity. Every level
 * starts at +0 and is added to, never assigned. So no result is ever -0, and a level stored as a
 * partial and summed again with weight 1 gives the same bits as one that was never stored. A NaN
 * becomes the one with all bits of exponent and mantissa set (0x7fff, 0x7fffffff), which is what
 * NVIDIA GPUs produce, whatever its sign and payload were. num_terms = 0: zeros.
 */
typedef void (*nep_sum_fn)(void *out, const struct nep_term *terms, uint32_t num_terms,
                           size_t elements);

struct nep_kernels {
    const char *name; /* "c", "avx2", "avx512" */
    /* A row to its final place, past the caches where that pays: call fence before a release. */
    void (*copy)(void *dst, const void *src, size_t bytes);
    /* One row to num final places (at most NEP_PUSH_MAX), read from memory once. As copy. */
    void (*push)(void *const *dsts, uint32_t num, const void *src, size_t bytes);
    /* By dtype - NEP_DTYPE_BF16: bf16, fp16, fp32. Stores are plain: no fence is needed. */
    nep_sum_fn sum[3];
    /* The same, for results that no core reads soon: past the caches. Call fence as after copy. */
    nep_sum_fn sum_final[3];
    /*
     * q[i] = e4m3(x[i] / s), nearest even, saturating at 448; NaN gives 0x7f. x is bf16, fp16 or
     * fp32. An infinity counts as the largest finite float in amax, a NaN as 0. scales has
     * ceil(elements / 128) entries of the kind's type.
     */
    void (*cast_fp8)(void *q, void *scales, const void *x, enum nep_dtype dtype, size_t elements,
                     enum nep_scale kind);
    /* x[i] = q[i] * s, the product in fp32, then rounded to dtype as sums are. Keeps -0. */
    void (*uncast_fp8)(void *x, enum nep_dtype dtype, const void *q, const void *scales,
                       size_t elements, enum nep_scale kind);
    /* Orders all earlier copy and push stores of this thread before later stores. */
    void (*fence)(void);
};

/*
 * The table for `simd`: "c", "avx2", "avx512", or "auto" for the widest that this CPU and this
 * build have. NEP_ERR_UNSUPPORTED names what the CPU lacks, NEP_ERR_INVALID an unknown name.
 */
enum nep_status nep_kernels_select(const char *simd, const struct nep_kernels **kernels_p);

/*
 * Optional, before the sum of an earlier row: starts loading the first bytes of the next terms'
 * rows, where a sum would wait for memory. The rest of a row is prefetched by the sum itself.
 */
static inline void nep_terms_prefetch(const struct nep_term *terms, uint32_t num_terms)
{
    for (uint32_t t = 0; t < num_terms; t++) {
        for (size_t byte = 0; byte < 256; byte += 64) {
            __builtin_prefetch((const char *)terms[t].row + byte);
        }
    }
}

/* Bytes of one scale, of a row's scales. */
static inline size_t nep_scale_bytes(enum nep_scale kind)
{
    return kind == NEP_SCALE_UE8M0 ? 1 : sizeof(float);
}

static inline size_t nep_scales_row_bytes(size_t elements, enum nep_scale kind)
{
    return (elements + NEP_FP8_BLOCK - 1) / NEP_FP8_BLOCK * nep_scale_bytes(kind);
}

#endif
