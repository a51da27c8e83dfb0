/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Ranks as threads over fake devices: a bootstrap that is a barrier, one transport and one window
 * each, and a sink that counts announcements in the window itself, as a sink may do no more.
 *
 * A window: `CELLS` words that the sink counts in (one per source and slot), then slots of
 * SLOT_BYTES, one per source and slot number; then the same again, from where this rank sends.
 */
#ifndef NEP_TESTS_VERBS_WORLD_H
#define NEP_TESTS_VERBS_WORLD_H

#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "tests/unit/cmocka_all.h"
#include "tests/unit/verbs/fake_device.h"
#include "transport/topology.h"
#include "transport/verbs/verbs.h"

enum { MAX_RANKS = 4, SLOTS = 32, SLOT_BYTES = 96 << 10, CELLS = MAX_RANKS * SLOTS };
enum { WINDOW = 5, COUNTERS_BYTES = CELLS * 8 };
#define LAND_BYTES   ((size_t)CELLS * SLOT_BYTES)
#define WINDOW_BYTES (COUNTERS_BYTES + 2 * LAND_BYTES)

struct world;

struct seat {
    struct world *world;
    uint32_t rank;
    struct nep_topology_store *store;
    struct nep_topology topology;
    struct nep_bootstrap bootstrap;
    struct nep_transport *transport;
    enum nep_status status;
    char message[512];
    uint8_t *base;
    uint32_t num_errors; /* found by its thread: cmocka's checks belong to the main one */
    uint32_t num_wrong;
    uint32_t num_repeats;
    uint64_t num_requests; /* that a test looked up */
    uint64_t last_number[MAX_RANKS];
    pthread_t thread;
    void (*work)(struct seat *seat);
};

struct world {
    uint32_t num_ranks;
    struct nep_config config;
    pthread_barrier_t barrier;
    const void *in[MAX_RANKS];
    struct seat seats[MAX_RANKS];
    uint64_t seed;
    bool is_open; /* no grants: every rank may write all of every window */
};

