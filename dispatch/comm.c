/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Creating a communicator: configuration, bootstrap, agreement, topology, transports, in this
 * order, each step collective and bounded. A step that fails on one rank is made to fail on all
 * (nep_bootstrap_common), so that nobody waits for a rank that has already given up.
 */
#include "dispatch/device.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "dispatch/events.h"
#include "dispatch/grow.h"
#include "dispatch/host/workers.h"
#include "dispatch/protocol.h"
#include "transport/bootstrap.h"
#include "transport/topology.h"

enum { PUTS_PER_PEER = 256 };

/* Whether there is a fault, that of a kernel included; then it is in comm->fault. With the lock
 * held. */
static bool find_fault(struct nep_comm *comm)
{
    for (struct nep_ep *ep = comm->eps; ep != NULL && comm->fault.status == NEP_OK; ep = ep->next) {
        struct nep_fault fault;
        if (ep->device != NULL && nep_device_fault(ep, &fault)) {
            comm->fault = fault;
            nep_log(NEP_LOG_ERROR, "rank %u: %s", comm->world.rank, fault.message);
        }
    }
    return comm->fault.status != NEP_OK;
}

/* The fault that was kept last goes into the trace, and the trace where it is wanted. */
static void trace_fault(struct nep_comm *comm)
{
    nep_event_put(comm->events, NEP_EVENT_FAULT, 0, comm->fault.rank, comm->fault.op,
                  (uint32_t)comm->fault.status);
    nep_events_dump_configured(comm);
}

bool nep_comm_look(struct nep_comm *comm)
{
    pthread_mutex_lock(&comm->lock);
    bool was_harmed = comm->fault.status != NEP_OK;
    bool is_harmed = find_fault(comm);
    pthread_mutex_unlock(&comm->lock);
    if (is_harmed && !was_harmed) {
        trace_fault(comm);
    }
    return is_harmed;
}

enum nep_status nep_comm_check(struct nep_comm *comm)
{
    if (comm == NULL) {
        return nep_fail(NEP_ERR_INVALID, "the communicator is NULL");
    }
    if (comm->pid != getpid()) {
        return nep_fail(NEP_ERR_BROKEN,
                        "this communicator was made before fork(): only its destruction is "
                        "possible in the child; create a new one there");
    }
    pthread_mutex_lock(&comm->lock);
    bool is_harmed = find_fault(comm);
    enum nep_status status =
        is_harmed
            ? nep_fail(NEP_ERR_BROKEN, "this communicator broke earlier: %s", comm->fault.message)
            : NEP_OK;
    pthread_mutex_unlock(&comm->lock);
    return status;
}

enum nep_status nep_comm_fail(struct nep_comm *comm, const struct nep_fault *fault)
{
    struct nep_fault named = *fault;
    named.rank = nep_comm_name(comm, fault->rank);
    named.node = nep_comm_node_name(comm, fault->rank);
    pthread_mutex_lock(&comm->lock);
    bool is_first = comm->fault.status == NEP_OK;
    if (is_first) {
        comm->fault = named;
    }
    pthread_mutex_unlock(&comm->lock);
    nep_log(NEP_LOG_ERROR, "rank %u: %s", comm->world.rank, fault->message);
    if (is_first) {
        trace_fault(comm);
    }
    return nep_fail(fault->status, "%s", fault->message);
}

enum nep_status nep_comm_fault(const struct nep_comm *comm, struct nep_fault *fault_p)
{
    if (comm == NULL || fault_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_comm_fault: an argument is NULL");
    }
    struct nep_comm *open = (struct nep_comm *)comm;
    pthread_mutex_lock(&open->lock);
    (void)find_fault(open);
    *fault_p = open->fault;
    pthread_mutex_unlock(&open->lock);
    fault_p->size = sizeof *fault_p;
    return NEP_OK;
}

