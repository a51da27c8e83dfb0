/* SPDX-License-Identifier: Apache-2.0 */
/* The body of every verbs test where nearep is built without verbs: the refusal is the test. */
#include "transport/transport.h"

static void test_verbs_without_header_is_refused(void **state)
{
    (void)state;
    const struct nep_transport_ops *ops;
    const char *args;
    struct nep_config config;
    memset(&config, 0, sizeof config);
    assert_int_equal(nep_transport_find("verbs", &ops, &args), NEP_OK);
    assert_int_equal(ops->probe(&config), NEP_ERR_UNSUPPORTED);
    print_message("%s\n", nep_last_message());
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_verbs_without_header_is_refused)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
