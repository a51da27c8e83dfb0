/* SPDX-License-Identifier: Apache-2.0 */
/* Ranks as processes with a launcher's environment, as torchrun, mpirun and srun would start them.
 */
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "base/log.h"
#include "tests/unit/transport/group.h"
#include "transport/rendezvous_socket.h"

enum { NUM = 3, TIMES = 2, FIRST_PORT = 21000 };

/* %u is the rank. */
struct launch {
    const char *variables[8];
    uint32_t num; /* ranks that start; fewer than NUM: the rest never do */
};

static enum nep_status meet(uint64_t timeout_ns)
{
    struct nep_config config;
    struct nep_comm_params params = {.size = sizeof params};
    enum nep_status status = nep_config_load(&config);
    for (int i = 0; i < TIMES && status == NEP_OK; i++) {
        struct nep_bootstrap bootstrap;
        struct nep_rendezvous_client *owned = NULL;
        uint32_t rank, num_ranks, all[NUM];
        status =
            nep_bootstrap_open(&params, &config, timeout_ns, &bootstrap, &rank, &num_ranks, &owned);
        if (status != NEP_OK) {
            break;
        }
        status = nep_bootstrap_allgather(&bootstrap, &rank, all, 4, timeout_ns, "ranks");
        for (uint32_t r = 0; status == NEP_OK && r < num_ranks; r++) {
            status = all[r] == r ? NEP_OK : nep_fail(NEP_ERR_INTERNAL, "place %u is wrong", r);
        }
        nep_bootstrap_close(owned);
    }
    return status;
}

/* In a program of its own, started with the launcher's environment alone: a process that was only
 * forked could not start threads under ThreadSanitizer. */
static int rank_main(const char *timeout_text)
{
    uint64_t timeout_ns = 0;
    enum nep_status status = nep_parse_time_ns(timeout_text, &timeout_ns);
    status = status == NEP_OK ? meet(timeout_ns) : status;
    printf("%d %s\n", status, status == NEP_OK ? "" : nep_last_message());
    return 0;
}

