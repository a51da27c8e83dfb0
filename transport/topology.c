/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which ranks share a node. Each rank tells all others four numbers about where it runs and the
 * name in NEP_NODE; every rank then computes the same tables by itself, so that nothing can differ.
 *
 * Host names are not asked: containers of one machine have different ones, and two machines may
 * have the same. Network namespaces neither: processes in different ones still share memory. What
 * decides is what makes shared memory work: the same kernel (boot id), the same IPC namespace and
 * the same /dev/shm.
 *
 * Emulated nodes may split a machine, never join two: ranks that are told to share a node and do
 * not share memory are found here, where the sentence can name both, and not later as a failed
 * mapping.
 */
#include "transport/topology.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/log.h"
#include "transport/bootstrap.h"

struct nep_topology_store {
    uint32_t *node_of_rank; /* one allocation for the three arrays */
    bool is_one_machine;    /* all ranks share memory, whatever nodes they are told to be on */
};

/* What a rank tells of itself. */
struct place {
    char boot_id[40];
    uint64_t ipc_namespace;
    uint64_t shm_device;
    char node[64]; /* NEP_NODE */
};

void nep_topology_boot_id(char *text, size_t cap)
{
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (file == NULL || fgets(text, (int)cap, file) == NULL) {
        text[0] = '\0';
    }
    if (file != NULL) {
        fclose(file);
    }
}

static void read_place(const struct nep_config *config, struct place *place)
{
    memset(place, 0, sizeof *place);
    nep_topology_boot_id(place->boot_id, sizeof place->boot_id);
    struct stat info;
    if (stat("/proc/self/ns/ipc", &info) == 0) {
        place->ipc_namespace = info.st_ino;
    }
    if (stat("/dev/shm", &info) == 0) {
        place->shm_device = info.st_dev;
    }
    memcpy(place->node, config->node, sizeof place->node);
}

static bool is_memory_shared(const struct place *a, const struct place *b)
{
    return strncmp(a->boot_id, b->boot_id, sizeof a->boot_id) == 0 &&
           a->ipc_namespace == b->ipc_namespace && a->shm_device == b->shm_device;
}

/* ---- tables --------------------------------------------------------------------------------- */

static enum nep_status store_create(uint32_t num_ranks, uint32_t num_nodes, uint32_t rank,
                                    struct nep_topology_store **store_p,
                                    struct nep_topology *topology_p)
{
    struct nep_topology_store *store = calloc(1, sizeof *store);
    uint32_t *arrays = calloc(2 * (size_t)num_ranks + num_nodes, sizeof *arrays);
    if (store == NULL || arrays == NULL) {
        free(store);
        free(arrays);
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for the table of %u ranks", num_ranks);
    }
    store->node_of_rank = arrays;
    *store_p = store;
    *topology_p = (struct nep_topology){
        .size = sizeof *topology_p,
        .num_ranks = num_ranks,
        .num_nodes = num_nodes,
        .rank = rank,
        .node_of_rank = arrays,
        .local_of_rank = arrays + num_ranks,
        .node_ranks = arrays + 2 * (size_t)num_ranks,
    };
    return NEP_OK;
}

/* node_of_rank is filled; counts the rest. */
static void fill_tables(struct nep_topology_store *store, struct nep_topology *topology)
{
    uint32_t *local_of_rank = store->node_of_rank + topology->num_ranks;
    uint32_t *node_ranks = store->node_of_rank + 2 * (size_t)topology->num_ranks;
    for (uint32_t r = 0; r < topology->num_ranks; r++) {
        local_of_rank[r] = node_ranks[store->node_of_rank[r]]++;
    }
    topology->node = store->node_of_rank[topology->rank];
    topology->local = local_of_rank[topology->rank];
}

bool nep_topology_is_one_machine(const struct nep_topology_store *store)
{
    return store->is_one_machine;
}

void nep_topology_destroy(struct nep_topology_store *store)
{
    if (store != NULL) {
        free(store->node_of_rank);
        free(store);
    }
}

