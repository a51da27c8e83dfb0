/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A gather that cannot succeed any more breaks its group: all who wait, and all who come to a later
 * gather, get one and the same sentence at once, so that what fails is the same on every rank and
 * nobody waits for his own deadline to learn what is known. The store of a broken group goes on
 * working: recovery needs it.
 *
 * Rejected: taking a lost rank's new connection into its old place. Others may already have read
 * values that the lost one wrote; who replaces whom is decided above, through the store.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/log.h"
#include "transport/rendezvous_group.h"

/* ---- replies -------------------------------------------------------------------------------- */

void nep_rdv_reply_failure(struct nep_rdv_hub *hub, void *conn, uint32_t id, enum nep_status status,
                           const char *sentence)
{
    struct nep_rdv_message reply = {.op = NEP_RDV_REPLY,
                                    .id = id,
                                    .status = status,
                                    .text = sentence,
                                    .text_len = strlen(sentence)};
    hub->reply(conn, &reply);
}

void nep_rdv_reply_value(struct nep_rdv_hub *hub, void *conn, uint32_t id, const uint8_t *value,
                         size_t len)
{
    struct nep_rdv_message reply = {
        .op = NEP_RDV_REPLY, .id = id, .value = value, .value_len = len};
    hub->reply(conn, &reply);
}

void nep_rdv_break_group(struct nep_rdv_hub *hub, struct group *group, enum nep_status status,
                         const char *sentence)
{
    if (group->broken == NEP_OK) {
        group->broken = status;
        snprintf(group->sentence, sizeof group->sentence, "%s", sentence);
        nep_info("rendezvous: group %llu failed: %s", (unsigned long long)group->number, sentence);
    }
    for (uint32_t r = 0; r < hub->num_ranks && group->num_waiting != 0; r++) {
        struct nep_rdv_member *member = group->seats[r].member;
        if (member != NULL && member->is_waiting) {
            nep_rdv_end_wait(member);
            nep_rdv_reply_failure(hub, member->conn, member->id, group->broken, group->sentence);
        }
    }
}

/* ---- hub and groups ------------------------------------------------------------------------- */

enum nep_status nep_rdv_hub_create(uint32_t num_ranks, nep_rdv_reply_fn reply,
                                   struct nep_rdv_hub **hub_p)
{
    struct nep_rdv_hub *hub = calloc(1, sizeof *hub);
    if (hub == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for the rendezvous");
    }
    hub->num_ranks = num_ranks;
    hub->reply = reply;
    *hub_p = hub;
    return NEP_OK;
}

void nep_rdv_hub_destroy(struct nep_rdv_hub *hub)
{
    free(hub); /* groups go with their last member */
}

static void group_destroy(struct group *group)
{
    if (group != NULL) {
        nep_rdv_store_destroy(group->store);
        free(group->seats);
        free(group);
    }
}

static struct group *group_create(struct nep_rdv_hub *hub)
{
    struct group *group = calloc(1, sizeof *group);
    struct seat *seats = calloc(hub->num_ranks, sizeof *seats);
    if (group == NULL || seats == NULL || nep_rdv_store_create(&group->store) != NEP_OK) {
        free(group);
        free(seats);
        return NULL;
    }
    group->seats = seats;
    group->number = hub->num_groups++;
    struct group **end = &hub->groups;
    while (*end != NULL) {
        end = &(*end)->next;
    }
    *end = group;
    return group;
}

static void group_release(struct nep_rdv_hub *hub, struct group *group, uint64_t now_ns)
{
    if (group->num_here != 0) {
        return;
    }
    if (group->broken != NEP_OK && group->num_came < hub->num_ranks) {
        nep_rdv_hub_note(hub, now_ns, group->sentence);
    }
    struct group **at = &hub->groups;
    while (*at != group) {
        at = &(*at)->next;
    }
    *at = group->next;
    group_destroy(group);
}

void nep_rdv_hub_note(struct nep_rdv_hub *hub, uint64_t now_ns, const char *sentence)
{
    hub->note_ns = now_ns;
    snprintf(hub->note, sizeof hub->note, "%s", sentence);
}

/* ---- joining -------------------------------------------------------------------------------- */

