/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One round: all commands that are there, then the transport, then the duty. Rejected: a thread per
 * communicator that serves several rings: one late `post` would hold up ranks that have nothing to
 * do with it, and the ring has one consumer by design.
 */
#include "dispatch/cuda/proxy.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "base/log.h"

#define PEERS_NS (10 * NEP_MS)
#define NAP_NS   (50 * 1000ull)

struct nep_proxy {
    struct nep_proxy_params params;
    pthread_t thread;
    uint64_t stop;
    uint64_t pause;
    uint64_t taken;
    uint64_t commands; /* these three are read by nep_proxy_stats at any time */
    uint64_t naps;
    uint64_t longest_ns;
};

static void count(uint64_t *counter, uint64_t value)
{
    __atomic_store_n(counter, value, __ATOMIC_RELAXED);
}

/* The first fault stays. Release: pairs with the acquire of waiting kernels in nep_ring_wait. */
static void record(struct nep_proxy *proxy, enum nep_proxy_fault_kind kind, uint32_t who)
{
    uint64_t *word = &proxy->params.ring.shared->fault;
    if (nep_ring_peek(word) == 0) {
        /* A peer may also have ended after the last operation: kernels that wait say more. */
        if (kind == NEP_PROXY_PEER_LOST) {
            nep_info("proxy: lost rank %u: %s", who, nep_last_message());
        } else {
            nep_warn("proxy: no post to rank %u: %s", who, nep_last_message());
        }
        nep_ring_store(word, NEP_PROXY_FAULT(kind, who));
    }
}

static bool take_commands(struct nep_proxy *proxy)
{
    uint64_t command;
    bool is_busy = false;
    /* At most a ring full, so that the transport moves, too. */
    for (uint32_t i = 0; i < proxy->params.ring.size; i++) {
        uint32_t who = 0;
        if (!nep_ring_take(&proxy->params.ring, &proxy->taken, &command)) {
            break;
        }
        is_busy = true;
        count(&proxy->commands, proxy->taken);
        if (proxy->params.post(proxy->params.ctx, command, &who) != NEP_OK) {
            record(proxy, NEP_PROXY_POST_FAILED, who);
        }
    }
    return is_busy;
}

static void look_after_peers(struct nep_proxy *proxy)
{
    struct nep_transport *transport = proxy->params.transport;
    for (uint32_t i = 0; transport != NULL && i < proxy->params.num_peers; i++) {
        uint32_t rank = proxy->params.peers[i];
        if (transport->ops->peer_status(transport, rank) != NEP_OK) {
            record(proxy, NEP_PROXY_PEER_LOST, rank);
        }
    }
}

static void nap(void)
{
    const struct timespec time = {0, NAP_NS};
    nanosleep(&time, NULL);
}

static void *run(void *arg)
{
    struct nep_proxy *proxy = arg;
    struct nep_ring_shared *shared = proxy->params.ring.shared;
    struct nep_transport *transport = proxy->params.transport;
    uint64_t beat = 0, last = nep_now_ns(), busy = last, looked = last;
    while (nep_ring_load(&proxy->stop) == 0) {
        if (nep_ring_load(&proxy->pause) != 0) {
            nap();
            continue;
        }
        /* Relaxed would do: kernels compare it with itself alone. */
        nep_ring_store(&shared->heartbeat, ++beat);
        bool is_busy = take_commands(proxy);
        if (transport != NULL) {
            transport->ops->progress(transport);
        }
        if (proxy->params.duty != NULL) {
            is_busy = proxy->params.duty(proxy->params.ctx) || is_busy;
        }
        uint64_t now = nep_now_ns();
        if (now - last > proxy->longest_ns) {
            count(&proxy->longest_ns, now - last);
        }
        last = now;
        if (is_busy) {
            busy = now;
        }
        if (now - looked > PEERS_NS) {
            look_after_peers(proxy);
            looked = now;
        }
        if (now - busy > proxy->params.spin_ns) {
            count(&proxy->naps, proxy->naps + 1);
            nap();
            last = nep_now_ns();
        }
    }
    return NULL;
}

enum nep_status nep_proxy_start(const struct nep_proxy_params *params, struct nep_proxy **proxy_p)
{
    uint32_t size = params->ring.size;
    if (size == 0 || (size & (size - 1)) != 0) {
        return nep_fail(NEP_ERR_INTERNAL, "proxy: a ring of %u commands; a power of two is needed",
                        size);
    }
    struct nep_proxy *proxy = calloc(1, sizeof *proxy);
    if (proxy == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "proxy: no memory");
    }
    proxy->params = *params;
    int error = pthread_create(&proxy->thread, NULL, run, proxy);
    if (error != 0) {
        free(proxy);
        return nep_fail(NEP_ERR_IO, "proxy: the system refuses a thread (error %d)", error);
    }
    *proxy_p = proxy;
    return NEP_OK;
}

void nep_proxy_stop(struct nep_proxy *proxy)
{
    if (proxy == NULL) {
        return;
    }
    /* Release: pairs with the acquire in run. */
    nep_ring_store(&proxy->stop, 1);
    pthread_join(proxy->thread, NULL);
    free(proxy);
}

void nep_proxy_pause(struct nep_proxy *proxy, bool is_paused)
{
    nep_ring_store(&proxy->pause, is_paused);
}

struct nep_proxy_stats nep_proxy_stats(const struct nep_proxy *proxy)
{
    return (struct nep_proxy_stats){
        .commands = nep_ring_peek(&proxy->commands),
        .naps = nep_ring_peek(&proxy->naps),
        .longest_ns = nep_ring_peek(&proxy->longest_ns),
    };
}
