/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A chained hash table of fixed width: a group has tens of keys, at most some thousands. The limits
 * are on sums, so that no pattern of requests takes more than MAX_BYTES of the host that serves.
 */
#include "transport/rendezvous_store.h"

#include <stdlib.h>
#include <string.h>

enum { NUM_CHAINS = 256, MAX_KEYS = 1 << 16, MAX_BYTES = 256 << 20 };

struct item {
    struct item *next;
    uint8_t *value;
    size_t len;
    size_t key_len;
    char key[];
};

struct nep_rdv_store {
    struct item *chains[NUM_CHAINS];
    size_t num_keys;
    size_t num_bytes;
};

enum nep_status nep_rdv_store_create(struct nep_rdv_store **store_p)
{
    struct nep_rdv_store *store = calloc(1, sizeof *store);
    if (store == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for the rendezvous' store");
    }
    *store_p = store;
    return NEP_OK;
}

void nep_rdv_store_destroy(struct nep_rdv_store *store)
{
    for (size_t i = 0; store != NULL && i < NUM_CHAINS; i++) {
        while (store->chains[i] != NULL) {
            struct item *item = store->chains[i];
            store->chains[i] = item->next;
            free(item->value);
            free(item);
        }
    }
    free(store);
}

static size_t chain_of(const char *key, size_t len)
{
    uint32_t hash = 2166136261u; /* FNV-1a */
    for (size_t i = 0; i < len; i++) {
        hash = (hash ^ (uint8_t)key[i]) * 16777619u;
    }
    return (hash ^ hash >> 16) % NUM_CHAINS;
}

static struct item *find_item(const struct nep_rdv_store *store, const char *key, size_t key_len)
{
    struct item *item = store->chains[chain_of(key, key_len)];
    while (item != NULL && (item->key_len != key_len || memcmp(item->key, key, key_len) != 0)) {
        item = item->next;
    }
    return item;
}

struct nep_rdv_value nep_rdv_store_find(const struct nep_rdv_store *store, const char *key,
                                        size_t key_len)
{
    const struct item *item = find_item(store, key, key_len);
    if (item == NULL) {
        return (struct nep_rdv_value){NULL, 0};
    }
    return (struct nep_rdv_value){item->value, item->len};
}

enum nep_status nep_rdv_store_set(struct nep_rdv_store *store, const char *key, size_t key_len,
                                  const void *value, size_t len)
{
    struct item *item = find_item(store, key, key_len);
    size_t freed = item == NULL ? 0 : item->len;
    size_t added = len + (item == NULL ? key_len : 0);
    if ((item == NULL && store->num_keys >= MAX_KEYS) ||
        store->num_bytes - freed + added > MAX_BYTES) {
        return nep_fail(
            NEP_ERR_OVERFLOW,
            "the rendezvous' store is full: %zu keys and %zu bytes of at most %d and %d",
            store->num_keys, store->num_bytes, MAX_KEYS, MAX_BYTES);
    }
    /* One byte more, so that an empty value is a pointer too. */
    uint8_t *copy = malloc(len + 1);
    if (copy != NULL && item == NULL) {
        item = malloc(sizeof *item + key_len);
        if (item == NULL) {
            free(copy);
            copy = NULL;
        } else {
            size_t chain = chain_of(key, key_len);
            *item = (struct item){.next = store->chains[chain], .key_len = key_len};
            memcpy(item->key, key, key_len);
            store->chains[chain] = item;
            store->num_keys++;
        }
    }
    if (copy == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for a value of %zu bytes in the rendezvous",
                        len);
    }
    if (len != 0) {
        memcpy(copy, value, len);
    }
    free(item->value);
    item->value = copy;
    item->len = len;
    store->num_bytes += added - freed;
    return NEP_OK;
}
