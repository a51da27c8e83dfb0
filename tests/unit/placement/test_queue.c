/* SPDX-License-Identifier: Apache-2.0 */
/* The batch queue: nothing lost, nothing twice, oldest first, the age bound, fairness, the cost. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "nearep.h"
#include "placement/rng.h"
#include "tests/unit/cmocka_all.h"

static struct nep_queue *make(uint32_t homes, uint32_t slots, uint32_t capacity, uint32_t tenants,
                              uint64_t max_age_ns)
{
    struct nep_queue_params params = {.size = sizeof params,
                                      .num_homes = homes,
                                      .home_slots = slots,
                                      .capacity = capacity,
                                      .num_tenants = tenants,
                                      .max_age_ns = max_age_ns};
    struct nep_queue *queue = NULL;
    assert_int_equal(nep_queue_create(&params, &queue), NEP_OK);
    return queue;
}

static enum nep_status push(struct nep_queue *queue, uint64_t id, uint32_t tenant,
                            const float *scores, uint64_t now)
{
    struct nep_request request = {sizeof request, id, tenant, 1, scores};
    return nep_queue_push(queue, &request, now);
}

static uint64_t pop_one(struct nep_queue *queue, uint32_t home, uint64_t now)
{
    uint64_t id = UINT64_MAX;
    struct nep_micro_batch batch = {sizeof batch, &id, 1, 0};
    assert_int_equal(nep_queue_pop(queue, home, now, &batch), NEP_OK);
    return batch.num == 1 ? id : UINT64_MAX;
}

static void test_queue_requests_go_to_their_cheapest_open_home(void **state)
{
    (void)state;
    struct nep_queue *queue = make(3, 1, 16, 1, 1000);
    const float scores[] = {5.0f, 1.0f, 3.0f};
    assert_int_equal(push(queue, 1, 0, scores, 0), NEP_OK);
    assert_int_equal(push(queue, 1, 0, scores, 0), NEP_ERR_INVALID);
    assert_int_equal(push(queue, 2, 0, scores, 1), NEP_OK);
    /* home 1 is spoken for, 2 is the next cheapest */
    assert_true(pop_one(queue, 2, 2) == 2);
    assert_true(pop_one(queue, 1, 2) == 1);
    assert_true(pop_one(queue, 1, 3) == UINT64_MAX);
    assert_int_equal(nep_queue_finish(queue, 1), NEP_OK);
    assert_int_equal(nep_queue_finish(queue, 1), NEP_ERR_NOT_FOUND);
    /* home 1 can start it itself: others leave it there */
    assert_int_equal(push(queue, 3, 0, scores, 4), NEP_OK);
    assert_true(pop_one(queue, 0, 5) == UINT64_MAX);
    assert_true(pop_one(queue, 1, 5) == 3);
    /* all busy: it waits for home 1; the home that is free first takes it */
    assert_int_equal(push(queue, 4, 0, scores, 6), NEP_OK);
    assert_true(pop_one(queue, 0, 6) == 4);
    assert_int_equal(push(queue, 5, 0, scores, 7), NEP_OK);
    assert_int_equal(nep_queue_finish(queue, 2), NEP_OK);
    assert_true(pop_one(queue, 2, 8) == 5);
    struct nep_queue_stats stats;
    assert_int_equal(nep_queue_get_stats(queue, &stats), NEP_OK);
    assert_int_equal(stats.stolen, 1);
    assert_int_equal(stats.running, 3);
    nep_queue_destroy(queue);
}

