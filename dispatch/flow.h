/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Streams of tiles and their credits. A stream's tiles are numbered through all operations; tile q
 * lands in slot q % W of its receiver and may go when q < freed + W.
 *
 * freed is the larger of what the receiver said (CREDIT) and of what follows by itself: once this
 * rank has completed operation j, every rank has begun j, so it has completed j - S and read all
 * its tiles.
 */
#ifndef NEP_DISPATCH_FLOW_H
#define NEP_DISPATCH_FLOW_H

#include "dispatch/region.h"

struct nep_ep;
struct nep_put;

/* What this rank sends to one receiver. */
struct nep_flow {
    uint32_t dst;
    uint32_t ring;                         /* send ring */
    uint64_t planned;                      /* tiles of all operations begun */
    uint64_t next;                         /* next tile to send */
    uint64_t implicit;                     /* freed as it follows from completed operations */
    uint64_t end[2 * NEP_MAX_OUTSTANDING]; /* by op % W: planned after that operation */
    bool is_open;                          /* combine: a tile is being filled */
    uint32_t open_rows;
};

/* What this rank receives of one stream. */
struct nep_inflow {
    uint64_t next;      /* next tile to read (combine: by this rank; dispatch: by this rank) */
    uint64_t announced; /* freed as the sender is known to know it */
    uint64_t planned;   /* tiles of all operations whose COUNTS were taken */
    uint64_t end[2 * NEP_MAX_OUTSTANDING]; /* by op % W */
    uint64_t credit_put;                   /* put number of the last CREDIT */
    uint64_t credit_oldest; /* what the oldest CREDIT that may be in flight says to be free */
};

/* Packed tiles on their way: W slots, used in turn by both kinds of operation. */
struct nep_send_ring {
    uint64_t next;
    struct {
        uint32_t dst;
        uint64_t number; /* 0: never used */
    } slots[NEP_TILE_SLOTS];
};

/* An operation begins: num_tiles more of this stream (0 for streams it does not use). */
void nep_flow_begin(struct nep_flow *flow, uint64_t op, uint32_t window, uint32_t num_tiles);
/* Operation `op` completed here. */
void nep_flow_complete(struct nep_flow *flow, uint64_t op, uint32_t window);
/* Whether the next tile may go, given the explicit credit word. */
static inline bool nep_flow_may_send(const struct nep_flow *flow, uint64_t credit, uint32_t window)
{
    uint64_t freed = credit > flow->implicit ? credit : flow->implicit;
    return flow->next < freed + window;
}

/* The receiver's mirror: COUNTS of op said that the stream ends at `end`. False: `end` is
 * impossible. */
bool nep_inflow_begin(struct nep_inflow *inflow, uint64_t op, uint32_t window, uint64_t end,
                      uint32_t num_tiles);
/* Whether the sender will need a CREDIT beyond what it knows. */
static inline bool nep_inflow_needs_credit(const struct nep_inflow *inflow, uint32_t window)
{
    return inflow->planned > inflow->announced + window;
}

/*
 * Whether a CREDIT that says so may go, and what is remembered of it then. Several may be in
 * flight, and overtake each other, as long as all that they say lies within NEP_CREDIT_SPAN: of a
 * number 8 bits travel, and the sender is at most NEP_TILE_SLOTS beyond the last one that it knows.
 */
bool nep_inflow_may_credit(struct nep_ep *ep, const struct nep_inflow *inflow, uint32_t dst,
                           uint64_t freed);
enum nep_status nep_inflow_credit(struct nep_ep *ep, struct nep_inflow *inflow,
                                  const struct nep_put *put, uint64_t freed);
/*
 * Whether this rank owes the sender nothing: all CREDITs that it needs are sent, and the last one
 * is complete. One that its sender had no need for could else be on its way while hundreds of tiles
 * pass, and its 8 bits would mean another number. What it waits for is in ep->missing.
 */
bool nep_inflow_is_settled(struct nep_ep *ep, const struct nep_inflow *inflow, uint32_t dst);

/* The next slot of a send ring, or NULL while its last put is not complete. */
uint8_t *nep_send_slot(struct nep_ep *ep, uint32_t ring);
/*
 * After a round of tiles: where cores are shared, the fabric's thread and the other ranks get a
 * turn. A rank that packs or sums a whole operation first holds its core for milliseconds, in which
 * what is posted does not leave, and others post nothing.
 */
void nep_send_turn(const struct nep_ep *ep);
/* Puts what lies in that slot. */
enum nep_status nep_send_post(struct nep_ep *ep, uint32_t ring, uint32_t dst, uint64_t offset,
                              uint64_t bytes, uint32_t imm);

#endif
