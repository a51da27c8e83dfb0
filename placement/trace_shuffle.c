/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The shuffled control: picks wander between tokens of the whole trace, within their layer, by
 * random exchanges that never give a token an expert twice. Every expert keeps its load and every
 * token its number of picks; co-activation and the requests' characters are gone, and with them
 * every gain that came from locality.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/status.h"
#include "placement/rng.h"
#include "placement/stream.h"
#include "placement/trace.h"

#define EXCHANGES_PER_PICK 8u

static uint32_t get(const struct nep_trace *trace, uint64_t at)
{
    return trace->header->id_bytes == 1 ? ((const uint8_t *)trace->ids)[at]
                                        : ((const uint16_t *)trace->ids)[at];
}

static void put(struct nep_trace *trace, uint64_t at, uint32_t id)
{
    if (trace->header->id_bytes == 1) {
        ((uint8_t *)trace->ids)[at] = (uint8_t)id;
    } else {
        ((uint16_t *)trace->ids)[at] = (uint16_t)id;
    }
}

static int has(const struct nep_trace *trace, uint64_t row, uint32_t top_k, uint32_t id)
{
    for (uint32_t k = 0; k < top_k; k++) {
        if (get(trace, row + k) == id) {
            return 1;
        }
    }
    return 0;
}

static void shuffle_layer(struct nep_trace *trace, struct nep_rng *rng, uint32_t layer)
{
    uint32_t top_k = trace->header->top_k;
    uint64_t per_token = (uint64_t)trace->header->num_layers * top_k;
    uint32_t tokens = (uint32_t)trace->header->num_tokens;
    for (uint64_t i = 0; i < (uint64_t)tokens * top_k * EXCHANGES_PER_PICK; i++) {
        uint64_t a = nep_rng_below(rng, tokens) * per_token + (uint64_t)layer * top_k;
        uint64_t b = nep_rng_below(rng, tokens) * per_token + (uint64_t)layer * top_k;
        uint64_t at_a = a + nep_rng_below(rng, top_k);
        uint64_t at_b = b + nep_rng_below(rng, top_k);
        uint32_t x = get(trace, at_a);
        uint32_t y = get(trace, at_b);
        if (!has(trace, b, top_k, x) && !has(trace, a, top_k, y)) {
            put(trace, at_a, y);
            put(trace, at_b, x);
        }
    }
}

enum nep_status nep_trace_shuffle(uint64_t seed, struct nep_trace **trace_p)
{
    struct nep_trace *from = *trace_p;
    if (from->header->num_tokens >= UINT32_MAX) {
        return nep_fail(NEP_ERR_UNSUPPORTED, "shuffle: more than 2^32 tokens");
    }
    void *base =
        mmap(NULL, from->map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
        return nep_fail(NEP_ERR_NO_MEMORY, "shuffle: no memory for %zu bytes", from->map_bytes);
    }
    memcpy(base, from->base, from->map_bytes);
    from->requests =
        (const void *)((char *)base + ((const char *)from->requests - (const char *)from->base));
    from->ids = (char *)base + ((const char *)from->ids - (const char *)from->base);
    munmap(from->base, from->map_bytes);
    from->base = base;
    from->header = base;
    struct nep_rng rng = nep_rng_seed(seed);
    for (uint32_t l = 0; l < from->header->num_layers; l++) {
        shuffle_layer(from, &rng, l);
    }
    return NEP_OK;
}
