/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Names are resolved by a thread that may be left behind: getaddrinfo has no deadline, and a name
 * server that does not answer takes it half a minute. Rejected: getaddrinfo_a, which musl lacks and
 * whose requests cannot be cancelled either.
 */
#include "transport/rendezvous_socket.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/clock.h"

struct addresses {
    struct sockaddr_storage list[8];
    socklen_t len[8];
    uint32_t num;
};

/* ---- names ---------------------------------------------------------------------------------- */

struct look_up {
    pthread_mutex_t mutex;
    pthread_cond_t done_cond;
    bool is_done;
    bool is_abandoned;
    int error;
    char host[256];
    struct addresses found;
};

static void copy_found(struct addresses *found, const struct addrinfo *info)
{
    for (; info != NULL && found->num < 8; info = info->ai_next) {
        if (info->ai_addrlen <= sizeof found->list[0]) {
            memcpy(&found->list[found->num], info->ai_addr, info->ai_addrlen);
            found->len[found->num++] = info->ai_addrlen;
        }
    }
}

static int look_up_now(const char *host, int flags, struct addresses *found)
{
    struct addrinfo *info = NULL;
    struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM, .ai_flags = flags};
    int error = getaddrinfo(host, NULL, &hints, &info);
    if (error == 0) {
        copy_found(found, info);
        freeaddrinfo(info);
    }
    return error;
}

static void look_up_free(struct look_up *look_up)
{
    pthread_cond_destroy(&look_up->done_cond);
    pthread_mutex_destroy(&look_up->mutex);
    free(look_up);
}

static void *look_up_main(void *arg)
{
    struct look_up *look_up = arg;
    struct addresses found = {.num = 0};
    int error = look_up_now(look_up->host, 0, &found);
    pthread_mutex_lock(&look_up->mutex);
    look_up->error = error;
    look_up->found = found;
    look_up->is_done = true;
    bool is_abandoned = look_up->is_abandoned;
    pthread_cond_signal(&look_up->done_cond);
    pthread_mutex_unlock(&look_up->mutex);
    if (is_abandoned) {
        look_up_free(look_up);
    }
    return NULL;
}

/* True when it is done; false leaves it to its thread. */
static bool look_up_wait(struct look_up *look_up, uint64_t deadline_ns)
{
    struct timespec until;
    uint64_t left = nep_left_ns(deadline_ns);
    left = left > 3600 * NEP_S ? 3600 * NEP_S : left;
    clock_gettime(CLOCK_REALTIME, &until);
    left += (uint64_t)until.tv_nsec;
    until.tv_sec += (time_t)(left / NEP_S);
    until.tv_nsec = (long)(left % NEP_S);
    pthread_mutex_lock(&look_up->mutex);
    while (!look_up->is_done &&
           pthread_cond_timedwait(&look_up->done_cond, &look_up->mutex, &until) == 0) {
    }
    bool is_done = look_up->is_done;
    look_up->is_abandoned = !is_done;
    pthread_mutex_unlock(&look_up->mutex);
    return is_done;
}

static enum nep_status resolve_name(const char *host, uint64_t deadline_ns, struct addresses *found)
{
    struct look_up *look_up = calloc(1, sizeof *look_up);
    pthread_t thread;
    if (look_up == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory to resolve %s", host);
    }
    snprintf(look_up->host, sizeof look_up->host, "%s", host);
    pthread_mutex_init(&look_up->mutex, NULL);
    pthread_cond_init(&look_up->done_cond, NULL);
    if (pthread_create(&thread, NULL, look_up_main, look_up) != 0) {
        look_up_free(look_up);
        return nep_fail(NEP_ERR_NO_MEMORY, "no thread to resolve %s", host);
    }
    if (!look_up_wait(look_up, deadline_ns)) {
        pthread_detach(thread);
        return nep_fail(NEP_ERR_TIMEOUT,
                        "the name %s was not resolved in time: check the name server, or give an "
                        "address",
                        host);
    }
    pthread_join(thread, NULL);
    *found = look_up->found;
    int error = look_up->error;
    look_up_free(look_up);
    if (error != 0) {
        return nep_fail(NEP_ERR_NOT_FOUND, "the name %s does not resolve: %s", host,
                        gai_strerror(error));
    }
    return NEP_OK;
}

