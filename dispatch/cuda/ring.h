/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The command ring: how kernels ask the proxy thread to post. Commands are 64-bit numbers in pinned
 * host memory, one release store each. Any number of producers (blocks) take places by an atomic
 * add in their own memory; one consumer, the proxy. An entry says by its tag (the lap, 1 to 255)
 * which ticket it belongs to, so the consumer reads nothing but the entry that it expects next and
 * nothing is ever cleared. A producer waits for its place to be free, so the ring never overflows;
 * it looks across PCIe for that only when a copy of the tail in its own memory does not prove it.
 *
 * The text compiles for the device (nvcc) and, word for word, for host threads, which is how CI
 * tests it. Every wait ends: with what was waited for, at its deadline, when the proxy's heartbeat
 * stood still for half of that, or when the proxy recorded a fault.
 *
 * Rejected: a tail that the consumer writes into device memory (a CUDA call or a BAR mapping per
 * batch), and a head word beside the entries (two stores across PCIe per command).
 */
#ifndef NEP_DISPATCH_CUDA_RING_H
#define NEP_DISPATCH_CUDA_RING_H

#include <stdbool.h>
#include <stdint.h>

#if defined(__CUDACC__)
#include "dispatch/cuda/device/ring.cuh"
#else
#include <sched.h>

#include "base/clock.h"
#define NEP_RING_FN static inline
#endif

/* In pinned memory, zeroed; each word on a line of its own. */
struct nep_ring_shared {
    uint64_t tail; /* commands that the proxy has taken */
    uint64_t pad0[15];
    uint64_t heartbeat; /* grows while the proxy runs */
    uint64_t pad1[15];
    uint64_t fault; /* 0, or what the proxy found: NEP_PROXY_FAULT; it stays */
    uint64_t pad2[15];
    uint64_t entries[1]; /* [size] */
};

/* In the producers' memory, zeroed. */
struct nep_ring_producer {
    uint64_t head; /* tickets given out */
    uint64_t tail; /* what was last seen of the shared one */
};

struct nep_ring {
    struct nep_ring_shared *shared; /* as this side maps it */
    struct nep_ring_producer *producer;
    uint32_t size; /* a power of two */
};

static inline uint64_t nep_ring_bytes(uint32_t size)
{
    return sizeof(struct nep_ring_shared) + size * sizeof(uint64_t);
}

/* ---- commands ------------------------------------------------------------------------------- */

/*
 * From the top: tag 8 (the ring's), kind 4, stream 12, rows 12, op 12, number 16. op and number are
 * low bits, which the proxy completes from its own counters. Addresses follow from the layout.
 */
#define NEP_RING_COMMAND_MASK 0x00ffffffffffffffull

NEP_RING_FN uint64_t nep_ring_command(uint32_t kind, uint32_t stream, uint32_t rows, uint64_t op,
                                      uint64_t number)
{
    return (uint64_t)(kind & 15) << 52 | (uint64_t)(stream & 4095) << 40 |
           (uint64_t)(rows & 4095) << 28 | (op & 4095) << 16 | (number & 65535);
}

struct nep_command {
    uint32_t kind;
    uint32_t stream;
    uint32_t rows;
    uint32_t op;
    uint32_t number;
};

static inline struct nep_command nep_ring_command_of(uint64_t command)
{
    struct nep_command c;
    c.kind = (uint32_t)(command >> 52 & 15);
    c.stream = (uint32_t)(command >> 40 & 4095);
    c.rows = (uint32_t)(command >> 28 & 4095);
    c.op = (uint32_t)(command >> 16 & 4095);
    c.number = (uint32_t)(command & 65535);
    return c;
}

/* ---- words, on the host; the device's are in device/ring.cuh --------------------------------- */

