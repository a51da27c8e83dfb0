/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One table; each row knows its field by offset and its type, so that parsing, printing, comparing
 * between ranks and the page docs/configuration.md have one source (the idea is UCX's, whose
 * ucx_info prints its configuration the same way). Rejected: a macro per variable at its place of
 * use, after which nobody can list them.
 *
 * The environment is a global that other threads may change; it is read once per communicator and
 * never again, and nowhere else.
 */
#include "base/config.h"

#include <ctype.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/log.h"

extern char **environ;

enum row_type { TEXT, WORD, TIME, BYTES, COUNT, SWITCH, SECRET };

struct row {
    const char *name;
    enum row_type type;
    const char *words; /* WORD: those allowed */
    size_t offset;
    size_t size;
    const char *default_text;
    bool is_shared;
    const char *help;
};

#define FIELD(name) offsetof(struct nep_config, name), sizeof(((struct nep_config *)0)->name)

static const struct row rows[] = {
    {"NEP_LOG", WORD, "none|error|warn|info|debug", FIELD(log), "warn", false,
     "what the log says; info names each choice, debug each step of the set-up"},
    {"NEP_LOG_FILE", TEXT, NULL, FIELD(log_file), "", false,
     "where the log goes; %p is the process id, %h the host; empty: standard error"},
    {"NEP_TIMEOUT", TIME, NULL, FIELD(timeout_ns), "100s", false,
     "deadline of every wait, then the culprit is named"},
    {"NEP_SPIN", COUNT, NULL, FIELD(spin), "auto", false,
     "looks before a wait yields the core; auto: 0 where ranks outnumber cores"},
    {"NEP_RANK", COUNT, NULL, FIELD(rank), "auto", false,
     "this rank, with NEP_RANKS; auto: from the launcher (torchrun, mpirun, srun)"},
    {"NEP_RANKS", COUNT, NULL, FIELD(num_ranks), "auto", false,
     "ranks of the group, with NEP_RANK; auto: from the launcher"},
    {"NEP_RENDEZVOUS", TEXT, NULL, FIELD(rendezvous), "", false,
     "host:port where ranks meet: a running nep-info --serve, or an address of rank 0, which "
     "then serves; empty: from the launcher's environment"},
    {"NEP_SECRET", SECRET, NULL, FIELD(secret), "", false,
     "words that every rank must know to join; prefer NEP_SECRET_FILE, an environment can be "
     "read by others of this user"},
    {"NEP_SECRET_FILE", TEXT, NULL, FIELD(secret_file), "", false,
     "file with the secret, readable by its owner alone"},
    {"NEP_NODE", TEXT, NULL, FIELD(node), "", false,
     "name of this rank's node; ranks of equal names share a node; empty: found out"},
    {"NEP_INTRA", TEXT, NULL, FIELD(intra), "auto", true,
     "transport inside a node: shm, loop, auto (nep-info --transports lists them)"},
    {"NEP_INTER", TEXT, NULL, FIELD(inter), "auto", true,
     "transport between nodes: shm, loop, ucx, verbs, adversary:NAME, auto"},
    {"NEP_SIMD", WORD, "auto|c|avx2|avx512", FIELD(simd), "auto", false,
     "widest instructions used on the host; the results are the same bits"},
    {"NEP_THREADS", COUNT, NULL, FIELD(threads), "1", false,
     "threads that share the work on a rank's rows, the caller's included; auto: 1"},
    {"NEP_POOL", BYTES, NULL, FIELD(pool_bytes), "64M", true,
     "memory per rank for nep_buffer_alloc where the ep does not say"},
    {"NEP_STAGING", BYTES, NULL, FIELD(staging_bytes), "512M", true,
     "device memory per rank for expert outputs that are not in nep_buffer_alloc's memory; over "
     "several nodes as much again for outputs of dispatch"},
    {"NEP_HUGE_PAGES", SWITCH, NULL, FIELD(huge_pages), "on", false,
     "try huge pages for regions; small ones where there are none"},
    {"NEP_PROGRESS_CORES", TEXT, NULL, FIELD(progress_cores), "auto", false,
     "where progress threads run: core numbers by local rank, 3,7,11; none: not bound; auto: a "
     "core "
     "of the rank's own near its device"},
    {"NEP_VERBS_DEVICES", TEXT, NULL, FIELD(verbs_devices), "auto", false,
     "devices that the ranks of this machine may use: dev[:port],dev[:port]; or the path of a file "
     "with lines `local-rank dev[:port],...`, which decides alone; auto: all with a live port"},
    {"NEP_VERBS_PATHS", COUNT, NULL, FIELD(verbs_paths), "1", true,
     "devices used by each rank, 1 to 8; a message may travel over all of them"},
    {"NEP_VERBS_QPS", COUNT, NULL, FIELD(verbs_qps), "1", true,
     "queue pairs per path and peer, 1 to 8; at most 14 over all paths"},
    {"NEP_VERBS_GID", COUNT, NULL, FIELD(verbs_gid), "auto", false,
     "GID index; auto: RoCE v2, routable, of one family at both ends"},
    {"NEP_VERBS_MTU", COUNT, NULL, FIELD(verbs_mtu), "auto", false,
     "path MTU in bytes: 256, 512, 1024, 2048 or 4096; auto: the smaller of both ends"},
    {"NEP_VERBS_SL", COUNT, NULL, FIELD(verbs_sl), "0", false, "service level, 0 to 15"},
    {"NEP_VERBS_TC", COUNT, NULL, FIELD(verbs_tc), "0", false,
     "traffic class of RoCE, 0 to 255 (DSCP * 4)"},
    {"NEP_VERBS_ACK_TIMEOUT", COUNT, NULL, FIELD(verbs_ack_timeout), "14", false,
     "acknowledgement timeout, 1 to 31: 4.096 us * 2^value; with the retries it bounds how long a "
     "dead peer stays unnoticed (14 and 6: 0.47 s)"},
    {"NEP_VERBS_RETRY", COUNT, NULL, FIELD(verbs_retry), "6", false,
     "retransmissions before a queue pair fails, 0 to 7; Soft-RoCE takes 7 as endless"},
    {"NEP_VERBS_RNR_RETRY", COUNT, NULL, FIELD(verbs_rnr_retry), "7", false,
     "retries when the receiver has no receive posted, 0 to 7; 7 is endless"},
    {"NEP_VERBS_REVIVE", TIME, NULL, FIELD(verbs_revive_ns), "5s", false,
     "how long a peer that no queue pair reaches is tried to be reached again before it is lost; "
     "NEP_TIMEOUT while a port of this side is down; one whose machine says that its process has "
     "ended is lost at once; 0: dead queue pairs stay dead, and nobody is asked"},
    {"NEP_VERBS_DEPTH", COUNT, NULL, FIELD(verbs_depth), "128", false,
     "work requests in each send queue, 8 to 16384; what does not fit waits inside"},
    {"NEP_VERBS_SPLIT", BYTES, NULL, FIELD(verbs_split_bytes), "64k", false,
     "messages at least this long are split over the queue pairs of a peer"},
    {"NEP_VERBS_CHUNK", BYTES, NULL, FIELD(verbs_chunk_bytes), "1G", true,
     "largest piece of memory registered at once; systems with an IOMMU refuse 2 GiB"},
    {"NEP_VERBS_RELAXED_ORDERING", SWITCH, NULL, FIELD(verbs_relaxed_ordering), "on", false,
     "let PCIe reorder writes of data; announcements are never reordered"},
    {"NEP_VERBS_GUARD", SWITCH, NULL, FIELD(verbs_guard), "on", false,
     "let each peer write its own slots alone: a registration of them, and a memory window for "
     "each QP"},
    {"NEP_TRACE", TEXT, NULL, FIELD(trace), "", false,
     "where each rank writes what happened on its wire, when the communicator breaks or is "
     "destroyed; %r is the rank (added where it is missing), %p the process id, %h the host; "
     "empty: "
     "nowhere"},
    {"NEP_TRACE_EVENTS", COUNT, NULL, FIELD(trace_events), "8192", false,
     "last events that are kept for it, at most 1048576, 32 bytes each; 0: none"},
    {"NEP_ADVERSARY_SEED", COUNT, NULL, FIELD(adversary_seed), "1", false,
     "what the transport adversary draws its delays, parts and repeats from"},
    {"NEP_CUDA_VISIBILITY", WORD, "auto|ordered|flush|staged", FIELD(cuda_visibility), "auto",
     false,
     "what makes a NIC's writes visible to running kernels: the device's order, a flush by the "
     "host, or landing in pinned host memory (staged); auto: from the device's attributes. No "
     "transport's window reaches memory of a GPU yet, so auto is staged, and the others are "
     "refused"},
    {"NEP_PROXY_SPIN", TIME, NULL, FIELD(proxy_spin_ns), "1ms", false,
     "how long the proxy thread of a GPU, which posts for kernels between nodes, spins without "
     "work before it naps"},
};

