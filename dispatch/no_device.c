/* SPDX-License-Identifier: Apache-2.0 */
/* A build without CUDA: an ep on a GPU is refused, so nothing else here is ever reached. */
#include "dispatch/device.h"

#if !NEP_HAVE_CUDA

static enum nep_status refuse(void)
{
    return nep_fail(NEP_ERR_UNSUPPORTED,
                    "executor cuda: this build of nearep has no CUDA executor: build it where nvcc "
                    "is, with NEP_CUDA=ON");
}

enum nep_status nep_device_create(struct nep_ep *ep, const struct nep_ep_params *params)
{
    (void)ep;
    (void)params;
    return refuse();
}

void nep_device_destroy(struct nep_ep *ep, bool is_child)
{
    (void)ep;
    (void)is_child;
}

enum nep_status nep_device_memory(const struct nep_plan *plan, const struct nep_ep_params *params,
                                  struct nep_memory *memory)
{
    (void)plan;
    (void)params;
    (void)memory;
    return refuse();
}

bool nep_device_fault(const struct nep_ep *ep, struct nep_fault *fault)
{
    (void)ep;
    (void)fault;
    return false;
}

void nep_device_stats(const struct nep_ep *ep, struct nep_stats *stats)
{
    (void)ep;
    (void)stats;
}

enum nep_status nep_device_handle_create(struct nep_handle *handle)
{
    (void)handle;
    return refuse();
}

void nep_device_handle_destroy(struct nep_handle *handle, bool is_child)
{
    (void)handle;
    (void)is_child;
}

enum nep_status nep_device_take_map(struct nep_ep *ep, const struct nep_map_version *version)
{
    (void)ep;
    (void)version;
    return refuse();
}

enum nep_status nep_device_zero(struct nep_ep *ep, void *buffer, uint64_t bytes)
{
    (void)ep;
    (void)buffer;
    (void)bytes;
    return refuse();
}

enum nep_status nep_device_alloc(struct nep_ep *ep, uint64_t bytes, void **buffer_p)
{
    (void)ep;
    (void)bytes;
    (void)buffer_p;
    return refuse();
}

void nep_device_free(struct nep_ep *ep, void *buffer)
{
    (void)ep;
    (void)buffer;
}

enum nep_status nep_device_bind(struct nep_handle *handle, const struct nep_rows *out)
{
    (void)handle;
    (void)out;
    return refuse();
}

enum nep_status nep_device_dispatch_send(struct nep_handle *handle, const struct nep_rows *out,
                                         void *stream)
{
    (void)handle;
    (void)out;
    (void)stream;
    return refuse();
}

enum nep_status nep_device_dispatch_recv(struct nep_handle *handle, const struct nep_rows *out,
                                         void *stream)
{
    (void)handle;
    (void)out;
    (void)stream;
    return refuse();
}

enum nep_status nep_device_counts(struct nep_handle *handle)
{
    (void)handle;
    return refuse();
}

bool nep_device_is_counted(const struct nep_handle *handle)
{
    (void)handle;
    return false;
}

void nep_device_counts_at(const struct nep_handle *handle, struct nep_counts *counts)
{
    (void)handle;
    (void)counts;
}

enum nep_status nep_device_combine_await(struct nep_handle *handle,
                                         const struct nep_written *written, void *stream)
{
    (void)handle;
    (void)written;
    (void)stream;
    return refuse();
}

enum nep_status nep_device_combine_send(struct nep_handle *handle, bool is_whole, void *stream)
{
    (void)handle;
    (void)is_whole;
    (void)stream;
    return refuse();
}

enum nep_status nep_device_combine_recv(struct nep_handle *handle, bool is_whole, void *stream)
{
    (void)handle;
    (void)is_whole;
    (void)stream;
    return refuse();
}

enum nep_status nep_device_layout(struct nep_ep *ep, const struct nep_tokens *in,
                                  const struct nep_layout_counts *counts)
{
    (void)ep;
    (void)in;
    (void)counts;
    return refuse();
}

#endif
