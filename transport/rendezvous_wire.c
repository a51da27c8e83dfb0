/* SPDX-License-Identifier: Apache-2.0 */
/*
 * All cryptography is libsodium's: BLAKE2b keyed as MAC and to derive keys, ChaCha20-Poly1305 to
 * seal, its constant-time compare. TLS was rejected: certificates have to be made and carried to
 * every node for what a shared secret of one job does, and the handshake here is two fixed messages
 * each way that a fuzzer covers.
 *
 * The client proves first, so that connecting to a server yields nothing to guess a secret with;
 * a server that does not know the secret cannot make the welcome.
 *
 * Numbers are little-endian. A body is one fixed header, then the four variable parts.
 */
#include "transport/rendezvous_wire.h"

#include <sodium.h>
#include <string.h>

_Static_assert(NEP_RDV_TAG_BYTES == crypto_aead_chacha20poly1305_ietf_ABYTES, "the tag's size");
_Static_assert(NEP_RDV_KEY_BYTES == crypto_aead_chacha20poly1305_ietf_KEYBYTES, "the key's size");

static const char magic[8] = {'n', 'e', 'a', 'r', 'e', 'p', 'r', 'v'};

static void put_u32(uint8_t *out, uint32_t value)
{
    for (int i = 0; i < 4; i++) {
        out[i] = (uint8_t)(value >> (8 * i));
    }
}

static uint32_t get_u32(const uint8_t *in)
{
    return (uint32_t)in[0] | (uint32_t)in[1] << 8 | (uint32_t)in[2] << 16 | (uint32_t)in[3] << 24;
}

static void put_u64(uint8_t *out, uint64_t value)
{
    put_u32(out, (uint32_t)value);
    put_u32(out + 4, (uint32_t)(value >> 32));
}

static uint64_t get_u64(const uint8_t *in)
{
    return get_u32(in) | (uint64_t)get_u32(in + 4) << 32;
}

/* ---- keys ----------------------------------------------------------------------------------- */

enum nep_status nep_rdv_secret_init(struct nep_rdv_secret *secret, const void *text, size_t len)
{
    static const char label[] = "nearep rendezvous 1 secret";
    if (sodium_init() < 0) {
        return nep_fail(NEP_ERR_UNSUPPORTED, "libsodium cannot start: no source of random numbers");
    }
    crypto_generichash_state state;
    crypto_generichash_init(&state, NULL, 0, sizeof secret->key);
    crypto_generichash_update(&state, (const unsigned char *)label, sizeof label);
    crypto_generichash_update(&state, text, len);
    crypto_generichash_final(&state, secret->key, sizeof secret->key);
    return NEP_OK;
}

void nep_rdv_session_init(struct nep_rdv_session *session, const struct nep_rdv_secret *secret,
                          bool is_server)
{
    memset(session, 0, sizeof *session);
    session->secret = secret;
    session->is_server = is_server;
}

void nep_rdv_session_fini(struct nep_rdv_session *session)
{
    sodium_memzero(session, sizeof *session);
}

/* 32 bytes from the secret, what they are for, and both first messages. */
static void derive(const struct nep_rdv_session *session, const char *purpose, uint8_t out[32])
{
    crypto_generichash_state state;
    crypto_generichash_init(&state, session->secret->key, sizeof session->secret->key, 32);
    crypto_generichash_update(&state, (const unsigned char *)purpose, strlen(purpose) + 1);
    crypto_generichash_update(&state, session->hello, sizeof session->hello);
    crypto_generichash_update(&state, session->challenge, sizeof session->challenge);
    crypto_generichash_final(&state, out, 32);
}

static void derive_keys(struct nep_rdv_session *session)
{
    derive(session, "client to server",
           session->is_server ? session->receive_key : session->send_key);
    derive(session, "server to client",
           session->is_server ? session->send_key : session->receive_key);
}

/* ---- handshake ------------------------------------------------------------------------------ */

static void write_first(uint8_t *out, uint32_t verdict)
{
    memcpy(out, magic, sizeof magic);
    put_u32(out + 8, NEP_RDV_PROTOCOL);
    put_u32(out + 12, verdict);
    randombytes_buf(out + 16, NEP_RDV_NONCE_BYTES);
}

void nep_rdv_write_hello(struct nep_rdv_session *session, uint8_t out[NEP_RDV_HELLO_BYTES])
{
    write_first(session->hello, 0);
    memcpy(out, session->hello, NEP_RDV_HELLO_BYTES);
}

