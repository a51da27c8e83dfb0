/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Combine runs a dispatch backwards. For each source of another node, the rank where its tokens
 * landed sums this node's rows and sends one row per token; each rank sums its own node's rows of
 * its tokens together with what the other nodes sent, nodes ascending. All sums run through one
 * kernel, so the bits do not depend on who summed what, or on whether a row was staged.
 */
#include "dispatch/combine.h"

#include <string.h>

#include "dispatch/counts.h"
#include "dispatch/pack.h"
#include "dispatch/positions.h"
#include "dispatch/wait.h"

/* Where the weights of row `row` of a tile of sums lie. */
static float *tile_weights(const struct nep_ep *ep, const void *tile, uint32_t num_rows,
                           uint32_t row)
{
    uint64_t rows = nep_tile_payload_offset(&ep->shape, NEP_KIND_COMBINE, 0) +
                    (uint64_t)num_rows * ep->shape.row_bytes;
    return (float *)((uint8_t *)tile + rows) + (uint64_t)row * ep->shape.top_k;
}

/* ---- for other nodes ------------------------------------------------------------------------ */

static uint64_t lane_of(const struct nep_ep *ep, uint32_t source)
{
    return nep_plan_lane(&ep->plan, source, ep->node);
}

static enum nep_status post_sums(struct nep_ep *ep, const struct nep_handle *handle,
                                 uint32_t source, uint8_t *slot)
{
    struct nep_flow *flow = &ep->combine_flows[lane_of(ep, source)];
    struct nep_tile_msg msg = {
        .op = handle->op.number,
        .number = flow->next,
        .source = ep->rank,
        .kind = NEP_KIND_COMBINE,
        .first_row = handle->rows_sent[lane_of(ep, source)] - flow->open_rows,
        .num_rows = flow->open_rows,
    };
    memcpy(slot, &msg, sizeof msg);
    uint32_t far = ep->plan.topology->node_of_rank[source];
    const struct nep_region *there = &ep->plan.regions[source];
    uint32_t num_slots = ep->shape.tile_slots;
    uint64_t idx = (uint64_t)nep_plan_skip(far, ep->node) * num_slots + flow->next % num_slots;
    uint64_t row_bytes = ep->shape.row_bytes;
    if (handle->op.rows.topk_weights != NULL) {
        row_bytes += ep->shape.weights_bytes;
    }
    uint64_t bytes = nep_tile_payload_offset(&ep->shape, NEP_KIND_COMBINE, flow->open_rows) +
                     flow->open_rows * row_bytes;
    uint32_t imm =
        nep_imm(ep->head->generation, NEP_KIND_COMBINE, ep->number, handle->op.number, flow->next);
    ep->stats.remote_rows_back += flow->open_rows;
    flow->is_open = false;
    flow->next++;
    /* Before the put: a credit for this tile must find it sent. */
    nep_word_set(ep->head, ep->region->combine_sent, lane_of(ep, source), flow->next);
    return nep_send_post(ep, flow->ring, source,
                         there->combine_landing + idx * there->combine_tile_bytes, bytes, imm);
}

/* Opens the next tile for a source if a credit and a send slot are there. */
static bool open_tile(struct nep_ep *ep, uint32_t source, uint32_t total, uint32_t sent)
{
    struct nep_flow *flow = &ep->combine_flows[lane_of(ep, source)];
    uint64_t credit = nep_word_get(ep->head, ep->region->combine_credit, lane_of(ep, source));
    if (!nep_flow_may_send(flow, credit, ep->shape.tile_slots)) {
        nep_ep_miss(ep, "credit", source, total, sent);
        return false;
    }
    if (nep_send_slot(ep, flow->ring) == NULL) {
        nep_ep_miss(ep, "local completion", source, total, sent);
        return false;
    }
    flow->is_open = true;
    flow->open_rows = 0;
    return true;
}

/* Collects rows for the open tile as far as they are there, and sums them. */
static void fill_tile(struct nep_ep *ep, struct nep_handle *handle, uint32_t source,
                      uint32_t in_tile, uint8_t *slot)
{
    uint32_t lane = (uint32_t)lane_of(ep, source);
    struct nep_flow *flow = &ep->combine_flows[lane];
    struct nep_sum_batch *batch = ep->batch;
    uint8_t *rows = slot + nep_tile_payload_offset(&ep->shape, NEP_KIND_COMBINE, 0);
    while (batch->num < NEP_SUM_BATCH && flow->open_rows < in_tile) {
        struct nep_sum_job *job = &batch->jobs[batch->num];
        job->terms.num = 0;
        if (!nep_stage_terms(ep, handle, 1 + lane, source, handle->rows_sent[lane], &job->terms)) {
            break;
        }
        job->to = rows + (uint64_t)flow->open_rows * ep->shape.row_bytes;
        job->weights = handle->op.rows.topk_weights != NULL
                           ? tile_weights(ep, slot, in_tile, flow->open_rows)
                           : NULL;
        batch->num++;
        flow->open_rows++;
        handle->rows_sent[lane]++;
    }
    batch->is_final = false; /* the fabric reads the tile next */
    nep_sum_batch_run(batch);
    nep_stage_release(ep, 1 + lane);
}

