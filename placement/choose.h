/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which physical copy of each chosen expert a token goes to. Pure arithmetic on a table; the same
 * text compiles for host and device; the same inputs give the same answer everywhere.
 *
 * Order of preference: a copy on the home rank; else on the home node; else on a node that this
 * token visits anyway (greedy cover: fewest remote nodes; ties between nodes by a hash of (source
 * rank, token)). Several copies equal under that rule share the tokens by a hash of (source rank,
 * token, expert) against the map's weights.
 */
#ifndef NEP_PLACEMENT_CHOOSE_H
#define NEP_PLACEMENT_CHOOSE_H

#include <stdint.h>

#define NEP_SLOT_NONE UINT32_MAX

/* One layer of a map, flattened. Copies of expert e: slot[begin[e]] .. slot[begin[e + 1] - 1],
 * ascending. */
struct nep_copies {
    uint32_t num_experts;
    uint32_t num_ranks;
    uint32_t num_nodes;
    uint32_t slots_per_rank;
    const uint32_t *begin;        /* [num_experts + 1] */
    const uint32_t *slot;         /* physical slot: rank * slots_per_rank + local slot */
    const uint32_t *node;         /* beside slot: node_of_rank[slot / slots_per_rank] */
    const uint16_t *weight;       /* beside slot, 1 to 65535 */
    const uint32_t *node_of_rank; /* [num_ranks] */
    int is_single;                /* every expert has one copy: no choice to make */
};

/*
 * ids: [k] logical experts, -1 = unused. slots: [k] physical slots, NEP_SLOT_NONE where unused. k
 * <= 32. ids are in range (the caller checked). source: the rank that holds the token. The device
 * compiles the same text from placement/choose_impl.h, as nep_choose_one.
 */
void nep_choose(const struct nep_copies *copies, uint32_t source, uint32_t token,
                const int32_t *ids, uint32_t k, uint32_t *slots);

#endif
