/* SPDX-License-Identifier: Apache-2.0 */
/* Between rendezvous_client.c (calls), rendezvous_open.c (how a connection is made) and
 * rendezvous_stream.c (its bytes); nobody else's. */
#ifndef NEP_TRANSPORT_RENDEZVOUS_CLIENT_H
#define NEP_TRANSPORT_RENDEZVOUS_CLIENT_H

#include <pthread.h>
#include <sys/types.h>

#include "transport/rendezvous.h"
#include "transport/rendezvous_wire.h"

enum { NEP_RDV_SENTENCE = 700 };

struct call;

struct nep_rendezvous_client {
    int fd;
    pid_t pid; /* the process that opened it */
    struct nep_rdv_secret secret;
    struct nep_rdv_session session;
    char name[384]; /* "the rendezvous at node0:29600" */
    uint32_t rank, num_ranks;
    bool is_newcomer;
    uint64_t leave_ns;
    struct nep_rendezvous_server *server; /* hosted by this rank, or NULL */
    pthread_mutex_t mutex;                /* guards what follows, and sending */
    pthread_cond_t changed;
    bool is_reading; /* one of the callers, outside the mutex; it owns `in` then */
    struct call *calls;
    uint32_t num_calls;
    uint64_t num_gathers;
    uint64_t answer_ns; /* what the way there and back is taken to last; see nep_rdv_answer_ns */
    enum nep_status broken;
    char sentence[NEP_RDV_SENTENCE];
    uint8_t *in;
    size_t in_cap, in_have;
};

/* Sends all of it, or breaks the connection trying. */
enum nep_status nep_rdv_send_all(struct nep_rendezvous_client *client, const uint8_t *bytes,
                                 size_t len, uint64_t deadline_ns);
/* The next `bytes` bytes, into client->in. What a deadline cut off goes on at the next call. */
enum nep_status nep_rdv_receive(struct nep_rendezvous_client *client, size_t bytes,
                                uint64_t deadline_ns);
enum nep_status nep_rdv_send_message(struct nep_rendezvous_client *client,
                                     const struct nep_rdv_message *message, uint64_t deadline_ns);
/* The next message; its pointers are good until the next call. */
enum nep_status nep_rdv_receive_message(struct nep_rendezvous_client *client, uint64_t deadline_ns,
                                        struct nep_rdv_message *message);
void nep_rdv_client_destroy(struct nep_rendezvous_client *client);

/*
 * How long an answer is waited for; learnt_ns: what the way there and back took of late.
 * A get may be a short look at a key, over a wire on which an answer takes longer than that; those
 * who look again and again would never see it. So the answer has its own time.
 * A gather is ended by the server within its timeout, with who is missing. A server that gets no
 * core just then is late with that, and the caller would name the rendezvous in place of the rank:
 * a quarter of the timeout more, two seconds at most.
 */
uint64_t nep_rdv_answer_ns(const struct nep_rdv_message *request, uint64_t learnt_ns);

#endif
