/* SPDX-License-Identifier: Apache-2.0 */
/* What is on this machine: cores, shared memory, launcher, transports. */
#include <string.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "tools/nep_info.h"
#include "transport/topology.h"
#include "transport/transport.h"

static void print_bytes(struct info *info, const char *label, const char *key, uint64_t bytes)
{
    fprintf(info->out, "  %-22s %.1f MiB\n", label, (double)bytes / 1048576.0);
    json_u64(&info->json, key, bytes);
}

static void print_machine(struct info *info)
{
    char host[65] = "";
    struct statvfs shm;
    struct rlimit lock;
    gethostname(host, sizeof host - 1);
    fprintf(info->out, "machine %s\n", host);
    json_text(&info->json, "host", host);
    uint32_t num_cores = nep_topology_num_cores();
    fprintf(info->out, "  %-22s %u\n", "cores usable", num_cores);
    json_u64(&info->json, "cores", num_cores);
    if (statvfs("/dev/shm", &shm) == 0) {
        print_bytes(info, "free in /dev/shm", "shm_free_bytes",
                    (uint64_t)shm.f_bavail * shm.f_frsize);
    } else {
        fprintf(info->out, "  %-22s none\n", "/dev/shm");
        json_null(&info->json, "shm_free_bytes");
    }
    if (getrlimit(RLIMIT_MEMLOCK, &lock) == 0 && lock.rlim_cur != RLIM_INFINITY) {
        print_bytes(info, "memory it may lock", "memlock_bytes", lock.rlim_cur);
    } else {
        fprintf(info->out, "  %-22s no limit\n", "memory it may lock");
        json_null(&info->json, "memlock_bytes");
    }
}

static int print_launcher(struct info *info)
{
    struct nep_launch_env env;
    if (nep_launch_env_read(&env) != NEP_OK) {
        return info_error(INFO_FAILED, "%s", nep_last_message());
    }
    json_text(&info->json, "launcher", env.launcher);
    if (env.rank == UINT32_MAX) {
        fprintf(info->out, "  %-22s none\n", "launcher");
    } else {
        fprintf(info->out, "  %-22s %s: rank %u of %u", "launcher", env.launcher, env.rank,
                env.num_ranks);
        fprintf(info->out, env.address[0] != '\0' ? ", address %s port %u\n" : "\n", env.address,
                env.port);
        json_u64(&info->json, "rank", env.rank);
        json_u64(&info->json, "num_ranks", env.num_ranks);
    }
    return INFO_FINE;
}

static int print_group(struct info *info)
{
    struct nep_topology_store *store;
    struct nep_topology topology;
    if (nep_topology_from_sizes(info->ranks_per_node, info->num_nodes, 0, &store, &topology) !=
        NEP_OK) {
        return info_error(INFO_UNUSABLE, "%s", nep_last_message());
    }
    fprintf(info->out, "group of %u ranks on %u nodes\n", topology.num_ranks, topology.num_nodes);
    json_open(&info->json, "nodes", '[');
    for (uint32_t n = 0; n < topology.num_nodes; n++) {
        uint32_t first = nep_topology_rank_at(&topology, n, 0);
        uint32_t size = topology.node_ranks[n];
        fprintf(info->out, "  node %-4u ranks %u-%u", n, first, first + size - 1);
        json_open(&info->json, NULL, '{');
        json_u64(&info->json, "first_rank", first);
        json_u64(&info->json, "ranks", size);
        /* Lanes that other nodes have and this one has not land on a lower one. */
        uint32_t most = 0;
        for (uint32_t m = 0; m < topology.num_nodes; m++) {
            most = topology.node_ranks[m] > most ? topology.node_ranks[m] : most;
        }
        for (uint32_t lane = size; lane < most; lane++) {
            fprintf(info->out, "%s lane %u lands on rank %u",
                    lane == size ? "; from elsewhere" : ",", lane, first + lane % size);
        }
        fputc('\n', info->out);
        json_close(&info->json, '}');
    }
    json_close(&info->json, ']');
    nep_topology_destroy(store);
    return INFO_FINE;
}

int info_topology(struct info *info)
{
    json_open(&info->json, "topology", '{');
    print_machine(info);
    int status = print_launcher(info);
    if (status == INFO_FINE && info->has_ranks) {
        status = print_group(info);
    }
    json_close(&info->json, '}');
    return status;
}

static void print_caps(FILE *out, uint32_t caps)
{
    static const struct {
        uint32_t cap;
        const char *word;
    } words[] = {{NEP_CAP_MAPPED, " mapped"},
                 {NEP_CAP_FABRIC, " fabric"},
                 {NEP_CAP_THREAD, " own-thread"},
                 {NEP_CAP_ORDERED, " ordered"}};
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        fputs(caps & words[i].cap ? words[i].word : "", out);
    }
}

int info_transports(struct info *info)
{
    fprintf(info->out, "transports\n");
    json_open(&info->json, "transports", '[');
    for (size_t i = 0; nep_transport_list[i] != NULL; i++) {
        const struct nep_transport_ops *ops = nep_transport_list[i];
        enum nep_status status = ops->probe(&info->config);
        const char *why = status == NEP_OK ? "" : nep_last_message();
        fprintf(info->out, "  %-12s %s", ops->name, status == NEP_OK ? "works:" : "no: ");
        if (status == NEP_OK) {
            print_caps(info->out, ops->caps);
        }
        fprintf(info->out, "%s\n", why);
        json_open(&info->json, NULL, '{');
        json_text(&info->json, "name", ops->name);
        json_bool(&info->json, "works", status == NEP_OK);
        json_text(&info->json, "why_not", why);
        json_bool(&info->json, "mapped", ops->caps & NEP_CAP_MAPPED);
        json_bool(&info->json, "fabric", ops->caps & NEP_CAP_FABRIC);
        json_close(&info->json, '}');
    }
    json_close(&info->json, ']');
    return INFO_FINE;
}
