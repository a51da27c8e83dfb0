/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The batch queue. A request waits in two lists: the list of its home and tenant, oldest first, and
 * the list of all, oldest first. A pop takes from the front of the list of all while that is old
 * (any home serves it: that is the age bound), then from the lists of its own home, tenants in turn
 * by what they were served so far (the virtual token counters of Sheng et al. 2024), then, if its
 * home has nothing, from the home with most waiting beyond its free slots. But for the patience
 * below, no slot idles while something waits that its own home cannot start, so the throughput is
 * that of one common queue.
 *
 * A request goes to the cheapest home with a free slot; when all are busy, to the least loaded of
 * those within a band above the least cost (ELDR's locality band); the band widens with the load of
 * the best home, so that a burst of one kind spreads. A request whose best home is full and clearly
 * cheaper than any open one waits there for a small part of the age bound, if hardly anything
 * waits: a slot falls free soon. Only while requests now and then find all homes full, because
 * where they do not, no wait is worth its rows.
 *
 * Everything is an index into arrays of fixed size: push and pop cost a hash look-up and a few list
 * links, whatever waits. Rejected: a heap by (score, age). It costs more, and no order of one
 * number gives both the bound and the fairness.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "placement/choose_impl.h"
#include "placement/placement.h"

#define NONE UINT32_MAX

#define DEFAULT_CAPACITY 65536u
#define DEFAULT_AGE_NS   1000000000ull
#define DEFAULT_BAND     0.05
/* How long a request is left to a full home that is its best: a share of the age bound; how many a
 * home at most (home_slots / 8) and all homes (half of them); and the share of pushes, of 65536,
 * that must have found all homes full lately, over about so many pushes. */
#define PATIENCE_SHARE  40u
#define PATIENT_SLOTS   8u
#define CROWDED         983u
#define CROWDED_HISTORY 256u

struct entry {
    uint64_t id;
    uint64_t since_ns;
    uint32_t tenant;
    uint32_t tokens;
    uint32_t home;
    uint32_t is_running;
    uint32_t hash_next;
    uint32_t prev; /* in the list of all that wait */
    uint32_t next;
    uint32_t home_prev; /* in the list of (home, tenant) */
    uint32_t home_next;
};

struct list {
    uint32_t head;
    uint32_t tail;
};

struct nep_queue {
    struct nep_queue_params params;
    pthread_mutex_t lock;
    struct entry *entries; /* [capacity] */
    float *scores;         /* [capacity][num_homes] */
    uint32_t *buckets;     /* [bucket_mask + 1] */
    uint32_t bucket_mask;
    uint32_t free_head; /* by hash_next */
    struct list all;
    struct list *lists;  /* [num_homes][num_tenants] */
    uint32_t *waiting;   /* [num_homes] */
    uint32_t *running;   /* [num_homes] */
    uint64_t *served;    /* [num_tenants] tokens */
    uint32_t *of_tenant; /* [num_tenants] waiting */
    uint64_t usual_ns;   /* moving mean of the waits that were not 0 */
    uint32_t crowded;    /* of 65536: pushes that found all homes full, a moving mean */
    struct nep_queue_stats stats;
};

static struct list *list_of(struct nep_queue *q, const struct entry *e)
{
    return &q->lists[(size_t)e->home * q->params.num_tenants + e->tenant];
}

static float *scores_of(struct nep_queue *q, uint32_t at)
{
    return &q->scores[(size_t)at * q->params.num_homes];
}

static uint32_t *bucket_of(struct nep_queue *q, uint64_t id)
{
    return &q->buckets[nep_choose_hash((uint32_t)id ^ nep_choose_hash((uint32_t)(id >> 32))) &
                       q->bucket_mask];
}

static uint32_t find(struct nep_queue *q, uint64_t id)
{
    uint32_t at = *bucket_of(q, id);
    while (at != NONE && q->entries[at].id != id) {
        at = q->entries[at].hash_next;
    }
    return at;
}

/* ---- lists ---- */

static void link_home(struct nep_queue *q, uint32_t at)
{
    struct entry *e = &q->entries[at];
    struct list *list = list_of(q, e);
    /* Oldest first also when a waiting request changes home: walk back past younger ones. */
    uint32_t after = list->tail;
    while (after != NONE && q->entries[after].since_ns > e->since_ns) {
        after = q->entries[after].home_prev;
    }
    e->home_prev = after;
    e->home_next = after == NONE ? list->head : q->entries[after].home_next;
    *(after == NONE ? &list->head : &q->entries[after].home_next) = at;
    *(e->home_next == NONE ? &list->tail : &q->entries[e->home_next].home_prev) = at;
    q->waiting[e->home]++;
}

static void unlink_home(struct nep_queue *q, uint32_t at)
{
    struct entry *e = &q->entries[at];
    struct list *list = list_of(q, e);
    *(e->home_prev == NONE ? &list->head : &q->entries[e->home_prev].home_next) = e->home_next;
    *(e->home_next == NONE ? &list->tail : &q->entries[e->home_next].home_prev) = e->home_prev;
    q->waiting[e->home]--;
}

static void unlink_all(struct nep_queue *q, uint32_t at)
{
    struct entry *e = &q->entries[at];
    *(e->prev == NONE ? &q->all.head : &q->entries[e->prev].next) = e->next;
    *(e->next == NONE ? &q->all.tail : &q->entries[e->next].prev) = e->prev;
    q->of_tenant[e->tenant]--;
    q->stats.waiting--;
}

/* ---- where to wait ---- */

static double load_of(const struct nep_queue *q, uint32_t home)
{
    return ((double)q->waiting[home] + q->running[home]) / q->params.home_slots;
}

static uint32_t least_loaded(const struct nep_queue *q, const float *scores, float most)
{
    uint32_t best = NONE;
    for (uint32_t h = 0; h < q->params.num_homes; h++) {
        if (scores[h] <= most && (best == NONE || load_of(q, h) < load_of(q, best))) {
            best = h;
        }
    }
    return best;
}

/* The cheapest home with a free slot; among equal costs the less loaded one, which matters while
 * scores are unknown. NONE: all are full. */
static uint32_t cheapest_open(const struct nep_queue *q, const float *scores)
{
    uint32_t open = NONE;
    for (uint32_t h = 0; h < q->params.num_homes; h++) {
        int is_open = q->running[h] + q->waiting[h] < q->params.home_slots;
        if (is_open && (open == NONE || scores[h] < scores[open] ||
                        (scores[h] == scores[open] && load_of(q, h) < load_of(q, open)))) {
            open = h;
        }
    }
    return open;
}

/* Whether to wait at `best`, which is full, and not to start at `open`. */
static int is_patient(const struct nep_queue *q, const float *scores, uint32_t best, uint32_t open)
{
    uint32_t most = (q->params.home_slots + PATIENT_SLOTS - 1) / PATIENT_SLOTS;
    return q->crowded > CROWDED && q->waiting[best] < most &&
           scores[open] > scores[best] * (float)(1.0 + q->params.band);
}

static uint32_t pick_home(const struct nep_queue *q, const float *scores)
{
    uint32_t best = 0;
    double load = 0.0;
    for (uint32_t h = 0; h < q->params.num_homes; h++) {
        best = scores[h] < scores[best] ? h : best;
        load += load_of(q, h) / q->params.num_homes;
    }
    uint32_t open = cheapest_open(q, scores);
    if (open != NONE) {
        return is_patient(q, scores, best, open) ? best : open;
    }
    double widen = load_of(q, best) / (load > 0.0 ? load : 1.0);
    double band = q->params.band * (widen > 1.0 ? widen : 1.0);
    return least_loaded(q, scores, scores[best] * (float)(1.0 + band));
}

/* ---- creation ---- */

static enum nep_status check_given(const void *queue, const void *argument)
{
    return queue != NULL && argument != NULL
               ? NEP_OK
               : nep_fail(NEP_ERR_INVALID, "queue: %s is NULL",
                          queue == NULL ? "the queue" : "a pointer for the result");
}

static enum nep_status check_params(struct nep_queue_params *p)
{
    if (p->num_homes == 0 || p->num_homes > 65536 || p->home_slots == 0 ||
        p->capacity > (1u << 28) || p->num_tenants > 65536 || !(p->band >= 0.0 && p->band < 1e6)) {
        return nep_fail(
            NEP_ERR_INVALID,
            "queue: %u homes (1 to 65536), %u slots each (1 or more), capacity %u (most "
            "2^28), %u tenants (most 65536), band %g",
            p->num_homes, p->home_slots, p->capacity, p->num_tenants, p->band);
    }
    p->capacity = p->capacity == 0 ? DEFAULT_CAPACITY : p->capacity;
    p->num_tenants = p->num_tenants == 0 ? 1 : p->num_tenants;
    p->max_age_ns = p->max_age_ns == 0 ? DEFAULT_AGE_NS : p->max_age_ns;
    p->band = p->band == 0.0 ? DEFAULT_BAND : p->band;
    return NEP_OK;
}

static int alloc_queue(struct nep_queue *q)
{
    const struct nep_queue_params *p = &q->params;
    size_t lists = (size_t)p->num_homes * p->num_tenants;
    uint32_t buckets = 16;
    while (buckets < p->capacity) {
        buckets *= 2;
    }
    q->bucket_mask = buckets - 1;
    q->entries = calloc(p->capacity, sizeof *q->entries);
    q->scores = calloc((size_t)p->capacity * p->num_homes, sizeof *q->scores);
    q->buckets = malloc(buckets * sizeof *q->buckets);
    q->lists = malloc(lists * sizeof *q->lists);
    q->waiting = calloc(p->num_homes, sizeof *q->waiting);
    q->running = calloc(p->num_homes, sizeof *q->running);
    q->served = calloc(p->num_tenants, sizeof *q->served);
    q->of_tenant = calloc(p->num_tenants, sizeof *q->of_tenant);
    if (q->entries == NULL || q->scores == NULL || q->buckets == NULL || q->lists == NULL ||
        q->waiting == NULL || q->running == NULL || q->served == NULL || q->of_tenant == NULL) {
        return 0;
    }
    memset(q->buckets, 0xff, buckets * sizeof *q->buckets);
    memset(q->lists, 0xff, lists * sizeof *q->lists);
    for (uint32_t i = 0; i < p->capacity; i++) {
        q->entries[i].hash_next = i + 1 < p->capacity ? i + 1 : NONE;
    }
    q->all = (struct list){NONE, NONE};
    return 1;
}

enum nep_status nep_queue_create(const struct nep_queue_params *params, struct nep_queue **queue_p)
{
    struct nep_queue_params p;
    if (queue_p == NULL) {
        return check_given(params, queue_p);
    }
    enum nep_status status =
        nep_struct_copy(&p, sizeof p, params, sizeof(size_t) + 8, "nep_queue_params");
    if (status == NEP_OK) {
        status = check_params(&p);
    }
    if (status != NEP_OK) {
        return status;
    }
    struct nep_queue *q = calloc(1, sizeof *q);
    if (q == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "queue: no memory");
    }
    q->params = p;
    q->stats.size = sizeof q->stats;
    pthread_mutex_init(&q->lock, NULL);
    if (!alloc_queue(q)) {
        nep_queue_destroy(q);
        return nep_fail(NEP_ERR_NO_MEMORY, "queue: no memory for %u requests", p.capacity);
    }
    *queue_p = q;
    return NEP_OK;
}

