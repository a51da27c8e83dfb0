/* SPDX-License-Identifier: Apache-2.0 */
/* One chunk of work is one row: long enough to be worth handing over, and the same for any number
 * of threads. */
#include "dispatch/sums.h"

/* fp32, in the order of the rows' tree: ranks of a node, then nodes. */
static void sum_weights(const struct nep_sum_job *job, uint32_t top_k)
{
    const struct nep_terms *terms = &job->terms;
    for (uint32_t k = 0; k < top_k; k++) {
        float home = 0.0f, node = 0.0f;
        for (uint32_t i = 0; i < terms->num; i++) {
            node += terms->weights[i] != NULL ? terms->weights[i][k] : 0.0f;
            if ((terms->rows[i].ends & NEP_ENDS_NODE) != 0 || i + 1 == terms->num) {
                home += node;
                node = 0.0f;
            }
        }
        job->weights[k] = home;
    }
}

static void sum_one(void *ctx, uint32_t idx)
{
    const struct nep_sum_batch *batch = ctx;
    const struct nep_sum_job *job = &batch->jobs[idx];
    const nep_sum_fn *sums = batch->is_final ? batch->kernels->sum_final : batch->kernels->sum;
    sums[batch->shape->dtype - NEP_DTYPE_BF16](job->to, job->terms.rows, job->terms.num,
                                               batch->shape->hidden);
    if (batch->is_final) {
        batch->kernels->fence(); /* this thread's stores, before the batch is said to be done */
    }
    if (job->weights != NULL) {
        sum_weights(job, batch->shape->top_k);
    }
}

void nep_sum_batch_run(struct nep_sum_batch *batch)
{
    nep_workers_run(batch->workers, sum_one, batch, batch->num);
    batch->num = 0;
}
