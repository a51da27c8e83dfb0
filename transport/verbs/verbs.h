/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The parts of the verbs transport.
 *
 * path: one device port with its own protection domain, completion queue and shared receive queue.
 * QP q of a peer lives on path q % num_paths and is connected to QP q of the other side.
 *
 * Locks, in the order in which they may be taken: poll (completions, arrivals, events), then a
 * peer's. put takes the peer's alone.
 */
#ifndef NEP_TRANSPORT_VERBS_VERBS_H
#define NEP_TRANSPORT_VERBS_VERBS_H

#include <pthread.h>
#include <stdatomic.h>

#include "transport/grants.h"
#include "transport/verbs/api.h"

enum {
    NEP_VERBS_MAX_PATHS = 8,
    NEP_VERBS_MAX_QPS = 14, /* per peer, over all paths; 15 in the part field marks control */
    NEP_VERBS_MAX_WINDOWS = 64,
    NEP_VERBS_NAME = 64,
    NEP_VERBS_REFILL = 32, /* receives posted at once */
    NEP_VERBS_KNOCKS = 64, /* datagrams under way in each direction of a path; see revive.c */
    NEP_VERBS_INCARNATION = 0xfffff,
};

/* In wr_id of sends; a receive has 0. The rest is the number of the work request on its QP. */
#define NEP_VERBS_WR_SEND  (1ull << 63)
#define NEP_VERBS_WR_KNOCK (1ull << 62) /* of the datagram QP; the rest is the slot */

/* ---- immediates (docs/protocol.md): generation 3, kind 3, ep 6, op 8, tile 8, part 4 -------- */

/*
 * The part field belongs to this transport: 0 is a whole put, n from 2 to 14 a put split over the n
 * live QPs of a peer (which part it is follows from the QP it came by), 15 a message of the
 * transport itself: its code in bits 4 to 7, its argument above: of QP_DEAD the QP in bits 8 to 11
 * and the incarnation that died above.
 */
enum nep_verbs_control { NEP_VERBS_QP_DEAD = 1, NEP_VERBS_LEAVE = 2 };

static inline uint32_t nep_verbs_imm_window(uint32_t imm)
{
    return imm >> 20 & 63;
}
static inline uint32_t nep_verbs_imm_part(uint32_t imm)
{
    return imm & 15;
}

/* ---- choices (gid.c, assign.c): plain arithmetic, no device --------------------------------- */

/* What a GID is good for, best first. */
enum nep_verbs_gid_kind {
    NEP_VERBS_GID_V2_IPV4,
    NEP_VERBS_GID_V2_IPV6,
    NEP_VERBS_GID_IB,
    NEP_VERBS_GID_V2_LINK,
    NEP_VERBS_GID_V1,
    NEP_VERBS_GID_NUM_KINDS
};

/* The first GID of each kind on a port. index: -1 where there is none. */
struct nep_verbs_gids {
    int32_t index[NEP_VERBS_GID_NUM_KINDS];
    uint8_t raw[NEP_VERBS_GID_NUM_KINDS][16];
};

enum nep_verbs_gid_kind nep_verbs_gid_classify(const struct ibv_gid_entry *entry);
const char *nep_verbs_gid_kind_name(enum nep_verbs_gid_kind kind);
/* "::ffff:10.9.0.1" as text of at least 48 bytes. */
void nep_verbs_gid_text(const uint8_t raw[16], char text[48]);
/* The best kind that both ends have; NEP_ERR_UNSUPPORTED with what each has otherwise. */
enum nep_status nep_verbs_gid_agree(const struct nep_verbs_gids *mine,
                                    const struct nep_verbs_gids *theirs,
                                    enum nep_verbs_gid_kind *kind_p);

/* One candidate device port. */
struct nep_verbs_port {
    char device[NEP_VERBS_NAME];
    uint8_t port;
    int32_t numa; /* -1: unknown or none */
};

/*
 * Gives each of num_ranks local ranks num_paths of the num_ports ports: no port is used once more
 * than another, and within that the sum of distances is as small as pairwise exchange makes it.
 * numa[r]: where rank r's memory is, -1 unknown. choice[r * num_paths + p]: index of the port.
 */
