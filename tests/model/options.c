/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A model from words: "nodes=2,2 s=1 ops=DC tiles=1 delays repeats off=r1". The table of cases and
 * the command line use the same words, so that any row of the table can be run and varied by hand.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "options.h"

struct flag {
    const char *word;
    size_t offset;
};
#define FLAG(word, member)                                                                         \
    {                                                                                              \
        word, offsetof(struct params, member)                                                      \
    }

static const struct flag plain_flags[] = {
    FLAG("skip", skip),       FLAG("joint", joint),     FLAG("delays", delays),
    FLAG("repeats", repeats), FLAG("stale", imm_stale), FLAG("credit-stale", credit_stale)};
static const struct flag off_flags[] = {FLAG("r1", no_r1),
                                        FLAG("r2", no_r2),
                                        FLAG("r3", no_r3),
                                        FLAG("r4", no_r4),
                                        FLAG("lend", no_lend),
                                        FLAG("duty", no_duty),
                                        FLAG("implicit", no_implicit),
                                        FLAG("credit-max", credit_written),
                                        FLAG("credit-single", credit_burst),
                                        FLAG("credit-settled", credit_loose),
                                        FLAG("send-returns", send_waits),
                                        FLAG("credit-infer", credit_blind)};

static bool set_flag(struct params *params, const struct flag *flags, size_t num, const char *word)
{
    for (size_t i = 0; i < num; i++) {
        if (strcmp(word, flags[i].word) == 0) {
            *(bool *)((char *)params + flags[i].offset) = true;
            return true;
        }
    }
    return false;
}

static bool set_number(const char *text, unsigned most, uint8_t *out)
{
    char *end;
    unsigned long value = strtoul(text, &end, 10);
    if (*text == '\0' || *end != '\0' || value > most) {
        return false;
    }
    *out = (uint8_t)value;
    return true;
}

static bool set_nodes(struct params *params, char *text)
{
    char *rest = NULL;
    unsigned num = 0;
    for (char *part = strtok_r(text, ",", &rest); part; part = strtok_r(NULL, ",", &rest)) {
        if (num == MAX_NODES || !set_number(part, MAX_LANES, &params->ranks_on[num++])) {
            return false;
        }
    }
    return num > 0;
}

static bool set_off(struct params *params, char *text)
{
    char *rest = NULL;
    for (char *part = strtok_r(text, ",", &rest); part; part = strtok_r(NULL, ",", &rest)) {
        if (!set_flag(params, off_flags, sizeof(off_flags) / sizeof(off_flags[0]), part)) {
            return false;
        }
    }
    return true;
}

static bool choose(const char *text, const char *const *words, unsigned num, unsigned *out)
{
    for (unsigned i = 0; i < num; i++) {
        if (strcmp(text, words[i]) == 0) {
            *out = i;
            return true;
        }
    }
    return false;
}

static bool set_word(struct params *params, char *word, char *ops)
{
    static const char *const traffics[] = {"even", "varied", "quiet", "burst"};
    static const char *const aheads[] = {"none", "calls", "always"};
    unsigned choice = 0;
    char *value = strchr(word, '=');
    if (!value) {
        return set_flag(params, plain_flags, sizeof(plain_flags) / sizeof(plain_flags[0]), word);
    }
    *value++ = '\0';
    if (strcmp(word, "nodes") == 0) {
        return set_nodes(params, value);
    }
    if (strcmp(word, "ops") == 0) {
        size_t num = strlen(value);
        memcpy(ops, value, num <= MAX_OPS ? num + 1 : 1);
        return num > 0 && num <= MAX_OPS && strspn(value, "DC") == num;
    }
    if (strcmp(word, "traffic") == 0) {
        bool found = choose(value, traffics, 4, &choice);
        params->traffic = (enum traffic)choice;
        return found;
    }
    if (strcmp(word, "ahead") == 0) {
        bool found = choose(value, aheads, 3, &choice);
        params->ahead = (enum ahead)choice;
        return found;
    }
    if (strcmp(word, "off") == 0) {
        return set_off(params, value);
    }
    return (strcmp(word, "s") == 0 && set_number(value, 8, &params->outstanding)) ||
           (strcmp(word, "w") == 0 && set_number(value, 16, &params->slots)) ||
           (strcmp(word, "v") == 0 && set_number(value, 16, &params->tile_slots)) ||
           (strcmp(word, "tiles") == 0 && set_number(value, 8, &params->tiles)) ||
           (strcmp(word, "ring") == 0 && set_number(value, 16, &params->ring)) ||
           (strcmp(word, "span") == 0 && set_number(value, 31, &params->credit_span)) ||
           (strcmp(word, "mod") == 0 && set_number(value, 255, &params->imm_modulus));
}

bool options_parse(const char *text, struct options *options)
{
    char copy[256], *rest = NULL;
    if (strlen(text) >= sizeof(copy)) {
        return false;
    }
    memcpy(copy, text, strlen(text) + 1);
    memset(options, 0, sizeof(*options));
    options->params = (struct params){.ranks_on = {1, 1}, .outstanding = 1, .tiles = 1};
    strcpy(options->ops, "DC");
    for (char *word = strtok_r(copy, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
        if (!set_word(&options->params, word, options->ops)) {
            fprintf(stderr, "model: cannot read the word '%s' of \"%s\"\n", word, text);
            return false;
        }
    }
    options->params.ops = options->ops;
    return options->params.outstanding > 0;
}
