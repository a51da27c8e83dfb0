/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nep-perf put: the transport alone. Like perftest, a program without a host name is the server and
 * waits for a client that names it; they meet through the built-in rendezvous, which the server
 * hosts. --ranks 2 forks both. Under a launcher with two ranks rank 0 is the server.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "perftest/put.h"
#include "transport/bootstrap.h"
#include "transport/rendezvous.h"
#include "transport/topology.h"

/* "auto": the first that works here; two machines need a fabric. */
static const char *choose_transport(const struct nep_perf_put_options *options,
                                    const struct nep_config *config)
{
    if (strcmp(options->transport, "auto") != 0) {
        return options->transport;
    }
    static const char *const names[] = {"verbs", "ucx"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const struct nep_transport_ops *ops;
        const char *args;
        if (nep_transport_find(names[i], &ops, &args) == NEP_OK && ops->probe(config) == NEP_OK) {
            return names[i];
        }
    }
    return "shm";
}

static int run_sizes(struct nep_perf_put_side *side)
{
    const struct nep_perf_put_options *options = side->options;
    struct nep_perf_put_result results[32];
    uint64_t sizes[32];
    uint32_t num_sizes = nep_perf_put_sizes(options, sizes);
    bool is_quiet = options->json != NULL && strcmp(options->json, "-") == 0;
    bool is_shown = side->rank == 1 && !is_quiet;
    uint64_t wrong = 0;
    int rc = nep_perf_put_open(side);
    if (rc == -1 && is_shown) {
        nep_perf_put_banner(stdout, side);
    }
    for (uint32_t i = 0; i < num_sizes && rc == -1; i++) {
        rc = nep_perf_put_measure(side, sizes[i], &results[i]);
        if (rc == -1 && is_shown) {
            nep_perf_put_row(stdout, side, &results[i]);
            fflush(stdout);
        }
        wrong += rc == -1 ? results[i].wrong : 0;
    }
    if (rc == -1 && side->rank == 1 && options->json != NULL) {
        rc = nep_perf_put_json(side, results, num_sizes);
        rc = rc == NEP_PERF_OK ? -1 : rc;
    }
    nep_perf_put_close(side);
    if (rc == -1 && wrong != 0) {
        rc = side->rank == 1
                 ? nep_perf_error(NEP_PERF_FAILED, "%llu bytes or announcements are wrong",
                                  (unsigned long long)wrong)
                 : NEP_PERF_FAILED;
    }
    return rc == -1 ? NEP_PERF_OK : rc;
}

/* One side whose bootstrap is there. */
static int run_side(const struct nep_perf_put_options *given, const struct nep_config *config,
                    const struct nep_bootstrap *bootstrap, uint32_t rank)
{
    static const uint32_t sizes[2] = {1, 1};
    struct nep_perf_put_options options = *given;
    struct nep_perf_put_side side = {.options = &options,
                                     .config = *config,
                                     .bootstrap = *bootstrap,
                                     .rank = rank,
                                     .topology = {.size = sizeof side.topology}};
    side.config.verbs_qps = options.qps != 0 ? options.qps : config->verbs_qps;
    side.config.verbs_paths = options.paths != 0 ? options.paths : config->verbs_paths;
    options.transport = choose_transport(given, config);
    const struct nep_agree_field fields[] = {
        {"--lat", options.is_lat},         {"--size", options.size},
        {"--all", options.is_all},         {"--iters", options.iters},
        {"--depth", options.depth},        {"--write-imm", options.is_announced},
        {"--verify", options.is_verified}, {"--seed", options.seed},
    };
    struct nep_topology_store *store = NULL;
    if (nep_topology_from_sizes(sizes, 2, rank, &store, &side.topology) != NEP_OK ||
        nep_bootstrap_agree(bootstrap, 2, "put", fields, sizeof fields / sizeof fields[0],
                            config->timeout_ns) != NEP_OK) {
        int rc = nep_perf_error(NEP_PERF_USAGE, "%s", nep_last_message());
        nep_topology_destroy(store);
        return rc;
    }
    int rc = run_sizes(&side);
    nep_topology_destroy(store);
    return rc;
}

static int join(const struct nep_perf_put_options *options, const struct nep_config *config,
                const struct nep_rendezvous_params *params)
{
    struct nep_rendezvous_client *client = NULL;
    struct nep_bootstrap bootstrap;
    if (nep_rendezvous_client_open(params, &client) != NEP_OK) {
        return nep_perf_error(NEP_PERF_FAILED, "%s", nep_last_message());
    }
    nep_rendezvous_client_bootstrap(client, &bootstrap);
    int rc = run_side(options, config, &bootstrap, params->rank);
    nep_rendezvous_client_close(client);
    return rc;
}

/* ---- both sides here ------------------------------------------------------------------------ */

