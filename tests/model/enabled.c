/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which actions a state allows: the rules of docs/protocol.md, asked with what a rank can know. A
 * condition here is what the engine waits for; what must hold whatever the rules say is checked in
 * steps.c.
 */
#include "model.h"

static bool in_range(struct range range, uint8_t op)
{
    return op >= range.from && op < range.to;
}

static bool slot_ready(const struct model *model, const struct stream *stream, uint8_t freed)
{
    uint8_t q = stream->posted;
    if (!model->p.no_r3 && q >= freed + model->tile_slots) {
        return false;
    }
    uint32_t pending = stream->flight | stream->again;
    return model->p.no_r4 || q < model->tile_slots || !(pending >> (q - model->tile_slots) & 1);
}

bool may_post(const struct model *model, const struct state *state, uint8_t link,
              struct range range)
{
    const struct stream *stream = &state->dispatch[link];
    uint8_t op = op_of(model->dispatch_end[link], stream->posted);
    return op < model->num_ops && in_range(range, op) && state->sent[model->links[link].src] > op &&
           slot_ready(model, stream, dispatch_freed(model, state, link));
}

bool may_sum_post(const struct model *model, const struct state *state, uint8_t link,
                  struct range range)
{
    const struct stream *stream = &state->combine[link];
    const struct link *ends = &model->links[link];
    uint8_t op = op_of(model->combine_end[link], stream->posted);
    if (op >= model->num_ops || !in_range(range, op) || state->sent[ends->far] <= op ||
        !slot_ready(model, stream, combine_freed(model, state, link))) {
        return false;
    }
    for (uint8_t d = model->first[ends->node]; d < model->first[ends->node + 1]; d++) {
        if (state->staged[d][ends->src] <= stream->posted) {
            return false;
        }
    }
    return true;
}

bool may_stage(const struct model *model, const struct state *state, uint8_t rank, uint8_t source,
               struct range range)
{
    uint8_t node = model->node[rank], chunk = state->staged[rank][source];
    const uint8_t *end = node == model->node[source]
                             ? model->home_end[source]
                             : model->combine_end[model->link_of[source][node]];
    uint8_t op = op_of(end, chunk);
    return op < model->num_ops && in_range(range, op) && state->sent[rank] > op &&
           (model->p.ring == 0 || chunk < ring_used(model, state, rank, source) + model->p.ring);
}

bool may_read(const struct model *model, const struct state *state, uint8_t rank, uint8_t link,
              struct range range)
{
    const struct link *ends = &model->links[link];
    const struct stream *stream = &state->dispatch[link];
    uint8_t q = state->read[link][model->lane[rank]];
    uint8_t op = op_of(model->dispatch_end[link], q);
    if (op >= model->num_ops || !in_range(range, op) ||
        !counts_on_node(model, state, ends->src, ends->node, op)) {
        return false;
    }
    uint8_t ranks = model->p.ranks_on[ends->node];
    return (model->p.skip && q % ranks != model->lane[rank]) ||
           (stream->posted > q && !(stream->flight >> q & 1));
}

static uint8_t home_op(const struct model *model, const struct state *state, uint8_t rank)
{
    uint8_t op = state->home[rank];
    while (op < model->num_ops && model->p.ops[op] != 'D') {
        op++;
    }
    return op;
}

bool may_read_home(const struct model *model, const struct state *state, uint8_t rank,
                   struct range range)
{
    uint8_t op = home_op(model, state, rank), node = model->node[rank];
    if (op >= model->num_ops || !in_range(range, op)) {
        return false;
    }
    for (uint8_t y = model->first[node]; y < model->first[node + 1]; y++) {
        if (state->sent[y] <= op) {
            return false;
        }
    }
    return true;
}

/* Tile k of every stream of the first operation that is not read yet, and its home rows. */
bool may_read_all(const struct model *model, const struct state *state, uint8_t rank)
{
    struct range range = range_now(model, state, rank);
    for (uint8_t op = range.from; op < range.to; op++) {
        bool any = false, ready = true;
        if (model->p.ops[op] == 'D' && state->home[rank] <= op) {
            any = true;
            ready = may_read_home(model, state, rank, range);
        }
        for (uint8_t i = 0; i < model->num_streams; i++) {
            if (model->links[i].node == model->node[rank] &&
                state->read[i][model->lane[rank]] < model->dispatch_end[i][op + 1]) {
                any = true;
                ready = ready && may_read(model, state, rank, i, range);
            }
        }
        if (any) {
            return ready;
        }
    }
    return false;
}