static pid_t start_rank(const struct launch *launch, uint32_t rank, uint64_t timeout_ns, int fd)
{
    char texts[8][256], time[32];
    char *variables[9] = {NULL};
    for (size_t i = 0; i < 8 && launch->variables[i] != NULL; i++) {
        /* The formats are this file's own; an unused argument is fine. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
        snprintf(texts[i], sizeof texts[i], launch->variables[i], rank);
#pragma GCC diagnostic pop
        variables[i] = texts[i];
    }
    nep_format_time_ns(timeout_ns, time, sizeof time);
    char *arguments[] = {"test_bootstrap_launchers", "--rank", time, NULL};
    pid_t pid = fork();
    if (pid == 0) {
        dup2(fd, STDOUT_FILENO);
        execve("/proc/self/exe", arguments, variables);
        _exit(99);
    }
    return pid;
}

/* Starts them and returns their lines, "<status> <message>\n" each. */
static void launch_all(const struct launch *launch, uint64_t timeout_ns, char *lines, size_t cap)
{
    int fds[2];
    pid_t pids[NUM];
    size_t have = 0;
    ssize_t got;
    assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
    for (uint32_t r = 0; r < launch->num; r++) {
        /* The last rank first: nothing may depend on rank 0 being early. */
        pids[r] = start_rank(launch, launch->num - 1 - r, timeout_ns, fds[1]);
        usleep(20000);
    }
    close(fds[1]);
    while ((got = read(fds[0], lines + have, cap - 1 - have)) > 0) {
        have += (size_t)got;
    }
    lines[have] = '\0';
    close(fds[0]);
    for (uint32_t r = 0; r < launch->num; r++) {
        waitpid(pids[r], NULL, 0);
    }
}

static void assert_meet(const struct launch *launch)
{
    char lines[4096];
    launch_all(launch, 20 * NEP_S, lines, sizeof lines);
    assert_string_equal(lines, "0 \n0 \n0 \n");
}

static uint16_t port_of_this_test(void)
{
    return (uint16_t)(FIRST_PORT + getpid() % 8000);
}

static void test_launchers_one_machine_meets_without_a_port(void **state)
{
    (void)state;
    char job[64];
    snprintf(job, sizeof job, "PMIX_NAMESPACE=test%ld", (long)getpid());
    char run[64];
    snprintf(run, sizeof run, "TORCHELASTIC_RUN_ID=test%ld", (long)getpid());
    char slurm[64];
    snprintf(slurm, sizeof slurm, "SLURM_JOB_ID=test%ld", (long)getpid());
    const struct launch launches[] = {
        {{"OMPI_COMM_WORLD_RANK=%u", "OMPI_COMM_WORLD_SIZE=3", "OMPI_COMM_WORLD_LOCAL_SIZE=3", job},
         NUM},
        {{"PMI_RANK=%u", "PMI_SIZE=3", "MPI_LOCALNRANKS=3"}, NUM},
        {{"RANK=%u", "WORLD_SIZE=3", "LOCAL_WORLD_SIZE=3", "MASTER_ADDR=127.0.0.1",
          "MASTER_PORT=29500", run},
         NUM},
        {{"SLURM_PROCID=%u", "SLURM_STEP_NUM_TASKS=3", "SLURM_STEP_NUM_NODES=1", slurm}, NUM},
    };
    for (size_t i = 0; i < sizeof launches / sizeof launches[0]; i++) {
        assert_meet(&launches[i]);
    }
}

static void test_launchers_torchrun_ports_taken_by_others(void **state)
{
    (void)state;
    uint16_t port = port_of_this_test(), other_port;
    char text[64];
    /* The next port: somebody who accepts and says nothing. The one after: another job's server. */
    int silent_fd = -1;
    struct nep_rendezvous_server *other = NULL;
    struct nep_rendezvous_params params = {.host = "127.0.0.1",
                                           .port = (uint16_t)(port + 2),
                                           .num_ranks = NUM,
                                           .secret = "of another job"};
    uint16_t silent_port;
    assert_int_equal(nep_rdv_listen("127.0.0.1", (uint16_t)(port + 1), &silent_fd, &silent_port),
                     NEP_OK);
    assert_int_equal(nep_rendezvous_server_start(&params, &other, &other_port), NEP_OK);
    snprintf(text, sizeof text, "MASTER_PORT=%u", port);
    const struct launch launch = {
        {"RANK=%u", "WORLD_SIZE=3", "MASTER_ADDR=127.0.0.1", text, "TORCHELASTIC_RUN_ID=none"},
        NUM};
    assert_meet(&launch);
    nep_rendezvous_server_stop(other);
    close(silent_fd);
}

static void test_launchers_slurm_meets_at_its_first_host(void **state)
{
    (void)state;
    char job[64];
    snprintf(job, sizeof job, "SLURM_JOB_ID=%ld", (long)getpid());
    const struct launch launch = {{"SLURM_PROCID=%u", "SLURM_NTASKS=3", job, "SLURM_STEP_ID=0",
                                   "SLURM_STEP_NODELIST=localhost,other[1-2]"},
                                  NUM};
    assert_meet(&launch);
}

static void test_launchers_address_of_rank_0_or_a_server(void **state)
{
    (void)state;
    char address[64];
    struct nep_rendezvous_server *server = NULL;
    struct nep_rendezvous_params params = {
        .host = "127.0.0.1", .num_ranks = NUM, .secret = "words of this job"};
    assert_int_equal(nep_rendezvous_server_start(&params, &server, &params.port), NEP_OK);
    snprintf(address, sizeof address, "NEP_RENDEZVOUS=127.0.0.1:%u", params.port);
    const struct launch launch = {
        {"NEP_RANK=%u", "NEP_RANKS=3", address, "NEP_SECRET=words of this job"}, NUM};
    assert_meet(&launch); /* a server is there */
    nep_rendezvous_server_stop(server);
    assert_meet(&launch); /* rank 0 serves */
}

static void test_launchers_missing_rank_and_address_are_named(void **state)
{
    (void)state;
    char lines[4096], job[64];
    snprintf(job, sizeof job, "PMIX_NAMESPACE=gone%ld", (long)getpid());
    const struct launch missing = {
        {"OMPI_COMM_WORLD_RANK=%u", "OMPI_COMM_WORLD_SIZE=3", "OMPI_COMM_WORLD_LOCAL_SIZE=3", job},
        2};
    launch_all(&missing, 3 * NEP_S, lines, sizeof lines);
    const char *first = strstr(lines, "these did not join within 3s: rank 2");
    assert_non_null(first);
    assert_non_null(strstr(first + 1, "these did not join within 3s: rank 2"));
    const struct launch apart = {
        {"OMPI_COMM_WORLD_RANK=%u", "OMPI_COMM_WORLD_SIZE=3", "OMPI_COMM_WORLD_LOCAL_SIZE=1"}, 1};
    launch_all(&apart, 3 * NEP_S, lines, sizeof lines);
    assert_says(lines, "Open MPI gives no address");
    assert_says(lines, "mpirun -x NEP_RENDEZVOUS");
    const struct launch none = {{NULL}, 1};
    launch_all(&none, 3 * NEP_S, lines, sizeof lines);
    assert_says(lines, "start with torchrun, mpirun or srun");
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "--rank") == 0) {
        return rank_main(argv[2]);
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_launchers_one_machine_meets_without_a_port),
        cmocka_unit_test(test_launchers_torchrun_ports_taken_by_others),
        cmocka_unit_test(test_launchers_slurm_meets_at_its_first_host),
        cmocka_unit_test(test_launchers_address_of_rank_0_or_a_server),
        cmocka_unit_test(test_launchers_missing_rank_and_address_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