void nep_verbs_assign(const struct nep_verbs_port *ports, uint32_t num_ports, const int32_t *numa,
                      uint32_t num_ranks, uint32_t num_paths, uint32_t *choice);

/* ---- objects -------------------------------------------------------------------------------- */

/* Open-addressing table from QP number to (peer, QP index); written at set-up only. */
struct nep_verbs_qp_table {
    uint32_t mask;
    struct nep_verbs_qp_key {
        uint32_t qp_num;
        uint32_t peer; /* UINT32_MAX: empty */
        uint32_t qp_idx;
    } * keys;
};

/* What a rank says of one of its paths, at set-up. */
struct nep_verbs_card {
    char device[NEP_VERBS_NAME];
    struct nep_verbs_gids gids;
    uint32_t mtu; /* enum ibv_mtu */
    uint32_t link_layer;
    uint32_t knock_qp; /* 0: it has none */
    uint16_t lid;
    uint16_t door_port; /* TCP, where it listens while it lives; 0: nowhere */
    uint8_t port;
};

/* The datagram QP of a path: revive.c. Poll lock. */
struct nep_verbs_knocks {
    struct ibv_qp *qp; /* NULL: QPs of this path are not revived */
    struct ibv_mr *mr;
    uint8_t *memory;
    uint32_t next;
    uint32_t num_sending;
    bool is_broken;
};

struct nep_verbs_path {
    char device[NEP_VERBS_NAME];
    uint8_t port;
    int32_t numa;
    struct ibv_context *context;
    struct ibv_pd *pd;
    struct ibv_comp_channel *channel;
    struct ibv_cq *cq;
    struct ibv_srq *srq;
    struct ibv_device_attr device_attr;
    struct ibv_port_attr port_attr;
    struct nep_verbs_gids gids;
    struct nep_verbs_qp_table table;
    struct nep_verbs_knocks knocks;
    int door_fd; /* listens; door.c */
    uint16_t door_port;
    uint32_t cq_depth;
    uint32_t srq_depth;
    uint32_t srq_posted;   /* receives there now; poll lock */
    uint32_t num_unacked;  /* completion events not acknowledged yet; progress thread */
    uint32_t num_overruns; /* SRQ limit events; poll lock, as the next */
    bool is_unwatched;     /* the limit must be set again */
    bool has_bound_windows;
    atomic_bool is_down;    /* the port; set by events */
    atomic_bool has_failed; /* the device; QPs of it are dead or about to be */
    atomic_bool is_dead;    /* the same, and its completions are taken */
};

struct nep_verbs_qp {
    struct ibv_qp *qp;
    uint32_t path;
    bool is_dead;
    uint32_t max_inline;
    uint64_t posted;  /* work requests so far: each has the next number */
    uint64_t done;    /* of them, those known complete */
    uint64_t *put_of; /* [put_mask + 1]: put that ends with a work request, 0 for none */
    uint16_t told;    /* dead QPs of this peer that were announced by this one */
    /* revive.c */
    uint32_t remote_num;  /* the other end's number */
    uint32_t incarnation; /* of this connection; while it is dead, the one to come */
    bool is_armed;        /* dead, but ready to receive */
    bool is_answered;     /* a knock of this incarnation came: the path works */
    bool is_other_armed;
    bool stays_dead; /* given up, or memory windows were made without it */
    uint64_t died_ns;
    uint64_t next_ns; /* when to knock */
    uint64_t gap_ns;
};

/* One put between nep_put and its completion. */
struct nep_verbs_record {
    struct nep_put put;
    uint16_t on_qps; /* QPs that still carry a part of it */
    bool must_resend;
};

/* Parts that came of one put split over num_parts QPs. */
struct nep_verbs_partial {
    uint32_t imm;
    uint16_t seen; /* by which QPs */
    uint16_t num_seen;
};
struct nep_verbs_assembly {
    struct nep_verbs_partial *partials;
    uint32_t num;
    uint32_t cap;
};

