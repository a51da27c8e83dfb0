/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the proxy of one ep does: a command becomes a put (addresses follow from the plan), what is
 * complete becomes words that kernels look at, and what was read becomes credits. All of it on the
 * proxy's thread.
 */
#ifndef NEP_DISPATCH_CUDA_FABRIC_PROXY_H
#define NEP_DISPATCH_CUDA_FABRIC_PROXY_H

#include "dispatch/cuda/cuda_fabric.h"
#include "dispatch/protocol.h"
#include "transport/transport.h"

struct nep_fabric_proxy_params {
    const struct nep_plan *plan; /* W = V = nep_far_window, nothing rides */
    struct nep_transport *inter;
    uint32_t window;            /* the ep's number */
    uint8_t *words;             /* this rank's, as the host maps them */
    uint8_t *const *node_words; /* [G] those of this node */
    const uint8_t *data;        /* this rank's, as the transport knows it: sources of puts */
    struct nep_far_page *page;
};

struct nep_fabric_proxy;

enum nep_status nep_fabric_proxy_create(const struct nep_fabric_proxy_params *params,
                                        struct nep_fabric_proxy **fabric_p);
void nep_fabric_proxy_destroy(struct nep_fabric_proxy *fabric);
/* For struct nep_proxy_params. */
enum nep_status nep_fabric_proxy_post(void *fabric, uint64_t command, uint32_t *who_p);
bool nep_fabric_proxy_duty(void *fabric);

/* What was put so far: any thread, while it runs. */
struct nep_fabric_stats {
    uint64_t rows;      /* of dispatch */
    uint64_t rows_back; /* of combine */
    uint64_t bytes;
    uint64_t messages;
};
struct nep_fabric_stats nep_fabric_proxy_stats(const struct nep_fabric_proxy *fabric);

/* Fills in the head and the directory that the sink works from. */
void nep_fabric_fill_head(const struct nep_plan *plan, uint32_t rank, uint8_t *words);

#endif
