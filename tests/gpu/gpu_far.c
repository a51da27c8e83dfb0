/* SPDX-License-Identifier: Apache-2.0 */
/*
 * usage: gpu_far random SEED COUNT | lockstep SEED COUNT | faults | perf NODES RANKS SMS TOKENS
 * bf16|fp8 [staged | TILES] Two hops on one GPU: emulated nodes (far_world.h). random: every
 * element of dispatch and combine over random shapes, groups of unlike nodes, few and many tiles, a
 * NIC that reorders, staging through pinned memory, graphs. lockstep: the same in small, launch by
 * launch, a rank a node, for sanitizers, which may not run two kernels at once. faults: a stopped
 * proxy and a lost rank, named within the deadline on every rank that waits. perf: times in a graph
 * that is replayed; TILES: into so many an operation's rows for a node are cut, a power of two.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "tests/gpu/far_world.h"

enum { ROUNDS = 3, REPLAYS = 7 };

/* ---- random --------------------------------------------------------------------------------- */

static void run_ops(struct far_rank *r, void (*ops)(struct far_rank *), uint32_t num)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    far_must((int)cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (uint32_t i = 0; i < num; i++) {
        ops(r);
    }
    far_must((int)cudaStreamEndCapture(r->stream, &graph), "capture");
    far_must((int)cudaGraphInstantiate(&exec, graph, 0), "graph");
    far_must((int)cudaGraphLaunch(exec, r->stream), "graph");
    far_must((int)cudaStreamSynchronize(r->stream), "graph");
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
}

static void check_rounds(struct far_rank *r)
{
    bool is_graph = r->world->shape.is_graph;
    for (uint64_t round = 0; round < ROUNDS; round++) {
        far_draw(r, round);
        is_graph ? run_ops(r, far_dispatch, 1) : far_dispatch(r);
        uint64_t status = far_status(r);
        if (status == 0) {
            r->wrong += far_check_dispatch(r);
        }
        far_meet(r); /* expert outputs are uploaded */
        if (status == 0) {
            is_graph ? run_ops(r, far_combine, 1) : far_combine(r);
            status = far_status(r);
        }
        if (status == 0) {
            r->wrong += far_check_combine(r);
        } else {
            printf("rank %u, round %llu: gave up, status %llx\n", r->rank,
                   (unsigned long long)round, (unsigned long long)status);
            r->wrong++;
        }
        far_meet(r);
    }
}

static struct far_shape random_shape(uint64_t key)
{
    static const uint32_t groups[][4] = {{4, 4, 0, 0}, {4, 4, 4, 4}, {1, 1, 0, 0}, {2, 2, 2, 0},
                                         {3, 2, 0, 0}, {1, 4, 2, 0}, {8, 8, 0, 0}, {2, 2, 2, 2}};
    static const enum nep_layout layouts[] = {NEP_LAYOUT_RANK, NEP_LAYOUT_EXPERT_PACKED,
                                              NEP_LAYOUT_EXPERT_PADDED};
    static const enum nep_dtype dtypes[] = {NEP_DTYPE_BF16, NEP_DTYPE_FP16, NEP_DTYPE_FP32};
    struct nep_ref_rng rng = {key};
    struct far_shape s = {.key = nep_ref_rng_next(&rng), .timeout_ns = 2 * NEP_S};
    const uint32_t *group = groups[nep_ref_rng_below(&rng, 8)];
    uint32_t num = 0;
    for (uint32_t n = 0; n < 4 && group[n] != 0; n++) {
        s.node_ranks[s.num_nodes++] = group[n];
        num += group[n];
    }
    s.slots_per_rank = 1 + nep_ref_rng_below(&rng, 9);
    uint32_t most = num * s.slots_per_rank < 32 ? num * s.slots_per_rank : 32;
    s.top_k = 1 + nep_ref_rng_below(&rng, nep_ref_rng_below(&rng, 2) && most > 9 ? 9 : most);
    s.hidden = 16 * (1 + nep_ref_rng_below(&rng, nep_ref_rng_below(&rng, 4) ? 40 : 200));
    s.max_tokens = 1 + nep_ref_rng_below(&rng, nep_ref_rng_below(&rng, 2) ? 150 : 20);
    s.tile_rows = nep_ref_rng_below(&rng, 2) ? 256 : 5 + nep_ref_rng_below(&rng, 20);
    s.alignment = nep_ref_rng_below(&rng, 2) ? 1 : 8;
    s.num_sms = 2 + nep_ref_rng_below(&rng, 5);
    s.layout = layouts[nep_ref_rng_below(&rng, 3)];
    s.dtype = dtypes[nep_ref_rng_below(&rng, 3)];
    s.wire = nep_ref_rng_below(&rng, 3) == 0 ? NEP_DTYPE_FP8_E4M3 : s.dtype;
    s.is_staged = nep_ref_rng_below(&rng, 4) == 0;
    s.nic_seed = nep_ref_rng_below(&rng, 2);
    s.is_graph = nep_ref_rng_below(&rng, 2);
    s.is_whole = nep_ref_rng_below(&rng, 2);
    s.tiles = nep_ref_rng_below(&rng, 3) == 0 ? 4 : 0;
    return s;
}

