/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One table: name, argument, help, and a function that reads the value. The same table is the help
 * text, so that an option without a line of help cannot exist.
 */
#include "perftest/options.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "perftest/gpu.h"
#include "perftest/perf.h"
#include "transport/transport.h"

typedef bool (*parse_fn)(struct nep_perf_options *options, const char *value, size_t offset);

struct option {
    const char *name;
    const char *arg; /* NULL: a flag */
    const char *help;
    parse_fn parse;
    size_t offset;
};

static bool parse_u64(const char *value, uint64_t max, uint64_t *out)
{
    char *end;
    errno = 0;
    unsigned long long number = strtoull(value, &end, 10);
    if (end == value || *end != '\0' || errno != 0 || value[0] == '-' || number > max) {
        return false;
    }
    *out = number;
    return true;
}

static bool set_u32(struct nep_perf_options *options, const char *value, size_t offset)
{
    uint64_t number;
    if (!parse_u64(value, INT32_MAX, &number)) {
        return false;
    }
    *(uint32_t *)((char *)options + offset) = (uint32_t)number;
    return true;
}

static bool set_seed(struct nep_perf_options *options, const char *value, size_t offset)
{
    return parse_u64(value, UINT64_MAX, (uint64_t *)((char *)options + offset));
}

static bool set_text(struct nep_perf_options *options, const char *value, size_t offset)
{
    *(const char **)((char *)options + offset) = value;
    return true;
}

static bool set_flag(struct nep_perf_options *options, const char *value, size_t offset)
{
    (void)value;
    *(bool *)((char *)options + offset) = true;
    return true;
}

static bool set_ranks(struct nep_perf_options *options, const char *value, size_t offset)
{
    options->has_ranks = true;
    return set_u32(options, value, offset) && options->num_ranks > 0 && options->num_ranks <= 1024;
}

static bool set_nodes(struct nep_perf_options *options, const char *value, size_t offset)
{
    (void)offset;
    options->num_nodes = 0;
    options->has_nodes = true;
    while (*value != '\0') {
        char *end;
        unsigned long ranks = strtoul(value, &end, 10);
        if (end == value || ranks == 0 || ranks > 1024 || options->num_nodes == 1024 ||
            (*end != ',' && *end != '\0')) {
            return false;
        }
        options->ranks_per_node[options->num_nodes++] = (uint32_t)ranks;
        value = *end == ',' ? end + 1 : end;
    }
    return options->num_nodes > 0;
}

static bool set_layout(struct nep_perf_options *options, const char *value, size_t offset)
{
    (void)offset;
    options->layout = strcmp(value, "rank") == 0 ? NEP_LAYOUT_RANK : NEP_LAYOUT_EXPERT_PACKED;
    return strcmp(value, "rank") == 0 || strcmp(value, "expert") == 0;
}

static bool set_packed(struct nep_perf_options *options, const char *value, size_t offset)
{
    (void)value;
    (void)offset;
    options->is_padded = false;
    return true;
}

static bool set_dtype(struct nep_perf_options *options, const char *value, size_t offset)
{
    enum nep_dtype *dtype = (enum nep_dtype *)((char *)options + offset);
    if (strcmp(value, "bf16") == 0) {
        *dtype = NEP_DTYPE_BF16;
    } else if (strcmp(value, "fp16") == 0) {
        *dtype = NEP_DTYPE_FP16;
    } else if (strcmp(value, "fp32") == 0) {
        *dtype = NEP_DTYPE_FP32;
    } else {
        return false;
    }
    return true;
}

static bool set_wire(struct nep_perf_options *options, const char *value, size_t offset)
{
    if (strcmp(value, "fp8") == 0) {
        options->wire = NEP_DTYPE_FP8_E4M3;
        return true;
    }
    return set_dtype(options, value, offset);
}

static bool set_memory(struct nep_perf_options *options, const char *value, size_t offset)
{
    (void)offset;
    options->is_mapped = strcmp(value, "mapped") == 0;
    return options->is_mapped || strcmp(value, "private") == 0;
}

static bool set_routing(struct nep_perf_options *options, const char *value, size_t offset)
{
    (void)offset;
    options->routing = value;
    if (strcmp(value, "uniform") == 0) {
        options->routing_kind = NEP_PERF_UNIFORM;
    } else if (strcmp(value, "incast") == 0) {
        options->routing_kind = NEP_PERF_INCAST;
    } else if (strncmp(value, "zipf:", 5) == 0) {
        char *end;
        options->routing_kind = NEP_PERF_ZIPF;
        options->zipf = strtod(value + 5, &end);
        return end != value + 5 && *end == '\0' && options->zipf >= 0.0 && options->zipf < 16.0;
    } else if (strncmp(value, "trace:", 6) == 0) {
        options->routing_kind = NEP_PERF_TRACE;
        options->trace = value + 6;
    } else {
        return false;
    }
    return true;
}