void nep_queue_destroy(struct nep_queue *queue)
{
    if (queue == NULL) {
        return;
    }
    pthread_mutex_destroy(&queue->lock);
    free(queue->entries);
    free(queue->scores);
    free(queue->buckets);
    free(queue->lists);
    free(queue->waiting);
    free(queue->running);
    free(queue->served);
    free(queue->of_tenant);
    free(queue);
}

/* ---- push ---- */

/* A tenant that comes back does not bring the credit of the time it was away. */
static void lift_tenant(struct nep_queue *q, uint32_t tenant)
{
    uint64_t least = UINT64_MAX;
    for (uint32_t t = 0; t < q->params.num_tenants; t++) {
        if (q->of_tenant[t] > 0 && q->served[t] < least) {
            least = q->served[t];
        }
    }
    if (least != UINT64_MAX && q->served[tenant] < least) {
        q->served[tenant] = least;
    }
}

static enum nep_status push(struct nep_queue *q, const struct nep_request *r, uint64_t now_ns)
{
    if (find(q, r->id) != NONE) {
        return nep_fail(NEP_ERR_INVALID, "queue: request %llu is already known",
                        (unsigned long long)r->id);
    }
    uint32_t at = q->free_head;
    if (at == NONE) {
        return nep_fail(NEP_ERR_BUSY, "queue: %u requests are known, its capacity",
                        q->params.capacity);
    }
    struct entry *e = &q->entries[at];
    q->free_head = e->hash_next;
    uint32_t *bucket = bucket_of(q, r->id);
    /* Time that went back counts as standing still: the list of all stays sorted. */
    if (q->all.tail != NONE && now_ns < q->entries[q->all.tail].since_ns) {
        now_ns = q->entries[q->all.tail].since_ns;
    }
    *e = (struct entry){.id = r->id,
                        .since_ns = now_ns,
                        .tenant = r->tenant,
                        .tokens = r->tokens == 0 ? 1 : r->tokens,
                        .hash_next = *bucket,
                        .prev = q->all.tail,
                        .next = NONE};
    *bucket = at;
    float *scores = scores_of(q, at);
    for (uint32_t h = 0; h < q->params.num_homes; h++) {
        scores[h] = r->scores == NULL ? 0.0f : r->scores[h];
    }
    int is_full = q->stats.running == (uint64_t)q->params.num_homes * q->params.home_slots;
    q->crowded = (q->crowded * (CROWDED_HISTORY - 1) + (is_full ? 65536u : 0u)) / CROWDED_HISTORY;
    e->home = pick_home(q, scores);
    if (q->of_tenant[e->tenant]++ == 0) {
        lift_tenant(q, e->tenant);
    }
    *(q->all.tail == NONE ? &q->all.head : &q->entries[q->all.tail].next) = at;
    q->all.tail = at;
    link_home(q, at);
    q->stats.pushed++;
    q->stats.waiting++;
    return NEP_OK;
}

