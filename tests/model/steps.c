/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an action does, and the properties that must hold whatever the rules were: no put into a
 * slot that somebody still reads, every read of exactly its tile, every immediate decoded to its
 * number, no completion with something missing, nothing lent handed back to the caller while it is
 * read.
 */
#include <stdio.h>

#include "model.h"

/*
 * What a receiver makes of the low bits of `number`: the one of [base, base + room) that has them,
 * or -1, dropped as old, when there is none.
 */
static int decode(const struct model *model, int number, int base, int room)
{
    int modulus = model->modulus, ahead = ((number - base) % modulus + modulus) % modulus;
    return ahead < room ? base + ahead : -1;
}

static const char *check_decode(const struct model *model, const struct state *state, uint8_t link,
                                bool combine, uint8_t q, bool repeat)
{
    const struct stream *stream = combine ? &state->combine[link] : &state->dispatch[link];
    const struct link *ends = &model->links[link];
    /* What the landing rank itself has read; where ranks step over tiles, what all have read. */
    int base = combine         ? model->stream_used[link][state->sums[ends->src]]
               : model->p.skip ? dispatch_read_by_all(model, state, link)
                               : state->read[link][model->lane[ends->far]];
    int heard = decode(model, q, model->p.imm_stale ? stream->said : base, model->tile_slots);
    if (heard == q || (heard < 0 && repeat)) {
        return NULL;
    }
    return heard < 0 ? "a new tile is dropped as an old one"
                     : "an immediate is taken for another tile";
}

static const char *post(const struct model *model, struct state *state, uint8_t link, bool combine)
{
    struct stream *stream = combine ? &state->combine[link] : &state->dispatch[link];
    uint8_t q = stream->posted++;
    uint8_t used = combine ? model->stream_used[link][state->sums[model->links[link].src]]
                           : dispatch_read_by_all(model, state, link);
    if (q >= used + model->tile_slots) {
        return "a tile is put into a slot whose tile a reader has not read";
    }
    if (!model->p.delays) {
        return check_decode(model, state, link, combine, q, false);
    }
    stream->flight |= 1u << q;
    stream->again |= model->p.repeats ? 1u << q : 0;
    return NULL;
}

static const char *post_counts(const struct model *model, struct state *state, uint8_t rank)
{
    uint8_t op = state->sent[rank]++;
    for (uint8_t to = 0; to < model->num_ranks; to++) {
        bool own = model->node[to] == model->node[rank];
        if (!own && !model->told[op][rank][to]) {
            continue;
        }
        uint8_t node = model->node[to];
        for (uint8_t y = model->first[node]; y < model->first[node + 1]; y++) {
            if (op >= state->done[y] + model->slots) {
                return "COUNTS are put into a slot that a rank of the node still needs";
            }
        }
        if (!own && model->p.delays) {
            state->counts_flight[rank][to] |= (uint8_t)(1u << op);
            state->counts_again[rank][to] |= (uint8_t)(model->p.repeats ? 1u << op : 0);
        }
    }
    return NULL;
}

/* The send half: COUNTS, then what credits and rings allow at this moment, never a wait. */
static const char *apply_send(const struct model *model, struct state *state, uint8_t rank)
{
    struct range range = range_in_send(model, state->sent[rank]);
    const char *broken = post_counts(model, state, rank);
    bool moved = true;
    while (moved && !broken) {
        moved = false;
        for (uint8_t s = 0; s < model->num_ranks; s++) {
            while (may_stage(model, state, rank, s, range)) {
                state->staged[rank][s]++;
                moved = true;
            }
        }
        for (uint8_t i = 0; i < model->num_streams && !broken; i++) {
            if (model->links[i].src == rank && may_post(model, state, i, range)) {
                broken = post(model, state, i, false);
                moved = true;
            } else if (model->links[i].far == rank && may_sum_post(model, state, i, range)) {
                broken = post(model, state, i, true);
                moved = true;
            }
        }
    }
    return broken;
}

