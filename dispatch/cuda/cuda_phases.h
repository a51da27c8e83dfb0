/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The phases of the CUDA executor inside one node, as functions that put one kernel each on a
 * stream. dispatch: layout, place, push, and pull where the own output is not mapped; combine:
 * stage where the expert outputs are not mapped, ready, sum. push may do place's work itself, and
 * sum that of ready. Nothing here allocates or waits on the host, so all of it may be captured into
 * a graph. Pointers in the structures are device pointers unless a comment says otherwise; the
 * structures themselves are read during the call only.
 *
 * Every rank of the group begins operations in the same order (layout and ready begin one); up to
 * window / 2 may be between their beginning and their end. Kernels of several ranks wait for each
 * other, so all of their blocks must fit on the device together (nep_cuda_geometry refuses what
 * does not).
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

enum { NEP_CUDA_MAX_RANKS = 64 /* of one group */ };
#define NEP_CUDA_NONE UINT64_MAX /* an offset: there is no such array */

/* ---- launch geometry: no GPU needed --------------------------------------------------------- */

struct nep_cuda_limits {
    uint32_t device_sms;      /* of the device */
    uint32_t ranks_on_device; /* that run kernels on it at once */
    uint32_t shared_bytes;    /* most shared memory that a block may ask for */
    int can_launch_early;
};

struct nep_cuda_geometry {
    uint32_t blocks; /* of push, pull and sum: one per SM */
    uint32_t threads;
    uint32_t shared_bytes; /* so much that no second block fits beside one on its SM */
    int can_launch_early;  /* the device has programmatic dependent launch (sm_90) */
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
    NEP_CUDA_PHASE_READ = 5,
    NEP_CUDA_PHASE_BOUND = 6,
    NEP_CUDA_PHASE_STAGE = 7,
    NEP_CUDA_PHASE_WRITTEN = 8
};
#define NEP_CUDA_STATUS(kind, phase, who)                                                          \
    ((uint64_t)(kind) << 56 | (uint64_t)(phase) << 48 | (uint64_t)(who))
enum nep_cuda_status_kind {
    NEP_CUDA_EXPIRED = 1,  /* who: the rank whose word did not come */
    NEP_CUDA_BAD_ID = 2,   /* who: index into topk_ids, 48 bits */
    NEP_CUDA_OVERFLOW = 3, /* who: the rank whose output (phase STAGE: staging) is too small */
    NEP_CUDA_DISAGREE = 4, /* who: the rank whose COUNTS are of another operation or map */
    NEP_CUDA_CROWDED = 5,  /* who: the rank that has a slot with more rows than it has room for */
    NEP_CUDA_LOST = 15     /* who: the rank that the host found gone */
};

/* Device memory of a rank, zeroed before its first operation. */
struct nep_cuda_state {
    uint64_t op;     /* operations begun */
    uint64_t status; /* sticky: while it is not 0, kernels return at once */
};

/* An operation as its kernels find it; in device memory of a handle, zeroed before its first use.
 * Here, not in arguments: a graph that is replayed begins another operation each time. */
struct nep_cuda_cell {
    uint64_t op;
    uint64_t epoch; /* of layout */
    uint32_t arrived;
    uint32_t reserved;
};

/*
 * Control area in every rank's window, at the same offset, zeroed before the first operation. W:
 * slots in use, operation op has slot op % W; all words hold operation numbers and only grow.
 */
struct nep_cuda_words {
    uint64_t counts;  /* [W][R] that rank's COUNTS are here */
    uint64_t bound;   /* [W][R] its outputs are known */
    uint64_t pushed;  /* [W][R] its rows are all here, or where they are pulled from */
    uint64_t ready;   /* [W][R] its expert outputs may be read */
    uint64_t read;    /* [W][R] it has read what it reads here */
    uint64_t fault;   /* [R] status with which it gave up */
    uint64_t bind;    /* [W][R] struct nep_cuda_bind */
    uint64_t lend;    /* [W][R] struct nep_cuda_lend */
    uint64_t message; /* [W][R][message_bytes] */
    uint64_t message_bytes;
    uint64_t bytes;
};
struct nep_cuda_words nep_cuda_words_plan(uint32_t num_ranks, uint32_t slots_per_rank,
                                          uint32_t window);

