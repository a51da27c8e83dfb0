/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One connection, many calls at once: a thread that waits for its answer reads for all, and hands
 * the reading on when its own has come (leader and followers), so that a get that waits for a key
 * holds up neither a put nor a gather of another thread, and no thread of its own is needed.
 *
 * The server takes a request's deadline to be a little before the caller's, so that its sentence,
 * which names who is missing, arrives before the caller gives up by itself with one that cannot.
 */
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "transport/rendezvous_client.h"

enum { SENTENCE = NEP_RDV_SENTENCE };

static const uint64_t LEAST_ANSWER_NS = NEP_MS, MOST_ANSWER_NS = NEP_S, MOST_LATE_NS = 2 * NEP_S;

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
    enum nep_status status = nep_rdv_receive_message(client, deadline_ns, &message);
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
    enum nep_status status = nep_rdv_send_message(client, request, deadline_ns);
    if (status != NEP_OK) {
        break_client(client, status); /* a part may have been sent */
    }
}

/* How long the server waits for a get's key: what nep_rdv_get leaves for the answer is taken off.
 */
static uint64_t served_ns(const struct nep_rdv_message *request)
{
    return request->op == NEP_RDV_GET ? request->timeout_ns / 4 * 3 : 0;
}

uint64_t nep_rdv_answer_ns(const struct nep_rdv_message *request, uint64_t learnt_ns)
{
    uint64_t timeout_ns = request->timeout_ns;
    if (request->op == NEP_RDV_GATHER) {
        uint64_t more_ns = timeout_ns / 4 < MOST_LATE_NS ? timeout_ns / 4 : MOST_LATE_NS;
        return more_ns > UINT64_MAX - timeout_ns ? UINT64_MAX : timeout_ns + more_ns;
    }
    uint64_t least_ns = served_ns(request) + learnt_ns;
    least_ns = least_ns < MOST_ANSWER_NS ? least_ns : MOST_ANSWER_NS;
    return request->op == NEP_RDV_GET && least_ns > timeout_ns ? least_ns : timeout_ns;
}

/* Twice what an answer took, and twice as long as before where none came. */
static void learn_answer(struct nep_rendezvous_client *client, const struct call *call,
                         const struct nep_rdv_message *request, uint64_t took_ns)
{
    uint64_t *answer_ns = &client->answer_ns, wanted_ns;
    if (call->is_done) {
        *answer_ns -= *answer_ns / 16;
        wanted_ns = took_ns > served_ns(request) ? 2 * (took_ns - served_ns(request)) : 0;
    } else {
        wanted_ns = 2 * (*answer_ns > LEAST_ANSWER_NS ? *answer_ns : LEAST_ANSWER_NS);
    }
    wanted_ns = wanted_ns < MOST_ANSWER_NS ? wanted_ns : MOST_ANSWER_NS;
    *answer_ns = *answer_ns > wanted_ns ? *answer_ns : wanted_ns;
}

static enum nep_status do_call(struct nep_rendezvous_client *client, struct call *call,
                               struct nep_rdv_message *request, uint64_t timeout_ns)
{
    uint64_t begin_ns = nep_now_ns();
    request->timeout_ns = timeout_ns;
    if (client->pid != getpid()) {
        return nep_fail(NEP_ERR_BROKEN, "%s belongs to process %ld, from which this one was forked",
                        client->name, (long)client->pid);
    }
    pthread_mutex_lock(&client->mutex);
    uint64_t deadline_ns = nep_deadline_ns(nep_rdv_answer_ns(request, client->answer_ns));
    start_call(client, call, request, deadline_ns);
    while (!call->is_done && nep_left_ns(deadline_ns) != 0) {
        if (client->is_reading) {
            await_reader(client, deadline_ns);
        } else {
            read_for_all(client, deadline_ns);
        }
    }
    unlink_call(client, call);
    if (request->op != NEP_RDV_GATHER) { /* that waits for ranks */
        learn_answer(client, call, request, nep_now_ns() - begin_ns);
    }
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

/* ---- closing --------------------------------------------------------------------------------- */

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
    if (client->pid != getpid()) {
        nep_rdv_client_destroy(client); /* the server's thread was not forked either */
        return;
    }
    char message[NEP_MESSAGE_BYTES];
    nep_message_save(message);
    if (client->broken == NEP_OK) {
        do_call(client, &call, &goodbye, client->leave_ns);
    }
    nep_message_restore(message);
    struct nep_rendezvous_server *server = client->server;
    nep_rdv_client_destroy(client);
    nep_rendezvous_server_release(server);
}
