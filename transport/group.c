/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Each rank that comes puts a card with the generation that it wants and where its operations
 * stand. The lowest member that is not known to be gone collects the cards and proposes who lives;
 * compare-and-swap makes the first proposal the decision. A collector that dies is replaced by the
 * next member: two of them at once are harmless, which is why nobody has to elect one.
 *
 * Rejected: a decision by majority. A group that lost more than half of its ranks may go on, and
 * the store already serialises everything.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/group_card.h"

enum { KEY_BYTES = NEP_GROUP_KEY_BYTES };

static const uint64_t SLICE_NS = 20 * NEP_MS, LONGEST_NS = 80 * NEP_MS, PEEK_NS = NEP_MS,
                      GRACE_NS = 50 * NEP_MS, LONGEST_GRACE_NS = 500 * NEP_MS,
                      LATE_NEW_NS = 500 * NEP_MS;
static const char HERE[] = "here";

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

bool nep_group_read(const struct nep_bootstrap *store, const char *key, void *value, size_t bytes,
                    uint64_t timeout_ns)
{
    size_t len = 0;
    return store->get(store->ctx, key, value, bytes, &len, timeout_ns) == 0 && len == bytes;
}

static void card_key(char key[KEY_BYTES], const char *what, uint32_t rank)
{
    snprintf(key, KEY_BYTES, "nearep/%s/%u", what, rank);
}

/* A newcomer that died leaves its card behind. Seen where it ran on this machine. */
static bool is_left_behind(const struct nep_group_card *card)
{
    if (card->is_new == 0 || card->machine == 0 || card->pid <= 0 || card->pid == getpid() ||
        card->machine != machine_id()) {
        return false;
    }
    int fd = nep_group_watch((pid_t)card->pid);
    bool has_ended = nep_group_has_ended(fd);
    if (fd >= 0) {
        close(fd);
    }
    return has_ended;
}

bool nep_group_read_card(const struct nep_bootstrap *store, const char *what, uint64_t generation,
                         uint32_t rank, uint64_t timeout_ns, struct nep_group_card *card)
{
    char key[KEY_BYTES];
    card_key(key, what, rank);
    if (!nep_group_read(store, key, card, sizeof *card, timeout_ns)) {
        return false;
    }
    if (card->generation == generation && card->rank == rank && !is_left_behind(card)) {
        return true;
    }
    /* An old one: nothing was waited for. */
    nep_group_pause(timeout_ns < NEP_MS ? timeout_ns : NEP_MS);
    return false;
}

enum nep_status nep_group_put_card(const struct nep_group_vote *vote, const char *what,
                                   uint64_t generation, uint64_t ticket, uint64_t prepared)
{
    struct nep_group_card card = {.generation = generation,
                                  .rank = vote->rank,
                                  .is_new = vote->was_live == NULL,
                                  .suspect = vote->suspect,
                                  .machine = machine_id(),
                                  .pid = getpid(),
                                  .ticket = ticket,
                                  .prepared = prepared,
                                  .ops = vote->ops};
    char key[KEY_BYTES];
    card_key(key, what, vote->rank);
    if (vote->store->put(vote->store->ctx, key, &card, sizeof card, vote->timeout_ns) != 0) {
        return nep_fail(NEP_ERR_IO, "the store that was given at bootstrap is gone: without it "
                                    "nobody can agree on who lives");
    }
    return NEP_OK;
}

void nep_group_decision_init(struct nep_group_decision *decision, const struct nep_group_vote *vote)
{
    memset(decision, 0, nep_group_decision_bytes(vote->num_ranks));
    decision->generation = vote->generation;
    decision->num_ranks = vote->num_ranks;
    memset(decision->ops.completed, 0xff, sizeof decision->ops.completed);
    for (uint32_t r = 0; r < vote->num_ranks; r++) {
        decision->seats[r].node = vote->node_of_rank[r];
    }
}

void nep_group_seat_take(struct nep_group_decision *decision, const struct nep_group_card *card)
{
    struct nep_group_seat *seat = &decision->seats[card->rank];
    seat->is_live = 1;
    seat->machine = card->machine;
    seat->pid = card->pid;
    seat->ticket = card->ticket;
    decision->num_live++;
    for (int i = 0; card->is_new == 0 && i < NEP_GROUP_OPS; i++) {
        const struct nep_group_ops *ops = &card->ops;
        uint64_t *next = &decision->ops.next[i], *completed = &decision->ops.completed[i];
        *next = ops->next[i] > *next ? ops->next[i] : *next;
        *completed = ops->completed[i] < *completed ? ops->completed[i] : *completed;
    }
}

