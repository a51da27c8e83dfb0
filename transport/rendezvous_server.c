/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One thread, one epoll, no blocking call. A connection is a stranger until its proof is right;
 * strangers get 48 + 32 bytes of buffer, five seconds, and a place in a queue of bounded length
 * whose oldest makes room, so that a port scan, a flood or half-open connections cost little and
 * stop nobody: a rank that was pushed out by them tries again.
 *
 * Rejected: a thread per connection (1024 ranks), and answering from the ranks' own threads, which
 * would make rank 0's progress everybody's.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/rendezvous.h"
#include "transport/rendezvous_hub.h"
#include "transport/rendezvous_socket.h"

enum {
    HANDSHAKE_S = 5,      /* for a stranger to become a member */
    STALL_S = 30,         /* for a member to take what is sent to it */
    EXTRA_STRANGERS = 64, /* besides one for each rank */
    ACCEPT_AGAIN_MS = 100,
    FLUSH_MS = 200,
    NUM_EVENTS = 64
};

enum conn_state { AWAIT_HELLO, AWAIT_PROOF, AWAIT_JOIN, IS_MEMBER, IS_CLOSING };

struct conn {
    struct conn *next, *previous; /* all connections, oldest first */
    struct nep_rendezvous_server *server;
    int fd;
    enum conn_state state;
    uint64_t deadline_ns; /* of the handshake, of taking output, or UINT64_MAX */
    struct nep_rdv_session session;
    struct nep_rdv_member *member;
    uint8_t *in; /* what is being received: in_need bytes, in_have are here */
    size_t in_cap, in_need, in_have;
    uint8_t *out; /* out_len bytes, out_sent are sent */
    size_t out_cap, out_len, out_sent;
    bool is_polling_out;
};

struct nep_rendezvous_server {
    pthread_t thread;
    int epoll_fd, listen_fd, wake_fd;
    struct nep_rdv_secret secret;
    struct nep_rdv_hub *hub;
    uint32_t num_ranks;
    struct conn first; /* head of the ring of connections */
    uint32_t num_strangers, num_members;
    bool is_listening;
    uint64_t listen_again_ns;
    pthread_mutex_t mutex; /* guards what follows */
    pthread_cond_t answered;
    bool is_stopping, is_released, has_answered;
    bool has_let_go; /* release has returned: the thread may free the server */
};

/* ---- connections ---------------------------------------------------------------------------- */

static bool is_stranger(const struct conn *conn)
{
    return conn->state < IS_MEMBER;
}

static void conn_destroy(struct conn *conn)
{
    struct nep_rendezvous_server *server = conn->server;
    server->num_strangers -= is_stranger(conn);
    if (conn->member != NULL) {
        server->num_members--;
        nep_rdv_hub_remove(conn->member, nep_now_ns());
    }
    conn->next->previous = conn->previous;
    conn->previous->next = conn->next;
    close(conn->fd); /* leaves the epoll set with it */
    nep_rdv_session_fini(&conn->session);
    free(conn->in);
    free(conn->out);
    free(conn);
}

/* Sends what is there and closes then; members are removed at once. */
static void conn_close(struct conn *conn)
{
    struct nep_rendezvous_server *server = conn->server;
    if (conn->state == IS_CLOSING) {
        return;
    }
    server->num_strangers -= is_stranger(conn);
    conn->state = IS_CLOSING;
    conn->in_have = 0;
    conn->deadline_ns = nep_deadline_ns(HANDSHAKE_S * NEP_S);
    if (conn->member != NULL) {
        struct nep_rdv_member *member = conn->member;
        conn->member = NULL;
        server->num_members--;
        nep_rdv_hub_remove(member, nep_now_ns());
    }
}

static bool reserve(uint8_t **buffer, size_t *cap, size_t need)
{
    if (need <= *cap) {
        return true;
    }
    size_t grown = *cap * 2 > need ? *cap * 2 : need;
    uint8_t *bytes = realloc(*buffer, grown);
    if (bytes == NULL) {
        return false;
    }
    *buffer = bytes;
    *cap = grown;
    return true;
}

/* Room for len bytes of output; NULL closes the connection. */
static uint8_t *conn_out(struct conn *conn, size_t len)
{
    if (conn->out_sent == conn->out_len) {
        conn->out_sent = conn->out_len = 0;
    }
    if (!reserve(&conn->out, &conn->out_cap, conn->out_len + len)) {
        nep_warn("rendezvous: no memory for an answer of %zu bytes, closing the connection", len);
        /* Not conn_close: this may be called from inside the hub. */
        shutdown(conn->fd, SHUT_RDWR);
        return NULL;
    }
    uint8_t *at = conn->out + conn->out_len;
    conn->out_len += len;
    return at;
}

