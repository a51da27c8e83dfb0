/* SPDX-License-Identifier: Apache-2.0 */
/* Any values in any launchers' variables: refused with a sentence, or a rank below the size. */
#include "base/config.h"
#include "base/log.h"
#include "tests/fuzz/fuzz.h"

static const char *const names[] = {"NEP_RANK",
                                    "NEP_RANKS",
                                    "NEP_RENDEZVOUS",
                                    "RANK",
                                    "WORLD_SIZE",
                                    "LOCAL_RANK",
                                    "LOCAL_WORLD_SIZE",
                                    "MASTER_ADDR",
                                    "MASTER_PORT",
                                    "TORCHELASTIC_RUN_ID",
                                    "TORCHELASTIC_RESTART_COUNT",
                                    "OMPI_COMM_WORLD_RANK",
                                    "OMPI_COMM_WORLD_SIZE",
                                    "OMPI_COMM_WORLD_LOCAL_SIZE",
                                    "PMIX_NAMESPACE",
                                    "PMI_RANK",
                                    "PMI_SIZE",
                                    "SLURM_PROCID",
                                    "SLURM_NTASKS",
                                    "SLURM_STEP_NUM_TASKS",
                                    "SLURM_STEP_NUM_NODES",
                                    "SLURM_JOB_ID",
                                    "SLURM_STEP_ID",
                                    "SLURM_STEP_NODELIST",
                                    "PMI_JOBID"};

/* Each line is a variable: NAME=value of a known name, or a value whose first byte picks the name.
 */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    char *lines[33];
    struct nep_launch_env env, before;
    nep_log_open(NEP_LOG_NONE, "");
    char *text = fuzz_lines(data, len, lines, 32);
    clearenv();
    /* putenv, not setenv: glibc never frees what setenv copied. */
    char *variables[32] = {NULL};
    for (size_t i = 0; lines[i] != NULL; i++) {
        size_t pick = (uint8_t)lines[i][0] % (sizeof names / sizeof names[0]);
        const char *equals = strchr(lines[i], '=');
        bool is_named = equals != NULL && equals != lines[i];
        size_t cap = strlen(lines[i]) + 64;
        variables[i] = malloc(cap);
        PROMISE(variables[i] != NULL);
        snprintf(variables[i], cap, "%s%s%s", is_named ? "" : names[pick], is_named ? "" : "=",
                 is_named ? lines[i] : lines[i] + (lines[i][0] != '\0'));
        putenv(variables[i]);
    }
    memset(&env, 0x5a, sizeof env);
    before = env;
    if (nep_launch_env_read(&env) == NEP_OK) {
        PROMISE(env.launcher != NULL);
        PROMISE((env.rank == UINT32_MAX) == (env.num_ranks == UINT32_MAX));
        PROMISE(env.rank == UINT32_MAX || env.rank < env.num_ranks);
        PROMISE(memchr(env.address, 0, sizeof env.address) != NULL);
        PROMISE(memchr(env.job, 0, sizeof env.job) != NULL);
        PROMISE(!env.is_rendezvous || env.port != 0);
    } else {
        PROMISE(nep_last_message()[0] != '\0');
        PROMISE(memcmp(&env, &before, sizeof env) == 0);
    }
    clearenv();
    for (size_t i = 0; i < 32; i++) {
        free(variables[i]);
    }
    free(text);
    return 0;
}
