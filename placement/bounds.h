/* SPDX-License-Identifier: Apache-2.0 */
/* How low the traffic of a layer could go: what no placement without copies can beat. */
#ifndef NEP_PLACEMENT_BOUNDS_H
#define NEP_PLACEMENT_BOUNDS_H

#include "placement/sets.h"

#define NEP_BOUND_MAX_EXPERTS 512u

/*
 * A lower bound of the mean distinct nodes per token over all placements of one copy of each expert
 * on num_nodes nodes with E / num_nodes slots each. Remote nodes per token are at least one less.
 * NEP_ERR_UNSUPPORTED, in words, where it does not apply: E not divisible or too large, tokens with
 * fewer picks than others.
 */
enum nep_status nep_bound_distinct(const struct nep_sets *sets, uint32_t num_nodes,
                                   double *distinct_p);

#endif
