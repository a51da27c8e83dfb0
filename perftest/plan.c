/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every number is a function of (seed, rank, batch), so that the oracle on one rank can say what
 * any other rank sent. Kept apart: drawing (uniform, zipf, incast), the trace's schedule
 * (placement/schedule.h, shared with nep-place, so that what it predicts is what is sent here), and
 * the choice of copies, which is the library's own function; the rules that its answer must obey
 * are stated again in tests/ref.
 */
#include "perftest/plan.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "perftest/perf.h"
#include "perftest/trace_routing.h"

struct nep_perf_plan {
    const struct nep_perf_options *options;
    struct nep_topology topology;
    struct nep_map *map;
    struct nep_perf_trace *trace;
    uint32_t map_layers;
    uint32_t slots_per_rank;
    double *cumulative; /* zipf: [E] */
    uint64_t num_batches;
    uint64_t num_routings; /* drawn ones repeat after so many batches; rows never do */
    /* the group at hand */
    struct nep_ref_group group;
    uint64_t batch;
    uint32_t *num_tokens;
    int32_t *ids; /* of the rank at hand, [T][K] */
    uint32_t **slots;
    float **weights;
    float *factor;
    const uint8_t *is_live; /* [R], NULL: all */
};

static void group_row(void *ctx, uint32_t rank, uint32_t token, void *row)
{
    const struct nep_perf_plan *plan = ctx;
    nep_perf_plan_row(plan, rank, plan->batch, token, row);
}

static int load_map(struct nep_perf_plan *plan)
{
    const struct nep_perf_options *options = plan->options;
    uint32_t ranks = plan->topology.num_ranks;
    plan->slots_per_rank = (options->experts + ranks - 1) / ranks;
    if (options->map == NULL) {
        plan->map_layers = 1;
        return -1;
    }
    enum nep_status status = nep_map_load(options->map, &plan->map);
    if (status != NEP_OK) {
        return nep_perf_error(NEP_PERF_USAGE, "--map %s: %s", options->map, nep_last_message());
    }
    struct nep_map_shape shape = {.size = sizeof(shape)};
    status = nep_map_get_shape(plan->map, &shape);
    if (status != NEP_OK) {
        return nep_perf_error(NEP_PERF_USAGE, "--map %s: %s", options->map, nep_last_message());
    }
    uint32_t layers = nep_perf_plan_num_layers(plan);
    bool fits_layers = shape.num_layers == 1 || shape.num_layers == layers ||
                       options->routing_kind != NEP_PERF_TRACE;
    if (shape.num_experts != options->experts || shape.num_ranks != ranks ||
        shape.num_nodes != plan->topology.num_nodes || !fits_layers) {
        return nep_perf_error(NEP_PERF_USAGE,
                              "--map %s is for %u layers, %u experts, %u ranks on %u nodes; this "
                              "run has %u, %u, %u on %u",
                              options->map, shape.num_layers, shape.num_experts, shape.num_ranks,
                              shape.num_nodes, layers, options->experts, ranks,
                              plan->topology.num_nodes);
    }
    plan->slots_per_rank = shape.slots_per_rank;
    plan->map_layers = shape.num_layers;
    return -1;
}

/* So many routings that looking at all of them stays a matter of a moment, however long the run. */
static uint64_t most_routings(const struct nep_perf_plan *plan)
{
    uint64_t pairs =
        (uint64_t)plan->topology.num_ranks * plan->options->tokens * plan->options->top_k;
    uint64_t most = (1u << 22) / (pairs + 1);
    return most < 8 ? 8 : most > 512 ? 512 : most;
}

static int prepare_draws(struct nep_perf_plan *plan)
{
    uint32_t experts = plan->options->experts;
    plan->cumulative = calloc(experts, sizeof(double));
    if (plan->cumulative == NULL) {
        return nep_perf_error(NEP_PERF_FAILED, "out of memory");
    }
    double sum = 0.0;
    for (uint32_t e = 0; e < experts; e++) {
        sum += pow(e + 1, -plan->options->zipf);
        plan->cumulative[e] = sum;
    }
    return -1;
}

