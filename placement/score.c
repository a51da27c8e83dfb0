/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Scoring routes every scored token through nep_choose, the function that dispatch uses, and
 * counts. There is no second model of the choice here that could drift from what is sent.
 */
#include "placement/score.h"

#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "placement/map.h"

struct scorer {
    const struct nep_requests *requests;
    const struct nep_map *map;
    const uint32_t *homes;
    uint32_t *source; /* [num] rank of each request */
    uint64_t *load;   /* [num_ranks] of the layer */
    uint64_t remote;  /* of the layer */
    uint64_t local;
    uint64_t ranks;
    const struct nep_score_details *details;
};

static void count_token(struct scorer *s, const struct nep_copies *copies, uint32_t source,
                        const uint32_t *slots, uint32_t k)
{
    uint32_t nodes[NEP_TRACE_TOP_K_LIMIT];
    uint32_t ranks[NEP_TRACE_TOP_K_LIMIT];
    uint32_t num_nodes = 0;
    uint32_t num_ranks = 0;
    uint32_t home = copies->node_of_rank[source];
    for (uint32_t i = 0; i < k; i++) {
        if (slots[i] == NEP_SLOT_NONE) {
            continue;
        }
        uint32_t rank = slots[i] / copies->slots_per_rank;
        uint32_t node = copies->node_of_rank[rank];
        s->load[rank]++;
        uint32_t j = 0;
        while (j < num_ranks && ranks[j] != rank) {
            j++;
        }
        if (j < num_ranks) {
            continue;
        }
        ranks[num_ranks++] = rank;
        j = 0;
        while (j < num_nodes && nodes[j] != node) {
            j++;
        }
        if (j == num_nodes && node != home) {
            nodes[num_nodes++] = node;
            if (s->details != NULL && s->details->traffic != NULL) {
                s->details->traffic[(size_t)home * copies->num_nodes + node]++;
            }
        }
    }
    s->remote += num_nodes;
    s->local += num_nodes == 0;
    s->ranks += num_ranks;
}

static void score_layer(struct scorer *s, uint32_t layer)
{
    const struct nep_trace *trace = s->requests->trace;
    uint32_t top_k = nep_trace_top_k(trace);
    int32_t ids[NEP_TRACE_TOP_K_LIMIT];
    uint32_t slots[NEP_TRACE_TOP_K_LIMIT];
    struct nep_copies copies;
    nep_map_copies(s->map, layer, &copies);
    s->remote = 0;
    memset(s->load, 0, copies.num_ranks * sizeof *s->load);
    for (uint32_t i = 0; i < s->requests->num; i++) {
        uint64_t first;
        uint64_t count;
        nep_trace_scored(trace, nep_requests_at(s->requests, i), &first, &count);
        for (uint64_t t = 0; t < count; t++) {
            nep_trace_ids(trace, first + t, layer, ids);
            nep_choose(&copies, s->source[i], (uint32_t)(first + t), ids, top_k, slots);
            count_token(s, &copies, s->source[i], slots, top_k);
        }
    }
}

void nep_score_imbalance(const struct nep_map_shape *shape, const uint64_t *rank_load,
                         double *node_p, double *rank_p)
{
    uint64_t total = 0;
    uint64_t most_rank = 0;
    double most_node = 0.0;
    uint32_t rank = 0;
    for (uint32_t n = 0; n < shape->num_nodes; n++) {
        uint64_t node = 0;
        for (uint32_t i = 0; i < shape->ranks_per_node[n]; i++, rank++) {
            node += rank_load[rank];
            most_rank = rank_load[rank] > most_rank ? rank_load[rank] : most_rank;
        }
        double per_rank = (double)node / shape->ranks_per_node[n];
        most_node = per_rank > most_node ? per_rank : most_node;
        total += node;
    }
    double mean = (double)total / shape->num_ranks;
    *node_p = total == 0 ? 1.0 : most_node / mean;
    *rank_p = total == 0 ? 1.0 : (double)most_rank / mean;
}

static void add_imbalance(const struct scorer *s, struct nep_score *score)
{
    double node;
    double rank;
    nep_score_imbalance(&s->map->shape, s->load, &node, &rank);
    score->imbalance_node += node;
    score->imbalance_rank += rank;
}

