/* SPDX-License-Identifier: Apache-2.0 */
/* Transport `ucx` in a build without UCX's headers: a sentence in its place. */
#include "transport/transport.h"

#if !NEP_HAVE_UCX

static enum nep_status probe(const struct nep_config *config)
{
    (void)config;
    return nep_fail(
        NEP_ERR_UNSUPPORTED,
        "this nearep was built without transport ucx: install the headers of UCX 1.13 or "
        "newer (Debian and Ubuntu: libucx-dev), then build with -DNEP_UCX=ON");
}

static enum nep_status transport_create(const struct nep_transport_params *params,
                                        struct nep_transport **transport_p)
{
    (void)transport_p;
    return probe(params->config);
}

/* No object is ever made, so nothing but these two is ever called. */
const struct nep_transport_ops nep_ucx_ops = {
    .name = "ucx",
    .caps = NEP_CAP_FABRIC | NEP_CAP_THREAD,
    .probe = probe,
    .create = transport_create,
    .put = nep_unsupported_put,
    .peer_window = nep_unsupported_peer_window,
};

#endif
