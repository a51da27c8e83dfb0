/* SPDX-License-Identifier: Apache-2.0 */
/*
 * RDMA devices in memory, behind the table of calls that the verbs transport makes: writes are
 * copies, completions are entries in arrays. Everything a device here cannot be made to do is a
 * knob: error completions with the data delivered or not, posting that fails, registrations that
 * fail, events, slow completions. One mutex for all; ranks are threads.
 *
 * It is strict: a completion queue that overflows, an unknown key, an address outside its
 * registration or a write to a QP that is not ready fails the test or the QP, as a device would.
 */
#ifndef NEP_TESTS_FAKE_DEVICE_H
#define NEP_TESTS_FAKE_DEVICE_H

#include <pthread.h>
#include <stdbool.h>

#include "transport/verbs/api.h"

enum { FAKE_DEVICES = 4, FAKE_QPS = 4096, FAKE_MRS = 4096, FAKE_PENDING = 256, FAKE_GRH = 40 };
#define FAKE_MW                                                                                    \
    0x80000000u /* in keys of memory windows; below: the number, and 8 bits that count */

struct fake_mr {
    struct ibv_mr mr;
    unsigned access;
};

struct fake_mw {
    struct ibv_mw mw;
    uint32_t key; /* 0: not bound */
    uint32_t qp_num;
    uint64_t addr, len;
    struct fake_mr *mr;
};

struct fake_cq {
    struct ibv_cq cq;
    struct ibv_wc *wc;
    uint32_t num, first;
    bool armed;
};

struct fake_srq {
    struct ibv_srq srq;
    uint32_t posted;
    uint32_t max;
};

struct fake_qp {
    struct ibv_qp qp;
    struct fake_cq *cq;
    struct fake_srq *srq;
    enum ibv_qp_state state;
    uint32_t dest;
    uint32_t num_wr; /* posted and not completed */
    uint32_t max_wr;
    /* waiting: the receiver had no receive posted */
    struct ibv_send_wr pending[FAKE_PENDING];
    struct ibv_sge pending_sge[FAKE_PENDING];
    uint8_t *pending_inline[FAKE_PENDING];
    uint32_t num_pending;
    /* knobs */
    int64_t fail_after;  /* requests until one fails; -1: never */
    bool deliver_failed; /* the failing request did its work: its acknowledgement was lost */
    int64_t enomem_after;
    uint32_t unsignalled; /* requests since the last signalled one */
    uint32_t send_psn, recv_psn;
    /* a datagram QP: its own receives, oldest first */
    bool is_datagram;
    uint32_t qkey;
    struct fake_recv {
        uint64_t wr_id;
        struct ibv_sge sge;
    } recvs[FAKE_PENDING];
    uint32_t num_recvs;
};

struct fake_context {
    struct ibv_context context;
    int events[2];
};

struct fake_fabric {
    pthread_mutex_t lock;
    uint32_t num_devices;
    int list_errno; /* of ibv_get_device_list */
    struct ibv_device devices[FAKE_DEVICES];
    struct fake_qp *qps[FAKE_QPS]; /* by number */
    struct fake_mr *mrs[FAKE_MRS];
    struct fake_mw *mws[FAKE_MRS];
    uint32_t num_qps, num_mrs, num_mws;
    bool no_mw;
    bool is_loopback;       /* GIDs are addresses that this machine has */
    uint64_t max_reg_bytes; /* larger registrations fail with ENOMEM; 0: no limit */
    uint32_t num_overflows;
    uint32_t num_bad;
    bool no_srq_limit;
    bool slow; /* one completion per poll */
    struct fake_context *contexts[64];
    uint32_t num_contexts;
    uint64_t num_posted;
    const uint8_t *device_base;
    size_t device_bytes;
    bool no_dmabuf;
    int last_dmabuf;
    uint32_t num_dmabufs;
    uint32_t num_inline_from_device;
    uint32_t cut; /* bit d: nothing passes to or from device d */
    bool no_datagrams;
    uint32_t lost_datagrams; /* one of so many is lost; 0: none */
    uint32_t num_datagrams;
    int32_t max_srq_wr;   /* 0: many */
    uint32_t num_watches; /* SRQ limits set */
    /* calls that make or change something: the one after so many others fails; < 0: none does */
    int64_t fail_call;
    int64_t num_live; /* things made and not destroyed */
};

extern struct fake_fabric fake;
extern const struct nep_verbs_api fake_api;

/* A new fabric, with all knobs at rest. */
void fake_reset(uint32_t num_devices);
int fake_memory_kind(const void *addr, bool *is_device_p);
int fake_post_srq_recv(struct ibv_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);
int fake_post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad);
int fake_poll_cq(struct ibv_cq *cq, int max, struct ibv_wc *wc);

/* ---- between fake_device.c and fake_qp.c ---- */

bool fake_make(void);
void fake_unmake(void *thing);
void fake_push(struct fake_cq *cq, const struct ibv_wc *wc);
struct ibv_qp *fake_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *attr);
int fake_post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);
struct ibv_ah *fake_create_ah(struct ibv_pd *pd, struct ibv_ah_attr *attr);
int fake_destroy_ah(struct ibv_ah *ah);
int fake_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask);
int fake_query_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask,
                  struct ibv_qp_init_attr *init_attr);
int fake_destroy_qp(struct ibv_qp *qp);

#endif
