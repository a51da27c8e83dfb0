/* SPDX-License-Identifier: Apache-2.0 */
/* One table is both the parser and the help, so that no option lacks its line. */
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "tools/nep_info.h"

typedef bool (*parse_fn)(struct info *info, const char *value, size_t offset);

struct option {
    const char *name;
    const char *arg; /* NULL: a flag */
    const char *help;
    parse_fn parse;
    size_t offset;
    bool is_arg_optional;
};

int info_error(int status, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    fputs("nep-info: ", stderr);
    vfprintf(stderr, fmt, args);
    fputc('\n', stderr);
    va_end(args);
    return status;
}

static bool read_u32(const char *text, uint32_t *number_p, const char **end_p)
{
    char *end;
    unsigned long number = text[0] >= '0' && text[0] <= '9' ? strtoul(text, &end, 10) : UINT64_MAX;
    if (number > INT32_MAX) {
        return false;
    }
    *number_p = (uint32_t)number;
    *end_p = end;
    return true;
}

static bool set_u32(struct info *info, const char *value, size_t offset)
{
    const char *end;
    return read_u32(value, (uint32_t *)((char *)info + offset), &end) && *end == '\0';
}

static bool set_flag(struct info *info, const char *value, size_t offset)
{
    (void)value;
    *(bool *)((char *)info + offset) = true;
    return true;
}

static bool set_text(struct info *info, const char *value, size_t offset)
{
    *(const char **)((char *)info + offset) = value;
    return true;
}

static bool set_serve(struct info *info, const char *value, size_t offset)
{
    (void)offset;
    info->wants_serve = true;
    info->address = value; /* may be NULL */
    return true;
}

static bool set_merge(struct info *info, const char *value, size_t offset)
{
    (void)offset;
    info->wants_merge = true;
    info->merge_path = value;
    return true;
}

static bool set_ranks(struct info *info, const char *value, size_t offset)
{
    info->has_ranks = true;
    return set_u32(info, value, offset) && info->num_ranks > 0 && info->num_ranks <= 65535;
}

static bool set_sizes(struct info *info, const char *value, size_t offset)
{
    (void)offset;
    info->num_nodes = 0;
    for (;;) {
        const char *end;
        uint32_t ranks;
        if (info->num_nodes == INFO_MAX_NODES || !read_u32(value, &ranks, &end) || ranks == 0 ||
            (*end != ',' && *end != '\0')) {
            return false;
        }
        info->ranks_per_node[info->num_nodes++] = ranks;
        if (*end == '\0') {
            return true;
        }
        value = end + 1;
    }
}

static bool set_dtype(struct info *info, const char *value, size_t offset)
{
    static const char *const names[] = {"", "bf16", "fp16", "fp32", "fp8"};
    enum nep_dtype *dtype = (enum nep_dtype *)((char *)info + offset);
    uint32_t last = offset == offsetof(struct info, shape.wire) ? 4 : 3;
    for (uint32_t i = 1; i <= last; i++) {
        if (strcmp(value, names[i]) == 0) {
            *dtype = (enum nep_dtype)i;
            return true;
        }
    }
    return false;
}

static bool set_layout(struct info *info, const char *value, size_t offset)
{
    (void)offset;
    info->shape.layout = strcmp(value, "rank") == 0 ? NEP_LAYOUT_RANK : NEP_LAYOUT_EXPERT_PACKED;
    return strcmp(value, "rank") == 0 || strcmp(value, "expert") == 0;
}

static bool set_packed(struct info *info, const char *value, size_t offset)
{
    (void)value;
    (void)offset;
    info->shape.layout = NEP_LAYOUT_EXPERT_PACKED;
    return true;
}

static bool set_padded(struct info *info, const char *value, size_t offset)
{
    (void)value;
    (void)offset;
    info->shape.layout = NEP_LAYOUT_EXPERT_PADDED;
    return true;
}

#define AT(field) offsetof(struct info, field)

