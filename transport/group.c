/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Each rank that comes puts a card with the generation that it wants and where its operations
 * stand. The lowest member that is not known to be gone collects the cards and proposes who lives;
 * compare-and-swap makes the first proposal the decision. A collector that dies is replaced by the
 * next member: two of them at once are harmless, which is why nobody has to elect one.
 *
 * This file is long because the exchange among the members shares keys, stamps and what is known of
 * their ends with the agreement.
 *
 * Rejected: a decision by majority. A group that lost more than half of its ranks may go on, and
 * the store already serialises everything.
 */
#include "transport/group.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"

enum { KEY_BYTES = 64, CHUNK_BYTES = 512 << 10, MOST_KEYS = 32768, GATHERS = 32 };

static const uint64_t SLICE_NS = 20 * NEP_MS, PEEK_NS = NEP_MS, GRACE_NS = 50 * NEP_MS,
                      WATCH_NS = 100 * NEP_MS;

struct card {
    uint64_t generation;
    uint32_t rank;
    uint32_t is_new;
    uint32_t suspect;
    uint32_t reserved;
    uint64_t machine;
    int64_t pid;
    uint64_t ticket; /* another in each card */
    struct nep_group_ops ops;
};

static void pause_ns(uint64_t ns)
{
    nanosleep(&(struct timespec){.tv_nsec = (long)ns}, NULL);
}

static size_t decision_bytes(uint32_t num_ranks)
{
    return sizeof(struct nep_group_decision) + num_ranks * sizeof(struct nep_group_seat);
}

/* A number that is the same where process ids mean the same processes. */
static uint64_t machine_id(void)
{
    char text[64] = "";
    struct stat pid_namespace = {.st_ino = 0};
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (file == NULL || fgets(text, sizeof text, file) == NULL ||
        stat("/proc/self/ns/pid", &pid_namespace) != 0) {
        text[0] = '\0';
    }
    if (file != NULL) {
        fclose(file);
    }
    uint64_t hash = 14695981039346656037ull ^ pid_namespace.st_ino;
    for (const char *c = text; *c != '\0'; c++) {
        hash = (hash ^ (uint8_t)*c) * 1099511628211ull;
    }
    return text[0] != '\0' ? hash : 0;
}

/* A key's value of exactly `bytes` bytes; false when it is not there in time, or is another size.
 */
static bool read_key(const struct nep_bootstrap *store, const char *key, void *value, size_t bytes,
                     uint64_t timeout_ns)
{
    size_t len = 0;
    return store->get(store->ctx, key, value, bytes, &len, timeout_ns) == 0 && len == bytes;
}

static void card_key(char key[KEY_BYTES], uint32_t rank)
{
    snprintf(key, KEY_BYTES, "nearep/here/%u", rank);
}

static bool read_card(const struct nep_bootstrap *store, uint64_t generation, uint32_t rank,
                      uint64_t timeout_ns, struct card *card)
{
    char key[KEY_BYTES];
    card_key(key, rank);
    if (!read_key(store, key, card, sizeof *card, timeout_ns)) {
        return false;
    }
    if (card->generation == generation && card->rank == rank) {
        return true;
    }
    pause_ns(timeout_ns < NEP_MS ? timeout_ns : NEP_MS); /* an old one: nothing was waited for */
    return false;
}

static bool read_decision(const struct nep_group_vote *vote, uint64_t generation,
                          uint64_t timeout_ns, struct nep_group_decision *decision)
{
    char key[KEY_BYTES];
    snprintf(key, sizeof key, "nearep/decision/%llu", (unsigned long long)generation);
    return read_key(vote->store, key, decision, decision_bytes(vote->num_ranks), timeout_ns) &&
           decision->generation == generation && decision->num_ranks == vote->num_ranks;
}

/* ---- collecting ----------------------------------------------------------------------------- */

struct collection {
    const struct nep_group_vote *vote;
    struct card *cards; /* [num_ranks] */
    uint8_t *is_here;   /* [num_ranks] */
    uint8_t *suspected; /* [num_ranks] */
};

