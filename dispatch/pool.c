/* SPDX-License-Identifier: Apache-2.0 */
/* A handful of large buffers that live as long as the ep: a sorted array is all it takes. */
#include "dispatch/pool.h"

#include <stdlib.h>
#include <string.h>

enum { PAGE = 4096 };

void nep_pool_init(struct nep_pool *pool, void *base, uint64_t bytes)
{
    memset(pool, 0, sizeof *pool);
    pool->base = base;
    pool->bytes = bytes;
}

void nep_pool_fini(struct nep_pool *pool)
{
    free(pool->blocks);
    memset(pool, 0, sizeof *pool);
}

static enum nep_status insert(struct nep_pool *pool, uint32_t at, uint64_t offset, uint64_t bytes)
{
    if (pool->num_blocks == pool->cap_blocks) {
        uint32_t cap = pool->cap_blocks != 0 ? 2 * pool->cap_blocks : 16;
        void *blocks = realloc(pool->blocks, cap * sizeof *pool->blocks);
        if (blocks == NULL) {
            return nep_fail(NEP_ERR_NO_MEMORY, "no memory for the list of %u buffers", cap);
        }
        pool->blocks = blocks;
        pool->cap_blocks = cap;
    }
    memmove(pool->blocks + at + 1, pool->blocks + at,
            (pool->num_blocks - at) * sizeof *pool->blocks);
    pool->blocks[at] = (struct nep_pool_block){offset, bytes};
    pool->num_blocks++;
    return NEP_OK;
}

enum nep_status nep_pool_take(struct nep_pool *pool, uint64_t bytes, void **buffer_p)
{
    *buffer_p = NULL;
    if (bytes > pool->bytes) {
        return NEP_OK;
    }
    bytes = bytes == 0 ? PAGE : (bytes + PAGE - 1) / PAGE * PAGE;
    uint64_t free_from = 0;
    for (uint32_t i = 0; i <= pool->num_blocks; i++) {
        uint64_t free_to = i < pool->num_blocks ? pool->blocks[i].offset : pool->bytes;
        if (free_to - free_from >= bytes) {
            enum nep_status status = insert(pool, i, free_from, bytes);
            if (status == NEP_OK) {
                *buffer_p = pool->base + free_from;
            }
            return status;
        }
        free_from = i < pool->num_blocks ? free_to + pool->blocks[i].bytes : free_from;
    }
    return NEP_OK;
}

bool nep_pool_give(struct nep_pool *pool, void *buffer)
{
    for (uint32_t i = 0; i < pool->num_blocks; i++) {
        if (pool->base + pool->blocks[i].offset == buffer) {
            pool->num_blocks--;
            memmove(pool->blocks + i, pool->blocks + i + 1,
                    (pool->num_blocks - i) * sizeof *pool->blocks);
            return true;
        }
    }
    return false;
}

bool nep_pool_holds(const struct nep_pool *pool, const void *buffer, uint64_t bytes)
{
    const uint8_t *from = buffer;
    if (from < pool->base || from >= pool->base + pool->bytes) {
        return false;
    }
    uint64_t offset = (uint64_t)(from - pool->base);
    for (uint32_t i = 0; i < pool->num_blocks; i++) {
        const struct nep_pool_block *block = &pool->blocks[i];
        if (offset >= block->offset && offset < block->offset + block->bytes) {
            return bytes <= block->offset + block->bytes - offset;
        }
    }
    return false;
}