static void conn_poll_out(struct conn *conn, bool is_wanted)
{
    if (conn->is_polling_out != is_wanted) {
        struct epoll_event event = {.events = EPOLLIN | (is_wanted ? EPOLLOUT : 0),
                                    .data.ptr = conn};
        epoll_ctl(conn->server->epoll_fd, EPOLL_CTL_MOD, conn->fd, &event);
        conn->is_polling_out = is_wanted;
    }
}

/* False when the other side is gone. */
static bool conn_flush(struct conn *conn)
{
    size_t before = conn->out_sent;
    while (conn->out_sent < conn->out_len) {
        ssize_t sent = send(conn->fd, conn->out + conn->out_sent, conn->out_len - conn->out_sent,
                            MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) {
            continue;
        }
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            break;
        }
        if (sent < 0) {
            return false;
        }
        conn->out_sent += (size_t)sent;
    }
    bool is_done = conn->out_sent == conn->out_len;
    if (conn->state == IS_MEMBER &&
        (is_done || conn->out_sent != before || !conn->is_polling_out)) {
        conn->deadline_ns = is_done ? UINT64_MAX : nep_deadline_ns(STALL_S * NEP_S);
    }
    conn_poll_out(conn, !is_done);
    return true;
}

/* The hub's answers; it must not be called back from here, so a failure only shuts the socket. */
static void conn_reply(void *arg, const struct nep_rdv_message *reply)
{
    struct conn *conn = arg;
    size_t len = nep_rdv_message_bytes(reply);
    uint8_t *body = malloc(len);
    uint8_t *out =
        body == NULL ? NULL : conn_out(conn, NEP_RDV_LENGTH_BYTES + len + NEP_RDV_TAG_BYTES);
    if (out == NULL) {
        shutdown(conn->fd, SHUT_RDWR);
    } else {
        nep_rdv_message_encode(reply, body);
        nep_rdv_seal(&conn->session, body, len, out);
        if (!conn_flush(conn)) {
            shutdown(conn->fd, SHUT_RDWR);
        }
    }
    free(body);
}

/* ---- what arrives --------------------------------------------------------------------------- */

static bool conn_need(struct conn *conn, size_t need)
{
    conn->in_need = need;
    return reserve(&conn->in, &conn->in_cap, need);
}

static enum nep_status on_hello(struct conn *conn)
{
    uint8_t answer[NEP_RDV_CHALLENGE_BYTES];
    size_t len;
    enum nep_status status = nep_rdv_answer_hello(&conn->session, conn->in, answer, &len);
    uint8_t *out = len == 0 ? NULL : conn_out(conn, len);
    if (out != NULL) {
        memcpy(out, answer, len);
        conn_flush(conn);
    }
    if (status != NEP_OK && len != 0) {
        nep_rdv_hub_note(conn->server->hub, nep_now_ns(), nep_last_message());
    }
    conn->state = AWAIT_PROOF;
    conn->in_have = 0;
    return status != NEP_OK || conn_need(conn, NEP_RDV_MAC_BYTES) ? status : NEP_ERR_NO_MEMORY;
}

static enum nep_status on_proof(struct conn *conn)
{
    uint8_t answer[NEP_RDV_WELCOME_BYTES];
    enum nep_status status = nep_rdv_answer_proof(&conn->session, conn->in, answer);
    uint8_t *out = conn_out(conn, sizeof answer);
    if (out != NULL) {
        memcpy(out, answer, sizeof answer);
        conn_flush(conn);
    }
    if (status != NEP_OK) {
        nep_rdv_hub_note(conn->server->hub, nep_now_ns(),
                         "a process was refused because it does not know the secret");
        return status;
    }
    conn->state = AWAIT_JOIN;
    conn->in_have = 0;
    return conn_need(conn, NEP_RDV_LENGTH_BYTES) ? NEP_OK : NEP_ERR_NO_MEMORY;
}

