/* SPDX-License-Identifier: Apache-2.0 */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "base/backoff.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status.h"
#include "tests/unit/cmocka_all.h"

struct shape {
    size_t size;
    uint32_t old_field;
    uint32_t new_field;
};

struct newer_shape {
    struct shape known;
    uint64_t tail;
};

static void test_status_message_belongs_to_thread_and_is_cut(void **state)
{
    (void)state;
    char text[4000];
    memset(text, 'm', sizeof text);
    text[sizeof text - 1] = '\0';
    assert_int_equal(nep_fail(NEP_ERR_BUSY, "%s", text), NEP_ERR_BUSY);
    assert_true(strlen(nep_last_message()) < 1024);
    nep_fail(NEP_ERR_IO, "slot %d", 3);
    assert_int_equal(nep_fail_prefix(NEP_ERR_IO, "ep %d: ", 7), NEP_ERR_IO);
    assert_string_equal(nep_last_message(), "ep 7: slot 3");
    /* A message that quotes the last one. */
    nep_fail(NEP_ERR_IO, "again: %s", nep_last_message());
    assert_string_equal(nep_last_message(), "again: ep 7: slot 3");
}

static void *fail_elsewhere(void *arg)
{
    nep_fail(NEP_ERR_IO, "elsewhere");
    return arg;
}

static void test_status_other_thread_leaves_message_alone(void **state)
{
    (void)state;
    pthread_t thread;
    nep_fail(NEP_ERR_IO, "here");
    assert_int_equal(pthread_create(&thread, NULL, fail_elsewhere, NULL), 0);
    pthread_join(thread, NULL);
    assert_string_equal(nep_last_message(), "here");
}

static void test_struct_copy_takes_older_and_refuses_unknown_tail(void **state)
{
    (void)state;
    struct shape out,
        older = {.size = offsetof(struct shape, new_field), .old_field = 5, .new_field = 0xdead};
    assert_int_equal(nep_struct_copy(&out, sizeof out, &older, 12, "shape"), NEP_OK);
    assert_int_equal(out.old_field, 5);
    assert_int_equal(out.new_field, 0);
    assert_true(out.size == sizeof out);
    struct newer_shape newer = {.known = {.size = sizeof newer, .old_field = 1, .new_field = 2}};
    assert_int_equal(nep_struct_copy(&out, sizeof out, &newer, 12, "shape"), NEP_OK);
    assert_int_equal(out.new_field, 2);
    newer.tail = 1ull << 40;
    assert_int_equal(nep_struct_copy(&out, sizeof out, &newer, 12, "shape"), NEP_ERR_UNSUPPORTED);
    older.size = 4;
    assert_int_equal(nep_struct_copy(&out, sizeof out, &older, 12, "shape"), NEP_ERR_INVALID);
    assert_int_equal(nep_struct_copy(&out, sizeof out, NULL, 12, "shape"), NEP_ERR_INVALID);
    assert_non_null(strstr(nep_last_message(), "shape is NULL"));
}

static void test_status_names_are_all_different(void **state)
{
    (void)state;
    const int all[] = {0, -1, -2, -3, -4, -5, -6, -7, -8, -20, -30, -31, -32, -40};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        assert_int_equal(strncmp(nep_status_name(all[i]), "NEP_", 4), 0);
        for (size_t j = 0; j < i; j++) {
            assert_string_not_equal(nep_status_name(all[i]), nep_status_name(all[j]));
        }
    }
    assert_string_equal(nep_status_name((enum nep_status) - 99), "unknown status");
}

static void test_version_text_is_the_number(void **state)
{
    (void)state;
    char text[32];
    snprintf(text, sizeof text, "%u.%u.%u", nep_version() / 10000, nep_version() / 100 % 100,
             nep_version() % 100);
    assert_string_equal(nep_version_string(), text);
}

static void test_backoff_ends_at_deadline_and_says_slow(void **state)
{
    (void)state;
    const uint32_t spins[] = {0, 100};
    for (int i = 0; i < 2; i++) {
        struct nep_backoff backoff;
        uint64_t start = nep_now_ns();
        bool was_slow = false;
        nep_backoff_init(&backoff, 40 * NEP_MS, spins[i]);
        while (nep_backoff_pause(&backoff)) {
            was_slow |= backoff.slow;
        }
        was_slow |= backoff.slow; /* a loaded machine may give it one look only */
        assert_true(nep_now_ns() - start >= 40 * NEP_MS);
        assert_true(was_slow);
        assert_true(nep_backoff_idle_ns(&backoff) >= 40 * NEP_MS);
    }
}

static void test_deadline_saturates(void **state)
{
    (void)state;
    assert_true(nep_deadline_ns(UINT64_MAX) == UINT64_MAX);
    assert_true(nep_left_ns(UINT64_MAX) > UINT64_MAX / 2);
    assert_true(nep_left_ns(1) == 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_status_message_belongs_to_thread_and_is_cut),
        cmocka_unit_test(test_status_other_thread_leaves_message_alone),
        cmocka_unit_test(test_struct_copy_takes_older_and_refuses_unknown_tail),
        cmocka_unit_test(test_status_names_are_all_different),
        cmocka_unit_test(test_version_text_is_the_number),
        cmocka_unit_test(test_backoff_ends_at_deadline_and_says_slow),
        cmocka_unit_test(test_deadline_saturates),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
