/* SPDX-License-Identifier: Apache-2.0 */
/* Options of nep-place: one table gives the parser, the checks and --help. */
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "tools/nep_place.h"

enum kind { TEXT, COUNT, REAL, SIGNED, FLAG };

enum {
    SOLVE = 1,
    EVAL = 2,
    COMPARE = 4,
    REPORT = 8,
    QUEUE = 16,
    SLICE = 32,
};

struct option {
    const char *name;
    const char *value;
    enum kind kind;
    unsigned commands;
    size_t offset;
    double least;
    double most;
    const char *help;
};

#define AT(field) offsetof(struct place_args, field)

static const struct option options[] = {
    {"--trace", "FILE", TEXT, SOLVE | EVAL | REPORT | QUEUE | SLICE, AT(trace), 0, 0,
     "the trace of routing (.nept)"},
    {"--train", "FILE", TEXT, COMPARE, AT(train), 0, 0, "trace that maps are solved on"},
    {"--test", "FILE", TEXT, COMPARE, AT(test), 0, 0, "trace that maps are scored on"},
    {"--map", "FILE", TEXT, EVAL | REPORT | QUEUE, AT(map), 0, 0, "placement map (.nepmap)"},
    {"--before", "FILE", TEXT, REPORT, AT(before), 0, 0,
     "map to compare with (default: contiguous)"},
    {"--nodes", "N", COUNT, SOLVE | COMPARE, AT(nodes), 1, PLACE_MAX_NODES, "nodes (required)"},
    {"--gpus-per-node", "G", COUNT, SOLVE | COMPARE, AT(gpus_per_node), 1, 4096,
     "ranks on each node (default 1)"},
    {"--replicas", "PCT", REAL, SOLVE | COMPARE, AT(replicas), 0, 10000,
     "second copies, percent of the experts; slots per rank must come out whole (default 0; "
     "compare: 12.5)"},
    {"--max-imbalance", "X", REAL, SOLVE | COMPARE, AT(max_imbalance), 1, 1e6,
     "limit on max/mean load of nodes while solving (default 1.10)"},
    {"--seed", "S", COUNT, SOLVE | EVAL | COMPARE | QUEUE | SLICE | REPORT, AT(seed), 0, 1e18,
     "seed of everything random (default 1)"},
    {"--seeds", "n", COUNT, COMPARE, AT(seeds), 1, 1000, "seeds to average over (default 1)"},
    {"--threads", "n", COUNT, SOLVE | COMPARE, AT(threads), 1, 1024,
     "threads; the result does not depend on it (default 1)"},
    {"--max-tokens", "n", COUNT, SOLVE | COMPARE, AT(max_tokens), 1, 4e9,
     "tokens a layer to solve on, about (default 24576)"},
    {"--time-limit", "SECONDS", REAL, SOLVE, AT(time_limit), 0, 1e6,
     "stop improving then; the map is then said to be truncated (default none)"},
    {"--warm", "FILE", TEXT, SOLVE, AT(warm), 0, 0, "start from this running map"},
    {"--max-moves", "n", COUNT, SOLVE, AT(max_moves), 0, 1e15,
     "with --warm: copies that may change place (default no limit)"},
    {"--methods", "NAMES", TEXT, COMPARE, AT(methods), 0, 0,
     "only these, names with commas between (default all)"},
    {"--online", NULL, FLAG, COMPARE, AT(is_online), 0, 0,
     "also run the online corrector along the test stream"},
    {"--shuffled", NULL, FLAG, COMPARE, AT(is_shuffled), 0, 0,
     "control: picks exchanged between tokens in both traces, loads kept; gains must vanish"},
    {"--homes", "HOW", TEXT, EVAL, AT(homes), 0, 0,
     "predicted, random or oracle: where requests run (default predicted)"},
    {"--tokens", "T", COUNT, EVAL, AT(tokens), 1, 1e6,
     "remote_rows: tokens per rank and iteration, as nep-perf (default 128)"},
    {"--iters", "n", COUNT, EVAL, AT(iters), 1, 1e9, "remote_rows: timed iterations (default 20)"},
    {"--warmup", "n", COUNT, EVAL, AT(warmup), 0, 1e9,
     "remote_rows: iterations before those (default 5)"},
    {"--layer", "n", SIGNED, EVAL, AT(layer), -1, 65535,
     "remote_rows: one layer (default all in turn)"},
    {"--arrivals", "poisson:RATE", TEXT, QUEUE, AT(arrivals), 0, 0,
     "arrivals; RATE is the load, 0 to 1 (default poisson:0.8)"},
    {"--batch", "n", COUNT, QUEUE, AT(batch), 1, 65536,
     "requests that a home runs at once (default 8)"},
    {"--max-age", "periods", REAL, QUEUE, AT(max_age), 0.01, 1e6,
     "bound on waiting, in mean service times (default 4)"},
    {"--part", "HOW", TEXT, SLICE, AT(requests), 0, 0,
     "all, train (two thirds of the requests) or test (the rest) (default all)"},
    {"--leave-out", "DOMAIN", TEXT, SLICE, AT(leave_out), 0, 0, "without this domain"},
    {"--only", "DOMAIN", TEXT, SLICE, AT(only), 0, 0, "this domain only"},
    {"--bound", NULL, FLAG, EVAL, AT(has_bound), 0, 0,
     "also a lower bound of the remote nodes per token, of any map without copies (seconds)"},
    {"-o", "FILE", TEXT, SOLVE | REPORT | SLICE, AT(output), 0, 0, "where to write (required)"},
    {"--json", "FILE", TEXT, SOLVE | EVAL | COMPARE | QUEUE | SLICE | REPORT, AT(json_path), 0, 0,
     "the results as one JSON object; - is standard output"},
};

