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
enum nep_status nep_cuda_load_written(void);

static inline enum nep_status nep_cuda_check(cudaError_t error, const char *what)
{
    if (error == cudaSuccess) {
        return NEP_OK;
    }
    return nep_fail(NEP_ERR_IO, "%s: CUDA says %s (%s)", what, cudaGetErrorName(error),
                    cudaGetErrorString(error));
}

/*
 * Launches a kernel that begins with nep_wait_for_previous: its blocks may be set up while the last
 * blocks of the kernel before it run, which saves its launch latency. Those blocks wait for nobody
 * but the kernel before, so all that must fit on the device together still does.
 */
template <class Args>
static inline cudaError_t nep_cuda_launch_early(void (*kernel)(Args), const Args &args,
                                                const struct nep_cuda_geometry &geometry,
                                                uint32_t threads, struct CUstream_st *stream)
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(geometry.blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = geometry.shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = geometry.can_launch_early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args);
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
