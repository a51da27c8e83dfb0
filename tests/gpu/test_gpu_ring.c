/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The command ring and the proxy where the device is a few threads: the ring's text is the one that
 * kernels run. ThreadSanitizer runs it, too. The puts go through transport `loop`'s operations
 * table in test_gpu_proxy_puts; here `post` only looks.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cmocka_all.h"
#include "dispatch/cuda/proxy.h"
#include "dispatch/cuda/visibility.h"

enum { PRODUCERS = 4, EACH = 4000 };

struct fixture {
    struct nep_ring ring;
    struct nep_ring_producer producer;
    struct nep_proxy *proxy;
    uint32_t next[PRODUCERS];       /* number expected of each */
    uint32_t data[PRODUCERS][EACH]; /* plain memory that a command hands over */
    uint64_t wrong;
    uint64_t arrived; /* word that the `post` raises */
    uint64_t seen;
    enum nep_status answer;
};

static void make(struct fixture *f, uint32_t size)
{
    memset(f, 0, sizeof *f);
    f->ring.shared = calloc(1, nep_ring_bytes(size));
    assert_non_null(f->ring.shared);
    f->ring.producer = &f->producer;
    f->ring.size = size;
}

static enum nep_status look(void *ctx, uint64_t command, uint32_t *who_p)
{
    struct fixture *f = ctx;
    struct nep_command c = nep_ring_command_of(command);
    *who_p = c.stream;
    f->wrong += c.stream >= PRODUCERS || c.kind != 3;
    if (c.stream < PRODUCERS && f->next[c.stream] < EACH) {
        uint32_t number = f->next[c.stream]++;
        f->wrong += c.number != (number & 65535) || c.op != (number & 4095) ||
                    c.rows != number % 4096 || f->data[c.stream][number] != number + 1;
    }
    f->seen++;
    nep_ring_store(&f->arrived, f->seen);
    return f->answer;
}

static void start(struct fixture *f, uint64_t spin_ns)
{
    struct nep_proxy_params params = {.ring = f->ring, .post = look, .ctx = f, .spin_ns = spin_ns};
    assert_int_equal(nep_proxy_start(&params, &f->proxy), NEP_OK);
}

static void stop(struct fixture *f)
{
    nep_proxy_stop(f->proxy);
    free(f->ring.shared);
}

struct producer {
    struct fixture *f;
    uint32_t stream;
    uint32_t num;
    uint64_t timeout_ns;
    enum nep_ring_end end;
    pthread_t thread;
};

static void *produce(void *arg)
{
    struct producer *p = arg;
    for (uint32_t i = 0; i < p->num && p->end == NEP_RING_DONE; i++) {
        p->f->data[p->stream][i] = i + 1;
        p->end = nep_ring_post(&p->f->ring, nep_ring_command(3, p->stream, i % 4096, i, i), NULL,
                               p->timeout_ns);
    }
    return NULL;
}

static void run_producers(struct fixture *f, struct producer *producers, uint32_t num,
                          uint64_t timeout_ns)
{
    for (uint32_t i = 0; i < PRODUCERS; i++) {
        producers[i] = (struct producer){f, i, num, timeout_ns, NEP_RING_DONE, 0};
        assert_int_equal(pthread_create(&producers[i].thread, NULL, produce, &producers[i]), 0);
    }
    for (uint32_t i = 0; i < PRODUCERS; i++) {
        pthread_join(producers[i].thread, NULL);
    }
}

/* Many laps of a small ring, so that tags come round and producers wait for room. */
static void test_wrap(void **state)
{
    (void)state;
    const uint32_t sizes[] = {1, 2, 8, 256};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        struct fixture f;
        struct producer producers[PRODUCERS];
        uint32_t each = sizes[s] < 8 ? EACH / 20 : EACH;
        make(&f, sizes[s]);
        start(&f, 100 * NEP_MS);
        run_producers(&f, producers, each, 60 * NEP_S);
        struct fixture *p = &f;
        assert_int_equal(
            nep_ring_wait(&f.ring, &p->arrived, (uint64_t)PRODUCERS * each, NULL, 60 * NEP_S),
            NEP_RING_DONE);
        assert_int_equal(f.wrong, 0);
        for (uint32_t i = 0; i < PRODUCERS; i++) {
            assert_int_equal(producers[i].end, NEP_RING_DONE);
            assert_int_equal(f.next[i], each);
        }
        assert_int_equal(nep_proxy_stats(f.proxy).commands, (uint64_t)PRODUCERS * each);
        stop(&f);
    }
}

/* A stale entry of the lap before is not taken for a new one, whatever the lap. */
static void test_tags(void **state)
{
    (void)state;
    struct fixture f;
    uint64_t taken = 0;
    uint64_t command = 0;
    make(&f, 2);
    for (uint64_t i = 0; i < 2000; i++) {
        assert_false(nep_ring_take(&f.ring, &taken, &command));
        assert_int_equal(nep_ring_post(&f.ring, ~0ull - i, NULL, NEP_S), NEP_RING_DONE);
        assert_true(nep_ring_take(&f.ring, &taken, &command));
        assert_int_equal(command, (~0ull - i) & NEP_RING_COMMAND_MASK);
    }
    free(f.ring.shared);
}

