/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The measurement. Bandwidth: the client keeps `depth` puts under way; the time is from the first
 * post to the last completion at the client, as in ib_write_bw. Latency: both sides write in turn
 * and see the other's write by its last byte (plain) or by its announcement; half a round trip, as
 * in ib_write_lat. Verification is outside the timed part and has slots of its own.
 *
 * Peak bandwidth is that of the best window of `depth` puts. perftest takes the best of all pairs
 * of a post and a completion, also of single messages, which is rather the speed of posting.
 */
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/clock.h"
#include "perftest/put.h"
#include "transport/bootstrap.h"

enum { WINDOW = 0, SLOT_DONE = 255, SLOT_TIMED = 254 };

/* ---- window: a page of counters, slots that land, slots to send from ------------------------ */

static void sink(void *base, uint32_t dst, uint32_t src, uint32_t imm)
{
    (void)dst;
    (void)src;
    atomic_uint *words = base;
    /* release: pairs with the acquire in arrived */
    atomic_fetch_add_explicit(&words[imm >> 4 & 255], 1, memory_order_release);
}

static uint32_t arrived(const struct nep_perf_put_side *side, uint32_t slot)
{
    /* acquire: pairs with the release in sink */
    return atomic_load_explicit((atomic_uint *)(void *)side->base + slot, memory_order_acquire);
}

static uint8_t *landing(const struct nep_perf_put_side *side, uint32_t slot)
{
    return side->base + NEP_PERF_PUT_PAGE + slot * side->max_size;
}

static uint8_t *source(const struct nep_perf_put_side *side, uint32_t slot)
{
    return landing(side, side->num_slots + slot);
}

static int failed(const struct nep_perf_put_side *side, const char *what)
{
    return nep_perf_error(NEP_PERF_FAILED, "%s: %s: %s", side->rank == 0 ? "server" : "client",
                          what, nep_last_message());
}

int nep_perf_put_open(struct nep_perf_put_side *side)
{
    const struct nep_transport_ops *ops;
    struct nep_transport_params params = {.topology = &side->topology,
                                          .bootstrap = &side->bootstrap,
                                          .config = &side->config,
                                          .timeout_ns = side->config.timeout_ns,
                                          .sink = sink,
                                          .max_puts = side->options->depth + 8};
    params.max_puts =
        params.max_puts < 4 * NEP_PERF_PUT_SLOTS ? 4 * NEP_PERF_PUT_SLOTS : params.max_puts;
    const char *name = side->options->transport;
    if (nep_transport_find(name, &ops, &params.args) != NEP_OK) {
        return nep_perf_error(NEP_PERF_USAGE, "%s", nep_last_message());
    }
    if (ops->create(&params, &side->transport) != NEP_OK) {
        return failed(side, "the transport");
    }
    uint64_t sizes[32];
    uint32_t num_sizes = nep_perf_put_sizes(side->options, sizes);
    side->max_size = (sizes[num_sizes - 1] + 63) / 64 * 64;
    uint64_t slots = (64ull << 20) / side->max_size;
    side->num_slots = slots < NEP_PERF_PUT_SLOTS ? (uint32_t)slots : NEP_PERF_PUT_SLOTS;
    size_t bytes = NEP_PERF_PUT_PAGE + 2 * side->num_slots * side->max_size;
    void *base = NULL;
    if ((ops->caps & NEP_CAP_MAPPED) == 0) {
        base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        base = base == MAP_FAILED ? NULL : base;
    }
    if (ops->window_create(side->transport, WINDOW, &base, bytes) != NEP_OK) {
        return failed(side, "the window");
    }
    side->base = base;
    return -1;
}

void nep_perf_put_close(struct nep_perf_put_side *side)
{
    if (side->transport != NULL) {
        if (side->base != NULL) {
            side->transport->ops->window_destroy(side->transport, WINDOW);
        }
        side->transport->ops->close(side->transport);
        side->transport = NULL;
    }
}

/* ---- steps ---------------------------------------------------------------------------------- */

static bool is_plain(const struct nep_perf_put_side *side)
{
    return !side->options->is_announced && (side->transport->ops->caps & NEP_CAP_SILENT) != 0;
}

