/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The operations table and its contract. A transport moves bytes between ranks; it knows no token
 * and no expert. Two seats use it: `intra` (ranks of one node, which map each other's windows) and
 * `inter` (the fabric between nodes).
 *
 * Windows. A window is one contiguous piece of memory of this rank that peers may reach: an ep
 * makes one for its region and pool, and names it by its own number, which immediates carry too.
 * Creation is collective over all ranks of the communicator.
 *
 * Puts. nep_put copies `len` bytes to `offset` in window `window` of rank `dst` and then announces
 * itself there ONCE with a 32-bit immediate: the receiving side's sink is called with (window, src,
 * imm). No order is promised between puts, not even to one peer. The bytes of a put are visible
 * (acquire) to whoever the sink's stores release to. The transport may call the sink from any
 * thread; `shm` and `loop` call it from the SENDER's thread, on the receiver's window as the sender
 * maps it, so the sink touches nothing but that window's memory, with atomics. A sink must take
 * repeats: after a fail-over a put may be announced twice (same imm).
 *
 * An immediate is laid out as docs/protocol.md says; a transport looks at two fields alone: bits 20
 * to 25 hold the window's number, since some fabrics deliver nothing but the immediate, and bits 0
 * to 3 (part) are 0 in a put and in the sink, since a transport that splits a put uses them
 * between.
 *
 * The source bytes of a put belong to the transport until completed(dst) has reached the number
 * that put returned. A repeat may also write its bytes again until then, and not after: so whoever
 * reuses a slot at the receiver waits for the completion of the put that filled it last. What is
 * put to dst after that comes after it, unless it is_apart.
 *
 * Threads: put, progress, posted and completed may be called by several threads of a rank at once.
 * Nothing blocks but create, connect, window_create and close, all bounded by their deadline.
 */
#ifndef NEP_TRANSPORT_H
#define NEP_TRANSPORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/config.h"
#include "base/status.h"
#include "nearep.h"

enum nep_transport_cap {
    NEP_CAP_MAPPED = 1u << 0,  /* peer_window gives a pointer: load and store reach the peer */
    NEP_CAP_FABRIC = 1u << 1,  /* put works */
    NEP_CAP_THREAD = 1u << 2,  /* has its own progress thread; progress need not be called */
    NEP_CAP_ORDERED = 1u << 3, /* puts arrive in order (nobody may rely on it; tests print it) */
    NEP_CAP_WRAPPER = 1u << 4, /* stands around what args names, and maps what that maps */
    NEP_CAP_SILENT = 1u << 5   /* nep_put.is_silent works */
};

struct nep_transport;

/* Called once per announced put. base: the receiver's window as this process maps it. */
typedef void (*nep_sink_fn)(void *base, uint32_t dst, uint32_t src, uint32_t imm);

/* What a transport gets at creation. Everything here outlives it. */
struct nep_transport_params {
    const struct nep_topology *topology;
    /* allgather over ALL ranks; collective calls in the same order */
    const struct nep_bootstrap *bootstrap;
    const struct nep_config *config;
    uint64_t timeout_ns;
    nep_sink_fn sink;
    bool node_only;    /* serve the ranks of this node alone (the intra seat): map nobody else */
    const char *args;  /* what stood after the name: "ucx" for "adversary:ucx" */
    uint32_t max_puts; /* puts that may be in flight to this rank at once: sizes receive queues */
    /* [num_ranks] what ranks are called in sentences, after some were lost; NULL: their numbers */
    const uint32_t *names;
};

static inline uint32_t nep_transport_name(const struct nep_transport_params *params, uint32_t rank)
{
    return params->names != NULL ? params->names[rank] : rank;
}

struct nep_put {
    uint32_t dst;
    uint32_t window;
    uint64_t offset;
    const void *src; /* inside this rank's own window of the same number */
    uint32_t len;    /* 0: only the announcement */
    uint32_t imm;
    bool is_apart;  /* no bytes, and nothing to do with other puts: better early than in line */
    bool is_silent; /* no announcement; only with NEP_CAP_SILENT: to compare with plain writes */
};

/* A part of a window that `rank` may write. */
struct nep_grant {
    uint32_t rank;
    uint64_t offset;
    uint64_t bytes;
};

enum { NEP_MAX_GRANTS = 4 };

struct nep_transport_stats {
    uint64_t puts;          /* posted */
    uint64_t put_bytes;     /* payload */
    uint64_t work_requests; /* what the device saw, where that differs */
    uint64_t arrivals;
    uint64_t retries;
    uint64_t refused; /* messages that named no window or no place of theirs in it: dropped */
};

struct nep_transport_ops {
    const char *name;
    uint32_t caps; /* of enum nep_transport_cap */

