/* SPDX-License-Identifier: Apache-2.0 */
/* Environments as the launchers make them, each with what must be read from it. */
#include <stdlib.h>
#include <string.h>

#include "base/config.h"
#include "tests/unit/cmocka_all.h"

extern char **environ;

static enum nep_status read_env(const char *const *variables, struct nep_launch_env *env)
{
    clearenv();
    for (size_t i = 0; variables[i] != NULL; i++) {
        putenv((char *)variables[i]);
    }
    enum nep_status status = nep_launch_env_read(env);
    clearenv();
    return status;
}

static void test_launch_env_nothing_is_none(void **state)
{
    (void)state;
    struct nep_launch_env env;
    const char *const variables[] = {"PATH=/bin", NULL};
    assert_int_equal(read_env(variables, &env), NEP_OK);
    assert_string_equal(env.launcher, "none");
    assert_true(env.rank == UINT32_MAX && env.num_ranks == UINT32_MAX);
    assert_string_equal(env.address, "");
    assert_int_equal(env.port, 0);
    assert_false(env.is_rendezvous);
}

static void test_launch_env_torchrun_gives_all(void **state)
{
    (void)state;
    struct nep_launch_env env;
    const char *const variables[] = {"RANK=5",
                                     "WORLD_SIZE=8",
                                     "LOCAL_RANK=1",
                                     "LOCAL_WORLD_SIZE=4",
                                     "MASTER_ADDR=node0",
                                     "MASTER_PORT=29500",
                                     "TORCHELASTIC_RUN_ID=abc",
                                     "TORCHELASTIC_RESTART_COUNT=2",
                                     "SLURM_PROCID=1", /* torchrun under srun */
                                     "SLURM_NTASKS=2",
                                     NULL};
    assert_int_equal(read_env(variables, &env), NEP_OK);
    assert_string_equal(env.launcher, "torchrun");
    assert_int_equal(env.rank, 5);
    assert_int_equal(env.num_ranks, 8);
    assert_int_equal(env.local_rank, 1);
    assert_int_equal(env.local_size, 4);
    assert_string_equal(env.address, "node0");
    assert_int_equal(env.port, 29500);
    assert_string_equal(env.job, "abc.2");
    assert_false(env.is_rendezvous);
}

static void test_launch_env_open_mpi_and_mpich(void **state)
{
    (void)state;
    struct nep_launch_env env;
    const char *const open_mpi[] = {"OMPI_COMM_WORLD_RANK=3",
                                    "OMPI_COMM_WORLD_SIZE=4",
                                    "OMPI_COMM_WORLD_LOCAL_SIZE=2",
                                    "PMIX_NAMESPACE=1180368897",
                                    "PMI_RANK=0", /* Open MPI started under another PMI */
                                    "PMI_SIZE=1",
                                    NULL};
    assert_int_equal(read_env(open_mpi, &env), NEP_OK);
    assert_string_equal(env.launcher, "Open MPI");
    assert_int_equal(env.rank, 3);
    assert_int_equal(env.num_ranks, 4);
    assert_int_equal(env.local_size, 2);
    assert_string_equal(env.job, "1180368897");
    const char *const mpich[] = {"PMI_RANK=1", "PMI_SIZE=2", "MPI_LOCALNRANKS=2", NULL};
    assert_int_equal(read_env(mpich, &env), NEP_OK);
    assert_string_equal(env.launcher, "MPICH");
    assert_int_equal(env.rank, 1);
    assert_int_equal(env.local_size, 2);
}

