/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the CUDA driver knows of an address, and where this thread's GPU is, without linking it and
 * without loading it: a process whose windows lie on a GPU has it loaded, and for all others host
 * memory is the answer. The declarations below are of its stable binary interface (cuda.h, CUDA
 * 11.7 and newer).
 */
#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

#include "transport/verbs/api.h"

enum { CU_MEMORYTYPE_DEVICE = 2, CU_POINTER_ATTRIBUTE_MEMORY_TYPE = 2, CU_RANGE_DMA_BUF_FD = 1 };

typedef int (*pointer_get_attribute_fn)(void *data, int attribute, unsigned long long ptr);
typedef int (*get_range_handle_fn)(void *handle, unsigned long long ptr, size_t size, int type,
                                   unsigned long long flags);
typedef int (*ctx_get_device_fn)(int *device);
typedef int (*device_get_pci_bus_id_fn)(char *text, int size, int device);

static void *driver_symbol(const char *name)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (library == NULL) {
        return NULL;
    }
    void *found = dlsym(library, name);
    dlclose(library);
    return found;
}

int nep_verbs_cuda_memory_kind(const void *addr, bool *is_device_p)
{
    pointer_get_attribute_fn get;
    unsigned kind = 0;
    *(void **)&get = driver_symbol("cuPointerGetAttribute");
    /* The driver fails for memory it does not know: that is the host's. */
    *is_device_p = get != NULL &&
                   get(&kind, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, (uintptr_t)addr) == 0 &&
                   kind == CU_MEMORYTYPE_DEVICE;
    return 0;
}

int nep_verbs_cuda_dmabuf_of(const void *addr, size_t length, int *fd_p, uint64_t *offset_p)
{
    get_range_handle_fn get;
    int fd = -1;
    /* The driver takes whole pages of the host's size; the rest is the registration's offset. */
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = (uintptr_t)addr & ~(page - 1);
    uintptr_t end = ((uintptr_t)addr + length + page - 1) & ~(page - 1);
    *(void **)&get = driver_symbol("cuMemGetHandleForAddressRange");
    if (get == NULL) {
        return ENOSYS;
    }
    if (get(&fd, first, end - first, CU_RANGE_DMA_BUF_FD, 0) != 0 || fd < 0) {
        return ENOTSUP; /* the kernel module is not the open one, or this memory was not made for it
                         */
    }
    *fd_p = fd;
    *offset_p = (uintptr_t)addr - first;
    return 0;
}

int32_t nep_verbs_pci_numa(const char *bus_id)
{
    char path[96];
    int numa = -1;
    int len = snprintf(path, sizeof path, "/sys/bus/pci/devices/%.32s/numa_node", bus_id);
    for (int i = 0; i < len; i++) { /* the driver writes capitals, the system does not */
        path[i] = (char)tolower((unsigned char)path[i]);
    }
    FILE *file = fopen(path, "re");
    if (file != NULL) {
        if (fscanf(file, "%d", &numa) != 1) {
            numa = -1;
        }
        fclose(file);
    }
    return numa;
}

int32_t nep_verbs_cuda_numa(void)
{
    ctx_get_device_fn get_device;
    device_get_pci_bus_id_fn get_bus_id;
    char bus_id[32] = "";
    int device = 0;
    *(void **)&get_device = driver_symbol("cuCtxGetDevice");
    *(void **)&get_bus_id = driver_symbol("cuDeviceGetPCIBusId");
    /* Without a context of this thread's there is no device that is meant. */
    if (get_device == NULL || get_bus_id == NULL || get_device(&device) != 0 ||
        get_bus_id(bus_id, sizeof bus_id, device) != 0) {
        return -1;
    }
    return nep_verbs_pci_numa(bus_id);
}
