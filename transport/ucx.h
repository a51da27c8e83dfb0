/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Inside of transport `ucx`, shared by its files: ucx_lib.c (the library, loaded at run time),
 * ucx_connect.c (addresses, endpoints, leaving), ucx_pass.c (who is who), ucx_send.c, ucx_recv.c,
 * ucx_thread.c (who drives the worker) and ucx.c (the operations table, windows, status of peers).
 */
#ifndef NEP_TRANSPORT_UCX_H
#define NEP_TRANSPORT_UCX_H

#include <pthread.h>
#include <stdatomic.h>
#include <ucp/api/ucp.h>

#include "transport/grants.h"

/* ---- ucx_lib.c ---------------------------------------------------------------------------- */

/* What is called of UCX. Each entry has the type that the header gives it. */
#define NEP_UCX_FUNCTIONS(X)                                                                       \
    X(ucp_get_version)                                                                             \
    X(ucp_get_version_string)                                                                      \
    X(ucp_config_read)                                                                             \
    X(ucp_config_release)                                                                          \
    X(ucp_config_modify)                                                                           \
    X(ucp_init_version)                                                                            \
    X(ucp_cleanup)                                                                                 \
    X(ucp_worker_create)                                                                           \
    X(ucp_worker_destroy)                                                                          \
    X(ucp_worker_query)                                                                            \
    X(ucp_worker_get_address)                                                                      \
    X(ucp_worker_release_address)                                                                  \
    X(ucp_worker_get_efd)                                                                          \
    X(ucp_worker_arm)                                                                              \
    X(ucp_worker_progress)                                                                         \
    X(ucp_worker_set_am_recv_handler)                                                              \
    X(ucp_ep_create)                                                                               \
    X(ucp_ep_print_info)                                                                           \
    X(ucp_ep_close_nbx)                                                                            \
    X(ucp_ep_flush_nbx)                                                                            \
    X(ucp_am_send_nbx)                                                                             \
    X(ucp_am_recv_data_nbx)                                                                        \
    X(ucp_mem_map)                                                                                 \
    X(ucp_mem_unmap)                                                                               \
    X(ucp_request_check_status)                                                                    \
    X(ucp_request_cancel)                                                                          \
    X(ucp_request_free)                                                                            \
    X(ucs_status_string)

struct nep_ucx_lib {
    void *handle;
#define X(name) __typeof__(name) *name;
    NEP_UCX_FUNCTIONS(X)
#undef X
};

/* Loads libucp and checks its version. NEP_ERR_UNSUPPORTED with a sentence. */
enum nep_status nep_ucx_lib_open(struct nep_ucx_lib *lib);
void nep_ucx_lib_close(struct nep_ucx_lib *lib);

/* ---- what a rank holds -------------------------------------------------------------------- */

enum {
    NEP_UCX_AM_PUT = 1, /* ids of active messages; 0 is left to others */
    NEP_UCX_AM_BEAT = 2,
    NEP_UCX_AM_LEAVE = 3,
    NEP_UCX_WINDOWS = 64 /* numbers of windows, as transport.h has them */
};

/*
 * Endpoints of a peer. Over TCP puts that stand apart and heartbeats have a connection of their
 * own: in the other one they would stand behind all that was put before and has not left, which is
 * megabytes, and a CREDIT that comes 100 ms late is a stream that stands still.
 */
enum { NEP_UCX_BULK, NEP_UCX_SHORT, NEP_UCX_EPS };

/* Before each piece of a put. 40 bytes without holes; UCX itself needs one byte order in a job. */
struct nep_ucx_header {
    uint32_t pass; /* of this communicator, sender and receiver: see nep_ucx_peer */
    uint32_t src;
    uint32_t window;
    uint32_t imm;
    uint64_t offset;
    uint32_t len;
    uint32_t life; /* how often the window's number was made: no late put meets a new window */
    uint32_t put;  /* the put's number, its low half: pieces of one put have it in common */
    uint32_t num_pieces;
};

/* A put from its call until its source bytes are free. Lives in blocks, never freed before close.
 */
struct nep_ucx_send {
    struct nep_ucx_send *next;      /* in the queue, or in the list of unused ones */
    struct nep_ucx_send *next_peer; /* in its peer's list, ascending numbers */
    uint32_t dst;
    struct nep_ucx *ux;
    uint64_t number;
    const void *src;
    ucp_mem_h memory;
    bool done;
    bool is_apart;
    uint32_t num_open; /* holder only: pieces that UCX has, and one while they are handed over */
    struct nep_ucx_header header; /* of the put as a whole */
};

