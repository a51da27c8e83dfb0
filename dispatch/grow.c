/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A larger group is made beside the one that computes: a communicator that nobody sees, with the
 * same parameters and the same ep objects, is built by the code that builds any generation, on a
 * thread of its own. Changing over is then a matter of pointers, done by nep_comm_recover where all
 * agree that all have it (transport/group.h); what was before goes the way back, and is closed by a
 * thread. Rejected: adding ranks to the transports and plans that exist. Lanes move when a node
 * grows, so every table would have to change under those who read it.
 */
#include "dispatch/grow.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "dispatch/ep.h"

enum { WORKING, READY, FAILED };

static const uint64_t NEARLY_NS = NEP_S;

struct nep_grown {
    struct nep_grown *next; /* of those that leave */
    struct nep_comm comm;   /* what is prepared; after the change what was before */
    pthread_t thread;
    bool has_thread;
    atomic_bool is_cancelled;
    atomic_bool has_ended; /* the thread has nothing more to do */
    atomic_int state;
    uint64_t number;
    uint64_t generation;
    uint32_t num_new;
    uint32_t series;
    uint8_t *was_live;                   /* [seats] */
    struct nep_group_decision *decision; /* who is in it */
    enum nep_status status;
    char message[NEP_MESSAGE_BYTES];
};

/* ---- what nobody sees ----------------------------------------------------------------------- */

static enum nep_status copy_eps(struct nep_comm *hidden, const struct nep_comm *comm)
{
    for (const struct nep_ep *ep = comm->eps; ep != NULL; ep = ep->next) {
        struct nep_ep *copy = calloc(1, sizeof *copy);
        if (copy == NULL) {
            return nep_fail(NEP_ERR_NO_MEMORY, "no memory to prepare an ep");
        }
        copy->comm = hidden;
        copy->number = ep->number;
        copy->has_number = true;
        copy->has_no_maps = true;
        memcpy(&copy->shape, &ep->shape, sizeof copy->shape);
        copy->params = ep->params;
        copy->kernels = ep->kernels;
        copy->timeout_ns = ep->timeout_ns;
        copy->next = hidden->eps;
        hidden->eps = copy;
    }
    return NEP_OK;
}

static enum nep_status hide(struct nep_grown *grown, const struct nep_comm *comm)
{
    struct nep_comm *hidden = &grown->comm;
    uint32_t num_seats = comm->world.num_ranks;
    *hidden = (struct nep_comm){.config = comm->config,
                                .shown_config = &comm->config,
                                .seats_bootstrap = comm->seats_bootstrap,
                                .world = comm->world,
                                .store = comm->store,
                                .is_joining = comm->is_joining,
                                .workers = comm->workers,
                                .timeout_ns = comm->timeout_ns,
                                .spin_limit = comm->spin_limit,
                                .pid = comm->pid,
                                .eps_used = comm->eps_used,
                                .events = comm->events,
                                .started = comm->started};
    pthread_mutex_init(&hidden->lock, NULL);
    hidden->is_live = calloc(num_seats, sizeof *hidden->is_live);
    grown->was_live = calloc(num_seats, sizeof *grown->was_live);
    if (hidden->is_live == NULL || grown->was_live == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for %u ranks", num_seats);
    }
    memcpy(grown->was_live, comm->is_live, num_seats);
    return copy_eps(hidden, comm);
}

static void close_hidden(struct nep_comm *hidden, bool is_child)
{
    for (struct nep_ep *ep = hidden->eps; ep != NULL; ep = ep->next) {
        nep_ep_free_window(ep);
        nep_ep_free_tables(ep);
    }
    if (!is_child) {
        nep_comm_close_transports(hidden);
    }
}

static void grown_free(struct nep_grown *grown, bool is_child)
{
    struct nep_comm *hidden = &grown->comm;
    close_hidden(hidden, is_child);
    while (hidden->eps != NULL) {
        struct nep_ep *ep = hidden->eps;
        hidden->eps = ep->next;
        free(ep);
    }
    nep_generation_destroy(hidden->made);
    nep_topology_destroy(hidden->world_store);
    free(hidden->is_live);
    pthread_mutex_destroy(&hidden->lock);
    free(grown->was_live);
    free(grown->decision);
    free(grown);
}

