/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The halves of dispatch and combine over several nodes as launches on the caller's stream. In one
 * call, one launch after layout; else the send half tells COUNTS and packs, and the complete half
 * places and receives. Tensors that the node does not map are copied from or to the window.
 *
 * With several operations outstanding an output that is not mapped is told of by the complete half:
 * the one place where such rows arrive is then free again, the operation before having been copied.
 */
#include "dispatch/cuda/exec_far.h"

static uint64_t offset_of(const struct nep_ep *ep, const void *buffer)
{
    const struct nep_device *device = ep->device;
    const char *near = device->windows.base + ep->local * device->windows.stride + device->plan.far;
    return buffer != NULL ? (uint64_t)((const char *)buffer - near) : NEP_CUDA_NONE;
}

static uint64_t staged(const void *wanted, uint64_t at)
{
    return wanted != NULL ? at : NEP_CUDA_NONE;
}

/* Where rows of the node arrive: in the caller's arrays or, if those are not mapped, beside them.
 */
static void find_output(struct nep_handle *handle, struct nep_far_output *to)
{
    const struct nep_ep *ep = handle->ep;
    const struct nep_far_output *area = &ep->device->far->plan.out;
    const struct nep_cuda_output *out = &handle->device->out;
    if (out->is_mapped || out->capacity == 0) {
        *to = (struct nep_far_output){
            .x = out->x != NULL ? offset_of(ep, out->x) : 0,
            .scales = offset_of(ep, out->scales),
            .topk_slots = offset_of(ep, out->topk_slots),
            .topk_weights = offset_of(ep, out->topk_weights),
            .source_rank = offset_of(ep, out->source_rank),
            .source_token = offset_of(ep, out->source_token),
            .capacity = out->capacity,
        };
        return;
    }
    *to = (struct nep_far_output){
        .x = area->x,
        .scales = staged(out->scales, area->scales),
        .topk_slots = staged(out->topk_slots, area->topk_slots),
        .topk_weights = staged(out->topk_weights, area->topk_weights),
        .source_rank = staged(out->source_rank, area->source_rank),
        .source_token = staged(out->source_token, area->source_token),
        .capacity = out->capacity < area->capacity ? out->capacity : area->capacity,
    };
}

static struct nep_far_dispatch dispatch_of(struct nep_handle *handle)
{
    struct nep_device_handle *here = handle->device;
    struct nep_device *device = handle->ep->device;
    device->far->far.timeout_ns = handle->ep->timeout_ns;
    return (struct nep_far_dispatch){
        .far = &device->far->far,
        .geometry = &device->geometry,
        .in = &here->in,
        .out = &here->far_out,
        .routing = &here->routing,
        .far_routing = &here->far,
    };
}

enum nep_status nep_device_far_send(struct nep_handle *handle, struct CUstream_st *stream)
{
    struct nep_device_handle *here = handle->device;
    const struct nep_device *device = handle->ep->device;
    const struct nep_cuda_dispatch layout = {
        .group = &device->group,
        .shape = &device->shape,
        .geometry = &device->geometry,
        .in = &here->in,
        .routing = &here->routing,
    };
    struct nep_far_dispatch dispatch = dispatch_of(handle);
    bool is_free = here->is_whole || handle->ep->shape.outstanding == 1;
    here->is_told = here->is_known && (here->out.is_mapped || is_free);
    if (here->is_known) {
        find_output(handle, &here->far_out);
    }
    enum nep_status status = nep_cuda_count(&layout, stream);
    if (here->is_whole) {
        return status;
    }
    if (status == NEP_OK) {
        status = nep_cuda_far_counts(&dispatch, here->is_told ? NEP_FAR_BINDS : 0, stream);
    }
    return status == NEP_OK ? nep_cuda_far_pack(&dispatch, stream) : status;
}

enum nep_status nep_device_far_place(struct nep_handle *handle, struct CUstream_st *stream)
{
    struct nep_far_dispatch dispatch = dispatch_of(handle);
    handle->device->is_placed = true;
    return nep_cuda_far_place(&dispatch, stream);
}

