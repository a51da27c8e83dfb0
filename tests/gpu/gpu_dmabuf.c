/* SPDX-License-Identifier: Apache-2.0 */
/*
 * GPU memory for a NIC, as far as it goes without one: what the verbs transport asks the driver
 * (transport/verbs/gpu.c) about memory of every kind, and whether the driver gives a dma-buf for
 * it, also where a window does not begin or end on a page. The dma-buf is then offered to a device,
 * if there is one. Exit status 0: the answers are those that the transport relies on; 3: no GPU.
 */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "transport/verbs/api.h"

static int num_wrong;

static void kind(const char *what, const void *memory, bool is_device)
{
    bool found = !is_device;
    nep_verbs_cuda_memory_kind(memory, &found);
    printf("%-34s %s%s\n", what, found ? "GPU's" : "host's", found == is_device ? "" : "  WRONG");
    num_wrong += found != is_device;
}

/* Registers with the first device, where there is one: the only step that needs a NIC. */
static void offer(const char *base, size_t bytes, int fd, uint64_t offset)
{
    struct nep_verbs_api api;
    struct ibv_device **list;
    int num;
    if (nep_verbs_api_load(&api) != NEP_OK || nep_verbs_api_devices(&api, &list, &num) != NEP_OK) {
        printf("    not registered: %s\n", nep_last_message());
        return;
    }
    struct ibv_context *context = api.open_device(list[0]);
    struct ibv_pd *pd = context == NULL ? NULL : api.alloc_pd(context);
    struct ibv_mr *mr = pd == NULL || api.reg_dmabuf_mr == NULL
                            ? NULL
                            : api.reg_dmabuf_mr(pd, offset, bytes, (uintptr_t)base, fd,
                                                IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    printf("    %s\n", mr == NULL ? "not registered: the device refused" : "registered");
    if (mr != NULL) {
        api.dereg_mr(mr);
    }
}

static void export(const char *what, const char *base, size_t bytes)
{
    int fd = -1;
    uint64_t offset = 0;
    int error = nep_verbs_cuda_dmabuf_of(base, bytes, &fd, &offset);
    printf("%-34s %zu bytes: %s, offset %llu\n", what, bytes,
           error == 0 ? "a dma-buf" : strerror(error), (unsigned long long)offset);
    if (error == 0) {
        num_wrong += fd < 0 || (((uintptr_t)base ^ offset) & 4095) != 0;
        offer(base, bytes, fd, offset);
        close(fd);
    }
}

int main(void)
{
    enum { BYTES = 4 << 20 };
    char *device = NULL, *pinned = NULL, *plain = malloc(BYTES);
    int has_rdma = 0;
    if (cudaMalloc((void **)&device, BYTES) != cudaSuccess ||
        cudaMallocHost((void **)&pinned, BYTES) != cudaSuccess) {
        printf("no GPU: %s\n", cudaGetErrorString(cudaGetLastError()));
        return 3;
    }
    cudaDeviceGetAttribute(&has_rdma, cudaDevAttrGPUDirectRDMASupported, 0);
    printf("GPUDirect RDMA supported: %d\n", has_rdma);
    kind("malloc", plain, false);
    kind("cudaMallocHost", pinned, false);
    kind("cudaMalloc", device, true);
    kind("cudaMalloc, in the middle", device + 12345, true);
    export("cudaMalloc, whole", device, BYTES);
    export("cudaMalloc, from byte 512", device + 512, BYTES - 512);
    export("cudaMalloc, 100 bytes from 4000", device + 4000, 100);
    int fd = -1;
    uint64_t offset = 0;
    if (nep_verbs_cuda_dmabuf_of(plain, BYTES, &fd, &offset) == 0) {
        printf("a dma-buf of the host's memory  WRONG\n");
        num_wrong++;
    }
    cudaFree(device);
    cudaFreeHost(pinned);
    free(plain);
    printf("%d wrong\n", num_wrong);
    return num_wrong != 0;
}
