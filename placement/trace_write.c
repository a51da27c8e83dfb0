/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Writer of routing traces. Requests are collected in memory in the file's own encoding and written
 * at once, so that a reader never sees half a file and the header needs no second pass.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "base/out_file.h"
#include "base/status.h"
#include "placement/trace.h"

struct nep_trace_writer {
    struct nep_trace_header header;
    char (*domains)[32];
    struct nep_trace_request *requests;
    size_t cap_requests;
    uint8_t *ids;
    size_t ids_bytes;
    size_t cap_ids_bytes;
};

static enum nep_status grow(void **array, size_t *cap, size_t need, size_t elem)
{
    if (need <= *cap) {
        return NEP_OK;
    }
    size_t next = need < 64 ? 64 : need + need / 2;
    void *bigger = realloc(*array, next * elem);
    if (bigger == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "trace writer: no memory for %zu bytes", next * elem);
    }
    *array = bigger;
    *cap = next;
    return NEP_OK;
}

enum nep_status nep_trace_writer_create(const struct nep_trace_shape *shape, const char *model,
                                        const char *const *domains,
                                        struct nep_trace_writer **writer_p)
{
    struct nep_trace_shape s;
    enum nep_status status =
        nep_struct_copy(&s, sizeof s, shape, sizeof(size_t) + 4 * 5, "nep_trace_shape");
    if (status != NEP_OK) {
        return status;
    }
    if (s.num_layers == 0 || s.num_experts == 0 || s.num_experts > 65535 || s.top_k == 0 ||
        s.top_k > s.num_experts || s.top_k > NEP_TRACE_TOP_K_LIMIT ||
        (s.num_domains > 0 && domains == NULL) || writer_p == NULL) {
        return nep_fail(NEP_ERR_INVALID,
                        "trace writer: %u layers, %u experts, top-k %u, %u domains: impossible",
                        s.num_layers, s.num_experts, s.top_k, s.num_domains);
    }
    struct nep_trace_writer *writer = calloc(1, sizeof *writer);
    if (writer == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "trace writer: no memory");
    }
    writer->domains = calloc((size_t)s.num_domains + 1, sizeof *writer->domains);
    if (writer->domains == NULL) {
        free(writer);
        return nep_fail(NEP_ERR_NO_MEMORY, "trace writer: no memory for %u domains", s.num_domains);
    }
    struct nep_trace_header *header = &writer->header;
    memcpy(header->magic, NEP_TRACE_MAGIC, 8);
    header->version = 1;
    header->num_layers = s.num_layers;
    header->num_experts = s.num_experts;
    header->top_k = s.top_k;
    header->num_domains = s.num_domains;
    /* 255 experts and one byte leave 255 for "none"; 256 need two bytes to keep a "none". */
    header->id_bytes = s.num_experts <= 255 ? 1 : 2;
    snprintf(header->model, sizeof header->model, "%s", model == NULL ? "" : model);
    for (uint32_t i = 0; i < s.num_domains; i++) {
        snprintf(writer->domains[i], sizeof writer->domains[i], "%s", domains[i]);
    }
    *writer_p = writer;
    return NEP_OK;
}

enum nep_status nep_trace_writer_add(struct nep_trace_writer *writer,
                                     const struct nep_trace_request *request, const int32_t *ids)
{
    if (writer == NULL || request == NULL || ids == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_trace_writer_add: an argument is NULL");
    }
    struct nep_trace_header *header = &writer->header;
    size_t tokens = (size_t)request->prefill_tokens + request->decode_tokens;
    size_t num = tokens * header->num_layers * header->top_k;
    if (request->domain >= header->num_domains || header->num_requests == UINT32_MAX) {
        return nep_fail(NEP_ERR_INVALID, "trace writer: domain %u of %u", request->domain,
                        header->num_domains);
    }
    for (size_t i = 0; i < num; i++) {
        if (ids[i] < -1 || ids[i] >= (int32_t)header->num_experts) {
            return nep_fail(NEP_ERR_INVALID, "trace writer: id %d at %zu of request %u, experts %u",
                            ids[i], i, header->num_requests, header->num_experts);
        }
    }
    enum nep_status status = grow((void **)&writer->requests, &writer->cap_requests,
                                  (size_t)header->num_requests + 1, sizeof *writer->requests);
    if (status == NEP_OK) {
        status = grow((void **)&writer->ids, &writer->cap_ids_bytes,
                      writer->ids_bytes + num * header->id_bytes, 1);
    }
    if (status != NEP_OK) {
        return status;
    }
    uint8_t *out = writer->ids + writer->ids_bytes;
    for (size_t i = 0; i < num; i++) {
        /* -1 becomes all ones in either width; little-endian. */
        memcpy(out + i * header->id_bytes, &ids[i], header->id_bytes);
    }
    writer->ids_bytes += num * header->id_bytes;
    writer->requests[header->num_requests] = *request;
    writer->requests[header->num_requests].first_token = header->num_tokens;
    header->num_requests++;
    header->num_tokens += tokens;
    return NEP_OK;
}

static void put(FILE *file, const void *data, size_t bytes, uint32_t *crc)
{
    if (bytes > 0) {
        *crc = (uint32_t)crc32_z(*crc, data, bytes);
        fwrite(data, 1, bytes, file);
    }
}

enum nep_status nep_trace_writer_save(const struct nep_trace_writer *writer, const char *path)
{
    struct nep_out_file out;
    if (writer == NULL || path == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_trace_writer_save: writer or path is NULL");
    }
    enum nep_status status = nep_out_file_open(&out, path);
    if (status != NEP_OK) {
        return status;
    }
    const struct nep_trace_header *header = &writer->header;
    uint32_t crc = 0;
    put(out.file, header, sizeof *header, &crc);
    put(out.file, writer->domains, 32 * (size_t)header->num_domains, &crc);
    put(out.file, writer->requests, sizeof *writer->requests * header->num_requests, &crc);
    put(out.file, writer->ids, writer->ids_bytes, &crc);
    fwrite(&crc, 4, 1, out.file);
    return nep_out_file_commit(&out);
}

void nep_trace_writer_destroy(struct nep_trace_writer *writer)
{
    if (writer == NULL) {
        return;
    }
    free(writer->domains);
    free(writer->requests);
    free(writer->ids);
    free(writer);
}
