/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bytes of a connection, through a socket pair. The first byte of the input chooses: a stranger who
 * sends the rest as it is, or a member whose frames are the rest, sealed by the fuzzer, since no
 * fuzzer guesses a MAC; then the rest unsealed, after a right join.
 */
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "tests/fuzz/fuzz.h"
#include "transport/rendezvous_conn.h"

struct peer {
    int fd;
    bool is_closed;
    struct nep_rdv_session session;
    struct nep_rdv_pool *pool;
};

static void turn(struct peer *peer)
{
    /* The only connection: its end is the pool's emptiness. */
    for (int i = 0; i < 4 && peer->pool->oldest != NULL; i++) {
        nep_rdv_conn_event(peer->pool->oldest, EPOLLIN);
    }
    peer->is_closed = peer->pool->oldest == NULL;
}

static void give(struct peer *peer, const void *bytes, size_t len)
{
    for (size_t sent = 0; sent < len && !peer->is_closed;) {
        size_t piece = len - sent > 32768 ? 32768 : len - sent;
        ssize_t put =
            send(peer->fd, (const char *)bytes + sent, piece, MSG_NOSIGNAL | MSG_DONTWAIT);
        sent += put > 0 ? (size_t)put : 0;
        turn(peer);
        char answers[4096];
        while (recv(peer->fd, answers, sizeof answers, MSG_DONTWAIT) > 0) {
        }
    }
}

static bool prove(struct peer *peer)
{
    uint8_t hello[NEP_RDV_HELLO_BYTES], challenge[NEP_RDV_CHALLENGE_BYTES];
    uint8_t proof[NEP_RDV_MAC_BYTES], welcome[NEP_RDV_WELCOME_BYTES];
    nep_rdv_write_hello(&peer->session, hello);
    PROMISE(send(peer->fd, hello, sizeof hello, 0) == (ssize_t)sizeof hello);
    turn(peer);
    PROMISE(recv(peer->fd, challenge, sizeof challenge, MSG_DONTWAIT) == (ssize_t)sizeof challenge);
    PROMISE(nep_rdv_answer_challenge(&peer->session, challenge, proof) == NEP_OK);
    PROMISE(send(peer->fd, proof, sizeof proof, 0) == (ssize_t)sizeof proof);
    turn(peer);
    PROMISE(recv(peer->fd, welcome, sizeof welcome, MSG_DONTWAIT) == (ssize_t)sizeof welcome);
    return nep_rdv_check_welcome(&peer->session, welcome) == NEP_OK;
}

static void give_sealed(struct peer *peer, const uint8_t *body, size_t len)
{
    uint8_t *frame = malloc(len + NEP_RDV_LENGTH_BYTES + NEP_RDV_TAG_BYTES);
    nep_rdv_seal(&peer->session, body, len, frame);
    give(peer, frame, len + NEP_RDV_LENGTH_BYTES + NEP_RDV_TAG_BYTES);
    free(frame);
}

static void give_join(struct peer *peer)
{
    struct nep_rdv_message join = {
        .op = NEP_RDV_JOIN, .num_ranks = 2, .version = nep_version(), .text = "x", .text_len = 1};
    uint8_t body[128];
    nep_rdv_message_encode(&join, body);
    give_sealed(peer, body, nep_rdv_message_bytes(&join));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct nep_rdv_pool pool = {.epoll_fd = epoll_create1(EPOLL_CLOEXEC)};
    struct peer peer = {.pool = &pool};
    int fds[2];
    nep_log_open(NEP_LOG_NONE, "");
    PROMISE(nep_rdv_secret_init(&pool.secret, "fuzz", 4) == NEP_OK);
    PROMISE(nep_rdv_hub_create(2, nep_rdv_conn_reply, &pool.hub) == NEP_OK);
    PROMISE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    peer.fd = fds[0];
    nep_rdv_session_init(&peer.session, &pool.secret, false);
    nep_rdv_conn_create(&pool, fds[1]);
    uint8_t how = len > 0 ? data[0] % 3 : 0;
    data += len > 0;
    len -= len > 0;
    if (how == 0) {
        give(&peer, data, len);
        PROMISE(pool.num_members == 0); /* nobody gets in without the secret */
    } else {
        PROMISE(prove(&peer));
        give_join(&peer);
        PROMISE(pool.num_members == 1);
        while (how == 1 && len >= 2 && !peer.is_closed) {
            size_t piece = data[0] | (size_t)data[1] << 8;
            piece = piece > len - 2 ? len - 2 : piece;
            give_sealed(&peer, data + 2, piece);
            data += 2 + piece;
            len -= 2 + piece;
        }
        if (how == 2) {
            give(&peer, data, len);
        }
    }
    nep_rdv_pool_fini(&pool);
    PROMISE(pool.num_members == 0 && pool.num_strangers == 0);
    nep_rdv_hub_destroy(pool.hub);
    close(fds[0]);
    close(pool.epoll_fd);
    return 0;
}
