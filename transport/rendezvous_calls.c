/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What members ask for: gathers and the store.
 *
 * All numbers and lengths of a gather are compared when the last rank has come, not when they
 * arrive: until then nobody can say who is the odd one.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/config.h"
#include "transport/bootstrap.h"
#include "transport/rendezvous_group.h"

void nep_rdv_end_wait(struct nep_rdv_member *member)
{
    member->group->num_waiting -= member->is_waiting;
    member->is_waiting = false;
    free(member->part);
    member->part = NULL;
    member->part_len = 0;
}

/* A quarter of the caller's time, at most half a second, is left for the answer's way. */
static uint64_t answer_by(uint64_t timeout_ns, uint64_t now_ns)
{
    uint64_t early_ns = timeout_ns / 4 > NEP_S / 2 ? NEP_S / 2 : timeout_ns / 4;
    uint64_t wait_ns = timeout_ns - early_ns;
    return wait_ns > UINT64_MAX - now_ns ? UINT64_MAX : now_ns + wait_ns;
}

/* ---- gather --------------------------------------------------------------------------------- */

static bool never_came(const void *ctx, uint32_t rank)
{
    return ((const struct group *)ctx)->seats[rank].state == NEVER_CAME;
}

static bool does_not_wait(const void *ctx, uint32_t rank)
{
    const struct seat *seat = &((const struct group *)ctx)->seats[rank];
    return seat->state == IS_HERE && !seat->member->is_waiting;
}

struct unlike {
    const struct group *group;
    const struct nep_rdv_member *first;
    bool is_like;
};

static bool is_unlike(const void *ctx, uint32_t rank)
{
    const struct unlike *unlike = ctx;
    const struct nep_rdv_member *member = unlike->group->seats[rank].member;
    bool is_like =
        member->number == unlike->first->number && member->part_len == unlike->first->part_len;
    return is_like == unlike->is_like;
}

/* All are here and wait, but not for the same. */
static void break_unlike(struct nep_rdv_hub *hub, struct group *group)
{
    char sentence[SENTENCE];
    struct unlike unlike = {group, group->seats[0].member, true};
    uint32_t other = 0;
    while (is_unlike(&unlike, other)) {
        other++;
    }
    const struct nep_rdv_member *a = unlike.first, *b = group->seats[other].member;
    snprintf(sentence, sizeof sentence,
             "the ranks exchange different things: %zu bytes (number "
             "%llu) on ranks ",
             a->part_len, (unsigned long long)a->number);
    nep_ranks_print(sentence, sizeof sentence, hub->num_ranks, is_unlike, &unlike);
    size_t used = strlen(sentence);
    snprintf(sentence + used, sizeof sentence - used,
             ", %zu bytes (number %llu) on rank %u; all "
             "must make the same calls",
             b->part_len, (unsigned long long)b->number, other);
    nep_rdv_break_group(hub, group, NEP_ERR_MISMATCH, sentence);
}

static void complete_gather(struct nep_rdv_hub *hub, struct group *group)
{
    const struct nep_rdv_member *first = group->seats[0].member;
    size_t part_len = first->part_len;
    struct unlike unlike = {group, first, false};
    for (uint32_t r = 0; r < hub->num_ranks; r++) {
        if (is_unlike(&unlike, r)) {
            break_unlike(hub, group);
            return;
        }
    }
    uint8_t *all = malloc(part_len * hub->num_ranks + 1);
    if (all == NULL) {
        nep_rdv_break_group(hub, group, NEP_ERR_NO_MEMORY, "the rendezvous is out of memory");
        return;
    }
    for (uint32_t r = 0; r < hub->num_ranks; r++) {
        if (part_len != 0) {
            memcpy(all + r * part_len, group->seats[r].member->part, part_len);
        }
    }
    for (uint32_t r = 0; r < hub->num_ranks; r++) {
        struct nep_rdv_member *member = group->seats[r].member;
        nep_rdv_end_wait(member);
        nep_rdv_reply_value(hub, member->conn, member->id, all, part_len * hub->num_ranks);
    }
    free(all);
}

