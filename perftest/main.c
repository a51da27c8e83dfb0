/* SPDX-License-Identifier: Apache-2.0 */
/* nep-perf: finds the subcommand. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "nearep.h"
#include "perftest/perf.h"

static const struct {
    const char *name;
    int (*main)(int argc, char **argv);
    const char *help;
} commands[] = {
    {"ep", nep_perf_ep_main,
     "dispatch and combine: times, bytes on the wire, every element checked"},
    {"put", nep_perf_put_main,
     "the transport alone, in the manner of ib_write_bw and ib_write_lat"},
};

int nep_perf_error(int status, const char *fmt, ...)
{
    char line[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(line, sizeof(line), fmt, args);
    va_end(args);
    fprintf(stderr, "nep-perf: %s\n", line); /* one write: lines of several ranks do not mix */
    return status;
}

static void print_help(void)
{
    printf("usage: nep-perf COMMAND [options]\n\n");
    for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
        printf("  %-6s %s\n", commands[i].name, commands[i].help);
    }
    printf("\nnep-perf COMMAND --help lists the options of a command.\n"
           "Exit status: 0 done and right, 1 failed or found something wrong, 2 unusable "
           "arguments.\n");
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        print_help();
        return NEP_PERF_USAGE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
        print_help();
        return NEP_PERF_OK;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("nep-perf %s\n", nep_version_string());
        return NEP_PERF_OK;
    }
    for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
        if (strcmp(argv[1], commands[i].name) == 0) {
            return commands[i].main(argc - 1, argv + 1);
        }
    }
    return nep_perf_error(NEP_PERF_USAGE, "unknown command '%s'; see nep-perf --help", argv[1]);
}