static bool post(struct nep_perf_put_side *side, uint32_t slot, uint32_t word, uint64_t size,
                 bool is_silent)
{
    struct nep_put put = {.dst = 1 - side->rank,
                          .window = WINDOW,
                          .offset = NEP_PERF_PUT_PAGE + slot * side->max_size,
                          .src = source(side, slot),
                          .len = (uint32_t)size,
                          .imm = word << 4,
                          .is_silent = is_silent};
    if (side->transport->ops->put(side->transport, &put, &side->sent) != NEP_OK) {
        failed(side, "put");
        return false;
    }
    return true;
}

/* Looks now and then whether the wait should end: the peer is gone, or time is up. */
struct wait {
    uint64_t deadline_ns;
    uint64_t next_ns;
    uint32_t looks;
};

static bool may_wait(struct nep_perf_put_side *side, struct wait *wait, const char *what)
{
    side->transport->ops->progress(side->transport);
    if (++wait->looks % 1024 != 0) {
        return true;
    }
    sched_yield();
    uint64_t now_ns = nep_now_ns();
    if (wait->deadline_ns == 0) {
        wait->deadline_ns = nep_deadline_ns(side->config.timeout_ns);
        wait->next_ns = now_ns + 10 * NEP_MS;
    }
    if (now_ns >= wait->next_ns) {
        wait->next_ns = now_ns + 10 * NEP_MS;
        if (side->transport->ops->peer_status(side->transport, 1 - side->rank) != NEP_OK) {
            failed(side, what);
            return false;
        }
    }
    if (now_ns >= wait->deadline_ns) {
        nep_perf_error(NEP_PERF_FAILED, "waiting for %s: nothing came within NEP_TIMEOUT", what);
        return false;
    }
    return true;
}

/* The server's part of a bandwidth test: out of the way, if the transport gets on by itself. */
static bool wait_idly(struct nep_perf_put_side *side, uint32_t word, uint32_t times)
{
    struct wait wait = {0};
    bool is_helpless = (side->transport->ops->caps & NEP_CAP_THREAD) == 0 && !is_plain(side);
    while (arrived(side, word) < times) {
        if (!is_helpless) {
            usleep(1000);
            wait.looks += 1023;
        }
        if ((is_helpless || wait.looks % (1024 * 16) == 1023) &&
            !may_wait(side, &wait, "the end of the test")) {
            return false;
        }
    }
    return true;
}

static bool wait_word(struct nep_perf_put_side *side, uint32_t word, uint32_t times)
{
    struct wait wait = {0};
    while (arrived(side, word) < times) {
        if (!may_wait(side, &wait, "an announcement")) {
            return false;
        }
    }
    return true;
}

static bool wait_sent(struct nep_perf_put_side *side, uint64_t number)
{
    struct wait wait = {0};
    while (side->transport->ops->completed(side->transport, 1 - side->rank) < number) {
        if (!may_wait(side, &wait, "a completion")) {
            return false;
        }
    }
    return true;
}

static bool meet(struct nep_perf_put_side *side)
{
    char mine = 0, both[2];
    return nep_bootstrap_allgather(&side->bootstrap, &mine, both, 1, side->config.timeout_ns,
                                   "a step of put") == NEP_OK ||
           failed(side, "meeting") == -1;
}

/* ---- bandwidth ------------------------------------------------------------------------------ */

static void summarize_bw(const uint64_t *posted_ns, const uint64_t *done_ns, uint32_t iters,
                         uint32_t depth, struct nep_perf_put_result *result)
{
    double total_s = (double)(done_ns[iters - 1] - posted_ns[0]) / 1e9;
    uint32_t window = depth < iters ? depth : iters;
    for (uint32_t i = 0; i + window <= iters; i++) {
        double seconds = (double)(done_ns[i + window - 1] - posted_ns[i]) / 1e9;
        double rate = seconds > 0 ? (double)window * (double)result->size / seconds : 0;
        result->peak = rate > result->peak ? rate : result->peak;
    }
    result->messages = total_s > 0 ? iters / total_s : 0;
    result->average = result->messages * (double)result->size;
    result->peak = result->average > result->peak ? result->average : result->peak;
}

