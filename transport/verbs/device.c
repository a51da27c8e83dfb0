/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Devices, ports and which of them this rank uses. All ranks of a machine (one boot id, whatever
 * nodes are emulated on it) tell each other where they run, and each computes the same assignment.
 */
#include <ctype.h>
#include <errno.h>
#include <hwloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "transport/bootstrap.h"
#include "transport/verbs/verbs.h"

static int32_t device_numa(const char *device)
{
    char path[160];
    snprintf(path, sizeof path, "/sys/class/infiniband/%s/device/numa_node", device);
    FILE *file = fopen(path, "re");
    int numa = -1;
    if (file != NULL) {
        if (fscanf(file, "%d", &numa) != 1) {
            numa = -1;
        }
        fclose(file);
    }
    return numa;
}

/* The number of a port; 0 where the text is none. */
static uint8_t port_number(const char *text)
{
    char *end = NULL;
    unsigned long number = isdigit((unsigned char)text[0]) ? strtoul(text, &end, 10) : 0;
    return number > 0 && number < UINT8_MAX && (*end == '\0' || *end == ',') ? (uint8_t)number : 0;
}

/* Whether "dev[:port],..." names this port; "auto" and "" name all. */
static bool is_named(const char *only, const char *device, uint8_t port)
{
    if (only == NULL || only[0] == '\0' || strcmp(only, "auto") == 0) {
        return true;
    }
    for (const char *at = only; *at != '\0'; at += *at == ',') {
        size_t len = strcspn(at, ",");
        const char *colon = memchr(at, ':', len);
        size_t name_len = colon == NULL ? len : (size_t)(colon - at);
        if (strlen(device) == name_len && memcmp(device, at, name_len) == 0 &&
            (colon == NULL || port_number(colon + 1) == port)) {
            return true;
        }
        at += len;
    }
    return false;
}

static uint32_t live_ports(const struct nep_verbs_api *api, struct ibv_device *device,
                           const char *only, struct nep_verbs_port *ports, uint32_t room)
{
    const char *name = api->get_device_name(device);
    struct ibv_context *context = api->open_device(device);
    struct ibv_device_attr attr;
    uint32_t num = 0;
    if (context == NULL) {
        nep_warn("verbs: %s cannot be opened: %s; it is not used", name, strerror(errno));
        return 0;
    }
    if (api->query_device(context, &attr) != 0) {
        attr.phys_port_cnt = 0;
    }
    for (uint8_t port = 1; port <= attr.phys_port_cnt && num < room; port++) {
        struct ibv_port_attr port_attr;
        if (!is_named(only, name, port) || api->query_port(context, port, &port_attr) != 0 ||
            port_attr.state != IBV_PORT_ACTIVE) {
            continue;
        }
        snprintf(ports[num].device, sizeof ports[num].device, "%s", name);
        ports[num].port = port;
        ports[num].numa = device_numa(name);
        num++;
    }
    api->close_device(context);
    return num;
}

static int by_name(const void *a, const void *b)
{
    const struct nep_verbs_port *left = a, *right = b;
    size_t i = strcspn(left->device, "0123456789"), j = strcspn(right->device, "0123456789");
    if (i == j && memcmp(left->device, right->device, i) == 0 &&
        atoi(left->device + i) != atoi(right->device + j)) {
        return atoi(left->device + i) - atoi(right->device + j); /* mlx5_2 before mlx5_10 */
    }
    int order = strcmp(left->device, right->device);
    return order != 0 ? order : (int)left->port - (int)right->port;
}

enum nep_status nep_verbs_ports_list(const struct nep_verbs_api *api, const char *only,
                                     struct nep_verbs_port **ports_p, uint32_t *num_ports_p)
{
    struct ibv_device **list;
    int num_devices;
    enum nep_status status = nep_verbs_api_devices(api, &list, &num_devices);
    if (status != NEP_OK) {
        return status;
    }
    uint32_t room = (uint32_t)num_devices * 2, num = 0;
    struct nep_verbs_port *ports = calloc(room, sizeof *ports);
    for (int i = 0; ports != NULL && i < num_devices; i++) {
        num += live_ports(api, list[i], only, ports + num, room - num);
    }
    api->free_device_list(list);
    if (ports == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for %d devices", num_devices);
    }
    if (num == 0) {
        free(ports);
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "verbs: none of %d devices has an active port%s%s: see ibv_devinfo; "
                        "NEP_VERBS_DEVICES chooses among them",
                        num_devices, is_named(only, "", 0) ? "" : " named in ",
                        is_named(only, "", 0) ? "" : only);
    }
    qsort(ports, num, sizeof *ports, by_name);
    *ports_p = ports;
    *num_ports_p = num;
    return NEP_OK;
}

