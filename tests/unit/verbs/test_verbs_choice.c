/* SPDX-License-Identifier: Apache-2.0 */
/* Which GID and which ports: plain arithmetic, against cases with one right answer. */
#include <ctype.h>
#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "tests/unit/cmocka_all.h"

#if NEP_HAVE_VERBS
#include "transport/verbs/verbs.h"

static struct ibv_gid_entry entry(uint32_t type, const uint8_t raw[16])
{
    struct ibv_gid_entry made = {.gid_type = type};
    memcpy(made.gid.raw, raw, 16);
    return made;
}

static void test_gid_classify_each_kind(void **state)
{
    (void)state;
    const uint8_t v4[16] = {[10] = 0xff, [11] = 0xff, [12] = 10};
    const uint8_t v6[16] = {0x20, 0x01};
    const uint8_t link[16] = {0xfe, 0x80};
    const uint8_t link_end[16] = {0xfe, 0xbf};
    const uint8_t not_link[16] = {0xfe, 0xc0};
    struct ibv_gid_entry gid = entry(IBV_GID_TYPE_ROCE_V2, v4);
    assert_int_equal(nep_verbs_gid_classify(&gid), NEP_VERBS_GID_V2_IPV4);
    gid = entry(IBV_GID_TYPE_ROCE_V2, v6);
    assert_int_equal(nep_verbs_gid_classify(&gid), NEP_VERBS_GID_V2_IPV6);
    gid = entry(IBV_GID_TYPE_ROCE_V2, link);
    assert_int_equal(nep_verbs_gid_classify(&gid), NEP_VERBS_GID_V2_LINK);
    gid = entry(IBV_GID_TYPE_ROCE_V2, link_end);
    assert_int_equal(nep_verbs_gid_classify(&gid), NEP_VERBS_GID_V2_LINK);
    gid = entry(IBV_GID_TYPE_ROCE_V2, not_link);
    assert_int_equal(nep_verbs_gid_classify(&gid), NEP_VERBS_GID_V2_IPV6);
    gid = entry(IBV_GID_TYPE_ROCE_V1, v4);
    assert_int_equal(nep_verbs_gid_classify(&gid), NEP_VERBS_GID_V1);
    gid = entry(IBV_GID_TYPE_IB, link);
    assert_int_equal(nep_verbs_gid_classify(&gid), NEP_VERBS_GID_IB);
}

static struct nep_verbs_gids with(uint32_t kinds)
{
    struct nep_verbs_gids gids;
    memset(&gids, 0, sizeof gids);
    for (uint32_t kind = 0; kind < NEP_VERBS_GID_NUM_KINDS; kind++) {
        gids.index[kind] = (kinds >> kind & 1) != 0 ? (int32_t)kind : -1;
    }
    return gids;
}

static void test_gid_agree_takes_the_best_of_both(void **state)
{
    (void)state;
    /* exhaustive: every set of kinds at both ends */
    for (uint32_t mine = 0; mine < 1u << NEP_VERBS_GID_NUM_KINDS; mine++) {
        for (uint32_t theirs = 0; theirs < 1u << NEP_VERBS_GID_NUM_KINDS; theirs++) {
            struct nep_verbs_gids a = with(mine), b = with(theirs);
            enum nep_verbs_gid_kind forth = 77, back = 77;
            enum nep_status status = nep_verbs_gid_agree(&a, &b, &forth);
            assert_int_equal(nep_verbs_gid_agree(&b, &a, &back), status);
            assert_int_equal(forth, back);
            if ((mine & theirs) == 0) {
                assert_int_equal(status, NEP_ERR_UNSUPPORTED);
                assert_int_equal(forth, 77); /* untouched */
                continue;
            }
            assert_int_equal(status, NEP_OK);
            assert_int_equal(forth, __builtin_ctz(mine & theirs));
        }
    }
}

static uint32_t uses(const uint32_t *choice, uint32_t num, uint32_t port)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < num; i++) {
        count += choice[i] == port;
    }
    return count;
}

