/* SPDX-License-Identifier: Apache-2.0 */
/* The order of an ep's operations, for the calls in ops.c and combine's in ops_combine.c. */
#ifndef NEP_DISPATCH_OP_H
#define NEP_DISPATCH_OP_H

#include "dispatch/ep.h"

/* ep, handle and stream of a call. */
enum nep_status nep_op_check(struct nep_ep *ep, struct nep_handle *handle, const void *stream);
/* handle NULL: of a layout alone. */
enum nep_status nep_op_check_tokens(const struct nep_ep *ep, const struct nep_handle *handle,
                                    const struct nep_tokens *in);
/* Whether the handle may begin an operation, and complete one of this kind. */
enum nep_status nep_op_check_begin(const struct nep_ep *ep, const struct nep_handle *handle);
enum nep_status nep_op_check_end(const struct nep_ep *ep, const struct nep_handle *handle,
                                 enum nep_handle_state state);
/* Takes the next number; gives it back as completed. */
void nep_op_begin(struct nep_ep *ep, struct nep_handle *handle, enum nep_op_kind kind);
void nep_op_end(struct nep_ep *ep, struct nep_handle *handle);
/* status of launches in the middle of an operation: a failure is the end of the ep. */
enum nep_status nep_op_settle(struct nep_ep *ep, enum nep_status status);

#endif