static bool read_decision(const struct nep_group_vote *vote, uint64_t generation,
                          uint64_t timeout_ns, struct nep_group_decision *decision)
{
    char key[KEY_BYTES];
    snprintf(key, sizeof key, "nearep/decision/%llu", (unsigned long long)generation);
    return nep_group_read(vote->store, key, decision, nep_group_decision_bytes(vote->num_ranks),
                          timeout_ns) &&
           decision->generation == generation && decision->num_ranks == vote->num_ranks;
}

/* ---- collecting ----------------------------------------------------------------------------- */

struct collection {
    const struct nep_group_vote *vote;
    struct nep_group_card *cards; /* [num_ranks] */
    uint8_t *is_here;             /* [num_ranks] */
    uint8_t *suspected;           /* [num_ranks] */
};

static bool is_known_gone(const struct nep_group_vote *vote, uint32_t rank)
{
    return (vote->is_lost != NULL && vote->is_lost[rank] != 0) ||
           (vote->is_gone != NULL && vote->is_gone(vote->ctx, rank));
}

static void take_card(struct collection *from, uint32_t rank, uint64_t timeout_ns)
{
    struct nep_group_card *card = &from->cards[rank];
    const struct nep_group_vote *vote = from->vote;
    if (nep_group_read_card(vote->store, HERE, vote->generation, rank, timeout_ns, card) &&
        (card->is_new != 0) == (vote->was_live[rank] == 0)) {
        from->is_here[rank] = 1;
        if (card->suspect < vote->num_ranks) {
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
    /* Those that are prepared for are waited for separately. */
    return is_complete && (num_new >= vote->num_new || vote->prepared != 0);
}

static bool is_idle(const struct nep_group_card *card, const struct nep_group_ops *ops)
{
    return memcmp(card->ops.next, ops->next, sizeof ops->next) == 0 &&
           memcmp(card->ops.completed, ops->next, sizeof ops->next) == 0;
}

/* Whether a newcomer is here with what was prepared, knowing where operations stand. */
static bool is_prepared(const struct collection *from, uint32_t rank)
{
    const struct nep_group_vote *vote = from->vote;
    const struct nep_group_card *card = &from->cards[rank];
    return from->is_here[rank] && card->prepared == vote->prepared &&
           card->ticket == vote->preparation->seats[rank].ticket && is_idle(card, &vote->ops);
}

/* What all members have prepared, with no operation under way; 0: they have not. */
static uint64_t prepared_by_members(const struct collection *from)
{
    const struct nep_group_vote *vote = from->vote;
    for (uint32_t r = 0; vote->prepared != 0 && r < vote->num_ranks; r++) {
        const struct nep_group_card *card = &from->cards[r];
        if (vote->was_live[r] != 0 &&
            (!from->is_here[r] || card->prepared != vote->prepared || !is_idle(card, &vote->ops))) {
            return 0;
        }
    }
    return vote->prepared;
}

/* Looks again at newcomers that have not yet said that they are prepared. False: some have not. */
static bool look_at_prepared(struct collection *from)
{
    const struct nep_group_vote *vote = from->vote;
    bool is_complete = true;
    for (uint32_t r = 0; r < vote->num_ranks; r++) {
        if (vote->was_live[r] == 0 && nep_group_lives(vote->preparation, r)) {
            if (!is_prepared(from, r)) {
                from->is_here[r] = 0;
                take_card(from, r, PEEK_NS);
            }
            is_complete &= is_prepared(from, r);
        }
    }
    return is_complete;
}

static void propose(const struct collection *from, struct nep_group_decision *decision)
{
    const struct nep_group_vote *vote = from->vote;
    uint64_t prepared = prepared_by_members(from);
    bool is_kept = false;
    for (uint32_t r = 0; prepared != 0 && r < vote->num_ranks; r++) {
        bool is_newcomer = vote->was_live[r] == 0 && nep_group_lives(vote->preparation, r);
        is_kept |= is_newcomer && !is_prepared(from, r);
    }
    nep_group_decision_init(decision, vote);
    decision->prepared = is_kept ? NEP_GROUP_KEPT : prepared;
    decision->series = prepared != 0 && !is_kept ? vote->preparation->series : 0;
    for (uint32_t r = 0; r < vote->num_ranks; r++) {
        bool is_in = vote->was_live[r] != 0 || prepared == 0 ||
                     (!is_kept && nep_group_lives(vote->preparation, r));
        if (is_in && from->is_here[r]) {
            nep_group_seat_take(decision, &from->cards[r]);
        }
    }
    for (int i = 0; i < NEP_GROUP_OPS; i++) {
        /* Nobody who is left has worked: there is nothing to be done again. */
        uint64_t *completed = &decision->ops.completed[i], next = decision->ops.next[i];
        *completed = *completed > next ? next : *completed;
    }
}

/*
 * How long one that is blamed, and perhaps only slow, may still come when all others are here: it
 * was told, and puts its card when it next looks. On a busy machine that takes as long as with the
 * others.
 */
static uint64_t grace_ns_after(uint64_t took_ns)
{
    uint64_t ns = 2 * took_ns > GRACE_NS ? 2 * took_ns : GRACE_NS;
    return ns < LONGEST_GRACE_NS ? ns : LONGEST_GRACE_NS;
}

static enum nep_status collect(const struct nep_group_vote *vote, uint64_t deadline_ns,
                               struct nep_group_decision *decision)
{
    struct collection from = {.vote = vote,
                              .cards = calloc(vote->num_ranks, sizeof(struct nep_group_card)),
                              .is_here = calloc(vote->num_ranks, 1),
                              .suspected = calloc(vote->num_ranks, 1)};
    if (from.cards == NULL || from.is_here == NULL || from.suspected == NULL) {
        free(from.cards);
        free(from.is_here);
        free(from.suspected);
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for the cards of %u ranks", vote->num_ranks);
    }
    bool suspects = false, is_made = false;
    uint64_t begin_ns = nep_now_ns(), grace_ns = UINT64_MAX;
    while (!is_made && nep_left_ns(deadline_ns) != 0) {
        is_made = look_round(&from, &suspects);
        if (is_made && suspects) {
            grace_ns = grace_ns == UINT64_MAX
                           ? nep_deadline_ns(grace_ns_after(nep_now_ns() - begin_ns))
                           : grace_ns;
            is_made = nep_left_ns(grace_ns) == 0;
        }
    }
    uint64_t late_ns = nep_deadline_ns(LATE_NEW_NS);
    while (prepared_by_members(&from) != 0 && !look_at_prepared(&from) &&
           nep_left_ns(late_ns) != 0) {
    }
    propose(&from, decision);
    char key[KEY_BYTES];
    snprintf(key, sizeof key, "nearep/decision/%llu", (unsigned long long)vote->generation);
    size_t bytes = nep_group_decision_bytes(vote->num_ranks), len = 0;
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

static enum nep_status member_agree(const struct nep_group_vote *vote,
                                    struct nep_group_decision *decision)
{
    enum nep_status status = nep_group_put_card(vote, HERE, vote->generation, 0, vote->prepared);
    /* Longer than a timeout: a member may wait that long in an exchange of the recovery that failed
     * before, and then it comes. */
    uint64_t late_ns = nep_deadline_ns(vote->timeout_ns / 4 * 5);
    uint64_t deadline_ns = nep_deadline_ns(vote->timeout_ns / 4 * 7);
    uint64_t slice_ns = SLICE_NS; /* longer and longer: what many ask is in the collector's way */
    while (status == NEP_OK) {
        /* Late, anybody collects: the collector may be stuck without being known to be. */
        if (collector(vote) == vote->rank || nep_left_ns(late_ns) == 0) {
            return collect(vote, deadline_ns, decision);
        }
        if (read_decision(vote, vote->generation, slice_ns, decision)) {
            return NEP_OK;
        }
        slice_ns = slice_ns < LONGEST_NS ? slice_ns * 2 : slice_ns;
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

/* A newcomer on its way to a seat. */
struct asking {
    const struct nep_group_vote *vote;
    uint64_t generation; /* the first that is not decided, as far as is known */
    uint64_t asked;      /* in which a seat was asked for */
    uint64_t ticket;
    uint64_t number; /* of what is prepared, or was last */
    uint64_t deadline_ns;
    bool is_preparing;
    bool has_answered; /* said that it is prepared, to members that want to change over */
    struct nep_group_decision *preparation;
};

static void drop_prepared(struct asking *asking)
{
    if (asking->is_preparing) {
        asking->vote->preparer->drop(asking->vote->ctx);
    }
    asking->is_preparing = asking->has_answered = false;
}

static bool is_seated(const struct asking *asking, const struct nep_group_decision *decision)
{
    return nep_group_lives(decision, asking->vote->rank) &&
           decision->seats[asking->vote->rank].ticket == asking->ticket;
}

/* The last preparation that was decided is begun, if this rank is in it; an earlier one is not of
 * use any more. */
static void find_preparation(struct asking *asking)
{
    const struct nep_group_vote *vote = asking->vote;
    struct nep_group_decision *found = asking->preparation;
    if (!nep_group_read_preparation(vote, asking->generation, asking->number + 1, PEEK_NS, found)) {
        return;
    }
    drop_prepared(asking);
    asking->number = found->prepared;
    asking->is_preparing = is_seated(asking, found);
    if (asking->is_preparing) {
        vote->preparer->begin(vote->ctx, asking->number, found);
    }
}

/* Members that change over say so in their cards, with the operations that they are at. */
static enum nep_status answer_members(struct asking *asking)
{
    struct nep_group_vote vote = *asking->vote;
    struct nep_group_card card;
    for (uint32_t r = 0; r < vote.num_ranks && !asking->has_answered; r++) {
        if (r != vote.rank && nep_group_lives(asking->preparation, r) &&
            nep_group_read_card(vote.store, HERE, asking->generation, r, PEEK_NS, &card) &&
            card.is_new == 0 && card.prepared == asking->number) {
            vote.preparer->set_ops(vote.ctx, &card.ops);
            vote.ops = card.ops;
            asking->has_answered = true;
            /* They count on it now, and decide soon: it is not to give up in between. */
            asking->deadline_ns = nep_deadline_ns(vote.timeout_ns);
        }
    }
    return asking->has_answered
               ? nep_group_put_card(&vote, HERE, asking->generation, asking->ticket, asking->number)
               : NEP_OK;
}

static enum nep_status look_at_preparation(struct asking *asking)
{
    const struct nep_group_vote *vote = asking->vote;
    if (vote->preparer == NULL) {
        return NEP_OK;
    }
    find_preparation(asking);
    if (!asking->is_preparing) {
        return NEP_OK;
    }
    int state = vote->preparer->state(vote->ctx);
    if (state < 0) {
        drop_prepared(asking);
    } else if (state == 0) {
        /* Members are at it; what it waits for has deadlines of its own. */
        asking->deadline_ns = nep_deadline_ns(vote->timeout_ns);
    }
    return state > 0 && !asking->has_answered ? answer_members(asking) : NEP_OK;
}

/*
 * Asks for a seat in the generation after the last one that was decided, again and again. The seat
 * may have been given to one that asked for it before and died: that is not this rank's. Meanwhile
 * it prepares what members decide to prepare.
 */
static enum nep_status ask(struct asking *asking, struct nep_group_decision *decision)
{
    const struct nep_group_vote *vote = asking->vote;
    enum nep_status status = NEP_OK;
    asking->deadline_ns = nep_deadline_ns(vote->timeout_ns);
    while (status == NEP_OK && nep_left_ns(asking->deadline_ns) != 0) {
        bool must_hurry = asking->is_preparing && !asking->has_answered;
        uint64_t wait_ns = asking->asked != asking->generation ? 2 * PEEK_NS
                           : must_hurry                        ? PEEK_NS
                                                               : SLICE_NS;
        if (read_decision(vote, asking->generation, wait_ns, decision)) {
            if (asking->asked == asking->generation && is_seated(asking, decision)) {
                return NEP_OK;
            }
            drop_prepared(asking);
            asking->generation++;
            asking->number = 0;
        } else if (asking->asked != asking->generation) {
            status = nep_group_put_card(vote, HERE, asking->generation, asking->ticket, 0);
            asking->asked = asking->generation;
        } else {
            status = look_at_preparation(asking);
        }
    }
    return status != NEP_OK ? status
                            : nep_fail(NEP_ERR_TIMEOUT,
                                       "rank %u asked for a seat in generation %llu, but the "
                                       "members did not call nep_comm_recover in time",
                                       vote->rank, (unsigned long long)asking->generation);
}

static enum nep_status newcomer_agree(const struct nep_group_vote *vote,
                                      struct nep_group_decision *decision)
{
    struct asking asking = {.vote = vote,
                            .generation = 1,
                            .ticket = make_ticket(),
                            .preparation = calloc(1, nep_group_decision_bytes(vote->num_ranks))};
    enum nep_status status = asking.preparation != NULL
                                 ? ask(&asking, decision)
                                 : nep_fail(NEP_ERR_NO_MEMORY, "no memory for a decision");
    if (status != NEP_OK || decision->prepared != asking.number) {
        drop_prepared(&asking);
    }
    free(asking.preparation);
    return status;
}

enum nep_status nep_group_agree(const struct nep_group_vote *vote,
                                struct nep_group_decision **decision_p)
{
    struct nep_group_decision *decision = calloc(1, nep_group_decision_bytes(vote->num_ranks));
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
        struct nep_group_card card;
        num += is_live[r] == 0 && nep_group_read_card(store, HERE, generation, r, PEEK_NS, &card) &&
               card.is_new != 0;
    }
    *num_p = num;
    return NEP_OK;
}
