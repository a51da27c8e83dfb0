/* SPDX-License-Identifier: Apache-2.0 */
/* The options of nep-perf ep. */
#ifndef NEP_PERFTEST_OPTIONS_H
#define NEP_PERFTEST_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "nearep.h"

enum nep_perf_routing_kind { NEP_PERF_UNIFORM, NEP_PERF_ZIPF, NEP_PERF_INCAST, NEP_PERF_TRACE };

struct nep_perf_options {
    uint32_t num_ranks;
    uint32_t ranks_per_node[1024];
    uint32_t num_nodes;
    bool has_ranks;
    bool has_nodes; /* the user named node sizes: emulate them under a launcher too */
    bool is_threads;
    uint32_t tokens;
    uint32_t hidden;
    uint32_t experts;
    uint32_t top_k;
    enum nep_layout layout;
    bool is_padded;
    enum nep_dtype dtype;
    enum nep_dtype wire;
    uint32_t alignment;
    bool is_mapped;
    const char *executor;
    bool is_on_gpu;   /* executor is cuda */
    uint32_t num_sms; /* 0: the library's default */
    const char *intra;
    const char *inter;
    const char *routing;
    enum nep_perf_routing_kind routing_kind;
    double zipf;
    const char *trace;
    int32_t layer; /* -1: all, in turn */
    const char *map;
    const char *homes; /* NULL: random, or predicted with a map */
    uint32_t outstanding;
    uint32_t iters;
    uint32_t warmup;
    uint64_t seed;
    bool is_verified;
    const char *baseline; /* NULL: none */
    uint32_t pairs;
    const char *on_fault;
    bool is_continued;   /* on_fault is "continue" */
    const char *json;    /* NULL: for people */
    const char *metrics; /* NULL: none */
    const char *record;  /* NULL: none */
    uint32_t record_ppm;
    char **argv; /* as given, for running the same command again under mpirun */
    int argc;
};

/* -1: go on; else exit with the value. */
int nep_perf_options_parse(int argc, char **argv, struct nep_perf_options *options);
/* Node sizes for num_ranks ranks; exit status, or -1: go on. */
int nep_perf_options_nodes(struct nep_perf_options *options, uint32_t num_ranks);

const char *nep_perf_dtype_name(enum nep_dtype dtype);
const char *nep_perf_layout_name(const struct nep_perf_options *options);

#endif
