/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A handle: the routing of one dispatch and where its rows went, in positions, never in slots, so
 * that any number of handles may be alive. Consumers (who sums): the home stream of this rank's own
 * tokens and one per lane source. Producer tables (what this rank holds of each source's tokens)
 * are used where expert outputs lie in private memory and must be staged.
 */
#ifndef NEP_DISPATCH_HANDLE_H
#define NEP_DISPATCH_HANDLE_H

#include "dispatch/protocol.h"

/* One addend of a token's sum on this node: row `pos` of local rank `local`'s output. */
struct nep_addend {
    uint32_t pos;
    uint16_t local;
    uint8_t is_last; /* the last of its rank */
    uint8_t k;
    float weight;
};

/* Rows of one stream in order, each with its addends: addends[begin[i] .. begin[i + 1]). */
struct nep_consumer {
    uint32_t num_rows;
    uint32_t *begin;            /* [M + 1] */
    struct nep_addend *addends; /* [M * K] */
};

/* What this rank holds of one source: rows in token order, each a (position, weight) list. */
struct nep_producer {
    uint32_t num_rows;
    uint32_t *begin; /* [M + 1]; NULL in the rank layout, where row i is first + i */
    uint32_t *pos;   /* [M * K] */
    float *weight;
    uint32_t first; /* rank layout */
};

enum nep_handle_state {
    NEP_HANDLE_EMPTY, /* no routing */
    NEP_HANDLE_DISPATCHING,
    NEP_HANDLE_READY, /* dispatched: combine or dispatch again */
    NEP_HANDLE_COMBINING,
};

/* No tokens and no ids: nobody can tell whether it was routed anew. */
#define NEP_ROUTED_ANY UINT32_MAX

enum nep_op_kind { NEP_OP_DISPATCH = NEP_KIND_DISPATCH, NEP_OP_COMBINE = NEP_KIND_COMBINE };

/* The operation that a handle is in. */
struct nep_op {
    uint64_t number;
    enum nep_op_kind kind;
    bool is_counted;      /* COUNTS of all ranks are in; dispatch: positions are known */
    bool is_bound;        /* the caller's buffer is published to the node */
    bool is_sent;         /* all tiles to other nodes are posted, all rows staged */
    bool is_receiving;    /* the complete half runs: out or sum is valid */
    bool is_pushed;       /* dispatch: own rows are with all ranks of the node */
    bool out_is_mapped;   /* dispatch: the node pushes into this rank's output */
    bool is_read_done;    /* combine: this rank has read all that others lend, and said so */
    uint32_t home_row;    /* dispatch: rows of the own node published; combine: tokens summed */
    struct nep_tokens in; /* dispatch */
    struct nep_rows out;  /* dispatch, from recv on */
    struct nep_expert_rows rows; /* combine */
    struct nep_tokens_out sum;   /* combine, from recv on */
};

struct nep_device_handle;

static inline enum nep_combine_weights nep_op_weights(const struct nep_op *op)
{
    return op->rows.topk_weights != NULL    ? NEP_WEIGHTS_BACK
           : op->rows.token_weights != NULL ? NEP_WEIGHTS_GIVEN
                                            : NEP_WEIGHTS_HELD;
}

struct nep_handle {
    struct nep_ep *ep;
    struct nep_device_handle *device; /* NULL: tokens are in host memory */
    struct nep_handle *next;          /* of the ep's */
    uint32_t id;
    enum nep_handle_state state;
    struct nep_op op;
    uint32_t layer;
    uint64_t map_digest;
    uint32_t map_version;
    /* The operation that routed it, the same on all ranks: by this they know that they mean the
     * same handle, whatever the order in which handles were made. */
    uint32_t routed;
    bool has_routing;
    /* source side */
    uint32_t num_tokens;
    uint32_t *slots;       /* [M][K] physical slot or NEP_SLOT_NONE */
    float *weights;        /* [M][K] */
    uint32_t *node_begin;  /* [N + 1] */
    uint32_t *node_tokens; /* tokens that go to each node, ascending */
    /* receiver side */
    uint32_t *cursor; /* [R][node slots, or G in the rank layout]: next position per source */
    uint64_t num_rows;
    uint64_t num_real_rows;
    uint32_t *rows_per_slot;   /* [L] */
    uint64_t *first_row;       /* [L] */
    uint32_t *rows_per_source; /* [R] */
    /* progress of the current operation; dispatch: by source rank, combine: by node */
    uint32_t *rows_expected;        /* [R] */
    uint32_t *rows_read;            /* [R] */
    uint32_t *rows_sent;            /* [R] dispatch: to each node, combine: to each lane source */
    uint32_t *rows_staged;          /* [R] combine: rows of each source staged for its consumer */
    struct nep_consumer *consumers; /* [1 + lanes] */
    struct nep_producer *producers; /* [R] */
    void *memory;                   /* all tables */
    uint64_t memory_bytes;
};

/* A handle of an ep that is being created: not in its list, no number. */
enum nep_status nep_handle_create_for(struct nep_ep *ep, struct nep_handle **handle_p);
/* Bytes of one handle, from the plan alone. */
uint64_t nep_handle_bytes(const struct nep_plan *plan, uint32_t rank);

#endif
