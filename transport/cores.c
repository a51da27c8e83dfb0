/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How many cores this process may use, and which one suits a progress thread. hwloc knows cores
 * from hardware threads and respects cpusets; a container's CPU quota it does not know, and a rank
 * that spins beyond its quota is stopped for the rest of a 100 ms period, so the quota counts too.
 *
 * Loading takes hwloc 10 to 20 ms, too much for each of 64 ranks as threads: the machine's
 * cores, which do not change, are loaded once per process and only read afterwards (which hwloc
 * allows from many threads); the binding, which may change, is asked each time.
 */
#include <hwloc.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "transport/topology.h"

/* CPUs that the control group allows, rounded up; UINT32_MAX without a quota. */
static uint32_t quota_cores(void)
{
    long long quota = -1, period = -1;
    FILE *file = fopen("/sys/fs/cgroup/cpu.max", "re");
    if (file != NULL) {
        if (fscanf(file, "%lld %lld", &quota, &period) != 2) {
            quota = -1;
        }
        fclose(file);
    } else {
        file = fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "re");
        if (file != NULL) {
            if (fscanf(file, "%lld", &quota) != 1) {
                quota = -1;
            }
            fclose(file);
        }
        file = fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "re");
        if (file != NULL) {
            if (fscanf(file, "%lld", &period) != 1) {
                period = -1;
            }
            fclose(file);
        }
    }
    if (quota <= 0 || period <= 0 || quota / period >= UINT32_MAX - 1) {
        return UINT32_MAX;
    }
    return (uint32_t)((quota + period - 1) / period);
}

static pthread_once_t machine_once = PTHREAD_ONCE_INIT;
static hwloc_topology_t machine; /* NULL when hwloc cannot tell */

static void load_machine(void)
{
    hwloc_topology_t topology;
    if (hwloc_topology_init(&topology) != 0) {
        return;
    }
    hwloc_topology_set_all_types_filter(topology, HWLOC_TYPE_FILTER_KEEP_NONE);
    hwloc_topology_set_type_filter(topology, HWLOC_OBJ_CORE, HWLOC_TYPE_FILTER_KEEP_ALL);
    /* Without groups a NUMA node would be given all cores of the machine. */
    hwloc_topology_set_type_filter(topology, HWLOC_OBJ_GROUP, HWLOC_TYPE_FILTER_KEEP_STRUCTURE);
    if (hwloc_topology_load(topology) != 0) {
        hwloc_topology_destroy(topology);
        return;
    }
    machine = topology;
}

/* The hardware threads that this thread may run on; NULL when unknown. Free it. */
static hwloc_cpuset_t read_binding(void)
{
    pthread_once(&machine_once, load_machine);
    hwloc_cpuset_t mine = machine == NULL ? NULL : hwloc_bitmap_alloc();
    if (mine != NULL && hwloc_get_cpubind(machine, mine, HWLOC_CPUBIND_THREAD) != 0) {
        hwloc_bitmap_copy(mine, hwloc_topology_get_allowed_cpuset(machine));
    }
    return mine;
}

/* Cores that have a hardware thread in `mine`; the at-th of them in *core_p when it is not NULL. */
static uint32_t count_cores(hwloc_const_cpuset_t mine, uint32_t at, hwloc_obj_t *core_p)
{
    uint32_t num = 0;
    hwloc_obj_t core = NULL;
    int depth = hwloc_get_type_or_below_depth(machine, HWLOC_OBJ_CORE);
    while ((core = hwloc_get_next_obj_by_depth(machine, depth, core)) != NULL) {
        if (hwloc_bitmap_intersects(core->cpuset, mine)) {
            if (num == at && core_p != NULL) {
                *core_p = core;
            }
            num++;
        }
    }
    return num;
}

uint32_t nep_topology_num_cores(void)
{
    hwloc_cpuset_t mine = read_binding();
    uint32_t num = mine == NULL ? 0 : count_cores(mine, 0, NULL);
    hwloc_bitmap_free(mine);
    uint32_t quota = quota_cores();
    num = num < quota ? num : quota;
    return num == 0 ? 1 : num;
}

