/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A rank with one ep and one handle on 2 nodes of 2 ranks, and a routing that every rank can
 * compute for every other: for tests that state what they expect from the routing alone.
 */
#ifndef NEP_TESTS_MULTI_SEAT_H
#define NEP_TESTS_MULTI_SEAT_H

#include "tests/multi/harness.h"

enum {
    SEAT_RANKS = 4,
    SEAT_TOKENS = 40,
    SEAT_EXPERTS = 8,
    SEAT_TOP_K = 3,
    SEAT_HIDDEN = 144,
    SEAT_ROWS = 4 * 40 * 3
};

struct seat {
    struct nep_comm *comm;
    struct nep_ep *ep;
    struct nep_handle *handle;
    int32_t ids[SEAT_TOKENS * SEAT_TOP_K];
    float weights[SEAT_TOKENS * SEAT_TOP_K];
    uint32_t source_rank[SEAT_ROWS];
    uint32_t source_token[SEAT_ROWS];
    int32_t topk_slots[SEAT_ROWS * SEAT_TOP_K];
    float topk_weights[SEAT_ROWS * SEAT_TOP_K];
};

/* A small generator, the same on every rank. */
uint32_t seat_mix(uint64_t seed, uint64_t a, uint64_t b);
/* Distinct experts, -1 now and then. */
void seat_route(uint64_t seed, uint32_t rank, int32_t *ids, float *weights);
/* Fills in the shape's numbers; false after nep_multi_fail. */
bool seat_open(struct nep_multi_rank *rank, const struct nep_ep_params *params, struct seat *seat);
void seat_close(struct seat *seat);
struct nep_tokens seat_tokens(struct seat *seat, const void *x, const void *scales);
struct nep_rows seat_rows(struct seat *seat, void *x, void *scales);
/* Runs fn as all ranks, threads or processes; fails the test with the first error. */
void seat_run(nep_multi_fn fn, void *arg);
void seat_run_processes(nep_multi_fn fn, void *arg);

#endif
