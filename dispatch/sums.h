/* SPDX-License-Identifier: Apache-2.0 */
/* Sums in batches: terms are collected in order, then the rows are summed, by several threads if
 * there are. */
#ifndef NEP_DISPATCH_SUMS_H
#define NEP_DISPATCH_SUMS_H

#include "dispatch/host/kernels.h"
#include "dispatch/host/workers.h"
#include "dispatch/shape.h"

enum { NEP_SUM_BATCH = 32, NEP_MAX_TERMS = 2 * NEP_MAX_TOP_K + 2 };

/* The addends of one sum: rows, and the weights that come back with them. */
struct nep_terms {
    uint32_t num;
    struct nep_term rows[NEP_MAX_TERMS];
    const float *weights[NEP_MAX_TERMS]; /* NULL: none */
};

static inline void nep_terms_add(struct nep_terms *terms, const void *row, float weight,
                                 uint32_t ends, const float *weights)
{
    terms->rows[terms->num] = (struct nep_term){row, weight, ends};
    terms->weights[terms->num++] = weights;
}

struct nep_sum_job {
    struct nep_terms terms;
    void *to;
    float *weights; /* NULL: they do not come back */
};

struct nep_sum_batch {
    const struct nep_shape *shape;
    const struct nep_kernels *kernels;
    struct nep_workers *workers; /* NULL: the caller alone */
    bool is_final;               /* results that no core reads soon: past the caches */
    uint32_t num;
    struct nep_sum_job jobs[NEP_SUM_BATCH];
};

/* Sums all jobs of the batch and empties it; what it wrote is ordered before later stores. The
 * result does not depend on the number of threads.
 */
void nep_sum_batch_run(struct nep_sum_batch *batch);

#endif
