/* SPDX-License-Identifier: Apache-2.0 */
/*
 * usage: gpu_check refusal
 *        gpu_check random threads|processes RANKS SEED COUNT [NODES]
 *        gpu_check faults threads|processes
 * refusal: says what this machine lacks, and passes where it lacks a GPU and the library says so.
 * random: COUNT shapes, three rounds each (the third from the slots that the handle holds), on one
 * node or emulated ones of equal size.
 * faults: a rank that does not come, an output that is too small, an id that does not exist, a slot
 * with too many rows, and with processes a rank killed between its kernels.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/gpu_case.h"

enum { MAX_BYTES = 96 << 20 };

struct job {
    uint64_t seed;
    uint32_t count;
};

/* The i-th shape of a seed, of a bearable size. */
static struct gpu_shape shape_of(const struct job *job, uint32_t i, const struct gpu_world *world)
{
    uint64_t key = nep_ref_mix(job->seed, i);
    uint64_t most = world->num_nodes > 1 ? MAX_BYTES / 8 : MAX_BYTES;
    struct gpu_shape shape = gpu_shape_random(key, world->num_ranks);
    while (gpu_shape_bytes(&shape) > most) {
        shape = gpu_shape_random(++key, world->num_ranks);
    }
    shape.num_nodes = world->num_nodes;
    if (world->num_nodes > 1) { /* what is refused there; few SMs, for the CPU that may run this */
        shape.has_weights_late = false;
        shape.num_sms = 1 + shape.num_sms % 4;
        if (i % 2 != 0) {
            shape.is_overlapped = true;
            shape.is_graph = false;
        }
        if (i % 4 > 1) { /* more tiles than there are slots */
            shape.max_tokens += 900;
            shape.hidden = shape.hidden > 128 ? 128 : shape.hidden;
            shape.top_k = shape.top_k > 6 ? 6 : shape.top_k;
            shape.num_sms += 1;
            shape.slots_per_rank = shape.slots_per_rank > 4 ? 4 : shape.slots_per_rank;
            shape.num_experts = shape.slots_per_rank * shape.num_ranks;
        }
    }
    return shape;
}

static uint64_t run_random(struct gpu_world *world, void *ctx)
{
    const struct job *job = ctx;
    uint64_t wrong = 0;
    for (uint32_t i = 0; i < job->count; i++) {
        struct gpu_shape shape = shape_of(job, i, world);
        struct gpu_case *c = gpu_case_create(world, &shape);
        uint64_t here = 0;
        for (uint64_t round = 0; round < 3; round++) {
            if (round == 2) { /* the same routing again, from the handle */
                c->in.topk_ids = NULL;
            }
            here += gpu_case_round(c, round < 2 ? round : 1);
        }
        if (here != 0) {
            printf("rank %u: %llu wrong in case %u: ", world->rank, (unsigned long long)here, i);
            gpu_shape_print(&shape);
        }
        wrong += here;
        gpu_case_destroy(c);
    }
    return wrong;
}

static int check_random(bool as_processes, uint32_t num_ranks, uint32_t num_nodes, uint64_t seed,
                        uint32_t count)
{
    struct job job = {seed, count};
    uint64_t wrong = gpu_world_run(num_ranks, num_nodes, as_processes, 0, run_random, &job);
    printf("random: %u ranks on %u nodes as %s, seed %llu, %u shapes of 3 rounds: %llu wrong\n",
           num_ranks, num_nodes, as_processes ? "processes" : "threads", (unsigned long long)seed,
           count, (unsigned long long)wrong);
    return wrong != 0;
}

/* ---- faults --------------------------------------------------------------------------------- */

static struct gpu_shape small_shape(uint32_t num_ranks)
{
    return (struct gpu_shape){.key = 5,
                              .num_ranks = num_ranks,
                              .slots_per_rank = 4,
                              .num_experts = 4 * num_ranks,
                              .top_k = 4,
                              .hidden = 256,
                              .max_tokens = 64,
                              .num_sms = 4,
                              .layout = NEP_LAYOUT_RANK,
                              .dtype = NEP_DTYPE_BF16,
                              .wire = NEP_DTYPE_BF16,
                              .is_full = true};
}

/* The communicator says why, within a bound; what it says names the rank and holds the words. */
static uint64_t expect(struct gpu_case *c, enum nep_status status, uint32_t rank, const char *words,
                       const char *what)
{
    struct nep_fault fault;
    gpu_must((int)cudaStreamSynchronize(c->world->stream), what);
    gpu_must_nep(nep_comm_fault(c->world->comm, &fault), what);
    bool is_right =
        fault.status == status && fault.rank == rank && strstr(fault.message, words) != NULL &&
        nep_dispatch(c->ep, c->handle, &c->in, &c->out, c->world->stream) == NEP_ERR_BROKEN;
    if (!is_right) {
        printf("rank %u, %s: %s, rank %u: %s; must be %s, rank %u, with \"%s\"; then: %s\n",
               c->world->rank, what, nep_status_name(fault.status), fault.rank, fault.message,
               nep_status_name(status), rank, words, nep_last_message());
    }
    return !is_right;
}

