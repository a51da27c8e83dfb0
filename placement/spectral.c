/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The grouping of GRACE-MoE (arXiv 2509.25041) at equal slots: affinity is how often two experts
 * share a token, normalised by what each fires at all (D^-1/2 A D^-1/2); experts are rows of its
 * leading eigenvectors, of length one; k-means groups them, with every group's slots as a limit.
 * The eigenvectors come from subspace iteration: a baseline needs them to a few digits only (the
 * bound in bounds.c needs all, exactly). Layers are apart, so the labels of nodes have no meaning
 * from one layer to the next.
 */
#include "placement/spectral.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "placement/map.h"
#include "placement/rng.h"

#define MOST_TOKENS 16384u
#define ITERATIONS  80
#define STEPS       20

struct spectral {
    uint32_t n; /* experts */
    uint32_t k; /* nodes, and eigenvectors */
    const uint32_t *slots;
    double *affinity; /* [n][n] */
    double *vectors;  /* [n][k] */
    double *next;     /* [n][k] */
    double *centres;  /* [k][k] */
    uint16_t *node_of;
};

static void set_affinity(struct spectral *s, const struct nep_sets *sets)
{
    for (uint32_t t = 0; t < sets->num_tokens; t++) {
        const uint16_t *items = &sets->items[(size_t)t * sets->width];
        for (uint32_t i = 0; i < sets->len[t]; i++) {
            for (uint32_t j = 0; j < sets->len[t]; j++) {
                s->affinity[(size_t)items[i] * s->n + items[j]] += i != j;
            }
        }
    }
    double *scale = s->next;
    for (uint32_t i = 0; i < s->n; i++) {
        double sum = 0.0;
        for (uint32_t j = 0; j < s->n; j++) {
            sum += s->affinity[(size_t)i * s->n + j];
        }
        scale[i] = sum > 0.0 ? 1.0 / sqrt(sum) : 0.0;
    }
    for (uint32_t i = 0; i < s->n; i++) {
        for (uint32_t j = 0; j < s->n; j++) {
            s->affinity[(size_t)i * s->n + j] *= scale[i] * scale[j];
        }
        s->affinity[(size_t)i * s->n + i] += 1.0; /* no eigenvalue is below 0 then */
    }
}

/* Columns to an orthonormal basis (Gram-Schmidt); what vanishes becomes zero. */
static void orthonormalise(struct spectral *s)
{
    for (uint32_t c = 0; c < s->k; c++) {
        for (uint32_t b = 0; b <= c; b++) {
            double dot = 0.0;
            for (uint32_t i = 0; i < s->n; i++) {
                dot += s->vectors[(size_t)i * s->k + c] * s->vectors[(size_t)i * s->k + b];
            }
            double length = sqrt(dot);
            for (uint32_t i = 0; i < s->n; i++) {
                double *x = &s->vectors[(size_t)i * s->k + c];
                if (b < c) {
                    *x -= dot * s->vectors[(size_t)i * s->k + b];
                } else {
                    *x = length > 1e-12 ? *x / length : 0.0;
                }
            }
        }
    }
}

static void find_vectors(struct spectral *s, struct nep_rng *rng)
{
    size_t size = (size_t)s->n * s->k;
    for (size_t i = 0; i < size; i++) {
        s->vectors[i] = nep_rng_unit(rng) - 0.5;
    }
    for (int step = 0; step < ITERATIONS; step++) {
        orthonormalise(s);
        memset(s->next, 0, size * sizeof *s->next);
        for (uint32_t i = 0; i < s->n; i++) {
            for (uint32_t j = 0; j < s->n; j++) {
                double a = s->affinity[(size_t)i * s->n + j];
                for (uint32_t c = 0; c < s->k && a != 0.0; c++) {
                    s->next[(size_t)i * s->k + c] += a * s->vectors[(size_t)j * s->k + c];
                }
            }
        }
        memcpy(s->vectors, s->next, size * sizeof *s->next);
    }
    orthonormalise(s);
    for (uint32_t i = 0; i < s->n; i++) {
        double *row = &s->vectors[(size_t)i * s->k];
        double sum = 0.0;
        for (uint32_t c = 0; c < s->k; c++) {
            sum += row[c] * row[c];
        }
        for (uint32_t c = 0; c < s->k && sum > 0.0; c++) {
            row[c] /= sqrt(sum);
        }
    }
}

static double likeness(const struct spectral *s, uint32_t expert, uint32_t node)
{
    double sum = 0.0;
    for (uint32_t c = 0; c < s->k; c++) {
        sum += s->vectors[(size_t)expert * s->k + c] * s->centres[(size_t)node * s->k + c];
    }
    return sum;
}

/* First centres: the expert least like any centre so far, in turn. */
static void start_centres(struct spectral *s, uint32_t first)
{
    uint32_t chosen = first;
    for (uint32_t n = 0; n < s->k; n++) {
        memcpy(&s->centres[(size_t)n * s->k], &s->vectors[(size_t)chosen * s->k],
               s->k * sizeof *s->centres);
        double least = INFINITY;
        for (uint32_t e = 0; e < s->n; e++) {
            double most = -INFINITY;
            for (uint32_t m = 0; m <= n; m++) {
                most = fmax(most, likeness(s, e, m));
            }
            if (most < least) {
                least = most;
                chosen = e;
            }
        }
    }
}

struct like {
    double value;
    uint32_t expert;
    uint32_t node;
};

