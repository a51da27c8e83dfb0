/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The verbs transport over devices in memory, without faults: what is put arrives, once, with its
 * bytes, over any number of paths and QPs; queues never overflow; requests are few.
 */
#include <fcntl.h>
#include <string.h>

#include "tests/unit/cmocka_all.h"

#if NEP_HAVE_VERBS
#include "tests/unit/verbs/world.h"

enum { ROUNDS = 6 };

/* All slots to all ranks, itself included; then a look at every byte; then again. */
static void exchange(struct seat *seat)
{
    uint32_t num_ranks = seat->world->num_ranks;
    for (uint64_t round = 0; round < ROUNDS; round++) {
        for (uint32_t slot = 0; slot < SLOTS; slot++) {
            for (uint32_t dst = 0; dst < num_ranks; dst++) {
                seat_put(seat, (dst + slot) % num_ranks, slot, round);
            }
        }
        for (uint32_t src = 0; src < num_ranks; src++) {
            for (uint32_t slot = 0; slot < SLOTS; slot++) {
                seat->num_errors += !seat_wait(seat, src, slot, round + 1);
                seat->num_wrong += seat_wrong(seat, src, slot, round);
            }
        }
        for (uint32_t dst = 0; dst < num_ranks; dst++) {
            seat->num_errors += !seat_wait_completed(seat, dst);
        }
        pthread_barrier_wait(&seat->world->barrier); /* slots are used again */
    }
    for (uint32_t i = 0; i < num_ranks * SLOTS; i++) {
        seat->num_repeats += world_arrived(seat, i / SLOTS, i % SLOTS) != ROUNDS;
    }
}

static void run_exchange(uint32_t paths, uint32_t qps, uint32_t depth, uint64_t chunk_bytes)
{
    static struct world world;
    world_prepare(&world, 4, "exchange");
    fake.slow = depth == 8;
    world.config.verbs_paths = paths;
    world.config.verbs_qps = qps;
    world.config.verbs_depth = depth;
    world.config.verbs_chunk_bytes = chunk_bytes;
    uint32_t num_ranks = 2 + (uint32_t)(world.seed % 3);
    world_run(&world, num_ranks, exchange);
    world_is_exact(&world);
    world_end(&world);
}

static void test_verbs_one_qp_delivers_all(void **state)
{
    (void)state;
    run_exchange(1, 1, 128, 1u << 30);
}

static void test_verbs_three_qps_on_two_paths_deliver_all(void **state)
{
    (void)state;
    run_exchange(2, 3, 128, 1u << 30);
}

static void test_verbs_short_queues_and_pieces_deliver_all(void **state)
{
    (void)state;
    run_exchange(2, 1, 8, 1u << 20);
}

static void test_verbs_most_qps_deliver_all(void **state)
{
    (void)state;
    run_exchange(2, 7, 16, 1u << 20);
}

/* ---- GPU memory, played by the host's ------------------------------------------------------- */

/* Small puts between all ranks but to oneself, which GPU memory refuses. */
static void exchange_small(struct seat *seat)
{
    uint32_t other = 1 - seat->rank;
    struct nep_put to_self = {
        .dst = seat->rank, .window = WINDOW, .src = seat->base, .len = 8, .imm = world_imm(0)};
    uint64_t number;
    bool is_device;
    fake_memory_kind(seat->base, &is_device);
    if (is_device) {
        seat->num_errors +=
            seat->transport->ops->put(seat->transport, &to_self, &number) != NEP_ERR_UNSUPPORTED;
    }
    seat_put_all(seat, other, 0);
    seat_take_all(seat, other, 0);
    pthread_barrier_wait(&seat->world->barrier);
}