enum nep_status nep_topology_from_sizes(const uint32_t *ranks_per_node, uint32_t num_nodes,
                                        uint32_t rank, struct nep_topology_store **store_p,
                                        struct nep_topology *topology_p)
{
    uint64_t num_ranks = 0;
    for (uint32_t n = 0; n < num_nodes; n++) {
        if (ranks_per_node[n] == 0) {
            return nep_fail(NEP_ERR_INVALID, "node %u of %u has no ranks: each needs at least one",
                            n, num_nodes);
        }
        num_ranks += ranks_per_node[n];
    }
    if (num_ranks > UINT32_MAX / 4 || rank >= num_ranks) {
        return nep_fail(NEP_ERR_INVALID, "rank %u is impossible with %u nodes of %llu ranks in all",
                        rank, num_nodes, (unsigned long long)num_ranks);
    }
    struct nep_topology_store *store;
    struct nep_topology topology;
    enum nep_status status = store_create((uint32_t)num_ranks, num_nodes, rank, &store, &topology);
    if (status != NEP_OK) {
        return status;
    }
    uint32_t next = 0;
    for (uint32_t n = 0; n < num_nodes; n++) {
        for (uint32_t i = 0; i < ranks_per_node[n]; i++) {
            store->node_of_rank[next++] = n;
        }
    }
    fill_tables(store, &topology);
    *store_p = store;
    *topology_p = topology;
    return NEP_OK;
}

enum nep_status nep_topology_subset(const uint32_t *nodes, uint32_t num, uint32_t idx,
                                    bool is_one_machine, struct nep_topology_store **store_p,
                                    struct nep_topology *topology_p)
{
    uint32_t *node_of_rank = calloc(num + 1, sizeof *node_of_rank);
    if (node_of_rank == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for the table of %u ranks", num);
    }
    uint32_t num_nodes = 0;
    for (uint32_t r = 0; r < num; r++) {
        uint32_t same = 0;
        while (nodes[same] != nodes[r]) {
            same++;
        }
        node_of_rank[r] = same < r ? node_of_rank[same] : num_nodes++;
    }
    enum nep_status status = store_create(num, num_nodes, idx, store_p, topology_p);
    if (status == NEP_OK) {
        memcpy((*store_p)->node_of_rank, node_of_rank, num * sizeof *node_of_rank);
        (*store_p)->is_one_machine = is_one_machine;
        fill_tables(*store_p, topology_p);
    }
    free(node_of_rank);
    return status;
}

/* ---- from places ---------------------------------------------------------------------------- */

static bool is_same_node(const struct place *a, const struct place *b)
{
    if (a->node[0] != '\0' || b->node[0] != '\0') {
        return strncmp(a->node, b->node, sizeof a->node) == 0;
    }
    return is_memory_shared(a, b);
}

/* Numbers nodes by their lowest rank. O(ranks * nodes), once. */
static enum nep_status from_places(const struct place *places, uint32_t num_ranks, uint32_t rank,
                                   struct nep_topology_store **store_p,
                                   struct nep_topology *topology_p)
{
    uint32_t *first = calloc(2 * (size_t)num_ranks, sizeof *first);
    if (first == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for the table of %u ranks", num_ranks);
    }
    uint32_t *node_of_rank = first + num_ranks;
    uint32_t num_nodes = 0;
    for (uint32_t r = 0; r < num_ranks; r++) {
        uint32_t n = 0;
        while (n < num_nodes && !is_same_node(&places[r], &places[first[n]])) {
            n++;
        }
        if (n == num_nodes) {
            first[num_nodes++] = r;
        }
        node_of_rank[r] = n;
    }
    struct nep_topology_store *store;
    enum nep_status status = store_create(num_ranks, num_nodes, rank, &store, topology_p);
    if (status == NEP_OK) {
        memcpy(store->node_of_rank, node_of_rank, num_ranks * sizeof *node_of_rank);
        fill_tables(store, topology_p);
        *store_p = store;
    }
    free(first);
    return status;
}

static enum nep_status check_shared_memory(const struct place *places,
                                           const struct nep_topology *topology, const char *who)
{
    for (uint32_t r = 0; r < topology->num_ranks; r++) {
        uint32_t first = nep_topology_rank_at(topology, topology->node_of_rank[r], 0);
        const struct place *a = &places[first], *b = &places[r];
        if (!is_memory_shared(a, b)) {
            const char *what = strncmp(a->boot_id, b->boot_id, sizeof a->boot_id) != 0
                                   ? "run on different machines"
                               : a->ipc_namespace != b->ipc_namespace
                                   ? "have different IPC namespaces"
                                   : "have different /dev/shm";
            return nep_fail(NEP_ERR_INVALID,
                            "%s puts ranks %u and %u on node %u, but they %s and cannot share "
                            "memory: give them different nodes",
                            who, first, r, topology->node_of_rank[r], what);
        }
    }
    return NEP_OK;
}

