/* SPDX-License-Identifier: Apache-2.0 */
/* Between the adversary's operations table (adversary.c) and the puts it holds (adversary_hold.c).
 */
#ifndef NEP_TRANSPORT_ADVERSARY_H
#define NEP_TRANSPORT_ADVERSARY_H

#include <pthread.h>

#include "transport/transport.h"

enum { NEP_ADVERSARY_WINDOWS = 64 };

/* A put that was taken and is not complete. */
struct nep_adversary_held {
    struct nep_adversary_held *next;
    struct nep_put put;
    uint64_t number; /* of its destination */
    uint64_t due_ns;
    uint64_t inner;       /* number that the inner fabric gave it */
    uint32_t num_parts;   /* in which its bytes land */
    uint32_t parts_left;  /* bit set */
    uint32_t num_repeats; /* how often it comes again */
    uint32_t num_sent;    /* announcements so far */
    bool is_busy;         /* a thread has it in hand */
    bool is_posted;       /* the inner fabric has the last copy */
};

struct nep_adversary_lane {
    uint64_t issued;
    uint64_t completed;
};

struct nep_adversary {
    struct nep_transport transport;
    struct nep_transport_ops ops; /* this one's own: caps depend on what is wrapped */
    struct nep_transport *inner;
    bool is_mapped;
    uint32_t num_lanes;
    size_t window_bytes[NEP_ADVERSARY_WINDOWS];
    pthread_t thread;
    bool has_thread;
    /* The lock guards all below. */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool is_closing;
    struct nep_adversary_held *held;
    struct nep_adversary_lane *lanes; /* [num_lanes] */
    uint64_t random;
    uint64_t num_puts;
    uint64_t put_bytes;
    uint64_t num_repeats;
};

enum nep_status nep_adversary_hold(struct nep_adversary *adversary, const struct nep_put *put,
                                   uint64_t *number_p);
/* Does what is due, with the lock held. Returns the time at which more is due. */
uint64_t nep_adversary_deliver(struct nep_adversary *adversary);
/* Sends at once what is held for a window, or all (UINT32_MAX). Waits for no peer. */
void nep_adversary_flush(struct nep_adversary *adversary, uint32_t window);
/* The thread. */
void *nep_adversary_main(void *arg);

#endif