static bool is_known_gone(const struct nep_group_vote *vote, uint32_t rank)
{
    return (vote->is_lost != NULL && vote->is_lost[rank] != 0) ||
           (vote->is_gone != NULL && vote->is_gone(vote->ctx, rank));
}

static void take_card(struct collection *from, uint32_t rank, uint64_t timeout_ns)
{
    struct card *card = &from->cards[rank];
    if (read_card(from->vote->store, from->vote->generation, rank, timeout_ns, card) &&
        (card->is_new != 0) == (from->vote->was_live[rank] == 0)) {
        from->is_here[rank] = 1;
        if (card->suspect < from->vote->num_ranks) {
            from->suspected[card->suspect] = 1;
        }
    }
}

/* One look at everybody who is not here. False: somebody who must come is missing. */
static bool look_round(struct collection *from, bool *suspects_p)
{
    const struct nep_group_vote *vote = from->vote;
    bool is_complete = true;
    uint32_t num_new = 0;
    *suspects_p = false;
    for (uint32_t r = 0; r < vote->num_ranks; r++) {
        bool is_member = vote->was_live[r] != 0;
        bool is_gone = is_member && !from->is_here[r] && is_known_gone(vote, r);
        if (!from->is_here[r]) {
            bool must_come = is_member && !is_gone && from->suspected[r] == 0;
            take_card(from, r, must_come ? SLICE_NS : PEEK_NS);
        }
        if (is_member && !is_gone && !from->is_here[r]) {
            is_complete &= from->suspected[r] != 0;
            *suspects_p |= from->suspected[r] != 0;
        }
        num_new += !is_member && from->is_here[r];
    }
    return is_complete && num_new >= vote->num_new;
}

static void propose(const struct collection *from, struct nep_group_decision *decision)
{
    const struct nep_group_vote *vote = from->vote;
    memset(decision, 0, decision_bytes(vote->num_ranks));
    decision->generation = vote->generation;
    decision->num_ranks = vote->num_ranks;
    memset(decision->ops.completed, 0xff, sizeof decision->ops.completed);
    for (uint32_t r = 0; r < vote->num_ranks; r++) {
        struct nep_group_seat *seat = &decision->seats[r];
        seat->node = vote->node_of_rank[r];
        seat->is_live = from->is_here[r];
        seat->machine = from->is_here[r] ? from->cards[r].machine : 0;
        seat->pid = from->is_here[r] ? from->cards[r].pid : 0;
        seat->ticket = from->is_here[r] ? from->cards[r].ticket : 0;
        decision->num_live += from->is_here[r];
        for (int i = 0; from->is_here[r] && vote->was_live[r] && i < NEP_GROUP_OPS; i++) {
            const struct nep_group_ops *ops = &from->cards[r].ops;
            uint64_t *next = &decision->ops.next[i], *completed = &decision->ops.completed[i];
            *next = ops->next[i] > *next ? ops->next[i] : *next;
            *completed = ops->completed[i] < *completed ? ops->completed[i] : *completed;
        }
    }
}

static enum nep_status collect(const struct nep_group_vote *vote, uint64_t deadline_ns,
                               struct nep_group_decision *decision)
{
    struct collection from = {.vote = vote,
                              .cards = calloc(vote->num_ranks, sizeof(struct card)),
                              .is_here = calloc(vote->num_ranks, 1),
                              .suspected = calloc(vote->num_ranks, 1)};
    if (from.cards == NULL || from.is_here == NULL || from.suspected == NULL) {
        free(from.cards);
        free(from.is_here);
        free(from.suspected);
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for the cards of %u ranks", vote->num_ranks);
    }
    bool suspects = false, is_made = false;
    uint64_t grace_ns = UINT64_MAX;
    while (!is_made && nep_left_ns(deadline_ns) != 0) {
        is_made = look_round(&from, &suspects);
        if (is_made && suspects) {
            /* Blamed, and perhaps only slow: it has a moment to come. */
            grace_ns = grace_ns == UINT64_MAX ? nep_deadline_ns(GRACE_NS) : grace_ns;
            is_made = nep_left_ns(grace_ns) == 0;
        }
    }
    propose(&from, decision);
    char key[KEY_BYTES];
    snprintf(key, sizeof key, "nearep/decision/%llu", (unsigned long long)vote->generation);
    size_t bytes = decision_bytes(vote->num_ranks), len = 0;
    /* Whatever stands there afterwards is the decision, mine or another's. */
    int failed = vote->store->cas(vote->store->ctx, key, "", 0, decision, bytes, decision, bytes,
                                  &len, vote->timeout_ns);
    free(from.cards);
    free(from.is_here);
    free(from.suspected);
    if (failed != 0 || len != bytes || decision->num_ranks != vote->num_ranks) {
        return nep_fail(NEP_ERR_IO, "the store that was given at bootstrap refused the decision "
                                    "about who lives: without it nobody can go on");
    }
    return NEP_OK;
}

