/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The executor over several nodes: an ep's and a handle's part of the fabric, and the launches of
 * its halves. exec.c and exec_ops.c call these where the communicator has more than one node.
 */
#ifndef NEP_DISPATCH_CUDA_EXEC_FAR_H
#define NEP_DISPATCH_CUDA_EXEC_FAR_H

#include "dispatch/cuda/exec.h"
#include "dispatch/cuda/fabric_proxy.h"
#include "dispatch/cuda/far_plan.h"
#include "dispatch/cuda/proxy.h"

struct nep_device_far {
    struct nep_far_plan plan;
    struct nep_far far;
    void *memory;              /* of the GPU: tables and state */
    uint8_t **words;           /* [G] windows of the node's ranks, as the host maps them */
    bool *is_registered;       /* [G] by this rank */
    struct nep_far_page *page; /* pinned, as the ring's shared part */
    struct nep_ring_shared *ring;
    struct nep_fabric_proxy *fabric;
    struct nep_proxy *proxy;
    uint32_t *peers;
    uint32_t num_peers;
    bool has_intra_window;
    bool has_inter_window;
};

/* Before windows are made: the plan. */
enum nep_status nep_device_far_plan(struct nep_ep *ep, uint64_t staging_bytes);
/* Collective. After the windows on the GPU are there: pinned words, tables, the proxy. */
enum nep_status nep_device_far_create(struct nep_ep *ep);
/* is_child: after fork(), only memory is freed. */
void nep_device_far_destroy(struct nep_ep *ep, bool is_child);

enum nep_status nep_device_far_handle_create(struct nep_handle *handle);
void nep_device_far_handle_destroy(struct nep_handle *handle);

/* The handle's `in` is filled in; `out` too where it is known. */
enum nep_status nep_device_far_send(struct nep_handle *handle, struct CUstream_st *stream);
enum nep_status nep_device_far_place(struct nep_handle *handle, struct CUstream_st *stream);
enum nep_status nep_device_far_recv(struct nep_handle *handle, struct CUstream_st *stream);
/* is_whole: recv follows at once and does all that others wait for. */
enum nep_status nep_device_far_combine_send(struct nep_handle *handle, bool is_whole,
                                            struct CUstream_st *stream);
enum nep_status nep_device_far_combine_recv(struct nep_handle *handle, bool is_whole,
                                            struct CUstream_st *stream);

#endif