static bool may_home_sum(const struct model *model, const struct state *state, uint8_t rank)
{
    uint8_t step = state->sums[rank], op = op_of(model->sums_end[rank], step);
    if (op >= model->num_ops || !in_range(range_now(model, state, rank), op)) {
        return false;
    }
    for (uint8_t n = 0; n < model->num_nodes; n++) {
        if (n == model->node[rank]) {
            for (uint8_t d = model->first[n]; d < model->first[n + 1]; d++) {
                if (state->staged[d][rank] < model->home_used[rank][step + 1]) {
                    return false;
                }
            }
            continue;
        }
        uint8_t i = model->link_of[rank][n], q = model->stream_used[i][step];
        if (model->stream_used[i][step + 1] > q &&
            (state->combine[i].posted <= q || (state->combine[i].flight >> q & 1) ||
             !counts_at_rank(state, model->links[i].far, rank, op))) {
            return false;
        }
    }
    return true;
}

uint8_t dispatch_read_by_all(const struct model *model, const struct state *state, uint8_t link)
{
    uint8_t node = model->links[link].node, least = UINT8_MAX;
    for (uint8_t l = 0; l < model->p.ranks_on[node]; l++) {
        least = state->read[link][l] < least ? state->read[link][l] : least;
    }
    return least;
}

/* How many operations' COUNTS of the stream's sender its receiver has seen without a gap. */
static uint8_t counts_seen(const struct model *model, const struct state *state, uint8_t link,
                           bool combine)
{
    const struct link *ends = &model->links[link];
    uint8_t op = 0;
    if (!combine) {
        while (op < model->num_ops && counts_on_node(model, state, ends->src, ends->node, op)) {
            op++;
        }
        return op;
    }
    while (op < model->num_ops &&
           (model->p.ops[op] == 'C'
                ? counts_at_rank(state, ends->far, ends->src, op)
                : counts_on_node(model, state, ends->far, model->node[ends->src], op))) {
        op++;
    }
    return op;
}

/*
 * What the receiver of a stream may count as known to its sender: its last CREDIT; and that the
 * sender of COUNTS of op k has completed op k - S, so that it knows op k - 2S freed.
 */
uint8_t credit_known(const struct model *model, const struct state *state, uint8_t link,
                     bool combine)
{
    const struct stream *stream = combine ? &state->combine[link] : &state->dispatch[link];
    const uint8_t *end = combine ? model->combine_end[link] : model->dispatch_end[link];
    if (model->p.credit_blind || model->p.no_implicit) {
        return stream->said;
    }
    uint8_t seen = counts_seen(model, state, link, combine), twice = 2 * model->p.outstanding;
    uint8_t implicit = seen >= twice ? end[seen - twice] : 0;
    return implicit > stream->said ? implicit : stream->said;
}

/* CREDITs of a stream may be in flight together where they lie close to each other. */
static bool is_far_from_flight(const struct model *model, const struct stream *stream,
                               uint8_t number)
{
    uint32_t flight = stream->credit_flight | stream->credit_again;
    if (flight == 0 || model->p.credit_burst) {
        return false;
    }
    return model->p.credit_span == 0 || number > __builtin_ctz(flight) + model->p.credit_span;
}

static bool may_credit(const struct model *model, const struct state *state, uint8_t link,
                       bool combine)
{
    const struct link *ends = &model->links[link];
    const struct stream *stream = combine ? &state->combine[link] : &state->dispatch[link];
    const uint8_t *end = combine ? model->combine_end[link] : model->dispatch_end[link];
    uint8_t rank = combine ? ends->src : ends->far;
    uint8_t number = combine ? model->stream_used[link][state->sums[ends->src]]
                             : dispatch_read_by_all(model, state, link);
    if (range_now(model, state, rank).to == 0 || number <= stream->said ||
        is_far_from_flight(model, stream, number)) {
        return false;
    }
    uint8_t known = credit_known(model, state, link, combine);
    return number > known &&
           end[counts_seen(model, state, link, combine)] > known + model->tile_slots;
}