enum nep_status nep_rdv_answer_hello(struct nep_rdv_session *session,
                                     const uint8_t in[NEP_RDV_HELLO_BYTES],
                                     uint8_t out[NEP_RDV_CHALLENGE_BYTES], size_t *len_p)
{
    *len_p = 0;
    if (memcmp(in, magic, sizeof magic) != 0) {
        return nep_fail(NEP_ERR_FORMAT, "a connection that is not nearep's");
    }
    *len_p = NEP_RDV_CHALLENGE_BYTES;
    uint32_t protocol = get_u32(in + 8);
    bool is_known = protocol == NEP_RDV_PROTOCOL;
    memcpy(session->hello, in, NEP_RDV_HELLO_BYTES);
    write_first(session->challenge, is_known ? NEP_RDV_ACCEPTED : NEP_RDV_WRONG_PROTOCOL);
    memcpy(out, session->challenge, NEP_RDV_CHALLENGE_BYTES);
    if (!is_known) {
        return nep_fail(NEP_ERR_MISMATCH,
                        "a process with protocol %u of the rendezvous, this one has %d: run one "
                        "version of nearep everywhere",
                        protocol, NEP_RDV_PROTOCOL);
    }
    return NEP_OK;
}

enum nep_status nep_rdv_answer_challenge(struct nep_rdv_session *session,
                                         const uint8_t in[NEP_RDV_CHALLENGE_BYTES],
                                         uint8_t proof[NEP_RDV_MAC_BYTES])
{
    if (memcmp(in, magic, sizeof magic) != 0) {
        return nep_fail(NEP_ERR_FORMAT, "what answers there is not a nearep rendezvous: another "
                                        "program uses this port");
    }
    if (get_u32(in + 8) != NEP_RDV_PROTOCOL || get_u32(in + 12) != NEP_RDV_ACCEPTED) {
        return nep_fail(NEP_ERR_MISMATCH,
                        "the rendezvous has protocol %u, this process %d: run one version of "
                        "nearep everywhere",
                        get_u32(in + 8), NEP_RDV_PROTOCOL);
    }
    memcpy(session->challenge, in, NEP_RDV_CHALLENGE_BYTES);
    derive(session, "client proves", proof);
    return NEP_OK;
}

enum nep_status nep_rdv_answer_proof(struct nep_rdv_session *session,
                                     const uint8_t in[NEP_RDV_MAC_BYTES],
                                     uint8_t out[NEP_RDV_WELCOME_BYTES])
{
    uint8_t expected[NEP_RDV_MAC_BYTES];
    derive(session, "client proves", expected);
    bool is_right = sodium_memcmp(in, expected, sizeof expected) == 0;
    sodium_memzero(expected, sizeof expected);
    memset(out, 0, NEP_RDV_WELCOME_BYTES);
    put_u32(out, is_right ? NEP_RDV_ACCEPTED : NEP_RDV_WRONG_SECRET);
    if (!is_right) {
        return nep_fail(NEP_ERR_MISMATCH, "a process that does not know the secret");
    }
    derive(session, "server proves", out + 4);
    derive_keys(session);
    return NEP_OK;
}

enum nep_status nep_rdv_check_welcome(struct nep_rdv_session *session,
                                      const uint8_t in[NEP_RDV_WELCOME_BYTES])
{
    uint8_t expected[NEP_RDV_MAC_BYTES];
    derive(session, "server proves", expected);
    bool is_right =
        get_u32(in) == NEP_RDV_ACCEPTED && sodium_memcmp(in + 4, expected, sizeof expected) == 0;
    sodium_memzero(expected, sizeof expected);
    if (!is_right) {
        return nep_fail(NEP_ERR_MISMATCH,
                        "the rendezvous has another secret than this rank: set the same "
                        "NEP_SECRET or NEP_SECRET_FILE everywhere, or nowhere");
    }
    derive_keys(session);
    return NEP_OK;
}

/* ---- frames --------------------------------------------------------------------------------- */

static void frame_nonce(uint64_t number, uint8_t out[crypto_aead_chacha20poly1305_ietf_NPUBBYTES])
{
    memset(out, 0, crypto_aead_chacha20poly1305_ietf_NPUBBYTES);
    put_u64(out + 4, number);
}

void nep_rdv_seal(struct nep_rdv_session *session, const void *body, size_t len, uint8_t *out)
{
    uint8_t nonce[crypto_aead_chacha20poly1305_ietf_NPUBBYTES];
    frame_nonce(session->num_sent++, nonce);
    put_u32(out, (uint32_t)(len + NEP_RDV_TAG_BYTES));
    crypto_aead_chacha20poly1305_ietf_encrypt(out + NEP_RDV_LENGTH_BYTES, NULL, body, len, out,
                                              NEP_RDV_LENGTH_BYTES, NULL, nonce, session->send_key);
}

enum nep_status nep_rdv_read_length(const uint8_t in[NEP_RDV_LENGTH_BYTES], size_t most,
                                    size_t *sealed_p)
{
    size_t sealed = get_u32(in);
    if (sealed < NEP_RDV_TAG_BYTES || sealed > most + NEP_RDV_TAG_BYTES) {
        return nep_fail(NEP_ERR_FORMAT,
                        "a rendezvous message of %zu bytes, between %d and %zu are possible",
                        sealed, NEP_RDV_TAG_BYTES, most + NEP_RDV_TAG_BYTES);
    }
    *sealed_p = sealed;
    return NEP_OK;
}

