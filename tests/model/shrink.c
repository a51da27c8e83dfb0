/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A model of how a group changes: ranks that run, die, are taken for dead, vote, build again, and
 * newcomers; the store with its cards and decisions; writes that arrive at any later time, also
 * after their sender is dead or removed. Written from docs/faults.md; breadth first over all
 * states, so a counterexample is a shortest one. Each rule can be switched off, and must then
 * break.
 *
 * model_shrink: all cases. model_shrink CASE: one, with its trace.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "states.h"

enum { RANKS = 3, GENERATIONS = 5, FLIGHTS = 3 };

enum rule {
    RULE_CAS = 1,        /* the first proposal stays the decision */
    RULE_WAIT = 2,       /* collect all that are not gone or suspected */
    RULE_STAMP = 4,      /* a card counts for its generation alone */
    RULE_FRESH = 8,      /* a new generation has new windows */
    RULE_OPS = 16,       /* numbers: the largest next, the smallest completed */
    RULE_BARRIER = 32,   /* nobody runs before all have their windows */
    RULE_DEADLINE = 128, /* who waits for one that went on without it gives up */
    RULE_ALL = 255
};

enum pc { RUN, VOTE, BUILD, FINISHED, DEAD, OUT, NEW };

struct flight {
    uint8_t is_used, generation, op;
};

struct state {
    uint8_t pc[RANKS], generation[RANKS], mask[RANKS], op[RANKS], step[RANKS], posted[RANKS];
    uint8_t card[RANKS], card_new[RANKS], card_op[RANKS], card_step[RANKS];
    uint8_t built[RANKS];
    uint8_t decision[GENERATIONS], decision_op[GENERATIONS], decision_step[GENERATIONS];
    uint8_t adopted[GENERATIONS], all[GENERATIONS], suspected[GENERATIONS];
    uint8_t arrived[RANKS][RANKS]; /* [to][from] op + 1 */
    struct flight flights[RANKS][RANKS][FLIGHTS];
    uint8_t crashes, suspicions, restarts; /* left */
};

struct shrink_case {
    const char *name;
    uint8_t ranks, steps, crashes, suspicions, restarts;
    bool delays;        /* writes arrive at any later time; else at once */
    uint8_t off;        /* rules switched off */
    const char *broken; /* what must be found; NULL: safe */
};

struct run {
    const struct shrink_case *item;
    uint8_t rules;
    struct states states;
    uint32_t at; /* the state that is expanded */
    uint32_t num_next;
    const char *broken;
    uint32_t broken_at;
};

/* ---- the set of states ---------------------------------------------------------------------- */

/*
 * Writes that can do nothing any more (to a rank that is dead, or to a window that is not the live
 * one) are taken away, and the others of a pair sorted: states that differ in nothing else are one.
 */
static void normalise(struct state *s, bool is_fresh)
{
    for (int src = 0; src < RANKS; src++) {
        for (int dst = 0; dst < RANKS; dst++) {
            struct flight *flights = s->flights[src][dst], kept[FLIGHTS] = {{0, 0, 0}};
            int num = 0;
            bool is_away = s->pc[dst] == DEAD || s->pc[dst] == OUT || s->pc[dst] == NEW;
            for (int i = 0; i < FLIGHTS; i++) {
                bool is_late = is_fresh && flights[i].generation < s->generation[dst];
                if (flights[i].is_used && !is_away && !is_late) {
                    kept[num++] = flights[i];
                }
            }
            for (int i = 1; i < num; i++) {
                for (int j = i; j > 0 && memcmp(&kept[j - 1], &kept[j], sizeof kept[0]) > 0; j--) {
                    struct flight swap = kept[j];
                    kept[j] = kept[j - 1];
                    kept[j - 1] = swap;
                }
            }
            memcpy(flights, kept, sizeof kept);
        }
    }
}