static const struct option table[] = {
    {"--config", NULL, "every NEP_* variable: value, type, default, help", set_flag,
     AT(wants_config), false},
    {"--transports", NULL, "the transports of this build, and which of them work here", set_flag,
     AT(wants_transports), false},
    {"--topology", NULL,
     "cores, shared memory and launcher here; with --ranks: which rank is where, and who receives "
     "for whom",
     set_flag, AT(wants_topology), false},
    {"--region", NULL, "bytes per rank for a shape, part by part", set_flag, AT(wants_region),
     false},
    {"--check", NULL, "the doctor: what works here, what does not, why, and what to do", set_flag,
     AT(wants_check), false},
    {"--serve", "HOST:PORT",
     "serve a rendezvous for --ranks ranks until a signal ends it (all addresses, port 29600)",
     set_serve, 0, true},
    {"--merge-traces", "OUT",
     "join the traces of ranks (NEP_TRACE), the files named next, into one for Perfetto; - is "
     "standard output",
     set_merge, 0, false},
    {"--ranks", "R", "ranks of the group (8)", set_ranks, AT(num_ranks), false},
    {"--ranks-per-node", "G[,G...]", "nodes of G ranks each, or of the sizes listed (4)", set_sizes,
     0, false},
    {"--tokens", "T", "most tokens per rank and call (128)", set_u32, AT(shape.max_tokens), false},
    {"--hidden", "H", "hidden size in elements, a multiple of 16 (7168)", set_u32, AT(shape.hidden),
     false},
    {"--experts", "E", "logical experts (256)", set_u32, AT(shape.num_experts), false},
    {"--top-k", "K", "experts per token, 1 to 32 (8)", set_u32, AT(shape.top_k), false},
    {"--slots", "L", "expert slots per rank (E divided by R, rounded up)", set_u32,
     AT(shape.slots_per_rank), false},
    {"--layout", "rank|expert", "output layout of dispatch (expert)", set_layout, 0, false},
    {"--packed", NULL, "expert layout: rows packed per expert (the default)", set_packed, 0, false},
    {"--padded", NULL, "expert layout: rows in slots per source", set_padded, 0, false},
    {"--alignment", "N", "expert layout: first rows of experts are multiples of N (1)", set_u32,
     AT(shape.expert_alignment), false},
    {"--dtype", "bf16|fp16|fp32", "payload type (bf16)", set_dtype, AT(shape.dtype), false},
    {"--wire", "bf16|fp16|fp32|fp8", "type of dispatched rows on the wire (as dtype)", set_dtype,
     AT(shape.wire), false},
    {"--map", "FILE", "placement map, .nepmap; gives experts, slots and layers (contiguous)",
     set_text, AT(map), false},
    {"--outstanding", "S", "operations between send and complete at once, 1 to 8 (1)", set_u32,
     AT(shape.outstanding), false},
    {"--markdown", NULL, "with --config: as the page docs/configuration.md", set_flag,
     AT(is_markdown), false},
    {"--json", "FILE", "the same as one JSON object to FILE, - is standard output", set_text,
     AT(json_path), false},
};

enum { NUM_OPTIONS = sizeof table / sizeof table[0] };

static void print_help(void)
{
    printf("usage: nep-info [options]\n\nWhat nearep finds on this machine. Without options: "
           "--topology --transports.\nExit status: 0 fine, 1 something is broken (--check) or "
           "failed, 2 unusable arguments.\n\n");
    for (size_t i = 0; i < NUM_OPTIONS; i++) {
        char left[48];
        const char *arg = table[i].arg == NULL ? "" : table[i].arg;
        snprintf(left, sizeof left, table[i].is_arg_optional ? "%s [%s]" : "%s %s", table[i].name,
                 arg);
        printf("  %-26s %s\n", left, table[i].help);
    }
    printf("  %-26s this text\n  %-26s the version\n", "--help", "--version");
}

static const struct option *find_option(const char *name)
{
    for (size_t i = 0; i < NUM_OPTIONS; i++) {
        if (strcmp(table[i].name, name) == 0) {
            return &table[i];
        }
    }
    return NULL;
}

