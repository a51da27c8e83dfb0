/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nep-perf ep inside an MPI job: nearep and the baseline in alternating blocks of the same ranks,
 * each pair in the other order than the one before, so that a machine that drifts drifts for both.
 * The rates of memory are taken between the pairs, by all ranks at once.
 */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "base/clock.h"
#include "base/config.h"
#include "perftest/mpi_baseline.h"
#include "perftest/perf.h"
#include "perftest/results.h"

static int mpi_allgather(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns)
{
    (void)ctx;
    (void)timeout_ns; /* MPI has no deadlines: a lost rank ends the job */
    return MPI_Allgather(in, (int)bytes, MPI_BYTE, out, (int)bytes, MPI_BYTE, MPI_COMM_WORLD) !=
           MPI_SUCCESS;
}

static bool mpi_barrier(struct nep_perf_seat *seat)
{
    (void)seat;
    return MPI_Barrier(MPI_COMM_WORLD) == MPI_SUCCESS;
}

/*
 * Between hosts the last rank of a part ends tens of milliseconds after the first. MPI_Barrier
 * polls sockets all that time, yields or not, on the cores by which the last ranks' bytes come: it
 * took 20 to 60 ms from both sides. So those that are done sleep here, for either side.
 */
static bool mpi_barrier_asleep(struct nep_perf_seat *seat)
{
    enum { POLLS_BEFORE_SLEEP = 20, SLEEP_NS = 100000 };
    MPI_Request request;
    int is_over = 0;
    (void)seat;
    bool is_fine = MPI_Ibarrier(MPI_COMM_WORLD, &request) == MPI_SUCCESS;
    for (uint32_t i = 0; is_fine; i++) {
        is_fine = MPI_Test(&request, &is_over, MPI_STATUS_IGNORE) == MPI_SUCCESS;
        if (is_over) {
            break;
        }
        if (i >= POLLS_BEFORE_SLEEP) {
            nanosleep(&(struct timespec){.tv_nsec = SLEEP_NS}, NULL);
        }
    }
    return is_fine;
}

/* One pass over 64 MiB by all ranks at once, read and written; adds this rank's share. */
static void measure_rates(struct nep_perf_seat *seat, uint64_t *memory, size_t words,
                          double rates[2])
{
    const struct nep_perf_kernels *kernels = nep_perf_kernels();
    static const size_t row_words = 1792; /* 14 KiB, as a row of hidden 7168 */
    uint64_t *row = calloc(row_words, sizeof(*row));
    if (row == NULL) {
        return;
    }
    nep_ref_gen_row(seat->rank, false, NEP_DTYPE_FP32, (uint32_t)row_words * 2, row);
    for (int what = 0; what < 2; what++) {
        MPI_Barrier(MPI_COMM_WORLD);
        uint64_t start_ns = nep_now_ns();
        if (what == 0) {
            volatile uint64_t keep = kernels->read(memory, words);
            (void)keep;
        } else {
            kernels->fill(memory, words, row, row_words);
        }
        MPI_Barrier(MPI_COMM_WORLD);
        rates[what] += (double)(words * sizeof(*memory)) * 1e9 / (double)(nep_now_ns() - start_ns);
    }
    free(row);
}

static int run_pairs(struct nep_perf_rank *rank, struct nep_perf_mpi *mpi,
                     struct nep_perf_baseline *baseline)
{
    const struct nep_perf_options *options = &rank->options;
    size_t words = (size_t)8 << 20;
    uint64_t *memory = aligned_alloc(4096, words * sizeof(*memory));
    if (memory == NULL) {
        return nep_perf_error(NEP_PERF_FAILED, "out of memory");
    }
    memset(memory, 1, words * sizeof(*memory));
    double rates[2] = {0.0, 0.0};
    int rc = -1;
    uint32_t warmup = options->warmup;
    for (uint32_t pair = 0; pair < options->pairs && rc == -1; pair++) {
        measure_rates(rank->seat, memory, words, rates);
        for (uint32_t half = 0; half < 2 && rc == -1; half++) {
            bool is_own = (pair + half) % 2 == 0;
            rc = is_own ? nep_perf_rank_block(rank, warmup, options->iters)
                        : nep_perf_mpi_block(mpi, warmup, options->iters);
        }
        warmup = options->warmup < 2 ? options->warmup : 2;
    }
    free(memory);
    baseline->read_rate = rates[0] / options->pairs;
    baseline->write_rate = rates[1] / options->pairs;
    return rc;
}

static int run_baseline(struct nep_perf_rank *rank)
{
    const struct nep_perf_options *options = &rank->options;
    if (options->dtype != NEP_DTYPE_BF16 || options->is_padded || options->outstanding != 1) {
        return nep_perf_error(NEP_PERF_USAGE, "--baseline mpi is bf16, packed, one operation at a "
                                              "time");
    }
    struct nep_perf_mpi *mpi = nep_perf_mpi_create(rank);
    struct nep_perf_baseline baseline = {.name = "MPI_Alltoallv, one row per (token, rank)",
                                         .pairs = options->pairs};
    int rc = run_pairs(rank, mpi, &baseline);
    if (rc == -1) {
        nep_perf_mpi_results(mpi, &baseline);
        rc = nep_perf_results(rank, &baseline);
    }
    nep_perf_mpi_destroy(mpi);
    return rc;
}

static int run_in_job(const struct nep_perf_options *given)
{
    struct nep_perf_options options = *given;
    struct nep_config config;
    if (nep_config_load(&config) != NEP_OK) {
        return nep_perf_error(NEP_PERF_USAGE, "%s", nep_last_message());
    }
    struct nep_perf_seat seat = {.timeout_ns = config.timeout_ns, .barrier = mpi_barrier};
    int rank;
    int size;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    seat.rank = (uint32_t)rank;
    seat.num_ranks = (uint32_t)size;
    seat.bootstrap =
        (struct nep_bootstrap){.size = sizeof(seat.bootstrap), .allgather = mpi_allgather};
    if (options.has_ranks && options.num_ranks != seat.num_ranks) {
        return nep_perf_error(NEP_PERF_USAGE, "--ranks is %u, but mpirun started %u",
                              options.num_ranks, seat.num_ranks);
    }
    int rc = options.has_nodes ? nep_perf_options_nodes(&options, seat.num_ranks) : -1;
    if (rc != -1) {
        return rc;
    }
    struct nep_perf_rank state;
    rc = nep_perf_rank_create(&options, &seat, &state);
    seat.barrier = state.topology.num_nodes > 1 ? mpi_barrier_asleep : mpi_barrier;
    if (rc == -1) {
        rc = run_baseline(&state);
    }
    MPI_Barrier(MPI_COMM_WORLD);
    nep_perf_rank_destroy(&state);
    return rc;
}

static int run_mpi(const struct nep_perf_options *options)
{
    MPI_Init(NULL, NULL);
    int rc = run_in_job(options);
    if (rc != NEP_PERF_OK) {
        /* Others may wait in a collective for this rank. */
        MPI_Abort(MPI_COMM_WORLD, rc);
    }
    MPI_Finalize();
    return rc;
}

int (*const nep_perf_run_mpi)(const struct nep_perf_options *options) = run_mpi;