static void test_launch_env_slurm_takes_first_host(void **state)
{
    (void)state;
    const struct {
        const char *list;
        const char *first;
    } cases[] = {{"SLURM_STEP_NODELIST=node[03-07,9],other", "node03"},
                 {"SLURM_STEP_NODELIST=n1", "n1"},
                 {"SLURM_STEP_NODELIST=a,b,c", "a"},
                 {"SLURM_STEP_NODELIST=rack[1-2]n[05,07]", "rack1n05"},
                 {"SLURM_STEP_NODELIST=x[", "x"},
                 {"SLURM_STEP_NODELIST=x[1-", "x1"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct nep_launch_env env;
        const char *const variables[] = {"SLURM_PROCID=0",
                                         "SLURM_STEP_NUM_TASKS=6",
                                         "SLURM_NTASKS=64",
                                         "SLURM_JOB_ID=77",
                                         "SLURM_STEP_ID=3",
                                         cases[i].list,
                                         NULL};
        assert_int_equal(read_env(variables, &env), NEP_OK);
        assert_string_equal(env.launcher, "Slurm");
        assert_int_equal(env.num_ranks, 6); /* the step's, not the job's */
        assert_string_equal(env.address, cases[i].first);
        assert_string_equal(env.job, "77.3");
        assert_int_equal(env.port, 0);
        assert_true(env.local_size == UINT32_MAX);
    }
    struct nep_launch_env env;
    const char *const one[] = {"SLURM_PROCID=0", "SLURM_NTASKS=6", "SLURM_STEP_NUM_NODES=1", NULL};
    assert_int_equal(read_env(one, &env), NEP_OK);
    assert_int_equal(env.local_size, 6);
}

static void test_launch_env_own_names_and_address_win(void **state)
{
    (void)state;
    struct nep_launch_env env;
    const char *const variables[] = {"NEP_RANK=1",
                                     "NEP_RANKS=2",
                                     "RANK=7",
                                     "WORLD_SIZE=8",
                                     "MASTER_ADDR=other",
                                     "NEP_RENDEZVOUS=[::1]:4000",
                                     NULL};
    assert_int_equal(read_env(variables, &env), NEP_OK);
    assert_string_equal(env.launcher, "nearep");
    assert_int_equal(env.rank, 1);
    assert_int_equal(env.num_ranks, 2);
    assert_string_equal(env.address, "::1");
    assert_int_equal(env.port, 4000);
    assert_true(env.is_rendezvous);
}

static void test_launch_env_nonsense_names_the_variable(void **state)
{
    (void)state;
    char address[400] = "MASTER_ADDR=";
    memset(address + strlen(address), 'a', 300);
    const struct {
        const char *variables[5];
        const char *says;
    } cases[] = {
        {{"RANK=x", "WORLD_SIZE=8", NULL}, "RANK is 'x'"},
        {{"RANK=-1", "WORLD_SIZE=8", NULL}, "RANK is '-1'"},
        {{"RANK=8", "WORLD_SIZE=8", NULL}, "rank 8 of 8"},
        {{"RANK=0", "WORLD_SIZE=0", NULL}, "WORLD_SIZE is '0'"},
        {{"RANK=0", "WORLD_SIZE=99999999999999999999", NULL}, "WORLD_SIZE"},
        {{"RANK=0", "WORLD_SIZE=2x", NULL}, "WORLD_SIZE is '2x'"},
        {{"RANK=0", "WORLD_SIZE=2", "LOCAL_RANK=?", NULL}, "LOCAL_RANK"},
        {{"RANK=0", "WORLD_SIZE=2", "MASTER_ADDR=a", "MASTER_PORT=65536", NULL}, "MASTER_PORT"},
        {{"RANK=0", "WORLD_SIZE=2", "NEP_RENDEZVOUS=a", NULL}, "NEP_RENDEZVOUS"},
        {{"RANK=0", "WORLD_SIZE=2", address, NULL}, "MASTER_ADDR has 300"},
        {{"SLURM_PROCID=3", "SLURM_NTASKS=3", NULL}, "Slurm gives rank 3 of 3"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct nep_launch_env env = {.rank = 42};
        assert_int_equal(read_env(cases[i].variables, &env), NEP_ERR_INVALID);
        if (strstr(nep_last_message(), cases[i].says) == NULL) {
            fail_msg("'%s' does not say '%s'", nep_last_message(), cases[i].says);
        }
        assert_int_equal(env.rank, 42);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_launch_env_nothing_is_none),
        cmocka_unit_test(test_launch_env_torchrun_gives_all),
        cmocka_unit_test(test_launch_env_open_mpi_and_mpich),
        cmocka_unit_test(test_launch_env_slurm_takes_first_host),
        cmocka_unit_test(test_launch_env_own_names_and_address_win),
        cmocka_unit_test(test_launch_env_nonsense_names_the_variable),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