/* The hardware threads of `mine` on NUMA node `numa`; NULL where that node is not known. */
static hwloc_cpuset_t on_numa(hwloc_const_cpuset_t mine, int32_t numa)
{
    hwloc_obj_t node =
        numa < 0 ? NULL : hwloc_get_numanode_obj_by_os_index(machine, (unsigned)numa);
    hwloc_cpuset_t near = node == NULL ? NULL : hwloc_bitmap_alloc();
    if (near != NULL) {
        hwloc_bitmap_and(near, mine, node->cpuset);
    }
    return near;
}

/*
 * Where the launcher bound each rank to cores of its own, the last of them; else the last core of
 * an equal share for each lane. A share of one core is left to the rank itself. Near the device, if
 * there are enough cores: a launcher's binding is never left for it.
 */
int nep_topology_progress_core(uint32_t local, uint32_t ranks_on_node, int32_t numa)
{
    hwloc_cpuset_t mine = ranks_on_node == 0 ? NULL : read_binding();
    if (mine == NULL) {
        return -1;
    }
    uint32_t num = count_cores(mine, 0, NULL);
    bool is_bound = !hwloc_bitmap_isincluded(hwloc_topology_get_allowed_cpuset(machine), mine);
    bool has_own = num / (is_bound ? 1 : ranks_on_node) >= 2; /* one is left to the rank */
    hwloc_cpuset_t near = on_numa(mine, numa);
    uint32_t num_near = near == NULL ? 0 : count_cores(near, 0, NULL);
    if (num_near >= (is_bound ? 1 : ranks_on_node)) {
        hwloc_bitmap_copy(mine, near);
        num = num_near;
    }
    uint32_t share = is_bound ? num : num / ranks_on_node;
    int cpu = -1;
    hwloc_obj_t core = NULL;
    if (has_own) {
        count_cores(mine, is_bound ? num - 1 : (local % ranks_on_node + 1) * share - 1, &core);
    }
    if (core != NULL) {
        hwloc_bitmap_and(mine, mine, core->cpuset);
        cpu = hwloc_bitmap_first(mine);
    }
    hwloc_bitmap_free(near);
    hwloc_bitmap_free(mine);
    return cpu;
}

/* The local-th number of a list "3,7,11"; the last one for ranks beyond it. -2: not a list. */
static int listed_core(const char *list, uint32_t local)
{
    int core = -2;
    const char *at = list;
    for (uint32_t i = 0; *at != '\0'; i++) {
        char *end;
        unsigned long number = strtoul(at, &end, 10);
        if (end == at || number >= CPU_SETSIZE || at[0] < '0' || at[0] > '9' ||
            (*end != ',' && *end != '\0')) {
            return -2;
        }
        core = i <= local ? (int)number : core;
        at = end + (*end == ',');
    }
    return core;
}

enum nep_status nep_topology_place_thread(uint32_t local, uint32_t num_local, const char *wanted,
                                          pthread_t thread, const char *name, int32_t numa)
{
    bool is_auto = strcmp(wanted, "auto") == 0;
    int core = is_auto                       ? nep_topology_progress_core(local, num_local, numa)
               : strcmp(wanted, "none") == 0 ? -1
                                             : listed_core(wanted, local);
    if (core == -2) {
        return nep_fail(NEP_ERR_INVALID,
                        "NEP_PROGRESS_CORES is \"%s\": auto, none, or core numbers by local rank, "
                        "such as 3,7,11",
                        wanted);
    }
    if (core < 0 || core >= CPU_SETSIZE) {
        nep_info("%s: the progress thread of local rank %u of %u is not bound to a core", name,
                 local, num_local);
        return NEP_OK;
    }
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)core, &set);
    int error = pthread_setaffinity_np(thread, sizeof set, &set);
    if (error != 0 && !is_auto) {
        return nep_fail(NEP_ERR_INVALID, "NEP_PROGRESS_CORES names core %d for local rank %u: %s",
                        core, local, strerror(error));
    }
    nep_info(
        "%s: the progress thread of local rank %u of %u %s core %d (device on NUMA node %d; -1: "
        "unknown)",
        name, local, num_local, error == 0 ? "runs on" : "could not be bound to", core, numa);
    return NEP_OK;
}
