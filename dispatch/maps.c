/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Versions of the map. A staged map is checked and flattened when it is staged, so that taking it
 * over, in the middle of a step, cannot fail. What a handle keeps is the number of its version and
 * the slots that its tokens went to; the table itself is not needed any more once they are routed.
 */
#include "dispatch/maps.h"

#include <stdlib.h>
#include <string.h>

/* The map must be of this group and shape. */
static enum nep_status check_map(const struct nep_map *map, const struct nep_shape *shape,
                                 const struct nep_topology *topology)
{
    struct nep_map_shape is = {.size = sizeof is};
    enum nep_status status = nep_map_get_shape(map, &is);
    if (status != NEP_OK) {
        return status;
    }
    const struct {
        const char *what;
        uint64_t map, ep;
    } rows[] = {
        {"experts", is.num_experts, shape->num_experts},
        {"ranks", is.num_ranks, topology->num_ranks},
        {"nodes", is.num_nodes, topology->num_nodes},
        {"slots per rank", is.slots_per_rank, shape->slots_per_rank},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        if (rows[i].map != rows[i].ep) {
            return nep_fail(NEP_ERR_INVALID, "the map is for %llu %s, this ep has %llu",
                            (unsigned long long)rows[i].map, rows[i].what,
                            (unsigned long long)rows[i].ep);
        }
    }
    if (is.num_layers < shape->num_layers) {
        return nep_fail(NEP_ERR_INVALID, "the map has %u layers, this ep %u", is.num_layers,
                        shape->num_layers);
    }
    /* A map numbers ranks node by node. */
    uint32_t rank = 0;
    for (uint32_t n = 0; n < is.num_nodes; n++) {
        for (uint32_t i = 0; i < is.ranks_per_node[n]; i++, rank++) {
            if (topology->node_of_rank[rank] != n) {
                return nep_fail(NEP_ERR_INVALID,
                                "the map puts rank %u on node %u, here it is on node %u", rank, n,
                                topology->node_of_rank[rank]);
            }
        }
    }
    return NEP_OK;
}

static void version_fini(struct nep_map_version *version)
{
    free(version->copies);
    free(version->tables);
    free(version->is_lost);
    nep_map_destroy(version->map);
    memset(version, 0, sizeof *version);
}

/* member_of[seat], UINT32_MAX where it is empty. */
static uint32_t *members_by_seat(const struct nep_members *group)
{
    uint32_t *member_of = malloc((group->seats->num_ranks + 1) * sizeof *member_of);
    for (uint32_t s = 0; member_of != NULL && s < group->seats->num_ranks; s++) {
        member_of[s] = UINT32_MAX;
    }
    for (uint32_t m = 0; member_of != NULL && m < group->members->num_ranks; m++) {
        member_of[group->seat_of[m]] = m;
    }
    return member_of;
}

/* One layer without the copies on empty seats, slots numbered by members. Returns what is used. */
static uint8_t *filter_layer(struct nep_copies *copies, const struct nep_members *group,
                             const uint32_t *member_of, uint8_t *room, uint8_t *is_lost)
{
    struct nep_copies all = *copies;
    uint32_t num = all.begin[all.num_experts];
    uint32_t *begin = (uint32_t *)room, *slot = begin + all.num_experts + 1, *node = slot + num;
    uint16_t *weight = (uint16_t *)(node + num);
    uint32_t fill = 0;
    for (uint32_t e = 0; e < all.num_experts; e++) {
        begin[e] = fill;
        for (uint32_t c = all.begin[e]; c < all.begin[e + 1]; c++) {
            uint32_t member = member_of[all.slot[c] / all.slots_per_rank];
            if (member != UINT32_MAX) {
                slot[fill] = member * all.slots_per_rank + all.slot[c] % all.slots_per_rank;
                node[fill] = group->members->node_of_rank[member];
                weight[fill++] = all.weight[c];
            }
        }
        is_lost[e] = fill == begin[e];
    }
    begin[all.num_experts] = fill;
    copies->num_ranks = group->members->num_ranks;
    copies->num_nodes = group->members->num_nodes;
    copies->begin = begin;
    copies->slot = slot;
    copies->node = node;
    copies->weight = weight;
    copies->is_single = false; /* it would index by expert */
    return (uint8_t *)(weight + (num + 1) / 2 * 2);
}

static enum nep_status filter(struct nep_map_version *version, const struct nep_shape *shape,
                              const struct nep_members *group)
{
    size_t bytes = 0;
    for (uint32_t l = 0; l < shape->num_layers; l++) {
        uint32_t num = version->copies[l].begin[shape->num_experts];
        bytes += (shape->num_experts + 1 + 2 * (size_t)num) * 4 + (num + 1) / 2 * 4;
    }
    uint32_t *member_of = members_by_seat(group);
    uint8_t *room = malloc(bytes);
    version->tables = room;
    version->is_lost = calloc(shape->num_layers, shape->num_experts);
    bool is_fine = member_of != NULL && room != NULL && version->is_lost != NULL;
    for (uint32_t l = 0; is_fine && l < shape->num_layers; l++) {
        room = filter_layer(&version->copies[l], group, member_of, room,
                            version->is_lost + (size_t)l * shape->num_experts);
    }
    free(member_of);
    return is_fine ? NEP_OK
                   : nep_fail(NEP_ERR_NO_MEMORY, "ep: no memory for a map of %zu bytes", bytes);
}

