/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the CUDA driver knows of an address, without linking it and without loading it: a process
 * whose windows lie on a GPU has it loaded, and for all others host memory is the answer. The three
 * declarations below are of its stable binary interface (cuda.h, CUDA 11.7 and newer).
 */
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <unistd.h>

#include "transport/verbs/api.h"

enum { CU_MEMORYTYPE_DEVICE = 2, CU_POINTER_ATTRIBUTE_MEMORY_TYPE = 2, CU_RANGE_DMA_BUF_FD = 1 };

typedef int (*pointer_get_attribute_fn)(void *data, int attribute, unsigned long long ptr);
typedef int (*get_range_handle_fn)(void *handle, unsigned long long ptr, size_t size, int type,
                                   unsigned long long flags);

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