static const struct {
    const char *name;
    unsigned bit;
    const char *help;
} commands[] = {
    {"solve", SOLVE, "find a placement map for a trace"},
    {"eval", EVAL, "what a map costs on a trace"},
    {"compare", COMPARE, "solve by every method on one trace, score on another"},
    {"report", REPORT, "a self-contained HTML page on a map"},
    {"queue", QUEUE, "replay requests through the batch queue, against FCFS and least-loaded"},
    {"slice", SLICE, "write a part of a trace: a split, with or without a domain"},
};

int place_error(int status, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    fputs("nep-place: ", stderr);
    vfprintf(stderr, fmt, args);
    fputc('\n', stderr);
    va_end(args);
    return status;
}

int place_failed(enum nep_status status, const char *what)
{
    int is_own_fault = status == NEP_ERR_NO_MEMORY || status == NEP_ERR_INTERNAL;
    return place_error(is_own_fault ? PLACE_FAILED : PLACE_UNUSABLE, "%s: %s", what,
                       nep_last_message());
}

static void help(void)
{
    printf("nep-place: where experts live, and which requests run where.\n\n"
           "usage: nep-place COMMAND [options]\n\ncommands:\n");
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        printf("  %-10s %s\n", commands[i].name, commands[i].help);
    }
    printf("\noptions, and the commands that take them:\n");
    for (size_t i = 0; i < sizeof options / sizeof options[0]; i++) {
        char name[64];
        snprintf(name, sizeof name, "%s %s", options[i].name,
                 options[i].value == NULL ? "" : options[i].value);
        printf("  %-24s %s [", name, options[i].help);
        const char *comma = "";
        for (size_t c = 0; c < sizeof commands / sizeof commands[0]; c++) {
            if ((options[i].commands & commands[c].bit) != 0) {
                printf("%s%s", comma, commands[c].name);
                comma = ", ";
            }
        }
        printf("]\n");
    }
    printf("  %-24s this text\n  %-24s the version\n\nexit status: 0 done and right, 1 failed, 2 "
           "unusable arguments or input\n",
           "--help", "--version");
}

static int set(struct place_args *args, const struct option *option, const char *text)
{
    char *field = (char *)args + option->offset;
    if (option->kind == TEXT) {
        memcpy(field, &text, sizeof text);
        return PLACE_GO_ON;
    }
    char *end = NULL;
    errno = 0;
    double value = strtod(text, &end);
    if (end == text || *end != '\0' || errno != 0 || !(value >= option->least) ||
        !(value <= option->most) || (option->kind != REAL && value != floor(value))) {
        return place_error(PLACE_UNUSABLE, "%s %s: expected a %snumber from %.15g to %.15g",
                           option->name, text, option->kind == REAL ? "" : "whole ", option->least,
                           option->most);
    }
    uint64_t count = (uint64_t)value;
    int64_t number = (int64_t)value;
    if (option->kind == REAL) {
        memcpy(field, &value, sizeof value);
    } else if (option->kind == SIGNED) {
        memcpy(field, &number, sizeof number);
    } else {
        memcpy(field, &count, sizeof count);
    }
    return PLACE_GO_ON;
}

