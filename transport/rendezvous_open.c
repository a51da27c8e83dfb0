/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a rank comes to its rendezvous: it tries again until the deadline while nobody listens, since
 * ranks and server start in any order; it gives up at once where trying again cannot help.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/rendezvous_client.h"
#include "transport/rendezvous_socket.h"

enum { RETRY_LEAST_MS = 20, RETRY_MOST_MS = 200, TRY_S = 1 };

/* Sends a fixed message and receives the fixed answer, into client->in. */
static enum nep_status exchange(struct nep_rendezvous_client *client, const uint8_t *bytes,
                                size_t len, size_t answer_len, uint64_t deadline_ns)
{
    client->in_have = 0;
    enum nep_status status = nep_rdv_send_all(client, bytes, len, deadline_ns);
    if (status == NEP_OK) {
        status = nep_rdv_receive(client, answer_len, deadline_ns);
    }
    client->in_have = 0;
    return status;
}

static enum nep_status shake_hands(struct nep_rendezvous_client *client, uint64_t deadline_ns)
{
    uint8_t hello[NEP_RDV_HELLO_BYTES], proof[NEP_RDV_MAC_BYTES];
    nep_rdv_session_init(&client->session, &client->secret, false);
    nep_rdv_write_hello(&client->session, hello);
    enum nep_status status =
        exchange(client, hello, sizeof hello, NEP_RDV_CHALLENGE_BYTES, deadline_ns);
    if (status == NEP_OK) {
        status = nep_rdv_answer_challenge(&client->session, client->in, proof);
    }
    if (status == NEP_OK) {
        status = exchange(client, proof, sizeof proof, NEP_RDV_WELCOME_BYTES, deadline_ns);
    }
    if (status == NEP_OK) {
        status = nep_rdv_check_welcome(&client->session, client->in);
    }
    return status;
}

/* The same for every communicator of a process, another for every other process. */
static void identify(uint8_t process[16], char *who, size_t cap)
{
    char text[512], host[65] = "", boot_id[40] = "";
    gethostname(host, sizeof host - 1);
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (file != NULL) {
        if (fgets(boot_id, sizeof boot_id, file) == NULL) {
            boot_id[0] = '\0';
        }
        fclose(file);
    }
    struct stat pid_namespace = {0};
    stat("/proc/self/ns/pid", &pid_namespace);
    snprintf(text, sizeof text, "%s|%s|%llu|%ld", host, boot_id,
             (unsigned long long)pid_namespace.st_ino, (long)getpid());
    struct nep_rdv_secret hash;
    nep_rdv_secret_init(&hash, text, strlen(text));
    memcpy(process, hash.key, 16);
    snprintf(who, cap, "host %s, process %ld", host, (long)getpid());
}

static enum nep_status join(struct nep_rendezvous_client *client, uint64_t deadline_ns)
{
    char who[NEP_RDV_WHO_BYTES];
    struct nep_rdv_message request = {.op = NEP_RDV_JOIN,
                                      .rank = client->rank,
                                      .num_ranks = client->num_ranks,
                                      .number = client->is_newcomer,
                                      .version = nep_version()};
    struct nep_rdv_message reply;
    identify(request.process, who, sizeof who);
    request.text = who;
    request.text_len = strlen(who);
    enum nep_status status = nep_rdv_send_message(client, &request, deadline_ns);
    if (status == NEP_OK) {
        status = nep_rdv_receive_message(client, deadline_ns, &reply);
    }
    if (status != NEP_OK) {
        return status;
    }
    if (reply.status != NEP_OK) {
        return nep_fail((enum nep_status)reply.status, "%s refused this rank: %.*s", client->name,
                        (int)reply.text_len, reply.text);
    }
    nep_debug("rank %u of %u joined group %llu of %s", client->rank, client->num_ranks,
              (unsigned long long)reply.number, client->name);
    return NEP_OK;
}

/*
 * One attempt at one port. *is_final_p: trying again cannot help. With several ports a stranger on
 * one of them is nobody's fault.
 */
