// SPDX-License-Identifier: Apache-2.0
/*
 * As much of the CUDA run-time library and of the driver's calls for shared memory as the executor
 * and its tests use, for one device that is this machine: device memory is memory, VMM allocations
 * are memfds, so that they pass between processes as they do on a GPU.
 */
#include <cuda.h>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/gpu/emu/emu.h" /* last: it names attributes anew */

namespace
{

enum { SMS = 132, SHARED = 227 << 10, GRANULARITY = 64 << 10 };

std::mutex pinned_mutex;
std::map<void *, size_t> pinned;

CUresult mem_create(CUmemGenericAllocationHandle *handle_p, size_t bytes,
                    const CUmemAllocationProp *, unsigned long long)
{
    int fd = memfd_create("emu", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *handle_p = (CUmemGenericAllocationHandle)fd + 1;
    return CUDA_SUCCESS;
}

CUresult mem_release(CUmemGenericAllocationHandle handle)
{
    close((int)handle - 1);
    return CUDA_SUCCESS;
}

CUresult mem_export(void *fd_p, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType,
                    unsigned long long)
{
    *(int *)fd_p = dup((int)handle - 1);
    return CUDA_SUCCESS;
}

CUresult mem_import(CUmemGenericAllocationHandle *handle_p, void *fd, CUmemAllocationHandleType)
{
    *handle_p = (CUmemGenericAllocationHandle)dup((int)(intptr_t)fd) + 1;
    return CUDA_SUCCESS;
}

CUresult address_reserve(CUdeviceptr *at_p, size_t bytes, size_t, CUdeviceptr, unsigned long long)
{
    void *at = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *at_p = (CUdeviceptr)at;
    return at != MAP_FAILED ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult address_free(CUdeviceptr at, size_t bytes)
{
    munmap((void *)at, bytes);
    return CUDA_SUCCESS;
}

CUresult mem_map(CUdeviceptr at, size_t bytes, size_t, CUmemGenericAllocationHandle handle,
                 unsigned long long)
{
    void *mapped =
        mmap((void *)at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, (int)handle - 1, 0);
    return mapped != MAP_FAILED ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult mem_unmap(CUdeviceptr at, size_t bytes)
{
    mmap((void *)at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
         0);
    return CUDA_SUCCESS;
}

CUresult set_access(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t)
{
    return CUDA_SUCCESS;
}

CUresult granularity(size_t *bytes_p, const CUmemAllocationProp *, CUmemAllocationGranularity_flags)
{
    *bytes_p = GRANULARITY;
    return CUDA_SUCCESS;
}

CUresult attribute(int *value_p, CUdevice_attribute, CUdevice)
{
    *value_p = 1;
    return CUDA_SUCCESS;
}

CUresult write_value(CUstream stream, CUdeviceptr to, cuuint64_t value, unsigned)
{
    emu::enqueue(stream, [=] { __atomic_store_n((uint64_t *)to, value, __ATOMIC_RELEASE); });
    return CUDA_SUCCESS;
}

CUresult error_name(CUresult, const char **name_p)
{
    *name_p = "an error of the emulation";
    return CUDA_SUCCESS;
}

const std::map<std::string, void *> driver = {
    {"cuMemCreate", (void *)mem_create},
    {"cuMemRelease", (void *)mem_release},
    {"cuMemExportToShareableHandle", (void *)mem_export},
    {"cuMemImportFromShareableHandle", (void *)mem_import},
    {"cuMemAddressReserve", (void *)address_reserve},
    {"cuMemAddressFree", (void *)address_free},
    {"cuMemMap", (void *)mem_map},
    {"cuMemUnmap", (void *)mem_unmap},
    {"cuMemSetAccess", (void *)set_access},
    {"cuMemGetAllocationGranularity", (void *)granularity},
    {"cuDeviceGetAttribute", (void *)attribute},
    {"cuStreamWriteValue64", (void *)write_value},
    {"cuGetErrorName", (void *)error_name},
};

struct event {
    uint64_t ns;
};

uint64_t now_ns()
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

/* Not zeros: what reads memory before it is written shall be seen. */
cudaError_t take(void **memory_p, size_t bytes)
{
    *memory_p = std::aligned_alloc(4096, (bytes + 4096) / 4096 * 4096);
    if (*memory_p == nullptr) {
        return cudaErrorMemoryAllocation;
    }
    std::memset(*memory_p, 0xa7, bytes);
    return cudaSuccess;
}

} // namespace

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **at_p, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult *found_p)
{
    auto found = driver.find(name);
    *at_p = found != driver.end() ? found->second : nullptr;
    *found_p = *at_p != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *num_p)
{
    *num_p = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device_p)
{
    *device_p = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int)
{
    return cudaSuccess;
}

cudaError_t cudaSetDeviceFlags(unsigned)
{
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void)
{
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value_p, enum cudaDeviceAttr attr, int)
{
    switch (attr) {
    case cudaDevAttrMultiProcessorCount:
        *value_p = SMS;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value_p = SHARED;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value_p = 9;
        break;
    default:
        *value_p = 0;
        break;
    }
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int)
{
    std::memset(properties, 0, sizeof *properties);
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *)
{
    std::memset(attributes, 0, sizeof *attributes);
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *, enum cudaFuncAttribute, int)
{
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void)
{
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t)
{
    return "an error of the emulation";
}

const char *cudaGetErrorName(cudaError_t)
{
    return "emu";
}

/* ---- memory ---------------------------------------------------------------------------------- */

cudaError_t cudaMalloc(void **memory_p, size_t bytes)
{
    return take(memory_p, bytes);
}

cudaError_t cudaFree(void *memory)
{
    std::free(memory);
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **memory_p, size_t bytes, unsigned)
{
    return take(memory_p, bytes);
}

cudaError_t cudaFreeHost(void *memory)
{
    std::free(memory);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *memory, size_t bytes, unsigned)
{
    std::lock_guard<std::mutex> lock(pinned_mutex);
    return pinned.emplace(memory, bytes).second ? cudaSuccess
                                                : cudaErrorHostMemoryAlreadyRegistered;
}

cudaError_t cudaHostUnregister(void *memory)
{
    std::lock_guard<std::mutex> lock(pinned_mutex);
    return pinned.erase(memory) == 1 ? cudaSuccess : cudaErrorHostMemoryNotRegistered;
}

cudaError_t cudaHostGetDevicePointer(void **device_p, void *memory, unsigned)
{
    *device_p = memory;
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t bytes)
{
    std::memset(to, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream)
{
    emu::enqueue(stream, [=] { std::memset(to, value, bytes); });
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind)
{
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind,
                            cudaStream_t stream)
{
    emu::enqueue(stream, [=] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
}

/* ---- events ---------------------------------------------------------------------------------- */

cudaError_t cudaEventCreate(cudaEvent_t *event_p)
{
    *event_p = (cudaEvent_t) new event{0};
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t which)
{
    delete (event *)which;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t which, cudaStream_t stream)
{
    emu::enqueue(stream, [=] { ((event *)which)->ns = now_ns(); });
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms_p, cudaEvent_t begin, cudaEvent_t end)
{
    *ms_p = (float)(((event *)end)->ns - ((event *)begin)->ns) * 1e-6f;
    return cudaSuccess;
}
}
