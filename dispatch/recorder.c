/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Layers of a model come one call after the other with the same tokens: a step begins with layer 0,
 * which picks the tokens to be recorded; the calls of the other layers fill in their ids. A token
 * counts once all its layers have come. Requests are sampled by a hash of their key, so all ranks
 * and all steps agree about a request without talking. Rejected: sampling single tokens; the solver
 * needs whole requests.
 */
#include "dispatch/recorder.h"

#include <stdlib.h>
#include <string.h>

enum { DEFAULT_PPM = 10000, DEFAULT_REQUESTS = 4096, DEFAULT_BYTES = 64 << 20 };

struct recorded {
    uint32_t request;
    uint32_t layers; /* that have come, 0 to layer - 1 */
    bool is_prefill;
};

struct request {
    uint64_t key;
    bool is_used;
};

struct nep_recorder {
    uint32_t num_layers, num_experts, top_k;
    uint64_t threshold; /* hashes below it are recorded */
    char model[64];
    bool has_boundary;        /* every call so far said which tokens are prefill */
    struct request *requests; /* a hash table, open addressing */
    uint32_t cap_requests;    /* a power of two; at most half of it is used */
    uint32_t num_requests;
    struct recorded *tokens;
    uint16_t *ids; /* [cap_tokens][num_layers][top_k], all ones = none */
    uint64_t cap_tokens;
    uint64_t num_tokens;
    /* the step that is under way */
    uint64_t step_first;  /* its first recorded token */
    uint32_t step_tokens; /* T of its calls */
    uint32_t *step_at;    /* [cap of step] index in the call of each recorded token */
    uint32_t cap_step;
};

static uint64_t hash(uint64_t key)
{
    key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9ull;
    key = (key ^ (key >> 27)) * 0x94d049bb133111ebull;
    return key ^ (key >> 31);
}

void nep_recorder_destroy(struct nep_recorder *recorder)
{
    if (recorder != NULL) {
        free(recorder->requests);
        free(recorder->tokens);
        free(recorder->ids);
        free(recorder->step_at);
        free(recorder);
    }
}

enum nep_status nep_recorder_create(const struct nep_recorder_params *params,
                                    const struct nep_shape *shape, struct nep_recorder **recorder_p)
{
    if (shape->num_experts >= UINT16_MAX || params->sample_ppm > 1000000) {
        return nep_fail(NEP_ERR_INVALID,
                        "recorder: %u experts and %u requests in a million; at most 65534 and "
                        "1000000 are possible",
                        shape->num_experts, params->sample_ppm);
    }
    struct nep_recorder *recorder = calloc(1, sizeof *recorder);
    if (recorder == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for a recorder");
    }
    uint64_t ppm = params->sample_ppm != 0 ? params->sample_ppm : DEFAULT_PPM;
    uint64_t bytes = params->max_bytes != 0 ? params->max_bytes : DEFAULT_BYTES;
    uint32_t requests = params->max_requests != 0 ? params->max_requests : DEFAULT_REQUESTS;
    uint64_t row = (uint64_t)shape->num_layers * shape->top_k * sizeof *recorder->ids;
    recorder->num_layers = shape->num_layers;
    recorder->num_experts = shape->num_experts;
    recorder->top_k = shape->top_k;
    recorder->threshold = ppm == 1000000 ? UINT64_MAX : UINT64_MAX / 1000000 * ppm;
    recorder->has_boundary = true;
    recorder->cap_tokens = bytes / (row + sizeof *recorder->tokens);
    recorder->cap_requests = 2;
    while (recorder->cap_requests / 2 < requests && recorder->cap_requests < 1u << 30) {
        recorder->cap_requests *= 2;
    }
    recorder->cap_step = shape->max_tokens;
    if (params->model != NULL) {
        strncpy(recorder->model, params->model, sizeof recorder->model - 1);
    }
    recorder->requests = calloc(recorder->cap_requests, sizeof *recorder->requests);
    recorder->tokens = calloc(recorder->cap_tokens + 1, sizeof *recorder->tokens);
    recorder->ids = malloc((recorder->cap_tokens + 1) * row);
    recorder->step_at = calloc(recorder->cap_step, sizeof *recorder->step_at);
    if (recorder->requests == NULL || recorder->tokens == NULL || recorder->ids == NULL ||
        recorder->step_at == NULL) {
        nep_recorder_destroy(recorder);
        return nep_fail(NEP_ERR_NO_MEMORY, "recorder: no memory for %llu bytes and %u requests",
                        (unsigned long long)bytes, requests);
    }
    *recorder_p = recorder;
    return NEP_OK;
}

/* The entry of a request, made where there is room; UINT32_MAX where there is none. */
static uint32_t find_request(struct nep_recorder *recorder, uint64_t key)
{
    uint32_t mask = recorder->cap_requests - 1;
    uint32_t at = (uint32_t)hash(key ^ 0x5bd1e995u) & mask;
    while (recorder->requests[at].is_used && recorder->requests[at].key != key) {
        at = (at + 1) & mask;
    }
    if (!recorder->requests[at].is_used) {
        if (recorder->num_requests >= recorder->cap_requests / 2) {
            return UINT32_MAX;
        }
        recorder->requests[at] = (struct request){key, true};
        recorder->num_requests++;
    }
    return at;
}

