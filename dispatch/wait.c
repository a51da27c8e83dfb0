/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whom to blame. A rank that gives up writes the culprit into its own region, where its node sees
 * it, and sends LEAVE to the ranks it talks to on other nodes, before it returns: so a rank that
 * ends because another one died is not taken for the cause. Culprits named by others come first,
 * then ranks whose process is gone, then, at the deadline, the rank that the step named.
 */
#include "dispatch/wait.h"

#include <string.h>

#include "base/backoff.h"
#include "base/clock.h"
#include "base/log.h"
#include "dispatch/waits.h"

#define TRACED_IDLE_NS 10000ull
#define GRACE_NS       (500 * NEP_MS)

static void forget_missing(struct nep_ep *ep)
{
    ep->missing = (struct nep_missing){.rank = UINT32_MAX};
    memset(ep->awaited, 0, (ep->plan.topology->num_ranks + 63) / 64 * sizeof *ep->awaited);
}

static const char *op_name(const struct nep_handle *handle)
{
    return handle->op.kind == NEP_OP_COMBINE ? "combine" : "dispatch";
}

void nep_tell(struct nep_ep *ep, uint32_t culprit)
{
    struct nep_transport *inter = ep->comm->inter;
    uint64_t none = 0;
    atomic_compare_exchange_strong_explicit(&ep->head->fault, &none, (uint64_t)culprit + 1,
                                            memory_order_acq_rel, memory_order_relaxed);
    for (uint32_t c = 1; inter != NULL && c < ep->region->num_controls; c++) {
        struct nep_put put = {
            .dst = ep->control_rank[c],
            .window = ep->number,
            .imm = nep_imm(ep->head->generation, NEP_KIND_LEAVE, ep->number, culprit >> 8, culprit),
        };
        uint64_t number;
        /* The culprit too: if it only waits itself, it knows better (pass_on). */
        if (inter->ops->peer_status(inter, put.dst) == NEP_OK) {
            (void)inter->ops->put(inter, &put, &number);
        }
    }
}

enum nep_status nep_break(struct nep_ep *ep, const struct nep_fault *fault)
{
    ep->is_broken = true;
    if (fault->rank != UINT32_MAX) {
        nep_tell(ep, fault->rank);
    }
    return nep_comm_fail(ep->comm, fault);
}

static enum nep_status give_up(struct nep_ep *ep, struct nep_handle *handle, enum nep_status status,
                               uint32_t culprit, uint64_t idle_ns, const char *cause)
{
    const struct nep_missing *missing = &ep->missing;
    struct nep_fault fault = {
        .size = sizeof fault,
        .status = status,
        .rank = culprit,
        .op = handle->op.number,
        .expected = missing->expected,
        .arrived = missing->arrived,
        .idle_ns = idle_ns,
    };
    snprintf(fault.phase, sizeof fault.phase, "%s", missing->phase ? missing->phase : "");
    snprintf(fault.message, sizeof fault.message,
             "%s; rank %u waited in %s (operation %llu) for %s of rank %u: %llu of %llu here, "
             "nothing moved for %.3f s",
             cause, nep_ep_name(ep, ep->rank), op_name(handle),
             (unsigned long long)handle->op.number,
             missing->phase ? missing->phase : "nothing in particular",
             nep_ep_name(ep, missing->rank), (unsigned long long)missing->arrived,
             (unsigned long long)missing->expected, (double)idle_ns / 1e9);
    return nep_break(ep, &fault);
}

/* The culprit that some rank of this node, or this rank by a LEAVE, has named; UINT32_MAX if none.
 */
static uint32_t named_culprit(struct nep_ep *ep)
{
    for (uint32_t g = 0; g < ep->node_size; g++) {
        struct nep_region_head *head = (struct nep_region_head *)ep->window[nep_ep_rank_at(ep, g)];
        uint64_t fault = atomic_load_explicit(&head->fault, memory_order_acquire);
        if (fault != 0 && fault <= ep->plan.topology->num_ranks) {
            return (uint32_t)(fault - 1);
        }
    }
    return UINT32_MAX;
}