static enum nep_status check_sizes(const struct nep_comm_params *params, uint32_t num_ranks)
{
    uint64_t sum = 0;
    for (uint32_t n = 0; n < params->num_nodes; n++) {
        sum += params->ranks_per_node[n];
    }
    if (sum != num_ranks) {
        return nep_fail(NEP_ERR_INVALID,
                        "ranks_per_node has %u nodes of %llu ranks in all, but the group has %u",
                        params->num_nodes, (unsigned long long)sum, num_ranks);
    }
    return NEP_OK;
}

static enum nep_status create_from(const struct nep_comm_params *params,
                                   const struct nep_config *config, const struct place *places,
                                   uint32_t rank, uint32_t num_ranks,
                                   struct nep_topology_store **store_p,
                                   struct nep_topology *topology_p)
{
    bool is_emulated = params->ranks_per_node != NULL && params->num_nodes != 0;
    struct nep_topology_store *store = NULL;
    struct nep_topology topology;
    enum nep_status status;
    if (is_emulated) {
        status = check_sizes(params, num_ranks);
        if (status == NEP_OK) {
            status = nep_topology_from_sizes(params->ranks_per_node, params->num_nodes, rank,
                                             &store, &topology);
        }
    } else {
        status = from_places(places, num_ranks, rank, &store, &topology);
    }
    if (status != NEP_OK) {
        return status;
    }
    status = check_shared_memory(places, &topology, is_emulated ? "ranks_per_node" : "NEP_NODE");
    if (status != NEP_OK) {
        nep_topology_destroy(store);
        return status;
    }
    nep_info("rank %u of %u is lane %u of node %u of %u, %u ranks there%s", rank, num_ranks,
             topology.local, topology.node, topology.num_nodes, topology.node_ranks[topology.node],
             is_emulated            ? " (emulated)"
             : config->node[0] != 0 ? " (NEP_NODE)"
                                    : "");
    *store_p = store;
    *topology_p = topology;
    return NEP_OK;
}

enum nep_status nep_topology_create(const struct nep_comm_params *params,
                                    const struct nep_config *config,
                                    const struct nep_bootstrap *bootstrap, uint32_t rank,
                                    uint32_t num_ranks, uint64_t timeout_ns,
                                    struct nep_topology_store **store_p,
                                    struct nep_topology *topology_p)
{
    struct place mine;
    struct place *places = calloc(num_ranks, sizeof *places);
    if (places == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for the places of %u ranks", num_ranks);
    }
    read_place(config, &mine);
    enum nep_status status = nep_bootstrap_allgather(bootstrap, &mine, places, sizeof mine,
                                                     timeout_ns, "where each rank runs");
    for (uint32_t r = 0; status == NEP_OK && r < num_ranks; r++) {
        places[r].boot_id[sizeof places[r].boot_id - 1] = '\0';
        places[r].node[sizeof places[r].node - 1] = '\0';
    }
    if (status == NEP_OK) {
        status = create_from(params, config, places, rank, num_ranks, store_p, topology_p);
    }
    if (status == NEP_OK) {
        (*store_p)->is_one_machine = true;
        for (uint32_t r = 1; r < num_ranks; r++) {
            (*store_p)->is_one_machine &= is_memory_shared(&places[0], &places[r]);
        }
    }
    free(places);
    return status;
}

/* ---- look-ups ------------------------------------------------------------------------------- */

uint32_t nep_topology_rank_at(const struct nep_topology *topology, uint32_t node, uint32_t local)
{
    /* A node's rank with local index l has at least l ranks before it. */
    for (uint32_t r = local; r < topology->num_ranks; r++) {
        if (topology->node_of_rank[r] == node && topology->local_of_rank[r] == local) {
            return r;
        }
    }
    return UINT32_MAX;
}

uint32_t nep_topology_landing(const struct nep_topology *topology, uint32_t source, uint32_t node)
{
    uint32_t local = topology->local_of_rank[source] % topology->node_ranks[node];
    return nep_topology_rank_at(topology, node, local);
}
