/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What lies where in a region and in a message, as plain numbers and structures: host code, kernels
 * and the proxy read the same text. dispatch/region.h computes the offsets, dispatch/protocol.h
 * says what the messages mean.
 */
#ifndef NEP_DISPATCH_OFFSETS_H
#define NEP_DISPATCH_OFFSETS_H

#include <stdint.h>

/* Offsets into a region. [x][y] below are the dimensions of the arrays that start there. */
struct nep_region {
    uint32_t num_lanes;    /* lane sources */
    uint32_t num_controls; /* ranks whose COUNTS land here, itself included */
    uint32_t num_sends;    /* send rings: max(other nodes, lane sources) */
    uint32_t staging_rows; /* rows of each staging ring */
    uint64_t counts_bytes; /* of a COUNTS slot here */
    uint64_t send_counts_bytes;
    uint64_t dispatch_tile_bytes;
    uint64_t combine_tile_bytes;
    uint64_t send_tile_bytes;
    /* words, 8 bytes each */
    uint64_t directory;       /* [R] struct nep_directory: how the sink finds a source's words */
    uint64_t counts_word;     /* [controls][W] op + 1 */
    uint64_t dispatch_word;   /* [lanes][V] tile number + 1 */
    uint64_t combine_word;    /* [N][V] tile number + 1 */
    uint64_t dispatch_read;   /* [R] tiles of each source that this rank has read */
    uint64_t combine_read;    /* [N] tiles of each node's partial sums that this rank has read */
    uint64_t dispatch_credit; /* [N] tiles that node n has freed of this rank's stream to it */
    uint64_t dispatch_sent;   /* [N] tiles that this rank has sent to it */
    uint64_t combine_credit;  /* [lanes] the same for partial sums sent to lane sources */
    uint64_t combine_sent;    /* [lanes] */
    uint64_t home_word;       /* [V] home tile number + 1 */
    uint64_t out_bind;        /* [W] struct nep_bind of dispatch outputs */
    uint64_t y_bind;          /* [W] struct nep_bind of combine inputs */
    uint64_t pushed;          /* [G] op + 1 of the last push of each local rank into this one */
    uint64_t staged;          /* [R] rows staged for each source, ever */
    uint64_t taken;           /* [lanes + 1][G] rows that this consumer took from each local rank */
    uint64_t arrivals;        /* struct nep_event_ring: what the sink was told last */
    uint64_t words_end;
    /* data */
    uint64_t counts;           /* [controls][W] */
    uint64_t send_counts;      /* [controls][W] */
    uint64_t dispatch_landing; /* [lanes][V] */
    uint64_t combine_landing;  /* [N - 1][V], nodes ascending, own left out */
    uint64_t send;             /* [num_sends][V] */
    uint64_t home;             /* [V] */
    uint64_t staging;          /* [R][staging_rows] */
    uint64_t staging_weights;  /* [R][staging_rows][K] float */
    uint64_t bytes;
};

enum nep_kind {
    NEP_KIND_COUNTS = 0,
    NEP_KIND_DISPATCH = 1,        /* a tile of tokens */
    NEP_KIND_COMBINE = 2,         /* a tile of partial sums */
    NEP_KIND_DISPATCH_CREDIT = 3, /* number: tiles of the sender's dispatch stream that are free */
    NEP_KIND_COMBINE_CREDIT = 4,
    NEP_KIND_LEAVE = 5 /* op, number: the rank that the sender blames, 16 bits; it gave up */
};

/* Where the weights of a combine are: COUNTS say it, all ranks must mean the same. */
enum nep_combine_weights {
    NEP_WEIGHTS_HELD = 0, /* in the handle, or there are none */
    NEP_WEIGHTS_BACK = 1, /* rows come with K weights, which are summed like them */
    NEP_WEIGHTS_GIVEN =
        2, /* with each source, for its own tokens: rows are not weighed on the way */
};

/*
 * COUNTS: what one rank announces to one node (or, in combine, to one source) for one operation.
 * Behind it: uint32_t rows_per_rank[G], uint32_t rows_per_slot[G * L] (dispatch), then, where
 * `ride_rows` is not 0, that many nep_meta and rows, as in a tile.
 */
struct nep_counts_msg {
    uint64_t op;
    uint64_t map_digest; /* of the map this operation routes with */
    uint64_t tiles_end;  /* the stream's number after this operation's last tile */
    uint32_t source;
    uint32_t kind;   /* enum nep_kind: DISPATCH or COMBINE */
    uint32_t routed; /* the operation that routed the handle, or NEP_ROUTED_ANY */
    uint32_t layer;
    uint32_t num_tokens; /* T */
    uint32_t num_rows;   /* tokens of the source for this node; combine: rows coming back */
    uint32_t num_tiles;
    uint32_t ride_rows;
    uint32_t ride_offset; /* of the rows in this message */
    uint32_t bytes;       /* of the message */
    uint32_t has_weights; /* combine: enum nep_combine_weights */
    uint32_t reserved;
};

/*
 * A tile: this, then nep_meta[num_rows] (dispatch only), then rows at payload_offset, then
 * (combine, where weights come back) float[num_rows][K].
 */
struct nep_tile_msg {
    uint64_t op;
    uint64_t number;
    uint32_t source; /* dispatch: whose tokens; combine: who summed */
    uint32_t kind;
    uint32_t first_row; /* of the operation's rows of this stream */
    uint32_t num_rows;
    uint64_t reserved[4];
};

#endif
