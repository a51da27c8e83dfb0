/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Balanced k-means over requests. A request is the vector of how often it activates each expert of
 * each layer, L2-normalised (the signature of arXiv 2604.23150); large vectors are hashed with
 * signs into DIMS numbers, which keeps inner products (Weinberger et al. 2009, feature hashing).
 * Each step assigns requests to centres with nep_homes_assign, so that the balance is the one that
 * homes must keep anyway. Several starts, the best one stays.
 *
 * It only has to break the symmetry: the solver reassigns homes by the exact cost afterwards.
 */
#include "placement/cluster.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "placement/rng.h"

#define DIMS   2048u
#define STEPS  12
#define STARTS 4

struct cluster {
    const struct nep_requests *requests;
    const struct nep_map_shape *shape;
    uint32_t dims;
    float *vectors; /* [num][dims] */
    float *centres; /* [num_nodes][dims] */
    float *cost;    /* [num][num_nodes] */
    uint64_t *tokens;
    uint32_t *homes;
};

static void normalise(float *vector, uint32_t dims)
{
    double sum = 0.0;
    for (uint32_t d = 0; d < dims; d++) {
        sum += (double)vector[d] * vector[d];
    }
    float scale = sum > 0.0 ? (float)(1.0 / sqrt(sum)) : 0.0f;
    for (uint32_t d = 0; d < dims; d++) {
        vector[d] *= scale;
    }
}

static void add_ids(const struct nep_trace *trace, uint64_t token, uint32_t dims, float *vector)
{
    int32_t ids[NEP_TRACE_TOP_K_LIMIT];
    uint32_t experts = nep_trace_num_experts(trace);
    uint32_t top_k = nep_trace_top_k(trace);
    uint64_t size = (uint64_t)nep_trace_num_layers(trace) * experts;
    for (uint32_t layer = 0; layer < nep_trace_num_layers(trace); layer++) {
        nep_trace_ids(trace, token, layer, ids);
        for (uint32_t k = 0; k < top_k; k++) {
            if (ids[k] < 0) {
                continue;
            }
            uint64_t feature = (uint64_t)layer * experts + (uint32_t)ids[k];
            if (size <= dims) {
                vector[feature] += 1.0f;
                continue;
            }
            struct nep_rng hash = nep_rng_seed(feature);
            uint64_t bits = nep_rng_next(&hash);
            vector[(bits >> 1) % dims] += (bits & 1) != 0 ? 1.0f : -1.0f;
        }
    }
}

static void read_vectors(struct cluster *c, enum nep_cluster_part part)
{
    const struct nep_trace *trace = c->requests->trace;
    for (uint32_t i = 0; i < c->requests->num; i++) {
        uint32_t request = nep_requests_at(c->requests, i);
        const struct nep_trace_request *r = nep_trace_request_at(trace, request);
        uint64_t first = r->first_token;
        uint64_t count = (uint64_t)r->prefill_tokens + r->decode_tokens;
        if (part == NEP_CLUSTER_SCORED) {
            nep_trace_scored(trace, request, &first, &count);
        }
        float *vector = &c->vectors[(size_t)i * c->dims];
        for (uint64_t t = 0; t < count; t++) {
            add_ids(trace, first + t, c->dims, vector);
        }
        normalise(vector, c->dims);
        c->tokens[i] = count == 0 ? 1 : count;
    }
}