/* Works on one tile for a source: sums what is there, and posts it when it is full. */
static enum nep_status sum_for(struct nep_ep *ep, struct nep_handle *handle, uint32_t source,
                               bool *progress_p)
{
    struct nep_flow *flow = &ep->combine_flows[lane_of(ep, source)];
    const uint32_t *sent = &handle->rows_sent[lane_of(ep, source)];
    uint32_t total = handle->consumers[1 + lane_of(ep, source)].num_rows;
    enum nep_status status = NEP_OK;
    bool is_posted = false;
    while (!is_posted && *sent < total) {
        uint32_t before = *sent;
        if (!flow->is_open && !open_tile(ep, source, total, *sent)) {
            break;
        }
        uint8_t *slot = nep_send_slot(ep, flow->ring);
        uint32_t left = total - (*sent - flow->open_rows);
        uint32_t in_tile = left < ep->shape.tile_rows ? left : ep->shape.tile_rows;
        fill_tile(ep, handle, source, in_tile, slot);
        if (*sent == before) {
            break;
        }
        if (flow->open_rows == in_tile) {
            status = post_sums(ep, handle, source, slot);
            is_posted = true;
        }
        *progress_p = true;
    }
    if (*sent < total) {
        handle->op.is_sent = false;
    }
    return status;
}

/*
 * A tile for each source in turn, since home sums a token when the rows of all nodes are there: a
 * stream that ran ahead would fill its slots and wait for the others.
 */
static enum nep_status sum_for_all(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p)
{
    uint32_t num_ranks = ep->plan.topology->num_ranks;
    enum nep_status status = NEP_OK;
    bool is_staged = handle->op.is_sent;
    bool is_moving = true;
    while (status == NEP_OK && is_moving) {
        is_moving = false;
        handle->op.is_sent = is_staged;
        for (uint32_t i = 0; status == NEP_OK && i < num_ranks; i++) {
            uint32_t s = (ep->rank + i) % num_ranks;
            if (s != ep->rank && nep_consumer_idx(ep, ep->rank, s) != UINT32_MAX) {
                status = sum_for(ep, handle, s, &is_moving);
            }
        }
        *progress_p |= is_moving;
        if (is_moving) {
            nep_send_turn(ep);
        }
    }
    return status;
}

/* ---- own tokens ----------------------------------------------------------------------------- */

/* Checks the tile that holds the next row of sums from a node; its rows, or NULL while not here. */
static enum nep_status find_sums(struct nep_ep *ep, const struct nep_handle *handle, uint32_t node,
                                 const uint8_t **row_p, const float **weights_p,
                                 struct nep_tile_msg *msg)
{
    uint64_t number = ep->combine_in[node].next;
    uint64_t slot = number % ep->shape.tile_slots;
    uint32_t far = nep_plan_landing(&ep->plan, ep->rank, node);
    *row_p = NULL;
    /* Acquire: pairs with the release in raise() of the sink. */
    if (nep_word_get(ep->head, ep->region->combine_word, node * ep->shape.tile_slots + slot) !=
        number + 1) {
        nep_ep_miss(ep, "sums", far, handle->node_begin[node + 1] - handle->node_begin[node],
                    handle->rows_read[node]);
        return NEP_OK;
    }
    uint64_t idx = (uint64_t)nep_plan_skip(ep->node, node) * ep->shape.tile_slots + slot;
    const uint8_t *tile =
        (uint8_t *)ep->head + ep->region->combine_landing + idx * ep->region->combine_tile_bytes;
    memcpy(msg, tile, sizeof *msg);
    uint32_t row = handle->rows_read[node] - msg->first_row;
    if (msg->op != handle->op.number || msg->number != number || msg->source != far ||
        msg->num_rows > ep->shape.tile_rows || row >= msg->num_rows) {
        struct nep_fault fault = {.size = sizeof fault,
                                  .status = NEP_ERR_FORMAT,
                                  .rank = far,
                                  .op = handle->op.number,
                                  .phase = "sums"};
        snprintf(fault.message, sizeof fault.message,
                 "tile %llu of sums of rank %u holds something else (operation %llu, tile %llu of "
                 "rank %u)",
                 (unsigned long long)number, nep_ep_name(ep, far), (unsigned long long)msg->op,
                 (unsigned long long)msg->number, nep_ep_name(ep, msg->source));
        return nep_break(ep, &fault);
    }
    *row_p = tile + nep_tile_payload_offset(&ep->shape, NEP_KIND_COMBINE, 0) +
             (uint64_t)row * ep->shape.row_bytes;
    *weights_p =
        handle->op.rows.topk_weights != NULL ? tile_weights(ep, tile, msg->num_rows, row) : NULL;
    return NEP_OK;
}

