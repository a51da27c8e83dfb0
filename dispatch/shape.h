/* SPDX-License-Identifier: Apache-2.0 */
/* One MoE shape, checked: the caller's nep_ep_params with every default filled in, and what
 * follows. */
#ifndef NEP_DISPATCH_SHAPE_H
#define NEP_DISPATCH_SHAPE_H

#include <stdbool.h>

#include "base/config.h"
#include "dispatch/host/wire.h"
#include "nearep.h"

enum {
    NEP_MAX_TOP_K = 32,
    NEP_MAX_OUTSTANDING = 8,
    NEP_TILE_ROWS = 64,   /* most tokens of a tile */
    NEP_TILE_SLOTS = 64,  /* most slots of a stream: numbers of tiles travel as 8 bits */
    NEP_CREDIT_SPAN = 64, /* what CREDITs of a stream in flight at once may differ by */
    NEP_RIDE_ROWS = 8,    /* so few rows for a node travel inside COUNTS */
    NEP_MAX_TOKENS = 1 << 20,
    NEP_MAX_NODE_SLOTS = 65535 /* a slot of a node is a 16-bit number, all ones = elsewhere */
};

struct nep_shape {
    uint32_t num_experts;
    uint32_t slots_per_rank;
    uint32_t top_k;
    uint32_t hidden;
    uint32_t max_tokens;
    uint32_t alignment;
    uint32_t outstanding;
    uint32_t window;     /* W = 2 S: slots of COUNTS and of what an operation binds */
    uint32_t tile_slots; /* V: slots of each stream of tiles */
    uint32_t num_layers;
    enum nep_dtype dtype;
    enum nep_dtype wire;
    enum nep_layout layout;
    uint64_t pool_bytes;
    uint32_t row_bytes;      /* a row of dtype */
    struct nep_wire format;  /* what a dispatched row is */
    uint32_t wire_row_bytes; /* format.row_bytes: a dispatched row in a tile, scales included */
    uint32_t weights_bytes;  /* of the K weights that may come back with a row */
    uint32_t meta_bytes;     /* what accompanies it: token, K slots, K weights */
    uint32_t tile_rows;      /* min(M, NEP_TILE_ROWS) */
    uint32_t ride_rows;      /* min(M, NEP_RIDE_ROWS) */
};

/* Checks params against the group; every refusal says which field, its value and the limit. */
enum nep_status nep_shape_init(struct nep_shape *shape, const struct nep_ep_params *params,
                               const struct nep_topology *topology,
                               const struct nep_config *config);

/* Whether two shapes of one group are the same in all that the caller chooses. */
bool nep_shape_is_same(const struct nep_shape *a, const struct nep_shape *b);

/* Whether slots have places of their own, with room for M rows of every source. */
static inline bool nep_layout_is_fixed(enum nep_layout layout)
{
    return layout == NEP_LAYOUT_EXPERT_PADDED || layout == NEP_LAYOUT_EXPERT_FRONT;
}

/* Bytes of one element. */
uint32_t nep_dtype_bytes(enum nep_dtype dtype);
const char *nep_dtype_name(enum nep_dtype dtype);

/* What a row of a tile carries besides its payload, as it travels. The slots are numbered on the
 * node. */
struct nep_meta {
    uint32_t token;
    /* uint16_t slot[K]; NEP_META_NONE = not on this node. Then, 4-byte aligned, float weight[K]. */
};
#define NEP_META_NONE 0xffffu

static inline uint16_t *nep_meta_slots(void *meta)
{
    return (uint16_t *)((uint8_t *)meta + sizeof(struct nep_meta));
}

static inline float *nep_meta_weights(void *meta, uint32_t top_k)
{
    return (float *)((uint8_t *)meta + sizeof(struct nep_meta) + (top_k + 1) / 2 * 4);
}

#endif
