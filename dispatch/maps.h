/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which placement map an operation routes with. Maps are staged for an operation number that all
 * ranks name alike; COUNTS carry a digest, so a rank that staged another one is named. A handle
 * keeps the version it was routed with until it is routed again or destroyed.
 */
#ifndef NEP_DISPATCH_MAPS_H
#define NEP_DISPATCH_MAPS_H

#include "dispatch/shape.h"
#include "placement/placement.h"

enum { NEP_MAX_STAGED = 4 };

/* Whom maps speak of, and who is there. */
struct nep_members {
    const struct nep_topology *seats;   /* maps number these */
    const struct nep_topology *members; /* slots are numbered by these */
    const uint32_t *seat_of;            /* [members] ascending */
};

/* One version, flattened for route. */
struct nep_map_version {
    struct nep_map *map;
    struct nep_copies *copies; /* [num_layers] */
    void *tables;              /* of copies, where seats are empty; else they are the map's */
    uint8_t *is_lost;          /* [num_layers][E] 1: no copy is left; NULL: nothing is lost */
    uint64_t digest;
    uint64_t op; /* the first operation that uses it */
    uint32_t version;
};

struct nep_maps {
    struct nep_map_version now;
    struct nep_map_version staged[NEP_MAX_STAGED]; /* ascending by op */
    uint32_t num_staged;
    uint32_t num_versions; /* ever made */
    struct nep_members group;
};

/* The first version: `map`, or the contiguous one where it is NULL. What group points to outlives
 * it, or is replaced by nep_maps_renew. */
enum nep_status nep_maps_init(struct nep_maps *maps, const struct nep_map *map,
                              const struct nep_shape *shape, const struct nep_members *group);
void nep_maps_fini(struct nep_maps *maps);
/* Other members: all versions are flattened anew, copies on empty seats left out. */
enum nep_status nep_maps_renew(struct nep_maps *maps, const struct nep_shape *shape,
                               const struct nep_members *group);
/* Stages one more for operation `op` and later. *version_p, where given: its number. */
enum nep_status nep_maps_stage(struct nep_maps *maps, const struct nep_map *map,
                               const struct nep_shape *shape, uint64_t op, uint32_t *version_p);
/* The version of operation `op`: staged ones that have come are taken over. */
const struct nep_map_version *nep_maps_at(struct nep_maps *maps, uint64_t op);

#endif