/* ---- the thread ----------------------------------------------------------------------------- */

static enum nep_status decide(struct nep_grown *grown)
{
    const struct nep_comm *hidden = &grown->comm;
    struct nep_group_vote vote = {.store = &hidden->seats_bootstrap,
                                  .rank = hidden->world.rank,
                                  .num_ranks = hidden->world.num_ranks,
                                  .generation = grown->generation,
                                  .was_live = grown->was_live,
                                  .node_of_rank = hidden->world.node_of_rank,
                                  .suspect = UINT32_MAX,
                                  .num_new = grown->num_new,
                                  .timeout_ns = hidden->timeout_ns};
    return nep_group_prepare(&vote, grown->number, grown->series, &grown->is_cancelled,
                             &grown->decision);
}

static enum nep_status build(struct nep_grown *grown)
{
    struct nep_comm *hidden = &grown->comm;
    struct nep_generation *made = NULL;
    enum nep_status status = grown->decision == NULL ? decide(grown) : NEP_OK;
    if (status == NEP_OK) {
        status = nep_generation_create(hidden, grown->decision, &made);
    }
    if (status != NEP_OK) {
        return status;
    }
    made->group.is_cancelled = &grown->is_cancelled;
    hidden->is_joining = false;
    nep_generation_take(hidden, made);
    nep_comm_set_spin(hidden);
    status = nep_generation_build(hidden, grown->decision, hidden->timeout_ns);
    nep_group_unwatch(&made->group);
    return status;
}

static void *prepare_main(void *arg)
{
    struct nep_grown *grown = arg;
    uint64_t begin_ns = nep_now_ns();
    grown->status = build(grown);
    if (grown->status != NEP_OK) {
        nep_message_save(grown->message);
        close_hidden(&grown->comm, false);
    } else {
        nep_info("rank %u: generation %llu is prepared, in %.1f ms", grown->comm.world.rank,
                 (unsigned long long)grown->generation, (double)(nep_now_ns() - begin_ns) / 1e6);
    }
    /* Release: what was made, or the message; pairs with the acquire in state_of. */
    atomic_store_explicit(&grown->state, grown->status == NEP_OK ? READY : FAILED,
                          memory_order_release);
    atomic_store_explicit(&grown->has_ended, true, memory_order_release);
    return NULL;
}

static void *close_main(void *arg)
{
    struct nep_grown *grown = arg;
    close_hidden(&grown->comm, false);
    atomic_store_explicit(&grown->has_ended, true, memory_order_release);
    return NULL;
}

static bool start(struct nep_grown *grown, void *(*body)(void *))
{
    sigset_t all, before;
    atomic_store_explicit(&grown->has_ended, false, memory_order_relaxed);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the caller's business */
    int error = pthread_create(&grown->thread, NULL, body, grown);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    grown->has_thread = error == 0;
    return error == 0;
}

static void join(struct nep_grown *grown)
{
    if (grown->has_thread) {
        pthread_join(grown->thread, NULL);
    }
    grown->has_thread = false;
}

static int state_of(const struct nep_grown *grown)
{
    return atomic_load_explicit(&grown->state, memory_order_acquire);
}

/* Frees what has left; with must_wait all of it. */
static void reap(struct nep_comm *comm, bool must_wait)
{
    struct nep_grown **at = &comm->leaving;
    while (*at != NULL) {
        struct nep_grown *grown = *at;
        /* Acquire: pairs with the release at the thread's end. */
        if (!must_wait && !atomic_load_explicit(&grown->has_ended, memory_order_acquire)) {
            at = &grown->next;
            continue;
        }
        *at = grown->next;
        join(grown);
        grown_free(grown, false);
    }
}

static void leave(struct nep_comm *comm, struct nep_grown *grown)
{
    grown->next = comm->leaving;
    comm->leaving = grown;
}

void nep_grow_drop(struct nep_comm *comm)
{
    struct nep_grown *grown = comm->grown;
    comm->grown = NULL;
    if (grown == NULL) {
        return;
    }
    atomic_store(&grown->is_cancelled, true);
    if (state_of(grown) != WORKING) {
        join(grown);
        if (!start(grown, close_main)) {
            grown_free(grown, false);
            return;
        }
    }
    leave(comm, grown);
}

