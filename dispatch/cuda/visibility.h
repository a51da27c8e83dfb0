/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What makes bytes that a NIC wrote into GPU memory visible to a kernel that runs already: chosen
 * once from what the device says about itself, or by NEP_CUDA_VISIBILITY.
 */
#ifndef NEP_DISPATCH_CUDA_VISIBILITY_H
#define NEP_DISPATCH_CUDA_VISIBILITY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum nep_visibility {
    NEP_VISIBILITY_ORDERED, /* the device orders a NIC's writes before the word: nothing to do */
    NEP_VISIBILITY_FLUSH,   /* the host flushes them to all devices before it raises the word */
    NEP_VISIBILITY_STAGED   /* the NIC writes pinned host memory; kernels read it there */
};

/* cudaDevAttr GPUDirectRDMASupported, ...WritesOrdering, ...FlushWritesOptions. */
struct nep_visibility_facts {
    bool reaches_device;  /* the transport can register or copy to memory of the GPU */
    int gpudirect;        /* 0, 1 */
    int writes_ordering;  /* 0 none, 100 for the owner, 200 for all devices */
    int flush_options;    /* bit 0: by the host, bit 1: by a stream's memory operation */
    uint32_t num_devices; /* whose kernels read this memory: of this node */
};

/*
 * wish: auto, ordered, flush or staged. why: a sentence about the choice, for the log and nep-info.
 * A wish that the device does not support is granted where only the user can know better
 * (`ordered`), and refused where it cannot work.
 */
enum nep_status nep_visibility_choose(const struct nep_visibility_facts *facts, const char *wish,
                                      enum nep_visibility *visibility_p, char *why, size_t cap);
const char *nep_visibility_name(enum nep_visibility visibility);

#endif
