/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who started this process, and what it says: one row per launcher, the innermost first. A job
 * script under Slurm may run mpirun, and mpirun may run torchrun, each inheriting the outer
 * variables: so nearep's own come first, then torchrun, Open MPI, MPICH, and Slurm last.
 *
 * Rejected: linking PMIx or PMI. The environment has rank and size everywhere; what it lacks is an
 * address between hosts under mpirun, and NEP_RENDEZVOUS is one word.
 */
#include <stdlib.h>
#include <string.h>

#include "base/config.h"

struct launcher {
    const char *name;
    const char *rank[2]; /* names of variables; the first that is set counts */
    const char *size[2];
    const char *local_rank[2];
    const char *local_size[2];
    const char *job[2]; /* parts, joined by '.' */
    const char *address;
    const char *port;
};

static const struct launcher launchers[] = {
    {"nearep", {"NEP_RANK", NULL}, {"NEP_RANKS", NULL}, {NULL}, {NULL}, {NULL}, NULL, NULL},
    {"torchrun",
     {"RANK", NULL},
     {"WORLD_SIZE", NULL},
     {"LOCAL_RANK", NULL},
     {"LOCAL_WORLD_SIZE", NULL},
     {"TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"},
     "MASTER_ADDR",
     "MASTER_PORT"},
    {"Open MPI",
     {"OMPI_COMM_WORLD_RANK", NULL},
     {"OMPI_COMM_WORLD_SIZE", NULL},
     {"OMPI_COMM_WORLD_LOCAL_RANK", NULL},
     {"OMPI_COMM_WORLD_LOCAL_SIZE", NULL},
     {"PMIX_NAMESPACE", NULL},
     NULL,
     NULL},
    {"MPICH",
     {"PMI_RANK", NULL},
     {"PMI_SIZE", NULL},
     {"MPI_LOCALRANKID", NULL},
     {"MPI_LOCALNRANKS", NULL},
     {"PMI_JOBID", NULL},
     NULL,
     NULL},
    {"Slurm",
     {"SLURM_PROCID", NULL},
     {"SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"},
     {"SLURM_LOCALID", NULL},
     {NULL},
     {"SLURM_JOB_ID", "SLURM_STEP_ID"},
     NULL,
     NULL},
};

static const char *first_set(const char *const names[2], const char **name_p)
{
    for (int i = 0; i < 2; i++) {
        const char *value = names[i] == NULL ? NULL : nep_env_get(names[i]);
        if (value != NULL) {
            *name_p = names[i];
            return value;
        }
    }
    return NULL;
}

static enum nep_status read_number(const char *const names[2], uint32_t least, uint32_t most,
                                   uint32_t *number_p)
{
    const char *name = NULL;
    const char *text = first_set(names, &name);
    char *end;
    if (text == NULL) {
        *number_p = UINT32_MAX;
        return NEP_OK;
    }
    unsigned long long number =
        text[0] >= '0' && text[0] <= '9' ? strtoull(text, &end, 10) : UINT64_MAX;
    if (number > most || number < least || *end != '\0') {
        return nep_fail(NEP_ERR_INVALID,
                        "the launcher's %s is '%.40s', not a number from %u to %u: correct it, or "
                        "give rank and size to nep_comm_create",
                        name, text, least, most);
    }
    *number_p = (uint32_t)number;
    return NEP_OK;
}

static void read_job(const struct launcher *launcher, struct nep_launch_env *env)
{
    for (int i = 0; i < 2; i++) {
        const char *part = launcher->job[i] == NULL ? NULL : nep_env_get(launcher->job[i]);
        if (part != NULL) {
            size_t used = strlen(env->job);
            snprintf(env->job + used, sizeof env->job - used, "%s%.100s", used == 0 ? "" : ".",
                     part);
        }
    }
}