static int parse_options(int argc, char **argv, unsigned command, struct place_args *args)
{
    for (int i = 2; i < argc; i++) {
        const struct option *found = NULL;
        for (size_t o = 0; o < sizeof options / sizeof options[0]; o++) {
            if (strcmp(argv[i], options[o].name) == 0) {
                found = &options[o];
            }
        }
        if (found == NULL || (found->commands & command) == 0) {
            return place_error(PLACE_UNUSABLE, "%s: %s has no option %s (see --help)",
                               args->command, args->command, argv[i]);
        }
        if (found->kind == FLAG) {
            *(bool *)((char *)args + found->offset) = true;
            continue;
        }
        if (i + 1 == argc) {
            return place_error(PLACE_UNUSABLE, "%s needs a value (%s)", found->name, found->value);
        }
        int status = set(args, found, argv[++i]);
        if (status != PLACE_GO_ON) {
            return status;
        }
    }
    return PLACE_GO_ON;
}

static int check_needs(const struct place_args *args, unsigned command)
{
    const struct {
        unsigned commands;
        bool is_there;
        const char *name;
    } needs[] = {
        {SOLVE | EVAL | REPORT | QUEUE | SLICE, args->trace != NULL, "--trace FILE"},
        {COMPARE, args->train != NULL, "--train FILE"},
        {COMPARE, args->test != NULL, "--test FILE"},
        {EVAL | REPORT | QUEUE, args->map != NULL, "--map FILE"},
        {SOLVE | COMPARE, args->nodes != 0, "--nodes N"},
        {SOLVE | REPORT | SLICE, args->output != NULL, "-o FILE"},
    };
    for (size_t i = 0; i < sizeof needs / sizeof needs[0]; i++) {
        if ((needs[i].commands & command) != 0 && !needs[i].is_there) {
            return place_error(PLACE_UNUSABLE, "%s needs %s", args->command, needs[i].name);
        }
    }
    return PLACE_GO_ON;
}

static int open_outputs(struct place_args *args)
{
    args->out = stdout;
    if (args->json_path == NULL) {
        return PLACE_GO_ON;
    }
    if (nep_out_file_open_arg(&args->json_file, args->json_path) != NEP_OK) {
        return place_error(PLACE_UNUSABLE, "--json %s", nep_last_message());
    }
    args->json.file = args->json_file.file;
    args->out = args->json.file == stdout ? fopen("/dev/null", "we") : stdout;
    return args->out != NULL ? PLACE_GO_ON
                             : place_error(PLACE_FAILED, "/dev/null: %s", strerror(errno));
}

int place_args_parse(int argc, char **argv, struct place_args *args)
{
    *args = (struct place_args){.replicas = -1.0,
                                .gpus_per_node = 1,
                                .threads = 1,
                                .seed = 1,
                                .seeds = 1,
                                .tokens = 128,
                                .iters = 20,
                                .warmup = 5,
                                .layer = -1,
                                .batch = 8,
                                .max_age = 4.0,
                                .homes = "predicted",
                                .requests = "all",
                                .arrivals = "poisson:0.8"};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            help();
            return PLACE_FINE;
        }
        if (strcmp(argv[i], "--version") == 0) {
            printf("nep-place %s\n", nep_version_string());
            return PLACE_FINE;
        }
    }
    unsigned command = 0;
    args->command = argc > 1 ? argv[1] : "";
    for (size_t c = 0; c < sizeof commands / sizeof commands[0]; c++) {
        if (strcmp(args->command, commands[c].name) == 0) {
            command = commands[c].bit;
        }
    }
    if (command == 0) {
        return place_error(PLACE_UNUSABLE,
                           "\"%s\" is not a command; solve, eval, compare, report, queue and slice "
                           "are (see --help)",
                           args->command);
    }
    int status = parse_options(argc, argv, command, args);
    if (status == PLACE_GO_ON) {
        status = check_needs(args, command);
    }
    return status == PLACE_GO_ON ? open_outputs(args) : status;
}
