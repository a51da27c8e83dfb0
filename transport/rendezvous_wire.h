/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bytes of the rendezvous, without sockets: the handshake, the sealed frames, and what is in them.
 * docs/bootstrap.md has the same as a table.
 *
 *   client                                         server
 *   hello: magic, protocol, nonce            ->
 *                                            <-    challenge: magic, protocol, verdict, nonce
 *   proof: MAC of both under the secret      ->
 *                                            <-    welcome: verdict, MAC of both under the secret
 *   frame: length, sealed body               ->
 *                                            <-    frame: length, sealed body
 *
 * Until the proof is right all messages have fixed sizes, so that a stranger cannot ask for memory.
 * After it each direction has a key of its own, derived from the secret and both nonces, and a
 * counter as nonce: a frame that is changed, repeated, left out or taken from another connection
 * does not open. Without a secret the same is done under the empty one, which keeps strangers out
 * as little as no secret can, but still finds damage.
 */
#ifndef NEP_TRANSPORT_RENDEZVOUS_WIRE_H
#define NEP_TRANSPORT_RENDEZVOUS_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum {
    NEP_RDV_PROTOCOL = 1,
    NEP_RDV_NONCE_BYTES = 32,
    NEP_RDV_MAC_BYTES = 32,
    NEP_RDV_KEY_BYTES = 32,
    NEP_RDV_TAG_BYTES = 16,
    NEP_RDV_HELLO_BYTES = 8 + 4 + 4 + NEP_RDV_NONCE_BYTES,     /* magic, protocol, zero, nonce */
    NEP_RDV_CHALLENGE_BYTES = 8 + 4 + 4 + NEP_RDV_NONCE_BYTES, /* magic, protocol, verdict, nonce */
    NEP_RDV_WELCOME_BYTES = 4 + NEP_RDV_MAC_BYTES,
    NEP_RDV_LENGTH_BYTES = 4,
    NEP_RDV_MAX_FRAME = 64 << 20,  /* body of any frame */
    NEP_RDV_MAX_REQUEST = 5 << 20, /* body of a frame to the server */
    NEP_RDV_MAX_VALUE = 1 << 20,   /* one value of the store */
    NEP_RDV_MAX_GATHER = 4 << 20,  /* one rank's part of an allgather */
    NEP_RDV_MAX_KEY = 255,
    NEP_RDV_WHO_BYTES = 96
};

enum nep_rdv_verdict { NEP_RDV_ACCEPTED = 0, NEP_RDV_WRONG_PROTOCOL = 1, NEP_RDV_WRONG_SECRET = 2 };

enum nep_rdv_op {
    NEP_RDV_JOIN = 1,
    NEP_RDV_GATHER = 2,
    NEP_RDV_PUT = 3,
    NEP_RDV_GET = 4,
    NEP_RDV_CAS = 5,
    NEP_RDV_LEAVE = 6,
    NEP_RDV_REPLY = 7
};

/* What the secret becomes: the key of the handshake. */
struct nep_rdv_secret {
    uint8_t key[NEP_RDV_KEY_BYTES];
};
enum nep_status nep_rdv_secret_init(struct nep_rdv_secret *secret, const void *text, size_t len);

/* One side of one connection. */
struct nep_rdv_session {
    bool is_server;
    const struct nep_rdv_secret *secret;
    uint8_t hello[NEP_RDV_HELLO_BYTES];
    uint8_t challenge[NEP_RDV_CHALLENGE_BYTES];
    uint8_t send_key[NEP_RDV_KEY_BYTES], receive_key[NEP_RDV_KEY_BYTES];
    uint64_t num_sent, num_received;
};

void nep_rdv_session_init(struct nep_rdv_session *session, const struct nep_rdv_secret *secret,
                          bool is_server);
void nep_rdv_session_fini(struct nep_rdv_session *session);

/* The client's hello; then, from the server's challenge, the proof. */
void nep_rdv_write_hello(struct nep_rdv_session *session, uint8_t out[NEP_RDV_HELLO_BYTES]);
enum nep_status nep_rdv_answer_challenge(struct nep_rdv_session *session,
                                         const uint8_t in[NEP_RDV_CHALLENGE_BYTES],
                                         uint8_t proof[NEP_RDV_MAC_BYTES]);
enum nep_status nep_rdv_check_welcome(struct nep_rdv_session *session,
                                      const uint8_t in[NEP_RDV_WELCOME_BYTES]);
/* The server's answers. On failure `out` is what to send before closing; *len_p may be 0. */
enum nep_status nep_rdv_answer_hello(struct nep_rdv_session *session,
                                     const uint8_t in[NEP_RDV_HELLO_BYTES],
                                     uint8_t out[NEP_RDV_CHALLENGE_BYTES], size_t *len_p);
enum nep_status nep_rdv_answer_proof(struct nep_rdv_session *session,
                                     const uint8_t in[NEP_RDV_MAC_BYTES],
                                     uint8_t out[NEP_RDV_WELCOME_BYTES]);

/* Seals a body of len bytes at body into out (len + NEP_RDV_TAG_BYTES + NEP_RDV_LENGTH_BYTES). */
void nep_rdv_seal(struct nep_rdv_session *session, const void *body, size_t len, uint8_t *out);
/* The sealed length that a frame's first 4 bytes announce, checked against most. */
enum nep_status nep_rdv_read_length(const uint8_t in[NEP_RDV_LENGTH_BYTES], size_t most,
                                    size_t *sealed_p);
/* Opens in place: the body is at sealed, sealed_len - NEP_RDV_TAG_BYTES bytes. */
enum nep_status nep_rdv_open(struct nep_rdv_session *session,
                             const uint8_t length[NEP_RDV_LENGTH_BYTES], uint8_t *sealed,
                             size_t sealed_len);

/* ---- bodies --------------------------------------------------------------------------------- */

/*
 * A request or a reply, decoded. Pointers point into the frame. Which fields an op uses:
 *   JOIN    id, rank, num_ranks, version, process, text = who, number = 1: takes a lost rank's seat
 *   GATHER  id, timeout_ns, number, value = this rank's part
 *   PUT     id, key, value;  GET  id, timeout_ns, key;  CAS  id, key, expected, value = desired
 *   LEAVE   text = why, "" when all is well
 *   REPLY   id, status, value, or text = the sentence when status is not NEP_OK
 */
struct nep_rdv_message {
    uint32_t op;
    uint32_t id; /* the request that a reply answers */
    int32_t status;
    uint32_t rank, num_ranks, version;
    uint64_t number;
    uint64_t timeout_ns;
    uint8_t process[16];
    const char *text; /* text_len bytes, not ended */
    size_t text_len;
    const char *key;
    size_t key_len;
    const uint8_t *expected;
    size_t expected_len;
    const uint8_t *value;
    size_t value_len;
};

/* Bytes that encode needs; it writes exactly as many. */
size_t nep_rdv_message_bytes(const struct nep_rdv_message *message);
void nep_rdv_message_encode(const struct nep_rdv_message *message, uint8_t *out);
/* Refuses unknown ops, lengths that do not add up, keys and values over their limits. */
enum nep_status nep_rdv_message_decode(const uint8_t *in, size_t len,
                                       struct nep_rdv_message *message);

#endif
