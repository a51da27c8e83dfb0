/* SPDX-License-Identifier: Apache-2.0 */
/* The ring of events under one and many writers; the clocks' arithmetic; ticks and names. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/path.h"
#include "dispatch/events.h"
#include "tests/unit/cmocka_all.h"
#include "transport/clocks.h"

static void test_events_keep_the_last_in_order(void **state)
{
    struct nep_event_ring *ring = nep_events_create(100);
    struct nep_event_copy events[128];
    uint64_t lost = 0;
    (void)state;
    assert_non_null(ring);
    assert_int_equal(ring->num, 128);
    assert_int_equal(nep_events_read(ring, events, 128, &lost), 0);
    for (uint64_t i = 0; i < 1000; i++) {
        nep_event_put(ring, NEP_EVENT_POST, (uint32_t)i % 64, (uint32_t)i, i * 3, ~i);
    }
    assert_int_equal(nep_events_read(ring, events, 128, &lost), 128);
    assert_int_equal(lost, 1000 - 128);
    for (uint64_t i = 0; i < 128; i++) {
        uint64_t number = 1000 - 128 + i;
        assert_int_equal(events[i].op, number * 3);
        assert_int_equal(events[i].value, ~number);
        assert_int_equal(events[i].peer, number);
        assert_int_equal(events[i].ep, number % 64);
        assert_true(i == 0 || events[i].ticks >= events[i - 1].ticks);
    }
    /* No more than asked for, and the last ones. */
    lost = 0;
    assert_int_equal(nep_events_read(ring, events, 3, &lost), 3);
    assert_int_equal(events[2].op, 999 * 3);
    free(ring);
}

static void test_events_ring_of_none_keeps_none(void **state)
{
    struct nep_event_ring *ring = nep_events_create(0);
    struct nep_event_copy event;
    uint64_t lost = 0;
    (void)state;
    nep_event_put(ring, NEP_EVENT_POST, 0, 0, 0, 0);
    assert_int_equal(nep_events_read(ring, &event, 1, &lost), 0);
    assert_int_equal(lost, 0);
    free(ring);
}

static void test_events_move_with_their_times(void **state)
{
    struct nep_event_ring *from = nep_events_create(8), *to = nep_events_create(8);
    struct nep_event_copy a[8], b[8];
    uint64_t lost = 0;
    (void)state;
    for (uint64_t i = 0; i < 5; i++) {
        nep_event_put(from, NEP_EVENT_ARRIVAL, 1, 2, i, i);
    }
    nep_events_move(from, to, (const uint32_t[]){7, 8, 9});
    assert_int_equal(nep_events_read(from, a, 8, &lost), 5);
    assert_int_equal(nep_events_read(to, b, 8, &lost), 5);
    for (int i = 0; i < 5; i++) {
        assert_true(a[i].ticks == b[i].ticks && b[i].peer == 9 && a[i].op == b[i].op &&
                    a[i].value == b[i].value);
    }
    free(from);
    free(to);
}

enum { WRITERS = 4, PUTS = 40000 };

static void *writer(void *arg)
{
    struct nep_event_ring *ring = arg;
    for (uint64_t i = 0; i < PUTS; i++) {
        /* A reader can tell halves of two events: all three words say the same. */
        nep_event_put_at(ring, i, NEP_EVENT_POST, 0, (uint32_t)i, i, i);
    }
    return NULL;
}

static void test_events_are_whole_under_many_writers(void **state)
{
    struct nep_event_ring *ring = nep_events_create(16);
    pthread_t threads[WRITERS];
    uint64_t num = 0;
    (void)state;
    for (int t = 0; t < WRITERS; t++) {
        assert_int_equal(pthread_create(&threads[t], NULL, writer, ring), 0);
    }
    while (atomic_load(&ring->next) < (uint64_t)WRITERS * PUTS) {
        struct nep_event_copy events[16];
        uint64_t lost = 0;
        uint32_t found = nep_events_read(ring, events, 16, &lost);
        for (uint32_t i = 0; i < found; i++) {
            assert_true(events[i].ticks == events[i].op && events[i].op == events[i].value);
            assert_int_equal(events[i].peer, events[i].op & 65535);
        }
        num += found;
    }
    for (int t = 0; t < WRITERS; t++) {
        pthread_join(threads[t], NULL);
    }
    print_message("%llu events read while they were written\n", (unsigned long long)num);
    free(ring);
}

static void test_clocks_enclose_the_difference(void **state)
{
    uint64_t random = 12345;
    (void)state;
    for (int round = 0; round < 1000; round++) {
        struct nep_clock_card mine, first;
        struct nep_clock clock;
        int64_t ahead = (int64_t)(random % 2000000000) - 1000000000;
        uint64_t now = 5000000000;
        for (int i = 0; i < NEP_CLOCK_ROUNDS; i++) {
            uint64_t delays[4];
            for (int d = 0; d < 4; d++) {
                random = random * 6364136223846793005ull + 1442695040888963407ull;
                delays[d] = (random >> 33) % 300000;
            }
            uint64_t a = now + delays[0], b = now + delays[1]; /* they enter */
            uint64_t all = a > b ? a : b;
            first.entered_ns[i] = a;
            mine.entered_ns[i] = b + (uint64_t)ahead;
            first.left_ns[i] = all + delays[2];
            mine.left_ns[i] = all + delays[3] + (uint64_t)ahead;
            now = all + 1000000;
        }
        nep_clocks_enclose(&mine, &first, &clock);
        assert_true(llabs(clock.ahead_ns - ahead) <= (int64_t)clock.error_ns);
        assert_true(clock.error_ns <= 300001);
    }
}

static void test_ticks_become_nanoseconds(void **state)
{
    struct nep_tick_pair a = {1000, 500, 0}, b = {3000, 1500, 0};
    (void)state;
    assert_int_equal(nep_ticks_to_ns(1000, &a, &b), 500);
    assert_int_equal(nep_ticks_to_ns(2000, &a, &b), 1000);
    assert_int_equal(nep_ticks_to_ns(3200, &a, &b), 1600);
    assert_int_equal(nep_ticks_to_ns(1010, &a, &a), 510);
    uint64_t before = nep_ticks();
    usleep(1000);
    assert_true(nep_ticks() > before);
}

static void test_path_letters_are_replaced(void **state)
{
    char text[64], expected[64];
    (void)state;
    nep_path_expand("a%r-%p.%q%", 7, text, sizeof text);
    snprintf(expected, sizeof expected, "a7-%ld.%%q%%", (long)getpid());
    assert_string_equal(text, expected);
    nep_path_expand("%r", UINT32_MAX, text, sizeof text);
    assert_string_equal(text, "%r");
    nep_path_expand("0123456789", 0, text, 5);
    assert_string_equal(text, "0123");
    nep_path_expand("01%p", 0, text, 4);
    assert_int_equal(strlen(text), 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_events_keep_the_last_in_order),
        cmocka_unit_test(test_events_ring_of_none_keeps_none),
        cmocka_unit_test(test_events_move_with_their_times),
        cmocka_unit_test(test_events_are_whole_under_many_writers),
        cmocka_unit_test(test_clocks_enclose_the_difference),
        cmocka_unit_test(test_ticks_become_nanoseconds),
        cmocka_unit_test(test_path_letters_are_replaced),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
