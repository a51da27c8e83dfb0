/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How far this rank's CLOCK_MONOTONIC is ahead of rank 0's, with a bound that holds, from gathers
 * alone: nobody leaves a gather before everybody has entered it. So for every gather, and every two
 * ranks, "it left" is not earlier than "the other entered"; a few of them, both ways, enclose the
 * difference. Rejected: ping and pong, which a caller's bootstrap does not have; synchronised wall
 * clocks, whose error nobody knows.
 */
#ifndef NEP_TRANSPORT_CLOCKS_H
#define NEP_TRANSPORT_CLOCKS_H

#include "nearep.h"

struct nep_clock {
    int64_t ahead_ns;  /* this rank's clock - rank 0's */
    uint64_t error_ns; /* at most so wrong at measured_ns; 0 where both read the same clock */
    uint64_t measured_ns;
};

/* Collective. Ranks of one machine read one clock: they are 0 ahead, exactly. */
enum nep_status nep_clocks_align(const struct nep_bootstrap *bootstrap, uint32_t rank,
                                 uint32_t num_ranks, uint64_t timeout_ns,
                                 struct nep_clock *clock_p);

enum { NEP_CLOCK_ROUNDS = 4 };
/* When a rank entered and left each gather, on its own clock. */
struct nep_clock_card {
    uint64_t entered_ns[NEP_CLOCK_ROUNDS];
    uint64_t left_ns[NEP_CLOCK_ROUNDS];
};
/* The arithmetic alone. */
void nep_clocks_enclose(const struct nep_clock_card *mine, const struct nep_clock_card *first,
                        struct nep_clock *clock);

#endif