enum { NUM_ROWS = sizeof rows / sizeof rows[0] };
_Static_assert(NUM_ROWS <= 64, "from_env has a bit for each row");

static void *field_of(struct nep_config *config, const struct row *row)
{
    return (char *)config + row->offset;
}

static const void *field_in(const struct nep_config *config, const struct row *row)
{
    return (const char *)config + row->offset;
}

const char *nep_env_get(const char *name)
{
    const char *value = getenv(name);
    return value == NULL || value[0] == '\0' ? NULL : value;
}

/* ---- values --------------------------------------------------------------------------------- */

static bool is_word_of(const char *words, const char *value)
{
    size_t len = strlen(value);
    for (const char *at = words; at != NULL; at = strchr(at, '|')) {
        at += *at == '|';
        if (strncmp(at, value, len) == 0 && (at[len] == '|' || at[len] == '\0')) {
            return true;
        }
    }
    return false;
}

static enum nep_status set_text(const struct row *row, char *field, const char *value)
{
    if (row->type == WORD && !is_word_of(row->words, value)) {
        return nep_fail(NEP_ERR_INVALID, "'%.40s' is none of %s", value, row->words);
    }
    if (strlen(value) >= row->size) {
        return nep_fail(NEP_ERR_INVALID, "%zu characters are too many, at most %zu", strlen(value),
                        row->size - 1);
    }
    for (const char *at = value; *at != '\0'; at++) {
        if (iscntrl((unsigned char)*at)) {
            return nep_fail(NEP_ERR_INVALID, "character %zu is a control character",
                            (size_t)(at - value));
        }
    }
    snprintf(field, row->size, "%s", value);
    return NEP_OK;
}