/* Everything of the oracle's group but the batch. */
static int prepare_group(struct nep_perf_plan *plan)
{
    const struct nep_perf_options *options = plan->options;
    uint32_t ranks = plan->topology.num_ranks;
    size_t pairs = (size_t)options->tokens * options->top_k;
    plan->num_tokens = calloc(ranks, sizeof(uint32_t));
    plan->slots = calloc(ranks, sizeof(uint32_t *));
    plan->weights = calloc(ranks, sizeof(float *));
    plan->factor = calloc((size_t)ranks * plan->slots_per_rank, sizeof(float));
    plan->ids = calloc(pairs + 1, sizeof(int32_t));
    bool is_complete = plan->num_tokens != NULL && plan->slots != NULL && plan->weights != NULL &&
                       plan->factor != NULL && plan->ids != NULL;
    for (uint32_t r = 0; r < ranks && is_complete; r++) {
        plan->slots[r] = calloc(pairs + 1, sizeof(uint32_t));
        plan->weights[r] = calloc(pairs + 1, sizeof(float));
        is_complete = plan->slots[r] != NULL && plan->weights[r] != NULL;
    }
    if (!is_complete) {
        return nep_perf_error(NEP_PERF_FAILED, "out of memory");
    }
    plan->group = (struct nep_ref_group){.num_ranks = ranks,
                                         .num_nodes = plan->topology.num_nodes,
                                         .node_of_rank = plan->topology.node_of_rank,
                                         .slots_per_rank = plan->slots_per_rank,
                                         .top_k = options->top_k,
                                         .hidden = options->hidden,
                                         .max_tokens = options->tokens > 0 ? options->tokens : 1,
                                         .expert_alignment = options->alignment,
                                         .dtype = options->dtype,
                                         .wire = options->wire,
                                         .layout = options->layout,
                                         .num_tokens = plan->num_tokens,
                                         .slots = (const uint32_t *const *)plan->slots,
                                         .weights = (const float *const *)plan->weights,
                                         .x_row = group_row,
                                         .x_ctx = plan,
                                         .factor = plan->factor};
    return -1;
}

int nep_perf_plan_create(struct nep_perf_options *options, const struct nep_topology *topology,
                         struct nep_perf_plan **plan_p)
{
    struct nep_perf_plan *plan = calloc(1, sizeof(*plan));
    if (plan == NULL) {
        return nep_perf_error(NEP_PERF_FAILED, "out of memory");
    }
    plan->options = options;
    plan->topology = *topology;
    plan->num_batches = ((uint64_t)options->warmup + options->iters) * options->outstanding;
    plan->num_routings = plan->num_batches;
    int rc = -1;
    if (options->routing_kind == NEP_PERF_TRACE) {
        rc = nep_perf_trace_open(options, topology, &plan->trace);
    }
    if (plan->trace == NULL && plan->num_routings > most_routings(plan)) {
        plan->num_routings = most_routings(plan);
    }
    if (rc == -1) {
        rc = load_map(plan);
    }
    if (rc == -1) {
        rc = prepare_draws(plan);
    }
    if (rc == -1) {
        rc = prepare_group(plan);
    }
    if (rc == -1 && plan->trace != NULL) {
        rc = nep_perf_trace_schedule(plan->trace, plan->map);
    }
    if (rc != -1) {
        nep_perf_plan_destroy(plan);
        return rc;
    }
    *plan_p = plan;
    return -1;
}

void nep_perf_plan_destroy(struct nep_perf_plan *plan)
{
    if (plan == NULL) {
        return;
    }
    for (uint32_t r = 0;
         r < plan->topology.num_ranks && plan->slots != NULL && plan->weights != NULL; r++) {
        free(plan->slots[r]);
        free(plan->weights[r]);
    }
    free(plan->slots);
    free(plan->weights);
    free(plan->num_tokens);
    free(plan->factor);
    free(plan->ids);
    free(plan->cumulative);
    nep_perf_trace_close(plan->trace);
    nep_map_destroy(plan->map);
    free(plan);
}

const struct nep_map *nep_perf_plan_map(const struct nep_perf_plan *plan)
{
    return plan->map;
}

uint32_t nep_perf_plan_num_layers(const struct nep_perf_plan *plan)
{
    return plan->trace != NULL ? nep_perf_trace_num_layers(plan->trace) : 1;
}

uint32_t nep_perf_plan_layer(const struct nep_perf_plan *plan, uint64_t batch)
{
    return plan->trace != NULL ? nep_perf_trace_layer(plan->trace, batch % plan->num_batches) : 0;
}

uint32_t nep_perf_plan_map_layer(const struct nep_perf_plan *plan, uint64_t batch)
{
    return plan->map_layers > 1 ? nep_perf_plan_layer(plan, batch) % plan->map_layers : 0;
}

