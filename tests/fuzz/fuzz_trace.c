/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes as a routing trace: refused with a sentence, or one whose every id and request is in
 * range. The checksum is made right first, or nearly every input would end there; one without is
 * tried as well.
 */
#include <unistd.h>
#include <zlib.h>

#include "base/log.h"
#include "placement/placement.h"
#include "tests/fuzz/fuzz.h"

static void check_requests(const struct nep_trace *trace, const struct nep_trace_shape *shape)
{
    for (uint32_t r = 0; r < shape->num_requests; r++) {
        const struct nep_trace_request *request = nep_trace_request_at(trace, r);
        uint64_t tokens = (uint64_t)request->prefill_tokens + request->decode_tokens;
        PROMISE(request->domain < shape->num_domains);
        PROMISE(request->first_token <= shape->num_tokens);
        PROMISE(tokens <= shape->num_tokens - request->first_token);
    }
    PROMISE(nep_trace_request_at(trace, shape->num_requests) == NULL);
}

static void check(const struct nep_trace *trace)
{
    struct nep_trace_shape shape = {.size = sizeof shape};
    PROMISE(nep_trace_get_shape(trace, &shape) == NEP_OK);
    check_requests(trace, &shape);
    int32_t *ids = malloc(shape.top_k * sizeof *ids);
    PROMISE(ids != NULL);
    for (uint64_t t = 0; t < shape.num_tokens; t++) {
        for (uint32_t l = 0; l < shape.num_layers; l++) {
            nep_trace_ids(trace, t, l, ids);
            for (uint32_t k = 0; k < shape.top_k; k++) {
                PROMISE(ids[k] >= -1 && ids[k] < (int32_t)shape.num_experts);
            }
        }
    }
    free(ids);
    for (uint32_t d = 0; d <= shape.num_domains; d++) {
        PROMISE(strlen(nep_trace_domain(trace, d)) < 32);
    }
    PROMISE(strlen(nep_trace_model(trace)) < 64);
}

static void try_file(const uint8_t *data, size_t len)
{
    char path[64];
    struct nep_trace *trace = NULL;
    int fd = fuzz_file(data, len, path, sizeof path);
    if (nep_trace_open(path, &trace) == NEP_OK) {
        check(trace);
        nep_trace_close(trace);
    } else {
        PROMISE(trace == NULL && nep_last_message()[0] != '\0');
    }
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    nep_log_open(NEP_LOG_NONE, "");
    try_file(data, len);
    if (len >= 4) {
        uint8_t *copy = malloc(len);
        PROMISE(copy != NULL);
        memcpy(copy, data, len);
        uint32_t crc = (uint32_t)crc32_z(0, copy, len - 4);
        memcpy(copy + len - 4, &crc, sizeof crc);
        try_file(copy, len);
        free(copy);
    }
    return 0;
}
