/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory of a rank's own that other ranks of its node come to reach: offered as a card, which
 * travels through the bootstrap, and attached by each of them. Ranks of one process share their
 * addresses; others map the file behind the memory, opened through /proc/PID/fd as windows are.
 */
#ifndef NEP_TRANSPORT_SHARE_H
#define NEP_TRANSPORT_SHARE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

struct nep_share_card {
    uint64_t address; /* in the process that offers it */
    uint64_t bytes;   /* 0: nothing is offered */
    uint64_t process; /* a number that the process drew */
    uint64_t inode;
    uint64_t device;
    uint64_t offset; /* of the address, in the file */
    int32_t pid;
    int32_t fd; /* -1: memory without a file */
};

/* Another rank's memory as it is reached here. */
struct nep_share {
    uint8_t *base; /* NULL: nothing was offered */
    void *mapping; /* NULL: of this process */
    size_t mapped_bytes;
};

/*
 * fd >= 0: [base, base + bytes) must be a shared, writable mapping of that file, which is looked
 * up; -1: ordinary memory. The card holds a duplicate of fd until nep_share_withdraw, which comes
 * when all have attached.
 */
enum nep_status nep_share_offer(void *base, size_t bytes, int fd, struct nep_share_card *card_p);
void nep_share_withdraw(struct nep_share_card *card);

/* name: what the rank that offers it is called. */
enum nep_status nep_share_attach(const struct nep_share_card *card, uint32_t name,
                                 struct nep_share *share_p);
void nep_share_detach(struct nep_share *share);

#endif