static void add(struct run *run, const struct state *given, const char *what, int rank)
{
    struct state normal = *given, *state = &normal;
    normalise(state, (run->rules & RULE_FRESH) != 0);
    run->num_next++;
    states_add(&run->states, state, run->at, rank, what);
}

static void breaks(struct run *run, const char *what)
{
    if (run->broken == NULL) {
        run->broken = what;
        run->broken_at = run->at;
    }
}

/* ---- what ranks do -------------------------------------------------------------------------- */

static bool has(const struct run *run, enum rule rule)
{
    return (run->rules & rule) != 0;
}

static bool is_in(uint8_t mask, int rank)
{
    return (mask >> rank & 1) != 0;
}

/* What can be known of a member of a generation: its process is gone, replaced by another or not.
 */
static bool is_gone(const struct state *s, int rank, uint8_t generation)
{
    bool is_other = s->pc[rank] == NEW && !(s->card_new[rank] && s->card[rank] == generation);
    return s->pc[rank] == DEAD || is_other || s->pc[rank] == OUT;
}

static void vote(struct state *s, int r)
{
    s->pc[r] = VOTE;
    s->card[r] = s->generation[r] + 1;
    s->card_new[r] = 0;
    s->card_op[r] = s->op[r];
    s->card_step[r] = s->step[r];
}

static bool has_reason_to_vote(const struct run *run, const struct state *s, int r)
{
    for (int q = 0; q < run->item->ranks; q++) {
        bool is_member = is_in(s->mask[r], q) && q != r;
        bool is_told = is_member && s->pc[q] == VOTE && s->card[q] == s->generation[r] + 1;
        bool is_left = has(run, RULE_DEADLINE) && is_member && s->generation[q] > s->generation[r];
        if ((is_member && is_gone(s, q, s->generation[r])) || is_told || is_left) {
            return true;
        }
    }
    return false;
}

/* A newcomer waits, and all members stand between the same two steps. */
static bool may_grow(const struct run *run, const struct state *s, int r)
{
    bool waits = false;
    for (int q = 0; q < run->item->ranks; q++) {
        if (is_in(s->mask[r], q) &&
            (s->pc[q] != RUN || s->posted[q] || s->generation[q] != s->generation[r] ||
             s->step[q] != s->step[r])) {
            return false;
        }
        waits |= !is_in(s->mask[r], q) && s->pc[q] == NEW && s->card[q] == s->generation[r] + 1;
    }
    return waits;
}

static void post(struct run *run, struct state *s, int r)
{
    for (int q = 0; q < run->item->ranks; q++) {
        struct flight *flight = s->flights[r][q];
        if (q == r || !is_in(s->mask[r], q)) {
            continue;
        }
        while (flight->is_used) {
            flight++;
        }
        /* At once is enough where only the order in which it enables something differs. */
        if (!run->item->delays && s->generation[q] == s->generation[r] &&
            s->arrived[q][r] < s->op[r] + 1) {
            s->arrived[q][r] = s->op[r] + 1;
        }
        if (run->item->delays || s->generation[q] > s->generation[r]) {
            *flight = (struct flight){1, s->generation[r], s->op[r]};
        } else if (s->generation[q] < s->generation[r]) {
            breaks(run, "a write finds no window");
        }
    }
    s->posted[r] = 1;
}

static bool has_room(const struct run *run, const struct state *s, int r)
{
    for (int q = 0; q < run->item->ranks; q++) {
        if (s->flights[r][q][FLIGHTS - 1].is_used) {
            return false;
        }
    }
    return true;
}

static bool all_arrived(const struct run *run, const struct state *s, int r)
{
    for (int q = 0; q < run->item->ranks; q++) {
        if (q != r && is_in(s->mask[r], q) && s->arrived[r][q] < s->op[r] + 1) {
            return false;
        }
    }
    return true;
}

