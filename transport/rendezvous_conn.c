/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A connection is a stranger until its proof is right and it has joined: strangers get a few
 * hundred bytes and five seconds. The hub answers members from inside its own calls, so an answer
 * that cannot be sent only shuts its socket; the loop finds it ended later.
 */
#include "transport/rendezvous_conn.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/rendezvous_socket.h"

enum {
    HANDSHAKE_S = 5, /* for a stranger to become a member */
    STALL_S = 30,    /* for a member to take what is sent to it */
    JOIN_MOST_BYTES = 512
};

enum conn_state { AWAIT_HELLO, AWAIT_PROOF, AWAIT_JOIN, IS_MEMBER, IS_CLOSING };

struct nep_rdv_conn {
    struct nep_rdv_conn *next, *previous; /* the pool's, oldest first */
    struct nep_rdv_pool *pool;
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

/* ---- connections ---------------------------------------------------------------------------- */

static bool is_stranger(const struct nep_rdv_conn *conn)
{
    return conn->state < IS_MEMBER;
}

static void conn_destroy(struct nep_rdv_conn *conn)
{
    struct nep_rdv_pool *pool = conn->pool;
    pool->num_strangers -= is_stranger(conn);
    if (conn->member != NULL) {
        pool->num_members--;
        nep_rdv_hub_remove(conn->member, nep_now_ns());
    }
    *(conn->previous == NULL ? &pool->oldest : &conn->previous->next) = conn->next;
    *(conn->next == NULL ? &pool->newest : &conn->next->previous) = conn->previous;
    /* A process forked meanwhile may hold the socket too: closing alone would neither take it out
     * of the epoll set nor end it for the other side. */
    epoll_ctl(pool->epoll_fd, EPOLL_CTL_DEL, conn->fd, NULL);
    shutdown(conn->fd, SHUT_RDWR);
    close(conn->fd);
    nep_rdv_session_fini(&conn->session);
    free(conn->in);
    free(conn->out);
    free(conn);
}

/* Sends what is there and closes then; members are removed at once. */
static void conn_close(struct nep_rdv_conn *conn)
{
    struct nep_rdv_pool *pool = conn->pool;
    if (conn->state == IS_CLOSING) {
        return;
    }
    pool->num_strangers -= is_stranger(conn);
    conn->state = IS_CLOSING;
    conn->in_have = 0;
    conn->deadline_ns = nep_deadline_ns(HANDSHAKE_S * NEP_S);
    if (conn->member != NULL) {
        struct nep_rdv_member *member = conn->member;
        conn->member = NULL;
        pool->num_members--;
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
static uint8_t *conn_out(struct nep_rdv_conn *conn, size_t len)
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

static void conn_poll_out(struct nep_rdv_conn *conn, bool is_wanted)
{
    if (conn->is_polling_out != is_wanted) {
        struct epoll_event event = {.events = EPOLLIN | (is_wanted ? EPOLLOUT : 0),
                                    .data.ptr = conn};
        epoll_ctl(conn->pool->epoll_fd, EPOLL_CTL_MOD, conn->fd, &event);
        conn->is_polling_out = is_wanted;
    }
}

/* False when the other side is gone. */
static bool conn_flush(struct nep_rdv_conn *conn)
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

void nep_rdv_conn_reply(void *arg, const struct nep_rdv_message *reply)
{
    struct nep_rdv_conn *conn = arg;
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

static bool conn_need(struct nep_rdv_conn *conn, size_t need)
{
    conn->in_need = need;
    return reserve(&conn->in, &conn->in_cap, need);
}

static enum nep_status on_hello(struct nep_rdv_conn *conn)
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
        nep_rdv_hub_note(conn->pool->hub, nep_now_ns(), nep_last_message());
    }
    conn->state = AWAIT_PROOF;
    conn->in_have = 0;
    return status != NEP_OK || conn_need(conn, NEP_RDV_MAC_BYTES) ? status : NEP_ERR_NO_MEMORY;
}

static enum nep_status on_proof(struct nep_rdv_conn *conn)
{
    uint8_t answer[NEP_RDV_WELCOME_BYTES];
    enum nep_status status = nep_rdv_answer_proof(&conn->session, conn->in, answer);
    uint8_t *out = conn_out(conn, sizeof answer);
    if (out != NULL) {
        memcpy(out, answer, sizeof answer);
        conn_flush(conn);
    }
    if (status != NEP_OK) {
        nep_rdv_hub_note(conn->pool->hub, nep_now_ns(),
                         "a process was refused because it does not know the secret");
        return status;
    }
    conn->state = AWAIT_JOIN;
    conn->in_have = 0;
    return conn_need(conn, NEP_RDV_LENGTH_BYTES) ? NEP_OK : NEP_ERR_NO_MEMORY;
}

static enum nep_status on_message(struct nep_rdv_conn *conn, const struct nep_rdv_message *message)
{
    struct nep_rdv_pool *pool = conn->pool;
    uint64_t now = nep_now_ns();
    if (conn->state == IS_MEMBER) {
        return nep_rdv_hub_request(conn->member, message, now);
    }
    struct nep_rdv_member *member;
    enum nep_status status = nep_rdv_hub_join(pool->hub, message, conn, now, &member);
    if (status == NEP_OK) {
        conn->member = member;
        conn->state = IS_MEMBER;
        conn->deadline_ns = UINT64_MAX;
        pool->num_strangers--;
        pool->num_members++;
    }
    return status;
}

/* The length alone, or length and body. */
static enum nep_status on_frame(struct nep_rdv_conn *conn)
{
    size_t sealed;
    size_t most = conn->state == IS_MEMBER ? NEP_RDV_MAX_REQUEST : JOIN_MOST_BYTES;
    enum nep_status status = nep_rdv_read_length(conn->in, most, &sealed);
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

static enum nep_status on_input(struct nep_rdv_conn *conn)
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
static bool conn_receive(struct nep_rdv_conn *conn)
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

void nep_rdv_conn_event(struct nep_rdv_conn *conn, uint32_t events)
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

/* ---- the pool -------------------------------------------------------------------------------- */

void nep_rdv_conn_create(struct nep_rdv_pool *pool, int fd)
{
    struct nep_rdv_conn *conn = calloc(1, sizeof *conn);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = conn};
    if (conn == NULL || !nep_rdv_is_peer_allowed(fd) || !conn_need(conn, NEP_RDV_HELLO_BYTES) ||
        epoll_ctl(pool->epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) {
        if (conn != NULL) {
            free(conn->in);
        }
        free(conn);
        close(fd);
        return;
    }
    conn->pool = pool;
    conn->fd = fd;
    conn->state = AWAIT_HELLO;
    conn->deadline_ns = nep_deadline_ns(HANDSHAKE_S * NEP_S);
    nep_rdv_session_init(&conn->session, &pool->secret, true);
    conn->previous = pool->newest;
    *(conn->previous == NULL ? &pool->oldest : &conn->previous->next) = conn;
    pool->newest = conn;
    pool->num_strangers++;
}

void nep_rdv_pool_drop_stranger(struct nep_rdv_pool *pool)
{
    struct nep_rdv_conn *conn = pool->oldest;
    while (conn != NULL && !is_stranger(conn) && conn->state != IS_CLOSING) {
        conn = conn->next;
    }
    if (conn != NULL) {
        conn_destroy(conn);
    }
}

bool nep_rdv_pool_has_output(const struct nep_rdv_pool *pool)
{
    for (const struct nep_rdv_conn *conn = pool->oldest; conn != NULL; conn = conn->next) {
        if (conn->out_sent != conn->out_len) {
            return true;
        }
    }
    return false;
}

uint64_t nep_rdv_pool_expire(struct nep_rdv_pool *pool, uint64_t now_ns)
{
    uint64_t next = UINT64_MAX;
    for (struct nep_rdv_conn *conn = pool->oldest; conn != NULL;) {
        struct nep_rdv_conn *after = conn->next;
        if (conn->deadline_ns <= now_ns) {
            conn_destroy(conn);
        } else if (conn->deadline_ns < next) {
            next = conn->deadline_ns;
        }
        conn = after;
    }
    return next;
}

void nep_rdv_pool_fini(struct nep_rdv_pool *pool)
{
    while (pool->oldest != NULL) {
        conn_destroy(pool->oldest);
    }
}