enum nep_status nep_queue_push(struct nep_queue *queue, const struct nep_request *request,
                               uint64_t now_ns)
{
    struct nep_request r;
    enum nep_status status = check_given(queue, queue);
    if (status == NEP_OK) {
        status = nep_struct_copy(&r, sizeof r, request, sizeof r, "nep_request");
    }
    if (status != NEP_OK) {
        return status;
    }
    if (r.tenant >= queue->params.num_tenants) {
        return nep_fail(NEP_ERR_INVALID, "queue: tenant %u of %u", r.tenant,
                        queue->params.num_tenants);
    }
    for (uint32_t h = 0; r.scores != NULL && h < queue->params.num_homes; h++) {
        if (!(r.scores[h] >= 0.0f && r.scores[h] < 1e30f)) {
            return nep_fail(NEP_ERR_INVALID, "queue: request %llu, score %g of home %u",
                            (unsigned long long)r.id, (double)r.scores[h], h);
        }
    }
    pthread_mutex_lock(&queue->lock);
    status = push(queue, &r, now_ns);
    pthread_mutex_unlock(&queue->lock);
    return status;
}

/* ---- pop ---- */

/* The oldest request of the home's least served tenant; NONE when the home has none. */
static uint32_t next_of_home(struct nep_queue *q, uint32_t home)
{
    const struct list *lists = &q->lists[(size_t)home * q->params.num_tenants];
    uint32_t best = NONE;
    for (uint32_t t = 0; t < q->params.num_tenants; t++) {
        if (lists[t].head != NONE && (best == NONE || q->served[t] < q->served[best])) {
            best = t;
        }
    }
    return best == NONE ? NONE : lists[best].head;
}