static enum nep_status try_port(struct nep_rendezvous_client *client,
                                const struct nep_rendezvous_params *params, uint16_t port,
                                uint64_t deadline_ns, bool *is_final_p)
{
    *is_final_p = false;
    const char *whose = params->is_rank_0 ? " (served by rank 0)" : "";
    if (params->host[0] == '@') {
        snprintf(client->name, sizeof client->name, "the rendezvous at %s%s", params->host, whose);
    } else {
        snprintf(client->name, sizeof client->name, "the rendezvous at %s port %u%s", params->host,
                 port, whose);
    }
    uint64_t share = params->num_ports < 2 ? nep_left_ns(deadline_ns) / 8 : 0;
    uint64_t most = nep_deadline_ns(TRY_S * NEP_S + share);
    uint64_t try_ns = most < deadline_ns ? most : deadline_ns;
    enum nep_status status = nep_rdv_connect(params->host, port, try_ns, &client->fd);
    if (status != NEP_OK) {
        *is_final_p = status == NEP_ERR_INVALID || status == NEP_ERR_MISMATCH;
        return status;
    }
    status = shake_hands(client, try_ns);
    *is_final_p = (status == NEP_ERR_MISMATCH || status == NEP_ERR_FORMAT) && params->num_ports < 2;
    if (status == NEP_OK) {
        status = join(client, deadline_ns);
        *is_final_p = status == NEP_ERR_MISMATCH;
    }
    if (status != NEP_OK) {
        close(client->fd);
        client->fd = -1;
    }
    return status;
}

static enum nep_status connect_and_join(struct nep_rendezvous_client *client,
                                        const struct nep_rendezvous_params *params)
{
    uint64_t deadline_ns = nep_deadline_ns(params->timeout_ns);
    uint32_t num_ports = params->num_ports == 0 ? 1 : params->num_ports;
    uint64_t pause_ms = RETRY_LEAST_MS;
    uint32_t num_tries = 0;
    for (;;) {
        enum nep_status status = NEP_ERR_INVALID;
        for (uint32_t i = 0; i < num_ports && params->port + i <= 65535; i++) {
            bool is_final;
            status = try_port(client, params, (uint16_t)(params->port + i), deadline_ns, &is_final);
            num_tries++;
            if (status == NEP_OK || is_final) {
                return status;
            }
        }
        if (params->is_one_try || nep_left_ns(deadline_ns) < pause_ms * NEP_MS) {
            char time[32];
            nep_format_time_ns(params->timeout_ns, time, sizeof time);
            return nep_fail_prefix(NEP_ERR_TIMEOUT,
                                   "rank %u found no rendezvous within %s (%u attempts; is rank 0 "
                                   "or nep-info --serve running there?), at last: ",
                                   client->rank, time, num_tries);
        }
        nanosleep(&(struct timespec){.tv_nsec = (long)(pause_ms * NEP_MS)}, NULL);
        pause_ms = pause_ms * 2 > RETRY_MOST_MS ? RETRY_MOST_MS : pause_ms * 2;
    }
}

void nep_rdv_client_destroy(struct nep_rendezvous_client *client)
{
    bool is_own = client->pid == getpid();
    if (client->fd >= 0) {
        if (is_own) {
            shutdown(client->fd, SHUT_RDWR); /* also where a forked process holds it too */
        }
        close(client->fd);
    }
    nep_rdv_session_fini(&client->session);
    if (is_own) { /* in a forked process another thread may have left them locked */
        pthread_cond_destroy(&client->changed);
        pthread_mutex_destroy(&client->mutex);
    }
    free(client->in);
    free(client);
}

enum nep_status nep_rendezvous_client_open(const struct nep_rendezvous_params *params,
                                           struct nep_rendezvous_client **client_p)
{
    const char *secret = params->secret == NULL ? "" : params->secret;
    struct nep_rendezvous_client *client = calloc(1, sizeof *client);
    if (client == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for the connection to the rendezvous");
    }
    client->fd = -1;
    client->pid = getpid();
    client->rank = params->rank;
    client->is_newcomer = params->is_newcomer;
    client->num_ranks = params->num_ranks;
    client->leave_ns = params->timeout_ns > NEP_S ? NEP_S : params->timeout_ns;
    pthread_mutex_init(&client->mutex, NULL);
    pthread_cond_init(&client->changed, NULL);
    enum nep_status status = nep_rdv_secret_init(&client->secret, secret, strlen(secret));
    if (status == NEP_OK) {
        status = connect_and_join(client, params);
    }
    if (status != NEP_OK) {
        nep_rdv_client_destroy(client);
        return status;
    }
    *client_p = client;
    return NEP_OK;
}
