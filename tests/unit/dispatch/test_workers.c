/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pool of workers: every chunk once, results independent of the number of threads, several
 * callers, loops inside loops, fork, and many starts and stops. Run it under ThreadSanitizer.
 */
#include "tests/unit/cmocka_all.h"

#include <dirent.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dispatch/host/workers.h"

#define MAX_CHUNKS 2000

struct loop {
    uint32_t num_chunks;
    uint32_t times[MAX_CHUNKS]; /* plain: a chunk run twice at once is a race that TSan sees */
    uint64_t out[MAX_CHUNKS];
};

static void chunk_count(void *ctx, uint32_t chunk_idx)
{
    struct loop *loop = ctx;
    loop->times[chunk_idx]++;
    uint64_t hash = chunk_idx + 1;
    for (uint32_t i = 0; i < 50 + chunk_idx % 200; i++) {
        hash = hash * 6364136223846793005ull + 1442695040888963407ull;
    }
    loop->out[chunk_idx] = hash;
}

static void loop_check(const struct loop *loop, uint32_t times)
{
    struct loop want = {.num_chunks = loop->num_chunks};
    for (uint32_t i = 0; i < MAX_CHUNKS; i++) {
        assert_int_equal(loop->times[i], i < loop->num_chunks ? times : 0);
        if (i < loop->num_chunks) {
            chunk_count(&want, i);
        }
    }
    assert_memory_equal(loop->out, want.out, sizeof want.out);
}

static void test_workers_run_any_size_calls_each_chunk_once(void **state)
{
    (void)state;
    static const uint32_t threads[] = {0, 1, 2, 3, 8, 17};
    static const uint32_t chunks[] = {0, 1, 2, 3, 7, 64, MAX_CHUNKS};
    for (size_t t = 0; t < sizeof threads / sizeof threads[0]; t++) {
        struct nep_workers *workers = NULL;
        assert_int_equal(nep_workers_create(threads[t], 100 * (t & 1), &workers), NEP_OK);
        assert_int_equal(nep_workers_num_threads(workers), threads[t] > 1 ? threads[t] : 1);
        for (size_t c = 0; c < sizeof chunks / sizeof chunks[0]; c++) {
            struct loop loop = {.num_chunks = chunks[c]};
            for (uint32_t round = 1; round <= 20; round++) {
                nep_workers_run(workers, chunk_count, &loop, chunks[c]);
                loop_check(&loop, round);
            }
        }
        nep_workers_destroy(workers);
    }
}

struct meeting {
    atomic_uint num_here;
    atomic_bool met;
};

/* Two chunks that see each other: only two threads can do that. Gives up after half a minute. */
static void chunk_meet(void *ctx, uint32_t chunk_idx)
{
    struct meeting *meeting = ctx;
    (void)chunk_idx;
    atomic_fetch_add(&meeting->num_here, 1);
    for (int wait = 0; wait < 300000 && atomic_load(&meeting->num_here) < 2; wait++) {
        usleep(100);
    }
    if (atomic_load(&meeting->num_here) >= 2) {
        atomic_store(&meeting->met, true);
    }
}

static void test_workers_run_two_threads_work_at_once(void **state)
{
    (void)state;
    struct nep_workers *workers = NULL;
    assert_int_equal(nep_workers_create(2, 0, &workers), NEP_OK);
    for (int round = 0; round < 20; round++) {
        struct meeting meeting = {0};
        nep_workers_run(workers, chunk_meet, &meeting, 2);
        assert_true(atomic_load(&meeting.met));
    }
    nep_workers_destroy(workers);
}

static void test_workers_run_without_a_pool_is_a_loop(void **state)
{
    (void)state;
    struct loop loop = {.num_chunks = 9};
    nep_workers_run(NULL, chunk_count, &loop, 9);
    loop_check(&loop, 1);
    assert_int_equal(nep_workers_num_threads(NULL), 1);
    nep_workers_destroy(NULL);
}

struct caller {
    struct nep_workers *workers;
    struct loop loop;
    pthread_t thread;
};

static void *caller_main(void *arg)
{
    struct caller *caller = arg;
    for (int round = 0; round < 200; round++) {
        nep_workers_run(caller->workers, chunk_count, &caller->loop, caller->loop.num_chunks);
    }
    return NULL;
}

static void test_workers_run_several_callers_share_one_pool(void **state)
{
    (void)state;
    enum { NUM = 4 };
    struct nep_workers *workers = NULL;
    struct caller *callers = calloc(NUM, sizeof *callers);
    assert_non_null(callers);
    assert_int_equal(nep_workers_create(3, 10, &workers), NEP_OK);
    for (uint32_t i = 0; i < NUM; i++) {
        callers[i].workers = workers;
        callers[i].loop.num_chunks = 5 + 3 * i;
        assert_int_equal(pthread_create(&callers[i].thread, NULL, caller_main, &callers[i]), 0);
    }
    for (uint32_t i = 0; i < NUM; i++) {
        pthread_join(callers[i].thread, NULL);
        loop_check(&callers[i].loop, 200);
    }
    nep_workers_destroy(workers);
    free(callers);
}

static void chunk_nest(void *ctx, uint32_t chunk_idx)
{
    struct caller *callers = ctx;
    struct caller *caller = &callers[chunk_idx];
    nep_workers_run(caller->workers, chunk_count, &caller->loop, caller->loop.num_chunks);
}