/* Flattens the map that this version holds. */
static enum nep_status flatten(struct nep_map_version *version, const struct nep_shape *shape,
                               const struct nep_members *group)
{
    free(version->copies);
    free(version->tables);
    free(version->is_lost);
    version->tables = NULL;
    version->is_lost = NULL;
    version->copies = calloc(shape->num_layers, sizeof *version->copies);
    enum nep_status status = NEP_OK;
    if (version->copies == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "ep: no memory for %u layers", shape->num_layers);
    }
    for (uint32_t l = 0; status == NEP_OK && l < shape->num_layers; l++) {
        status = nep_map_copies(version->map, l, &version->copies[l]);
        /* The group's own table: a map knows nodes by size alone. */
        version->copies[l].node_of_rank = group->members->node_of_rank;
    }
    if (status == NEP_OK && group->members->num_ranks < group->seats->num_ranks) {
        status = filter(version, shape, group);
    }
    return status;
}

/* Takes over a map, which this version then holds. */
static enum nep_status version_init(struct nep_map_version *version, struct nep_map *map,
                                    const struct nep_shape *shape, const struct nep_members *group)
{
    memset(version, 0, sizeof *version);
    version->map = map;
    enum nep_status status = flatten(version, shape, group);
    if (status == NEP_OK) {
        version->digest = nep_map_digest(map);
    } else {
        version_fini(version);
    }
    return status;
}

static enum nep_status version_of(struct nep_map_version *version, const struct nep_map *map,
                                  const struct nep_shape *shape, const struct nep_members *group)
{
    enum nep_status status = check_map(map, shape, group->seats);
    if (status != NEP_OK) {
        return status;
    }
    nep_map_retain((struct nep_map *)map);
    return version_init(version, (struct nep_map *)map, shape, group);
}

enum nep_status nep_maps_init(struct nep_maps *maps, const struct nep_map *map,
                              const struct nep_shape *shape, const struct nep_members *group)
{
    const struct nep_topology *topology = group->seats;
    memset(maps, 0, sizeof *maps);
    maps->num_versions = 1;
    maps->group = *group;
    if (map != NULL) {
        return version_of(&maps->now, map, shape, group);
    }
    struct nep_map_shape contiguous = {
        .size = sizeof contiguous,
        .num_layers = shape->num_layers,
        .num_experts = shape->num_experts,
        .num_nodes = topology->num_nodes,
        .num_ranks = topology->num_ranks,
        .slots_per_rank = shape->slots_per_rank,
        .ranks_per_node = topology->node_ranks,
    };
    struct nep_map *made = NULL;
    enum nep_status status = nep_map_contiguous(&contiguous, &made);
    return status == NEP_OK ? version_init(&maps->now, made, shape, group) : status;
}

enum nep_status nep_maps_renew(struct nep_maps *maps, const struct nep_shape *shape,
                               const struct nep_members *group)
{
    maps->group = *group;
    enum nep_status status = flatten(&maps->now, shape, group);
    for (uint32_t i = 0; status == NEP_OK && i < maps->num_staged; i++) {
        status = flatten(&maps->staged[i], shape, group);
    }
    return status;
}

void nep_maps_fini(struct nep_maps *maps)
{
    version_fini(&maps->now);
    for (uint32_t i = 0; i < maps->num_staged; i++) {
        version_fini(&maps->staged[i]);
    }
    maps->num_staged = 0;
}

enum nep_status nep_maps_stage(struct nep_maps *maps, const struct nep_map *map,
                               const struct nep_shape *shape, uint64_t op, uint32_t *version_p)
{
    if (map == NULL) {
        return nep_fail(NEP_ERR_INVALID, "the map to be staged is NULL");
    }
    if (maps->num_staged == NEP_MAX_STAGED) {
        return nep_fail(NEP_ERR_BUSY,
                        "%d maps are staged already: the next of them is for operation "
                        "%llu",
                        NEP_MAX_STAGED, (unsigned long long)maps->staged[0].op);
    }
    if (maps->num_staged != 0 && maps->staged[maps->num_staged - 1].op >= op) {
        return nep_fail(NEP_ERR_INVALID,
                        "a map is staged for operation %llu, but one for operation %llu was staged "
                        "before: stage them in order",
                        (unsigned long long)op,
                        (unsigned long long)maps->staged[maps->num_staged - 1].op);
    }
    struct nep_map_version *to = &maps->staged[maps->num_staged];
    enum nep_status status = version_of(to, map, shape, &maps->group);
    if (status != NEP_OK) {
        return status;
    }
    to->op = op;
    to->version = maps->num_versions++;
    maps->num_staged++;
    if (version_p != NULL) {
        *version_p = to->version;
    }
    return NEP_OK;
}

const struct nep_map_version *nep_maps_at(struct nep_maps *maps, uint64_t op)
{
    while (maps->num_staged != 0 && maps->staged[0].op <= op) {
        version_fini(&maps->now);
        maps->now = maps->staged[0];
        maps->num_staged--;
        memmove(maps->staged, maps->staged + 1, maps->num_staged * sizeof maps->staged[0]);
    }
    return &maps->now;
}
