/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Puts that the adversary holds. Each has a time at which its next step is due: a part of its
 * bytes, the announcement, or all of that again. Steps are done without the lock, by the thread or
 * by a call of progress, whoever comes first.
 *
 * The source bytes are read when they are sent, not when they are posted: a caller who touches them
 * before completed() allows it sends wrong bytes and is found out.
 *
 * Rejected: a queue per peer with a shuffled order. It delays nobody across peers, and the cases
 * that the model (tests/model) finds dangerous are those in which one rank is far ahead of another.
 */
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/adversary.h"

enum {
    PART_BYTES = 2048, /* puts of less than twice that stay whole */
    MAX_PARTS = 8,
    MAX_REPEATS = 2,
};

/* ThreadSanitizer takes it for a race when bytes are written again, equal, while a reader looks. */
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define WRITES_AGAIN 0
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define WRITES_AGAIN 0
#endif
#ifndef WRITES_AGAIN
#define WRITES_AGAIN 1
#endif

/* splitmix64 (Steele, Lea, Flood). */
static uint64_t next_random(struct nep_adversary *adversary)
{
    uint64_t z = adversary->random += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

/* Mostly short, sometimes long: so a put is mostly a little, and sometimes far, out of order. */
static uint64_t random_delay_ns(struct nep_adversary *adversary)
{
    uint64_t pick = next_random(adversary) % 1000;
    uint64_t most_ns = pick < 500 ? 0 : pick < 900 ? NEP_MS / 10 : pick < 995 ? NEP_MS : 5 * NEP_MS;
    return most_ns == 0 ? 0 : next_random(adversary) % most_ns;
}

enum nep_status nep_adversary_hold(struct nep_adversary *adversary, const struct nep_put *put,
                                   uint64_t *number_p)
{
    struct nep_adversary_held *held = calloc(1, sizeof *held);
    if (held == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "adversary: no memory to hold a put");
    }
    held->put = *put;
    held->num_parts = 1;
    pthread_mutex_lock(&adversary->lock);
    uint64_t random = next_random(adversary);
    if (adversary->is_mapped && put->len >= 2 * PART_BYTES) {
        uint32_t most = put->len / PART_BYTES;
        held->num_parts = 1 + (uint32_t)(random % (most < MAX_PARTS ? most : MAX_PARTS));
    }
    held->parts_left = (1u << held->num_parts) - 1;
    /* One in eight comes twice, one in 64 three times. */
    held->num_repeats = (random >> 32 & 7) != 0 ? 0 : (random >> 35 & 7) != 0 ? 1 : MAX_REPEATS;
    held->due_ns = nep_now_ns() + random_delay_ns(adversary);
    held->number = ++adversary->lanes[put->dst].issued;
    held->next = adversary->held;
    adversary->held = held;
    adversary->num_puts++;
    adversary->put_bytes += put->len;
    *number_p = held->number;
    pthread_cond_broadcast(&adversary->changed);
    pthread_mutex_unlock(&adversary->lock);
    return NEP_OK;
}

/* ---- one step, without the lock ------------------------------------------------------------- */

static void copy_part(struct nep_adversary *adversary, struct nep_adversary_held *held,
                      uint64_t random)
{
    uint32_t bits = held->parts_left;
    for (uint64_t skip = random % (uint32_t)__builtin_popcount(bits); skip > 0; skip--) {
        bits &= bits - 1;
    }
    uint32_t part = (uint32_t)__builtin_ctz(bits);
    held->parts_left &= ~(1u << part);
    uint8_t *base =
        adversary->inner->ops->peer_window(adversary->inner, held->put.window, held->put.dst);
    uint64_t from = (uint64_t)held->put.len * part / held->num_parts;
    uint64_t to = (uint64_t)held->put.len * (part + 1) / held->num_parts;
    if (base != NULL) {
        memcpy(base + held->put.offset + from, (const uint8_t *)held->put.src + from, to - from);
    }
}

static void step(struct nep_adversary *adversary, struct nep_adversary_held *held, uint64_t random)
{
    struct nep_put put = held->put;
    if (adversary->is_mapped) {
        if (put.len != 0 && (held->num_sent == 0 || WRITES_AGAIN)) {
            copy_part(adversary, held, random);
            if (held->parts_left != 0) {
                return;
            }
        }
        put.len = 0; /* the bytes are there: what is left is to announce them */
    } else if (held->num_sent > 0) {
        /* completed() there says that the source is free, not that a repeat has landed: bytes
         * could be written over those of the slot's next owner. pick_due has seen that the put
         * itself is complete, so that its announcement does not come again before its bytes. */
        put.len = 0;
    }
    /* The sink's release covers parts that other threads copied: they passed `held` on under the
     * lock. */
    if (adversary->inner->ops->put(adversary->inner, &put, &held->inner) != NEP_OK) {
        nep_debug("adversary: a put to rank %u failed: %s", put.dst, nep_last_message());
        held->num_repeats = held->num_sent; /* peer_status tells why */
        held->inner = 0;
    }
    held->num_sent++;
    held->parts_left = (1u << held->num_parts) - 1;
}

/* ---- under the lock ------------------------------------------------------------------------- */

static void step_locked(struct nep_adversary *adversary, struct nep_adversary_held *held)
{
    uint64_t random = next_random(adversary);
    held->is_busy = true;
    pthread_mutex_unlock(&adversary->lock);
    step(adversary, held, random);
    pthread_mutex_lock(&adversary->lock);
    held->is_busy = false;
    held->is_posted = held->num_sent > held->num_repeats;
    held->due_ns = nep_now_ns() + random_delay_ns(adversary);
    pthread_cond_broadcast(&adversary->changed);
}

