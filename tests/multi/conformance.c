/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every rank plans, from the seed alone, what every other rank will put where, so the receiver
 * knows each byte of its slots, those that must stay untouched included, without being told.
 */
#include "conformance.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/clock.h"
#include "base/config.h"

enum { PUTS_PER_ROUND = 6, THREADS = 3, PUTS_PER_THREAD = 64 };
static const uint64_t WAIT_NS = 60 * NEP_S;
static const int POISON = 0xa5;

/* ---- windows ------------------------------------------------------------------------------ */

static atomic_uint *word_of(void *base, uint32_t src, uint32_t imm)
{
    return (atomic_uint *)base + src * WINDOW_IMMS + imm % WINDOW_IMMS;
}

static size_t words_bytes(uint32_t num_ranks)
{
    return ((size_t)num_ranks * WINDOW_IMMS * sizeof(atomic_uint) + 4095) / 4096 * 4096;
}

void conformance_sink(void *base, uint32_t dst, uint32_t src, uint32_t imm)
{
    (void)dst;
    /* Release: pairs with the acquire in window_arrivals. */
    atomic_fetch_add_explicit(word_of(base, src, imm >> 4), 1, memory_order_release);
}

uint32_t window_arrivals(const struct window *window, uint32_t src, uint32_t imm)
{
    return atomic_load_explicit(word_of(window->base, src, imm), memory_order_acquire);
}

uint64_t window_landing(const struct window *window, uint32_t src)
{
    return words_bytes(window->num_ranks) + src * window->slot_bytes;
}

char *window_source(const struct window *window, uint32_t dst)
{
    return (char *)window->base + window_landing(window, window->num_ranks + dst);
}

/* Each source may write the slot that is its own, and nothing else. */
static int grant_slots(struct rank *rank, struct nep_transport *transport,
                       const struct window *window)
{
    struct nep_grant *grants = calloc(window->num_ranks, sizeof *grants);
    RANK_CHECK(rank, grants != NULL, "no memory");
    uint32_t num = 0;
    for (uint32_t r = 0; r < window->num_ranks; r++) {
        if (r != rank->rank) {
            grants[num++] = (struct nep_grant){r, window_landing(window, r), window->slot_bytes};
        }
    }
    enum nep_status status = transport->ops->window_grant(transport, window->number, grants, num);
    free(grants);
    RANK_CHECK(rank, status == NEP_OK, "%s", nep_last_message());
    return 0;
}

