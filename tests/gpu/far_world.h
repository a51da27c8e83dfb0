/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Emulated nodes on one GPU: ranks as threads of one process, each with a stream and a proxy, a
 * fake NIC between nodes, or staging through pinned memory. Slots, indexes and counts of a round
 * are made on the host, so that what runs here is the fabric's kernels and the proxy alone; every
 * element of what they leave is compared with the oracle (tests/ref).
 */
#ifndef NEP_TESTS_GPU_FAR_WORLD_H
#define NEP_TESTS_GPU_FAR_WORLD_H

#include <cuda_runtime_api.h>
#include <pthread.h>

#include "dispatch/cuda/fabric_proxy.h"
#include "dispatch/cuda/proxy.h"
#include "tests/gpu/fake_nic.h"
#include "tests/ref/ref.h"

enum { FAR_MOST_RANKS = 16, FAR_RING = 256 };

struct far_shape {
    uint64_t key;
    uint32_t num_nodes;
    uint32_t node_ranks[NEP_FAR_MAX_NODES];
    uint32_t slots_per_rank;
    uint32_t top_k;
    uint32_t hidden;
    uint32_t max_tokens;
    uint32_t tile_rows;
    uint32_t tiles; /* of a stream that always find slots, a power of two; 0: NEP_FAR_TILES */
    uint32_t alignment;
    uint32_t num_sms;
    enum nep_layout layout;
    enum nep_dtype dtype;
    enum nep_dtype wire;
    bool is_staged;
    bool is_full; /* every rank has max_tokens, every k is used */
    bool is_graph;
    bool is_whole;    /* one launch an operation */
    bool is_lockstep; /* every launch ends before the next one of any rank begins */
    uint64_t nic_seed;
    uint64_t timeout_ns;
};

struct far_rank;
typedef void (*far_rank_fn)(struct far_rank *rank);

/* Of all ranks. */
struct far_world {
    struct far_shape shape;
    uint32_t num_ranks;
    uint32_t node_of_rank[FAR_MOST_RANKS];
    uint32_t local_of_rank[FAR_MOST_RANKS];
    uint64_t stride; /* of a rank's `near` window */
    uint64_t words_bytes;
    char *near;
    uint8_t *words[FAR_MOST_RANKS];
    struct fake_nic_world nic;
    cudaStream_t nic_stream;
    pthread_barrier_t barrier;
    /* a round */
    uint32_t num_tokens[FAR_MOST_RANKS];
    uint32_t *slots[FAR_MOST_RANKS];
    float *weights[FAR_MOST_RANKS];
    float *factor;
    struct nep_ref_group ref;
    struct far_rank *ranks[FAR_MOST_RANKS];
    far_rank_fn fn;
    void *ctx;
    double values[FAR_MOST_RANKS]; /* exchanged by far_max */
};

struct far_rank {
    struct far_world *world;
    uint32_t rank;
    struct nep_topology topology;
    struct nep_shape shape;
    struct nep_plan plan;
    cudaStream_t stream;
    struct nep_far far;
    struct nep_cuda_geometry geometry;
    struct nep_cuda_input in;
    struct nep_far_output out;
    struct nep_cuda_routing routing;
    struct nep_far_routing far_routing;
    struct nep_far_dispatch dispatch;
    struct nep_far_combine combine;
    struct nep_transport *nic;
    struct nep_fabric_proxy *fabric;
    struct nep_proxy *proxy;
    uint64_t y_offset;
    uint8_t *node_words[FAR_MOST_RANKS];
    uint32_t *peers;
    uint32_t num_peers;
    void *memory[96];
    uint32_t num_memory;
    uint64_t *status_host;
    uint64_t wrong;
};

/* Runs fn as every rank of the shape's nodes; the sum of their `wrong`. */
uint64_t far_world_run(const struct far_shape *shape, far_rank_fn fn, void *ctx);
void far_meet(struct far_rank *r);
/* All ranks: the greatest value. */
double far_max(struct far_rank *r, double value);
/* New tokens of a round, on all ranks alike; outputs are poisoned. */
void far_draw(struct far_rank *r, uint64_t round);
void far_dispatch(struct far_rank *r);
void far_combine(struct far_rank *r);
/* Waits for the stream; the status. */
uint64_t far_status(struct far_rank *r);
/* Looks at every element of a dispatch, makes the expert outputs; then of a combine. */
uint64_t far_check_dispatch(struct far_rank *r);
uint64_t far_check_combine(struct far_rank *r);
/* To the device, waited for. */
void far_put(struct far_rank *r, void *to, const void *from, uint64_t bytes);
/* Prints and ends the process. */
void far_must(int error, const char *what);

#endif