/* Where homes are often full, a request is left to its best home for a 40th of the age bound. */
static void test_queue_request_waits_a_little_for_its_best_home(void **state)
{
    (void)state;
    struct nep_queue *queue = make(2, 8, 64, 1, 4000);
    const float second[] = {5.0f, 1.0f};
    const float first[] = {1.0f, 5.0f};
    for (uint64_t id = 0; id < 26; id++) { /* the last ten find all slots taken */
        uint32_t home = id % 2;
        assert_int_equal(push(queue, id, 0, home == 0 ? first : second, 0), NEP_OK);
        assert_true(pop_one(queue, home, 0) == (id < 16 ? id : UINT64_MAX));
    }
    for (uint64_t id = 16; id < 26; id++) {
        assert_int_equal(nep_queue_finish(queue, id), NEP_OK);
    }
    assert_int_equal(nep_queue_finish(queue, 0), NEP_OK); /* a slot of home 0 */
    assert_int_equal(push(queue, 100, 0, second, 10), NEP_OK);
    assert_true(pop_one(queue, 0, 10) == UINT64_MAX);
    assert_true(pop_one(queue, 0, 109) == UINT64_MAX);
    assert_true(pop_one(queue, 0, 110) == 100);
    /* its best home falls free first */
    assert_int_equal(nep_queue_finish(queue, 2), NEP_OK); /* a slot of home 0 */
    assert_int_equal(push(queue, 101, 0, second, 200), NEP_OK);
    assert_int_equal(nep_queue_finish(queue, 1), NEP_OK);
    assert_true(pop_one(queue, 0, 201) == UINT64_MAX);
    assert_true(pop_one(queue, 1, 201) == 101);
    nep_queue_destroy(queue);
}

static void test_queue_running_request_moves_where_it_pays(void **state)
{
    (void)state;
    struct nep_queue *queue = make(2, 1, 16, 1, 1000);
    const float first[] = {1.0f, 2.0f};
    const float later[] = {3.0f, 1.0f};
    uint32_t home = 9;
    assert_int_equal(push(queue, 7, 0, first, 0), NEP_OK);
    assert_true(pop_one(queue, 0, 0) == 7);
    assert_int_equal(nep_queue_update(queue, 7, later, 10, 20.0f, &home), NEP_OK);
    assert_int_equal(home, 0);
    assert_int_equal(nep_queue_update(queue, 7, later, 11, 20.0f, &home), NEP_OK);
    assert_int_equal(home, 1);
    assert_int_equal(nep_queue_update(queue, 8, later, 11, 20.0f, &home), NEP_ERR_NOT_FOUND);
    nep_queue_destroy(queue);
}

static void test_queue_full_or_wrong_is_refused(void **state)
{
    (void)state;
    struct nep_queue *queue = make(2, 1, 2, 2, 1000);
    const float bad[] = {1.0f, -1.0f};
    assert_int_equal(push(queue, 1, 0, NULL, 0), NEP_OK);
    assert_int_equal(push(queue, 2, 2, NULL, 0), NEP_ERR_INVALID);
    assert_int_equal(push(queue, 2, 1, bad, 0), NEP_ERR_INVALID);
    assert_int_equal(push(queue, 2, 1, NULL, 0), NEP_OK);
    assert_int_equal(push(queue, 3, 1, NULL, 0), NEP_ERR_BUSY);
    assert_int_equal(nep_queue_finish(queue, 1), NEP_OK); /* waiting ones can be removed */
    assert_int_equal(push(queue, 3, 1, NULL, 0), NEP_OK);
    struct nep_micro_batch batch = {sizeof batch, NULL, 1, 0};
    assert_int_equal(nep_queue_pop(queue, 0, 0, &batch), NEP_ERR_INVALID);
    assert_int_equal(nep_queue_pop(queue, 2, 0, NULL), NEP_ERR_INVALID);
    struct nep_queue_params params = {.size = sizeof params};
    struct nep_queue *none = NULL;
    assert_int_equal(nep_queue_create(&params, &none), NEP_ERR_INVALID);
    assert_null(none);
    params.num_homes = params.home_slots = 1;
    assert_int_equal(nep_queue_create(&params, NULL), NEP_ERR_INVALID);
    assert_int_equal(nep_queue_create(NULL, &none), NEP_ERR_INVALID);
    nep_queue_destroy(queue);
}

