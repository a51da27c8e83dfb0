/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fabric's half of the CUDA executor: two hops. Regions, slots, words, messages and credits are
 * those of the host executor (dispatch/region.h, docs/protocol.md); a region lies twice, at equal
 * offsets: its words in pinned host memory, which the proxy's sink raises, and everything else in
 * `data`: memory of the GPU where the fabric reaches it, else the same pinned memory (staging).
 * What ranks of one node tell each other is always in memory of the GPU, `near`.
 *
 * Dispatch on one stream: nep_cuda_far_counts, _pack, _place, _recv. Combine: _offer, _reduce,
 * _sum. Several operations may be between their two halves; halves of a kind run in the order of
 * operations. What slots hold is packed by _pack and _reduce, which wait for operations that this
 * rank has completed alone; the rest by blocks of _recv and _sum beside those that receive.
 *
 * Differences to the host's messages, both known from the shape: no rows ride in COUNTS, and a
 * tile's row also carries, for each k, how many rows of its source come before it in its bucket, so
 * that receivers need not count.
 */
#ifndef NEP_DISPATCH_CUDA_FABRIC_H
#define NEP_DISPATCH_CUDA_FABRIC_H

#include "dispatch/cuda/cuda_phases.h"
#include "dispatch/cuda/ring.h"
#include "dispatch/offsets.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    NEP_FAR_MAX_NODES = 16,
    NEP_FAR_MAX_RANKS = 64, /* of the group */
    NEP_FAR_MAX_WINDOW = 16,
    NEP_FAR_TILES = 2,         /* of a stream, for each operation outstanding, have their slots */
    NEP_FAR_HAS_WEIGHTS = 2048 /* among a command's rows: a float for each k of each behind them */
};

/* Kinds of a status beside those of cuda_phases.h. */
enum {
    NEP_CUDA_PROXY_STALE = 16, /* who: this rank; its proxy thread does not run */
    NEP_CUDA_FABRIC_FAULT = 17 /* who: the rank that the proxy named */
};
/* Phases. */
enum {
    NEP_FAR_PHASE_SLOT = 16,   /* a send slot whose put is not complete */
    NEP_FAR_PHASE_CREDIT = 17, /* a tile's credit */
    NEP_FAR_PHASE_POST = 18,   /* room in the ring */
    NEP_FAR_PHASE_TILE = 19,
    NEP_FAR_PHASE_SUMS = 20,
    NEP_FAR_PHASE_BIND = 21
};

/* When block 0 of a kernel, or the block that does the thing, got there: to see where time goes. */
enum nep_far_stamp {
    NEP_FAR_AT_COUNTS,
    NEP_FAR_AT_LISTED,
    NEP_FAR_AT_COUNTS_POSTED,
    NEP_FAR_AT_PACK,
    NEP_FAR_AT_PACKED,
    NEP_FAR_AT_PLACE,
    NEP_FAR_AT_COUNTS_HERE,
    NEP_FAR_AT_PLACED,
    NEP_FAR_AT_RECV,
    NEP_FAR_AT_PUSHED,
    NEP_FAR_AT_TILE_HERE,
    NEP_FAR_AT_READ,
    NEP_FAR_AT_MET,
    NEP_FAR_AT_OFFER,
    NEP_FAR_AT_REDUCE,
    NEP_FAR_AT_ROWS_HERE,
    NEP_FAR_AT_REDUCED,
    NEP_FAR_AT_SUM,
    NEP_FAR_AT_SUMS_HERE,
    NEP_FAR_AT_SUMMED,
    NEP_FAR_AT_SUM_MET,
    NEP_FAR_NUM_STAMPS
};

/* Pinned. Written by the proxy: what is complete of this rank's puts. Monotone. */
struct nep_far_page {
    uint64_t counts_free[NEP_FAR_MAX_RANKS]; /* by control: op + 1 */
    uint64_t tiles_free[NEP_FAR_MAX_RANKS];  /* by send ring: puts */
    uint64_t tokens_local;                   /* by a kernel, for statistics */
};

/* What is known of a source of another node in one operation. */
struct nep_far_in {
    uint64_t first_tile;
    uint32_t rows;
    uint32_t tiles;
};

/* An operation between its halves. */
struct nep_far_op {
    uint64_t first_tile[NEP_FAR_MAX_NODES]; /* of the streams to each node */
    uint64_t first_sums[NEP_FAR_MAX_RANKS]; /* and to each lane source */
    uint32_t sent[NEP_FAR_MAX_RANKS];       /* tiles that the send half posted, by send ring */
};