static void test_workers_run_inside_a_chunk_ends(void **state)
{
    (void)state;
    enum { NUM = 6 };
    struct nep_workers *workers = NULL;
    struct caller *callers = calloc(NUM, sizeof *callers);
    assert_non_null(callers);
    assert_int_equal(nep_workers_create(4, 0, &workers), NEP_OK);
    for (uint32_t i = 0; i < NUM; i++) {
        callers[i].workers = workers;
        callers[i].loop.num_chunks = 10 + i;
    }
    nep_workers_run(workers, chunk_nest, callers, NUM);
    for (uint32_t i = 0; i < NUM; i++) {
        loop_check(&callers[i].loop, 1);
    }
    nep_workers_destroy(workers);
    free(callers);
}

static void test_workers_destroy_right_after_create_ends(void **state)
{
    (void)state;
    for (uint32_t round = 0; round < 200; round++) {
        struct nep_workers *workers = NULL;
        struct loop loop = {.num_chunks = round % 7};
        assert_int_equal(nep_workers_create(1 + round % 5, round % 3 * 1000, &workers), NEP_OK);
        if (round & 1) {
            nep_workers_run(workers, chunk_count, &loop, loop.num_chunks);
            loop_check(&loop, 1);
        }
        nep_workers_destroy(workers);
    }
}

static void test_workers_create_too_many_is_refused_auto_is_one(void **state)
{
    (void)state;
    struct nep_workers *workers = NULL;
    assert_int_equal(nep_workers_create(NEP_WORKERS_MAX + 1, 0, &workers), NEP_ERR_INVALID);
    assert_null(workers);
    assert_non_null(strstr(nep_last_message(), "257"));
    assert_int_equal(nep_workers_create(UINT32_MAX, 0, &workers), NEP_OK);
    assert_int_equal(nep_workers_num_threads(workers), 1);
    nep_workers_destroy(workers);
}

/* ThreadSanitizer dies in a forked child that has lost its threads. */
#if defined(__SANITIZE_THREAD__)
#define HAS_FORK_TESTS 0
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define HAS_FORK_TESTS 0
#endif
#endif
#ifndef HAS_FORK_TESTS
#define HAS_FORK_TESTS 1
#endif

#if HAS_FORK_TESTS

/* A child has the pool's memory but not its threads. */
static void test_workers_in_a_forked_child_still_work(void **state)
{
    (void)state;
    struct nep_workers *workers = NULL;
    struct loop loop = {.num_chunks = 100};
    assert_int_equal(nep_workers_create(4, 0, &workers), NEP_OK);
    nep_workers_run(workers, chunk_count, &loop, 100);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        alarm(20); /* a hang is a failure, not a lost test run */
        nep_workers_run(workers, chunk_count, &loop, 100);
        bool right = loop.times[0] == 2 && loop.times[99] == 2;
        nep_workers_destroy(workers);
        _exit(right ? 0 : 1);
    }
    int status = -1;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    loop_check(&loop, 1);
    nep_workers_destroy(workers);
}

static int num_threads_here(void)
{
    DIR *tasks = opendir("/proc/self/task");
    int num = 0;
    for (struct dirent *task; tasks != NULL && (task = readdir(tasks)) != NULL;) {
        num += task->d_name[0] != '.';
    }
    if (tasks != NULL) {
        closedir(tasks);
    }
    return num;
}

/* No thread for user 65534 beyond a few: those that started must be ended again. */
static void test_workers_create_without_threads_is_refused(void **state)
{
    (void)state;
    if (geteuid() != 0) {
        printf("not root: a limit of threads cannot be imposed on another user; not tried\n");
        return;
    }
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        alarm(20);
        struct rlimit limit = {3, 3};
        struct nep_workers *workers = NULL;
        if (setrlimit(RLIMIT_NPROC, &limit) != 0 || setuid(65534) != 0) {
            _exit(2);
        }
        enum nep_status status = nep_workers_create(64, 0, &workers);
        /* a joined thread leaves the list a moment later */
        for (int wait = 0; wait < 100000 && num_threads_here() != 1; wait++) {
            usleep(100);
        }
        bool right = status == NEP_ERR_NO_MEMORY && workers == NULL && num_threads_here() == 1 &&
                     strstr(nep_last_message(), "NEP_THREADS") != NULL;
        _exit(right ? 0 : 1);
    }
    int status = -1;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    if (WEXITSTATUS(status) == 2) {
        printf("root here may not become another user; not tried\n");
        return;
    }
    assert_int_equal(WEXITSTATUS(status), 0);
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_workers_run_any_size_calls_each_chunk_once),
        cmocka_unit_test(test_workers_run_two_threads_work_at_once),
        cmocka_unit_test(test_workers_run_without_a_pool_is_a_loop),
        cmocka_unit_test(test_workers_run_several_callers_share_one_pool),
        cmocka_unit_test(test_workers_run_inside_a_chunk_ends),
        cmocka_unit_test(test_workers_destroy_right_after_create_ends),
        cmocka_unit_test(test_workers_create_too_many_is_refused_auto_is_one),
#if HAS_FORK_TESTS
        cmocka_unit_test(test_workers_in_a_forked_child_still_work),
        cmocka_unit_test(test_workers_create_without_threads_is_refused),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