enum nep_status nep_blame_put(struct nep_ep *ep, uint32_t dst, enum nep_status status)
{
    char cause[256];
    snprintf(cause, sizeof cause, "%s", nep_last_message());
    uint32_t named = named_culprit(ep);
    uint32_t culprit = named != UINT32_MAX ? named : dst;
    struct nep_fault fault = {
        .size = sizeof fault,
        .status = status,
        .rank = culprit,
        .op = ep->completed_op,
        .phase = "put",
    };
    snprintf(fault.message, sizeof fault.message, "rank %u is lost: a put to rank %u failed: %s",
             nep_ep_name(ep, culprit), nep_ep_name(ep, dst), cause);
    return nep_break(ep, &fault);
}

static enum nep_status peer_status(struct nep_ep *ep, uint32_t rank)
{
    struct nep_comm *comm = ep->comm;
    bool is_near = ep->plan.topology->node_of_rank[rank] == ep->node;
    struct nep_transport *transport = is_near ? comm->intra : comm->inter;
    return transport->ops->peer_status(transport, rank);
}

/* Who is gone, and how this rank knows. */
struct loss {
    uint32_t culprit;    /* UINT32_MAX: nobody */
    uint64_t watched_ns; /* for how long this rank has waited and looked, without a gap */
    char cause[256];
};

static bool follow(const struct nep_ep *ep, struct loss *loss, uint32_t culprit)
{
    loss->culprit = culprit;
    snprintf(loss->cause, sizeof loss->cause, "rank %u is lost or stuck: another rank found it",
             nep_ep_name(ep, culprit));
    return true;
}

/*
 * A rank of this node that ended in the middle of this operation without having named anybody: it
 * comes before a rank of another node, which may have left because of it and whose LEAVE has not
 * come, or went to others.
 */
static uint32_t dead_neighbour(struct nep_ep *ep)
{
    for (uint32_t g = 0; g < ep->node_size; g++) {
        uint32_t rank = nep_ep_rank_at(ep, g);
        struct nep_region_head *head = (struct nep_region_head *)ep->window[rank];
        if (rank != ep->rank &&
            atomic_load_explicit(&head->completed, memory_order_acquire) <= ep->completed_op &&
            atomic_load_explicit(&head->fault, memory_order_acquire) == 0 &&
            peer_status(ep, rank) != NEP_OK) {
            return rank;
        }
    }
    return UINT32_MAX;
}

static bool lose(const struct nep_ep *ep, struct loss *loss, uint32_t culprit)
{
    loss->culprit = culprit;
    snprintf(loss->cause, sizeof loss->cause, "rank %u is lost: %s", nep_ep_name(ep, culprit),
             nep_last_message());
    return true;
}

static bool is_near(const struct nep_ep *ep, uint32_t rank)
{
    return rank < ep->plan.topology->num_ranks && ep->plan.topology->node_of_rank[rank] == ep->node;
}

/* Whether a rank of this node has looked, in a wait, within the most of the deadline. */
static bool is_looking(const struct nep_ep *ep, uint32_t near)
{
    struct nep_region_head *head = (struct nep_region_head *)ep->window[near];
    uint64_t looked_ns = atomic_load_explicit(&head->looked_ns, memory_order_relaxed);
    return nep_now_ns() <= looked_ns + ep->timeout_ns / 4 * 3;
}

/* A rank of this node that only waits itself is not the cause: whom it waits for may be. */
static uint32_t follow_waits(const struct nep_ep *ep, uint32_t first)
{
    uint32_t rank = first;
    for (uint32_t hops = 0; hops < ep->node_size && is_near(ep, rank); hops++) {
        struct nep_region_head *head = (struct nep_region_head *)ep->window[rank];
        uint64_t awaits = atomic_load_explicit(&head->awaits, memory_order_relaxed);
        if (awaits == 0 || awaits > ep->plan.topology->num_ranks || !is_looking(ep, rank)) {
            break;
        }
        rank = (uint32_t)(awaits - 1);
    }
    return rank != ep->rank ? rank : first;
}

/*
 * Whom to blame for what is missing: the rank that the step named, or whom that one waits for; or
 * the rank of this node by which its messages come, when that one has not looked at anything for
 * most of the deadline: it is stopped, or does something else, and what came for this rank may lie
 * with it.
 */
