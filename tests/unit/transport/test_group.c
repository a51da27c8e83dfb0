/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who lives, agreed on through a store, and the exchange among those: over a store in memory, ranks
 * being threads; long because the store is a part of it. Whatever the order in which they come, all
 * get one decision, byte for byte.
 */
#include "transport/group.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "tests/unit/cmocka_all.h"

enum { RANKS = 4, MAX_KEYS = 128, KEY_LEN = 64 };

/* ---- a store in memory ---------------------------------------------------------------------- */

struct store {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint32_t num;
    bool is_broken; /* refuses to take anything */
    struct entry {
        char key[KEY_LEN];
        uint8_t *value;
        size_t len;
    } entries[MAX_KEYS];
};

static struct entry *find(struct store *store, const char *key)
{
    for (uint32_t i = 0; i < store->num; i++) {
        if (strcmp(store->entries[i].key, key) == 0) {
            return &store->entries[i];
        }
    }
    return NULL;
}

static int set(struct store *store, const char *key, const void *value, size_t len)
{
    struct entry *entry = find(store, key);
    uint8_t *copy = malloc(len + 1);
    if (store->is_broken || copy == NULL || (entry == NULL && store->num == MAX_KEYS)) {
        free(copy);
        return -1;
    }
    if (entry == NULL) {
        entry = &store->entries[store->num++];
        strncpy(entry->key, key, KEY_LEN - 1);
    }
    free(entry->value);
    memcpy(copy, value, len);
    entry->value = copy;
    entry->len = len;
    pthread_cond_broadcast(&store->changed);
    return 0;
}

static int store_put(void *ctx, const char *key, const void *value, size_t len, uint64_t timeout_ns)
{
    struct store *store = ctx;
    (void)timeout_ns;
    pthread_mutex_lock(&store->lock);
    int rc = set(store, key, value, len);
    pthread_mutex_unlock(&store->lock);
    return rc;
}

static int give(const struct entry *entry, void *value, size_t cap, size_t *len_p)
{
    if (entry == NULL || entry->len > cap) {
        return -1;
    }
    memcpy(value, entry->value, entry->len);
    *len_p = entry->len;
    return 0;
}

static int store_get(void *ctx, const char *key, void *value, size_t cap, size_t *len_p,
                     uint64_t timeout_ns)
{
    struct store *store = ctx;
    uint64_t deadline_ns = nep_deadline_ns(timeout_ns);
    struct timespec until = {.tv_sec = (time_t)(deadline_ns / NEP_S),
                             .tv_nsec = (long)(deadline_ns % NEP_S)};
    pthread_mutex_lock(&store->lock);
    int failed = 0;
    while (find(store, key) == NULL && failed == 0) {
        failed = pthread_cond_timedwait(&store->changed, &store->lock, &until);
    }
    int rc = give(find(store, key), value, cap, len_p);
    pthread_mutex_unlock(&store->lock);
    return rc;
}

static int store_cas(void *ctx, const char *key, const void *expected, size_t expected_len,
                     const void *desired, size_t desired_len, void *result, size_t cap,
                     size_t *len_p, uint64_t timeout_ns)
{
    struct store *store = ctx;
    (void)timeout_ns;
    pthread_mutex_lock(&store->lock);
    const struct entry *old = find(store, key);
    bool is_expected =
        old == NULL ? expected_len == 0
                    : old->len == expected_len && memcmp(old->value, expected, expected_len) == 0;
    int rc = is_expected ? set(store, key, desired, desired_len) : 0;
    rc = rc == 0 ? give(find(store, key), result, cap, len_p) : rc;
    pthread_mutex_unlock(&store->lock);
    return rc;
}

static void store_init(struct store *store)
{
    pthread_condattr_t attr;
    memset(store, 0, sizeof *store);
    pthread_mutex_init(&store->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&store->changed, &attr);
    pthread_condattr_destroy(&attr);
}

static void store_fini(struct store *store)
{
    for (uint32_t i = 0; i < store->num; i++) {
        free(store->entries[i].value);
    }
    pthread_cond_destroy(&store->changed);
    pthread_mutex_destroy(&store->lock);
}

