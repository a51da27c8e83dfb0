/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A rank is killed at every place of an operation where it may have done part of its work: before
 * and between its COUNTS, before, among and after its tiles, before and after the CREDIT that its
 * reading gives, in the caller's own work, and between operations; of dispatch and of combine. The
 * others must each name that rank, as one that is lost and not at their deadline, go on without it,
 * and have no wrong element, before as after.
 *
 * Three of the four ranks of a group die one after the other: one that is alone on its node, of
 * whose end the fabric alone tells; one with a neighbour, which sees it; and that neighbour, alone
 * by then. The last one goes on by itself.
 *
 * usage: test_deaths [FABRIC]: over that one alone, as the guest's tests do.
 */
#include <stdio.h>

#include "base/clock.h"
#include "tests/multi/mortals.h"
#include "tests/unit/cmocka_all.h"
#include "transport/transport.h"

enum { GROUP = 3 /* deaths */, AHEAD = 16 /* tiles that go without a credit: dispatch/shape.c */ };

static const struct mortals_moment moments[] = {
    {.name = "before a dispatch", .call = MORTALS_DISPATCH_SEND},
    {.name = "dispatch, before its counts",
     .call = MORTALS_DISPATCH_SEND,
     .event = MORTALS_AT_PUT,
     .kind = NEP_KIND_COUNTS},
    {.name = "dispatch, counts told to one node",
     .call = MORTALS_DISPATCH_SEND,
     .event = MORTALS_AT_PUT,
     .kind = NEP_KIND_COUNTS,
     .is_after = true},
    {.name = "dispatch, before its first tile",
     .call = MORTALS_DISPATCH_SEND,
     .event = MORTALS_AT_PUT,
     .kind = NEP_KIND_DISPATCH},
    {.name = "dispatch, among its tiles",
     .call = MORTALS_DISPATCH_SEND,
     .event = MORTALS_AT_PUT,
     .kind = NEP_KIND_DISPATCH,
     .nth_of_node = AHEAD / 2},
    {.name = "dispatch, sent and not received", .call = MORTALS_DISPATCH_RECV},
    {.name = "dispatch, at its first look for messages",
     .call = MORTALS_DISPATCH_RECV,
     .event = MORTALS_AT_LOOK},
    {.name = "dispatch, before a tile that a credit allowed",
     .call = MORTALS_DISPATCH_SEND,
     .event = MORTALS_AT_PUT,
     .kind = NEP_KIND_DISPATCH,
     .nth_of_node = AHEAD},
    {.name = "dispatch, all of a stream read, before its credit",
     .call = MORTALS_DISPATCH_RECV,
     .event = MORTALS_AT_PUT,
     .kind = NEP_KIND_DISPATCH_CREDIT},
    {.name = "dispatch, after its credit",
     .call = MORTALS_DISPATCH_RECV,
     .event = MORTALS_AT_PUT,
     .kind = NEP_KIND_DISPATCH_CREDIT,
     .is_after = true},
    {.name = "in the experts", .call = MORTALS_EXPERTS},
    {.name = "before a combine", .call = MORTALS_COMBINE_SEND},
    {.name = "combine, before its counts",
     .call = MORTALS_COMBINE_SEND,
     .event = MORTALS_AT_PUT,
     .kind = NEP_KIND_COUNTS},
    {.name = "combine, counts told to one home",
     .call = MORTALS_COMBINE_SEND,
     .event = MORTALS_AT_PUT,
     .kind = NEP_KIND_COUNTS,
     .is_after = true},
    {.name = "combine, before its first tile",
     .call = MORTALS_COMBINE_SEND,
     .event = MORTALS_AT_PUT,
     .kind = NEP_KIND_COMBINE},
    {.name = "combine, among its tiles",
     .call = MORTALS_COMBINE_SEND,
     .event = MORTALS_AT_PUT,
     .kind = NEP_KIND_COMBINE,
     .nth = AHEAD / 2},
    {.name = "combine, sent and not received", .call = MORTALS_COMBINE_RECV},
    {.name = "combine, at its first look for messages",
     .call = MORTALS_COMBINE_RECV,
     .event = MORTALS_AT_LOOK},
    {.name = "combine, before its credit",
     .call = MORTALS_COMBINE_RECV,
     .event = MORTALS_AT_PUT,
     .kind = NEP_KIND_COMBINE_CREDIT},
    {.name = "combine, after its credit",
     .call = MORTALS_COMBINE_RECV,
     .event = MORTALS_AT_PUT,
     .kind = NEP_KIND_COMBINE_CREDIT,
     .is_after = true},
    {.name = "after a combine", .call = MORTALS_AFTER},
};
enum { MOMENTS = sizeof moments / sizeof moments[0] };

