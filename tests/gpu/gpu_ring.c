/* SPDX-License-Identifier: Apache-2.0 */
/*
 * usage: gpu_ring figures | faults | litmus SECONDS
 * The command ring, the proxy and a fake NIC on one GPU. figures: hand-overs and the whole loop, in
 * a graph that is replayed. faults: a stopped proxy and a lost peer, seen by waiting kernels.
 * litmus: does a kernel that acquired the word ever see bytes that are not there yet, for each way
 * in which bytes come; with a control that must fail, so that the test is known to see it.
 */
#include "tests/gpu/gpu_ring.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "dispatch/cuda/proxy.h"
#include "dispatch/cuda/visibility.h"
#include "tests/gpu/fake_nic.h"

enum { MOST_BYTES = 112 * 1024, IN_GRAPH = 32 };

enum mode {
    MODE_WORD,   /* no bytes: the post raises the word */
    MODE_NIC,    /* the fake NIC copies, its completion raises the word */
    MODE_ENGINE, /* a copy engine writes the GPU's memory from the host's, as a NIC does */
    MODE_STAGED, /* the host writes pinned memory that kernels read */
    MODE_EARLY   /* control: as ENGINE, but the word is raised first */
};

struct bench {
    struct gpu_ring_args args;
    struct gpu_ring_state *state; /* on the GPU */
    uint64_t *word;
    char *staging; /* pinned */
    char *landing; /* on the GPU */
    struct fake_nic_queue *queue;
    struct fake_nic_world world;
    struct nep_transport *nic;
    struct nep_proxy *proxy;
    enum mode mode;
    cudaStream_t stream;
    cudaStream_t copies;
    cudaEvent_t copied;
    uint64_t arrived;
};

static void must(int error, const char *what)
{
    if (error != 0) {
        printf("%s: %s\n", what, cudaGetErrorString((cudaError_t)error));
        fflush(stdout);
        _exit(3);
    }
}

/* The kernels' pattern (gpu_ring_kernels.cu), by the host. */
static void fill(char *to, uint32_t bytes, uint64_t op)
{
    uint32_t *words = (uint32_t *)to;
    for (uint32_t i = 0; i < bytes / 16; i++) {
        uint32_t x = ((uint32_t)op * 0x9e3779b1u ^ i) * 0x85ebca6bu;
        x ^= x >> 13;
        words[4 * i] = x;
        words[4 * i + 1] = x + 1;
        words[4 * i + 2] = x ^ 0x55;
        words[4 * i + 3] = (uint32_t)op;
    }
}

static void raise_word(struct bench *b)
{
    /* Release: pairs with the acquire of nep_ring_wait in the kernel. */
    __atomic_store_n(b->word, ++b->arrived, __ATOMIC_RELEASE);
}

static struct bench *the_bench; /* the sink has no context */

static void sink(void *base, uint32_t dst, uint32_t src, uint32_t imm)
{
    (void)base;
    (void)dst;
    (void)src;
    (void)imm;
    raise_word(the_bench);
}

static void copy_by_engine(struct bench *b, uint64_t op)
{
    uint32_t bytes = b->args.bytes;
    char *from = b->staging + (op & 1) * bytes;
    fill(from, bytes, op);
    if (b->mode == MODE_EARLY) {
        raise_word(b);
    }
    must((int)cudaMemcpyAsync(b->landing + (op & 1) * bytes, from, bytes, cudaMemcpyHostToDevice,
                              b->copies),
         "copy");
    must((int)cudaEventRecord(b->copied, b->copies), "event");
    while (cudaEventQuery(b->copied) == cudaErrorNotReady) {
    }
}

static enum nep_status post(void *ctx, uint64_t command, uint32_t *who_p)
{
    struct bench *b = ctx;
    struct nep_command c = nep_ring_command_of(command);
    uint64_t number = 0;
    uint64_t op = b->arrived + 1;
    *who_p = 0;
    if (c.kind == 2) {
        return NEP_OK; /* flood */
    }
    if (b->mode == MODE_NIC) {
        struct nep_put put = {.dst = 0,
                              .offset = MOST_BYTES * 2 + (c.number & 1) * b->args.bytes,
                              .src = b->world.words[0] + (c.number & 1) * b->args.bytes,
                              .len = b->args.bytes};
        return b->nic->ops->put(b->nic, &put, &number);
    }
    if (b->mode == MODE_STAGED) {
        fill(b->staging + (op & 1) * b->args.bytes, b->args.bytes, op);
    }
    if (b->mode == MODE_ENGINE || b->mode == MODE_EARLY) {
        copy_by_engine(b, op);
    }
    if (b->mode != MODE_EARLY) {
        raise_word(b);
    }
    return NEP_OK;
}