/* Memory of the GPU, zeroed before the first operation. */
struct nep_far_state {
    struct nep_cuda_state run;             /* op: operations completed */
    uint64_t begun;                        /* operations whose send half is over */
    uint64_t next_tile[NEP_FAR_MAX_NODES]; /* dispatch tiles of all operations begun, to a node */
    uint64_t next_sums[NEP_FAR_MAX_RANKS]; /* combine tiles, to each lane source */
    uint64_t next_in[NEP_FAR_MAX_NODES];   /* combine tiles from each node, of those completed */
    uint64_t next_send[NEP_FAR_MAX_RANKS]; /* puts of each send ring */
    uint32_t due[NEP_FAR_MAX_RANKS];       /* puts that operations begun have left */
    struct nep_far_op ops[NEP_FAR_MAX_WINDOW];
    uint64_t credit[NEP_FAR_MAX_RANKS]; /* what was last seen of pinned words */
    uint64_t sums_credit[NEP_FAR_MAX_RANKS];
    uint64_t slot[NEP_FAR_MAX_RANKS];
    uint64_t counts_free[NEP_FAR_MAX_RANKS];
    uint64_t tile_seen[NEP_FAR_MAX_RANKS];
    uint64_t sums_seen[NEP_FAR_MAX_NODES];
    uint64_t listed[NEP_FAR_MAX_NODES]; /* within a launch: op + 1 when a node's list is there */
    uint64_t placed;                    /* and when positions are */
    uint64_t tokens_local;
    uint64_t stamps[NEP_FAR_NUM_STAMPS];                    /* of the last operation, nanoseconds */
    uint32_t arrived;                                       /* of a whole launch */
    uint32_t packed[NEP_FAR_MAX_RANKS][NEP_FAR_MAX_WINDOW]; /* blocks done with a tile */
    uint32_t read[NEP_FAR_MAX_WINDOW];                      /* with the tiles of a round */
    uint32_t reserved;
};

/* Everything about a rank that does not change between operations. Pointers are the device's. */
struct nep_far {
    uint32_t num_ranks, rank;
    uint32_t num_nodes, node;
    uint32_t node_size, local;
    uint32_t node_begin; /* of this node in node_rank */
    uint32_t tile_rows;
    uint32_t meta_bytes;
    uint32_t row_bytes; /* of combine */
    uint32_t window;    /* W = V, slots of COUNTS and of each stream; nep_far_window */
    uint32_t tiles;     /* NEP_FAR_TILES; others for a measurement */
    uint32_t num_lanes;
    uint32_t num_controls;
    struct nep_cuda_shape shape;
    enum nep_dtype dtype; /* of combine */
    /* tables */
    const uint32_t *node_of_rank;
    const uint32_t *local_of_rank;
    const uint32_t *node_first;       /* [N + 1] into node_rank */
    const uint32_t *node_rank;        /* [R] */
    const uint32_t *landing;          /* [N][R] */
    const uint32_t *lane;             /* [N][R] */
    const uint32_t *lane_source;      /* [lanes] */
    const uint32_t *control;          /* [R][R]: index of [source] among the controls of [rank] */
    const struct nep_region *regions; /* [R] */
    struct nep_region own;            /* here: no load before its offsets are known */
    char *const *words;               /* [G] of this node, by local index: pinned */
    char *const *data;                /* [G] what the fabric reads and writes */
    char *const *near;                /* [G] memory of the GPU: what ranks of a node tell each
                                       * other, their outputs; `data` where the fabric reaches it */
    uint64_t *completed;              /* pinned: of this rank's region head */
    uint64_t *stuck; /* near, [R] of `staged`: not 0 when somebody of the node gave up */
    struct nep_far_page *page;
    struct nep_ring ring;
    struct nep_far_state *state;
    uint64_t *status_host; /* pinned, or NULL */
    uint64_t timeout_ns;
};

/* What a handle adds to struct nep_cuda_routing: memory of the GPU. */
struct nep_far_routing {
    uint32_t *node_tokens; /* [N][M] tokens that go to each node, ascending */
    uint32_t *row_of;      /* [N][M] the inverse, NEP_SLOT_NONE: none */
    uint32_t *node_rows;   /* [N] */
    uint32_t *first;       /* [R][G] or [R][G * L]: where a source's rows begin on this node */
    struct nep_far_in *in; /* [R] */
    struct nep_cuda_term *home_terms; /* [M][K] */
    uint32_t *home_num;               /* [M] */
    struct nep_cuda_term *far_terms;  /* [lanes][M][K] */
    uint32_t *far_num;                /* [lanes][M] */
    uint32_t *chunks;                 /* [M / tile_rows + 2] zeroed */
    uint64_t *schedule;               /* [lanes * (M / tile_rows + 1)] zeroed */
};

/* Offsets in this rank's `near`; NEP_CUDA_NONE where there is no such array. */
struct nep_far_output {
    uint64_t x;
    uint64_t scales;
    uint64_t topk_slots;
    uint64_t topk_weights;
    uint64_t source_rank;
    uint64_t source_token;
    uint64_t capacity; /* rows */
};