static void test_assign_spreads_before_it_shares(void **state)
{
    (void)state;
    struct nep_verbs_port ports[8];
    memset(ports, 0, sizeof ports);
    int32_t numa[16];
    for (uint32_t num_ports = 1; num_ports <= 8; num_ports++) {
        for (uint32_t num_ranks = 1; num_ranks <= 16; num_ranks++) {
            for (uint32_t num_paths = 1; num_paths <= 2 && num_paths <= num_ports; num_paths++) {
                uint32_t choice[32], seats = num_ranks * num_paths;
                for (uint32_t i = 0; i < 8; i++) {
                    ports[i].numa = (int32_t)(i * 2 / num_ports);
                }
                for (uint32_t i = 0; i < 16; i++) {
                    numa[i] = (int32_t)(i * 5 % 3) - 1;
                }
                memset(choice, 0xff, sizeof choice);
                nep_verbs_assign(ports, num_ports, numa, num_ranks, num_paths, choice);
                uint32_t least = UINT32_MAX, most = 0;
                for (uint32_t port = 0; port < num_ports; port++) {
                    uint32_t used = uses(choice, seats, port);
                    least = used < least ? used : least;
                    most = used > most ? used : most;
                }
                assert_in_range(most - least, 0, 1);
                for (uint32_t r = 0; num_paths == 2 && r < num_ranks; r++) {
                    assert_int_not_equal(choice[2 * r], choice[2 * r + 1]);
                }
            }
        }
    }
}

static void test_assign_is_near_where_it_can_be(void **state)
{
    (void)state;
    /* Ports 0 and 1 on node 0, 2 and 3 on node 1; ranks the other way round. */
    struct nep_verbs_port ports[4] = {{.numa = 0}, {.numa = 0}, {.numa = 1}, {.numa = 1}};
    const int32_t numa[4] = {1, 1, 0, 0};
    uint32_t choice[4];
    nep_verbs_assign(ports, 4, numa, 4, 1, choice);
    for (uint32_t r = 0; r < 4; r++) {
        assert_int_equal(ports[choice[r]].numa, numa[r]);
        assert_int_equal(uses(choice, 4, choice[r]), 1);
    }
    /* A rank without a place takes a near port first; the exchange gives it back. */
    const int32_t mixed[2] = {-1, 0};
    struct nep_verbs_port two[2] = {{.numa = 0}, {.numa = 1}};
    nep_verbs_assign(two, 2, mixed, 2, 1, choice);
    assert_int_equal(choice[1], 0);
    assert_int_equal(choice[0], 1);
}

/* What the system says of each device on the bus, asked for as the GPU's driver writes it. */
static void test_pci_numa_is_the_systems(void **state)
{
    (void)state;
    const char *root = "/sys/bus/pci/devices";
    DIR *dir = opendir(root);
    uint32_t num = 0;
    for (struct dirent *item = dir == NULL ? NULL : readdir(dir); item != NULL;
         item = readdir(dir)) {
        char path[320], name[32];
        int numa;
        snprintf(path, sizeof path, "%s/%s/numa_node", root, item->d_name);
        FILE *file = item->d_name[0] == '.' ? NULL : fopen(path, "re");
        if (file == NULL || fscanf(file, "%d", &numa) != 1) {
            numa = -1;
        }
        if (file != NULL) {
            fclose(file);
            num++;
        }
        snprintf(name, sizeof name, "%.31s", item->d_name);
        for (char *c = name; *c != '\0'; c++) {
            *c = (char)toupper((unsigned char)*c);
        }
        assert_int_equal(nep_verbs_pci_numa(name), numa);
    }
    if (dir != NULL) {
        closedir(dir);
    }
    print_message("%u devices on the bus of this machine\n", num);
    assert_int_equal(nep_verbs_pci_numa("0000:FF:1F.7"), -1);
    assert_int_equal(nep_verbs_pci_numa(""), -1);
    assert_int_equal(nep_verbs_cuda_numa(), -1); /* nothing here has loaded the driver */
}

/* ---- a file that says which rank takes which ports ------------------------------------------- */

static int alone(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns)
{
    (void)ctx;
    (void)timeout_ns;
    memcpy(out, in, bytes);
    return 0;
}

static int32_t no_gpu(void)
{
    return -1;
}

static struct nep_verbs chooser;

