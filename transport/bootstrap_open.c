/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where ranks meet, in order of what is known:
 *   the caller's functions                    nothing to do here
 *   an address (params, NEP_RENDEZVOUS)       rank 0 serves there if it is an address of its own
 *                                             and free; else somebody serves there already
 *   all ranks on one machine (the launcher    a Unix socket in the abstract namespace, named after
 *   says so)                                  user and job: no port, no file, nothing left behind
 *   MASTER_ADDR and MASTER_PORT, or Slurm's   rank 0 serves at one of 16 ports there
 *   list of hosts
 *
 * torchrun's own store holds MASTER_PORT, so the 16 ports after it are tried. Which of them is the
 * right one cannot be told by its being open: the handshake tells, since its key is made of the
 * secret, or else of the job's id, which another job's server does not know. Rejected: speaking the
 * protocol of torch's store to publish the port, which binds nearep to its version.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/bootstrap.h"
#include "transport/rendezvous.h"

enum { NUM_DERIVED_PORTS = 16, SLURM_FIRST_PORT = 20000, SLURM_NUM_PORTS = 20000 };

struct place {
    char host[256];
    uint16_t port;
    uint16_t num_ports;
    bool is_rank_0; /* nobody else can be serving there */
    char secret[NEP_RENDEZVOUS_SECRET_BYTES];
};

static uint64_t hash_text(const char *text)
{
    uint64_t hash = 0xcbf29ce484222325ull; /* FNV-1a */
    for (; *text != '\0'; text++) {
        hash = (hash ^ (uint8_t)*text) * 0x100000001b3ull;
    }
    return hash;
}

/* ---- who ------------------------------------------------------------------------------------ */

static enum nep_status resolve_rank(const struct nep_comm_params *params,
                                    const struct nep_launch_env *env, uint32_t *rank_p,
                                    uint32_t *num_ranks_p)
{
    uint32_t rank = params->num_ranks != 0 ? params->rank : env->rank;
    uint32_t num_ranks = params->num_ranks != 0 ? params->num_ranks : env->num_ranks;
    if (num_ranks == UINT32_MAX) {
        return nep_fail(NEP_ERR_INVALID,
                        "rank and number of ranks are unknown: start with torchrun, mpirun or "
                        "srun, set NEP_RANK, NEP_RANKS and NEP_RENDEZVOUS, or fill rank and "
                        "num_ranks of nep_comm_params");
    }
    if (rank >= num_ranks) {
        return nep_fail(NEP_ERR_INVALID, "rank %u of %u ranks: ranks count from 0", rank,
                        num_ranks);
    }
    *rank_p = rank;
    *num_ranks_p = num_ranks;
    return NEP_OK;
}

static enum nep_status copy_bootstrap(const struct nep_bootstrap *given, struct nep_bootstrap *out)
{
    struct nep_bootstrap copy;
    enum nep_status status = nep_struct_copy(&copy, sizeof copy, given,
                                             offsetof(struct nep_bootstrap, put), "nep_bootstrap");
    if (status != NEP_OK) {
        return status;
    }
    if (copy.allgather == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_bootstrap has no allgather: it is the one function "
                                         "that a communicator cannot do without");
    }
    if ((copy.put == NULL) != (copy.get == NULL) || (copy.put == NULL) != (copy.cas == NULL)) {
        return nep_fail(NEP_ERR_INVALID,
                        "nep_bootstrap has some of put, get and cas: give all three or none");
    }
    *out = copy;
    return NEP_OK;
}

/* ---- where ---------------------------------------------------------------------------------- */

/* Equal on all ranks of the job, and different from those of other jobs of this user. */
static void job_text(const struct nep_launch_env *env, char *text, size_t cap)
{
    if (env->job[0] == '\0' && env->address[0] == '\0') {
        /* MPICH names no job; ranks of one machine have one parent. */
        snprintf(text, cap, "%s parent %ld", env->launcher, (long)getppid());
    } else {
        snprintf(text, cap, "%s %.100s %.100s %u", env->launcher, env->job, env->address,
                 env->port);
    }
}

static enum nep_status derive_place(const struct nep_launch_env *env, uint32_t num_ranks,
                                    struct place *place)
{
    char job[320];
    job_text(env, job, sizeof job);
    if (place->secret[0] == '\0') {
        snprintf(place->secret, sizeof place->secret, "job %.250s", job);
    }
    place->is_rank_0 = true;
    if (env->local_size == num_ranks) {
        snprintf(place->host, sizeof place->host, "@nearep-%u-%016llx", (unsigned)geteuid(),
                 (unsigned long long)hash_text(job));
        place->num_ports = 1;
        return NEP_OK;
    }
    if (env->address[0] == '\0') {
        return nep_fail(NEP_ERR_INVALID,
                        "%s gives no address where ranks of different hosts could meet: set "
                        "NEP_RENDEZVOUS=host:port, host being rank 0's, on all ranks (mpirun -x "
                        "NEP_RENDEZVOUS)",
                        env->launcher);
    }
    snprintf(place->host, sizeof place->host, "%s", env->address);
    place->num_ports = NUM_DERIVED_PORTS;
    place->port = env->port != 0 ? (uint16_t)(env->port > 65535 - NUM_DERIVED_PORTS
                                                  ? env->port - NUM_DERIVED_PORTS
                                                  : env->port + 1)
                                 : (uint16_t)(SLURM_FIRST_PORT + hash_text(job) % SLURM_NUM_PORTS);
    return NEP_OK;
}