static enum nep_status on_message(struct conn *conn, const struct nep_rdv_message *message)
{
    struct nep_rendezvous_server *server = conn->server;
    uint64_t now = nep_now_ns();
    if (conn->state == IS_MEMBER) {
        return nep_rdv_hub_request(conn->member, message, now);
    }
    struct nep_rdv_member *member;
    enum nep_status status = nep_rdv_hub_join(server->hub, message, conn, now, &member);
    if (status == NEP_OK) {
        conn->member = member;
        conn->state = IS_MEMBER;
        conn->deadline_ns = UINT64_MAX;
        server->num_strangers--;
        server->num_members++;
    }
    return status;
}

/* The length alone, or length and body. */
static enum nep_status on_frame(struct conn *conn)
{
    size_t sealed;
    enum nep_status status = nep_rdv_read_length(conn->in, NEP_RDV_MAX_REQUEST, &sealed);
    if (status != NEP_OK) {
        return status;
    }
    if (conn->in_have == NEP_RDV_LENGTH_BYTES) {
        return conn_need(conn, NEP_RDV_LENGTH_BYTES + sealed) ? NEP_OK : NEP_ERR_NO_MEMORY;
    }
    uint8_t *body = conn->in + NEP_RDV_LENGTH_BYTES;
    struct nep_rdv_message message;
    status = nep_rdv_open(&conn->session, conn->in, body, sealed);
    if (status == NEP_OK) {
        status = nep_rdv_message_decode(body, sealed - NEP_RDV_TAG_BYTES, &message);
    }
    if (status == NEP_OK) {
        status = on_message(conn, &message);
    }
    conn->in_have = 0;
    conn->in_need = NEP_RDV_LENGTH_BYTES;
    return status;
}

static enum nep_status on_input(struct conn *conn)
{
    switch (conn->state) {
    case AWAIT_HELLO:
        return on_hello(conn);
    case AWAIT_PROOF:
        return on_proof(conn);
    case AWAIT_JOIN:
    case IS_MEMBER:
        return on_frame(conn);
    case IS_CLOSING:
        break;
    }
    conn->in_have = 0; /* ignored until the last answer is sent */
    return NEP_OK;
}

/* False when the connection has ended. Reads a bounded amount: others have their turn. */
static bool conn_receive(struct conn *conn)
{
    for (int turn = 0; turn < 16; turn++) {
        ssize_t got = recv(conn->fd, conn->in + conn->in_have, conn->in_need - conn->in_have, 0);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < 0) {
            return errno == EAGAIN || errno == EWOULDBLOCK;
        }
        if (got == 0) {
            return false;
        }
        conn->in_have += (size_t)got;
        if (conn->in_have < conn->in_need) {
            continue;
        }
        enum nep_status status = on_input(conn);
        if (status != NEP_OK) {
            nep_info("rendezvous: refused a connection: %s", nep_last_message());
            conn_close(conn);
            return true;
        }
    }
    return true;
}

static void conn_event(struct conn *conn, uint32_t events)
{
    bool is_alive = true;
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
        is_alive = conn_receive(conn);
    }
    if (is_alive && conn->out_len != conn->out_sent) {
        is_alive = conn_flush(conn);
    }
    if (!is_alive || (conn->state == IS_CLOSING && conn->out_sent == conn->out_len)) {
        conn_destroy(conn);
    }
}

/* ---- accepting ------------------------------------------------------------------------------ */

static void drop_oldest_stranger(struct nep_rendezvous_server *server)
{
    struct conn *conn = server->first.next;
    while (conn != &server->first && !is_stranger(conn) && conn->state != IS_CLOSING) {
        conn = conn->next;
    }
    if (conn != &server->first) {
        conn_destroy(conn);
    }
}

static void listen_pause(struct nep_rendezvous_server *server, bool is_pause)
{
    struct epoll_event event = {.events = is_pause ? 0 : EPOLLIN, .data.ptr = &server->listen_fd};
    epoll_ctl(server->epoll_fd, EPOLL_CTL_MOD, server->listen_fd, &event);
    server->is_listening = !is_pause;
    server->listen_again_ns = is_pause ? nep_deadline_ns(ACCEPT_AGAIN_MS * NEP_MS) : UINT64_MAX;
}

static void conn_create(struct nep_rendezvous_server *server, int fd)
{
    struct conn *conn = calloc(1, sizeof *conn);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = conn};
    if (conn == NULL || !nep_rdv_is_peer_allowed(fd) || !conn_need(conn, NEP_RDV_HELLO_BYTES) ||
        epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) {
        if (conn != NULL) {
            free(conn->in);
        }
        free(conn);
        close(fd);
        return;
    }
    conn->server = server;
    conn->fd = fd;
    conn->state = AWAIT_HELLO;
    conn->deadline_ns = nep_deadline_ns(HANDSHAKE_S * NEP_S);
    nep_rdv_session_init(&conn->session, &server->secret, true);
    conn->next = &server->first;
    conn->previous = server->first.previous;
    conn->previous->next = conn;
    server->first.previous = conn;
    server->num_strangers++;
}