static const char *apply_finish(const struct model *model, struct state *state, uint8_t rank)
{
    uint8_t op = state->done[rank]++, node = model->node[rank];
    state->inside[rank] = 0;
    if (state->sums[rank] < model->sums_end[rank][op + 1]) {
        return "a combine completes with a tile missing";
    }
    for (uint8_t i = 0; i < model->num_streams; i++) {
        if (model->links[i].node == node &&
            state->read[i][model->lane[rank]] < model->dispatch_end[i][op + 1]) {
            return "a dispatch completes with a tile missing";
        }
    }
    for (uint8_t y = model->first[node]; y < model->first[node + 1]; y++) {
        if (model->p.ops[op] == 'D' && (state->home[y] <= op || state->sent[y] <= op)) {
            return "an input goes back to its caller while a neighbour reads it";
        }
    }
    for (uint8_t s = 0; s < model->num_ranks; s++) {
        const uint8_t *end = model->node[s] == node ? model->home_end[s]
                                                    : model->combine_end[model->link_of[s][node]];
        if (ring_used(model, state, rank, s) < end[op + 1]) {
            return "staged rows go back to their rank before they are summed";
        }
    }
    return NULL;
}

static const char *read_tile(const struct model *model, struct state *state, uint8_t rank,
                             uint8_t link)
{
    uint8_t q = state->read[link][model->lane[rank]]++;
    bool newest = state->dispatch[link].posted <= q + model->tile_slots;
    return newest ? NULL : "a reader finds another tile in the slot";
}

static const char *read_all(const struct model *model, struct state *state, uint8_t rank)
{
    struct range range = range_now(model, state, rank);
    const char *broken = NULL;
    for (uint8_t op = range.from; op < range.to; op++) {
        bool any = false;
        if (model->p.ops[op] == 'D' && state->home[rank] <= op) {
            state->home[rank] = (uint8_t)(op + 1);
            any = true;
        }
        for (uint8_t i = 0; i < model->num_streams; i++) {
            if (model->links[i].node == model->node[rank] &&
                state->read[i][model->lane[rank]] < model->dispatch_end[i][op + 1]) {
                const char *now = read_tile(model, state, rank, i);
                broken = broken ? broken : now;
                any = true;
            }
        }
        if (any) {
            break;
        }
    }
    return broken;
}

static const char *home_sum(const struct model *model, struct state *state, uint8_t rank)
{
    uint8_t step = state->sums[rank]++;
    for (uint8_t i = 0; i < model->num_streams; i++) {
        uint8_t q = model->stream_used[i][step];
        if (model->links[i].src == rank && model->stream_used[i][step + 1] > q &&
            state->combine[i].posted > q + model->tile_slots) {
            return "a sum finds another tile in the slot";
        }
    }
    return NULL;
}

static const char *credit(const struct model *model, struct state *state, struct action action)
{
    bool combine = action.info & INFO_COMBINE;
    struct stream *stream =
        combine ? &state->combine[action.other] : &state->dispatch[action.other];
    uint8_t number = action.info & INFO_NUMBER;
    stream->said = number;
    if (!model->p.delays) {
        stream->credit = number;
    } else {
        stream->credit_flight |= 1u << number;
        stream->credit_again |= model->p.repeats ? 1u << number : 0;
    }
    return NULL;
}

static const char *arrive_counts(const struct model *model, struct state *state,
                                 struct action action)
{
    uint8_t op = action.info & INFO_NUMBER, from = action.rank, to = action.other;
    bool repeat = action.info & INFO_REPEAT;
    uint8_t *mask = repeat ? &state->counts_again[from][to] : &state->counts_flight[from][to];
    *mask &= (uint8_t) ~(1u << op);
    if (repeat && state->sent[from] > op + model->slots) {
        return "repeated COUNTS are written over newer ones";
    }
    int heard = decode(model, op, state->done[to], model->slots);
    /* A rank that only wants to know its sums may have completed without: it wants none then. */
    bool may_drop = repeat || model->landing[from][model->node[to]] != to;
    if (heard == op || (heard < 0 && may_drop)) {
        return NULL;
    }
    return heard < 0 ? "new COUNTS are dropped as old ones"
                     : "COUNTS are taken for another operation's";
}

static const char *arrive_tile(const struct model *model, struct state *state, struct action action)
{
    bool combine = action.info & INFO_COMBINE, repeat = action.info & INFO_REPEAT;
    struct stream *stream =
        combine ? &state->combine[action.other] : &state->dispatch[action.other];
    uint8_t q = action.info & INFO_NUMBER;
    *(repeat ? &stream->again : &stream->flight) &= ~(1u << q);
    if (repeat && stream->posted > q + model->tile_slots) {
        return "a repeated tile is written over a newer one";
    }
    return check_decode(model, state, action.other, combine, q, repeat);
}