/* Flags of nep_cuda_far_counts and nep_cuda_far_recv. */
enum { NEP_FAR_BINDS = 1 /* say where the outputs are: one of the two does */ };

struct nep_far_dispatch {
    const struct nep_far *far;
    const struct nep_cuda_geometry *geometry;
    const struct nep_cuda_input *in;
    const struct nep_far_output *out;
    const struct nep_cuda_routing *routing; /* slots, index and counts in numbers of the group */
    const struct nep_far_routing *far_routing;
};

struct nep_far_combine {
    const struct nep_far *far;
    const struct nep_cuda_geometry *geometry;
    const struct nep_cuda_routing *routing;
    const struct nep_far_routing *far_routing;
    /* offsets in `near`: this rank's expert outputs and, where top-k weights come back, theirs
     * (NEP_CUDA_NONE: they do not); so much further for each slot, where they were copied there */
    uint64_t rows;
    uint64_t weights;
    uint64_t rows_step;
    uint64_t weights_step;
    void *y;             /* [T] */
    const void *bias[2]; /* [T] rows each, or NULL */
    float *topk_weights; /* [T][K], or NULL */
    uint32_t num_tokens;
};

/* Rows between memory that the node does not map and this rank's window: up to six arrays, of a
 * dispatch those of struct nep_far_output. */
enum { NEP_FAR_SCALES = 1 };
struct nep_far_copy {
    const char *from[6]; /* NULL: nothing */
    char *to[6];
    uint32_t row_bytes[6];
    uint64_t to_step[2];  /* of to[0], to[1]: an area for each operation that may be outstanding */
    uint64_t capacity[2]; /* rows of the outputs that it copies from, and to: for NEP_FAR_SCALES */
    int is_dispatched;    /* what the operation before brought: padded slots source by source */
};

/* Loads the kernels. Before the first launch and before any kernel that stays. */
enum nep_status nep_cuda_far_load(void);
/* Lists per node; COUNTS to every node; where this rank's outputs lie, if that is known. */
enum nep_status nep_cuda_far_counts(const struct nep_far_dispatch *d, unsigned flags,
                                    struct CUstream_st *stream);
enum nep_status nep_cuda_far_pack(const struct nep_far_dispatch *d, struct CUstream_st *stream);
/* Waits for all COUNTS; from them where rows of every source begin on this node. */
enum nep_status nep_cuda_far_place(const struct nep_far_dispatch *d, struct CUstream_st *stream);
/* Own rows to the outputs of this node, far tiles to this rank's; waits for both. */
enum nep_status nep_cuda_far_recv(const struct nep_far_dispatch *d, unsigned flags,
                                  struct CUstream_st *stream);
/* The rows of each array that came to this rank; more than `most` places are a fault. */
enum nep_status nep_cuda_far_copy(const struct nep_far *far,
                                  const struct nep_cuda_geometry *geometry,
                                  const struct nep_cuda_routing *routing,
                                  const struct nep_far_copy *copy, uint64_t most,
                                  struct CUstream_st *stream);
/* All of a dispatch whose outputs are known, in one launch; at least two SMs. */
enum nep_status nep_cuda_far_dispatch(const struct nep_far_dispatch *d, struct CUstream_st *stream);
/* COUNTS of a combine, and that this rank's expert outputs may be read. */
enum nep_status nep_cuda_far_offer(const struct nep_far_combine *c, struct CUstream_st *stream);
/* Partial sums for the sources that land here, one row per token back. */
enum nep_status nep_cuda_far_reduce(const struct nep_far_combine *c, struct CUstream_st *stream);
/* This node's rows and the other nodes' sums of this rank's tokens. */
enum nep_status nep_cuda_far_sum(const struct nep_far_combine *c, struct CUstream_st *stream);
/* All of a combine in one launch. */
enum nep_status nep_cuda_far_combine(const struct nep_far_combine *c, struct CUstream_st *stream);

/* Slots for S operations outstanding: a power of two, 2 S at least. */
static inline uint32_t nep_far_window(uint32_t outstanding)
{
    uint32_t window = NEP_FAR_TILES;
    while (window < NEP_FAR_TILES * outstanding) {
        window *= 2;
    }
    return window;
}

/* Rows of a tile: small batches go in two, of which one is read while the other travels. */
static inline uint32_t nep_far_tile_rows(uint32_t max_tokens)
{
    uint32_t half = (max_tokens + 1) / 2;
    return max_tokens <= 32 ? max_tokens : half < 256 ? half : 256;
}

/* Bytes of a tile's row of numbers: token, K slots, K weights, K indexes. */
static inline uint32_t nep_far_meta_bytes(uint32_t top_k)
{
    return 4 + (top_k + 1) / 2 * 4 + top_k * 8;
}

#ifdef __cplusplus
}
#endif

#endif
