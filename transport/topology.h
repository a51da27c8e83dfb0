/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which ranks share a node, their lanes, and cores for progress threads. Two processes are on one
 * node when boot id, IPC namespace and the device of /dev/shm agree; overridden by
 * params->ranks_per_node or NEP_NODE, to emulate nodes.
 */
#ifndef NEP_TRANSPORT_TOPOLOGY_H
#define NEP_TRANSPORT_TOPOLOGY_H

#include <pthread.h>

#include "base/config.h"
#include "nearep.h"

struct nep_topology_store; /* owns the arrays of a nep_topology */

/* Collective. */
enum nep_status nep_topology_create(const struct nep_comm_params *params,
                                    const struct nep_config *config,
                                    const struct nep_bootstrap *bootstrap, uint32_t rank,
                                    uint32_t num_ranks, uint64_t timeout_ns,
                                    struct nep_topology_store **store_p,
                                    struct nep_topology *topology_p);
void nep_topology_destroy(struct nep_topology_store *store);
/* All ranks share memory: their nodes, if there are several, are emulated. */
bool nep_topology_is_one_machine(const struct nep_topology_store *store);
/* Not collective: from sizes of nodes alone, for tools and tests. */
enum nep_status nep_topology_from_sizes(const uint32_t *ranks_per_node, uint32_t num_nodes,
                                        uint32_t rank, struct nep_topology_store **store_p,
                                        struct nep_topology *topology_p);

/*
 * Some ranks of a group, numbered anew in their order, on nodes numbered anew: members [num],
 * ascending, idx the place of this rank among them; nodes [num] the node of each, in any numbering.
 */
enum nep_status nep_topology_subset(const uint32_t *nodes, uint32_t num, uint32_t idx,
                                    bool is_one_machine, struct nep_topology_store **store_p,
                                    struct nep_topology *topology_p);

/* Tells one run of a machine from all others; "" where it cannot be read. */
void nep_topology_boot_id(char *text, size_t cap);

/* Cores usable by this process (hwloc, cpuset aware), and one for the progress thread of a lane,
 * if it can be on NUMA node `numa` (-1: anywhere). -1: no preference. */
uint32_t nep_topology_num_cores(void);
int nep_topology_progress_core(uint32_t local, uint32_t ranks_on_node, int32_t numa);
/*
 * Binds the progress thread of local rank `local` of `num_local` as NEP_PROGRESS_CORES says
 * (`wanted`: auto, none, or a core for each local rank), near NUMA node `numa` of its device, and
 * logs where it runs. NEP_ERR_INVALID: `wanted` is no list, or names a core that this process may
 * not use.
 */
enum nep_status nep_topology_place_thread(uint32_t local, uint32_t num_local, const char *wanted,
                                          pthread_t thread, const char *name, int32_t numa);

/* The rank that lands messages of source rank `source` on node `node`: local index local(source)
 * mod G_node. */
uint32_t nep_topology_landing(const struct nep_topology *topology, uint32_t source, uint32_t node);
/* The rank with local index `local` on node `node`. */
uint32_t nep_topology_rank_at(const struct nep_topology *topology, uint32_t node, uint32_t local);

#endif
