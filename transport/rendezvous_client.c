/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One connection, many calls at once: a thread that waits for its answer reads for all, and hands
 * the reading on when its own has come (leader and followers), so that a get that waits for a key
 * holds up neither a put nor a gather of another thread, and no thread of its own is needed.
 *
 * The server takes a request's deadline to be a little before the caller's, so that its sentence,
 * which names who is missing, arrives before the caller gives up by itself with one that cannot.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/rendezvous.h"
#include "transport/rendezvous_socket.h"
#include "transport/rendezvous_wire.h"

enum { RETRY_LEAST_MS = 20, RETRY_MOST_MS = 200, TRY_S = 1, SENTENCE = 700 };

struct call {
    struct call *next;
    uint32_t id;
    bool is_done;
    enum nep_status status;
    char sentence[SENTENCE];
    void *out; /* cap bytes for the value */
    size_t cap;
    size_t len;
};

struct nep_rendezvous_client {
    int fd;
    struct nep_rdv_secret secret;
    struct nep_rdv_session session;
    char name[384]; /* "the rendezvous at node0:29600" */
    uint32_t rank, num_ranks;
    uint64_t leave_ns;
    struct nep_rendezvous_server *server; /* hosted by this rank, or NULL */
    pthread_mutex_t mutex;                /* guards what follows, and sending */
    pthread_cond_t changed;
    bool is_reading; /* one of the callers, outside the mutex; it owns `in` then */
    struct call *calls;
    uint32_t num_calls;
    uint64_t num_gathers;
    enum nep_status broken;
    char sentence[SENTENCE];
    uint8_t *in;
    size_t in_cap, in_have, in_need;
};

/* ---- bytes ---------------------------------------------------------------------------------- */

static enum nep_status lost(struct nep_rendezvous_client *client, const char *why)
{
    return nep_fail(NEP_ERR_PEER_LOST, "%s is gone: %s", client->name, why);
}

static enum nep_status send_all(struct nep_rendezvous_client *client, const uint8_t *bytes,
                                size_t len, uint64_t deadline_ns)
{
    for (size_t sent = 0; sent < len;) {
        ssize_t put = send(client->fd, bytes + sent, len - sent, MSG_NOSIGNAL);
        if (put > 0) {
            sent += (size_t)put;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            if (!nep_rdv_wait(client->fd, POLLOUT, deadline_ns)) {
                return nep_fail(NEP_ERR_TIMEOUT, "%s takes no data", client->name);
            }
        } else if (errno != EINTR) {
            return lost(client, strerror(errno));
        }
    }
    return NEP_OK;
}

/* Goes on filling client->in to in_need bytes. */
static enum nep_status receive(struct nep_rendezvous_client *client, uint64_t deadline_ns)
{
    while (client->in_have < client->in_need) {
        ssize_t got =
            recv(client->fd, client->in + client->in_have, client->in_need - client->in_have, 0);
        if (got > 0) {
            client->in_have += (size_t)got;
        } else if (got == 0) {
            return lost(client, "it closed the connection");
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            if (!nep_rdv_wait(client->fd, POLLIN, deadline_ns)) {
                return nep_fail(NEP_ERR_TIMEOUT, "%s does not answer", client->name);
            }
        } else if (errno != EINTR) {
            return lost(client, strerror(errno));
        }
    }
    return NEP_OK;
}

static enum nep_status need(struct nep_rendezvous_client *client, size_t bytes)
{
    if (bytes > client->in_cap) {
        uint8_t *grown = realloc(client->in, bytes);
        if (grown == NULL) {
            return nep_fail(NEP_ERR_NO_MEMORY, "no memory for %zu bytes from %s", bytes,
                            client->name);
        }
        client->in = grown;
        client->in_cap = bytes;
    }
    client->in_need = bytes;
    return NEP_OK;
}

/* The next message; its pointers are good until the next call. What a deadline cut off goes on. */
static enum nep_status receive_message(struct nep_rendezvous_client *client, uint64_t deadline_ns,
                                       struct nep_rdv_message *message)
{
    size_t sealed = 0;
    enum nep_status status = NEP_OK;
    if (client->in_have < NEP_RDV_LENGTH_BYTES) {
        status = need(client, NEP_RDV_LENGTH_BYTES);
        if (status == NEP_OK) {
            status = receive(client, deadline_ns);
        }
    }
    if (status == NEP_OK) {
        status = nep_rdv_read_length(client->in, NEP_RDV_MAX_FRAME, &sealed);
    }
    if (status == NEP_OK) {
        status = need(client, NEP_RDV_LENGTH_BYTES + sealed);
    }
    if (status == NEP_OK) {
        status = receive(client, deadline_ns);
    }
    if (status != NEP_OK) {
        return status;
    }
    client->in_have = 0;
    status = nep_rdv_open(&client->session, client->in, client->in + NEP_RDV_LENGTH_BYTES, sealed);
    if (status != NEP_OK) {
        return status;
    }
    return nep_rdv_message_decode(client->in + NEP_RDV_LENGTH_BYTES, sealed - NEP_RDV_TAG_BYTES,
                                  message);
}