enum nep_status nep_rdv_open(struct nep_rdv_session *session,
                             const uint8_t length[NEP_RDV_LENGTH_BYTES], uint8_t *sealed,
                             size_t sealed_len)
{
    uint8_t nonce[crypto_aead_chacha20poly1305_ietf_NPUBBYTES];
    frame_nonce(session->num_received, nonce);
    if (crypto_aead_chacha20poly1305_ietf_decrypt(sealed, NULL, NULL, sealed, sealed_len, length,
                                                  NEP_RDV_LENGTH_BYTES, nonce,
                                                  session->receive_key) != 0) {
        return nep_fail(NEP_ERR_FORMAT,
                        "rendezvous message %llu does not open: it was damaged, repeated or forged",
                        (unsigned long long)session->num_received);
    }
    session->num_received++;
    return NEP_OK;
}

/* ---- bodies --------------------------------------------------------------------------------- */

enum { HEADER_BYTES = 6 * 4 + 2 * 8 + 16 + 4 * 4 };

size_t nep_rdv_message_bytes(const struct nep_rdv_message *message)
{
    return HEADER_BYTES + message->text_len + message->key_len + message->expected_len +
           message->value_len;
}

static uint8_t *put_part(uint8_t *out, const void *part, size_t len)
{
    if (len != 0) {
        memcpy(out, part, len);
    }
    return out + len;
}

void nep_rdv_message_encode(const struct nep_rdv_message *message, uint8_t *out)
{
    put_u32(out, message->op);
    put_u32(out + 4, message->id);
    put_u32(out + 8, (uint32_t)message->status);
    put_u32(out + 12, message->rank);
    put_u32(out + 16, message->num_ranks);
    put_u32(out + 20, message->version);
    put_u64(out + 24, message->number);
    put_u64(out + 32, message->timeout_ns);
    memcpy(out + 40, message->process, 16);
    put_u32(out + 56, (uint32_t)message->text_len);
    put_u32(out + 60, (uint32_t)message->key_len);
    put_u32(out + 64, (uint32_t)message->expected_len);
    put_u32(out + 68, (uint32_t)message->value_len);
    uint8_t *at = put_part(out + HEADER_BYTES, message->text, message->text_len);
    at = put_part(at, message->key, message->key_len);
    at = put_part(at, message->expected, message->expected_len);
    put_part(at, message->value, message->value_len);
}

static enum nep_status check_limits(const struct nep_rdv_message *message)
{
    size_t most_value = message->op == NEP_RDV_GATHER  ? NEP_RDV_MAX_GATHER
                        : message->op == NEP_RDV_REPLY ? NEP_RDV_MAX_FRAME
                                                       : NEP_RDV_MAX_VALUE;
    bool has_key = message->op >= NEP_RDV_PUT && message->op <= NEP_RDV_CAS;
    if (message->op < NEP_RDV_JOIN || message->op > NEP_RDV_REPLY) {
        return nep_fail(NEP_ERR_FORMAT, "rendezvous operation %u does not exist", message->op);
    }
    if (message->key_len > NEP_RDV_MAX_KEY || has_key != (message->key_len != 0)) {
        return nep_fail(NEP_ERR_FORMAT, "a key of %zu bytes in rendezvous operation %u",
                        message->key_len, message->op);
    }
    if (message->value_len > most_value || message->expected_len > NEP_RDV_MAX_VALUE) {
        return nep_fail(NEP_ERR_FORMAT,
                        "a value of %zu bytes in rendezvous operation %u, at most "
                        "%zu fit",
                        message->value_len, message->op, most_value);
    }
    return NEP_OK;
}

enum nep_status nep_rdv_message_decode(const uint8_t *in, size_t len,
                                       struct nep_rdv_message *message)
{
    if (len < HEADER_BYTES) {
        return nep_fail(NEP_ERR_FORMAT,
                        "a rendezvous message of %zu bytes, shorter than its header", len);
    }
    struct nep_rdv_message read = {
        .op = get_u32(in),
        .id = get_u32(in + 4),
        .status = (int32_t)get_u32(in + 8),
        .rank = get_u32(in + 12),
        .num_ranks = get_u32(in + 16),
        .version = get_u32(in + 20),
        .number = get_u64(in + 24),
        .timeout_ns = get_u64(in + 32),
        .text_len = get_u32(in + 56),
        .key_len = get_u32(in + 60),
        .expected_len = get_u32(in + 64),
        .value_len = get_u32(in + 68),
    };
    memcpy(read.process, in + 40, sizeof read.process);
    /* Four lengths below 2^32 cannot overflow the sum in 64 bits. */
    if ((uint64_t)read.text_len + read.key_len + read.expected_len + read.value_len !=
        len - HEADER_BYTES) {
        return nep_fail(NEP_ERR_FORMAT,
                        "a rendezvous message of %zu bytes whose parts do not add up to it", len);
    }
    enum nep_status status = check_limits(&read);
    if (status != NEP_OK) {
        return status;
    }
    read.text = (const char *)in + HEADER_BYTES;
    read.key = read.text + read.text_len;
    read.expected = (const uint8_t *)read.key + read.key_len;
    read.value = read.expected + read.expected_len;
    *message = read;
    return NEP_OK;
}
