/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Casts happen where a row is first touched, so that its bytes cross memory and fabric small: into
 * the tile for other nodes, and once per row, not once per place, for the own node. The scales
 * follow their payload in a tile: one row is one contiguous piece, whatever its type. Rejected:
 * scales of a whole tile side by side, which readers that take every eighth row would jump to.
 */
#include "dispatch/host/wire.h"

#include <stdbool.h>
#include <string.h>

static bool is_number(enum nep_dtype dtype)
{
    return dtype == NEP_DTYPE_BF16 || dtype == NEP_DTYPE_FP16 || dtype == NEP_DTYPE_FP32;
}

static uint32_t row_bytes_of(uint32_t payload_bytes, uint32_t scale_bytes)
{
    uint64_t bytes = (uint64_t)payload_bytes + scale_bytes + NEP_WIRE_ALIGN - 1;
    bytes -= bytes % NEP_WIRE_ALIGN;
    return bytes <= UINT32_MAX ? (uint32_t)bytes : 0;
}

enum nep_status nep_wire_init(struct nep_wire *wire, enum nep_dtype dtype, enum nep_dtype type,
                              uint32_t hidden, enum nep_scale scale)
{
    bool is_fp8 = type == NEP_DTYPE_FP8_E4M3;
    if (!(is_number(dtype) && (type == dtype || is_fp8)) &&
        !(dtype == NEP_DTYPE_FP8_E4M3 && is_fp8)) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "rows of type %d cannot be dispatched as type %d: bf16, fp16 and fp32 go "
                        "as they are or as fp8, fp8 as it is",
                        (int)dtype, (int)type);
    }
    if (is_fp8 && (unsigned)scale > NEP_SCALE_UE8M0) {
        return nep_fail(NEP_ERR_INVALID, "scale %d is none of fp32, power of two, UE8M0",
                        (int)scale);
    }
    uint64_t in_bytes = (uint64_t)hidden * (dtype == NEP_DTYPE_FP32       ? 4
                                            : dtype == NEP_DTYPE_FP8_E4M3 ? 1
                                                                          : 2);
    if (hidden == 0 || in_bytes > UINT32_MAX / 2) {
        return nep_fail(NEP_ERR_INVALID, "a row of %u elements: 1 to 2^31 bytes are possible",
                        hidden);
    }
    struct nep_wire result = {
        .dtype = dtype,
        .type = type,
        .scale = scale,
        .hidden = hidden,
        .payload_bytes = is_fp8 ? hidden : (uint32_t)in_bytes,
        .scale_bytes = is_fp8 ? (uint32_t)nep_scales_row_bytes(hidden, scale) : 0,
        .in_bytes = (uint32_t)in_bytes,
    };
    result.row_bytes = row_bytes_of(result.payload_bytes, result.scale_bytes);
    *wire = result;
    return NEP_OK;
}

enum nep_status nep_wire_init_opaque(struct nep_wire *wire, uint32_t payload_bytes,
                                     uint32_t scale_bytes)
{
    uint32_t row_bytes = row_bytes_of(payload_bytes, scale_bytes);
    if (payload_bytes == 0 || row_bytes == 0) {
        return nep_fail(NEP_ERR_INVALID,
                        "opaque rows of %u bytes and %u bytes of scales: the first must not be 0, "
                        "the sum must stay below 2^32",
                        payload_bytes, scale_bytes);
    }
    *wire = (struct nep_wire){
        .dtype = NEP_DTYPE_OPAQUE,
        .type = NEP_DTYPE_OPAQUE,
        .payload_bytes = payload_bytes,
        .scale_bytes = scale_bytes,
        .row_bytes = row_bytes,
        .in_bytes = payload_bytes,
    };
    return NEP_OK;
}

enum nep_status nep_wire_set_columns(struct nep_wire *wire, uint32_t block)
{
    if (wire->scale_bytes == 0 || wire->scale_bytes % 4 != 0) {
        return nep_fail(NEP_ERR_INVALID,
                        "ep: scales in columns of 4 bytes, but a row has %u bytes of scales: it "
                        "must be a multiple of 4, and not 0",
                        wire->scale_bytes);
    }
    wire->scale_columns = 1;
    wire->scale_block = block;
    return NEP_OK;
}

static bool is_cast(const struct nep_wire *wire, const struct nep_wire_row *row)
{
    return wire->type != wire->dtype && row->scales == NULL;
}

void nep_wire_pack(const struct nep_wire *wire, const struct nep_kernels *kernels,
                   const struct nep_wire_row *row, void *to)
{
    char *scales = (char *)to + wire->payload_bytes;
    uint32_t used = wire->payload_bytes + wire->scale_bytes;
    if (is_cast(wire, row)) {
        kernels->cast_fp8(to, scales, row->x, wire->dtype, wire->hidden, wire->scale);
    } else {
        kernels->copy(to, row->x, wire->payload_bytes);
        if (wire->scale_bytes != 0) {
            memcpy(scales, row->scales, wire->scale_bytes);
        }
    }
    memset((char *)to + used, 0, wire->row_bytes - used); /* nothing old leaves the process */
}

struct nep_wire_row nep_wire_row_at(const struct nep_wire *wire, const void *at)
{
    return (struct nep_wire_row){
        .x = at,
        .scales = wire->scale_bytes != 0 ? (const char *)at + wire->payload_bytes : NULL,
    };
}

void nep_wire_push(const struct nep_wire *wire, const struct nep_kernels *kernels,
                   const struct nep_wire_row *row, const struct nep_wire_places *places,
                   void *scratch)
{
    struct nep_wire_row from = *row;
    if (is_cast(wire, row)) {
        nep_wire_pack(wire, kernels, row, scratch);
        from = nep_wire_row_at(wire, scratch);
    }
    kernels->push(places->x, places->num, from.x, wire->payload_bytes);
    if (wire->scale_bytes == 0) {
        return;
    }
    for (uint32_t i = 0; i < places->num; i++) {
        const struct nep_scales_at *at = &places->scales[i];
        uint32_t piece = at->step == 4 ? wire->scale_bytes : 4;
        for (uint32_t done = 0; done < wire->scale_bytes; done += piece) {
            memcpy(at->first + done / 4 * at->step, (const char *)from.scales + done, piece);
        }
    }
}