struct nep_verbs_peer {
    pthread_mutex_t lock;
    uint32_t rank;
    bool is_served;
    struct nep_verbs_qp *qps;                /* [num_qps] */
    struct ibv_ah *ahs[NEP_VERBS_MAX_PATHS]; /* NULL: it cannot be knocked at */
    uint32_t num_alive;
    uint32_t num_parts; /* of a put that is split: only ever falls; see post.c */
    uint16_t dead;      /* its dead QPs */
    uint64_t silent_ns; /* when the last one died */
    uint32_t next_qp;
    /* Ring of puts base + 1 to next; record of put n at n & mask. */
    struct nep_verbs_record *ring;
    uint64_t mask;
    uint64_t posted;           /* puts up to here were posted once */
    uint64_t next;             /* the last number given out */
    atomic_uint_fast64_t last; /* the same, for a look without the lock */
    uint32_t num_resend;
    uint64_t put_bytes;
    uint64_t num_requests;
    atomic_uint_fast64_t completed; /* all numbers up to here */
    atomic_int status;              /* NEP_OK, or why it is lost */
    atomic_bool has_left;
    char message[512]; /* written before status, as soon as no QP is left */
    atomic_uint_fast64_t last_heard_ns;
    uint64_t last_ping_ns;
    int ask_fd; /* connects to its door; -1: not now. This and the next: progress thread */
    uint32_t ask_path;
    uint64_t ask_ns; /* until when an answer is waited for; when to ask again */
    struct nep_verbs_assembly parts[NEP_VERBS_MAX_QPS + 1]; /* by number of parts; poll lock */
};

/* A part of another rank's window that this rank may write. */
struct nep_verbs_way {
    uint64_t offset;
    uint64_t bytes;
    uint32_t *rkeys; /* [qp * num_chunks + chunk] */
};

/* A window of one rank, as a peer needs it. */
struct nep_verbs_remote {
    uint64_t base;
    uint64_t bytes;
    uint32_t num_ways;
    struct nep_verbs_way ways[NEP_MAX_GRANTS];
};

/* A part of the own window that a peer may write: gate.c. */
struct nep_verbs_gate {
    uint32_t rank; /* UINT32_MAX: all */
    uint64_t offset;
    uint64_t bytes;
    uint32_t *keys;      /* [qp * num_chunks + chunk], 0 where the gate is not */
    struct ibv_mr **mrs; /* [path * num_chunks + chunk]; NULL: the window's are behind it */
    struct ibv_mw **mws; /* [qp * num_chunks + chunk]; NULL: keys are those of registrations */
};

struct nep_verbs_window {
    uint8_t *base;  /* NULL: no window, or one that was destroyed; poll lock for the sink */
    uint8_t *start; /* its first byte, also when it was destroyed */
    size_t bytes;
    size_t num_chunks; /* of the largest window of any rank */
    bool is_own_memory;
    bool is_device;      /* GPU memory: the host must not read it */
    bool is_guarded;     /* peers write through gates of their own */
    struct ibv_mr **mrs; /* [path * num_chunks + chunk]; NULL past the end */
    struct nep_verbs_gate *gates;
    uint32_t num_gates;
    struct nep_verbs_remote *remotes; /* [num_ranks] */
    uint32_t *rkeys;                  /* of their ways */
};

struct nep_verbs {
    struct nep_transport transport;
    struct nep_transport_params params;
    struct nep_verbs_api api;
    uint32_t rank;
    uint32_t num_ranks;
    uint32_t local; /* among the ranks of this machine, whatever nodes are emulated on it */
    uint32_t num_local;
    uint32_t num_paths;
    uint32_t num_qps;  /* per peer */
    uint32_t depth;    /* of each send queue */
    uint64_t put_mask; /* a power of two above depth, less one */
    uint64_t max_message_bytes;
    uint64_t key;                 /* random: what knocks at this rank carry */
    uint64_t *keys;               /* [num_ranks] */
    struct nep_verbs_card *cards; /* [num_ranks * num_paths] */
    struct nep_verbs_path paths[NEP_VERBS_MAX_PATHS];
    struct nep_verbs_peer *peers; /* [num_ranks] */
    struct ibv_recv_wr
        receives[NEP_VERBS_REFILL]; /* a list, of which the end may be posted alone */
    bool has_bound_windows;         /* memory windows that are bound to a QP, on all paths */
    struct nep_verbs_window windows[NEP_VERBS_MAX_WINDOWS];
    struct nep_grants grants[NEP_VERBS_MAX_WINDOWS]; /* of the window that is made next */
    pthread_mutex_t poll_lock;
    pthread_t thread;
    bool has_thread;
    int wake_fd;
    atomic_bool stop;
    atomic_uint_fast64_t num_caller_polls; /* by threads that wait: then the thread steps aside */
    atomic_bool has_dead;                  /* there are QPs to revive */
    atomic_uint num_down;                  /* paths whose port is down */
    uint64_t next_revive_ns;               /* progress thread, as the next two */
    int try_fd;                            /* connects to another rank's door, once; else -1 */
    bool believes_refusals;                /* and that went well */
    atomic_uint_fast64_t arrivals, retries, stale, revivals;
};