/* The last rank does not come: the others give up and name it; graphs replayed after that end at
 * once. */
static uint64_t check_absent(struct gpu_world *world)
{
    struct gpu_shape shape = small_shape(world->num_ranks);
    struct gpu_case *c = gpu_case_create(world, &shape);
    uint64_t wrong = 0;
    uint32_t absent = world->num_ranks - 1;
    gpu_case_draw(c, 0);
    if (world->rank != absent) {
        cudaGraph_t graph = NULL;
        cudaGraphExec_t exec = NULL;
        struct CUstream_st *stream = world->stream;
        gpu_must((int)cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
        gpu_case_dispatch(c);
        gpu_case_combine(c);
        gpu_must((int)cudaStreamEndCapture(stream, &graph), "capture");
        gpu_must((int)cudaGraphInstantiate(&exec, graph, 0), "graph");
        for (uint32_t i = 0; i < 200; i++) { /* 300 ms each, if each waited */
            gpu_must((int)cudaGraphLaunch(exec, stream), "graph");
        }
        wrong += expect(c, NEP_ERR_TIMEOUT, absent, "of rank", "a rank is absent");
        cudaGraphExecDestroy(exec);
        cudaGraphDestroy(graph);
    }
    gpu_case_destroy(c);
    return wrong;
}

/* The last rank's output is one row short: every rank says so, and nothing is written. */
static uint64_t check_overflow(struct gpu_world *world)
{
    struct gpu_shape shape = small_shape(world->num_ranks);
    struct gpu_case *c = gpu_case_create(world, &shape);
    uint32_t last = world->num_ranks - 1;
    gpu_case_draw(c, 0);
    if (world->rank == last) {
        c->out.capacity = c->want[last].num_rows - 1;
    }
    gpu_case_dispatch(c);
    uint64_t wrong = expect(c, NEP_ERR_OVERFLOW, last, "too small", "output too small");
    uint32_t row[128];
    cudaMemcpy(row, c->out.x, sizeof row, cudaMemcpyDeviceToHost);
    for (uint32_t i = 0; i < 128; i++) {
        wrong += row[i] != 0xeeeeeeeeu;
    }
    gpu_case_destroy(c);
    return wrong;
}

/* The same, found by the host, which knows the counts: nothing is lost. */
static uint64_t check_overflow_counted(struct gpu_world *world)
{
    struct gpu_shape shape = small_shape(world->num_ranks);
    struct gpu_case *c = gpu_case_create(world, &shape);
    struct nep_counts counts;
    void *stream = world->stream;
    gpu_case_draw(c, 0);
    gpu_must_nep(nep_dispatch_send(c->ep, c->handle, &c->in, stream), "send");
    gpu_must_nep(nep_dispatch_counts(c->ep, c->handle, &counts), "counts");
    c->out.capacity = counts.num_rows - 1;
    enum nep_status status = nep_dispatch_recv(c->ep, c->handle, &c->out, stream);
    uint64_t wrong = status != NEP_ERR_OVERFLOW;
    c->out.capacity = counts.num_rows;
    gpu_must_nep(nep_dispatch_recv(c->ep, c->handle, &c->out, stream), "recv");
    wrong += gpu_case_check_dispatch(c);
    if (wrong != 0) {
        printf("rank %u: one row short, after counts: %s\n", world->rank, nep_status_name(status));
    }
    gpu_case_destroy(c);
    return wrong;
}

/* An id out of range is named by token and k there, and by its rank elsewhere. */
static uint64_t check_bad_id(struct gpu_world *world)
{
    struct gpu_shape shape = small_shape(world->num_ranks);
    struct gpu_case *c = gpu_case_create(world, &shape);
    const int32_t bad = (int32_t)shape.num_experts;
    uint64_t wrong = 0;
    gpu_case_draw(c, 0);
    if (world->rank == 0) {
        cudaMemcpy((int32_t *)c->ids_device + 77, &bad, 4, cudaMemcpyHostToDevice);
    }
    gpu_case_dispatch(c);
    wrong += expect(c, NEP_ERR_INVALID, 0, world->rank == 0 ? "token 19, k 1" : "rank 0 has an id",
                    "an id that does not exist");
    gpu_case_destroy(c);
    return wrong;
}

/* Padded layout, every id the same: more rows for a slot than a source has room for. */
static uint64_t check_crowded(struct gpu_world *world)
{
    struct gpu_shape shape = small_shape(world->num_ranks);
    shape.layout = NEP_LAYOUT_EXPERT_PADDED;
    struct gpu_case *c = gpu_case_create(world, &shape);
    gpu_case_draw(c, 0);
    cudaMemset(c->ids_device, 0, shape.max_tokens * shape.top_k * 4);
    cudaDeviceSynchronize();
    gpu_world_meet(world);
    gpu_case_dispatch(c);
    uint64_t wrong = expect(c, NEP_ERR_INVALID, 0, "names an expert twice", "a crowded slot");
    gpu_case_destroy(c);
    return wrong;
}

/* One rank is killed between dispatch and combine: the others say that it is missing. */
static uint64_t check_killed(struct gpu_world *world)
{
    struct gpu_shape shape = small_shape(world->num_ranks);
    struct gpu_case *c = gpu_case_create(world, &shape);
    uint32_t last = world->num_ranks - 1;
    gpu_case_draw(c, 0);
    gpu_case_dispatch(c);
    uint64_t wrong = gpu_case_check_dispatch(c);
    gpu_world_meet(world);
    if (world->rank == last) {
        gpu_world_leave();
    }
    gpu_case_combine(c);
    wrong += expect(c, NEP_ERR_TIMEOUT, last, "for expert outputs of rank", "a rank was killed");
    nep_handle_destroy(c->handle);
    nep_ep_destroy(c->ep);
    return wrong;
}

typedef uint64_t (*fault_fn)(struct gpu_world *world);

static uint64_t run_fault(struct gpu_world *world, void *ctx)
{
    return (*(fault_fn *)ctx)(world);
}

static int check_faults(bool as_processes)
{
    fault_fn cases[] = {check_absent,  check_overflow,         check_bad_id,
                        check_crowded, check_overflow_counted, check_killed};
    uint32_t num = as_processes ? 6 : 5;
    uint64_t wrong = 0;
    for (uint32_t ranks = 2; ranks <= 4; ranks++) {
        for (uint32_t i = 0; i < num; i++) {
            wrong += gpu_world_run(ranks, 1, as_processes, 300000000, run_fault, &cases[i]);
        }
    }
    printf("faults as %s: absent rank, short output, bad id, crowded slot%s, with 2, 3 and 4 "
           "ranks: %llu wrong\n",
           as_processes ? "processes" : "threads", as_processes ? ", killed rank" : "",
           (unsigned long long)wrong);
    return wrong != 0;
}

/* ---- refusals ------------------------------------------------------------------------------- */

static int solo_allgather(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns)
{
    (void)ctx;
    (void)timeout_ns;
    memcpy(out, in, bytes);
    return 0;
}

/* Where there is no GPU, an ep says so; where there is one, too many SMs are refused. */
static int check_refusal(void)
{
    int num = -1;
    cudaError_t error = cudaGetDeviceCount(&num);
    bool has_gpu = error == cudaSuccess && num > 0;
    const struct nep_bootstrap bootstrap = {.size = sizeof bootstrap, .allgather = solo_allgather};
    const struct nep_comm_params comm_params = {
        .size = sizeof comm_params, .num_ranks = 1, .bootstrap = &bootstrap};
    struct nep_ep_params params = {.size = sizeof params,
                                   .num_experts = 4,
                                   .top_k = 2,
                                   .hidden = 64,
                                   .max_tokens = 8,
                                   .pool_bytes = 1 << 20,
                                   .executor = NEP_EXECUTOR_CUDA,
                                   .num_sms = 1000};
    struct nep_comm *comm = NULL;
    struct nep_ep *ep = NULL;
    gpu_must_nep(nep_comm_create(&comm_params, &comm), "communicator");
    enum nep_status status = nep_ep_create(comm, &params, &ep);
    const char *words = has_gpu ? "num_sms is 1000" : "no GPU can be used";
    bool is_right = status == (has_gpu ? NEP_ERR_INVALID : NEP_ERR_UNSUPPORTED) &&
                    strstr(nep_last_message(), words) != NULL;
    printf("%s; refused: %s\n", has_gpu ? "a GPU is here" : "no GPU here, so this is all",
           nep_last_message());
    nep_comm_destroy(comm);
    return !is_right;
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == 2 && strcmp(argv[1], "refusal") == 0) {
        return check_refusal();
    }
    if (argc == 3 && strcmp(argv[1], "faults") == 0) {
        return check_faults(strcmp(argv[2], "processes") == 0);
    }
    uint32_t num_nodes = argc == 7 ? (uint32_t)atoi(argv[6]) : 1;
    if ((argc == 6 || argc == 7) && strcmp(argv[1], "random") == 0 && num_nodes != 0) {
        return check_random(strcmp(argv[2], "processes") == 0, (uint32_t)atoi(argv[3]), num_nodes,
                            strtoull(argv[4], NULL, 0), (uint32_t)atoi(argv[5]));
    }
    fprintf(stderr, "usage: gpu_check refusal | faults threads|processes | random "
                    "threads|processes RANKS SEED COUNT [NODES]\n");
    return 2;
}