static void accept_some(struct nep_rendezvous_server *server)
{
    for (int turn = 0; turn < 64; turn++) {
        int fd = accept4(server->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0) {
            if (server->num_strangers >= server->num_ranks + EXTRA_STRANGERS) {
                drop_oldest_stranger(server);
            }
            nep_rdv_set_options(fd);
            conn_create(server, fd);
        } else if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
            drop_oldest_stranger(server);
            listen_pause(server, true);
            return;
        } else if (errno != EINTR && errno != ECONNABORTED) {
            return;
        }
    }
}

/* ---- the loop ------------------------------------------------------------------------------- */

/* Closes what has passed its deadline; returns the next one. */
static uint64_t expire(struct nep_rendezvous_server *server)
{
    uint64_t now = nep_now_ns();
    uint64_t next = nep_rdv_hub_expire(server->hub, now);
    for (struct conn *conn = server->first.next; conn != &server->first;) {
        struct conn *after = conn->next;
        if (conn->deadline_ns <= now) {
            conn_destroy(conn);
        } else if (conn->deadline_ns < next) {
            next = conn->deadline_ns;
        }
        conn = after;
    }
    if (!server->is_listening && server->listen_again_ns <= now) {
        listen_pause(server, false);
    }
    return server->listen_again_ns < next ? server->listen_again_ns : next;
}

static bool has_output(const struct nep_rendezvous_server *server)
{
    for (const struct conn *conn = server->first.next; conn != &server->first; conn = conn->next) {
        if (conn->out_sent != conn->out_len) {
            return true;
        }
    }
    return false;
}

/* Tells stop and release that all answers are on their way. True when the loop is over. */
static bool check_orders(struct nep_rendezvous_server *server)
{
    pthread_mutex_lock(&server->mutex);
    bool is_over = server->is_stopping || (server->is_released && server->num_members == 0);
    if ((server->is_stopping || server->is_released) && !has_output(server)) {
        server->has_answered = true;
        pthread_cond_broadcast(&server->answered);
    }
    pthread_mutex_unlock(&server->mutex);
    return is_over;
}

static void server_destroy(struct nep_rendezvous_server *server)
{
    while (server->first.next != &server->first) {
        conn_destroy(server->first.next);
    }
    nep_rdv_hub_destroy(server->hub);
    close(server->listen_fd);
    close(server->epoll_fd);
    close(server->wake_fd);
    pthread_mutex_destroy(&server->mutex);
    pthread_cond_destroy(&server->answered);
    free(server);
}

static void serve_once(struct nep_rendezvous_server *server, uint64_t until_ns)
{
    struct epoll_event events[NUM_EVENTS];
    uint64_t left_ms = until_ns == UINT64_MAX ? 60000 : nep_left_ns(until_ns) / NEP_MS + 1;
    int num =
        epoll_wait(server->epoll_fd, events, NUM_EVENTS, left_ms > 60000 ? 60000 : (int)left_ms);
    for (int i = 0; i < num; i++) {
        void *source = events[i].data.ptr;
        if (source == &server->wake_fd) {
            uint64_t ignored;
            ssize_t got = read(server->wake_fd, &ignored, sizeof ignored);
            (void)got;
        } else if (source != &server->listen_fd) {
            conn_event(source, events[i].events);
        }
    }
    /* Last: accepting may destroy a stranger that has an event in this list. */
    for (int i = 0; i < num; i++) {
        if (events[i].data.ptr == &server->listen_fd) {
            accept_some(server);
        }
    }
}

static void *server_main(void *arg)
{
    struct nep_rendezvous_server *server = arg;
    while (!check_orders(server)) {
        serve_once(server, expire(server));
    }
    uint64_t flush_until = nep_deadline_ns(FLUSH_MS * NEP_MS);
    while (has_output(server) && nep_left_ns(flush_until) != 0) {
        serve_once(server, nep_deadline_ns(NEP_MS));
    }
    pthread_mutex_lock(&server->mutex);
    bool is_released = server->is_released;
    server->has_answered = true;
    pthread_cond_broadcast(&server->answered);
    while (is_released && !server->has_let_go) {
        pthread_cond_wait(&server->answered, &server->mutex);
    }
    pthread_mutex_unlock(&server->mutex);
    if (is_released) {
        server_destroy(server);
    }
    return NULL;
}

