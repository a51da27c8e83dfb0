/* SPDX-License-Identifier: Apache-2.0 */
/* Between group.c (who lives), group_prepare.c (who is to join) and group_gather.c (the members'
 * exchange); nobody else's. */
#ifndef NEP_TRANSPORT_GROUP_CARD_H
#define NEP_TRANSPORT_GROUP_CARD_H

#include <sys/types.h>
#include <time.h>

#include "transport/group.h"

enum { NEP_GROUP_KEY_BYTES = 64 };

/* What a rank that wants the next generation says of itself. */
struct nep_group_card {
    uint64_t generation;
    uint32_t rank;
    uint32_t is_new;
    uint32_t suspect;
    uint32_t reserved;
    uint64_t machine;
    int64_t pid;
    uint64_t ticket; /* another in each newcomer */
    uint64_t prepared;
    struct nep_group_ops ops;
};

static inline void nep_group_pause(uint64_t ns)
{
    nanosleep(&(struct timespec){.tv_nsec = (long)ns}, NULL);
}

static inline size_t nep_group_decision_bytes(uint32_t num_ranks)
{
    return sizeof(struct nep_group_decision) + num_ranks * sizeof(struct nep_group_seat);
}

/* A key's value of exactly `bytes` bytes; false when it is not there in time, or is another size.
 */
bool nep_group_read(const struct nep_bootstrap *store, const char *key, void *value, size_t bytes,
                    uint64_t timeout_ns);
/* What this rank says; `what` is the first part of the key. */
enum nep_status nep_group_put_card(const struct nep_group_vote *vote, const char *what,
                                   uint64_t generation, uint64_t ticket, uint64_t prepared);
/* What `rank` says of `generation`; false: nothing, in time. */
bool nep_group_read_card(const struct nep_bootstrap *store, const char *what, uint64_t generation,
                         uint32_t rank, uint64_t timeout_ns, struct nep_group_card *card);
/* A card's rank takes its seat in a decision. */
void nep_group_seat_take(struct nep_group_decision *decision, const struct nep_group_card *card);
/* Watches a process; and whether what that returned says that it has ended. */
int nep_group_watch(pid_t pid);
bool nep_group_has_ended(int watched);
/* The last decision about what is prepared for a generation; false where it is older than `number`,
 * or there is none in time. decision is changed in any case. */
bool nep_group_read_preparation(const struct nep_group_vote *vote, uint64_t generation,
                                uint64_t number, uint64_t timeout_ns,
                                struct nep_group_decision *decision);
/* Every seat's node, nobody in it. */
void nep_group_decision_init(struct nep_group_decision *decision,
                             const struct nep_group_vote *vote);

#endif