    /* Whether this machine can run it at all: NEP_OK, or NEP_ERR_UNSUPPORTED with a sentence. Not
     * collective. */
    enum nep_status (*probe)(const struct nep_config *config);
    /* Collective; connects all ranks it serves. */
    enum nep_status (*create)(const struct nep_transport_params *params,
                              struct nep_transport **transport_p);
    /* Bounded; never waits for a peer. */
    void (*close)(struct nep_transport *transport);

    /*
     * Collective. Makes window number `window` (0 to 63, free on every rank; the caller agreed on
     * it). Fabric-only transports get memory that exists (*base_p != NULL: register it). A mapped
     * transport allocates it when *base_p is NULL: zeroed, page-aligned, huge pages where
     * configured.
     */
    enum nep_status (*window_create)(struct nep_transport *transport, uint32_t window,
                                     void **base_p, size_t bytes);
    /*
     * Not collective; before window_create, of which it becomes a part. Each grant is a part of
     * this rank's window that a peer may write over the fabric, NEP_MAX_GRANTS for each peer at
     * most; a window that nothing was said of is open to all. What a peer writes elsewhere is
     * refused and never lands: counted and held against it, or its connection ends. Ranks that map
     * the window are not held back by this.
     */
    enum nep_status (*window_grant)(struct nep_transport *transport, uint32_t window,
                                    const struct nep_grant *grants, uint32_t num_grants);
    /* Not collective. Peers must have stopped using it. */
    void (*window_destroy)(struct nep_transport *transport, uint32_t window);
    /*
     * As window_destroy, for a mapped transport: but keep_bytes of this rank's own memory at
     * keep_offset (whole pages, not 0) stay where they are, with what is in them, as memory of this
     * process alone, which the caller unmaps. No peer can reach it any more, unless it is a thread
     * of this process.
     */
    void (*window_retire)(struct nep_transport *transport, uint32_t window, size_t keep_offset,
                          size_t keep_bytes);
    /* The window of a peer as mapped here; NULL where there is none. Own rank: the own base. */
    void *(*peer_window)(struct nep_transport *transport, uint32_t window, uint32_t rank);

    /* Never blocks. *number_p: compare with completed(dst). A full queue is kept inside, not
     * refused. */
    enum nep_status (*put)(struct nep_transport *transport, const struct nep_put *put,
                           uint64_t *number_p);
    /* Moves things along; cheap when there is nothing. A fault of a peer is reported through
     * peer_status. */
    void (*progress)(struct nep_transport *transport);
    /* Puts to dst whose source bytes are free again: all numbers <= the result. */
    uint64_t (*completed)(struct nep_transport *transport, uint32_t dst);
    /*
     * NEP_OK while the peer is believed alive; else the status, with a sentence in this thread's
     * message. May look at the system (process gone, link down): called about every 10 ms of a
     * wait.
     */
    enum nep_status (*peer_status)(struct nep_transport *transport, uint32_t rank);
    /*
     * The group goes on without this rank: destroy and close wait for nothing to or from it,
     * whether it is dead, unreachable, or only slow. Not collective.
     */
    void (*abandon)(struct nep_transport *transport, uint32_t rank);
    void (*stats)(struct nep_transport *transport, struct nep_transport_stats *stats);
};

/* First member of every transport's own structure. */
struct nep_transport {
    const struct nep_transport_ops *ops;
};

/* The one list of transports, ended by NULL: transport/list.c. */
extern const struct nep_transport_ops *const nep_transport_list[];
/* By name, where "name:args" splits at the first colon; *args_p is "" or what follows.
 * NEP_ERR_NOT_FOUND lists the names. */
enum nep_status nep_transport_find(const char *name, const struct nep_transport_ops **ops_p,
                                   const char **args_p);

/* What a wrapper stands around when nothing is named: it serves threads and processes. */
#define NEP_TRANSPORT_WRAPPED "shm"
/* Capabilities of "name" or "name:args", a wrapper's completed by those of what it wraps; 0:
 * unknown. */
uint32_t nep_transport_caps(const char *name);

/* Fill entries a transport does not have; they return NEP_ERR_UNSUPPORTED naming the transport. */
enum nep_status nep_unsupported_put(struct nep_transport *transport, const struct nep_put *put,
                                    uint64_t *number_p);
/* For transports whose peers map the windows: there is nobody to hold back. */
enum nep_status nep_open_window_grant(struct nep_transport *transport, uint32_t window,
                                      const struct nep_grant *grants, uint32_t num_grants);
void nep_unsupported_window_retire(struct nep_transport *transport, uint32_t window,
                                   size_t keep_offset, size_t keep_bytes); /* destroys it */
void nep_unsupported_abandon(struct nep_transport *transport,
                             uint32_t rank); /* where nothing is waited for */
void *nep_unsupported_peer_window(struct nep_transport *transport, uint32_t window, uint32_t rank);

#endif
