/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The proxy of an ep over several nodes, without a GPU: threads stand for the kernels of four ranks
 * on two nodes. Each sends tiles through the ring under credits and reads what lands, many laps of
 * the slots; the put is the region's own sink over memory copies, through an operations table.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "cmocka_all.h"
#include "dispatch/cuda/fabric_proxy.h"
#include "dispatch/cuda/proxy.h"

enum { RANKS = 4, NODES = 2, RING = 8, OPS = 40, TILES = 3, ROWS = 5 };

struct copier {
    struct nep_transport transport;
    uint32_t rank;
    uint8_t **base; /* [RANKS] */
    uint64_t numbers[RANKS];
};

struct rank {
    struct nep_topology topology;
    struct nep_plan plan;
    struct copier copier;
    struct nep_far_page page;
    struct nep_ring ring;
    struct nep_ring_producer producer;
    struct nep_fabric_proxy *fabric;
    struct nep_proxy *proxy;
    uint8_t *node_words[RANKS];
    pthread_t thread;
    uint64_t wrong;
};

static const uint32_t node_of_rank[RANKS] = {0, 0, 1, 1};
static const uint32_t local_of_rank[RANKS] = {0, 1, 0, 1};
static const uint32_t node_ranks[NODES] = {2, 2};
static struct nep_shape shape;
static struct rank ranks[RANKS];
static uint8_t *windows[RANKS];
static pthread_barrier_t barrier;
static uint32_t window; /* W = V */

static enum nep_status copier_put(struct nep_transport *transport, const struct nep_put *put,
                                  uint64_t *number_p)
{
    struct copier *copier = (struct copier *)transport;
    if (put->len != 0) {
        memcpy(copier->base[put->dst] + put->offset, put->src, put->len);
    }
    nep_arrive(copier->base[put->dst], put->dst, copier->rank, put->imm);
    *number_p = ++copier->numbers[put->dst];
    return NEP_OK;
}

static uint64_t copier_completed(struct nep_transport *transport, uint32_t dst)
{
    return ((struct copier *)transport)->numbers[dst];
}

static void copier_progress(struct nep_transport *transport)
{
    (void)transport;
}

static enum nep_status copier_peer_status(struct nep_transport *transport, uint32_t rank)
{
    (void)transport;
    (void)rank;
    return NEP_OK;
}

static const struct nep_transport_ops copier_ops = {
    .name = "copier",
    .caps = NEP_CAP_FABRIC,
    .put = copier_put,
    .progress = copier_progress,
    .completed = copier_completed,
    .peer_status = copier_peer_status,
    .abandon = nep_unsupported_abandon,
};

static void open_rank(uint32_t r)
{
    struct rank *rank = &ranks[r];
    rank->topology = (struct nep_topology){
        sizeof rank->topology, RANKS,        NODES,         r,         node_of_rank[r],
        local_of_rank[r],      node_of_rank, local_of_rank, node_ranks};
    assert_int_equal(nep_plan_init(&rank->plan, &shape, &rank->topology), NEP_OK);
    windows[r] = aligned_alloc(4096, rank->plan.regions[r].bytes);
    assert_non_null(windows[r]);
    memset(windows[r], 0, rank->plan.regions[r].bytes);
    nep_fabric_fill_head(&rank->plan, r, windows[r]);
    rank->copier = (struct copier){{&copier_ops}, r, windows, {0}};
    rank->ring = (struct nep_ring){calloc(1, nep_ring_bytes(RING)), &rank->producer, RING};
    assert_non_null(rank->ring.shared);
}

static void start_rank(uint32_t r)
{
    struct rank *rank = &ranks[r];
    for (uint32_t g = 0; g < 2; g++) {
        rank->node_words[g] = windows[nep_plan_rank_at(&rank->plan, node_of_rank[r], g)];
    }
    struct nep_fabric_proxy_params params = {
        .plan = &rank->plan,
        .inter = &rank->copier.transport,
        .words = windows[r],
        .node_words = rank->node_words,
        .data = windows[r],
        .page = &rank->page,
    };
    assert_int_equal(nep_fabric_proxy_create(&params, &rank->fabric), NEP_OK);
    struct nep_proxy_params proxy = {.ring = rank->ring,
                                     .transport = &rank->copier.transport,
                                     .post = nep_fabric_proxy_post,
                                     .duty = nep_fabric_proxy_duty,
                                     .ctx = rank->fabric,
                                     .spin_ns = NEP_MS};
    assert_int_equal(nep_proxy_start(&proxy, &rank->proxy), NEP_OK);
}

/* ---- what kernels do ------------------------------------------------------------------------ */

static bool wait_word(struct rank *rank, const void *word, uint64_t value)
{
    return nep_ring_wait(&rank->ring, word, value, NULL, 60 * NEP_S) == NEP_RING_DONE;
}

static void *word_of(uint32_t r, uint64_t offset, uint64_t idx)
{
    return (uint64_t *)(windows[r] + offset) + idx;
}