static enum nep_status set_count(uint32_t *field, const char *value)
{
    uint64_t number = 0;
    if (strcasecmp(value, "auto") == 0) {
        *field = UINT32_MAX;
        return NEP_OK;
    }
    for (const char *at = value; *at != '\0'; at++) {
        if (!isdigit((unsigned char)*at) ||
            (number = number * 10 + (uint64_t)(*at - '0')) >= UINT32_MAX) {
            return nep_fail(NEP_ERR_INVALID,
                            "'%.40s' is not a number from 0 to 4294967294, nor auto", value);
        }
    }
    *field = (uint32_t)number;
    return NEP_OK;
}

static enum nep_status set_switch(bool *field, const char *value)
{
    static const char *const on[] = {"on", "1", "yes", "true"};
    static const char *const off[] = {"off", "0", "no", "false"};
    for (size_t i = 0; i < 4; i++) {
        if (strcasecmp(value, on[i]) == 0 || strcasecmp(value, off[i]) == 0) {
            *field = strcasecmp(value, on[i]) == 0;
            return NEP_OK;
        }
    }
    return nep_fail(NEP_ERR_INVALID, "'%.40s' is neither on nor off", value);
}

static enum nep_status set_value(struct nep_config *config, const struct row *row,
                                 const char *value)
{
    void *field = field_of(config, row);
    switch (row->type) {
    case TIME:
        return nep_parse_time_ns(value, field);
    case BYTES:
        return nep_parse_bytes(value, field);
    case COUNT:
        return set_count(field, value);
    case SWITCH:
        return set_switch(field, value);
    case TEXT:
    case WORD:
    case SECRET:
        break;
    }
    return set_text(row, field, value);
}