enum nep_status nep_comm_topology(const struct nep_comm *comm, struct nep_topology *topology_p)
{
    if (comm == NULL || topology_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_comm_topology: an argument is NULL");
    }
    *topology_p = comm->world;
    return NEP_OK;
}

enum nep_status nep_comm_claim_ep(struct nep_comm *comm, uint32_t *number_p)
{
    uint32_t num_ranks = comm->topology.num_ranks;
    uint64_t *used = calloc(num_ranks, sizeof *used);
    if (used == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "ep: no memory for %u ranks", num_ranks);
    }
    pthread_mutex_lock(&comm->lock);
    uint64_t mine = comm->eps_used;
    pthread_mutex_unlock(&comm->lock);
    enum nep_status status = NEP_OK;
    if (comm->is_joining) {
        used[0] = mine; /* compared when it is let in */
    } else {
        status = nep_bootstrap_allgather(&comm->bootstrap, &mine, used, sizeof mine,
                                         comm->timeout_ns, "free ep numbers");
    }
    uint64_t all = 0;
    for (uint32_t r = 0; r < num_ranks; r++) {
        all |= used[r];
    }
    free(used);
    if (status != NEP_OK) {
        return status;
    }
    if (all == UINT64_MAX) {
        return nep_fail(NEP_ERR_BUSY, "ep: all 64 ep objects of this communicator are in use");
    }
    *number_p = (uint32_t)__builtin_ctzll(~all);
    pthread_mutex_lock(&comm->lock);
    comm->eps_used |= 1ull << *number_p;
    pthread_mutex_unlock(&comm->lock);
    return NEP_OK;
}

void nep_comm_release_ep(struct nep_comm *comm, uint32_t number)
{
    pthread_mutex_lock(&comm->lock);
    comm->eps_used &= ~(1ull << number);
    pthread_mutex_unlock(&comm->lock);
}

/* ---- creation ------------------------------------------------------------------------------- */

/* What all ranks must have in common before anything else is exchanged. */
static enum nep_status agree(struct nep_comm *comm, const struct nep_comm_params *params)
{
    uint64_t sizes = 14695981039346656037ull;
    for (uint32_t n = 0; params->ranks_per_node != NULL && n < params->num_nodes; n++) {
        sizes = (sizes ^ params->ranks_per_node[n]) * 1099511628211ull;
    }
    const struct nep_agree_field fields[] = {
        {"number of ranks", comm->topology.num_ranks},
        {"number of emulated nodes", params->ranks_per_node != NULL ? params->num_nodes : 0},
        {"sizes of emulated nodes (hash)", sizes},
        {"timeout in ns", comm->timeout_ns},
    };
    enum nep_status status = nep_bootstrap_agree_config(&comm->bootstrap, comm->topology.num_ranks,
                                                        &comm->config, comm->timeout_ns);
    if (status != NEP_OK) {
        return status;
    }
    return nep_bootstrap_agree(&comm->bootstrap, comm->topology.num_ranks, "communicator", fields,
                               sizeof fields / sizeof fields[0], comm->timeout_ns);
}

/*
 * Whether on every node all ranks are threads of one process (*node_p), and whether all ranks are
 * (*all_p): the same answer on every rank.
 */
static enum nep_status find_processes(struct nep_comm *comm, bool *node_p, bool *all_p)
{
    static const char mark; /* its address differs between processes of different layout */
    uint32_t num_ranks = comm->topology.num_ranks;
    struct {
        uint64_t pid;
        uint64_t mark;
    } mine = {(uint64_t)getpid(), (uint64_t)(uintptr_t)&mark}, *cards;
    cards = calloc(num_ranks, sizeof *cards);
    if (cards == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for %u ranks", num_ranks);
    }
    enum nep_status status = nep_bootstrap_allgather(&comm->bootstrap, &mine, cards, sizeof mine,
                                                     comm->timeout_ns, "processes");
    *all_p = nep_topology_is_one_machine(comm->store);
    *node_p = true;
    for (uint32_t r = 0; r < num_ranks; r++) {
        uint32_t first = nep_topology_rank_at(&comm->topology, comm->topology.node_of_rank[r], 0);
        *all_p &= memcmp(&cards[r], &cards[0], sizeof cards[r]) == 0;
        *node_p &= memcmp(&cards[r], &cards[first], sizeof cards[r]) == 0;
    }
    free(cards);
    return status;
}

