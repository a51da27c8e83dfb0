/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The layout of every rank's region, computed in one place from the configuration alone, so that
 * every rank knows every address. Who lands where, and under which index, is here too (the plan).
 *
 * Indexes. Messages that land at rank Y come from few ranks; their slots are compact:
 * - lane sources of Y: sources of other nodes whose landing rank on Y's node is Y, ascending by
 * rank;
 * - controls of Y: Y itself (0), its lane sources (1 ...), then the landing ranks F(Y, m) of other
 * nodes that are not lane sources of Y (only where nodes differ in size), ascending by node.
 */
#ifndef NEP_DISPATCH_REGION_H
#define NEP_DISPATCH_REGION_H

#include <stdatomic.h>

#include "dispatch/offsets.h"
#include "dispatch/shape.h"

struct nep_plan {
    uint32_t num_seats; /* ranks that callers know, lost ones too; >= topology->num_ranks */
    const struct nep_topology *topology;
    const struct nep_shape *shape;
    uint32_t *landing;          /* [N][R] F(s, n); for s's own node: s */
    uint32_t *lane;             /* [N][R] index of s among the lane sources of F(s, n) */
    uint32_t *node_first;       /* [N + 1] into node_rank */
    uint32_t *node_rank;        /* [R] ranks by node, then lane */
    struct nep_region *regions; /* [R] */
    uint64_t most_counts_bytes; /* of COUNTS to any node */
    uint64_t window_bytes;      /* largest region + pool: every rank's window */
    uint64_t pool_offset;       /* equal on all ranks */
};

/* Allocates its tables. topology and shape must outlive it. */
enum nep_status nep_plan_init(struct nep_plan *plan, const struct nep_shape *shape,
                              const struct nep_topology *topology);
void nep_plan_fini(struct nep_plan *plan);

static inline uint32_t nep_plan_landing(const struct nep_plan *plan, uint32_t source, uint32_t node)
{
    return plan->landing[(uint64_t)node * plan->topology->num_ranks + source];
}

static inline uint32_t nep_plan_lane(const struct nep_plan *plan, uint32_t source, uint32_t node)
{
    return plan->lane[(uint64_t)node * plan->topology->num_ranks + source];
}

static inline uint32_t nep_plan_rank_at(const struct nep_plan *plan, uint32_t node, uint32_t local)
{
    return plan->node_rank[plan->node_first[node] + local];
}

/* Index of `source` among the controls of `rank`; UINT32_MAX where its COUNTS never land there. */
uint32_t nep_plan_control(const struct nep_plan *plan, uint32_t rank, uint32_t source);
/* Index of node `other` among the nodes other than `node`. */
static inline uint32_t nep_plan_skip(uint32_t node, uint32_t other)
{
    return other < node ? other : other - 1;
}

struct nep_grant;
/* Where other nodes' ranks write into the region of `rank`, and nobody else does: the slots of
 * their COUNTS and tiles. At most 3 * num_controls grants; returns how many. */
uint32_t nep_plan_grants(const struct nep_plan *plan, uint32_t rank, struct nep_grant *grants);

/* The parts of rank's region, for nep_ep_memory and nep-info --region. handle_bytes is left alone.
 */
void nep_plan_memory(const struct nep_plan *plan, uint32_t rank, struct nep_memory *memory);

/* ---- what lies at those offsets ---- */

struct nep_directory {
    uint32_t control; /* UINT32_MAX: no such message lands here */
    uint32_t lane;
    uint32_t node;
    uint32_t reserved;
};

/* A byte of memory that the node reaches, by a name that is the same on all its ranks. */
struct nep_place {
    uint64_t offset; /* in the window of the rank that published it, or in its registered buffer */
    uint32_t space;  /* 0: the window; else 1 + the number of the buffer (dispatch/buffers.h) */
    uint32_t reserved;
};

/* A buffer that this rank published for one operation: word = op + 1, then mode and places are
 * valid. */
enum { NEP_BIND_PRIVATE = 0, NEP_BIND_MAPPED = 1 };
struct nep_bind {
    _Atomic uint64_t word;
    uint64_t mode;
    struct nep_place rows;
    struct nep_place extra; /* scales (outputs) or weights (expert outputs), where there are any */
    uint64_t capacity;      /* outputs: rows */
    uint64_t reserved;
};

#define NEP_REGION_MAGIC 0x6e65702d72656731ull

/* At offset 0. The sink works from this alone: it may run in a sender's process. */
struct nep_region_head {
    uint64_t magic;
    uint32_t rank;
    uint32_t num_ranks;
    uint32_t window;
    uint32_t tile_slots;
    uint32_t generation;
    struct nep_region region;
    _Alignas(64) _Atomic uint64_t completed; /* operations completed by this rank */
    _Atomic uint64_t read_done; /* op + 1 of the last operation whose lent buffers it has read */
    _Atomic uint64_t fault;     /* 0, or culprit rank + 1: this rank gave up, and whom it blames */
    _Alignas(64) _Atomic uint64_t duplicates;
    _Atomic uint64_t stale;
    _Atomic uint64_t looked_ns; /* when this rank last looked, in a wait, at what is missing */
    _Atomic uint64_t awaits;    /* 0, or 1 + the rank that it then missed something of */
};

static inline _Atomic uint64_t *nep_word(void *base, uint64_t offset, uint64_t idx)
{
    return (_Atomic uint64_t *)((uint8_t *)base + offset) + idx;
}

static inline uint64_t nep_word_get(void *base, uint64_t offset, uint64_t idx)
{
    return atomic_load_explicit(nep_word(base, offset, idx), memory_order_acquire);
}

static inline void nep_word_set(void *base, uint64_t offset, uint64_t idx, uint64_t value)
{
    atomic_store_explicit(nep_word(base, offset, idx), value, memory_order_release);
}

/* Raises a word, which others may raise too, to value; false: it was there already. Release: pairs
 * with nep_word_get. */
static inline bool nep_word_raise(_Atomic uint64_t *word, uint64_t value)
{
    uint64_t old = atomic_load_explicit(word, memory_order_relaxed);
    while (old < value) {
        if (atomic_compare_exchange_weak_explicit(word, &old, value, memory_order_acq_rel,
                                                  memory_order_relaxed)) {
            return true;
        }
    }
    return false;
}

#endif