void nep_grow_end(struct nep_comm *comm)
{
    if (comm->pid == getpid()) {
        nep_grow_drop(comm);
        reap(comm, true);
        return;
    }
    if (comm->grown != NULL) { /* its thread was not forked */
        leave(comm, comm->grown);
        comm->grown = NULL;
    }
    while (comm->leaving != NULL) {
        struct nep_grown *grown = comm->leaving;
        comm->leaving = grown->next;
        grown_free(grown, true);
    }
}

/* ---- changing over -------------------------------------------------------------------------- */

static bool is_fitting(const struct nep_comm *comm)
{
    const struct nep_comm *hidden = &comm->grown->comm;
    bool fits = hidden->eps_used == comm->eps_used;
    for (const struct nep_ep *ep = comm->eps; fits && ep != NULL; ep = ep->next) {
        const struct nep_ep *made = nep_comm_ep_of(hidden, ep->number);
        fits = made != NULL && !ep->is_broken && ep->next_op == ep->completed_op &&
               nep_shape_is_same(&made->shape, &ep->shape);
    }
    return fits;
}

uint64_t nep_grow_offer(struct nep_comm *comm)
{
    struct nep_grown *grown = comm->grown;
    uint64_t deadline_ns = nep_deadline_ns(NEARLY_NS);
    if (grown == NULL || comm->fault.status != NEP_OK || !is_fitting(comm)) {
        return 0;
    }
    while (state_of(grown) == WORKING && nep_left_ns(deadline_ns) != 0) {
        nanosleep(&(struct timespec){.tv_nsec = NEP_MS / 5}, NULL);
    }
    return state_of(grown) == READY ? grown->number : 0;
}

const struct nep_group_decision *nep_grow_decision(const struct nep_comm *comm)
{
    return comm->grown->decision;
}

void nep_grow_set_ops(struct nep_comm *comm, const struct nep_group_ops *ops)
{
    for (struct nep_ep *ep = comm->grown->comm.eps; ep != NULL; ep = ep->next) {
        ep->next_op = ep->completed_op = ep->first_op = ops->next[ep->number];
        /* Release: pairs with the acquire in nep_arrive; nobody sends before all have voted. */
        atomic_store_explicit(&ep->head->completed, ep->completed_op, memory_order_release);
    }
}

/* Each gets what the other had. */
static void exchange(struct nep_comm *comm, struct nep_comm *hidden)
{
    struct nep_generation *before = comm->made, *made = hidden->made;
    struct nep_transport *intra = comm->intra, *inter = comm->inter;
    if (comm->is_joining) {
        nep_topology_destroy(comm->world_store);
        comm->world = hidden->world;
        comm->world_store = hidden->world_store;
        hidden->world_store = NULL;
        comm->is_joining = false;
    }
    made->group.is_cancelled = NULL;
    nep_generation_take(comm, made);
    comm->intra = hidden->intra;
    comm->inter = hidden->inter;
    comm->clock = hidden->clock;
    comm->spin_limit = hidden->spin_limit;
    hidden->made = before;
    hidden->intra = intra;
    hidden->inter = inter;
}

enum nep_status nep_grow_take(struct nep_comm *comm, const struct nep_group_decision *decision)
{
    struct nep_grown *grown = comm->grown;
    struct nep_comm *hidden = &grown->comm;
    join(grown);
    nep_grow_set_ops(comm, &decision->ops);
    for (struct nep_ep *ep = comm->eps; ep != NULL; ep = ep->next) {
        nep_ep_unbuild(ep);
    }
    exchange(comm, hidden);
    enum nep_status status = NEP_OK;
    for (struct nep_ep *ep = comm->eps; status == NEP_OK && ep != NULL; ep = ep->next) {
        status = nep_ep_adopt(ep, nep_comm_ep_of(hidden, ep->number));
    }
    comm->grown = NULL;
    if (start(grown, close_main)) {
        leave(comm, grown);
    } else {
        grown_free(grown, false);
    }
    return status;
}

/* ---- a newcomer ----------------------------------------------------------------------------- */