static enum nep_status find_place(const struct nep_comm_params *params,
                                  const struct nep_config *config, const struct nep_launch_env *env,
                                  uint32_t rank, uint32_t num_ranks, struct place *place)
{
    const char *address = params->rendezvous != NULL   ? params->rendezvous
                          : config->rendezvous[0] != 0 ? config->rendezvous
                                                       : NULL;
    memset(place, 0, sizeof *place);
    enum nep_status status = nep_rendezvous_secret_read(config, place->secret);
    if (status != NEP_OK) {
        return status;
    }
    if (address != NULL) {
        place->num_ports = 1;
        return nep_parse_host_port(address, "the rendezvous' address", place->host,
                                   sizeof place->host, &place->port);
    }
    if (num_ranks == 1) {
        snprintf(place->host, sizeof place->host, "127.0.0.1");
        place->is_rank_0 = true;
        return nep_rendezvous_secret_make(place->secret);
    }
    if (env->rank != rank || env->num_ranks != num_ranks || strcmp(env->launcher, "nearep") == 0) {
        return nep_fail(NEP_ERR_INVALID,
                        "rank %u of %u has no place to meet the others: set NEP_RENDEZVOUS=host:"
                        "port or the rendezvous of nep_comm_params, or give a bootstrap",
                        rank, num_ranks);
    }
    return derive_place(env, num_ranks, place);
}

/* ---- meeting -------------------------------------------------------------------------------- */

static void say_who_serves(const struct nep_rendezvous_params *params, uint16_t port)
{
    nep_info("rank 0 serves the rendezvous at %s port %u: it is a single point of failure, "
             "without it no rank can be replaced; nep-info --serve on a host that stays avoids "
             "that",
             params->host, port);
}

/*
 * Rank 0 serves, or finds that somebody does. An address that is taken may be the server of this
 * rank's earlier communicator, which may end at any moment: so both are tried in turn.
 */
static enum nep_status serve_or_join(const struct nep_rendezvous_params *params,
                                     uint64_t deadline_ns, struct nep_rendezvous_client **client_p)
{
    uint32_t num_ports = params->num_ports == 0 ? 1 : params->num_ports;
    for (;;) {
        enum nep_status status = NEP_ERR_BUSY;
        for (uint32_t i = 0; i < num_ports && params->port + i <= 65535; i++) {
            struct nep_rendezvous_params one = *params;
            struct nep_rendezvous_server *server = NULL;
            one.port = (uint16_t)(params->port + i);
            one.num_ports = 1;
            status = nep_rendezvous_server_start(&one, &server, &one.port);
            if (status == NEP_OK) {
                say_who_serves(&one, one.port);
            } else if (status != NEP_ERR_BUSY) {
                return nep_rendezvous_client_open(params, client_p);
            }
            one.timeout_ns = nep_left_ns(deadline_ns);
            if (server == NULL) {
                one.timeout_ns = one.timeout_ns > 2 * NEP_S ? 2 * NEP_S : one.timeout_ns;
                one.is_one_try = true;
            }
            status = nep_rendezvous_client_open(&one, client_p);
            if (status == NEP_OK) {
                nep_rendezvous_client_keep(*client_p, server);
                return NEP_OK;
            }
            nep_rendezvous_server_stop(server);
            if (server != NULL || (status == NEP_ERR_MISMATCH && num_ports == 1)) {
                return status;
            }
        }
        if (nep_left_ns(deadline_ns) < 10 * NEP_MS) {
            return nep_fail_prefix(NEP_ERR_TIMEOUT,
                                   "rank 0 can neither serve the rendezvous at %s port %u nor "
                                   "join one there: ",
                                   params->host, params->port);
        }
        nanosleep(&(struct timespec){.tv_nsec = 5 * (long)NEP_MS}, NULL);
    }
}

enum nep_status nep_bootstrap_open(const struct nep_comm_params *params,
                                   const struct nep_config *config, uint64_t timeout_ns,
                                   struct nep_bootstrap *out, uint32_t *rank_p,
                                   uint32_t *num_ranks_p, struct nep_rendezvous_client **owned_p)
{
    struct nep_launch_env env;
    struct place place;
    uint32_t rank = 0, num_ranks = 0;
    enum nep_status status = nep_launch_env_read(&env);
    if (status == NEP_OK) {
        status = resolve_rank(params, &env, &rank, &num_ranks);
    }
    struct nep_rendezvous_client *client = NULL;
    struct nep_bootstrap bootstrap;
    if (status == NEP_OK && params->bootstrap != NULL) {
        status = copy_bootstrap(params->bootstrap, &bootstrap);
    } else if (status == NEP_OK) {
        status = find_place(params, config, &env, rank, num_ranks, &place);
        struct nep_rendezvous_params meet = {.host = place.host,
                                             .port = place.port,
                                             .num_ports = place.num_ports,
                                             .num_ranks = num_ranks,
                                             .rank = rank,
                                             .secret = place.secret,
                                             .timeout_ns = timeout_ns,
                                             .is_rank_0 = place.is_rank_0,
                                             .is_newcomer = params->joins != 0};
        if (status == NEP_OK) {
            nep_info("rank %u of %u (%s) meets the others at %s port %u", rank, num_ranks,
                     env.launcher, place.host, place.port);
            status = rank == 0 && params->joins == 0
                         ? serve_or_join(&meet, nep_deadline_ns(timeout_ns), &client)
                         : nep_rendezvous_client_open(&meet, &client);
        }
        if (status == NEP_OK) {
            nep_rendezvous_client_bootstrap(client, &bootstrap);
        }
    }
    if (status != NEP_OK) {
        return status;
    }
    *out = bootstrap;
    *rank_p = rank;
    *num_ranks_p = num_ranks;
    *owned_p = client;
    return NEP_OK;
}

void nep_bootstrap_close(struct nep_rendezvous_client *owned)
{
    nep_rendezvous_client_close(owned);
}
