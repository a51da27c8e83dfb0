/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The group changes: ranks were lost, or newcomers wait. Who lives is agreed on
 * (transport/group.h); then everything that follows from who the members are is made again
 * (generation.c), or was prepared and is taken (grow.c).
 *
 * Why nothing late does harm: a removed rank, and what it sent, only ever knew the windows and
 * connections of its own generation, and those are gone. Rejected: going on in the old windows.
 * Each fabric then needs a fence of its own for what is under way, every table an entry that says
 * who is dead, and regions room for lanes that may move.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "dispatch/ep.h"
#include "dispatch/grow.h"
#include "dispatch/wait.h"

/* Whether the transports of the last generation know that a seat's rank is gone. */
static bool is_gone(void *ctx, uint32_t seat)
{
    struct nep_comm *comm = ctx;
    const struct nep_topology *topology = &comm->topology;
    for (uint32_t m = 0; m < topology->num_ranks; m++) {
        if (comm->members[m] == seat && m != topology->rank) {
            bool is_near = topology->node_of_rank[m] == topology->node;
            struct nep_transport *transport = is_near ? comm->intra : comm->inter;
            if (transport != NULL && transport->ops->peer_status(transport, m) != NEP_OK) {
                return true;
            }
        }
    }
    return nep_group_saw_end(&comm->made->group, seat); /* where a recovery failed: no transports */
}

/*
 * Who comes because it knows of a loss, without having waited itself, says so to those that wait:
 * they may have no other way to learn of it before their deadline.
 */
static void tell_loss(struct nep_comm *comm, const uint8_t *is_lost)
{
    for (uint32_t m = 0; m < comm->topology.num_ranks; m++) {
        uint32_t seat = comm->members[m];
        if (m == comm->topology.rank ||
            !((is_lost != NULL && is_lost[seat] != 0) || is_gone(comm, seat))) {
            continue;
        }
        for (struct nep_ep *ep = comm->eps; ep != NULL; ep = ep->next) {
            if (ep->head != NULL) {
                nep_tell(ep, m);
            }
        }
        return;
    }
}

struct nep_ep *nep_comm_ep_of(const struct nep_comm *comm, uint32_t number)
{
    struct nep_ep *ep = comm->eps;
    while (ep != NULL && !(ep->has_number && ep->number == number)) {
        ep = ep->next;
    }
    return ep;
}

static enum nep_status agree(struct nep_comm *comm, const struct nep_recover_params *params,
                             struct nep_group_decision **decision_p)
{
    struct nep_group_vote vote = {.store = &comm->seats_bootstrap,
                                  .rank = comm->world.rank,
                                  .num_ranks = comm->world.num_ranks,
                                  .generation = comm->num_decided + 1,
                                  .was_live = comm->is_joining ? NULL : comm->is_live,
                                  .is_lost = params->is_lost,
                                  .node_of_rank = comm->world.node_of_rank,
                                  .suspect = UINT32_MAX,
                                  .num_new = params->num_joining,
                                  .preparer = &nep_grow_preparer,
                                  .is_gone = is_gone,
                                  .ctx = comm,
                                  .timeout_ns = params->timeout_ns};
    if (comm->fault.status != NEP_OK) {
        vote.suspect = comm->fault.rank;
    } else if (!comm->is_joining) {
        tell_loss(comm, params->is_lost);
    }
    for (uint32_t i = 0; i < NEP_GROUP_OPS; i++) {
        const struct nep_ep *ep = nep_comm_ep_of(comm, i);
        vote.ops.next[i] = ep != NULL ? ep->next_op : 0;
        vote.ops.completed[i] = !comm->has_worked ? UINT64_MAX : ep != NULL ? ep->completed_op : 0;
    }
    vote.prepared = comm->is_joining || params->is_lost != NULL ? 0 : nep_grow_offer(comm);
    if (vote.prepared != 0) {
        vote.preparation = nep_grow_decision(comm);
        nep_grow_set_ops(comm, &vote.ops);
    }
    return nep_group_agree(&vote, decision_p);
}

/* Ranks that are not in the decision are not waited for in what follows, dead or alive. */
static void abandon_lost(struct nep_comm *comm, const struct nep_group_decision *decision)
{
    struct nep_transport *transports[] = {comm->intra, comm->inter};
    for (uint32_t m = 0; m < comm->topology.num_ranks; m++) {
        for (int i = 0; i < 2 && !nep_group_lives(decision, comm->members[m]); i++) {
            if (transports[i] != NULL && (i == 0 || comm->inter != comm->intra)) {
                transports[i]->ops->abandon(transports[i], m);
            }
        }
    }
}

static void set_fault(struct nep_comm *comm, enum nep_status status)
{
    struct nep_fault fault = {.size = sizeof fault, .status = status, .rank = UINT32_MAX};
    fault.node = UINT32_MAX;
    if (status != NEP_OK) {
        snprintf(fault.phase, sizeof fault.phase, "recovery");
        snprintf(fault.message, sizeof fault.message, "the group could not be made again: %.400s",
                 nep_last_message());
    }
    pthread_mutex_lock(&comm->lock);
    comm->fault = fault;
    pthread_mutex_unlock(&comm->lock);
}

