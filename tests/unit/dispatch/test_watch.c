/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The watch over kernels, with a thread that waits as a kernel does: for words of other ranks, with
 * a look at what each of them gave up with, and with a deadline of its own. The "host" makes no
 * call. Deadlines that must not be met are long, so that no test depends on who is faster.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

#include "base/clock.h"
#include "dispatch/watch.h"
#include "tests/unit/cmocka_all.h"

enum { RANKS = 4, SELF = 1, LOST = 15, EXPIRED = 1 };

/* What kernel, watch and test share: the words of a rank's window, and what the host would see. */
struct device {
    _Atomic uint64_t word[RANKS];  /* who has done its part of an operation */
    _Atomic uint64_t fault[RANKS]; /* with what each rank gave up: kind << 56 | rank */
    _Atomic uint64_t status;       /* of this rank's kernels, sticky */
    atomic_bool is_gone[RANKS];
    atomic_uint num_told[RANKS];
    atomic_uint num_said; /* a fault was found, without a call of the host */
    uint64_t timeout_ns;
    uint32_t awaited;
};

static uint64_t status_of(uint64_t kind, uint32_t rank)
{
    return kind << 56 | rank;
}

/* As nep_wait_word in dispatch/cuda/device/wait.cuh. */
static void *kernel(void *arg)
{
    struct device *device = arg;
    uint64_t deadline_ns = nep_deadline_ns(device->timeout_ns);
    while (atomic_load_explicit(&device->word[device->awaited], memory_order_acquire) == 0) {
        uint64_t status = atomic_load(&device->fault[device->awaited]);
        if (status == 0 && nep_left_ns(deadline_ns) == 0) {
            status = status_of(EXPIRED, device->awaited);
        }
        if (status != 0) {
            uint64_t none = 0;
            atomic_compare_exchange_strong(&device->status, &none, status);
            break;
        }
        sched_yield();
    }
    return NULL;
}

static enum nep_status peer_status(void *ctx, uint32_t rank)
{
    struct device *device = ctx;
    return atomic_load(&device->is_gone[rank])
               ? nep_fail(NEP_ERR_PEER_LOST, "the process of rank %u has ended", rank)
               : NEP_OK;
}

static void tell(void *ctx, uint32_t rank)
{
    struct device *device = ctx;
    atomic_fetch_add(&device->num_told[rank], 1);
    atomic_store(&device->fault[rank], status_of(LOST, rank));
}

static bool look(void *ctx)
{
    struct device *device = ctx;
    if (atomic_load(&device->status) == 0) {
        return false;
    }
    atomic_fetch_add(&device->num_said, 1);
    return true;
}

static struct nep_watch *watch_over(struct device *device)
{
    struct nep_watch_params params = {.peer_status = peer_status,
                                      .tell = tell,
                                      .look = look,
                                      .ctx = device,
                                      .rank = SELF,
                                      .num_ranks = RANKS,
                                      .period_ns = NEP_MS};
    struct nep_watch *watch = NULL;
    assert_int_equal(nep_watch_start(&params, &watch), NEP_OK);
    return watch;
}

/* Until the value is there; a minute is never. */
static bool wait_for(atomic_uint *value, unsigned wanted)
{
    uint64_t deadline_ns = nep_deadline_ns(60 * NEP_S);
    while (atomic_load(value) < wanted && nep_left_ns(deadline_ns) > 0) {
        sched_yield();
    }
    return atomic_load(value) >= wanted;
}

static void test_watch_ends_a_kernel_that_waits_for_a_rank_that_is_gone(void **state)
{
    (void)state;
    struct device device = {.timeout_ns = UINT64_MAX, .awaited = 2};
    struct nep_watch *watch = watch_over(&device);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, kernel, &device), 0);
    atomic_store(&device.is_gone[2], true);
    pthread_join(thread, NULL); /* its own deadline never comes */
    assert_true(atomic_load(&device.status) == status_of(LOST, 2));
    assert_true(wait_for(&device.num_said, 1));
    nep_watch_stop(watch);
    assert_int_equal(atomic_load(&device.num_told[2]), 1);
    assert_int_equal(atomic_load(&device.num_said), 1);
}

static void test_watch_stops_nobody_who_waits_for_another(void **state)
{
    (void)state;
    struct device device = {.timeout_ns = UINT64_MAX, .awaited = 3};
    struct nep_watch *watch = watch_over(&device);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, kernel, &device), 0);
    atomic_store(&device.is_gone[0], true);
    assert_true(wait_for(&device.num_told[0], 1));
    atomic_store_explicit(&device.word[3], 1, memory_order_release); /* it did come */
    pthread_join(thread, NULL);
    nep_watch_stop(watch);
    assert_true(atomic_load(&device.status) == 0);
    assert_int_equal(atomic_load(&device.num_said), 0);
    assert_int_equal(atomic_load(&device.num_told[3]), 0);
}

static void test_watch_says_what_a_kernel_gave_up_for(void **state)
{
    (void)state;
    struct device device = {.timeout_ns = NEP_MS, .awaited = 0};
    struct nep_watch *watch = watch_over(&device);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, kernel, &device), 0);
    pthread_join(thread, NULL);
    assert_true(wait_for(&device.num_said, 1)); /* no call of the host was made */
    nep_watch_stop(watch);
    assert_true(atomic_load(&device.status) == status_of(EXPIRED, 0));
    assert_int_equal(atomic_load(&device.num_said), 1);
}

/* The thread is gone: the kernel's own deadline holds. */
static void test_watch_is_not_needed_by_kernels(void **state)
{
    (void)state;
    struct device device = {.timeout_ns = NEP_MS, .awaited = 2};
    nep_watch_stop(watch_over(&device));
    atomic_store(&device.is_gone[2], true);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, kernel, &device), 0);
    pthread_join(thread, NULL);
    assert_true(atomic_load(&device.status) == status_of(EXPIRED, 2));
    assert_int_equal(atomic_load(&device.num_told[2]), 0);
}

static void test_watch_stops_at_once_and_stops_nothing(void **state)
{
    (void)state;
    struct device device = {.timeout_ns = NEP_S};
    nep_watch_stop(NULL);
    for (uint32_t i = 0; i < 50; i++) {
        nep_watch_stop(watch_over(&device));
    }
    struct nep_watch_params params = {.peer_status = peer_status,
                                      .tell = tell,
                                      .look = look,
                                      .ctx = &device,
                                      .rank = SELF,
                                      .num_ranks = RANKS,
                                      .period_ns = 1000 * NEP_S};
    struct nep_watch *watch = NULL;
    assert_int_equal(nep_watch_start(&params, &watch), NEP_OK);
    nep_watch_stop(watch); /* not after its period: the test's time-out would tell */
    for (uint32_t r = 0; r < RANKS; r++) {
        assert_int_equal(atomic_load(&device.num_told[r]), 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_watch_ends_a_kernel_that_waits_for_a_rank_that_is_gone),
        cmocka_unit_test(test_watch_stops_nobody_who_waits_for_another),
        cmocka_unit_test(test_watch_says_what_a_kernel_gave_up_for),
        cmocka_unit_test(test_watch_is_not_needed_by_kernels),
        cmocka_unit_test(test_watch_stops_at_once_and_stops_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
