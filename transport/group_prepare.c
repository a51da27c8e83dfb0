/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who is to be in a generation that is prepared: the lowest member collects the cards of all
 * members and of the newcomers that ask for seats, and says who is in. Nothing depends on this
 * being one decision: what was prepared is only used where a decision (group.c) finds that all have
 * it, under the same number.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/group_card.h"

static const uint64_t SLICE_NS = 20 * NEP_MS;

/* Cards of one that was given up do not get in the way of the next one's. */
static void card_name(char name[NEP_GROUP_KEY_BYTES], uint64_t number)
{
    snprintf(name, NEP_GROUP_KEY_BYTES, "prepare%u", (unsigned)(number % 8));
}

static void preparation_key(char key[NEP_GROUP_KEY_BYTES], uint64_t generation)
{
    snprintf(key, NEP_GROUP_KEY_BYTES, "nearep/prepared/%llu", (unsigned long long)generation);
}

bool nep_group_read_preparation(const struct nep_group_vote *vote, uint64_t generation,
                                uint64_t number, uint64_t timeout_ns,
                                struct nep_group_decision *decision)
{
    char key[NEP_GROUP_KEY_BYTES];
    preparation_key(key, generation);
    size_t bytes = nep_group_decision_bytes(vote->num_ranks);
    if (!nep_group_read(vote->store, key, decision, bytes, timeout_ns)) {
        return false;
    }
    if (decision->prepared >= number && decision->num_ranks == vote->num_ranks) {
        return true;
    }
    nep_group_pause(timeout_ns < NEP_MS ? timeout_ns : NEP_MS); /* it is there, and old */
    return false;
}

static uint32_t lowest(const struct nep_group_vote *vote)
{
    uint32_t r = 0;
    while (vote->was_live[r] == 0) {
        r++;
    }
    return r;
}

static enum nep_status check(uint64_t deadline_ns, const atomic_bool *is_cancelled,
                             const char *missing, uint32_t num)
{
    if (atomic_load(is_cancelled)) {
        return nep_fail(NEP_ERR_BROKEN, "what was prepared is not wanted any more");
    }
    return nep_left_ns(deadline_ns) != 0
               ? NEP_OK
               : nep_fail(NEP_ERR_TIMEOUT, "%s %u did not come to prepare in time", missing, num);
}

/* One look at the newcomers; those that ask for a seat take it. */
static void seat_newcomers(const struct nep_group_vote *vote, struct nep_group_decision *decision)
{
    for (uint32_t r = 0; r < vote->num_ranks; r++) {
        struct nep_group_card card;
        if (vote->was_live[r] == 0 && !nep_group_lives(decision, r) &&
            nep_group_read_card(vote->store, "here", vote->generation, r, NEP_MS, &card) &&
            card.is_new != 0) {
            nep_group_seat_take(decision, &card);
        }
    }
}

static enum nep_status collect(const struct nep_group_vote *vote, uint64_t number,
                               const atomic_bool *is_cancelled, uint64_t deadline_ns,
                               struct nep_group_decision *decision)
{
    enum nep_status status = NEP_OK;
    char what[NEP_GROUP_KEY_BYTES];
    card_name(what, number);
    for (uint32_t r = 0; r < vote->num_ranks; r++) {
        struct nep_group_card card;
        while (status == NEP_OK && vote->was_live[r] != 0 && !nep_group_lives(decision, r)) {
            if (nep_group_read_card(vote->store, what, vote->generation, r, SLICE_NS, &card) &&
                card.prepared == number) {
                nep_group_seat_take(decision, &card);
            }
            status = check(deadline_ns, is_cancelled, "rank", r);
        }
    }
    uint32_t num_members = decision->num_live;
    while (status == NEP_OK && decision->num_live - num_members < vote->num_new) {
        seat_newcomers(vote, decision);
        status = check(deadline_ns, is_cancelled, "newcomers: of so many some", vote->num_new);
    }
    return status;
}

/* Puts it, unless something newer stands there: this thread may be one that was given up. */
static enum nep_status publish(const struct nep_group_vote *vote, const char *key,
                               const struct nep_group_decision *decision, uint64_t deadline_ns)
{
    const struct nep_bootstrap *store = vote->store;
    size_t bytes = nep_group_decision_bytes(vote->num_ranks), len = 0;
    struct nep_group_decision *before = calloc(1, bytes), *after = calloc(1, bytes);
    enum nep_status status = NEP_OK;
    bool is_there = false;
    if (before == NULL || after == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "no memory for what is to be prepared");
    }
    while (status == NEP_OK) {
        if (store->cas(store->ctx, key, before, is_there ? bytes : 0, decision, bytes, after, bytes,
                       &len, nep_left_ns(deadline_ns)) != 0 ||
            len != bytes) {
            status = nep_fail(NEP_ERR_IO, "the store that was given at bootstrap refused what is "
                                          "to be prepared");
        } else if (after->prepared >= decision->prepared) {
            break;
        }
        is_there = true;
        memcpy(before, after, len == bytes ? bytes : 0);
    }
    free(before);
    free(after);
    return status;
}

enum nep_status nep_group_prepare(const struct nep_group_vote *vote, uint64_t number,
                                  uint32_t series, const atomic_bool *is_cancelled,
                                  struct nep_group_decision **decision_p)
{
    char key[NEP_GROUP_KEY_BYTES];
    uint64_t deadline_ns = nep_deadline_ns(vote->timeout_ns);
    struct nep_group_decision *decision = calloc(1, nep_group_decision_bytes(vote->num_ranks));
    if (decision == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for a decision about %u ranks",
                        vote->num_ranks);
    }
    preparation_key(key, vote->generation);
    char what[NEP_GROUP_KEY_BYTES];
    card_name(what, number);
    enum nep_status status = nep_group_put_card(vote, what, vote->generation, 0, number);
    if (status == NEP_OK && lowest(vote) == vote->rank) {
        nep_group_decision_init(decision, vote);
        decision->prepared = number;
        decision->series = series;
        status = collect(vote, number, is_cancelled, deadline_ns, decision);
        status = status == NEP_OK ? publish(vote, key, decision, deadline_ns) : status;
    } else {
        while (status == NEP_OK &&
               !nep_group_read_preparation(vote, vote->generation, number, SLICE_NS, decision)) {
            status = check(deadline_ns, is_cancelled, "the decision of rank", lowest(vote));
        }
        if (status == NEP_OK && decision->prepared != number) {
            status = nep_fail(NEP_ERR_BROKEN, "the others prepare something else meanwhile");
        }
    }
    if (status == NEP_OK) {
        *decision_p = decision;
    } else {
        free(decision);
    }
    return status;
}
