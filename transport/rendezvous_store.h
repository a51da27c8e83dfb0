/* SPDX-License-Identifier: Apache-2.0 */
/* The values of one group: keys and values are bytes, in memory, bounded. One thread. */
#ifndef NEP_TRANSPORT_RENDEZVOUS_STORE_H
#define NEP_TRANSPORT_RENDEZVOUS_STORE_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

struct nep_rdv_store;

struct nep_rdv_value {
    const uint8_t *data; /* NULL: the key is missing */
    size_t len;
};

enum nep_status nep_rdv_store_create(struct nep_rdv_store **store_p);
void nep_rdv_store_destroy(struct nep_rdv_store *store);
/* Valid until the key is set again. */
struct nep_rdv_value nep_rdv_store_find(const struct nep_rdv_store *store, const char *key,
                                        size_t key_len);
/* NEP_ERR_OVERFLOW when the store is full. */
enum nep_status nep_rdv_store_set(struct nep_rdv_store *store, const char *key, size_t key_len,
                                  const void *value, size_t len);

#endif
