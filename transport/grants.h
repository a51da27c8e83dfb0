/* SPDX-License-Identifier: Apache-2.0 */
/* Who may write where in one window of this rank: what nep_transport_ops.window_grant was told. */
#ifndef NEP_TRANSPORT_GRANTS_H
#define NEP_TRANSPORT_GRANTS_H

#include "transport/transport.h"

struct nep_grants {
    uint32_t num_ranks;
    uint32_t *num; /* [num_ranks]; NULL: nothing was said, all may write everywhere */
    struct nep_grant (*of)[NEP_MAX_GRANTS]; /* [num_ranks] */
};

/* Copies them; what was there is freed. NEP_ERR_INVALID names the grant that makes no sense. */
enum nep_status nep_grants_set(struct nep_grants *grants, uint32_t num_ranks,
                               const struct nep_grant *list, uint32_t num);
void nep_grants_free(struct nep_grants *grants);
/* Whether all of them lie in a window of so many bytes; else as nep_grants_set. */
enum nep_status nep_grants_check(const struct nep_grants *grants, size_t window_bytes);

/* Whether `rank` may write there. Nothing at all (len 0) may be written anywhere. */
static inline bool nep_grants_allow(const struct nep_grants *grants, uint32_t rank, uint64_t offset,
                                    uint64_t len)
{
    if (grants->num == NULL || len == 0) {
        return true;
    }
    for (uint32_t i = 0; i < grants->num[rank]; i++) {
        const struct nep_grant *grant = &grants->of[rank][i];
        if (offset >= grant->offset && offset - grant->offset < grant->bytes &&
            len <= grant->bytes - (offset - grant->offset)) {
            return true;
        }
    }
    return false;
}

#endif
