/* SPDX-License-Identifier: Apache-2.0 */
/* Operations, votes, what is decided and taken. */
#include <string.h>

#include "grow.h"

static bool is_member_gone(const struct state *s, int r)
{
    for (int q = 0; q < RANKS; q++) {
        if (q != r && is_in(s->mask[r], q) &&
            (is_away(s, q) || (s->ticket[q] > 1 && s->generation[q] < s->generation[r]))) {
            return true;
        }
    }
    return false;
}

/* ---- changing ------------------------------------------------------------------------------- */

static void vote(struct run *run, const struct state *from, int r, bool is_hurt)
{
    struct state s = *from;
    struct prepared *p = &s.prepared[r];
    bool has_it = p->work == READY && !is_hurt && !s.posted[r];
    s.pc[r] = VOTE;
    s.is_hurt[r] = is_hurt;
    s.card[r].generation = s.generation[r] + 1;
    s.card[r].is_new = 0;
    s.card[r].number = has_it ? p->number : 0;
    s.card[r].op = s.op[r];
    s.card[r].ticket = s.ticket[r];
    if (has_it && has(run, RULE_FIRST)) {
        p->op = s.op[r];
    }
    grow_add(run, &s, has_it ? "votes for what is prepared" : "votes", r);
}

/* All stand between the same two operations, or one that stood there has voted. */
static bool is_time(const struct state *s, int r)
{
    bool is_met = !s->posted[r], asks = false;
    for (int q = 0; q < RANKS; q++) {
        if (q != r && is_in(s->mask[r], q) && !is_away(s, q)) {
            is_met &= s->op[q] == s->op[r] && !s->posted[q] &&
                      s->generation[q] == s->generation[r] && s->pc[q] != BUILD;
        }
        asks |= s->pc[q] == NEW && s->card[q].generation == s->generation[r] + 1 &&
                !is_in(s->mask[r], q);
    }
    return is_met && (s->num_begun[r] > 0 || asks);
}

bool grow_is_called(const struct state *s, int r)
{
    for (int q = 0; q < RANKS; q++) {
        bool is_member = q != r && is_in(s->mask[r], q);
        if (is_member && ((s->pc[q] == VOTE && s->card[q].generation == s->generation[r] + 1) ||
                          (s->pc[q] != NEW && s->generation[q] > s->generation[r]))) {
            return true;
        }
    }
    return false;
}

void grow_step_run(struct run *run, const struct state *from, int r)
{
    struct state s = *from;
    bool all_arrived = true;
    for (int q = 0; q < RANKS; q++) {
        all_arrived &= q == r || !is_in(s.mask[r], q) || s.arrived[r][q] > s.op[r];
    }
    if (s.pc[r] == RUN && !s.posted[r] && grow_has_room(&s, r)) {
        grow_post(run, &s, r);
        grow_add(run, &s, "posts", r);
    } else if (s.pc[r] == RUN && s.posted[r] && all_arrived) {
        s.posted[r] = 0;
        s.pc[r] = ++s.op[r] == run->item->steps ? FINISHED : RUN;
        grow_add(run, &s, "completes", r);
    }
    if (s.generation[r] + 1 >= GENERATIONS) {
        return;
    }
    if (from->pc[r] == RUN) {
        grow_begin(run, from, r);
    }
    bool is_gone = is_member_gone(from, r);
    if (is_time(from, r)) {
        vote(run, from, r, false);
    }
    if (is_gone || grow_is_called(from, r)) {
        vote(run, from, r, true);
    }
    for (int q = 0; q < RANKS && from->suspicions > 0; q++) {
        if (q != r && is_in(from->mask[r], q) && !is_away(from, q) && from->posted[r]) {
            s = *from;
            s.suspicions--;
            s.suspected[s.generation[r] + 1] |= (uint8_t)(1 << q);
            vote(run, &s, r, true);
        }
    }
}

/* What the members' cards say of what is prepared: its number, or 0. */
static uint8_t said_by_members(const struct run *run, const struct state *s, int r, uint8_t mask,
                               uint8_t *op_p)
{
    uint8_t number = 0, op = 0;
    bool all_say = true, is_one = false;
    for (int q = 0; q < RANKS; q++) {
        if (!is_in(s->mask[r], q)) {
            continue;
        }
        bool is_here = is_in(mask, q);
        op = is_here && s->card[q].op > op ? s->card[q].op : op;
        all_say &= is_here && s->card[q].number != 0 && (!is_one || s->card[q].number == number);
        number = is_here && s->card[q].number != 0 ? s->card[q].number : number;
        is_one = true;
    }
    for (int q = 0; q < RANKS; q++) {
        all_say &= !is_in(mask, q) || !is_in(s->mask[r], q) || s->card[q].op == op;
    }
    *op_p = op;
    return all_say || !has(run, RULE_ALL_SAY) ? number : 0;
}

static void propose(struct run *run, const struct state *from, int r, uint8_t mask, uint8_t kind,
                    uint8_t op)
{
    struct state s = *from;
    uint8_t g = s.generation[r] + 1;
    s.decision[g].mask = mask;
    s.decision[g].kind = kind;
    s.decision[g].op = op;
    for (int q = 0; q < RANKS; q++) {
        s.decision[g].ticket[q] = is_in(mask, q) ? s.card[q].ticket : 0;
    }
    grow_add(run, &s,
             kind == KEPT ? "decides to stay"
             : kind != 0  ? "decides to take"
                          : "decides",
             r);
}

