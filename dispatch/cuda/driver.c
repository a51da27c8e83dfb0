/* SPDX-License-Identifier: Apache-2.0 */
#include "dispatch/cuda/driver.h"

#include <pthread.h>

static struct nep_cuda_driver table;
static const char *missing;
static cudaError_t missing_why;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void find(const char *name, void *to)
{
    enum cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    void *at = NULL;
    cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, &at, 12000, cudaEnableDefault, &found);
    if ((error != cudaSuccess || at == NULL) && missing == NULL) {
        missing = name;
        missing_why = error;
    }
    *(void **)to = at;
}

static void find_all(void)
{
    find("cuMemCreate", &table.mem_create);
    find("cuMemRelease", &table.mem_release);
    find("cuMemExportToShareableHandle", &table.mem_export);
    find("cuMemImportFromShareableHandle", &table.mem_import);
    find("cuMemAddressReserve", &table.address_reserve);
    find("cuMemAddressFree", &table.address_free);
    find("cuMemMap", &table.mem_map);
    find("cuMemUnmap", &table.mem_unmap);
    find("cuMemSetAccess", &table.set_access);
    find("cuMemGetAllocationGranularity", &table.granularity);
    find("cuDeviceGetAttribute", &table.attribute);
    find("cuStreamWriteValue64", &table.write_value64);
    find("cuGetErrorName", &table.error_name);
}

enum nep_status nep_cuda_driver_get(const struct nep_cuda_driver **driver_p)
{
    pthread_once(&once, find_all);
    if (missing != NULL) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "the CUDA driver has no %s (%s): it needs 12.0 or later", missing,
                        cudaGetErrorString(missing_why));
    }
    *driver_p = &table;
    return NEP_OK;
}

enum nep_status nep_cuda_driver_check(CUresult result, const char *what)
{
    if (result == CUDA_SUCCESS) {
        return NEP_OK;
    }
    const char *name = NULL;
    if (table.error_name == NULL || table.error_name(result, &name) != CUDA_SUCCESS) {
        name = "an unknown error";
    }
    return nep_fail(result == CUDA_ERROR_OUT_OF_MEMORY ? NEP_ERR_NO_MEMORY : NEP_ERR_IO,
                    "%s: CUDA says %s (%d)", what, name, (int)result);
}

enum nep_status nep_cuda_runtime_check(cudaError_t error, const char *what)
{
    if (error == cudaSuccess) {
        return NEP_OK;
    }
    return nep_fail(error == cudaErrorMemoryAllocation ? NEP_ERR_NO_MEMORY : NEP_ERR_IO,
                    "%s: CUDA says %s (%s)", what, cudaGetErrorName(error),
                    cudaGetErrorString(error));
}