/* What waits at another home beyond its free slots, longest; NONE: nothing. What a home can start
 * itself, or soon, is left to it: it waits there because it is cheap there. */
static uint32_t next_elsewhere(struct nep_queue *q, uint32_t home, uint64_t now_ns)
{
    uint64_t patience = q->params.max_age_ns / PATIENCE_SHARE;
    int is_calm = q->crowded > CROWDED && 2 * q->stats.waiting <= q->params.num_homes;
    uint32_t oldest = NONE;
    for (uint32_t h = 0; h < q->params.num_homes; h++) {
        if (h == home || q->waiting[h] <= q->params.home_slots - q->running[h]) {
            continue;
        }
        uint32_t at = next_of_home(q, h);
        if (is_calm && now_ns < q->entries[at].since_ns + patience) {
            continue;
        }
        if (oldest == NONE || q->entries[at].since_ns < q->entries[oldest].since_ns) {
            oldest = at;
        }
    }
    return oldest;
}

static uint32_t next_request(struct nep_queue *q, uint32_t home, uint64_t now_ns)
{
    uint32_t oldest = q->all.head;
    if (oldest == NONE) {
        return NONE;
    }
    uint64_t since = q->entries[oldest].since_ns;
    if (now_ns > since && now_ns - since >= q->params.max_age_ns / 2) {
        q->stats.urgent++;
        return oldest;
    }
    uint32_t own = next_of_home(q, home);
    uint32_t other = next_elsewhere(q, home, now_ns);
    if (own == NONE || other == NONE) {
        return own == NONE ? other : own;
    }
    /* Own ones first, unless another has waited longer by more than twice what waiting usually
     * takes. */
    return q->entries[other].since_ns + 2 * q->usual_ns < q->entries[own].since_ns ? other : own;
}

static void start(struct nep_queue *q, uint32_t at, uint32_t home, uint64_t now_ns)
{
    struct entry *e = &q->entries[at];
    uint64_t wait = now_ns > e->since_ns ? now_ns - e->since_ns : 0;
    if (wait > 0) {
        q->usual_ns = q->usual_ns - q->usual_ns / 64 + wait / 64;
    }
    q->stats.max_wait_ns = wait > q->stats.max_wait_ns ? wait : q->stats.max_wait_ns;
    q->stats.stolen += e->home != home;
    q->stats.popped++;
    q->stats.running++;
    unlink_home(q, at);
    unlink_all(q, at);
    q->served[e->tenant] += e->tokens;
    e->home = home;
    e->is_running = 1;
    q->running[home]++;
}

