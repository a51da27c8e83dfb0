/* SPDX-License-Identifier: Apache-2.0 */
/* What transport.h promises, checked through the operations table alone, for any transport. */
#ifndef NEP_TESTS_CONFORMANCE_H
#define NEP_TESTS_CONFORMANCE_H

#include "ranks.h"
#include "transport/transport.h"

enum { WINDOW_IMMS = 256 };

/* A window under test: words that the sink bumps, a slot per source, own bytes to send. */
struct window {
    uint32_t number;
    uint32_t num_ranks;
    size_t slot_bytes;
    void *base;
    size_t bytes;
};

struct conformance {
    const char *name; /* as for nep_transport_find */
    uint64_t seed;
    uint32_t num_rounds;
    size_t slot_bytes; /* the largest put is a little less */
    bool repeats;      /* puts may be announced twice */
};

/* The immediate of announcement `i`, below WINDOW_IMMS, in a window: its tile field. */
static inline uint32_t window_imm(uint32_t number, uint32_t i)
{
    return number << 20 | i << 4;
}

/* The sink that these windows expect. */
void conformance_sink(void *base, uint32_t dst, uint32_t src, uint32_t imm);

enum nep_status conformance_open(struct rank *rank, const char *name, uint64_t timeout_ns,
                                 struct nep_transport **transport_p);
int window_open(struct rank *rank, struct nep_transport *transport, uint32_t number,
                size_t slot_bytes, struct window *window);
void window_close(struct nep_transport *transport, struct window *window);
/* How often announcement `i` of src came here; what was written before is visible then. */
uint32_t window_arrivals(const struct window *window, uint32_t src, uint32_t i);
uint64_t window_landing(const struct window *window, uint32_t src); /* offset of src's slot */
char *window_source(const struct window *window, uint32_t dst);     /* bytes to send to dst */
/* Waits, bounded by a minute, until it was announced. */
int window_wait(struct rank *rank, struct nep_transport *transport, const struct window *window,
                uint32_t src, uint32_t imm);
int wait_completed(struct rank *rank, struct nep_transport *transport, uint32_t dst,
                   uint64_t number);
/* Fills with numbers that follow from the key. */
void fill(char *bytes, size_t len, uint64_t key);
int barrier(struct rank *rank);

/* The body of one rank: rank->arg is a struct conformance. */
int conformance_body(struct rank *rank);

#endif