static enum nep_status find_sources(struct scorer *s, uint64_t *num_tokens_p)
{
    const struct nep_map_shape *shape = &s->map->shape;
    uint32_t *next = calloc(2 * (size_t)shape->num_nodes, sizeof *next);
    if (next == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "score: no memory");
    }
    uint32_t *first_rank = next + shape->num_nodes;
    for (uint32_t n = 1; n < shape->num_nodes; n++) {
        first_rank[n] = first_rank[n - 1] + shape->ranks_per_node[n - 1];
    }
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < s->requests->num; i++) {
        uint64_t first;
        uint64_t count;
        nep_trace_scored(s->requests->trace, nep_requests_at(s->requests, i), &first, &count);
        tokens += count;
        uint32_t home = s->homes[i];
        s->source[i] = first_rank[home] + next[home];
        next[home] = (next[home] + 1) % shape->ranks_per_node[home];
    }
    free(next);
    *num_tokens_p = tokens;
    return NEP_OK;
}

enum nep_status nep_score_map(const struct nep_requests *requests, const struct nep_map *map,
                              const uint32_t *homes, struct nep_score *score_p,
                              const struct nep_score_details *details)
{
    enum nep_status status = nep_trace_match(requests->trace, map);
    if (status != NEP_OK) {
        return status;
    }
    struct scorer s = {requests, map, homes, NULL, NULL, 0, 0, 0, details};
    s.source = malloc(((size_t)requests->num + 1) * sizeof *s.source);
    s.load = malloc(map->shape.num_ranks * sizeof *s.load);
    struct nep_score score = {0};
    uint64_t remote = 0;
    if (s.source == NULL || s.load == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "score: no memory for %u requests", requests->num);
        goto out;
    }
    status = find_sources(&s, &score.num_tokens);
    if (status != NEP_OK) {
        goto out;
    }
    double tokens = score.num_tokens == 0 ? 1.0 : (double)score.num_tokens;
    uint32_t layers = map->shape.num_layers;
    for (uint32_t layer = 0; layer < layers; layer++) {
        score_layer(&s, layer);
        add_imbalance(&s, &score);
        remote += s.remote;
        if (details != NULL && details->remote_of_layer != NULL) {
            details->remote_of_layer[layer] = (double)s.remote / tokens;
        }
        if (details != NULL && details->rank_load != NULL) {
            memcpy(&details->rank_load[(size_t)layer * map->shape.num_ranks], s.load,
                   map->shape.num_ranks * sizeof *s.load);
        }
    }
    score.remote_nodes_per_token = (double)remote / tokens / layers;
    score.ranks_per_token = (double)s.ranks / tokens / layers;
    score.local_share = (double)s.local / tokens / layers;
    score.imbalance_node /= layers;
    score.imbalance_rank /= layers;
    *score_p = score;
out:
    free(s.source);
    free(s.load);
    return status;
}

enum nep_status nep_score_random_homes(const struct nep_requests *requests,
                                       const struct nep_map *map, uint32_t draws, uint64_t seed,
                                       struct nep_score *score_p)
{
    uint32_t *homes = malloc(((size_t)requests->num + 1) * sizeof *homes);
    if (homes == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "score: no memory for %u requests", requests->num);
    }
    struct nep_score sum = {0};
    enum nep_status status = NEP_OK;
    for (uint32_t i = 0; i < draws && status == NEP_OK; i++) {
        struct nep_score one;
        status = nep_homes_random(requests, &map->shape, seed + i, homes);
        if (status == NEP_OK) {
            status = nep_score_map(requests, map, homes, &one, NULL);
        }
        if (status == NEP_OK) {
            sum.remote_nodes_per_token += one.remote_nodes_per_token / draws;
            sum.ranks_per_token += one.ranks_per_token / draws;
            sum.local_share += one.local_share / draws;
            sum.imbalance_node += one.imbalance_node / draws;
            sum.imbalance_rank += one.imbalance_rank / draws;
            sum.num_tokens = one.num_tokens;
        }
    }
    free(homes);
    if (status == NEP_OK) {
        *score_p = sum;
    }
    return status;
}
