/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the rendezvous decides, without sockets and without a clock: who may join, what a gather
 * waits for, whom to name. The server feeds it decoded messages; it answers through reply. One
 * thread.
 *
 * Groups. The k-th communicator that a rank makes belongs with the k-th of the other ranks: a
 * connection of rank r joins the first group in which rank r has not been. So several communicators
 * of a job, and job after job, can use one server. A newcomer joins the first group that lost its
 * rank, or which that has left. A group and its store go when its last member goes.
 */
#ifndef NEP_TRANSPORT_RENDEZVOUS_HUB_H
#define NEP_TRANSPORT_RENDEZVOUS_HUB_H

#include "transport/rendezvous_wire.h"

struct nep_rdv_hub;
struct nep_rdv_member;

/* Called for each answer; its pointers are valid during the call. */
typedef void (*nep_rdv_reply_fn)(void *conn, const struct nep_rdv_message *reply);

enum nep_status nep_rdv_hub_create(uint32_t num_ranks, nep_rdv_reply_fn reply,
                                   struct nep_rdv_hub **hub_p);
/* All members must have gone. */
void nep_rdv_hub_destroy(struct nep_rdv_hub *hub);

/*
 * The first message of a connection. Replies in either case; on failure the connection is to be
 * closed after the reply.
 */
enum nep_status nep_rdv_hub_join(struct nep_rdv_hub *hub, const struct nep_rdv_message *join,
                                 void *conn, uint64_t now_ns, struct nep_rdv_member **member_p);
/* Every later one. A failure means that the member broke the protocol: close it. */
enum nep_status nep_rdv_hub_request(struct nep_rdv_member *member,
                                    const struct nep_rdv_message *request, uint64_t now_ns);
/* The connection is gone. Without a LEAVE before, the rank counts as lost. Frees the member. */
void nep_rdv_hub_remove(struct nep_rdv_member *member, uint64_t now_ns);
/* A connection was refused before it could join: the next timeout mentions it. */
void nep_rdv_hub_note(struct nep_rdv_hub *hub, uint64_t now_ns, const char *sentence);
/* Answers what has passed its deadline; returns the next deadline, UINT64_MAX when there is none.
 */
uint64_t nep_rdv_hub_expire(struct nep_rdv_hub *hub, uint64_t now_ns);

#endif