static void print_shape(const struct far_shape *s)
{
    printf("key %llx, nodes", (unsigned long long)s->key);
    for (uint32_t n = 0; n < s->num_nodes; n++) {
        printf(" %u", s->node_ranks[n]);
    }
    printf(": %u SMs, L %u, K %u, H %u, M %u, tiles of %u, align %u, layout %d, type %d wire "
           "%d%s%s%s%s\n",
           s->num_sms, s->slots_per_rank, s->top_k, s->hidden, s->max_tokens, s->tile_rows,
           s->alignment, (int)s->layout, (int)s->dtype, (int)s->wire, s->is_staged ? " staged" : "",
           s->nic_seed ? " reordered" : "", s->is_graph ? " graph" : "",
           s->is_whole ? " whole" : "");
}

/* Small, and such that no kernel waits for one that has not ended: all tiles fit their slots. */
static void set_lockstep(struct far_shape *s)
{
    s->num_nodes = s->num_nodes > 3 ? 3 : s->num_nodes;
    for (uint32_t n = 0; n < s->num_nodes; n++) {
        s->node_ranks[n] = 1;
    }
    uint32_t most = s->num_nodes * s->slots_per_rank;
    s->top_k = s->top_k < most ? s->top_k : most;
    s->max_tokens = 1 + s->max_tokens % 24;
    s->tile_rows = (s->max_tokens + 1) / 2;
    s->hidden = s->hidden > 512 ? 512 : s->hidden;
    s->is_staged = s->is_lockstep = true;
    s->is_graph = s->is_whole = false;
    s->timeout_ns = 20 * NEP_S; /* the proxies' threads are slow there, too */
}

static int check_random(uint64_t seed, uint32_t count, bool is_lockstep)
{
    uint64_t wrong = 0;
    for (uint32_t i = 0; i < count; i++) {
        struct far_shape shape = random_shape(nep_ref_mix(seed, i));
        if (is_lockstep) {
            set_lockstep(&shape);
        }
        uint64_t here = far_world_run(&shape, check_rounds, NULL);
        if (here != 0) {
            printf("%llu wrong in shape %u: ", (unsigned long long)here, i);
            print_shape(&shape);
        }
        wrong += here;
        if (here > 100) {
            break;
        }
    }
    printf("two hops, seed %llu, %u shapes of %d rounds: %llu wrong\n", (unsigned long long)seed,
           count, ROUNDS, (unsigned long long)wrong);
    return wrong != 0;
}

/* ---- faults --------------------------------------------------------------------------------- */

static struct far_shape small_shape(void)
{
    return (struct far_shape){
        .key = 9,
        .num_nodes = 2,
        .node_ranks = {2, 2},
        .slots_per_rank = 4,
        .top_k = 4,
        .hidden = 256,
        .max_tokens = 64,
        .tile_rows = 16,
        .num_sms = 4,
        .layout = NEP_LAYOUT_RANK,
        .dtype = NEP_DTYPE_BF16,
        .wire = NEP_DTYPE_BF16,
        .is_full = true,
        .timeout_ns = 200 * NEP_MS,
    };
}

