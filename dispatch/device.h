/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The executor for tokens in GPU memory, as the calls of dispatch use it: ep->device is not NULL
 * then. Built from dispatch/cuda/; in a build without CUDA, creation is refused (no_device.c).
 * Arguments are checked, and operations numbered, by the callers, alike for both executors.
 */
#ifndef NEP_DISPATCH_DEVICE_H
#define NEP_DISPATCH_DEVICE_H

#include "dispatch/ep.h"

/* Collective, like nep_ep_create, of which it is a part. */
enum nep_status nep_device_create(struct nep_ep *ep, const struct nep_ep_params *params);
/* is_child: after fork(), only memory is freed. */
void nep_device_destroy(struct nep_ep *ep, bool is_child);
/* Adds what the regions of such an ep take per rank. */
enum nep_status nep_device_memory(const struct nep_plan *plan, const struct nep_ep_params *params,
                                  struct nep_memory *memory);

/* Whether a kernel has given up, and why. Any thread; no CUDA call. */
bool nep_device_fault(const struct nep_ep *ep, struct nep_fault *fault);

/* Adds what the executor counted beside the calls. */
void nep_device_stats(const struct nep_ep *ep, struct nep_stats *stats);

enum nep_status nep_device_handle_create(struct nep_handle *handle);
void nep_device_handle_destroy(struct nep_handle *handle, bool is_child);

/* Tables of a map version that was just staged. */
enum nep_status nep_device_take_map(struct nep_ep *ep, const struct nep_map_version *version);

/* Device memory: from the pool, zeroed; private where the pool has no room. */
enum nep_status nep_device_zero(struct nep_ep *ep, void *buffer, uint64_t bytes);
enum nep_status nep_device_alloc(struct nep_ep *ep, uint64_t bytes, void **buffer_p);
void nep_device_free(struct nep_ep *ep, void *buffer);

enum nep_status nep_device_bind(struct nep_handle *handle, const struct nep_rows *out);
/* out: of a dispatch in one call; NULL: the complete half brings it, or it is bound. */
enum nep_status nep_device_dispatch_send(struct nep_handle *handle, const struct nep_rows *out,
                                         void *stream);
enum nep_status nep_device_dispatch_recv(struct nep_handle *handle, const struct nep_rows *out,
                                         void *stream);
enum nep_status nep_device_counts(struct nep_handle *handle);
/* It was called for the dispatch at hand. */
bool nep_device_is_counted(const struct nep_handle *handle);
/* Pointers into device memory, valid as long as the handle. */
void nep_device_counts_at(const struct nep_handle *handle, struct nep_counts *counts);
/* The stream waits until the outputs for the handle's rows are written. */
enum nep_status nep_device_combine_await(struct nep_handle *handle,
                                         const struct nep_written *written, void *stream);
/* is_whole: recv follows at once on the same stream. */
enum nep_status nep_device_combine_send(struct nep_handle *handle, bool is_whole, void *stream);
enum nep_status nep_device_combine_recv(struct nep_handle *handle, bool is_whole, void *stream);
enum nep_status nep_device_layout(struct nep_ep *ep, const struct nep_tokens *in,
                                  const struct nep_layout_counts *counts);

#endif
