/* SPDX-License-Identifier: Apache-2.0 */
#include "transport/grants.h"

#include <stdlib.h>
#include <string.h>

void nep_grants_free(struct nep_grants *grants)
{
    free(grants->num);
    free(grants->of);
    memset(grants, 0, sizeof *grants);
}

enum nep_status nep_grants_set(struct nep_grants *grants, uint32_t num_ranks,
                               const struct nep_grant *list, uint32_t num)
{
    struct nep_grants made = {.num_ranks = num_ranks,
                              .num = calloc(num_ranks, sizeof *made.num),
                              .of = calloc(num_ranks, sizeof *made.of)};
    if (made.num == NULL || made.of == NULL) {
        nep_grants_free(&made);
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for what %u ranks may write", num_ranks);
    }
    for (uint32_t i = 0; i < num; i++) {
        const struct nep_grant *grant = &list[i];
        if (grant->rank >= num_ranks || made.num[grant->rank] == NEP_MAX_GRANTS ||
            grant->bytes == 0 || grant->bytes > UINT64_MAX - grant->offset) {
            nep_grants_free(&made);
            return nep_fail(NEP_ERR_INVALID,
                            "grant %u of a window: %llu bytes at %llu for rank %u of %u, at most "
                            "%d for each",
                            i, (unsigned long long)grant->bytes, (unsigned long long)grant->offset,
                            grant->rank, num_ranks, NEP_MAX_GRANTS);
        }
        made.of[grant->rank][made.num[grant->rank]++] = *grant;
    }
    nep_grants_free(grants);
    *grants = made;
    return NEP_OK;
}

enum nep_status nep_grants_check(const struct nep_grants *grants, size_t window_bytes)
{
    for (uint32_t r = 0; grants->num != NULL && r < grants->num_ranks; r++) {
        for (uint32_t i = 0; i < grants->num[r]; i++) {
            const struct nep_grant *grant = &grants->of[r][i];
            unsigned long long end = grant->offset + grant->bytes;
            if (end > window_bytes) {
                return nep_fail(NEP_ERR_INVALID,
                                "what rank %u may write ends at %llu, the window at %zu", r, end,
                                window_bytes);
            }
        }
    }
    return NEP_OK;
}
