/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What goes over the wire, to the byte: one row per (token, remote node) each way, and headers
 * whose sizes are stated here by hand from docs/protocol.md, not taken from the code. 2 nodes of 2
 * ranks.
 */
#include <stdlib.h>
#include <string.h>

#include "tests/multi/seat.h"
#include "tests/unit/cmocka_all.h"

enum {
    COUNTS_HEAD = 72,
    TILE_HEAD = 64,
    META = 24, /* token 4, three 16-bit slots and a pad 8, three weights 12 */
    ROW = SEAT_HIDDEN * 2,
    TABLES = 2 * 4 + 2 * 2 * 4 /* rows per rank, rows per slot of a node of 2 ranks of 2 slots */
};

static uint64_t up64(uint64_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

/* Tokens of the first `num` whose experts reach the other node. */
static uint32_t far_rows(const struct seat *seat, uint32_t node, uint32_t num)
{
    uint32_t rows = 0;
    for (uint32_t t = 0; t < num; t++) {
        bool is_far = false;
        for (uint32_t k = 0; k < SEAT_TOP_K; k++) {
            int32_t id = seat->ids[t * SEAT_TOP_K + k];
            is_far = is_far || (id >= 0 && (uint32_t)id / 4 != node); /* 4 slots a node */
        }
        rows += is_far;
    }
    return rows;
}

static bool wire_is_exact(struct nep_multi_rank *rank)
{
    uint64_t seed = *(const uint64_t *)rank->arg;
    struct seat *seat = calloc(1, sizeof *seat);
    struct nep_ep_params params = {0};
    if (seat == NULL || !seat_open(rank, &params, seat)) {
        return false;
    }
    uint16_t *x = calloc(SEAT_TOKENS * SEAT_HIDDEN, 2), *out = calloc(SEAT_ROWS * SEAT_HIDDEN, 2);
    uint64_t rows = 0, back = 0, bytes = 0;
    for (uint32_t round = 0; round < 12; round++) {
        uint32_t num = round % 3 == 0 ? SEAT_TOKENS : seat_mix(seed, round, rank->rank) % 20;
        seat_route(seed + round, rank->rank, seat->ids, seat->weights);
        struct nep_tokens in = seat_tokens(seat, x, NULL);
        struct nep_rows outputs = seat_rows(seat, out, NULL);
        struct nep_expert_rows y = {.size = sizeof y, .y = out};
        struct nep_tokens_out sum = {.size = sizeof sum, .num_tokens = num, .y = x};
        in.num_tokens = num;
        if (nep_dispatch(seat->ep, seat->handle, &in, &outputs, NULL) != NEP_OK ||
            nep_combine(seat->ep, seat->handle, &y, &sum, NULL) != NEP_OK) {
            return nep_multi_fail(rank, "%s", nep_last_message());
        }
        uint32_t far = far_rows(seat, rank->rank / 2, num);
        rows += far;
        bytes += up64(COUNTS_HEAD + TABLES);
        if (far > 8) {
            bytes += up64(TILE_HEAD + (uint64_t)far * META) + (uint64_t)far * ROW;
        } else if (far > 0) {
            bytes += up64((uint64_t)far * META) + (uint64_t)far * ROW; /* inside COUNTS */
        }
        /* Back: this rank sums for the same lane of the other node. */
        uint32_t lane = (rank->rank + 2) % 4;
        uint32_t num_there = round % 3 == 0 ? SEAT_TOKENS : seat_mix(seed, round, lane) % 20;
        struct seat *there = calloc(1, sizeof *there);
        seat_route(seed + round, lane, there->ids, there->weights);
        uint32_t sums = far_rows(there, lane / 2, num_there);
        free(there);
        back += sums;
        bytes += COUNTS_HEAD + (sums != 0 ? TILE_HEAD + (uint64_t)sums * ROW : 0);
        struct nep_stats stats;
        if (nep_ep_stats(seat->ep, &stats) != NEP_OK || stats.remote_rows != rows ||
            stats.remote_rows_back != back || stats.wire_bytes != bytes) {
            return nep_multi_fail(
                rank, "round %u: %llu rows, %llu back, %llu bytes; must be %llu, %llu, %llu", round,
                (unsigned long long)stats.remote_rows, (unsigned long long)stats.remote_rows_back,
                (unsigned long long)stats.wire_bytes, (unsigned long long)rows,
                (unsigned long long)back, (unsigned long long)bytes);
        }
    }
    free(x);
    free(out);
    seat_close(seat);
    return true;
}

static void test_wire_bytes_are_floor_and_headers(void **state)
{
    (void)state;
    uint64_t seed = nep_multi_seed("wire");
    seat_run(wire_is_exact, &seed);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_wire_bytes_are_floor_and_headers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
