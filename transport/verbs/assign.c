/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which rank uses which port. Decided once over all ranks of a machine, because a rank that looks
 * for its own nearest port takes the same one as its neighbour where two are equally near (DeepEP
 * 466, llm-d 397). Every rank computes the same table from the same gathered input.
 *
 * A rank takes the least used port first and the nearest among those; then pairs exchange ports
 * while that shortens the sum of distances. Rejected: the Hungarian method. With at most 16 ranks
 * and ports on a machine and distances of 0 and 1, exchange finds the same sums.
 */
#include "transport/verbs/verbs.h"

static uint32_t distance(const struct nep_verbs_port *port, int32_t numa)
{
    return port->numa >= 0 && numa >= 0 && port->numa != numa;
}

static uint32_t uses(const uint32_t *choice, uint32_t num, uint32_t port)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < num; i++) {
        count += choice[i] == port;
    }
    return count;
}

static bool rank_has(const uint32_t *choice, uint32_t num_paths, uint32_t rank, uint32_t port)
{
    return uses(choice + rank * num_paths, num_paths, port) > 0;
}

/* Exchanges two seats where that shortens the sum and gives no rank one port twice. */
static bool improve(const struct nep_verbs_port *ports, const int32_t *numa, uint32_t num_seats,
                    uint32_t num_paths, uint32_t *choice)
{
    bool changed = false;
    for (uint32_t a = 0; a < num_seats; a++) {
        for (uint32_t b = a + 1; b < num_seats; b++) {
            uint32_t rank_a = a / num_paths, rank_b = b / num_paths;
            uint32_t now = distance(&ports[choice[a]], numa[rank_a]) +
                           distance(&ports[choice[b]], numa[rank_b]);
            uint32_t then = distance(&ports[choice[b]], numa[rank_a]) +
                            distance(&ports[choice[a]], numa[rank_b]);
            if (then >= now || rank_has(choice, num_paths, rank_a, choice[b]) ||
                rank_has(choice, num_paths, rank_b, choice[a])) {
                continue;
            }
            uint32_t kept = choice[a];
            choice[a] = choice[b];
            choice[b] = kept;
            changed = true;
        }
    }
    return changed;
}

void nep_verbs_assign(const struct nep_verbs_port *ports, uint32_t num_ports, const int32_t *numa,
                      uint32_t num_ranks, uint32_t num_paths, uint32_t *choice)
{
    uint32_t num_seats = num_ranks * num_paths;
    for (uint32_t seat = 0; seat < num_seats; seat++) {
        uint32_t best = 0, best_cost = UINT32_MAX;
        for (uint32_t port = 0; port < num_ports; port++) {
            uint32_t rank = seat / num_paths, path = seat % num_paths;
            uint32_t cost = uses(choice, seat, port) * 2 + distance(&ports[port], numa[rank]);
            /* two paths over one port fail together: only where there are not enough ports */
            cost += uses(choice + rank * num_paths, path, port) << 20;
            if (cost < best_cost) {
                best = port;
                best_cost = cost;
            }
        }
        choice[seat] = best;
    }
    while (improve(ports, numa, num_seats, num_paths, choice)) {
    }
}