static void open_bench(struct bench *b)
{
    memset(b, 0, sizeof *b);
    the_bench = b;
    /* A kernel that is loaded at its first launch waits for the resident one. */
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    void *shared = NULL;
    char *memory = NULL;
    must((int)cudaSetDevice(0), "device");
    must((int)cudaHostAlloc(&shared, nep_ring_bytes(GPU_RING_SIZE), cudaHostAllocMapped), "ring");
    must((int)cudaHostAlloc((void **)&b->word, 128, cudaHostAllocMapped), "word");
    must((int)cudaHostAlloc((void **)&b->staging, 2 * MOST_BYTES, cudaHostAllocMapped), "staging");
    must((int)cudaHostAlloc((void **)&b->queue, sizeof *b->queue, cudaHostAllocMapped), "queue");
    must((int)cudaMalloc((void **)&memory, 4 * MOST_BYTES), "slots");
    must((int)cudaMalloc((void **)&b->state, sizeof *b->state), "state");
    must((int)cudaMalloc((void **)&b->args.producer, sizeof *b->args.producer), "producer");
    must((int)cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking), "stream");
    must((int)cudaStreamCreateWithFlags(&b->copies, cudaStreamNonBlocking), "stream");
    must((int)cudaEventCreateWithFlags(&b->copied, cudaEventDisableTiming), "event");
    b->args.shared = shared;
    b->args.state = b->state;
    b->args.word = b->word;
    b->args.slots = memory;
    b->landing = memory + 2 * MOST_BYTES;
    b->world = (struct fake_nic_world){.num_ranks = 1, .queues = b->queue, .sink = sink};
    b->world.words[0] = memory; /* only differences of addresses in it are used */
    b->world.data[0] = memory;
}

static void choose(struct bench *b, enum mode mode, uint32_t bytes, uint64_t timeout_ns)
{
    b->mode = mode;
    b->args.bytes = bytes;
    b->args.timeout_ns = timeout_ns;
    b->args.landing = mode == MODE_STAGED ? b->staging : b->landing;
}

/* Everything back to zero; the proxy and, where chosen, the NIC run. Graphs are made before. */
static void begin(struct bench *b)
{
    must((int)cudaDeviceSynchronize(), "begin");
    memset(b->args.shared, 0, nep_ring_bytes(GPU_RING_SIZE));
    memset(b->queue, 0, sizeof *b->queue);
    *b->word = b->arrived = 0;
    b->world.lost = 0;
    must((int)cudaMemset(b->state, 0, sizeof *b->state), "state");
    must((int)cudaMemset(b->args.producer, 0, sizeof *b->args.producer), "producer");
    must((int)cudaMemset(b->args.slots, 0xee, 4 * MOST_BYTES), "slots");
    memset(b->staging, 0xee, 2 * MOST_BYTES);
    must((int)cudaDeviceSynchronize(), "begin");
    b->nic = fake_nic_create(&b->world, 0);
    must(b->nic == NULL, "fake NIC");
    if (b->mode == MODE_NIC) {
        must(fake_nic_launch(b->queue, 1, 20 * NEP_S, b->copies), "fake NIC");
    }
    static const uint32_t peer = 0;
    struct nep_proxy_params params = {
        .ring = {b->args.shared, NULL, GPU_RING_SIZE},
        .transport = b->nic,
        .post = post,
        .ctx = b,
        .peers = &peer,
        .num_peers = 1,
        .spin_ns = 100 * NEP_MS,
    };
    must(nep_proxy_start(&params, &b->proxy) != NEP_OK, "proxy");
}

