/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where progress threads run, on a machine that hwloc makes up: two NUMA nodes of four cores. The
 * made-up machine is for the whole process, so this is a program of its own.
 */
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "base/config.h"
#include "tests/unit/cmocka_all.h"
#include "transport/topology.h"

static void test_cores_progress_is_near_its_device(void **state)
{
    (void)state;
    const struct {
        uint32_t local, ranks;
        int32_t numa;
        int core;
    } cases[] = {
        {0, 1, -1, 7}, {0, 1, 0, 3}, {0, 1, 1, 7}, {0, 2, -1, 3}, {1, 2, -1, 7},
        {0, 2, 1, 5},  {1, 2, 1, 7}, {0, 2, 0, 1}, {1, 2, 0, 3},  {0, 3, 1, 4},
        {2, 3, 1, 6},  {0, 4, 1, 4}, {3, 4, 1, 7}, {0, 5, 1, -1}, /* no core of its own */
        {0, 1, 9, 7},                                             /* no such node */
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int core = nep_topology_progress_core(cases[i].local, cases[i].ranks, cases[i].numa);
        if (core != cases[i].core) {
            fail_msg("local %u of %u, NUMA node %d: core %d, not %d", cases[i].local,
                     cases[i].ranks, cases[i].numa, core, cases[i].core);
        }
    }
}

static void test_cores_listed_ones_are_taken(void **state)
{
    (void)state;
    cpu_set_t before, now;
    int core = -1;
    char list[64];
    assert_int_equal(pthread_getaffinity_np(pthread_self(), sizeof before, &before), 0);
    for (int i = 0; i < CPU_SETSIZE; i++) {
        core = CPU_ISSET((size_t)i, &before) ? i : core;
    }
    snprintf(list, sizeof list, "0,%d", core);
    assert_int_equal(nep_topology_place_thread(1, 2, list, pthread_self(), "test", -1), NEP_OK);
    assert_int_equal(pthread_getaffinity_np(pthread_self(), sizeof now, &now), 0);
    assert_int_equal(CPU_COUNT(&now), 1);
    assert_true(CPU_ISSET((size_t)core, &now));
    pthread_setaffinity_np(pthread_self(), sizeof before, &before);

    assert_int_equal(nep_topology_place_thread(1, 2, "none", pthread_self(), "test", -1), NEP_OK);
    assert_int_equal(pthread_getaffinity_np(pthread_self(), sizeof now, &now), 0);
    assert_true(CPU_EQUAL(&before, &now));
    static const char *const bad[] = {"x", "3,x", "-1", "3 4", "", "99999", "1023"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_int_equal(nep_topology_place_thread(1, 2, bad[i], pthread_self(), "test", -1),
                         NEP_ERR_INVALID);
        print_message("%s\n", nep_last_message());
        assert_non_null(strstr(nep_last_message(), "NEP_PROGRESS_CORES"));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cores_progress_is_near_its_device),
        cmocka_unit_test(test_cores_listed_ones_are_taken),
    };
    setenv("HWLOC_SYNTHETIC", "numa:2 core:4 pu:1", 1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