void nep_rdv_copy_text(char *out, size_t cap, const char *text, size_t len)
{
    size_t used = 0;
    for (size_t i = 0; i < len && used + 1 < cap; i++) {
        out[used++] = text[i] >= ' ' && text[i] <= '~' ? text[i] : '?';
    }
    out[used] = '\0';
}

/* A process of this job that cannot join: named to those of its group who are there. */
static enum nep_status refuse(struct nep_rdv_hub *hub, const struct nep_rdv_message *join,
                              void *conn, uint64_t now_ns, const char *sentence)
{
    bool is_told = false;
    for (struct group *group = hub->groups; group != NULL; group = group->next) {
        if (group->num_came < hub->num_ranks) {
            nep_rdv_break_group(hub, group, NEP_ERR_MISMATCH, sentence);
            is_told = true;
        }
    }
    if (!is_told) {
        nep_rdv_hub_note(hub, now_ns, sentence);
    }
    nep_rdv_reply_failure(hub, conn, join->id, NEP_ERR_MISMATCH, sentence);
    return nep_fail(NEP_ERR_MISMATCH, "%s", sentence);
}

/*
 * Another process in this rank's seat. While the group gathers that is a mistake of the job; later
 * it is most likely the last of a job that ended, whose end is seen within half a minute: whoever
 * comes may try again.
 */
static enum nep_status check_seats(const struct nep_rdv_hub *hub,
                                   const struct nep_rdv_message *join, const char *who,
                                   char *sentence)
{
    for (const struct group *group = hub->groups; group != NULL; group = group->next) {
        const struct seat *seat = &group->seats[join->rank];
        if (seat->state == IS_HERE && memcmp(seat->process, join->process, 16) != 0) {
            snprintf(sentence, SENTENCE,
                     "two processes say that they are rank %u: %s, and %s, which came later and "
                     "was refused",
                     join->rank, seat->who, who);
            return group->num_came < hub->num_ranks ? NEP_ERR_MISMATCH : NEP_ERR_BUSY;
        }
    }
    return NEP_OK;
}

static enum nep_status check_join(const struct nep_rdv_hub *hub, const struct nep_rdv_message *join,
                                  const char *who, char *sentence)
{
    uint32_t ours = nep_version(), theirs = join->version;
    if (theirs / 100 != ours / 100) {
        snprintf(sentence, SENTENCE,
                 "rank %u (%s) runs nearep %u.%u, the rendezvous %u.%u: run one version everywhere",
                 join->rank, who, theirs / 10000, theirs / 100 % 100, ours / 10000,
                 ours / 100 % 100);
        return NEP_ERR_MISMATCH;
    }
    if (join->num_ranks != hub->num_ranks) {
        snprintf(sentence, SENTENCE,
                 "rank %u (%s) says that there are %u ranks, the rendezvous was started for %u",
                 join->rank, who, join->num_ranks, hub->num_ranks);
        return NEP_ERR_MISMATCH;
    }
    if (join->rank >= hub->num_ranks) {
        snprintf(sentence, SENTENCE, "%s says that it is rank %u of %u: ranks count from 0", who,
                 join->rank, hub->num_ranks);
        return NEP_ERR_MISMATCH;
    }
    return check_seats(hub, join, who, sentence);
}

static struct group *find_group(struct nep_rdv_hub *hub, uint32_t rank, bool is_newcomer)
{
    for (struct group *group = hub->groups; is_newcomer && group != NULL; group = group->next) {
        if (group->seats[rank].state == HAS_LEFT || group->seats[rank].state == WAS_LOST) {
            return group;
        }
    }
    for (struct group *group = hub->groups; group != NULL; group = group->next) {
        if (group->seats[rank].state == NEVER_CAME) {
            return group;
        }
    }
    return group_create(hub);
}