static inline uint64_t world_random(uint64_t *state)
{
    *state += 0x9e3779b97f4a7c15ull; /* splitmix64 (Steele et al.) */
    uint64_t z = *state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static inline int world_allgather(void *ctx, const void *in, void *out, size_t bytes,
                                  uint64_t timeout_ns)
{
    struct seat *seat = ctx;
    struct world *world = seat->world;
    (void)timeout_ns;
    world->in[seat->rank] = in;
    pthread_barrier_wait(&world->barrier);
    for (uint32_t r = 0; r < world->num_ranks; r++) {
        memcpy((uint8_t *)out + r * bytes, world->in[r], bytes);
    }
    pthread_barrier_wait(&world->barrier);
    return 0;
}

/* Immediates of these tests: the slot is in the tile field. */
static inline uint32_t world_imm(uint32_t slot)
{
    return (uint32_t)WINDOW << 20 | slot << 4;
}

static inline void world_sink(void *base, uint32_t dst, uint32_t src, uint32_t imm)
{
    (void)dst;
    atomic_ullong *cells = base;
    atomic_fetch_add_explicit(&cells[src * SLOTS + (imm >> 4 & 255)], 1, memory_order_release);
}

static inline uint64_t world_arrived(const struct seat *seat, uint32_t src, uint32_t slot)
{
    atomic_ullong *cells = (atomic_ullong *)(void *)seat->base;
    return atomic_load_explicit(&cells[src * SLOTS + slot], memory_order_acquire);
}

static inline uint8_t *world_landed(const struct seat *seat, uint32_t src, uint32_t slot)
{
    return seat->base + COUNTERS_BYTES + (size_t)(src * SLOTS + slot) * SLOT_BYTES;
}

static inline uint8_t *world_source(const struct seat *seat, uint32_t dst, uint32_t slot)
{
    return world_landed(seat, dst, slot) + LAND_BYTES;
}

static inline void world_config(struct nep_config *config)
{
    const char *nothing[] = {NULL};
    assert_int_equal(nep_config_load_from(config, nothing), NEP_OK);
    config->verbs_split_bytes = 32 << 10;
    config->timeout_ns = 20 * NEP_S;
    config->verbs_revive_ns = 0; /* a dead QP stays dead but where its return is the test */
}

static inline uint64_t world_seed(const char *name)
{
    const char *given = getenv("NEP_TEST_SEED");
    uint64_t seed = given != NULL ? strtoull(given, NULL, 0) : nep_now_ns();
    printf("%s: NEP_TEST_SEED=%llu\n", name, (unsigned long long)seed);
    return seed;
}

/* Devices as new, usual settings, a seed that is printed; knobs of a test come after it. */
static inline void world_prepare(struct world *world, uint32_t num_devices, const char *name)
{
    memset(world, 0, sizeof *world);
    fake_reset(num_devices);
    world_config(&world->config);
    world->seed = world_seed(name);
}

/* Each source writes its own slots, which come in two parts. */
static inline void seat_grant(struct seat *seat)
{
    struct nep_grant grants[2 * MAX_RANKS];
    uint32_t num = 0;
    for (uint32_t r = 0; r < seat->world->num_ranks; r++) {
        for (uint32_t half = 0; r != seat->rank && half < 2; half++) {
            uint64_t slot = (uint64_t)r * SLOTS + half * (SLOTS / 2);
            grants[num++] = (struct nep_grant){r, COUNTERS_BYTES + slot * SLOT_BYTES,
                                               (uint64_t)SLOTS / 2 * SLOT_BYTES};
        }
    }
    if (!seat->world->is_open) {
        seat->num_errors +=
            seat->transport->ops->window_grant(seat->transport, WINDOW, grants, num) != NEP_OK;
    }
}

static inline void seat_open(struct seat *seat)
{
    struct world *world = seat->world;
    struct nep_transport_params params = {.topology = &seat->topology,
                                          .bootstrap = &seat->bootstrap,
                                          .config = &world->config,
                                          .timeout_ns = world->config.timeout_ns,
                                          .sink = world_sink,
                                          .args = "",
                                          .max_puts = SLOTS * world->num_ranks};
    seat->status = nep_verbs_create_with(&fake_api, &params, &seat->transport);
    if (seat->status == NEP_OK) {
        void *base = seat->base;
        seat_grant(seat);
        seat->status =
            seat->transport->ops->window_create(seat->transport, WINDOW, &base, WINDOW_BYTES);
    }
    snprintf(seat->message, sizeof seat->message, "%.511s", nep_last_message());
}

static inline void *seat_run(void *arg)
{
    struct seat *seat = arg;
    seat_open(seat);
    if (seat->status == NEP_OK && seat->work != NULL) {
        seat->work(seat);
    }
    if (seat->transport != NULL) {
        seat->transport->ops->close(seat->transport);
        seat->transport = NULL;
    }
    return NULL;
}

/* Runs `work` on every rank; a seat's status and message tell how its creation went. */
static inline void world_run(struct world *world, uint32_t num_ranks,
                             void (*work)(struct seat *seat))
{
    uint32_t sizes[MAX_RANKS] = {1, 1, 1, 1};
    world->num_ranks = num_ranks;
    pthread_barrier_init(&world->barrier, NULL, num_ranks);
    for (uint32_t r = 0; r < num_ranks; r++) {
        struct seat *seat = &world->seats[r];
        memset(seat, 0, sizeof *seat);
        seat->world = world;
        seat->rank = r;
        seat->work = work;
        seat->base = calloc(1, WINDOW_BYTES);
        seat->bootstrap = (struct nep_bootstrap){
            .size = sizeof seat->bootstrap, .ctx = seat, .allgather = world_allgather};
        assert_int_equal(
            nep_topology_from_sizes(sizes, num_ranks, r, &seat->store, &seat->topology), NEP_OK);
    }
    for (uint32_t r = 0; r < num_ranks; r++) {
        pthread_create(&world->seats[r].thread, NULL, seat_run, &world->seats[r]);
    }
    for (uint32_t r = 0; r < num_ranks; r++) {
        pthread_join(world->seats[r].thread, NULL);
    }
    pthread_barrier_destroy(&world->barrier);
}

static inline void world_free(struct world *world)
{
    for (uint32_t r = 0; r < world->num_ranks; r++) {
        free(world->seats[r].base);
        nep_topology_destroy(world->seats[r].store);
    }
}

/* All seats were made and found nothing wrong, no device was misused, nothing stayed behind. */
static inline void world_end(struct world *world)
{
    for (uint32_t r = 0; r < world->num_ranks; r++) {
        const struct seat *seat = &world->seats[r];
        if (seat->status != NEP_OK || seat->num_errors != 0 || seat->num_wrong != 0) {
            fail_msg("rank %u: status %d, %u errors, %u wrong bytes: %s", r, seat->status,
                     seat->num_errors, seat->num_wrong, seat->message);
        }
    }
    assert_int_equal(fake.num_overflows, 0);
    assert_int_equal(fake.num_bad, 0);
    assert_int_equal(fake.num_live, 0);
    world_free(world);
}

/* What slot `slot` of round `round` carries from src to dst. */
static inline uint32_t world_len(uint64_t seed, uint32_t src, uint32_t dst, uint32_t slot,
                                 uint64_t round)
{
    uint64_t state =
        seed ^ (uint64_t)src << 40 ^ (uint64_t)dst << 48 ^ (uint64_t)slot << 32 ^ round;
    uint64_t r = world_random(&state);
    uint32_t limits[] = {0, 64, 300, 20000, SLOT_BYTES};
    uint32_t limit = limits[r % 5];
    return limit == 0 ? 0 : (uint32_t)(world_random(&state) % limit + 1);
}

static inline uint8_t world_byte(uint64_t seed, uint32_t src, uint32_t dst, uint32_t slot,
                                 uint64_t round, uint32_t i)
{
    uint64_t mix = seed + src * 7919 + dst * 104729 + slot * 1299709 + round * 15485863 + i;
    return (uint8_t)((mix * 0x9e3779b97f4a7c15ull) >> 56);
}

static inline void seat_put(struct seat *seat, uint32_t dst, uint32_t slot, uint64_t round)
{
    uint64_t seed = seat->world->seed;
    uint32_t len = world_len(seed, seat->rank, dst, slot, round);
    uint8_t *src = world_source(seat, dst, slot);
    for (uint32_t i = 0; i < len; i++) {
        src[i] = world_byte(seed, seat->rank, dst, slot, round, i);
    }
    struct nep_put put = {.dst = dst,
                          .window = WINDOW,
                          .offset =
                              COUNTERS_BYTES + (size_t)(seat->rank * SLOTS + slot) * SLOT_BYTES,
                          .src = src,
                          .len = len,
                          .imm = world_imm(slot)};
    enum nep_status status =
        seat->transport->ops->put(seat->transport, &put, &seat->last_number[dst]);
    if (status != NEP_OK && status != NEP_ERR_PEER_LOST) { /* of the latter peer_status tells */
        fprintf(stderr, "rank %u: put: %s\n", seat->rank, nep_last_message());
        seat->num_errors++;
    }
}

/* True when `slot` from `src` came at least `times` times within the deadline. */
static inline bool seat_wait(struct seat *seat, uint32_t src, uint32_t slot, uint64_t times)
{
    uint64_t deadline_ns = nep_deadline_ns(20 * NEP_S);
    while (world_arrived(seat, src, slot) < times) {
        if (nep_left_ns(deadline_ns) == 0) {
            return false;
        }
        seat->transport->ops->progress(seat->transport);
        usleep(20);
    }
    return true;
}

static inline uint32_t seat_wrong(const struct seat *seat, uint32_t src, uint32_t slot,
                                  uint64_t round)
{
    uint64_t seed = seat->world->seed;
    uint32_t len = world_len(seed, src, seat->rank, slot, round), wrong = 0;
    const uint8_t *landed = world_landed(seat, src, slot);
    for (uint32_t i = 0; i < len; i++) {
        wrong += landed[i] != world_byte(seed, src, seat->rank, slot, round, i);
    }
    return wrong;
}

/* Nothing came twice, where nothing had to go again. */
static inline void world_is_exact(const struct world *world)
{
    for (uint32_t r = 0; r < world->num_ranks; r++) {
        assert_int_equal(world->seats[r].num_repeats, 0);
    }
}

/* ---- what tests do with a peer -------------------------------------------------------------- */

static inline struct nep_verbs *seat_verbs(const struct seat *seat)
{
    return (struct nep_verbs *)seat->transport;
}

static inline void seat_put_all(struct seat *seat, uint32_t dst, uint64_t round)
{
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        seat_put(seat, dst, slot, round);
    }
}