/* From the window to the caller's arrays. */
static enum nep_status copy_out(struct nep_handle *handle, struct CUstream_st *stream)
{
    const struct nep_ep *ep = handle->ep;
    const struct nep_device *device = ep->device;
    const struct nep_device_handle *here = handle->device;
    const char *near = device->windows.base + ep->local * device->windows.stride + device->plan.far;
    const struct nep_far_output *area = &here->far_out;
    uint32_t per_k = ep->shape.layout == NEP_LAYOUT_RANK ? ep->shape.weights_bytes : 4;
    const struct {
        void *to;
        uint64_t from;
        uint32_t bytes;
    } arrays[] = {
        {here->out.x, area->x, ep->shape.format.payload_bytes},
        {here->out.scales, area->scales, ep->shape.format.scale_bytes},
        {here->out.topk_slots, area->topk_slots, per_k},
        {here->out.topk_weights, area->topk_weights, per_k},
        {here->out.source_rank, area->source_rank, 4},
        {here->out.source_token, area->source_token, 4},
    };
    struct nep_far_copy copy = {.is_dispatched = 1,
                                .capacity = {area->capacity, here->out.capacity}};
    for (uint32_t i = 0; i < 6; i++) {
        copy.from[i] = arrays[i].to != NULL ? near + arrays[i].from : NULL;
        copy.to[i] = arrays[i].to;
        copy.row_bytes[i] = arrays[i].bytes;
    }
    return nep_cuda_far_copy(&device->far->far, &device->geometry, &here->routing, &copy,
                             area->capacity, stream);
}

enum nep_status nep_device_far_recv(struct nep_handle *handle, struct CUstream_st *stream)
{
    struct nep_device_handle *here = handle->device;
    struct nep_far_dispatch dispatch = dispatch_of(handle);
    enum nep_status status = NEP_OK;
    if (!here->is_known) {
        find_output(handle, &here->far_out);
    }
    if (here->is_whole) {
        here->is_placed = true;
        status = nep_cuda_far_dispatch(&dispatch, stream);
    } else if (!here->is_placed) {
        status = nep_device_far_place(handle, stream);
    }
    if (status == NEP_OK && !here->is_whole) {
        status = nep_cuda_far_recv(&dispatch, here->is_told ? 0 : NEP_FAR_BINDS, stream);
    }
    if (status == NEP_OK && !here->out.is_mapped && here->out.capacity != 0) {
        status = copy_out(handle, stream);
    }
    return status;
}

static struct nep_far_combine combine_of(struct nep_handle *handle)
{
    struct nep_device_handle *here = handle->device;
    struct nep_device *device = handle->ep->device;
    const struct nep_tokens_out *sum = &handle->op.sum;
    device->far->far.timeout_ns = handle->ep->timeout_ns;
    return (struct nep_far_combine){
        .far = &device->far->far,
        .geometry = &device->geometry,
        .routing = &here->routing,
        .far_routing = &here->far,
        .rows = here->far_rows,
        .weights = here->far_weights,
        .rows_step = here->is_y_copied ? device->far->plan.y_step : 0,
        .weights_step = here->is_y_copied ? device->far->plan.y_weights_step : 0,
        .y = sum->y,
        .bias = {sum->bias[0], sum->bias[1]},
        .topk_weights = sum->topk_weights,
        .num_tokens = handle->num_tokens,
    };
}

enum nep_status nep_device_far_combine_send(struct nep_handle *handle, bool is_whole,
                                            struct CUstream_st *stream)
{
    struct nep_device_handle *here = handle->device;
    struct nep_ep *ep = handle->ep;
    const struct nep_device *device = ep->device;
    const struct nep_far_plan *plan = &device->far->plan;
    const struct nep_expert_rows *rows = &handle->op.rows;
    enum nep_status status = NEP_OK;
    here->is_y_copied = here->combine.rows == NEP_CUDA_NONE; /* it is not mapped */
    here->far_rows = here->is_y_copied ? plan->y : rows->y != NULL ? offset_of(ep, rows->y) : 0;
    here->far_weights = rows->topk_weights == NULL ? NEP_CUDA_NONE
                        : here->is_y_copied        ? plan->y_weights
                                                   : offset_of(ep, rows->topk_weights);
    if (here->is_y_copied) {
        char *near = device->windows.base + ep->local * device->windows.stride + device->plan.far;
        const struct nep_far_copy copy = {
            .from = {rows->y, (const char *)rows->topk_weights},
            .to = {near + plan->y, near + plan->y_weights},
            .to_step = {plan->y_step, plan->y_weights_step},
            .row_bytes = {ep->shape.row_bytes, ep->shape.weights_bytes},
        };
        device->far->far.timeout_ns = ep->timeout_ns;
        status = nep_cuda_far_copy(&device->far->far, &device->geometry, &here->routing, &copy,
                                   plan->y_rows, stream);
    }
    struct nep_far_combine combine = combine_of(handle);
    if (is_whole) {
        return status;
    }
    if (status == NEP_OK) {
        status = nep_cuda_far_offer(&combine, stream);
    }
    return status == NEP_OK ? nep_cuda_far_reduce(&combine, stream) : status;
}

enum nep_status nep_device_far_combine_recv(struct nep_handle *handle, bool is_whole,
                                            struct CUstream_st *stream)
{
    struct nep_far_combine combine = combine_of(handle);
    return is_whole ? nep_cuda_far_combine(&combine, stream) : nep_cuda_far_sum(&combine, stream);
}
