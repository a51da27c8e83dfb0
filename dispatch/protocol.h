/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What travels: the immediate, COUNTS, tiles; and the sink, which ticks an arrival off.
 * docs/protocol.md has the rules and what the model checker proved about them.
 */
#ifndef NEP_DISPATCH_PROTOCOL_H
#define NEP_DISPATCH_PROTOCOL_H

#include "dispatch/region.h"

enum nep_kind {
    NEP_KIND_COUNTS = 0,
    NEP_KIND_DISPATCH = 1,        /* a tile of tokens */
    NEP_KIND_COMBINE = 2,         /* a tile of partial sums */
    NEP_KIND_DISPATCH_CREDIT = 3, /* number: tiles of the sender's dispatch stream that are free */
    NEP_KIND_COMBINE_CREDIT = 4,
    NEP_KIND_LEAVE = 5 /* op, number: the rank that the sender blames, 16 bits; it gave up */
};

/*
 * The immediate, from the top: generation 3, kind 3, ep 6, op 8, number 8, part 4. op and number
 * are low bits: the receiver completes them from its own counters (a window of W < 128 is in
 * question). part belongs to the transport.
 */
static inline uint32_t nep_imm(uint32_t generation, enum nep_kind kind, uint32_t ep, uint64_t op,
                               uint64_t number)
{
    return (generation & 7) << 29 | ((uint32_t)kind & 7) << 26 | (ep & 63) << 20 |
           ((uint32_t)op & 255) << 12 | ((uint32_t)number & 255) << 4;
}
static inline uint32_t nep_imm_generation(uint32_t imm)
{
    return imm >> 29;
}
static inline enum nep_kind nep_imm_kind(uint32_t imm)
{
    return (enum nep_kind)(imm >> 26 & 7);
}
static inline uint32_t nep_imm_ep(uint32_t imm)
{
    return imm >> 20 & 63;
}
static inline uint32_t nep_imm_op(uint32_t imm)
{
    return imm >> 12 & 255;
}
static inline uint32_t nep_imm_number(uint32_t imm)
{
    return imm >> 4 & 255;
}

/* The sink of every ep (transport.h): works on the receiver's region alone, from any thread. */
void nep_arrive(void *base, uint32_t dst, uint32_t src, uint32_t imm);

/*
 * COUNTS: what one rank announces to one node (or, in combine, to one source) for one operation.
 * Behind it: uint32_t rows_per_rank[G], uint32_t rows_per_slot[G * L] (dispatch), then, where
 * `ride_rows` is not 0, that many nep_meta and rows, as in a tile.
 */
struct nep_counts_msg {
    uint64_t op;
    uint64_t map_digest; /* of the map this operation routes with */
    uint64_t tiles_end;  /* the stream's number after this operation's last tile */
    uint32_t source;
    uint32_t kind;   /* enum nep_kind: DISPATCH or COMBINE */
    uint32_t routed; /* the operation that routed the handle, or NEP_ROUTED_ANY */
    uint32_t layer;
    uint32_t num_tokens; /* T */
    uint32_t num_rows;   /* tokens of the source for this node; combine: rows coming back */
    uint32_t num_tiles;
    uint32_t ride_rows;
    uint32_t ride_offset; /* of the rows in this message */
    uint32_t bytes;       /* of the message */
    uint32_t has_weights; /* combine: rows come with K weights */
    uint32_t reserved;
};

/*
 * A tile: this, then nep_meta[num_rows] (dispatch only), then rows at payload_offset, then
 * (combine, where weights come back) float[num_rows][K].
 */
struct nep_tile_msg {
    uint64_t op;
    uint64_t number;
    uint32_t source; /* dispatch: whose tokens; combine: who summed */
    uint32_t kind;
    uint32_t first_row; /* of the operation's rows of this stream */
    uint32_t num_rows;
    uint64_t reserved[4];
};

/* Largest COUNTS to a node of that many ranks; largest tile of a kind. Multiples of 64. */
uint64_t nep_counts_bytes(const struct nep_shape *shape, uint32_t node_ranks);
uint64_t nep_tile_bytes(const struct nep_shape *shape, enum nep_kind kind);

/* Where the rows of a COUNTS that ride begin, and the parts of a tile of so many rows. */
uint32_t nep_counts_ride_offset(const struct nep_shape *shape, uint32_t node_ranks);
static inline uint32_t nep_tile_payload_offset(const struct nep_shape *shape, enum nep_kind kind,
                                               uint32_t num_rows)
{
    uint64_t meta = kind == NEP_KIND_DISPATCH ? (uint64_t)num_rows * shape->meta_bytes : 0;
    return (uint32_t)((sizeof(struct nep_tile_msg) + meta + 63) / 64 * 64);
}
static inline uint32_t nep_counts_rows_per_slot_offset(uint32_t node_ranks)
{
    return (uint32_t)sizeof(struct nep_counts_msg) + node_ranks * 4;
}

#endif
