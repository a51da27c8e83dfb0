/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The oracle: what dispatch and combine must yield, from routing and inputs alone. Written apart
 * from the library; of its headers it uses nearep.h for the structures that it compares, nothing
 * else. It knows the whole group at once, has no transport, and says for every row and every
 * element what it must be.
 *
 * A group holds the tokens of ONE operation of all ranks. Rows of x are made on demand by a
 * function, so that 64 ranks need not each hold the inputs of 64 ranks.
 *
 * Sums (docs/protocol.md, determinism): fp32 fmaf from +0, k ascending within a rank, ranks
 * ascending within a node, nodes ascending; rounded to the payload type after each level.
 */
#ifndef NEP_TESTS_REF_H
#define NEP_TESTS_REF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nearep.h"

#define NEP_REF_NONE UINT32_MAX

/* Writes row `token` of rank `rank`: hidden elements of the group's dtype. */
typedef void (*nep_ref_row_fn)(void *ctx, uint32_t rank, uint32_t token, void *row);

struct nep_ref_group {
    uint32_t num_ranks;
    uint32_t num_nodes;
    const uint32_t *node_of_rank; /* [num_ranks] */
    uint32_t slots_per_rank;
    uint32_t top_k;
    uint32_t hidden;
    uint32_t max_tokens;
    uint32_t expert_alignment; /* 0 or 1: none */
    enum nep_dtype dtype;      /* never DEFAULT here, nor the two below */
    enum nep_dtype wire;
    enum nep_layout layout;
    const uint32_t *num_tokens;   /* [num_ranks] */
    const uint32_t *const *slots; /* [num_ranks] -> [T][K] physical slots, NEP_REF_NONE = unused */
    const float *const *weights;  /* [num_ranks] -> [T][K]; NULL, or a NULL entry: all 1 */
    nep_ref_row_fn x_row;
    void *x_ctx;
    const float *factor; /* [num_ranks * slots_per_rank]: the stand-in expert multiplies by it */
};

/* ---- rows: what a rank must receive, in order ---- */

struct nep_ref_row {
    uint64_t idx; /* in the output */
    uint32_t source;
    uint32_t token;
    uint32_t k;    /* expert layouts: which of the token's choices; rank layout: unused */
    uint32_t slot; /* expert layouts: local slot */
};

struct nep_ref_rows {
    struct nep_ref_row *rows; /* [num_real_rows], ascending by idx */
    uint64_t num_rows;        /* expert layouts: where one more slot would start */
    uint64_t num_real_rows;
    uint32_t *rows_per_slot;   /* [L] */
    uint64_t *first_row;       /* [L], expert layouts */
    uint32_t *rows_per_source; /* [R] */
};

/* false: out of memory. */
bool nep_ref_rows_build(const struct nep_ref_group *group, uint32_t rank,
                        struct nep_ref_rows *rows);
void nep_ref_rows_free(struct nep_ref_rows *rows);

/* What this routing must put on the wire, and where load goes. Arrays are the caller's. */
struct nep_ref_traffic {
    uint64_t tokens;
    uint64_t tokens_local;    /* of them: every expert on the home node (none chosen counts too) */
    uint64_t remote_nodes;    /* (token, remote node): the floor, in rows one way */
    uint64_t remote_ranks;    /* (token, rank on a remote node) */
    uint64_t remote_pairs;    /* (token, expert on a remote node) */
    uint64_t *pairs_per_rank; /* [num_ranks] (token, expert) pairs that land there; or NULL */
};
/* Adds what tokens of rank `rank` cause. */
void nep_ref_traffic_add(const struct nep_ref_group *group, uint32_t rank,
                         struct nep_ref_traffic *traffic);

/* ---- checks ---- */

struct nep_ref_report {
    uint64_t wrong;    /* elements, and numbers beside them, that differ */
    uint64_t elements; /* compared */
    char first[256];   /* the first difference in words */
};

void nep_ref_check_counts(const struct nep_ref_group *group, const struct nep_ref_rows *want,
                          const struct nep_counts *got, struct nep_ref_report *report);