static bool set_layer(struct nep_perf_options *options, const char *value, size_t offset)
{
    (void)offset;
    if (strcmp(value, "all") == 0) {
        options->layer = -1;
        return true;
    }
    uint64_t number;
    if (!parse_u64(value, 65535, &number)) {
        return false;
    }
    options->layer = (int32_t)number;
    return true;
}

static bool set_homes(struct nep_perf_options *options, const char *value, size_t offset)
{
    (void)offset;
    options->homes = value;
    return strcmp(value, "random") == 0 || strcmp(value, "predicted") == 0;
}

static bool set_baseline(struct nep_perf_options *options, const char *value, size_t offset)
{
    (void)offset;
    options->baseline = value;
    return strcmp(value, "mpi") == 0;
}

static bool set_on_fault(struct nep_perf_options *options, const char *value, size_t offset)
{
    (void)offset;
    options->on_fault = value;
    options->is_continued = strcmp(value, "continue") == 0;
    return strcmp(value, "fail") == 0 || strcmp(value, "continue") == 0;
}

static bool set_executor(struct nep_perf_options *options, const char *value, size_t offset)
{
    (void)offset;
    options->executor = value;
    options->is_on_gpu = strcmp(value, "cuda") == 0;
    return strcmp(value, "host") == 0 || strcmp(value, "cuda") == 0;
}

#define AT(field) offsetof(struct nep_perf_options, field)

static const struct option table[] = {
    {"--ranks", "R",
     "local ranks to spawn; under torchrun, mpirun or srun the environment decides (8)", set_ranks,
     AT(num_ranks)},
    {"--ranks-per-node", "G[,G...]", "emulated nodes of G ranks each, or of the sizes listed (4)",
     set_nodes, 0},
    {"--threads", NULL, "ranks as threads of one process", set_flag, AT(is_threads)},
    {"--tokens", "T", "tokens per rank and iteration (128)", set_u32, AT(tokens)},
    {"--hidden", "H", "hidden size in elements, a multiple of 16 (7168)", set_u32, AT(hidden)},
    {"--experts", "E", "logical experts; with a trace the trace's (256)", set_u32, AT(experts)},
    {"--top-k", "K", "experts per token, 1 to 32; with a trace the trace's (8)", set_u32,
     AT(top_k)},
    {"--layout", "rank|expert", "output layout of dispatch (expert)", set_layout, 0},
    {"--dtype", "bf16|fp16|fp32", "payload type (bf16)", set_dtype, AT(dtype)},
    {"--wire", "bf16|fp8", "type of dispatched rows on the wire (as dtype)", set_wire, AT(wire)},
    {"--packed", NULL, "expert layout: rows packed per expert (the default)", set_packed, 0},
    {"--padded", NULL, "expert layout: rows in slots per source", set_flag, AT(is_padded)},
    {"--alignment", "N", "expert layout, packed: first rows of experts are multiples of N (1)",
     set_u32, AT(alignment)},
    {"--memory", "mapped|private", "tensors from nearep's pool, or the caller's own (mapped)",
     set_memory, 0},
    {"--executor", "host|cuda", "where tokens live (host)", set_executor, 0},
    {"--num-sms", "N", "executor cuda: SMs of each rank's kernels (16, or a share of them)",
     set_u32, AT(num_sms)},
    {"--intra", "NAME", "transport inside a node: shm, cuda, loop or auto (auto)", set_text,
     AT(intra)},
    {"--inter", "NAME",
     "between nodes: ucx, verbs, shm, loop, adversary[:ucx|verbs|shm], fake or auto (auto)",
     set_text, AT(inter)},
    {"--routing", "R", "uniform, zipf:S, incast or trace:FILE (uniform)", set_routing, 0},
    {"--layer", "N", "with a trace: one of its layers, or all, in turn (all)", set_layer, 0},
    {"--map", "FILE", "placement map, .nepmap (contiguous)", set_text, AT(map)},
    {"--homes", "random|predicted",
     "where a request of a trace runs (random; predicted with a map)", set_homes, 0},
    {"--outstanding", "S", "operations between send and complete at once, 1 to 8 (1)", set_u32,
     AT(outstanding)},
    {"--iters", "N", "timed iterations (20)", set_u32, AT(iters)},
    {"--warmup", "N", "iterations before them, not timed, but verified (5)", set_u32, AT(warmup)},
    {"--seed", "N", "seed of inputs and routing (1)", set_seed, AT(seed)},
    {"--verify", NULL, "compare every element of every iteration with the oracle", set_flag,
     AT(is_verified)},
    {"--baseline", "mpi", "run the MPI_Alltoallv baseline too, in alternating blocks", set_baseline,
     0},
    {"--pairs", "N", "with a baseline: pairs of blocks of --iters iterations each (7)", set_u32,
     AT(pairs)},
    {"--on-fault", "fail|continue",
     "a lost rank ends the run with status 1, or go on without it (fail)", set_on_fault, 0},
    {"--metrics", "FILE",
     "write each rank's counters as Prometheus text, %r in FILE is the rank; without it, or to -, "
     "those of rank 0",
     set_text, AT(metrics)},
    {"--record", "FILE",
     "record the routing and write it as a trace at the end, %r in FILE is the rank; without it, "
     "that of rank 0; each place of a rank's batch counts as one request",
     set_text, AT(record)},
    {"--record-ppm", "N", "with --record: of a million requests, so many (10000)", set_u32,
     AT(record_ppm)},
    {"--json", "FILE", "write results as one JSON object to FILE, - is standard output", set_text,
     AT(json)},
};

