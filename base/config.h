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
    char log[16];         /* NEP_LOG: none, error, warn, info, debug */
    char log_file[256];   /* NEP_LOG_FILE */
    uint64_t timeout_ns;  /* NEP_TIMEOUT */
    uint32_t spin;        /* NEP_SPIN: looks before a wait yields; UINT32_MAX: auto */
    char rendezvous[256]; /* NEP_RENDEZVOUS: host:port */
    char node[64];       /* NEP_NODE: name of this rank's node; ranks of equal names share a node */
    char intra[32];      /* NEP_INTRA */
    char inter[64];      /* NEP_INTER */
    char simd[16];       /* NEP_SIMD: auto, c, avx2, avx512 */
    uint64_t pool_bytes; /* NEP_POOL: default size of an ep's pool of mapped memory */
    bool huge_pages;     /* NEP_HUGE_PAGES: try huge pages for regions */
};

/*
 * Defaults, then the environment. Unknown NEP_* names are warned about (with the nearest known
 * one); a value that does not parse is NEP_ERR_INVALID and names the variable. Units: 10ms, 1s,
 * 64k, 1M, 2G, inf, auto, on/off.
 */
enum nep_status nep_config_load(struct nep_config *config);
/* Prints every variable: NAME=value, type, default, help, and whether it came from the environment.
 */
void nep_config_print(FILE *out, const struct nep_config *config);
/* A hash over the fields that must be equal on all ranks, and the name of the i-th such field. */
uint64_t nep_config_digest(const struct nep_config *config);
/* Parses "1.5s", "100ms", "200us", "inf"; and "64k", "2GiB". */
enum nep_status nep_parse_time_ns(const char *text, uint64_t *ns_p);
enum nep_status nep_parse_bytes(const char *text, uint64_t *bytes_p);
/*
 * The launcher's environment, read here and nowhere else. rank and size are UINT32_MAX when absent.
 * Knows torchrun, Open MPI / PMIx, MPICH (PMI), Slurm. address/port: MASTER_ADDR/MASTER_PORT, or
 * NEP_RENDEZVOUS. launcher: the name of what was found.
 */
struct nep_launch_env {
    const char *launcher;
    uint32_t rank;
    uint32_t num_ranks;
    char address[256];
    uint16_t port;
    char job[128]; /* an id of the job, equal on all its ranks, "" when there is none */
};
enum nep_status nep_launch_env_read(struct nep_launch_env *env);

#endif
