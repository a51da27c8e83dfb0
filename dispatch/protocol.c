/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Arrival is a set: each word is the number of what last arrived in a slot, plus one; it only
 * grows. A repeat finds its number there already, a straggler of an earlier round falls outside the
 * window that the receiver's own counters span; both are counted and dropped. Rejected: a count of
 * arrivals, wrong as soon as a fail-over sends something twice.
 */
#include "dispatch/protocol.h"

#include "dispatch/events.h"

uint32_t nep_counts_ride_offset(const struct nep_shape *shape, uint32_t node_ranks)
{
    uint64_t tables = nep_counts_rows_per_slot_offset(node_ranks) +
                      (uint64_t)node_ranks * shape->slots_per_rank * 4;
    return (uint32_t)((tables + 63) / 64 * 64);
}

uint64_t nep_counts_bytes(const struct nep_shape *shape, uint32_t node_ranks)
{
    uint64_t meta = ((uint64_t)shape->ride_rows * shape->meta_bytes + 63) / 64 * 64;
    uint64_t rows = (uint64_t)shape->ride_rows * shape->wire_row_bytes;
    return (nep_counts_ride_offset(shape, node_ranks) + meta + rows + 63) / 64 * 64;
}

uint64_t nep_tile_bytes(const struct nep_shape *shape, enum nep_kind kind)
{
    uint64_t row = kind == NEP_KIND_DISPATCH ? shape->wire_row_bytes
                                             : (uint64_t)shape->row_bytes + shape->weights_bytes;
    uint64_t bytes =
        nep_tile_payload_offset(shape, kind, shape->tile_rows) + shape->tile_rows * row;
    return (bytes + 63) / 64 * 64;
}

static void raise(struct nep_region_head *head, _Atomic uint64_t *word, uint64_t value)
{
    if (!nep_word_raise(word, value)) {
        atomic_fetch_add_explicit(&head->duplicates, 1, memory_order_relaxed);
    }
}

static void drop_stale(struct nep_region_head *head)
{
    atomic_fetch_add_explicit(&head->stale, 1, memory_order_relaxed);
}

/* A slot's word: `low` are the low 8 bits of a number in [base, base + slots). */
static void tick(struct nep_region_head *head, uint64_t words, uint64_t row, uint64_t base_number,
                 uint32_t slots, uint32_t low)
{
    uint64_t ahead = (low - base_number) & 255;
    if (ahead >= slots) {
        drop_stale(head);
        return;
    }
    uint64_t number = base_number + ahead;
    raise(head, nep_word(head, words, row * slots + number % slots), number + 1);
}

/* A credit: `low` are the low 8 bits of a number in [known, sent]. */
static void credit(struct nep_region_head *head, uint64_t words, uint64_t sent_words, uint64_t idx,
                   uint32_t low)
{
    _Atomic uint64_t *word = nep_word(head, words, idx);
    uint64_t known = atomic_load_explicit(word, memory_order_relaxed);
    uint64_t value = known + ((low - known) & 255);
    if (value > nep_word_get(head, sent_words, idx)) {
        drop_stale(head);
        return;
    }
    raise(head, word, value);
}

/* Keeps what came, whatever becomes of it. The operation's number is the one next to those that
 * this rank has completed. */
static void keep(struct nep_region_head *head, uint32_t src, uint32_t imm)
{
    struct nep_event_ring *ring =
        (struct nep_event_ring *)((uint8_t *)head + head->region.arrivals);
    uint64_t completed = atomic_load_explicit(&head->completed, memory_order_relaxed);
    uint64_t op = completed + (uint64_t)(int64_t)(int8_t)(uint8_t)(nep_imm_op(imm) - completed);
    nep_event_put(ring, NEP_EVENT_ARRIVAL, nep_imm_ep(imm), src, op, (uint64_t)imm << 32);
}

void nep_arrive(void *base, uint32_t dst, uint32_t src, uint32_t imm)
{
    struct nep_region_head *head = base;
    (void)dst;
    if (src < head->num_ranks) {
        keep(head, src, imm);
    }
    if (src >= head->num_ranks || nep_imm_generation(imm) != (head->generation & 7)) {
        drop_stale(head);
        return;
    }
    const struct nep_region *region = &head->region;
    const struct nep_directory *from =
        (const struct nep_directory *)((const uint8_t *)base + region->directory) + src;
    uint32_t number = nep_imm_number(imm);
    bool is_lane = from->lane != UINT32_MAX;
    bool is_far = from->control != UINT32_MAX && src != head->rank;
    switch (nep_imm_kind(imm)) {
    case NEP_KIND_COUNTS:
        if (is_far) {
            uint64_t completed = atomic_load_explicit(&head->completed, memory_order_acquire);
            tick(head, region->counts_word, from->control, completed, head->window,
                 nep_imm_op(imm));
            return;
        }
        break;
    case NEP_KIND_DISPATCH:
        if (is_lane) {
            uint64_t read = nep_word_get(base, region->dispatch_read, src);
            tick(head, region->dispatch_word, from->lane, read, head->tile_slots, number);
            return;
        }
        break;
    case NEP_KIND_COMBINE:
        if (is_far) {
            uint64_t read = nep_word_get(base, region->combine_read, from->node);
            tick(head, region->combine_word, from->node, read, head->tile_slots, number);
            return;
        }
        break;
    case NEP_KIND_DISPATCH_CREDIT:
        if (is_far) {
            credit(head, region->dispatch_credit, region->dispatch_sent, from->node, number);
            return;
        }
        break;
    case NEP_KIND_COMBINE_CREDIT:
        if (is_lane) {
            credit(head, region->combine_credit, region->combine_sent, from->lane, number);
            return;
        }
        break;
    case NEP_KIND_LEAVE: {
        uint64_t none = 0;
        uint64_t culprit = (nep_imm_op(imm) << 8 | number) + 1;
        atomic_compare_exchange_strong_explicit(&head->fault, &none, culprit, memory_order_acq_rel,
                                                memory_order_relaxed);
        return;
    }
    }
    drop_stale(head);
}