enum nep_status nep_rdv_hub_join(struct nep_rdv_hub *hub, const struct nep_rdv_message *join,
                                 void *conn, uint64_t now_ns, struct nep_rdv_member **member_p)
{
    char who[NEP_RDV_WHO_BYTES];
    char sentence[SENTENCE];
    if (join->op != NEP_RDV_JOIN) {
        return nep_fail(NEP_ERR_FORMAT, "a rendezvous connection begins with operation %u, not %d",
                        join->op, NEP_RDV_JOIN);
    }
    nep_rdv_copy_text(who, sizeof who, join->text, join->text_len);
    enum nep_status status = check_join(hub, join, who, sentence);
    if (status == NEP_ERR_BUSY) {
        nep_rdv_reply_failure(hub, conn, join->id, status, sentence);
        return nep_fail(status, "%s", sentence);
    }
    if (status != NEP_OK) {
        return refuse(hub, join, conn, now_ns, sentence);
    }
    struct nep_rdv_member *member = calloc(1, sizeof *member);
    struct group *group = member == NULL ? NULL : find_group(hub, join->rank, join->number == 1);
    if (group == NULL) {
        free(member);
        nep_rdv_reply_failure(hub, conn, join->id, NEP_ERR_NO_MEMORY,
                              "the rendezvous is out of memory");
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for rank %u", join->rank);
    }
    struct seat *seat = &group->seats[join->rank];
    group->num_here++;
    group->num_came += seat->state == NEVER_CAME;
    seat->state = IS_HERE;
    seat->member = member;
    memcpy(seat->process, join->process, sizeof seat->process);
    memcpy(seat->who, who, sizeof who);
    *member = (struct nep_rdv_member){.hub = hub, .group = group, .conn = conn, .rank = join->rank};
    struct nep_rdv_message reply = {.op = NEP_RDV_REPLY, .id = join->id, .number = group->number};
    hub->reply(conn, &reply);
    *member_p = member;
    return NEP_OK;
}

/* ---- leaving -------------------------------------------------------------------------------- */

void nep_rdv_hub_remove(struct nep_rdv_member *member, uint64_t now_ns)
{
    struct nep_rdv_hub *hub = member->hub;
    struct group *group = member->group;
    struct seat *seat = &group->seats[member->rank];
    char sentence[SENTENCE];
    seat->member = NULL;
    group->num_here--;
    nep_rdv_drop_gets(member);
    nep_rdv_end_wait(member);
    if (member->said_goodbye) {
        seat->state = HAS_LEFT;
        snprintf(sentence, sizeof sentence, "rank %u (%s) has left the group", member->rank,
                 seat->who);
        /* Leaving when nobody waits is how every communicator ends. */
        if (group->num_waiting != 0 || group->num_came < hub->num_ranks) {
            nep_rdv_break_group(hub, group, NEP_ERR_PEER_LOST, sentence);
        }
    } else {
        seat->state = WAS_LOST;
        snprintf(sentence, sizeof sentence,
                 "rank %u (%s) was lost: its connection ended without a goodbye", member->rank,
                 seat->who);
        nep_rdv_break_group(hub, group, NEP_ERR_PEER_LOST, sentence);
    }
    free(member);
    group_release(hub, group, now_ns);
}

/* ---- requests ------------------------------------------------------------------------------- */

enum nep_status nep_rdv_hub_request(struct nep_rdv_member *member,
                                    const struct nep_rdv_message *request, uint64_t now_ns)
{
    switch ((enum nep_rdv_op)request->op) {
    case NEP_RDV_GATHER:
        return nep_rdv_gather(member, request, now_ns);
    case NEP_RDV_GET:
        return nep_rdv_get(member, request, now_ns);
    case NEP_RDV_PUT:
    case NEP_RDV_CAS:
        return nep_rdv_put_or_cas(member, request);
    case NEP_RDV_LEAVE:
        member->said_goodbye = true;
        nep_rdv_reply_value(member->hub, member->conn, request->id, NULL, 0);
        return NEP_OK;
    case NEP_RDV_JOIN:
    case NEP_RDV_REPLY:
        break;
    }
    return nep_fail(NEP_ERR_FORMAT, "rank %u sent rendezvous operation %u, which is none here",
                    member->rank, request->op);
}

uint64_t nep_rdv_hub_expire(struct nep_rdv_hub *hub, uint64_t now_ns)
{
    uint64_t next = UINT64_MAX;
    for (struct group *group = hub->groups; group != NULL; group = group->next) {
        nep_rdv_expire_gets(hub, group, now_ns, &next);
        for (uint32_t r = 0; r < hub->num_ranks && group->num_waiting != 0; r++) {
            struct nep_rdv_member *member = group->seats[r].member;
            if (member == NULL || !member->is_waiting) {
                continue;
            }
            if (member->deadline_ns <= now_ns) {
                nep_rdv_expire_gather(hub, member, now_ns);
            } else if (member->deadline_ns < next) {
                next = member->deadline_ns;
            }
        }
    }
    return next;
}