static struct nep_bootstrap bootstrap_of(struct store *store)
{
    return (struct nep_bootstrap){.size = sizeof(struct nep_bootstrap),
                                  .ctx = store,
                                  .put = store_put,
                                  .get = store_get,
                                  .cas = store_cas};
}

/* ---- ranks ---------------------------------------------------------------------------------- */

struct voter {
    struct nep_group_vote vote;
    uint8_t gone[RANKS]; /* that this rank's transports know of */
    uint64_t begin_ns;   /* it comes so late */
    bool is_absent;
    pthread_t thread;
    enum nep_status status;
    struct nep_group_decision *decision;
};

static const uint32_t node_of[RANKS] = {0, 0, 1, 1};
static const uint8_t everybody[RANKS] = {1, 1, 1, 1};

static bool knows_gone(void *ctx, uint32_t rank)
{
    return ((struct voter *)ctx)->gone[rank] != 0;
}

static void *vote(void *arg)
{
    struct voter *voter = arg;
    nanosleep(&(struct timespec){.tv_nsec = (long)voter->begin_ns}, NULL);
    voter->status = nep_group_agree(&voter->vote, &voter->decision);
    return NULL;
}

static void prepare(struct voter voters[RANKS], struct nep_bootstrap *store,
                    const uint8_t *was_live)
{
    memset(voters, 0, RANKS * sizeof *voters);
    for (uint32_t r = 0; r < RANKS; r++) {
        voters[r].vote = (struct nep_group_vote){.store = store,
                                                 .rank = r,
                                                 .num_ranks = RANKS,
                                                 .generation = 1,
                                                 .was_live = was_live[r] != 0 ? was_live : NULL,
                                                 .node_of_rank = node_of,
                                                 .suspect = UINT32_MAX,
                                                 .is_gone = knows_gone,
                                                 .ctx = &voters[r],
                                                 .timeout_ns = 20 * NEP_S};
        voters[r].vote.ops.next[3] = 10 + r;
        voters[r].vote.ops.completed[3] = 8 + r;
        voters[r].is_absent = was_live[r] == 0;
    }
}

static void run(struct voter voters[RANKS])
{
    for (uint32_t r = 0; r < RANKS; r++) {
        if (!voters[r].is_absent) {
            assert_int_equal(pthread_create(&voters[r].thread, NULL, vote, &voters[r]), 0);
        }
    }
    for (uint32_t r = 0; r < RANKS; r++) {
        if (!voters[r].is_absent) {
            pthread_join(voters[r].thread, NULL);
        }
    }
}

/* Those that are in `live` have one decision, which says so; others that came were refused. */
static void check(struct voter voters[RANKS], uint64_t generation, const uint8_t live[RANKS])
{
    const struct nep_group_decision *first = NULL;
    uint32_t num_live = 0;
    for (uint32_t r = 0; r < RANKS; r++) {
        num_live += live[r];
    }
    for (uint32_t r = 0; r < RANKS; r++) {
        if (voters[r].is_absent) {
            continue;
        }
        assert_int_equal(voters[r].status, live[r] != 0 ? NEP_OK : NEP_ERR_PEER_LOST);
        if (live[r] == 0) {
            assert_null(voters[r].decision);
            continue;
        }
        const struct nep_group_decision *decision = voters[r].decision;
        first = first == NULL ? decision : first;
        size_t bytes = sizeof *decision + RANKS * sizeof decision->seats[0];
        assert_memory_equal(decision, first, bytes);
        assert_int_equal(decision->generation, generation);
        assert_int_equal(decision->num_live, num_live);
        for (uint32_t s = 0; s < RANKS; s++) {
            assert_int_equal(nep_group_lives(decision, s), live[s] != 0);
            assert_int_equal(decision->seats[s].node, node_of[s]);
        }
    }
}

/* What each test begins with and leaves: a store, and ranks for as many votes as it takes. */
struct fixture {
    struct store store;
    struct nep_bootstrap bootstrap;
    struct voter votes[4][RANKS];
};