/* The proxy stops: who waits for room, and who waits for a word, knows it before the deadline. */
static void test_death(void **state)
{
    (void)state;
    struct fixture f;
    struct producer producers[PRODUCERS];
    make(&f, 8);
    start(&f, NEP_S);
    nep_proxy_pause(f.proxy, true);
    uint64_t begin = nep_now_ns();
    run_producers(&f, producers, EACH, 400 * NEP_MS);
    assert_in_range(nep_now_ns() - begin, 200 * NEP_MS, 60 * NEP_S);
    for (uint32_t i = 0; i < PRODUCERS; i++) {
        assert_int_equal(producers[i].end, NEP_RING_STALE);
    }
    uint64_t never = 0;
    assert_int_equal(nep_ring_wait(&f.ring, &never, 1, NULL, 100 * NEP_MS), NEP_RING_STALE);
    /* Alive again: the heartbeat says so, and a word that does not come is no fault of its. */
    nep_proxy_pause(f.proxy, false);
    assert_int_equal(nep_ring_wait(&f.ring, &f.arrived, 1, NULL, 10 * NEP_S), NEP_RING_DONE);
    /* A machine with more to do than cores may stop the proxy for a while: two seconds count. */
    assert_int_equal(nep_ring_wait(&f.ring, &never, 1, NULL, 4 * NEP_S), NEP_RING_EXPIRED);
    uint64_t stuck = 1;
    assert_int_equal(nep_ring_wait(&f.ring, &never, 1, &stuck, 10 * NEP_S), NEP_RING_STUCK);
    stop(&f);
}

/* A post that fails is a fault that waiting kernels see, with the rank. */
static void test_post_fails(void **state)
{
    (void)state;
    struct fixture f;
    uint64_t never = 0;
    make(&f, 8);
    f.answer = NEP_ERR_IO;
    start(&f, NEP_S);
    assert_int_equal(nep_ring_post(&f.ring, nep_ring_command(3, 2, 0, 0, 0), NULL, NEP_S),
                     NEP_RING_DONE);
    assert_int_equal(nep_ring_wait(&f.ring, &never, 1, NULL, 60 * NEP_S), NEP_RING_FAULT);
    assert_int_equal(nep_ring_load(&f.ring.shared->fault),
                     NEP_PROXY_FAULT(NEP_PROXY_POST_FAILED, 2));
    stop(&f);
}

/* An idle proxy naps, and still takes what comes. */
static void test_nap(void **state)
{
    (void)state;
    struct fixture f;
    make(&f, 8);
    start(&f, 0);
    uint64_t deadline = nep_deadline_ns(10 * NEP_S);
    while (nep_proxy_stats(f.proxy).naps < 3 && nep_left_ns(deadline) > 0) {
        nanosleep(&(struct timespec){0, 1000000}, NULL);
    }
    assert_true(nep_proxy_stats(f.proxy).naps >= 3);
    assert_int_equal(nep_ring_post(&f.ring, nep_ring_command(3, 0, 0, 0, 0), NULL, NEP_S),
                     NEP_RING_DONE);
    assert_int_equal(nep_ring_wait(&f.ring, &f.arrived, 1, NULL, 10 * NEP_S), NEP_RING_DONE);
    stop(&f);
}

static void test_bad_size(void **state)
{
    (void)state;
    struct nep_proxy *proxy = NULL;
    struct nep_proxy_params params = {.ring = {.size = 12}};
    assert_int_equal(nep_proxy_start(&params, &proxy), NEP_ERR_INTERNAL);
    assert_null(proxy);
    nep_proxy_stop(NULL);
}

static void test_visibility(void **state)
{
    (void)state;
    const struct {
        struct nep_visibility_facts facts;
        const char *wish;
        enum nep_status status;
        enum nep_visibility visibility;
    } cases[] = {
        {{true, 1, 100, 1, 1}, "auto", NEP_OK, NEP_VISIBILITY_ORDERED},
        {{true, 1, 100, 1, 8}, "auto", NEP_OK, NEP_VISIBILITY_FLUSH},
        {{true, 1, 200, 0, 8}, "auto", NEP_OK, NEP_VISIBILITY_ORDERED},
        {{true, 1, 0, 1, 1}, "auto", NEP_OK, NEP_VISIBILITY_FLUSH},
        {{true, 1, 0, 2, 1}, "auto", NEP_OK, NEP_VISIBILITY_STAGED},
        {{true, 0, 200, 1, 1}, "auto", NEP_OK, NEP_VISIBILITY_STAGED},
        {{false, 1, 200, 1, 1}, "auto", NEP_OK, NEP_VISIBILITY_STAGED},
        {{true, 1, 200, 1, 1}, "staged", NEP_OK, NEP_VISIBILITY_STAGED},
        {{true, 1, 0, 1, 8}, "ordered", NEP_OK, NEP_VISIBILITY_ORDERED},
        {{true, 1, 0, 0, 8}, "flush", NEP_ERR_UNSUPPORTED, NEP_VISIBILITY_FLUSH},
        {{false, 1, 200, 1, 1}, "ordered", NEP_ERR_UNSUPPORTED, NEP_VISIBILITY_FLUSH},
        {{true, 1, 200, 1, 1}, "maybe", NEP_ERR_INVALID, NEP_VISIBILITY_FLUSH},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        enum nep_visibility visibility = NEP_VISIBILITY_FLUSH;
        char why[256] = "";
        assert_int_equal(
            nep_visibility_choose(&cases[i].facts, cases[i].wish, &visibility, why, sizeof why),
            cases[i].status);
        assert_int_equal(visibility, cases[i].visibility);
        if (cases[i].status == NEP_OK) {
            assert_non_null(strstr(why, nep_visibility_name(visibility)));
        } else {
            assert_non_null(strstr(nep_last_message(), "NEP_CUDA_VISIBILITY"));
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_wrap),       cmocka_unit_test(test_tags),
        cmocka_unit_test(test_death),      cmocka_unit_test(test_post_fails),
        cmocka_unit_test(test_nap),        cmocka_unit_test(test_bad_size),
        cmocka_unit_test(test_visibility),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
