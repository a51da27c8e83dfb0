/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reader of routing traces: the file is mapped and read in place, so that opening a trace costs one
 * pass for the CRC and one over the ids, and no copy. Everything that later code relies on is
 * checked here, once: after nep_trace_open every id is an expert or "none", and every request lies
 * inside the tokens and overlaps no other. Sizes are computed with overflow checks before any of
 * them is used, so that a hostile header costs nothing.
 *
 * Rejected: copying ids to int32 at open (four times the memory, for a conversion that costs less
 * than the cache miss beside it).
 */
#include "placement/trace.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include "base/status.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "traces are little-endian and read in place"
#endif

_Static_assert(sizeof(struct nep_trace_header) == 112, "the header of the file");
_Static_assert(sizeof(struct nep_trace_request) == 24, "a request record of the file");

static enum nep_status check_header(const char *path, const struct nep_trace_header *header)
{
    if (memcmp(header->magic, NEP_TRACE_MAGIC, 8) != 0) {
        return nep_fail(NEP_ERR_FORMAT, "%s: not a trace, it does not start with \"NEPTRACE\"",
                        path);
    }
    if (header->version != 1) {
        return nep_fail(NEP_ERR_FORMAT, "%s: version %u of the trace format, this reads version 1",
                        path, header->version);
    }
    if (header->reserved != 0) {
        return nep_fail(NEP_ERR_FORMAT, "%s: the reserved word at byte 44 is %u, not 0", path,
                        header->reserved);
    }
    if (header->id_bytes != 1 && header->id_bytes != 2) {
        return nep_fail(NEP_ERR_FORMAT, "%s: id_bytes is %u, not 1 or 2", path, header->id_bytes);
    }
    if (header->num_layers == 0 || header->num_experts == 0 || header->top_k == 0 ||
        header->num_experts > (header->id_bytes == 1 ? 256u : 65536u) ||
        header->top_k > header->num_experts) {
        return nep_fail(
            NEP_ERR_FORMAT, "%s: %u layers, %u experts, top-k %u with ids of %u bytes: impossible",
            path, header->num_layers, header->num_experts, header->top_k, header->id_bytes);
    }
    if (header->top_k > NEP_TRACE_TOP_K_LIMIT) {
        return nep_fail(NEP_ERR_UNSUPPORTED, "%s: top-k %u, at most %d is supported", path,
                        header->top_k, NEP_TRACE_TOP_K_LIMIT);
    }
    return NEP_OK;
}

/* The length that the header promises; 0 when it does not fit 64 bits. */
static uint64_t promised_bytes(const struct nep_trace_header *header)
{
    uint64_t per_token;
    uint64_t ids;
    uint64_t total = sizeof *header + 32ull * header->num_domains + 24ull * header->num_requests;
    if (__builtin_mul_overflow((uint64_t)header->num_layers * header->top_k,
                               (uint64_t)header->id_bytes, &per_token) ||
        __builtin_mul_overflow(per_token, header->num_tokens, &ids) ||
        __builtin_add_overflow(total, ids, &total) || __builtin_add_overflow(total, 4u, &total)) {
        return 0;
    }
    return total;
}

static int request_before(const void *a, const void *b, void *requests)
{
    const struct nep_trace_request *x = (struct nep_trace_request *)requests + *(const uint32_t *)a;
    const struct nep_trace_request *y = (struct nep_trace_request *)requests + *(const uint32_t *)b;
    if (x->first_token != y->first_token) {
        return x->first_token < y->first_token ? -1 : 1;
    }
    return (x->decode_tokens + (uint64_t)x->prefill_tokens > 0) -
           (y->decode_tokens + (uint64_t)y->prefill_tokens > 0);
}

static enum nep_status check_overlap(const char *path, const struct nep_trace *trace)
{
    uint32_t num = trace->header->num_requests;
    uint32_t *order = malloc(((size_t)num + 1) * sizeof *order);
    if (order == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "%s: no memory to sort %u requests", path, num);
    }
    for (uint32_t i = 0; i < num; i++) {
        order[i] = i;
    }
    qsort_r(order, num, sizeof *order, request_before, (void *)trace->requests);
    uint64_t end = 0;
    uint32_t last = 0;
    enum nep_status status = NEP_OK;
    for (uint32_t i = 0; i < num && status == NEP_OK; i++) {
        const struct nep_trace_request *request = &trace->requests[order[i]];
        uint64_t tokens = (uint64_t)request->prefill_tokens + request->decode_tokens;
        if (tokens > 0 && request->first_token < end) {
            status = nep_fail(NEP_ERR_FORMAT, "%s: requests %u and %u overlap at token %llu", path,
                              last, order[i], (unsigned long long)request->first_token);
        }
        if (tokens > 0) {
            end = request->first_token + tokens;
            last = order[i];
        }
    }
    free(order);
    return status;
}