static int set_up(void **state)
{
    struct fixture *fixture = calloc(1, sizeof *fixture);
    assert_non_null(fixture);
    store_init(&fixture->store);
    fixture->bootstrap = bootstrap_of(&fixture->store);
    *state = fixture;
    return 0;
}

static int tear_down(void **state)
{
    struct fixture *fixture = *state;
    for (uint32_t i = 0; i < 4 * RANKS; i++) {
        free(fixture->votes[i / RANKS][i % RANKS].decision);
    }
    store_fini(&fixture->store);
    free(fixture);
    return 0;
}

/* ---- who lives ------------------------------------------------------------------------------ */

static void test_group_all_come_all_live(void **state)
{
    struct fixture *fixture = *state;
    struct voter *voters = fixture->votes[0];
    prepare(voters, &fixture->bootstrap, everybody);
    run(voters);
    check(voters, 1, everybody);
    /* The next operation is the furthest anybody began, the first to do again the furthest behind.
     */
    assert_int_equal(voters[0].decision->ops.next[3], 13);
    assert_int_equal(voters[0].decision->ops.completed[3], 8);
}

/* One rank does not come, and the others go on without it: each as it learns of that. */
static void test_group_one_does_not_come(void **state)
{
    (void)state;
    enum how { ALL_KNOW_IT_GONE, ONE_CALLER_SAYS_SO, ALL_SUSPECT_IT, NOBODY_KNOWS };
    static const struct {
        uint32_t lost;
        enum how how;
    } cases[] = {
        /* Each in turn, rank 0 too, which would have collected. */
        {0, ALL_KNOW_IT_GONE}, {1, ALL_KNOW_IT_GONE},   {2, ALL_KNOW_IT_GONE},
        {3, ALL_KNOW_IT_GONE}, {2, ONE_CALLER_SAYS_SO}, /* the others have it from the decision */
        {0, ALL_SUSPECT_IT},   {0, NOBODY_KNOWS}, /* the collector is stuck: after a while others
                                                     collect */
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint32_t lost = cases[i].lost;
        uint8_t live[RANKS] = {1, 1, 1, 1}, is_lost[RANKS] = {0};
        void *made = NULL;
        set_up(&made);
        struct fixture *fixture = made;
        struct voter *voters = fixture->votes[0], *late = fixture->votes[1];
        prepare(voters, &fixture->bootstrap, everybody);
        live[lost] = 0;
        is_lost[lost] = 1;
        voters[lost].is_absent = true;
        voters[0].vote.is_lost = cases[i].how == ONE_CALLER_SAYS_SO ? is_lost : NULL;
        for (uint32_t r = 0; r < RANKS; r++) {
            voters[r].gone[lost] = cases[i].how == ALL_KNOW_IT_GONE;
            voters[r].vote.suspect = cases[i].how == ALL_SUSPECT_IT ? lost : UINT32_MAX;
            voters[r].vote.timeout_ns = cases[i].how == NOBODY_KNOWS ? 4 * NEP_S : 20 * NEP_S;
        }
        run(voters);
        check(voters, 1, live);
        /* It was only slow, and comes now. */
        prepare(late, &fixture->bootstrap, everybody);
        for (uint32_t r = 0; r < RANKS; r++) {
            late[r].is_absent = r != lost;
        }
        run(late);
        check(late, 1, live);
        tear_down(&made);
    }
}

static void test_group_suspect_that_comes_lives(void **state)
{
    struct fixture *fixture = *state;
    struct voter *voters = fixture->votes[0];
    uint8_t card[4096];
    size_t len;
    prepare(voters, &fixture->bootstrap, everybody);
    /* Its card is there before anybody looks, however slow this machine is. */
    voters[3].vote.suspect = 0;
    assert_int_equal(pthread_create(&voters[3].thread, NULL, vote, &voters[3]), 0);
    assert_int_equal(
        store_get(&fixture->store, "nearep/here/3", card, sizeof card, &len, 20 * NEP_S), 0);
    voters[3].is_absent = true;
    voters[0].vote.suspect = voters[1].vote.suspect = 3;
    run(voters);
    pthread_join(voters[3].thread, NULL);
    voters[3].is_absent = false;
    check(voters, 1, everybody);
}