int window_open(struct rank *rank, struct nep_transport *transport, uint32_t number,
                size_t slot_bytes, struct window *window)
{
    *window = (struct window){
        .number = number, .num_ranks = rank->num_ranks, .slot_bytes = slot_bytes, .base = NULL};
    window->bytes = words_bytes(rank->num_ranks) + 2 * rank->num_ranks * slot_bytes;
    if (!(transport->ops->caps & NEP_CAP_MAPPED)) {
        window->base = mmap(NULL, window->bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        RANK_CHECK(rank, window->base != MAP_FAILED, "%zu bytes", window->bytes);
    }
    if (grant_slots(rank, transport, window) != 0) {
        return 1;
    }
    enum nep_status status =
        transport->ops->window_create(transport, number, &window->base, window->bytes);
    RANK_CHECK(rank, status == NEP_OK, "%s", nep_last_message());
    RANK_CHECK(rank, transport->ops->peer_window(transport, number, rank->rank) == window->base,
               "own window is elsewhere");
    memset((char *)window->base + window_landing(window, 0), POISON, rank->num_ranks * slot_bytes);
    return barrier(rank); /* nobody puts before all slots are poisoned */
}

void window_close(struct nep_transport *transport, struct window *window)
{
    transport->ops->window_destroy(transport, window->number);
    if (!(transport->ops->caps & NEP_CAP_MAPPED)) {
        munmap(window->base, window->bytes);
    }
}

int window_wait(struct rank *rank, struct nep_transport *transport, const struct window *window,
                uint32_t src, uint32_t imm)
{
    uint64_t deadline_ns = nep_deadline_ns(WAIT_NS);
    while (window_arrivals(window, src, imm) == 0) {
        transport->ops->progress(transport);
        RANK_CHECK(rank, nep_now_ns() < deadline_ns, "put %u of rank %u did not arrive", imm, src);
        sched_yield();
    }
    return 0;
}

int wait_completed(struct rank *rank, struct nep_transport *transport, uint32_t dst,
                   uint64_t number)
{
    uint64_t deadline_ns = nep_deadline_ns(WAIT_NS);
    while (transport->ops->completed(transport, dst) < number) {
        transport->ops->progress(transport);
        RANK_CHECK(rank, nep_now_ns() < deadline_ns, "put %llu to rank %u did not complete",
                   (unsigned long long)number, dst);
        sched_yield();
    }
    return 0;
}

void fill(char *bytes, size_t len, uint64_t key)
{
    for (size_t i = 0; i < len; i += 8) {
        uint64_t value = rank_random(&key);
        memcpy(bytes + i, &value, len - i < 8 ? len - i : 8);
    }
}

int barrier(struct rank *rank)
{
    char mine = 0, all[RANKS_MAX];
    int failed = rank->bootstrap.allgather(rank->bootstrap.ctx, &mine, all, 1, WAIT_NS);
    RANK_CHECK(rank, failed == 0, "a barrier of the test");
    return 0;
}

enum nep_status conformance_open(struct rank *rank, const char *name, uint64_t timeout_ns,
                                 struct nep_transport **transport_p)
{
    static _Thread_local struct nep_config config; /* outlives the transport */
    const struct nep_transport_ops *ops;
    struct nep_transport_params params = {
        .topology = &rank->topology,
        .bootstrap = &rank->bootstrap,
        .config = &config,
        .timeout_ns = timeout_ns,
        .sink = conformance_sink,
        .max_puts = 4096,
    };
    enum nep_status status = nep_config_load(&config);
    if (status == NEP_OK) {
        status = nep_transport_find(name, &ops, &params.args);
    }
    return status == NEP_OK ? ops->create(&params, transport_p) : status;
}

/* ---- rounds of puts of any size ----------------------------------------------------------- */

struct plan {
    uint32_t num;
    uint32_t imm[PUTS_PER_ROUND];
    uint32_t offset[PUTS_PER_ROUND]; /* in the slot; disjoint */
    uint32_t len[PUTS_PER_ROUND];
    uint64_t key[PUTS_PER_ROUND];
};

/* Sizes around the borders of UCX's, MPI's and everybody's protocols, and anything between. */
static uint32_t plan_len(uint64_t *random, uint32_t most)
{
    static const uint32_t borders[] = {0,    1,     7,     8,     64,    4096,  8192,
                                       8193, 14336, 16384, 65536, 65537, 262144};
    uint64_t pick = rank_random(random) % 20;
    uint32_t len = pick < sizeof borders / sizeof borders[0]
                       ? borders[pick]
                       : (uint32_t)(rank_random(random) % (most + 1));
    return len <= most ? len : most;
}

static void plan_make(const struct conformance *test, uint32_t src, uint32_t dst, uint32_t round,
                      struct plan *plan)
{
    uint64_t random = test->seed ^ ((uint64_t)src << 40 | (uint64_t)dst << 20 | round);
    uint32_t share = (uint32_t)(test->slot_bytes / PUTS_PER_ROUND);
    plan->num = 1 + (uint32_t)(rank_random(&random) % PUTS_PER_ROUND);
    for (uint32_t i = 0; i < plan->num; i++) {
        plan->imm[i] = (round * PUTS_PER_ROUND + i) % WINDOW_IMMS;
        plan->len[i] = plan_len(&random, share - 1);
        plan->offset[i] = i * share + (uint32_t)(rank_random(&random) % (share - plan->len[i]));
        plan->key[i] = rank_random(&random);
    }
}

static int send_round(struct rank *rank, const struct conformance *test,
                      struct nep_transport *transport, const struct window *window, uint32_t round)
{
    struct plan plan;
    for (uint32_t k = 0; k < rank->num_ranks; k++) {
        uint32_t dst = (rank->rank + k) % rank->num_ranks;
        plan_make(test, rank->rank, dst, round, &plan);
        uint64_t number[PUTS_PER_ROUND] = {0};
        for (uint32_t i = 0; i < plan.num; i++) {
            char *src = window_source(window, dst) + plan.offset[i];
            fill(src, plan.len[i], plan.key[i]);
            struct nep_put put = {.dst = dst,
                                  .window = window->number,
                                  .offset = window_landing(window, rank->rank) + plan.offset[i],
                                  .src = src,
                                  .len = plan.len[i],
                                  .imm = window_imm(window->number, plan.imm[i])};
            enum nep_status status = transport->ops->put(transport, &put, &number[i]);
            RANK_CHECK(rank, status == NEP_OK, "%s", nep_last_message());
            RANK_CHECK(rank, i == 0 || number[i] > number[i - 1], "numbers do not grow");
        }
        /* Once it is complete the source may be overwritten, even if the put has not arrived. */
        for (uint32_t i = 0; i < plan.num && round % 2 == 0; i++) {
            if (wait_completed(rank, transport, dst, number[i]) != 0) {
                return 1;
            }
            memset(window_source(window, dst) + plan.offset[i], 0xee, plan.len[i]);
        }
        if (wait_completed(rank, transport, dst, number[plan.num - 1]) != 0) {
            return 1;
        }
    }
    return 0;
}

static int check_round(struct rank *rank, const struct conformance *test,
                       struct nep_transport *transport, const struct window *window, uint32_t round,
                       char *expected)
{
    struct plan plan;
    for (uint32_t src = 0; src < rank->num_ranks; src++) {
        plan_make(test, src, rank->rank, round, &plan);
        memset(expected, POISON, test->slot_bytes);
        for (uint32_t i = 0; i < plan.num; i++) {
            fill(expected + plan.offset[i], plan.len[i], plan.key[i]);
            if (window_wait(rank, transport, window, src, plan.imm[i]) != 0) {
                return 1;
            }
        }
        char *slot = (char *)window->base + window_landing(window, src);
        RANK_CHECK(rank, memcmp(slot, expected, test->slot_bytes) == 0,
                   "round %u: bytes of rank %u are wrong", round, src);
        memset(slot, POISON, test->slot_bytes);
    }
    return 0;
}

/* After everything: each planned announcement once (or more, if allowed), no other one. */
static int check_counts(struct rank *rank, const struct conformance *test,
                        const struct window *window, uint64_t *total_p)
{
    for (uint32_t src = 0; src < rank->num_ranks; src++) {
        uint32_t expected[WINDOW_IMMS] = {0};
        for (uint32_t round = 0; round < test->num_rounds; round++) {
            struct plan plan;
            plan_make(test, src, rank->rank, round, &plan);
            for (uint32_t i = 0; i < plan.num; i++) {
                expected[plan.imm[i]]++;
                (*total_p)++;
            }
        }
        for (uint32_t imm = 0; imm < WINDOW_IMMS; imm++) {
            uint32_t seen = window_arrivals(window, src, imm);
            bool right = test->repeats
                             ? seen >= expected[imm] && (seen != 0) == (expected[imm] != 0)
                             : seen == expected[imm];
            RANK_CHECK(rank, right, "announcement %u of rank %u: %u times, not %u", imm, src, seen,
                       expected[imm]);
        }
    }
    return 0;
}

static int run_rounds(struct rank *rank, const struct conformance *test,
                      struct nep_transport *transport, const struct window *window)
{
    char *expected = malloc(test->slot_bytes);
    RANK_CHECK(rank, expected != NULL, "no memory");
    int failed = 0;
    for (uint32_t round = 0; round < test->num_rounds && failed == 0; round++) {
        failed = send_round(rank, test, transport, window, round);
        if (failed == 0 && test->repeats) {
            failed = barrier(rank); /* repeats may write until the put is complete */
        }
        if (failed == 0) {
            failed = check_round(rank, test, transport, window, round, expected);
        }
        if (failed == 0) {
            failed = barrier(rank); /* slots are free again everywhere */
        }
    }
    free(expected);
    uint64_t total = 0;
    return failed != 0 ? failed : check_counts(rank, test, window, &total);
}

/* ---- several threads of a rank ------------------------------------------------------------ */

struct poster {
    struct rank *rank;
    struct nep_transport *transport;
    const struct window *window;
    uint32_t thread;
    int failed;
};

static uint32_t small_len(uint32_t imm)
{
    return imm % 5 == 0 ? 0 : imm * 11;
}

static int post_small(struct poster *poster)
{
    struct rank *rank = poster->rank;
    const struct window *window = poster->window;
    for (uint32_t i = 0; i < PUTS_PER_THREAD; i++) {
        uint32_t imm = poster->thread * PUTS_PER_THREAD + i;
        uint32_t place = imm * 4096;
        for (uint32_t dst = 0; dst < rank->num_ranks; dst++) {
            char *src = window_source(window, dst) + place;
            fill(src, small_len(imm), (uint64_t)rank->rank << 32 | imm);
            struct nep_put put = {.dst = dst,
                                  .window = window->number,
                                  .offset = window_landing(window, rank->rank) + place,
                                  .src = src,
                                  .len = small_len(imm),
                                  .imm = window_imm(window->number, imm)};
            uint64_t number;
            enum nep_status status = poster->transport->ops->put(poster->transport, &put, &number);
            RANK_CHECK(rank, status == NEP_OK, "%s", nep_last_message());
        }
        poster->transport->ops->progress(poster->transport);
    }
    return 0;
}

static void *poster_main(void *arg)
{
    struct poster *poster = arg;
    poster->failed = post_small(poster);
    return NULL;
}

static int run_threads(struct rank *rank, const struct conformance *test,
                       struct nep_transport *transport, const struct window *window)
{
    struct poster posters[THREADS];
    pthread_t threads[THREADS];
    for (uint32_t t = 0; t < THREADS; t++) {
        posters[t] = (struct poster){rank, transport, window, t, 0};
        RANK_CHECK(rank, pthread_create(&threads[t], NULL, poster_main, &posters[t]) == 0,
                   "no thread");
    }
    int failed = 0;
    for (uint32_t t = 0; t < THREADS; t++) {
        pthread_join(threads[t], NULL);
        failed |= posters[t].failed;
    }
    for (uint32_t src = 0; src < rank->num_ranks && failed == 0; src++) {
        for (uint32_t imm = 0; imm < THREADS * PUTS_PER_THREAD && failed == 0; imm++) {
            failed = window_wait(rank, transport, window, src, imm);
            char expected[THREADS * PUTS_PER_THREAD * 11];
            fill(expected, small_len(imm), (uint64_t)src << 32 | imm);
            RANK_CHECK(rank,
                       memcmp((char *)window->base + window_landing(window, src) + imm * 4096,
                              expected, small_len(imm)) == 0,
                       "small put %u of rank %u is wrong", imm, src);
        }
    }
    failed = failed != 0 ? failed : barrier(rank);
    for (uint32_t src = 0; src < rank->num_ranks && failed == 0; src++) {
        for (uint32_t imm = 0; imm < THREADS * PUTS_PER_THREAD; imm++) {
            uint32_t seen = window_arrivals(window, src, imm);
            RANK_CHECK(rank, seen == 1 || (seen > 1 && test->repeats),
                       "small put %u of rank %u was announced %u times", imm, src, seen);
        }
    }
    return failed;
}

/* ---- the rest ----------------------------------------------------------------------------- */

static int run_refusals(struct rank *rank, struct nep_transport *transport,
                        const struct window *window)
{
    uint32_t dst = (rank->rank + 1) % rank->num_ranks;
    uint64_t number = 77;
    struct nep_put good = {.dst = dst,
                           .window = window->number,
                           .offset = window_landing(window, rank->rank),
                           .src = window_source(window, dst),
                           .len = 8,
                           .imm = window_imm(window->number, WINDOW_IMMS - 1)};
    struct nep_put bad[4] = {good, good, good, good};
    bad[0].offset = window->bytes + (4u << 20) - 7; /* windows may be rounded up to huge pages */
    bad[1].offset = UINT64_MAX - 3;                 /* wraps around */
    bad[2].window = 63;                             /* does not exist */
    bad[3].len = UINT32_MAX;                        /* longer than any window here */
    for (int i = 0; i < 4; i++) {
        enum nep_status status = transport->ops->put(transport, &bad[i], &number);
        RANK_CHECK(rank, status < 0, "bad put %d was taken", i);
        RANK_CHECK(rank, nep_last_message()[0] != '\0', "bad put %d: no sentence", i);
        RANK_CHECK(rank, number == 77, "bad put %d got a number", i);
    }
    RANK_CHECK(rank, transport->ops->peer_window(transport, 63, rank->rank) == NULL,
               "window 63 does not exist");
    return barrier(rank);
}

static int run_status(struct rank *rank, const struct conformance *test,
                      struct nep_transport *transport)
{
    struct nep_transport_stats stats;
    transport->ops->stats(transport, &stats);
    RANK_CHECK(rank, stats.puts > 0 && stats.put_bytes > 0, "nothing counted");
    /* An announcement that comes again may find its window gone. */
    RANK_CHECK(rank, stats.refused == 0 || test->repeats, "%llu refused",
               (unsigned long long)stats.refused);
    for (uint32_t peer = 0; peer < rank->num_ranks; peer++) {
        RANK_CHECK(rank, transport->ops->peer_status(transport, peer) == NEP_OK, "%s",
                   nep_last_message());
    }
    return barrier(rank); /* nobody has left before all have looked */
}

/* What is put once another put is complete comes after it, with its bytes: long ones that are on
 * their way still, and a word behind each. */
static int run_later(struct rank *rank, const struct conformance *test,
                     struct nep_transport *transport)
{
    struct window window;
    uint64_t number;
    if (window_open(rank, transport, 7, test->slot_bytes, &window) != 0) {
        return 1;
    }
    for (uint32_t i = 1; i < rank->num_ranks; i++) {
        uint32_t dst = (rank->rank + i) % rank->num_ranks;
        struct nep_put put = {.dst = dst,
                              .window = window.number,
                              .offset = window_landing(&window, rank->rank),
                              .src = window_source(&window, dst),
                              .len = (uint32_t)test->slot_bytes,
                              .imm = window_imm(window.number, 1)};
        fill(window_source(&window, dst), test->slot_bytes, test->seed + rank->rank);
        RANK_CHECK(rank, transport->ops->put(transport, &put, &number) == NEP_OK, "%s",
                   nep_last_message());
        if (wait_completed(rank, transport, dst, number) != 0) {
            return 1;
        }
        put.len = 0;
        put.imm = window_imm(window.number, 2);
        RANK_CHECK(rank, transport->ops->put(transport, &put, &number) == NEP_OK, "%s",
                   nep_last_message());
    }
    char *expected = malloc(test->slot_bytes);
    RANK_CHECK(rank, expected != NULL, "no memory");
    int wrong = 0;
    for (uint32_t src = 0; src < rank->num_ranks && wrong == 0; src++) {
        if (src != rank->rank) {
            wrong = window_wait(rank, transport, &window, src, 2);
            fill(expected, test->slot_bytes, test->seed + src);
            wrong = wrong != 0 || window_arrivals(&window, src, 1) == 0 ||
                    memcmp(expected, (char *)window.base + window_landing(&window, src),
                           test->slot_bytes) != 0;
        }
    }
    free(expected);
    RANK_CHECK(rank, wrong == 0, "a put came before one that was complete");
    if (barrier(rank) != 0) {
        return 1;
    }
    window_close(transport, &window);
    return 0;
}

static int run_all(struct rank *rank, const struct conformance *test,
                   struct nep_transport *transport)
{
    struct window big, small;
    if (window_open(rank, transport, 3, test->slot_bytes, &big) != 0 ||
        window_open(rank, transport, 5, THREADS * PUTS_PER_THREAD * 4096, &small) != 0) {
        return 1;
    }
    if (run_refusals(rank, transport, &big) != 0 || run_rounds(rank, test, transport, &big) != 0 ||
        run_threads(rank, test, transport, &small) != 0) {
        return 1;
    }
    window_close(transport, &small);
    /* The number again, for another window, while the other one lives. */
    if (barrier(rank) != 0 ||
        window_open(rank, transport, 5, THREADS * PUTS_PER_THREAD * 4096, &small) != 0 ||
        run_threads(rank, test, transport, &small) != 0 || run_later(rank, test, transport) != 0 ||
        run_status(rank, test, transport) != 0) {
        return 1;
    }
    window_close(transport, &small);
    window_close(transport, &big);
    return 0;
}

int conformance_body(struct rank *rank)
{
    const struct conformance *test = rank->arg;
    struct nep_transport *transport;
    enum nep_status status = conformance_open(rank, test->name, 30 * NEP_S, &transport);
    RANK_CHECK(rank, status == NEP_OK, "%s", nep_last_message());
    int failed = run_all(rank, test, transport);
    transport->ops->close(transport);
    return failed;
}
