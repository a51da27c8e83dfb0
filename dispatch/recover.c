/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The group changes: ranks were lost, or newcomers wait. Who lives is agreed on
 * (transport/group.h); then everything that follows from who the members are is made again by the
 * same code that made it first, among them alone: numbers without gaps, transports, windows, plans.
 * Landing lanes move on and lost experts drop out because the plan is a function of the members.
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
#include "dispatch/wait.h"
#include "transport/bootstrap.h"
#include "transport/topology.h"

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
    return nep_group_saw_end(&comm->group, seat); /* where a recovery failed: no transports */
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

static struct nep_ep *ep_of(const struct nep_comm *comm, uint32_t number)
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
                                  .generation = comm->generation + 1,
                                  .was_live = comm->is_joining ? NULL : comm->is_live,
                                  .is_lost = params->is_lost,
                                  .node_of_rank = comm->world.node_of_rank,
                                  .suspect = UINT32_MAX,
                                  .num_new = params->num_joining,
                                  .is_gone = is_gone,
                                  .ctx = comm,
                                  .timeout_ns = params->timeout_ns};
    if (comm->fault.status != NEP_OK) {
        vote.suspect = comm->fault.rank;
    } else if (!comm->is_joining) {
        tell_loss(comm, params->is_lost);
    }
    for (uint32_t i = 0; i < NEP_GROUP_OPS; i++) {
        const struct nep_ep *ep = ep_of(comm, i);
        vote.ops.next[i] = ep != NULL ? ep->next_op : 0;
        vote.ops.completed[i] = ep != NULL ? ep->completed_op : 0;
    }
    return nep_group_agree(&vote, decision_p);
}

/* ---- the new members ------------------------------------------------------------------------ */

/* A newcomer learns where the seats are. */
static enum nep_status learn_world(struct nep_comm *comm, const struct nep_group_decision *decision)
{
    uint32_t *nodes = calloc(decision->num_ranks, sizeof *nodes);
    if (nodes == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for %u ranks", decision->num_ranks);
    }
    for (uint32_t r = 0; r < decision->num_ranks; r++) {
        nodes[r] = decision->seats[r].node;
    }
    struct nep_topology_store *store;
    struct nep_topology world;
    enum nep_status status =
        nep_topology_subset(nodes, decision->num_ranks, comm->world.rank, false, &store, &world);
    free(nodes);
    if (status == NEP_OK) {
        nep_topology_destroy(comm->world_store);
        comm->world_store = comm->store = store;
        comm->world = comm->topology = world;
    }
    return status;
}

static enum nep_status set_members(struct nep_comm *comm, const struct nep_group_decision *decision)
{
    enum nep_status status = comm->is_joining ? learn_world(comm, decision) : NEP_OK;
    struct nep_group group;
    uint32_t *nodes = calloc(decision->num_live + 1, sizeof *nodes);
    if (status == NEP_OK && nodes == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "no memory for members");
    }
    if (status == NEP_OK) {
        status = nep_group_init(&group, &comm->seats_bootstrap, decision, comm->world.rank);
    }
    if (status != NEP_OK) {
        free(nodes);
        return status;
    }
    for (uint32_t m = 0; m < group.num; m++) {
        comm->members[m] = group.members[m];
        nodes[m] = comm->world.node_of_rank[group.members[m]];
    }
    for (uint32_t r = 0; r < decision->num_ranks; r++) {
        comm->is_live[r] = nep_group_lives(decision, r);
    }
    bool is_one_machine = nep_topology_is_one_machine(comm->store);
    struct nep_topology_store *store;
    status =
        nep_topology_subset(nodes, group.num, group.idx, is_one_machine, &store, &comm->topology);
    free(nodes);
    nep_group_fini(&comm->group);
    comm->group = group;
    nep_group_bootstrap(&comm->group, &comm->bootstrap);
    comm->generation = decision->generation;
    comm->is_joining = false;
    if (status == NEP_OK) {
        if (comm->store != comm->world_store) {
            nep_topology_destroy(comm->store);
        }
        comm->store = store;
        nep_comm_set_spin(comm);
    }
    return status;
}

/* ---- everything again ----------------------------------------------------------------------- */

static enum nep_status build_ep(struct nep_ep *ep, const struct nep_group_decision *decision)
{
    ep->next_op = ep->completed_op = decision->ops.next[ep->number];
    ep->first_op = decision->ops.completed[ep->number];
    enum nep_status status = nep_ep_build(ep);
    if (status == NEP_OK) {
        status = nep_ep_renew_handles(ep);
    }
    return nep_bootstrap_common(&ep->comm->bootstrap, ep->comm->topology.rank,
                                ep->comm->topology.num_ranks, status, ep->comm->timeout_ns);
}

