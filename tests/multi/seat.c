/* SPDX-License-Identifier: Apache-2.0 */
/* One seat of the fixed group; everything about the routing is a function of (seed, rank). */
#include "tests/multi/seat.h"

#include <stdlib.h>

#include "tests/unit/cmocka_all.h"

uint32_t seat_mix(uint64_t seed, uint64_t a, uint64_t b)
{
    uint64_t z = seed + a * 0x9e3779b97f4a7c15ull + b * 0xd1342543de82ef95ull;
    z = (z ^ (z >> 29)) * 0xbf58476d1ce4e5b9ull;
    return (uint32_t)(z ^ (z >> 32));
}

void seat_route(uint64_t seed, uint32_t rank, int32_t *ids, float *weights)
{
    for (uint32_t t = 0; t < SEAT_TOKENS; t++) {
        for (uint32_t k = 0; k < SEAT_TOP_K; k++) {
            uint32_t at = t * SEAT_TOP_K + k;
            ids[at] = (int32_t)((seat_mix(seed, rank, t) + k * 3) % SEAT_EXPERTS);
            if (seat_mix(seed, rank + 100, at) % 9 == 0) {
                ids[at] = -1;
            }
            weights[at] = 0.25f * (float)(1 + seat_mix(seed, rank + 200, at) % 8);
        }
    }
}

bool seat_open(struct nep_multi_rank *rank, const struct nep_ep_params *params, struct seat *seat)
{
    static const uint32_t sizes[] = {2, 2};
    struct nep_comm_params comm = {.size = sizeof comm,
                                   .rank = rank->rank,
                                   .num_ranks = SEAT_RANKS,
                                   .bootstrap = &rank->bootstrap,
                                   .ranks_per_node = sizes,
                                   .num_nodes = 2,
                                   .timeout_ns = 60000000000ull};
    struct nep_ep_params full = *params;
    full.size = sizeof full;
    full.num_experts = SEAT_EXPERTS;
    full.top_k = SEAT_TOP_K;
    full.hidden = SEAT_HIDDEN;
    full.max_tokens = SEAT_TOKENS;
    full.pool_bytes = 8 << 20;
    if (nep_comm_create(&comm, &seat->comm) != NEP_OK ||
        nep_ep_create(seat->comm, &full, &seat->ep) != NEP_OK ||
        nep_handle_create(seat->ep, &seat->handle) != NEP_OK) {
        return nep_multi_fail(rank, "creation: %s", nep_last_message());
    }
    return true;
}

void seat_close(struct seat *seat)
{
    nep_handle_destroy(seat->handle);
    nep_ep_destroy(seat->ep);
    nep_comm_destroy(seat->comm);
    free(seat);
}

struct nep_tokens seat_tokens(struct seat *seat, const void *x, const void *scales)
{
    return (struct nep_tokens){.size = sizeof(struct nep_tokens),
                               .num_tokens = SEAT_TOKENS,
                               .x = x,
                               .scales = scales,
                               .topk_ids = seat->ids,
                               .topk_weights = seat->weights};
}

struct nep_rows seat_rows(struct seat *seat, void *x, void *scales)
{
    return (struct nep_rows){.size = sizeof(struct nep_rows),
                             .x = x,
                             .capacity = SEAT_ROWS,
                             .scales = scales,
                             .topk_slots = seat->topk_slots,
                             .topk_weights = seat->topk_weights,
                             .source_rank = seat->source_rank,
                             .source_token = seat->source_token};
}

static void check(const struct nep_multi_result *result)
{
    if (result->num_failed != 0) {
        fail_msg("%u ranks failed: %s", result->num_failed, result->error);
    }
}

void seat_run(nep_multi_fn fn, void *arg)
{
    struct nep_multi_result result;
    nep_multi_run_threads(SEAT_RANKS, fn, arg, &result);
    check(&result);
}

void seat_run_processes(nep_multi_fn fn, void *arg)
{
    struct nep_multi_result result;
    nep_multi_run_processes(SEAT_RANKS, fn, arg, 60, &result);
    check(&result);
}
