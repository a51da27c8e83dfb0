/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A peer writes its own slots and nothing else, whatever it claims: bounds that it changes, keys
 * that it took from another rank. Its own connection ends; the others do not notice.
 */
#include <string.h>

#include "tests/unit/cmocka_all.h"

#if NEP_HAVE_VERBS
#include "tests/unit/verbs/world.h"

/* Rank 0 forges, rank 1 is attacked, rank 2 is whose slots are meant. */
enum { FORGER, VICTIM, OTHER, NUM };

static void (*forge)(struct seat *seat, struct nep_put *put);

static struct nep_verbs_remote *victim_of(struct seat *seat)
{
    return &seat_verbs(seat)->windows[WINDOW].remotes[VICTIM];
}

/* All of the window is this rank's, it says, with the keys that it has. */
static void claim_all(struct seat *seat, struct nep_put *put)
{
    struct nep_verbs_remote *remote = victim_of(seat);
    (void)put;
    remote->num_ways = 1;
    remote->ways[0].offset = 0;
    remote->ways[0].bytes = remote->bytes;
}

/* The same, with the keys of rank 2's own way there, which all ranks were told. */
static void steal_keys(struct seat *seat, struct nep_put *put)
{
    claim_all(seat, put);
    struct seat *victim = &seat->world->seats[VICTIM];
    const struct nep_verbs_window *window = &seat_verbs(victim)->windows[WINDOW];
    for (uint32_t g = 0; g < window->num_gates; g++) {
        const struct nep_verbs_gate *gate = &window->gates[g];
        if (gate->rank == OTHER && gate->offset <= put->offset &&
            put->offset + put->len <= gate->offset + gate->bytes) {
            victim_of(seat)->ways[0].rkeys = gate->keys;
        }
    }
}

/* The window's own registration is for leaving, not for writing to. */
static void use_whole(struct seat *seat, struct nep_put *put)
{
    claim_all(seat, put);
    struct seat *victim = &seat->world->seats[VICTIM];
    static uint32_t keys[NEP_VERBS_MAX_QPS];
    for (uint32_t q = 0; q < seat_verbs(seat)->num_qps; q++) {
        keys[q] = seat_verbs(victim)->windows[WINDOW].mrs[q % seat_verbs(seat)->num_paths]->rkey;
    }
    victim_of(seat)->ways[0].rkeys = keys;
}

static void put_into_others_slot(struct seat *seat)
{
    const struct nep_transport_ops *ops = seat->transport->ops;
    struct nep_put put = {.dst = VICTIM,
                          .window = WINDOW,
                          .offset = COUNTERS_BYTES + (size_t)OTHER * SLOTS * SLOT_BYTES,
                          .src = world_source(seat, VICTIM, 0),
                          .len = 300,
                          .imm = world_imm(0)};
    uint64_t number;
    memset(world_source(seat, VICTIM, 0), 0xbd, put.len);
    /* An honest mistake is refused where it is made. */
    seat->num_errors += ops->put(seat->transport, &put, &number) != NEP_ERR_INVALID;
    seat->num_errors += strstr(nep_last_message(), "elsewhere") == NULL;
    forge(seat, &put);
    seat->num_errors += ops->put(seat->transport, &put, &number) != NEP_OK;
    seat->num_errors += !seat_wait_lost(seat, VICTIM);
    seat->num_errors += strstr(nep_last_message(), "remote access error") == NULL ||
                        strstr(nep_last_message(), "rank 1 is lost") == NULL;
}

static void attack(struct seat *seat)
{
    pthread_barrier_wait(&seat->world->barrier); /* all windows are made: forgers look into them */
    if (seat->rank == FORGER) {
        put_into_others_slot(seat);
    }
    pthread_barrier_wait(&seat->world->barrier);
    if (seat->rank == VICTIM) {
        const uint8_t *slot = world_landed(seat, OTHER, 0);
        for (uint32_t i = 0; i < SLOT_BYTES; i++) {
            seat->num_wrong += slot[i] != 0;
        }
        seat->num_errors += world_arrived(seat, FORGER, 0) != 0;
    }
    pthread_barrier_wait(&seat->world->barrier);
    /* The two that behave go on. */
    if (seat->rank != FORGER) {
        uint32_t other = seat->rank == VICTIM ? OTHER : VICTIM;
        seat_put_all(seat, other, 1);
        seat_take_all(seat, other, 1);
    }
    if (seat->rank == VICTIM) {
        uint64_t number;
        struct nep_put put = {.dst = FORGER, .window = WINDOW, .imm = world_imm(0)};
        (void)seat->transport->ops->put(seat->transport, &put, &number);
        seat->num_errors += !seat_wait_lost(seat, FORGER);
    }
    pthread_barrier_wait(&seat->world->barrier);
}