/* Ranks 1 to 3 take rank 0 for gone, which lives: two collect, and there is one decision. */
static void test_group_two_collectors_one_decision(void **state)
{
    (void)state;
    for (int turn = 0; turn < 20; turn++) {
        void *made = NULL;
        set_up(&made);
        struct fixture *fixture = made;
        struct voter *voters = fixture->votes[0];
        prepare(voters, &fixture->bootstrap, everybody);
        for (uint32_t r = 1; r < RANKS; r++) {
            voters[r].gone[0] = 1;
        }
        voters[0].begin_ns = (uint64_t)turn * 100000;
        run(voters);
        uint8_t live[RANKS] = {voters[0].status == NEP_OK, 1, 1, 1};
        check(voters, 1, live);
        tear_down(&made);
    }
}

/* ---- newcomers ------------------------------------------------------------------------------ */

static const uint8_t all_but_1[RANKS] = {1, 0, 1, 1};

/* Ranks of a later generation, which know of as many newcomers. */
static void prepare_later(struct voter voters[RANKS], struct nep_bootstrap *store,
                          const uint8_t *was_live, uint64_t generation, uint32_t num_new)
{
    prepare(voters, store, was_live);
    for (uint32_t r = 0; r < RANKS; r++) {
        voters[r].vote.generation = generation;
        voters[r].vote.num_new = num_new;
    }
}

static void test_group_newcomer_is_waited_for(void **state)
{
    struct fixture *fixture = *state;
    struct voter *voters = fixture->votes[0];
    prepare_later(voters, &fixture->bootstrap, all_but_1, 1, 1);
    voters[1].is_absent = false; /* with was_live NULL: it joins */
    voters[1].vote.node_of_rank = NULL;
    voters[1].begin_ns = 30 * NEP_MS;
    run(voters);
    check(voters, 1, everybody);
    /* What the newcomer brought does not count. */
    assert_int_equal(voters[0].decision->ops.completed[3], 8);
    assert_int_equal(voters[0].decision->ops.next[3], 13);
}

/* A newcomer that was let in, and lost somebody before it had an ep, is a member all the same. */
static void test_group_member_that_never_worked_has_no_say(void **state)
{
    struct fixture *fixture = *state;
    struct voter *voters = fixture->votes[0];
    prepare(voters, &fixture->bootstrap, everybody);
    voters[0].vote.ops.next[3] = 0;
    voters[0].vote.ops.completed[3] = UINT64_MAX;
    for (uint32_t r = 0; r < RANKS; r++) {
        voters[r].vote.ops.next[5] = 7; /* of these nobody has a say */
        voters[r].vote.ops.completed[5] = UINT64_MAX;
    }
    run(voters);
    check(voters, 1, everybody);
    assert_int_equal(voters[0].decision->ops.completed[3], 9);
    assert_int_equal(voters[0].decision->ops.next[3], 13);
    assert_int_equal(voters[0].decision->ops.completed[5], 7);
}

/* It came too late for generation 1 and asks for the next by itself; others can count it. */
static void test_group_newcomer_asks_again(void **state)
{
    struct fixture *fixture = *state;
    struct nep_bootstrap *bootstrap = &fixture->bootstrap;
    struct voter *voters = fixture->votes[0], *second = fixture->votes[1];
    uint32_t num = 0;
    prepare(voters, bootstrap, all_but_1);
    run(voters);
    check(voters, 1, all_but_1);
    prepare_later(second, bootstrap, all_but_1, 2, 1);
    second[1].vote.generation = 1;
    assert_int_equal(pthread_create(&second[1].thread, NULL, vote, &second[1]), 0);
    second[1].is_absent = true;
    while (num == 0) {
        assert_int_equal(nep_group_newcomers(bootstrap, RANKS, all_but_1, 2, &num), NEP_OK);
    }
    assert_int_equal(num, 1);
    run(second);
    pthread_join(second[1].thread, NULL);
    second[1].is_absent = false;
    check(second, 2, everybody);
}