static enum nep_status send_message(struct nep_rendezvous_client *client,
                                    const struct nep_rdv_message *message, uint64_t deadline_ns)
{
    size_t len = nep_rdv_message_bytes(message);
    uint8_t *body = malloc(2 * len + NEP_RDV_LENGTH_BYTES + NEP_RDV_TAG_BYTES);
    if (body == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for %zu bytes to %s", len, client->name);
    }
    nep_rdv_message_encode(message, body);
    nep_rdv_seal(&client->session, body, len, body + len);
    enum nep_status status =
        send_all(client, body + len, NEP_RDV_LENGTH_BYTES + len + NEP_RDV_TAG_BYTES, deadline_ns);
    free(body);
    return status;
}

/* ---- calls ---------------------------------------------------------------------------------- */

static void finish(struct call *call, enum nep_status status, const char *text, size_t len)
{
    call->is_done = true;
    call->status = status;
    snprintf(call->sentence, sizeof call->sentence, "%.*s", (int)(len > 690 ? 690 : len), text);
}

static void break_client(struct nep_rendezvous_client *client, enum nep_status status)
{
    client->broken = status;
    snprintf(client->sentence, sizeof client->sentence, "%s", nep_last_message());
    for (struct call *call = client->calls; call != NULL; call = call->next) {
        if (!call->is_done) {
            finish(call, status, client->sentence, strlen(client->sentence));
        }
    }
}

/* An answer to a call that gave up is dropped. */
static void deliver(struct nep_rendezvous_client *client, const struct nep_rdv_message *message)
{
    struct call *call = client->calls;
    while (call != NULL && (call->id != message->id || call->is_done)) {
        call = call->next;
    }
    if (call == NULL || message->op != NEP_RDV_REPLY) {
        return;
    }
    call->len = message->value_len;
    if (message->status == NEP_OK && message->value_len > call->cap) {
        char text[128];
        snprintf(text, sizeof text, "the value has %zu bytes, the caller's buffer %zu",
                 message->value_len, call->cap);
        finish(call, NEP_ERR_OVERFLOW, text, strlen(text));
        return;
    }
    if (message->status == NEP_OK && message->value_len != 0) {
        memcpy(call->out, message->value, message->value_len);
    }
    finish(call, (enum nep_status)message->status, message->text, message->text_len);
}

/* One message, as the reading thread; the mutex is held on entry and return. */
static void read_for_all(struct nep_rendezvous_client *client, uint64_t deadline_ns)
{
    struct nep_rdv_message message;
    client->is_reading = true;
    pthread_mutex_unlock(&client->mutex);
    enum nep_status status = receive_message(client, deadline_ns, &message);
    pthread_mutex_lock(&client->mutex);
    client->is_reading = false;
    if (status == NEP_OK) {
        deliver(client, &message);
    } else if (status != NEP_ERR_TIMEOUT) {
        break_client(client, status);
    }
    pthread_cond_broadcast(&client->changed);
}

static void await_reader(struct nep_rendezvous_client *client, uint64_t deadline_ns)
{
    struct timespec until;
    uint64_t left = nep_left_ns(deadline_ns);
    left = left > 60 * NEP_S ? 60 * NEP_S : left;
    clock_gettime(CLOCK_REALTIME, &until);
    left += (uint64_t)until.tv_nsec;
    until.tv_sec += (time_t)(left / NEP_S);
    until.tv_nsec = (long)(left % NEP_S);
    pthread_cond_timedwait(&client->changed, &client->mutex, &until);
}

static void unlink_call(struct nep_rendezvous_client *client, struct call *call)
{
    struct call **at = &client->calls;
    while (*at != call) {
        at = &(*at)->next;
    }
    *at = call->next;
}

