/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What no device of a test machine can be made to do: a QP that dies with its last data delivered
 * or not, posting that fails, a peer that is gone, ports that go and come, queues that run dry.
 * After a fail-over nothing may be lost; an announcement may repeat, data may not be damaged.
 */
#include <string.h>

#include "tests/unit/cmocka_all.h"

#if NEP_HAVE_VERBS
#include "tests/unit/verbs/world.h"

enum { ROUNDS = 40, KILL_ROUND = 10 };

struct fault {
    uint32_t num_kills;
    bool deliver;
    bool enomem;
};
static struct fault fault;

static struct fake_qp *qp_to(struct seat *seat, uint32_t dst, uint32_t qp_idx)
{
    return (struct fake_qp *)seat_verbs(seat)->peers[dst].qps[qp_idx].qp;
}

/* Sets the knobs of some of rank 0's QPs to rank 1, not all of them. */
static void arm_faults(struct seat *seat)
{
    uint64_t random = seat->world->seed;
    pthread_mutex_lock(&fake.lock);
    for (uint32_t q = 0; q < fault.num_kills; q++) {
        struct fake_qp *qp = qp_to(seat, 1, q);
        int64_t after = (int64_t)(world_random(&random) % 40);
        qp->deliver_failed = fault.deliver;
        *(fault.enomem ? &qp->enomem_after : &qp->fail_after) = after;
    }
    pthread_mutex_unlock(&fake.lock);
}

/*
 * Both ranks send all slots in each round, and go on when all of the other's came. Repeats are
 * allowed after a kill, so a slot waits for its data to be those of the round: the sender changes
 * them only in the next round.
 */
static void survive(struct seat *seat)
{
    uint32_t other = 1 - seat->rank;
    uint64_t seen[SLOTS] = {0};
    for (uint64_t round = 0; round < ROUNDS; round++) {
        if (round == KILL_ROUND && seat->rank == 0) {
            arm_faults(seat);
        }
        seat_put_all(seat, other, round);
        seat->num_errors += !seat_wait_completed(seat, other);
        pthread_barrier_wait(&seat->world->barrier); /* all that was sent is acknowledged */
        for (uint32_t slot = 0; slot < SLOTS; slot++) {
            seat->num_errors += !seat_wait(seat, other, slot, seen[slot] + 1);
            seat->num_wrong += seat_wrong(seat, other, slot, round);
        }
        usleep(200);
        seat->transport->ops->progress(seat->transport);
        pthread_barrier_wait(&seat->world->barrier);
        for (uint32_t slot = 0; slot < SLOTS; slot++) {
            uint64_t now = world_arrived(seat, other, slot);
            seat->num_repeats += now > seen[slot] + 1;
            seen[slot] = now;
        }
        pthread_barrier_wait(&seat->world->barrier);
    }
    seat->num_errors += seat->transport->ops->peer_status(seat->transport, other) != NEP_OK;
    pthread_barrier_wait(&seat->world->barrier); /* who closes has left, for the other */
}

static void run_survive(uint32_t paths, uint32_t qps, struct fault wanted)
{
    static struct world world;
    world_prepare(&world, 4, "survive");
    world.config.verbs_paths = paths;
    world.config.verbs_qps = qps;
    fault = wanted;
    world_run(&world, 2, survive);
    for (uint32_t r = 0; r < 2; r++) {
        print_message("rank %u: %u announcements repeated\n", r, world.seats[r].num_repeats);
    }
    world_end(&world);
}

static void test_verbs_path_death_loses_nothing(void **state)
{
    (void)state;
    run_survive(2, 1, (struct fault){.num_kills = 1, .deliver = false});
}

static void test_verbs_lost_acknowledgement_damages_nothing(void **state)
{
    (void)state;
    run_survive(2, 1, (struct fault){.num_kills = 1, .deliver = true});
}

static void test_verbs_four_of_six_qps_die(void **state)
{
    (void)state;
    run_survive(3, 2, (struct fault){.num_kills = 4, .deliver = true});
    run_survive(3, 2, (struct fault){.num_kills = 4, .deliver = false});
}

static void test_verbs_failed_posting_moves_to_another_qp(void **state)
{
    (void)state;
    run_survive(2, 2, (struct fault){.num_kills = 3, .enomem = true});
}

/* ---- a lost peer ---------------------------------------------------------------------------- */