static void step_run(struct run *run, const struct state *from, int r)
{
    struct state s = *from;
    if (!s.posted[r] && has_room(run, &s, r)) {
        post(run, &s, r);
        add(run, &s, "posts", r);
    } else if (s.posted[r] && all_arrived(run, &s, r)) {
        s.posted[r] = 0;
        s.op[r]++;
        s.pc[r] = ++s.step[r] == run->item->steps ? FINISHED : RUN;
        add(run, &s, "completes", r);
    }
    s = *from;
    if (has_reason_to_vote(run, &s, r) || may_grow(run, &s, r)) {
        vote(&s, r);
        add(run, &s, "votes", r);
    }
    for (int q = 0; q < run->item->ranks && from->suspicions > 0; q++) {
        s = *from;
        if (q != r && is_in(s.mask[r], q) && !is_gone(&s, q, s.generation[r])) {
            s.suspicions--;
            s.suspected[s.generation[r] + 1] |= (uint8_t)(1 << q);
            vote(&s, r);
            add(run, &s, "suspects", r);
        }
    }
}

static bool counts(const struct run *run, const struct state *s, int r, int q)
{
    uint8_t wanted = s->generation[r] + 1;
    bool is_due = has(run, RULE_STAMP) ? s->card[q] == wanted : s->card[q] != 0;
    return is_due && s->card_new[q] == !is_in(s->mask[r], q);
}

static void decide(struct run *run, const struct state *from, int r)
{
    struct state s = *from;
    uint8_t g = s.generation[r] + 1;
    uint8_t mask = 0, op = 0, step = UINT8_MAX;
    for (int q = 0; q < run->item->ranks; q++) {
        bool is_here = counts(run, &s, r, q);
        bool may_miss =
            !is_in(s.mask[r], q) || is_gone(&s, q, s.generation[r]) || is_in(s.suspected[g], q);
        if (!is_here && !may_miss && has(run, RULE_WAIT)) {
            return;
        }
        mask |= (uint8_t)(is_here << q);
        if (is_here && !s.card_new[q]) {
            op = s.card_op[q] > op ? s.card_op[q] : op;
            step = s.card_step[q] < step ? s.card_step[q] : step;
        }
    }
    if (s.decision[g] != 0 && (has(run, RULE_CAS) || s.decision[g] == mask)) {
        return;
    }
    s.decision[g] = mask;
    s.decision_op[g] = op;
    s.decision_step[g] = step;
    add(run, &s, "decides", r);
}

static void adopt(struct run *run, const struct state *from, int r, uint8_t g)
{
    struct state s = *from;
    if (!is_in(s.decision[g], r)) {
        if (!is_in(s.suspected[g], r)) {
            breaks(run, "a rank that nobody suspects is left out");
        }
        s.pc[r] = OUT;
        add(run, &s, "is out", r);
        return;
    }
    if (s.adopted[g] != 0 && s.adopted[g] != s.decision[g]) {
        breaks(run, "two ranks of a generation differ on who lives");
    }
    s.adopted[g] = s.decision[g];
    bool is_new = s.pc[r] == NEW;
    s.pc[r] = BUILD;
    s.generation[r] = s.built[r] = g;
    s.mask[r] = s.decision[g];
    if (has(run, RULE_OPS) || is_new) {
        s.op[r] = s.decision_op[g];
        s.step[r] = s.decision_step[g];
    }
    s.posted[r] = 0;
    memset(s.arrived[r], 0, sizeof s.arrived[r]);
    add(run, &s, "adopts", r);
}

static void step_vote(struct run *run, const struct state *s, int r)
{
    uint8_t g = s->generation[r] + 1;
    decide(run, s, r);
    if (s->decision[g] != 0) {
        adopt(run, s, r, g);
    }
}

