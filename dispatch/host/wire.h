/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a dispatched row is: its payload, then its scales, if it has any. Rows are passed through or
 * cast to fp8 on their way into a tile or straight to their final places; nothing else in dispatch
 * looks into a row.
 */
#ifndef NEP_DISPATCH_HOST_WIRE_H
#define NEP_DISPATCH_HOST_WIRE_H

#include "dispatch/host/kernels.h"

/* Rows in a tile start at multiples of this. */
#define NEP_WIRE_ALIGN 16

struct nep_wire {
    enum nep_dtype dtype;   /* of the caller's rows */
    enum nep_dtype type;    /* of dispatched rows: dtype, or fp8 */
    enum nep_scale scale;   /* where type is fp8 */
    uint32_t hidden;        /* elements; 0 where the type is opaque */
    uint32_t payload_bytes; /* of a dispatched row */
    uint32_t scale_bytes;   /* of its scales; 0: none */
    uint32_t row_bytes;     /* of both in a tile, padded */
    uint32_t in_bytes;      /* of a caller's row that is to be cast; else payload_bytes */
    /* outputs: columns of 4 bytes of scales, not rows; of so many rows, 0: of the capacity */
    uint32_t scale_columns;
    uint32_t scale_block;
};

/*
 * bf16, fp16 and fp32 stay as they are or become fp8; fp8 stays fp8, the caller brings the scales.
 * hidden is not 0. Other combinations are NEP_ERR_UNSUPPORTED.
 */
enum nep_status nep_wire_init(struct nep_wire *wire, enum nep_dtype dtype, enum nep_dtype type,
                              uint32_t hidden, enum nep_scale scale);
/* Rows of any format: payload_bytes, not 0, and scale_bytes pass through. */
enum nep_status nep_wire_init_opaque(struct nep_wire *wire, uint32_t payload_bytes,
                                     uint32_t scale_bytes);

/* Scales of outputs in columns, of `block` rows each (0: of the capacity); refused where a row's
 * are not whole pieces of 4 bytes. */
enum nep_status nep_wire_set_columns(struct nep_wire *wire, uint32_t block);

/* A row at its source. Without scales, where the wire has some, x is of dtype and is cast. */
struct nep_wire_row {
    const void *x;
    const void *scales;
};

#if defined(__CUDACC__)
#define NEP_WIRE_FN static __host__ __device__ inline
#else
#define NEP_WIRE_FN static inline
#endif

/* Where the scales of one row lie: 4 bytes every `step` bytes. */
struct nep_scales_at {
    char *first; /* NULL: nowhere */
    uint64_t step;
};

/* Rows of a column, the pad to 16 bytes included. */
NEP_WIRE_FN uint64_t nep_wire_column(const struct nep_wire *wire, uint64_t capacity)
{
    return ((wire->scale_block != 0 ? wire->scale_block : capacity) + 3) / 4 * 4;
}

/* Of row `row` of an output's scales; capacity: rows of that output. */
NEP_WIRE_FN struct nep_scales_at nep_wire_scales_at(const struct nep_wire *wire, void *scales,
                                                    uint64_t row, uint64_t capacity)
{
    struct nep_scales_at at = {(char *)scales, 4};
    if (scales == 0) {
        return at;
    }
    if (wire->scale_columns == 0) {
        at.first += row * wire->scale_bytes;
        return at;
    }
    uint64_t column = nep_wire_column(wire, capacity);
    uint64_t block = wire->scale_block != 0 ? row / wire->scale_block : 0;
    at.step = column * 4;
    at.first += block * wire->scale_bytes * column + (row - block * wire->scale_block) * 4;
    return at;
}

/* Bytes of the scales of an output. */
NEP_WIRE_FN uint64_t nep_wire_scales_bytes(const struct nep_wire *wire, uint64_t capacity)
{
    uint64_t blocks =
        wire->scale_block != 0 ? (capacity + wire->scale_block - 1) / wire->scale_block : 1;
    return wire->scale_columns == 0 ? capacity * wire->scale_bytes
                                    : blocks * wire->scale_bytes * nep_wire_column(wire, capacity);
}

/* Final places of one row: of its payload, and of its scales where the wire has some. */
struct nep_wire_places {
    uint32_t num; /* at most NEP_PUSH_MAX */
    void *x[NEP_PUSH_MAX];
    struct nep_scales_at scales[NEP_PUSH_MAX];
};

/* A caller's row into a tile, through the caches: the fabric reads it next. The pad is zeroed. */
void nep_wire_pack(const struct nep_wire *wire, const struct nep_kernels *kernels,
                   const struct nep_wire_row *row, void *to);
/* The row in a tile, as the source of a push. */
struct nep_wire_row nep_wire_row_at(const struct nep_wire *wire, const void *at);
/*
 * A row, a caller's or a tile's, to its final places; kernels->fence before they are announced.
 * scratch: row_bytes, needed where the row is cast, which is done once.
 */
void nep_wire_push(const struct nep_wire *wire, const struct nep_kernels *kernels,
                   const struct nep_wire_row *row, const struct nep_wire_places *places,
                   void *scratch);

#endif
