/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The connections of a rendezvous server: from a stranger's first byte to a member's last. One
 * thread; nothing here blocks.
 */
#ifndef NEP_TRANSPORT_RENDEZVOUS_CONN_H
#define NEP_TRANSPORT_RENDEZVOUS_CONN_H

#include "transport/rendezvous_hub.h"

struct nep_rdv_conn;

/* All connections of one server. epoll_fd, secret and hub are the server's, set before the first.
 */
struct nep_rdv_pool {
    int epoll_fd;
    struct nep_rdv_secret secret;
    struct nep_rdv_hub *hub;
    struct nep_rdv_conn *oldest, *newest;
    uint32_t num_strangers, num_members;
};

/* Takes over an accepted socket; epoll reports it with the connection as data. */
void nep_rdv_conn_create(struct nep_rdv_pool *pool, int fd);
/* What epoll reported. May destroy this connection, and no other. */
void nep_rdv_conn_event(struct nep_rdv_conn *conn, uint32_t events);
/* The hub's answers to a connection: a nep_rdv_reply_fn. */
void nep_rdv_conn_reply(void *conn, const struct nep_rdv_message *reply);
/* Makes room for a newcomer. */
void nep_rdv_pool_drop_stranger(struct nep_rdv_pool *pool);
/* Closes what has passed its deadline; returns the next one. */
uint64_t nep_rdv_pool_expire(struct nep_rdv_pool *pool, uint64_t now_ns);
/* Whether anything waits to be sent. */
bool nep_rdv_pool_has_output(const struct nep_rdv_pool *pool);
void nep_rdv_pool_fini(struct nep_rdv_pool *pool);

#endif
