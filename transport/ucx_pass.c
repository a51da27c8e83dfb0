/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a rank knows whose message it has: each pair of ranks agrees on two numbers, one for each
 * direction, that no other rank can work out, and every message begins with the one of its pair. An
 * exchange of public keys (X25519) among all ranks is enough for that, though everybody sees all of
 * it: it goes over the bootstrap, which is trusted to say who is who. Rejected: the connection that
 * a message came by. UCX tells it only where the sender asks for an answer, in more bytes.
 */
#if NEP_HAVE_UCX

#include <sodium.h>
#include <string.h>

#include "transport/ucx.h"

_Static_assert(NEP_UCX_KEY_BYTES == crypto_box_PUBLICKEYBYTES &&
                   NEP_UCX_KEY_BYTES == crypto_box_SECRETKEYBYTES,
               "sizes of keys");

enum nep_status nep_ucx_keys_make(struct nep_ucx_keys *keys)
{
    if (sodium_init() < 0 || crypto_box_keypair(keys->open, keys->secret) != 0) {
        return nep_fail(NEP_ERR_INTERNAL, "transport ucx: libsodium cannot make a key");
    }
    return NEP_OK;
}

static uint32_t pass_of(const uint8_t shared[crypto_box_BEFORENMBYTES], uint32_t src, uint32_t dst)
{
    const uint32_t way[2] = {src, dst};
    uint8_t hash[crypto_generichash_BYTES_MIN];
    uint32_t pass;
    crypto_generichash(hash, sizeof hash, (const uint8_t *)way, sizeof way, shared,
                       crypto_box_BEFORENMBYTES);
    memcpy(&pass, hash, sizeof pass);
    return pass;
}

enum nep_status nep_ucx_pass_agree(struct nep_ucx *ux, const struct nep_ucx_keys *keys,
                                   uint32_t rank, const uint8_t open[NEP_UCX_KEY_BYTES])
{
    uint8_t shared[crypto_box_BEFORENMBYTES];
    if (crypto_box_beforenm(shared, open, keys->secret) != 0) {
        return nep_fail(NEP_ERR_MISMATCH, "rank %u announced a ucx key that is none", rank);
    }
    ux->peers[rank].pass_from = pass_of(shared, rank, ux->rank);
    ux->peers[rank].pass_to = pass_of(shared, ux->rank, rank);
    sodium_memzero(shared, sizeof shared);
    return NEP_OK;
}

void nep_ucx_keys_forget(struct nep_ucx_keys *keys)
{
    sodium_memzero(keys, sizeof *keys);
}

#endif