static uint32_t suspect(const struct nep_ep *ep)
{
    uint32_t rank = follow_waits(ep, ep->missing.rank);
    if (rank >= ep->plan.topology->num_ranks || is_near(ep, rank)) {
        return rank;
    }
    uint32_t landing = nep_plan_landing(&ep->plan, rank, ep->node);
    return landing == ep->rank || is_looking(ep, landing) ? rank : landing;
}

/*
 * Another rank blames this one, which only waits itself: for half a deadline at least, and looking
 * all that time (a rank that was stopped, or came late, is rightly blamed). Its own deadline would
 * have passed next, so the blame goes on to whom it waits for.
 */
static bool pass_on(const struct nep_ep *ep, struct loss *loss)
{
    uint32_t rank = suspect(ep);
    if (ep->missing.phase == NULL || rank == ep->rank || loss->watched_ns < ep->timeout_ns / 2) {
        return false;
    }
    loss->culprit = rank;
    snprintf(loss->cause, sizeof loss->cause,
             "rank %u is slow or stuck: rank %u, which waits for it, was taken for the cause",
             nep_ep_name(ep, rank), nep_ep_name(ep, ep->rank));
    return true;
}

/*
 * Looks for ranks that are gone. One that this rank does not wait for is no reason to fail yet: it
 * may have done all its part, or whoever waits for it will say so; after GRACE_NS without either it
 * is one.
 */
static bool find_loss(struct nep_ep *ep, uint64_t idle_ns, bool is_over, struct loss *loss)
{
    uint32_t named = named_culprit(ep);
    if (named != UINT32_MAX) {
        return (named == ep->rank && pass_on(ep, loss)) || follow(ep, loss, named);
    }
    for (uint32_t r = 0; r < ep->plan.topology->num_ranks; r++) {
        bool is_awaited = (ep->awaited[r / 64] >> r % 64 & 1) != 0;
        if (r == ep->rank || !(is_awaited || is_over || idle_ns > GRACE_NS) ||
            peer_status(ep, r) == NEP_OK) {
            continue;
        }
        lose(ep, loss, r);
        if (ep->plan.topology->node_of_rank[r] != ep->node) {
            uint32_t near = dead_neighbour(ep);
            if (near != UINT32_MAX) {
                return lose(ep, loss, near);
            }
        }
        /* It may have ended because of another: what it said before is visible by now. */
        named = named_culprit(ep);
        return named == UINT32_MAX || named == r || follow(ep, loss, named);
    }
    return false;
}

static void progress_transports(struct nep_comm *comm)
{
    comm->intra->ops->progress(comm->intra);
    if (comm->inter != NULL && comm->inter != comm->intra) {
        comm->inter->ops->progress(comm->inter);
    }
}

/* Slow, not dead: it is named in the log once in a wait, long before the deadline. */
static void warn_slow(const struct nep_ep *ep, const struct nep_handle *handle, uint64_t idle_ns)
{
    nep_warn("rank %u is slow: rank %u has waited %.3f s in %s (operation %llu) for %s of it: %llu "
             "of %llu here; it seems to live, and is waited for until %.3f s",
             nep_ep_name(ep, ep->missing.rank), nep_ep_name(ep, ep->rank), (double)idle_ns / 1e9,
             op_name(handle), (unsigned long long)handle->op.number, ep->missing.phase,
             (unsigned long long)ep->missing.arrived, (unsigned long long)ep->missing.expected,
             (double)ep->timeout_ns / 1e9);
}

/* An idle stretch is over: whoever was missing in its last step is charged for it. */
static void end_idle(struct nep_ep *ep, const struct nep_handle *handle,
                     const struct nep_backoff *backoff, const struct nep_missing *missed)
{
    uint64_t idle_ns = nep_backoff_idle_ns(backoff);
    ep->stats.wait_ns += idle_ns;
    nep_waits_add(ep->waits, missed->phase, nep_ep_name(ep, missed->rank), idle_ns);
    if (idle_ns >= TRACED_IDLE_NS && missed->phase != NULL) {
        uint64_t us = idle_ns / 1000 < UINT32_MAX ? idle_ns / 1000 : UINT32_MAX;
        nep_ep_event(ep, NEP_EVENT_WAIT, missed->rank, us << 32 | (uint32_t)handle->op.number,
                     (uintptr_t)missed->phase);
    }
}