static enum nep_status open_transport(struct nep_comm *comm, const char *name, bool node_only,
                                      struct nep_transport **transport_p)
{
    const struct nep_transport_ops *ops;
    struct nep_transport_params params = {
        .topology = &comm->made->topology,
        .bootstrap = &comm->made->bootstrap,
        .config = comm->shown_config,
        .timeout_ns = comm->timeout_ns,
        .sink = nep_arrive,
        .node_only = node_only,
        .max_puts = PUTS_PER_PEER * comm->topology.num_ranks,
        .names = comm->members,
    };
    enum nep_status status = nep_transport_find(name, &ops, &params.args);
    if (status == NEP_OK) {
        status = ops->probe(&comm->config);
    }
    if (status == NEP_OK && node_only && (nep_transport_caps(name) & NEP_CAP_MAPPED) == 0) {
        status =
            nep_fail(NEP_ERR_UNSUPPORTED, "transport %s cannot map memory inside a node", name);
    }
    if (status == NEP_OK && !node_only && (ops->caps & NEP_CAP_FABRIC) == 0) {
        status = nep_fail(NEP_ERR_UNSUPPORTED, "transport %s cannot serve between nodes", name);
    }
    status = nep_bootstrap_common(&comm->bootstrap, comm->topology.rank, comm->topology.num_ranks,
                                  status, comm->timeout_ns);
    if (status != NEP_OK) {
        return status;
    }
    struct nep_transport *transport = NULL;
    status = ops->create(&params, &transport);
    status = nep_bootstrap_common(&comm->bootstrap, comm->topology.rank, comm->topology.num_ranks,
                                  status, comm->timeout_ns);
    if (status != NEP_OK) {
        if (transport != NULL) {
            ops->close(transport);
        }
        return status;
    }
    *transport_p = transport;
    return NEP_OK;
}

/* The best fabric that this machine has. */
static const char *auto_fabric(const struct nep_config *config)
{
    static const char *const names[] = {"verbs", "ucx"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const struct nep_transport_ops *ops;
        const char *args;
        if (nep_transport_find(names[i], &ops, &args) == NEP_OK && ops->probe(config) == NEP_OK) {
            return names[i];
        }
    }
    return "ucx"; /* its refusal is the sentence to show */
}

static bool is_auto(const char *name)
{
    return name[0] == '\0' || strcmp(name, "auto") == 0;
}

enum nep_status nep_comm_open_transports(struct nep_comm *comm)
{
    bool is_node_one = false, is_all_one = false;
    enum nep_status status = find_processes(comm, &is_node_one, &is_all_one);
    if (status != NEP_OK) {
        return status;
    }
    /* One rank's choice counts for all: rank 0's devices must not differ from the others' unseen.
     */
    const char *intra = comm->config.intra;
    const char *inter = comm->config.inter;
    if (is_auto(intra)) {
        intra = is_node_one ? "loop" : "shm";
    }
    if (comm->topology.num_nodes == 1) {
        return open_transport(comm, intra, true, &comm->intra);
    }
    if (is_auto(inter)) {
        inter = is_all_one                                 ? "loop"
                : nep_topology_is_one_machine(comm->store) ? "shm"
                                                           : auto_fabric(&comm->config);
    }
    status = nep_bootstrap_agree_text(&comm->bootstrap, comm->topology.num_ranks, "communicator",
                                      "fabric", inter, comm->timeout_ns);
    if (status != NEP_OK) {
        return status;
    }
    nep_info("rank %u: %s inside the node, %s between nodes", comm->topology.rank, intra, inter);
    /* A fabric that maps windows allocates them, so it serves both seats. */
    if ((nep_transport_caps(inter) & NEP_CAP_MAPPED) != 0) {
        const char *inner = strchr(inter, ':'); /* what a wrapper stands around */
        inner = inner != NULL ? inner + 1 : inter;
        if (!is_auto(comm->config.intra) && strcmp(intra, inner) != 0) {
            return nep_fail(NEP_ERR_INVALID,
                            "%s between nodes maps memory and so serves inside nodes too: leave "
                            "intra at auto instead of %s",
                            inter, intra);
        }
        status = open_transport(comm, inter, false, &comm->intra);
        comm->inter = comm->intra;
        return status;
    }
    status = open_transport(comm, intra, true, &comm->intra);
    return status == NEP_OK ? open_transport(comm, inter, false, &comm->inter) : status;
}

