/* SPDX-License-Identifier: Apache-2.0 */
#include "transport/clocks.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/bootstrap.h"
#include "transport/topology.h"

/* Whose clock this process reads. */
struct source {
    char boot_id[40];
    uint64_t time_namespace;
};

static void read_source(struct source *source)
{
    struct stat info;
    memset(source, 0, sizeof *source);
    nep_topology_boot_id(source->boot_id, sizeof source->boot_id);
    if (stat("/proc/self/ns/time", &info) == 0) {
        source->time_namespace = info.st_ino;
    }
}

/* Whether all ranks read one clock, and whether this one reads rank 0's. */
static enum nep_status compare(const struct nep_bootstrap *bootstrap, uint32_t num_ranks,
                               uint64_t timeout_ns, bool *all_p, bool *first_p)
{
    struct source mine;
    struct source *sources = calloc(num_ranks, sizeof *sources);
    if (sources == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for the clocks of %u ranks", num_ranks);
    }
    read_source(&mine);
    enum nep_status status =
        nep_bootstrap_allgather(bootstrap, &mine, sources, sizeof mine, timeout_ns, "clocks");
    *all_p = true;
    for (uint32_t r = 0; r < num_ranks; r++) {
        *all_p &= mine.boot_id[0] != '\0' && memcmp(&sources[r], &sources[0], sizeof mine) == 0;
    }
    *first_p = mine.boot_id[0] != '\0' && memcmp(&mine, &sources[0], sizeof mine) == 0;
    free(sources);
    return status;
}

void nep_clocks_enclose(const struct nep_clock_card *mine, const struct nep_clock_card *first,
                        struct nep_clock *clock)
{
    int64_t low = INT64_MIN, high = INT64_MAX;
    for (uint32_t i = 0; i < NEP_CLOCK_ROUNDS; i++) {
        int64_t least = (int64_t)(mine->entered_ns[i] - first->left_ns[i]);
        int64_t most = (int64_t)(mine->left_ns[i] - first->entered_ns[i]);
        low = least > low ? least : low;
        high = most < high ? most : high;
    }
    clock->ahead_ns = low + (high - low) / 2;
    /* A clock that was set back between two gathers turns the ends round. */
    clock->error_ns = (uint64_t)(high >= low ? high - low : low - high) / 2 + 1;
}

enum nep_status nep_clocks_align(const struct nep_bootstrap *bootstrap, uint32_t rank,
                                 uint32_t num_ranks, uint64_t timeout_ns, struct nep_clock *clock_p)
{
    bool is_one = false, is_first = false;
    struct nep_clock clock = {0};
    enum nep_status status = compare(bootstrap, num_ranks, timeout_ns, &is_one, &is_first);
    if (status != NEP_OK || is_one) {
        clock.measured_ns = nep_now_ns();
        *clock_p = clock;
        return status;
    }
    struct nep_clock_card mine;
    struct nep_clock_card *cards = calloc(num_ranks, sizeof *cards);
    uint8_t *nothing = calloc(num_ranks, 1);
    if (cards == NULL || nothing == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "no memory for the clocks of %u ranks", num_ranks);
    }
    status = nep_bootstrap_common(bootstrap, rank, num_ranks, status, timeout_ns);
    for (uint32_t i = 0; status == NEP_OK && i < NEP_CLOCK_ROUNDS; i++) {
        uint8_t byte = 0;
        mine.entered_ns[i] = nep_now_ns();
        status = nep_bootstrap_allgather(bootstrap, &byte, nothing, 1, timeout_ns, "clocks");
        mine.left_ns[i] = nep_now_ns();
    }
    if (status == NEP_OK) {
        status =
            nep_bootstrap_allgather(bootstrap, &mine, cards, sizeof mine, timeout_ns, "clocks");
    }
    if (status == NEP_OK) {
        if (!is_first) {
            nep_clocks_enclose(&mine, &cards[0], &clock);
        }
        clock.measured_ns = nep_now_ns();
        nep_info("rank %u: its clock is %lld ns ahead of rank 0's, at most %llu ns wrong", rank,
                 (long long)clock.ahead_ns, (unsigned long long)clock.error_ns);
        *clock_p = clock;
    }
    free(cards);
    free(nothing);
    return status;
}