struct nep_cuda_group {
    char *base; /* rank r's window is at base + r * stride */
    uint64_t stride;
    uint32_t num_ranks;
    uint32_t rank;
    uint32_t window; /* W */
    uint64_t words_offset;
    struct nep_cuda_words words; /* from nep_cuda_words_plan */
    struct nep_cuda_state *state;
    uint64_t *status_host; /* pinned, 2 words: status, operation; or NULL */
    uint64_t timeout_ns;   /* of every wait inside a kernel */
};

/*
 * Where rows lie that peers pull (from tokens in memory that they do not map) or read (expert
 * outputs in such memory): offsets in the window, equal on all ranks. Slot op % depth.
 */
struct nep_cuda_staging {
    uint32_t depth;
    uint64_t x;             /* [depth][M] rows of payload_bytes */
    uint64_t scales;        /* [depth][M] rows of scale_bytes */
    uint64_t slots;         /* [depth][M][K] */
    uint64_t index;         /* [depth][M][K] */
    uint64_t weights;       /* [depth][M][K] */
    uint64_t scales_stride; /* of a slot, multiples of 16 */
    uint64_t y;             /* [depth][y_rows] rows of dtype */
    uint64_t y_weights;     /* [depth][y_rows][K] */
    uint64_t y_rows;
};

struct nep_cuda_shape {
    uint32_t num_ranks; /* R, on all nodes; slots, counts and sources are numbers among these */
    uint32_t rank;      /* this one */
    uint32_t slots_per_rank; /* L */
    uint32_t top_k;          /* K, 1 to 32 */
    uint32_t max_tokens;     /* M */
    uint32_t alignment;
    uint32_t num_nodes; /* for the counts per node */
    enum nep_layout layout;
    struct nep_wire wire; /* payload_bytes is a multiple of 16 */
    struct nep_cuda_staging staging;
};

/* ---- dispatch -------------------------------------------------------------------------------- */

/* One row to add. ends: NEP_ENDS_* of dispatch/host/kernels.h. */
struct nep_cuda_term {
    uint32_t pos; /* row of rank's expert outputs */
    uint16_t rank;
    uint16_t ends;
    float weight;
    uint32_t k;
};

/* What a handle holds in device memory. */
struct nep_cuda_routing {
    struct nep_cuda_cell *cell;
    uint32_t *slots;             /* [M][K] physical slot or NEP_SLOT_NONE */
    uint32_t *index;             /* [M][K] how many rows of this rank come before in the bucket */
    float *weights;              /* [M][K] */
    uint32_t *counts;            /* rows per rank [R], per node [N], per slot [R * L] */
    uint32_t *first;             /* [R] or [R * L]: where this rank's rows of a bucket begin */
    uint64_t *totals;            /* [R] rows of each rank's output */
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
    const float *weight; /* [T][K]; NULL: 1, or those that the routing holds */
    enum nep_id_type id_type;
    uint32_t num_tokens;
    /* offsets in the window where x and scales lie as they travel; NONE: they must be staged */
    uint64_t x_offset;
    uint64_t scales_offset;
    uint64_t digest;          /* of the map; all ranks must have the same */
    struct nep_copies copies; /* its tables in device memory */
};

/* This rank's outputs. Optional arrays may be NULL. */
struct nep_cuda_output {
    char *x;
    char *scales;
    int32_t *topk_slots;
    float *topk_weights;
    uint32_t *source_rank;
    uint32_t *source_token;
    uint64_t capacity; /* rows */
    int is_mapped;     /* all of them lie in the window: peers push; else this rank pulls */
};

struct nep_cuda_dispatch {
    const struct nep_cuda_group *group;
    const struct nep_cuda_shape *shape;
    const struct nep_cuda_geometry *geometry;
    const struct nep_cuda_input *in;
    const struct nep_cuda_output *out; /* layout: NULL while it is not known */
    const struct nep_cuda_routing *routing;
};

/* Loads the kernels and raises their shared memory limits. Before the first launch, per device. */
enum nep_status nep_cuda_load(void);
/* Begins the operation: slots, counts, indexes; COUNTS, and outputs if known, to every rank. */
enum nep_status nep_cuda_layout(const struct nep_cuda_dispatch *dispatch,
                                struct CUstream_st *stream);
