/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who lives, agreed on through the store that was given at bootstrap, and an allgather among those
 * alone. A communicator's generations follow each other: the k-th decision is the value of one key
 * of the store, set once by compare-and-swap, so two ranks that lost sight of each other cannot
 * decide differently, and one that is not in a decision learns that it is out.
 *
 * A group that is to grow is prepared before it is decided: members and newcomers make everything
 * that the larger group needs, beside what they work with, and each says in its card that it has.
 * Only where all say so does the decision let them change over to it.
 */
#ifndef NEP_TRANSPORT_GROUP_H
#define NEP_TRANSPORT_GROUP_H

#include <stdatomic.h>
#include <stdbool.h>

#include "base/status.h"
#include "nearep.h"

enum { NEP_GROUP_OPS = 64 };

/* Where one series of operations stands: an ep's. */
struct nep_group_ops {
    uint64_t next[NEP_GROUP_OPS];      /* number of the next operation begun */
    uint64_t completed[NEP_GROUP_OPS]; /* operations completed; UINT64_MAX: it has no say */
};

/* Of a decision: the prepared newcomers did not come, all stays as it is. */
#define NEP_GROUP_KEPT UINT64_MAX

struct nep_group_decision {
    uint64_t generation;
    uint64_t prepared; /* the number of what all have prepared; 0: everything is made anew */
    uint32_t series;   /* of the keys of the members' exchanges; see nep_group_init */
    uint32_t reserved;
    uint32_t num_ranks;
    uint32_t num_live;
    struct nep_group_ops ops; /* next: the largest, completed: the smallest of all old members */
    struct nep_group_seat {
        uint32_t node;
        uint8_t is_live;
        uint8_t reserved[3];
        uint64_t machine; /* where process ids mean the same; 0: unknown */
        int64_t pid;
        uint64_t ticket; /* of the card that the seat was given for */
    } seats[];           /* [num_ranks] */
};

/*
 * What a newcomer makes beside asking for its seat, as it is told; NULL: nothing, it waits. No call
 * blocks.
 */
struct nep_group_preparer {
    /* What is to be prepared has been decided. */
    void (*begin)(void *ctx, uint64_t number, const struct nep_group_decision *decision);
    /* 1: made; 0: not yet; -1: that failed, it may be dropped. */
    int (*state)(void *ctx);
    /* Where the members' operations stand, once they are about to change over. */
    void (*set_ops)(void *ctx, const struct nep_group_ops *ops);
    /* It is not going to be used. */
    void (*drop)(void *ctx);
};

struct nep_group_vote {
    const struct nep_bootstrap *store; /* has put, get and cas */
    uint32_t rank;
    uint32_t num_ranks;
    uint64_t generation;          /* to be decided; ignored for a newcomer */
    const uint8_t *was_live;      /* [num_ranks] members of the last one; NULL: a newcomer */
    const uint8_t *is_lost;       /* [num_ranks] 1: the caller knows that it is gone; may be NULL */
    const uint32_t *node_of_rank; /* [num_ranks]; not for a newcomer */
    uint32_t suspect;             /* blamed, may yet come; UINT32_MAX: nobody */
    uint32_t num_new;             /* newcomers to wait for */
    /* a member: what it has prepared, with nothing of its own under way; 0: nothing */
    uint64_t prepared;
    const struct nep_group_decision *preparation; /* who is in that; NULL: nothing */
    const struct nep_group_preparer *preparer;    /* a newcomer's; may be NULL */
    bool (*is_gone)(void *ctx, uint32_t rank);    /* the transports know that it ended */
    void *ctx;
    struct nep_group_ops ops;
    uint64_t timeout_ns;
};

/*
 * Waits, bounded by twice the timeout, for one decision that all who take part in it get alike.
 * NEP_ERR_PEER_LOST: it was made without this rank. *decision_p is to be freed.
 */
enum nep_status nep_group_agree(const struct nep_group_vote *vote,
                                struct nep_group_decision **decision_p);
/*
 * Members: who is to be in a generation that is prepared, under `number`: all of them, and
 * vote->num_new newcomers, which are waited for. `series` of that generation's exchanges. Bounded
 * by the timeout, ended early by *is_cancelled. *decision_p is to be freed.
 */
enum nep_status nep_group_prepare(const struct nep_group_vote *vote, uint64_t number,
                                  uint32_t series, const atomic_bool *is_cancelled,
                                  struct nep_group_decision **decision_p);
static inline bool nep_group_lives(const struct nep_group_decision *decision, uint32_t rank)
{
    return decision->seats[rank].is_live != 0;
}
/* How many newcomers have asked for a seat in `generation`. About a millisecond for each empty
 * seat. */
enum nep_status nep_group_newcomers(const struct nep_bootstrap *store, uint32_t num_ranks,
                                    const uint8_t *is_live, uint64_t generation, uint32_t *num_p);

/* The members of one generation; its ctx for nep_bootstrap. */
struct nep_group {
    struct nep_bootstrap store;
    uint64_t generation;
    uint64_t num_gathers;
    uint32_t num_ranks; /* seats */
    uint32_t num;       /* members */
    uint32_t idx;       /* of this rank among them */
    uint32_t *members;  /* [num] ranks, ascending */
    int *pidfds;        /* [num] of members on this machine, while they are watched; else < 0 */
    uint64_t stamp;     /* tells the exchanges of one group from all earlier ones of its series */
    uint32_t series;
    const atomic_bool *is_cancelled; /* true ends an exchange; may be NULL */
    enum nep_status failed;          /* of the first exchange that did, and its sentence */
    char why[256];
};
/*
 * Groups whose exchanges may be under way at once are of different series (of three): what is
 * prepared is of another than what it is to replace, and than 0, that of groups that were not
 * prepared.
 */
enum { NEP_GROUP_SERIES = 3 };
static inline uint32_t nep_group_next_series(uint32_t series)
{
    return series == 1 ? 2 : 1;
}
enum nep_status nep_group_init(struct nep_group *group, const struct nep_bootstrap *store,
                               const struct nep_group_decision *decision, uint32_t rank);
void nep_group_fini(struct nep_group *group);
/* Whether the rank's process is watched, and has ended. */
bool nep_group_saw_end(const struct nep_group *group, uint32_t rank);
/* The end of a member's process that could be seen ends exchanges until here; not any more. */
void nep_group_unwatch(struct nep_group *group);
/* An allgather among the members, in their order; put, get and cas of the store. */
void nep_group_bootstrap(struct nep_group *group, struct nep_bootstrap *out);
/* True for a bootstrap made by nep_group_bootstrap. */
bool nep_group_is(const struct nep_bootstrap *bootstrap);

#endif