static void test_queue_null_is_refused_in_words(void **state)
{
    (void)state;
    struct nep_queue *queue = make(1, 1, 2, 1, 1000);
    const float scores[] = {1.0f};
    const struct nep_request request = {.size = sizeof request, .scores = scores};
    uint64_t id;
    uint32_t home;
    struct nep_micro_batch batch = {sizeof batch, &id, 1, 0};
    struct nep_queue_stats stats;
    assert_int_equal(nep_queue_push(NULL, &request, 0), NEP_ERR_INVALID);
    assert_non_null(strstr(nep_last_message(), "NULL"));
    assert_int_equal(nep_queue_push(queue, NULL, 0), NEP_ERR_INVALID);
    assert_int_equal(nep_queue_pop(NULL, 0, 0, &batch), NEP_ERR_INVALID);
    assert_int_equal(nep_queue_finish(NULL, 1), NEP_ERR_INVALID);
    assert_int_equal(nep_queue_update(NULL, 1, scores, 1, 1.0f, &home), NEP_ERR_INVALID);
    assert_int_equal(nep_queue_update(queue, 1, NULL, 1, 1.0f, &home), NEP_ERR_INVALID);
    assert_int_equal(nep_queue_update(queue, 1, scores, 1, 1.0f, NULL), NEP_ERR_INVALID);
    assert_int_equal(nep_queue_get_stats(NULL, &stats), NEP_ERR_INVALID);
    assert_int_equal(nep_queue_get_stats(queue, NULL), NEP_ERR_INVALID);
    nep_queue_destroy(NULL);
    nep_queue_destroy(queue);
}

/* One tenant floods, and every request wants home 0. Service is fast enough for first come first
 * served to keep the bound; so must the queue, and every request must come out once. */
static void test_queue_adversarial_mix_keeps_the_age_bound(void **state)
{
    (void)state;
    uint64_t seed = (uint64_t)time(NULL);
    print_message("seed %llu\n", (unsigned long long)seed);
    struct nep_rng rng = nep_rng_seed(seed);
    enum { HOMES = 4, SLOTS = 2, SERVICE = 40, STEPS = 40000 };
    const uint64_t bound = 400;
    struct nep_queue *queue = make(HOMES, SLOTS, 4096, 3, bound);
    struct running {
        uint64_t id;
        uint64_t end;
    } running[HOMES][SLOTS] = {0};
    uint8_t *seen = calloc(STEPS + 1, 1);
    uint64_t next = 0;
    uint64_t done = 0;
    for (uint64_t now = 0; now < STEPS; now++) {
        /* 8 servers of 40 ticks: one request in 5 ticks is full load; bursts within 90 %. */
        int is_burst = now / 1000 % 2 == 0;
        if (now < STEPS - 2000 && nep_rng_unit(&rng) < (is_burst ? 0.22 : 0.10)) {
            const float scores[HOMES] = {1.0f, 9.0f, 9.0f, 9.0f};
            uint32_t tenant = nep_rng_below(&rng, 10) == 0 ? 1 + nep_rng_below(&rng, 2) : 0;
            assert_int_equal(push(queue, next++, tenant, scores, now), NEP_OK);
        }
        for (uint32_t h = 0; h < HOMES; h++) {
            for (uint32_t s = 0; s < SLOTS; s++) {
                if (running[h][s].end != 0 && running[h][s].end <= now) {
                    assert_int_equal(nep_queue_finish(queue, running[h][s].id), NEP_OK);
                    running[h][s].end = 0;
                    done++;
                }
                if (running[h][s].end == 0) {
                    uint64_t id = pop_one(queue, h, now);
                    if (id != UINT64_MAX) {
                        assert_int_equal(seen[id]++, 0);
                        running[h][s] = (struct running){id, now + SERVICE};
                    }
                }
            }
        }
    }
    struct nep_queue_stats stats;
    assert_int_equal(nep_queue_get_stats(queue, &stats), NEP_OK);
    print_message("%llu requests, longest wait %llu of %llu\n", (unsigned long long)next,
                  (unsigned long long)stats.max_wait_ns, (unsigned long long)bound);
    assert_int_equal(stats.waiting, 0);
    assert_int_equal(done + stats.running, next);
    assert_true(stats.max_wait_ns <= bound);
    free(seen);
    nep_queue_destroy(queue);
}

