/* SPDX-License-Identifier: Apache-2.0 */
/* What is written, and what is prepared. */
#include <string.h>

#include "grow.h"

static bool is_same(struct window a, struct window b)
{
    return a.generation == b.generation && a.number == b.number;
}

/* What a rank's preparation made; where windows are not its own, those that it has already. */
static bool has_prepared_window(const struct state *s, int r, struct window window)
{
    const struct prepared *p = &s->prepared[r];
    return (p->work == MADE || p->work == READY) &&
           is_same(window, (struct window){p->generation, p->number});
}

/* ---- writes --------------------------------------------------------------------------------- */

/* A write comes to dst. */
static void arrive(struct run *run, struct state *s, int src, int dst, struct window window,
                   uint8_t op)
{
    struct prepared *p = &s->prepared[dst];
    if (s->pc[dst] == DEAD || s->pc[dst] == OUT) {
        return;
    }
    if (s->pc[dst] != NEW && is_same(window, s->window[dst])) {
        uint8_t *arrived = &s->arrived[dst][src];
        *arrived = op + 1 > *arrived ? op + 1 : *arrived;
    } else if (has_prepared_window(s, dst, window)) {
        if (p->op == NOT_SET) {
            grow_breaks(run, "a write comes before its window lets it in");
        }
        p->arrived[src] = op + 1 > p->arrived[src] ? op + 1 : p->arrived[src];
    } else if (s->pc[dst] != NEW && window.generation <= s->window[dst].generation) {
        run->saw |= SAW_LATE;
        if (!has(run, RULE_FRESH)) {
            grow_breaks(run, "a late write lands in a live buffer");
        }
    } else if (is_in(s->mask[src], dst) && s->pc[src] != DEAD && s->pc[src] != OUT &&
               is_same(window, s->window[src]) && s->pc[dst] != NEW) {
        grow_breaks(run, "a write finds no window");
    } /* else the process that it was for has been replaced */
}

bool grow_has_room(const struct state *s, int r)
{
    for (int q = 0; q < RANKS; q++) {
        if (s->flights[r][q][FLIGHTS - 1].is_used) {
            return false;
        }
    }
    return true;
}

void grow_post(struct run *run, struct state *s, int r)
{
    s->posted[r] = 1;
    for (int q = 0; q < RANKS; q++) {
        struct flight *flight = s->flights[r][q];
        if (q == r || !is_in(s->mask[r], q)) {
            continue;
        }
        if (!run->item->delays) {
            arrive(run, s, r, q, s->window[r], s->op[r]);
            continue;
        }
        while (flight->is_used) {
            flight++;
        }
        *flight = (struct flight){.window = s->window[r], .is_used = 1, .op = s->op[r]};
    }
}

void grow_land(struct run *run, const struct state *from, int src)
{
    for (int dst = 0; dst < RANKS; dst++) {
        for (int i = 0; i < FLIGHTS && from->flights[src][dst][i].is_used; i++) {
            struct state s = *from;
            struct flight flight = s.flights[src][dst][i];
            s.flights[src][dst][i].is_used = 0;
            memmove(&s.flights[src][dst][i], &s.flights[src][dst][i + 1],
                    (size_t)(FLIGHTS - 1 - i) * sizeof flight);
            memset(&s.flights[src][dst][FLIGHTS - 1], 0, sizeof flight);
            arrive(run, &s, src, dst, flight.window, flight.op);
            grow_add(run, &s, "is written to", dst);
        }
    }
}

/* ---- preparing ------------------------------------------------------------------------------ */

void grow_drop(struct state *s, int r)
{
    memset(&s->prepared[r], 0, sizeof s->prepared[r]);
}

/* The engine begins on all members equally often: the next when all have begun the last. */
void grow_begin(struct run *run, const struct state *from, int r)
{
    struct state s = *from;
    uint8_t number = s.num_begun[r] + 1, g = s.generation[r] + 1;
    bool is_first = true, may_begin = number < NUMBERS && s.mask[r] != (1 << RANKS) - 1;
    for (int q = 0; q < RANKS; q++) {
        bool is_peer = q != r && is_in(s.mask[r], q) && !is_away(&s, q);
        if (is_peer && s.generation[q] == s.generation[r]) {
            is_first &= s.num_begun[q] < number;
            may_begin &= s.num_begun[q] + 1 >= number;
        }
    }
    if (!may_begin || (is_first && s.preparations == 0) || s.is_hurt[r]) {
        return;
    }
    s.preparations -= is_first;
    run->saw |= number == 2 ? SAW_SECOND : 0;
    grow_drop(&s, r);
    s.num_begun[r] = number;
    s.prepared[r].work = DECIDING;
    s.prepared[r].generation = g;
    s.prepared[r].number = number;
    s.prepared[r].op = NOT_SET;
    s.begun[r][number] = g;
    grow_add(run, &s, "begins", r);
}

