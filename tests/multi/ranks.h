/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Several ranks in one test: forked processes or threads, with a bootstrap in shared memory. A rank
 * that does not come back in time is killed (a thread: the program is), so a test never hangs.
 *
 * A rank's function must not use cmocka's assertions, which jump back into the parent's test: it
 * uses RANK_CHECK, which prints and returns 1.
 */
#ifndef NEP_TESTS_RANKS_H
#define NEP_TESTS_RANKS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "nearep.h"

/* ThreadSanitizer sees what one process does; what orders two processes would be races to it. */
#ifdef __SANITIZE_THREAD__
#define RANKS_ONLY_THREADS true
#else
#define RANKS_ONLY_THREADS false
#endif

enum { RANKS_MAX = 64, RANKS_SCRATCH = 1 << 16 };

struct ranks_params {
    const uint32_t *ranks_per_node; /* [num_nodes] */
    uint32_t num_nodes;
    bool threads;       /* else processes */
    uint32_t seconds;   /* after which ranks are killed */
    uint32_t num_spare; /* the last that many ranks may die: their fate is not checked */
};

struct rank {
    uint32_t rank;
    uint32_t num_ranks;
    struct nep_bootstrap bootstrap; /* allgather only */
    struct nep_topology topology;
    void *scratch; /* RANKS_SCRATCH bytes, zeroed, shared by all ranks */
    void *arg;
};

typedef int (*rank_fn)(struct rank *rank);

/* Runs fn on every rank; returns how many did not return 0 (spare ones apart). */
int ranks_run(const struct ranks_params *params, rank_fn fn, void *arg);

/* A seed from the system, printed; NEP_TEST_SEED repeats one. */
uint64_t ranks_seed(const char *test);

/* Pseudo-random numbers (splitmix64, Steele et al.): the same in every process. */
static inline uint64_t rank_random(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

#define RANK_CHECK(rank_ptr, condition, ...)                                                       \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: rank %u: %s is false: ", __FILE__, __LINE__, (rank_ptr)->rank, \
                    #condition);                                                                   \
            fprintf(stderr, __VA_ARGS__);                                                          \
            fprintf(stderr, "\n");                                                                 \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

#endif
