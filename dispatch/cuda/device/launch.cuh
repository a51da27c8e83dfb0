/* SPDX-License-Identifier: Apache-2.0 */
/* Host side of a phase: attributes and launches, with one sentence when the driver refuses. */
#ifndef NEP_DISPATCH_CUDA_DEVICE_LAUNCH_CUH
#define NEP_DISPATCH_CUDA_DEVICE_LAUNCH_CUH

#include <cuda_runtime.h>

extern "C" {
#include "base/status.h"
#include "dispatch/host/kernels.h"
}
#include "dispatch/cuda/cuda_phases.h"

/* Each phase's part of nep_cuda_load. */
enum nep_status nep_cuda_load_layout(void);
enum nep_status nep_cuda_load_place(void);
enum nep_status nep_cuda_load_push(void);
enum nep_status nep_cuda_load_pull(void);
enum nep_status nep_cuda_load_stage(void);
enum nep_status nep_cuda_load_sum(void);

static inline enum nep_status nep_cuda_check(cudaError_t error, const char *what)
{
    if (error == cudaSuccess) {
        return NEP_OK;
    }
    return nep_fail(NEP_ERR_IO, "%s: CUDA says %s (%s)", what, cudaGetErrorName(error),
                    cudaGetErrorString(error));
}

/* Loads a kernel now, not at its first launch, when other kernels may be waiting for it, and lets
 * it have all shared memory that its static part leaves. */
static inline enum nep_status nep_cuda_load_kernel(const void *kernel, const char *what)
{
    cudaFuncAttributes attributes;
    int device = 0;
    int most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) {
        error = cudaFuncGetAttributes(&attributes, kernel);
    }
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     most - (int)attributes.sharedSizeBytes);
    }
    return nep_cuda_check(error, what);
}

#endif
