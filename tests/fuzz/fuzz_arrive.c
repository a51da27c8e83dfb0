/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any immediates from any rank, at the sink of an ep: words of the region grow, each to a number
 * that belongs to its slot and lies in the window that the receiver's counters span; nothing else
 * in the region changes. Input: 5 bytes an arrival, the source and the immediate. A source of 0xff
 * lets the receiver read and complete as far as it has heard.
 */
#include "base/log.h"
#include "dispatch/protocol.h"
#include "tests/fuzz/fuzz.h"
#include "transport/topology.h"

enum { RANK = 1, READS = 0xff };
static const uint32_t sizes[] = {2, 1, 3};

struct fixture {
    struct nep_topology_store *store;
    struct nep_topology topology;
    struct nep_shape shape;
    struct nep_plan plan;
    const struct nep_region *region;
    uint8_t *base;
};

static void fixture_open(struct fixture *f)
{
    struct nep_config config;
    struct nep_ep_params params = {.size = sizeof params,
                                   .num_experts = 12,
                                   .top_k = 2,
                                   .hidden = 16,
                                   .max_tokens = 200,
                                   .pool_bytes = 4096};
    PROMISE(nep_config_load_from(&config, (const char *const[]){NULL}) == NEP_OK);
    PROMISE(nep_topology_from_sizes(sizes, 3, RANK, &f->store, &f->topology) == NEP_OK);
    PROMISE(nep_shape_init(&f->shape, &params, &f->topology, &config) == NEP_OK);
    PROMISE(nep_plan_init(&f->plan, &f->shape, &f->topology) == NEP_OK);
    f->region = &f->plan.regions[RANK];
    f->base = aligned_alloc(4096, f->region->bytes);
    PROMISE(f->base != NULL);
}

static void fixture_clear(struct fixture *f)
{
    const struct nep_region *region = f->region;
    struct nep_region_head *head = (struct nep_region_head *)f->base;
    memset(f->base, 0, region->words_end);
    head->rank = RANK;
    head->num_ranks = f->topology.num_ranks;
    head->window = f->shape.window;
    head->tile_slots = f->shape.tile_slots;
    head->region = *region;
    struct nep_directory *directory = (struct nep_directory *)(f->base + region->directory);
    for (uint32_t r = 0; r < f->topology.num_ranks; r++) {
        bool is_lane = f->topology.node_of_rank[r] != f->topology.node &&
                       nep_plan_landing(&f->plan, r, f->topology.node) == RANK;
        directory[r] = (struct nep_directory){nep_plan_control(&f->plan, RANK, r),
                                              is_lane ? nep_plan_lane(&f->plan, r, f->topology.node)
                                                      : UINT32_MAX,
                                              f->topology.node_of_rank[r], 0};
    }
}

/* Slots of one stream of numbers: each word is a number of its slot, at most `slots` ahead. */
static void check_slots(struct fixture *f, uint64_t words, uint64_t row, uint32_t slots,
                        uint64_t known)
{
    for (uint32_t i = 0; i < slots; i++) {
        uint64_t word = nep_word_get(f->base, words, row * slots + i);
        PROMISE(word == 0 || ((word - 1) % slots == i && word <= known + slots));
    }
}

static void check(struct fixture *f)
{
    const struct nep_region_head *head = (const struct nep_region_head *)f->base;
    const struct nep_region *region = f->region;
    const struct nep_directory *directory =
        (const struct nep_directory *)(f->base + region->directory);
    PROMISE(memcmp(&head->region, region, sizeof *region) == 0);
    for (uint32_t c = 0; c < region->num_controls; c++) {
        check_slots(f, region->counts_word, c, f->shape.window, head->completed);
    }
    for (uint32_t r = 0; r < f->topology.num_ranks; r++) {
        if (directory[r].lane != UINT32_MAX) {
            check_slots(f, region->dispatch_word, directory[r].lane, f->shape.tile_slots,
                        nep_word_get(f->base, region->dispatch_read, r));
        }
    }
    for (uint32_t n = 0; n < f->topology.num_nodes; n++) {
        check_slots(f, region->combine_word, n, f->shape.tile_slots,
                    nep_word_get(f->base, region->combine_read, n));
        PROMISE(nep_word_get(f->base, region->dispatch_credit, n) <=
                nep_word_get(f->base, region->dispatch_sent, n));
    }
    for (uint32_t l = 0; l < region->num_lanes; l++) {
        PROMISE(nep_word_get(f->base, region->combine_credit, l) <=
                nep_word_get(f->base, region->combine_sent, l));
    }
}

/* The receiver goes on: what has arrived next in each stream is read, all may be sent. */
static void go_on(struct fixture *f)
{
    const struct nep_region *region = f->region;
    struct nep_region_head *head = (struct nep_region_head *)f->base;
    const struct nep_directory *directory =
        (const struct nep_directory *)(f->base + region->directory);
    uint32_t slots = f->shape.tile_slots;
    head->completed++;
    for (uint32_t r = 0; r < f->topology.num_ranks; r++) {
        uint64_t read = nep_word_get(f->base, region->dispatch_read, r);
        uint64_t at = (uint64_t)directory[r].lane * slots + read % slots;
        if (directory[r].lane != UINT32_MAX &&
            nep_word_get(f->base, region->dispatch_word, at) == read + 1) {
            nep_word_set(f->base, region->dispatch_read, r, read + 1);
        }
    }
    for (uint32_t n = 0; n < f->topology.num_nodes; n++) {
        nep_word_set(f->base, region->dispatch_sent, n,
                     nep_word_get(f->base, region->dispatch_sent, n) + slots);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    static struct fixture f;
    nep_log_open(NEP_LOG_NONE, "");
    if (f.base == NULL) {
        fixture_open(&f);
        memset(f.base, 0, f.region->bytes);
    }
    fixture_clear(&f);
    for (; len >= 5; data += 5, len -= 5) {
        uint32_t imm;
        memcpy(&imm, data + 1, sizeof imm);
        if (data[0] == READS) {
            go_on(&f);
        } else {
            nep_arrive(f.base, RANK, data[0], imm);
        }
        check(&f);
    }
    for (uint64_t i = f.region->words_end; i < f.region->staging; i++) {
        PROMISE(f.base[i] == 0);
    }
    return 0;
}
