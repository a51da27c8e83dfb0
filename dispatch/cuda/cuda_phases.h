/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The phases of the CUDA executor inside one node, as functions that put one kernel each on a
 * stream: layout, place, push (together: dispatch), pull, sum (combine). Nothing here allocates or
 * waits on the host, so all of it may be captured into a graph. Pointers in the structures are
 * device pointers unless a comment says otherwise; the structures themselves are read during the
 * call only.
 *
 * One operation at a time per state, on one stream: dispatch = layout, place, push, combine = sum;
 * every rank of the group in the same order. Kernels of several ranks wait for each other, so all
 * of their blocks must fit on the device together (nep_cuda_geometry refuses what does not).
 */
#ifndef NEP_DISPATCH_CUDA_PHASES_H
#define NEP_DISPATCH_CUDA_PHASES_H

#include "dispatch/host/wire.h"
#include "nearep.h"
#include "placement/choose.h"

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st;

enum {
    NEP_CUDA_MAX_RANKS = 64,  /* of one group */
    NEP_CUDA_SLOTS_IN_USE = 2 /* W of docs/protocol.md for one operation outstanding */
};
#define NEP_CUDA_NONE UINT64_MAX /* an offset: there is no such array */

/* ---- launch geometry: no GPU needed --------------------------------------------------------- */

struct nep_cuda_limits {
    uint32_t device_sms;      /* of the device */
    uint32_t ranks_on_device; /* that run kernels on it at once */
    uint32_t shared_bytes;    /* most shared memory that a block may ask for */
};

struct nep_cuda_geometry {
    uint32_t blocks; /* of push, pull and sum: one per SM */
    uint32_t threads;
    uint32_t shared_bytes; /* so much that no second block fits beside one on its SM */
    uint32_t layout_blocks;
    uint32_t layout_threads;
    uint32_t layout_shared_bytes;
};

/*
 * num_buckets: R in the rank layout, R * L in the others; num_counts: R + N + R * L. Refuses
 * num_sms that do not fit beside those of the other ranks, with the numbers.
 */
enum nep_status nep_cuda_geometry(const struct nep_cuda_limits *limits, uint32_t num_sms,
                                  uint32_t num_buckets, uint32_t num_counts,
                                  struct nep_cuda_geometry *geometry_p);
/*
 * Into how many parts a row of `units` 16-byte pieces is cut, so that the busiest of the
 * blocks * threads / 32 warps has least to do with num_rows rows; at most one part per `least`
 * pieces.
 */
uint32_t nep_cuda_row_parts(const struct nep_cuda_geometry *geometry, uint32_t num_rows,
                            uint32_t units, uint32_t least);

/* ---- who takes part -------------------------------------------------------------------------- */

/* What a kernel that gave up left behind. 0: nothing. The first one stays. */
enum nep_cuda_phase {
    NEP_CUDA_PHASE_LAYOUT = 1,
    NEP_CUDA_PHASE_COUNTS = 2,
    NEP_CUDA_PHASE_PUSHED = 3,
    NEP_CUDA_PHASE_READY = 4,
    NEP_CUDA_PHASE_READ = 5
};
#define NEP_CUDA_STATUS(kind, phase, who)                                                          \
    ((uint64_t)(kind) << 56 | (uint64_t)(phase) << 48 | (uint64_t)(who))
enum nep_cuda_status_kind {
    NEP_CUDA_EXPIRED = 1,  /* who: the rank whose word did not come */
    NEP_CUDA_BAD_ID = 2,   /* who: index into topk_ids, 48 bits */
    NEP_CUDA_OVERFLOW = 3, /* who: the rank whose output is too small */
    NEP_CUDA_DISAGREE = 4  /* who: the rank whose COUNTS belong to another operation */
};

/* Device memory of a rank, zeroed before its first operation. */
struct nep_cuda_state {
    uint64_t op;     /* operations begun */
    uint64_t status; /* sticky: while it is not 0, kernels return at once */
    uint32_t arrived;
    uint32_t reserved;
    uint64_t epoch; /* of layout */
};

/* Control area in every rank's window, at the same offset, zeroed before the first operation. */
struct nep_cuda_words {
    uint64_t counts;  /* [W][R] op */
    uint64_t pushed;  /* [R] op: that rank's rows are all here */
    uint64_t ready;   /* [R] op: that rank's expert outputs may be read */
    uint64_t y;       /* [W][R] their offset in that rank's window */
    uint64_t read;    /* [R] op: that rank has read what it reads here */
    uint64_t message; /* [W][R][message_bytes] */
    uint64_t message_bytes;
    uint64_t bytes;
};
struct nep_cuda_words nep_cuda_words_plan(uint32_t num_ranks, uint32_t slots_per_rank);

struct nep_cuda_group {
    char *base; /* rank r's window is at base + r * stride */
    uint64_t stride;
    uint32_t num_ranks;
    uint32_t rank;
    uint64_t words_offset;
    struct nep_cuda_words words; /* from nep_cuda_words_plan */
    struct nep_cuda_state *state;
    uint64_t *status_host; /* pinned, or NULL: the status is stored there as well */
    uint64_t timeout_ns;   /* of every wait inside a kernel */
};