/* The seat went to a process that asked before and died: the next one does not take it for its. */
static void test_group_newcomer_leaves_the_seat_of_a_dead_one(void **state)
{
    struct fixture *fixture = *state;
    struct nep_bootstrap *bootstrap = &fixture->bootstrap;
    struct voter *voters = fixture->votes[0], *second = fixture->votes[1];
    struct voter *third = fixture->votes[2], *asks = fixture->votes[3];
    uint8_t card[4096];
    size_t len;
    prepare(voters, bootstrap, all_but_1);
    voters[1].vote.timeout_ns = 20 * NEP_MS;
    vote(&voters[1]); /* asks, and is never heard of again */
    assert_int_equal(voters[1].status, NEP_ERR_TIMEOUT);
    assert_int_equal(store_get(&fixture->store, "nearep/here/1", card, sizeof card, &len, NEP_S),
                     0);
    run(voters);
    assert_true(nep_group_lives(voters[0].decision, 1));
    /* The members find it dead and have lost it; meanwhile another process asks. */
    prepare_later(asks, bootstrap, all_but_1, 2, 0);
    assert_int_equal(pthread_create(&asks[1].thread, NULL, vote, &asks[1]), 0);
    prepare_later(second, bootstrap, everybody, 2, 0);
    for (uint32_t r = 0; r < RANKS; r++) {
        second[r].gone[1] = 1;
    }
    second[1].is_absent = true;
    run(second);
    assert_false(nep_group_lives(second[0].decision, 1));
    prepare_later(third, bootstrap, all_but_1, 3, 1);
    run(third);
    pthread_join(asks[1].thread, NULL);
    third[1] = asks[1];
    asks[1].decision = NULL;
    check(third, 3, everybody);
}

/* What a newcomer prepares, in a test: nothing, which takes it so long. */
struct preparing {
    uint64_t long_ns, until_ns;
    uint64_t number;
    uint32_t num_begun, num_dropped;
    atomic_bool is_ready;
};

static struct preparing preparing;

static void begin(void *ctx, uint64_t number, const struct nep_group_decision *decision)
{
    (void)ctx;
    assert_true(nep_group_lives(decision, 1));
    preparing.number = number;
    preparing.num_begun++;
    preparing.until_ns = nep_deadline_ns(preparing.long_ns);
}

static int state_of(void *ctx)
{
    (void)ctx;
    bool is_ready = nep_left_ns(preparing.until_ns) == 0;
    atomic_store(&preparing.is_ready, is_ready);
    return is_ready;
}

static void set_ops(void *ctx, const struct nep_group_ops *ops)
{
    (void)ctx;
    assert_int_equal(ops->next[3], 10);
}

static void drop(void *ctx)
{
    (void)ctx;
    preparing.num_dropped++;
}

static const struct nep_group_preparer preparer = {begin, state_of, set_ops, drop};

/* A member begins to prepare, and votes for it when the newcomer is ready. */
static void *grow(void *arg)
{
    static const atomic_bool is_never;
    struct voter *voter = arg;
    struct nep_group_decision *who = NULL;
    voter->vote.num_new = 1;
    voter->status = nep_group_prepare(&voter->vote, 1, 1, &is_never, &who);
    uint64_t deadline_ns = nep_deadline_ns(60 * NEP_S);
    while (!atomic_load(&preparing.is_ready) && nep_left_ns(deadline_ns) != 0) {
        nanosleep(&(struct timespec){.tv_nsec = (long)NEP_MS}, NULL);
    }
    if (voter->status == NEP_OK) {
        voter->vote.prepared = 1;
        voter->vote.preparation = who;
        voter->status = nep_group_agree(&voter->vote, &voter->decision);
    }
    free(who);
    return NULL;
}

