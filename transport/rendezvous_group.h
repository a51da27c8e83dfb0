/* SPDX-License-Identifier: Apache-2.0 */
/* Between rendezvous_hub.c (who is here) and rendezvous_calls.c (what they ask for); nobody else's.
 */
#ifndef NEP_TRANSPORT_RENDEZVOUS_GROUP_H
#define NEP_TRANSPORT_RENDEZVOUS_GROUP_H

#include "transport/rendezvous_hub.h"
#include "transport/rendezvous_store.h"

enum { SENTENCE = 640, NOTE_AGE_S = 600, MAX_GETS_PER_MEMBER = 64 };

enum seat_state { NEVER_CAME, IS_HERE, HAS_LEFT, WAS_LOST };

struct seat {
    enum seat_state state;
    struct nep_rdv_member *member; /* IS_HERE */
    uint8_t process[16];
    char who[NEP_RDV_WHO_BYTES]; /* "host b, process 77" */
};

struct get {
    struct get *next;
    struct nep_rdv_member *member;
    uint32_t id;
    uint64_t deadline_ns;
    size_t key_len;
    char key[NEP_RDV_MAX_KEY];
};

struct group {
    struct group *next;
    uint64_t number;
    uint32_t num_here;
    uint32_t num_came;
    struct seat *seats; /* [num_ranks] */
    struct nep_rdv_store *store;
    struct get *gets;
    uint32_t num_waiting; /* members in a gather */
    enum nep_status broken;
    char sentence[SENTENCE]; /* why, when broken */
};

struct nep_rdv_hub {
    uint32_t num_ranks;
    nep_rdv_reply_fn reply;
    struct group *groups; /* oldest first */
    uint64_t num_groups;  /* ever */
    uint64_t note_ns;
    char note[SENTENCE];
};

struct nep_rdv_member {
    struct nep_rdv_hub *hub;
    struct group *group;
    void *conn;
    uint32_t rank;
    uint32_t num_gets;
    bool said_goodbye;
    bool is_waiting; /* in a gather */
    uint32_t id;     /* of that gather */
    uint64_t number;
    uint64_t timeout_ns;
    uint64_t deadline_ns;
    uint8_t *part;
    size_t part_len;
};

void nep_rdv_reply_failure(struct nep_rdv_hub *hub, void *conn, uint32_t id, enum nep_status status,
                           const char *sentence);
void nep_rdv_reply_value(struct nep_rdv_hub *hub, void *conn, uint32_t id, const uint8_t *value,
                         size_t len);
/* Printable characters of text, the rest as '?': it goes into messages and logs. */
void nep_rdv_copy_text(char *out, size_t cap, const char *text, size_t len);
/* The group's first failure stays its only one; all who wait get it. */
void nep_rdv_break_group(struct nep_rdv_hub *hub, struct group *group, enum nep_status status,
                         const char *sentence);

enum nep_status nep_rdv_gather(struct nep_rdv_member *member, const struct nep_rdv_message *request,
                               uint64_t now_ns);
void nep_rdv_end_wait(struct nep_rdv_member *member);
void nep_rdv_expire_gather(struct nep_rdv_hub *hub, struct nep_rdv_member *member, uint64_t now_ns);
enum nep_status nep_rdv_get(struct nep_rdv_member *member, const struct nep_rdv_message *request,
                            uint64_t now_ns);
enum nep_status nep_rdv_put_or_cas(struct nep_rdv_member *member,
                                   const struct nep_rdv_message *request);
void nep_rdv_drop_gets(struct nep_rdv_member *member);
/* Lowers *next_p to the next deadline. */
void nep_rdv_expire_gets(struct nep_rdv_hub *hub, struct group *group, uint64_t now_ns,
                         uint64_t *next_p);

#endif
