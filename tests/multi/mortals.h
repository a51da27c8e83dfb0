/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Groups of which ranks die at moments chosen beforehand, while the others go on. A moment is a
 * place in the work of a step, not a time: before a call, at the n-th message of a kind, or when
 * the rank looks for messages the n-th time. So a test is about the same death however slow the
 * machine is, and one that is not reached fails it.
 *
 * Values are small integers, so that sums are exact in any order: every element is compared with
 * what the experts that live must give, and `present` with their weights, exactly.
 */
#ifndef NEP_TESTS_MULTI_MORTALS_H
#define NEP_TESTS_MULTI_MORTALS_H

#include "dispatch/offsets.h"
#include "tests/multi/exact.h"
#include "tests/multi/harness.h"

enum { MORTALS_MAX_RANKS = NEP_EXACT_RANKS, MORTALS_MAX_DEATHS = 4 };

/* The parts of a step, in their order. */
enum mortals_call {
    MORTALS_DISPATCH_SEND,
    MORTALS_DISPATCH_RECV,
    MORTALS_EXPERTS, /* the caller's own work between the two */
    MORTALS_COMBINE_SEND,
    MORTALS_COMBINE_RECV,
    MORTALS_AFTER
};

enum mortals_event {
    MORTALS_AT_CALL, /* before it is made */
    MORTALS_AT_PUT,  /* a message of a kind to another node */
    MORTALS_AT_LOOK  /* the call looks for messages */
};

struct mortals_moment {
    const char *name;
    enum mortals_call call; /* events are counted from its beginning to the end of the step */
    enum mortals_event event;
    enum nep_kind kind;
    uint32_t nth;         /* so many events pass first */
    uint32_t nth_of_node; /* and so many more for each other node */
    bool is_after;        /* when the message has been given to the fabric; else instead of it */
};

struct mortals_death {
    uint32_t rank;
    uint32_t step;
    struct mortals_moment moment;
};

/* Where tensors lie: the caller's own, the ep's pool, the caller's own and registered. */
enum mortals_memory { MORTALS_PRIVATE, MORTALS_POOL, MORTALS_REGISTERED };

struct mortals_plan {
    const char *intra;
    const char *inter;
    uint32_t num_nodes;
    uint32_t ranks_per_node[MORTALS_MAX_RANKS];
    uint32_t num_ranks; /* filled in */
    enum nep_layout layout;
    enum mortals_memory memory;
    bool is_threads;
    uint64_t timeout_ns;
    struct mortals_death deaths[MORTALS_MAX_DEATHS]; /* in the order of their steps */
    uint32_t num_deaths;
    uint32_t newcomer; /* seat that is taken again, UINT32_MAX: none */
    uint32_t join_step;
    bool is_renewed;     /* the group is made again before every step, nobody being lost */
    uint32_t num_tokens; /* of each rank; 0: 21 */
    uint32_t hidden;     /* 0: 64 */
    uint32_t last_step;  /* 0: 14 */
    uint32_t seconds;    /* for all of it; 0: 90 */
    char address[64];    /* filled in */
};

/* Runs it; fails the cmocka test with the first error of a rank. */
void mortals_run(struct mortals_plan plan);

/* ---- between mortals.c and mortals_step.c --------------------------------------------------- */

/* Words that the ranks share. */
enum {
    MORTALS_STEP_WORD = 0,     /* where the members are when a newcomer is let in */
    MORTALS_DEAD_WORD = 1,     /* victims that have ended */
    MORTALS_SENT_WORD = 8,     /* [deaths] ranks that have sent in the step in which one stops */
    MORTALS_TIME_WORD = 16,    /* [deaths] when */
    MORTALS_SLOWEST_WORD = 24, /* [deaths] the longest until a survivor named it, ns */
    MORTALS_NAMED_WORD = 32    /* [deaths] how many have */
};

struct mortals_tensor {
    void *base;
    size_t bytes;
    int fd;          /* where it is registered */
    uint32_t number; /* as a buffer of the ep */
};

struct mortals_seat {
    struct nep_multi_rank *rank;
    const struct mortals_plan *plan;
    struct nep_comm *comm;
    struct nep_exact exact;           /* ep, handle, tensors, who lives */
    struct mortals_tensor tensors[3]; /* x, y and rows */
    bool is_registered;
    uint32_t *source_token;
    uint32_t base_step;
    uint64_t base_op;
    uint64_t made_ns;   /* how long communicator and ep took to make */
    uint64_t failed_ns; /* when a step failed; 0: none since the last good one */
};

uint32_t mortals_number(const struct mortals_seat *seat);
bool mortals_buffers_make(struct mortals_seat *seat);
/* The ep's handle and the ep go between the two halves: registered memory outlives them. */
void mortals_buffers_free(struct mortals_seat *seat);
void mortals_registered_free(struct mortals_seat *seat);
/*
 * Registrations ended with the generation before. In every other one the memory is registered
 * again, by all alike; in those between rows must arrive all the same.
 */
bool mortals_buffers_enrol(struct mortals_seat *seat, uint64_t generation);
/* NEP_OK, a failure of the library, or 1: this rank is to stop here. */
int mortals_step_run(struct mortals_seat *seat, uint32_t step);
/* What the step left in y and present. */
bool mortals_step_check(struct mortals_seat *seat, uint32_t step);

/* Dies, if the time has come; true: a thread, which is to stop. */
bool mortals_call_begins(struct mortals_seat *seat, uint32_t step, enum mortals_call call);
/* A thread that stops is found by a deadline alone: it begins where all others have sent. */
bool mortals_expect_stop(struct mortals_seat *seat, uint32_t step);

#endif
