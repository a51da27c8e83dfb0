/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fp8 casts of the vector kernels; only kernels_simd.h includes it, which see. Codes are made
 * in integers, as in kernels_impl.h: the codes above 2^-6 by rounding the float's bits, those below
 * by adding 2^14, whose unit in the last place is the least code. The quotient is a true division:
 * a product with 1 / s rounds twice.
 */
#ifndef NEP_DISPATCH_HOST_KERNELS_SIMD_FP8_H
#define NEP_DISPATCH_HOST_KERNELS_SIMD_FP8_H

#ifdef LANES

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
        vf x[NEP_FP8_BLOCK / LANES]; /* kept, so that the block is read once */
        vf amax = vf_zero();
        UNROLL
        for (size_t v = 0; v < NEP_FP8_BLOCK / LANES; v++) {
            x[v] = v_load(cast->x, begin + v * LANES, dtype);
            amax = vf_max_or_second(vf_abs(x[v]), amax);
        }
        float scale = nep_fp8_scale(vf_reduce_max(amax), cast->kind);
        nep_fp8_scale_store(scales, begin / NEP_FP8_BLOCK, scale, cast->kind);
        UNROLL
        for (size_t v = 0; v < NEP_FP8_BLOCK / LANES; v++) {
            vi_store_u8(q + begin + v * LANES, v_to_e4m3(vf_div(x[v], vf_set1(scale))));
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

#endif
#endif
