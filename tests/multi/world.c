/* SPDX-License-Identifier: Apache-2.0 */
/* Creation and data of a world; flights are in flight.c. */
#include "tests/multi/world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "placement/placement.h"
#include "tests/multi/flight.h"

uint32_t nep_multi_num_ranks(const struct nep_multi_shape *shape)
{
    uint32_t ranks = 0;
    for (uint32_t n = 0; n < shape->num_nodes; n++) {
        ranks += shape->ranks_per_node[n];
    }
    return ranks;
}

/* A map file with every expert once and random copies in the slots left, read back by the library:
 * there is no call that makes an arbitrary map. Every rank writes its own file. */
static bool make_map(struct nep_multi_world *world)
{
    const struct nep_multi_shape *shape = &world->shape;
    uint32_t ranks = world->rank->num_ranks;
    uint32_t slots = world->slots_per_rank * ranks;
    uint32_t *expert_of_slot = malloc(slots * sizeof(uint32_t));
    FILE *file = expert_of_slot != NULL ? tmpfile() : NULL;
    if (file == NULL) {
        free(expert_of_slot);
        return nep_multi_fail(world->rank, "a map's text cannot be written");
    }
    struct nep_ref_rng rng = {shape->seed ^ 0x6d6170};
    for (uint32_t s = 0; s < slots; s++) {
        expert_of_slot[s] = s < shape->experts ? s : nep_ref_rng_below(&rng, shape->experts);
    }
    for (uint32_t s = slots; s > 1; s--) {
        uint32_t other = nep_ref_rng_below(&rng, s);
        uint32_t kept = expert_of_slot[s - 1];
        expert_of_slot[s - 1] = expert_of_slot[other];
        expert_of_slot[other] = kept;
    }
    fprintf(file, "nepmap 1\nlayers 1 experts %u nodes %u ranks_per_node ", shape->experts,
            shape->num_nodes);
    for (uint32_t n = 0; n < shape->num_nodes; n++) {
        fprintf(file, "%s%u", n > 0 ? "," : "", shape->ranks_per_node[n]);
    }
    fprintf(file, " slots_per_rank %u\n", world->slots_per_rank);
    for (uint32_t e = 0; e < shape->experts; e++) {
        fprintf(file, "0 %u", e);
        for (uint32_t s = 0; s < slots; s++) {
            if (expert_of_slot[s] == e) {
                fprintf(file, " %u:%u*%u", s / world->slots_per_rank, s % world->slots_per_rank,
                        1 + s % 3);
            }
        }
        fprintf(file, "\n");
    }
    free(expert_of_slot);
    world->map = nep_multi_map_read(file);
    return world->map != NULL ||
           nep_multi_fail(world->rank, "nep_map_load: %s", nep_last_message());
}

static bool make_comm(struct nep_multi_world *world)
{
    const struct nep_multi_shape *shape = &world->shape;
    struct nep_comm_params params = {.size = sizeof(params),
                                     .rank = world->rank->rank,
                                     .num_ranks = world->rank->num_ranks,
                                     .bootstrap = &world->rank->bootstrap,
                                     .ranks_per_node = shape->ranks_per_node,
                                     .num_nodes = shape->num_nodes,
                                     .intra = shape->intra,
                                     .inter = shape->inter,
                                     .timeout_ns = shape->timeout_ns};
    /* NEP_TEST_ADVERSARY: the same test over a fabric that disorders, which serves both seats. */
    char fabric[64];
    if (getenv("NEP_TEST_ADVERSARY") != NULL && shape->inter != NULL && shape->num_nodes > 1 &&
        strncmp(shape->inter, "adversary", 9) != 0) {
        snprintf(fabric, sizeof(fabric), "adversary:%s", shape->inter);
        params.inter = fabric;
        params.intra = NULL;
    }
    world->topology.size = sizeof(world->topology);
    if (nep_comm_create(&params, &world->comm) != NEP_OK ||
        nep_comm_topology(world->comm, &world->topology) != NEP_OK) {
        return nep_multi_fail(world->rank, "nep_comm_create: %s", nep_last_message());
    }
    return true;
}