/* Rank 1 vanishes: its QPs go into error and it does nothing more. 0 and 2 go on. */
static void lose_one(struct seat *seat)
{
    const struct nep_transport_ops *ops = seat->transport->ops;
    if (seat->rank == 1) {
        pthread_mutex_lock(&fake.lock);
        for (uint32_t r = 0; r < 3; r += 2) {
            for (uint32_t q = 0; q < seat_verbs(seat)->num_qps; q++) {
                qp_to(seat, r, q)->state = IBV_QPS_ERR;
            }
        }
        pthread_mutex_unlock(&fake.lock);
    }
    pthread_barrier_wait(&seat->world->barrier);
    if (seat->rank != 1) {
        /* rank 2 sends nothing to 1: only the zero-byte writes of peer_status can find it out */
        for (uint32_t slot = 0; seat->rank == 0 && slot < SLOTS; slot++) {
            seat_put(seat, 1, slot, 0);
            if (ops->peer_status(seat->transport, 1) != NEP_OK) {
                break;
            }
        }
        seat->num_errors += !seat_wait_lost(seat, 1);
        seat->num_errors += ops->completed(seat->transport, 1) != seat->last_number[1];
        struct nep_put put = {.dst = 1, .window = WINDOW, .imm = world_imm(0)};
        uint64_t number = 99;
        seat->num_errors += ops->put(seat->transport, &put, &number) != NEP_ERR_PEER_LOST;
        uint32_t other = 2 - seat->rank;
        seat_put_all(seat, other, 1);
        seat_take_all(seat, other, 1);
        seat->num_errors += ops->peer_status(seat->transport, other) != NEP_OK;
    }
    pthread_barrier_wait(&seat->world->barrier);
}

static void test_verbs_lost_peer_is_named_and_others_go_on(void **state)
{
    (void)state;
    static struct world world;
    world_prepare(&world, 4, "lost peer");
    world.config.verbs_paths = 2;
    world_run(&world, 3, lose_one);
    for (uint32_t r = 0; r < 3; r += 2) {
        const char *message = world.seats[r].message;
        print_message("%s\n", message);
        assert_non_null(strstr(message, "rank 1 is lost"));
        assert_non_null(strstr(message, "transport retry counter exceeded"));
        assert_non_null(strstr(message, "QP state ERR, port ACTIVE"));
    }
    world_end(&world);
}

/* Rank 0 gives rank 1 up while puts to it are under way: they are over at once, 2 is not touched.
 */
static void give_one_up(struct seat *seat)
{
    const struct nep_transport_ops *ops = seat->transport->ops;
    if (seat->rank == 0) {
        seat_put_all(seat, 1, 0);
        ops->abandon(seat->transport, 1);
        ops->abandon(seat->transport, 1);
        ops->abandon(seat->transport, 0); /* the own rank: nothing is there */
        seat->num_errors += ops->completed(seat->transport, 1) != seat->last_number[1];
        seat->num_errors += ops->peer_status(seat->transport, 1) != NEP_ERR_PEER_LOST;
        struct nep_put put = {.dst = 1, .window = WINDOW, .imm = world_imm(0)};
        uint64_t number = 99;
        seat->num_errors += ops->put(seat->transport, &put, &number) != NEP_ERR_PEER_LOST;
    }
    pthread_barrier_wait(&seat->world->barrier);
    for (uint32_t slot = 0; slot < SLOTS && seat->rank != 1; slot++) {
        seat_put(seat, 2 - seat->rank, slot, 1);
    }
    for (uint32_t slot = 0; slot < SLOTS && seat->rank != 1; slot++) {
        seat->num_errors += !seat_wait(seat, 2 - seat->rank, slot, 1);
        seat->num_wrong += seat_wrong(seat, 2 - seat->rank, slot, 1);
    }
    pthread_barrier_wait(&seat->world->barrier);
}

static void test_verbs_abandoned_peer_is_not_waited_for(void **state)
{
    (void)state;
    static struct world world;
    world_prepare(&world, 4, "abandoned peer");
    world.config.verbs_paths = 2;
    world_run(&world, 3, give_one_up);
    world_end(&world);
}

/* ---- events --------------------------------------------------------------------------------- */

