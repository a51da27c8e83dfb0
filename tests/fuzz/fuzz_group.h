/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Three ranks in this process, two of them on one node, at a moment where all have sent an
 * operation and none has taken anything: rank 0 goes on from there, over and over, with other bytes
 * in what the others sent.
 */
#ifndef NEP_TESTS_FUZZ_GROUP_H
#define NEP_TESTS_FUZZ_GROUP_H

#include "dispatch/ep.h"

enum {
    FUZZ_RANKS = 3, /* ranks 0 and 1 on node 0, rank 2 on node 1 */
    FUZZ_TOKENS = 70,
    FUZZ_TOP_K = 2,
    FUZZ_EXPERTS = 6,
    FUZZ_HIDDEN = 16,
    FUZZ_MOMENTS = 5
};

struct fuzz_group;

/* Moment `number` (modulo FUZZ_MOMENTS) as it was; made when first asked for. */
struct fuzz_group *fuzz_group_at(uint32_t number);
struct nep_ep *fuzz_group_ep(struct fuzz_group *group);
/* Rank 0's, in the operation. */
struct nep_handle *fuzz_group_handle(struct fuzz_group *group);
/*
 * Input: patches of 3 + n bytes: an offset of two, n - 1 in four bits of one, then n bytes that
 * replace those of the message (offsets wrap at its end).
 */
void fuzz_group_patch(uint8_t *message, uint32_t bytes, const uint8_t *data, size_t len);
/*
 * Rank 0 goes as far as it gets without waiting, with outputs of exactly the size that its COUNTS
 * ask for. What the others sent is right, or the fault names one of them.
 */
void fuzz_group_go_on(struct fuzz_group *group);

#endif