/* ---- unknown names -------------------------------------------------------------------------- */

/* Edits (change, insert, delete) that turn a into b; both shorter than 64. */
static unsigned edit_distance(const char *a, const char *b)
{
    unsigned previous[64], current[64];
    size_t len = strlen(b);
    for (unsigned j = 0; j <= len; j++) {
        previous[j] = j;
    }
    for (unsigned i = 1; a[i - 1] != '\0'; i++) {
        current[0] = i;
        for (size_t j = 1; j <= len; j++) {
            unsigned best = previous[j - 1] + (a[i - 1] != b[j - 1]);
            best = previous[j] + 1 < best ? previous[j] + 1 : best;
            best = current[j - 1] + 1 < best ? current[j - 1] + 1 : best;
            current[j] = best;
        }
        memcpy(previous, current, (len + 1) * sizeof previous[0]);
    }
    return previous[len];
}

static const char *nearest_name(const char *name)
{
    const char *nearest = NULL;
    unsigned least = 4;
    for (size_t i = 0; i < NUM_ROWS; i++) {
        unsigned distance = edit_distance(name, rows[i].name);
        if (distance < least) {
            least = distance;
            nearest = rows[i].name;
        }
    }
    return nearest;
}

static uint64_t hash_bytes(uint64_t hash, const void *data, size_t len)
{
    const unsigned char *bytes = data;
    for (size_t i = 0; i < len; i++) {
        hash = (hash ^ bytes[i]) * 0x100000001b3ull; /* FNV-1a */
    }
    return hash;
}

static const struct row *find_row(const char *name, size_t len)
{
    for (size_t i = 0; i < NUM_ROWS; i++) {
        if (strlen(rows[i].name) == len && memcmp(rows[i].name, name, len) == 0) {
            return &rows[i];
        }
    }
    return NULL;
}

/* Names that start with NEP_ and are no row; NEP_TEST_* belong to the tests. Said once per set of
 * names: a process that makes many communicators, or has many ranks as threads, does not repeat it.
 */
static void warn_unknown(const char *const *variables)
{
    static atomic_ullong warned;
    uint64_t names = 0xcbf29ce484222325ull;
    for (int pass = 0; pass < 2; pass++) {
        for (size_t i = 0; variables[i] != NULL; i++) {
            size_t len = strcspn(variables[i], "=");
            if (strncmp(variables[i], "NEP_", 4) != 0 ||
                strncmp(variables[i], "NEP_TEST_", 9) == 0 || find_row(variables[i], len) != NULL) {
                continue;
            }
            if (pass == 0) {
                names = hash_bytes(names, variables[i], len + 1);
                continue;
            }
            char name[64];
            snprintf(name, sizeof name, "%.*s", (int)(len < 63 ? len : 63), variables[i]);
            const char *nearest = nearest_name(name);
            nep_warn("%s is set but nearep has no such variable%s%s; nep-info --config lists them",
                     name, nearest == NULL ? "" : ": did you mean ",
                     nearest == NULL ? "" : nearest);
        }
        if (pass == 0 && atomic_exchange(&warned, names) == names) {
            return;
        }
    }
}

/* ---- loading -------------------------------------------------------------------------------- */

static const char *value_of(const char *const *variables, const char *name)
{
    size_t len = strlen(name);
    for (size_t i = 0; variables[i] != NULL; i++) {
        if (strncmp(variables[i], name, len) == 0 && variables[i][len] == '=') {
            return variables[i][len + 1] == '\0' ? NULL : variables[i] + len + 1;
        }
    }
    return NULL;
}

enum nep_status nep_config_load_from(struct nep_config *config, const char *const *variables)
{
    struct nep_config loaded = {0};
    for (size_t i = 0; i < NUM_ROWS; i++) {
        const char *value = value_of(variables, rows[i].name);
        enum nep_status status =
            set_value(&loaded, &rows[i], value == NULL ? rows[i].default_text : value);
        if (status != NEP_OK) {
            return nep_fail_prefix(status, "%s: ", rows[i].name);
        }
        loaded.from_env |= (uint64_t)(value != NULL) << i;
    }
    if (loaded.timeout_ns == 0) {
        return nep_fail(NEP_ERR_INVALID,
                        "NEP_TIMEOUT is 0: every wait would fail at once; inf waits for ever");
    }
    warn_unknown(variables);
    *config = loaded;
    return NEP_OK;
}