enum nep_status nep_queue_pop(struct nep_queue *queue, uint32_t home, uint64_t now_ns,
                              struct nep_micro_batch *batch)
{
    if (check_given(queue, queue) != NEP_OK) {
        return NEP_ERR_INVALID;
    }
    if (home >= queue->params.num_homes || batch == NULL ||
        (batch->capacity > 0 && batch->ids == NULL)) {
        return nep_fail(NEP_ERR_INVALID, "queue: home %u of %u, batch %s", home,
                        queue->params.num_homes, batch == NULL ? "is NULL" : "without ids");
    }
    uint32_t num = 0;
    pthread_mutex_lock(&queue->lock);
    while (num < batch->capacity && queue->running[home] < queue->params.home_slots) {
        uint32_t at = next_request(queue, home, now_ns);
        if (at == NONE) {
            break;
        }
        start(queue, at, home, now_ns);
        batch->ids[num++] = queue->entries[at].id;
    }
    pthread_mutex_unlock(&queue->lock);
    batch->num = num;
    return NEP_OK;
}

/* ---- finish, update ---- */

static enum nep_status unknown(uint64_t id)
{
    return nep_fail(NEP_ERR_NOT_FOUND, "queue: request %llu is not known", (unsigned long long)id);
}

enum nep_status nep_queue_finish(struct nep_queue *queue, uint64_t id)
{
    if (check_given(queue, queue) != NEP_OK) {
        return NEP_ERR_INVALID;
    }
    pthread_mutex_lock(&queue->lock);
    uint32_t at = find(queue, id);
    if (at != NONE) {
        struct entry *e = &queue->entries[at];
        if (e->is_running) {
            queue->running[e->home]--;
            queue->stats.running--;
        } else {
            unlink_home(queue, at);
            unlink_all(queue, at);
        }
        uint32_t *link = bucket_of(queue, id);
        while (*link != at) {
            link = &queue->entries[*link].hash_next;
        }
        *link = e->hash_next;
        e->hash_next = queue->free_head;
        queue->free_head = at;
    }
    pthread_mutex_unlock(&queue->lock);
    return at == NONE ? unknown(id) : NEP_OK;
}

/* Another home for a running request, if it pays and there is room. */
static void rehome(struct nep_queue *q, struct entry *e, const float *scores, uint32_t tokens_left,
                   float move_cost)
{
    uint32_t best = e->home;
    for (uint32_t h = 0; h < q->params.num_homes; h++) {
        if (scores[h] < scores[best] && q->running[h] < q->params.home_slots) {
            best = h;
        }
    }
    if ((scores[e->home] - scores[best]) * (float)tokens_left > move_cost) {
        q->running[e->home]--;
        q->running[best]++;
        e->home = best;
    }
}

enum nep_status nep_queue_update(struct nep_queue *queue, uint64_t id, const float *scores,
                                 uint32_t tokens_left, float move_cost, uint32_t *home_p)
{
    if (check_given(queue, home_p) != NEP_OK) {
        return NEP_ERR_INVALID;
    }
    for (uint32_t h = 0; h < queue->params.num_homes; h++) {
        if (scores == NULL || !(scores[h] >= 0.0f && scores[h] < 1e30f)) {
            return nep_fail(NEP_ERR_INVALID, "queue: request %llu, scores are %s",
                            (unsigned long long)id, scores == NULL ? "NULL" : "out of range");
        }
    }
    pthread_mutex_lock(&queue->lock);
    uint32_t at = find(queue, id);
    if (at != NONE) {
        struct entry *e = &queue->entries[at];
        memcpy(scores_of(queue, at), scores, queue->params.num_homes * sizeof *scores);
        if (e->is_running) {
            rehome(queue, e, scores, tokens_left, move_cost);
        } else {
            unlink_home(queue, at);
            e->home = pick_home(queue, scores);
            link_home(queue, at);
        }
        *home_p = e->home;
    }
    pthread_mutex_unlock(&queue->lock);
    return at == NONE ? unknown(id) : NEP_OK;
}

enum nep_status nep_queue_get_stats(struct nep_queue *queue, struct nep_queue_stats *stats_p)
{
    if (check_given(queue, stats_p) != NEP_OK) {
        return NEP_ERR_INVALID;
    }
    pthread_mutex_lock(&queue->lock);
    *stats_p = queue->stats;
    pthread_mutex_unlock(&queue->lock);
    return NEP_OK;
}