static enum nep_status build(struct nep_comm *comm, const struct nep_group_decision *decision,
                             uint64_t timeout_ns)
{
    uint32_t num_ranks = comm->topology.num_ranks;
    const struct nep_agree_field fields[] = {{"ep objects (bit i: number i)", comm->eps_used},
                                             {"timeout in ns", timeout_ns},
                                             {"number of seats", comm->world.num_ranks}};
    enum nep_status status =
        nep_bootstrap_agree_config(&comm->bootstrap, num_ranks, &comm->config, comm->timeout_ns);
    if (status == NEP_OK) {
        status = nep_bootstrap_agree(&comm->bootstrap, num_ranks, "recovery", fields,
                                     sizeof fields / sizeof fields[0], comm->timeout_ns);
    }
    if (status == NEP_OK) {
        status = nep_comm_open_transports(comm);
    }
    if (status == NEP_OK) {
        status = nep_clocks_align(&comm->bootstrap, comm->topology.rank, num_ranks,
                                  comm->timeout_ns, &comm->clock);
    }
    for (uint32_t i = 0; status == NEP_OK && i < NEP_GROUP_OPS; i++) {
        struct nep_ep *ep = ep_of(comm, i);
        status = ep != NULL ? build_ep(ep, decision) : NEP_OK;
    }
    return status;
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

static void tear_down(struct nep_comm *comm)
{
    for (struct nep_ep *ep = comm->eps; ep != NULL; ep = ep->next) {
        nep_ep_unbuild(ep);
    }
    nep_comm_close_transports(comm);
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

static enum nep_status check(const struct nep_comm *comm)
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

enum nep_status nep_comm_recover(struct nep_comm *comm, const struct nep_recover_params *params,
                                 struct nep_recovery *recovery_p)
{
    struct nep_recover_params copy = {.size = sizeof copy};
    struct nep_group_decision *decision = NULL;
    enum nep_status status = check(comm);
    if (status == NEP_OK && params != NULL) {
        status =
            nep_struct_copy(&copy, sizeof copy, params, sizeof copy.size, "nep_recover_params");
    }
    if (status == NEP_OK) {
        copy.timeout_ns = copy.timeout_ns != 0 ? copy.timeout_ns : comm->timeout_ns;
        status = agree(comm, &copy, &decision);
    }
    if (status != NEP_OK) {
        return status;
    }
    uint64_t begin_ns = nep_now_ns(), timeout_ns = comm->timeout_ns;
    /* All who go on have put their cards, so none of them is in a window any more. */
    abandon_lost(comm, decision);
    tear_down(comm);
    status = set_members(comm, decision);
    comm->timeout_ns = copy.timeout_ns; /* of every exchange below */
    if (status == NEP_OK) {
        status = build(comm, decision, timeout_ns);
    }
    comm->timeout_ns = timeout_ns;
    if (status == NEP_OK) {
        nep_group_unwatch(&comm->group);
    }
    if (status != NEP_OK) {
        char saved[NEP_MESSAGE_BYTES];
        nep_message_save(saved);
        set_fault(comm, status);
        tear_down(comm);
        nep_message_restore(saved);
    } else {
        set_fault(comm, NEP_OK);
        nep_info("rank %u: generation %llu has %u of %u ranks, made in %.1f ms", comm->world.rank,
                 (unsigned long long)comm->generation, decision->num_live, decision->num_ranks,
                 (double)(nep_now_ns() - begin_ns) / 1e6);
    }
    if (status == NEP_OK && recovery_p != NULL) {
        *recovery_p = (struct nep_recovery){.size = sizeof *recovery_p,
                                            .generation = comm->generation,
                                            .num_live = decision->num_live,
                                            .is_live = comm->is_live};
    }
    free(decision);
    return status;
}

enum nep_status nep_comm_newcomers(struct nep_comm *comm, uint32_t *num_p)
{
    enum nep_status status = check(comm);
    if (status == NEP_OK && num_p == NULL) {
        status = nep_fail(NEP_ERR_INVALID, "nep_comm_newcomers: num_p is NULL");
    }
    return status == NEP_OK ? nep_group_newcomers(&comm->seats_bootstrap, comm->world.num_ranks,
                                                  comm->is_live, comm->generation + 1, num_p)
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