static float dot(const float *a, const float *b, uint32_t dims)
{
    float sum[8] = {0};
    uint32_t d = 0;
    for (; d + 8 <= dims; d += 8) {
        for (uint32_t i = 0; i < 8; i++) {
            sum[i] += a[d + i] * b[d + i];
        }
    }
    for (; d < dims; d++) {
        sum[0] += a[d] * b[d];
    }
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

/* k-means++ with distances 1 - cosine. */
static void start_centres(struct cluster *c, struct nep_rng *rng)
{
    uint32_t num = c->requests->num;
    uint32_t chosen = nep_rng_below(rng, num);
    for (uint32_t i = 0; i < num; i++) {
        c->cost[i] = 2.0f;
    }
    for (uint32_t n = 0; n < c->shape->num_nodes; n++) {
        memcpy(&c->centres[(size_t)n * c->dims], &c->vectors[(size_t)chosen * c->dims],
               c->dims * sizeof *c->centres);
        double total = 0.0;
        for (uint32_t i = 0; i < num; i++) {
            float d = 1.0f - dot(&c->vectors[(size_t)i * c->dims], &c->centres[(size_t)n * c->dims],
                                 c->dims);
            c->cost[i] = d < c->cost[i] ? d : c->cost[i];
            total += c->cost[i] > 0.0f ? c->cost[i] : 0.0f;
        }
        double at = nep_rng_unit(rng) * total;
        chosen = 0;
        while (chosen + 1 < num && at >= 0.0) {
            at -= c->cost[chosen] > 0.0f ? c->cost[chosen] : 0.0f;
            chosen += at >= 0.0;
        }
    }
}

static enum nep_status assign(struct cluster *c, double *total_p)
{
    uint32_t nodes = c->shape->num_nodes;
    for (uint32_t i = 0; i < c->requests->num; i++) {
        for (uint32_t n = 0; n < nodes; n++) {
            c->cost[(size_t)i * nodes + n] =
                (float)c->tokens[i] * (1.0f - dot(&c->vectors[(size_t)i * c->dims],
                                                  &c->centres[(size_t)n * c->dims], c->dims));
        }
    }
    const struct nep_homes_params params = {c->requests->num, nodes, c->shape->ranks_per_node,
                                            c->tokens, c->cost};
    enum nep_status status = nep_homes_assign(&params, c->homes);
    double total = 0.0;
    for (uint32_t i = 0; i < c->requests->num && status == NEP_OK; i++) {
        total += c->cost[(size_t)i * nodes + c->homes[i]];
    }
    *total_p = total;
    return status;
}

static void move_centres(struct cluster *c)
{
    memset(c->centres, 0, (size_t)c->shape->num_nodes * c->dims * sizeof *c->centres);
    for (uint32_t i = 0; i < c->requests->num; i++) {
        float *centre = &c->centres[(size_t)c->homes[i] * c->dims];
        const float *vector = &c->vectors[(size_t)i * c->dims];
        for (uint32_t d = 0; d < c->dims; d++) {
            centre[d] += (float)c->tokens[i] * vector[d];
        }
    }
    for (uint32_t n = 0; n < c->shape->num_nodes; n++) {
        normalise(&c->centres[(size_t)n * c->dims], c->dims);
    }
}

static enum nep_status run(struct cluster *c, uint64_t seed, uint32_t *homes)
{
    struct nep_rng rng = nep_rng_seed(seed);
    double best = INFINITY;
    for (int start = 0; start < STARTS; start++) {
        start_centres(c, &rng);
        double total = INFINITY;
        for (int step = 0; step < STEPS; step++) {
            double before = total;
            enum nep_status status = assign(c, &total);
            if (status != NEP_OK) {
                return status;
            }
            if (total >= before * (1.0 - 1e-4)) {
                break;
            }
            move_centres(c);
        }
        if (total < best) {
            best = total;
            memcpy(homes, c->homes, c->requests->num * sizeof *homes);
        }
    }
    return NEP_OK;
}

enum nep_status nep_cluster_homes(const struct nep_requests *requests,
                                  const struct nep_map_shape *shape, enum nep_cluster_part part,
                                  uint64_t seed, uint32_t *homes)
{
    uint64_t size =
        (uint64_t)nep_trace_num_layers(requests->trace) * nep_trace_num_experts(requests->trace);
    struct cluster c = {.requests = requests, .shape = shape};
    if (requests->num == 0) {
        return NEP_OK;
    }
    c.dims = size < DIMS ? (uint32_t)size : DIMS;
    c.vectors = calloc((size_t)requests->num * c.dims, sizeof *c.vectors);
    c.centres = calloc((size_t)shape->num_nodes * c.dims, sizeof *c.centres);
    c.cost = calloc((size_t)requests->num * shape->num_nodes, sizeof *c.cost);
    c.tokens = calloc(requests->num, sizeof *c.tokens);
    c.homes = calloc(requests->num, sizeof *c.homes);
    enum nep_status status = NEP_OK;
    if (c.vectors == NULL || c.centres == NULL || c.cost == NULL || c.tokens == NULL ||
        c.homes == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "solver: no memory for %u requests", requests->num);
    } else {
        read_vectors(&c, part);
        status = run(&c, seed, homes);
    }
    free(c.vectors);
    free(c.centres);
    free(c.cost);
    free(c.tokens);
    free(c.homes);
    return status;
}