static void step_build(struct run *run, const struct state *from, int r)
{
    struct state s = *from;
    uint8_t g = s.generation[r];
    bool all_built = true;
    for (int q = 0; q < run->item->ranks; q++) {
        all_built &= !is_in(s.mask[r], q) || s.built[q] == g;
    }
    if (all_built && s.all[g] == 0 && (s.mask[r] & ((1 << r) - 1)) == 0) {
        s.all[g] = 1;
        add(run, &s, "leads", r);
    }
    s = *from;
    if (s.all[g] || !has(run, RULE_BARRIER)) {
        s.pc[r] = s.step[r] < run->item->steps ? RUN : FINISHED;
        add(run, &s, "runs", r);
    }
    s = *from;
    if (g + 1 < GENERATIONS && has_reason_to_vote(run, &s, r)) {
        vote(&s, r);
        add(run, &s, "votes again", r);
    }
}

static void step_new(struct run *run, const struct state *from, int r)
{
    struct state s = *from;
    uint8_t g = 1;
    while (g < GENERATIONS && s.decision[g] != 0) {
        g++;
    }
    if (s.card_new[r] && s.decision[s.card[r]] != 0 && is_in(s.decision[s.card[r]], r)) {
        adopt(run, from, r, s.card[r]);
        return;
    }
    if (g < GENERATIONS && !(s.card_new[r] && s.card[r] == g)) {
        s.card[r] = g;
        s.card_new[r] = 1;
        add(run, &s, "asks", r);
    }
}

/* A finished rank stands in the barrier at the end of its job: it can be called back. */
static void step_finished(struct run *run, const struct state *from, int r)
{
    struct state s = *from;
    if (s.generation[r] + 1 < GENERATIONS && has_reason_to_vote(run, &s, r)) {
        for (int q = 0; q < run->item->ranks; q++) {
            bool is_needed =
                is_in(s.mask[r], q) && s.pc[q] != FINISHED && !is_gone(&s, q, s.generation[r]);
            if (is_needed && q != r) {
                vote(&s, r);
                add(run, &s, "comes back", r);
                return;
            }
        }
    }
}

/* ---- what happens to them ------------------------------------------------------------------- */

static void land(struct run *run, const struct state *from, int src, int dst, int which)
{
    struct state s = *from;
    struct flight flight = s.flights[src][dst][which];
    for (int i = which; i + 1 < FLIGHTS; i++) {
        s.flights[src][dst][i] = s.flights[src][dst][i + 1];
    }
    s.flights[src][dst][FLIGHTS - 1] = (struct flight){0, 0, 0};
    if (s.pc[dst] != DEAD && s.pc[dst] != OUT && s.pc[dst] != NEW) {
        if (flight.generation > s.generation[dst]) {
            breaks(run, "a write finds no window");
        } else if (flight.generation == s.generation[dst]) {
            uint8_t *arrived = &s.arrived[dst][src];
            *arrived = flight.op + 1 > *arrived ? flight.op + 1 : *arrived;
        } else if (!has(run, RULE_FRESH)) {
            breaks(run, "a late write lands in a live buffer");
        } /* else it lands in memory that nobody reads */
    }
    add(run, &s, "is written to", dst);
}

static void accidents(struct run *run, const struct state *from, int r)
{
    struct state s = *from;
    bool is_alive = s.pc[r] == RUN || s.pc[r] == VOTE || s.pc[r] == BUILD;
    if (is_alive && s.crashes > 0) {
        s.crashes--;
        s.pc[r] = DEAD;
        add(run, &s, "dies", r);
    }
    s = *from;
    if (s.pc[r] == DEAD && s.restarts > 0) {
        s.restarts--;
        s.pc[r] = NEW;
        add(run, &s, "is replaced", r);
    }
    for (int q = 0; q < run->item->ranks; q++) {
        for (int i = 0; i < FLIGHTS; i++) {
            if (from->flights[r][q][i].is_used) {
                land(run, from, r, q, i);
            }
        }
    }
}