/* A tile of a kind into the send slot, and its command. */
static void send(struct rank *rank, uint32_t r, enum nep_kind kind, uint64_t number,
                 uint64_t sequence, uint32_t stream)
{
    const struct nep_region *own = &rank->plan.regions[r];
    bool is_rows = kind == NEP_KIND_DISPATCH;
    uint64_t credit = is_rows ? own->dispatch_credit : own->combine_credit;
    if (number >= window) {
        rank->wrong += !wait_word(rank, word_of(r, credit, stream), number - window + 1);
    }
    if (sequence >= window) {
        rank->wrong += !wait_word(rank, &rank->page.tiles_free[0], sequence - window + 1);
    }
    uint8_t *slot = windows[r] + own->send + sequence % window * own->send_tile_bytes;
    struct nep_tile_msg msg = {
        .number = number, .source = r, .kind = (uint32_t)kind, .num_rows = ROWS};
    memcpy(slot, &msg, sizeof msg);
    uint32_t payload = nep_tile_payload_offset(&shape, kind, ROWS);
    memset(slot + payload, (int)(number * 7 + r), ROWS * shape.row_bytes);
    rank->wrong += nep_ring_post(&rank->ring, nep_ring_command(kind, stream, ROWS, 0, number), NULL,
                                 60 * NEP_S) != NEP_RING_DONE;
}

/* What landed at `at`, from `source`; then says that it is read. */
static void receive(struct rank *rank, uint32_t r, enum nep_kind kind, uint32_t at, uint64_t number,
                    uint32_t source, uint32_t word_row, uint64_t read, uint32_t read_idx)
{
    const struct nep_region *there = &rank->plan.regions[at];
    bool is_rows = kind == NEP_KIND_DISPATCH;
    uint64_t slot = number % window;
    uint64_t words = is_rows ? there->dispatch_word : there->combine_word;
    rank->wrong += !wait_word(rank, word_of(at, words, word_row * window + slot), number + 1);
    const uint8_t *tile =
        windows[at] + (is_rows ? there->dispatch_landing + slot * there->dispatch_tile_bytes
                               : there->combine_landing + slot * there->combine_tile_bytes);
    struct nep_tile_msg msg;
    memcpy(&msg, tile, sizeof msg);
    const uint8_t *rows = tile + nep_tile_payload_offset(&shape, kind, ROWS);
    rank->wrong += msg.number != number || msg.source != source || msg.num_rows != ROWS;
    for (uint32_t i = 0; i < ROWS * shape.row_bytes; i++) {
        rank->wrong += rows[i] != (uint8_t)(number * 7 + source);
    }
    nep_ring_store(word_of(r, read, read_idx), number + 1);
}

/* Dispatch and combine in turn: TILES tiles each way, more than there are slots. */
static void *run_rank(void *arg)
{
    struct rank *rank = arg;
    uint32_t r = rank->topology.rank;
    uint32_t far_node = 1 - node_of_rank[r];
    const struct nep_region *own = &rank->plan.regions[r];
    uint64_t rows_sent = 0, rows_read[2] = {0}, sums_sent = 0, sums_read = 0, sequence = 0;
    for (uint32_t op = 0; op < OPS; op++) {
        bool is_rows = op % 2 == 0;
        for (uint32_t t = 0; t < TILES; t++) {
            if (is_rows) {
                send(rank, r, NEP_KIND_DISPATCH, rows_sent++, sequence++, far_node);
            } else {
                send(rank, r, NEP_KIND_COMBINE, sums_sent++, sequence++, 0);
            }
            for (uint32_t lane = 0; lane < 2; lane++) { /* both ranks of the node read both */
                uint32_t source = far_node * 2 + lane;
                uint32_t landing = node_of_rank[r] * 2 + lane;
                if (is_rows) {
                    receive(rank, r, NEP_KIND_DISPATCH, landing, rows_read[lane]++, source, 0,
                            own->dispatch_read, source);
                } else if (landing == r) {
                    receive(rank, r, NEP_KIND_COMBINE, r, sums_read++, source, far_node,
                            own->combine_read, far_node);
                }
            }
        }
    }
    pthread_barrier_wait(&barrier);
    return NULL;
}

static void run_tiles(uint32_t slots)
{
    window = slots;
    memset(ranks, 0, sizeof ranks);
    shape = (struct nep_shape){.slots_per_rank = 2,
                               .top_k = 2,
                               .max_tokens = 64,
                               .outstanding = 1,
                               .window = window,
                               .tile_slots = window,
                               .row_bytes = 64,
                               .wire_row_bytes = 64,
                               .meta_bytes = nep_far_meta_bytes(2),
                               .tile_rows = 8};
    pthread_barrier_init(&barrier, NULL, RANKS);
    for (uint32_t r = 0; r < RANKS; r++) {
        open_rank(r);
    }
    for (uint32_t r = 0; r < RANKS; r++) {
        start_rank(r);
    }
    for (uint32_t r = 0; r < RANKS; r++) {
        assert_int_equal(pthread_create(&ranks[r].thread, NULL, run_rank, &ranks[r]), 0);
    }
    for (uint32_t r = 0; r < RANKS; r++) {
        pthread_join(ranks[r].thread, NULL);
    }
    for (uint32_t r = 0; r < RANKS; r++) {
        nep_proxy_stop(ranks[r].proxy);
        assert_int_equal(ranks[r].wrong, 0);
        assert_int_equal(ranks[r].ring.shared->fault, 0);
        struct nep_region_head *head = (struct nep_region_head *)windows[r];
        assert_int_equal(head->duplicates, 0);
        assert_int_equal(head->stale, 0);
    }
    for (uint32_t r = 0; r < RANKS; r++) {
        nep_fabric_proxy_destroy(ranks[r].fabric);
        nep_plan_fini(&ranks[r].plan);
        free(ranks[r].ring.shared);
        free(windows[r]);
    }
    pthread_barrier_destroy(&barrier);
}

static void test_tiles(void **state)
{
    (void)state;
    run_tiles(nep_far_window(1));
    run_tiles(nep_far_window(3));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_tiles)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
