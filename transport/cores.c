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
#include <stdio.h>

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

/*
 * Where the launcher bound each rank to cores of its own, the last of them; else the last core of
 * an equal share for each lane. A share of one core is left to the rank itself.
 */
int nep_topology_progress_core(uint32_t local, uint32_t ranks_on_node)
{
    hwloc_cpuset_t mine = ranks_on_node == 0 ? NULL : read_binding();
    if (mine == NULL) {
        return -1;
    }
    uint32_t num = count_cores(mine, 0, NULL);
    bool is_bound = !hwloc_bitmap_isincluded(hwloc_topology_get_allowed_cpuset(machine), mine);
    uint32_t share = is_bound ? num : num / ranks_on_node;
    uint32_t at = is_bound ? num - 1 : (local % ranks_on_node + 1) * share - 1;
    int cpu = -1;
    hwloc_obj_t core = NULL;
    if (share >= 2) {
        count_cores(mine, at, &core);
    }
    if (core != NULL) {
        hwloc_bitmap_and(mine, mine, core->cpuset);
        cpu = hwloc_bitmap_first(mine);
    }
    hwloc_bitmap_free(mine);
    return cpu;
}
