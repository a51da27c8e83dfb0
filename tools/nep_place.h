/* SPDX-License-Identifier: Apache-2.0 */
/* nep-place: what its commands share. */
#ifndef NEP_TOOLS_NEP_PLACE_H
#define NEP_TOOLS_NEP_PLACE_H

#include "base/out_file.h"
#include "placement/homes.h"
#include "placement/score.h"
#include "tools/json_out.h"

/* Exit statuses, fixed by docs/cli.md. */
enum { PLACE_FINE = 0, PLACE_FAILED = 1, PLACE_UNUSABLE = 2, PLACE_GO_ON = -1 };

#define PLACE_MAX_NODES 256u

struct place_args {
    const char *command;
    const char *trace;
    const char *train;
    const char *test;
    const char *map;
    const char *before;
    const char *output;
    const char *json_path;
    const char *homes;
    const char *arrivals;
    const char *requests;  /* of slice: "all", "train", "test" */
    const char *leave_out; /* a domain */
    const char *only;      /* a domain */
    const char *methods;   /* of compare: names with commas; NULL: all */
    double replicas;       /* percent */
    double max_imbalance;  /* 0: not given */
    double time_limit;     /* seconds */
    double max_age;        /* batch periods */
    uint64_t nodes;
    uint64_t gpus_per_node;
    uint64_t threads;
    uint64_t seed;
    uint64_t seeds;
    uint64_t tokens;
    uint64_t iters;
    uint64_t warmup;
    uint64_t max_tokens;
    uint64_t max_moves;
    uint64_t batch;
    int64_t layer;
    bool is_online;
    bool is_shuffled;
    bool has_bound;
    const char *warm;
    FILE *out; /* for people; not standard output when JSON goes there */
    struct json_out json;
    struct nep_out_file json_file;
};

/* PLACE_GO_ON, or the exit status. */
int place_args_parse(int argc, char **argv, struct place_args *args);
/* One line on standard error; returns the status. */
int place_error(int status, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* nep_last_message() as an error: 2 for what the caller gave, 1 for the rest. */
int place_failed(enum nep_status status, const char *what);
/* Completes the shape for --nodes, --gpus-per-node, --replicas; exit status or PLACE_GO_ON. */
int place_shape(const struct place_args *args, const struct nep_trace *trace, double replicas,
                uint32_t *sizes, struct nep_map_shape *shape);
void place_json_score(struct json_out *json, const struct nep_score *score, double base);

int place_solve(struct place_args *args);
int place_eval(struct place_args *args);
int place_slice(struct place_args *args);
int place_compare(struct place_args *args);
int place_report(struct place_args *args);
int place_queue(struct place_args *args);

#endif
