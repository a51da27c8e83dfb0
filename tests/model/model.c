/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tables of a model (who lands where, which operation has how many tiles in which stream) and
 * the questions that both the rules and the checks ask of a state.
 *
 * Tables instead of formulas, because the traffic patterns are irregular on purpose: streams with
 * no tile in one operation and several in the next are what moves the cumulative numbers of a
 * stream out of step with the numbers of the operations.
 */
#include <string.h>

#include "model.h"

static uint8_t tiles_of(const struct model *model, uint8_t op, uint8_t src, uint8_t node)
{
    uint8_t most = model->p.tiles;
    if (model->p.traffic == TRAFFIC_VARIED) {
        return (uint8_t)((op + src + 2 * node) % (most + 1));
    }
    if (model->p.traffic == TRAFFIC_QUIET && model->p.ops[op] == 'C') {
        return 0;
    }
    if (model->p.traffic == TRAFFIC_BURST && strchr(model->p.ops + op + 1, model->p.ops[op])) {
        return 1;
    }
    return most;
}

static bool init_groups(struct model *model)
{
    for (uint8_t n = 0; n < MAX_NODES && model->p.ranks_on[n] > 0; n++) {
        model->first[n] = model->num_ranks;
        for (uint8_t l = 0; l < model->p.ranks_on[n]; l++) {
            if (model->num_ranks == MAX_RANKS || l >= MAX_LANES) {
                return false;
            }
            model->node[model->num_ranks] = n;
            model->lane[model->num_ranks++] = l;
        }
        model->num_nodes++;
        model->first[n + 1] = model->num_ranks;
    }
    for (uint8_t s = 0; s < model->num_ranks; s++) {
        for (uint8_t n = 0; n < model->num_nodes; n++) {
            uint8_t far = (uint8_t)(model->first[n] + model->lane[s] % model->p.ranks_on[n]);
            model->landing[s][n] = far;
            if (n == model->node[s]) {
                continue;
            }
            model->link_of[s][n] = model->num_streams;
            model->links[model->num_streams++] = (struct link){s, n, far};
        }
    }
    return true;
}

static void init_told(struct model *model)
{
    for (uint8_t op = 0; op < model->num_ops; op++) {
        for (uint8_t i = 0; i < model->num_streams; i++) {
            const struct link *link = &model->links[i];
            model->told[op][link->src][link->far] = true;
            if (model->p.ops[op] == 'C') {
                model->told[op][link->far][link->src] = true;
            }
        }
    }
}

static bool init_traffic(struct model *model)
{
    for (uint8_t op = 0; op < model->num_ops; op++) {
        bool combine = model->p.ops[op] == 'C';
        uint8_t most[MAX_RANKS] = {0};
        for (uint8_t s = 0; s < model->num_ranks; s++) {
            most[s] = combine ? tiles_of(model, op, s, model->node[s]) : 0;
            model->home_end[s][op + 1] = (uint8_t)(model->home_end[s][op] + most[s]);
        }
        for (uint8_t i = 0; i < model->num_streams; i++) {
            const struct link *link = &model->links[i];
            uint8_t tiles = tiles_of(model, op, link->src, link->node);
            uint8_t *dispatch = model->dispatch_end[i], *back = model->combine_end[i];
            dispatch[op + 1] = (uint8_t)(dispatch[op] + (combine ? 0 : tiles));
            back[op + 1] = (uint8_t)(back[op] + (combine ? tiles : 0));
            if (combine && tiles > most[link->src]) {
                most[link->src] = tiles;
            }
            if (dispatch[op + 1] > MAX_TILES || back[op + 1] > MAX_TILES) {
                return false;
            }
        }
        for (uint8_t s = 0; s < model->num_ranks; s++) {
            uint8_t from = model->sums_end[s][op], to = (uint8_t)(from + most[s]);
            model->sums_end[s][op + 1] = to;
            if (to > MAX_TILES) {
                return false;
            }
            for (uint8_t step = from + 1; step <= to; step++) {
                uint8_t k = (uint8_t)(step - from), *end = model->home_end[s];
                uint8_t here = (uint8_t)(end[op] + k);
                model->home_used[s][step] = here < end[op + 1] ? here : end[op + 1];
                for (uint8_t n = 0; n < model->num_nodes; n++) {
                    if (n != model->node[s]) {
                        uint8_t i = model->link_of[s][n];
                        end = model->combine_end[i];
                        here = (uint8_t)(end[op] + k);
                        model->stream_used[i][step] = here < end[op + 1] ? here : end[op + 1];
                    }
                }
            }
        }
    }
    return true;
}

static void add_segment(struct model *model, size_t offset, size_t length)
{
    model->segments[model->num_segments].offset = (uint16_t)offset;
    model->segments[model->num_segments++].length = (uint16_t)length;
    model->packed_bytes = (uint16_t)(model->packed_bytes + length);
}

static void init_segments(struct model *model)
{
    size_t ranks = model->num_ranks;
    add_segment(model, offsetof(struct state, sent), ranks);
    add_segment(model, offsetof(struct state, done), ranks);
    add_segment(model, offsetof(struct state, inside), ranks);
    add_segment(model, offsetof(struct state, home), ranks);
    add_segment(model, offsetof(struct state, sums), ranks);
    for (size_t i = 0; i < model->num_streams; i++) {
        add_segment(model, offsetof(struct state, read) + i * MAX_LANES, MAX_LANES);
        /* Without delays nothing is ever in flight. */
        size_t bytes = model->p.delays ? sizeof(struct stream) : offsetof(struct stream, flight);
        add_segment(model, offsetof(struct state, dispatch) + i * sizeof(struct stream), bytes);
        add_segment(model, offsetof(struct state, combine) + i * sizeof(struct stream), bytes);
    }
    for (size_t r = 0; r < ranks; r++) {
        add_segment(model, offsetof(struct state, staged) + r * MAX_RANKS, ranks);
        if (model->p.delays) {
            add_segment(model, offsetof(struct state, counts_flight) + r * MAX_RANKS, ranks);
            add_segment(model, offsetof(struct state, counts_again) + r * MAX_RANKS, ranks);
        }
    }
}