static bool send_all(struct nep_perf_put_side *side, uint64_t size, uint32_t iters,
                     uint64_t *posted_ns, uint64_t *done_ns)
{
    const struct nep_transport_ops *ops = side->transport->ops;
    uint64_t first = side->sent + 1;
    uint32_t num_posted = 0, num_done = 0;
    struct wait wait = {0};
    while (num_done < iters) {
        while (num_posted < iters && num_posted - num_done < side->options->depth) {
            posted_ns[num_posted++] = nep_now_ns();
            if (!post(side, 0, SLOT_TIMED, size, is_plain(side))) {
                return false;
            }
        }
        uint64_t completed = ops->completed(side->transport, 0);
        if (completed < first + num_done) {
            if (!may_wait(side, &wait, "a completion")) {
                return false;
            }
            continue;
        }
        uint64_t now_ns = nep_now_ns();
        wait.looks = 0;
        wait.deadline_ns = 0;
        while (num_done < num_posted && first + num_done <= completed) {
            done_ns[num_done++] = now_ns;
        }
    }
    return true;
}

static int measure_bw(struct nep_perf_put_side *side, struct nep_perf_put_result *result)
{
    uint32_t before = arrived(side, SLOT_DONE);
    uint32_t timed = arrived(side, SLOT_TIMED);
    if (!meet(side)) {
        return NEP_PERF_FAILED;
    }
    if (side->rank == 0) {
        /* What is announced may come after the last word: no order is promised. Plain writes are
         * complete before it is sent. */
        bool is_over = wait_idly(side, SLOT_DONE, before + 1) &&
                       (is_plain(side) || wait_idly(side, SLOT_TIMED, timed + result->iters));
        return is_over ? -1 : NEP_PERF_FAILED;
    }
    uint64_t *posted_ns = calloc(result->iters, sizeof *posted_ns);
    uint64_t *done_ns = calloc(result->iters, sizeof *done_ns);
    bool is_fine = posted_ns != NULL && done_ns != NULL &&
                   send_all(side, result->size, result->iters, posted_ns, done_ns);
    if (is_fine) {
        summarize_bw(posted_ns, done_ns, result->iters, side->options->depth, result);
        is_fine = post(side, 0, SLOT_DONE, 0, false) && wait_sent(side, side->sent);
    }
    free(posted_ns);
    free(done_ns);
    return is_fine ? -1 : NEP_PERF_FAILED;
}

/* ---- latency -------------------------------------------------------------------------------- */

static bool wait_turn(struct nep_perf_put_side *side, uint64_t size, uint32_t turn,
                      uint32_t words_before)
{
    struct wait wait = {0};
    uint32_t looks = 0;
    const atomic_uchar *last = (const atomic_uchar *)landing(side, 0) + size - 1;
    while (true) {
        /* A plain write is seen by its last byte, written last on an ordered connection. */
        bool is_here = is_plain(side)
                           ? atomic_load_explicit(last, memory_order_acquire) == (turn & 255)
                           : arrived(side, SLOT_TIMED) >= words_before + turn;
        if (is_here) {
            return true;
        }
        if ((!is_plain(side) || ++looks % 256 == 0) &&
            !may_wait(side, &wait, "the other side's turn")) {
            return false;
        }
    }
}

static int by_value(const void *a, const void *b)
{
    double left = *(const double *)a, right = *(const double *)b;
    return left < right ? -1 : left > right;
}

static void summarize_lat(double *us, uint32_t num, struct nep_perf_put_result *result)
{
    double sum = 0, squares = 0;
    qsort(us, num, sizeof *us, by_value);
    for (uint32_t i = 0; i < num; i++) {
        sum += us[i];
    }
    result->mean = sum / num;
    for (uint32_t i = 0; i < num; i++) {
        squares += (us[i] - result->mean) * (us[i] - result->mean);
    }
    result->stdev = num > 1 ? sqrt(squares / (num - 1)) : 0;
    result->min = us[0];
    result->max = us[num - 1];
    result->typical = us[num / 2];
    result->p99 = us[(uint64_t)num * 99 / 100];
    result->p999 = us[(uint64_t)num * 999 / 1000];
}

