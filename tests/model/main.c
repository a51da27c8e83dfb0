/* SPDX-License-Identifier: Apache-2.0 */
/*
 * model_check GROUP... | --big | --list | -- WORDS: runs the cases of cases.c, or one model given
 * by its words, and compares each verdict with what is expected. A case that must break a property
 * and does not fails the test, so that a checker which has gone blind is noticed.
 */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "cases.h"

static const char *verdict_name(enum verdict verdict)
{
    static const char *const names[] = {"safe", "violation", "deadlock", "undecided"};
    return names[verdict];
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static bool explore(const char *words, uint64_t max_states, bool trace, struct result *result)
{
    static struct model model;
    struct options options;
    if (!options_parse(words, &options) || !model_init(&model, &options.params)) {
        fprintf(stderr, "model: \"%s\" is no model, or too large a one\n", words);
        return false;
    }
    double start = seconds();
    *result = model_explore(&model, max_states, trace);
    printf("%-9s %9llu states %10llu steps %8llu credits, %3u deep, %5.1f s  %s%s%s\n",
           verdict_name(result->verdict), (unsigned long long)result->states,
           (unsigned long long)result->transitions, (unsigned long long)result->credits,
           result->depth, seconds() - start, words, result->broken[0] ? ": " : "", result->broken);
    fflush(stdout);
    return true;
}

static bool run_case(const struct model_case *item)
{
    struct result result;
    if (!explore(item->words, UINT32_MAX / 2, item->expect != VERDICT_SAFE, &result)) {
        return false;
    }
    if (result.verdict != item->expect ||
        (item->broken && strcmp(item->broken, result.broken) != 0)) {
        printf("WRONG: expected %s%s%s\n", verdict_name(item->expect), item->broken ? ": " : "",
               item->broken ? item->broken : "");
        return false;
    }
    return true;
}

static int run_words(int argc, char **argv)
{
    char words[256] = "";
    struct result result;
    for (int i = 0; i < argc; i++) {
        if (strlen(words) + strlen(argv[i]) + 2 > sizeof(words)) {
            return 2;
        }
        strcat(strcat(words, i ? " " : ""), argv[i]);
    }
    return explore(words, UINT32_MAX / 2, true, &result) ? result.verdict != VERDICT_SAFE : 2;
}

int main(int argc, char **argv)
{
    unsigned num = 0, wrong = 0;
    if (argc > 1 && strcmp(argv[1], "--") == 0) {
        return run_words(argc - 2, argv + 2);
    }
    bool big = argc > 1 && strcmp(argv[1], "--big") == 0;
    bool list = argc > 1 && strcmp(argv[1], "--list") == 0;
    for (const struct model_case *item = model_cases; item->words; item++) {
        bool chosen = big ? item->big : !item->big && (argc < 2 || list);
        for (int i = 1; i < argc; i++) {
            chosen = chosen || strcmp(argv[i], item->group) == 0;
        }
        if (list) {
            printf("%-8s %-9s %s\n", item->group, verdict_name(item->expect), item->words);
        } else if (chosen) {
            num++;
            wrong += !run_case(item);
        }
    }
    if (!list) {
        printf("%u models, %u not as expected\n", num, wrong);
    }
    return wrong > 0 || (num == 0 && !list);
}
