/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Under a launcher: whether every rank reaches every other one over the fabric that would be used,
 * over each of its paths. Every rank puts to all and says what came; a rank that hears nothing from
 * another names it, with what its own side knows of the connection.
 */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/clock.h"
#include "tools/doctor.h"
#include "transport/bootstrap.h"
#include "transport/topology.h"
#include "transport/transport.h"

enum { WINDOW = 0, PUTS_PER_PEER = 16 }; /* more than paths and QPs: they are used in turn */

struct group {
    struct nep_config config;
    struct nep_bootstrap bootstrap;
    struct nep_rendezvous_client *client;
    struct nep_topology_store *store;
    struct nep_topology topology;
    struct nep_transport *transport;
    const char *name;
    atomic_uint *words; /* [num_ranks]: what came from each */
};

static void sink(void *base, uint32_t dst, uint32_t src, uint32_t imm)
{
    (void)dst;
    (void)imm;
    atomic_fetch_add((atomic_uint *)base + src, 1);
}

static enum nep_status group_open(struct group *group)
{
    static const char *const names[] = {"verbs", "ucx", "shm"};
    struct nep_comm_params params = {.size = sizeof params};
    uint32_t rank, num_ranks;
    enum nep_status status =
        nep_bootstrap_open(&params, &group->config, group->config.timeout_ns, &group->bootstrap,
                           &rank, &num_ranks, &group->client);
    if (status == NEP_OK) {
        group->topology.size = sizeof group->topology;
        status = nep_topology_create(&params, &group->config, &group->bootstrap, rank, num_ranks,
                                     group->config.timeout_ns, &group->store, &group->topology);
    }
    const struct nep_transport_ops *ops = NULL;
    const char *args = "";
    bool is_chosen = strcmp(group->config.inter, "auto") != 0;
    for (size_t i = 0; status == NEP_OK && i < sizeof names / sizeof names[0]; i++) {
        status = nep_transport_find(is_chosen ? group->config.inter : names[i], &ops, &args);
        if (status == NEP_OK && (is_chosen || ops->probe(&group->config) == NEP_OK)) {
            break;
        }
    }
    if (status == NEP_OK) {
        struct nep_transport_params create = {.topology = &group->topology,
                                              .bootstrap = &group->bootstrap,
                                              .config = &group->config,
                                              .timeout_ns = group->config.timeout_ns,
                                              .sink = sink,
                                              .args = args,
                                              .max_puts = num_ranks * PUTS_PER_PEER};
        group->name = ops->name;
        status = ops->create(&create, &group->transport);
    }
    return status;
}

static enum nep_status group_window(struct group *group)
{
    const struct nep_transport_ops *ops = group->transport->ops;
    size_t bytes = (group->topology.num_ranks * sizeof(atomic_uint) + 4095) / 4096 * 4096;
    void *base = NULL;
    if ((ops->caps & NEP_CAP_MAPPED) == 0) {
        base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        base = base == MAP_FAILED ? NULL : base;
    }
    enum nep_status status = ops->window_create(group->transport, WINDOW, &base, bytes);
    group->words = base;
    return status;
}

static bool all_came(const struct group *group)
{
    for (uint32_t r = 0; r < group->topology.num_ranks; r++) {
        if (atomic_load(&group->words[r]) < PUTS_PER_PEER) {
            return false;
        }
    }
    return true;
}

static void examine(struct doctor *doctor, struct group *group)
{
    const struct nep_transport_ops *ops = group->transport->ops;
    uint32_t num_bad = 0;
    for (uint32_t r = 0; r < group->topology.num_ranks; r++) {
        for (uint32_t i = 0; i < PUTS_PER_PEER; i++) {
            struct nep_put put = {.dst = r, .window = WINDOW};
            uint64_t number;
            if (ops->put(group->transport, &put, &number) != NEP_OK) {
                break; /* peer_status says why, below */
            }
        }
    }
    uint64_t deadline_ns = nep_deadline_ns(10 * NEP_S);
    while (!all_came(group) && nep_left_ns(deadline_ns) > 0) {
        ops->progress(group->transport);
        usleep(1000);
    }
    for (uint32_t r = 0; r < group->topology.num_ranks; r++) {
        uint32_t came = atomic_load(&group->words[r]);
        bool is_lost = ops->peer_status(group->transport, r) != NEP_OK;
        if (came >= PUTS_PER_PEER) {
            continue;
        }
        num_bad++;
        doctor_say(doctor, DOCTOR_BAD, "peers",
                   "look at routes, VLANs, MTU and firewalls between the two ports named",
                   "rank %u (node %u): %u of %u messages came over %s: %s", r,
                   group->topology.node_of_rank[r], came, PUTS_PER_PEER, group->name,
                   is_lost ? nep_last_message() : "nothing more within 10 s");
    }
    if (num_bad == 0) {
        doctor_say(doctor, DOCTOR_FINE, "peers", "",
                   "all %u ranks on %u nodes reach rank %u over %s", group->topology.num_ranks,
                   group->topology.num_nodes, group->topology.rank, group->name);
    }
    nep_bootstrap_common(&group->bootstrap, group->topology.rank, group->topology.num_ranks, NEP_OK,
                         group->config.timeout_ns); /* nobody leaves before all have looked */
}

void doctor_check_peers(struct doctor *doctor)
{
    struct nep_launch_env env;
    if (nep_launch_env_read(&env) != NEP_OK || env.num_ranks == UINT32_MAX || env.num_ranks < 2) {
        return;
    }
    struct group group = {.config = *doctor_config(doctor), .name = "the fabric"};
    enum nep_status status = group_open(&group);
    if (status == NEP_OK) {
        status = group_window(&group);
    }
    if (status == NEP_OK) {
        examine(doctor, &group);
    } else {
        doctor_say(doctor, DOCTOR_BAD, "peers", "what the sentence says", "%s: %s", group.name,
                   nep_last_message());
    }
    if (group.transport != NULL) {
        group.transport->ops->close(group.transport);
    }
    nep_topology_destroy(group.store);
    nep_bootstrap_close(group.client);
}