static int measure_lat(struct nep_perf_put_side *side, struct nep_perf_put_result *result)
{
    uint64_t size = result->size;
    uint32_t words_before = arrived(side, SLOT_TIMED);
    uint8_t *last = source(side, 0) + size - 1;
    landing(side, 0)[size - 1] = 0;
    double *us = calloc(result->iters, sizeof *us);
    if (us == NULL || !meet(side)) {
        free(us);
        return NEP_PERF_FAILED;
    }
    bool is_fine = true;
    uint64_t before_ns = nep_now_ns();
    for (uint32_t turn = 1; turn <= result->iters && is_fine; turn++) {
        if (side->rank == 0) {
            is_fine = wait_turn(side, size, turn, words_before);
        }
        *last = (uint8_t)turn;
        is_fine = is_fine && post(side, 0, SLOT_TIMED, size, is_plain(side));
        if (side->rank == 1 && is_fine) {
            is_fine = wait_turn(side, size, turn, words_before);
        }
        is_fine = is_fine && wait_sent(side, side->sent); /* the source is written again */
        uint64_t now_ns = nep_now_ns();
        us[turn - 1] = (double)(now_ns - before_ns) / 2e3;
        before_ns = now_ns;
    }
    if (is_fine && side->rank == 1) {
        summarize_lat(us, result->iters, result);
    }
    free(us);
    return is_fine ? -1 : NEP_PERF_FAILED;
}

/* ---- verification --------------------------------------------------------------------------- */

static uint8_t byte_of(uint64_t seed, uint32_t slot, uint64_t i)
{
    uint64_t mix = (seed * 0x9e3779b97f4a7c15ull) ^ ((uint64_t)slot << 32) ^ i;
    mix = (mix ^ (mix >> 33)) * 0xff51afd7ed558ccdull; /* the finaliser of MurmurHash3 (Appleby) */
    return (uint8_t)(mix >> 47);
}

/* Announced puts into all slots; the server compares every byte, also those after the message. */
static int verify(struct nep_perf_put_side *side, struct nep_perf_put_result *result)
{
    uint32_t before[NEP_PERF_PUT_SLOTS];
    uint64_t mine[2] = {0, 0}, both[4];
    for (uint32_t slot = 0; slot < side->num_slots; slot++) {
        before[slot] = arrived(side, slot);
        memset(landing(side, slot), 0xa5, side->max_size);
        for (uint64_t i = 0; side->rank == 1 && i < result->size; i++) {
            source(side, slot)[i] = byte_of(side->options->seed + result->size, slot, i);
        }
    }
    if (!meet(side)) { /* nobody puts before all is poisoned */
        return NEP_PERF_FAILED;
    }
    for (uint32_t slot = 0; side->rank == 1 && slot < side->num_slots; slot++) {
        if (!post(side, slot, slot, result->size, false)) {
            return NEP_PERF_FAILED;
        }
    }
    if (side->rank == 1 && !wait_sent(side, side->sent)) {
        return NEP_PERF_FAILED;
    }
    for (uint32_t slot = 0; side->rank == 0 && slot < side->num_slots; slot++) {
        if (!wait_word(side, slot, before[slot] + 1)) {
            return NEP_PERF_FAILED;
        }
        for (uint64_t i = 0; i < side->max_size; i++) {
            uint8_t right =
                i < result->size ? byte_of(side->options->seed + result->size, slot, i) : 0xa5;
            mine[1] += landing(side, slot)[i] != right;
        }
        mine[0] += result->size;
    }
    for (uint32_t slot = 0; side->rank == 0 && slot < side->num_slots; slot++) {
        mine[1] += arrived(side, slot) != before[slot] + 1;
    }
    if (nep_bootstrap_allgather(&side->bootstrap, mine, both, sizeof mine, side->config.timeout_ns,
                                "results of put") != NEP_OK) {
        return failed(side, "results");
    }
    result->verified = both[0] + both[2];
    result->wrong = both[1] + both[3];
    return -1;
}

int nep_perf_put_measure(struct nep_perf_put_side *side, uint64_t size,
                         struct nep_perf_put_result *result)
{
    *result = (struct nep_perf_put_result){.size = size,
                                           .iters = nep_perf_put_iters(side->options, size)};
    int rc = side->options->is_lat ? measure_lat(side, result) : measure_bw(side, result);
    if (rc == -1 && side->options->is_verified) {
        rc = verify(side, result);
    }
    return rc;
}
