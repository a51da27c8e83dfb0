/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The members' exchange, through the store: each puts its part, the first of them collects the
 * parts and puts the whole. A member whose process is seen to have ended ends the exchange. Once
 * one has failed no later one can succeed, and nobody waits for it: a group is made anew.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/group_card.h"

enum { KEY_BYTES = NEP_GROUP_KEY_BYTES, CHUNK_BYTES = 512 << 10, MOST_KEYS = 10240, GATHERS = 32 };

static const uint64_t WATCH_NS = 100 * NEP_MS;

/* Before every part and every piece of a result: which gather it belongs to. */
struct stamp {
    uint64_t generation;
    uint64_t number;
};

enum { NOT_WATCHED = -1, HAS_ENDED = -2 }; /* instead of a pidfd */

int nep_group_watch(pid_t pid)
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
    group->series = decision->series;
    /* A generation may be prepared several times. */
    group->stamp = decision->series != 0 ? decision->generation << 20 | decision->prepared
                                         : decision->generation;
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
            group->pidfds[group->num] = is_seen ? nep_group_watch((pid_t)seat->pid) : NOT_WATCHED;
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

bool nep_group_has_ended(int watched)
{
    struct pollfd pollfd = {.fd = watched, .events = POLLIN};
    return watched == HAS_ENDED || (watched >= 0 && poll(&pollfd, 1, 0) > 0);
}

bool nep_group_saw_end(const struct nep_group *group, uint32_t rank)
{
    for (uint32_t m = 0; group->pidfds != NULL && m < group->num; m++) {
        if (group->members[m] == rank) {
            return nep_group_has_ended(group->pidfds[m]);
        }
    }
    return false;
}

/* A member whose process is seen to have ended, or UINT32_MAX. */
static uint32_t ended_member(const struct nep_group *group)
{
    for (uint32_t m = 0; group->pidfds != NULL && m < group->num; m++) {
        if (nep_group_has_ended(group->pidfds[m])) {
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
    snprintf(key, KEY_BYTES, "nearep/%s%u/%llu/%u", what, group->series, (unsigned long long)turn,
             idx);
}

/* Whether what came is of this gather. *status_p: NEP_OK, or why not to go on. */
static bool is_due(const struct nep_group *group, const struct stamp *stamp, size_t len,
                   size_t bytes, enum nep_status *status_p)
{
    if (len < sizeof *stamp) {
        return false;
    }
    if (stamp->generation == group->stamp && stamp->number == group->num_gathers) {
        *status_p =
            len == bytes
                ? NEP_OK
                : nep_fail(NEP_ERR_MISMATCH,
                           "the members exchange different things: %zu bytes here, %zu there",
                           bytes, len);
        return true;
    }
    if (stamp->generation > group->stamp) {
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
            nep_group_pause(pause);
            pause = pause < 5 * NEP_MS ? pause * 2 : pause;
        }
        if (group->is_cancelled != NULL && atomic_load(group->is_cancelled)) {
            return nep_fail(NEP_ERR_BROKEN, "what was prepared is not wanted any more");
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
        *room = (struct stamp){group->stamp, group->num_gathers};
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

static enum nep_status gather(struct nep_group *group, const void *in, void *out, size_t bytes,
                              uint64_t timeout_ns)
{
    uint64_t deadline_ns = nep_deadline_ns(timeout_ns);
    size_t cap = bytes > CHUNK_BYTES ? bytes : CHUNK_BYTES;
    cap = cap < bytes * group->num ? cap : bytes * group->num;
    struct stamp *room = malloc(sizeof *room + cap);
    if (room == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory to exchange %zu bytes", bytes);
    }
    *room = (struct stamp){group->stamp, group->num_gathers};
    memcpy(room + 1, in, bytes);
    memcpy((uint8_t *)out + group->idx * bytes, in, bytes);
    enum nep_status status = group->idx == 0 ? lead(group, room, bytes, out, deadline_ns)
                                             : take_part(group, room, bytes, out, deadline_ns);
    free(room);
    group->num_gathers++;
    return status;
}

static int group_allgather(void *ctx, const void *in, void *out, size_t bytes, uint64_t timeout_ns)
{
    struct nep_group *group = ctx;
    if (group->num == 1) {
        memcpy(out, in, bytes);
        return 0;
    }
    if (group->failed != NEP_OK) {
        return nep_fail(group->failed, "%s", group->why);
    }
    group->failed = gather(group, in, out, bytes, timeout_ns);
    if (group->failed != NEP_OK) {
        snprintf(group->why, sizeof group->why, "%s", nep_last_message());
    }
    return group->failed;
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