static int run_spawned(const struct nep_perf_put_options *options, const struct nep_config *config)
{
    char host[64];
    snprintf(host, sizeof host, "@nep-perf-put-%d", (int)getpid());
    struct nep_rendezvous_params params = {
        .host = host, .num_ranks = 2, .timeout_ns = config->timeout_ns};
    pid_t self = getpid(), pids[2];
    fflush(NULL);
    for (uint32_t r = 0; r < 2; r++) {
        pids[r] = fork();
        if (pids[r] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            params.rank = r;
            int rc = getppid() == self ? join(options, config, &params) : NEP_PERF_FAILED;
            fflush(stdout);
            exit(rc);
        }
    }
    struct nep_rendezvous_server *server = NULL;
    uint16_t port;
    int rc = NEP_PERF_OK;
    if (pids[0] < 0 || pids[1] < 0 ||
        nep_rendezvous_server_start(&params, &server, &port) != NEP_OK) {
        rc = nep_perf_error(NEP_PERF_FAILED, "both sides cannot be started: %s",
                            pids[0] < 0 || pids[1] < 0 ? strerror(errno) : nep_last_message());
        for (uint32_t r = 0; r < 2; r++) {
            if (pids[r] > 0) {
                kill(pids[r], SIGKILL);
            }
        }
    }
    for (uint32_t r = 0; r < 2; r++) {
        int status = 0;
        if (pids[r] > 0 && waitpid(pids[r], &status, 0) == pids[r]) {
            int side = WIFEXITED(status) ? WEXITSTATUS(status) : NEP_PERF_FAILED;
            if (WIFSIGNALED(status)) {
                nep_perf_error(NEP_PERF_FAILED, "rank %u lost: ended by signal %d", r,
                               WTERMSIG(status));
            }
            rc = side > rc ? side : rc;
        }
    }
    nep_rendezvous_server_stop(server);
    return rc;
}

/* ---- two machines, or two shells ------------------------------------------------------------ */

static int run_server(const struct nep_perf_put_options *options, const struct nep_config *config,
                      struct nep_rendezvous_params *params)
{
    struct nep_rendezvous_server *server = NULL;
    uint16_t port;
    params->host = "0.0.0.0";
    if (nep_rendezvous_server_start(params, &server, &port) != NEP_OK) {
        return nep_perf_error(NEP_PERF_FAILED, "%s", nep_last_message());
    }
    printf("\n* Waiting for a client: nep-perf put [the same options] HOST (port %u) *\n", port);
    fflush(stdout);
    params->host = "127.0.0.1";
    params->port = port;
    int rc = join(options, config, params);
    nep_rendezvous_server_stop(server);
    return rc;
}

static int run_launched(const struct nep_perf_put_options *options, const struct nep_config *config,
                        const char *launcher)
{
    struct nep_comm_params params = {.size = sizeof params};
    struct nep_rendezvous_client *client = NULL;
    struct nep_bootstrap bootstrap;
    uint32_t rank, num_ranks;
    if (nep_bootstrap_open(&params, config, config->timeout_ns, &bootstrap, &rank, &num_ranks,
                           &client) != NEP_OK) {
        return nep_perf_error(NEP_PERF_FAILED, "under %s: %s", launcher, nep_last_message());
    }
    int rc = num_ranks == 2 ? run_side(options, config, &bootstrap, rank)
                            : nep_perf_error(NEP_PERF_USAGE, "put has 2 ranks, %s started %u",
                                             launcher, num_ranks);
    nep_bootstrap_close(client);
    return rc;
}

int nep_perf_put_main(int argc, char **argv)
{
    struct nep_perf_put_options options;
    struct nep_config config;
    struct nep_launch_env env;
    char secret[NEP_RENDEZVOUS_SECRET_BYTES] = "";
    int rc = nep_perf_put_parse(argc, argv, &options);
    if (rc != -1) {
        return rc;
    }
    if (nep_config_load(&config) != NEP_OK || nep_launch_env_read(&env) != NEP_OK ||
        nep_rendezvous_secret_read(&config, secret) != NEP_OK) {
        return nep_perf_error(NEP_PERF_USAGE, "%s", nep_last_message());
    }
    if (options.is_spawned) {
        return run_spawned(&options, &config);
    }
    if (env.num_ranks != UINT32_MAX && env.num_ranks != 0) {
        return run_launched(&options, &config, env.launcher);
    }
    struct nep_rendezvous_params params = {.host = options.host,
                                           .port = options.port,
                                           .num_ranks = 2,
                                           .rank = options.host == NULL ? 0 : 1,
                                           .secret = secret,
                                           .timeout_ns = config.timeout_ns};
    return options.host == NULL ? run_server(&options, &config, &params)
                                : join(&options, &config, &params);
}