void nep_comm_close_transports(struct nep_comm *comm)
{
    if (comm->inter != NULL && comm->inter != comm->intra) {
        comm->inter->ops->close(comm->inter);
    }
    if (comm->intra != NULL) {
        comm->intra->ops->close(comm->intra);
    }
    comm->inter = NULL;
    comm->intra = NULL;
}

static void copy_name(char *to, size_t cap, const char *from)
{
    if (from != NULL && from[0] != '\0') {
        strncpy(to, from, cap - 1);
        to[cap - 1] = '\0';
    }
}

void nep_comm_set_spin(struct nep_comm *comm)
{
    /* Spinning while another rank wants the core costs that rank a time slice. */
    uint32_t ranks_here = nep_topology_is_one_machine(comm->store)
                              ? comm->topology.num_ranks
                              : comm->topology.node_ranks[comm->topology.node];
    bool is_crowded = ranks_here > nep_topology_num_cores();
    comm->spin_limit = comm->config.spin != UINT32_MAX ? comm->config.spin : is_crowded ? 0 : 2000;
}

/* A newcomer knows its seat and nothing else: it counts as alone on its node until it is let in. */
static enum nep_status fill_newcomer(struct nep_comm *comm)
{
    uint32_t rank = comm->topology.rank, num_ranks = comm->topology.num_ranks;
    if (comm->bootstrap.put == NULL || comm->bootstrap.get == NULL || comm->bootstrap.cas == NULL) {
        return nep_fail(NEP_ERR_UNSUPPORTED, "a rank can only join through a store: the bootstrap "
                                             "has no put, get or cas");
    }
    uint32_t *ones = calloc(num_ranks, sizeof *ones);
    for (uint32_t n = 0; ones != NULL && n < num_ranks; n++) {
        ones[n] = 1;
    }
    enum nep_status status =
        ones == NULL
            ? nep_fail(NEP_ERR_NO_MEMORY, "no memory for %u ranks", num_ranks)
            : nep_topology_from_sizes(ones, num_ranks, rank, &comm->store, &comm->topology);
    free(ones);
    comm->world_store = comm->store;
    comm->is_joining = true;
    if (status == NEP_OK) {
        status = nep_generation_first(comm);
    }
    return status == NEP_OK ? nep_workers_create(comm->config.threads, 0, &comm->workers) : status;
}

static enum nep_status start_events(struct nep_comm *comm)
{
    uint32_t num = comm->config.trace_events;
    comm->started = nep_tick_pair_now();
    comm->clock.measured_ns = comm->started.ns;
    comm->events = nep_events_create(num == UINT32_MAX ? NEP_EVENTS_DEFAULT : num);
    if (comm->events == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for %u events (NEP_TRACE_EVENTS)", num);
    }
    return NEP_OK;
}

