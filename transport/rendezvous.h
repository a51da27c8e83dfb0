/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The built-in rendezvous: a small server that holds a store (put, get with wait, compare-and-swap)
 * and gathers; all with deadlines. Hosted by the launcher (nep-perf's parent, nep-info --serve), or
 * by rank 0, which is then a single point of failure and named as one. Knows num_ranks; refuses
 * strangers, wrong sizes, duplicate ranks and other versions, with a sentence to the client and to
 * the ranks that wait for it.
 *
 * host is a name or address for TCP; "@name" is a Unix socket in the abstract namespace, which one
 * machine's processes of one user reach and which leaves nothing behind.
 */
#ifndef NEP_TRANSPORT_RENDEZVOUS_H
#define NEP_TRANSPORT_RENDEZVOUS_H

#include "base/config.h"
#include "nearep.h"

struct nep_rendezvous_server;
struct nep_rendezvous_client;

enum { NEP_RENDEZVOUS_SECRET_BYTES = 256 };

struct nep_rendezvous_params {
    const char *host;
    uint16_t port;       /* server: 0 is any free one */
    uint16_t num_ports;  /* the first free (server) or right (client) of so many; 0: 1 */
    uint32_t num_ranks;  /* of the group */
    uint32_t rank;       /* client */
    const char *secret;  /* text that both sides must know; NULL or "": none */
    uint64_t timeout_ns; /* client: deadline of connecting, and of leaving */
    bool is_one_try;     /* client: do not try again while nobody listens */
    bool is_rank_0;      /* client: rank 0 serves it, which the sentence of its loss says */
    bool is_newcomer;    /* client: takes the seat of this rank in a group that lost it */
};

/*
 * Listens, with a thread of its own. *port_p: the port. NEP_ERR_BUSY: the address is taken;
 * NEP_ERR_NOT_FOUND: it is not one of this machine.
 */
enum nep_status nep_rendezvous_server_start(const struct nep_rendezvous_params *params,
                                            struct nep_rendezvous_server **server_p,
                                            uint16_t *port_p);
/* Ends it and its connections; what was answered is sent first, within 200 ms. */
void nep_rendezvous_server_stop(struct nep_rendezvous_server *server);
/* Lets it go on until its last client has left; then it frees itself. Returns like stop. */
void nep_rendezvous_server_release(struct nep_rendezvous_server *server);

/* Connects and joins, trying again until the deadline while nobody listens. */
enum nep_status nep_rendezvous_client_open(const struct nep_rendezvous_params *params,
                                           struct nep_rendezvous_client **client_p);
/* Says goodbye; does not wait for others. */
void nep_rendezvous_client_close(struct nep_rendezvous_client *client);
/* Fills a bootstrap whose ctx is the client. Its functions return an enum nep_status. */
void nep_rendezvous_client_bootstrap(struct nep_rendezvous_client *client,
                                     struct nep_bootstrap *out);
/* True for a bootstrap made by nep_rendezvous_client_bootstrap. */
bool nep_rendezvous_is_client(const struct nep_bootstrap *bootstrap);
/* The client keeps the server that this rank hosts, and releases it when it is closed. */
void nep_rendezvous_client_keep(struct nep_rendezvous_client *client,
                                struct nep_rendezvous_server *server);

/* A fresh secret of 64 hex digits: what a launcher hands to its ranks in NEP_SECRET. */
enum nep_status nep_rendezvous_secret_make(char secret[NEP_RENDEZVOUS_SECRET_BYTES]);
/*
 * NEP_SECRET, or the content of NEP_SECRET_FILE without its last newline; "" when neither is set. A
 * file that others than its owner may read or write is refused.
 */
enum nep_status nep_rendezvous_secret_read(const struct nep_config *config,
                                           char secret[NEP_RENDEZVOUS_SECRET_BYTES]);

#endif