/* A gather needs all ranks here. The one to name when one is not, and never will be. */
static void check_gone(struct nep_rdv_hub *hub, struct group *group)
{
    for (uint32_t r = 0; group->broken == NEP_OK && r < hub->num_ranks; r++) {
        if (group->seats[r].state == HAS_LEFT) {
            char sentence[SENTENCE];
            snprintf(sentence, sizeof sentence, "rank %u (%s) has left the group", r,
                     group->seats[r].who);
            nep_rdv_break_group(hub, group, NEP_ERR_PEER_LOST, sentence);
        }
    }
}

enum nep_status nep_rdv_gather(struct nep_rdv_member *member, const struct nep_rdv_message *request,
                               uint64_t now_ns)
{
    struct nep_rdv_hub *hub = member->hub;
    struct group *group = member->group;
    if (member->is_waiting) {
        return nep_fail(NEP_ERR_FORMAT, "rank %u began a second exchange inside one", member->rank);
    }
    check_gone(hub, group);
    if (group->broken != NEP_OK) {
        nep_rdv_reply_failure(hub, member->conn, request->id, group->broken, group->sentence);
        return NEP_OK;
    }
    uint8_t *part = malloc(request->value_len + 1);
    if (part == NULL || request->value_len * (uint64_t)hub->num_ranks > NEP_RDV_MAX_FRAME - 4096) {
        char sentence[SENTENCE];
        free(part);
        snprintf(sentence, sizeof sentence,
                 "an exchange of %zu bytes for each of %u ranks is too large for the rendezvous",
                 request->value_len, hub->num_ranks);
        nep_rdv_break_group(hub, group, NEP_ERR_OVERFLOW, sentence);
        nep_rdv_reply_failure(hub, member->conn, request->id, NEP_ERR_OVERFLOW, sentence);
        return NEP_OK;
    }
    memcpy(part, request->value, request->value_len);
    member->part = part;
    member->part_len = request->value_len;
    member->id = request->id;
    member->number = request->number;
    member->timeout_ns = request->timeout_ns;
    member->deadline_ns = answer_by(request->timeout_ns, now_ns);
    member->is_waiting = true;
    if (++group->num_waiting == hub->num_ranks) {
        complete_gather(hub, group);
    }
    return NEP_OK;
}

void nep_rdv_expire_gather(struct nep_rdv_hub *hub, struct nep_rdv_member *member, uint64_t now_ns)
{
    struct group *group = member->group;
    char sentence[SENTENCE] = "", time[32];
    nep_format_time_ns((member->timeout_ns + NEP_MS / 2) / NEP_MS * NEP_MS, time, sizeof time);
    if (group->num_came < hub->num_ranks) {
        snprintf(sentence, sizeof sentence, "of %u ranks, these did not join within %s: rank ",
                 hub->num_ranks, time);
        nep_ranks_print(sentence, sizeof sentence, hub->num_ranks, never_came, group);
    } else {
        snprintf(sentence, sizeof sentence,
                 "of %u ranks, these joined but did not come to exchange %llu within %s: rank ",
                 hub->num_ranks, (unsigned long long)member->number, time);
        nep_ranks_print(sentence, sizeof sentence, hub->num_ranks, does_not_wait, group);
    }
    size_t used = strlen(sentence);
    if (hub->note[0] != '\0' && now_ns - hub->note_ns < NOTE_AGE_S * NEP_S) {
        snprintf(sentence + used, sizeof sentence - used, "; %llu s ago: %.300s",
                 (unsigned long long)((now_ns - hub->note_ns) / NEP_S), hub->note);
    }
    nep_rdv_break_group(hub, group, NEP_ERR_TIMEOUT, sentence);
}

/* ---- store ---------------------------------------------------------------------------------- */

