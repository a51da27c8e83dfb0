/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Everything that follows from who the members are is made by the same code that made it first,
 * among them alone: numbers without gaps, transports, windows, plans. Landing lanes move on and
 * lost experts drop out because the plan is a function of the members.
 */
#include "dispatch/generation.h"

#include <stdlib.h>
#include <string.h>

#include "dispatch/ep.h"
#include "transport/bootstrap.h"

static struct nep_generation *allocate(uint32_t num_seats)
{
    struct nep_generation *made = calloc(1, sizeof *made);
    if (made == NULL) {
        return NULL;
    }
    made->members = calloc(num_seats, sizeof *made->members);
    if (made->members == NULL) {
        free(made);
        return NULL;
    }
    return made;
}

void nep_generation_destroy(struct nep_generation *made)
{
    if (made == NULL) {
        return;
    }
    if (made->has_store) {
        nep_topology_destroy(made->store);
    }
    nep_group_fini(&made->group);
    free(made->members);
    free(made);
}

void nep_generation_take(struct nep_comm *comm, struct nep_generation *made)
{
    comm->made = made;
    comm->generation = made->number;
    comm->topology = made->topology;
    comm->store = made->store;
    comm->members = made->members;
    comm->bootstrap = made->bootstrap;
    memset(comm->is_live, 0, comm->world.num_ranks);
    for (uint32_t m = 0; m < made->topology.num_ranks && !comm->is_joining; m++) {
        comm->is_live[made->members[m]] = 1;
    }
}

enum nep_status nep_generation_first(struct nep_comm *comm)
{
    uint32_t num_ranks = comm->topology.num_ranks;
    struct nep_generation *made = allocate(num_ranks);
    comm->is_live = calloc(num_ranks, sizeof *comm->is_live);
    if (made == NULL || comm->is_live == NULL) {
        nep_generation_destroy(made);
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for %u ranks", num_ranks);
    }
    for (uint32_t r = 0; r < num_ranks; r++) {
        made->members[r] = r;
    }
    made->topology = comm->world = comm->topology;
    made->store = comm->world_store = comm->store;
    made->bootstrap = comm->bootstrap;
    nep_generation_take(comm, made);
    return NEP_OK;
}

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
        comm->world_store = store;
        comm->world = world;
    }
    return status;
}

static enum nep_status fill(struct nep_comm *comm, const struct nep_group_decision *decision,
                            struct nep_generation *made)
{
    uint32_t rank = comm->world.rank;
    bool is_one_machine = !comm->is_joining && nep_topology_is_one_machine(comm->store);
    enum nep_status status = comm->is_joining ? learn_world(comm, decision) : NEP_OK;
    if (status == NEP_OK) {
        status = nep_group_init(&made->group, &comm->seats_bootstrap, decision, rank);
    }
    uint32_t *nodes = calloc(decision->num_live + 1, sizeof *nodes);
    if (status == NEP_OK && nodes == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "no memory for members");
    }
    for (uint32_t m = 0; status == NEP_OK && m < made->group.num; m++) {
        made->members[m] = made->group.members[m];
        nodes[m] = comm->world.node_of_rank[made->members[m]];
    }
    if (status == NEP_OK) {
        status = nep_topology_subset(nodes, made->group.num, made->group.idx, is_one_machine,
                                     &made->store, &made->topology);
        made->has_store = status == NEP_OK;
    }
    free(nodes);
    made->number = decision->generation;
    nep_group_bootstrap(&made->group, &made->bootstrap);
    return status;
}

enum nep_status nep_generation_create(struct nep_comm *comm,
                                      const struct nep_group_decision *decision,
                                      struct nep_generation **made_p)
{
    struct nep_generation *made = allocate(decision->num_ranks);
    if (made == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for %u ranks", decision->num_ranks);
    }
    enum nep_status status = fill(comm, decision, made);
    if (status != NEP_OK) {
        nep_generation_destroy(made);
        return status;
    }
    *made_p = made;
    return NEP_OK;
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

enum nep_status nep_generation_build(struct nep_comm *comm,
                                     const struct nep_group_decision *decision, uint64_t timeout_ns)
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
        struct nep_ep *ep = nep_comm_ep_of(comm, i);
        status = ep != NULL ? build_ep(ep, decision) : NEP_OK;
    }
    return status;
}

void nep_generation_tear_down(struct nep_comm *comm)
{
    for (struct nep_ep *ep = comm->eps; ep != NULL; ep = ep->next) {
        nep_ep_unbuild(ep);
    }
    nep_comm_close_transports(comm);
}
