/* SPDX-License-Identifier: Apache-2.0 */
/* nep-info as a user runs it: the program beside this one. */
#include <ctype.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "nearep.h"
#include "tests/unit/cmocka_all.h"
#include "transport/rendezvous.h"
#include "transport/topology.h"

static char program[1024];
static char out[1 << 18];

static void find_program(void)
{
    ssize_t len = readlink("/proc/self/exe", program, sizeof program - 1);
    assert_true(len > 0);
    program[len] = '\0';
    char *slash = strrchr(program, '/');
    snprintf(slash, sizeof program - (size_t)(slash - program), "/nep-info");
    assert_int_equal(access(program, X_OK), 0);
}

/* Runs "env -i <variables> nep-info <arguments>"; both streams into out; the exit status. */
static int run(const char *variables, const char *arguments)
{
    char command[2048];
    /* UCX's hooks of memory functions crash under ThreadSanitizer: what turns them off is passed
     * on. */
    const char *hooks = getenv("UCX_MEM_EVENTS");
    snprintf(command, sizeof command, "env -i %s%s %s %s %s 2>&1", hooks ? "UCX_MEM_EVENTS=" : "",
             hooks ? hooks : "", variables, program, arguments);
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    size_t len = fread(out, 1, sizeof out - 1, pipe);
    out[len] = '\0';
    int status = pclose(pipe);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void assert_says(const char *part)
{
    if (strstr(out, part) == NULL) {
        fail_msg("'%s' does not say '%s'", out, part);
    }
}

/* ---- JSON ----------------------------------------------------------------------------------- */

static const char *skip_value(const char *at);

static const char *skip_space(const char *at)
{
    while (isspace((unsigned char)*at)) {
        at++;
    }
    return at;
}

static const char *skip_string(const char *at)
{
    if (*at++ != '"') {
        return NULL;
    }
    for (; *at != '"'; at++) {
        if ((unsigned char)*at < ' ') {
            return NULL;
        }
        at += *at == '\\';
    }
    return at + 1;
}

static const char *skip_members(const char *at, char end, bool has_names)
{
    at = skip_space(at + 1);
    while (at != NULL && *at != end) {
        if (has_names) {
            at = skip_string(at);
            at = at == NULL ? NULL : skip_space(at);
            if (at == NULL || *at != ':') {
                return NULL;
            }
            at++;
        }
        at = skip_value(skip_space(at));
        at = at == NULL ? NULL : skip_space(at);
        if (at == NULL || (*at != ',' && *at != end)) {
            return NULL;
        }
        if (*at == ',') {
            at = skip_space(at + 1);
            if (*at == end) {
                return NULL;
            }
        }
    }
    return at == NULL ? NULL : at + 1;
}

/* After one JSON value; NULL when it is none. */
static const char *skip_value(const char *at)
{
    static const char *const words[] = {"true", "false", "null"};
    for (int i = 0; i < 3; i++) {
        if (strncmp(at, words[i], strlen(words[i])) == 0) {
            return at + strlen(words[i]);
        }
    }
    if (*at == '{' || *at == '[') {
        return skip_members(at, *at == '{' ? '}' : ']', *at == '{');
    }
    if (*at == '"') {
        return skip_string(at);
    }
    size_t digits = strspn(at, "0123456789");
    return digits == 0 ? NULL : at + digits;
}

/* ---- tests ---------------------------------------------------------------------------------- */

static void test_nep_info_help_and_version(void **state)
{
    (void)state;
    char version[64];
    assert_int_equal(run("", "--help"), 0);
    assert_says("--check");
    assert_says("--serve [HOST:PORT]");
    assert_int_equal(run("", "--version"), 0);
    snprintf(version, sizeof version, "nep-info %s\n", nep_version_string());
    assert_string_equal(out, version);
}

static void test_nep_info_unusable_arguments_exit_with_2_and_one_line(void **state)
{
    (void)state;
    const struct {
        const char *variables;
        const char *arguments;
        const char *says;
    } cases[] = {
        {"", "--bogus", "--bogus is no option"},
        {"", "--ranks", "--ranks needs a value"},
        {"", "--ranks 0", "'0' is no value for --ranks"},
        {"", "--ranks -3", "'-3' is no value"},
        {"", "--ranks 3x", "'3x' is no value"},
        {"", "--ranks 5 --ranks-per-node 2,2", "4 ranks in all, --ranks 5"},
        {"", "--ranks-per-node 1,,2", "'1,,2' is no value"},
        {"", "--serve 127.0.0.1:1", "--serve needs --ranks"},
        {"", "--serve here --ranks 2", "write host:port"},
        {"", "--json /no/such/folder/x",
         "--json /no/such/folder/x: cannot write: No such file or directory"},
        {"NEP_TIMEOUT=5", "--config", "NEP_TIMEOUT: '5' has no unit"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int status = run(cases[i].variables, cases[i].arguments);
        assert_says(cases[i].says);
        assert_int_equal(status, 2);
        assert_int_equal(strncmp(out, "nep-info: ", 10), 0);
        assert_ptr_equal(strchr(out, '\n'), out + strlen(out) - 1);
    }
}

static void test_nep_info_config_page_is_what_it_prints(void **state)
{
    (void)state;
    char page[1 << 16];
    FILE *file = fopen("docs/configuration.md", "r");
    assert_non_null(file);
    page[fread(page, 1, sizeof page - 1, file)] = '\0';
    fclose(file);
    assert_int_equal(run("", "--config --markdown"), 0);
    if (strcmp(out, page) != 0) {
        fail_msg("docs/configuration.md is old: nep-info --config --markdown > "
                 "docs/configuration.md");
    }
}

static void test_nep_info_config_shows_where_values_come_from(void **state)
{
    (void)state;
    assert_int_equal(run("NEP_TIMEOUT=1500ms", "--config"), 0);
    assert_says("NEP_TIMEOUT=1500ms\n    time; default 100s; set in the environment");
    assert_says("NEP_POOL=64M\n    bytes; default 64M; not set; must be equal");
}

static void test_nep_info_json_is_one_object(void **state)
{
    (void)state;
    assert_int_equal(run("NEP_NODE='a\\\"b'", "--config --transports --topology --check "
                                              "--ranks 8 --ranks-per-node 1,2,5 --json -"),
                     0);
    const char *end = skip_value(out);
    assert_non_null(end);
    assert_string_equal(end, "\n");
    assert_says("\"name\": \"NEP_NODE\", \"value\": \"a\\\\\\\"b\"");
    assert_says("\"first_rank\": 3, \"ranks\": 5");
    assert_says("\"name\": \"shm\", \"works\": true");
}

static void test_nep_info_topology_names_the_launcher(void **state)
{
    (void)state;
    assert_int_equal(run("RANK=1 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=5", "--topology"), 0);
    assert_says("torchrun: rank 1 of 2, address h port 5");
    assert_int_equal(run("RANK=7 WORLD_SIZE=2", "--topology"), 1);
    assert_says("rank 7 of 2");
    assert_int_equal(run("", "--topology --ranks-per-node 3,1"), 0);
}

static uint64_t number_after(const char *key)
{
    char quoted[64];
    snprintf(quoted, sizeof quoted, "\"%s\": ", key);
    const char *at = strstr(out, quoted);
    assert_non_null(at);
    return strtoull(at + strlen(quoted), NULL, 10);
}

static void test_nep_info_region_parts_add_up_to_the_librarys(void **state)
{
    (void)state;
    const char *const parts[] = {
        "control_bytes", "dispatch_landing_bytes", "combine_landing_bytes", "send_bytes",
        "home_bytes",    "staging_bytes"};
    assert_int_equal(run("", "--region --ranks-per-node 1,2,5 --tokens 300 --hidden 1024 "
                             "--experts 64 --top-k 4 --outstanding 2 --wire fp8 --json -"),
                     0);
    uint64_t sum = 0, region = number_after("region_bytes");
    for (int i = 0; i < 6; i++) {
        sum += number_after(parts[i]);
    }
    assert_true(sum == region && region > 0);
    struct nep_ep_params params = {.size = sizeof params,
                                   .num_experts = 64,
                                   .top_k = 4,
                                   .hidden = 1024,
                                   .max_tokens = 300,
                                   .outstanding = 2,
                                   .wire = NEP_DTYPE_FP8_E4M3};
    const uint32_t sizes[] = {1, 2, 5};
    uint64_t most = 0, least = UINT64_MAX;
    for (uint32_t r = 0; r < 8; r++) {
        struct nep_topology_store *store;
        struct nep_topology topology;
        struct nep_memory memory = {.size = sizeof memory};
        assert_int_equal(nep_topology_from_sizes(sizes, 3, r, &store, &topology), NEP_OK);
        assert_int_equal(nep_ep_memory(&params, &topology, &memory), NEP_OK);
        most = memory.region_bytes > most ? memory.region_bytes : most;
        least = memory.region_bytes < least ? memory.region_bytes : least;
        nep_topology_destroy(store);
    }
    assert_true(most == region);
    assert_true(least == number_after("least_region_bytes"));
    /* 8 ranks on 4 nodes, top-8 of 256: 3 (1 - C(192, 8) / C(256, 8)) and 6 (1 - C(224, 8) / ...)
     */
    assert_int_equal(run("", "--region --ranks 8 --ranks-per-node 2 --tokens 16"), 0);
    assert_says("2.711 rows for other nodes, 3.971 for their ranks");
    assert_says("564.6 KiB more");
    assert_says(": try it");
    assert_int_equal(run("", "--region --ranks 8 --ranks-per-node 2 --tokens 64"), 0);
    assert_says("about 700 KiB (docs/performance.md).");
    assert_int_equal(run("", "--region --top-k 33"), 2);
    assert_says("top_k is 33");
    assert_int_equal(run("", "--region --map /no/such/map"), 2);
    assert_says("/no/such/map");
}

static void test_nep_info_check_finds_what_is_broken(void **state)
{
    (void)state;
    assert_int_equal(run("", "--check"), 0);
    assert_says("ok    rendezvous");
    assert_says("nothing is broken here");
    assert_int_equal(run("RANK=7 WORLD_SIZE=2", "--check"), 1);
    assert_says("BAD   launcher");
    assert_int_equal(run("NEP_SECRET_FILE=/no/such/file", "--check"), 1);
    assert_says("BAD   secret");
}

static void test_nep_info_serve_serves_until_a_signal(void **state)
{
    (void)state;
    struct nep_rendezvous_params params = {.host = "127.0.0.1", .num_ranks = 1};
    struct nep_rendezvous_server *server;
    char address[64];
    assert_int_equal(nep_rendezvous_server_start(&params, &server, &params.port), NEP_OK);
    nep_rendezvous_server_stop(server); /* a port that was free just now */
    snprintf(address, sizeof address, "127.0.0.1:%u", params.port);
    pid_t pid = fork();
    if (pid == 0) {
        execl(program, "nep-info", "--serve", address, "--ranks", "1", "--json", "/dev/null",
              (char *)NULL);
        _exit(99);
    }
    struct nep_rendezvous_client *client = NULL;
    params.timeout_ns = 20 * NEP_S;
    assert_int_equal(nep_rendezvous_client_open(&params, &client), NEP_OK);
    nep_rendezvous_client_close(client);
    int status;
    kill(pid, SIGTERM);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nep_info_help_and_version),
        cmocka_unit_test(test_nep_info_unusable_arguments_exit_with_2_and_one_line),
        cmocka_unit_test(test_nep_info_config_page_is_what_it_prints),
        cmocka_unit_test(test_nep_info_config_shows_where_values_come_from),
        cmocka_unit_test(test_nep_info_json_is_one_object),
        cmocka_unit_test(test_nep_info_topology_names_the_launcher),
        cmocka_unit_test(test_nep_info_region_parts_add_up_to_the_librarys),
        cmocka_unit_test(test_nep_info_check_finds_what_is_broken),
        cmocka_unit_test(test_nep_info_serve_serves_until_a_signal),
    };
    find_program();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
