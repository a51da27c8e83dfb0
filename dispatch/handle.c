/* SPDX-License-Identifier: Apache-2.0 */
/*
 * All tables of a handle in one zeroed mapping, sized for the worst case, touched as far as they
 * are used: the system gives pages only then.
 */
#include "dispatch/handle.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dispatch/device.h"

/* Lays tables out one after the other; with base NULL only the end counts. */
struct carve {
    uint8_t *base;
    uint64_t end;
};

static void *carve_take(struct carve *carve, uint64_t num, uint64_t bytes)
{
    uint64_t offset = (carve->end + 63) / 64 * 64;
    carve->end = offset + num * bytes;
    return carve->base != NULL ? carve->base + offset : NULL;
}

static void carve_streams(struct carve *carve, const struct nep_plan *plan, uint32_t rank,
                          struct nep_consumer *consumers, struct nep_producer *producers)
{
    const struct nep_shape *shape = plan->shape;
    uint64_t max_tokens = shape->max_tokens;
    uint64_t pairs = max_tokens * shape->top_k;
    for (uint32_t c = 0; c < 1 + plan->regions[rank].num_lanes; c++) {
        struct nep_consumer one = {
            .begin = carve_take(carve, max_tokens + 1, sizeof *one.begin),
            .addends = carve_take(carve, pairs, sizeof *one.addends),
        };
        if (consumers != NULL) {
            consumers[c] = one;
        }
    }
    for (uint32_t s = 0; shape->layout != NEP_LAYOUT_RANK && s < plan->topology->num_ranks; s++) {
        struct nep_producer one = {
            .begin = carve_take(carve, max_tokens + 1, sizeof *one.begin),
            .pos = carve_take(carve, pairs, sizeof *one.pos),
            .weight = carve_take(carve, pairs, sizeof *one.weight),
        };
        if (producers != NULL) {
            producers[s] = one;
        }
    }
}

static void carve_all(struct carve *carve, const struct nep_plan *plan, uint32_t rank,
                      struct nep_handle *handle)
{
    const struct nep_topology *topology = plan->topology;
    const struct nep_shape *shape = plan->shape;
    uint64_t num_ranks = topology->num_ranks, num_nodes = topology->num_nodes;
    uint64_t slots = (uint64_t)shape->slots_per_rank;
    uint64_t node_slots = slots * topology->node_ranks[topology->node_of_rank[rank]];
    uint64_t pairs = (uint64_t)shape->max_tokens * shape->top_k;
    uint64_t fan_out = num_nodes < shape->top_k ? num_nodes : shape->top_k;
    handle->slots = carve_take(carve, pairs, sizeof *handle->slots);
    handle->weights = carve_take(carve, pairs, sizeof *handle->weights);
    handle->node_begin = carve_take(carve, num_nodes + 1, sizeof *handle->node_begin);
    handle->node_tokens = carve_take(carve, shape->max_tokens * fan_out, sizeof(uint32_t));
    handle->cursor = carve_take(carve, num_ranks * node_slots, sizeof *handle->cursor);
    handle->rows_per_slot = carve_take(carve, slots, sizeof *handle->rows_per_slot);
    handle->first_row = carve_take(carve, slots, sizeof *handle->first_row);
    handle->rows_per_source = carve_take(carve, plan->num_seats, sizeof(uint32_t));
    handle->rows_expected = carve_take(carve, num_ranks, sizeof(uint32_t));
    handle->rows_read = carve_take(carve, num_ranks, sizeof(uint32_t));
    handle->rows_sent = carve_take(carve, num_ranks, sizeof(uint32_t));
    handle->rows_staged = carve_take(carve, num_ranks, sizeof(uint32_t));
    uint64_t consumers = 1 + plan->regions[rank].num_lanes;
    handle->consumers = carve_take(carve, consumers, sizeof *handle->consumers);
    handle->producers = carve_take(carve, num_ranks, sizeof *handle->producers);
    carve_streams(carve, plan, rank, handle->consumers, handle->producers);
}

uint64_t nep_handle_bytes(const struct nep_plan *plan, uint32_t rank)
{
    struct carve carve = {NULL, 0};
    struct nep_handle none = {0};
    carve_all(&carve, plan, rank, &none);
    return (carve.end + 4095) / 4096 * 4096;
}

static enum nep_status make_tables(const struct nep_ep *ep, struct nep_handle *handle)
{
    uint64_t bytes = nep_handle_bytes(&ep->plan, ep->rank);
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        return nep_fail(NEP_ERR_NO_MEMORY, "a handle's tables of %llu bytes: %m",
                        (unsigned long long)bytes);
    }
    struct carve carve = {memory, 0};
    carve_all(&carve, &ep->plan, ep->rank, handle);
    handle->memory = memory;
    handle->memory_bytes = bytes;
    return NEP_OK;
}

enum nep_status nep_ep_renew_handles(struct nep_ep *ep)
{
    uint32_t num = 0;
    for (struct nep_handle *handle = ep->handles; handle != NULL; handle = handle->next) {
        num++;
    }
    ep->next_handle = num;
    /* The youngest comes first in the list. */
    for (struct nep_handle *handle = ep->handles; handle != NULL; handle = handle->next) {
        struct nep_handle old = *handle;
        memset(handle, 0, sizeof *handle);
        handle->ep = ep;
        handle->next = old.next;
        handle->id = --num;
        enum nep_status status = make_tables(ep, handle);
        if (status != NEP_OK) {
            handle->memory = old.memory;
            handle->memory_bytes = old.memory_bytes;
            return status;
        }
        munmap(old.memory, old.memory_bytes);
    }
    return NEP_OK;
}

enum nep_status nep_handle_create_for(struct nep_ep *ep, struct nep_handle **handle_p)
{
    struct nep_handle *handle = calloc(1, sizeof *handle);
    if (handle == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for a handle");
    }
    handle->ep = ep;
    enum nep_status status =
        ep->device != NULL ? nep_device_handle_create(handle) : make_tables(ep, handle);
    if (status != NEP_OK) {
        free(handle);
        return status;
    }
    *handle_p = handle;
    return NEP_OK;
}

enum nep_status nep_handle_create(struct nep_ep *ep, struct nep_handle **handle_p)
{
    enum nep_status status = nep_ep_check(ep);
    if (status != NEP_OK) {
        return status;
    }
    if (handle_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_handle_create: handle_p is NULL");
    }
    struct nep_handle *handle = NULL;
    status = nep_handle_create_for(ep, &handle);
    if (status != NEP_OK) {
        return status;
    }
    handle->id = ep->next_handle++;
    handle->next = ep->handles;
    ep->handles = handle;
    *handle_p = handle;
    return NEP_OK;
}

void nep_handle_destroy(struct nep_handle *handle)
{
    if (handle == NULL) {
        return;
    }
    nep_ep_forget(handle->ep, handle);
    nep_device_handle_destroy(handle, handle->ep->comm->pid != getpid());
    if (handle->memory != NULL) {
        munmap(handle->memory, handle->memory_bytes);
    }
    free(handle);
}