#if !defined(__CUDACC__)
static inline uint64_t nep_ring_load(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static inline uint64_t nep_ring_peek(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static inline void nep_ring_store(uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static inline uint64_t nep_ring_ticket(uint64_t *head)
{
    return __atomic_fetch_add(head, 1, __ATOMIC_RELAXED);
}

static inline uint64_t nep_ring_load_near(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

/* Raises; release: who loads it near may overwrite what the shared tail freed. */
static inline void nep_ring_raise_near(uint64_t *word, uint64_t value)
{
    uint64_t old = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (old < value && !__atomic_compare_exchange_n(word, &old, value, true, __ATOMIC_ACQ_REL,
                                                       __ATOMIC_RELAXED)) {
    }
}

static inline uint64_t nep_ring_now(void)
{
    return nep_now_ns();
}

/* Threads may outnumber cores; blocks of a kernel have theirs. */
static inline void nep_ring_relax(void)
{
    sched_yield();
}
#endif

NEP_RING_FN uint64_t nep_ring_tag(uint64_t ticket, uint32_t size)
{
    return (ticket / size % 255 + 1) << 56;
}

/* ---- waiting -------------------------------------------------------------------------------- */

enum nep_ring_end {
    NEP_RING_DONE = 0,
    NEP_RING_EXPIRED = 1, /* the proxy lives, the word did not come */
    NEP_RING_STALE = 2,   /* the proxy's heartbeat stands still */
    NEP_RING_FAULT = 3,   /* the proxy recorded a fault */
    NEP_RING_STUCK = 4    /* someone else of this rank has given up */
};

/*
 * Until *word >= value. Acquire: pairs with the release that raised it. stuck: a near word that
 * turns non-zero when others of this rank give up, or NULL. The words across PCIe are looked at
 * once in 64 looks at the word itself.
 */
NEP_RING_FN enum nep_ring_end nep_ring_wait(const struct nep_ring *ring, const uint64_t *word,
                                            uint64_t value, const uint64_t *stuck,
                                            uint64_t timeout_ns)
{
    if (nep_ring_load(word) >= value) {
        return NEP_RING_DONE;
    }
    uint64_t start = nep_ring_now();
    uint64_t moved = start;
    uint64_t beat = nep_ring_peek(&ring->shared->heartbeat);
    for (uint32_t looks = 1;; looks++) {
        if (nep_ring_load(word) >= value) {
            return NEP_RING_DONE;
        }
        if (looks % 64 != 0) {
            nep_ring_relax();
            continue;
        }
        if (stuck != 0 && nep_ring_peek(stuck) != 0) {
            return NEP_RING_STUCK;
        }
        if (nep_ring_load(&ring->shared->fault) != 0) {
            return NEP_RING_FAULT;
        }
        uint64_t now = nep_ring_now();
        uint64_t beat_now = nep_ring_peek(&ring->shared->heartbeat);
        if (beat_now != beat) {
            beat = beat_now;
            moved = now;
        }
        if (now - moved > timeout_ns / 2) {
            return NEP_RING_STALE;
        }
        if (now - start > timeout_ns) {
            return NEP_RING_EXPIRED;
        }
    }
}

/*
 * The same for a word in the waiters' own memory that one of them raises, or a neighbour: never
 * looks across PCIe. With hundreds of blocks waiting, looks at the proxy's heartbeat by all of them
 * made every other hop several times slower; whoever waits for the fabric looks, and turns `stuck`.
 */
NEP_RING_FN enum nep_ring_end nep_ring_wait_near(const uint64_t *word, uint64_t value,
                                                 const uint64_t *stuck, uint64_t timeout_ns)
{
    if (nep_ring_load(word) >= value) {
        return NEP_RING_DONE;
    }
    uint64_t start = nep_ring_now();
    for (uint32_t looks = 1;; looks++) {
        if (nep_ring_load(word) >= value) {
            return NEP_RING_DONE;
        }
        if (looks % 64 != 0) {
            nep_ring_relax();
        } else if (nep_ring_peek(stuck) != 0) {
            return NEP_RING_STUCK;
        } else if (nep_ring_now() - start > timeout_ns) {
            return NEP_RING_EXPIRED;
        }
    }
}

/* ---- producers ------------------------------------------------------------------------------ */

/*
 * Posts one command (its tag is put in here). What the caller's thread wrote before is visible to
 * the proxy and to what it posts: the store is a release of system scope. After anything but
 * NEP_RING_DONE a ticket is lost and the ring of no further use: record it and post no more.
 */
NEP_RING_FN enum nep_ring_end nep_ring_post(const struct nep_ring *ring, uint64_t command,
                                            const uint64_t *stuck, uint64_t timeout_ns)
{
    uint64_t ticket = nep_ring_ticket(&ring->producer->head);
    uint64_t need = ticket >= ring->size ? ticket - ring->size + 1 : 0;
    /* Acquire: pairs with the raise below, of whoever saw the shared tail. */
    if (nep_ring_load_near(&ring->producer->tail) < need) {
        /* Acquire: pairs with the release in nep_ring_take: the entry there has been read. */
        enum nep_ring_end end = nep_ring_wait(ring, &ring->shared->tail, need, stuck, timeout_ns);
        if (end != NEP_RING_DONE) {
            return end;
        }
        nep_ring_raise_near(&ring->producer->tail, nep_ring_load(&ring->shared->tail));
    }
    /* Release: pairs with the acquire in nep_ring_take. */
    nep_ring_store(&ring->shared->entries[ticket & (ring->size - 1)],
                   nep_ring_tag(ticket, ring->size) | (command & NEP_RING_COMMAND_MASK));
    return NEP_RING_DONE;
}

/* ---- the consumer --------------------------------------------------------------------------- */

#if !defined(__CUDACC__)
/* The next command; *taken_p counts them. False: none yet. */
static inline bool nep_ring_take(const struct nep_ring *ring, uint64_t *taken_p,
                                 uint64_t *command_p)
{
    uint64_t ticket = *taken_p;
    /* Acquire: pairs with the release in nep_ring_post: what the kernel packed. */
    uint64_t entry = nep_ring_load(&ring->shared->entries[ticket & (ring->size - 1)]);
    if ((entry & ~NEP_RING_COMMAND_MASK) != nep_ring_tag(ticket, ring->size)) {
        return false;
    }
    *command_p = entry & NEP_RING_COMMAND_MASK;
    *taken_p = ticket + 1;
    /* Release: pairs with the acquire of a producer that waits for this place. */
    nep_ring_store(&ring->shared->tail, ticket + 1);
    return true;
}
#endif

#endif