/* ---- start and stop ------------------------------------------------------------------------- */

static enum nep_status server_open(struct nep_rendezvous_server *server)
{
    server->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    server->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event wake = {.events = EPOLLIN, .data.ptr = &server->wake_fd};
    struct epoll_event accepts = {.events = EPOLLIN, .data.ptr = &server->listen_fd};
    if (server->epoll_fd < 0 || server->wake_fd < 0 ||
        epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, server->wake_fd, &wake) != 0 ||
        epoll_ctl(server->epoll_fd, EPOLL_CTL_ADD, server->listen_fd, &accepts) != 0) {
        return nep_fail(NEP_ERR_IO, "the rendezvous cannot start: %s", strerror(errno));
    }
    server->is_listening = true;
    server->listen_again_ns = UINT64_MAX;
    return nep_rdv_hub_create(server->num_ranks, conn_reply, &server->hub);
}

static enum nep_status listen_on_one(const struct nep_rendezvous_params *params, int *fd_p,
                                     uint16_t *port_p)
{
    uint32_t num_ports = params->num_ports == 0 ? 1 : params->num_ports;
    enum nep_status status = NEP_ERR_BUSY;
    for (uint32_t i = 0; i < num_ports && status == NEP_ERR_BUSY; i++) {
        uint32_t port = params->port + i;
        if (port > 65535) {
            break;
        }
        status = nep_rdv_listen(params->host, (uint16_t)port, fd_p, port_p);
    }
    return status;
}

enum nep_status nep_rendezvous_server_start(const struct nep_rendezvous_params *params,
                                            struct nep_rendezvous_server **server_p,
                                            uint16_t *port_p)
{
    const char *secret = params->secret == NULL ? "" : params->secret;
    if (params->num_ranks == 0 || params->num_ranks > UINT16_MAX) {
        return nep_fail(NEP_ERR_INVALID, "a rendezvous for %u ranks: 1 to %u are possible",
                        params->num_ranks, UINT16_MAX);
    }
    struct nep_rendezvous_server *server = calloc(1, sizeof *server);
    if (server == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for the rendezvous");
    }
    server->num_ranks = params->num_ranks;
    server->first.next = server->first.previous = &server->first;
    server->epoll_fd = server->wake_fd = server->listen_fd = -1;
    pthread_mutex_init(&server->mutex, NULL);
    pthread_cond_init(&server->answered, NULL);
    uint16_t port = 0;
    enum nep_status status = nep_rdv_secret_init(&server->secret, secret, strlen(secret));
    if (status == NEP_OK) {
        status = listen_on_one(params, &server->listen_fd, &port);
    }
    if (status == NEP_OK) {
        status = server_open(server);
    }
    if (status == NEP_OK && pthread_create(&server->thread, NULL, server_main, server) != 0) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "no thread for the rendezvous");
    }
    if (status != NEP_OK) {
        server_destroy(server);
        return status;
    }
    *server_p = server;
    *port_p = port;
    return NEP_OK;
}

/* Gives the order and waits until the answers are sent, at most FLUSH_MS. Holds the mutex. */
static void order(struct nep_rendezvous_server *server)
{
    uint64_t one = 1;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += FLUSH_MS * (long)NEP_MS;
    until.tv_sec += until.tv_nsec / (long)NEP_S;
    until.tv_nsec %= (long)NEP_S;
    server->has_answered = false;
    ssize_t written = write(server->wake_fd, &one, sizeof one);
    (void)written;
    while (!server->has_answered &&
           pthread_cond_timedwait(&server->answered, &server->mutex, &until) == 0) {
    }
}

void nep_rendezvous_server_stop(struct nep_rendezvous_server *server)
{
    if (server == NULL) {
        return;
    }
    pthread_mutex_lock(&server->mutex);
    server->is_stopping = true;
    order(server);
    pthread_mutex_unlock(&server->mutex);
    pthread_join(server->thread, NULL);
    server_destroy(server);
}

void nep_rendezvous_server_release(struct nep_rendezvous_server *server)
{
    if (server == NULL) {
        return;
    }
    pthread_detach(server->thread);
    pthread_mutex_lock(&server->mutex);
    server->is_released = true;
    order(server);
    server->has_let_go = true;
    pthread_cond_broadcast(&server->answered);
    pthread_mutex_unlock(&server->mutex);
}
