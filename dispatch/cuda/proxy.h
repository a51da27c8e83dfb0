/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The proxy: a host thread that takes commands from the ring, has them posted through a transport's
 * operations table, moves the transport along, and keeps the promises that kernels cannot (credits,
 * looking after peers). It knows no token: what a command means is its caller's `post`.
 *
 * It spins while there is something to do and for spin_ns after that, then naps between looks, so
 * that an idle job does not burn a core per rank. It never blocks longer than a nap, so its
 * heartbeat is fresh as long as the thread runs; waiting kernels take a stale one as its end.
 */
#ifndef NEP_DISPATCH_CUDA_PROXY_H
#define NEP_DISPATCH_CUDA_PROXY_H

#include "dispatch/cuda/ring.h"
#include "transport/transport.h"

/* The fault word: kind, then the rank. */
enum nep_proxy_fault_kind {
    NEP_PROXY_PEER_LOST = 1,
    NEP_PROXY_POST_FAILED = 2, /* who: the destination, as far as known */
    NEP_PROXY_BAD_COMMAND = 3
};
#define NEP_PROXY_FAULT(kind, who) ((uint64_t)(kind) << 56 | (uint64_t)(who))

struct nep_proxy_params {
    struct nep_ring ring;            /* as the host maps it; producer is not used */
    struct nep_transport *transport; /* moved along here; NULL: there is none */
    /* Posts a command. Not NEP_OK: *who_p is the rank that it concerned; the message is logged. */
    enum nep_status (*post)(void *ctx, uint64_t command, uint32_t *who_p);
    /* Called between commands; true: it did something. NULL: nothing to do. */
    bool (*duty)(void *ctx);
    void *ctx;
    const uint32_t *peers; /* looked after every 10 ms; outlives the proxy */
    uint32_t num_peers;
    uint64_t spin_ns;
};

struct nep_proxy;

enum nep_status nep_proxy_start(const struct nep_proxy_params *params, struct nep_proxy **proxy_p);
/* Ends the thread and frees it. Bounded: the thread never blocks. NULL is nothing. */
void nep_proxy_stop(struct nep_proxy *proxy);
/* For tests of what waits for it: the thread stops (heartbeat and all) until it is let go on. */
void nep_proxy_pause(struct nep_proxy *proxy, bool is_paused);

struct nep_proxy_stats {
    uint64_t commands;
    uint64_t naps;
    uint64_t longest_ns; /* of one round: how late a command could be seen */
};
struct nep_proxy_stats nep_proxy_stats(const struct nep_proxy *proxy);

#endif