/* K distinct experts of one token. */
static void draw_token(const struct nep_perf_plan *plan, struct nep_ref_rng *rng, int32_t *ids)
{
    const struct nep_perf_options *options = plan->options;
    uint32_t range = options->experts;
    if (options->routing_kind == NEP_PERF_INCAST) {
        uint32_t on_rank0 =
            plan->slots_per_rank > options->top_k ? plan->slots_per_rank : options->top_k;
        range = on_rank0 < range ? on_rank0 : range;
    }
    for (uint32_t k = 0; k < options->top_k;) {
        uint32_t id;
        if (options->routing_kind == NEP_PERF_ZIPF) {
            double at = nep_ref_rng_unit(rng) * plan->cumulative[range - 1];
            uint32_t low = 0;
            uint32_t high = range - 1;
            while (low < high) {
                uint32_t middle = (low + high) / 2;
                if (plan->cumulative[middle] > at) {
                    high = middle;
                } else {
                    low = middle + 1;
                }
            }
            id = low;
        } else {
            id = nep_ref_rng_below(rng, range);
        }
        uint32_t j = 0;
        while (j < k && ids[j] != (int32_t)id) {
            j++;
        }
        if (j == k) {
            ids[k++] = (int32_t)id;
        }
    }
}

uint32_t nep_perf_plan_routing(const struct nep_perf_plan *plan, uint32_t rank, uint64_t batch,
                               int32_t *ids, float *weights)
{
    const struct nep_perf_options *options = plan->options;
    uint32_t k = options->top_k;
    batch = batch % plan->num_batches % plan->num_routings;
    struct nep_ref_rng rng = {nep_ref_mix(nep_ref_mix(options->seed, rank), batch)};
    uint32_t tokens = options->tokens;
    if (plan->trace != NULL) {
        tokens = nep_perf_trace_ids(plan->trace, rank, batch, tokens, ids);
    }
    for (uint32_t t = 0; t < tokens; t++) {
        if (plan->trace == NULL) {
            draw_token(plan, &rng, ids + (size_t)t * k);
        }
        float sum = 0.0f;
        for (uint32_t i = 0; i < k; i++) {
            float weight = (float)nep_ref_rng_unit(&rng) + 0.05f;
            weights[(size_t)t * k + i] = weight;
            sum += weight;
        }
        for (uint32_t i = 0; i < k; i++) {
            weights[(size_t)t * k + i] /= sum;
        }
    }
    return tokens;
}

void nep_perf_plan_row(const struct nep_perf_plan *plan, uint32_t rank, uint64_t batch,
                       uint32_t token, void *row)
{
    const struct nep_perf_options *options = plan->options;
    uint64_t key = nep_ref_mix(options->seed ^ 0x726f7773ull, rank);
    key = nep_ref_mix(key, (batch % plan->num_batches) * options->tokens + token);
    nep_ref_gen_row(key, false, options->dtype, options->hidden, row);
}

void nep_perf_plan_slots(const struct nep_perf_plan *plan, uint32_t rank, uint64_t batch,
                         const int32_t *ids, uint32_t num_tokens, uint32_t *slots)
{
    uint32_t k = plan->options->top_k;
    struct nep_copies copies;
    bool has_map =
        plan->map != NULL &&
        nep_map_copies(plan->map, nep_perf_plan_map_layer(plan, batch), &copies) == NEP_OK;
    for (uint32_t t = 0; t < num_tokens; t++) {
        const int32_t *id = ids + (size_t)t * k;
        uint32_t *slot = slots + (size_t)t * k;
        if (has_map) {
            nep_choose(&copies, rank, t, id, k, slot);
            continue;
        }
        for (uint32_t i = 0; i < k; i++) {
            bool is_there = id[i] >= 0 && (plan->is_live == NULL ||
                                           plan->is_live[(uint32_t)id[i] / plan->slots_per_rank]);
            slot[i] = is_there ? (uint32_t)id[i] : NEP_REF_NONE; /* contiguous: expert = slot */
        }
    }
}

void nep_perf_plan_set_live(struct nep_perf_plan *plan, const uint8_t *is_live)
{
    plan->is_live = is_live;
}