static enum nep_status grown_create(struct nep_comm *comm, uint64_t number, uint32_t num_new,
                                    const struct nep_group_decision *decision)
{
    struct nep_grown *grown = calloc(1, sizeof *grown);
    if (grown == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory to prepare a group that grows");
    }
    enum nep_status status = hide(grown, comm);
    grown->number = number;
    grown->generation = comm->num_decided + 1;
    grown->num_new = num_new;
    grown->series = nep_group_next_series(comm->made->group.series);
    if (status == NEP_OK && decision != NULL) {
        size_t bytes = sizeof *decision + decision->num_ranks * sizeof decision->seats[0];
        grown->generation = decision->generation;
        grown->decision = malloc(bytes);
        if (grown->decision != NULL) {
            memcpy(grown->decision, decision, bytes);
        } else {
            status = nep_fail(NEP_ERR_NO_MEMORY, "no memory to prepare a group that grows");
        }
    }
    if (status == NEP_OK && !start(grown, prepare_main)) {
        status = nep_fail(NEP_ERR_IO, "the system refuses a thread that prepares a larger group");
    }
    if (status != NEP_OK) {
        grown_free(grown, false);
        return status;
    }
    comm->grown = grown;
    return NEP_OK;
}

static void newcomer_begin(void *ctx, uint64_t number, const struct nep_group_decision *decision)
{
    struct nep_comm *comm = ctx;
    nep_grow_drop(comm);
    if (grown_create(comm, number, 0, decision) != NEP_OK) {
        nep_warn("rank %u cannot prepare to join, and joins when all wait for it: %s",
                 comm->world.rank, nep_last_message());
    }
}

static int newcomer_state(void *ctx)
{
    struct nep_comm *comm = ctx;
    int state = comm->grown != NULL ? state_of(comm->grown) : FAILED;
    return state == READY ? 1 : state == WORKING ? 0 : -1;
}

static void newcomer_set_ops(void *ctx, const struct nep_group_ops *ops)
{
    nep_grow_set_ops(ctx, ops);
}

static void newcomer_drop(void *ctx)
{
    nep_grow_drop(ctx);
}

const struct nep_group_preparer nep_grow_preparer = {
    .begin = newcomer_begin,
    .state = newcomer_state,
    .set_ops = newcomer_set_ops,
    .drop = newcomer_drop,
};

/* ---- what callers see ----------------------------------------------------------------------- */

enum nep_status nep_comm_grow_begin(struct nep_comm *comm, const struct nep_grow_params *params)
{
    struct nep_grow_params copy = {.size = sizeof copy, .num_joining = 1};
    enum nep_status status = nep_comm_may_recover(comm);
    if (status == NEP_OK) {
        status = nep_comm_check(comm);
    }
    if (status == NEP_OK && params != NULL) {
        status = nep_struct_copy(&copy, sizeof copy, params, sizeof copy.size, "nep_grow_params");
    }
    if (status == NEP_OK && comm->is_joining) {
        status = nep_fail(NEP_ERR_INVALID, "a newcomer prepares within nep_comm_recover");
    }
    if (status == NEP_OK && (copy.num_joining == 0 ||
                             copy.num_joining > comm->world.num_ranks - comm->topology.num_ranks)) {
        status = nep_fail(NEP_ERR_INVALID, "%u ranks are to join, but %u of %u seats are empty",
                          copy.num_joining, comm->world.num_ranks - comm->topology.num_ranks,
                          comm->world.num_ranks);
    }
    if (status != NEP_OK) {
        return status;
    }
    nep_grow_drop(comm);
    reap(comm, false);
    return grown_create(comm, ++comm->num_prepared, copy.num_joining, NULL);
}

enum nep_status nep_comm_grow_ready(struct nep_comm *comm, uint32_t *is_ready_p)
{
    if (comm == NULL || is_ready_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_comm_grow_ready: an argument is NULL");
    }
    if (comm->grown == NULL) {
        return nep_fail(NEP_ERR_NOT_FOUND, "nothing is prepared: nep_comm_grow_begin begins, and "
                                           "nep_comm_recover ends it");
    }
    int state = state_of(comm->grown);
    *is_ready_p = state == READY;
    return state == FAILED ? nep_fail(comm->grown->status, "the larger group was not made: %s",
                                      comm->grown->message)
                           : NEP_OK;
}
