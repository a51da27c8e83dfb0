/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the executor share: an ep's and a handle's things on a GPU. */
#ifndef NEP_DISPATCH_CUDA_EXEC_H
#define NEP_DISPATCH_CUDA_EXEC_H

#include "dispatch/cuda/cuda_fabric.h"
#include "dispatch/cuda/driver.h"
#include "dispatch/cuda/windows.h"
#include "dispatch/device.h"

/* The window of every rank: words, staging areas, pool. Equal on all ranks. */
struct nep_cuda_plan {
    struct nep_cuda_words words;     /* at offset 0 */
    struct nep_cuda_staging staging; /* of one node */
    uint64_t far;                    /* of several: the area of far_plan.h */
    uint64_t pool;
    uint64_t bytes;
    uint64_t handle_bytes; /* device memory of a handle */
};

/* A map version's tables in device memory. */
struct nep_device_map {
    void *memory; /* NULL: unused */
    uint32_t version;
    struct nep_copies *copies; /* [num_layers], on the host; what they point to is on the device */
};

struct nep_device_far;
struct nep_device_watch;

struct nep_device {
    int ordinal;
    struct nep_cuda_plan plan;
    struct nep_cuda_windows windows;
    struct nep_cuda_state *state; /* of one node */
    struct nep_cuda_group group;
    struct nep_cuda_shape shape;
    struct nep_cuda_geometry geometry;
    uint32_t shared_bytes;      /* most that a block may ask for */
    uint64_t *status_host;      /* pinned */
    struct nep_device_far *far; /* NULL: one node */
    struct nep_device_watch *watch;
    struct nep_device_map maps[1 + NEP_MAX_STAGED];
    struct nep_handle *scratch; /* for nep_ep_layout */
};

struct nep_device_handle {
    void *memory;
    void *pinned; /* counts on the host */
    struct nep_cuda_routing routing;
    struct nep_cuda_input in; /* of the dispatch at hand */
    struct nep_cuda_output out;
    struct nep_rows bound; /* nep_handle_bind_output */
    struct CUstream_st *stream;
    bool is_bound;
    bool is_known;  /* layout has told where the outputs are */
    bool is_placed; /* place has been launched */
    bool is_pushed;
    bool is_few;     /* push does layout's work */
    bool is_counted; /* counts are on the host */
    /* the combine at hand */
    struct nep_cuda_combine combine;
    bool is_begun;
    /* over several nodes */
    void *far_memory;
    struct nep_far_routing far;
    struct nep_far_output far_out;
    bool is_whole;     /* a dispatch in one call: one launch does it */
    bool is_told;      /* the send half has told where the outputs are */
    bool is_y_copied;  /* expert outputs lie in memory that the node does not map */
    uint64_t far_rows; /* of the expert outputs, in the area */
    uint64_t far_weights;
};

/* Makes the ep's device current for this thread until the end; -1 as *was_p: it was already. */
enum nep_status nep_device_enter(const struct nep_ep *ep, int *was_p);
void nep_device_leave(int was);

/* While no call of the host looks: a rank that is gone, a kernel that gave up. Not collective. */
enum nep_status nep_device_watch_start(struct nep_ep *ep);
void nep_device_watch_stop(struct nep_ep *ep, bool is_child);

/* Rows of output that a dispatch can bring at most. */
uint64_t nep_device_max_rows(const struct nep_shape *shape, uint32_t num_ranks);
void nep_cuda_plan_init(struct nep_cuda_plan *plan, const struct nep_shape *shape,
                        uint32_t num_ranks, uint32_t num_nodes, uint32_t layout_blocks,
                        uint64_t staging_bytes, uint64_t far_bytes);

#endif