static bool all_posted(const struct model *model, const struct state *state, uint8_t rank,
                       uint8_t op)
{
    for (uint8_t i = 0; i < model->num_streams; i++) {
        if ((model->links[i].src == rank &&
             state->dispatch[i].posted < model->dispatch_end[i][op + 1]) ||
            (model->links[i].far == rank &&
             state->combine[i].posted < model->combine_end[i][op + 1])) {
            return false;
        }
    }
    return true;
}

static bool may_send(const struct model *model, const struct state *state, uint8_t rank)
{
    uint8_t op = state->sent[rank];
    if (state->inside[rank] || op >= model->num_ops ||
        (!model->p.no_r2 && op - state->done[rank] >= model->p.outstanding) ||
        (model->p.send_waits && op > 0 && !all_posted(model, state, rank, (uint8_t)(op - 1)))) {
        return false;
    }
    for (uint8_t to = 0; to < model->num_ranks && op >= model->slots && !model->p.no_r4; to++) {
        uint8_t pending = state->counts_flight[rank][to] | state->counts_again[rank][to];
        if (pending >> (op - model->slots) & 1) {
            return false;
        }
    }
    return true;
}

static bool counts_complete(const struct model *model, const struct state *state, uint8_t rank,
                            uint8_t op)
{
    for (uint8_t from = 0; from < model->num_ranks; from++) {
        if (model->p.no_r1 && model->p.ops[op] == 'C' && from != rank &&
            model->landing[rank][model->node[from]] != from) {
            continue;
        }
        if (!counts_on_node(model, state, from, model->node[rank], op)) {
            return false;
        }
    }
    return true;
}

static bool lent_is_back(const struct model *model, const struct state *state, uint8_t rank,
                         uint8_t op)
{
    uint8_t node = model->node[rank];
    for (uint8_t y = model->first[node]; y < model->first[node + 1]; y++) {
        if (model->p.ops[op] == 'D' && state->home[y] <= op) {
            return false;
        }
    }
    for (uint8_t s = 0; s < model->num_ranks; s++) {
        const uint8_t *end = model->node[s] == node ? model->home_end[s]
                                                    : model->combine_end[model->link_of[s][node]];
        if (ring_used(model, state, rank, s) < end[op + 1]) {
            return false;
        }
    }
    return true;
}

static bool may_finish(const struct model *model, const struct state *state, uint8_t rank)
{
    uint8_t op = state->done[rank];
    if (!state->inside[rank] || !counts_complete(model, state, rank, op) ||
        !all_posted(model, state, rank, op) || state->sums[rank] < model->sums_end[rank][op + 1] ||
        (model->p.ops[op] == 'D' && state->home[rank] <= op) ||
        (!model->p.no_lend && !lent_is_back(model, state, rank, op))) {
        return false;
    }
    for (uint8_t i = 0; i < model->num_streams; i++) {
        const struct link *ends = &model->links[i];
        if (ends->node == model->node[rank] &&
            state->read[i][model->lane[rank]] < model->dispatch_end[i][op + 1]) {
            return false;
        }
        const struct stream *in = &state->dispatch[i], *back = &state->combine[i];
        if (!model->p.credit_loose &&
            ((ends->far == rank && (in->credit_flight | in->credit_again) != 0) ||
             (ends->src == rank && (back->credit_flight | back->credit_again) != 0))) {
            return false;
        }
        if (!model->p.no_duty &&
            ((ends->far == rank && model->dispatch_end[i][op + 1] >
                                       credit_known(model, state, i, false) + model->tile_slots) ||
             (ends->src == rank && model->combine_end[i][op + 1] >
                                       credit_known(model, state, i, true) + model->tile_slots))) {
            return false;
        }
    }
    return true;
}

static void add(struct action *out, unsigned *num, enum step step, unsigned rank, unsigned other,
                unsigned info)
{
    out[(*num)++] = (struct action){(uint8_t)step, (uint8_t)rank, (uint8_t)other, (uint8_t)info};
}