static enum nep_status time_out(struct nep_ep *ep, struct nep_handle *handle, uint64_t idle_ns)
{
    char cause[128];
    uint32_t culprit = suspect(ep);
    snprintf(cause, sizeof cause, "rank %u is slow or stuck: the timeout of %.3f s passed",
             nep_ep_name(ep, culprit), (double)ep->timeout_ns / 1e9);
    return give_up(ep, handle, NEP_ERR_TIMEOUT, culprit, idle_ns, cause);
}

/* Says to the node that this rank looks, and whom it misses something of. */
static void say_looked(struct nep_ep *ep)
{
    uint64_t awaits = ep->missing.phase != NULL ? (uint64_t)ep->missing.rank + 1 : 0;
    atomic_store_explicit(&ep->head->awaits, awaits, memory_order_relaxed);
    atomic_store_explicit(&ep->head->looked_ns, nep_now_ns(), memory_order_relaxed);
}

/* It does something else now. */
static void stop_looking(struct nep_ep *ep)
{
    if (atomic_load_explicit(&ep->head->awaits, memory_order_relaxed) != 0) {
        atomic_store_explicit(&ep->head->awaits, 0, memory_order_relaxed);
    }
}

enum nep_status nep_wait(struct nep_ep *ep, struct nep_handle *handle, nep_step_fn step)
{
    struct nep_backoff backoff;
    struct nep_missing missed = {.rank = UINT32_MAX};
    struct loss loss = {.culprit = UINT32_MAX};
    bool is_lost = false; /* find_loss has found one: one more step, then it is told */
    bool is_warned = false;
    nep_backoff_init(&backoff, ep->timeout_ns, ep->comm->spin_limit);
    for (;;) {
        bool progress = false, done = false;
        forget_missing(ep);
        enum nep_status status = step(ep, handle, &progress, &done);
        if ((progress || done) && backoff.num_idle != 0) {
            end_idle(ep, handle, &backoff, &missed);
            stop_looking(ep);
        }
        if (status != NEP_OK || done) {
            return status;
        }
        progress_transports(ep->comm);
        if (progress) {
            nep_backoff_reset(&backoff);
            missed = (struct nep_missing){.rank = UINT32_MAX};
            is_lost = false;
            continue;
        }
        if (ep->missing.phase != NULL) { /* else what was missing came during the step itself */
            missed = ep->missing;
        }
        if (is_lost) {
            /* The step above found nothing more of what it may have left behind. */
            return give_up(ep, handle, NEP_ERR_PEER_LOST, loss.culprit,
                           nep_backoff_idle_ns(&backoff), loss.cause);
        }
        bool in_time = nep_backoff_pause(&backoff);
        if (in_time && !backoff.slow) {
            continue;
        }
        uint64_t idle_ns = nep_backoff_idle_ns(&backoff);
        loss.watched_ns = nep_backoff_watched_ns(&backoff);
        if (backoff.slow) {
            say_looked(ep);
        }
        if (find_loss(ep, idle_ns, !in_time, &loss)) {
            is_lost = true;
            continue;
        }
        if (!in_time) {
            return time_out(ep, handle, idle_ns);
        }
        if (!is_warned && ep->missing.phase != NULL && loss.watched_ns > ep->timeout_ns / 4) {
            warn_slow(ep, handle, idle_ns);
            is_warned = true;
        }
    }
}

enum nep_status nep_wait_in(struct nep_ep *ep, struct nep_handle *handle, nep_step_fn step,
                            enum nep_event_call call)
{
    uint64_t op = handle->op.number;
    nep_ep_begin_call(ep, call, op);
    return nep_ep_end_call(ep, call, op, nep_wait(ep, handle, step));
}

enum nep_status nep_try(struct nep_ep *ep, struct nep_handle *handle, nep_step_fn step)
{
    bool progress = true, done = false;
    enum nep_status status = NEP_OK;
    while (status == NEP_OK && progress && !done) {
        progress = false;
        forget_missing(ep);
        status = step(ep, handle, &progress, &done);
        progress_transports(ep->comm);
    }
    return status;
}