static struct gpu_ring_state *end(struct bench *b)
{
    static struct gpu_ring_state state;
    must((int)cudaStreamSynchronize(b->stream), "end");
    nep_proxy_stop(b->proxy);
    __atomic_store_n(&b->queue->stop, 1, __ATOMIC_RELEASE);
    must((int)cudaDeviceSynchronize(), "end");
    b->nic->ops->close(b->nic);
    must((int)cudaMemcpy(&state, b->state, sizeof state, cudaMemcpyDeviceToHost), "state");
    return &state;
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a;
    uint32_t y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void sort(uint32_t *values, uint32_t num)
{
    qsort(values, num, sizeof *values, by_value);
}

/* ---- figures -------------------------------------------------------------------------------- */

static int figure_hops(struct bench *b)
{
    const uint32_t num = 10000;
    choose(b, MODE_WORD, 0, NEP_S);
    begin(b);
    must(gpu_ring_load_cost(&b->args, 20000, b->stream), "load");
    struct gpu_ring_state *state = end(b);
    double load = state->latency_ns[0] * 1e-3;
    double mhz = state->latency_ns[1];
    choose(b, MODE_WORD, 0, NEP_S);
    begin(b);
    must(gpu_ring_ping(&b->args, num, b->stream), "ping");
    state = end(b);
    sort(state->latency_ns, num);
    double median = state->latency_ns[num / 2] / mhz;
    double p99 = state->latency_ns[num * 99 / 100] / mhz;
    printf("command -> proxy's post -> pinned word -> kernel: %.2f us (p99 %.2f); one load of the "
           "word %.2f us, so store to post about %.2f us (must 3), word to kernel about %.2f us "
           "(must 2.5); status %llx\n",
           median, p99, load, median - load, load, (unsigned long long)state->status);
    return state->status != 0;
}

static int figure_flood(struct bench *b)
{
    const uint32_t blocks = 16, num = 20000;
    choose(b, MODE_WORD, 0, NEP_S);
    begin(b);
    uint64_t start = nep_now_ns();
    must(gpu_ring_flood(&b->args, blocks, num, b->stream), "flood");
    must((int)cudaStreamSynchronize(b->stream), "flood");
    double us = (double)(nep_now_ns() - start) * 1e-3;
    uint64_t deadline = nep_deadline_ns(NEP_S);
    while (nep_proxy_stats(b->proxy).commands < (uint64_t)blocks * num &&
           nep_left_ns(deadline) > 0) {
    }
    struct nep_proxy_stats stats = nep_proxy_stats(b->proxy);
    struct gpu_ring_state *state = end(b);
    printf("flood: %u blocks, %llu of %u commands through a ring of %u, %.0f ns each; status "
           "%llx\n",
           blocks, (unsigned long long)stats.commands, blocks * num, GPU_RING_SIZE,
           us * 1e3 / (blocks * num), (unsigned long long)state->status);
    return state->status != 0 || stats.commands != (uint64_t)blocks * num;
}

/* Uploaded at once: a graph's first launch may wait for the device. */
static cudaGraphExec_t make_graph(struct bench *b, uint32_t ops)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    must((int)cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (uint32_t i = 0; i < ops; i++) {
        must(gpu_ring_send(&b->args, b->stream), "send");
        must(gpu_ring_recv(&b->args, b->stream), "receive");
    }
    must((int)cudaStreamEndCapture(b->stream, &graph), "capture");
    must((int)cudaGraphInstantiate(&exec, graph, 0), "graph");
    must((int)cudaGraphUpload(exec, b->stream), "graph");
    must((int)cudaStreamSynchronize(b->stream), "graph");
    cudaGraphDestroy(graph);
    return exec;
}

static int figure_loop(struct bench *b, uint32_t bytes)
{
    const uint32_t num = 10000;
    choose(b, MODE_NIC, bytes, NEP_S);
    cudaGraphExec_t graph = make_graph(b, 1);
    begin(b);
    uint64_t start = nep_now_ns();
    for (uint32_t i = 0; i < num; i++) {
        must((int)cudaGraphLaunch(graph, b->stream), "graph");
    }
    must((int)cudaStreamSynchronize(b->stream), "graph");
    double each = (double)(nep_now_ns() - start) * 1e-3 / num;
    struct gpu_ring_state *state = end(b);
    cudaGraphExecDestroy(graph);
    sort(state->latency_ns + 1, num);
    printf("whole loop, fake NIC, %3u KiB tile: store of the command to its arrival in a kernel "
           "%.2f us (p99 %.2f), %.2f us per replay; %llu of %u operations, wrong pieces %llu, "
           "status %llx\n",
           bytes / 1024, state->latency_ns[1 + num / 2] * 1e-3,
           state->latency_ns[1 + num * 99 / 100] * 1e-3, each, (unsigned long long)state->op, num,
           (unsigned long long)state->wrong, (unsigned long long)state->status);
    return state->op != num || state->wrong != 0 || state->status != 0;
}

/* ---- faults --------------------------------------------------------------------------------- */

static int fault_run(struct bench *b, const char *what, uint64_t want)
{
    bool is_death = want == NEP_RING_STALE;
    choose(b, MODE_NIC, 14 * 1024, 40 * NEP_MS);
    cudaGraphExec_t graph = make_graph(b, 1);
    begin(b);
    for (uint32_t i = 0; i < 1000; i++) {
        must((int)cudaGraphLaunch(graph, b->stream), "graph");
        if (i == 500) {
            must((int)cudaStreamSynchronize(b->stream), "graph");
            nep_proxy_pause(b->proxy, is_death);
            __atomic_store_n(&b->world.lost, is_death ? 0 : 1, __ATOMIC_RELEASE);
            usleep(is_death ? 1000 : 30000); /* a peer is looked at every 10 ms */
        }
    }
    uint64_t start = nep_now_ns();
    must((int)cudaStreamSynchronize(b->stream), "graph");
    double ms = (double)(nep_now_ns() - start) * 1e-6;
    nep_proxy_pause(b->proxy, false);
    struct gpu_ring_state *state = end(b);
    printf("%s: status %llu at operation %llu, that wait took %.3f ms of 40; the other replays "
           "returned, %.1f ms in all; wrong pieces %llu\n",
           what, (unsigned long long)(state->status >> 32),
           (unsigned long long)(state->status & 0xffffffffu), (double)state->waited_ns * 1e-6, ms,
           (unsigned long long)state->wrong);
    int wrong = state->status >> 32 != want || state->wrong != 0 || state->waited_ns > 40 * NEP_MS;
    /* The same graph runs again after the state was cleared. */
    begin(b);
    for (uint32_t i = 0; i < 500; i++) {
        must((int)cudaGraphLaunch(graph, b->stream), "graph");
    }
    state = end(b);
    cudaGraphExecDestroy(graph);
    return wrong || state->op != 500 || state->status != 0 || state->wrong != 0;
}

/* ---- litmus --------------------------------------------------------------------------------- */

static int litmus(struct bench *b, const char *what, enum mode mode, uint32_t bytes, double seconds)
{
    choose(b, mode, bytes, NEP_S);
    cudaGraphExec_t graph = make_graph(b, IN_GRAPH);
    begin(b);
    uint64_t deadline = nep_deadline_ns((uint64_t)(seconds * 1e9));
    while (nep_left_ns(deadline) > 0) {
        must((int)cudaGraphLaunch(graph, b->stream), "graph");
        must((int)cudaStreamSynchronize(b->stream), "graph");
    }
    struct gpu_ring_state *state = end(b);
    cudaGraphExecDestroy(graph);
    bool is_control = mode == MODE_EARLY;
    printf("litmus, %s: %.1f s, %llu operations of %u KiB, wrong pieces %llu%s, status %llx\n",
           what, seconds, (unsigned long long)state->op, bytes / 1024,
           (unsigned long long)state->wrong, is_control ? " (must be some)" : "",
           (unsigned long long)state->status);
    return state->status != 0 || (state->wrong != 0) != is_control;
}

static void print_policy(void)
{
    int gpudirect = 0, ordering = 0, flush = 0;
    cudaDeviceGetAttribute(&gpudirect, cudaDevAttrGPUDirectRDMASupported, 0);
    cudaDeviceGetAttribute(&ordering, cudaDevAttrGPUDirectRDMAWritesOrdering, 0);
    cudaDeviceGetAttribute(&flush, cudaDevAttrGPUDirectRDMAFlushWritesOptions, 0);
    for (uint32_t devices = 1; devices <= 8; devices += 7) {
        struct nep_visibility_facts facts = {true, gpudirect, ordering, flush, devices};
        enum nep_visibility visibility;
        char why[256];
        if (nep_visibility_choose(&facts, "auto", &visibility, why, sizeof why) == NEP_OK) {
            printf("visibility, %u GPUs in the node: %s\n", devices, why);
        }
    }
}

int main(int argc, char **argv)
{
    struct bench bench;
    int failed = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc < 2) {
        fprintf(stderr, "usage: gpu_ring figures | faults | litmus SECONDS\n");
        return 2;
    }
    open_bench(&bench);
    if (strcmp(argv[1], "figures") == 0) {
        failed |= figure_hops(&bench);
        failed |= figure_flood(&bench);
        failed |= figure_loop(&bench, 14 * 1024);
        failed |= figure_loop(&bench, MOST_BYTES);
    } else if (strcmp(argv[1], "faults") == 0) {
        failed |= fault_run(&bench, "a stopped proxy", NEP_RING_STALE);
        failed |= fault_run(&bench, "a lost peer", NEP_RING_FAULT);
    } else if (strcmp(argv[1], "litmus") == 0 && argc == 3) {
        double seconds = atof(argv[2]);
        print_policy();
        failed |= litmus(&bench, "fake NIC on an SM", MODE_NIC, 112 * 1024, seconds * 0.3);
        failed |= litmus(&bench, "copy engine over PCIe", MODE_ENGINE, 14 * 1024, seconds * 0.4);
        failed |= litmus(&bench, "pinned memory", MODE_STAGED, 14 * 1024, seconds * 0.25);
        failed |=
            litmus(&bench, "control: word before bytes", MODE_EARLY, 112 * 1024, seconds * 0.05);
    }
    printf("gpu_ring %s: %s\n", argv[1], failed ? "FAILED" : "ok");
    return failed;
}