static const char *arrive_credit(const struct model *model, struct state *state,
                                 struct action action)
{
    bool combine = action.info & INFO_COMBINE, repeat = action.info & INFO_REPEAT;
    struct stream *stream =
        combine ? &state->combine[action.other] : &state->dispatch[action.other];
    uint8_t number = action.info & INFO_NUMBER;
    *(repeat ? &stream->credit_again : &stream->credit_flight) &= ~(1u << number);
    if (model->p.credit_written) {
        stream->credit = number;
        return NULL;
    }
    int known = combine ? combine_freed(model, state, action.other)
                        : dispatch_freed(model, state, action.other);
    known = model->p.credit_stale ? stream->credit : known;
    int heard = decode(model, number, known, stream->posted - known + 1);
    if (heard > known) {
        stream->credit = (uint8_t)heard;
    }
    if (heard < 0 && number > known) {
        return "a new CREDIT is dropped as an old one";
    }
    return heard < 0 || heard == number ? NULL : "a CREDIT is taken for another number";
}

const char *model_apply(const struct model *model, struct state *state, struct action action)
{
    switch ((enum step)action.step) {
    case STEP_SEND:
        return apply_send(model, state, action.rank);
    case STEP_ENTER:
        state->inside[action.rank] = 1;
        return NULL;
    case STEP_FINISH:
        return apply_finish(model, state, action.rank);
    case STEP_HOME:
        state->home[action.rank] = (uint8_t)(action.info + 1);
        return NULL;
    case STEP_READ:
        return read_tile(model, state, action.rank, action.other);
    case STEP_READ_ALL:
        return read_all(model, state, action.rank);
    case STEP_POST:
    case STEP_SUM_POST:
        return post(model, state, action.other, action.step == STEP_SUM_POST);
    case STEP_STAGE:
        state->staged[action.rank][action.other]++;
        return NULL;
    case STEP_HOME_SUM:
        return home_sum(model, state, action.rank);
    case STEP_CREDIT:
        return credit(model, state, action);
    case STEP_ARRIVE_COUNTS:
        return arrive_counts(model, state, action);
    case STEP_ARRIVE_TILE:
        return arrive_tile(model, state, action);
    case STEP_ARRIVE_CREDIT:
        return arrive_credit(model, state, action);
    }
    return "an unknown step";
}

bool model_finished(const struct model *model, const struct state *state)
{
    for (uint8_t r = 0; r < model->num_ranks; r++) {
        if (state->done[r] < model->num_ops) {
            return false;
        }
    }
    return true; /* without actions left, nothing is in flight either */
}

static void print_stream(const struct model *model, const char *what, struct action action)
{
    const struct link *ends = &model->links[action.other];
    bool combine = action.info & INFO_COMBINE;
    printf("%s%s %u of %s stream %u -> %u", action.info & INFO_REPEAT ? "repeat of " : "", what,
           action.info & INFO_NUMBER, combine ? "combine" : "dispatch",
           combine ? ends->far : ends->src, combine ? ends->src : ends->far);
}

void model_print_action(const struct model *model, struct action action)
{
    unsigned number = action.info & INFO_NUMBER;
    char kind = number < model->num_ops ? model->p.ops[number] : '?';
    printf("  rank %u: ", action.rank);
    switch ((enum step)action.step) {
    case STEP_SEND:
        printf("send %u (%c)", number, kind);
        break;
    case STEP_ENTER:
        printf("enters complete %u (%c)", number, kind);
        break;
    case STEP_FINISH:
        printf("complete %u (%c) returns", number, kind);
        break;
    case STEP_HOME:
        printf("reads the rows of its node, op %u", number);
        break;
    case STEP_READ:
        print_stream(model, "reads tile", action);
        break;
    case STEP_READ_ALL:
        printf("reads the next tile of all its streams");
        break;
    case STEP_POST:
        print_stream(model, "puts tile", action);
        break;
    case STEP_SUM_POST:
        print_stream(model, "sums and puts tile", action);
        break;
    case STEP_STAGE:
        printf("stages chunk %u for source %u", number, action.other);
        break;
    case STEP_HOME_SUM:
        printf("home sum %u", number);
        break;
    case STEP_CREDIT:
        print_stream(model, "sends CREDIT", action);
        break;
    case STEP_ARRIVE_COUNTS:
        printf("%sCOUNTS %u (%c) arrive at rank %u", action.info & INFO_REPEAT ? "repeated " : "",
               number, kind, action.other);
        break;
    case STEP_ARRIVE_TILE:
        print_stream(model, "arrives: tile", action);
        break;
    case STEP_ARRIVE_CREDIT:
        print_stream(model, "arrives: CREDIT", action);
        break;
    }
    printf("\n");
}
