/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Times are of calls as they are made, launches included; a graph, which hides those, is what
 * tests/gpu/gpu_perf measures. Counts are read after the time is taken.
 */
#include "perftest/gpu.h"

#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "perftest/perf.h"

#if NEP_HAVE_CUDA

#include <cuda_runtime_api.h>
#include <sys/wait.h>
#include <unistd.h>

struct gpu_lane {
    void *x;
    void *ids;
    void *weights;
    struct nep_rows rows;
    void *expert;
    void *y;
};

struct nep_perf_gpu {
    cudaStream_t stream;
    cudaEvent_t begin;
    cudaEvent_t end;
    struct gpu_lane lanes[8];
    void *memory[128];
    uint32_t num_memory;
};

int nep_perf_gpu_probe(void)
{
    int status = 1;
    pid_t pid = fork();
    if (pid == 0) {
        int num = 0;
        _exit(cudaGetDeviceCount(&num) == cudaSuccess && num > 0 ? 0 : 1);
    }
    if (pid > 0) {
        waitpid(pid, &status, 0);
    }
    if (pid < 0 || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        return nep_perf_error(NEP_PERF_USAGE,
                              "--executor cuda: no GPU can be used on this machine");
    }
    return -1;
}

static enum nep_status check(cudaError_t error, const char *what)
{
    return error == cudaSuccess
               ? NEP_OK
               : nep_fail(NEP_ERR_IO, "%s: CUDA says %s", what, cudaGetErrorString(error));
}

struct sizes {
    uint64_t x, ids, weights, rows, scales, per_k, per_row, expert, y;
};

static struct sizes sizes_of(const struct nep_perf_rank *rank)
{
    const struct nep_perf_options *options = &rank->options;
    uint64_t payload = (uint64_t)options->hidden * nep_ref_dtype_bytes(options->dtype);
    uint64_t wire = (uint64_t)options->hidden * nep_ref_dtype_bytes(options->wire);
    uint64_t k = options->layout == NEP_LAYOUT_RANK ? options->top_k : 1;
    bool is_fp8 = options->wire == NEP_DTYPE_FP8_E4M3;
    return (struct sizes){
        .x = options->tokens * payload,
        .ids = (uint64_t)options->tokens * options->top_k * 4,
        .weights = (uint64_t)options->tokens * options->top_k * 4,
        .rows = rank->capacity * wire,
        .scales = is_fp8 ? rank->capacity * ((options->hidden + 127) / 128) * 4 : 0,
        .per_k = rank->capacity * k * 4,
        .per_row = rank->capacity * 4,
        .expert = options->wire == options->dtype ? 0 : rank->capacity * payload,
        .y = options->tokens * payload,
    };
}

uint64_t nep_perf_gpu_bytes(const struct nep_perf_rank *rank)
{
    struct sizes s = sizes_of(rank);
    return s.x + s.ids + s.weights + s.rows + s.scales + 2 * s.per_k + 2 * s.per_row + s.expert +
           s.y + 16 * 4096;
}

static enum nep_status take(struct nep_perf_rank *rank, uint64_t bytes, void *to)
{
    struct nep_perf_gpu *gpu = rank->gpu;
    void *memory = NULL;
    enum nep_status status =
        rank->options.is_mapped
            ? nep_buffer_alloc(rank->ep, bytes + 16, &memory)
            : check(cudaMalloc(&memory, bytes + 16), "device memory of a tensor");
    if (status == NEP_OK) {
        gpu->memory[gpu->num_memory++] = memory;
        memcpy(to, &memory, sizeof memory);
    }
    return status;
}

