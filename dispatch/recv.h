/* SPDX-License-Identifier: Apache-2.0 */
/* The receiving side of a dispatch: own node's rows pushed or lent, other nodes' rows pulled. */
#ifndef NEP_DISPATCH_RECV_H
#define NEP_DISPATCH_RECV_H

#include "dispatch/ep.h"

/*
 * One step of completing a dispatch: moves whatever can move, never waits. *done_p when nothing is
 * left to do for this operation; *progress_p when anything moved. What is missing is in
 * ep->missing.
 */
enum nep_status nep_recv_step(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p,
                              bool *done_p);
/* Publishes where this rank's rows are to go. */
void nep_recv_bind(struct nep_ep *ep, struct nep_handle *handle);

/* ---- own node: dispatch/home.c ---- */

/* Publishes this rank's tiles for its node and pushes rows into outputs that are mapped. */
enum nep_status nep_home_step(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p);
/* Reads the tiles of another rank of this node. */
enum nep_status nep_home_read(struct nep_ep *ep, struct nep_handle *handle, uint32_t source,
                              bool *progress_p);

#endif
