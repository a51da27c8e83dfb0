/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A fake NIC: a transport whose puts are copies between ranks' memory on one GPU, done by a
 * resident kernel, two blocks per rank held to 50 GB/s (a port of 400 Gb/s), that is fed by a queue
 * in pinned memory, as a NIC is. Its completions come back as a pinned word; then the receiver's
 * sink is called, as a completion queue's poller would. With a seed, announcements of one sender
 * are held back and overtake each other. One thread per rank calls it: the proxy.
 *
 * A rank's window is in two parts, equal offsets in both: words in host memory, which the sink
 * works on, and the rest in memory of the GPU.
 */
#ifndef NEP_TESTS_GPU_FAKE_NIC_H
#define NEP_TESTS_GPU_FAKE_NIC_H

#include <stdint.h>

enum { FAKE_NIC_QUEUE = 256, FAKE_NIC_HALVES = 2 };

/* A copy to do; seq is its number plus one, stored last. */
struct fake_nic_entry {
    const char *from;
    char *to;
    uint64_t bytes;
    uint64_t seq;
};

/* Of one rank, in pinned memory. */
struct fake_nic_queue {
    struct fake_nic_entry entries[FAKE_NIC_QUEUE];
    uint64_t done[FAKE_NIC_HALVES]; /* copies finished by each block, in order */
    uint64_t pad[14];
    uint64_t stop;
    uint64_t pad2[15];
};

#ifdef __cplusplus
extern "C" {
#endif
struct CUstream_st;
/* Starts the resident kernel: blocks 2r and 2r + 1 serve queues[r] until its stop, or for life_ns.
 */
int fake_nic_launch(struct fake_nic_queue *queues, uint32_t num_ranks, uint64_t life_ns,
                    struct CUstream_st *stream);
#ifdef __cplusplus
}
#else
#include "transport/transport.h"

/* What all ranks of a test share. */
struct fake_nic_world {
    uint32_t num_ranks;
    struct fake_nic_queue *queues;
    char *words[64]; /* host base of each rank's window */
    char *data[64];  /* its base on the GPU */
    nep_sink_fn sink;
    uint64_t seed;  /* 0: announced in order */
    uint64_t lost;  /* bit r: rank r is said to be gone */
    bool is_staged; /* windows lie in host memory as a whole: the sender copies, no kernel */
};

struct nep_transport *fake_nic_create(struct fake_nic_world *world, uint32_t rank);
#endif

#endif