static enum nep_status take_lane(struct nep_perf_rank *rank, struct gpu_lane *lane)
{
    struct sizes s = sizes_of(rank);
    bool is_rank_layout = rank->options.layout == NEP_LAYOUT_RANK;
    lane->rows = (struct nep_rows){.size = sizeof lane->rows, .capacity = rank->capacity};
    const struct {
        uint64_t bytes;
        void *to;
    } rows[] = {
        {s.x, &lane->x},
        {s.ids, &lane->ids},
        {s.weights, &lane->weights},
        {s.rows, &lane->rows.x},
        {s.per_k, &lane->rows.topk_weights},
        {s.per_row, &lane->rows.source_rank},
        {s.per_row, &lane->rows.source_token},
        {s.y, &lane->y},
        {is_rank_layout ? s.per_k : 0, &lane->rows.topk_slots},
        {s.scales, &lane->rows.scales},
        {s.expert, &lane->expert},
    };
    enum nep_status status = NEP_OK;
    for (size_t i = 0; status == NEP_OK && i < sizeof rows / sizeof rows[0]; i++) {
        bool is_optional = i >= 8;
        if (!is_optional || rows[i].bytes != 0) {
            status = take(rank, rows[i].bytes, rows[i].to);
        }
    }
    if (lane->expert == NULL) {
        lane->expert = lane->rows.x;
    }
    return status;
}

enum nep_status nep_perf_gpu_create(struct nep_perf_rank *rank)
{
    struct nep_perf_gpu *gpu = rank->gpu = calloc(1, sizeof *gpu);
    if (gpu == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "out of memory");
    }
    enum nep_status status =
        check(cudaStreamCreateWithFlags(&gpu->stream, cudaStreamNonBlocking), "a stream");
    if (status == NEP_OK) {
        status = check(cudaEventCreate(&gpu->begin), "an event");
    }
    if (status == NEP_OK) {
        status = check(cudaEventCreate(&gpu->end), "an event");
    }
    for (uint32_t s = 0; status == NEP_OK && s < rank->options.outstanding; s++) {
        status = take_lane(rank, &gpu->lanes[s]);
    }
    return status;
}

void nep_perf_gpu_destroy(struct nep_perf_rank *rank)
{
    struct nep_perf_gpu *gpu = rank->gpu;
    if (gpu == NULL) {
        return;
    }
    cudaStreamSynchronize(gpu->stream);
    for (uint32_t i = 0; i < gpu->num_memory; i++) {
        if (rank->options.is_mapped) {
            nep_buffer_free(rank->ep, gpu->memory[i]);
        } else {
            cudaFree(gpu->memory[i]);
        }
    }
    if (gpu->begin != NULL) {
        cudaEventDestroy(gpu->begin);
    }
    if (gpu->end != NULL) {
        cudaEventDestroy(gpu->end);
    }
    if (gpu->stream != NULL) {
        cudaStreamDestroy(gpu->stream);
    }
    free(gpu);
    rank->gpu = NULL;
}

/* ---- to and fro ---- */

static cudaError_t copy(const struct nep_perf_gpu *gpu, void *to, const void *from, uint64_t bytes)
{
    return bytes == 0 || to == NULL || from == NULL
               ? cudaSuccess
               : cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, gpu->stream);
}

static enum nep_status finish(const struct nep_perf_gpu *gpu, cudaError_t error, const char *what)
{
    cudaError_t late = cudaStreamSynchronize(gpu->stream);
    return check(error != cudaSuccess ? error : late, what);
}

enum nep_status nep_perf_gpu_upload(struct nep_perf_rank *rank)
{
    struct nep_perf_gpu *gpu = rank->gpu;
    struct sizes s = sizes_of(rank);
    cudaError_t error = cudaSuccess;
    for (uint32_t i = 0; i < rank->options.outstanding && error == cudaSuccess; i++) {
        const struct nep_perf_lane *lane = &rank->lanes[i];
        struct gpu_lane *here = &gpu->lanes[i];
        if (rank->options.is_verified) {
            error = cudaMemsetAsync(here->rows.x, 0xff, s.rows, gpu->stream);
        }
        if (rank->options.is_verified && error == cudaSuccess) {
            error = cudaMemsetAsync(here->y, 0xff, s.y, gpu->stream);
        }
        error = error == cudaSuccess ? copy(gpu, here->x, lane->x, s.x) : error;
        error = error == cudaSuccess ? copy(gpu, here->ids, lane->ids, s.ids) : error;
        error = error == cudaSuccess ? copy(gpu, here->weights, lane->weights, s.weights) : error;
    }
    return finish(gpu, error, "inputs to the device");
}