void nep_verbs_gids_read(const struct nep_verbs_api *api, struct ibv_context *context, uint8_t port,
                         uint32_t num_gids, uint32_t only, struct nep_verbs_gids *gids)
{
    memset(gids, 0, sizeof *gids);
    for (uint32_t kind = 0; kind < NEP_VERBS_GID_NUM_KINDS; kind++) {
        gids->index[kind] = -1;
    }
    uint32_t first = only == UINT32_MAX ? 0 : only;
    uint32_t end = only == UINT32_MAX ? num_gids : only + 1;
    uint32_t num_empty = 0;
    /* Tables have up to 1024 entries, used from the start; each look is a system call. */
    for (uint32_t i = first; i < end && num_empty < 32; i++) {
        struct ibv_gid_entry entry;
        memset(&entry, 0, sizeof entry);
        if (api->query_gid(context, port, i, &entry) != 0) {
            num_empty++;
            continue;
        }
        enum nep_verbs_gid_kind kind = nep_verbs_gid_classify(&entry);
        if (gids->index[kind] < 0) {
            gids->index[kind] = (int32_t)i;
            memcpy(gids->raw[kind], entry.gid.raw, 16);
        }
    }
}

/* ---- the choice, over all ranks of a machine ------------------------------------------------ */

struct seat {
    char boot_id[40];
    int32_t numa;
    uint64_t ports; /* digest of the ports it may use: containers of one machine may differ */
};

static uint64_t digest(const struct nep_verbs_port *ports, uint32_t num_ports)
{
    uint64_t hash = 0xcbf29ce484222325ull; /* FNV-1a (Fowler, Noll, Vo) */
    for (uint32_t i = 0; i < num_ports; i++) {
        for (const char *at = ports[i].device; *at != '\0'; at++) {
            hash = (hash ^ (uint8_t)*at) * 0x100000001b3ull;
        }
        hash = (hash ^ ports[i].port) * 0x100000001b3ull;
    }
    return hash;
}

static void read_boot_id(char text[40])
{
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re");
    memset(text, 0, 40);
    if (file != NULL) {
        if (fgets(text, 40, file) == NULL) {
            text[0] = '\0';
        }
        fclose(file);
    }
}

/* The NUMA node this thread runs on, when it is bound to one; else -1. */
static int32_t own_numa(void)
{
    hwloc_topology_t topology;
    int32_t numa = -1;
    if (hwloc_topology_init(&topology) != 0) {
        return -1;
    }
    hwloc_bitmap_t cpus = hwloc_bitmap_alloc(), nodes = hwloc_bitmap_alloc();
    if (cpus != NULL && nodes != NULL && hwloc_topology_load(topology) == 0 &&
        hwloc_get_cpubind(topology, cpus, HWLOC_CPUBIND_THREAD) == 0) {
        hwloc_cpuset_to_nodeset(topology, cpus, nodes);
        if (hwloc_bitmap_weight(nodes) == 1) {
            numa = hwloc_bitmap_first(nodes);
        }
    }
    hwloc_bitmap_free(cpus);
    hwloc_bitmap_free(nodes);
    hwloc_topology_destroy(topology);
    return numa;
}

/* Reads `local-rank dev[:port],...` lines; text is filled with the devices of `local`. */
static enum nep_status read_override(const char *path, uint32_t local, char *text, size_t size)
{
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        return nep_fail(NEP_ERR_NOT_FOUND, "verbs: NEP_VERBS_DEVICES: %s: %s", path,
                        strerror(errno));
    }
    char line[512], word[16], devices[256];
    uint32_t num_lines = 0;
    enum nep_status status =
        nep_fail(NEP_ERR_FORMAT, "verbs: %s has no line for local rank %u (`%u dev[:port],...`)",
                 path, local, local);
    while (status != NEP_OK && fgets(line, sizeof line, file) != NULL) {
        num_lines++;
        int found = sscanf(line, " %15s %255s", word, devices);
        if (found <= 0 || word[0] == '#') {
            continue;
        }
        if (found != 2 || (!isdigit((unsigned char)word[0]) && strcmp(word, "*") != 0)) {
            status =
                nep_fail(NEP_ERR_FORMAT, "verbs: %s line %u is not `local-rank dev[:port],...`",
                         path, num_lines);
            break;
        }
        if (strcmp(word, "*") == 0 || (uint32_t)atoi(word) == local) {
            snprintf(text, size, "%s", devices);
            status = NEP_OK;
        }
    }
    fclose(file);
    return status;
}

static void take_ports(struct nep_verbs *verbs, const struct nep_verbs_port *ports,
                       const uint32_t *choice)
{
    for (uint32_t p = 0; p < verbs->num_paths; p++) {
        struct nep_verbs_path *path = &verbs->paths[p];
        const struct nep_verbs_port *port = &ports[choice[p]];
        snprintf(path->device, sizeof path->device, "%s", port->device);
        path->port = port->port;
        path->numa = port->numa;
    }
}