/* ---- device.c: devices and ports; path.c: what is made on them ------------------------------ */

/* Ports with their state, for choosing. Free *ports_p. */
enum nep_status nep_verbs_ports_list(const struct nep_verbs_api *api, const char *only,
                                     struct nep_verbs_port **ports_p, uint32_t *num_ports_p);
/* The ports of this rank's paths, chosen with all ranks of this machine; collective. */
enum nep_status nep_verbs_paths_choose(struct nep_verbs *verbs);
void nep_verbs_gids_read(const struct nep_verbs_api *api, struct ibv_context *context, uint8_t port,
                         uint32_t num_gids, uint32_t only, struct nep_verbs_gids *gids);
/* Opens device and port, checks limits, makes queues; receives are posted. */
enum nep_status nep_verbs_path_open(struct nep_verbs *verbs, struct nep_verbs_path *path);
void nep_verbs_path_close(struct nep_verbs *verbs, struct nep_verbs_path *path);

/* ---- connect.c ------------------------------------------------------------------------------ */

/* Makes QPs to every rank served, exchanges addresses through the bootstrap, connects; collective.
 */
enum nep_status nep_verbs_connect(struct nep_verbs *verbs);
void nep_verbs_disconnect(struct nep_verbs *verbs);
/* From RESET to ready to receive and to send, for its present incarnation. */
enum nep_status nep_verbs_qp_start(struct nep_verbs *verbs, uint32_t rank, uint32_t qp_idx);
static inline const struct nep_verbs_card *nep_verbs_card_of(const struct nep_verbs *verbs,
                                                             uint32_t rank, uint32_t path)
{
    return &verbs->cards[(size_t)rank * verbs->num_paths + path];
}
/* The peer's QP behind a completion; NULL for a number that is not known. */
static inline const struct nep_verbs_qp_key *nep_verbs_qp_find(const struct nep_verbs_path *path,
                                                               uint32_t qp_num)
{
    const struct nep_verbs_qp_table *table = &path->table;
    for (uint32_t at = qp_num & table->mask;; at = (at + 1) & table->mask) {
        const struct nep_verbs_qp_key *key = &table->keys[at];
        if (key->qp_num == qp_num && key->peer != UINT32_MAX) {
            return key;
        }
        if (key->peer == UINT32_MAX) {
            return NULL;
        }
    }
}

/* ---- window.c ------------------------------------------------------------------------------- */

enum nep_status nep_verbs_window_grant(struct nep_transport *transport, uint32_t window,
                                       const struct nep_grant *grants, uint32_t num_grants);
enum nep_status nep_verbs_window_create(struct nep_transport *transport, uint32_t window,
                                        void **base_p, size_t bytes);
void nep_verbs_window_destroy(struct nep_transport *transport, uint32_t window);
/* Takes back the registrations of a window that was destroyed, or of one that was not. */
void nep_verbs_window_release(struct nep_verbs *verbs, uint32_t window);
/* The registration sentence for errno `error`: limits, rights, or what the device cannot do. */
enum nep_status nep_verbs_register_failed(const char *device, const char *what, size_t bytes,
                                          int error);

/* What all registrations of windows allow, remote writes apart. */
unsigned nep_verbs_access(const struct nep_verbs *verbs);