static enum nep_status unix_address(const char *host, struct addresses *found)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t len = strlen(host + 1);
    if (len == 0 || len > sizeof address.sun_path - 1) {
        return nep_fail(NEP_ERR_INVALID, "the socket name '%s' must have 1 to %zu characters", host,
                        sizeof address.sun_path - 1);
    }
    memcpy(address.sun_path + 1, host + 1, len);
    memcpy(&found->list[0], &address, sizeof address);
    found->len[0] = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + len);
    found->num = 1;
    return NEP_OK;
}

/* is_name_p: host was a name, not an address. */
static enum nep_status resolve(const char *host, uint16_t port, uint64_t deadline_ns,
                               struct addresses *found, bool *is_name_p)
{
    found->num = 0;
    *is_name_p = false;
    if (host[0] == '@') {
        return unix_address(host, found);
    }
    if (look_up_now(host, AI_NUMERICHOST, found) != 0) {
        *is_name_p = true;
        enum nep_status status = resolve_name(host, deadline_ns, found);
        if (status != NEP_OK) {
            return status;
        }
    }
    for (uint32_t i = 0; i < found->num; i++) {
        if (found->list[i].ss_family == AF_INET6) {
            ((struct sockaddr_in6 *)&found->list[i])->sin6_port = htons(port);
        } else {
            ((struct sockaddr_in *)&found->list[i])->sin_port = htons(port);
        }
    }
    return NEP_OK;
}

/* ---- listening ------------------------------------------------------------------------------ */

static bool is_loopback(const struct sockaddr_storage *address)
{
    if (address->ss_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)address;
        return ntohl(in->sin_addr.s_addr) >> 24 == 127;
    }
    if (address->ss_family == AF_INET6) {
        return IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)address)->sin6_addr);
    }
    return false;
}

static uint16_t bound_port(int fd)
{
    struct sockaddr_storage address = {0};
    socklen_t len = sizeof address;
    getsockname(fd, (struct sockaddr *)&address, &len);
    return address.ss_family == AF_INET    ? ntohs(((struct sockaddr_in *)&address)->sin_port)
           : address.ss_family == AF_INET6 ? ntohs(((struct sockaddr_in6 *)&address)->sin6_port)
                                           : 0;
}

/*
 * Over loopback a segment has 64 KiB, two of which fill a receive buffer: the window never opens by
 * the two segments that make the receiver say so, and a large answer advances by one segment for
 * each probe of the sender, every 200 ms and more. Before connect or listen.
 */
static void limit_segments(int fd)
{
    int bytes = 8192;
    setsockopt(fd, IPPROTO_TCP, TCP_MAXSEG, &bytes, sizeof bytes); /* fails on a Unix socket */
}

static enum nep_status listen_at(const struct sockaddr_storage *address, socklen_t len,
                                 const char *host, uint16_t port, int *fd_p)
{
    int fd = socket(address->ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int one = 1, zero = 0;
    if (fd < 0) {
        return nep_fail(NEP_ERR_IO, "no socket for the rendezvous at %s: %s", host,
                        strerror(errno));
    }
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    limit_segments(fd);
    if (address->ss_family == AF_INET6) {
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof zero);
    }
    if (bind(fd, (const struct sockaddr *)address, len) != 0 || listen(fd, 1024) != 0) {
        int error = errno;
        close(fd);
        enum nep_status status = error == EADDRINUSE      ? NEP_ERR_BUSY
                                 : error == EADDRNOTAVAIL ? NEP_ERR_NOT_FOUND
                                                          : NEP_ERR_IO;
        return nep_fail(status, "cannot listen at %s port %u: %s", host, port, strerror(error));
    }
    *fd_p = fd;
    return NEP_OK;
}

