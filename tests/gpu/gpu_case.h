/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One shape on the GPU: inputs from a key, the phases, and every element of what they leave against
 * the oracle (tests/ref) and the host's kernels (bits). Used by the tests and by the figures.
 */
#ifndef NEP_TESTS_GPU_CASE_H
#define NEP_TESTS_GPU_CASE_H

#include "dispatch/cuda/cuda_phases.h"
#include "tests/gpu/gpu_world.h"
#include "tests/ref/ref.h"

struct gpu_shape {
    uint64_t key; /* of all inputs */
    uint32_t num_ranks;
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
    bool is_graph; /* phases run from a captured graph */
};

struct gpu_shape gpu_shape_random(uint64_t key, uint32_t num_ranks);
void gpu_shape_print(const struct gpu_shape *shape);
/* Of a window that holds this shape. */
uint64_t gpu_shape_window_bytes(const struct gpu_shape *shape);

struct gpu_case {
    struct gpu_shape shape;
    struct gpu_world *world;
    /* of all ranks, on the host */
    uint32_t num_tokens[NEP_CUDA_MAX_RANKS];
    int32_t *ids[NEP_CUDA_MAX_RANKS];
    uint32_t *slots[NEP_CUDA_MAX_RANKS];
    float *weights[NEP_CUDA_MAX_RANKS];
    uint32_t *copy_begin;
    uint32_t *copy_slot;
    uint32_t *copy_node;
    uint16_t *copy_weight;
    uint32_t *node_of_rank;
    struct nep_ref_group ref;
    struct nep_ref_rows want[NEP_CUDA_MAX_RANKS];
    /* offsets in the window */
    uint64_t x_offset;
    uint64_t in_scales_offset;
    uint64_t y_offset;
    uint64_t rows_capacity;
    /* device */
    struct nep_cuda_group group;
    struct nep_cuda_shape cuda_shape;
    struct nep_cuda_geometry geometry;
    struct nep_cuda_input in;
    struct nep_cuda_output out;
    struct nep_cuda_routing routing;
    struct nep_cuda_dispatch dispatch;
    struct nep_cuda_combine combine;
    void *ids_device;
    float *weights_device;
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
/* Puts the three kernels of dispatch on the stream. */
void gpu_case_dispatch(struct gpu_case *c);
void gpu_case_combine(struct gpu_case *c);
/* Wrong elements; the first difference is printed. */
uint64_t gpu_case_check_dispatch(struct gpu_case *c);
uint64_t gpu_case_check_combine(struct gpu_case *c, uint64_t round);
/* The same rows pulled from the inputs of the ranks, and looked at. */
uint64_t gpu_case_check_pull(struct gpu_case *c);
uint64_t gpu_case_status(struct gpu_case *c);
/* Dispatch and combine of one round, all checked. */
uint64_t gpu_case_round(struct gpu_case *c, uint64_t round);
/* For expectation and copies. */
void gpu_case_x_row(void *ctx, uint32_t rank, uint32_t token, void *row);

#endif