/* ---- agreeing ------------------------------------------------------------------------------- */

/* The lowest member that may be expected to come. */
static uint32_t collector(const struct nep_group_vote *vote)
{
    uint32_t r = 0;
    while (r < vote->rank &&
           (vote->was_live[r] == 0 || r == vote->suspect || is_known_gone(vote, r))) {
        r++;
    }
    return r;
}

static enum nep_status put_card(const struct nep_group_vote *vote, uint64_t generation,
                                uint64_t ticket)
{
    struct card card = {.generation = generation,
                        .rank = vote->rank,
                        .is_new = vote->was_live == NULL,
                        .suspect = vote->suspect,
                        .machine = machine_id(),
                        .pid = getpid(),
                        .ticket = ticket,
                        .ops = vote->ops};
    char key[KEY_BYTES];
    card_key(key, vote->rank);
    if (vote->store->put(vote->store->ctx, key, &card, sizeof card, vote->timeout_ns) != 0) {
        return nep_fail(NEP_ERR_IO, "the store that was given at bootstrap is gone: without it "
                                    "nobody can agree on who lives");
    }
    return NEP_OK;
}

static enum nep_status member_agree(const struct nep_group_vote *vote,
                                    struct nep_group_decision *decision)
{
    enum nep_status status = put_card(vote, vote->generation, 0);
    /* Longer than a timeout: a member may wait that long in an exchange of the recovery that failed
     * before, and then it comes. */
    uint64_t late_ns = nep_deadline_ns(vote->timeout_ns / 4 * 5);
    uint64_t deadline_ns = nep_deadline_ns(vote->timeout_ns / 4 * 7);
    while (status == NEP_OK) {
        /* Late, anybody collects: the collector may be stuck without being known to be. */
        if (collector(vote) == vote->rank || nep_left_ns(late_ns) == 0) {
            return collect(vote, deadline_ns, decision);
        }
        if (read_decision(vote, vote->generation, SLICE_NS, decision)) {
            return NEP_OK;
        }
    }
    return status;
}

/* A number that no other process, and no other thread of this one, has. */
static uint64_t make_ticket(void)
{
    uint64_t words[] = {machine_id(), (uint64_t)getpid(), nep_now_ns(), (uintptr_t)&words};
    uint64_t hash = 14695981039346656037ull;
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        hash = (hash ^ words[i]) * 1099511628211ull;
        hash ^= hash >> 29;
    }
    return hash | 1;
}

/*
 * Asks for a seat in the generation after the last one that was decided, again and again. The seat
 * may have been given to one that asked for it before and died: that is not this rank's.
 */
static enum nep_status newcomer_agree(const struct nep_group_vote *vote,
                                      struct nep_group_decision *decision)
{
    uint64_t deadline_ns = nep_deadline_ns(vote->timeout_ns);
    enum nep_status status = NEP_OK;
    uint64_t asked = 0, generation = 1, ticket = make_ticket();
    while (status == NEP_OK && nep_left_ns(deadline_ns) != 0) {
        if (read_decision(vote, generation, asked == generation ? SLICE_NS : 2 * PEEK_NS,
                          decision)) {
            if (asked == generation && nep_group_lives(decision, vote->rank) &&
                decision->seats[vote->rank].ticket == ticket) {
                return NEP_OK;
            }
            generation++;
        } else if (asked != generation) {
            status = put_card(vote, generation, ticket);
            asked = generation;
        }
    }
    return status != NEP_OK ? status
                            : nep_fail(NEP_ERR_TIMEOUT,
                                       "rank %u asked for a seat in generation %llu, but the "
                                       "members did not call nep_comm_recover in time",
                                       vote->rank, (unsigned long long)generation);
}

