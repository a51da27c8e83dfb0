/* SPDX-License-Identifier: Apache-2.0 */
/* The next generation of a group that grows, prepared by a thread while this one computes. */
#ifndef NEP_DISPATCH_GROW_H
#define NEP_DISPATCH_GROW_H

#include "dispatch/comm.h"

struct nep_grown;

/* What this rank may change over to at once: 0, or its number. Waits a moment for what is nearly
 * done. Not where something of it does not fit any more, or an operation is under way. */
uint64_t nep_grow_offer(struct nep_comm *comm);
/* Who is in it. */
const struct nep_group_decision *nep_grow_decision(const struct nep_comm *comm);
/* What a newcomer is told while it asks for its seat; ctx: its communicator. */
extern const struct nep_group_preparer nep_grow_preparer;
/* Operations go on from these numbers in what is prepared. Before anybody may use it. */
void nep_grow_set_ops(struct nep_comm *comm, const struct nep_group_ops *ops);
/* Changes over; nobody is in an operation. What was before is closed by a thread. */
enum nep_status nep_grow_take(struct nep_comm *comm, const struct nep_group_decision *decision);
/* It is not to be used; a thread that still works on it ends by itself. */
void nep_grow_drop(struct nep_comm *comm);
/* Waits for all threads. */
void nep_grow_end(struct nep_comm *comm);

#endif