/* A good round, then one in which the last rank's proxy stands still, or the last rank is gone. */
static void check_fault(struct far_rank *r)
{
    struct far_world *w = r->world;
    bool is_lost = *(const bool *)w->ctx;
    uint32_t culprit = w->num_ranks - 1;
    far_draw(r, 0);
    far_dispatch(r);
    r->wrong += far_status(r) != 0;
    r->wrong += far_check_dispatch(r);
    far_draw(r, 1);
    if (r->rank == culprit) {
        nep_proxy_pause(r->proxy, !is_lost);
        __atomic_store_n(&w->nic.lost, is_lost ? 1ull << culprit : 0, __ATOMIC_RELEASE);
    }
    far_meet(r);
    uint64_t begin = nep_now_ns();
    if (r->rank != culprit || !is_lost) {
        far_dispatch(r);
    }
    uint64_t status = far_status(r);
    double ms = (double)(nep_now_ns() - begin) * 1e-6;
    uint64_t kind = status >> 56;
    uint64_t want = is_lost ? NEP_CUDA_FABRIC_FAULT : NEP_CUDA_PROXY_STALE;
    /* Who waits for the culprit's fabric itself names it; others run into their deadline. */
    bool must_name = is_lost ? r->rank == culprit - w->shape.node_ranks[1] : r->rank == culprit;
    bool is_right = is_lost && r->rank == culprit ? status == 0
                    : must_name                   ? kind == want && (status & 0xffff) == culprit
                                                  : status != 0;
    is_right = is_right && ms < 450 && *r->status_host == status;
    printf("%s: rank %u: kind %llu, phase %llu, who %llu after %.0f ms%s\n",
           is_lost ? "lost rank" : "stopped proxy", r->rank, (unsigned long long)kind,
           (unsigned long long)(status >> 48 & 255), (unsigned long long)(status & 0xffff), ms,
           is_right ? "" : ": WRONG");
    r->wrong += !is_right;
    begin = nep_now_ns();
    for (uint32_t i = 0; i < 100 && status != 0; i++) {
        far_dispatch(r);
        far_combine(r);
    }
    r->wrong += far_status(r) != status || nep_now_ns() - begin > 100 * NEP_MS;
    far_meet(r);
    nep_proxy_pause(r->proxy, false);
}

static int check_faults(void)
{
    uint64_t wrong = 0;
    for (int i = 0; i < 2; i++) {
        struct far_shape shape = small_shape();
        bool is_lost = i != 0;
        wrong += far_world_run(&shape, check_fault, &is_lost);
    }
    printf("two hops, faults: %llu wrong\n", (unsigned long long)wrong);
    return wrong != 0;
}

