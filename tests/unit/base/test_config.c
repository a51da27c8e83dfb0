/* SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/config.h"
#include "base/log.h"
#include "tests/unit/cmocka_all.h"

static void assert_says(const char *part)
{
    if (strstr(nep_last_message(), part) == NULL) {
        fail_msg("'%s' does not say '%s'", nep_last_message(), part);
    }
}

static void test_config_defaults_are_the_tables(void **state)
{
    (void)state;
    const char *const nothing[] = {"PATH=/bin", "HOME=/", NULL};
    struct nep_config config;
    memset(&config, 0xa5, sizeof config);
    assert_int_equal(nep_config_load_from(&config, nothing), NEP_OK);
    assert_true(config.timeout_ns == 100 * NEP_S);
    assert_string_equal(config.log, "warn");
    assert_string_equal(config.intra, "auto");
    assert_true(config.spin == UINT32_MAX);
    assert_true(config.pool_bytes == 64u << 20);
    assert_true(config.huge_pages);
    assert_true(config.from_env == 0);
    for (uint32_t i = 0; i < nep_config_num_rows(); i++) {
        char value[512];
        struct nep_config_row row = nep_config_row_at(i);
        nep_config_format(&config, i, value, sizeof value);
        assert_string_equal(value, row.default_text);
        assert_true(row.help[0] != '\0' && row.type[0] != '\0');
    }
}

static void test_config_values_are_read_with_units(void **state)
{
    (void)state;
    const char *const variables[] = {"NEP_TIMEOUT=1500ms", "NEP_POOL=2G",     "NEP_SPIN=12",
                                     "NEP_HUGE_PAGES=off", "NEP_INTER=ucx",   "NEP_LOG=debug",
                                     "NEP_SIMD=",          "NEP_SECRET=hush", NULL};
    struct nep_config config;
    assert_int_equal(nep_config_load_from(&config, variables), NEP_OK);
    assert_true(config.timeout_ns == 1500 * NEP_MS);
    assert_true(config.pool_bytes == 2ull << 30);
    assert_int_equal(config.spin, 12);
    assert_false(config.huge_pages);
    assert_string_equal(config.inter, "ucx");
    assert_string_equal(config.simd, "auto"); /* empty is unset */
    assert_string_equal(config.secret, "hush");
    int num_set = __builtin_popcountll(config.from_env);
    assert_int_equal(num_set, 7);
}

