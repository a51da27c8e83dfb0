/* SPDX-License-Identifier: Apache-2.0 */
/* The states of a small model, each once, with the way to it; for breadth first search. */
#ifndef NEP_TESTS_MODEL_STATES_H
#define NEP_TESTS_MODEL_STATES_H

#include <stddef.h>
#include <stdint.h>

struct states {
    size_t bytes; /* of one; padding counts, so it is to be zeroed */
    uint8_t *all;
    uint32_t *parents;
    char (*labels)[24];
    uint32_t num, cap;
    uint32_t *table;
    uint32_t table_size;
};

/* Adds it if it is new; "rank what" says how it came out of `parent`. Ends the program when memory
 * does. */
void states_add(struct states *states, const void *state, uint32_t parent, int rank,
                const char *what);
const void *states_at(const struct states *states, uint32_t idx);
/* The steps from the first state to this one, a line each. */
void states_print_trace(const struct states *states, uint32_t idx);
void states_free(struct states *states);

#endif
