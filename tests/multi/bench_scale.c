/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What grows with the number of ranks, for one of them: R ranks as threads, 8 a node, one token
 * each. All others sleep while rank 0 is timed, so that with any number of cores it has one.
 * Prints, for each R, medians: making the ep (all ranks at once, divided by them); one look for
 * COUNTS of which one is missing; taking all of them; one step of a dispatch that waits for a tile
 * or a push. Not a test: nothing is asserted.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/clock.h"
#include "dispatch/counts.h"
#include "dispatch/recv.h"
#include "tests/multi/harness.h"

enum { G = 8, TOP_K = 8, HIDDEN = 16, OPS = 5, LOOKS = 400 };

static pthread_barrier_t meeting; /* threads sleep in it */
static uint64_t create_ns;
static double look_ns[OPS], take_ns[OPS], step_ns[OPS];

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values)
{
    qsort(values, OPS, sizeof *values, compare);
    return values[OPS / 2];
}

struct seat {
    struct nep_comm *comm;
    struct nep_ep *ep;
    struct nep_handle *handle;
    int32_t ids[TOP_K];
    uint16_t x[HIDDEN], *rows, y[HIDDEN];
    uint64_t capacity;
};

static bool open_seat(struct nep_multi_rank *rank, struct seat *seat)
{
    uint32_t sizes[NEP_MULTI_MAX_RANKS / G];
    for (uint32_t n = 0; n < rank->num_ranks / G; n++) {
        sizes[n] = G;
    }
    struct nep_comm_params params = {.size = sizeof params,
                                     .rank = rank->rank,
                                     .num_ranks = rank->num_ranks,
                                     .bootstrap = &rank->bootstrap,
                                     .ranks_per_node = sizes,
                                     .num_nodes = rank->num_ranks / G,
                                     .timeout_ns = 600 * NEP_S};
    struct nep_ep_params shape = {.size = sizeof shape,
                                  .num_experts = rank->num_ranks,
                                  .top_k = TOP_K,
                                  .hidden = HIDDEN,
                                  .max_tokens = 1};
    if (nep_comm_create(&params, &seat->comm) != NEP_OK) {
        return nep_multi_fail(rank, "%s", nep_last_message());
    }
    pthread_barrier_wait(&meeting);
    uint64_t begin_ns = nep_now_ns();
    if (nep_ep_create(seat->comm, &shape, &seat->ep) != NEP_OK ||
        nep_handle_create(seat->ep, &seat->handle) != NEP_OK ||
        nep_ep_max_rows(seat->ep, &seat->capacity) != NEP_OK) {
        return nep_multi_fail(rank, "%s", nep_last_message());
    }
    pthread_barrier_wait(&meeting);
    create_ns = rank->rank == 0 ? nep_now_ns() - begin_ns : create_ns;
    seat->rows = calloc(seat->capacity * HIDDEN, sizeof *seat->rows);
    for (uint32_t k = 0; k < TOP_K; k++) { /* eight experts on as many nodes, where there are */
        seat->ids[k] = (int32_t)((rank->rank * 7 + k * (G + 1)) % rank->num_ranks);
    }
    return true;
}

/* Every rank but the last one has sent. */
static void look(struct seat *seat, int op)
{
    bool done = false;
    uint64_t begin_ns = nep_now_ns();
    for (int i = 0; i < LOOKS; i++) {
        nep_counts_take(seat->ep, seat->handle, &done);
    }
    look_ns[op] = (double)(nep_now_ns() - begin_ns) / LOOKS;
}

/* Every rank has sent, and no other one receives yet. */
static void take(struct seat *seat, struct nep_rows *out, int op)
{
    bool done = false, progress;
    uint64_t begin_ns = nep_now_ns();
    nep_counts_take(seat->ep, seat->handle, &done);
    take_ns[op] = (double)(nep_now_ns() - begin_ns);
    seat->handle->op.out = *out;
    seat->handle->op.is_receiving = true;
    nep_recv_step(seat->ep, seat->handle, &progress, &done);
    begin_ns = nep_now_ns();
    for (int i = 0; i < LOOKS; i++) {
        nep_recv_step(seat->ep, seat->handle, &progress, &done);
    }
    step_ns[op] = (double)(nep_now_ns() - begin_ns) / LOOKS;
}

static bool run_op(struct nep_multi_rank *rank, struct seat *seat, int op)
{
    struct nep_tokens in = {
        .size = sizeof in, .num_tokens = 1, .x = seat->x, .topk_ids = seat->ids};
    struct nep_rows out = {.size = sizeof out, .x = seat->rows, .capacity = seat->capacity};
    bool is_last = rank->rank == rank->num_ranks - 1;
    enum nep_status status = NEP_OK;
    if (!is_last) {
        status = nep_dispatch_send(seat->ep, seat->handle, &in, NULL);
    }
    pthread_barrier_wait(&meeting);
    if (rank->rank == 0) {
        look(seat, op);
    }
    pthread_barrier_wait(&meeting);
    if (is_last) {
        status = nep_dispatch_send(seat->ep, seat->handle, &in, NULL);
    }
    pthread_barrier_wait(&meeting);
    if (rank->rank == 0 && status == NEP_OK) {
        take(seat, &out, op);
    }
    pthread_barrier_wait(&meeting);
    if (status == NEP_OK) {
        status = nep_dispatch_recv(seat->ep, seat->handle, &out, NULL);
    }
    pthread_barrier_wait(&meeting);
    return status == NEP_OK || nep_multi_fail(rank, "%s", nep_last_message());
}

static bool bench(struct nep_multi_rank *rank)
{
    struct seat seat = {.comm = NULL};
    bool is_good = open_seat(rank, &seat);
    for (int op = 0; op < OPS && is_good; op++) {
        is_good = run_op(rank, &seat, op);
    }
    if (rank->rank == 0 && is_good) {
        printf("%5u %10.1f %10.2f %10.2f %10.2f\n", rank->num_ranks,
               (double)create_ns / 1e6 / rank->num_ranks, median(look_ns) / 1e3,
               median(take_ns) / 1e3, median(step_ns) / 1e3);
    }
    nep_handle_destroy(seat.handle);
    nep_ep_destroy(seat.ep);
    nep_comm_destroy(seat.comm);
    free(seat.rows);
    return is_good;
}

int main(int argc, char **argv)
{
    uint32_t most = argc > 1 ? (uint32_t)atoi(argv[1]) : 256;
    printf("ranks  create, ms    look, us    take, us    step, us\n");
    for (uint32_t ranks = 2 * G; ranks <= most && ranks <= NEP_MULTI_MAX_RANKS; ranks *= 2) {
        struct nep_multi_result result;
        pthread_barrier_init(&meeting, NULL, ranks);
        nep_multi_run_threads(ranks, bench, NULL, &result);
        pthread_barrier_destroy(&meeting);
        if (result.num_failed != 0) {
            fprintf(stderr, "%s\n", result.error);
            return 1;
        }
    }
    return 0;
}