/* Every element of every row, and the optional arrays that are not NULL. */
void nep_ref_check_dispatch(const struct nep_ref_group *group, uint32_t rank,
                            const struct nep_ref_rows *want, const struct nep_rows *got,
                            struct nep_ref_report *report);
/* Both oracles over every element: the same tree bit for bit, and fp64 with a bound. */
void nep_ref_check_combine(const struct nep_ref_group *group, uint32_t rank, const void *y,
                           struct nep_ref_report *report);
/* The constant c of |error| <= c * sum |w x|. */
double nep_ref_bound(const struct nep_ref_group *group);

/* One token's combined output, [hidden] of dtype, by the same tree. scratch: see nep_ref_scratch.
 */
struct nep_ref_scratch;
struct nep_ref_scratch *nep_ref_scratch_create(uint32_t hidden);
void nep_ref_scratch_destroy(struct nep_ref_scratch *scratch);
void nep_ref_sum_tree(const struct nep_ref_group *group, uint32_t rank, uint32_t token,
                      struct nep_ref_scratch *scratch, void *y);
/* The same in fp64 without rounding: the value and sum |w x| per element, [hidden] each. */
void nep_ref_sum_exact(const struct nep_ref_group *group, uint32_t rank, uint32_t token,
                       struct nep_ref_scratch *scratch, double *y, double *magnitude);

/*
 * The stand-in expert on a dispatch's output, in place where y == x. counts and rows are what the
 * library said. Expert layouts: y = round(factor * x). Rank layout: the weighted sum of that over
 * the row's local slots, k ascending, fmaf from +0, rounded.
 */
bool nep_ref_expert_apply(const struct nep_ref_group *group, uint32_t rank,
                          const struct nep_counts *counts, const struct nep_rows *rows, void *y);

/*
 * The rules of placement/choose.h, stated by exhaustion instead of by the algorithm. NULL when
 * `slots` obey them, else which rule they break (static text). begin/slot: copies of each expert.
 */
struct nep_ref_copies {
    uint32_t num_ranks;
    uint32_t num_nodes;
    uint32_t slots_per_rank;
    const uint32_t *node_of_rank;
    const uint32_t *begin; /* [num_experts + 1] */
    const uint32_t *slot;
};
const char *nep_ref_choice_check(const struct nep_ref_copies *copies, uint32_t source,
                                 const int32_t *ids, uint32_t k, const uint32_t *slots);

/* ---- numbers: tests/ref/number.c ---- */

size_t nep_ref_dtype_bytes(enum nep_dtype dtype);
/* Bytes of one row on the wire or in the output of dispatch, scales apart. */
size_t nep_ref_wire_row_bytes(const struct nep_ref_group *group);
uint32_t nep_ref_num_scales(const struct nep_ref_group *group); /* 0 where the wire has none */
void nep_ref_row_load(enum nep_dtype dtype, const void *row, uint32_t num, float *out);
void nep_ref_row_store(enum nep_dtype dtype, const float *row, uint32_t num, void *out);
/* Rounds in place to what dtype can hold. */
void nep_ref_row_round(enum nep_dtype dtype, float *row, uint32_t num);
/* fp8 e4m3 with one scale per 128 channels. */
void nep_ref_fp8_quantise(const float *row, uint32_t num, uint8_t *out, float *scales);
void nep_ref_fp8_load(const uint8_t *row, const float *scales, uint32_t num, float *out);

/* ---- inputs: tests/ref/gen.c ---- */

struct nep_ref_rng {
    uint64_t state;
};
uint64_t nep_ref_rng_next(struct nep_ref_rng *rng);
double nep_ref_rng_unit(struct nep_ref_rng *rng);                /* [0, 1) */
uint32_t nep_ref_rng_below(struct nep_ref_rng *rng, uint32_t n); /* [0, n) */
uint64_t nep_ref_mix(uint64_t a, uint64_t b);

/* Values in [-1, 1), or, where wild, of any exponent that sums stay finite with, subnormals too. */
void nep_ref_gen_row(uint64_t key, bool wild, enum nep_dtype dtype, uint32_t hidden, void *row);
/* A factor that differs between experts. */
float nep_ref_expert_factor(uint32_t expert);

#endif