static void send_event(struct seat *seat, uint32_t path, enum ibv_event_type type, void *element)
{
    struct ibv_context *context = seat_verbs(seat)->paths[path].context;
    struct ibv_async_event event = {.event_type = type};
    if (element == NULL) {
        event.element.port_num = 1;
    } else {
        event.element.qp = element;
    }
    for (uint32_t i = 0; i < 64; i++) {
        if (fake.contexts[i] != NULL && &fake.contexts[i]->context == context &&
            write(fake.contexts[i]->events[1], &event, sizeof event) != sizeof event) {
            seat->num_errors++;
        }
    }
}

static bool becomes(atomic_bool *flag, bool wanted)
{
    for (uint32_t i = 0; i < 5000 && atomic_load(flag) != wanted; i++) {
        usleep(1000);
    }
    return atomic_load(flag) == wanted;
}

/* Queue pairs to rank 1 that still work; the progress thread changes it. */
static uint32_t num_alive(struct seat *seat)
{
    struct nep_verbs_peer *peer = &seat_verbs(seat)->peers[1];
    pthread_mutex_lock(&peer->lock);
    uint32_t num = peer->num_alive;
    pthread_mutex_unlock(&peer->lock);
    return num;
}

static void port_goes_and_comes(struct seat *seat)
{
    if (seat->rank == 0) {
        struct nep_verbs_path *path = &seat_verbs(seat)->paths[0];
        send_event(seat, 0, IBV_EVENT_PORT_ERR, NULL);
        seat->num_errors += !becomes(&path->is_down, true);
        uint64_t before = qp_to(seat, 1, 0)->qp.qp_num;
        uint64_t posted = seat_verbs(seat)->peers[1].qps[0].posted;
        seat_put_all(seat, 1, 0);
        /* all by the other path */
        seat->num_errors += seat_verbs(seat)->peers[1].qps[0].posted != posted || before == 0;
        send_event(seat, 0, IBV_EVENT_PORT_ACTIVE, NULL);
        seat->num_errors += !becomes(&path->is_down, false);
        /* Few receives left: said once, and asked for again when something comes and there are
         * enough. On both paths, since single short puts stay on one of them. */
        uint32_t watches = __atomic_load_n(&fake.num_watches, __ATOMIC_RELAXED);
        struct nep_put word = {.dst = 1, .window = WINDOW, .imm = world_imm(SLOTS)};
        uint64_t number;
        send_event(seat, 0, IBV_EVENT_SRQ_LIMIT_REACHED, qp_to(seat, 1, 0));
        send_event(seat, 1, IBV_EVENT_SRQ_LIMIT_REACHED, qp_to(seat, 1, 1));
        for (uint32_t i = 0;
             i < 5000 && __atomic_load_n(&fake.num_watches, __ATOMIC_RELAXED) == watches; i++) {
            seat->num_errors +=
                seat->transport->ops->put(seat->transport, &word, &number) != NEP_OK;
            usleep(1000);
        }
        uint32_t again = __atomic_load_n(&fake.num_watches, __ATOMIC_RELAXED) - watches;
        seat->num_errors += again != 1 && again != 2;
        /* a QP that the device declares dead: the other one carries on */
        send_event(seat, 0, IBV_EVENT_QP_FATAL, qp_to(seat, 1, 0));
        for (uint32_t i = 0; i < 5000 && num_alive(seat) == 2; i++) {
            usleep(1000);
        }
        seat->num_errors += num_alive(seat) != 1;
        /* a device that is dead, with all that is left on it */
        send_event(seat, 1, IBV_EVENT_DEVICE_FATAL, NULL);
        for (uint32_t i = 0; i < 5000 && num_alive(seat) != 0; i++) {
            usleep(1000);
        }
        seat->num_errors +=
            seat->transport->ops->peer_status(seat->transport, 1) != NEP_ERR_PEER_LOST;
        pthread_barrier_wait(&seat->world->barrier);
        return;
    }
    seat_take_all(seat, 0, 0);
    pthread_barrier_wait(&seat->world->barrier); /* leaving early would end the tale */
}

static void test_verbs_events_are_acted_on(void **state)
{
    (void)state;
    static struct world world;
    world_prepare(&world, 4, "events");
    world.config.verbs_paths = 2;
    world_run(&world, 2, port_goes_and_comes);
    world_end(&world);
}

/* ---- leaving -------------------------------------------------------------------------------- */