static enum nep_status check_requests(const char *path, const struct nep_trace *trace)
{
    const struct nep_trace_header *header = trace->header;
    uint64_t sum = 0;
    for (uint32_t i = 0; i < header->num_requests; i++) {
        const struct nep_trace_request *request = &trace->requests[i];
        uint64_t tokens = (uint64_t)request->prefill_tokens + request->decode_tokens;
        if (request->domain >= header->num_domains) {
            return nep_fail(NEP_ERR_FORMAT, "%s: request %u has domain %u of %u", path, i,
                            request->domain, header->num_domains);
        }
        if (request->first_token > header->num_tokens ||
            tokens > header->num_tokens - request->first_token) {
            return nep_fail(NEP_ERR_FORMAT,
                            "%s: request %u has tokens %llu + %llu, past the end at %llu", path, i,
                            (unsigned long long)request->first_token, (unsigned long long)tokens,
                            (unsigned long long)header->num_tokens);
        }
        if ((request->flags & NEP_TRACE_NO_BOUNDARY) != 0 && request->prefill_tokens != 0) {
            return nep_fail(NEP_ERR_FORMAT,
                            "%s: request %u says that its boundary is unknown and has %u prefill "
                            "tokens",
                            path, i, request->prefill_tokens);
        }
        sum += tokens;
    }
    if (sum != header->num_tokens) {
        return nep_fail(NEP_ERR_FORMAT, "%s: its requests have %llu tokens, the header says %llu",
                        path, (unsigned long long)sum, (unsigned long long)header->num_tokens);
    }
    return check_overlap(path, trace);
}

static enum nep_status check_ids(const char *path, const struct nep_trace *trace)
{
    const struct nep_trace_header *header = trace->header;
    uint64_t per_token = (uint64_t)header->num_layers * header->top_k;
    uint64_t num = per_token * header->num_tokens;
    uint32_t experts = header->num_experts;
    uint32_t none = header->id_bytes == 1 ? UINT8_MAX : UINT16_MAX;
    for (uint64_t i = 0; i < num; i++) {
        uint32_t id = header->id_bytes == 1 ? ((const uint8_t *)trace->ids)[i]
                                            : ((const uint16_t *)trace->ids)[i];
        if (id >= experts && id != none) {
            uint64_t in_token = i % per_token;
            return nep_fail(NEP_ERR_FORMAT, "%s: token %llu, layer %llu, k %llu: id %u of %u", path,
                            (unsigned long long)(i / per_token),
                            (unsigned long long)(in_token / header->top_k),
                            (unsigned long long)(in_token % header->top_k), id, experts);
        }
    }
    return NEP_OK;
}

static enum nep_status copy_names(const char *path, struct nep_trace *trace)
{
    uint32_t num = trace->header->num_domains;
    trace->domain_names = calloc((size_t)num + 1, sizeof *trace->domain_names);
    if (trace->domain_names == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "%s: no memory for %u domain names", path, num);
    }
    memcpy(trace->model, trace->header->model, sizeof trace->header->model);
    const char *names = (const char *)(trace->header + 1);
    for (uint32_t i = 0; i < num; i++) {
        memcpy(trace->domain_names[i], names + 32ull * i, 32);
    }
    return NEP_OK;
}

static enum nep_status check_all(const char *path, struct nep_trace *trace)
{
    if (trace->map_bytes < sizeof(struct nep_trace_header) + 4) {
        return nep_fail(NEP_ERR_FORMAT, "%s: %zu bytes, less than a trace's header", path,
                        trace->map_bytes);
    }
    const char *base = trace->base;
    trace->header = trace->base;
    enum nep_status status = check_header(path, trace->header);
    if (status != NEP_OK) {
        return status;
    }
    uint64_t promised = promised_bytes(trace->header);
    if (promised != trace->map_bytes) {
        return nep_fail(NEP_ERR_FORMAT,
                        "%s: %zu bytes, but its header promises %llu (%u requests, %llu tokens, "
                        "%u layers, top-k %u): truncated or damaged",
                        path, trace->map_bytes, (unsigned long long)promised,
                        trace->header->num_requests, (unsigned long long)trace->header->num_tokens,
                        trace->header->num_layers, trace->header->top_k);
    }
    trace->requests =
        (const void *)(base + sizeof *trace->header + 32ull * trace->header->num_domains);
    trace->ids = trace->requests + trace->header->num_requests;
    uint32_t stored;
    memcpy(&stored, base + promised - 4, 4);
    uint32_t crc = (uint32_t)crc32_z(0, trace->base, promised - 4);
    if (crc != stored) {
        return nep_fail(NEP_ERR_FORMAT, "%s: CRC %08x, the file says %08x: damaged", path, crc,
                        stored);
    }
    status = check_requests(path, trace);
    if (status == NEP_OK) {
        status = check_ids(path, trace);
    }
    return status == NEP_OK ? copy_names(path, trace) : status;
}