/* A key was set: answers those who wait for it. */
static void wake_gets(struct nep_rdv_hub *hub, struct group *group, const char *key, size_t key_len)
{
    struct get **at = &group->gets;
    while (*at != NULL) {
        struct get *get = *at;
        if (get->key_len == key_len && memcmp(get->key, key, key_len) == 0) {
            struct nep_rdv_value value = nep_rdv_store_find(group->store, key, key_len);
            *at = get->next;
            get->member->num_gets--;
            nep_rdv_reply_value(hub, get->member->conn, get->id, value.data, value.len);
            free(get);
        } else {
            at = &get->next;
        }
    }
}

static enum nep_status wait_get(struct nep_rdv_member *member,
                                const struct nep_rdv_message *request, uint64_t now_ns)
{
    struct get *get = member->num_gets < MAX_GETS_PER_MEMBER ? calloc(1, sizeof *get) : NULL;
    if (get == NULL) {
        nep_rdv_reply_failure(member->hub, member->conn, request->id, NEP_ERR_OVERFLOW,
                              "this rank waits for too many keys of the rendezvous at once");
        return NEP_OK;
    }
    get->member = member;
    get->id = request->id;
    get->deadline_ns = answer_by(request->timeout_ns, now_ns);
    get->key_len = request->key_len;
    memcpy(get->key, request->key, request->key_len);
    get->next = member->group->gets;
    member->group->gets = get;
    member->num_gets++;
    return NEP_OK;
}

enum nep_status nep_rdv_get(struct nep_rdv_member *member, const struct nep_rdv_message *request,
                            uint64_t now_ns)
{
    struct nep_rdv_value value =
        nep_rdv_store_find(member->group->store, request->key, request->key_len);
    if (value.data == NULL) {
        return wait_get(member, request, now_ns);
    }
    nep_rdv_reply_value(member->hub, member->conn, request->id, value.data, value.len);
    return NEP_OK;
}

enum nep_status nep_rdv_put_or_cas(struct nep_rdv_member *member,
                                   const struct nep_rdv_message *request)
{
    struct nep_rdv_store *store = member->group->store;
    struct nep_rdv_value old = nep_rdv_store_find(store, request->key, request->key_len);
    bool is_put = request->op == NEP_RDV_PUT;
    bool is_expected = old.len == request->expected_len &&
                       (old.len == 0 || memcmp(old.data, request->expected, old.len) == 0);
    if (!is_put && !is_expected) {
        nep_rdv_reply_value(member->hub, member->conn, request->id, old.data, old.len);
        return NEP_OK;
    }
    enum nep_status status = nep_rdv_store_set(store, request->key, request->key_len,
                                               request->value, request->value_len);
    if (status != NEP_OK) {
        nep_rdv_reply_failure(member->hub, member->conn, request->id, status, nep_last_message());
        return NEP_OK;
    }
    nep_rdv_reply_value(member->hub, member->conn, request->id, request->value,
                        is_put ? 0 : request->value_len);
    wake_gets(member->hub, member->group, request->key, request->key_len);
    return NEP_OK;
}

void nep_rdv_drop_gets(struct nep_rdv_member *member)
{
    struct get **at = &member->group->gets;
    while (*at != NULL) {
        struct get *get = *at;
        if (get->member == member) {
            *at = get->next;
            free(get);
        } else {
            at = &get->next;
        }
    }
}

void nep_rdv_expire_gets(struct nep_rdv_hub *hub, struct group *group, uint64_t now_ns,
                         uint64_t *next_p)
{
    struct get **at = &group->gets;
    while (*at != NULL) {
        struct get *get = *at;
        if (get->deadline_ns > now_ns) {
            *next_p = get->deadline_ns < *next_p ? get->deadline_ns : *next_p;
            at = &get->next;
            continue;
        }
        char key[64], sentence[SENTENCE];
        nep_rdv_copy_text(key, sizeof key, get->key, get->key_len);
        snprintf(sentence, sizeof sentence,
                 "nobody has put the key '%s' into the rendezvous' store within the deadline", key);
        *at = get->next;
        get->member->num_gets--;
        nep_rdv_reply_failure(hub, get->member->conn, get->id, NEP_ERR_TIMEOUT, sentence);
        free(get);
    }
}
