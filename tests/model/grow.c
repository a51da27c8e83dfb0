/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A model of a group that grows while it computes (dispatch/grow.c, transport/group_prepare.c,
 * transport/group.c): members begin to prepare, each when it comes to it; a thread of each, and of
 * the newcomer, makes the windows of the larger group; between two operations all vote, and change
 * over, or stay, or make everything anew. Anybody may die at any moment and be replaced, members
 * may be taken for dead, and what was written arrives at any later time. model_shrink has the
 * agreement itself; here a proposal is the decision at once. Breadth first over all states; each
 * rule can be switched off, and must then break.
 *
 * model_grow: all cases. model_grow CASE: one, with its trace.
 */
#include <stdio.h>
#include <string.h>

#include "grow.h"

void grow_breaks(struct run *run, const char *what)
{
    if (run->broken == NULL) {
        run->broken = what;
        run->broken_at = run->at;
    }
}

/* Writes that can do nothing any more are taken away, the others of a pair sorted. */
static void normalise(struct run *run, struct state *s)
{
    for (int src = 0; src < RANKS; src++) {
        for (int dst = 0; dst < RANKS; dst++) {
            struct flight *flights = s->flights[src][dst], kept[FLIGHTS];
            int num = 0;
            memset(kept, 0, sizeof kept);
            for (int i = 0; i < FLIGHTS; i++) {
                bool is_past = has(run, RULE_FRESH) && s->pc[dst] != NEW &&
                               flights[i].window.generation < s->window[dst].generation;
                if (flights[i].is_used && is_past) {
                    run->saw |= SAW_LATE;
                }
                if (flights[i].is_used && s->pc[dst] != DEAD && s->pc[dst] != OUT && !is_past) {
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

void grow_add(struct run *run, const struct state *given, const char *what, int rank)
{
    struct state normal;
    memcpy(&normal, given, sizeof normal);
    normalise(run, &normal);
    run->num_next++;
    states_add(&run->states, &normal, run->at, rank, what);
}

static void accidents(struct run *run, const struct state *from, int r)
{
    struct state s = *from;
    bool is_empty = s.pc[r] == NEW && s.card[r].generation == 0;
    if (s.deaths > 0 && r >= run->item->spare && s.pc[r] != DEAD && s.pc[r] != OUT &&
        s.pc[r] != FINISHED && !is_empty) {
        s.deaths--;
        s.pc[r] = DEAD;
        grow_drop(&s, r);
        grow_add(run, &s, "dies", r);
    }
    s = *from;
    if (s.restarts > 0 && s.pc[r] == DEAD) {
        s.restarts--;
        s.pc[r] = NEW;
        s.ticket[r]++;
        s.generation[r] = s.mask[r] = s.op[r] = s.posted[r] = s.num_begun[r] = 0;
        s.built[r] = s.is_hurt[r] = 0;
        memset(s.arrived[r], 0, sizeof s.arrived[r]);
        s.window[r] = (struct window){0, 0};
        grow_add(run, &s, "is replaced", r);
    }
    grow_land(run, from, r);
}

static void expand(struct run *run)
{
    struct state s; /* a copy: the array may move */
    memcpy(&s, states_at(&run->states, run->at), sizeof s);
    run->num_next = 0;
    for (int r = 0; r < RANKS; r++) {
        bool is_alive = s.pc[r] != DEAD && s.pc[r] != OUT;
        if (s.pc[r] == RUN || (s.pc[r] == FINISHED && grow_is_called(&s, r))) {
            grow_step_run(run, &s, r);
        } else if (s.pc[r] == VOTE) {
            grow_step_vote(run, &s, r);
        } else if (s.pc[r] == BUILD) {
            grow_step_build(run, &s, r);
        } else if (s.pc[r] == NEW) {
            grow_step_new(run, &s, r);
        }
        if (is_alive && s.prepared[r].work != NOTHING) {
            grow_prepare(run, &s, r);
        }
        accidents(run, &s, r);
    }
    for (int r = 0; run->num_next == 0 && r < RANKS; r++) {
        if (s.pc[r] == RUN || s.pc[r] == VOTE || s.pc[r] == BUILD) {
            grow_breaks(run, "deadlock");
        }
    }
}

/* ---- cases ---------------------------------------------------------------------------------- */

static const char NOT_PREPARED[] = "a rank is to take what it has not prepared";
static const char OTHER_PROCESS[] = "a rank takes what was made with another process";
static const char TOO_EARLY[] = "a write comes before its window lets it in";
static const char LATE_WRITE[] = "a late write lands in a live buffer";

/* members, operations; deaths, restarts, suspicions, preparations */
static const struct grow_case cases[] = {
    {"two-newcomers", 1, 1, 0, 0, 0, 1, false, 0, 0, SAW_TAKEN | SAW_KEPT | SAW_ANEW, NULL},
    {"one-newcomer", 2, 2, 0, 0, 0, 1, false, 0, 0, SAW_TAKEN | SAW_KEPT | SAW_ANEW, NULL},
    {"delays", 2, 1, 0, 0, 0, 1, true, 0, 0, SAW_TAKEN | SAW_LATE, NULL},
    {"death", 2, 1, 1, 0, 0, 1, false, 0, 0, SAW_TAKEN | SAW_KEPT | SAW_ANEW | SAW_FAILED, NULL},
    {"replaced", 2, 1, 1, 1, 0, 1, false, 2, 0, SAW_TAKEN | SAW_KEPT | SAW_FAILED, NULL},
    {"second", 2, 1, 1, 1, 0, 2, false, 2, 0, SAW_TAKEN | SAW_KEPT | SAW_SECOND, NULL},
    {"slow-delays", 2, 1, 0, 0, 1, 1, true, 0, 0, SAW_TAKEN | SAW_LATE, NULL},
    {"off-all-say", 2, 1, 0, 0, 0, 1, false, 0, RULE_ALL_SAY, 0, NOT_PREPARED},
    {"off-answer", 2, 1, 0, 0, 0, 1, false, 0, RULE_ANSWER, 0, NOT_PREPARED},
    {"off-ticket", 2, 1, 1, 1, 0, 1, false, 2, RULE_TICKET, 0, OTHER_PROCESS},
    {"off-first", 2, 1, 0, 0, 0, 1, false, 0, RULE_FIRST, 0, TOO_EARLY},
    {"off-fresh", 2, 1, 0, 0, 0, 1, true, 0, RULE_FRESH, 0, LATE_WRITE},
    {"off-drop", 2, 1, 1, 1, 1, 1, false, 2, RULE_DROP, 0, NOT_PREPARED},
};

static bool explore(const struct grow_case *item, bool is_traced)
{
    struct run run = {.item = item,
                      .rules = (uint8_t)(RULE_ALL & ~item->off),
                      .states = {.bytes = sizeof(struct state)}};
    struct state first;
    memset(&first, 0, sizeof first);
    for (int r = 0; r < RANKS; r++) {
        first.pc[r] = r < item->members ? RUN : NEW;
        first.mask[r] = r < item->members ? (uint8_t)((1 << item->members) - 1) : 0;
        first.ticket[r] = 1;
    }
    first.deaths = item->deaths;
    first.restarts = item->restarts;
    first.suspicions = item->suspicions;
    first.preparations = item->preparations;
    grow_add(&run, &first, "starts", 0);
    for (run.at = 0; run.at < run.states.num && run.broken == NULL; run.at++) {
        expand(&run);
    }
    bool is_right = item->broken == NULL
                        ? run.broken == NULL && (run.saw & item->sees) == item->sees
                        : run.broken != NULL && strcmp(run.broken, item->broken) == 0;
    printf("%-14s %9u states  %s, saw %02x%s\n", item->name, run.states.num,
           run.broken ? run.broken : "safe", run.saw, is_right ? "" : "   WRONG");
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
