/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The calls of libibverbs that nearep makes, as a table: filled from the library when a transport
 * is created (so nearep runs where it is not installed), or from a test's own device. Functions
 * keep the meaning, arguments and results of their manual pages.
 */
#ifndef NEP_TRANSPORT_VERBS_API_H
#define NEP_TRANSPORT_VERBS_API_H

#include <infiniband/verbs.h>
#include <stdbool.h>

#include "base/status.h"

struct nep_verbs_api {
    void *library; /* of dlopen; NULL for a test's table */

    struct ibv_device **(*get_device_list)(int *num_devices);
    void (*free_device_list)(struct ibv_device **list);
    const char *(*get_device_name)(struct ibv_device *device);
    struct ibv_context *(*open_device)(struct ibv_device *device);
    int (*close_device)(struct ibv_context *context);
    int (*query_device)(struct ibv_context *context, struct ibv_device_attr *attr);
    int (*query_port)(struct ibv_context *context, uint8_t port, struct ibv_port_attr *attr);
    /* 0 and the entry, or an errno: an index without an entry is ENODATA */
    int (*query_gid)(struct ibv_context *context, uint8_t port, uint32_t index,
                     struct ibv_gid_entry *entry);

    struct ibv_pd *(*alloc_pd)(struct ibv_context *context);
    int (*dealloc_pd)(struct ibv_pd *pd);
    struct ibv_mr *(*reg_mr)(struct ibv_pd *pd, void *addr, size_t length, unsigned access);
    struct ibv_mr *(*reg_dmabuf_mr)(struct ibv_pd *pd, uint64_t offset, size_t length,
                                    uint64_t iova, int fd, int access); /* NULL: too old */
    int (*dereg_mr)(struct ibv_mr *mr);
    struct ibv_mw *(*alloc_mw)(struct ibv_pd *pd, enum ibv_mw_type type);
    int (*dealloc_mw)(struct ibv_mw *mw);
    /*
     * Whose memory an address is: 0 and *is_device_p. Not of libibverbs: the CUDA driver knows, if
     * the process has loaded it.
     */
    int (*memory_kind)(const void *addr, bool *is_device_p);
    /* A dma-buf of device memory, to be closed after registration, and where addr is in it; 0, or
     * an errno. */
    int (*dmabuf_of)(const void *addr, size_t length, int *fd_p, uint64_t *offset_p);
    /* The NUMA node of the GPU that this thread uses; -1: none, or unknown. */
    int32_t (*gpu_numa)(void);

    struct ibv_comp_channel *(*create_comp_channel)(struct ibv_context *context);
    int (*destroy_comp_channel)(struct ibv_comp_channel *channel);
    struct ibv_cq *(*create_cq)(struct ibv_context *context, int depth, void *cq_context,
                                struct ibv_comp_channel *channel, int vector);
    int (*destroy_cq)(struct ibv_cq *cq);
    int (*poll_cq)(struct ibv_cq *cq, int max, struct ibv_wc *wc);
    int (*req_notify_cq)(struct ibv_cq *cq, int solicited_only);
    int (*get_cq_event)(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **cq_context);
    void (*ack_cq_events)(struct ibv_cq *cq, unsigned num);
    int (*get_async_event)(struct ibv_context *context, struct ibv_async_event *event);
    void (*ack_async_event)(struct ibv_async_event *event);

    struct ibv_srq *(*create_srq)(struct ibv_pd *pd, struct ibv_srq_init_attr *attr);
    int (*modify_srq)(struct ibv_srq *srq, struct ibv_srq_attr *attr, int mask);
    int (*destroy_srq)(struct ibv_srq *srq);
    int (*post_srq_recv)(struct ibv_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);

    struct ibv_qp *(*create_qp)(struct ibv_pd *pd, struct ibv_qp_init_attr *attr);
    int (*modify_qp)(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask);
    int (*query_qp)(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask,
                    struct ibv_qp_init_attr *init_attr);
    int (*destroy_qp)(struct ibv_qp *qp);
    struct ibv_ah *(*create_ah)(struct ibv_pd *pd, struct ibv_ah_attr *attr);
    int (*destroy_ah)(struct ibv_ah *ah);
    int (*post_recv)(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);
    int (*post_send)(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad);

    const char *(*wc_status_str)(enum ibv_wc_status status);
    const char *(*event_type_str)(enum ibv_event_type type);
};

/* Loads libibverbs; NEP_ERR_UNSUPPORTED with what to install when it cannot. */
enum nep_status nep_verbs_api_load(struct nep_verbs_api *api);
void nep_verbs_api_unload(struct nep_verbs_api *api);

/* memory_kind, dmabuf_of and gpu_numa of the table, over the CUDA driver: gpu.c. */
int nep_verbs_cuda_memory_kind(const void *addr, bool *is_device_p);
int nep_verbs_cuda_dmabuf_of(const void *addr, size_t length, int *fd_p, uint64_t *offset_p);
int32_t nep_verbs_cuda_numa(void);
/* Of a device by its address on the bus, "0000:3B:00.0"; -1: none, or unknown. */
int32_t nep_verbs_pci_numa(const char *bus_id);

/* The device list, or a sentence that tells a kernel without verbs, a machine without devices and
 * a missing provider apart. Free it with api->free_device_list. */
enum nep_status nep_verbs_api_devices(const struct nep_verbs_api *api, struct ibv_device ***list_p,
                                      int *num_devices_p);

#endif
