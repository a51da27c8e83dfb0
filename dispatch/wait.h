/* SPDX-License-Identifier: Apache-2.0 */
/* The one way an operation waits: bounded, and with a culprit when it is over. */
#ifndef NEP_DISPATCH_WAIT_H
#define NEP_DISPATCH_WAIT_H

#include "dispatch/ep.h"

/* Moves what can move; *progress_p when anything did, *done_p when there is nothing left. */
typedef enum nep_status (*nep_step_fn)(struct nep_ep *ep, struct nep_handle *handle,
                                       bool *progress_p, bool *done_p);

/*
 * Runs step until it is done. On expiry, or when a peer is gone, breaks the communicator with a
 * fault that names who is missing with what, and tells the other ranks.
 */
enum nep_status nep_wait(struct nep_ep *ep, struct nep_handle *handle, nep_step_fn step);
/* The same as a call of the trace. */
enum nep_status nep_wait_in(struct nep_ep *ep, struct nep_handle *handle, nep_step_fn step,
                            enum nep_event_call call);
/* The end of this ep: tells the other ranks whom this one blames, keeps the fault, returns its
 * status. */
enum nep_status nep_break(struct nep_ep *ep, const struct nep_fault *fault);
/* Says to everyone that can hear it whom this rank blames. */
void nep_tell(struct nep_ep *ep, uint32_t culprit);
/* A put to `dst` failed with the status and message given: breaks with the culprit, which may be
 * another. */
enum nep_status nep_blame_put(struct nep_ep *ep, uint32_t dst, enum nep_status status);
/* Runs step as long as it moves anything: the send halves. */
enum nep_status nep_try(struct nep_ep *ep, struct nep_handle *handle, nep_step_fn step);

#endif
