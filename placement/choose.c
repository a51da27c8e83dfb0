/* SPDX-License-Identifier: Apache-2.0 */
/* The host's copy of the choice; the text and its reasons are in choose_impl.h. */
#include "placement/choose.h"

#include "placement/choose_impl.h"

void nep_choose(const struct nep_copies *copies, uint32_t source, uint32_t token,
                const int32_t *ids, uint32_t k, uint32_t *slots)
{
    nep_choose_one(copies, source, token, ids, k, slots);
}
