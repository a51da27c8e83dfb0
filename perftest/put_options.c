/* SPDX-License-Identifier: Apache-2.0 */
/* The options of nep-perf put: one table, which is the help text too. */
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "nearep.h"
#include "perftest/put.h"

enum kind { FLAG, U32, U64, PORT, TEXT, BANDWIDTH };

struct row {
    const char *name;
    const char *arg;
    enum kind kind;
    size_t offset;
    const char *help;
};

#define AT(field) offsetof(struct nep_perf_put_options, field)

static const struct row rows[] = {
    {"--bw", NULL, BANDWIDTH, 0, "bandwidth and message rate, as ib_write_bw (default)"},
    {"--lat", NULL, FLAG, AT(is_lat), "latency, half a round trip, as ib_write_lat"},
    {"--size", "N", U64, AT(size), "bytes of a message, 1 to 8388608 (65536; latency: 2)"},
    {"--all", NULL, FLAG, AT(is_all), "all powers of two from 2 bytes to 8 MiB"},
    {"--iters", "N", U32, AT(iters), "messages per size (5000; latency: 1000)"},
    {"--depth", "N", U32, AT(depth), "messages under way at once, bandwidth (128)"},
    {"--transport", "T", TEXT, AT(transport), "shm, ucx, verbs, adversary:T, ... (auto)"},
    {"--qps", "N", U32, AT(qps), "verbs: queue pairs per path (NEP_VERBS_QPS)"},
    {"--paths", "N", U32, AT(paths), "verbs: devices per side (NEP_VERBS_PATHS)"},
    {"--write-imm", NULL, FLAG, AT(is_announced),
     "announce every message, as dispatch does; without it plain writes, where T has them"},
    {"--report-gbits", NULL, FLAG, AT(is_gbits), "Gb/s instead of MiB/s"},
    {"--verify", NULL, FLAG, AT(is_verified),
     "after each size, check bytes and announcements of 64 more messages"},
    {"--ranks", "2", U32, AT(is_spawned), "run both sides here"},
    {"--port", "P", PORT, AT(port), "TCP port where both sides meet (18515)"},
    {"--seed", "N", U64, AT(seed), "of the bytes that are verified (1)"},
    {"--json", "FILE", TEXT, AT(json), "results as one JSON object; -: standard output"},
};

enum { NUM_ROWS = sizeof rows / sizeof rows[0] };

static void help(void)
{
    printf(
        "usage: nep-perf put [options]        the server\n"
        "       nep-perf put [options] HOST   the client, which measures\n"
        "       nep-perf put [options] --ranks 2\n\n"
        "The transport alone, in the manner of ib_write_bw and ib_write_lat. Both sides need the "
        "same options.\n\n");
    for (size_t i = 0; i < NUM_ROWS; i++) {
        printf("  %-15s %-5s %s\n", rows[i].name, rows[i].arg == NULL ? "" : rows[i].arg,
               rows[i].help);
    }
    printf("  %-15s %-5s %s\n  %-15s %-5s %s\n", "--help", "", "this text", "--version", "",
           "the version");
}

static bool parse_number(const char *text, uint64_t most, uint64_t *out)
{
    char *end;
    errno = 0;
    unsigned long long number = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end != '\0' || errno != 0 || number > most) {
        return false;
    }
    *out = number;
    return true;
}

static bool set(struct nep_perf_put_options *options, const struct row *row, const char *value)
{
    char *field = (char *)options + row->offset;
    uint64_t number = 0;
    switch (row->kind) {
    case BANDWIDTH:
        options->is_lat = false;
        return true;
    case FLAG:
        *(bool *)field = true;
        return true;
    case TEXT:
        *(const char **)field = value;
        return true;
    case PORT:
        if (!parse_number(value, UINT16_MAX, &number)) {
            return false;
        }
        *(uint16_t *)field = (uint16_t)number;
        return true;
    case U64:
        options->has_size = options->has_size || row->offset == AT(size);
        return parse_number(value, UINT64_MAX, (uint64_t *)field);
    case U32:
        break;
    }
    if (!parse_number(value, 1u << 30, &number)) {
        return false;
    }
    if (row->offset == AT(is_spawned)) {
        options->is_spawned = true;
        return number == 2;
    }
    *(uint32_t *)field = (uint32_t)number;
    return number > 0;
}

static int check(struct nep_perf_put_options *options)
{
    if (!options->has_size) {
        options->size = options->is_lat ? 2 : 65536;
    }
    if (options->size < 1 || options->size > 8u << 20) {
        return nep_perf_error(NEP_PERF_USAGE, "--size %llu: 1 to 8388608 bytes",
                              (unsigned long long)options->size);
    }
    if (options->is_spawned && options->host != NULL) {
        return nep_perf_error(NEP_PERF_USAGE, "--ranks 2 runs both sides here: HOST is one too "
                                              "much");
    }
    if (options->depth > 4096) {
        return nep_perf_error(NEP_PERF_USAGE, "--depth %u: at most 4096", options->depth);
    }
    return -1;
}

int nep_perf_put_parse(int argc, char **argv, struct nep_perf_put_options *options)
{
    *options = (struct nep_perf_put_options){
        .depth = 128, .transport = "auto", .port = NEP_PERF_PUT_PORT, .seed = 1};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            help();
            return NEP_PERF_OK;
        }
        if (strcmp(argv[i], "--version") == 0) {
            printf("nep-perf %s\n", nep_version_string());
            return NEP_PERF_OK;
        }
        if (argv[i][0] != '-') {
            if (options->host != NULL) {
                return nep_perf_error(NEP_PERF_USAGE, "%s: one HOST at most", argv[i]);
            }
            options->host = argv[i];
            continue;
        }
        const struct row *row = NULL;
        size_t len = strcspn(argv[i], "=");
        for (size_t r = 0; r < NUM_ROWS; r++) {
            if (strlen(rows[r].name) == len && memcmp(rows[r].name, argv[i], len) == 0) {
                row = &rows[r];
            }
        }
        if (row == NULL || (row->arg == NULL && argv[i][len] == '=')) {
            return nep_perf_error(NEP_PERF_USAGE, "put has no option %s; see nep-perf put --help",
                                  argv[i]);
        }
        const char *value = argv[i][len] == '=' ? argv[i] + len + 1 : NULL;
        if (row->arg != NULL && value == NULL) {
            value = i + 1 < argc ? argv[++i] : NULL;
        }
        if (row->arg != NULL && (value == NULL || !set(options, row, value))) {
            return nep_perf_error(NEP_PERF_USAGE, "%s %s: %s", row->name,
                                  value == NULL ? "without a value" : value, row->help);
        }
        if (row->arg == NULL) {
            set(options, row, NULL);
        }
    }
    return check(options);
}

uint32_t nep_perf_put_sizes(const struct nep_perf_put_options *options, uint64_t sizes[32])
{
    uint32_t num = 0;
    if (!options->is_all) {
        sizes[0] = options->size;
        return 1;
    }
    for (uint64_t size = 2; size <= 8u << 20; size *= 2) {
        sizes[num++] = size;
    }
    return num;
}

uint32_t nep_perf_put_iters(const struct nep_perf_put_options *options, uint64_t size)
{
    (void)size;
    return options->iters != 0 ? options->iters : options->is_lat ? 1000 : 5000;
}