/* One active message. Holder only; lives in a list of unused ones, never freed before close. */
struct nep_ucx_piece {
    struct nep_ucx_piece *next_unused, *next_made;
    struct nep_ucx_send *send;
    struct nep_ucx_header header; /* UCX reads it until the message is sent */
};

struct nep_ucx_block {
    struct nep_ucx_block *next;
    struct nep_ucx_send sends[64];
};

enum nep_ucx_state {
    NEP_UCX_NONE,   /* no endpoint: this rank itself, or one that is not served */
    NEP_UCX_ALIVE,  /* endpoint made */
    NEP_UCX_LEFT,   /* said goodbye */
    NEP_UCX_FAILED, /* UCX's error handler ran, or a send failed */
};

struct nep_ucx_peer {
    struct nep_ucx *ux;
    uint32_t rank;
    /* What its messages here, and mine to it, begin with. The two of us alone know them, so a rank
     * cannot speak for another one; late messages of another communicator have others. */
    uint32_t pass_from, pass_to;
    ucp_ep_h eps[NEP_UCX_EPS]; /* holder of the worker only; SHORT is NULL where it is not needed */
    bool close_ep;             /* holder only: failed, to be closed outside the handler */
    uint32_t num_leaves;       /* holder only: connections on which it said goodbye */
    uint32_t num_ended;        /* holder only: those that failed since the first of them */
    _Atomic int state;         /* enum nep_ucx_state */
    _Atomic int failure;       /* ucs_status_t, written before the state becomes FAILED */
    _Atomic bool misbehaved;   /* sent a put that was refused */
    _Atomic uint64_t heard_ns;
    _Atomic uint32_t num_silent;    /* own heartbeats since then */
    _Atomic uint64_t said_heard_ns; /* heard_ns of the silence that the log has named */
    uint32_t piece_bytes; /* longer puts are cut; a piece is sent eagerly where puts are cut */
    struct nep_ucx_partial *partials; /* holder only */
    uint32_t num_partials;
    bool beat_pending;                 /* holder only: the last beat is still on its way */
    struct nep_ucx_header word;        /* of beats and of the goodbye: UCX reads it as it sends */
    _Atomic uint64_t completed;        /* see nep_transport_ops.completed */
    uint64_t posted;                   /* below: under queue_lock */
    struct nep_ucx_send *first, *last; /* not completed, in order of their numbers */
};

/* A rendezvous on its way into a window. */
struct nep_ucx_recv {
    struct nep_ucx_recv *next_unused, *next_made;
    struct nep_ucx *ux;
    struct nep_ucx_window *window;
    struct nep_ucx_header header;
};

/* A put of which some pieces are here. */
struct nep_ucx_partial {
    struct nep_ucx_partial *next;
    uint32_t put;
    uint32_t num_left;
};

struct nep_ucx_window {
    _Atomic bool alive;
    uint32_t life; /* 1 for the first window of this number; equal on all ranks */
    void *base;
    uint64_t *bytes; /* [num_ranks] */
    ucp_mem_h memory;
    struct nep_grants grants;      /* holder only, while it is alive */
    struct nep_grants next_grants; /* of the next window of this number */
    uint32_t num_receiving;        /* holder only: rendezvous that write into it now */
};

struct nep_ucx {
    struct nep_transport transport; /* first */
    struct nep_ucx_lib lib;
    struct nep_transport_params params;
    uint32_t rank, num_ranks;
    int pid; /* a fork()ed child must not touch UCX */

    ucp_context_h context;
    ucp_worker_h worker;
    ucp_address_t *address;
    size_t address_len;
    int worker_fd; /* becomes readable when an armed worker has something to do */
    int wake_fd;   /* eventfd: something was queued while the thread slept */

    struct nep_ucx_peer *peers;
    struct nep_ucx_window windows[NEP_UCX_WINDOWS];

    pthread_mutex_t queue_lock;
    struct nep_ucx_send *queue_first, *queue_last;
    struct nep_ucx_send *unused;
    struct nep_ucx_block *blocks;
    _Atomic uint32_t num_queued;

