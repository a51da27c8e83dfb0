/* SPDX-License-Identifier: Apache-2.0 */
/* Kernels of the test of the command ring, gpu_ring.c. */
#ifndef NEP_TESTS_GPU_RING_H
#define NEP_TESTS_GPU_RING_H

#include <stdint.h>

struct CUstream_st;
struct nep_ring_shared;
struct nep_ring_producer;

enum { GPU_RING_SIZE = 256, GPU_RING_LATENCIES = 16384, GPU_RING_BLOCKS = 8 };

/* In memory of the GPU. */
struct gpu_ring_state {
    uint64_t op;
    uint64_t status; /* sticky: nep_ring_end << 32 | op */
    uint64_t waited_ns;
    uint64_t begin_ns; /* when the command was stored */
    uint64_t wrong;    /* 16-byte pieces */
    uint64_t seen;     /* the first block relays what it acquired across PCIe */
    uint32_t arrived;
    uint32_t reserved;
    uint32_t latency_ns[GPU_RING_LATENCIES];
};

struct gpu_ring_args {
    struct nep_ring_shared *shared;
    struct nep_ring_producer *producer;
    struct gpu_ring_state *state;
    uint64_t *word; /* arrivals, pinned */
    char *slots;    /* two to send from */
    char *landing;  /* two */
    uint32_t bytes; /* of one */
    uint64_t timeout_ns;
};

#ifdef __cplusplus
extern "C" {
#endif
/* num commands, each posted when the word of the one before came. */
int gpu_ring_ping(const struct gpu_ring_args *args, uint32_t num, struct CUstream_st *stream);
/* Every block posts num commands as fast as the ring takes them. */
int gpu_ring_flood(const struct gpu_ring_args *args, uint32_t blocks, uint32_t num,
                   struct CUstream_st *stream);
/* Nanoseconds of one acquiring load of the word, on average, into latency_ns[0]. */
int gpu_ring_load_cost(const struct gpu_ring_args *args, uint32_t num, struct CUstream_st *stream);
/* The two halves of an operation: fill a slot and post; wait for its arrival and check it. */
int gpu_ring_send(const struct gpu_ring_args *args, struct CUstream_st *stream);
int gpu_ring_recv(const struct gpu_ring_args *args, struct CUstream_st *stream);
#ifdef __cplusplus
}
#endif

#endif
