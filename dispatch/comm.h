/* SPDX-License-Identifier: Apache-2.0 */
/* This rank's seat in a group: who is where, two transports, the first fault. */
#ifndef NEP_DISPATCH_COMM_H
#define NEP_DISPATCH_COMM_H

#include <pthread.h>
#include <sys/types.h>

#include "base/config.h"
#include "base/ticks.h"
#include "dispatch/generation.h"
#include "nearep.h"
#include "transport/clocks.h"
#include "transport/transport.h"

struct nep_topology_store;
struct nep_rendezvous_client;
struct nep_workers;
struct nep_ep;
struct nep_event_ring;
struct nep_grown;

/*
 * Seats have numbers that stay: `world`, what callers see. Members are those who live, numbered
 * without gaps: `topology`, what transports and eps work with. As long as nobody is lost they are
 * the same. What is said to people and programs uses seats: nep_comm_name.
 */
struct nep_comm {
    struct nep_config config;
    struct nep_bootstrap seats_bootstrap; /* as given: its store outlives a rank */
    struct nep_bootstrap bootstrap;       /* among members */
    struct nep_generation *made; /* who they are, where transports and plans look; the same as: */
    struct nep_rendezvous_client *client; /* NULL for a caller's bootstrap */
    struct nep_topology world;
    struct nep_topology topology;
    struct nep_topology_store *world_store;
    struct nep_topology_store *store;      /* of topology; may be world_store */
    uint32_t *members;                     /* [members] the seat of each */
    uint64_t generation;                   /* which decision made it */
    uint8_t *is_live;                      /* [seats] */
    uint64_t num_decided;                  /* decisions about who lives */
    uint64_t num_prepared;                 /* preparations for the next one, ever begun */
    struct nep_grown *grown;               /* being prepared, or prepared; NULL: nothing */
    struct nep_grown *leaving;             /* what threads still close */
    const struct nep_config *shown_config; /* that transports look at: it outlives them */
    bool is_joining;                       /* a newcomer that has not been let in */
    bool has_worked; /* in some generation; one that never has does not say what is to be redone */
    struct nep_ep *eps;          /* all that are alive, under lock */
    struct nep_transport *intra; /* maps the ranks of this node */
    struct nep_transport *inter; /* the fabric; NULL with one node, may be intra itself */
    struct nep_workers *workers; /* shared by its ep objects; NULL: callers alone */
    uint64_t timeout_ns;
    uint32_t spin_limit;
    pid_t pid;            /* a forked child has another one */
    uint64_t eps_used;    /* bit i: ep number i is alive */
    pthread_mutex_t lock; /* of fault, eps_used and eps */
    struct nep_fault fault;
    struct nep_event_ring *events; /* what this rank did last */
    struct nep_tick_pair started;
    struct nep_clock clock; /* against the first member's */
};

/* Refuses NULL, a forked child and a communicator that broke. */
enum nep_status nep_comm_check(struct nep_comm *comm);
/* Keeps the first fault and says it; its rank is a member, whose seat and node are filled in.
 * Returns fault->status, with the message set. */
enum nep_status nep_comm_fail(struct nep_comm *comm, const struct nep_fault *fault);
/* Whether there is a fault; one that a kernel left behind is said, and its trace written. Any
 * thread. */
bool nep_comm_look(struct nep_comm *comm);
/* Collective: the lowest ep number that is free on every rank, claimed. */
enum nep_status nep_comm_claim_ep(struct nep_comm *comm, uint32_t *number_p);
void nep_comm_release_ep(struct nep_comm *comm, uint32_t number);
/* Writes the trace to a path (see nep_comm_dump_events). Any thread. */
enum nep_status nep_events_dump(struct nep_comm *comm, const char *path);
/* The same where NEP_TRACE says, if it does; a failure is a warning. */
void nep_events_dump_configured(struct nep_comm *comm);
/* Collective over members: the transports of comm->topology, over comm->bootstrap. */
enum nep_status nep_comm_open_transports(struct nep_comm *comm);
void nep_comm_close_transports(struct nep_comm *comm);
/* How long waits spin, from who shares the cores. */
void nep_comm_set_spin(struct nep_comm *comm);
/* The ep of that number; NULL: there is none. */
struct nep_ep *nep_comm_ep_of(const struct nep_comm *comm, uint32_t number);
/* Refuses where the group of this communicator cannot change. */
enum nep_status nep_comm_may_recover(const struct nep_comm *comm);

/* The seat of a member; UINT32_MAX stays what it is. */
static inline uint32_t nep_comm_name(const struct nep_comm *comm, uint32_t member)
{
    return member < comm->topology.num_ranks ? comm->members[member] : member;
}

static inline uint32_t nep_comm_node_name(const struct nep_comm *comm, uint32_t member)
{
    return member < comm->topology.num_ranks ? comm->world.node_of_rank[comm->members[member]]
                                             : UINT32_MAX;
}

#endif