/* Both tenants always have work waiting, one of them ten times as much: served alike. */
static void test_queue_flooding_tenant_gets_its_share_only(void **state)
{
    (void)state;
    struct nep_queue *queue = make(1, 1, 4096, 2, UINT64_MAX / 2);
    uint64_t served[2] = {0};
    for (uint64_t i = 0; i < 2000; i++) {
        assert_int_equal(push(queue, i, i % 11 == 0, NULL, i), NEP_OK);
    }
    for (int i = 0; i < 200; i++) {
        uint64_t id = pop_one(queue, 0, 2000);
        served[id % 11 == 0]++;
        assert_int_equal(nep_queue_finish(queue, id), NEP_OK);
    }
    assert_int_equal(served[0], 100);
    assert_int_equal(served[1], 100);
    nep_queue_destroy(queue);
}

static void *hammer(void *arg)
{
    struct nep_queue *queue = arg;
    struct nep_rng rng = nep_rng_seed((uint64_t)(uintptr_t)&rng);
    uint64_t base = nep_rng_next(&rng) << 20;
    for (uint64_t i = 0; i < 5000; i++) {
        push(queue, base + i, 0, NULL, i);
        uint64_t id = pop_one(queue, nep_rng_below(&rng, 4), i);
        if (id != UINT64_MAX) {
            nep_queue_finish(queue, id);
        }
    }
    return NULL;
}

static void test_queue_threads_lose_nothing(void **state)
{
    (void)state;
    struct nep_queue *queue = make(4, 8, 30000, 1, UINT64_MAX / 2);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        assert_int_equal(pthread_create(&threads[i], NULL, hammer, queue), 0);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
    }
    struct nep_queue_stats stats;
    assert_int_equal(nep_queue_get_stats(queue, &stats), NEP_OK);
    assert_int_equal(stats.pushed, 20000);
    assert_int_equal(stats.popped + stats.waiting, 20000);
    assert_int_equal(stats.running, 0);
    nep_queue_destroy(queue);
}

/* Of this thread's processor, whatever else runs. */
static uint64_t cpu_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* No assertion on time; the figure is for people. */
static void test_queue_cost_is_printed(void **state)
{
    (void)state;
    enum { WAITING = 100000, ROUNDS = 100000 };
    struct nep_queue *queue = make(8, 16, WAITING + 200, 8, UINT64_MAX / 2);
    struct nep_rng rng = nep_rng_seed(1);
    float scores[8];
    uint64_t next = 0;
    for (; next < WAITING; next++) {
        for (int h = 0; h < 8; h++) {
            scores[h] = (float)nep_rng_below(&rng, 100);
        }
        assert_int_equal(push(queue, next, next % 8, scores, next), NEP_OK);
    }
    uint64_t start = cpu_ns();
    for (int i = 0; i < ROUNDS; i++, next++) {
        uint64_t id = pop_one(queue, (uint32_t)i % 8, next);
        nep_queue_finish(queue, id);
        push(queue, next, next % 8, scores, next);
    }
    print_message("push + pop + finish: %.0f ns with %d waiting\n",
                  (double)(cpu_ns() - start) / ROUNDS, WAITING);
    struct nep_queue_stats stats;
    assert_int_equal(nep_queue_get_stats(queue, &stats), NEP_OK);
    assert_int_equal(stats.waiting, WAITING);
    nep_queue_destroy(queue);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_queue_requests_go_to_their_cheapest_open_home),
        cmocka_unit_test(test_queue_request_waits_a_little_for_its_best_home),
        cmocka_unit_test(test_queue_running_request_moves_where_it_pays),
        cmocka_unit_test(test_queue_full_or_wrong_is_refused),
        cmocka_unit_test(test_queue_null_is_refused_in_words),
        cmocka_unit_test(test_queue_adversarial_mix_keeps_the_age_bound),
        cmocka_unit_test(test_queue_flooding_tenant_gets_its_share_only),
        cmocka_unit_test(test_queue_threads_lose_nothing),
        cmocka_unit_test(test_queue_cost_is_printed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