/* ---- gate.c --------------------------------------------------------------------------------- */

/* Whether each peer can be held to its own part of this window. */
bool nep_verbs_can_guard(const struct nep_verbs *verbs, const struct nep_verbs_window *window,
                         const struct nep_grants *grants);
/* Registers and binds; not collective. What was made of them stays for nep_verbs_gates_free. */
enum nep_status nep_verbs_gates_make(struct nep_verbs *verbs, struct nep_verbs_window *window,
                                     const struct nep_grants *grants);
/* Takes the memory windows back, which must be gone before QPs and registrations. */
void nep_verbs_gates_unbind(struct nep_verbs *verbs, struct nep_verbs_window *window);
void nep_verbs_gates_free(struct nep_verbs *verbs, struct nep_verbs_window *window);
/* Collective: fills in the ways of remotes. num_cards: the most gates of any rank. */
enum nep_status nep_verbs_gates_exchange(struct nep_verbs *verbs, struct nep_verbs_window *window,
                                         uint32_t num_cards);

/* ---- send.c --------------------------------------------------------------------------------- */

enum nep_status nep_verbs_put(struct nep_transport *transport, const struct nep_put *put,
                              uint64_t *number_p);
uint64_t nep_verbs_completed(struct nep_transport *transport, uint32_t dst);
/* Those below, and all of post.c, are called with the peer's lock held. */
static inline struct nep_verbs_record *nep_verbs_record_of(const struct nep_verbs_peer *peer,
                                                           uint64_t number)
{
    return &peer->ring[number & peer->mask];
}
/* The way of a put into another rank's window; NULL: this rank may not write there. */
static inline const struct nep_verbs_way *nep_verbs_way_of(const struct nep_verbs_remote *remote,
                                                           uint64_t offset, uint64_t bytes)
{
    const struct nep_verbs_way *way = remote->ways;
    for (uint32_t i = 0; i < remote->num_ways; i++, way++) {
        if (offset >= way->offset && offset + bytes <= way->offset + way->bytes) {
            return way;
        }
    }
    return NULL;
}
/* Nearly always: no border of registrations or messages is in reach. Divisions cost more. */
static inline bool nep_verbs_is_one_piece(const struct nep_verbs *verbs, const struct nep_put *put,
                                          uint64_t len)
{
    return len == 0 ||
           (verbs->windows[put->window].num_chunks == 1 && len <= verbs->max_message_bytes);
}
void nep_verbs_peer_advance(struct nep_verbs_peer *peer);
/* Puts from this window that are not complete; those that wait for room or for another QP become
 * empty ones, so that nobody reads their source again. */
uint64_t nep_verbs_peer_forget(struct nep_verbs_peer *peer, uint32_t window, bool forget);

/* ---- post.c --------------------------------------------------------------------------------- */

/* Posts what has been put, as far as there is room. */
void nep_verbs_peer_pump(struct nep_verbs *verbs, struct nep_verbs_peer *peer);
/* Tells the peer that this rank leaves, over one live QP. */
void nep_verbs_peer_leave(struct nep_verbs *verbs, struct nep_verbs_peer *peer);
/* Posts a bind of a memory window to a QP that has room. */
void nep_verbs_peer_bind(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint32_t qp_idx,
                         struct ibv_mw *mw, uint32_t key, const struct ibv_mw_bind_info *info);
/* A write of zero bytes on every live QP that is idle: fails when the other side is gone. */
void nep_verbs_peer_ping(struct nep_verbs *verbs, struct nep_verbs_peer *peer);

/* ---- receive.c ------------------------------------------------------------------------------ */

/* Handles the completions there are, at most one batch per path; poll lock held. True if any. */
bool nep_verbs_poll(struct nep_verbs *verbs);
bool nep_verbs_poll_path(struct nep_verbs *verbs, struct nep_verbs_path *path);
/* Tops the shared receive queue up; poll lock held or before the path is used. */
enum nep_status nep_verbs_srq_fill(struct nep_verbs *verbs, struct nep_verbs_path *path);
/* Asks for an event when few receives are left, where the device has it: a progress thread that
 * cannot keep up. */
