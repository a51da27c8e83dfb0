/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Device memory that the ranks of a node share: every rank has a window, and in every process rank
 * local's window is at base + local * stride.
 */
#ifndef NEP_DISPATCH_CUDA_WINDOWS_H
#define NEP_DISPATCH_CUDA_WINDOWS_H

#include "dispatch/comm.h"

struct nep_cuda_mapping; /* one per process, node and ep; counted */

struct nep_cuda_windows {
    struct nep_cuda_mapping *mapping;
    char *base;
    uint64_t stride;
    uint32_t ranks_on_device; /* of the communicator, this one included */
};

/* Collective over the communicator. Windows of at least `bytes`, on the current device, not zeroed.
 */
enum nep_status nep_cuda_windows_create(struct nep_comm *comm, uint64_t bytes,
                                        struct nep_cuda_windows *windows);
void nep_cuda_windows_destroy(struct nep_cuda_windows *windows);

#endif
