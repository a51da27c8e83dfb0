/* SPDX-License-Identifier: Apache-2.0 */
/* Between grow.c (the search), grow_prepare.c (preparations, what is written) and grow_change.c
 * (votes, decisions, newcomers). */
#ifndef NEP_TESTS_MODEL_GROW_H
#define NEP_TESTS_MODEL_GROW_H

#include <stdbool.h>

#include "states.h"

enum { RANKS = 3, GENERATIONS = 6, NUMBERS = 3, FLIGHTS = 3, KEPT = 7, NOT_SET = 255 };

enum rule {
    RULE_ALL_SAY = 1, /* taken only where each member says that it has it, with nothing under way */
    RULE_ANSWER = 2,  /* and the newcomer: it knows the operation, too */
    RULE_TICKET = 4,  /* a seat in what is prepared is for the process that asked */
    RULE_FIRST = 8,   /* who says so has set where operations stand in what it prepared */
    RULE_FRESH = 16,  /* what is prepared has windows of its own */
    RULE_DROP = 32,   /* a decision ends what was prepared before it */
    RULE_ALL = 63
};

/* What is seen in a search, so that a safe one is not safe because nothing happens. */
enum { SAW_TAKEN = 1, SAW_KEPT = 2, SAW_ANEW = 4, SAW_LATE = 8, SAW_FAILED = 16, SAW_SECOND = 32 };

enum pc { RUN, VOTE, BUILD, FINISHED, DEAD, OUT, NEW };

enum work { NOTHING, DECIDING, MAKING, MADE, READY, FAILED };

/* Which windows: of a generation, made anew (0) or by a preparation of that number. */
struct window {
    uint8_t generation, number;
};

struct flight {
    struct window window; /* generation 0 is the first group's; is_used tells */
    uint8_t is_used, op;
};

struct prepared {
    uint8_t work, generation, number, mask, ticket;
    uint8_t seat, met; /* the newcomer's, and the process in it that it was made with */
    uint8_t op;        /* the first that is let in; NOT_SET: none */
    uint8_t arrived[RANKS];
};

struct state {
    uint8_t pc[RANKS], generation[RANKS], mask[RANKS], op[RANKS], posted[RANKS];
    uint8_t ticket[RANKS], is_hurt[RANKS];
    struct window window[RANKS];
    uint8_t arrived[RANKS][RANKS]; /* [to][from] op + 1 */
    uint8_t num_begun[RANKS];      /* since the last decision */
    struct prepared prepared[RANKS];
    /* the store */
    struct {
        uint8_t generation, is_new, number, op, ticket;
    } card[RANKS];
    uint8_t begun[RANKS][NUMBERS]; /* the card of preparation i, of that generation */
    struct {
        uint8_t number, mask, seat, ticket;
    } wanted[GENERATIONS];
    struct {
        uint8_t mask, kind, op; /* kind: 0 anew, KEPT, or a number */
        uint8_t ticket[RANKS];
    } decision[GENERATIONS];
    uint8_t suspected[GENERATIONS], built[RANKS];
    struct flight flights[RANKS][RANKS][FLIGHTS];
    uint8_t deaths, restarts, suspicions, preparations; /* left */
};

struct grow_case {
    const char *name;
    uint8_t members, steps, deaths, restarts, suspicions, preparations;
    bool delays;        /* writes arrive at any later time; else at once */
    uint8_t spare;      /* the first so many members do not die */
    uint8_t off;        /* rules switched off */
    uint8_t sees;       /* must be seen, if safe */
    const char *broken; /* what must be found; NULL: safe */
};

struct run {
    const struct grow_case *item;
    uint8_t rules;
    struct states states;
    uint32_t at;
    uint32_t num_next;
    uint8_t saw;
    const char *broken;
    uint32_t broken_at;
};

static inline bool has(const struct run *run, enum rule rule)
{
    return (run->rules & rule) != 0;
}

static inline bool is_in(uint8_t mask, int rank)
{
    return (mask >> rank & 1) != 0;
}

static inline bool is_away(const struct state *s, int r)
{
    return s->pc[r] == DEAD || s->pc[r] == OUT || s->pc[r] == NEW;
}

/* One more state that can be reached; and what must not happen. */
void grow_add(struct run *run, const struct state *given, const char *what, int rank);
void grow_breaks(struct run *run, const char *what);

/* grow_prepare.c. Each adds what can follow from a state by one step of rank r. */
bool grow_has_room(const struct state *s, int r);
void grow_post(struct run *run, struct state *s, int r);
void grow_land(struct run *run, const struct state *from, int src);
void grow_drop(struct state *s, int r);
void grow_begin(struct run *run, const struct state *from, int r);
void grow_prepare(struct run *run, const struct state *from, int r);
void grow_find(struct run *run, const struct state *from, int r);
void grow_answer(struct run *run, const struct state *from, int r);

/* grow_change.c */
bool grow_is_called(const struct state *s, int r);
void grow_step_run(struct run *run, const struct state *from, int r);
void grow_step_vote(struct run *run, const struct state *s, int r);
void grow_step_build(struct run *run, const struct state *from, int r);
void grow_step_new(struct run *run, const struct state *from, int r);

#endif