enum nep_status nep_comm_may_recover(const struct nep_comm *comm)
{
    if (comm == NULL) {
        return nep_fail(NEP_ERR_INVALID, "the communicator is NULL");
    }
    if (comm->pid != getpid()) {
        return nep_fail(NEP_ERR_BROKEN, "this communicator was made before fork(): the child has "
                                        "no seat in its group");
    }
    const struct nep_bootstrap *store = &comm->seats_bootstrap;
    if (store->put == NULL || store->get == NULL || store->cas == NULL) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "ranks can agree on who lives only through a store, and the bootstrap of "
                        "this communicator has no put, get or cas");
    }
    for (const struct nep_ep *ep = comm->eps; ep != NULL; ep = ep->next) {
        if (ep->device != NULL) {
            return nep_fail(
                NEP_ERR_UNSUPPORTED,
                "an ep has its tokens in GPU memory, where kernels and graphs hold what "
                "recovery would take away: destroy it first, and make it anew after");
        }
    }
    return NEP_OK;
}

/* Everything is made again, among those who live. */
static enum nep_status remake(struct nep_comm *comm, const struct nep_group_decision *decision,
                              uint64_t exchange_ns)
{
    uint64_t timeout_ns = comm->timeout_ns;
    /* All who go on have put their cards, so none of them is in a window any more. */
    abandon_lost(comm, decision);
    nep_generation_tear_down(comm);
    struct nep_generation *before = comm->made, *made = NULL;
    enum nep_status status = nep_generation_create(comm, decision, &made);
    if (status == NEP_OK) {
        comm->is_joining = false;
        nep_generation_take(comm, made);
        nep_generation_destroy(before);
        nep_comm_set_spin(comm);
        comm->timeout_ns = exchange_ns; /* of every exchange below */
        status = nep_generation_build(comm, decision, timeout_ns);
        comm->timeout_ns = timeout_ns;
    }
    if (status == NEP_OK) {
        nep_group_unwatch(&made->group);
    }
    return status;
}

/* All stays as it is. */
static enum nep_status keep(struct nep_comm *comm)
{
    for (struct nep_ep *ep = comm->eps; ep != NULL; ep = ep->next) {
        ep->first_op = ep->completed_op;
    }
    return NEP_OK;
}

/* What was decided is done. */
static enum nep_status change(struct nep_comm *comm, const struct nep_group_decision *decision,
                              uint64_t exchange_ns)
{
    uint64_t begin_ns = nep_now_ns();
    bool is_kept = decision->prepared == NEP_GROUP_KEPT;
    bool is_prepared = decision->prepared != 0 && !is_kept;
    enum nep_status status = NEP_OK;
    if (is_prepared) {
        status = nep_grow_take(comm, decision);
    } else {
        nep_grow_drop(comm);
        status = is_kept ? keep(comm) : remake(comm, decision, exchange_ns);
    }
    comm->num_decided = decision->generation;
    comm->num_prepared = 0;
    if (status != NEP_OK) {
        char saved[NEP_MESSAGE_BYTES];
        nep_message_save(saved);
        set_fault(comm, status);
        nep_generation_tear_down(comm);
        nep_message_restore(saved);
        return status;
    }
    set_fault(comm, NEP_OK);
    comm->has_worked = true;
    nep_info("rank %u: generation %llu has %u of %u ranks, %s in %.1f ms", comm->world.rank,
             (unsigned long long)comm->num_decided, decision->num_live, decision->num_ranks,
             is_prepared ? "taken"
             : is_kept   ? "kept"
                         : "made",
             (double)(nep_now_ns() - begin_ns) / 1e6);
    return NEP_OK;
}

enum nep_status nep_comm_recover(struct nep_comm *comm, const struct nep_recover_params *params,
                                 struct nep_recovery *recovery_p)
{
    struct nep_recover_params copy = {.size = sizeof copy};
    struct nep_group_decision *decision = NULL;
    enum nep_status status = nep_comm_may_recover(comm);
    if (status == NEP_OK && params != NULL) {
        status =
            nep_struct_copy(&copy, sizeof copy, params, sizeof copy.size, "nep_recover_params");
    }
    if (status == NEP_OK) {
        copy.timeout_ns = copy.timeout_ns != 0 ? copy.timeout_ns : comm->timeout_ns;
        status = agree(comm, &copy, &decision);
    }
    if (status == NEP_OK) {
        status = change(comm, decision, copy.timeout_ns);
    }
    if (status == NEP_OK && recovery_p != NULL) {
        *recovery_p = (struct nep_recovery){.size = sizeof *recovery_p,
                                            .generation = comm->num_decided,
                                            .num_live = decision->num_live,
                                            .was_prepared = decision->prepared != 0 &&
                                                            decision->prepared != NEP_GROUP_KEPT,
                                            .is_live = comm->is_live};
    }
    free(decision);
    return status;
}

enum nep_status nep_comm_newcomers(struct nep_comm *comm, uint32_t *num_p)
{
    enum nep_status status = nep_comm_may_recover(comm);
    if (status == NEP_OK && num_p == NULL) {
        status = nep_fail(NEP_ERR_INVALID, "nep_comm_newcomers: num_p is NULL");
    }
    return status == NEP_OK ? nep_group_newcomers(&comm->seats_bootstrap, comm->world.num_ranks,
                                                  comm->is_live, comm->num_decided + 1, num_p)
                            : status;
}

enum nep_status nep_ep_resume(const struct nep_ep *ep, uint64_t *first_op_p, uint64_t *next_op_p)
{
    if (ep == NULL || first_op_p == NULL || next_op_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_ep_resume: an argument is NULL");
    }
    *first_op_p = ep->first_op;
    *next_op_p = ep->next_op;
    return NEP_OK;
}

enum nep_status nep_ep_set_timeout(struct nep_ep *ep, uint64_t timeout_ns)
{
    if (ep == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_ep_set_timeout: the ep is NULL");
    }
    ep->timeout_ns = timeout_ns != 0 ? timeout_ns : ep->comm->timeout_ns;
    return NEP_OK;
}
