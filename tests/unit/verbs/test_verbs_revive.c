/* SPDX-License-Identifier: Apache-2.0 */
/*
 * QPs that die and come back while their communicator lives: links are cut and mended at random
 * moments under traffic, with datagrams lost, over one path and several. Nothing may be lost or
 * damaged; at the end every QP lives and carries puts. And what cannot come back is given up.
 */
#include <string.h>
#include <sys/socket.h>

#include "tests/unit/cmocka_all.h"

#if NEP_HAVE_VERBS
#include "tests/unit/verbs/world.h"

static struct {
    pthread_t thread;
    uint64_t seed;
    uint32_t devices; /* that may be cut */
    uint32_t num_cuts;
    atomic_bool is_over;
    atomic_bool has_hit; /* a QP of rank 0 came back, and so one of rank 1 */
    bool is_last;        /* rank 0 decides for both */
} flapping;

static void cut(uint32_t devices)
{
    pthread_mutex_lock(&fake.lock);
    fake.cut = devices;
    pthread_mutex_unlock(&fake.lock);
}

static void *flap(void *arg)
{
    uint64_t random = flapping.seed;
    (void)arg;
    /* at least so often, and until it has hit: a slow machine may be idle at every cut */
    for (uint32_t i = 0; i < flapping.num_cuts || (!atomic_load(&flapping.has_hit) && i < 400);
         i++) {
        usleep((useconds_t)(world_random(&random) % 60000));
        uint32_t mask = (uint32_t)world_random(&random) & flapping.devices;
        cut(mask != 0 ? mask : flapping.devices);
        usleep((useconds_t)(world_random(&random) % 40000));
        cut(0);
    }
    atomic_store(&flapping.is_over, true);
    return NULL;
}

/* All slots to the other rank, and all of its slots here, with their bytes. */
static void exchange(struct seat *seat, uint64_t round, uint64_t *seen)
{
    uint32_t other = 1 - seat->rank;
    seat_put_all(seat, other, round);
    seat->num_errors += !seat_wait_completed(seat, other);
    pthread_barrier_wait(&seat->world->barrier); /* all that was sent is acknowledged */
    for (uint32_t slot = 0; slot < SLOTS && seat->num_errors == 0; slot++) {
        seat->num_errors += !seat_wait(seat, other, slot, seen[slot] + 1);
        seat->num_wrong += seat_wrong(seat, other, slot, round);
    }
    if (seat->num_errors != 0) {
        fprintf(stderr, "rank %u: round %u did not end\n", seat->rank, (uint32_t)round);
    }
    pthread_barrier_wait(&seat->world->barrier);
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        uint64_t now = world_arrived(seat, other, slot);
        seat->num_repeats += now > seen[slot] + 1;
        seen[slot] = now;
    }
    pthread_barrier_wait(&seat->world->barrier); /* before the next round's arrive */
}

static uint32_t num_alive(struct seat *seat)
{
    struct nep_verbs_peer *peer = &seat_verbs(seat)->peers[1 - seat->rank];
    pthread_mutex_lock(&peer->lock);
    uint32_t num = peer->num_alive;
    pthread_mutex_unlock(&peer->lock);
    return num;
}

static bool all_alive(struct seat *seat)
{
    uint64_t deadline_ns = nep_deadline_ns(60 * NEP_S);
    while (num_alive(seat) < seat_verbs(seat)->num_qps && nep_left_ns(deadline_ns) > 0) {
        seat->transport->ops->progress(seat->transport);
        usleep(1000);
    }
    return num_alive(seat) == seat_verbs(seat)->num_qps;
}

static void flapped(struct seat *seat)
{
    uint64_t seen[SLOTS] = {0}, round = 0;
    struct nep_verbs *verbs = seat_verbs(seat);
    struct nep_verbs_peer *peer = &verbs->peers[1 - seat->rank];
    for (bool is_last = false; !is_last; round++) {
        exchange(seat, round, seen);
        if (seat->rank == 0) {
            atomic_store(&flapping.has_hit, atomic_load(&verbs->revivals) > 0);
            flapping.is_last = atomic_load(&flapping.is_over);
        }
        pthread_barrier_wait(&seat->world->barrier);
        is_last = flapping.is_last;
        pthread_barrier_wait(&seat->world->barrier);
    }
    seat->num_errors += !all_alive(seat);
    pthread_barrier_wait(&seat->world->barrier);
    uint64_t before[NEP_VERBS_MAX_QPS];
    pthread_mutex_lock(&peer->lock);
    for (uint32_t q = 0; q < verbs->num_qps; q++) {
        before[q] = peer->qps[q].posted;
    }
    pthread_mutex_unlock(&peer->lock);
    for (uint64_t end = round + 12; round < end; round++) {
        exchange(seat, round, seen);
    }
    for (uint32_t q = 0; q < verbs->num_qps; q++) {
        seat->num_errors += peer->qps[q].posted == before[q]; /* is used again */
    }
    seat->num_errors += atomic_load(&verbs->revivals) == 0;
    print_message("rank %u: %u rounds, %u QPs came back, %u announcements repeated\n", seat->rank,
                  (uint32_t)round, (uint32_t)atomic_load(&verbs->revivals), seat->num_repeats);
    pthread_barrier_wait(&seat->world->barrier);
}

