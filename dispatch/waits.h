/* SPDX-License-Identifier: Apache-2.0 */
/* What this rank waited for, by phase and rank: who is slow. Kept by an ep, by seats, for its whole
 * life. */
#ifndef NEP_DISPATCH_WAITS_H
#define NEP_DISPATCH_WAITS_H

#include "base/status.h"

struct nep_ep;

struct nep_waits;

enum nep_status nep_waits_create(uint32_t num_ranks, struct nep_waits **waits_p);
void nep_waits_destroy(struct nep_waits *waits);
/* A wait of ns for `phase` (static text) of seat `rank` is over. */
void nep_waits_add(struct nep_waits *waits, const char *phase, uint32_t rank, uint64_t ns);

#endif
