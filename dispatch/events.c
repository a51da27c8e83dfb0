/* SPDX-License-Identifier: Apache-2.0 */
#include "dispatch/events.h"

#include <stdbool.h>
#include <stdlib.h>

struct nep_event_ring *nep_events_create(uint32_t num)
{
    uint32_t size = num == 0 ? 0 : 1;
    while (size < num && size < NEP_EVENTS_MAX) {
        size *= 2;
    }
    size_t bytes = sizeof(struct nep_event_ring) + size * sizeof(struct nep_event);
    struct nep_event_ring *ring = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (ring == NULL) {
        return NULL;
    }
    atomic_init(&ring->next, 0);
    ring->num = size;
    for (uint32_t i = 0; i < size; i++) {
        atomic_init(&ring->events[i].what, 0);
    }
    return ring;
}

/* False: the place holds another event, or half of one. */
static bool read_event(struct nep_event_ring *ring, uint64_t number, struct nep_event_copy *copy)
{
    struct nep_event *event = &ring->events[number & (ring->num - 1)];
    uint64_t what = atomic_load_explicit(&event->what, memory_order_acquire);
    if ((uint32_t)what != (uint32_t)(number + 1) || what == NEP_EVENT_BUSY) {
        return false;
    }
    copy->ticks = atomic_load_explicit(&event->ticks, memory_order_acquire);
    copy->op = atomic_load_explicit(&event->op, memory_order_acquire);
    copy->value = atomic_load_explicit(&event->value, memory_order_acquire);
    copy->kind = (uint8_t)(what >> 56);
    copy->ep = (uint8_t)(what >> 48);
    copy->peer = (uint32_t)(what >> 32 & 65535);
    return atomic_load_explicit(&event->what, memory_order_relaxed) == what;
}

uint32_t nep_events_read(struct nep_event_ring *ring, struct nep_event_copy *events, uint32_t cap,
                         uint64_t *lost_p)
{
    uint64_t end = atomic_load_explicit(&ring->next, memory_order_relaxed);
    uint64_t held = end < ring->num ? end : ring->num;
    held = held < cap ? held : cap;
    uint32_t num = 0;
    for (uint64_t number = end - held; number < end; number++) {
        num += read_event(ring, number, &events[num]);
    }
    *lost_p += end - num;
    return num;
}

void nep_events_move(struct nep_event_ring *from, struct nep_event_ring *to, const uint32_t *seats)
{
    uint64_t end = atomic_load_explicit(&from->next, memory_order_relaxed);
    uint64_t held = end < from->num ? end : from->num;
    for (uint64_t number = end - held; to->num != 0 && number < end; number++) {
        struct nep_event_copy copy;
        if (read_event(from, number, &copy)) {
            nep_event_put_at(to, copy.ticks, (enum nep_event_kind)copy.kind, copy.ep,
                             seats[copy.peer], copy.op, copy.value);
        }
    }
}
