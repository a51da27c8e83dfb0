/* SPDX-License-Identifier: Apache-2.0 */
/* The way back: rows of expert outputs to one sum per token. */
#ifndef NEP_DISPATCH_COMBINE_H
#define NEP_DISPATCH_COMBINE_H

#include "dispatch/ep.h"

/* Publishes where this rank's expert outputs lie. */
void nep_combine_bind(struct nep_ep *ep, struct nep_handle *handle);
/*
 * One step: stages, sums for other nodes, sends, sums own tokens as far as all parts are here.
 * Never waits. Before op.is_receiving (the send half) own tokens are left alone.
 */
enum nep_status nep_combine_step(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p,
                                 bool *done_p);

/* ---- rows of this node: dispatch/stage.c ---- */

/* Fills ep->lent for all local ranks; false while one has not published (said in missing). */
bool nep_stage_find_lent(struct nep_ep *ep, const struct nep_handle *handle);
/* Copies or sums this rank's rows into staging for the ranks that cannot read them in place. */
void nep_stage_fill(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p);
/*
 * Adds the terms of row `row` of consumer `idx` (source `source`), ranks ascending, and counts its
 * staged rows as taken. False, and nothing added, while a staged row is missing (said in missing).
 */
bool nep_stage_terms(struct nep_ep *ep, const struct nep_handle *handle, uint32_t idx,
                     uint32_t source, uint32_t row, struct nep_terms *terms);
/* The rows counted as taken have been summed: their holders may stage over them. */
void nep_stage_release(struct nep_ep *ep, uint32_t idx);

#endif
