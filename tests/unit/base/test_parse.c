/* SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "base/config.h"
#include "tests/unit/cmocka_all.h"

static void test_parse_time_units_are_exact(void **state)
{
    (void)state;
    const struct {
        const char *text;
        uint64_t ns;
    } cases[] = {
        {"0s", 0},
        {"1ns", 1},
        {"200us", 200000},
        {"100ms", 100000000},
        {"1.5s", 1500000000},
        {"0.000000001s", 1},
        {"2m", 120 * NEP_S},
        {"2min", 120 * NEP_S},
        {"1h", 3600 * NEP_S},
        {"100S", 100 * NEP_S},
        {"18446744073709551615ns", UINT64_MAX},
        {"inf", UINT64_MAX},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint64_t ns = 77;
        assert_int_equal(nep_parse_time_ns(cases[i].text, &ns), NEP_OK);
        assert_true(ns == cases[i].ns);
    }
}

static void test_parse_time_nonsense_is_refused(void **state)
{
    (void)state;
    const char *const cases[] = {"",
                                 "10",
                                 "s",
                                 "-1s",
                                 "+1s",
                                 "1.s",
                                 ".5s",
                                 "1,5s",
                                 "1 s",
                                 "0x10s",
                                 "nan",
                                 "1e3s",
                                 "1.5ns",
                                 "10sec",
                                 "1s ",
                                 "infinity",
                                 "1.0000000001s",
                                 "18446744073709551616ns",
                                 "584542046091s",
                                 "99999999999h"};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint64_t ns = 77;
        if (nep_parse_time_ns(cases[i], &ns) != NEP_ERR_INVALID) {
            fail_msg("'%s' was taken as %llu ns", cases[i], (unsigned long long)ns);
        }
        assert_true(ns == 77); /* outputs on success only */
    }
}

static void test_parse_bytes_units_are_exact(void **state)
{
    (void)state;
    const struct {
        const char *text;
        uint64_t bytes;
    } cases[] = {{"0", 0},       {"4096", 4096},     {"64k", 65536},
                 {"64K", 65536}, {"1.5M", 1572864},  {"2GiB", 2ull << 30},
                 {"0.5k", 512},  {"1T", 1ull << 40}, {"18446744073709551615", UINT64_MAX},
                 {"7B", 7},      {"3mb", 3ull << 20}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint64_t bytes = 77;
        assert_int_equal(nep_parse_bytes(cases[i].text, &bytes), NEP_OK);
        assert_true(bytes == cases[i].bytes);
    }
    const char *const wrong[] = {"",
                                 "k",
                                 "-1",
                                 "1.5",
                                 "0.3k",
                                 "1kk",
                                 "12 k",
                                 "0x",
                                 "1e3",
                                 "inf",
                                 "auto",
                                 "16777216T",
                                 "18446744073709551616"};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        uint64_t bytes = 77;
        if (nep_parse_bytes(wrong[i], &bytes) != NEP_ERR_INVALID) {
            fail_msg("'%s' was taken as %llu bytes", wrong[i], (unsigned long long)bytes);
        }
        assert_true(bytes == 77);
    }
}

static void test_parse_format_comes_back_equal(void **state)
{
    (void)state;
    const uint64_t values[] = {0,       1,          999,        1000,          NEP_MS,
                               NEP_S,   1500000000, 1500000001, 1024,          1536,
                               1 << 20, 1u << 31,   3ull << 40, UINT64_MAX - 1};
    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++) {
        char text[64];
        uint64_t back = 1;
        nep_format_time_ns(values[i], text, sizeof text);
        assert_int_equal(nep_parse_time_ns(text, &back), NEP_OK);
        assert_true(back == values[i]);
        nep_format_bytes(values[i], text, sizeof text);
        assert_int_equal(nep_parse_bytes(text, &back), NEP_OK);
        assert_true(back == values[i]);
    }
}

static void test_parse_host_port_splits_and_refuses(void **state)
{
    (void)state;
    char host[16];
    uint16_t port;
    assert_int_equal(nep_parse_host_port("node0:29600", "x", host, sizeof host, &port), NEP_OK);
    assert_string_equal(host, "node0");
    assert_int_equal(port, 29600);
    assert_int_equal(nep_parse_host_port("[fe80::1]:65535", "x", host, sizeof host, &port), NEP_OK);
    assert_string_equal(host, "fe80::1");
    assert_int_equal(port, 65535);
    const char *const wrong[] = {
        "",         "node0",    "node0:",     ":80",   "node0:0",  "node0:65536",
        "node0:-1", "node0:1x", "fe80::1:80", "[]:80", "node0: 1", "node0:99999999999999999999"};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        assert_int_equal(nep_parse_host_port(wrong[i], "the address", host, sizeof host, &port),
                         NEP_ERR_INVALID);
        assert_non_null(strstr(nep_last_message(), "the address"));
    }
    /* 15 characters fit into 16 bytes, 16 do not. */
    assert_int_equal(nep_parse_host_port("fifteen-letters:1", "x", host, sizeof host, &port),
                     NEP_OK);
    assert_int_equal(nep_parse_host_port("sixteen--letters:1", "x", host, sizeof host, &port),
                     NEP_ERR_INVALID);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_parse_time_units_are_exact),
        cmocka_unit_test(test_parse_time_nonsense_is_refused),
        cmocka_unit_test(test_parse_bytes_units_are_exact),
        cmocka_unit_test(test_parse_format_comes_back_equal),
        cmocka_unit_test(test_parse_host_port_splits_and_refuses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
