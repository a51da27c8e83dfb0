/* SPDX-License-Identifier: Apache-2.0 */
/* A rendezvous on a host that stays, so that no rank is a single point of failure. */
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "tools/nep_info.h"
#include "transport/rendezvous.h"

static enum nep_status start(struct info *info, struct nep_rendezvous_params *params, char *host,
                             size_t cap, struct nep_rendezvous_server **server_p)
{
    enum nep_status status;
    params->host = host;
    if (info->address != NULL) {
        status = nep_parse_host_port(info->address, "--serve", host, cap, &params->port);
        return status == NEP_OK ? nep_rendezvous_server_start(params, server_p, &params->port)
                                : status;
    }
    params->port = 29600;
    snprintf(host, cap, "::");
    status = nep_rendezvous_server_start(params, server_p, &params->port);
    if (status != NEP_OK && status != NEP_ERR_BUSY) {
        snprintf(host, cap, "0.0.0.0"); /* no IPv6 here */
        status = nep_rendezvous_server_start(params, server_p, &params->port);
    }
    return status;
}

/* A connection for each rank; the soft limit is often 1024. */
static void raise_file_limit(void)
{
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}

int info_serve(struct info *info)
{
    char secret[NEP_RENDEZVOUS_SECRET_BYTES], host[256], shown[256];
    struct nep_rendezvous_server *server = NULL;
    struct nep_rendezvous_params params = {.num_ranks = info->num_ranks, .secret = secret};
    sigset_t signals;
    int signal_number;
    raise_file_limit();
    /* Before the server's thread starts: it inherits the mask, and sigwait below gets them. */
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    if (nep_rendezvous_secret_read(&info->config, secret) != NEP_OK) {
        return info_error(INFO_UNUSABLE, "%s", nep_last_message());
    }
    enum nep_status status = start(info, &params, host, sizeof host, &server);
    if (status != NEP_OK) {
        return info_error(status == NEP_ERR_INVALID ? INFO_UNUSABLE : INFO_FAILED, "%s",
                          nep_last_message());
    }
    bool is_any = strcmp(host, "::") == 0 || strcmp(host, "0.0.0.0") == 0;
    snprintf(shown, sizeof shown, "%s", host);
    if (is_any) {
        gethostname(shown, sizeof shown - 1);
    }
    fprintf(info->out, "serving %u ranks; on each: export NEP_RENDEZVOUS=%s%s%s:%u\n",
            info->num_ranks, strchr(shown, ':') != NULL ? "[" : "", shown,
            strchr(shown, ':') != NULL ? "]" : "", params.port);
    if (secret[0] == '\0') {
        fprintf(info->out, "no secret is set (NEP_SECRET_FILE): who reaches this port can join\n");
    }
    fflush(info->out);
    while (sigwait(&signals, &signal_number) != 0) {
    }
    nep_rendezvous_server_stop(server);
    return INFO_FINE;
}
