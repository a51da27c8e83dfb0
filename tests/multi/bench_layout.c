/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How long route and layout take: nep_ep_layout of 4096 tokens, E = 256, K = 8, 8 nodes, one core.
 * Prints ns a token, the median and the best of many runs, for a map of single copies and one with
 * replicas. Not a test: nothing is asserted.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "tests/multi/harness.h"

enum { RANKS = 8, TOKENS = 4096, EXPERTS = 256, TOP_K = 8, RUNS = 101 };

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void measure(struct nep_ep *ep, const char *what)
{
    int32_t *ids = malloc(TOKENS * TOP_K * sizeof *ids);
    uint64_t seed = 1;
    for (uint32_t i = 0; ids != NULL && i < TOKENS * TOP_K; i++) {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        ids[i] = (int32_t)((seed >> 33) % (EXPERTS / TOP_K) * TOP_K + i % TOP_K); /* distinct */
    }
    uint32_t per_rank[RANKS], per_node[RANKS];
    uint32_t *slots = malloc(TOKENS * TOP_K * sizeof *slots);
    struct nep_tokens in = {.size = sizeof in, .num_tokens = TOKENS, .topk_ids = ids};
    struct nep_layout_counts counts = {.size = sizeof counts,
                                       .rows_per_rank = per_rank,
                                       .rows_per_node = per_node,
                                       .topk_slots = slots};
    double ns[RUNS];
    for (int i = 0; i < RUNS; i++) {
        uint64_t start = nep_now_ns();
        if (nep_ep_layout(ep, &in, &counts) != NEP_OK) {
            printf("%s\n", nep_last_message());
            break;
        }
        ns[i] = (double)(nep_now_ns() - start) / TOKENS;
    }
    qsort(ns, RUNS, sizeof ns[0], compare);
    printf("route + layout, %s: %.1f ns a token (best %.1f)\n", what, ns[RUNS / 2], ns[0]);
    free(ids);
    free(slots);
}

static bool bench(struct nep_multi_rank *rank)
{
    static const uint32_t sizes[RANKS] = {1, 1, 1, 1, 1, 1, 1, 1};
    struct nep_comm_params params = {.size = sizeof params,
                                     .rank = rank->rank,
                                     .num_ranks = RANKS,
                                     .bootstrap = &rank->bootstrap,
                                     .ranks_per_node = sizes,
                                     .num_nodes = RANKS};
    struct nep_ep_params shape = {.size = sizeof shape,
                                  .num_experts = EXPERTS,
                                  .top_k = TOP_K,
                                  .hidden = 16,
                                  .max_tokens = TOKENS,
                                  .map = rank->arg};
    struct nep_comm *comm = NULL;
    struct nep_ep *ep = NULL;
    if (nep_comm_create(&params, &comm) != NEP_OK || nep_ep_create(comm, &shape, &ep) != NEP_OK) {
        return nep_multi_fail(rank, "%s", nep_last_message());
    }
    if (rank->rank == 0) {
        measure(ep, rank->arg != NULL ? "12.5 % replicas" : "single copies");
    }
    bool is_good = nep_multi_barrier(rank);
    nep_ep_destroy(ep);
    nep_comm_destroy(comm);
    return is_good;
}

/* 36 slots a rank: 32 experts of its own and 4 of its neighbour's. */
static struct nep_map *with_replicas(void)
{
    FILE *file = tmpfile();
    if (file == NULL) {
        return NULL;
    }
    fprintf(file, "nepmap 1\nlayers 1 experts 256 nodes 8 ranks_per_node 1,1,1,1,1,1,1,1 "
                  "slots_per_rank 36\n");
    for (int e = 0; e < EXPERTS; e++) {
        fprintf(file, "0 %d %d:%d", e, e / 32, e % 32);
        if (e % 32 < 4) {
            fprintf(file, " %d:%d", (e / 32 + 1) % 8, 32 + e % 32);
        }
        fputc('\n', file);
    }
    return nep_multi_map_read(file);
}

int main(void)
{
    struct nep_multi_result result;
    nep_multi_run_threads(RANKS, bench, NULL, &result);
    struct nep_map *map = with_replicas();
    if (map != NULL && result.num_failed == 0) {
        nep_multi_run_threads(RANKS, bench, map, &result);
    }
    nep_map_destroy(map);
    if (result.num_failed != 0) {
        fprintf(stderr, "%s\n", result.error);
    }
    return result.num_failed != 0;
}