/* The first host of "node[03-07,9],other": "node03". Slurm writes lists this way. */
static void first_host(const char *list, char *host, size_t cap)
{
    size_t used = 0;
    bool in_brackets = false;
    for (const char *at = list; *at != '\0' && used + 1 < cap; at++) {
        if (*at == '[') {
            in_brackets = true;
        } else if (in_brackets && (*at == '-' || *at == ',' || *at == ']')) {
            at = strchr(at, ']');
            if (at == NULL) {
                break;
            }
            in_brackets = false;
        } else if (*at == ',') {
            break;
        } else {
            host[used++] = *at;
        }
    }
    host[used] = '\0';
}

static enum nep_status read_address(const struct launcher *launcher, struct nep_launch_env *env)
{
    const char *rendezvous = nep_env_get("NEP_RENDEZVOUS");
    const char *address = launcher->address == NULL ? NULL : nep_env_get(launcher->address);
    const char *hosts = nep_env_get("SLURM_STEP_NODELIST");
    if (rendezvous != NULL) {
        env->is_rendezvous = true;
        return nep_parse_host_port(rendezvous, "NEP_RENDEZVOUS", env->address, sizeof env->address,
                                   &env->port);
    }
    if (address != NULL) {
        uint32_t port;
        const char *const names[2] = {launcher->port, NULL};
        enum nep_status status = read_number(names, 1, 65535, &port);
        if (status != NEP_OK) {
            return status;
        }
        if (strlen(address) >= sizeof env->address) {
            return nep_fail(NEP_ERR_INVALID, "%s has %zu characters, at most %zu",
                            launcher->address, strlen(address), sizeof env->address - 1);
        }
        snprintf(env->address, sizeof env->address, "%s", address);
        env->port = port == UINT32_MAX ? 0 : (uint16_t)port;
    } else if (strcmp(launcher->name, "Slurm") == 0 && hosts != NULL) {
        first_host(hosts, env->address, sizeof env->address);
    }
    return NEP_OK;
}

static enum nep_status read_launcher(const struct launcher *launcher, struct nep_launch_env *env)
{
    enum nep_status status = read_number(launcher->rank, 0, UINT32_MAX - 2, &env->rank);
    if (status == NEP_OK) {
        status = read_number(launcher->size, 1, UINT32_MAX - 1, &env->num_ranks);
    }
    if (status == NEP_OK) {
        status = read_number(launcher->local_rank, 0, UINT32_MAX - 2, &env->local_rank);
    }
    if (status == NEP_OK) {
        status = read_number(launcher->local_size, 1, UINT32_MAX - 1, &env->local_size);
    }
    if (status != NEP_OK) {
        return status;
    }
    if (env->rank >= env->num_ranks) {
        return nep_fail(NEP_ERR_INVALID,
                        "%s gives rank %u of %u ranks (%s, %s): ranks count from 0", launcher->name,
                        env->rank, env->num_ranks, launcher->rank[0], launcher->size[0]);
    }
    const char *num_nodes = nep_env_get("SLURM_STEP_NUM_NODES");
    if (strcmp(launcher->name, "Slurm") == 0 && num_nodes != NULL && strcmp(num_nodes, "1") == 0) {
        env->local_size = env->num_ranks;
    }
    env->launcher = launcher->name;
    read_job(launcher, env);
    return NEP_OK;
}

enum nep_status nep_launch_env_read(struct nep_launch_env *env)
{
    static const struct launcher none = {"none", {NULL}, {NULL}, {NULL},
                                         {NULL}, {NULL}, NULL,   NULL};
    struct nep_launch_env found = {.launcher = "none",
                                   .rank = UINT32_MAX,
                                   .num_ranks = UINT32_MAX,
                                   .local_rank = UINT32_MAX,
                                   .local_size = UINT32_MAX};
    const struct launcher *launcher = &none;
    const char *unused;
    for (size_t i = 0; i < sizeof launchers / sizeof launchers[0]; i++) {
        if (first_set(launchers[i].rank, &unused) != NULL &&
            first_set(launchers[i].size, &unused) != NULL) {
            launcher = &launchers[i];
            break;
        }
    }
    enum nep_status status = launcher == &none ? NEP_OK : read_launcher(launcher, &found);
    if (status == NEP_OK) {
        status = read_address(launcher, &found);
    }
    if (status == NEP_OK) {
        *env = found;
    }
    return status;
}