/* Reads argv[*at_p] and its value. */
static int parse_one(int argc, char **argv, int *at_p, struct info *info)
{
    const char *name = argv[*at_p];
    if (strcmp(name, "--help") == 0) {
        print_help();
        return INFO_FINE;
    }
    if (strcmp(name, "--version") == 0) {
        printf("nep-info %s\n", nep_version_string());
        return INFO_FINE;
    }
    const struct option *option = find_option(name);
    const char *value = NULL;
    if (info->wants_merge && name[0] != '-') {
        info->files = info->files != NULL ? info->files : argv + *at_p;
        info->num_files++;
        return info->files + info->num_files == argv + *at_p + 1
                   ? INFO_GO_ON
                   : info_error(INFO_UNUSABLE, "%s: the traces to join stand together", name);
    }
    if (option == NULL) {
        return info_error(INFO_UNUSABLE, "%s is no option of nep-info (--help lists them)", name);
    }
    if (option->arg != NULL) {
        bool has_value = *at_p + 1 < argc && strncmp(argv[*at_p + 1], "--", 2) != 0;
        if (has_value) {
            value = argv[++*at_p];
        } else if (!option->is_arg_optional) {
            return info_error(INFO_UNUSABLE, "%s needs a value: %s", name, option->arg);
        }
    }
    if (!option->parse(info, value, option->offset)) {
        return info_error(INFO_UNUSABLE, "'%s' is no value for %s: %s, %s", value, name,
                          option->arg, option->help);
    }
    return INFO_GO_ON;
}

/* One size repeats until the ranks are used up; several must add up to them. */
static int complete_nodes(struct info *info)
{
    uint64_t sum = 0;
    for (uint32_t n = 0; n < info->num_nodes; n++) {
        sum += info->ranks_per_node[n];
    }
    if (info->num_nodes > 1 && !info->has_ranks && sum <= 65535) {
        info->num_ranks = (uint32_t)sum;
    } else if (info->num_nodes == 1) {
        uint32_t size = info->ranks_per_node[0];
        uint32_t num_nodes = (info->num_ranks + size - 1) / size;
        if (num_nodes > INFO_MAX_NODES) {
            return info_error(INFO_UNUSABLE, "%u nodes are too many, at most %d", num_nodes,
                              INFO_MAX_NODES);
        }
        for (uint32_t n = 0; n < num_nodes; n++) {
            uint32_t left = info->num_ranks - n * size;
            info->ranks_per_node[n] = left < size ? left : size;
        }
        info->num_nodes = num_nodes;
    } else if (sum != info->num_ranks) {
        return info_error(INFO_UNUSABLE, "--ranks-per-node has %llu ranks in all, --ranks %u",
                          (unsigned long long)sum, info->num_ranks);
    }
    return INFO_GO_ON;
}

int info_options_parse(int argc, char **argv, struct info *info)
{
    *info = (struct info){.num_ranks = 8,
                          .num_nodes = 1,
                          .ranks_per_node = {4},
                          .shape = {.size = sizeof info->shape,
                                    .num_experts = 256,
                                    .top_k = 8,
                                    .hidden = 7168,
                                    .max_tokens = 128}};
    for (int i = 1; i < argc; i++) {
        int status = parse_one(argc, argv, &i, info);
        if (status != INFO_GO_ON) {
            return status;
        }
    }
    if (!info->wants_config && !info->wants_transports && !info->wants_region &&
        !info->wants_check && !info->wants_serve && !info->wants_topology && !info->wants_merge) {
        info->wants_topology = info->wants_transports = true;
    }
    if (info->wants_serve && !info->has_ranks) {
        return info_error(INFO_UNUSABLE, "--serve needs --ranks: how many ranks will join");
    }
    if (info->wants_merge && info->num_files == 0) {
        return info_error(INFO_UNUSABLE, "--merge-traces needs the traces to join behind OUT");
    }
    return complete_nodes(info);
}