/* A row of sums is in the batch: on to the next one. Its tile is freed when the batch has been
 * summed. */
static void next_sums(struct nep_ep *ep, struct nep_handle *handle, uint32_t node,
                      const struct nep_tile_msg *msg)
{
    handle->rows_read[node]++;
    if (handle->rows_read[node] == msg->first_row + msg->num_rows) {
        ep->combine_in[node].next++;
    }
}

/* All rows of the batch have been read: frees what they came from. */
static void release_sums(struct nep_ep *ep)
{
    nep_stage_release(ep, 0);
    for (uint32_t n = 0; n < ep->plan.topology->num_nodes; n++) {
        /* Release: these tiles have been read; the sink's window moves on. */
        nep_word_set(ep->head, ep->region->combine_read, n, ep->combine_in[n].next);
    }
}

/* Whether `token` is the next one of the node's list. */
static bool goes_to(const struct nep_handle *handle, uint32_t node, uint32_t row, uint32_t token)
{
    uint32_t at = handle->node_begin[node] + row;
    return at < handle->node_begin[node + 1] && handle->node_tokens[at] == token;
}

/* The parts of one token that other nodes sent. */
struct far_rows {
    uint32_t num;
    uint32_t nodes[NEP_MAX_TOP_K];
    const uint8_t *rows[NEP_MAX_TOP_K];
    const float *weights[NEP_MAX_TOP_K];
    struct nep_tile_msg msgs[NEP_MAX_TOP_K];
};

/* *ready_p false while one is missing. */
static enum nep_status find_far(struct nep_ep *ep, struct nep_handle *handle, uint32_t token,
                                struct far_rows *far, bool *ready_p)
{
    far->num = 0;
    *ready_p = false;
    for (uint32_t n = 0; n < ep->plan.topology->num_nodes; n++) {
        if (n == ep->node || !goes_to(handle, n, handle->rows_read[n], token)) {
            continue;
        }
        uint32_t i = far->num++;
        far->nodes[i] = n;
        far->weights[i] = NULL;
        enum nep_status status =
            find_sums(ep, handle, n, &far->rows[i], &far->weights[i], &far->msgs[i]);
        if (status != NEP_OK || far->rows[i] == NULL) {
            return status;
        }
    }
    *ready_p = true;
    return NEP_OK;
}

/* Adds one own token to the batch: bias, then nodes ascending. *ready_p false while a part is
 * missing. */
static enum nep_status collect_token(struct nep_ep *ep, struct nep_handle *handle, uint32_t token,
                                     struct nep_sum_job *job, bool *ready_p)
{
    uint32_t both = NEP_ENDS_RANK | NEP_ENDS_NODE;
    struct nep_terms *terms = &job->terms;
    struct far_rows far;
    enum nep_status status = find_far(ep, handle, token, &far, ready_p);
    if (status != NEP_OK || !*ready_p) {
        return status;
    }
    terms->num = 0;
    for (uint32_t i = 0; i < 2; i++) {
        const uint8_t *bias = handle->op.sum.bias[i];
        if (bias != NULL) {
            nep_terms_add(terms, bias + (uint64_t)token * ep->shape.row_bytes, 1.0f, both, NULL);
        }
    }
    bool has_home = goes_to(handle, ep->node, handle->rows_read[ep->node], token);
    uint32_t i = 0;
    for (; i < far.num && far.nodes[i] < ep->node; i++) {
        nep_terms_add(terms, far.rows[i], 1.0f, both, far.weights[i]);
    }
    if (has_home) {
        if (!nep_stage_terms(ep, handle, 0, ep->rank, handle->rows_read[ep->node], terms)) {
            *ready_p = false;
            return NEP_OK;
        }
        terms->rows[terms->num - 1].ends = both;
        handle->rows_read[ep->node]++;
    }
    for (; i < far.num; i++) {
        nep_terms_add(terms, far.rows[i], 1.0f, both, far.weights[i]);
    }
    for (i = 0; i < far.num; i++) {
        next_sums(ep, handle, far.nodes[i], &far.msgs[i]);
    }
    float *weights = handle->op.sum.topk_weights;
    job->to = (uint8_t *)handle->op.sum.y + (uint64_t)token * ep->shape.row_bytes;
    job->weights = weights != NULL ? weights + (uint64_t)token * ep->shape.top_k : NULL;
    return NEP_OK;
}