#define NUM_OPTIONS (sizeof(table) / sizeof(table[0]))

static void print_help(void)
{
    printf("usage: nep-perf ep [options]\n\nDispatch and combine: times of the slowest rank, bytes "
           "on the wire and their floor.\n\n");
    for (size_t i = 0; i < NUM_OPTIONS; i++) {
        char left[48];
        snprintf(left, sizeof(left), "%s%s%s", table[i].name, table[i].arg != NULL ? " " : "",
                 table[i].arg != NULL ? table[i].arg : "");
        printf("  %-26s %s\n", left, table[i].help);
    }
    printf("  %-26s %s\n  %-26s %s\n", "--help", "this text", "--version", "the version");
}

static int check_transport(const char *option, const char *name)
{
    const struct nep_transport_ops *ops;
    const char *args;
    if (strcmp(name, "auto") == 0 || nep_transport_find(name, &ops, &args) == NEP_OK) {
        return -1;
    }
    return nep_perf_error(NEP_PERF_USAGE, "%s %s: %s", option, name, nep_last_message());
}

/* What single options cannot know. -1: fine. */
static int check(const struct nep_perf_options *options)
{
    if (options->tokens > 65536 || options->iters == 0 || options->outstanding == 0 ||
        options->outstanding > 8 || options->pairs == 0) {
        return nep_perf_error(NEP_PERF_USAGE,
                              "--tokens is at most 65536, --iters and --pairs at least 1, "
                              "--outstanding 1 to 8");
    }
    if (options->hidden == 0 || options->hidden % 16 != 0 || options->top_k == 0 ||
        options->top_k > 32 || options->experts == 0) {
        return nep_perf_error(NEP_PERF_USAGE,
                              "--hidden %u must be a multiple of 16, --top-k %u 1 to 32, --experts "
                              "%u at least 1",
                              options->hidden, options->top_k, options->experts);
    }
    if (options->routing_kind != NEP_PERF_TRACE && options->top_k > options->experts) {
        return nep_perf_error(NEP_PERF_USAGE, "--top-k %u is more than --experts %u",
                              options->top_k, options->experts);
    }
    if (options->is_on_gpu && (options->baseline != NULL || options->is_continued)) {
        return nep_perf_error(NEP_PERF_USAGE,
                              "--baseline mpi and --on-fault continue are for tokens "
                              "in host memory, not for --executor cuda");
    }
    if (options->record != NULL && (options->is_on_gpu || options->baseline != NULL)) {
        return nep_perf_error(NEP_PERF_USAGE, "--record goes neither with --executor cuda nor with "
                                              "--baseline");
    }
    if (options->record_ppm > 1000000) {
        return nep_perf_error(NEP_PERF_USAGE, "--record-ppm %u: at most 1000000",
                              options->record_ppm);
    }
    if (options->is_on_gpu && nep_perf_gpu_probe() != -1) {
        return NEP_PERF_USAGE;
    }
    if (options->is_continued && options->baseline != NULL) {
        return nep_perf_error(NEP_PERF_USAGE, "--on-fault continue does not go with --baseline");
    }
    if (options->is_padded && options->layout == NEP_LAYOUT_RANK) {
        return nep_perf_error(NEP_PERF_USAGE, "--padded belongs to --layout expert");
    }
    int rc = check_transport("--intra", options->intra);
    return rc == -1 ? check_transport("--inter", options->inter) : rc;
}

