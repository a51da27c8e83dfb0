/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One rank's place in the job: barriers and gathers of the benchmark itself, and the bootstrap that
 * the library gets. Ranks meet in memory (spawned processes, threads), through the built-in
 * rendezvous (torchrun, mpirun, srun), or through MPI (nep-perf-mpi).
 */
#ifndef NEP_PERFTEST_SEAT_H
#define NEP_PERFTEST_SEAT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nearep.h"

/* In memory that all local ranks share. Zeroed at the start. */
struct nep_perf_control {
    _Atomic uint32_t arrived;
    _Atomic uint32_t round;
    _Atomic uint32_t is_serving;      /* the rendezvous listens */
    _Atomic uint32_t failed;          /* somebody failed: barriers return */
    _Atomic uint32_t lost_rank;       /* rank + 1 that the parent saw end, or 0 */
    _Atomic uint32_t reported;        /* the first to report sets it */
    const void *_Atomic gather[1024]; /* threads only: what each rank brings */
    /* --on-fault continue: how far each rank is, and whom the parent saw end */
    _Atomic uint64_t round_of[1024];
    _Atomic uint32_t is_gone[1024];
};

struct nep_perf_seat {
    uint32_t rank;
    uint32_t num_ranks;
    uint64_t timeout_ns;
    struct nep_bootstrap bootstrap;
    struct nep_perf_control *control; /* NULL under a launcher */
    /* false: somebody is gone, or the deadline passed; said already. */
    bool (*barrier)(struct nep_perf_seat *seat);
    void *ctx;
    /* --on-fault continue alone */
    const uint8_t *is_live; /* [num_ranks], of the library; NULL: all */
    uint64_t round;
    uint64_t num_gathers;
    bool must_recover; /* a barrier ended because somebody is gone */
};

/* Seats over the control block; threads: gathers too. */
void nep_perf_seat_memory(struct nep_perf_seat *seat, struct nep_perf_control *control,
                          uint32_t rank, uint32_t num_ranks, uint64_t timeout_ns);
/* The same for ranks that go on without those that are lost: barriers count who lives, and gathers
 * go through the store of the bootstrap. */
void nep_perf_seat_survive(struct nep_perf_seat *seat);
/* The members have changed; generation of the library. */
void nep_perf_seat_renew(struct nep_perf_seat *seat, uint64_t generation, const uint8_t *is_live);
/* allgather through the store; nothing comes from who is lost. */
bool nep_perf_seat_store_gather(struct nep_perf_seat *seat, const void *in, void *out,
                                size_t bytes);
/* The one that speaks for all: the lowest that lives. */
bool nep_perf_seat_is_first(const struct nep_perf_seat *seat);
/* bytes of every rank to every rank; false: said already. */
bool nep_perf_seat_allgather(struct nep_perf_seat *seat, const void *in, void *out, size_t bytes);
/* allgather in process memory: the bootstrap of ranks that are threads. */
int nep_perf_threads_allgather(void *ctx, const void *in, void *out, size_t bytes,
                               uint64_t timeout_ns);
/* A barrier that is an allgather of nothing much: for launchers. */
bool nep_perf_seat_gather_barrier(struct nep_perf_seat *seat);

#endif