/* completed(dst) passes a put once it and all earlier ones to dst are done. */
static void update_lane(struct nep_adversary *adversary, uint32_t dst)
{
    struct nep_adversary_lane *lane = &adversary->lanes[dst];
    uint64_t least = lane->issued + 1;
    for (const struct nep_adversary_held *held = adversary->held; held != NULL; held = held->next) {
        if (held->put.dst == dst && held->number < least) {
            least = held->number;
        }
    }
    lane->completed = least - 1;
}

/* Lets go of puts that the inner fabric has let go of. */
static void reap(struct nep_adversary *adversary)
{
    for (struct nep_adversary_held **at = &adversary->held; *at != NULL;) {
        struct nep_adversary_held *held = *at;
        uint32_t dst = held->put.dst;
        if (!held->is_posted ||
            adversary->inner->ops->completed(adversary->inner, dst) < held->inner) {
            at = &held->next;
            continue;
        }
        *at = held->next;
        adversary->num_repeats += held->num_sent - 1;
        free(held);
        update_lane(adversary, dst);
    }
}

/* Whether it may be sent now, or sent again. */
static bool may_step(const struct nep_adversary *adversary, const struct nep_adversary_held *held)
{
    const struct nep_transport *inner = adversary->inner;
    return !held->is_busy && !held->is_posted &&
           (adversary->is_mapped || held->num_sent == 0 ||
            inner->ops->completed(adversary->inner, held->put.dst) >= held->inner);
}

/* One that is due and in nobody's hands, any of them. */
static struct nep_adversary_held *pick_due(struct nep_adversary *adversary, uint64_t *next_ns_p)
{
    struct nep_adversary_held *due = NULL;
    uint64_t now_ns = nep_now_ns();
    uint32_t num_due = 0;
    *next_ns_p = UINT64_MAX;
    for (struct nep_adversary_held *held = adversary->held; held != NULL; held = held->next) {
        if (!may_step(adversary, held)) {
            continue;
        }
        if (held->due_ns > now_ns) {
            *next_ns_p = held->due_ns < *next_ns_p ? held->due_ns : *next_ns_p;
        } else if (next_random(adversary) % ++num_due == 0) {
            due = held;
        }
    }
    return due;
}

uint64_t nep_adversary_deliver(struct nep_adversary *adversary)
{
    uint64_t next_ns;
    for (struct nep_adversary_held *held = pick_due(adversary, &next_ns); held != NULL;
         held = pick_due(adversary, &next_ns)) {
        step_locked(adversary, held);
    }
    reap(adversary);
    return next_ns;
}

static void nap_until(struct nep_adversary *adversary, uint64_t until_ns)
{
    struct timespec until = {(time_t)(until_ns / NEP_S), (long)(until_ns % NEP_S)};
    pthread_cond_timedwait(&adversary->changed, &adversary->lock, &until);
}

void nep_adversary_flush(struct nep_adversary *adversary, uint32_t window)
{
    uint64_t deadline_ns = nep_deadline_ns(NEP_S);
    pthread_mutex_lock(&adversary->lock);
    for (bool is_over = false; !is_over;) {
        struct nep_adversary_held *ready = NULL;
        is_over = true;
        for (struct nep_adversary_held *held = adversary->held; held != NULL; held = held->next) {
            if (!held->is_posted && (window == UINT32_MAX || held->put.window == window)) {
                is_over = false;
                ready = may_step(adversary, held) ? held : ready;
            }
        }
        if (ready != NULL) {
            step_locked(adversary, ready);
        } else if (!is_over) {
            nap_until(adversary, nep_now_ns() + NEP_MS);
        }
        is_over = is_over || nep_left_ns(deadline_ns) == 0;
    }
    reap(adversary);
    pthread_mutex_unlock(&adversary->lock);
}

/* A busy one is in another thread's hands, num_sent with it: it is not looked into. */
static bool waits_for_inner(const struct nep_adversary *adversary)
{
    for (const struct nep_adversary_held *held = adversary->held; held != NULL; held = held->next) {
        if (held->is_posted || (!held->is_busy && held->num_sent > 0)) {
            return true;
        }
    }
    return false;
}

void *nep_adversary_main(void *arg)
{
    struct nep_adversary *adversary = arg;
    pthread_mutex_lock(&adversary->lock);
    while (!adversary->is_closing) {
        uint64_t next_ns = nep_adversary_deliver(adversary);
        bool is_waiting = waits_for_inner(adversary);
        if (is_waiting) {
            pthread_mutex_unlock(&adversary->lock);
            adversary->inner->ops->progress(adversary->inner);
            pthread_mutex_lock(&adversary->lock);
        }
        /* What was posted meanwhile has a time of its own: look again soon in any case. */
        uint64_t nap_ns = nep_now_ns() + NEP_MS / (is_waiting ? 10 : 1);
        if (!adversary->is_closing && (adversary->held == NULL || next_ns > nep_now_ns())) {
            nap_until(adversary, adversary->held == NULL ? nep_now_ns() + NEP_S
                                 : next_ns < nap_ns      ? next_ns
                                                         : nap_ns);
        }
    }
    pthread_mutex_unlock(&adversary->lock);
    return NULL;
}