    _Atomic bool held;              /* who exchanges it to true is the holder of the worker */
    _Atomic uint32_t num_in_flight; /* sends and receives that UCX works on */
    _Atomic uint64_t beat_ns;       /* when the next heartbeat is due */
    uint32_t num_to_close;          /* holder only: peers with close_ep */
    /* holder only: all that were made, and those not in use */
    struct nep_ucx_recv *unused_recvs, *recvs;
    struct nep_ucx_piece *unused_pieces, *pieces;
    struct nep_ucx_partial *unused_partials;

    pthread_t thread;
    bool has_thread;
    uint32_t spin;
    _Atomic bool stop;
    _Atomic bool asleep;

    _Atomic uint64_t num_puts, num_bytes, num_messages, num_arrivals, num_refused;
};

/* ---- ucx_send.c --------------------------------------------------------------------------- */

enum nep_status nep_ucx_send_push(struct nep_ucx *ux, const struct nep_put *put,
                                  uint64_t *number_p);
/* The rest is the holder's. */
uint32_t nep_ucx_send_queued(struct nep_ucx *ux);
void nep_ucx_beat(struct nep_ucx *ux);
/* The peer is gone; its endpoints are closed by the next nep_ucx_close_failed. */
void nep_ucx_peer_fail(struct nep_ucx_peer *peer, ucs_status_t status);
/*
 * One of its connections has failed, and with it the peer, unless it is about to leave: its
 * connections end one by one then, and what it put last may be in another one than the first
 * goodbye. So it is there until all have said goodbye, or one has ended without.
 */
void nep_ucx_connection_fail(struct nep_ucx_peer *peer, ucs_status_t status);
void nep_ucx_close_failed(struct nep_ucx *ux);
static inline bool nep_ucx_peer_is_open(const struct nep_ucx_peer *peer)
{
    return peer->eps[NEP_UCX_BULK] != NULL && !peer->close_ep;
}

/* ---- ucx_pass.c --------------------------------------------------------------------------- */

enum { NEP_UCX_KEY_BYTES = 32 };
struct nep_ucx_keys {
    uint8_t open[NEP_UCX_KEY_BYTES];
    uint8_t secret[NEP_UCX_KEY_BYTES];
};

enum nep_status nep_ucx_keys_make(struct nep_ucx_keys *keys);
/* Fills in pass_from and pass_to of a peer from its open key. */
enum nep_status nep_ucx_pass_agree(struct nep_ucx *ux, const struct nep_ucx_keys *keys,
                                   uint32_t rank, const uint8_t open[NEP_UCX_KEY_BYTES]);
void nep_ucx_keys_forget(struct nep_ucx_keys *keys);

/* ---- ucx_recv.c --------------------------------------------------------------------------- */

enum nep_status nep_ucx_handlers_set(struct nep_ucx *ux);
/* The handlers of puts and of goodbyes; also called by their unit tests. */
ucs_status_t nep_ucx_on_put(void *arg, const void *header, size_t header_len, void *data,
                            size_t len, const ucp_am_recv_param_t *param);
ucs_status_t nep_ucx_on_leave(void *arg, const void *header, size_t header_len, void *data,
                              size_t len, const ucp_am_recv_param_t *param);

/* ---- ucx_thread.c ------------------------------------------------------------------------- */

/* Moves things if nobody else does just now; false when somebody does. *moved_p: how much. */
bool nep_ucx_try_pump(struct nep_ucx *ux, uint32_t *moved_p);
/* For set-up and tear-down: waits until the worker is this thread's. Holders never block. */
void nep_ucx_hold(struct nep_ucx *ux);
void nep_ucx_release(struct nep_ucx *ux);
/* Holder: rounds of sends and progress, then what is due. */
uint32_t nep_ucx_pump(struct nep_ucx *ux);
/* Wakes the progress thread if it sleeps. */
void nep_ucx_wake(struct nep_ucx *ux);
enum nep_status nep_ucx_thread_start(struct nep_ucx *ux);
void nep_ucx_thread_stop(struct nep_ucx *ux);

/* ---- ucx_connect.c ------------------------------------------------------------------------ */

/* Context, worker, own address. Not collective. */
enum nep_status nep_ucx_worker_open(struct nep_ucx *ux);
void nep_ucx_worker_close(struct nep_ucx *ux);
/* Collective: exchanges addresses, makes an endpoint to every other rank and waits until each
 * works. */
enum nep_status nep_ucx_connect(struct nep_ucx *ux);
/* Says goodbye, waits a bounded time until what was sent has arrived, closes all endpoints. */
void nep_ucx_leave(struct nep_ucx *ux);

#endif
