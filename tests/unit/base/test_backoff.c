/* SPDX-License-Identifier: Apache-2.0 */
/* Deadlines of waits whose rank did not look all the time, on a clock that the test turns. */
#include "base/backoff.h"
#include "base/clock.h"
#include "tests/unit/cmocka_all.h"

enum { LOOK_MS = 10 };

static const uint64_t TIMEOUT_NS = 800 * NEP_MS, START_NS = 1000 * NEP_S;

struct clock {
    struct nep_backoff backoff;
    uint64_t now_ns;
};

static void begin(struct clock *clock)
{
    nep_backoff_init(&clock->backoff, TIMEOUT_NS, 0);
    clock->now_ns = START_NS;
    assert_true(nep_backoff_look(&clock->backoff, clock->now_ns));
}

/* Milliseconds from the start; whether there is time left then. */
static bool look_at(struct clock *clock, uint64_t ms)
{
    clock->now_ns = START_NS + ms * NEP_MS;
    return nep_backoff_look(&clock->backoff, clock->now_ns);
}

/* Looks every LOOK_MS until the deadline; returns when that was. */
static uint64_t look_until_over(struct clock *clock)
{
    uint64_t ms = (clock->now_ns - START_NS) / NEP_MS;
    do {
        ms += LOOK_MS;
    } while (look_at(clock, ms));
    return ms;
}

static void test_who_looks_all_the_time_waits_for_the_timeout(void **state)
{
    (void)state;
    struct clock clock;
    begin(&clock);
    assert_int_equal(look_until_over(&clock), 800);
    assert_int_equal(nep_backoff_watched_ns(&clock.backoff), TIMEOUT_NS);
}

/* Not more than an eighth: a look, if a late one. */
static void test_late_looks_move_nothing(void **state)
{
    (void)state;
    struct clock clock;
    begin(&clock);
    for (uint64_t ms = 100; ms <= 700; ms += 100) {
        assert_true(look_at(&clock, ms));
    }
    assert_false(look_at(&clock, 800));
}

static void test_gaps_move_the_deadline(void **state)
{
    (void)state;
    struct clock clock;
    begin(&clock);
    assert_true(look_at(&clock, 50));
    assert_true(look_at(&clock, 200)); /* 150 */
    assert_int_equal(nep_backoff_watched_ns(&clock.backoff), 0);
    assert_true(look_at(&clock, 250));
    assert_true(look_at(&clock, 450)); /* and 200 */
    assert_int_equal(look_until_over(&clock), 800 + 150 + 200);
    assert_int_equal(nep_backoff_watched_ns(&clock.backoff), (1150 - 450) * NEP_MS);
}

/* However many gaps: half a timeout in all. */
static void test_gaps_are_forgiven_for_half_a_timeout(void **state)
{
    (void)state;
    struct clock clock;
    begin(&clock);
    uint64_t ms = 0;
    while (look_at(&clock, ms + 150)) {
        ms += 150;
    }
    assert_int_equal(ms + 150, 1200);
}

/* A gap that outlasts everything leaves an eighth to look, once. */
static void test_after_the_longest_gap_there_is_time_to_look(void **state)
{
    (void)state;
    struct clock clock;
    begin(&clock);
    assert_true(look_at(&clock, 3600 * 1000));
    assert_int_equal(look_until_over(&clock), 3600 * 1000 + 100);
    begin(&clock);
    assert_true(look_at(&clock, 3600 * 1000));
    assert_false(look_at(&clock, 2 * 3600 * 1000));
}

/* What moves begins everything anew, at the next look that finds nothing: work is no waiting. */
static void test_progress_begins_anew(void **state)
{
    (void)state;
    struct clock clock;
    begin(&clock);
    assert_true(look_at(&clock, 1000)); /* all that is forgiven is used */
    nep_backoff_reset(&clock.backoff);
    assert_int_equal(nep_backoff_idle_ns(&clock.backoff), 0);
    assert_true(look_at(&clock, 5000));
    assert_int_equal(look_until_over(&clock), 5000 + 800);
    nep_backoff_reset(&clock.backoff);
    assert_true(look_at(&clock, 7000));
    assert_true(look_at(&clock, 7300));
    assert_int_equal(look_until_over(&clock), 7000 + 800 + 300);
}

static void test_never_stays_never(void **state)
{
    (void)state;
    struct nep_backoff backoff;
    nep_backoff_init(&backoff, UINT64_MAX, 0);
    assert_true(nep_backoff_look(&backoff, START_NS));
    assert_true(nep_backoff_look(&backoff, UINT64_MAX - 1));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_who_looks_all_the_time_waits_for_the_timeout),
        cmocka_unit_test(test_late_looks_move_nothing),
        cmocka_unit_test(test_gaps_move_the_deadline),
        cmocka_unit_test(test_gaps_are_forgiven_for_half_a_timeout),
        cmocka_unit_test(test_after_the_longest_gap_there_is_time_to_look),
        cmocka_unit_test(test_progress_begins_anew),
        cmocka_unit_test(test_never_stays_never),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