static int likest(const void *a, const void *b)
{
    const struct like *x = a;
    const struct like *y = b;
    if (x->value != y->value) {
        return x->value > y->value ? -1 : 1;
    }
    return x->expert != y->expert ? (x->expert < y->expert ? -1 : 1) : (x->node < y->node ? -1 : 1);
}

/* Pairs of expert and centre, the likest first, as long as slots last; then the centres anew. */
static void group(struct spectral *s, struct like *pairs, uint32_t *left)
{
    for (uint32_t e = 0; e < s->n; e++) {
        s->node_of[e] = UINT16_MAX;
        for (uint32_t n = 0; n < s->k; n++) {
            pairs[(size_t)e * s->k + n] = (struct like){likeness(s, e, n), e, n};
        }
    }
    qsort(pairs, (size_t)s->n * s->k, sizeof *pairs, likest);
    memcpy(left, s->slots, s->k * sizeof *left);
    memset(s->centres, 0, (size_t)s->k * s->k * sizeof *s->centres);
    for (size_t i = 0; i < (size_t)s->n * s->k; i++) {
        const struct like *p = &pairs[i];
        if (s->node_of[p->expert] == UINT16_MAX && left[p->node] > 0) {
            s->node_of[p->expert] = (uint16_t)p->node;
            left[p->node]--;
            for (uint32_t c = 0; c < s->k; c++) {
                s->centres[(size_t)p->node * s->k + c] +=
                    s->vectors[(size_t)p->expert * s->k + c] / s->slots[p->node];
            }
        }
    }
}

enum nep_status nep_spectral_layer(const struct nep_sets *sets, uint32_t num_nodes,
                                   const uint32_t *slots, uint64_t seed, uint16_t *node_of)
{
    struct spectral s = {.n = sets->num_items, .k = num_nodes, .slots = slots, .node_of = node_of};
    size_t table = (size_t)s.n * s.k;
    s.affinity = calloc((size_t)s.n * s.n, sizeof *s.affinity);
    s.vectors = calloc(table, sizeof *s.vectors);
    s.next = calloc(table, sizeof *s.next);
    s.centres = calloc((size_t)s.k * s.k, sizeof *s.centres);
    struct like *pairs = malloc(table * sizeof *pairs);
    uint32_t *left = malloc(s.k * sizeof *left);
    enum nep_status status = NEP_OK;
    if (s.affinity == NULL || s.vectors == NULL || s.next == NULL || s.centres == NULL ||
        pairs == NULL || left == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "spectral: no memory for %u experts", s.n);
    } else {
        struct nep_rng rng = nep_rng_seed(seed);
        set_affinity(&s, sets);
        find_vectors(&s, &rng);
        start_centres(&s, nep_rng_below(&rng, s.n));
        for (int step = 0; step < STEPS; step++) {
            group(&s, pairs, left);
        }
    }
    free(s.affinity);
    free(s.vectors);
    free(s.next);
    free(s.centres);
    free(pairs);
    free(left);
    return status;
}

/* Ranks of a node take its experts in turn. */
static void add_entries(const struct nep_map_shape *shape, uint32_t layer, const uint16_t *node_of,
                        struct nep_map_entry *entries)
{
    uint32_t first = 0;
    uint32_t at = 0;
    for (uint32_t n = 0; n < shape->num_nodes; n++) {
        uint32_t ranks = shape->ranks_per_node[n];
        uint32_t num = 0;
        for (uint32_t e = 0; e < shape->num_experts; e++) {
            if (node_of[e] == n) {
                uint32_t slot = (first + num % ranks) * shape->slots_per_rank + num / ranks;
                entries[at++] = (struct nep_map_entry){layer, e, slot, 1, 0};
                num++;
            }
        }
        first += ranks;
    }
}

enum nep_status nep_solve_spectral(const struct nep_requests *requests,
                                   const struct nep_map_shape *shape, uint64_t seed,
                                   struct nep_map **map_p)
{
    uint32_t experts = shape->num_experts;
    uint64_t tokens = nep_trace_num_tokens(requests->trace);
    uint32_t stride = (uint32_t)(tokens / MOST_TOKENS) + 1;
    uint32_t *slots = calloc(shape->num_nodes, sizeof *slots);
    uint16_t *node_of = calloc(experts, sizeof *node_of);
    struct nep_map_entry *entries = malloc((size_t)shape->num_layers * experts * sizeof *entries);
    enum nep_status status = NEP_OK;
    if (slots == NULL || node_of == NULL || entries == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "spectral: no memory for %u experts", experts);
    }
    for (uint32_t n = 0; n < shape->num_nodes && status == NEP_OK; n++) {
        slots[n] = shape->ranks_per_node[n] * shape->slots_per_rank;
    }
    for (uint32_t l = 0; l < shape->num_layers && status == NEP_OK; l++) {
        struct nep_sets sets;
        status = nep_sets_sample(requests, l, stride, 0, &sets);
        if (status == NEP_OK) {
            status = nep_spectral_layer(&sets, shape->num_nodes, slots, seed ^ l, node_of);
            nep_sets_fini(&sets);
        }
        if (status == NEP_OK) {
            add_entries(shape, l, node_of, &entries[(size_t)l * experts]);
        }
    }
    if (status == NEP_OK) {
        status = nep_map_build(shape, entries, (size_t)shape->num_layers * experts, map_p);
    }
    free(slots);
    free(node_of);
    free(entries);
    return status;
}
