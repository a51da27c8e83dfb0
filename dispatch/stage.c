/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How the rows of a node reach the rank that sums them: read in place where the outputs lie in
 * mapped memory, else through a ring of staged rows per (holder, source). A holder stages one row
 * per token, its experts' rows summed, or, where the consumer alone has the weights
 * (NEP_WEIGHTS_GIVEN), the rows themselves; a consumer takes them in the same order, so two
 * counters are the whole protocol.
 */
#include "dispatch/combine.h"

#include <string.h>

#include "dispatch/positions.h"

void nep_combine_bind(struct nep_ep *ep, struct nep_handle *handle)
{
    const void *y = handle->op.rows.y;
    const float *weights = handle->op.rows.topk_weights;
    struct nep_place rows = {0}, extra = {0};
    bool is_mapped =
        nep_buffers_find(ep, y, handle->num_rows * ep->shape.row_bytes, &rows) &&
        (weights == NULL ||
         nep_buffers_find(ep, weights, handle->num_rows * ep->shape.weights_bytes, &extra));
    struct nep_bind *bind = (struct nep_bind *)((uint8_t *)ep->head + ep->region->y_bind) +
                            handle->op.number % ep->shape.window;
    bind->mode = is_mapped ? NEP_BIND_MAPPED : NEP_BIND_PRIVATE;
    bind->rows = rows;
    bind->extra = extra;
    handle->op.out_is_mapped = is_mapped;
    handle->op.is_bound = true;
    /* Release: pairs with the acquire in nep_stage_find_lent; the caller's rows are complete. */
    atomic_store_explicit(&bind->word, handle->op.number + 1, memory_order_release);
}

bool nep_stage_find_lent(struct nep_ep *ep, const struct nep_handle *handle)
{
    uint64_t op = handle->op.number;
    for (uint32_t g = 0; g < ep->node_size; g++) {
        uint32_t rank = nep_ep_rank_at(ep, g);
        struct nep_bind *bind =
            (struct nep_bind *)(ep->window[rank] + ep->plan.regions[rank].y_bind) +
            op % ep->shape.window;
        if (atomic_load_explicit(&bind->word, memory_order_acquire) != op + 1) {
            nep_ep_miss(ep, "expert outputs", rank, ep->node_size, g);
            return false;
        }
        bool has_weights = handle->op.rows.topk_weights != NULL;
        struct nep_lent *lent = &ep->lent[g];
        *lent = (struct nep_lent){NULL, NULL};
        if (g == ep->local) {
            *lent = (struct nep_lent){handle->op.rows.y, handle->op.rows.topk_weights};
        } else if (bind->mode == NEP_BIND_MAPPED) {
            *lent = (struct nep_lent){
                nep_buffers_at(ep, g, bind->rows),
                has_weights ? (const float *)nep_buffers_at(ep, g, bind->extra) : NULL,
            };
        }
    }
    return true;
}

/* The ring of rows that local rank `local` stages for `source`. */
static uint8_t *staged_row(const struct nep_ep *ep, uint32_t rank, uint32_t source, uint64_t number)
{
    const struct nep_region *region = &ep->plan.regions[rank];
    uint64_t row = (uint64_t)source * region->staging_rows + number % region->staging_rows;
    return ep->window[rank] + region->staging + row * ep->shape.row_bytes;
}

/* The weights that go with a staged row. */
static float *staged_weights(const struct nep_ep *ep, uint32_t rank, uint32_t source,
                             uint64_t number)
{
    const struct nep_region *region = &ep->plan.regions[rank];
    uint64_t row = (uint64_t)source * region->staging_rows + number % region->staging_rows;
    return (float *)(ep->window[rank] + region->staging_weights) + row * ep->shape.top_k;
}

/* Whether rows are staged as they are, to be weighed by who sums. */
static bool is_raw(const struct nep_handle *handle)
{
    return nep_op_weights(&handle->op) == NEP_WEIGHTS_GIVEN;
}

/* Rows that this rank stages for a source. */
static uint32_t num_staged(const struct nep_handle *handle, uint32_t source)
{
    const struct nep_producer *producer = &handle->producers[source];
    return is_raw(handle) ? producer->begin[producer->num_rows] : producer->num_rows;
}

/*
 * Row i of what this rank holds of a source, summed over its experts. Stored past the caches: the
 * row's lines were last read by another core, and taking them back one by one costs more than
 * memory does (combine of 4 x 1024 tokens: 31 against 13 ms in the rank layout).
 */
static void stage_row(const struct nep_ep *ep, const struct nep_handle *handle, uint32_t source,
                      uint32_t i, uint64_t number)
{
    uint8_t *to = staged_row(ep, ep->rank, source, number);
    const struct nep_producer *producer = &handle->producers[source];
    const uint8_t *y = handle->op.rows.y;
    uint64_t row_bytes = ep->shape.row_bytes;
    if (is_raw(handle)) {
        ep->kernels->copy(to, y + producer->pos[i] * row_bytes, row_bytes);
        ep->kernels->fence();
        return;
    }
    if (producer->begin == NULL) {
        uint64_t row = (uint64_t)producer->first + i;
        ep->kernels->copy(to, y + row * row_bytes, row_bytes);
        ep->kernels->fence();
        if (handle->op.rows.topk_weights != NULL) {
            memcpy(staged_weights(ep, ep->rank, source, number),
                   handle->op.rows.topk_weights + row * ep->shape.top_k, ep->shape.weights_bytes);
        }
        return;
    }
    struct nep_term terms[NEP_MAX_TOP_K];
    uint32_t begin = producer->begin[i];
    uint32_t num = producer->begin[i + 1] - begin;
    for (uint32_t k = 0; k < num; k++) {
        terms[k] = (struct nep_term){y + producer->pos[begin + k] * row_bytes,
                                     producer->weight[begin + k], 0};
    }
    ep->kernels->sum_final[ep->shape.dtype - NEP_DTYPE_BF16](to, terms, num, ep->shape.hidden);
    ep->kernels->fence();
}