/* Holds the mutex: the request is numbered and sealed in the order in which it is sent. */
static void start_call(struct nep_rendezvous_client *client, struct call *call,
                       struct nep_rdv_message *request, uint64_t deadline_ns)
{
    call->id = request->id = ++client->num_calls;
    call->next = client->calls;
    client->calls = call;
    if (client->broken != NEP_OK) {
        finish(call, client->broken, client->sentence, strlen(client->sentence));
        return;
    }
    if (request->op == NEP_RDV_GATHER) {
        request->number = client->num_gathers++;
    }
    enum nep_status status = send_message(client, request, deadline_ns);
    if (status != NEP_OK) {
        break_client(client, status); /* a part may have been sent */
    }
}

static enum nep_status do_call(struct nep_rendezvous_client *client, struct call *call,
                               struct nep_rdv_message *request, uint64_t timeout_ns)
{
    uint64_t deadline_ns = nep_deadline_ns(timeout_ns);
    request->timeout_ns = timeout_ns;
    pthread_mutex_lock(&client->mutex);
    start_call(client, call, request, deadline_ns);
    while (!call->is_done && nep_left_ns(deadline_ns) != 0) {
        if (client->is_reading) {
            await_reader(client, deadline_ns);
        } else {
            read_for_all(client, deadline_ns);
        }
    }
    unlink_call(client, call);
    pthread_mutex_unlock(&client->mutex);
    if (!call->is_done) {
        char time[32];
        nep_format_time_ns(timeout_ns, time, sizeof time);
        return nep_fail(NEP_ERR_TIMEOUT, "%s did not answer within %s", client->name, time);
    }
    return call->status == NEP_OK ? NEP_OK : nep_fail(call->status, "%s", call->sentence);
}

/* ---- the bootstrap's functions -------------------------------------------------------------- */

static enum nep_status check_key(const char *key, size_t value_len)
{
    size_t len = strlen(key);
    if (len == 0 || len > NEP_RDV_MAX_KEY || value_len > NEP_RDV_MAX_VALUE) {
        return nep_fail(NEP_ERR_INVALID,
                        "the key '%.40s' of %zu bytes with %zu bytes of value: keys have 1 to %d, "
                        "values at most %d",
                        key, len, value_len, NEP_RDV_MAX_KEY, NEP_RDV_MAX_VALUE);
    }
    return NEP_OK;
}

static int client_allgather(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns)
{
    struct nep_rendezvous_client *client = ctx;
    if (bytes > NEP_RDV_MAX_GATHER || bytes * (uint64_t)client->num_ranks > NEP_RDV_MAX_FRAME / 2) {
        return nep_fail(NEP_ERR_OVERFLOW,
                        "an exchange of %zu bytes for each of %u ranks is too large for the "
                        "rendezvous: at most %d each and %d together",
                        bytes, client->num_ranks, NEP_RDV_MAX_GATHER, NEP_RDV_MAX_FRAME / 2);
    }
    struct call call = {.out = out, .cap = bytes * client->num_ranks};
    struct nep_rdv_message request = {.op = NEP_RDV_GATHER, .value = in, .value_len = bytes};
    enum nep_status status = do_call(client, &call, &request, timeout_ns);
    if (status == NEP_OK && call.len != bytes * client->num_ranks) {
        return nep_fail(NEP_ERR_FORMAT, "%s answered an exchange of %zu bytes with %zu",
                        client->name, bytes * client->num_ranks, call.len);
    }
    return status;
}

static int client_put(void *ctx, const char *key, const void *value, size_t len,
                      uint64_t timeout_ns)
{
    struct call call = {.cap = 0};
    struct nep_rdv_message request = {
        .op = NEP_RDV_PUT, .key = key, .key_len = strlen(key), .value = value, .value_len = len};
    enum nep_status status = check_key(key, len);
    return status == NEP_OK ? do_call(ctx, &call, &request, timeout_ns) : status;
}

static int client_get(void *ctx, const char *key, void *value, size_t cap, size_t *len_p,
                      uint64_t timeout_ns)
{
    struct call call = {.out = value, .cap = cap};
    struct nep_rdv_message request = {.op = NEP_RDV_GET, .key = key, .key_len = strlen(key)};
    enum nep_status status = check_key(key, 0);
    if (status == NEP_OK) {
        status = do_call(ctx, &call, &request, timeout_ns);
    }
    if (status == NEP_OK) {
        *len_p = call.len;
    }
    return status;
}

