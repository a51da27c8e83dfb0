/* SPDX-License-Identifier: Apache-2.0 */
/* nep-perf put: what its files share. */
#ifndef NEP_PERFTEST_PUT_H
#define NEP_PERFTEST_PUT_H

#include <stdio.h>

#include "base/config.h"
#include "perftest/perf.h"
#include "transport/transport.h"

enum { NEP_PERF_PUT_SLOTS = 64, NEP_PERF_PUT_PAGE = 4096, NEP_PERF_PUT_PORT = 18515 };

struct nep_perf_put_options {
    bool is_lat;
    bool is_all; /* 2 bytes to 8 MiB */
    bool has_size;
    uint64_t size;
    uint32_t iters; /* 0: default of the test */
    uint32_t depth;
    uint32_t qps;   /* 0: configured */
    uint32_t paths; /* 0: configured */
    const char *transport;
    bool is_announced; /* --write-imm */
    bool is_gbits;
    bool is_verified;
    bool is_spawned; /* --ranks 2 */
    uint16_t port;
    uint64_t seed;
    const char *json;
    const char *host; /* the server; NULL: be it */
};

/* -1: go on; else exit with the value. */
int nep_perf_put_parse(int argc, char **argv, struct nep_perf_put_options *options);

/* One side: rank 0 is the server, rank 1 the client that measures. */
struct nep_perf_put_side {
    const struct nep_perf_put_options *options;
    struct nep_config config;
    struct nep_bootstrap bootstrap;
    struct nep_topology topology;
    struct nep_transport *transport;
    uint32_t rank;
    uint64_t max_size;
    uint32_t num_slots; /* of the window, for verifying */
    uint8_t *base;
    uint64_t sent; /* the last put's number */
};

struct nep_perf_put_result {
    uint64_t size;
    uint32_t iters;
    /* bandwidth: bytes per second, messages per second */
    double peak;
    double average;
    double messages;
    /* latency in us: half a round trip */
    double min, max, typical, mean, stdev, p99, p999;
    uint64_t verified; /* bytes looked at, by both sides */
    uint64_t wrong;    /* of them; plus announcements missing or repeated */
};

/* Sizes of this run, ascending. */
uint32_t nep_perf_put_sizes(const struct nep_perf_put_options *options, uint64_t sizes[32]);
uint32_t nep_perf_put_iters(const struct nep_perf_put_options *options, uint64_t size);

/* Creates the transport and the window; exit status or -1. Collective. */
int nep_perf_put_open(struct nep_perf_put_side *side);
void nep_perf_put_close(struct nep_perf_put_side *side);
/* One size, both sides; the client's result is complete. Exit status or -1. */
int nep_perf_put_measure(struct nep_perf_put_side *side, uint64_t size,
                         struct nep_perf_put_result *result);

void nep_perf_put_banner(FILE *out, const struct nep_perf_put_side *side);
void nep_perf_put_row(FILE *out, const struct nep_perf_put_side *side,
                      const struct nep_perf_put_result *result);
int nep_perf_put_json(const struct nep_perf_put_side *side,
                      const struct nep_perf_put_result *results, uint32_t num_results);

#endif
