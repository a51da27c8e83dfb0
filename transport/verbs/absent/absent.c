/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Stands for the verbs transport where nearep was built without infiniband/verbs.h. It keeps its
 * name and says what is missing, so "verbs" is never an unknown word.
 */
#include "transport/bootstrap.h"
#include "transport/transport.h"

extern const struct nep_transport_ops nep_verbs_ops;

static enum nep_status absent(void)
{
    return nep_fail(NEP_ERR_UNSUPPORTED, "verbs: nearep was built without infiniband/verbs.h: "
                                         "install libibverbs-dev and build it again");
}

static enum nep_status absent_probe(const struct nep_config *config)
{
    (void)config;
    return absent();
}

static enum nep_status absent_create(const struct nep_transport_params *params,
                                     struct nep_transport **transport_p)
{
    (void)transport_p;
    /* The others may have it: they must hear. */
    return nep_bootstrap_common(params->bootstrap, params->topology->rank,
                                params->topology->num_ranks, absent(), params->timeout_ns);
}

const struct nep_transport_ops nep_verbs_ops = {
    .name = "verbs",
    .caps = NEP_CAP_FABRIC | NEP_CAP_THREAD,
    .probe = absent_probe,
    .create = absent_create,
};