/* Rank 0 closes at once after its puts; rank 1 must get them all, and hear of the farewell. */
static void leave_early(struct seat *seat)
{
    if (seat->rank == 0) {
        seat_put_all(seat, 1, 0);
        return; /* closes */
    }
    usleep(20000);
    seat_take_all(seat, 0, 0);
    seat->num_errors += !seat_wait_lost(seat, 0);
    seat->num_errors += strstr(seat->message, "rank 0 has left") == NULL;
    struct nep_put put = {.dst = 0, .window = WINDOW, .imm = world_imm(0)};
    uint64_t number = 0;
    seat->num_errors += seat->transport->ops->put(seat->transport, &put, &number) != NEP_OK;
    seat->num_errors += seat->transport->ops->completed(seat->transport, 0) < number;
}

static void test_verbs_close_delivers_and_says_farewell(void **state)
{
    (void)state;
    static struct world world;
    world_prepare(&world, 2, "leaving");
    world.config.verbs_depth = 8;
    world_run(&world, 2, leave_early);
    world_end(&world);
}

/* ---- set-up that fails ---------------------------------------------------------------------- */

/* Every call that makes something fails once: all ranks are told, and nothing stays behind. */
static void test_verbs_failed_set_up_leaves_nothing(void **state)
{
    (void)state;
    static struct world world;
    uint32_t num_refused = 0;
    for (int64_t call = 0; call < 500; call++) {
        fake_reset(1);
        fake.fail_call = call;
        world_config(&world.config);
        world.config.verbs_qps = 2;
        world_run(&world, 2, NULL);
        bool was_reached = fake.fail_call < 0;
        for (uint32_t r = 0; r < 2; r++) {
            enum nep_status status = world.seats[r].status;
            assert_int_equal(status, world.seats[1 - r].status);
            assert_true(status == NEP_OK || strlen(world.seats[r].message) > 20);
        }
        num_refused += world.seats[0].status != NEP_OK;
        if (fake.num_live != 0) {
            fail_msg("call %d failed: %d things stayed; %s", (int)call, (int)fake.num_live,
                     world.seats[0].message);
        }
        world_free(&world);
        if (!was_reached) {
            print_message("%u calls failed, %u of them refused\n", (uint32_t)call, num_refused);
            assert_true(num_refused >= 30);
            return;
        }
    }
    fail_msg("the calls do not end");
}

/* ---- a device that is taken away ------------------------------------------------------------ */

static void lose_device(struct seat *seat)
{
    if (seat->rank == 0) {
        struct nep_verbs_path *path = &seat_verbs(seat)->paths[1];
        pthread_mutex_lock(&fake.lock);
        for (uint32_t i = 0; i < 64; i++) {
            if (fake.contexts[i] != NULL && &fake.contexts[i]->context == path->context) {
                close(fake.contexts[i]->events[1]); /* the reading end hangs up */
                fake.contexts[i]->events[1] = -1;
            }
        }
        pthread_mutex_unlock(&fake.lock);
        seat->num_errors += !becomes(&path->is_dead, true);
    }
    pthread_barrier_wait(&seat->world->barrier);
    uint32_t other = 1 - seat->rank;
    seat_put_all(seat, other, 0);
    seat_take_all(seat, other, 0);
    pthread_barrier_wait(&seat->world->barrier);
}

static void test_verbs_device_that_hangs_up_is_left(void **state)
{
    (void)state;
    static struct world world;
    world_prepare(&world, 4, "device gone");
    world.config.verbs_paths = 2;
    world_run(&world, 2, lose_device);
    world_end(&world);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_verbs_path_death_loses_nothing),
        cmocka_unit_test(test_verbs_lost_acknowledgement_damages_nothing),
        cmocka_unit_test(test_verbs_four_of_six_qps_die),
        cmocka_unit_test(test_verbs_failed_posting_moves_to_another_qp),
        cmocka_unit_test(test_verbs_lost_peer_is_named_and_others_go_on),
        cmocka_unit_test(test_verbs_abandoned_peer_is_not_waited_for),
        cmocka_unit_test(test_verbs_events_are_acted_on),
        cmocka_unit_test(test_verbs_close_delivers_and_says_farewell),
        cmocka_unit_test(test_verbs_failed_set_up_leaves_nothing),
        cmocka_unit_test(test_verbs_device_that_hangs_up_is_left),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
#else
#include "tests/unit/verbs/absent.h"
#endif