bool model_init(struct model *model, const struct params *params)
{
    memset(model, 0, sizeof(*model));
    model->p = *params;
    model->num_ops = (uint8_t)strlen(params->ops);
    model->slots = params->slots ? params->slots : (uint8_t)(2 * params->outstanding);
    model->tile_slots = params->tile_slots ? params->tile_slots : model->slots;
    model->modulus = params->imm_modulus ? params->imm_modulus : 256;
    if (model->num_ops > MAX_OPS || (params->repeats && !params->delays) || !init_groups(model)) {
        return false;
    }
    init_told(model);
    if (!init_traffic(model)) {
        return false;
    }
    init_segments(model);
    return true;
}

void model_pack(const struct model *model, const struct state *state, uint8_t *out)
{
    for (unsigned i = 0; i < model->num_segments; i++) {
        memcpy(out, (const uint8_t *)state + model->segments[i].offset, model->segments[i].length);
        out += model->segments[i].length;
    }
}

void model_unpack(const struct model *model, const uint8_t *in, struct state *state)
{
    memset(state, 0, sizeof(*state));
    for (unsigned i = 0; i < model->num_segments; i++) {
        memcpy((uint8_t *)state + model->segments[i].offset, in, model->segments[i].length);
        in += model->segments[i].length;
    }
}

uint8_t op_of(const uint8_t *end, uint8_t number)
{
    uint8_t op = 0;
    while (op < MAX_OPS && number >= end[op + 1]) {
        op++;
    }
    return op;
}

bool counts_at_rank(const struct state *state, uint8_t from, uint8_t to, uint8_t op)
{
    return state->sent[from] > op && !(state->counts_flight[from][to] >> op & 1);
}

bool counts_on_node(const struct model *model, const struct state *state, uint8_t from,
                    uint8_t node, uint8_t op)
{
    if (model->node[from] == node) {
        return state->sent[from] > op;
    }
    for (uint8_t to = model->first[node]; to < model->first[node + 1]; to++) {
        if (model->told[op][from][to] && counts_at_rank(state, from, to, op)) {
            return true;
        }
    }
    return false;
}

static uint8_t freed(const struct model *model, const uint8_t *end, uint8_t done, uint8_t credit)
{
    uint8_t s = model->p.outstanding;
    uint8_t implicit = done >= s && !model->p.no_implicit ? end[done - s] : 0;
    return implicit > credit ? implicit : credit;
}

uint8_t dispatch_freed(const struct model *model, const struct state *state, uint8_t link)
{
    return freed(model, model->dispatch_end[link], state->done[model->links[link].src],
                 state->dispatch[link].credit);
}

uint8_t combine_freed(const struct model *model, const struct state *state, uint8_t link)
{
    return freed(model, model->combine_end[link], state->done[model->links[link].far],
                 state->combine[link].credit);
}

uint8_t ring_used(const struct model *model, const struct state *state, uint8_t rank,
                  uint8_t source)
{
    uint8_t node = model->node[rank];
    if (node == model->node[source]) {
        return model->home_used[source][state->sums[source]];
    }
    return state->combine[model->link_of[source][node]].posted;
}

struct range range_in_send(const struct model *model, uint8_t op)
{
    return (struct range){model->p.ahead == AHEAD_NONE ? op : 0, (uint8_t)(op + 1)};
}

struct range range_now(const struct model *model, const struct state *state, uint8_t rank)
{
    uint8_t done = state->done[rank];
    if (state->inside[rank] && model->p.ahead == AHEAD_NONE) {
        return (struct range){done, (uint8_t)(done + 1)};
    }
    bool works = state->inside[rank] || model->p.ahead == AHEAD_ALWAYS;
    return (struct range){0, works ? state->sent[rank] : 0};
}

static uint32_t bits(uint32_t mask)
{
    return (uint32_t)__builtin_popcount(mask);
}

/* Grows with every action: so every run ends, and the graph of states has no cycle. */
uint32_t model_measure(const struct model *model, const struct state *state)
{
    uint32_t sum = 0;
    for (uint8_t r = 0; r < model->num_ranks; r++) {
        /* A send posts COUNTS to at most MAX_RANKS ranks, each arriving at most twice. */
        sum += 3u * MAX_RANKS * state->sent[r] + 2u * state->done[r] + state->inside[r] +
               state->home[r] + state->sums[r];
        for (uint8_t other = 0; other < model->num_ranks; other++) {
            sum += state->staged[r][other];
            sum -= bits(state->counts_flight[r][other]) + bits(state->counts_again[r][other]);
        }
    }
    for (uint8_t i = 0; i < model->num_streams; i++) {
        for (unsigned l = 0; l < MAX_LANES; l++) {
            sum += state->read[i][l];
        }
        const struct stream *streams[] = {&state->dispatch[i], &state->combine[i]};
        for (unsigned k = 0; k < 2; k++) {
            sum += 3u * streams[k]->posted + 3u * streams[k]->said;
            sum -= bits(streams[k]->flight) + bits(streams[k]->again);
            sum -= bits(streams[k]->credit_flight) + bits(streams[k]->credit_again);
        }
    }
    return sum;
}
