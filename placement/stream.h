/* SPDX-License-Identifier: Apache-2.0 */
/* Requests as a stream in time, with the online corrector running along. */
#ifndef NEP_PLACEMENT_STREAM_H
#define NEP_PLACEMENT_STREAM_H

#include "placement/score.h"

/* As nep_score_map, over the whole stream, while the map is corrected; *moved_p: copies moved. */
enum nep_status nep_stream_score(const struct nep_requests *requests, const struct nep_map *map,
                                 const uint32_t *homes, struct nep_score *score_p,
                                 uint64_t *moved_p);
/* Control: replaces the trace by one whose picks are exchanged at random between tokens, layer by
 * layer; loads and numbers of picks stay, who picks what together does not. */
enum nep_status nep_trace_shuffle(uint64_t seed, struct nep_trace **trace_p);

#endif
