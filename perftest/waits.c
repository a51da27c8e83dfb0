/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who waited for whom, of all ranks, as two tables in JSON: waiting rank by awaited rank, and phase
 * by awaited rank. A column that is large for all others is a slow rank.
 */
#include <stdlib.h>
#include <string.h>

#include "perftest/results.h"

enum { MOST_RANKS = 128, MOST_STATS = 4096 };

static const char *const phases[] = {
    "counts",
    "output binding",
    "home tiles",
    "reading of home tiles",
    "push",
    "tiles",
    "credit",
    "local completion",
    "sums",
    "expert outputs",
    "staged rows",
    "reading of expert outputs",
    "other",
    "reading of tiles",
    "taking of staged rows",
};
enum { NUM_PHASES = sizeof(phases) / sizeof(phases[0]), OTHER = 12 };

static uint32_t phase_of(const char *name)
{
    for (uint32_t p = 0; p < NUM_PHASES; p++) {
        if (strcmp(phases[p], name) == 0) {
            return p;
        }
    }
    return OTHER;
}

bool nep_perf_waits_gather(struct nep_perf_rank *rank, struct nep_perf_summary *summary)
{
    uint32_t ranks = rank->seat->num_ranks, num = 0;
    if (ranks > MOST_RANKS) {
        return true;
    }
    size_t cells = (size_t)NUM_PHASES * ranks;
    double *own = calloc(cells, sizeof(*own));
    summary->waits_ms = calloc(cells * ranks, sizeof(*own));
    struct nep_wait_stat *stats = calloc(MOST_STATS, sizeof(*stats));
    bool is_fine = own != NULL && summary->waits_ms != NULL && stats != NULL;
    if (is_fine && nep_ep_waits(rank->ep, stats, MOST_STATS, &num) == NEP_OK) {
        for (uint32_t i = 0; i < num; i++) {
            own[phase_of(stats[i].phase) * ranks + stats[i].rank] +=
                (double)stats[i].wait_ns * 1e-6;
        }
    }
    is_fine = is_fine &&
              nep_perf_seat_allgather(rank->seat, own, summary->waits_ms, cells * sizeof(*own));
    free(own);
    free(stats);
    return is_fine;
}

/* One row; of every `step`-th block of R cells from `first` on, summed. */
static void row(FILE *out, const double *cells, uint32_t ranks, size_t first, size_t step,
                size_t num)
{
    for (uint32_t of = 0; of < ranks; of++) {
        double sum = 0;
        for (size_t i = 0; i < num; i++) {
            sum += cells[(first + i * step) * ranks + of];
        }
        fprintf(out, "%s%.3f", of > 0 ? ", " : "[", sum);
    }
    fprintf(out, "]");
}

void nep_perf_waits_json(FILE *out, const struct nep_perf_rank *rank,
                         const struct nep_perf_summary *summary)
{
    uint32_t ranks = rank->seat->num_ranks;
    if (summary->waits_ms == NULL) {
        return;
    }
    fprintf(out, "  \"wait_ms\": [");
    for (uint32_t r = 0; r < ranks; r++) {
        fprintf(out, "%s", r > 0 ? ",\n    " : "\n    ");
        row(out, summary->waits_ms, ranks, (size_t)r * NUM_PHASES, 1, NUM_PHASES);
    }
    fprintf(out, "],\n  \"wait_ms_by_phase\": {");
    for (uint32_t p = 0; p < NUM_PHASES; p++) {
        fprintf(out, "%s\"%s\": ", p > 0 ? ",\n    " : "\n    ", phases[p]);
        row(out, summary->waits_ms, ranks, p, NUM_PHASES, ranks);
    }
    fprintf(out, "},\n");
}

void nep_perf_lost_json(FILE *out, const struct nep_perf_rank *rank,
                        const struct nep_perf_summary *summary)
{
    const char *separator = "";
    fprintf(out, "  \"lost_ranks\": [");
    for (uint32_t r = 0; rank->seat->is_live != NULL && r < rank->seat->num_ranks; r++) {
        if (rank->seat->is_live[r] == 0) {
            fprintf(out, "%s%u", separator, r);
            separator = ", ";
        }
    }
    fprintf(out, "],\n  \"recoveries\": %u,\n  \"outage_ms\": %.3f,\n", rank->num_recoveries,
            summary->outage_ms);
}