static uint64_t rows_capacity(const struct nep_multi_world *world)
{
    const struct nep_multi_shape *shape = &world->shape;
    uint64_t tokens = (uint64_t)shape->max_tokens * world->rank->num_ranks;
    if (shape->layout == NEP_LAYOUT_RANK) {
        return tokens;
    }
    if (shape->layout == NEP_LAYOUT_EXPERT_PADDED || shape->layout == NEP_LAYOUT_EXPERT_FRONT) {
        return tokens * world->slots_per_rank;
    }
    return tokens * shape->top_k + (uint64_t)shape->alignment * world->slots_per_rank;
}

static bool make_ep(struct nep_multi_world *world, uint32_t num_flights)
{
    const struct nep_multi_shape *shape = &world->shape;
    uint64_t per_flight = nep_multi_flight_bytes(world);
    struct nep_ep_params params = {.size = sizeof(params),
                                   .num_experts = shape->experts,
                                   .top_k = shape->top_k,
                                   .hidden = shape->hidden,
                                   .max_tokens = shape->max_tokens,
                                   .dtype = shape->dtype,
                                   .wire = shape->wire,
                                   .layout = shape->layout,
                                   .expert_alignment = shape->alignment,
                                   .outstanding = shape->outstanding,
                                   .map = world->map,
                                   .pool_bytes = per_flight * num_flights + 65536};
    if (nep_ep_create(world->comm, &params, &world->ep) != NEP_OK) {
        return nep_multi_fail(world->rank, "nep_ep_create: %s", nep_last_message());
    }
    return true;
}

static bool make_factors(struct nep_multi_world *world)
{
    world->factor = calloc((size_t)world->rank->num_ranks * world->slots_per_rank, sizeof(float));
    if (world->factor == NULL) {
        return nep_multi_fail(world->rank, "out of memory");
    }
    struct nep_copies copies;
    if (world->map != NULL && nep_map_copies(world->map, 0, &copies) != NEP_OK) {
        return nep_multi_fail(world->rank, "nep_map_copies: %s", nep_last_message());
    }
    for (uint32_t e = 0; e < world->shape.experts; e++) {
        if (world->map == NULL) {
            world->factor[e] = nep_ref_expert_factor(e);
            continue;
        }
        for (uint32_t i = copies.begin[e]; i < copies.begin[e + 1]; i++) {
            world->factor[copies.slot[i]] = nep_ref_expert_factor(e);
        }
    }
    return true;
}

bool nep_multi_world_create(struct nep_multi_rank *rank, const struct nep_multi_shape *shape,
                            uint32_t num_flights, struct nep_multi_world *world)
{
    memset(world, 0, sizeof(*world));
    world->rank = rank;
    world->shape = *shape;
    world->shape.dtype = shape->dtype == NEP_DTYPE_DEFAULT ? NEP_DTYPE_BF16 : shape->dtype;
    world->shape.wire = shape->wire == NEP_DTYPE_DEFAULT ? world->shape.dtype : shape->wire;
    world->slots_per_rank = (shape->experts + rank->num_ranks - 1) / rank->num_ranks;
    if (shape->has_replicas) {
        world->slots_per_rank += 2;
    }
    world->capacity = rows_capacity(world);
    if ((shape->has_replicas && !make_map(world)) || !make_comm(world) ||
        !make_ep(world, num_flights) || !make_factors(world)) {
        return false;
    }
    world->flights = calloc(num_flights, sizeof(*world->flights));
    if (world->flights == NULL) {
        return nep_multi_fail(rank, "out of memory");
    }
    world->num_flights = num_flights;
    for (uint32_t f = 0; f < num_flights; f++) {
        if (!nep_multi_flight_create(world, &world->flights[f])) {
            return false;
        }
    }
    return true;
}

void nep_multi_world_destroy(struct nep_multi_world *world)
{
    for (uint32_t f = 0; f < world->num_flights; f++) {
        nep_multi_flight_destroy(world, &world->flights[f]);
    }
    free(world->flights);
    nep_ep_destroy(world->ep);
    nep_comm_destroy(world->comm);
    nep_map_destroy(world->map);
    free(world->factor);
    memset(world, 0, sizeof(*world));
}