/* While something is prepared a newcomer does not give up, however long it has been asking. */
static void test_group_newcomer_is_patient_while_it_prepares(void **state)
{
    struct fixture *fixture = *state;
    struct voter *voters = fixture->votes[0];
    preparing.long_ns = 3 * NEP_S;
    prepare(voters, &fixture->bootstrap, all_but_1);
    voters[1].vote.node_of_rank = NULL;
    voters[1].vote.preparer = &preparer;
    voters[1].vote.timeout_ns = 2 * NEP_S;
    for (uint32_t r = 0; r < RANKS; r++) {
        memset(&voters[r].vote.ops, 0, sizeof voters[r].vote.ops);
        voters[r].vote.ops.next[3] = voters[r].vote.ops.completed[3] = 10;
        assert_int_equal(pthread_create(&voters[r].thread, NULL, r == 1 ? vote : grow, &voters[r]),
                         0);
    }
    for (uint32_t r = 0; r < RANKS; r++) {
        pthread_join(voters[r].thread, NULL);
    }
    voters[1].is_absent = false;
    check(voters, 1, everybody);
    assert_int_equal(voters[0].decision->prepared, 1);
    assert_int_equal(preparing.number, 1);
    assert_int_equal(preparing.num_begun, 1);
    assert_int_equal(preparing.num_dropped, 0);
}

static void test_group_newcomer_without_members_times_out(void **state)
{
    struct fixture *fixture = *state;
    struct voter *voters = fixture->votes[0];
    prepare(voters, &fixture->bootstrap, all_but_1);
    voters[1].vote.timeout_ns = 50 * NEP_MS;
    vote(&voters[1]);
    assert_int_equal(voters[1].status, NEP_ERR_TIMEOUT);
    assert_non_null(strstr(nep_last_message(), "rank 1 asked for a seat"));
}

static void test_group_store_that_refuses_is_named(void **state)
{
    struct fixture *fixture = *state;
    struct voter *voters = fixture->votes[0];
    fixture->store.is_broken = true;
    prepare(voters, &fixture->bootstrap, everybody);
    vote(&voters[2]);
    assert_int_equal(voters[2].status, NEP_ERR_IO);
    assert_non_null(strstr(nep_last_message(), "the store"));
}

/* ---- the exchange --------------------------------------------------------------------------- */

struct member {
    struct nep_group group;
    struct nep_bootstrap bootstrap;
    uint32_t num; /* exchanges */
    size_t bytes; /* of a part */
    uint64_t timeout_ns;
    pthread_t thread;
    int rc;
    uint32_t num_wrong;
};

/* A byte of rank r's part in exchange n. */
static uint8_t part_byte(uint32_t r, uint32_t n, size_t i)
{
    return (uint8_t)(r * 31 + n * 7 + i);
}

static void *exchange(void *arg)
{
    struct member *member = arg;
    const struct nep_group *group = &member->group;
    uint8_t *in = malloc(member->bytes), *out = malloc(member->bytes * group->num);
    for (uint32_t n = 0; n < member->num && member->rc == 0; n++) {
        for (size_t i = 0; i < member->bytes; i++) {
            in[i] = part_byte(group->members[group->idx], n, i);
        }
        memset(out, 0xee, member->bytes * group->num);
        member->rc = member->bootstrap.allgather(member->bootstrap.ctx, in, out, member->bytes,
                                                 member->timeout_ns);
        for (size_t i = 0; member->rc == 0 && i < member->bytes * group->num; i++) {
            uint32_t from = group->members[i / member->bytes];
            member->num_wrong += out[i] != part_byte(from, n, i % member->bytes);
        }
    }
    free(in);
    free(out);
    return NULL;
}

static struct nep_group_decision *decide(uint64_t generation, const uint8_t live[RANKS])
{
    struct nep_group_decision *decision =
        calloc(1, sizeof *decision + RANKS * sizeof decision->seats[0]);
    decision->generation = generation;
    decision->num_ranks = RANKS;
    for (uint32_t r = 0; r < RANKS; r++) {
        decision->seats[r].is_live = live[r];
        decision->num_live += live[r];
    }
    return decision;
}

