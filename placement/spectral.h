/* SPDX-License-Identifier: Apache-2.0 */
/* Spectral clustering of experts, a baseline: co-activation only, no homes, no limit on load. */
#ifndef NEP_PLACEMENT_SPECTRAL_H
#define NEP_PLACEMENT_SPECTRAL_H

#include "placement/homes.h"
#include "placement/sets.h"

/* Each layer by itself, one copy per expert, E divided over the nodes by their ranks. */
enum nep_status nep_solve_spectral(const struct nep_requests *requests,
                                   const struct nep_map_shape *shape, uint64_t seed,
                                   struct nep_map **map_p);
/* node_of: [num_items]. slots: [num_nodes], at least num_items together. */
enum nep_status nep_spectral_layer(const struct nep_sets *sets, uint32_t num_nodes,
                                   const uint32_t *slots, uint64_t seed, uint16_t *node_of);

#endif
