/* SPDX-License-Identifier: Apache-2.0 */
/* Maps staged while running: they count from their operation on; ranks that differ are named. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/multi/seat.h"
#include "tests/unit/cmocka_all.h"

/* ---- maps staged while running --------------------------------------------------------------- */

/* Experts rotated by `by` slots. */
static struct nep_map *rotated(uint32_t by)
{
    FILE *file = tmpfile();
    if (file == NULL) {
        return NULL;
    }
    fprintf(file, "nepmap 1\nlayers 1 experts %d nodes 2 ranks_per_node 2,2 slots_per_rank 2\n",
            SEAT_EXPERTS);
    for (uint32_t e = 0; e < SEAT_EXPERTS; e++) {
        uint32_t slot = (e + by) % SEAT_EXPERTS;
        fprintf(file, "0 %u %u:%u\n", e, slot / 2, slot % 2);
    }
    return nep_multi_map_read(file);
}

static bool staged_maps(struct nep_multi_rank *rank)
{
    uint64_t seed = *(const uint64_t *)rank->arg;
    struct seat *seat = calloc(1, sizeof *seat);
    struct nep_ep_params params = {.layout = NEP_LAYOUT_RANK};
    if (seat == NULL || !seat_open(rank, &params, seat)) {
        return false;
    }
    seat_route(seed, rank->rank, seat->ids, seat->weights);
    uint16_t *x = calloc(SEAT_TOKENS * SEAT_HIDDEN, 2), *out = calloc(SEAT_ROWS * SEAT_HIDDEN, 2);
    struct nep_map *maps[] = {rotated(3), rotated(5)};
    uint32_t versions[2];
    if (maps[0] == NULL || maps[1] == NULL ||
        nep_ep_stage_map(seat->ep, maps[0], 2, &versions[0]) != NEP_OK ||
        nep_ep_stage_map(seat->ep, maps[1], 3, &versions[1]) != NEP_OK ||
        nep_ep_stage_map(seat->ep, maps[1], 3, NULL) != NEP_ERR_INVALID) {
        return nep_multi_fail(rank, "staging: %s", nep_last_message());
    }
    nep_map_destroy(maps[0]); /* the ep holds them */
    nep_map_destroy(maps[1]);
    static const uint32_t rotation[] = {0, 0, 3, 5, 5};
    for (uint32_t op = 0; op < 5; op++) {
        struct nep_tokens in = seat_tokens(seat, x, NULL);
        struct nep_rows rows = seat_rows(seat, out, NULL);
        struct nep_counts counts;
        struct nep_map_state state;
        if (nep_dispatch(seat->ep, seat->handle, &in, &rows, NULL) != NEP_OK ||
            nep_dispatch_counts(seat->ep, seat->handle, &counts) != NEP_OK ||
            nep_ep_map_state(seat->ep, &state) != NEP_OK) {
            return nep_multi_fail(rank, "op %u: %s", op, nep_last_message());
        }
        uint32_t want_version = op < 2 ? 0 : op < 3 ? versions[0] : versions[1];
        if (state.version != want_version || state.oldest_held != want_version) {
            return nep_multi_fail(rank, "op %u: version %u, oldest %u", op, state.version,
                                  state.oldest_held);
        }
        for (uint64_t i = 0; i < counts.num_rows; i++) {
            int32_t ids[SEAT_TOKENS * SEAT_TOP_K];
            float weights[SEAT_TOKENS * SEAT_TOP_K];
            seat_route(seed, seat->source_rank[i], ids, weights);
            for (uint32_t k = 0; k < SEAT_TOP_K; k++) {
                int32_t id = ids[seat->source_token[i] * SEAT_TOP_K + k];
                uint32_t slot = id < 0 ? UINT32_MAX : ((uint32_t)id + rotation[op]) % SEAT_EXPERTS;
                int32_t want = id >= 0 && slot / 2 == rank->rank ? (int32_t)(slot % 2) : -1;
                if (seat->topk_slots[i * SEAT_TOP_K + k] != want) {
                    return nep_multi_fail(rank, "op %u row %llu k %u: slot %d, not %d", op,
                                          (unsigned long long)i, k,
                                          seat->topk_slots[i * SEAT_TOP_K + k], want);
                }
            }
        }
    }
    free(x);
    free(out);
    seat_close(seat);
    return true;
}

/* A rank that stages another map is named by all, within the operation. */
static bool staged_differently(struct nep_multi_rank *rank)
{
    uint64_t seed = *(const uint64_t *)rank->arg;
    struct seat *seat = calloc(1, sizeof *seat);
    struct nep_ep_params params = {.layout = NEP_LAYOUT_RANK};
    if (seat == NULL || !seat_open(rank, &params, seat)) {
        return false;
    }
    seat_route(seed, rank->rank, seat->ids, seat->weights);
    uint16_t *x = calloc(SEAT_TOKENS * SEAT_HIDDEN, 2), *out = calloc(SEAT_ROWS * SEAT_HIDDEN, 2);
    struct nep_map *map = rotated(rank->rank == 2 ? 1 : 3);
    struct nep_tokens in = seat_tokens(seat, x, NULL);
    struct nep_rows rows = seat_rows(seat, out, NULL);
    enum nep_status status = nep_ep_stage_map(seat->ep, map, 0, NULL);
    nep_map_destroy(map);
    if (status == NEP_OK) {
        status = nep_dispatch(seat->ep, seat->handle, &in, &rows, NULL);
    }
    if (status != NEP_ERR_MISMATCH && status != NEP_ERR_PEER_LOST) {
        return nep_multi_fail(rank, "status %d: %s", (int)status, nep_last_message());
    }
    if (rank->rank != 2 && strstr(nep_last_message(), "rank 2") == NULL) {
        return nep_multi_fail(rank, "rank 2 is not named: %s", nep_last_message());
    }
    bool is_good = nep_multi_barrier(rank);
    free(x);
    free(out);
    seat_close(seat);
    return is_good;
}

/* ---- tests ---- */

static void test_map_staged_counts_from_its_op(void **state)
{
    (void)state;
    uint64_t seed = nep_multi_seed("maps");
    seat_run(staged_maps, &seed);
}

static void test_map_staged_differently_names_the_rank(void **state)
{
    (void)state;
    uint64_t seed = nep_multi_seed("maps that differ");
    seat_run(staged_differently, &seed);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_map_staged_counts_from_its_op),
        cmocka_unit_test(test_map_staged_differently_names_the_rank),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