/* Slots that no expert occupies keep factor 0. */
static void fill_factors(struct nep_perf_plan *plan, uint64_t batch)
{
    struct nep_copies copies;
    bool has_map =
        plan->map != NULL &&
        nep_map_copies(plan->map, nep_perf_plan_map_layer(plan, batch), &copies) == NEP_OK;
    memset(plan->factor, 0,
           (size_t)plan->topology.num_ranks * plan->slots_per_rank * sizeof(float));
    for (uint32_t e = 0; e < plan->options->experts; e++) {
        if (!has_map) {
            plan->factor[e] = nep_ref_expert_factor(e);
            continue;
        }
        for (uint32_t i = copies.begin[e]; i < copies.begin[e + 1]; i++) {
            plan->factor[copies.slot[i]] = nep_ref_expert_factor(e);
        }
    }
}

const struct nep_ref_group *nep_perf_plan_group(struct nep_perf_plan *plan, uint64_t batch,
                                                bool all, uint32_t rank)
{
    plan->batch = batch;
    fill_factors(plan, batch);
    for (uint32_t r = 0; r < plan->topology.num_ranks; r++) {
        if (plan->is_live != NULL && plan->is_live[r] == 0) {
            plan->num_tokens[r] = 0;
        } else if (all || r == rank) {
            plan->num_tokens[r] =
                nep_perf_plan_routing(plan, r, batch, plan->ids, plan->weights[r]);
            nep_perf_plan_slots(plan, r, batch, plan->ids, plan->num_tokens[r], plan->slots[r]);
        }
    }
    return &plan->group;
}

const char *nep_perf_plan_check_choice(const struct nep_perf_plan *plan, uint32_t rank)
{
    struct nep_copies copies;
    if (plan->map == NULL ||
        nep_map_copies(plan->map, nep_perf_plan_map_layer(plan, plan->batch), &copies) != NEP_OK) {
        return NULL;
    }
    const struct nep_ref_copies ref = {copies.num_ranks,      copies.num_nodes,
                                       copies.slots_per_rank, plan->topology.node_of_rank,
                                       copies.begin,          copies.slot};
    uint32_t k = plan->options->top_k;
    const char *broken = NULL;
    nep_perf_plan_routing(plan, rank, plan->batch, plan->ids, plan->weights[rank]);
    for (uint32_t t = 0; t < plan->num_tokens[rank] && broken == NULL; t++) {
        broken = nep_ref_choice_check(&ref, rank, plan->ids + (size_t)t * k, k,
                                      plan->slots[rank] + (size_t)t * k);
    }
    return broken;
}

bool nep_perf_plan_predicted_rows(const struct nep_perf_plan *plan, uint64_t *rows_p)
{
    uint64_t first = (uint64_t)plan->options->warmup * plan->options->outstanding;
    return plan->trace != NULL &&
           nep_perf_trace_remote_rows(plan->trace, plan->map, first, plan->num_batches - first,
                                      rows_p) == NEP_OK;
}

/* Rows of one batch on every rank, without building them: packed rows are pairs, rounded up per
 * slot; the rank layout needs fewer. Of a long trace the most that can be. */
uint64_t nep_perf_plan_max_rows(struct nep_perf_plan *plan)
{
    const struct nep_perf_options *options = plan->options;
    uint32_t ranks = plan->topology.num_ranks;
    uint64_t tokens = (uint64_t)options->tokens * ranks;
    if (options->layout == NEP_LAYOUT_EXPERT_PADDED) {
        return tokens * plan->slots_per_rank;
    }
    uint64_t align = options->alignment > 1 ? options->alignment : 1;
    uint64_t padding = (align - 1) * plan->slots_per_rank;
    if (plan->num_routings > most_routings(plan)) {
        return options->layout == NEP_LAYOUT_RANK ? tokens : tokens * options->top_k + padding;
    }
    uint64_t *rows = calloc(ranks, sizeof(uint64_t));
    uint64_t most = 0;
    for (uint64_t batch = 0; batch < plan->num_routings && rows != NULL; batch++) {
        memset(rows, 0, ranks * sizeof(uint64_t));
        nep_perf_plan_group(plan, batch, true, 0);
        struct nep_ref_traffic traffic = {.pairs_per_rank = rows};
        for (uint32_t r = 0; r < ranks; r++) {
            nep_ref_traffic_add(&plan->group, r, &traffic);
        }
        for (uint32_t r = 0; r < ranks; r++) {
            uint64_t need =
                options->layout == NEP_LAYOUT_RANK && rows[r] > tokens ? tokens : rows[r];
            most = need > most ? need : most;
        }
    }
    free(rows);
    return most + padding;
}