static void decide(struct run *run, const struct state *s, int r)
{
    uint8_t g = s->generation[r] + 1, mask = 0, new_mask = 0, op = 0;
    for (int q = 0; q < RANKS; q++) {
        bool is_member = is_in(s->mask[r], q);
        bool is_here = s->card[q].generation == g && s->card[q].is_new == !is_member;
        bool is_gone = is_away(s, q) || is_in(s->suspected[g], q);
        if (is_member && !is_here && !is_gone) {
            return;
        }
        mask |= (uint8_t)((is_member && is_here) << q);
        new_mask |= (uint8_t)((!is_member && is_here) << q);
    }
    uint8_t number = said_by_members(run, s, r, mask, &op);
    const uint8_t in_it = s->wanted[g].mask & (uint8_t)~s->mask[r];
    if (number == 0) {
        propose(run, s, r, mask | new_mask, 0, op);
        return;
    }
    bool has_answered = true;
    for (int q = 0; q < RANKS; q++) {
        bool is_it = s->card[q].generation == g && s->card[q].number == number &&
                     s->card[q].op == op &&
                     (s->card[q].ticket == s->wanted[g].ticket || !has(run, RULE_TICKET));
        has_answered &= !is_in(in_it, q) || is_it || !has(run, RULE_ANSWER);
    }
    if (has_answered) {
        propose(run, s, r, mask | in_it, number, op);
    }
    if (!has_answered || s->restarts + s->deaths > 0) { /* it may be late, too */
        propose(run, s, r, mask, KEPT, op);
    }
}

/* The prepared windows are those in use from now on. */
static void take(struct run *run, struct state *s, int r, uint8_t g)
{
    struct prepared *p = &s->prepared[r];
    if (p->work != READY || p->generation != g || p->number != s->decision[g].kind) {
        grow_breaks(run, "a rank is to take what it has not prepared");
    }
    if (p->mask != s->decision[g].mask) {
        grow_breaks(run, "a rank takes what was prepared for others");
    }
    if (p->met != s->decision[g].ticket[p->seat]) {
        grow_breaks(run, "a rank takes what was made with another process");
    }
    if (s->posted[r]) {
        grow_breaks(run, "an operation under way is forgotten");
    }
    run->saw |= SAW_TAKEN;
    s->window[r] = (struct window){p->generation, p->number};
    memcpy(s->arrived[r], p->arrived, sizeof p->arrived);
    s->pc[r] = RUN;
    s->mask[r] = s->decision[g].mask;
}

static void adopt(struct run *run, const struct state *from, int r, uint8_t g)
{
    struct state s = *from;
    bool is_new = s.pc[r] == NEW;
    if (!is_in(s.decision[g].mask, r)) {
        s.pc[r] = OUT;
        grow_drop(&s, r);
        grow_add(run, &s, "is out", r);
        return;
    }
    uint8_t kind = s.decision[g].kind;
    if (kind == KEPT) {
        run->saw |= SAW_KEPT;
        s.pc[r] = RUN;
    } else if (kind != 0) {
        take(run, &s, r, g);
    } else {
        run->saw |= SAW_ANEW;
        s.pc[r] = BUILD;
        s.window[r] = (struct window){g, 0};
        s.built[r] = g;
        s.mask[r] = s.decision[g].mask;
        s.posted[r] = 0;
        memset(s.arrived[r], 0, sizeof s.arrived[r]);
    }
    s.op[r] = kind == KEPT ? s.op[r] : s.decision[g].op;
    s.generation[r] = g;
    s.is_hurt[r] = 0;
    s.num_begun[r] = 0;
    if (has(run, RULE_DROP) || kind != 0 || is_new) {
        grow_drop(&s, r);
    }
    if (s.pc[r] == RUN && s.op[r] == run->item->steps) {
        s.pc[r] = FINISHED;
    }
    grow_add(run, &s, "adopts", r);
}

void grow_step_vote(struct run *run, const struct state *s, int r)
{
    uint8_t g = s->generation[r] + 1;
    if (s->decision[g].mask == 0) {
        decide(run, s, r);
    } else {
        adopt(run, s, r, g);
    }
}

void grow_step_build(struct run *run, const struct state *from, int r)
{
    struct state s = *from;
    bool all_built = true;
    for (int q = 0; q < RANKS; q++) {
        all_built &= !is_in(s.mask[r], q) || (s.built[q] >= s.generation[r] && !is_away(&s, q));
    }
    if (all_built) {
        s.pc[r] = s.op[r] < run->item->steps ? RUN : FINISHED;
        grow_add(run, &s, "runs", r);
    } else if (s.generation[r] + 1 < GENERATIONS &&
               (is_member_gone(&s, r) || grow_is_called(&s, r))) {
        vote(run, from, r, true);
    }
}

/* ---- a newcomer ----------------------------------------------------------------------------- */

void grow_step_new(struct run *run, const struct state *from, int r)
{
    struct state s = *from;
    uint8_t g = s.card[r].generation;
    bool has_asked = s.card[r].is_new && s.card[r].ticket == s.ticket[r] && g != 0;
    if (has_asked && s.decision[g].mask != 0 && is_in(s.decision[g].mask, r) &&
        s.decision[g].ticket[r] == s.ticket[r]) {
        adopt(run, from, r, g);
        return;
    }
    uint8_t next = 1;
    while (next < GENERATIONS && s.decision[next].mask != 0) {
        next++;
    }
    if (next < GENERATIONS && (!has_asked || g != next)) {
        grow_drop(&s, r);
        s.num_begun[r] = 0;
        s.card[r].generation = next;
        s.card[r].is_new = 1;
        s.card[r].number = s.card[r].op = 0;
        s.card[r].ticket = s.ticket[r];
        grow_add(run, &s, "asks", r);
    } else if (has_asked && g == next) {
        grow_find(run, from, r);
        grow_answer(run, from, r);
    }
}
