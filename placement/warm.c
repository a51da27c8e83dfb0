/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The course from a running map: homes by what the sample costs under it, then the copies that gain
 * most are moved. With a limit on moves, all layers take what gains much before any takes what
 * gains little: what is enough falls by steps from FIRST_GAIN times the least gain on, and the
 * limit is one for all layers, of which none takes more than twice its even share in a turn. Where
 * a turn would pass the limit, it is taken back, and what is left is shared out in proportion to
 * what each layer wanted.
 *
 * More steps gain more and last longer: from 128 by halves, a point more in twice the time.
 *
 * Rejected: a share of the limit for each layer and two turns. The first turn took whatever gained
 * a fourteenth of what the best moves gain, in the order of the experts, until the share was spent
 * (dsv2lite on 8 nodes: 4 points for 400 copies, where 1,027 bring 11).
 */
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "placement/adjust.h"
#include "placement/solver.h"

/* Rows per token of the sample that a moved copy must save: the term that keeps experts put. */
#define WARM_GAIN 2e-4
/* With a limit on moves: the gain that is taken first, in units of the least. */
#define FIRST_GAIN 16.0
#define GAIN_STEP  4.0

struct warm_layer {
    struct nep_adjust *adjust;
    uint32_t *table;  /* [slots] */
    uint32_t *before; /* [slots] as the turn found it */
    uint32_t most;    /* that may move in this turn */
    uint32_t moved;   /* in this turn */
};

struct warm {
    struct nep_solver *solver;
    struct warm_layer *layers;
    uint32_t slots;
    double gain; /* of this turn, in units of the least */
};

static enum nep_status check_shape(const struct nep_solver *s)
{
    const struct nep_map_shape *shape = &s->warm->shape;
    if (shape->num_layers != s->shape.num_layers || shape->num_experts != s->shape.num_experts ||
        shape->num_nodes != s->shape.num_nodes || shape->num_ranks != s->shape.num_ranks ||
        shape->slots_per_rank != s->shape.slots_per_rank) {
        return nep_fail(NEP_ERR_MISMATCH,
                        "solver: the running map has %u layers, %u experts, %u nodes, %u ranks, %u "
                        "slots per rank; asked for are %u, %u, %u, %u, %u",
                        shape->num_layers, shape->num_experts, shape->num_nodes, shape->num_ranks,
                        shape->slots_per_rank, s->shape.num_layers, s->shape.num_experts,
                        s->shape.num_nodes, s->shape.num_ranks, s->shape.slots_per_rank);
    }
    return NEP_OK;
}

/* What each home would cost now. */
static enum nep_status cost_layer(void *ctx, uint32_t idx)
{
    const struct warm *w = ctx;
    struct nep_solver_layer *layer = &w->solver->layers[idx];
    nep_solver_set_homes(w->solver, &layer->sets);
    nep_adjust_copies(w->solver->warm, idx, &layer->copies);
    return nep_solver_cost_homes(w->solver, layer);
}

static enum nep_status open_layer(struct warm *w, uint32_t idx)
{
    struct nep_solver *s = w->solver;
    struct nep_solver_layer *layer = &s->layers[idx];
    const struct nep_adjust_params params = {
        .shape = &s->shape,
        .sets = &layer->sets,
        .max_imbalance = s->max_imbalance,
        .price = NEP_LOAD_PRICE,
    };
    nep_adjust_destroy(w->layers[idx].adjust);
    w->layers[idx].adjust = NULL;
    return nep_adjust_create(&params, w->layers[idx].table, &w->layers[idx].adjust);
}

static enum nep_status start_layer(void *ctx, uint32_t idx)
{
    struct warm *w = ctx;
    struct warm_layer *layer = &w->layers[idx];
    layer->table = malloc(2 * (size_t)w->slots * sizeof *layer->table);
    if (layer->table == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u slots", w->slots);
    }
    layer->before = layer->table + w->slots;
    nep_adjust_table(w->solver->warm, idx, layer->table);
    nep_solver_set_homes(w->solver, &w->solver->layers[idx].sets);
    return open_layer(w, idx);
}

static enum nep_status turn_layer(void *ctx, uint32_t idx)
{
    struct warm *w = ctx;
    struct warm_layer *layer = &w->layers[idx];
    double least = WARM_GAIN * w->gain * w->solver->layers[idx].sets.num_tokens;
    memcpy(layer->before, layer->table, w->slots * sizeof *layer->table);
    return nep_adjust_turn(layer->adjust, least, layer->most, &layer->moved);
}

