/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What travels: the immediate, COUNTS, tiles; and the sink, which ticks an arrival off.
 * docs/protocol.md has the rules and what the model checker proved about them.
 */
#ifndef NEP_DISPATCH_PROTOCOL_H
#define NEP_DISPATCH_PROTOCOL_H

#include "dispatch/region.h"

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
