/* SPDX-License-Identifier: Apache-2.0 */
/* One MoE shape on a communicator: its region, its streams, its operations in flight. */
#ifndef NEP_DISPATCH_EP_H
#define NEP_DISPATCH_EP_H

#include "dispatch/buffers.h"
#include "dispatch/comm.h"
#include "dispatch/events.h"
#include "dispatch/flow.h"
#include "dispatch/handle.h"
#include "dispatch/host/kernels.h"
#include "dispatch/layout.h"
#include "dispatch/maps.h"
#include "dispatch/pool.h"
#include "dispatch/protocol.h"
#include "dispatch/recorder.h"
#include "dispatch/region.h"
#include "dispatch/sums.h"
#include "placement/placement.h"

/* Parts in which a tile is pushed: one thread each, at most. */
enum { NEP_PUSH_CHUNKS = 8 };

/* What a step of an operation found missing: the first such thing, kept for the sentence. */
struct nep_missing {
    const char *phase; /* NULL: nothing is missing */
    uint32_t rank;     /* who should have delivered it */
    uint64_t expected;
    uint64_t arrived;
};

/* Where a physical slot is. */
struct nep_slot_at {
    uint32_t rank;
    uint32_t node;
};

/* Who publishes a source's COUNTS on this node, under which index. */
struct nep_word_at {
    uint32_t rank;
    uint32_t control;
};

/* Where the rows of a local rank go. */
struct nep_push_at {
    uint8_t *x; /* NULL: that rank pulls */
    uint8_t *scales;
    uint64_t capacity; /* rows */
};

/* Where the outputs of a local rank lie. */
struct nep_lent {
    const uint8_t *base;  /* row p at base + p * row_bytes; NULL: rows come through staging */
    const float *weights; /* beside base: [rows][K], NULL where none come back */
};

/* Memory of an earlier generation's pool that callers may still hold. */
struct nep_retired_pool {
    struct nep_retired_pool *next;
    struct nep_pool pool;
    void *memory;
    size_t bytes;
};

struct nep_waits;
struct nep_device;

struct nep_ep {
    struct nep_comm *comm;
    struct nep_ep *next; /* of the communicator's */
    uint32_t number;     /* id, window, bits of the immediate */
    uint32_t rank;
    uint32_t node;
    uint32_t local;
    uint32_t node_size; /* G of this node */
    struct nep_shape shape;
    struct nep_plan plan;
    const struct nep_region *region; /* own */
    struct nep_region_head *head;    /* own window */
    uint8_t **window;                /* [R] windows of this node's ranks; NULL elsewhere */
    const struct nep_kernels *kernels;
    struct nep_maps maps;
    struct nep_map *first_map;   /* of a newcomer, until it is let in */
    struct nep_slot_at *slot_at; /* [R * L] where each physical slot is */
    struct nep_pool pool;
    struct nep_registered *registered; /* [num_registered] */
    uint32_t num_registered;
    /* who publishes source s's COUNTS on this node */
    struct nep_word_at *counts_at; /* [R] */
    uint8_t *counts;               /* [R] copies of the COUNTS taken last, with their tables */
    struct nep_counts_msg *counts_of_sums; /* [N] the same of those that tell of sums */
    uint32_t *control_rank;                /* [controls] the rank behind each own control */
    uint16_t *slot_local;                  /* [G * L] local rank of each slot of this node */

    uint64_t next_op;      /* number of the next send */
    uint64_t completed_op; /* operations completed */
    uint64_t first_op;     /* the first that some rank had not completed when the group changed */
    uint64_t timeout_ns;   /* of every wait */
    struct nep_handle *in_flight[NEP_MAX_OUTSTANDING]; /* by op % S */
    struct nep_flow *dispatch_flows; /* [N] to each node; the own one counts home tiles */
    struct nep_flow *combine_flows;  /* [lanes] */
    struct nep_send_ring *rings;     /* [num_sends] */
    struct nep_inflow *dispatch_in;  /* [R] what is known of each source's stream here */
    struct nep_inflow *combine_in;   /* [N] */
    uint64_t *counts_put;            /* [controls][W] put number of each COUNTS sent */
    uint64_t *staged;                /* [R] rows staged for each source, ever */
    uint64_t *taken;                 /* [1 + lanes][G] */
    struct nep_push_at *push_at;     /* [G] scratch: outputs of the node that are mapped */
    uint8_t *cast_rows; /* [NEP_PUSH_CHUNKS] scratch: rows cast before they are pushed */
    struct nep_layout_tables layout; /* scratch of nep_dispatch_send and nep_ep_layout */

