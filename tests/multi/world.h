/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A shape, and what every rank sends in its n-th dispatch: a function of (seed, n), so that every
 * rank knows everything and the oracle can speak for all. A flight is one handle with its tensors
 * and the state it is in.
 */
#ifndef NEP_TESTS_MULTI_WORLD_H
#define NEP_TESTS_MULTI_WORLD_H

#include "nearep.h"
#include "tests/multi/harness.h"
#include "tests/ref/ref.h"

struct nep_multi_shape {
    const char *name;
    uint32_t num_nodes;
    uint32_t ranks_per_node[16];
    uint32_t experts;
    uint32_t top_k;
    uint32_t hidden;
    uint32_t max_tokens;
    enum nep_layout layout;
    uint32_t alignment;
    enum nep_dtype dtype; /* 0: bf16 */
    enum nep_dtype wire;  /* 0: dtype */
    uint32_t outstanding; /* 0: 1 */
    bool is_private;      /* tensors of the caller's own memory */
    bool is_fixed_tokens; /* every rank M tokens; else 0 to M, often 0 */
    uint32_t num_calm;    /* the first so many dispatches have one tile: at most 20 tokens a rank */
    bool is_wild;         /* values of all magnitudes, subnormals too */
    bool has_replicas;    /* a map with random copies */
    bool is_unweighted;   /* topk_weights NULL */
    bool is_late;         /* one node, expert layouts: combines get other weights than dispatches */
    bool is_int64;        /* ids of 64 bits */
    const char *intra;    /* NULL: loop in threads, shm in processes */
    const char *inter;
    uint64_t seed;
    uint64_t timeout_ns;
};

enum nep_multi_state { NEP_FLIGHT_IDLE, NEP_FLIGHT_OUT, NEP_FLIGHT_HERE, NEP_FLIGHT_BACK };

struct nep_multi_flight {
    struct nep_handle *handle;
    enum nep_multi_state state;
    uint64_t number;  /* of the dispatch whose routing it holds */
    uint64_t content; /* of the dispatch whose rows it holds */
    uint64_t sent;    /* when, counted by the world */
    uint32_t num_tokens;
    void *x;
    void *y;
    void *expert;
    struct nep_rows rows;
    struct nep_counts counts;
    int32_t *ids;
    int64_t *ids64;
    float *weights;
    /* what the group sent, fixed at send: other flights use the world in between */
    struct nep_ref_group group;
    uint32_t *group_tokens;
    uint32_t **slots;
    float **group_weights;
    struct nep_multi_world *world;
};

struct nep_multi_world {
    struct nep_multi_rank *rank;
    struct nep_multi_shape shape;
    struct nep_comm *comm;
    struct nep_topology topology;
    struct nep_ep *ep;
    struct nep_map *map;
    uint32_t slots_per_rank;
    uint64_t capacity;
    float *factor;
    struct nep_multi_flight *flights;
    uint32_t num_flights;
    uint64_t num_sent;
    uint64_t num_ops; /* completed */
    uint64_t elements;
    struct nep_ref_traffic traffic;
};

uint32_t nep_multi_num_ranks(const struct nep_multi_shape *shape);
/* All collective. false: nep_multi_fail has said why. */
bool nep_multi_world_create(struct nep_multi_rank *rank, const struct nep_multi_shape *shape,
                            uint32_t num_flights, struct nep_multi_world *world);
void nep_multi_world_destroy(struct nep_multi_world *world);

/* cached: with the routing that the handle holds, other rows. */
bool nep_multi_dispatch_send(struct nep_multi_world *world, struct nep_multi_flight *flight,
                             uint64_t number, bool cached);
bool nep_multi_dispatch_recv(struct nep_multi_world *world, struct nep_multi_flight *flight);
bool nep_multi_combine_send(struct nep_multi_world *world, struct nep_multi_flight *flight);
bool nep_multi_combine_recv(struct nep_multi_world *world, struct nep_multi_flight *flight);
/* Completes it if it is outstanding, and what was sent before it: an ep completes in order. */
bool nep_multi_complete(struct nep_multi_world *world, struct nep_multi_flight *flight);
/* The library's counters against the oracle's. */
bool nep_multi_check_stats(struct nep_multi_world *world);
/* num_steps random steps of the same schedule on all ranks, each completing early as it likes. */
bool nep_multi_random_schedule(struct nep_multi_world *world, uint64_t seed, uint32_t num_steps);

#endif