enum nep_status nep_group_agree(const struct nep_group_vote *vote,
                                struct nep_group_decision **decision_p)
{
    struct nep_group_decision *decision = calloc(1, decision_bytes(vote->num_ranks));
    if (decision == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for a decision about %u ranks",
                        vote->num_ranks);
    }
    enum nep_status status =
        vote->was_live != NULL ? member_agree(vote, decision) : newcomer_agree(vote, decision);
    if (status == NEP_OK && !nep_group_lives(decision, vote->rank)) {
        status = nep_fail(NEP_ERR_PEER_LOST,
                          "generation %llu was decided without rank %u, which came too late or was "
                          "taken for lost: it may join again as a newcomer",
                          (unsigned long long)decision->generation, vote->rank);
    }
    if (status != NEP_OK) {
        free(decision);
        return status;
    }
    *decision_p = decision;
    return NEP_OK;
}

enum nep_status nep_group_newcomers(const struct nep_bootstrap *store, uint32_t num_ranks,
                                    const uint8_t *is_live, uint64_t generation, uint32_t *num_p)
{
    uint32_t num = 0;
    for (uint32_t r = 0; r < num_ranks; r++) {
        struct card card;
        num +=
            is_live[r] == 0 && read_card(store, generation, r, PEEK_NS, &card) && card.is_new != 0;
    }
    *num_p = num;
    return NEP_OK;
}

/* ---- the members' allgather ----------------------------------------------------------------- */

/* Before every part and every piece of a result: which gather it belongs to. */
struct stamp {
    uint64_t generation;
    uint64_t number;
};

enum { NOT_WATCHED = -1, HAS_ENDED = -2 }; /* instead of a pidfd */

static int watch(pid_t pid)
{
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    return fd >= 0 ? fd : errno == ESRCH ? HAS_ENDED : NOT_WATCHED;
}

enum nep_status nep_group_init(struct nep_group *group, const struct nep_bootstrap *store,
                               const struct nep_group_decision *decision, uint32_t rank)
{
    memset(group, 0, sizeof *group);
    group->store = *store;
    group->generation = decision->generation;
    group->num_ranks = decision->num_ranks;
    group->members = calloc(decision->num_live + 1, sizeof *group->members);
    group->pidfds = calloc(decision->num_live + 1, sizeof *group->pidfds);
    if (group->members == NULL || group->pidfds == NULL) {
        nep_group_fini(group);
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for %u members", decision->num_live);
    }
    for (uint32_t r = 0; r < decision->num_ranks && group->num < decision->num_live; r++) {
        if (nep_group_lives(decision, r)) {
            const struct nep_group_seat *seat = &decision->seats[r], *own = &decision->seats[rank];
            bool is_seen = seat->machine != 0 && seat->machine == own->machine &&
                           seat->pid != own->pid && seat->pid > 0;
            group->idx = r == rank ? group->num : group->idx;
            group->pidfds[group->num] = is_seen ? watch((pid_t)seat->pid) : NOT_WATCHED;
            group->members[group->num++] = r;
        }
    }
    return NEP_OK;
}

void nep_group_unwatch(struct nep_group *group)
{
    for (uint32_t m = 0; group->pidfds != NULL && m < group->num; m++) {
        if (group->pidfds[m] >= 0) {
            close(group->pidfds[m]);
        }
    }
    free(group->pidfds);
    group->pidfds = NULL;
}

static bool has_ended(const struct nep_group *group, uint32_t idx)
{
    struct pollfd pollfd = {.fd = group->pidfds[idx], .events = POLLIN};
    return pollfd.fd == HAS_ENDED || (pollfd.fd >= 0 && poll(&pollfd, 1, 0) > 0);
}

bool nep_group_saw_end(const struct nep_group *group, uint32_t rank)
{
    for (uint32_t m = 0; group->pidfds != NULL && m < group->num; m++) {
        if (group->members[m] == rank) {
            return has_ended(group, m);
        }
    }
    return false;
}