static bool same_machine(const struct nep_verbs *verbs, const struct seat *seats, uint32_t rank)
{
    return strcmp(seats[rank].boot_id, seats[verbs->rank].boot_id) == 0;
}

static void count_local(struct nep_verbs *verbs, const struct seat *seats)
{
    for (uint32_t r = 0; r < verbs->num_ranks; r++) {
        bool is_here = same_machine(verbs, seats, r);
        verbs->local += is_here && r < verbs->rank;
        verbs->num_local += is_here;
    }
}

/* The assignment from everybody's seats. */
static enum nep_status choose_among(struct nep_verbs *verbs, const struct nep_verbs_port *ports,
                                    uint32_t num_ports, const struct seat *seats)
{
    int32_t *numa = calloc(verbs->num_ranks, sizeof *numa);
    uint32_t *choice = calloc((size_t)verbs->num_ranks * verbs->num_paths, sizeof *choice);
    enum nep_status status = NEP_OK;
    if (numa == NULL || choice == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for %u ranks", verbs->num_ranks);
    } else {
        uint32_t num_alike = 0, mine = 0;
        for (uint32_t r = 0; r < verbs->num_ranks; r++) {
            if (!same_machine(verbs, seats, r) || seats[r].ports != seats[verbs->rank].ports) {
                continue;
            }
            mine = r == verbs->rank ? num_alike : mine;
            numa[num_alike++] = seats[r].numa;
        }
        nep_verbs_assign(ports, num_ports, numa, num_alike, verbs->num_paths, choice);
        take_ports(verbs, ports, choice + mine * verbs->num_paths);
    }
    free(numa);
    free(choice);
    return status;
}

/* An override file decides alone: path p is its p-th entry. */
static enum nep_status choose_listed(struct nep_verbs *verbs, const char *devices)
{
    char list[256];
    snprintf(list, sizeof list, "%s", devices);
    char *rest = list;
    for (uint32_t p = 0; p < verbs->num_paths; p++) {
        char *entry = strsep(&rest, ",");
        if (entry == NULL || entry[0] == '\0') {
            return nep_fail(NEP_ERR_INVALID,
                            "verbs: the line of rank %u lists %u devices, NEP_VERBS_PATHS is %u",
                            verbs->rank, p, verbs->num_paths);
        }
        char *colon = strchr(entry, ':');
        verbs->paths[p].port = colon == NULL ? 1 : port_number(colon + 1);
        if (verbs->paths[p].port == 0) {
            return nep_fail(NEP_ERR_INVALID,
                            "verbs: NEP_VERBS_DEVICES: the port of '%s' is not from 1 to 254",
                            entry);
        }
        if (colon != NULL) {
            *colon = '\0';
        }
        snprintf(verbs->paths[p].device, sizeof verbs->paths[p].device, "%.63s", entry);
        verbs->paths[p].numa = device_numa(entry);
    }
    return NEP_OK;
}

enum nep_status nep_verbs_paths_choose(struct nep_verbs *verbs)
{
    const char *wanted = verbs->params.config->verbs_devices;
    bool is_file = wanted[0] == '/' || wanted[0] == '.';
    char listed[256] = "";
    struct nep_verbs_port *ports = NULL;
    uint32_t num_ports = 0;
    enum nep_status status =
        is_file ? read_override(wanted, verbs->params.topology->local, listed, sizeof listed)
                : nep_verbs_ports_list(&verbs->api, wanted, &ports, &num_ports);
    int32_t gpu_numa = verbs->api.gpu_numa(); /* its memory is what travels, where there is one */
    struct seat mine = {.numa = gpu_numa >= 0 ? gpu_numa : own_numa(),
                        .ports = digest(ports, num_ports)};
    read_boot_id(mine.boot_id);
    /* A rank that failed says so before anybody waits for its seat. */
    status = nep_bootstrap_common(verbs->params.bootstrap, verbs->rank, verbs->num_ranks, status,
                                  verbs->params.timeout_ns);
    struct seat *seats = calloc(verbs->num_ranks, sizeof *seats);
    if (status == NEP_OK && seats == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "verbs: no memory for %u ranks", verbs->num_ranks);
    }
    if (status == NEP_OK) {
        status = nep_bootstrap_allgather(verbs->params.bootstrap, &mine, seats, sizeof mine,
                                         verbs->params.timeout_ns, "verbs devices");
    }
    if (status == NEP_OK) {
        count_local(verbs, seats);
        status =
            is_file ? choose_listed(verbs, listed) : choose_among(verbs, ports, num_ports, seats);
    }
    free(seats);
    free(ports);
    return status;
}