/* Layer 0: picks the tokens of the step. */
static void begin_step(struct nep_recorder *recorder, const struct nep_tokens *in)
{
    recorder->step_first = recorder->num_tokens;
    recorder->step_tokens = in->num_tokens;
    recorder->has_boundary &= in->is_prefill != NULL;
    for (uint32_t t = 0; t < in->num_tokens && recorder->num_tokens < recorder->cap_tokens; t++) {
        if (hash(in->request_keys[t]) > recorder->threshold) {
            continue;
        }
        uint32_t request = find_request(recorder, in->request_keys[t]);
        if (request != UINT32_MAX) {
            recorder->step_at[recorder->num_tokens - recorder->step_first] = t;
            recorder->tokens[recorder->num_tokens++] =
                (struct recorded){request, 0, in->is_prefill != NULL && in->is_prefill[t] != 0};
        }
    }
}

/* Whether a call belongs to the step: the same number of tokens, of the same requests. */
static bool is_same_step(const struct nep_recorder *recorder, const struct nep_tokens *in)
{
    if (in->num_tokens != recorder->step_tokens) {
        return false;
    }
    for (uint64_t i = recorder->step_first; i < recorder->num_tokens; i++) {
        uint32_t t = recorder->step_at[i - recorder->step_first];
        if (recorder->requests[recorder->tokens[i].request].key != in->request_keys[t]) {
            return false;
        }
    }
    return true;
}

void nep_recorder_take(struct nep_recorder *recorder, const struct nep_tokens *in)
{
    if (in->request_keys == NULL || in->topk_ids == NULL) {
        return;
    }
    if (in->layer == 0) {
        begin_step(recorder, in);
    } else if (!is_same_step(recorder, in)) {
        recorder->step_first = recorder->num_tokens; /* its tokens stay incomplete */
        return;
    }
    uint32_t top_k = recorder->top_k;
    for (uint64_t i = recorder->step_first; i < recorder->num_tokens; i++) {
        if (recorder->tokens[i].layers != in->layer) {
            continue; /* a layer was left out */
        }
        uint64_t from = (uint64_t)recorder->step_at[i - recorder->step_first] * top_k;
        uint16_t *to = recorder->ids + (i * recorder->num_layers + in->layer) * top_k;
        for (uint32_t k = 0; k < top_k; k++) {
            int64_t id = in->id_type == NEP_IDS_INT64 ? ((const int64_t *)in->topk_ids)[from + k]
                                                      : ((const int32_t *)in->topk_ids)[from + k];
            to[k] = (uint16_t)id;
        }
        recorder->tokens[i].layers++;
    }
}

/* ---- saving --------------------------------------------------------------------------------- */

/* Adds one request's complete tokens, in the order in which they came. */
static enum nep_status add_request(const struct nep_recorder *recorder, uint32_t request,
                                   struct nep_trace_writer *writer, int32_t *ids,
                                   uint64_t *num_tokens_p)
{
    uint64_t per_token = (uint64_t)recorder->num_layers * recorder->top_k;
    uint32_t num = 0, prefill = 0;
    for (uint64_t i = 0; i < recorder->num_tokens; i++) {
        const struct recorded *token = &recorder->tokens[i];
        if (token->request != request || token->layers != recorder->num_layers) {
            continue;
        }
        for (uint64_t k = 0; k < per_token; k++) {
            uint16_t id = recorder->ids[i * per_token + k];
            ids[num * per_token + k] = id == UINT16_MAX ? -1 : id;
        }
        prefill += token->is_prefill && prefill == num; /* the leading ones */
        num++;
    }
    if (num == 0) {
        return NEP_OK;
    }
    if (!recorder->has_boundary) {
        prefill = 0;
    }
    struct nep_trace_request row = {
        .prefill_tokens = prefill,
        .decode_tokens = num - prefill,
        .flags = recorder->has_boundary ? 0 : NEP_TRACE_NO_BOUNDARY,
    };
    *num_tokens_p += num;
    return nep_trace_writer_add(writer, &row, ids);
}

enum nep_status nep_recorder_save(const struct nep_recorder *recorder, const char *path,
                                  uint64_t *num_tokens_p)
{
    struct nep_trace_shape shape = {
        .size = sizeof shape,
        .num_layers = recorder->num_layers,
        .num_experts = recorder->num_experts,
        .top_k = recorder->top_k,
        .num_domains = 1,
    };
    static const char *const domains[] = {"recorded"};
    uint64_t per_token = (uint64_t)recorder->num_layers * recorder->top_k;
    struct nep_trace_writer *writer = NULL;
    uint64_t num_tokens = 0;
    int32_t *ids = malloc((recorder->num_tokens + 1) * per_token * sizeof *ids);
    enum nep_status status =
        ids == NULL ? nep_fail(NEP_ERR_NO_MEMORY, "recorder: no memory to write %llu tokens",
                               (unsigned long long)recorder->num_tokens)
                    : nep_trace_writer_create(&shape, recorder->model, domains, &writer);
    for (uint32_t r = 0; status == NEP_OK && r < recorder->cap_requests; r++) {
        if (recorder->requests[r].is_used) {
            status = add_request(recorder, r, writer, ids, &num_tokens);
        }
    }
    if (status == NEP_OK) {
        status = nep_trace_writer_save(writer, path);
    }
    nep_trace_writer_destroy(writer);
    free(ids);
    if (status == NEP_OK && num_tokens_p != NULL) {
        *num_tokens_p = num_tokens;
    }
    return status;
}
