/* SPDX-License-Identifier: Apache-2.0 */
/* Memory that the node maps, given out in pages: first fit over a sorted list of what is taken. */
#ifndef NEP_DISPATCH_POOL_H
#define NEP_DISPATCH_POOL_H

#include <stdbool.h>

#include "base/status.h"

struct nep_pool_block {
    uint64_t offset;
    uint64_t bytes;
};

struct nep_pool {
    uint8_t *base;
    uint64_t bytes;
    struct nep_pool_block *blocks; /* ascending by offset */
    uint32_t num_blocks;
    uint32_t cap_blocks;

    bool is_said;
};

void nep_pool_init(struct nep_pool *pool, void *base, uint64_t bytes);
void nep_pool_fini(struct nep_pool *pool);
/* NULL in *buffer_p when the pool is full: the caller falls back. Nothing is zeroed: the pool may
 * be device memory. */
enum nep_status nep_pool_take(struct nep_pool *pool, uint64_t bytes, void **buffer_p);
/* False when it is not from this pool. */
bool nep_pool_give(struct nep_pool *pool, void *buffer);
/* Whether [buffer, buffer + bytes) lies inside one block of the pool. */
bool nep_pool_holds(const struct nep_pool *pool, const void *buffer, uint64_t bytes);

#endif
