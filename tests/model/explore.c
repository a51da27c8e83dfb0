/* SPDX-License-Identifier: Apache-2.0 */
/*
 * All reachable states, breadth first, so that the first counterexample is a shortest one.
 *
 * A state that was seen is remembered by a 64-bit fingerprint alone (chance of a mix-up at 10^7
 * states: about 3 in a million); whole states are kept only for the two levels in hand. The way to
 * a state is its parent's number and the action, and a trace is printed by running the actions
 * again. A depth-first search would need less memory but give traces of hundreds of steps.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

struct visit {
    uint64_t print;
    uint32_t parent;
    struct action action;
};

struct visits {
    struct visit *items;
    uint32_t num, room;
    uint32_t *table; /* number + 1; 0: empty */
    uint32_t mask;
};

struct level {
    uint8_t *bytes;
    uint32_t *numbers;
    uint32_t num, room;
};

static void *grown(void *old, size_t bytes)
{
    void *memory = realloc(old, bytes);
    if (!memory) {
        fprintf(stderr, "out of memory at %zu bytes\n", bytes);
        exit(2);
    }
    return memory;
}

static uint64_t mix(uint64_t x)
{
    x ^= x >> 32;
    x *= 0xd6e8feb86659fd93u;
    x ^= x >> 32;
    x *= 0xd6e8feb86659fd93u;
    return x ^ x >> 32;
}

static uint64_t fingerprint(const uint8_t *bytes, size_t length)
{
    uint64_t sum = 0x9e3779b97f4a7c15u;
    for (size_t at = 0; at < length; at += 8) {
        uint64_t word = 0;
        memcpy(&word, bytes + at, length - at < 8 ? length - at : 8);
        sum = mix(sum ^ mix(word + at));
    }
    return sum;
}

static void table_grow(struct visits *visits)
{
    uint32_t size = visits->mask ? 2 * (visits->mask + 1) : 1u << 16;
    free(visits->table);
    visits->table = grown(NULL, (size_t)size * sizeof(*visits->table));
    memset(visits->table, 0, (size_t)size * sizeof(*visits->table));
    visits->mask = size - 1;
    for (uint32_t i = 0; i < visits->num; i++) {
        uint32_t at = (uint32_t)visits->items[i].print & visits->mask;
        while (visits->table[at]) {
            at = (at + 1) & visits->mask;
        }
        visits->table[at] = i + 1;
    }
}

/* Whether it is new; its number is then num - 1. */
static bool visits_add(struct visits *visits, uint64_t print, uint32_t parent, struct action action)
{
    if (visits->num >= visits->mask / 3 * 2) {
        table_grow(visits);
    }
    uint32_t at = (uint32_t)print & visits->mask;
    while (visits->table[at]) {
        if (visits->items[visits->table[at] - 1].print == print) {
            return false;
        }
        at = (at + 1) & visits->mask;
    }
    if (visits->num == visits->room) {
        visits->room = visits->room ? 2 * visits->room : 1u << 15;
        visits->items = grown(visits->items, (size_t)visits->room * sizeof(*visits->items));
    }
    visits->items[visits->num] = (struct visit){print, parent, action};
    visits->table[at] = ++visits->num;
    return true;
}

static void level_add(struct level *level, const uint8_t *bytes, size_t length, uint32_t number)
{
    if (level->num == level->room) {
        level->room = level->room ? 2 * level->room : 1u << 12;
        level->bytes = grown(level->bytes, level->room * length);
        level->numbers = grown(level->numbers, level->room * sizeof(*level->numbers));
    }
    memcpy(level->bytes + level->num * length, bytes, length);
    level->numbers[level->num++] = number;
}

static void print_trace(const struct model *model, const struct visits *visits, uint32_t number)
{
    if (number != 0) {
        print_trace(model, visits, visits->items[number].parent);
        model_print_action(model, visits->items[number].action);
    }
}

static void print_ranks(const struct model *model, const struct state *state)
{
    for (uint8_t r = 0; r < model->num_ranks; r++) {
        printf("  rank %u: sent %u, completed %u%s\n", r, state->sent[r], state->done[r],
               state->inside[r] ? ", waits in complete" : "");
    }
}

/* All successors of one state; false: the search is over. */
static bool expand(const struct model *model, const struct state *state, uint32_t number,
                   struct visits *visits, struct level *next, struct result *result, bool trace)
{
    struct action actions[MAX_ACTIONS];
    uint8_t packed[sizeof(struct state)];
    unsigned num = model_actions(model, state, actions);
    uint32_t measure = model_measure(model, state);
    if (num == 0 && !model_finished(model, state)) {
        result->verdict = VERDICT_DEADLOCK;
        result->broken = "nobody can go on";
        if (trace) {
            print_trace(model, visits, number);
            print_ranks(model, state);
        }
        return false;
    }
    for (unsigned i = 0; i < num; i++) {
        struct state after = *state;
        const char *broken = model_apply(model, &after, actions[i]);
        result->transitions++;
        result->credits += actions[i].step == STEP_CREDIT;
        if (!broken && model_measure(model, &after) <= measure) {
            broken = "an action makes no progress, a run may never end";
        }
        if (broken) {
            result->verdict = VERDICT_VIOLATION;
            result->broken = broken;
            if (trace) {
                print_trace(model, visits, number);
                model_print_action(model, actions[i]);
            }
            return false;
        }
        model_pack(model, &after, packed);
        if (visits_add(visits, fingerprint(packed, model->packed_bytes), number, actions[i])) {
            level_add(next, packed, model->packed_bytes, visits->num - 1);
        }
    }
    return true;
}

struct result model_explore(const struct model *model, uint64_t max_states, bool trace)
{
    struct result result = {.verdict = VERDICT_SAFE, .broken = ""};
    struct visits visits = {0};
    struct level levels[2] = {{0}};
    struct state state = {0};
    uint8_t packed[sizeof(struct state)];
    bool going = true;

    model_pack(model, &state, packed);
    visits_add(&visits, fingerprint(packed, model->packed_bytes), 0, (struct action){0});
    level_add(&levels[0], packed, model->packed_bytes, 0);
    for (unsigned at = 0; going && levels[at].num > 0; at ^= 1) {
        struct level *now = &levels[at], *next = &levels[at ^ 1];
        next->num = 0;
        for (uint32_t i = 0; going && i < now->num; i++) {
            model_unpack(model, now->bytes + (size_t)i * model->packed_bytes, &state);
            going = expand(model, &state, now->numbers[i], &visits, next, &result, trace);
        }
        result.depth++;
        if (going && visits.num > max_states) {
            result.verdict = VERDICT_UNDECIDED;
            going = false;
        }
    }
    result.states = visits.num;
    free(visits.items);
    free(visits.table);
    for (unsigned k = 0; k < 2; k++) {
        free(levels[k].bytes);
        free(levels[k].numbers);
    }
    return result;
}