static void run_attack(void (*wanted)(struct seat *seat, struct nep_put *put), bool no_mw)
{
    static struct world world;
    world_prepare(&world, 2, "attack");
    fake.no_mw = no_mw;
    world.config.verbs_paths = 2;
    forge = wanted;
    world_run(&world, NUM, attack);
    world_end(&world);
}

static void test_verbs_put_beyond_the_own_slots_never_lands(void **state)
{
    (void)state;
    run_attack(claim_all, false);
    run_attack(claim_all, true);
}

static void test_verbs_key_of_another_rank_opens_nothing(void **state)
{
    (void)state;
    run_attack(steal_keys, false);
}

static void test_verbs_key_of_the_whole_window_opens_nothing(void **state)
{
    (void)state;
    run_attack(use_whole, false);
    run_attack(use_whole, true);
}

/* ---- what grants may say -------------------------------------------------------------------- */

static void grant_badly(struct seat *seat)
{
    const struct nep_transport_ops *ops = seat->transport->ops;
    struct nep_grant grants[NEP_MAX_GRANTS + 1];
    for (uint32_t i = 0; i <= NEP_MAX_GRANTS; i++) {
        grants[i] = (struct nep_grant){0, (uint64_t)i * 64, 64};
    }
    seat->num_errors +=
        ops->window_grant(seat->transport, 3, grants, NEP_MAX_GRANTS + 1) != NEP_ERR_INVALID;
    seat->num_errors += ops->window_grant(seat->transport, 64, grants, 1) != NEP_ERR_INVALID;
    grants[0].rank = seat->world->num_ranks;
    seat->num_errors += ops->window_grant(seat->transport, 3, grants, 1) != NEP_ERR_INVALID;
    grants[0] = (struct nep_grant){0, 64, UINT64_MAX - 32};
    seat->num_errors += ops->window_grant(seat->transport, 3, grants, 1) != NEP_ERR_INVALID;
    grants[0].bytes = 0;
    seat->num_errors += ops->window_grant(seat->transport, 3, grants, 1) != NEP_ERR_INVALID;
    /* One that does not fit fails the window, on all ranks, with its sentence. */
    grants[0] = (struct nep_grant){1 - seat->rank, 4096, 64};
    seat->num_errors += ops->window_grant(seat->transport, 3, grants, 1) != NEP_OK;
    void *base = NULL;
    seat->num_errors += ops->window_create(seat->transport, 3, &base, 4100) != NEP_ERR_INVALID;
    seat->num_errors += strstr(nep_last_message(), "ends at 4160") == NULL;
    /* What failed is forgotten: the next window of this number is open to all. */
    base = NULL;
    seat->num_errors += ops->window_create(seat->transport, 3, &base, 4096) != NEP_OK;
    seat->num_errors += seat_verbs(seat)->windows[3].is_guarded;
}

static void test_verbs_grants_that_make_no_sense_are_refused(void **state)
{
    (void)state;
    static struct world world;
    world_prepare(&world, 2, "grants");
    world_run(&world, 2, grant_badly);
    world_end(&world);
}

static void check_open(struct seat *seat)
{
    seat->num_errors += seat_verbs(seat)->windows[WINDOW].is_guarded;
    seat_put(seat, 1 - seat->rank, 0, 0);
    seat->num_errors += !seat_wait(seat, 1 - seat->rank, 0, 1);
}

static void test_verbs_guard_can_be_turned_off(void **state)
{
    (void)state;
    static struct world world;
    world_prepare(&world, 2, "unguarded");
    world.config.verbs_guard = false;
    world_run(&world, 2, check_open);
    assert_int_equal(fake.num_mws, 1 + 2); /* the one per path that is tried */
    world_end(&world);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_verbs_put_beyond_the_own_slots_never_lands),
        cmocka_unit_test(test_verbs_key_of_another_rank_opens_nothing),
        cmocka_unit_test(test_verbs_key_of_the_whole_window_opens_nothing),
        cmocka_unit_test(test_verbs_grants_that_make_no_sense_are_refused),
        cmocka_unit_test(test_verbs_guard_can_be_turned_off),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

#else
#include "tests/unit/verbs/absent.h"
#endif