static enum nep_status fill(struct nep_comm *comm, const struct nep_comm_params *params)
{
    enum nep_status status = nep_config_load(&comm->config);
    comm->shown_config = &comm->config;
    if (status == NEP_OK) {
        status = start_events(comm);
    }
    if (status != NEP_OK) {
        return status;
    }
    copy_name(comm->config.intra, sizeof comm->config.intra, params->intra);
    copy_name(comm->config.inter, sizeof comm->config.inter, params->inter);
    copy_name(comm->config.rendezvous, sizeof comm->config.rendezvous, params->rendezvous);
    comm->timeout_ns = params->timeout_ns != 0 ? params->timeout_ns : comm->config.timeout_ns;
    uint32_t rank = 0, num_ranks = 0;
    status = nep_bootstrap_open(params, &comm->config, comm->timeout_ns, &comm->bootstrap, &rank,
                                &num_ranks, &comm->client);
    if (status != NEP_OK) {
        return status;
    }
    comm->topology.rank = rank;
    comm->topology.num_ranks = num_ranks;
    comm->seats_bootstrap = comm->bootstrap;
    if (params->joins != 0) {
        return fill_newcomer(comm);
    }
    comm->has_worked = true;
    status = agree(comm, params);
    if (status == NEP_OK) {
        status = nep_topology_create(params, &comm->config, &comm->bootstrap, rank, num_ranks,
                                     comm->timeout_ns, &comm->store, &comm->topology);
        comm->world_store = comm->store;
        if (status == NEP_OK) {
            status = nep_generation_first(comm);
        }
        status = nep_bootstrap_common(&comm->bootstrap, rank, num_ranks, status, comm->timeout_ns);
    }
    if (status == NEP_OK) {
        status =
            nep_clocks_align(&comm->bootstrap, rank, num_ranks, comm->timeout_ns, &comm->clock);
    }
    if (status != NEP_OK) {
        return status;
    }
    nep_comm_set_spin(comm);
    status = nep_workers_create(comm->config.threads, comm->spin_limit, &comm->workers);
    status = nep_bootstrap_common(&comm->bootstrap, rank, num_ranks, status, comm->timeout_ns);
    return status == NEP_OK ? nep_comm_open_transports(comm) : status;
}

enum nep_status nep_comm_create(const struct nep_comm_params *params, struct nep_comm **comm_p)
{
    struct nep_comm_params copy;
    enum nep_status status =
        nep_struct_copy(&copy, sizeof copy, params, sizeof copy.size, "nep_comm_params");
    if (status != NEP_OK) {
        return status;
    }
    if (comm_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_comm_create: comm_p is NULL");
    }
    struct nep_comm *comm = calloc(1, sizeof *comm);
    if (comm == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for a communicator");
    }
    pthread_mutex_init(&comm->lock, NULL);
    comm->pid = getpid();
    status = fill(comm, &copy);
    if (status != NEP_OK) {
        nep_comm_destroy(comm);
        return status;
    }
    *comm_p = comm;
    return NEP_OK;
}

void nep_comm_destroy(struct nep_comm *comm)
{
    if (comm == NULL) {
        return;
    }
    bool is_child = comm->pid != getpid();
    if (comm->eps_used != 0 && !is_child) {
        nep_warn(
            "a communicator is destroyed before its ep objects: they must not be used any more");
    }
    if (!is_child && comm->fault.status == NEP_OK && comm->intra != NULL) {
        nep_events_dump_configured(comm);
    }
    nep_grow_end(comm);
    /* In a forked child threads and connections belong to the parent: memory alone is freed. */
    if (!is_child) {
        nep_comm_close_transports(comm);
        if (comm->client != NULL) {
            nep_bootstrap_close(comm->client);
        }
    }
    nep_workers_destroy(comm->workers);
    nep_generation_destroy(comm->made);
    nep_topology_destroy(comm->world_store);
    free(comm->events);
    free(comm->is_live);
    pthread_mutex_destroy(&comm->lock);
    free(comm);
}