static void seat(struct member *member, struct nep_bootstrap *store, uint64_t generation,
                 const uint8_t live[RANKS], uint32_t rank)
{
    struct nep_group_decision *decision = decide(generation, live);
    *member = (struct member){.num = 1, .bytes = 8, .timeout_ns = 20 * NEP_S};
    assert_int_equal(nep_group_init(&member->group, store, decision, rank), NEP_OK);
    nep_group_bootstrap(&member->group, &member->bootstrap);
    assert_true(nep_group_is(&member->bootstrap));
    assert_false(nep_group_is(store));
    free(decision);
}

static void run_members(struct member *members, uint32_t num)
{
    for (uint32_t m = 0; m < num; m++) {
        assert_int_equal(pthread_create(&members[m].thread, NULL, exchange, &members[m]), 0);
    }
    for (uint32_t m = 0; m < num; m++) {
        pthread_join(members[m].thread, NULL);
    }
}

/* Many, so that keys are used again, and of sizes up to several pieces of a result. */
static void test_group_exchange_among_those_who_live(void **state)
{
    struct fixture *fixture = *state;
    static const uint8_t live[RANKS] = {0, 1, 1, 1};
    static const struct {
        uint32_t num;
        size_t bytes;
    } sizes[] = {{40, 3}, {2, 300 << 10}};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        struct member members[3];
        for (uint32_t m = 0; m < 3; m++) {
            seat(&members[m], &fixture->bootstrap, 1 + s, live, m + 1);
            members[m].num = sizes[s].num;
            members[m].bytes = sizes[s].bytes;
        }
        run_members(members, 3);
        for (uint32_t m = 0; m < 3; m++) {
            assert_int_equal(members[m].rc, 0);
            assert_int_equal(members[m].num_wrong, 0);
            nep_group_fini(&members[m].group);
        }
    }
}

static void test_group_exchange_of_one_is_a_copy(void **state)
{
    struct fixture *fixture = *state;
    static const uint8_t live[RANKS] = {0, 0, 1, 0};
    struct member member;
    seat(&member, &fixture->bootstrap, 1, live, 2);
    exchange(&member);
    assert_int_equal(member.rc, 0);
    assert_int_equal(member.num_wrong, 0);
    assert_int_equal(fixture->store.num, 0);
    nep_group_fini(&member.group);
}

static void test_group_exchange_of_different_sizes_is_refused(void **state)
{
    struct fixture *fixture = *state;
    static const uint8_t live[RANKS] = {1, 1, 0, 0};
    struct member members[2];
    seat(&members[0], &fixture->bootstrap, 1, live, 0);
    seat(&members[1], &fixture->bootstrap, 1, live, 1);
    members[1].bytes = 4;
    members[1].timeout_ns = NEP_S; /* the first member has given up and says nothing more */
    run_members(members, 2);
    assert_int_equal(members[0].rc, NEP_ERR_MISMATCH);
    assert_int_not_equal(members[1].rc, 0);
    nep_group_fini(&members[0].group);
    nep_group_fini(&members[1].group);
}

/* Nobody waits a second time for a member that did not come: the store is not even asked. */
static void test_group_exchange_that_failed_is_the_last(void **state)
{
    struct fixture *fixture = *state;
    static const uint8_t live[RANKS] = {1, 1, 0, 0};
    for (uint32_t rank = 0; rank < 2; rank++) {
        struct member member;
        char sentence[NEP_MESSAGE_BYTES];
        seat(&member, &fixture->bootstrap, 1 + rank, live, rank);
        member.timeout_ns = 20 * NEP_MS;
        exchange(&member);
        assert_int_equal(member.rc, NEP_ERR_TIMEOUT);
        nep_message_save(sentence);
        fixture->store.is_broken = true;
        member.rc = 0;
        exchange(&member);
        assert_int_equal(member.rc, NEP_ERR_TIMEOUT);
        assert_string_equal(nep_last_message(), sentence);
        fixture->store.is_broken = false;
        nep_group_fini(&member.group);
    }
}

