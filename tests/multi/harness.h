/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs one function as every rank of a group: as threads of this process, or as forked processes.
 * Both come with an allgather and a barrier in shared memory, so that tests of the engine do not
 * depend on the rendezvous (which has tests of its own).
 */
#ifndef NEP_TESTS_MULTI_HARNESS_H
#define NEP_TESTS_MULTI_HARNESS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#include "nearep.h"

#define NEP_MULTI_MAX_RANKS    1024
#define NEP_MULTI_GATHER_BYTES 4096

struct nep_multi_shared; /* barrier, gather and first error; in memory that all ranks share */

struct nep_multi_rank {
    uint32_t rank;
    uint32_t num_ranks;
    struct nep_bootstrap bootstrap;
    struct nep_multi_shared *shared;
    void *arg;
};

/* Returns false after nep_multi_fail. */
typedef bool (*nep_multi_fn)(struct nep_multi_rank *rank);

struct nep_multi_result {
    uint32_t num_failed;
    char error[640]; /* of the first rank that failed */
};

void nep_multi_run_threads(uint32_t num_ranks, nep_multi_fn fn, void *arg,
                           struct nep_multi_result *result);
/* timeout_s: then all are killed and that is the error. */
void nep_multi_run_processes(uint32_t num_ranks, nep_multi_fn fn, void *arg, uint32_t timeout_s,
                             struct nep_multi_result *result);

/* A group of its own for some ranks: memory to be made before the ranks start, one seat a rank. */
struct nep_multi_shared *nep_multi_shared_create(void);
void nep_multi_shared_destroy(struct nep_multi_shared *shared);
void nep_multi_seat(struct nep_multi_rank *seat, uint32_t number, uint32_t num_ranks,
                    struct nep_multi_shared *shared, void *arg);

/* Records the first error of the group; always false. */
bool nep_multi_fail(struct nep_multi_rank *rank, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
/* false when a rank failed meanwhile or 120 s passed. */
bool nep_multi_barrier(struct nep_multi_rank *rank);
/* Words that all ranks share, for tests that have to tell each other something. */
_Atomic uint64_t *nep_multi_words(struct nep_multi_rank *rank); /* [64] */

/*
 * A rendezvous in a process of its own, for tests that fork ranks: with a server's thread beside
 * the fork they may inherit a lock of the allocator that nobody will release. -1: it did not start.
 */
struct nep_rendezvous_params;
pid_t nep_multi_serve(const struct nep_rendezvous_params *params, uint16_t *port_p);
void nep_multi_serve_end(pid_t pid);

/* The map whose text was written into a tmpfile(), which is closed. NULL: said why on stderr. */
struct nep_map *nep_multi_map_read(FILE *text);

/* NEP_TEST_SEED or one from the clock; printed. */
uint64_t nep_multi_seed(const char *test);
/* NEP_TEST_SCALE in percent of the default amount of random work; 100. */
uint64_t nep_multi_scaled(uint64_t amount);

#endif