static void run_device_memory(bool has_dmabuf)
{
    static struct world world;
    world_prepare(&world, 2, "device memory");
    fake.device_base = (const uint8_t *)1; /* all of the address space */
    fake.device_bytes = SIZE_MAX / 2;
    fake.no_dmabuf = !has_dmabuf;
    world.config.verbs_paths = 2;
    world.config.verbs_chunk_bytes = 4 << 20;
    world_run(&world, 2, exchange_small);
    /* two ranks, two paths, every piece of the window */
    uint32_t pieces = (WINDOW_BYTES + (4 << 20) - 1) / (4 << 20);
    assert_int_equal(fake.num_dmabufs, has_dmabuf ? 2 * 2 * pieces : 0);
    assert_int_equal(fake.num_inline_from_device, 0);
    assert_int_equal(fake.num_bad, 0);
    if (has_dmabuf) {
        assert_int_equal(fcntl(fake.last_dmabuf, F_GETFD), -1); /* closed after registration */
    }
    world_end(&world);
}

static void test_verbs_gpu_memory_goes_by_dmabuf(void **state)
{
    (void)state;
    run_device_memory(true);
}

static void test_verbs_gpu_memory_without_dmabuf_goes_by_peer_memory(void **state)
{
    (void)state;
    run_device_memory(false);
}

/* ---- requests ------------------------------------------------------------------------------- */

static void put_tiles(struct seat *seat)
{
    if (seat->rank != 0) {
        seat->num_errors += !seat_wait(seat, 0, SLOTS - 1, 1);
        return;
    }
    struct nep_transport_stats stats;
    uint64_t num_puts = SLOTS * (seat->world->num_ranks - 1);
    for (uint32_t i = 0; i < num_puts; i++) {
        uint32_t dst = 1 + i / SLOTS, slot = i % SLOTS;
        struct nep_put put = {.dst = dst,
                              .window = WINDOW,
                              .offset = COUNTERS_BYTES + (size_t)slot * SLOT_BYTES,
                              .src = world_source(seat, dst, slot),
                              .len = SLOT_BYTES,
                              .imm = world_imm(slot)};
        uint64_t number;
        seat->num_errors += seat->transport->ops->put(seat->transport, &put, &number) != NEP_OK;
        seat->num_errors += number != slot + 1;
    }
    seat->transport->ops->stats(seat->transport, &stats);
    seat->num_errors += stats.puts != num_puts || stats.put_bytes != num_puts * SLOT_BYTES;
    seat->num_requests = stats.work_requests;
}

static void test_verbs_requests_are_nodes_times_tiles_times_qps(void **state)
{
    (void)state;
    static struct world world;
    for (uint32_t paths = 1; paths <= 3; paths++) {
        world_prepare(&world, 4, "requests");
        world.config.verbs_paths = paths;
        uint32_t num_nodes = 1 + paths; /* this one and 1, 2 or 3 others */
        world_run(&world, num_nodes, put_tiles);
        assert_int_equal(world.seats[0].num_requests, (num_nodes - 1) * SLOTS * paths);
        world_end(&world);
    }
}

/* ---- receives ------------------------------------------------------------------------------- */

/* A device with fewer receives than the worst burst: senders wait, nothing is lost. */
static void test_verbs_few_receives_delay_and_deliver_all(void **state)
{
    (void)state;
    static struct world world;
    world_prepare(&world, 4, "few receives");
    fake.max_srq_wr = 48; /* of 2 * 32 + 36 */
    world_run(&world, 2, exchange);
    world_is_exact(&world);
    world_end(&world);
}

static void test_verbs_too_few_receives_are_refused(void **state)
{
    (void)state;
    static struct world world;
    const struct {
        int32_t max_srq_wr;
        uint32_t rnr_retry;
        const char *says;
    } cases[] = {{35, 7, "2 ranks need 100 receives, 36 at the very least"},
                 {99, 6, "fake0 has 99, with room for their completions, and 1024: lower"}};
    for (size_t i = 0; i < 2; i++) {
        world_prepare(&world, 1, "receives");
        fake.max_srq_wr = cases[i].max_srq_wr;
        world.config.verbs_rnr_retry = cases[i].rnr_retry;
        world_run(&world, 2, NULL);
        for (uint32_t r = 0; r < 2; r++) {
            assert_int_equal(world.seats[r].status, NEP_ERR_UNSUPPORTED);
            print_message("%s\n", world.seats[r].message);
            assert_non_null(strstr(world.seats[r].message, cases[i].says));
        }
        assert_int_equal(fake.num_live, 0);
        world_free(&world);
    }
}