enum nep_status nep_perf_gpu_fetch_rows(struct nep_perf_rank *rank)
{
    struct nep_perf_gpu *gpu = rank->gpu;
    struct sizes s = sizes_of(rank);
    for (uint32_t i = 0; i < rank->options.outstanding; i++) {
        struct nep_perf_lane *lane = &rank->lanes[i];
        const struct gpu_lane *here = &gpu->lanes[i];
        enum nep_status status = nep_dispatch_counts(rank->ep, lane->handle, &lane->counts);
        if (status != NEP_OK) {
            return status;
        }
        const struct {
            void *to;
            const void *from;
            uint64_t bytes;
        } parts[] = {{lane->rows.x, here->rows.x, s.rows},
                     {lane->rows.scales, here->rows.scales, s.scales},
                     {lane->rows.topk_slots, here->rows.topk_slots, s.per_k},
                     {lane->rows.topk_weights, here->rows.topk_weights, s.per_k},
                     {lane->rows.source_rank, here->rows.source_rank, s.per_row},
                     {lane->rows.source_token, here->rows.source_token, s.per_row}};
        cudaError_t error = cudaSuccess;
        for (size_t p = 0; p < sizeof parts / sizeof parts[0] && error == cudaSuccess; p++) {
            error = copy(gpu, parts[p].to, parts[p].from, parts[p].bytes);
        }
        status = finish(gpu, error, "rows to the host");
        if (status != NEP_OK) {
            return status;
        }
    }
    return NEP_OK;
}

enum nep_status nep_perf_gpu_put_experts(struct nep_perf_rank *rank)
{
    struct nep_perf_gpu *gpu = rank->gpu;
    struct sizes s = sizes_of(rank);
    cudaError_t error = cudaSuccess;
    for (uint32_t i = 0; i < rank->options.outstanding && error == cudaSuccess; i++) {
        error = copy(gpu, gpu->lanes[i].expert, rank->lanes[i].expert,
                     s.expert != 0 ? s.expert : s.rows);
    }
    return finish(gpu, error, "expert outputs to the device");
}

enum nep_status nep_perf_gpu_fetch_results(struct nep_perf_rank *rank)
{
    struct nep_perf_gpu *gpu = rank->gpu;
    struct sizes s = sizes_of(rank);
    cudaError_t error = cudaSuccess;
    for (uint32_t i = 0; i < rank->options.outstanding && error == cudaSuccess; i++) {
        error = copy(gpu, rank->lanes[i].y, gpu->lanes[i].y, s.y);
    }
    return finish(gpu, error, "results to the host");
}

/* ---- the calls ---- */

static enum nep_status elapsed(const struct nep_perf_gpu *gpu, uint64_t *ns_p)
{
    float ms = 0;
    enum nep_status status = check(cudaStreamSynchronize(gpu->stream), "the stream");
    if (status == NEP_OK) {
        status = check(cudaEventElapsedTime(&ms, gpu->begin, gpu->end), "the time");
    }
    *ns_p = (uint64_t)((double)ms * 1e6);
    return status;
}

static struct nep_tokens tokens_of(const struct nep_perf_rank *rank, uint32_t i)
{
    const struct nep_perf_lane *lane = &rank->lanes[i];
    const struct gpu_lane *here = &rank->gpu->lanes[i];
    return (struct nep_tokens){.size = sizeof(struct nep_tokens),
                               .num_tokens = lane->num_tokens,
                               .layer = nep_perf_plan_map_layer(rank->plan, lane->batch),
                               .x = here->x,
                               .topk_ids = here->ids,
                               .topk_weights = here->weights};
}