static enum nep_status map_file(const char *path, struct nep_trace *trace)
{
    /* NONBLOCK: opening a FIFO must not wait for a writer. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        return nep_fail(errno == ENOENT ? NEP_ERR_NOT_FOUND : NEP_ERR_IO, "%s: cannot open: %s",
                        path, strerror(errno));
    }
    struct stat info;
    enum nep_status status = NEP_OK;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        status = nep_fail(NEP_ERR_IO, "%s: not a regular file", path);
    } else if (info.st_size == 0) {
        status = nep_fail(NEP_ERR_FORMAT, "%s: empty", path);
    } else {
        trace->map_bytes = (size_t)info.st_size;
        trace->base = mmap(NULL, trace->map_bytes, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
        if (trace->base == MAP_FAILED) {
            trace->base = NULL;
            status = nep_fail(NEP_ERR_IO, "%s: cannot map %zu bytes: %s", path, trace->map_bytes,
                              strerror(errno));
        }
    }
    close(fd);
    return status;
}

enum nep_status nep_trace_open(const char *path, struct nep_trace **trace_p)
{
    if (path == NULL || trace_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_trace_open: path or trace_p is NULL");
    }
    struct nep_trace *trace = calloc(1, sizeof *trace);
    if (trace == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "%s: no memory for a trace", path);
    }
    enum nep_status status = map_file(path, trace);
    if (status == NEP_OK) {
        status = check_all(path, trace);
    }
    if (status != NEP_OK) {
        nep_trace_close(trace);
        return status;
    }
    *trace_p = trace;
    return NEP_OK;
}

void nep_trace_close(struct nep_trace *trace)
{
    if (trace == NULL) {
        return;
    }
    if (trace->base != NULL) {
        munmap(trace->base, trace->map_bytes);
    }
    free(trace->domain_names);
    free(trace);
}

enum nep_status nep_trace_get_shape(const struct nep_trace *trace, struct nep_trace_shape *shape_p)
{
    if (trace == NULL || shape_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_trace_get_shape: trace or shape_p is NULL");
    }
    *shape_p = (struct nep_trace_shape){
        .size = sizeof *shape_p,
        .num_layers = trace->header->num_layers,
        .num_experts = trace->header->num_experts,
        .top_k = trace->header->top_k,
        .num_requests = trace->header->num_requests,
        .num_domains = trace->header->num_domains,
        .num_tokens = trace->header->num_tokens,
    };
    return NEP_OK;
}

const char *nep_trace_model(const struct nep_trace *trace)
{
    return trace->model;
}

const char *nep_trace_domain(const struct nep_trace *trace, uint32_t domain)
{
    return domain < trace->header->num_domains ? trace->domain_names[domain] : "";
}

uint32_t nep_trace_num_layers(const struct nep_trace *trace)
{
    return trace->header->num_layers;
}

uint32_t nep_trace_num_experts(const struct nep_trace *trace)
{
    return trace->header->num_experts;
}

uint32_t nep_trace_top_k(const struct nep_trace *trace)
{
    return trace->header->top_k;
}

uint32_t nep_trace_num_requests(const struct nep_trace *trace)
{
    return trace->header->num_requests;
}

uint64_t nep_trace_num_tokens(const struct nep_trace *trace)
{
    return trace->header->num_tokens;
}

const struct nep_trace_request *nep_trace_request_at(const struct nep_trace *trace, uint32_t idx)
{
    return idx < trace->header->num_requests ? &trace->requests[idx] : NULL;
}

void nep_trace_ids(const struct nep_trace *trace, uint64_t token, uint32_t layer, int32_t *ids)
{
    const struct nep_trace_header *header = trace->header;
    uint32_t top_k = header->top_k;
    uint64_t first = (token * header->num_layers + layer) * top_k;
    for (uint32_t k = 0; k < top_k; k++) {
        uint32_t id = header->id_bytes == 1 ? ((const uint8_t *)trace->ids)[first + k]
                                            : ((const uint16_t *)trace->ids)[first + k];
        ids[k] = id < header->num_experts ? (int32_t)id : -1;
    }
}

void nep_trace_signature(const struct nep_trace *trace, uint32_t request, uint64_t *first_p,
                         uint64_t *count_p)
{
    const struct nep_trace_request *r = &trace->requests[request];
    uint64_t tokens = (uint64_t)r->prefill_tokens + r->decode_tokens;
    *first_p = r->first_token;
    *count_p = (r->flags & NEP_TRACE_NO_BOUNDARY) != 0 ? tokens / 2 : r->prefill_tokens;
}

void nep_trace_scored(const struct nep_trace *trace, uint32_t request, uint64_t *first_p,
                      uint64_t *count_p)
{
    const struct nep_trace_request *r = &trace->requests[request];
    uint64_t before;
    nep_trace_signature(trace, request, first_p, &before);
    *first_p += before;
    *count_p = (uint64_t)r->prefill_tokens + r->decode_tokens - before;
}