/* ---- windows that go and come --------------------------------------------------------------- */

/* Rank 0 destroys its window; rank 1, which does not know, still puts to it. Neither is lost, and
 * a new window of the same number hears nothing of it. */
static void use_again(struct seat *seat)
{
    const struct nep_transport_ops *ops = seat->transport->ops;
    uint32_t other = 1 - seat->rank;
    if (seat->rank == 0) {
        seat_put_all(seat, 1, 0);
        ops->window_destroy(seat->transport, WINDOW); /* waits for the own puts */
        struct nep_put put = {.dst = 1, .window = WINDOW, .imm = world_imm(0)};
        uint64_t number;
        seat->num_errors += ops->put(seat->transport, &put, &number) != NEP_ERR_INVALID;
        memset(seat->base, 0xa5, WINDOW_BYTES);
    }
    pthread_barrier_wait(&seat->world->barrier);
    for (uint32_t slot = 0; slot < SLOTS && seat->rank == 1; slot++) {
        seat->num_errors += !seat_wait(seat, 0, slot, 1);
        seat->num_wrong += seat_wrong(seat, 0, slot, 0);
        seat_put(seat, 0, slot, 1);
    }
    if (seat->rank == 1) {
        ops->window_destroy(seat->transport, WINDOW);
        memset(seat->base, 0, WINDOW_BYTES);
    }
    void *base = seat->base;
    pthread_barrier_wait(&seat->world->barrier);
    if (seat->rank == 0) {
        memset(seat->base, 0, WINDOW_BYTES);
    }
    if (ops->window_create(seat->transport, WINDOW, &base, WINDOW_BYTES) != NEP_OK) {
        fprintf(stderr, "%s\n", nep_last_message());
        seat->num_errors++;
    }
    for (uint32_t i = 0; i < CELLS; i++) {
        seat->num_repeats += world_arrived(seat, i / SLOTS, i % SLOTS) != 0;
    }
    pthread_barrier_wait(&seat->world->barrier);
    seat_put_all(seat, other, 2);
    seat_take_all(seat, other, 2);
    seat->num_errors += ops->peer_status(seat->transport, other) != NEP_OK;
    pthread_barrier_wait(&seat->world->barrier);
}

static void test_verbs_late_puts_to_a_destroyed_window_hurt_nobody(void **state)
{
    (void)state;
    static struct world world;
    world_prepare(&world, 2, "windows");
    world.config.verbs_paths = 2;
    world_run(&world, 2, use_again);
    world_is_exact(&world);
    world_end(&world);
}

/* ---- refusals ------------------------------------------------------------------------------- */

static void put_badly(struct seat *seat)
{
    const struct nep_put good = {.dst = 0,
                                 .window = WINDOW,
                                 .offset = WINDOW_BYTES - 64,
                                 .src = seat->base,
                                 .len = 64,
                                 .imm = world_imm(0)};
    struct nep_put bad[8] = {good, good, good, good, good, good, good, good};
    bad[0].dst = 2;
    bad[1].window = 63;
    bad[2].offset++;
    bad[3].offset = UINT64_MAX;
    bad[4].src = seat->base - 1;
    bad[5].src = seat->base + WINDOW_BYTES - 63;
    bad[6].imm |= 1;
    bad[7].imm ^= 1u << 20;
    for (uint32_t i = 0; i < 8; i++) {
        uint64_t number = 4711;
        enum nep_status status = seat->transport->ops->put(seat->transport, &bad[i], &number);
        if (status != NEP_ERR_INVALID || number != 4711) {
            fprintf(stderr, "bad put %u: status %d\n", i, status);
            seat->num_errors++;
        }
    }
}

