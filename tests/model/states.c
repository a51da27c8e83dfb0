/* SPDX-License-Identifier: Apache-2.0 */
#include "states.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t hash_of(const uint8_t *bytes, size_t num)
{
    uint64_t hash = 14695981039346656037ull;
    for (size_t i = 0; i < num; i++) {
        hash = (hash ^ bytes[i]) * 1099511628211ull;
    }
    return hash ^ hash >> 31;
}

const void *states_at(const struct states *states, uint32_t idx)
{
    return states->all + (size_t)idx * states->bytes;
}

static void grow(struct states *states)
{
    states->cap = states->cap == 0 ? 1 << 16 : 2 * states->cap;
    states->all = realloc(states->all, (size_t)states->cap * states->bytes);
    states->parents = realloc(states->parents, (size_t)states->cap * sizeof *states->parents);
    states->labels = realloc(states->labels, (size_t)states->cap * sizeof *states->labels);
    free(states->table);
    states->table_size = 4 * states->cap;
    states->table = calloc(states->table_size, sizeof *states->table);
    if (states->all == NULL || states->parents == NULL || states->labels == NULL ||
        states->table == NULL) {
        fprintf(stderr, "model: out of memory at %u states\n", states->num);
        exit(2);
    }
    for (uint32_t i = 0; i < states->num; i++) {
        uint64_t at = hash_of(states_at(states, i), states->bytes) % states->table_size;
        while (states->table[at] != 0) {
            at = (at + 1) % states->table_size;
        }
        states->table[at] = i + 1;
    }
}

void states_add(struct states *states, const void *state, uint32_t parent, int rank,
                const char *what)
{
    if (states->num == states->cap) {
        grow(states);
    }
    uint64_t at = hash_of(state, states->bytes) % states->table_size;
    for (; states->table[at] != 0; at = (at + 1) % states->table_size) {
        if (memcmp(states_at(states, states->table[at] - 1), state, states->bytes) == 0) {
            return;
        }
    }
    memcpy(states->all + (size_t)states->num * states->bytes, state, states->bytes);
    states->parents[states->num] = parent;
    snprintf(states->labels[states->num], sizeof states->labels[0], "%d %s", rank, what);
    states->table[at] = ++states->num;
}

void states_print_trace(const struct states *states, uint32_t idx)
{
    if (states->parents[idx] != idx) {
        states_print_trace(states, states->parents[idx]);
        printf("  rank %s\n", states->labels[idx]);
    }
}

void states_free(struct states *states)
{
    free(states->all);
    free(states->parents);
    free(states->labels);
    free(states->table);
}
