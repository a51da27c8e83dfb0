/* SPDX-License-Identifier: Apache-2.0 */
/* One rank of nep-perf ep: its objects of the library, its buffers, blocks of iterations. */
#ifndef NEP_PERFTEST_RANK_H
#define NEP_PERFTEST_RANK_H

#include "nearep.h"
#include "perftest/options.h"
#include "perftest/plan.h"
#include "perftest/seat.h"
#include "tests/ref/ref.h"

struct nep_perf_sample {
    uint64_t dispatch_ns;
    uint64_t combine_ns;
};

/* Tensors of one operation in flight. */
struct nep_perf_lane {
    struct nep_handle *handle;
    void *x;
    int32_t *ids;
    float *weights;
    struct nep_rows rows;
    void *expert; /* what combine reads: rows.x itself where the type is the same */
    void *y;
    struct nep_counts counts;
    uint64_t batch;
    uint32_t num_tokens;
};

struct nep_perf_gpu;

struct nep_perf_rank {
    struct nep_perf_options options; /* own copy: a trace sets E and K */
    struct nep_perf_seat *seat;
    struct nep_comm *comm;
    struct nep_topology topology;
    struct nep_perf_plan *plan;
    struct nep_ep *ep;
    struct nep_perf_lane lanes[8];
    uint64_t *request_keys;          /* [T] with --record, else NULL */
    struct nep_perf_gpu *gpu;        /* NULL: tokens are in host memory */
    uint64_t capacity;               /* output rows */
    struct nep_perf_sample *samples; /* of all timed iterations so far */
    uint64_t num_samples;
    uint64_t most_samples;
    struct nep_stats stats; /* summed over timed parts */
    struct nep_ref_report report;
    struct nep_ref_traffic traffic; /* of timed iterations, by the oracle */
    uint64_t *pairs;                /* [layers][R] where (token, expert) pairs landed */
    uint64_t digest;
    uint64_t rows_moved; /* output rows of timed iterations */
    /* --on-fault continue: which iteration began with which operation */
    bool is_blind; /* copies are chosen anew: elements are compared no more */
    uint32_t base_iteration;
    uint64_t base_op;
    uint32_t num_recoveries;
    uint64_t recover_ns; /* in nep_comm_recover */
    uint64_t lost_ns;    /* when this rank noticed the last loss; 0: it is over */
    uint64_t outage_ns;  /* from noticing to the end of the first good iteration, the longest */
};

/* Instead of an exit status: a rank is lost, and the others are to go on. */
enum { NEP_PERF_RECOVER = -2 };

/* Exit status, or -1: go on; failures are said. Collective. */
int nep_perf_rank_create(const struct nep_perf_options *options, struct nep_perf_seat *seat,
                         struct nep_perf_rank *rank);
void nep_perf_rank_destroy(struct nep_perf_rank *rank);
/* A call failed: NEP_PERF_RECOVER, or said and an exit status. */
int nep_perf_trouble(struct nep_perf_rank *rank, const char *what);
int nep_perf_fail(struct nep_perf_rank *rank, const char *what);
/* Goes on with those who live; *iteration_p: the one to be done again. -1 or an exit status. */
int nep_perf_rank_recover(struct nep_perf_rank *rank, uint32_t *iteration_p);
/* Tensors of before a recovery are private: new ones from the pool. */
int nep_perf_rank_renew_tensors(struct nep_perf_rank *rank);
/* warmup + iters iterations; the timed ones are appended to samples. */
int nep_perf_rank_block(struct nep_perf_rank *rank, uint32_t warmup, uint32_t iters);
/* Everything of a rank: create, a block, results, destroy. Exit status. */
int nep_perf_rank_main(const struct nep_perf_options *options, struct nep_perf_seat *seat);

/* --record: from before the first iteration, and the trace at the end. Exit status, or -1: go on.
 */
int nep_perf_record_start(struct nep_perf_rank *rank);
int nep_perf_record_save(struct nep_perf_rank *rank);

/* Writes the counters where --metrics says. Exit status, or -1: go on. */
int nep_perf_metrics(struct nep_perf_rank *rank);

#endif
