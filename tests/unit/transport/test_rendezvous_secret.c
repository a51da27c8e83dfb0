/* SPDX-License-Identifier: Apache-2.0 */
#include <fcntl.h>
#include <sys/stat.h>

#include "tests/unit/transport/group.h"

static char path[64];

static void write_file(const void *text, size_t len, mode_t rights)
{
    snprintf(path, sizeof path, "/tmp/nep-test-secret-XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_true(write(fd, text, len) == (ssize_t)len);
    assert_int_equal(fchmod(fd, rights), 0);
    close(fd);
}

static enum nep_status read_secret(char *secret)
{
    struct nep_config config = {0};
    memset(secret, 'p', NEP_RENDEZVOUS_SECRET_BYTES);
    snprintf(config.secret_file, sizeof config.secret_file, "%s", path);
    enum nep_status status = nep_rendezvous_secret_read(&config, secret);
    remove(path);
    return status;
}

static void test_secret_file_of_owner_is_read_without_newline(void **state)
{
    (void)state;
    char secret[NEP_RENDEZVOUS_SECRET_BYTES];
    write_file("0123456789abcdef\n", 17, 0600);
    assert_int_equal(read_secret(secret), NEP_OK);
    assert_string_equal(secret, "0123456789abcdef");
    write_file("0123456789abcdef0", 17, 0400);
    assert_int_equal(read_secret(secret), NEP_OK);
    assert_string_equal(secret, "0123456789abcdef0");
}

static void test_secret_file_unsafe_or_odd_is_refused(void **state)
{
    (void)state;
    char secret[NEP_RENDEZVOUS_SECRET_BYTES], longer[300];
    memset(longer, 'x', sizeof longer);
    const struct {
        const char *text;
        size_t len;
        mode_t rights;
        const char *says;
    } cases[] = {
        {"0123456789abcdef", 16, 0640, "chmod 600"},
        {"0123456789abcdef", 16, 0604, "chmod 600"},
        {"0123456789abcdef", 16, 0602, "chmod 600"},
        {"too short", 9, 0600, "16 to 255 characters"},
        {"", 0, 0600, "16 to 255 characters"},
        {"with a\0nul inside the text", 26, 0600, "16 to 255 characters"},
        {longer, sizeof longer, 0600, "longer than 255"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        write_file(cases[i].text, cases[i].len, cases[i].rights);
        assert_int_equal(read_secret(secret), NEP_ERR_INVALID);
        assert_says(nep_last_message(), cases[i].says);
        assert_int_equal(secret[0], 'p');
    }
    snprintf(path, sizeof path, "/tmp");
    assert_int_equal(
        nep_rendezvous_secret_read(&(struct nep_config){.secret_file = "/tmp"}, secret),
        NEP_ERR_INVALID);
    assert_int_equal(
        nep_rendezvous_secret_read(&(struct nep_config){.secret_file = "/no/such/file"}, secret),
        NEP_ERR_NOT_FOUND);
    assert_int_equal(nep_rendezvous_secret_read(
                         &(struct nep_config){.secret_file = "/tmp", .secret = "both"}, secret),
                     NEP_ERR_INVALID);
}

static void test_secret_made_is_new_each_time(void **state)
{
    (void)state;
    char a[NEP_RENDEZVOUS_SECRET_BYTES], b[NEP_RENDEZVOUS_SECRET_BYTES];
    assert_int_equal(nep_rendezvous_secret_make(a), NEP_OK);
    assert_int_equal(nep_rendezvous_secret_make(b), NEP_OK);
    assert_int_equal(strlen(a), 64);
    assert_int_equal(strspn(a, "0123456789abcdef"), 64);
    assert_string_not_equal(a, b);
    assert_int_equal(nep_rendezvous_secret_read(&(struct nep_config){.secret = "words"}, a),
                     NEP_OK);
    assert_string_equal(a, "words");
    assert_int_equal(nep_rendezvous_secret_read(&(struct nep_config){.log = ""}, a), NEP_OK);
    assert_string_equal(a, "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_secret_file_of_owner_is_read_without_newline),
        cmocka_unit_test(test_secret_file_unsafe_or_odd_is_refused),
        cmocka_unit_test(test_secret_made_is_new_each_time),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