/* What a rank that is `local` on its node chooses by a file of that content; NULL: no file. */
static enum nep_status choose(const char *content, uint32_t local, uint32_t num_paths)
{
    static struct nep_config config;
    static struct nep_topology topology;
    static const struct nep_bootstrap bootstrap = {.size = sizeof bootstrap, .allgather = alone};
    memset(&chooser, 0, sizeof chooser);
    topology.local = local;
    snprintf(config.verbs_devices, sizeof config.verbs_devices, "./verbs-devices-%ld",
             (long)getpid());
    FILE *file = content == NULL ? NULL : fopen(config.verbs_devices, "we");
    if (file != NULL) {
        fputs(content, file);
        fclose(file);
    }
    chooser.params.config = &config;
    chooser.params.topology = &topology;
    chooser.params.bootstrap = &bootstrap;
    chooser.params.timeout_ns = NEP_S;
    chooser.api.gpu_numa = no_gpu;
    chooser.num_ranks = 1;
    chooser.num_paths = num_paths;
    enum nep_status status = nep_verbs_paths_choose(&chooser);
    unlink(config.verbs_devices);
    return status;
}

static void test_file_of_devices_decides_alone(void **state)
{
    (void)state;
    const char *two = "# rank  ports\n\n0 rail_a,rail_b:2\n  1 rail_c:3,rail_d\n* other:7,last\n";
    assert_int_equal(choose(two, 0, 2), NEP_OK);
    assert_string_equal(chooser.paths[0].device, "rail_a");
    assert_int_equal(chooser.paths[0].port, 1);
    assert_string_equal(chooser.paths[1].device, "rail_b");
    assert_int_equal(chooser.paths[1].port, 2);
    assert_int_equal(chooser.num_local, 1);
    assert_int_equal(choose(two, 1, 1), NEP_OK); /* fewer paths than ports */
    assert_string_equal(chooser.paths[0].device, "rail_c");
    assert_int_equal(chooser.paths[0].port, 3);
    assert_int_equal(choose(two, 9, 2), NEP_OK);
    assert_string_equal(chooser.paths[0].device, "other");
    assert_int_equal(chooser.paths[0].port, 7);
    assert_string_equal(chooser.paths[1].device, "last");
}

static void test_file_of_devices_that_does_not_say_is_refused(void **state)
{
    (void)state;
    const struct {
        const char *content;
        uint32_t local, num_paths;
        enum nep_status status;
        const char *says;
    } cases[] = {
        {NULL, 0, 1, NEP_ERR_NOT_FOUND, "No such file"},
        {"", 2, 1, NEP_ERR_FORMAT, "has no line for local rank 2"},
        {"0 a\n1 b\n", 2, 1, NEP_ERR_FORMAT, "has no line for local rank 2"},
        {"# a comment\n0\n", 0, 1, NEP_ERR_FORMAT, "line 2 is not"},
        {"zero a\n", 0, 1, NEP_ERR_FORMAT, "line 1 is not"},
        {"0 a\n", 0, 2, NEP_ERR_INVALID, "lists 1 devices, NEP_VERBS_PATHS is 2"},
        {"0 a,,b\n", 0, 3, NEP_ERR_INVALID, "lists 1 devices, NEP_VERBS_PATHS is 3"},
        {"0 a:300\n", 0, 1, NEP_ERR_INVALID, "port of 'a:300'"},
        {"0 a,b:x\n", 0, 2, NEP_ERR_INVALID, "port of 'b:x'"},
        {"0 a:\n", 0, 1, NEP_ERR_INVALID, "port of 'a:'"},
        {"0 a:1b\n", 0, 1, NEP_ERR_INVALID, "port of 'a:1b'"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        assert_int_equal(choose(cases[i].content, cases[i].local, cases[i].num_paths),
                         cases[i].status);
        if (strstr(nep_last_message(), cases[i].says) == NULL) {
            fail_msg("case %zu: '%s' does not say '%s'", i, nep_last_message(), cases[i].says);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gid_classify_each_kind),
        cmocka_unit_test(test_gid_agree_takes_the_best_of_both),
        cmocka_unit_test(test_assign_spreads_before_it_shares),
        cmocka_unit_test(test_assign_is_near_where_it_can_be),
        cmocka_unit_test(test_pci_numa_is_the_systems),
        cmocka_unit_test(test_file_of_devices_decides_alone),
        cmocka_unit_test(test_file_of_devices_that_does_not_say_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
#else
#include "tests/unit/verbs/absent.h"
#endif