/* A member whose process is seen to have ended, or UINT32_MAX. */
static uint32_t ended_member(const struct nep_group *group)
{
    for (uint32_t m = 0; group->pidfds != NULL && m < group->num; m++) {
        if (has_ended(group, m)) {
            return group->members[m];
        }
    }
    return UINT32_MAX;
}

void nep_group_fini(struct nep_group *group)
{
    nep_group_unwatch(group);
    free(group->members);
    memset(group, 0, sizeof *group);
}

/*
 * Keys are used in turn, so that a store does not fill up. The stamp tells an old value: nobody is
 * more than one gather ahead of the first member, nor behind it.
 */
static void gather_key(const struct nep_group *group, const char *what, uint32_t idx,
                       char key[KEY_BYTES])
{
    uint64_t turns = MOST_KEYS / (group->num_ranks + 1);
    turns = turns < 8 ? 8 : turns > 512 ? 512 : turns;
    uint64_t turn = (group->generation * GATHERS + group->num_gathers) % turns;
    snprintf(key, KEY_BYTES, "nearep/%s/%llu/%u", what, (unsigned long long)turn, idx);
}

/* Whether what came is of this gather. *status_p: NEP_OK, or why not to go on. */
static bool is_due(const struct nep_group *group, const struct stamp *stamp, size_t len,
                   size_t bytes, enum nep_status *status_p)
{
    if (len < sizeof *stamp) {
        return false;
    }
    if (stamp->generation == group->generation && stamp->number == group->num_gathers) {
        *status_p =
            len == bytes
                ? NEP_OK
                : nep_fail(NEP_ERR_MISMATCH,
                           "the members exchange different things: %zu bytes here, %zu there",
                           bytes, len);
        return true;
    }
    if (stamp->generation > group->generation) {
        *status_p = nep_fail(NEP_ERR_PEER_LOST, "the others went on without this rank");
        return true;
    }
    return false;
}

/* Waits for the value of this gather; `bytes` with the stamp. */
static enum nep_status await(const struct nep_group *group, const char *key, void *value,
                             size_t bytes, uint64_t deadline_ns)
{
    uint64_t pause = NEP_MS / 10;
    while (nep_left_ns(deadline_ns) != 0) {
        size_t len = 0;
        uint64_t left_ns = nep_left_ns(deadline_ns);
        enum nep_status status = NEP_OK;
        if (group->store.get(group->store.ctx, key, value, bytes, &len,
                             left_ns < WATCH_NS ? left_ns : WATCH_NS) == 0) {
            if (is_due(group, value, len, bytes, &status)) {
                return status;
            }
            pause_ns(pause);
            pause = pause < 5 * NEP_MS ? pause * 2 : pause;
        }
        uint32_t ended = ended_member(group);
        if (ended != UINT32_MAX) {
            return nep_fail(NEP_ERR_PEER_LOST, "the process of rank %u ended meanwhile", ended);
        }
    }
    return nep_fail(NEP_ERR_TIMEOUT, "%s", key);
}

static enum nep_status send(const struct nep_group *group, const char *key, const void *value,
                            size_t bytes, uint64_t deadline_ns)
{
    return group->store.put(group->store.ctx, key, value, bytes, nep_left_ns(deadline_ns)) == 0
               ? NEP_OK
               : nep_fail(NEP_ERR_IO, "the store that was given at bootstrap refused %zu bytes",
                          bytes);
}

