/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whether a silent peer's process has ended. A dead process and a dead path look alike to a
 * connection: nothing answers. But when a process ends its machine closes its sockets, and refuses
 * from then on who asks for them. So each path has a TCP socket that listens at the address which
 * RoCE uses, and nothing is ever said there: a peer that no QP reaches is asked for by connecting.
 * Refused: the machine lives, and the process does not. Connected: it lives, and so does
 * everything else that means no more than that nothing is known (no answer, no route, a socket
 * that a forked child keeps): then the path is waited for (revive.c).
 *
 * A firewall may refuse, too. So nobody believes a refusal who has not connected to another rank
 * once, while all were alive.
 *
 * Rejected: a connection to each peer that stays open, and is reset at its end. A thousand ranks
 * would keep a million. Rejected: librdmacm, whose listeners answer for the kernel in the same way:
 * it needs an IP address per port as well, and its library. InfiniBand without one waits.
 */
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/verbs/verbs.h"

#define ASK_NS (200 * NEP_MS) /* an answer may take that long; then it is asked again */

union address {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
};

/* The address of a port's first routable GID; 0 where there is none, else its length. */
static socklen_t address_of(const struct nep_verbs_gids *gids, uint16_t port,
                            union address *address)
{
    memset(address, 0, sizeof *address);
    if (gids->index[NEP_VERBS_GID_V2_IPV4] >= 0) {
        address->v4.sin_family = AF_INET;
        address->v4.sin_port = htons(port);
        memcpy(&address->v4.sin_addr, gids->raw[NEP_VERBS_GID_V2_IPV4] + 12, 4);
        return sizeof address->v4;
    }
    if (gids->index[NEP_VERBS_GID_V2_IPV6] >= 0) {
        address->v6.sin6_family = AF_INET6;
        address->v6.sin6_port = htons(port);
        memcpy(&address->v6.sin6_addr, gids->raw[NEP_VERBS_GID_V2_IPV6], 16);
        return sizeof address->v6;
    }
    return 0;
}

static int tcp_socket(const union address *address)
{
    return socket(address->any.sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
}

/* ---- the own door --------------------------------------------------------------------------- */

void nep_verbs_door_open(struct nep_verbs *verbs, struct nep_verbs_path *path)
{
    union address address;
    socklen_t len = address_of(&path->gids, 0, &address);
    path->door_fd = -1;
    if (len == 0 || verbs->params.config->verbs_revive_ns == 0) {
        return;
    }
    int fd = tcp_socket(&address);
    if (fd < 0 || bind(fd, &address.any, len) != 0 || listen(fd, SOMAXCONN) != 0 ||
        getsockname(fd, &address.any, &len) != 0) {
        nep_debug("verbs: %s: nothing listens at its address (%s): ranks on other machines wait "
                  "for NEP_VERBS_REVIVE if this process is killed",
                  path->device, strerror(errno));
        if (fd >= 0) {
            close(fd);
        }
        return;
    }
    path->door_fd = fd;
    path->door_port =
        ntohs(address.any.sa_family == AF_INET6 ? address.v6.sin6_port : address.v4.sin_port);
}

void nep_verbs_door_close(struct nep_verbs_path *path)
{
    if (path->door_port != 0) {
        close(path->door_fd);
    }
    path->door_fd = -1;
    path->door_port = 0;
}

bool nep_verbs_door_answer(const struct nep_verbs_path *path)
{
    int fd;
    do {
        fd = accept4(path->door_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0) {
            close(fd);
        }
    } while (fd >= 0 || errno == EINTR || errno == ECONNABORTED);
    /* Without descriptors left, for instance, those who ask learn nothing, which is no harm. */
    return errno == EAGAIN || errno == EWOULDBLOCK;
}

/* ---- others' -------------------------------------------------------------------------------- */

/* Begins to connect; -1 with *error_p where that has ended already. */
static int begin(const struct nep_verbs *verbs, uint32_t rank, uint32_t path_idx, int *error_p)
{
    const struct nep_verbs_card *card = nep_verbs_card_of(verbs, rank, path_idx);
    union address address;
    socklen_t len = card->door_port != 0 ? address_of(&card->gids, card->door_port, &address) : 0;
    int fd = len != 0 ? tcp_socket(&address) : -1;
    *error_p = EHOSTUNREACH;
    if (fd < 0) {
        return -1;
    }
    if (connect(fd, &address.any, len) == 0 || errno == EINPROGRESS) {
        return fd;
    }
    *error_p = errno;
    close(fd);
    return -1;
}

static int outcome(int fd)
{
    int error = 0;
    socklen_t len = sizeof error;
    return getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) == 0 ? error : errno;
}

void nep_verbs_door_try(struct nep_verbs *verbs)
{
    const struct nep_topology *topology = verbs->params.topology;
    int error;
    verbs->try_fd = -1;
    for (uint32_t i = 1; i < verbs->num_ranks && verbs->try_fd < 0; i++) {
        uint32_t r = (verbs->rank + i) % verbs->num_ranks;
        if (verbs->peers[r].is_served &&
            topology->node_of_rank[r] != topology->node_of_rank[verbs->rank]) {
            verbs->try_fd = begin(verbs, r, 0, &error);
            break;
        }
    }
}

void nep_verbs_door_tried(struct nep_verbs *verbs)
{
    int error = outcome(verbs->try_fd);
    verbs->believes_refusals = error == 0 || error == ECONNRESET; /* it was connected before that */
    close(verbs->try_fd);
    verbs->try_fd = -1;
}

void nep_verbs_ask_end(struct nep_verbs_peer *peer)
{
    if (peer->ask_fd >= 0) {
        close(peer->ask_fd);
        peer->ask_fd = -1;
    }
}

bool nep_verbs_has_ended(struct nep_verbs *verbs, struct nep_verbs_peer *peer, uint64_t now_ns)
{
    int error = 0;
    if (!verbs->believes_refusals || (peer->ask_fd < 0 && now_ns < peer->ask_ns)) {
        return false;
    }
    if (peer->ask_fd < 0) {
        peer->ask_fd = begin(verbs, peer->rank, peer->ask_path++ % verbs->num_paths, &error);
        peer->ask_ns = now_ns + ASK_NS;
    }
    if (peer->ask_fd >= 0) {
        struct pollfd file = {.fd = peer->ask_fd, .events = POLLOUT};
        if (poll(&file, 1, 0) == 0 && now_ns < peer->ask_ns) {
            return false;
        }
        error = file.revents != 0 ? outcome(peer->ask_fd) : ETIMEDOUT;
        nep_verbs_ask_end(peer);
    }
    return error == ECONNREFUSED;
}