enum nep_status nep_rdv_listen(const char *host, uint16_t port, int *fd_p, uint16_t *port_p)
{
    struct addresses found;
    bool is_name;
    enum nep_status status = resolve(host, port, nep_deadline_ns(20 * NEP_S), &found, &is_name);
    if (status != NEP_OK) {
        return status;
    }
    if (is_name && strcmp(host, "localhost") != 0 && is_loopback(&found.list[0])) {
        struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
        struct sockaddr_in any4 = {.sin_family = AF_INET, .sin_port = htons(port)};
        memcpy(&found.list[0], &any, sizeof any);
        memcpy(&found.list[1], &any4, sizeof any4); /* where there is no IPv6 */
        found.len[0] = sizeof any;
        found.len[1] = sizeof any4;
        found.num = 2;
    }
    status = NEP_ERR_NOT_FOUND;
    for (uint32_t i = 0; i < found.num; i++) {
        status = listen_at(&found.list[i], found.len[i], host, port, fd_p);
        if (status == NEP_OK) {
            *port_p = bound_port(*fd_p);
            return NEP_OK;
        }
        if (status == NEP_ERR_BUSY) {
            break; /* another address of the same name would hide the taken one */
        }
    }
    return status;
}

/* ---- connecting ----------------------------------------------------------------------------- */

bool nep_rdv_wait(int fd, short events, uint64_t deadline_ns)
{
    for (;;) {
        uint64_t left_ms = (nep_left_ns(deadline_ns) + NEP_MS - 1) / NEP_MS;
        struct pollfd poll_fd = {.fd = fd, .events = events};
        int num = poll(&poll_fd, 1, left_ms > 60000 ? 60000 : (int)left_ms);
        if (num > 0) {
            return true;
        }
        if (left_ms == 0 || (num < 0 && errno != EINTR)) {
            return false;
        }
    }
}

bool nep_rdv_is_peer_allowed(int fd)
{
    struct sockaddr_storage address = {0};
    socklen_t len = sizeof address;
    struct ucred peer;
    if (getsockname(fd, (struct sockaddr *)&address, &len) != 0 || address.ss_family != AF_UNIX) {
        return true;
    }
    len = sizeof peer;
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) == 0 && peer.uid == geteuid();
}

void nep_rdv_set_options(int fd)
{
    int one = 1, idle_s = 10, every_s = 5, times = 3;
    /* They fail on a Unix socket, which needs none of them. */
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &every_s, sizeof every_s);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &times, sizeof times);
}

static enum nep_status connect_to(const struct sockaddr_storage *address, socklen_t len,
                                  const char *host, uint16_t port, uint64_t deadline_ns, int *fd_p)
{
    int fd = socket(address->ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int error = 0;
    socklen_t error_len = sizeof error;
    if (fd < 0) {
        return nep_fail(NEP_ERR_IO, "no socket to reach %s: %s", host, strerror(errno));
    }
    nep_rdv_set_options(fd);
    limit_segments(fd);
    if (connect(fd, (const struct sockaddr *)address, len) != 0) {
        error = errno;
        if (error == EINPROGRESS) {
            error = ETIMEDOUT;
            if (nep_rdv_wait(fd, POLLOUT, deadline_ns)) {
                getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &error_len);
            }
        }
    }
    if (error == 0 && nep_rdv_is_peer_allowed(fd)) {
        *fd_p = fd;
        return NEP_OK;
    }
    close(fd);
    if (error == 0) {
        return nep_fail(NEP_ERR_MISMATCH, "another user holds the socket %s", host);
    }
    return nep_fail(NEP_ERR_IO, "cannot connect to %s port %u: %s", host, port, strerror(error));
}

enum nep_status nep_rdv_connect(const char *host, uint16_t port, uint64_t deadline_ns, int *fd_p)
{
    struct addresses found;
    bool is_name;
    enum nep_status status = resolve(host, port, deadline_ns, &found, &is_name);
    for (uint32_t i = 0; status == NEP_OK && i < found.num; i++) {
        /* The last address may take what is left, those before it share. */
        uint64_t share = nep_deadline_ns(nep_left_ns(deadline_ns) / (found.num - i));
        enum nep_status tried = connect_to(&found.list[i], found.len[i], host, port, share, fd_p);
        if (tried == NEP_OK || i + 1 == found.num) {
            return tried;
        }
    }
    return status;
}
