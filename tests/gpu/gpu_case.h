/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One shape on the GPU: inputs from a key, the calls of the library, and every element of what they
 * leave against the oracle (tests/ref) and the host's kernels (bits). Used by the tests and by the
 * figures.
 */
#ifndef NEP_TESTS_GPU_CASE_H
#define NEP_TESTS_GPU_CASE_H

#include "dispatch/host/wire.h"
#include "placement/choose.h"
#include "tests/gpu/gpu_world.h"
#include "tests/ref/ref.h"

enum { GPU_MAX_RANKS = 16 };

/* How a dispatch is called. */
enum gpu_calls {
    GPU_CALLS_WHOLE,  /* nep_dispatch, nep_combine */
    GPU_CALLS_HALVES, /* outputs given to the complete half */
    GPU_CALLS_BOUND,  /* outputs bound before the send half */
    GPU_CALLS_COUNTS, /* the host waits for counts between the halves */
    GPU_NUM_CALLS
};

struct gpu_shape {
    uint64_t key; /* of all inputs */
    uint32_t num_ranks;
    uint32_t num_nodes; /* 0: one */
    uint32_t slots_per_rank;
    uint32_t num_experts; /* fewer than slots: some have several copies */
    uint32_t top_k;
    uint32_t hidden;
    uint32_t max_tokens;
    uint32_t alignment;
    uint32_t num_sms;
    enum nep_layout layout;
    enum nep_dtype dtype;
    enum nep_dtype wire; /* dtype, or fp8 */
    enum nep_scale scale;
    bool is_cast_before; /* the caller brings fp8 rows and scales */
    bool is_full;        /* every rank has max_tokens, every id is used, no two of a token alike */
    bool is_wild;        /* expert outputs of all magnitudes, infinities and NaN among them */
    bool has_weights;
    bool is_int64;
    bool is_graph;     /* phases run from a captured graph */
    bool is_x_private; /* inputs, outputs, expert outputs in memory that peers do not map */
    bool is_out_private;
    bool is_y_private;
    bool has_bias;
    bool has_weights_back; /* rank layout: top-k weights come back with combine */
    bool has_columns;      /* of scales, in outputs */
    bool has_weights_late; /* expert layouts: given to combine, not to dispatch */
    enum gpu_calls calls;
    bool is_overlapped; /* two operations outstanding, with a handle and outputs each */
};

static inline uint32_t gpu_num_nodes(const struct gpu_shape *shape)
{
    return shape->num_nodes != 0 ? shape->num_nodes : 1;
}

static inline bool gpu_is_fixed(enum nep_layout layout)
{
    return layout == NEP_LAYOUT_EXPERT_PADDED || layout == NEP_LAYOUT_EXPERT_FRONT;
}

struct gpu_shape gpu_shape_random(uint64_t key, uint32_t num_ranks);
void gpu_shape_print(const struct gpu_shape *shape);
/* Of the memory that a rank needs for it. */
uint64_t gpu_shape_bytes(const struct gpu_shape *shape);

struct gpu_case {
    struct gpu_shape shape;
    struct gpu_world *world;
    struct nep_map *map;
    struct nep_ep *ep;
    struct nep_handle *handle;
    struct nep_wire wire;
    /* of all ranks, on the host */
    uint32_t num_tokens[GPU_MAX_RANKS];
    int32_t *ids[GPU_MAX_RANKS];
    uint32_t *slots[GPU_MAX_RANKS];
    float *weights[GPU_MAX_RANKS];
    struct nep_copies copies;
    uint32_t node_of_rank[GPU_MAX_RANKS];
    struct nep_ref_group ref;
    struct nep_ref_rows want[GPU_MAX_RANKS];
    /* device */
    uint64_t capacity;
    void *ids_device;
    float *weights_device;
    struct nep_tokens in;
    struct nep_rows out;
    struct nep_expert_rows expert;
    struct nep_tokens_out result;
    float *back_weights; /* [rows][K] what combine adds up */
    /* a second operation beside the first */
    struct nep_handle *handle2;
    struct nep_rows out2;
    struct nep_tokens_out result2;
    void *graphs[2]; /* of dispatch and combine: captured once, replayed each round */
    uint32_t graph_tokens;
    void *memory[64];
    uint32_t num_memory;
};

/* Ends the process where set-up fails. */
struct gpu_case *gpu_case_create(struct gpu_world *world, const struct gpu_shape *shape);
void gpu_case_destroy(struct gpu_case *c);
/* New tokens, ids and weights, from the shape's key and `round`; outputs are poisoned. */
void gpu_case_draw(struct gpu_case *c, uint64_t round);
/* Expert outputs at the rows that the oracle expects. */
void gpu_case_fill_y(struct gpu_case *c, uint64_t round);
void gpu_case_dispatch(struct gpu_case *c);
void gpu_case_combine(struct gpu_case *c);
/* The second operation's things in the place of the first's, and back. */
void gpu_case_swap(struct gpu_case *c);
/* Wrong elements; the first difference is printed. */
uint64_t gpu_case_check_dispatch(struct gpu_case *c);
uint64_t gpu_case_check_combine(struct gpu_case *c, uint64_t round);
/* Route and layout alone, against the slots that the oracle works with. */
uint64_t gpu_case_check_layout(struct gpu_case *c);
/* Dispatch and combine of one round, all checked. */
uint64_t gpu_case_round(struct gpu_case *c, uint64_t round);
/* What the caller's row is made of. */
void gpu_case_x_row(void *ctx, uint32_t rank, uint32_t token, void *row);
void gpu_case_bias_row(const struct gpu_case *c, uint32_t which, uint32_t token, void *row);

#endif