enum nep_status nep_perf_gpu_dispatch(struct nep_perf_rank *rank, uint64_t *ns_p)
{
    struct nep_perf_gpu *gpu = rank->gpu;
    uint32_t num = rank->options.outstanding;
    enum nep_status status = check(cudaEventRecord(gpu->begin, gpu->stream), "an event");
    for (uint32_t i = 0; i < num && status == NEP_OK; i++) {
        struct nep_tokens in = tokens_of(rank, i);
        status = num == 1 ? nep_dispatch(rank->ep, rank->lanes[i].handle, &in, &gpu->lanes[i].rows,
                                         gpu->stream)
                          : nep_dispatch_send(rank->ep, rank->lanes[i].handle, &in, gpu->stream);
    }
    for (uint32_t i = 0; num > 1 && i < num && status == NEP_OK; i++) {
        status =
            nep_dispatch_recv(rank->ep, rank->lanes[i].handle, &gpu->lanes[i].rows, gpu->stream);
    }
    if (status == NEP_OK) {
        status = check(cudaEventRecord(gpu->end, gpu->stream), "an event");
    }
    return status == NEP_OK ? elapsed(gpu, ns_p) : status;
}

enum nep_status nep_perf_gpu_combine(struct nep_perf_rank *rank, uint64_t *ns_p)
{
    struct nep_perf_gpu *gpu = rank->gpu;
    uint32_t num = rank->options.outstanding;
    enum nep_status status = check(cudaEventRecord(gpu->begin, gpu->stream), "an event");
    for (uint32_t i = 0; i < num && status == NEP_OK; i++) {
        const struct nep_expert_rows in = {.size = sizeof in, .y = gpu->lanes[i].expert};
        const struct nep_tokens_out out = {
            .size = sizeof out, .num_tokens = rank->lanes[i].num_tokens, .y = gpu->lanes[i].y};
        status = num == 1 ? nep_combine(rank->ep, rank->lanes[i].handle, &in, &out, gpu->stream)
                          : nep_combine_send(rank->ep, rank->lanes[i].handle, &in, gpu->stream);
    }
    for (uint32_t i = 0; num > 1 && i < num && status == NEP_OK; i++) {
        const struct nep_tokens_out out = {
            .size = sizeof out, .num_tokens = rank->lanes[i].num_tokens, .y = gpu->lanes[i].y};
        status = nep_combine_recv(rank->ep, rank->lanes[i].handle, &out, gpu->stream);
    }
    if (status == NEP_OK) {
        status = check(cudaEventRecord(gpu->end, gpu->stream), "an event");
    }
    return status == NEP_OK ? elapsed(gpu, ns_p) : status;
}

#else

int nep_perf_gpu_probe(void)
{
    return nep_perf_error(NEP_PERF_USAGE, "--executor cuda: this build has no CUDA executor");
}

static enum nep_status refuse(void)
{
    return nep_fail(NEP_ERR_UNSUPPORTED, "this build has no CUDA executor");
}

uint64_t nep_perf_gpu_bytes(const struct nep_perf_rank *rank)
{
    (void)rank;
    return 0;
}

enum nep_status nep_perf_gpu_create(struct nep_perf_rank *rank)
{
    (void)rank;
    return refuse();
}

void nep_perf_gpu_destroy(struct nep_perf_rank *rank)
{
    (void)rank;
}

enum nep_status nep_perf_gpu_upload(struct nep_perf_rank *rank)
{
    (void)rank;
    return refuse();
}

enum nep_status nep_perf_gpu_fetch_rows(struct nep_perf_rank *rank)
{
    (void)rank;
    return refuse();
}

enum nep_status nep_perf_gpu_put_experts(struct nep_perf_rank *rank)
{
    (void)rank;
    return refuse();
}

enum nep_status nep_perf_gpu_fetch_results(struct nep_perf_rank *rank)
{
    (void)rank;
    return refuse();
}

enum nep_status nep_perf_gpu_dispatch(struct nep_perf_rank *rank, uint64_t *ns_p)
{
    (void)rank;
    (void)ns_p;
    return refuse();
}

enum nep_status nep_perf_gpu_combine(struct nep_perf_rank *rank, uint64_t *ns_p)
{
    (void)rank;
    (void)ns_p;
    return refuse();
}

#endif