/* A turn that some layer has overdone, again with the share that is left for it. */
static enum nep_status again_layer(void *ctx, uint32_t idx)
{
    struct warm *w = ctx;
    struct warm_layer *layer = &w->layers[idx];
    if (layer->moved == 0) {
        return NEP_OK;
    }
    memcpy(layer->table, layer->before, w->slots * sizeof *layer->table);
    enum nep_status status = open_layer(w, idx);
    return status == NEP_OK ? turn_layer(w, idx) : status;
}

static void finish_layer(struct warm *w, uint32_t idx)
{
    struct nep_solver_layer *layer = &w->solver->layers[idx];
    layer->num_entries = 0;
    for (uint32_t i = 0; i < w->slots; i++) {
        uint32_t expert = w->layers[idx].table[i];
        if (expert != NEP_SLOT_EMPTY) {
            layer->entries[layer->num_entries++] = (struct nep_map_entry){idx, expert, i, 1, 0};
        }
    }
}

static uint64_t sum_moved(const struct warm *w)
{
    uint64_t sum = 0;
    for (uint32_t l = 0; l < w->solver->shape.num_layers; l++) {
        sum += w->layers[l].moved;
    }
    return sum;
}

/* What is left goes to the layers in proportion to what they wanted, the rest to the first. */
static void share_left(struct warm *w, uint64_t left, uint64_t wanted)
{
    uint32_t layers = w->solver->shape.num_layers;
    uint64_t given = 0;
    for (uint32_t l = 0; l < layers; l++) {
        w->layers[l].most = (uint32_t)(left * w->layers[l].moved / wanted);
        given += w->layers[l].most;
    }
    for (uint32_t l = 0; l < layers && given < left; l++) {
        uint32_t more = w->layers[l].most < w->layers[l].moved;
        w->layers[l].most += more;
        given += more;
    }
}

static enum nep_status turn(struct warm *w, uint64_t *left_p, double done)
{
    struct nep_solver *s = w->solver;
    uint64_t fair = *left_p / s->shape.num_layers;
    uint32_t most = fair > UINT32_MAX / 4 ? UINT32_MAX : (uint32_t)(2 * fair + 1);
    for (uint32_t l = 0; l < s->shape.num_layers; l++) {
        w->layers[l].most = most;
    }
    enum nep_status status = nep_solver_step(s, turn_layer, w, done);
    uint64_t wanted = sum_moved(w);
    if (status == NEP_OK && wanted > *left_p) {
        share_left(w, *left_p, wanted);
        status = nep_solver_step(s, again_layer, w, done);
        *left_p = 0;
        return status;
    }
    *left_p -= wanted;
    return status;
}

static enum nep_status move_copies(struct warm *w)
{
    struct nep_solver *s = w->solver;
    uint64_t left = s->max_moves == 0 ? UINT64_MAX : s->max_moves;
    enum nep_status status = nep_parallel_run(s->num_threads, s->shape.num_layers, start_layer, w);
    double done = 0.3;
    w->gain = s->max_moves == 0 ? 1.0 : FIRST_GAIN;
    for (; w->gain >= 1.0 && left > 0 && status == NEP_OK; w->gain /= GAIN_STEP) {
        done += 0.5 * (1.0 - done);
        status = turn(w, &left, w->gain == 1.0 ? 1.0 : done);
    }
    for (uint32_t l = 0; l < s->shape.num_layers && status == NEP_OK; l++) {
        finish_layer(w, l);
    }
    return status;
}

enum nep_status nep_solve_warm(struct nep_solver *solver)
{
    uint32_t layers = solver->shape.num_layers;
    enum nep_status status = check_shape(solver);
    if (status != NEP_OK) {
        return status;
    }
    struct warm w = {.solver = solver,
                     .layers = calloc(layers, sizeof *w.layers),
                     .slots = solver->shape.num_ranks * solver->shape.slots_per_rank};
    if (w.layers == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u layers", layers);
    }
    status = nep_solver_step(solver, cost_layer, &w, 0.2);
    if (status == NEP_OK) {
        status = nep_solver_assign_homes(solver);
    }
    if (status == NEP_OK) {
        status = move_copies(&w);
    }
    for (uint32_t l = 0; l < layers; l++) {
        nep_adjust_destroy(w.layers[l].adjust);
        free(w.layers[l].table);
    }
    free(w.layers);
    return status;
}
