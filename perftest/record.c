/* SPDX-License-Identifier: Apache-2.0 */
/*
 * --record: the library's recorder on the routing of a run. The iterations of a rank go through the
 * layers in turn and have no requests of their own, so each place t of its batch counts as one
 * request that decodes a token per round of the layers.
 */
#include <stdlib.h>
#include <string.h>

#include "base/path.h"
#include "perftest/perf.h"
#include "perftest/rank.h"

static bool is_recorded(const struct nep_perf_rank *rank)
{
    const char *path = rank->options.record;
    /* Rank 0 alone where all would write to one place. */
    return path != NULL && (strstr(path, "%r") != NULL || rank->topology.rank == 0);
}

int nep_perf_record_start(struct nep_perf_rank *rank)
{
    const struct nep_recorder_params params = {
        .size = sizeof(params), .sample_ppm = rank->options.record_ppm, .model = "nep-perf"};
    if (!is_recorded(rank)) {
        return -1;
    }
    rank->request_keys = malloc((rank->options.tokens + 1) * sizeof(*rank->request_keys));
    if (rank->request_keys == NULL) {
        return nep_perf_error(NEP_PERF_FAILED, "out of memory for %u keys", rank->options.tokens);
    }
    for (uint32_t t = 0; t < rank->options.tokens; t++) {
        rank->request_keys[t] = ((uint64_t)rank->topology.rank << 32) | t;
    }
    return nep_ep_record_start(rank->ep, &params) == NEP_OK ? -1 : nep_perf_fail(rank, "--record");
}

int nep_perf_record_save(struct nep_perf_rank *rank)
{
    char name[512];
    if (!is_recorded(rank)) {
        return -1;
    }
    nep_path_expand(rank->options.record, rank->topology.rank, name, sizeof name);
    return nep_ep_record_save(rank->ep, name, NULL) == NEP_OK ? -1
                                                              : nep_perf_fail(rank, "--record");
}