static void add_calls(const struct model *model, const struct state *state, struct action *out,
                      unsigned *num)
{
    for (uint8_t r = 0; r < model->num_ranks; r++) {
        struct range range = range_now(model, state, r);
        if (may_send(model, state, r)) {
            add(out, num, STEP_SEND, r, 0, state->sent[r]);
        }
        if (!state->inside[r] && state->done[r] < state->sent[r] &&
            (!model->p.send_waits || all_posted(model, state, r, (uint8_t)(state->sent[r] - 1)))) {
            add(out, num, STEP_ENTER, r, 0, state->done[r]);
        }
        if (may_finish(model, state, r)) {
            add(out, num, STEP_FINISH, r, 0, state->done[r]);
        }
        if (model->p.joint) {
            if (may_read_all(model, state, r)) {
                add(out, num, STEP_READ_ALL, r, 0, 0);
            }
        } else if (may_read_home(model, state, r, range)) {
            add(out, num, STEP_HOME, r, 0, home_op(model, state, r));
        }
        if (may_home_sum(model, state, r)) {
            add(out, num, STEP_HOME_SUM, r, 0, state->sums[r]);
        }
        for (uint8_t s = 0; s < model->num_ranks; s++) {
            if (may_stage(model, state, r, s, range)) {
                add(out, num, STEP_STAGE, r, s, state->staged[r][s]);
            }
        }
    }
}

static void add_streams(const struct model *model, const struct state *state, struct action *out,
                        unsigned *num)
{
    for (uint8_t i = 0; i < model->num_streams; i++) {
        const struct link *ends = &model->links[i];
        struct range range = range_now(model, state, ends->src);
        if (model->p.send_waits) {
            range = (struct range){0, state->sent[ends->src]};
        }
        if (may_post(model, state, i, range)) {
            add(out, num, STEP_POST, ends->src, i, state->dispatch[i].posted);
        }
        if (may_sum_post(model, state, i, range_now(model, state, ends->far))) {
            add(out, num, STEP_SUM_POST, ends->far, i, INFO_COMBINE | state->combine[i].posted);
        }
        for (uint8_t d = model->first[ends->node];
             d < model->first[ends->node + 1] && !model->p.joint; d++) {
            if (may_read(model, state, d, i, range_now(model, state, d))) {
                add(out, num, STEP_READ, d, i, state->read[i][model->lane[d]]);
            }
        }
        if (may_credit(model, state, i, false)) {
            add(out, num, STEP_CREDIT, ends->far, i, dispatch_read_by_all(model, state, i));
        }
        if (may_credit(model, state, i, true)) {
            add(out, num, STEP_CREDIT, ends->src, i,
                INFO_COMBINE | model->stream_used[i][state->sums[ends->src]]);
        }
    }
}

static void add_masks(struct action *out, unsigned *num, struct action action, uint32_t flight,
                      uint32_t again)
{
    uint8_t info = action.info;
    for (uint8_t bit = 0; (flight | again) >> bit; bit++) {
        /* The repeat of a put is its second arrival; which copy came first does not matter. */
        if (flight >> bit & 1) {
            add(out, num, (enum step)action.step, action.rank, action.other, info | bit);
        } else if (again >> bit & 1) {
            add(out, num, (enum step)action.step, action.rank, action.other,
                INFO_REPEAT | info | bit);
        }
    }
}

static void add_arrivals(const struct model *model, const struct state *state, struct action *out,
                         unsigned *num)
{
    for (uint8_t from = 0; from < model->num_ranks; from++) {
        for (uint8_t to = 0; to < model->num_ranks; to++) {
            add_masks(out, num, (struct action){STEP_ARRIVE_COUNTS, from, to, 0},
                      state->counts_flight[from][to], state->counts_again[from][to]);
        }
    }
    for (uint8_t i = 0; i < model->num_streams; i++) {
        const struct stream *streams[] = {&state->dispatch[i], &state->combine[i]};
        const struct link *ends = &model->links[i];
        for (uint8_t k = 0; k < 2; k++) {
            uint8_t sender = k ? ends->far : ends->src, info = k ? INFO_COMBINE : 0;
            uint8_t receiver = k ? ends->src : ends->far;
            add_masks(out, num, (struct action){STEP_ARRIVE_TILE, sender, i, info},
                      streams[k]->flight, streams[k]->again);
            add_masks(out, num, (struct action){STEP_ARRIVE_CREDIT, receiver, i, info},
                      streams[k]->credit_flight, streams[k]->credit_again);
        }
    }
}

unsigned model_actions(const struct model *model, const struct state *state, struct action *out)
{
    unsigned num = 0;
    add_calls(model, state, out, &num);
    add_streams(model, state, out, &num);
    if (model->p.delays) {
        add_arrivals(model, state, out, &num);
    }
    return num;
}
