/* SPDX-License-Identifier: Apache-2.0 */
/* The inside of a trace, for trace.c and trace_write.c. */
#ifndef NEP_PLACEMENT_TRACE_H
#define NEP_PLACEMENT_TRACE_H

#include "placement/placement.h"

#define NEP_TRACE_MAGIC "NEPTRACE"

struct nep_trace_header {
    char magic[8];
    uint32_t version;
    uint32_t num_layers;
    uint32_t num_experts;
    uint32_t top_k;
    uint32_t num_requests;
    uint32_t num_domains;
    uint64_t num_tokens;
    uint32_t id_bytes;
    uint32_t reserved;
    char model[64];
};

struct nep_trace {
    void *base;
    size_t map_bytes;
    const struct nep_trace_header *header;
    const struct nep_trace_request *requests;
    const void *ids;
    char (*domain_names)[33]; /* terminated copies: the file's need not be */
    char model[65];
};

#endif
