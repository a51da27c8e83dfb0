/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Records where an ep's tokens go: of some requests, all tokens of fresh dispatches, until the
 * memory that was set aside is full. What comes out is a trace for the placement solver.
 */
#ifndef NEP_DISPATCH_RECORDER_H
#define NEP_DISPATCH_RECORDER_H

#include "dispatch/shape.h"

struct nep_recorder;

enum nep_status nep_recorder_create(const struct nep_recorder_params *params,
                                    const struct nep_shape *shape,
                                    struct nep_recorder **recorder_p);
void nep_recorder_destroy(struct nep_recorder *recorder);
/* One call's tokens; ids have been checked. Cheap where no token is of a recorded request. */
void nep_recorder_take(struct nep_recorder *recorder, const struct nep_tokens *in);
enum nep_status nep_recorder_save(const struct nep_recorder *recorder, const char *path,
                                  uint64_t *num_tokens_p);

#endif
