/* SPDX-License-Identifier: Apache-2.0 */
#ifndef NEP_PLACEMENT_REPACK_H
#define NEP_PLACEMENT_REPACK_H

#include "placement/map.h"

/* The same experts on the same nodes, ranks of a node packed by load alone (heaviest first, to the
 * lightest rank with a free slot): the yardstick of intra.c. loads: [num_layers][num_experts]; an
 * expert's copies share its load. */
enum nep_status nep_map_repack(const struct nep_map *map, const double *loads,
                               struct nep_map **map_p);

#endif