static enum nep_log_level level_of(const char *word)
{
    static const char *const words[] = {"none", "error", "warn", "info", "debug"};
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        if (strcmp(word, words[i]) == 0) {
            return (enum nep_log_level)i;
        }
    }
    return NEP_LOG_WARN;
}

enum nep_status nep_config_load(struct nep_config *config)
{
    static const char *const nothing[] = {NULL};
    const char *const *variables = environ == NULL ? nothing : (const char *const *)environ;
    struct nep_config loaded;
    enum nep_status status = nep_config_load_from(&loaded, variables);
    if (status == NEP_OK) {
        status = nep_log_open(level_of(loaded.log), loaded.log_file);
    }
    if (status == NEP_OK) {
        *config = loaded;
    }
    return status;
}

void nep_config_open_log(void)
{
    const char *level = nep_env_get("NEP_LOG");
    const char *path = nep_env_get("NEP_LOG_FILE");
    nep_log_open(level_of(level == NULL ? "warn" : level), path == NULL ? "" : path);
}

/* ---- printing ------------------------------------------------------------------------------- */

uint32_t nep_config_num_rows(void)
{
    return NUM_ROWS;
}

struct nep_config_row nep_config_row_at(uint32_t row_idx)
{
    static const char *const types[] = {"text", NULL, "time", "bytes", "count", "on/off", "text"};
    const struct row *row = &rows[row_idx];
    return (struct nep_config_row){
        .name = row->name,
        .type = row->type == WORD ? row->words : types[row->type],
        .default_text = row->default_text,
        .help = row->help,
        .is_shared = row->is_shared,
    };
}

void nep_config_format(const struct nep_config *config, uint32_t row_idx, char *text, size_t cap)
{
    const struct row *row = &rows[row_idx];
    const void *field = field_in(config, row);
    switch (row->type) {
    case TIME:
        nep_format_time_ns(*(const uint64_t *)field, text, cap);
        return;
    case BYTES:
        nep_format_bytes(*(const uint64_t *)field, text, cap);
        return;
    case COUNT:
        if (*(const uint32_t *)field == UINT32_MAX) {
            snprintf(text, cap, "auto");
        } else {
            snprintf(text, cap, "%u", *(const uint32_t *)field);
        }
        return;
    case SWITCH:
        snprintf(text, cap, "%s", *(const bool *)field ? "on" : "off");
        return;
    case SECRET:
        snprintf(text, cap, "%s", *(const char *)field == '\0' ? "" : "(set)");
        return;
    case TEXT:
    case WORD:
        break;
    }
    snprintf(text, cap, "%s", (const char *)field);
}

void nep_config_print(FILE *out, const struct nep_config *config)
{
    for (uint32_t i = 0; i < NUM_ROWS; i++) {
        struct nep_config_row row = nep_config_row_at(i);
        char value[512];
        nep_config_format(config, i, value, sizeof value);
        fprintf(out, "%s=%s\n    %s; default %s; %s%s\n    %s\n", row.name, value, row.type,
                row.default_text[0] == '\0' ? "empty" : row.default_text,
                config->from_env >> i & 1 ? "set in the environment" : "not set",
                row.is_shared ? "; must be equal on all ranks" : "", row.help);
    }
}

uint64_t nep_config_digest(const struct nep_config *config)
{
    uint64_t hash = 0xcbf29ce484222325ull;
    for (uint32_t i = 0; i < NUM_ROWS; i++) {
        if (rows[i].is_shared) {
            char value[512];
            nep_config_format(config, i, value, sizeof value);
            hash = hash_bytes(hash, rows[i].name, strlen(rows[i].name) + 1);
            hash = hash_bytes(hash, value, strlen(value) + 1);
        }
    }
    return hash;
}
