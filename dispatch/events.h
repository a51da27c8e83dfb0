/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The trace of the wire: the last events of a communicator, kept all the time in rings of fixed
 * size, so that a fault can be looked at from before it. What this rank does is in the
 * communicator's ring; what arrives is in a ring in the region of each ep, because the sink works
 * there alone, and for ranks of one node in the sender's process.
 *
 * A ring has many writers and no lock: a number is drawn, the event of that number is written into
 * its place. An event is four words, the last of which holds the low bits of its number; it says
 * "busy" while the others change. A reader that finds the same last word before and after has read
 * one event; what was overwritten meanwhile is skipped. A writer that was overtaken by a whole
 * round of the ring while it wrote has its place to itself: the event that comes upon a busy place
 * is lost, since nobody waits here and two writers in one place would mix their words. A process
 * that is killed while it writes leaves that one place busy. Rejected: a ring per thread, which
 * needs registration of threads that the library does not own.
 */
#ifndef NEP_DISPATCH_EVENTS_H
#define NEP_DISPATCH_EVENTS_H

#include <stdatomic.h>
#include <stdint.h>

#include "base/ticks.h"

enum nep_event_kind {
    NEP_EVENT_POST = 1,    /* a put went into the fabric; value: immediate, bytes */
    NEP_EVENT_ARRIVAL = 2, /* a put was announced here; value: immediate */
    NEP_EVENT_BEGIN = 3,   /* a call begins; value: enum nep_event_call */
    NEP_EVENT_END = 4,     /* value: the call, and its status in the upper half */
    NEP_EVENT_WAIT = 5,    /* an idle stretch ended; value: the name of what was missing */
    NEP_EVENT_FAULT = 6    /* the communicator broke; value: status */
};

enum nep_event_call {
    NEP_CALL_DISPATCH_SEND = 0,
    NEP_CALL_COUNTS = 1, /* waiting for COUNTS of all ranks */
    NEP_CALL_ROWS = 2,   /* moving rows to their places */
    NEP_CALL_COMBINE_SEND = 3,
    NEP_CALL_COMBINE_RECV = 4,
    NEP_NUM_CALLS = 5
};

/* ticks; op (of a wait: its low half, above it the length in microseconds); value; below. */
struct nep_event {
    _Atomic uint64_t ticks;
    _Atomic uint64_t op;
    _Atomic uint64_t value;
    _Atomic uint64_t what; /* kind 8, ep 8, peer 16, number + 1: low 32; 0: never written */
};
#define NEP_EVENT_BUSY (1ull << 63) /* `what` of an event that is being written; no kind has it */

/* Events follow. num is a power of two, or 0: nothing is kept. */
struct nep_event_ring {
    _Alignas(64) _Atomic uint64_t next;
    uint32_t num;
    struct nep_event events[] __attribute__((aligned(64)));
};

enum {
    NEP_EVENTS_DEFAULT = 8192,
    NEP_EVENTS_MAX = 1 << 20,
    NEP_ARRIVALS = 512 /* of the ring in each region */
};
#define NEP_ARRIVALS_BYTES (sizeof(struct nep_event_ring) + NEP_ARRIVALS * sizeof(struct nep_event))

/* ring->num must not be 0. */
static inline void nep_event_put_at(struct nep_event_ring *ring, uint64_t ticks,
                                    enum nep_event_kind kind, uint32_t ep, uint32_t peer,
                                    uint64_t op, uint64_t value)
{
    uint64_t number = atomic_fetch_add_explicit(&ring->next, 1, memory_order_relaxed);
    struct nep_event *event = &ring->events[number & (ring->num - 1)];
    uint64_t what = (uint64_t)kind << 56 | (uint64_t)(ep & 255) << 48 |
                    (uint64_t)(peer & 65535) << 32 | (uint32_t)(number + 1);
    /* Acquire: pairs with the release below in whoever wrote here before; its words come first. */
    if (atomic_exchange_explicit(&event->what, NEP_EVENT_BUSY, memory_order_acquire) ==
        NEP_EVENT_BUSY) {
        return;
    }
    /* Release: each pairs with the acquire in read_event, which then finds `what` changed. */
    atomic_store_explicit(&event->ticks, ticks, memory_order_release);
    atomic_store_explicit(&event->op, op, memory_order_release);
    atomic_store_explicit(&event->value, value, memory_order_release);
    atomic_store_explicit(&event->what, what, memory_order_release);
}

static inline void nep_event_put(struct nep_event_ring *ring, enum nep_event_kind kind, uint32_t ep,
                                 uint32_t peer, uint64_t op, uint64_t value)
{
    if (ring->num != 0) {
        nep_event_put_at(ring, nep_ticks(), kind, ep, peer, op, value);
    }
}

/* An event as it was read. */
struct nep_event_copy {
    uint64_t ticks;
    uint64_t op;
    uint64_t value;
    uint32_t peer;
    uint8_t ep;
    uint8_t kind;
};

/* A ring of at least num events (rounded up to a power of two); NULL: no memory. free() it. */
struct nep_event_ring *nep_events_create(uint32_t num);
/*
 * Copies what the ring holds, oldest first, at most `cap`; returns how many. Any thread, while
 * others write. *lost_p is raised by what the ring no longer holds, or was being written.
 */
uint32_t nep_events_read(struct nep_event_ring *ring, struct nep_event_copy *events, uint32_t cap,
                         uint64_t *lost_p);
/* Moves events of one ring into another, with the times at which they happened. seats: what each
 * peer is called there. */
void nep_events_move(struct nep_event_ring *from, struct nep_event_ring *to, const uint32_t *seats);

#endif