/* The group of three moments from `first` on. */
static void run_group(const char *inter, uint32_t first, enum nep_layout layout, bool is_mapped)
{
    static const uint32_t victims[GROUP] = {0, 1, 2};
    struct mortals_plan plan = {.intra = "shm",
                                .inter = inter,
                                .num_nodes = 3,
                                .ranks_per_node = {1, 2, 1},
                                .layout = layout,
                                .memory = is_mapped ? MORTALS_POOL : MORTALS_PRIVATE,
                                .timeout_ns = 60 * NEP_S,
                                .num_deaths = GROUP,
                                .newcomer = UINT32_MAX,
                                .num_tokens = 1700, /* so that streams need credits */
                                .hidden = 16,
                                .last_step = 7,
                                .seconds = 240};
    for (uint32_t d = 0; d < GROUP; d++) {
        plan.deaths[d] = (struct mortals_death){
            .rank = victims[d], .step = 1 + 2 * d, .moment = moments[(first + d) % MOMENTS]};
    }
    print_message("   %s, %s layout, %s outputs\n", inter,
                  layout == NEP_LAYOUT_RANK ? "rank" : "expert", is_mapped ? "mapped" : "private");
    mortals_run(plan);
}

static const char *fabric;

/* Every moment once. */
static void test_deaths_at_every_moment_over_a_fabric(void **state)
{
    (void)state;
    for (uint32_t first = 0; first < MOMENTS; first += GROUP) {
        run_group(fabric, first, first % 2 == 0 ? NEP_LAYOUT_EXPERT_PACKED : NEP_LAYOUT_RANK,
                  first % 4 < 2);
    }
}

/* Every moment with each of the three kinds of victims. */
static void run_all(const char *inter)
{
    for (uint32_t first = 0; first < MOMENTS; first++) {
        run_group(inter, first, first % 2 == 0 ? NEP_LAYOUT_EXPERT_PACKED : NEP_LAYOUT_RANK,
                  first % 4 < 2);
    }
}

static void test_deaths_at_every_moment_over_shm(void **state)
{
    (void)state;
    run_all("shm");
}

static void test_deaths_at_every_moment_over_ucx(void **state)
{
    (void)state;
    fabric = "ucx";
    test_deaths_at_every_moment_over_a_fabric(state);
}

static void test_deaths_at_every_moment_over_the_adversary(void **state)
{
    (void)state;
    run_all("adversary:shm");
}

int main(int argc, char **argv)
{
    const struct CMUnitTest one[] = {cmocka_unit_test(test_deaths_at_every_moment_over_a_fabric)};
    const struct CMUnitTest all[] = {
        cmocka_unit_test(test_deaths_at_every_moment_over_shm),
        cmocka_unit_test(test_deaths_at_every_moment_over_ucx),
        cmocka_unit_test(test_deaths_at_every_moment_over_the_adversary),
    };
#ifdef __SANITIZE_THREAD__
    (void)one, (void)all, (void)argc, (void)argv;
    printf("ranks are processes here, of which ThreadSanitizer sees one at a time: not run\n");
    return 0;
#else
    fabric = argc > 1 ? argv[1] : NULL;
    return fabric != NULL ? cmocka_run_group_tests(one, NULL, NULL)
                          : cmocka_run_group_tests(all, NULL, NULL);
#endif
}
