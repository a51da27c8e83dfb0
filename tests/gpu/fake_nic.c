/* SPDX-License-Identifier: Apache-2.0 */
/* The host's side of fake_nic.h: an operations table over the queues. */
#include "tests/gpu/fake_nic.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_RANKS = 64 };

/* A put between its post and its announcement. */
struct flight {
    uint32_t dst;
    uint32_t imm;
    uint64_t number; /* of its destination */
    uint64_t entry;  /* copies that must be done before it */
    uint32_t hold;   /* rounds to keep it back */
};

struct fake_nic {
    struct nep_transport transport;
    struct fake_nic_world *world;
    uint32_t rank;
    uint64_t posted; /* copies */
    uint64_t puts[MAX_RANKS];
    uint64_t completed[MAX_RANKS];
    uint64_t random;
    uint32_t num_flights;
    struct flight flights[FAKE_NIC_QUEUE];
    struct nep_transport_stats stats;
};

static enum nep_status nic_put(struct nep_transport *transport, const struct nep_put *put,
                               uint64_t *number_p)
{
    struct fake_nic *nic = (struct fake_nic *)transport;
    struct fake_nic_world *world = nic->world;
    struct fake_nic_queue *queue = &world->queues[nic->rank];
    if (nic->num_flights == FAKE_NIC_QUEUE) {
        return nep_fail(NEP_ERR_BUSY, "fake NIC: more than %d puts in flight", FAKE_NIC_QUEUE);
    }
    if (put->len != 0 && world->is_staged) {
        memcpy(world->words[put->dst] + put->offset, put->src, put->len);
    } else if (put->len != 0) {
        struct fake_nic_entry *entry = &queue->entries[nic->posted % FAKE_NIC_QUEUE];
        entry->from = world->data[nic->rank] + ((const char *)put->src - world->words[nic->rank]);
        entry->to = world->data[put->dst] + put->offset;
        entry->bytes = put->len;
        nic->posted++;
        __atomic_store_n(&entry->seq, nic->posted, __ATOMIC_RELEASE);
    }
    nic->random = nic->random * 6364136223846793005ull + 1442695040888963407ull;
    nic->flights[nic->num_flights++] = (struct flight){
        .dst = put->dst,
        .imm = put->imm,
        .number = ++nic->puts[put->dst],
        .entry = nic->posted,
        .hold = world->seed != 0 ? (uint32_t)(nic->random >> 60) : 0,
    };
    nic->stats.puts++;
    nic->stats.put_bytes += put->len;
    *number_p = nic->puts[put->dst];
    return NEP_OK;
}

/* All numbers below the lowest one in flight are complete. */
static void complete(struct fake_nic *nic, uint32_t dst)
{
    uint64_t low = nic->puts[dst] + 1;
    for (uint32_t i = 0; i < nic->num_flights; i++) {
        if (nic->flights[i].dst == dst && nic->flights[i].number < low) {
            low = nic->flights[i].number;
        }
    }
    __atomic_store_n(&nic->completed[dst], low - 1, __ATOMIC_RELEASE);
}

static void nic_progress(struct nep_transport *transport)
{
    struct fake_nic *nic = (struct fake_nic *)transport;
    struct fake_nic_world *world = nic->world;
    if (nic->num_flights == 0) {
        return;
    }
    uint64_t done = UINT64_MAX;
    for (int h = 0; h < FAKE_NIC_HALVES; h++) {
        uint64_t here = __atomic_load_n(&world->queues[nic->rank].done[h], __ATOMIC_ACQUIRE);
        done = here < done ? here : done;
    }
    for (uint32_t i = 0; i < nic->num_flights;) {
        struct flight *flight = &nic->flights[i];
        if (flight->entry > done || (flight->hold != 0 && flight->hold-- != 0)) {
            i++;
            continue;
        }
        struct flight now = *flight;
        memmove(flight, flight + 1, (--nic->num_flights - i) * sizeof *flight);
        world->sink(world->words[now.dst], now.dst, nic->rank, now.imm);
        complete(nic, now.dst);
    }
}

static uint64_t nic_completed(struct nep_transport *transport, uint32_t dst)
{
    struct fake_nic *nic = (struct fake_nic *)transport;
    return __atomic_load_n(&nic->completed[dst], __ATOMIC_ACQUIRE);
}

static enum nep_status nic_peer_status(struct nep_transport *transport, uint32_t rank)
{
    struct fake_nic *nic = (struct fake_nic *)transport;
    uint64_t lost = __atomic_load_n(&nic->world->lost, __ATOMIC_ACQUIRE);
    return (lost >> rank & 1) == 0 ? NEP_OK
                                   : nep_fail(NEP_ERR_PEER_LOST, "the test says that it is gone");
}

static void nic_stats(struct nep_transport *transport, struct nep_transport_stats *stats)
{
    *stats = ((struct fake_nic *)transport)->stats;
}

static void nic_close(struct nep_transport *transport)
{
    free(transport);
}

static const struct nep_transport_ops ops = {
    .name = "fake_nic",
    .caps = NEP_CAP_FABRIC,
    .close = nic_close,
    .put = nic_put,
    .progress = nic_progress,
    .completed = nic_completed,
    .peer_status = nic_peer_status,
    .abandon = nep_unsupported_abandon,
    .stats = nic_stats,
};

struct nep_transport *fake_nic_create(struct fake_nic_world *world, uint32_t rank)
{
    struct fake_nic *nic = calloc(1, sizeof *nic);
    if (nic == NULL) {
        return NULL;
    }
    nic->transport.ops = &ops;
    nic->world = world;
    nic->rank = rank;
    nic->random = world->seed * 2 + rank;
    return &nic->transport;
}