static enum nep_status sum_own(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p)
{
    struct nep_sum_batch *batch = ep->batch;
    enum nep_status status = NEP_OK;
    bool is_ready = true;
    while (status == NEP_OK && is_ready && handle->op.home_row < handle->num_tokens) {
        while (status == NEP_OK && is_ready && batch->num < NEP_SUM_BATCH &&
               handle->op.home_row < handle->num_tokens) {
            status =
                collect_token(ep, handle, handle->op.home_row, &batch->jobs[batch->num], &is_ready);
            if (status == NEP_OK && is_ready) {
                batch->num++;
                handle->op.home_row++;
            }
        }
        *progress_p |= batch->num != 0;
        batch->is_final = true;
        nep_sum_batch_run(batch);
        release_sums(ep);
    }
    return status;
}

/* ---- the whole ------------------------------------------------------------------------------ */

/* Tells the ranks that sum for this one which tiles are free (recv.c has the rule). */
static enum nep_status give_credits(struct nep_ep *ep, const struct nep_handle *handle,
                                    bool *progress_p)
{
    enum nep_status status = NEP_OK;
    for (uint32_t n = 0; status == NEP_OK && n < ep->plan.topology->num_nodes; n++) {
        struct nep_inflow *inflow = &ep->combine_in[n];
        if (n == ep->node || !nep_inflow_needs_credit(inflow, ep->shape.tile_slots) ||
            inflow->next <= inflow->announced) {
            continue;
        }
        uint32_t far = nep_plan_landing(&ep->plan, ep->rank, n);
        if (!nep_inflow_may_credit(ep, inflow, far, inflow->next)) {
            nep_ep_miss(ep, "local completion", far, 1, 0);
            continue;
        }
        struct nep_put put = {
            .dst = far,
            .window = ep->number,
            .is_apart = true,
            .imm = nep_imm(ep->head->generation, NEP_KIND_COMBINE_CREDIT, ep->number,
                           handle->op.number, inflow->next),
        };
        status = nep_inflow_credit(ep, inflow, &put, inflow->next);
        *progress_p = true;
    }
    return status;
}

/* Other ranks of the node have read all that this one lends. */
static bool is_lending_over(struct nep_ep *ep, const struct nep_handle *handle)
{
    for (uint32_t g = 0; g < ep->node_size; g++) {
        uint32_t rank = nep_ep_rank_at(ep, g);
        struct nep_region_head *head = (struct nep_region_head *)ep->window[rank];
        /* Acquire: pairs with the release in say_read_done of that rank. */
        if (atomic_load_explicit(&head->read_done, memory_order_acquire) < handle->op.number + 1) {
            nep_ep_miss(ep, "reading of expert outputs", rank, ep->node_size, g);
            return false;
        }
    }
    return true;
}

static bool needs_credits(struct nep_ep *ep)
{
    for (uint32_t n = 0; n < ep->plan.topology->num_nodes; n++) {
        if (n != ep->node && !nep_inflow_is_settled(ep, &ep->combine_in[n],
                                                    nep_plan_landing(&ep->plan, ep->rank, n))) {
            return true;
        }
    }
    return false;
}

enum nep_status nep_combine_step(struct nep_ep *ep, struct nep_handle *handle, bool *progress_p,
                                 bool *done_p)
{
    struct nep_op *op = &handle->op;
    bool is_counted = false;
    enum nep_status status = nep_counts_take(ep, handle, &is_counted);
    if (status != NEP_OK) {
        return status;
    }
    bool was_sent = op->is_sent;
    op->is_sent = true; /* until a part says that something is left */
    if (!was_sent) {
        nep_stage_fill(ep, handle, progress_p);
    }
    if (!nep_stage_find_lent(ep, handle)) {
        op->is_sent = was_sent;
        return NEP_OK;
    }
    if (!was_sent) {
        status = sum_for_all(ep, handle, progress_p);
    }
    if (status == NEP_OK && op->is_receiving) {
        status = sum_own(ep, handle, progress_p);
    }
    if (status == NEP_OK && is_counted && ep->comm->inter != NULL) {
        status = give_credits(ep, handle, progress_p);
    }
    bool is_summed = op->is_receiving && op->home_row == handle->num_tokens;
    if (status == NEP_OK && op->is_sent && is_summed && !op->is_read_done) {
        /* Release: all reads of others' rows are done; pairs with is_lending_over there. */
        atomic_store_explicit(&ep->head->read_done, op->number + 1, memory_order_release);
        op->is_read_done = true;
        *progress_p = true;
    }
    *done_p = status == NEP_OK && is_counted && op->is_read_done && !needs_credits(ep) &&
              is_lending_over(ep, handle);
    return status;
}