/* A rank of an old generation learns that the others went on, instead of taking their parts. */
static void test_group_exchange_of_an_old_generation_is_refused(void **state)
{
    struct fixture *fixture = *state;
    static const uint8_t both[RANKS] = {1, 1, 0, 0};
    struct member now[2], old;
    /* Generation 17 uses the keys that generation 1 would use: they go round. */
    seat(&now[0], &fixture->bootstrap, 17, both, 0);
    seat(&now[1], &fixture->bootstrap, 17, both, 1);
    run_members(now, 2);
    assert_int_equal(now[0].rc, 0);
    seat(&old, &fixture->bootstrap, 1, both, 1);
    exchange(&old);
    assert_int_equal(old.rc, NEP_ERR_PEER_LOST);
    nep_group_fini(&now[0].group);
    nep_group_fini(&now[1].group);
    nep_group_fini(&old.group);
}

/* A member that ended before the exchanges began cannot be watched: it is known to be gone. */
static void test_group_exchange_with_one_that_ended_is_over_at_once(void **state)
{
    struct fixture *fixture = *state;
    static const uint8_t live[RANKS] = {1, 0, 1, 0};
    struct member member;
    pid_t child = fork();
    if (child == 0) {
        _exit(0);
    }
    assert_true(child > 0);
    assert_int_equal(waitpid(child, NULL, 0), child);
    for (uint32_t r = 0; r < RANKS; r += 2) {
        struct nep_group_decision *decision = decide(1, live);
        decision->seats[0].machine = decision->seats[2].machine = 7;
        decision->seats[r].pid = getpid();
        decision->seats[2 - r].pid = child;
        member = (struct member){.num = 1, .bytes = 8, .timeout_ns = 600 * NEP_S};
        assert_int_equal(nep_group_init(&member.group, &fixture->bootstrap, decision, r), NEP_OK);
        nep_group_bootstrap(&member.group, &member.bootstrap);
        assert_true(nep_group_saw_end(&member.group, 2 - r));
        assert_false(nep_group_saw_end(&member.group, r));
        exchange(&member);
        assert_int_equal(member.rc, NEP_ERR_PEER_LOST);
        assert_non_null(strstr(nep_last_message(), "ended meanwhile"));
        nep_group_fini(&member.group);
        free(decision);
    }
}

static void test_group_exchange_nobody_comes_names_the_missing(void **state)
{
    struct fixture *fixture = *state;
    static const uint8_t live[RANKS] = {1, 0, 1, 0};
    struct member member;
    seat(&member, &fixture->bootstrap, 1, live, 0);
    member.timeout_ns = 50 * NEP_MS;
    exchange(&member);
    assert_int_equal(member.rc, NEP_ERR_TIMEOUT);
    assert_non_null(strstr(nep_last_message(), "rank 2 did not come"));
    nep_group_fini(&member.group);
    seat(&member, &fixture->bootstrap, 1, live, 2);
    member.timeout_ns = 50 * NEP_MS;
    exchange(&member);
    assert_int_equal(member.rc, NEP_ERR_TIMEOUT);
    assert_non_null(strstr(nep_last_message(), "rank 0, which"));
    nep_group_fini(&member.group);
}

#define FRESH(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        FRESH(test_group_all_come_all_live),
        cmocka_unit_test(test_group_one_does_not_come),
        FRESH(test_group_suspect_that_comes_lives),
        cmocka_unit_test(test_group_two_collectors_one_decision),
        FRESH(test_group_newcomer_is_waited_for),
        FRESH(test_group_member_that_never_worked_has_no_say),
        FRESH(test_group_newcomer_asks_again),
        FRESH(test_group_newcomer_leaves_the_seat_of_a_dead_one),
        FRESH(test_group_newcomer_is_patient_while_it_prepares),
        FRESH(test_group_newcomer_without_members_times_out),
        FRESH(test_group_store_that_refuses_is_named),
        FRESH(test_group_exchange_among_those_who_live),
        FRESH(test_group_exchange_of_one_is_a_copy),
        FRESH(test_group_exchange_of_different_sizes_is_refused),
        FRESH(test_group_exchange_that_failed_is_the_last),
        FRESH(test_group_exchange_of_an_old_generation_is_refused),
        FRESH(test_group_exchange_with_one_that_ended_is_over_at_once),
        FRESH(test_group_exchange_nobody_comes_names_the_missing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