bool nep_multi_check_stats(struct nep_multi_world *world)
{
    struct nep_stats stats = {.size = sizeof(stats)};
    if (nep_ep_stats(world->ep, &stats) != NEP_OK) {
        return nep_multi_fail(world->rank, "nep_ep_stats: %s", nep_last_message());
    }
    if (stats.remote_rows != world->traffic.remote_nodes || stats.tokens != world->traffic.tokens ||
        stats.tokens_local != world->traffic.tokens_local) {
        return nep_multi_fail(
            world->rank,
            "counters: %llu rows to other nodes, %llu tokens, %llu of them local; must be %llu, "
            "%llu, %llu",
            (unsigned long long)stats.remote_rows, (unsigned long long)stats.tokens,
            (unsigned long long)stats.tokens_local, (unsigned long long)world->traffic.remote_nodes,
            (unsigned long long)world->traffic.tokens,
            (unsigned long long)world->traffic.tokens_local);
    }
    return true;
}

/* One step that all ranks take alike. common: the states that the group agreed on; a rank may have
 * completed more. sent: when each flight was sent, commonly. */
struct script {
    struct nep_ref_rng rng;
    enum nep_multi_state state[16];
    uint64_t sent[16];
    uint64_t num_sent;
    uint64_t number; /* of the last dispatch */
    uint32_t outstanding;
};

/* Completes a flight, and commonly all that were sent before it. */
static bool step_complete(struct nep_multi_world *world, struct script *script, uint32_t f)
{
    for (uint32_t other = 0; other < world->num_flights; other++) {
        enum nep_multi_state *state = &script->state[other];
        bool is_out = *state == NEP_FLIGHT_OUT || *state == NEP_FLIGHT_BACK;
        if (is_out && script->sent[other] <= script->sent[f]) {
            *state = *state == NEP_FLIGHT_OUT ? NEP_FLIGHT_HERE : NEP_FLIGHT_IDLE;
            script->outstanding--;
        }
    }
    return nep_multi_complete(world, &world->flights[f]);
}

static bool step(struct nep_multi_world *world, struct script *script)
{
    uint32_t limit = world->shape.outstanding > 0 ? world->shape.outstanding : 1;
    uint32_t f = nep_ref_rng_below(&script->rng, world->num_flights);
    uint32_t kind = nep_ref_rng_below(&script->rng, 8);
    struct nep_multi_flight *flight = &world->flights[f];
    if (script->state[f] == NEP_FLIGHT_OUT || script->state[f] == NEP_FLIGHT_BACK) {
        return step_complete(world, script, f);
    }
    if (script->outstanding == limit) {
        return true;
    }
    script->outstanding++;
    script->sent[f] = ++script->num_sent;
    if (script->state[f] == NEP_FLIGHT_HERE && kind < 5) {
        script->state[f] = NEP_FLIGHT_BACK;
        return nep_multi_combine_send(world, flight);
    }
    bool cached = kind == 7 && flight->number != 0;
    script->state[f] = NEP_FLIGHT_OUT;
    return nep_multi_dispatch_send(world, flight, ++script->number, cached);
}

bool nep_multi_random_schedule(struct nep_multi_world *world, uint64_t seed, uint32_t num_steps)
{
    struct script script = {.rng = {seed}};
    struct nep_ref_rng own_rng = {nep_ref_mix(seed, world->rank->rank + 1)};
    for (uint32_t i = 0; i < num_steps; i++) {
        if (!step(world, &script)) {
            return false;
        }
        /* This rank alone may complete something early. */
        uint32_t f = nep_ref_rng_below(&own_rng, world->num_flights);
        if (nep_ref_rng_below(&own_rng, 4) == 0 && !nep_multi_complete(world, &world->flights[f])) {
            return false;
        }
    }
    uint32_t first = nep_ref_rng_below(&own_rng, world->num_flights);
    for (uint32_t i = 0; i < world->num_flights; i++) {
        if (!nep_multi_complete(world, &world->flights[(first + i) % world->num_flights])) {
            return false;
        }
    }
    return nep_multi_check_stats(world);
}
