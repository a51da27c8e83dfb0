/* SPDX-License-Identifier: Apache-2.0 */
/* nep-info's parts. Each prints for people to `out` and the same to `json`; one of them is silent.
 */
#ifndef NEP_TOOLS_NEP_INFO_H
#define NEP_TOOLS_NEP_INFO_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "base/config.h"
#include "nearep.h"
#include "tools/json_out.h"

enum { INFO_MAX_NODES = 4096 };

struct info {
    FILE *out;
    struct json_out json;
    struct nep_config config;
    /* what to show */
    bool wants_config, wants_transports, wants_topology, wants_region, wants_check, wants_serve;
    bool wants_merge;
    const char *merge_path;
    char **files; /* the arguments behind --merge-traces */
    uint32_t num_files;
    bool is_markdown; /* --config as docs/configuration.md */
    /* a shape */
    bool has_ranks;
    uint32_t num_ranks;
    uint32_t num_nodes;
    uint32_t ranks_per_node[INFO_MAX_NODES];
    struct nep_ep_params shape;
    const char *map;
    const char *address; /* --serve */
    const char *json_path;
};

/* Exit statuses: -1 goes on. */
enum { INFO_GO_ON = -1, INFO_FINE = 0, INFO_FAILED = 1, INFO_UNUSABLE = 2 };

int info_options_parse(int argc, char **argv, struct info *info);
int info_config(struct info *info);
int info_transports(struct info *info);
int info_topology(struct info *info);
int info_region(struct info *info);
/* Behind the region's parts: flat or by node, as far as a shape can say. */
void info_flat(struct info *info);
int info_check(struct info *info);
int info_serve(struct info *info);
int info_merge_traces(struct info *info);

/* "nep-info: <sentence>" on standard error; returns status. */
int info_error(int status, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
