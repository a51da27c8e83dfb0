/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The built-in rendezvous: a small TCP server that holds a store (put, get with wait,
 * compare-and-swap) and gathers; all with deadlines. Hosted by the launcher (nep-perf's parent,
 * nep-info --serve), or by rank 0, which is then a single point of failure and named as one. Knows
 * num_ranks; refuses strangers, wrong sizes, duplicate ranks and other versions, with a sentence to
 * the client.
 */
#ifndef NEP_TRANSPORT_RENDEZVOUS_H
#define NEP_TRANSPORT_RENDEZVOUS_H

#include "base/config.h"
#include "nearep.h"

struct nep_rendezvous_server;
struct nep_rendezvous_client;

/* Listens on host:port (port 0: any) with a thread of its own. *port_p: the port. */
enum nep_status nep_rendezvous_server_start(const char *host, uint16_t port, uint32_t num_ranks,
                                            struct nep_rendezvous_server **server_p,
                                            uint16_t *port_p);
void nep_rendezvous_server_stop(struct nep_rendezvous_server *server);

enum nep_status nep_rendezvous_client_open(const char *host, uint16_t port, uint32_t rank,
                                           uint32_t num_ranks, uint64_t timeout_ns,
                                           struct nep_rendezvous_client **client_p);
void nep_rendezvous_client_close(struct nep_rendezvous_client *client);
/* Fills a bootstrap whose ctx is the client. */
void nep_rendezvous_client_bootstrap(struct nep_rendezvous_client *client,
                                     struct nep_bootstrap *out);

#endif