void nep_verbs_srq_watch(struct nep_verbs *verbs, struct nep_verbs_path *path);

/* ---- fault.c -------------------------------------------------------------------------------- */

/* A QP reported an error (or wc is NULL: `why` says what happened). Peer's lock held. */
void nep_verbs_qp_failed(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint32_t qp_idx,
                         const struct ibv_wc *wc, const char *why);
/* One asynchronous event, acted on; poll lock held. */
void nep_verbs_event_handle(struct nep_verbs *verbs, struct nep_verbs_path *path,
                            const struct ibv_async_event *event);
enum nep_status nep_verbs_peer_status(struct nep_transport *transport, uint32_t rank);
/* Ends all QPs to this rank: what is under way to it fails now, not after the device's retries. */
void nep_verbs_abandon(struct nep_transport *transport, uint32_t rank);
/* No QP reaches it any more and none comes back: lost, as peer->message says. Peer's lock held. */
void nep_verbs_peer_lose(struct nep_verbs *verbs, struct nep_verbs_peer *peer);

/* ---- revive.c ------------------------------------------------------------------------------- */

/* The datagram QP of a path; a device without one is no fault. */
void nep_verbs_knocks_open(struct nep_verbs *verbs, struct nep_verbs_path *path);
void nep_verbs_knocks_close(struct nep_verbs *verbs, struct nep_verbs_path *path);
/* A completion with NEP_VERBS_WR_KNOCK; poll lock held. */
void nep_verbs_knock_completed(struct nep_verbs *verbs, struct nep_verbs_path *path,
                               const struct ibv_wc *wc, uint64_t now_ns);
/* Whether there is a way back for it. */
bool nep_verbs_qp_may_revive(const struct nep_verbs *verbs, const struct nep_verbs_peer *peer,
                             uint32_t qp_idx);
/* It is dead, and `incarnation` is to come. Peer's lock held, as for the next. */
void nep_verbs_qp_begin(struct nep_verbs_qp *qp, uint32_t incarnation);
/* The other side says that this incarnation died: fenced from here on. Poll lock held too. */
void nep_verbs_qp_reported(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint32_t qp_idx,
                           uint32_t incarnation);
/* Progress thread, while has_dead: knocks, arms, goes on; gives peers up. */
void nep_verbs_revive(struct nep_verbs *verbs);

/* ---- door.c --------------------------------------------------------------------------------- */

/* Listens, where the path has an address; a path without one is no fault. */
void nep_verbs_door_open(struct nep_verbs *verbs, struct nep_verbs_path *path);
void nep_verbs_door_close(struct nep_verbs_path *path);
/* Lets in and sees off who has come; false: it cannot, and is not to be called again. */
bool nep_verbs_door_answer(const struct nep_verbs_path *path);
/* Begins to connect to a rank of another node, while all live; its end is for _tried. */
void nep_verbs_door_try(struct nep_verbs *verbs);
void nep_verbs_door_tried(struct nep_verbs *verbs);
/* Asks, now and then; true: its machine says that its process is gone. Progress thread, and the
 * peer's lock held. */
bool nep_verbs_has_ended(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint64_t now_ns);
void nep_verbs_ask_end(struct nep_verbs_peer *peer);

/* ---- progress.c ----------------------------------------------------------------------------- */

enum nep_status nep_verbs_progress_start(struct nep_verbs *verbs);
void nep_verbs_progress_stop(struct nep_verbs *verbs);
void nep_verbs_progress(struct nep_transport *transport);

/* ---- verbs.c -------------------------------------------------------------------------------- */

/* nep_verbs_ops.create over a table of calls: the library's, or a test's. Takes the table over. */
enum nep_status nep_verbs_create_with(const struct nep_verbs_api *api,
                                      const struct nep_transport_params *params,
                                      struct nep_transport **transport_p);
/* How long a dead peer may stay unnoticed by the device, ns. */
uint64_t nep_verbs_budget_ns(const struct nep_config *config);
/* How long the end of something may wait for acknowledgements, ns. */
uint64_t nep_verbs_patience_ns(const struct nep_config *config);

#endif