static void run_flapped(uint32_t paths, uint32_t qps, uint32_t devices, uint32_t num_cuts,
                        uint32_t lost_datagrams)
{
    static struct world world;
    world_prepare(&world, 4, "flapped");
    fake.lost_datagrams = lost_datagrams;
    fake.is_loopback = true; /* they may ask, and learn that both live */
    world.config.verbs_revive_ns = 60 * NEP_S;
    world.config.verbs_paths = paths;
    world.config.verbs_qps = qps;
    flapping.seed = world.seed;
    flapping.devices = devices;
    flapping.num_cuts = num_cuts;
    atomic_store(&flapping.is_over, false);
    atomic_store(&flapping.has_hit, false);
    pthread_create(&flapping.thread, NULL, flap, NULL);
    world_run(&world, 2, flapped);
    pthread_join(flapping.thread, NULL);
    world_end(&world);
}

static void test_verbs_only_path_comes_back_and_nothing_is_lost(void **state)
{
    (void)state;
    run_flapped(1, 1, 1, 8, 0);
}

static void test_verbs_one_of_two_paths_comes_back_and_is_used(void **state)
{
    (void)state;
    run_flapped(2, 1, 1, 8, 0);
}

static void test_verbs_all_paths_flap_and_datagrams_are_lost(void **state)
{
    (void)state;
    run_flapped(2, 3, 15, 12, 3);
}

/* ---- what does not come back ---------------------------------------------------------------- */

static void cut_for_good(struct seat *seat)
{
    const struct nep_transport_ops *ops = seat->transport->ops;
    uint32_t other = 1 - seat->rank;
    pthread_barrier_wait(&seat->world->barrier);
    cut(1);
    seat_put(seat, other, 0, 0);
    seat->num_errors += !seat_wait_lost(seat, other);
    /* the transport holds no source bytes of a lost peer any more */
    seat->num_errors += ops->completed(seat->transport, other) != seat->last_number[other];
    pthread_barrier_wait(&seat->world->barrier);
}

static void run_cut_for_good(uint64_t revive_ns, bool no_datagrams)
{
    static struct world world;
    world_prepare(&world, 2, "cut for good");
    fake.no_datagrams = no_datagrams;
    world.config.verbs_revive_ns = revive_ns;
    world_run(&world, 2, cut_for_good);
    for (uint32_t r = 0; r < 2; r++) {
        print_message("%s\n", world.seats[r].message);
        assert_int_equal(world.seats[r].status, NEP_OK);
        assert_int_equal(world.seats[r].num_errors, 0);
        assert_non_null(strstr(world.seats[r].message, "is lost: QP"));
        assert_non_null(strstr(world.seats[r].message, "transport retry counter exceeded"));
    }
    world_end(&world);
}

static void test_verbs_path_that_stays_away_is_given_up_in_time(void **state)
{
    (void)state;
    run_cut_for_good(100 * NEP_MS, false);
}

static void test_verbs_without_datagrams_the_last_death_is_a_loss(void **state)
{
    (void)state;
    run_cut_for_good(3600 * NEP_S, true);
    run_cut_for_good(0, false);
}

/* ---- a process that ends -------------------------------------------------------------------- */

/* As when rank 1 is killed: its device says nothing any more, and nobody listens for it. */
static void end_of_one(struct seat *seat)
{
    const struct nep_transport_ops *ops = seat->transport->ops;
    uint32_t other = 1 - seat->rank;
    struct nep_verbs *verbs = seat_verbs(seat);
    seat->num_errors += verbs->paths[0].door_port == 0;
    pthread_barrier_wait(&seat->world->barrier);
    if (seat->rank == 1) {
        cut(1);
        shutdown(verbs->paths[0].door_fd, SHUT_RDWR);
    }
    pthread_barrier_wait(&seat->world->barrier);
    seat_put(seat, other, 0, 0);
    if (seat->rank == 0) {
        seat->num_errors += !seat_wait_lost(seat, other);
    }
    pthread_barrier_wait(&seat->world->barrier);
    uint64_t deadline_ns = nep_deadline_ns(60 * NEP_S);
    if (seat->rank == 1) { /* whose own question is answered: it waits for the path */
        while (num_alive(seat) > 0 && nep_left_ns(deadline_ns) > 0) {
            ops->progress(seat->transport);
            usleep(1000);
        }
        usleep(300000); /* time to ask; nothing depends on how often it does */
        seat->num_errors += ops->peer_status(seat->transport, other) != NEP_OK;
    }
    pthread_barrier_wait(&seat->world->barrier);
}

static void test_verbs_process_that_ended_is_not_waited_for(void **state)
{
    static struct world world;
    (void)state;
    world_prepare(&world, 2, "ended");
    fake.is_loopback = true;
    world.config.verbs_revive_ns = 3600 * NEP_S;
    world_run(&world, 2, end_of_one);
    for (uint32_t r = 0; r < 2; r++) {
        print_message("rank %u: %s\n", r, world.seats[r].message);
        assert_int_equal(world.seats[r].status, NEP_OK);
        assert_int_equal(world.seats[r].num_errors, 0);
    }
    assert_non_null(strstr(world.seats[0].message, "is lost: QP"));
    assert_non_null(strstr(world.seats[0].message, "its process has ended"));
    world_end(&world);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_verbs_only_path_comes_back_and_nothing_is_lost),
        cmocka_unit_test(test_verbs_one_of_two_paths_comes_back_and_is_used),
        cmocka_unit_test(test_verbs_all_paths_flap_and_datagrams_are_lost),
        cmocka_unit_test(test_verbs_path_that_stays_away_is_given_up_in_time),
        cmocka_unit_test(test_verbs_without_datagrams_the_last_death_is_a_loss),
        cmocka_unit_test(test_verbs_process_that_ended_is_not_waited_for),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
#else
#include "tests/unit/verbs/absent.h"
#endif
