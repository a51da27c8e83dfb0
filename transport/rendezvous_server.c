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
#include "transport/rendezvous_conn.h"
#include "transport/rendezvous_socket.h"

enum {
    EXTRA_STRANGERS = 64, /* besides one for each rank */
    ACCEPT_AGAIN_MS = 100,
    FLUSH_MS = 200,
    NUM_EVENTS = 64
};

struct nep_rendezvous_server {
    pthread_t thread;
    struct nep_rdv_pool pool;
    int listen_fd, wake_fd;
    uint32_t num_ranks;
    bool is_listening;
    bool has_said_full;
    uint64_t listen_again_ns;
    pthread_mutex_t mutex; /* guards what follows */
    pthread_cond_t answered;
    bool is_stopping, is_released, has_answered;
    bool has_let_go; /* release has returned: the thread may free the server */
};

/* ---- accepting ------------------------------------------------------------------------------ */

static void listen_pause(struct nep_rendezvous_server *server, bool is_pause)
{
    struct epoll_event event = {.events = is_pause ? 0 : EPOLLIN, .data.ptr = &server->listen_fd};
    epoll_ctl(server->pool.epoll_fd, EPOLL_CTL_MOD, server->listen_fd, &event);
    server->is_listening = !is_pause;
    server->listen_again_ns = is_pause ? nep_deadline_ns(ACCEPT_AGAIN_MS * NEP_MS) : UINT64_MAX;
}

/* Ranks that cannot connect time out elsewhere; the cause is known only here. */
static void say_full(struct nep_rendezvous_server *server, int error)
{
    char sentence[200];
    snprintf(sentence, sizeof sentence,
             "the rendezvous could not take a connection besides %u ranks (%s): raise ulimit -n "
             "where it runs",
             server->pool.num_members, strerror(error));
    if (!server->has_said_full) {
        nep_warn("%s", sentence);
        server->has_said_full = true;
    }
    nep_rdv_hub_note(server->pool.hub, nep_now_ns(), sentence);
}

static void accept_some(struct nep_rendezvous_server *server)
{
    for (int turn = 0; turn < 64; turn++) {
        int fd = accept4(server->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0) {
            if (server->pool.num_strangers >= server->num_ranks + EXTRA_STRANGERS) {
                nep_rdv_pool_drop_stranger(&server->pool);
            }
            nep_rdv_set_options(fd);
            nep_rdv_conn_create(&server->pool, fd);
        } else if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
            say_full(server, errno);
            nep_rdv_pool_drop_stranger(&server->pool);
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
    uint64_t hub_next = nep_rdv_hub_expire(server->pool.hub, now);
    uint64_t next = nep_rdv_pool_expire(&server->pool, now);
    next = hub_next < next ? hub_next : next;
    if (!server->is_listening && server->listen_again_ns <= now) {
        listen_pause(server, false);
    }
    return server->listen_again_ns < next ? server->listen_again_ns : next;
}

/* Tells stop and release that all answers are on their way. True when the loop is over. */
static bool check_orders(struct nep_rendezvous_server *server)
{
    pthread_mutex_lock(&server->mutex);
    bool is_over = server->is_stopping || (server->is_released && server->pool.num_members == 0);
    if ((server->is_stopping || server->is_released) && !nep_rdv_pool_has_output(&server->pool)) {
        server->has_answered = true;
        pthread_cond_broadcast(&server->answered);
    }
    pthread_mutex_unlock(&server->mutex);
    return is_over;
}

static void server_destroy(struct nep_rendezvous_server *server)
{
    nep_rdv_pool_fini(&server->pool);
    nep_rdv_hub_destroy(server->pool.hub);
    /* Else a process forked meanwhile goes on listening, and never answers. */
    shutdown(server->listen_fd, SHUT_RDWR);
    close(server->listen_fd);
    close(server->pool.epoll_fd);
    close(server->wake_fd);
    pthread_mutex_destroy(&server->mutex);
    pthread_cond_destroy(&server->answered);
    free(server);
}

static void serve_once(struct nep_rendezvous_server *server, uint64_t until_ns)
{
    struct epoll_event events[NUM_EVENTS];
    uint64_t left_ms = until_ns == UINT64_MAX ? 60000 : nep_left_ns(until_ns) / NEP_MS + 1;
    int num = epoll_wait(server->pool.epoll_fd, events, NUM_EVENTS,
                         left_ms > 60000 ? 60000 : (int)left_ms);
    for (int i = 0; i < num; i++) {
        void *source = events[i].data.ptr;
        if (source == &server->wake_fd) {
            uint64_t ignored;
            ssize_t got = read(server->wake_fd, &ignored, sizeof ignored);
            (void)got;
        } else if (source != &server->listen_fd) {
            nep_rdv_conn_event(source, events[i].events);
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
    while (nep_rdv_pool_has_output(&server->pool) && nep_left_ns(flush_until) != 0) {
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
    server->pool.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    server->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event wake = {.events = EPOLLIN, .data.ptr = &server->wake_fd};
    struct epoll_event accepts = {.events = EPOLLIN, .data.ptr = &server->listen_fd};
    if (server->pool.epoll_fd < 0 || server->wake_fd < 0 ||
        epoll_ctl(server->pool.epoll_fd, EPOLL_CTL_ADD, server->wake_fd, &wake) != 0 ||
        epoll_ctl(server->pool.epoll_fd, EPOLL_CTL_ADD, server->listen_fd, &accepts) != 0) {
        return nep_fail(NEP_ERR_IO, "the rendezvous cannot start: %s", strerror(errno));
    }
    server->is_listening = true;
    server->listen_again_ns = UINT64_MAX;
    return nep_rdv_hub_create(server->num_ranks, nep_rdv_conn_reply, &server->pool.hub);
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
    server->pool.epoll_fd = server->wake_fd = server->listen_fd = -1;
    pthread_mutex_init(&server->mutex, NULL);
    pthread_cond_init(&server->answered, NULL);
    uint16_t port = 0;
    enum nep_status status = nep_rdv_secret_init(&server->pool.secret, secret, strlen(secret));
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