/* The lowest member says who is in, once all have begun and a newcomer asks. */
static void lead(struct run *run, const struct state *from, int r)
{
    struct state s = *from;
    struct prepared *p = &s.prepared[r];
    uint8_t mask = 0, ticket = 0, seat = 0;
    for (int q = 0; q < RANKS; q++) {
        if (is_in(s.mask[r], q)) {
            if (s.begun[q][p->number] != p->generation) {
                return;
            }
            mask |= (uint8_t)(1 << q);
        } else if (s.card[q].is_new && s.card[q].generation == p->generation && ticket == 0) {
            mask |= (uint8_t)(1 << q);
            ticket = s.card[q].ticket;
            seat = (uint8_t)q;
        }
    }
    if (ticket == 0) {
        return;
    }
    if (s.wanted[p->generation].number < p->number) {
        s.wanted[p->generation].number = p->number;
        s.wanted[p->generation].mask = mask;
        s.wanted[p->generation].seat = seat;
        s.wanted[p->generation].ticket = ticket;
    }
    p->work = MAKING;
    p->mask = mask;
    p->seat = seat;
    p->ticket = ticket;
    grow_add(run, &s, "says who is in", r);
}

static bool is_in_it(const struct state *s, int q, const struct prepared *p)
{
    const struct prepared *other = &s->prepared[q];
    return !(s->pc[q] == DEAD || s->pc[q] == OUT) && other->generation == p->generation &&
           other->number == p->number && other->ticket == p->ticket &&
           (other->work == MAKING || other->work == MADE || other->work == READY);
}

/* A thread of a member, or of a newcomer that found that it is in. */
void grow_prepare(struct run *run, const struct state *from, int r)
{
    struct state s = *from;
    struct prepared *p = &s.prepared[r];
    bool all_made = true, can_fail = p->work == DECIDING;
    if (p->work == DECIDING && (s.mask[r] & ((1 << r) - 1)) == 0) {
        lead(run, from, r);
    } else if (p->work == DECIDING && s.wanted[p->generation].number >= p->number) {
        bool is_it = s.wanted[p->generation].number == p->number;
        p->work = is_it ? MAKING : FAILED;
        p->mask = s.wanted[p->generation].mask;
        p->seat = s.wanted[p->generation].seat;
        p->ticket = s.wanted[p->generation].ticket;
        grow_add(run, &s, is_it ? "learns who is in" : "is too late", r);
    } else if (p->work == MAKING) {
        p->work = MADE;
        grow_add(run, &s, "has made windows", r);
    }
    s = *from;
    for (int q = 0; q < RANKS; q++) {
        all_made &= !is_in(p->mask, q) || (is_in_it(&s, q, p) && s.prepared[q].work != MAKING);
        can_fail |= is_in(p->mask, q) && !is_in_it(&s, q, p) && s.prepared[q].work != READY;
    }
    if (p->work == MADE && all_made) {
        p->work = READY;
        p->met = s.ticket[p->seat];
        grow_add(run, &s, "is ready", r);
    }
    /* At the deadline, if nobody who is missing is going to come: a death, or a decision. */
    s = *from;
    if (p->work != READY && p->work != FAILED && can_fail) {
        run->saw |= SAW_FAILED;
        grow_drop(&s, r);
        s.prepared[r].work = FAILED;
        grow_add(run, &s, "fails to prepare", r);
    }
}

/* ---- a newcomer's -------------------------------------------------------------------------- */

void grow_find(struct run *run, const struct state *from, int r)
{
    struct state s = *from;
    uint8_t g = s.card[r].generation, number = s.wanted[g].number;
    if (number <= s.num_begun[r]) {
        return;
    }
    bool is_seated =
        is_in(s.wanted[g].mask, r) && (s.wanted[g].ticket == s.ticket[r] || !has(run, RULE_TICKET));
    grow_drop(&s, r);
    s.num_begun[r] = number;
    if (is_seated) {
        s.prepared[r].work = MAKING;
        s.prepared[r].generation = g;
        s.prepared[r].number = number;
        s.prepared[r].mask = s.wanted[g].mask;
        s.prepared[r].seat = (uint8_t)r;
        s.prepared[r].ticket = s.wanted[g].ticket;
        s.prepared[r].op = NOT_SET;
    }
    grow_add(run, &s, is_seated ? "finds that it is in" : "finds that it is not in", r);
}

/* Ready, and members want to change over: it learns where they are, and says so. */
void grow_answer(struct run *run, const struct state *from, int r)
{
    const struct prepared *p = &from->prepared[r];
    for (int q = 0; q < RANKS; q++) {
        if (q != r && p->work == READY && from->card[r].number == 0 && is_in(p->mask, q) &&
            !from->card[q].is_new && from->card[q].generation == p->generation &&
            from->card[q].number == p->number) {
            struct state s = *from;
            s.prepared[r].op = s.card[q].op;
            s.card[r].number = p->number;
            s.card[r].op = s.card[q].op;
            grow_add(run, &s, "answers", r);
            return;
        }
    }
}