    struct nep_lent *lent; /* [G] scratch of combine: where the outputs of each local rank lie */
    struct nep_sum_batch *batch; /* scratch of combine */
    struct nep_missing missing;
    uint64_t *awaited; /* [ceil(R / 64)] bit r: the last step found something of rank r missing */
    bool has_number;   /* claimed */
    bool has_intra_window; /* made */
    bool has_inter_window; /* registered with the fabric */
    bool has_no_maps;      /* it is prepared for another, which has them */
    bool is_broken;
    bool is_traced; /* under the communicator's lock: a trace may look into the region */
    uint64_t *load; /* [num_layers][E] (token, k) pairs that this rank dispatched, ever */
    struct nep_ep_params params;   /* as given, without the map */
    struct nep_device *device;     /* NULL: tokens are in host memory */
    struct nep_recorder *recorder; /* NULL: nothing is recorded */
    uint32_t next_handle;
    struct nep_handle *handles; /* all that are alive */
    struct nep_stats stats;
    struct nep_waits *waits;
    struct nep_retired_pool *retired;
};

enum nep_status nep_ep_check(struct nep_ep *ep);
/*
 * Collective over members: everything that follows from who they are: plan, tables, window. Again
 * after nep_ep_unbuild, when they have changed.
 */
enum nep_status nep_ep_build(struct nep_ep *ep);
/* What was built for another ep object of the same shape and number becomes this one's, which was
 * unbuilt. */
enum nep_status nep_ep_adopt(struct nep_ep *ep, struct nep_ep *made);
/* Lets go of the window; what callers hold of its pool stays. Handles are to be remade. */
void nep_ep_unbuild(struct nep_ep *ep);
void nep_ep_free_window(struct nep_ep *ep);
void nep_ep_free_tables(struct nep_ep *ep);
/* New tables for all handles, which are then empty, and numbered from 0 in the order of their age.
 */
enum nep_status nep_ep_renew_handles(struct nep_ep *ep);
/* A handle goes: an operation it is in can no longer complete. */
void nep_ep_forget(struct nep_ep *ep, struct nep_handle *handle);

/* Remembers whom this rank waits for; the first one's reason is kept for the sentence. */
static inline void nep_ep_miss(struct nep_ep *ep, const char *phase, uint32_t rank,
                               uint64_t expected, uint64_t arrived)
{
    ep->awaited[rank / 64] |= 1ull << rank % 64;
    if (ep->missing.phase == NULL) {
        ep->missing = (struct nep_missing){phase, rank, expected, arrived};
    }
}

/* What arrived here last, in the own region. */
static inline struct nep_event_ring *nep_ep_arrivals(const struct nep_ep *ep)
{
    return (struct nep_event_ring *)((uint8_t *)ep->head + ep->region->arrivals);
}

/* peer: a member. */
static inline void nep_ep_event(struct nep_ep *ep, enum nep_event_kind kind, uint32_t peer,
                                uint64_t op, uint64_t value)
{
    nep_event_put(ep->comm->events, kind, ep->number, ep->comm->members[peer], op, value);
}

static inline void nep_ep_begin_call(struct nep_ep *ep, enum nep_event_call call, uint64_t op)
{
    nep_ep_event(ep, NEP_EVENT_BEGIN, ep->rank, op, call);
}

/* Returns status. */
static inline enum nep_status nep_ep_end_call(struct nep_ep *ep, enum nep_event_call call,
                                              uint64_t op, enum nep_status status)
{
    nep_ep_event(ep, NEP_EVENT_END, ep->rank, op, (uint64_t)(uint32_t)status << 32 | call);
    return status;
}

/* What a rank is called in sentences and faults. */
static inline uint32_t nep_ep_name(const struct nep_ep *ep, uint32_t rank)
{
    return nep_comm_name(ep->comm, rank);
}

/* A rank of this node, by lane. */
static inline uint32_t nep_ep_rank_at(const struct nep_ep *ep, uint32_t local)
{
    return nep_plan_rank_at(&ep->plan, ep->node, local);
}

/* A put into the fabric, counted. */
enum nep_status nep_ep_put(struct nep_ep *ep, const struct nep_put *put, uint64_t *number_p);

#endif