/* ---- figures -------------------------------------------------------------------------------- */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Microseconds of one of num operations in a graph, the slowest rank's, the median replay. */
static double time_ops(struct far_rank *r, void (*ops)(struct far_rank *), uint32_t num)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    cudaEvent_t begin, end;
    double us[REPLAYS];
    far_must((int)cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (uint32_t i = 0; i < num; i++) {
        ops(r);
    }
    far_must((int)cudaStreamEndCapture(r->stream, &graph), "capture");
    far_must((int)cudaGraphInstantiate(&exec, graph, 0), "graph");
    far_must((int)cudaGraphUpload(exec, r->stream), "graph");
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    for (int i = -1; i < REPLAYS; i++) {
        float ms = 0;
        far_meet(r);
        cudaEventRecord(begin, r->stream);
        far_must((int)cudaGraphLaunch(exec, r->stream), "graph");
        cudaEventRecord(end, r->stream);
        far_must((int)cudaStreamSynchronize(r->stream), "graph");
        cudaEventElapsedTime(&ms, begin, end);
        double slowest = far_max(r, ms * 1e3 / num);
        if (i >= 0) {
            us[i] = slowest;
        }
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    qsort(us, REPLAYS, sizeof us[0], by_value);
    return us[REPLAYS / 2];
}

/* Where the last operation of rank 0 was when, in microseconds from its first kernel on. */
static void print_stamps(struct far_rank *r, enum nep_far_stamp first, enum nep_far_stamp last)
{
    static const char *const names[] = {
        "counts", "listed",    "counts posted", "pack",      "packed",    "place",  "counts here",
        "placed", "recv",      "own rows done", "tile here", "read",      "met",    "offer",
        "reduce", "rows here", "sums posted",   "sum",       "sums here", "summed", "met"};
    struct nep_far_state state;
    far_must(
        (int)cudaMemcpyAsync(&state, r->far.state, sizeof state, cudaMemcpyDeviceToHost, r->stream),
        "stamps");
    far_must((int)cudaStreamSynchronize(r->stream), "stamps");
    printf("rank %u:", r->rank);
    for (int i = (int)first; i <= (int)last; i++) {
        printf(" %s %.1f,", names[i],
               ((double)state.stamps[i] - (double)state.stamps[first]) * 1e-3);
    }
    struct nep_proxy_stats stats = nep_proxy_stats(r->proxy);
    printf(" proxy's longest round %.1f us, %llu naps\n", (double)stats.longest_ns * 1e-3,
           (unsigned long long)stats.naps);
}

static void measure(struct far_rank *r)
{
    struct far_world *w = r->world;
    const struct far_shape *s = &w->shape;
    far_draw(r, 0);
    far_dispatch(r);
    uint64_t status = far_status(r);
    r->wrong += status == 0 ? far_check_dispatch(r) : 1;
    far_meet(r);
    far_combine(r);
    status = far_status(r);
    r->wrong += status == 0 ? far_check_combine(r) : 1;
    uint32_t num = s->max_tokens > 1024 ? 4 : 20;
    double dispatch = time_ops(r, far_dispatch, num);
    if (r->rank < 2) {
        print_stamps(r, NEP_FAR_AT_COUNTS, NEP_FAR_AT_MET);
    }
    double combine = time_ops(r, far_combine, num);
    if (r->rank < 2) {
        print_stamps(r, NEP_FAR_AT_OFFER, NEP_FAR_AT_SUM_MET);
    }
    status = far_status(r);
    struct nep_ref_traffic traffic = {0};
    nep_ref_traffic_add(&w->ref, r->rank, &traffic);
    double out = (double)traffic.remote_nodes * (r->shape.wire_row_bytes + r->shape.meta_bytes);
    double back = (double)traffic.remote_nodes * r->shape.row_bytes;
    if (r->rank == 0) {
        printf("%u nodes x %u ranks x %u tokens, %u SMs, %s%s: dispatch %.1f us, combine %.1f us; "
               "to other nodes %.0f and %.0f KB per rank, at 50 GB/s %.1f and %.1f us; status "
               "%llx\n",
               s->num_nodes, s->node_ranks[0], s->max_tokens, s->num_sms,
               s->wire == s->dtype ? "bf16" : "fp8", s->is_staged ? " staged" : "", dispatch,
               combine, out * 1e-3, back * 1e-3, out / 50e3, back / 50e3,
               (unsigned long long)status);
    }
    r->wrong += status != 0;
}

static int perf(char **argv, int argc)
{
    uint32_t tokens = (uint32_t)atoi(argv[5]);
    uint32_t tiles = argc == 8 ? (uint32_t)atoi(argv[7]) : 0; /* staged: none */
    struct far_shape s = {
        .key = 3,
        .num_nodes = (uint32_t)atoi(argv[2]),
        .top_k = 8,
        .hidden = 7168,
        .max_tokens = tokens,
        .tile_rows = tiles != 0 ? (tokens + tiles - 1) / tiles : nep_far_tile_rows(tokens),
        .tiles = tiles,
        .is_whole = true,
        .num_sms = (uint32_t)atoi(argv[4]),
        .layout = NEP_LAYOUT_RANK,
        .dtype = NEP_DTYPE_BF16,
        .wire = strcmp(argv[6], "fp8") == 0 ? NEP_DTYPE_FP8_E4M3 : NEP_DTYPE_BF16,
        .is_staged = argc == 8 && tiles == 0,
        .is_full = true,
        .timeout_ns = 2 * NEP_S,
    };
    if (tiles > NEP_FAR_MAX_WINDOW || (tiles & (tiles - 1)) != 0 || s.tile_rows > 256) {
        fprintf(stderr, "gpu_far: TILES is a power of two, at most %d, of at most 256 rows\n",
                NEP_FAR_MAX_WINDOW);
        return 2;
    }
    for (uint32_t n = 0; n < s.num_nodes; n++) {
        s.node_ranks[n] = (uint32_t)atoi(argv[3]);
    }
    s.slots_per_rank = 256 / (s.num_nodes * s.node_ranks[0]);
    uint64_t wrong = far_world_run(&s, measure, NULL);
    printf("wrong %llu\n", (unsigned long long)wrong);
    return wrong != 0;
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    /* A kernel that is loaded at its first launch waits for the fake NIC's, which stays. */
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
    cudaSetDeviceFlags(cudaDeviceScheduleBlockingSync);
    bool is_lockstep = strcmp(argc > 1 ? argv[1] : "", "lockstep") == 0;
    if (argc == 4 && (is_lockstep || strcmp(argv[1], "random") == 0)) {
        return check_random(strtoull(argv[2], NULL, 0), (uint32_t)atoi(argv[3]), is_lockstep);
    }
    if (argc == 2 && strcmp(argv[1], "faults") == 0) {
        return check_faults();
    }
    if (argc >= 7 && strcmp(argv[1], "perf") == 0) {
        return perf(argv, argc);
    }
    fprintf(stderr, "usage: gpu_far random SEED COUNT | lockstep SEED COUNT | faults | perf NODES "
                    "RANKS SMS TOKENS bf16|fp8 [staged | TILES]\n");
    return 2;
}