static int client_cas(void *ctx, const char *key, const void *expected, size_t expected_len,
                      const void *desired, size_t desired_len, void *result, size_t cap,
                      size_t *len_p, uint64_t timeout_ns)
{
    struct call call = {.out = result, .cap = cap};
    struct nep_rdv_message request = {.op = NEP_RDV_CAS,
                                      .key = key,
                                      .key_len = strlen(key),
                                      .expected = expected,
                                      .expected_len = expected_len,
                                      .value = desired,
                                      .value_len = desired_len};
    enum nep_status status =
        check_key(key, desired_len > expected_len ? desired_len : expected_len);
    if (status == NEP_OK) {
        status = do_call(ctx, &call, &request, timeout_ns);
    }
    if (status == NEP_OK) {
        *len_p = call.len;
    }
    return status;
}

void nep_rendezvous_client_bootstrap(struct nep_rendezvous_client *client,
                                     struct nep_bootstrap *out)
{
    *out = (struct nep_bootstrap){.size = sizeof *out,
                                  .ctx = client,
                                  .allgather = client_allgather,
                                  .put = client_put,
                                  .get = client_get,
                                  .cas = client_cas};
}

bool nep_rendezvous_is_client(const struct nep_bootstrap *bootstrap)
{
    return bootstrap->allgather == client_allgather;
}

void nep_rendezvous_client_keep(struct nep_rendezvous_client *client,
                                struct nep_rendezvous_server *server)
{
    client->server = server;
}

/* ---- opening -------------------------------------------------------------------------------- */

static enum nep_status shake_hands(struct nep_rendezvous_client *client, uint64_t deadline_ns)
{
    uint8_t hello[NEP_RDV_HELLO_BYTES], proof[NEP_RDV_MAC_BYTES];
    nep_rdv_session_init(&client->session, &client->secret, false);
    nep_rdv_write_hello(&client->session, hello);
    client->in_have = 0;
    enum nep_status status = send_all(client, hello, sizeof hello, deadline_ns);
    if (status == NEP_OK) {
        status = need(client, NEP_RDV_CHALLENGE_BYTES);
    }
    if (status == NEP_OK) {
        status = receive(client, deadline_ns);
    }
    if (status == NEP_OK) {
        status = nep_rdv_answer_challenge(&client->session, client->in, proof);
    }
    client->in_have = 0;
    if (status == NEP_OK) {
        status = send_all(client, proof, sizeof proof, deadline_ns);
    }
    if (status == NEP_OK) {
        status = need(client, NEP_RDV_WELCOME_BYTES);
    }
    if (status == NEP_OK) {
        status = receive(client, deadline_ns);
    }
    if (status == NEP_OK) {
        status = nep_rdv_check_welcome(&client->session, client->in);
    }
    client->in_have = 0;
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
                                      .version = nep_version()};
    struct nep_rdv_message reply;
    identify(request.process, who, sizeof who);
    request.text = who;
    request.text_len = strlen(who);
    enum nep_status status = send_message(client, &request, deadline_ns);
    if (status == NEP_OK) {
        status = receive_message(client, deadline_ns, &reply);
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
        if (nep_left_ns(deadline_ns) < pause_ms * NEP_MS) {
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

static void client_destroy(struct nep_rendezvous_client *client)
{
    if (client->fd >= 0) {
        close(client->fd);
    }
    nep_rdv_session_fini(&client->session);
    pthread_cond_destroy(&client->changed);
    pthread_mutex_destroy(&client->mutex);
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
    client->rank = params->rank;
    client->num_ranks = params->num_ranks;
    client->leave_ns = params->timeout_ns > NEP_S ? NEP_S : params->timeout_ns;
    pthread_mutex_init(&client->mutex, NULL);
    pthread_cond_init(&client->changed, NULL);
    enum nep_status status = nep_rdv_secret_init(&client->secret, secret, strlen(secret));
    if (status == NEP_OK) {
        status = connect_and_join(client, params);
    }
    if (status != NEP_OK) {
        client_destroy(client);
        return status;
    }
    *client_p = client;
    return NEP_OK;
}

void nep_rendezvous_client_close(struct nep_rendezvous_client *client)
{
    if (client == NULL) {
        return;
    }
    /*
     * The answer to a goodbye says that everything before it was answered too, also to the others:
     * a process that ends after this call does not take their answers with it when it is the one
     * that serves.
     */
    struct nep_rdv_message goodbye = {.op = NEP_RDV_LEAVE};
    struct call call = {.cap = 0};
    if (client->broken == NEP_OK) {
        do_call(client, &call, &goodbye, client->leave_ns);
    }
    struct nep_rendezvous_server *server = client->server;
    client_destroy(client);
    nep_rendezvous_server_release(server);
}
