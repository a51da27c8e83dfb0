/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who the members are, at one address for as long as transports and plans that were made for them
 * live. A communicator has the generation that it works with, and perhaps a next one that is being
 * prepared (grow.h).
 */
#ifndef NEP_DISPATCH_GENERATION_H
#define NEP_DISPATCH_GENERATION_H

#include "nearep.h"
#include "transport/group.h"
#include "transport/topology.h"

struct nep_comm;

struct nep_generation {
    uint64_t number;
    struct nep_topology topology; /* numbers members */
    struct nep_topology_store *store;
    bool has_store;    /* it is this generation's, not that of all seats */
    uint32_t *members; /* [seats] the seat of each member */
    struct nep_group group;
    struct nep_bootstrap bootstrap; /* among members; its ctx may be group */
};

/* The first: all seats, or, of a newcomer, nobody yet knows whom. The communicator takes it. */
enum nep_status nep_generation_first(struct nep_comm *comm);
/* The one that was decided. A newcomer learns from it where the seats are. Not taken yet. */
enum nep_status nep_generation_create(struct nep_comm *comm,
                                      const struct nep_group_decision *decision,
                                      struct nep_generation **made_p);
void nep_generation_destroy(struct nep_generation *made);
/* The communicator's names for it; what it had before is the caller's. */
void nep_generation_take(struct nep_comm *comm, struct nep_generation *made);
/*
 * Collective over the members that the communicator has taken: transports, clock and ep objects.
 * timeout_ns: what the communicator's is, compared between members.
 */
enum nep_status nep_generation_build(struct nep_comm *comm,
                                     const struct nep_group_decision *decision,
                                     uint64_t timeout_ns);
/* Windows and transports go. */
void nep_generation_tear_down(struct nep_comm *comm);

#endif