static void expand(struct run *run)
{
    struct state s; /* a copy: the array may move */
    memcpy(&s, states_at(&run->states, run->at), sizeof s);
    run->num_next = 0;
    for (int r = 0; r < run->item->ranks; r++) {
        switch (s.pc[r]) {
        case RUN:
            if (s.generation[r] + 1 < GENERATIONS) {
                step_run(run, &s, r);
            }
            break;
        case VOTE:
            step_vote(run, &s, r);
            break;
        case BUILD:
            step_build(run, &s, r);
            break;
        case FINISHED:
            step_finished(run, &s, r);
            break;
        case NEW:
            step_new(run, &s, r);
            break;
        default:
            break;
        }
        accidents(run, &s, r);
    }
    for (int r = 0; run->num_next == 0 && r < run->item->ranks; r++) {
        if (s.pc[r] == RUN || s.pc[r] == VOTE || s.pc[r] == BUILD) {
            breaks(run, "deadlock");
        }
    }
}

/* ---- cases ---------------------------------------------------------------------------------- */

static const struct shrink_case cases[] = {
    {"death-2-delays", 2, 2, 1, 0, 0, true, 0, NULL},
    {"slow-3-delays", 3, 1, 0, 1, 0, true, 0, NULL},
    {"death-3", 3, 2, 1, 0, 0, false, 0, NULL},
    {"deaths-3", 3, 1, 2, 0, 0, false, 0, NULL},
    {"slow-3", 3, 1, 0, 2, 0, false, 0, NULL},
    {"slow-and-death-3", 3, 1, 1, 1, 0, false, 0, NULL},
    {"replaced-2", 2, 2, 1, 0, 1, false, 0, NULL},
    {"replaced-2-delays", 2, 2, 1, 0, 1, true, 0, NULL},
    {"replaced-3", 3, 1, 1, 0, 1, false, 0, NULL},
    {"off-cas", 3, 1, 0, 2, 0, false, RULE_CAS, "two ranks of a generation differ on who lives"},
    {"off-wait", 3, 2, 1, 0, 0, false, RULE_WAIT, "a rank that nobody suspects is left out"},
    {"off-stamp", 3, 2, 2, 0, 0, false, RULE_STAMP, "deadlock"},
    {"off-fresh", 3, 1, 1, 0, 0, true, RULE_FRESH, "a late write lands in a live buffer"},
    {"off-ops", 3, 2, 1, 0, 0, false, RULE_OPS, "deadlock"},
    {"off-barrier", 3, 1, 1, 0, 0, true, RULE_BARRIER, "a write finds no window"},
    {"off-deadline", 3, 2, 0, 1, 0, false, RULE_DEADLINE, "deadlock"},
};

static bool explore(const struct shrink_case *item, bool is_traced)
{
    struct run run = {.item = item,
                      .rules = (uint8_t)(RULE_ALL & ~item->off),
                      .states = {.bytes = sizeof(struct state)}};
    struct state first;
    memset(&first, 0, sizeof first);
    for (int r = 0; r < item->ranks; r++) {
        first.mask[r] = (uint8_t)((1 << item->ranks) - 1);
    }
    first.crashes = item->crashes;
    first.suspicions = item->suspicions;
    first.restarts = item->restarts;
    add(&run, &first, "starts", 0);
    for (run.at = 0; run.at < run.states.num && run.broken == NULL; run.at++) {
        expand(&run);
    }
    bool is_right = item->broken == NULL
                        ? run.broken == NULL
                        : run.broken != NULL && strcmp(run.broken, item->broken) == 0;
    printf("%-18s %9u states  %s%s\n", item->name, run.states.num, run.broken ? run.broken : "safe",
           is_right ? "" : "   WRONG");
    if (run.broken != NULL && (is_traced || !is_right)) {
        states_print_trace(&run.states, run.broken_at);
    }
    fflush(stdout);
    states_free(&run.states);
    return is_right;
}

int main(int argc, char **argv)
{
    unsigned num = 0, wrong = 0;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        if (argc < 2 || strcmp(argv[1], cases[i].name) == 0) {
            num++;
            wrong += !explore(&cases[i], argc > 1);
        }
    }
    printf("%u models, %u not as expected\n", num, wrong);
    return wrong > 0 || num == 0;
}