struct nep_cuda_shape {
    uint32_t slots_per_rank; /* L */
    uint32_t top_k;          /* K, 1 to 32 */
    uint32_t max_tokens;     /* M */
    uint32_t alignment;
    uint32_t num_nodes; /* for the counts per node */
    enum nep_layout layout;
    struct nep_wire wire; /* payload_bytes is a multiple of 16 */
};

/* ---- dispatch -------------------------------------------------------------------------------- */

/* One row to add. ends: NEP_ENDS_* of dispatch/host/kernels.h. */
struct nep_cuda_term {
    uint32_t pos; /* row of rank's expert outputs */
    uint16_t rank;
    uint16_t ends;
    float weight;
    uint32_t reserved;
};

/* What a handle holds in device memory. Sizes of nep_cuda_routing_bytes. */
struct nep_cuda_routing {
    uint32_t *slots;             /* [M][K] physical slot or NEP_SLOT_NONE */
    uint32_t *index;             /* [M][K] how many rows of this rank come before in the bucket */
    uint32_t *counts;            /* rows per rank [R], per node [N], per slot [R * L] */
    uint32_t *first;             /* [R] or [R * L]: where this rank's rows of a bucket begin */
    struct nep_cuda_term *terms; /* [M][K] */
    uint32_t *num_terms;         /* [M] */
    uint64_t *block_counts;      /* [layout_blocks][R + N + R * L], zeroed before the first use */
    uint64_t *received;          /* num_rows, num_real_rows, first_row [L] */
    uint32_t *received_rows;     /* rows per slot [L], per source [R] */
};

struct nep_cuda_input {
    const void *x;       /* [T] rows of wire.in_bytes or, where scales are given, payload_bytes */
    const void *scales;  /* [T] rows of scale_bytes; NULL: none, or cast here */
    const void *ids;     /* [T][K]; NULL: the slots that the routing holds */
    const float *weight; /* [T][K]; NULL: 1 */
    enum nep_id_type id_type;
    uint32_t num_tokens;
    struct nep_copies copies; /* its tables in device memory */
};

/* Offsets in this rank's window; NEP_CUDA_NONE where there is no such array. */
struct nep_cuda_output {
    uint64_t x;
    uint64_t scales;
    uint64_t topk_slots;
    uint64_t topk_weights;
    uint64_t source_rank;
    uint64_t source_token;
    uint64_t capacity; /* rows */
};

struct nep_cuda_dispatch {
    const struct nep_cuda_group *group;
    const struct nep_cuda_shape *shape;
    const struct nep_cuda_geometry *geometry;
    const struct nep_cuda_input *in;
    const struct nep_cuda_output *out;
    const struct nep_cuda_routing *routing;
};

/* Loads the kernels and raises their shared memory limits. Before the first launch, per device. */
enum nep_status nep_cuda_load(void);
/* Begins the operation: slots, counts, indexes; COUNTS to every rank of the group. */
enum nep_status nep_cuda_layout(const struct nep_cuda_dispatch *dispatch,
                                struct CUstream_st *stream);
/* Waits for all COUNTS; from them the first row of every bucket, and what comes to this rank. */
enum nep_status nep_cuda_place(const struct nep_cuda_dispatch *dispatch,
                               struct CUstream_st *stream);
/*
 * Every row to its final places, and who reads what in combine. is_waiting: ends when the rows of
 * all ranks are here.
 */
enum nep_status nep_cuda_push(const struct nep_cuda_dispatch *dispatch, int is_waiting,
                              struct CUstream_st *stream);

/* Row `row` of sources[source] to row `pos` of the outputs. */
struct nep_cuda_move {
    uint32_t source;
    uint32_t row;
    uint32_t pos;
    uint32_t reserved;
};

/* Rows from where they lie (tiles, inputs of others) to rows of this rank's output. */
struct nep_cuda_pull {
    const struct nep_cuda_geometry *geometry;
    const void *const *sources; /* addresses of rows */
    uint64_t stride;            /* of rows there */
    const struct nep_cuda_move *moves;
    const uint32_t *num_moves; /* in device memory; at most max_moves */
    uint32_t max_moves;
    uint32_t payload_bytes; /* a multiple of 16, as is stride */
    uint32_t scale_bytes;   /* behind the payload in a source's row */
    void *x;
    void *scales;
    const struct nep_cuda_state *state;
};
enum nep_status nep_cuda_pull(const struct nep_cuda_pull *pull, struct CUstream_st *stream);

/* ---- combine --------------------------------------------------------------------------------- */

struct nep_cuda_combine {
    const struct nep_cuda_group *group;
    const struct nep_cuda_shape *shape;
    const struct nep_cuda_geometry *geometry;
    const struct nep_cuda_routing *routing;
    uint64_t rows;       /* offset of this rank's expert outputs in its window */
    void *y;             /* [T] rows of dtype */
    uint32_t num_tokens; /* of the dispatch */
    enum nep_dtype dtype;
    uint32_t hidden;
};
/*
 * Says that this rank's rows are there, waits for the others', sums, and waits until all have read.
 */
enum nep_status nep_cuda_sum(const struct nep_cuda_combine *combine, struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif

#endif
