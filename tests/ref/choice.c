/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The choice of a copy, stated as rules that any answer must obey, found by trying everything:
 *  1. a choice is a copy of its expert;
 *  2. an expert with a copy on the home rank goes there; else one with a copy on the home node;
 *  3. the others visit few remote nodes: greedy covers within H(n) of the fewest (Chvatal 1979),
 *     and exactly the fewest when one node is enough;
 *  4. no expert goes to a node of its own when a node that the token visits anyway has a copy.
 * Weights and hashes decide only what these leave open, so they are not restated here.
 */
#include "tests/ref/ref.h"

static uint32_t node_of_slot(const struct nep_ref_copies *copies, uint32_t slot)
{
    return copies->node_of_rank[slot / copies->slots_per_rank];
}

static bool has_copy_on_node(const struct nep_ref_copies *copies, int32_t expert, uint32_t node)
{
    for (uint32_t i = copies->begin[expert]; i < copies->begin[expert + 1]; i++) {
        if (node_of_slot(copies, copies->slot[i]) == node) {
            return true;
        }
    }
    return false;
}

static bool has_copy_on_rank(const struct nep_ref_copies *copies, int32_t expert, uint32_t rank)
{
    for (uint32_t i = copies->begin[expert]; i < copies->begin[expert + 1]; i++) {
        if (copies->slot[i] / copies->slots_per_rank == rank) {
            return true;
        }
    }
    return false;
}

static bool is_copy(const struct nep_ref_copies *copies, int32_t expert, uint32_t slot)
{
    for (uint32_t i = copies->begin[expert]; i < copies->begin[expert + 1]; i++) {
        if (copies->slot[i] == slot) {
            return true;
        }
    }
    return false;
}

/* Rules 1 and 2. *remote_p: the choice had to leave the home node. */
static const char *check_one(const struct nep_ref_copies *copies, uint32_t source, int32_t expert,
                             uint32_t slot, bool *remote_p)
{
    *remote_p = false;
    if (expert < 0) {
        return slot == NEP_REF_NONE ? NULL : "an unused id got a slot";
    }
    if (slot == NEP_REF_NONE || !is_copy(copies, expert, slot)) {
        return "the slot holds no copy of the expert";
    }
    if (has_copy_on_rank(copies, expert, source)) {
        return slot / copies->slots_per_rank == source ? NULL
                                                       : "a copy on the home rank was passed over";
    }
    uint32_t home = copies->node_of_rank[source];
    if (has_copy_on_node(copies, expert, home)) {
        return node_of_slot(copies, slot) == home ? NULL
                                                  : "a copy on the home node was passed over";
    }
    *remote_p = true;
    return NULL;
}

/* The fewest nodes that hold a copy of each of the experts, by trying every set of nodes. */
static uint32_t fewest_nodes(const struct nep_ref_copies *copies, const int32_t *experts,
                             uint32_t num)
{
    uint32_t best = num;
    for (uint32_t set = 0; set < 1u << copies->num_nodes; set++) {
        uint32_t size = (uint32_t)__builtin_popcount(set);
        bool covers = size < best;
        for (uint32_t i = 0; i < num && covers; i++) {
            bool has = false;
            for (uint32_t node = 0; node < copies->num_nodes && !has; node++) {
                has = (set >> node & 1) != 0 && has_copy_on_node(copies, experts[i], node);
            }
            covers = has;
        }
        if (covers) {
            best = size;
        }
    }
    return best;
}

/* Rules 3 and 4 over the choices that left the node. */
static const char *check_remote(const struct nep_ref_copies *copies, const int32_t *experts,
                                const uint32_t *nodes, uint32_t num)
{
    uint64_t visited[16] = {0}; /* up to 1024 nodes */
    uint32_t used = 0;
    for (uint32_t i = 0; i < num; i++) {
        used += (visited[nodes[i] / 64] >> (nodes[i] % 64) & 1) == 0;
        visited[nodes[i] / 64] |= 1ull << (nodes[i] % 64);
    }
    for (uint32_t i = 0; i < num; i++) {
        uint32_t sharing = 0;
        for (uint32_t j = 0; j < num; j++) {
            sharing += nodes[j] == nodes[i];
        }
        for (uint32_t j = 0; j < num && sharing == 1; j++) {
            if (nodes[j] != nodes[i] && has_copy_on_node(copies, experts[i], nodes[j])) {
                return "a node of its own, although a visited node has a copy";
            }
        }
    }
    if (copies->num_nodes > 12 || num == 0) {
        return NULL;
    }
    uint32_t fewest = fewest_nodes(copies, experts, num);
    double harmonic = 0.0;
    for (uint32_t i = 1; i <= num; i++) {
        harmonic += 1.0 / i;
    }
    if (used > fewest * harmonic || (fewest == 1 && used > 1)) {
        return "more remote nodes than a greedy cover can need";
    }
    return NULL;
}

const char *nep_ref_choice_check(const struct nep_ref_copies *copies, uint32_t source,
                                 const int32_t *ids, uint32_t k, const uint32_t *slots)
{
    int32_t experts[32];
    uint32_t nodes[32];
    uint32_t num = 0;
    for (uint32_t i = 0; i < k; i++) {
        bool is_remote;
        const char *broken = check_one(copies, source, ids[i], slots[i], &is_remote);
        if (broken != NULL) {
            return broken;
        }
        if (is_remote) {
            experts[num] = ids[i];
            nodes[num++] = node_of_slot(copies, slots[i]);
        }
    }
    return check_remote(copies, experts, nodes, num);
}
