/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The one table of NEP_* variables: name, type, default, help. Read from the environment once per
 * communicator (nep_config_load); nothing else in the library calls getenv. A folder that needs a
 * variable adds a row to the table in config.c and a field here.
 */
#ifndef NEP_BASE_CONFIG_H
#define NEP_BASE_CONFIG_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "base/status.h"

struct nep_config {
    char log[16];          /* NEP_LOG: none, error, warn, info, debug */
    char log_file[256];    /* NEP_LOG_FILE */
    uint64_t timeout_ns;   /* NEP_TIMEOUT */
    uint32_t spin;         /* NEP_SPIN: looks before a wait yields; UINT32_MAX: auto */
    uint32_t rank;         /* NEP_RANK; UINT32_MAX: from the launcher */
    uint32_t num_ranks;    /* NEP_RANKS; UINT32_MAX: from the launcher */
    char rendezvous[256];  /* NEP_RENDEZVOUS: host:port */
    char secret[256];      /* NEP_SECRET; never printed */
    char secret_file[256]; /* NEP_SECRET_FILE */
    char node[64];       /* NEP_NODE: name of this rank's node; ranks of equal names share a node */
    char intra[32];      /* NEP_INTRA */
    char inter[64];      /* NEP_INTER */
    char simd[16];       /* NEP_SIMD: auto, c, avx2, avx512 */
    uint32_t threads;    /* NEP_THREADS; UINT32_MAX: auto */
    uint64_t pool_bytes; /* NEP_POOL: default size of an ep's pool of mapped memory */
    uint64_t staging_bytes;   /* NEP_STAGING: for expert outputs that peers do not map, on a GPU */
    bool huge_pages;          /* NEP_HUGE_PAGES: try huge pages for regions */
    char progress_cores[256]; /* NEP_PROGRESS_CORES: auto, none, or cores by local rank */
    char verbs_devices[256];  /* NEP_VERBS_DEVICES: dev[:port],... or the path of a file */
    uint32_t verbs_paths;     /* NEP_VERBS_PATHS: devices per rank; UINT32_MAX: auto */
    uint32_t verbs_qps;       /* NEP_VERBS_QPS: QPs per path and peer */
    uint32_t verbs_gid;       /* NEP_VERBS_GID: index; UINT32_MAX: choose */
    uint32_t verbs_mtu;       /* NEP_VERBS_MTU: bytes; UINT32_MAX: the port's */
    uint32_t verbs_sl;        /* NEP_VERBS_SL: service level */
    uint32_t verbs_tc;        /* NEP_VERBS_TC: traffic class */
    uint32_t verbs_ack_timeout;  /* NEP_VERBS_ACK_TIMEOUT: 4.096 us * 2^value */
    uint32_t verbs_retry;        /* NEP_VERBS_RETRY */
    uint32_t verbs_rnr_retry;    /* NEP_VERBS_RNR_RETRY */
    uint64_t verbs_revive_ns;    /* NEP_VERBS_REVIVE: until a silent peer is lost; 0: never tried */
    uint32_t verbs_depth;        /* NEP_VERBS_DEPTH: send queue of each QP */
    uint64_t verbs_split_bytes;  /* NEP_VERBS_SPLIT: puts this long are split over the QPs */
    uint64_t verbs_chunk_bytes;  /* NEP_VERBS_CHUNK: largest memory registration */
    bool verbs_relaxed_ordering; /* NEP_VERBS_RELAXED_ORDERING */
    bool verbs_guard;            /* NEP_VERBS_GUARD */
    char trace[256];             /* NEP_TRACE: path with %r, %p, %h */
    uint32_t trace_events;       /* NEP_TRACE_EVENTS; UINT32_MAX: the default */
    uint32_t adversary_seed;     /* NEP_ADVERSARY_SEED */
    char cuda_visibility[16];    /* NEP_CUDA_VISIBILITY: auto, ordered, flush, staged */
    uint64_t proxy_spin_ns;      /* NEP_PROXY_SPIN */
    uint64_t from_env;           /* bit i: row i of the table came from the environment */
};

/*
 * Defaults, then the environment. Unknown NEP_* names are warned about (with the nearest known
 * one); a value that does not parse is NEP_ERR_INVALID and names the variable. Units: 10ms, 1s,
 * 64k, 1M, 2G, inf, auto, on/off. Opens the log that NEP_LOG and NEP_LOG_FILE name.
 */
enum nep_status nep_config_load(struct nep_config *config);
/* The same from `name=value` strings ended by NULL instead of the environment; leaves the log. */
enum nep_status nep_config_load_from(struct nep_config *config, const char *const *variables);
/* Prints every variable: NAME=value, type, default, help, and whether it came from the environment.
 */
void nep_config_print(FILE *out, const struct nep_config *config);

/* The rows of the table, for tools and for the comparison between ranks. */
struct nep_config_row {
    const char *name;
    const char *type; /* "time", "bytes", "count", "on/off", "text", or the words allowed: "a|b" */
    const char *default_text;
    const char *help;
    bool is_shared; /* must be equal on all ranks */
};
uint32_t nep_config_num_rows(void);
struct nep_config_row nep_config_row_at(uint32_t row_idx);
/* The value in words, as it could be set; a secret is "(set)". */
void nep_config_format(const struct nep_config *config, uint32_t row_idx, char *text, size_t cap);
/* A hash over the fields that must be equal on all ranks. */
uint64_t nep_config_digest(const struct nep_config *config);

/* Parses "1.5s", "100ms", "200us", "inf"; and "64k", "2GiB". */
enum nep_status nep_parse_time_ns(const char *text, uint64_t *ns_p);
enum nep_status nep_parse_bytes(const char *text, uint64_t *bytes_p);
/* The shortest exact way to write it: "1500ms", "64M". */
void nep_format_time_ns(uint64_t ns, char *text, size_t cap);
void nep_format_bytes(uint64_t bytes, char *text, size_t cap);

/* The only door to the environment. NULL when unset; "" counts as unset. */
const char *nep_env_get(const char *name);
/* NEP_LOG and NEP_LOG_FILE alone, for a log line before any nep_config_load. Never fails. */
void nep_config_open_log(void);

/*
 * The launcher's environment, read here and nowhere else. Numbers are UINT32_MAX when absent. Knows
 * nearep's own NEP_RANK and NEP_RANKS, torchrun, Open MPI / PMIx, MPICH (PMI), Slurm; the first
 * that gives both rank and size wins. A variable that is there and makes no sense is
 * NEP_ERR_INVALID and named.
 */
struct nep_launch_env {
    const char *launcher; /* the name of what was found, "none" when nothing was */
    uint32_t rank;
    uint32_t num_ranks;
    uint32_t local_rank; /* as the launcher says; only a hint */
    uint32_t local_size;
    char address[256];  /* where rank 0 is: NEP_RENDEZVOUS, MASTER_ADDR, Slurm's first host; "" */
    uint16_t port;      /* of NEP_RENDEZVOUS, or MASTER_PORT; 0 when there is none */
    bool is_rendezvous; /* address:port is NEP_RENDEZVOUS: a server is there, or rank 0 hosts it */
    char job[128];      /* an id of the job, equal on all its ranks, "" when there is none */
};
enum nep_status nep_launch_env_read(struct nep_launch_env *env);
/* Splits "host:port", "[::1]:port"; the port is 1 to 65535. `what` names the text in the message.
 */
enum nep_status nep_parse_host_port(const char *text, const char *what, char *host, size_t cap,
                                    uint16_t *port_p);

#endif