static const struct option *find(const char *name, size_t len)
{
    for (size_t i = 0; i < NUM_OPTIONS; i++) {
        if (strlen(table[i].name) == len && strncmp(table[i].name, name, len) == 0) {
            return &table[i];
        }
    }
    return NULL;
}

/* One argument with its value; *i_p moves on where the value is the next one. -1: go on. */
static int parse_one(int argc, char **argv, int *i_p, struct nep_perf_options *options)
{
    const char *arg = argv[*i_p];
    const char *equals = strchr(arg, '=');
    const struct option *option = find(arg, equals != NULL ? (size_t)(equals - arg) : strlen(arg));
    if (option == NULL) {
        return nep_perf_error(NEP_PERF_USAGE, "unknown option '%s'; see nep-perf ep --help", arg);
    }
    const char *value = equals != NULL ? equals + 1 : NULL;
    if (option->arg != NULL && value == NULL) {
        value = *i_p + 1 < argc ? argv[++*i_p] : "";
    }
    if (option->arg == NULL && value != NULL) {
        return nep_perf_error(NEP_PERF_USAGE, "%s takes no value", option->name);
    }
    if (!option->parse(options, value, option->offset)) {
        return nep_perf_error(NEP_PERF_USAGE, "%s '%s' is not %s: %s", option->name, value,
                              option->arg, option->help);
    }
    return -1;
}

int nep_perf_options_parse(int argc, char **argv, struct nep_perf_options *options)
{
    *options = (struct nep_perf_options){.num_ranks = 8,
                                         .ranks_per_node = {4},
                                         .num_nodes = 1,
                                         .tokens = 128,
                                         .hidden = 7168,
                                         .experts = 256,
                                         .top_k = 8,
                                         .layout = NEP_LAYOUT_EXPERT_PACKED,
                                         .dtype = NEP_DTYPE_BF16,
                                         .is_mapped = true,
                                         .executor = "host",
                                         .intra = "auto",
                                         .inter = "auto",
                                         .routing = "uniform",
                                         .layer = -1,
                                         .outstanding = 1,
                                         .iters = 20,
                                         .warmup = 5,
                                         .seed = 1,
                                         .pairs = 7,
                                         .on_fault = "fail",
                                         .argv = argv,
                                         .argc = argc};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            print_help();
            return NEP_PERF_OK;
        }
        if (strcmp(argv[i], "--version") == 0) {
            printf("nep-perf %s\n", nep_version_string());
            return NEP_PERF_OK;
        }
        int rc = parse_one(argc, argv, &i, options);
        if (rc != -1) {
            return rc;
        }
    }
    if (options->is_padded && options->layout != NEP_LAYOUT_RANK) {
        options->layout = NEP_LAYOUT_EXPERT_PADDED;
    }
    if (options->wire == NEP_DTYPE_DEFAULT) {
        options->wire = options->dtype;
    }
    return check(options);
}

int nep_perf_options_nodes(struct nep_perf_options *options, uint32_t num_ranks)
{
    if (options->num_nodes > 1) {
        uint32_t sum = 0;
        for (uint32_t n = 0; n < options->num_nodes; n++) {
            sum += options->ranks_per_node[n];
        }
        if (!options->has_ranks && num_ranks == 8) {
            num_ranks = sum;
        }
        if (sum != num_ranks) {
            return nep_perf_error(NEP_PERF_USAGE, "--ranks-per-node adds up to %u, --ranks is %u",
                                  sum, num_ranks);
        }
    } else {
        /* Equal nodes; the last one takes what is left. */
        uint32_t size = options->ranks_per_node[0];
        options->num_nodes = (num_ranks + size - 1) / size;
        for (uint32_t n = 0; n < options->num_nodes; n++) {
            uint32_t left = num_ranks - n * size;
            options->ranks_per_node[n] = left < size ? left : size;
        }
    }
    options->num_ranks = num_ranks;
    return -1;
}

const char *nep_perf_dtype_name(enum nep_dtype dtype)
{
    static const char *const names[] = {"bf16", "bf16", "fp16", "fp32", "fp8", "opaque"};
    return names[dtype];
}

const char *nep_perf_layout_name(const struct nep_perf_options *options)
{
    return options->layout == NEP_LAYOUT_RANK ? "rank" : "expert";
}
