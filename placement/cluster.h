/* SPDX-License-Identifier: Apache-2.0 */
/* First homes of requests, before there is a map: balanced k-means of what they activate. */
#ifndef NEP_PLACEMENT_CLUSTER_H
#define NEP_PLACEMENT_CLUSTER_H

#include "placement/homes.h"

/* Which tokens of a request speak for it. */
enum nep_cluster_part { NEP_CLUSTER_ALL, NEP_CLUSTER_SCORED };

/* homes: [requests->num]. Balanced by the tokens of the requests, as NEP_HOMES_SLACK allows. */
enum nep_status nep_cluster_homes(const struct nep_requests *requests,
                                  const struct nep_map_shape *shape, enum nep_cluster_part part,
                                  uint64_t seed, uint32_t *homes);

#endif
