/* SPDX-License-Identifier: Apache-2.0 */
/* What other folders may use of placement. */
#ifndef NEP_PLACEMENT_H
#define NEP_PLACEMENT_H

#include "nearep.h"
#include "placement/choose.h"

/* The table of one layer; valid while the map lives. node_of_rank is the map's own. */
enum nep_status nep_map_copies(const struct nep_map *map, uint32_t layer,
                               struct nep_copies *copies_p);
/* Holds the map until the same number of nep_map_destroy calls. Thread-safe. */
void nep_map_retain(struct nep_map *map);
/* A hash of all entries: compared between ranks. */
uint64_t nep_map_digest(const struct nep_map *map);

/* ---- traces: placement/trace.c; format in docs/formats.md ---- */

struct nep_trace_request {
    uint32_t domain;
    uint32_t prefill_tokens;
    uint32_t decode_tokens;
    uint32_t flags; /* bit 0: boundary unknown */
    uint64_t first_token;
};

struct nep_trace; /* mmap of a .nept file, checked whole when opened */

enum nep_status nep_trace_open(const char *path, struct nep_trace **trace_p);
void nep_trace_close(struct nep_trace *trace);
uint32_t nep_trace_num_layers(const struct nep_trace *trace);
uint32_t nep_trace_num_experts(const struct nep_trace *trace);
uint32_t nep_trace_top_k(const struct nep_trace *trace);
uint32_t nep_trace_num_requests(const struct nep_trace *trace);
uint64_t nep_trace_num_tokens(const struct nep_trace *trace);
const struct nep_trace_request *nep_trace_request_at(const struct nep_trace *trace, uint32_t idx);
/* ids of one token and layer: [top_k], -1 = none. */
void nep_trace_ids(const struct nep_trace *trace, uint64_t token, uint32_t layer, int32_t *ids);
/* The scored tokens of a request (decode; the second half where the boundary is unknown): first and
 * count. */
void nep_trace_scored(const struct nep_trace *trace, uint32_t request, uint64_t *first_p,
                      uint64_t *count_p);

#endif