static void stage_source(struct nep_ep *ep, struct nep_handle *handle, uint32_t source,
                         bool *progress_p)
{
    uint32_t taker = ep->counts_at[source].rank; /* on this node, who sums for source */
    uint32_t idx = nep_consumer_idx(ep, taker, source);
    uint32_t total = num_staged(handle, source);
    uint32_t cap = ep->region->staging_rows;
    while (handle->rows_staged[source] < total) {
        /* Acquire: pairs with the release in nep_stage_release. */
        uint64_t taken = nep_word_get(ep->window[taker], ep->plan.regions[taker].taken,
                                      (uint64_t)idx * ep->node_size + ep->local);
        if (ep->staged[source] >= taken + cap) {
            nep_ep_miss(ep, "taking of staged rows", taker, total, handle->rows_staged[source]);
            handle->op.is_sent = false;
            return;
        }
        stage_row(ep, handle, source, handle->rows_staged[source], ep->staged[source]);
        handle->rows_staged[source]++;
        ep->staged[source]++;
        ep->stats.intra_bytes += ep->shape.row_bytes;
        /* Release: pairs with the acquire in nep_stage_terms. */
        nep_word_set(ep->head, ep->region->staged, source, ep->staged[source]);
        *progress_p = true;
    }
}

void nep_stage_fill(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p)
{
    if (handle->op.out_is_mapped) {
        return;
    }
    uint32_t num_ranks = ep->plan.topology->num_ranks;
    for (uint32_t i = 0; i < num_ranks; i++) {
        uint32_t s = (ep->rank + i) % num_ranks; /* holders begin at different sources */
        if (ep->counts_at[s].rank != ep->rank) {
            stage_source(ep, handle, s, progress_p);
        }
    }
}

/* Whether all staged rows that a token needs are there. */
static bool is_staged(struct nep_ep *ep, const struct nep_handle *handle, uint32_t idx,
                      uint32_t source, uint32_t row)
{
    const struct nep_consumer *consumer = &handle->consumers[idx];
    uint32_t needed = 0; /* of the rank at hand */
    for (uint32_t a = consumer->begin[row]; a < consumer->begin[row + 1]; a++) {
        const struct nep_addend *addend = &consumer->addends[a];
        needed = is_raw(handle) ? needed + 1 : 1;
        if (!addend->is_last) {
            continue;
        }
        uint32_t rows = needed;
        needed = 0;
        if (ep->lent[addend->local].base != NULL) {
            continue;
        }
        uint32_t rank = nep_ep_rank_at(ep, addend->local);
        /* Acquire: pairs with the release in stage_source. */
        uint64_t there = nep_word_get(ep->window[rank], ep->plan.regions[rank].staged, source);
        if (there < ep->taken[(uint64_t)idx * ep->node_size + addend->local] + rows) {
            nep_ep_miss(ep, "staged rows", rank, consumer->num_rows, row);
            return false;
        }
    }
    return true;
}

bool nep_stage_terms(struct nep_ep *ep, const struct nep_handle *handle, uint32_t idx,
                     uint32_t source, uint32_t row, struct nep_terms *terms)
{
    const struct nep_consumer *consumer = &handle->consumers[idx];
    bool has_weights = handle->op.rows.topk_weights != NULL;
    const float *given = handle->op.rows.token_weights;
    if (given != NULL) { /* one node: the stream of the own tokens */
        uint32_t token = handle->node_tokens[handle->node_begin[ep->node] + row];
        given += (uint64_t)token * ep->shape.top_k;
    }
    if (!is_staged(ep, handle, idx, source, row)) {
        return false;
    }
    for (uint32_t a = consumer->begin[row]; a < consumer->begin[row + 1]; a++) {
        const struct nep_addend *addend = &consumer->addends[a];
        const struct nep_lent *lent = &ep->lent[addend->local];
        float weight = given != NULL ? given[addend->k] : addend->weight;
        uint32_t ends = addend->is_last ? NEP_ENDS_RANK : 0;
        if (lent->base != NULL) {
            const uint8_t *at = lent->base + (uint64_t)addend->pos * ep->shape.row_bytes;
            nep_terms_add(terms, at, weight, ends,
                          has_weights ? lent->weights + (uint64_t)addend->pos * ep->shape.top_k
                                      : NULL);
        } else if (addend->is_last || given != NULL) {
            uint32_t rank = nep_ep_rank_at(ep, addend->local);
            uint64_t taken = ep->taken[(uint64_t)idx * ep->node_size + addend->local]++;
            nep_terms_add(terms, staged_row(ep, rank, source, taken), given != NULL ? weight : 1.0f,
                          given != NULL ? ends : NEP_ENDS_RANK,
                          has_weights ? staged_weights(ep, rank, source, taken) : NULL);
        }
    }
    return true;
}

void nep_stage_release(struct nep_ep *ep, uint32_t idx)
{
    for (uint32_t g = 0; g < ep->node_size; g++) {
        uint64_t at = (uint64_t)idx * ep->node_size + g;
        if (ep->lent[g].base == NULL) {
            /* Release: the rows have been read; pairs with the acquire in stage_source. */
            nep_word_set(ep->head, ep->region->taken, at, ep->taken[at]);
        }
    }
}
