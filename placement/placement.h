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

/* ---- traces: placement/trace.c; the rest of the reader is public ---- */

#define NEP_TRACE_TOP_K_LIMIT 32

uint32_t nep_trace_num_layers(const struct nep_trace *trace);
uint32_t nep_trace_num_experts(const struct nep_trace *trace);
uint32_t nep_trace_top_k(const struct nep_trace *trace);
uint32_t nep_trace_num_requests(const struct nep_trace *trace);
uint64_t nep_trace_num_tokens(const struct nep_trace *trace);
/* The scored tokens of a request (decode; the second half where the boundary is unknown): first and
 * count. */
void nep_trace_scored(const struct nep_trace *trace, uint32_t request, uint64_t *first_p,
                      uint64_t *count_p);
/* The signature part: all tokens before the scored ones. */
void nep_trace_signature(const struct nep_trace *trace, uint32_t request, uint64_t *first_p,
                         uint64_t *count_p);
/* NEP_ERR_MISMATCH with both numbers when a map is not for this trace: experts or layers differ. */
enum nep_status nep_trace_match(const struct nep_trace *trace, const struct nep_map *map);

#endif
