/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One row per phase, made when the phase is first waited for. Phases are static texts, a dozen of
 * them: a short list, searched when a wait of the slow kind ends, costs nothing that counts.
 */
#include "dispatch/waits.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch/ep.h"

enum { MAX_PHASES = 24 };

struct cell {
    uint64_t num;
    uint64_t ns;
    uint64_t longest_ns;
};

struct nep_waits {
    uint32_t num_ranks;
    uint32_t num_phases;
    const char *phases[MAX_PHASES];
    struct cell *cells; /* [MAX_PHASES][num_ranks] */
};

enum nep_status nep_waits_create(uint32_t num_ranks, struct nep_waits **waits_p)
{
    struct nep_waits *waits = calloc(1, sizeof *waits);
    struct cell *cells = calloc((size_t)MAX_PHASES * num_ranks, sizeof *cells);
    if (waits == NULL || cells == NULL) {
        free(waits);
        free(cells);
        return nep_fail(NEP_ERR_NO_MEMORY, "ep: no memory for the waits of %u ranks", num_ranks);
    }
    waits->num_ranks = num_ranks;
    waits->cells = cells;
    *waits_p = waits;
    return NEP_OK;
}

void nep_waits_destroy(struct nep_waits *waits)
{
    if (waits != NULL) {
        free(waits->cells);
        free(waits);
    }
}

void nep_waits_add(struct nep_waits *waits, const char *phase, uint32_t rank, uint64_t ns)
{
    if (phase == NULL || rank >= waits->num_ranks) {
        return;
    }
    uint32_t p = 0;
    while (p < waits->num_phases && strcmp(waits->phases[p], phase) != 0) {
        p++;
    }
    if (p == MAX_PHASES) {
        return;
    }
    if (p == waits->num_phases) {
        waits->phases[waits->num_phases++] = phase;
    }
    struct cell *cell = &waits->cells[(size_t)p * waits->num_ranks + rank];
    cell->num++;
    cell->ns += ns;
    cell->longest_ns = ns > cell->longest_ns ? ns : cell->longest_ns;
}

enum nep_status nep_ep_waits(const struct nep_ep *ep, struct nep_wait_stat *stats, uint32_t cap,
                             uint32_t *num_p)
{
    if (ep == NULL || num_p == NULL || (stats == NULL && cap != 0)) {
        return nep_fail(NEP_ERR_INVALID, "nep_ep_waits: an argument is NULL");
    }
    const struct nep_waits *waits = ep->waits;
    uint32_t num = 0;
    for (uint32_t i = 0; i < waits->num_phases * waits->num_ranks; i++) {
        const struct cell *cell = &waits->cells[i];
        if (cell->num == 0) {
            continue;
        }
        if (num < cap) {
            struct nep_wait_stat *stat = &stats[num];
            memset(stat, 0, sizeof *stat);
            snprintf(stat->phase, sizeof stat->phase, "%s", waits->phases[i / waits->num_ranks]);
            stat->rank = i % waits->num_ranks;
            stat->num = cell->num;
            stat->wait_ns = cell->ns;
            stat->longest_ns = cell->longest_ns;
        }
        num++;
    }
    *num_p = num;
    return num <= cap || cap == 0
               ? NEP_OK
               : nep_fail(NEP_ERR_OVERFLOW, "nep_ep_waits: there are %u, room for %u", num, cap);
}