/* All slots from `src` have come, for the first time, with the bytes of `round`. */
static inline void seat_take_all(struct seat *seat, uint32_t src, uint64_t round)
{
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        seat->num_errors += !seat_wait(seat, src, slot, 1);
        seat->num_wrong += seat_wrong(seat, src, slot, round);
    }
}

/* All puts to `dst` are acknowledged; false when it is lost, or not within a minute. */
static inline bool seat_wait_completed(struct seat *seat, uint32_t dst)
{
    const struct nep_transport_ops *ops = seat->transport->ops;
    uint64_t deadline_ns = nep_deadline_ns(60 * NEP_S);
    while (ops->completed(seat->transport, dst) < seat->last_number[dst]) {
        if (nep_left_ns(deadline_ns) == 0 || ops->peer_status(seat->transport, dst) != NEP_OK) {
            fprintf(stderr, "rank %u: not acknowledged: %s\n", seat->rank, nep_last_message());
            return false;
        }
        ops->progress(seat->transport);
        usleep(20);
    }
    return true;
}

/* The peer is found lost within a minute; the sentence is the seat's message. */
static inline bool seat_wait_lost(struct seat *seat, uint32_t peer)
{
    const struct nep_transport_ops *ops = seat->transport->ops;
    uint64_t deadline_ns = nep_deadline_ns(60 * NEP_S);
    while (ops->peer_status(seat->transport, peer) == NEP_OK && nep_left_ns(deadline_ns) > 0) {
        ops->progress(seat->transport);
        usleep(100);
    }
    bool is_lost = ops->peer_status(seat->transport, peer) == NEP_ERR_PEER_LOST;
    snprintf(seat->message, sizeof seat->message, "%.511s", nep_last_message());
    return is_lost;
}

#endif