/* Slots and counts alone; nothing is begun or sent. */
enum nep_status nep_cuda_count(const struct nep_cuda_dispatch *dispatch,
                               struct CUstream_st *stream);
/* is_in[T][R]: whether a token goes to a rank, from the slots of a routing. */
enum nep_status nep_cuda_is_in(const struct nep_cuda_dispatch *dispatch, uint8_t *is_in,
                               struct CUstream_st *stream);
/* Waits for all COUNTS; from them the first row of every bucket, and what comes to this rank. */
enum nep_status nep_cuda_place(const struct nep_cuda_dispatch *dispatch,
                               struct CUstream_st *stream);
enum nep_cuda_push_flags {
    NEP_CUDA_PUSH_PLACES = 1, /* do place's work first */
    NEP_CUDA_PUSH_BINDS = 2,  /* say where the outputs are: layout did not know */
    NEP_CUDA_PUSH_WAITS = 4   /* end when the rows of all ranks are here */
};
/*
 * Every row to its final places or, for ranks that pull, to the staging area where it does not lie
 * in mapped memory already; and who reads what in combine.
 */
enum nep_status nep_cuda_push(const struct nep_cuda_dispatch *dispatch, unsigned flags,
                              struct CUstream_st *stream);
/*
 * layout and push (with places, outputs known) in one launch, where nep_cuda_is_few says that there
 * are so few tokens that this is faster.
 */
int nep_cuda_is_few(const struct nep_cuda_dispatch *dispatch);
enum nep_status nep_cuda_push_few(const struct nep_cuda_dispatch *dispatch, unsigned flags,
                                  struct CUstream_st *stream);
/* Waits for the rows of all ranks. */
enum nep_status nep_cuda_await(const struct nep_cuda_dispatch *dispatch,
                               struct CUstream_st *stream);
/* Waits for the rows of all ranks and takes them to the own output. */
enum nep_status nep_cuda_pull(const struct nep_cuda_dispatch *dispatch, struct CUstream_st *stream);

/* ---- combine --------------------------------------------------------------------------------- */

struct nep_cuda_combine {
    const struct nep_cuda_group *group;
    const struct nep_cuda_shape *shape;
    const struct nep_cuda_geometry *geometry;
    const struct nep_cuda_routing *routing;
    /* where this rank's expert outputs are */
    uint64_t rows;    /* offset in its window; NONE: staged */
    uint64_t weights; /* of their top-k weights; NONE: there are none, or staged */
    const void *in;   /* to be staged from here */
    const float *in_weights;
    int has_weights;            /* on all ranks */
    const float *token_weights; /* [T][K] in place of the terms'; or NULL */
    /* results */
    void *y; /* [T] rows of dtype */
    const void *bias[2];
    float *topk_weights; /* [T][K] */
    uint32_t num_tokens; /* of the dispatch */
    enum nep_dtype dtype;
    uint32_t hidden;
};
/* Before it begins: until the outputs for the rows that came are written, as flags say. */
enum nep_status nep_cuda_await_written(const struct nep_cuda_group *group,
                                       const struct nep_cuda_routing *routing,
                                       const struct nep_written *written, uint32_t num_slots,
                                       struct CUstream_st *stream);
/* Begins the operation: copies the rows to be staged. */
enum nep_status nep_cuda_stage(const struct nep_cuda_combine *combine, struct CUstream_st *stream);
/* Says that this rank's rows may be read; begins the operation if stage did not. */
enum nep_status nep_cuda_ready(const struct nep_cuda_combine *combine, int is_begun,
                               struct CUstream_st *stream);
enum nep_cuda_sum_flags {
    NEP_CUDA_SUM_SAYS = 1, /* do ready's work first */
    NEP_CUDA_SUM_BEGUN = 2 /* stage or ready has begun the operation */
};
/* Waits for the others' rows, sums, and waits until all have read. */
enum nep_status nep_cuda_sum(const struct nep_cuda_combine *combine, unsigned flags,
                             struct CUstream_st *stream);

#ifdef __cplusplus
}
#endif

#endif