static void test_verbs_bad_puts_are_refused(void **state)
{
    (void)state;
    static struct world world;
    world_prepare(&world, 1, "bad puts");
    world_run(&world, 2, put_badly);
    world_end(&world);
}

/* Creation fails on every rank with a sentence that has `words`. */
static void expect_refusal(struct world *world, enum nep_status status, const char *words)
{
    world_run(world, 2, NULL);
    for (uint32_t r = 0; r < 2; r++) {
        print_message("%s\n", world->seats[r].message);
        assert_int_equal(world->seats[r].status, status);
        assert_non_null(strstr(world->seats[r].message, words));
    }
    world_free(world);
}

static void test_verbs_machine_without_devices_is_refused(void **state)
{
    (void)state;
    static struct world world;
    world_prepare(&world, 0, "no devices");
    expect_refusal(&world, NEP_ERR_UNSUPPORTED, "no RDMA devices on this machine");
    fake.list_errno = ENOSYS;
    expect_refusal(&world, NEP_ERR_UNSUPPORTED, "modprobe ib_uverbs");
    fake_reset(2);
    snprintf(world.config.verbs_devices, sizeof world.config.verbs_devices, "mlx5_0");
    expect_refusal(&world, NEP_ERR_UNSUPPORTED, "named in mlx5_0");
}

static void test_verbs_locked_memory_limit_is_named(void **state)
{
    (void)state;
    static struct world world;
    world_prepare(&world, 1, "locked memory");
    fake.max_reg_bytes = 65536;
    expect_refusal(&world, NEP_ERR_NO_MEMORY, "cannot register a window");
    fake.max_reg_bytes = 1;
    expect_refusal(&world, NEP_ERR_NO_MEMORY, "cannot register a page of host memory");
}

static void test_verbs_impossible_settings_are_refused(void **state)
{
    (void)state;
    static struct world world;
    world_prepare(&world, 1, "settings");
    world.config.verbs_qps = 9;
    expect_refusal(&world, NEP_ERR_INVALID, "NEP_VERBS_QPS is 9");
    world_config(&world.config);
    world.config.verbs_retry = 8;
    expect_refusal(&world, NEP_ERR_INVALID, "NEP_VERBS_RETRY is 8");
    world_config(&world.config);
    world.config.verbs_gid = 3; /* the fake port has 0 and 1 */
    expect_refusal(&world, NEP_ERR_UNSUPPORTED, "no GID of one kind");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_verbs_one_qp_delivers_all),
        cmocka_unit_test(test_verbs_three_qps_on_two_paths_deliver_all),
        cmocka_unit_test(test_verbs_short_queues_and_pieces_deliver_all),
        cmocka_unit_test(test_verbs_most_qps_deliver_all),
        cmocka_unit_test(test_verbs_gpu_memory_goes_by_dmabuf),
        cmocka_unit_test(test_verbs_gpu_memory_without_dmabuf_goes_by_peer_memory),
        cmocka_unit_test(test_verbs_requests_are_nodes_times_tiles_times_qps),
        cmocka_unit_test(test_verbs_few_receives_delay_and_deliver_all),
        cmocka_unit_test(test_verbs_too_few_receives_are_refused),
        cmocka_unit_test(test_verbs_late_puts_to_a_destroyed_window_hurt_nobody),
        cmocka_unit_test(test_verbs_bad_puts_are_refused),
        cmocka_unit_test(test_verbs_machine_without_devices_is_refused),
        cmocka_unit_test(test_verbs_locked_memory_limit_is_named),
        cmocka_unit_test(test_verbs_impossible_settings_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
#else
#include "tests/unit/verbs/absent.h"
#endif