/* The first member's work: every part, then the whole in pieces. */
static enum nep_status lead(const struct nep_group *group, struct stamp *room, size_t bytes,
                            uint8_t *out, uint64_t deadline_ns)
{
    char key[KEY_BYTES];
    for (uint32_t m = 1; m < group->num; m++) {
        gather_key(group, "part", group->members[m], key);
        enum nep_status status = await(group, key, room, sizeof *room + bytes, deadline_ns);
        if (status != NEP_OK) {
            return status == NEP_ERR_TIMEOUT
                       ? nep_fail(status,
                                  "rank %u did not come to exchange %llu of generation "
                                  "%llu in time",
                                  group->members[m], (unsigned long long)group->num_gathers,
                                  (unsigned long long)group->generation)
                       : status;
        }
        memcpy(out + m * bytes, room + 1, bytes);
    }
    size_t total = bytes * group->num;
    enum nep_status status = NEP_OK;
    for (size_t at = 0, piece = 0; status == NEP_OK && at < total; at += CHUNK_BYTES, piece++) {
        size_t len = total - at < CHUNK_BYTES ? total - at : CHUNK_BYTES;
        *room = (struct stamp){group->generation, group->num_gathers};
        memcpy(room + 1, out + at, len);
        gather_key(group, "all", (uint32_t)piece, key);
        status = send(group, key, room, sizeof *room + len, deadline_ns);
    }
    return status;
}

static enum nep_status take_part(const struct nep_group *group, struct stamp *room, size_t bytes,
                                 uint8_t *out, uint64_t deadline_ns)
{
    char key[KEY_BYTES];
    gather_key(group, "part", group->members[group->idx], key);
    enum nep_status status = send(group, key, room, sizeof *room + bytes, deadline_ns);
    size_t total = bytes * group->num;
    for (size_t at = 0, piece = 0; status == NEP_OK && at < total; at += CHUNK_BYTES, piece++) {
        size_t len = total - at < CHUNK_BYTES ? total - at : CHUNK_BYTES;
        gather_key(group, "all", (uint32_t)piece, key);
        status = await(group, key, room, sizeof *room + len, deadline_ns);
        memcpy(out + at, room + 1, status == NEP_OK ? len : 0);
    }
    return status != NEP_ERR_TIMEOUT
               ? status
               : nep_fail(status,
                          "exchange %llu of generation %llu did not end in time: rank %u, which "
                          "leads it, or a rank that it waits for is gone",
                          (unsigned long long)group->num_gathers,
                          (unsigned long long)group->generation, group->members[0]);
}

static int group_allgather(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns)
{
    struct nep_group *group = ctx;
    if (group->num == 1) {
        memcpy(out, in, bytes);
        return 0;
    }
    uint64_t deadline_ns = nep_deadline_ns(timeout_ns);
    size_t cap = bytes > CHUNK_BYTES ? bytes : CHUNK_BYTES;
    cap = cap < bytes * group->num ? cap : bytes * group->num;
    struct stamp *room = malloc(sizeof *room + cap);
    if (room == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory to exchange %zu bytes", bytes);
    }
    *room = (struct stamp){group->generation, group->num_gathers};
    memcpy(room + 1, in, bytes);
    memcpy((uint8_t *)out + group->idx * bytes, in, bytes);
    enum nep_status status = group->idx == 0 ? lead(group, room, bytes, out, deadline_ns)
                                             : take_part(group, room, bytes, out, deadline_ns);
    free(room);
    group->num_gathers++;
    return status;
}

static int group_put(void *ctx, const char *key, const void *value, size_t len, uint64_t timeout_ns)
{
    const struct nep_group *group = ctx;
    return group->store.put(group->store.ctx, key, value, len, timeout_ns);
}

static int group_get(void *ctx, const char *key, void *value, size_t cap, size_t *len_p,
                     uint64_t timeout_ns)
{
    const struct nep_group *group = ctx;
    return group->store.get(group->store.ctx, key, value, cap, len_p, timeout_ns);
}

static int group_cas(void *ctx, const char *key, const void *expected, size_t expected_len,
                     const void *desired, size_t desired_len, void *result, size_t cap,
                     size_t *len_p, uint64_t timeout_ns)
{
    const struct nep_group *group = ctx;
    return group->store.cas(group->store.ctx, key, expected, expected_len, desired, desired_len,
                            result, cap, len_p, timeout_ns);
}

void nep_group_bootstrap(struct nep_group *group, struct nep_bootstrap *out)
{
    *out = (struct nep_bootstrap){.size = sizeof *out,
                                  .ctx = group,
                                  .allgather = group_allgather,
                                  .put = group_put,
                                  .get = group_get,
                                  .cas = group_cas};
}

bool nep_group_is(const struct nep_bootstrap *bootstrap)
{
    return bootstrap->allgather == group_allgather;
}
