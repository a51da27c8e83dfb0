/* SPDX-License-Identifier: Apache-2.0 */
/* The driver's functions for shared memory, asked of the run-time library, so that the library also
 * links and loads where there is no driver. */
#ifndef NEP_DISPATCH_CUDA_DRIVER_H
#define NEP_DISPATCH_CUDA_DRIVER_H

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "base/status.h"

struct nep_cuda_driver {
    __typeof__(&cuMemCreate) mem_create;
    __typeof__(&cuMemRelease) mem_release;
    __typeof__(&cuMemExportToShareableHandle) mem_export;
    __typeof__(&cuMemImportFromShareableHandle) mem_import;
    __typeof__(&cuMemAddressReserve) address_reserve;
    __typeof__(&cuMemAddressFree) address_free;
    __typeof__(&cuMemMap) mem_map;
    __typeof__(&cuMemUnmap) mem_unmap;
    __typeof__(&cuMemSetAccess) set_access;
    __typeof__(&cuMemGetAllocationGranularity) granularity;
    __typeof__(&cuDeviceGetAttribute) attribute;
    __typeof__(&cuStreamWriteValue64) write_value64;
    __typeof__(&cuGetErrorName) error_name;
};

/* The one table of the process. */
enum nep_status nep_cuda_driver_get(const struct nep_cuda_driver **driver_p);
/* A status with one sentence. */
enum nep_status nep_cuda_driver_check(CUresult result, const char *what);
enum nep_status nep_cuda_runtime_check(cudaError_t error, const char *what);

#endif
