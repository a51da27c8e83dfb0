/* SPDX-License-Identifier: Apache-2.0 */
/* The one list of transports, in the order in which "auto" prefers them for the fabric. */
#include <string.h>

#include "transport/transport.h"

extern const struct nep_transport_ops nep_adversary_ops;
extern const struct nep_transport_ops nep_loop_ops;
extern const struct nep_transport_ops nep_shm_ops;
extern const struct nep_transport_ops nep_ucx_ops;
extern const struct nep_transport_ops nep_verbs_ops;

const struct nep_transport_ops *const nep_transport_list[] = {
    &nep_shm_ops, &nep_verbs_ops, &nep_ucx_ops, &nep_loop_ops, &nep_adversary_ops, NULL,
};

enum nep_status nep_transport_find(const char *name, const struct nep_transport_ops **ops_p,
                                   const char **args_p)
{
    size_t len = strcspn(name, ":");
    char known[256] = "";
    for (const struct nep_transport_ops *const *ops = nep_transport_list; *ops != NULL; ops++) {
        if (strlen((*ops)->name) == len && memcmp((*ops)->name, name, len) == 0) {
            *ops_p = *ops;
            *args_p = name[len] == ':' ? name + len + 1 : "";
            return NEP_OK;
        }
        strncat(known, known[0] != '\0' ? ", " : "", sizeof known - strlen(known) - 1);
        strncat(known, (*ops)->name, sizeof known - strlen(known) - 1);
    }
    return nep_fail(NEP_ERR_NOT_FOUND, "there is no transport \"%s\"; there are %s", name, known);
}

uint32_t nep_transport_caps(const char *name)
{
    const struct nep_transport_ops *ops, *inner;
    const char *args, *inner_args;
    if (nep_transport_find(name, &ops, &args) != NEP_OK) {
        return 0;
    }
    const char *wrapped = args[0] != '\0' ? args : NEP_TRANSPORT_WRAPPED;
    bool has_inner = (ops->caps & NEP_CAP_WRAPPER) != 0 &&
                     nep_transport_find(wrapped, &inner, &inner_args) == NEP_OK;
    return ops->caps | (has_inner ? inner->caps & NEP_CAP_MAPPED : 0);
}

enum nep_status nep_unsupported_put(struct nep_transport *transport, const struct nep_put *put,
                                    uint64_t *number_p)
{
    (void)put;
    (void)number_p;
    return nep_fail(NEP_ERR_UNSUPPORTED, "transport %s has no put", transport->ops->name);
}

enum nep_status nep_open_window_grant(struct nep_transport *transport, uint32_t window,
                                      const struct nep_grant *grants, uint32_t num_grants)
{
    (void)transport;
    (void)window;
    (void)grants;
    (void)num_grants;
    return NEP_OK;
}

void nep_unsupported_window_retire(struct nep_transport *transport, uint32_t window,
                                   size_t keep_offset, size_t keep_bytes)
{
    (void)keep_offset;
    (void)keep_bytes;
    transport->ops->window_destroy(transport, window);
}

void nep_unsupported_abandon(struct nep_transport *transport, uint32_t rank)
{
    (void)transport;
    (void)rank;
}

void *nep_unsupported_peer_window(struct nep_transport *transport, uint32_t window, uint32_t rank)
{
    (void)transport;
    (void)window;
    (void)rank;
    return NULL;
}