static void test_config_bad_value_names_variable_and_changes_nothing(void **state)
{
    (void)state;
    char long_name[600] = "NEP_NODE=";
    memset(long_name + strlen(long_name), 'x', 500);
    const struct {
        const char *variable;
        const char *says;
    } cases[] = {
        {"NEP_TIMEOUT=10", "NEP_TIMEOUT: '10' has no unit"},
        {"NEP_TIMEOUT=0s", "NEP_TIMEOUT is 0"},
        {"NEP_POOL=lots", "NEP_POOL: 'lots'"},
        {"NEP_SPIN=-1", "NEP_SPIN: '-1'"},
        {"NEP_SPIN=4294967295", "NEP_SPIN: '4294967295'"},
        {"NEP_SPIN=99999999999999999999999", "NEP_SPIN"},
        {"NEP_SIMD=avx", "NEP_SIMD: 'avx' is none of auto|c|avx2|avx512"},
        {"NEP_LOG=warning", "NEP_LOG"},
        {"NEP_HUGE_PAGES=maybe", "NEP_HUGE_PAGES: 'maybe' is neither on nor off"},
        {"NEP_NODE=a\nb", "NEP_NODE: character 1 is a control character"},
        {long_name, "NEP_NODE: 500 characters are too many, at most 63"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *const variables[] = {cases[i].variable, NULL};
        struct nep_config config, before;
        memset(&config, 0xa5, sizeof config);
        before = config;
        assert_int_equal(nep_config_load_from(&config, variables), NEP_ERR_INVALID);
        assert_says(cases[i].says);
        assert_memory_equal(&config, &before, sizeof config);
    }
}

static void test_config_unknown_name_is_warned_about_once(void **state)
{
    (void)state;
    struct nep_config config;
    const char *const known[] = {"NEP_TIMEOUT=1s", "NEPTUNE=8", "NEP_TEST_SEED=1", NULL};
    const char *const unknown[] = {"NEP_TIMOUT=1s", "NEP_FROBNICATE=1", NULL};
    const char *const other[] = {"NEP_TIMOUT=1s", NULL};
    uint64_t before = nep_log_num_warnings();
    assert_int_equal(nep_config_load_from(&config, known), NEP_OK);
    assert_true(nep_log_num_warnings() == before);
    assert_int_equal(nep_config_load_from(&config, unknown), NEP_OK);
    assert_true(config.timeout_ns == 100 * NEP_S);
    assert_true(nep_log_num_warnings() == before + 2);
    assert_int_equal(nep_config_load_from(&config, unknown), NEP_OK);
    assert_true(nep_log_num_warnings() == before + 2);
    assert_int_equal(nep_config_load_from(&config, other), NEP_OK);
    assert_true(nep_log_num_warnings() == before + 3);
}

static void test_config_digest_covers_shared_rows_only(void **state)
{
    (void)state;
    struct nep_config a, b;
    const char *const nothing[] = {NULL};
    assert_int_equal(nep_config_load_from(&a, nothing), NEP_OK);
    const struct {
        const char *variable;
        bool is_shared;
    } cases[] = {{"NEP_INTER=shm", true}, {"NEP_INTRA=loop", true}, {"NEP_POOL=1M", true},
                 {"NEP_LOG=info", false}, {"NEP_SIMD=c", false},    {"NEP_RANK=1", false}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *const variables[] = {cases[i].variable, NULL};
        assert_int_equal(nep_config_load_from(&b, variables), NEP_OK);
        assert_int_equal(nep_config_digest(&a) != nep_config_digest(&b), cases[i].is_shared);
    }
}

static void test_config_print_shows_no_secret(void **state)
{
    (void)state;
    const char *const variables[] = {"NEP_SECRET=swordfish-and-more", "NEP_RANK=3", NULL};
    struct nep_config config;
    assert_int_equal(nep_config_load_from(&config, variables), NEP_OK);
    char *text = NULL;
    size_t len = 0;
    FILE *out = open_memstream(&text, &len);
    nep_config_print(out, &config);
    fclose(out);
    assert_null(strstr(text, "swordfish"));
    assert_non_null(strstr(text, "NEP_SECRET=(set)"));
    assert_non_null(strstr(text, "NEP_RANK=3\n"));
    for (uint32_t i = 0; i < nep_config_num_rows(); i++) {
        assert_non_null(strstr(text, nep_config_row_at(i).name));
    }
    free(text);
}

static void test_config_load_reads_environment_and_opens_log(void **state)
{
    (void)state;
    char path[] = "/tmp/nep-test-log-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    setenv("NEP_LOG", "info", 1);
    setenv("NEP_LOG_FILE", path, 1);
    struct nep_config config;
    assert_int_equal(nep_config_load(&config), NEP_OK);
    assert_true(nep_log_enabled(NEP_LOG_INFO));
    assert_false(nep_log_enabled(NEP_LOG_DEBUG));
    nep_info("said to the %s", "file");
    nep_debug("not said");
    setenv("NEP_LOG", "warn", 1);
    setenv("NEP_LOG_FILE", "/nowhere/at/all", 1);
    assert_int_equal(nep_config_load(&config), NEP_ERR_IO);
    assert_says("/nowhere/at/all");
    unsetenv("NEP_LOG");
    unsetenv("NEP_LOG_FILE");
    assert_int_equal(nep_config_load(&config), NEP_OK);
    assert_false(nep_log_enabled(NEP_LOG_INFO));
    char text[4096] = "";
    ssize_t got = read(fd, text, sizeof text - 1);
    assert_true(got > 0);
    assert_non_null(strstr(text, "info: said to the file\n"));
    assert_null(strstr(text, "not said"));
    close(fd);
    remove(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_config_defaults_are_the_tables),
        cmocka_unit_test(test_config_values_are_read_with_units),
        cmocka_unit_test(test_config_bad_value_names_variable_and_changes_nothing),
        cmocka_unit_test(test_config_unknown_name_is_warned_about_once),
        cmocka_unit_test(test_config_digest_covers_shared_rows_only),
        cmocka_unit_test(test_config_print_shows_no_secret),
        cmocka_unit_test(test_config_load_reads_environment_and_opens_log),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
