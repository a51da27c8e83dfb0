/* SPDX-License-Identifier: Apache-2.0 */
/* This rank's seat in a group: who is where, two transports, the first fault. */
#ifndef NEP_DISPATCH_COMM_H
#define NEP_DISPATCH_COMM_H

#include <pthread.h>
#include <sys/types.h>

#include "base/config.h"
#include "nearep.h"
#include "transport/transport.h"

struct nep_topology_store;
struct nep_rendezvous_client;
struct nep_workers;

struct nep_comm {
    struct nep_config config;
    struct nep_bootstrap bootstrap;
    struct nep_rendezvous_client *client; /* NULL for a caller's bootstrap */
    struct nep_topology topology;
    struct nep_topology_store *store;
    struct nep_transport *intra; /* maps the ranks of this node */
    struct nep_transport *inter; /* the fabric; NULL with one node, may be intra itself */
    struct nep_workers *workers; /* shared by its ep objects; NULL: callers alone */
    uint64_t timeout_ns;
    uint32_t spin_limit;
    pid_t pid;            /* a forked child has another one */
    uint64_t eps_used;    /* bit i: ep number i is alive */
    pthread_mutex_t lock; /* of fault and eps_used */
    struct nep_fault fault;
};

/* Refuses NULL, a forked child and a communicator that broke. */
enum nep_status nep_comm_check(struct nep_comm *comm);
/* Keeps the first fault and says it: returns fault->status, with the message set. */
enum nep_status nep_comm_fail(struct nep_comm *comm, const struct nep_fault *fault);
/* Collective: the lowest ep number that is free on every rank, claimed. */
enum nep_status nep_comm_claim_ep(struct nep_comm *comm, uint32_t *number_p);
void nep_comm_release_ep(struct nep_comm *comm, uint32_t number);

#endif
