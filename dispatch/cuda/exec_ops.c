/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The halves of dispatch and combine as launches on the caller's stream:
 *
 *   outputs bound before   send: layout, push(place)          recv: await, or pull
 *   outputs given at recv  send: layout                       recv: push(place, bind), or + pull
 *   both in one call       layout, push(place, wait), or push(place), pull
 *                          few tokens: layout is done by push, in one launch
 *   combine                send: (stage) ready                recv: sum
 *   combine in one call    (stage) sum(ready)
 *
 * Over several nodes (exec_far.c): layout, counts, pack; place, receive, (copy); in combine (copy),
 * offer, reduce; sum.
 *
 * Between halves no kernel runs. nep_dispatch_counts launches place where nothing else has.
 */
#include <string.h>

#include "base/clock.h"
#include "dispatch/cuda/exec_far.h"

/* ---- arguments ------------------------------------------------------------------------------ */

static bool is_mapped(const struct nep_ep *ep, const void *buffer, uint64_t bytes)
{
    return buffer == NULL || nep_pool_holds(&ep->pool, buffer, bytes);
}

static uint64_t offset_of(const struct nep_ep *ep, const void *buffer)
{
    const struct nep_cuda_group *group = &ep->device->group;
    return (uint64_t)((const char *)buffer - (group->base + group->rank * group->stride));
}

static const struct nep_copies *copies_at(const struct nep_ep *ep, uint32_t version, uint32_t layer)
{
    for (uint32_t i = 0; i < 1 + NEP_MAX_STAGED; i++) {
        const struct nep_device_map *map = &ep->device->maps[i];
        if (map->memory != NULL && map->version == version) {
            return &map->copies[layer];
        }
    }
    return NULL;
}

static enum nep_status fill_input(struct nep_ep *ep, const struct nep_handle *handle,
                                  const struct nep_tokens *tokens, struct nep_cuda_input *in)
{
    const struct nep_wire *wire = &ep->shape.format;
    bool is_cast = wire->type != wire->dtype && tokens->scales == NULL;
    uint64_t num = tokens->num_tokens;
    const struct nep_copies *copies = copies_at(ep, handle->map_version, tokens->layer);
    if (copies == NULL && tokens->topk_ids != NULL) {
        return nep_fail(NEP_ERR_INTERNAL, "version %u of the map is not on the device",
                        handle->map_version);
    }
    *in = (struct nep_cuda_input){
        .x = tokens->x,
        .scales = tokens->scales,
        .ids = tokens->topk_ids,
        .weight = tokens->topk_weights,
        .id_type = tokens->id_type,
        .num_tokens = tokens->num_tokens,
        .x_offset = NEP_CUDA_NONE,
        .scales_offset = NEP_CUDA_NONE,
        .digest = handle->map_digest,
    };
    if (copies != NULL) {
        in->copies = *copies;
    }
    if (num != 0 && tokens->x != NULL && !is_cast &&
        nep_pool_holds(&ep->pool, tokens->x, num * wire->payload_bytes) &&
        is_mapped(ep, tokens->scales, num * wire->scale_bytes)) {
        in->x_offset = offset_of(ep, tokens->x);
        in->scales_offset = tokens->scales != NULL ? offset_of(ep, tokens->scales) : 0;
    }
    return NEP_OK;
}

static void fill_output(const struct nep_ep *ep, const struct nep_rows *rows,
                        struct nep_cuda_output *out)
{
    const struct nep_wire *wire = &ep->shape.format;
    uint64_t num = rows->x != NULL ? rows->capacity : 0;
    bool is_rank_layout = ep->shape.layout == NEP_LAYOUT_RANK;
    uint64_t k = is_rank_layout ? ep->shape.top_k : 1;
    *out = (struct nep_cuda_output){
        .x = rows->x,
        .scales = wire->scale_bytes != 0 ? rows->scales : NULL,
        .topk_slots = is_rank_layout ? rows->topk_slots : NULL,
        .topk_weights = rows->topk_weights,
        .source_rank = rows->source_rank,
        .source_token = rows->source_token,
        .capacity = num,
    };
    out->is_mapped = num != 0 && nep_pool_holds(&ep->pool, rows->x, num * wire->payload_bytes) &&
                     is_mapped(ep, out->scales, nep_wire_scales_bytes(wire, num)) &&
                     is_mapped(ep, out->topk_slots, num * k * 4) &&
                     is_mapped(ep, out->topk_weights, num * k * 4) &&
                     is_mapped(ep, out->source_rank, num * 4) &&
                     is_mapped(ep, out->source_token, num * 4);
}

static struct nep_cuda_dispatch dispatch_of(struct nep_handle *handle, bool has_out)
{
    struct nep_device_handle *here = handle->device;
    const struct nep_device *device = handle->ep->device;
    return (struct nep_cuda_dispatch){
        .group = &device->group,
        .shape = &device->shape,
        .geometry = &device->geometry,
        .in = &here->in,
        .out = has_out ? &here->out : NULL,
        .routing = &here->routing,
    };
}

/* ---- dispatch ------------------------------------------------------------------------------- */

enum nep_status nep_device_bind(struct nep_handle *handle, const struct nep_rows *out)
{
    handle->device->is_bound = out != NULL;
    if (out != NULL) {
        handle->device->bound = *out;
    }
    return NEP_OK;
}

/* Push, from a half that knows the outputs; place is done on the way where it was not. */
static enum nep_status push(struct nep_handle *handle, bool is_last, struct CUstream_st *stream)
{
    struct nep_device_handle *here = handle->device;
    struct nep_cuda_dispatch dispatch = dispatch_of(handle, true);
    unsigned flags = 0;
    flags |= here->is_placed ? 0 : NEP_CUDA_PUSH_PLACES;
    flags |= here->is_known ? 0 : NEP_CUDA_PUSH_BINDS;
    flags |= is_last && here->out.is_mapped ? NEP_CUDA_PUSH_WAITS : 0;
    here->is_placed = true;
    here->is_pushed = true;
    return here->is_few ? nep_cuda_push_few(&dispatch, flags, stream)
                        : nep_cuda_push(&dispatch, flags, stream);
}

enum nep_status nep_device_dispatch_send(struct nep_handle *handle, const struct nep_rows *out,
                                         void *stream)
{
    struct nep_device_handle *here = handle->device;
    struct nep_ep *ep = handle->ep;
    bool is_bound = here->is_bound;
    int was = -1;
    enum nep_status status = nep_device_enter(ep, &was);
    if (status == NEP_OK) {
        status = fill_input(ep, handle, &handle->op.in, &here->in);
    }
    if (status == NEP_OK) {
        if (is_bound || out != NULL) {
            fill_output(ep, is_bound ? &here->bound : out, &here->out);
        }
        here->stream = stream;
        here->is_known = is_bound || out != NULL;
        here->is_placed = here->is_pushed = here->is_counted = false;
    }
    if (status == NEP_OK && ep->device->far != NULL) {
        here->is_whole = out != NULL && ep->device->geometry.blocks > 1;
        status = nep_device_far_send(handle, stream);
    } else if (status == NEP_OK) {
        struct nep_cuda_dispatch dispatch = dispatch_of(handle, here->is_known);
        here->is_few = here->is_known && nep_cuda_is_few(&dispatch);
        if (!here->is_few) {
            status = nep_cuda_layout(&dispatch, stream);
        }
    }
    if (status == NEP_OK && is_bound && out == NULL && ep->device->far == NULL) {
        status = push(handle, false, stream);
    }
    nep_device_leave(was);
    return status;
}

enum nep_status nep_device_dispatch_recv(struct nep_handle *handle, const struct nep_rows *out,
                                         void *stream)
{
    struct nep_device_handle *here = handle->device;
    bool was_pushed = here->is_pushed;
    int was = -1;
    if (here->is_known &&
        (out->x != here->out.x || (out->x != NULL && out->capacity != here->out.capacity))) {
        return nep_fail(
            NEP_ERR_INVALID,
            "the outputs of handle %u were bound before its dispatch was sent: give the "
            "same ones here",
            handle->id);
    }
    enum nep_status status = nep_device_enter(handle->ep, &was);
    if (status == NEP_OK && !here->is_known) {
        fill_output(handle->ep, out, &here->out);
    }
    bool is_far = handle->ep->device->far != NULL;
    if (status == NEP_OK && is_far) {
        status = nep_device_far_recv(handle, stream);
    } else if (status == NEP_OK && !was_pushed) {
        status = push(handle, true, stream);
    }
    struct nep_cuda_dispatch dispatch = dispatch_of(handle, true);
    if (is_far) {
        /* Received and waited for. */
    } else if (status == NEP_OK && !here->out.is_mapped && here->out.capacity != 0) {
        status = nep_cuda_pull(&dispatch, stream);
    } else if (status == NEP_OK && (was_pushed || !here->out.is_mapped)) {
        status = nep_cuda_await(&dispatch, stream);
    }
    here->stream = stream;
    nep_device_leave(was);
    return status;
}

/* ---- counts --------------------------------------------------------------------------------- */

static enum nep_status check_capture(struct CUstream_st *stream)
{
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    enum nep_status status =
        nep_cuda_runtime_check(cudaStreamIsCapturing(stream, &capture), "the stream");
    if (status == NEP_OK && capture != cudaStreamCaptureStatusNone) {
        status =
            nep_fail(NEP_ERR_UNSUPPORTED,
                     "counts cannot be waited for while a graph is captured: size outputs with "
                     "nep_ep_max_rows, or read nep_dispatch_counts_device in kernels");
    }
    return status;
}

/* Until the stream has nothing left: bounded, whatever else the caller has put on it. */
static enum nep_status wait_stream(const struct nep_ep *ep, struct CUstream_st *stream)
{
    /* Kernels give up by themselves at the timeout; this wait is over a little after. */
    uint64_t deadline_ns = nep_deadline_ns(ep->timeout_ns + ep->timeout_ns / 2);
    struct nep_fault fault;
    cudaError_t error = cudaStreamQuery(stream);
    while (error == cudaErrorNotReady) {
        if (nep_left_ns(deadline_ns) == 0) {
            return nep_fail(NEP_ERR_TIMEOUT, "the stream was not done after %.3f s",
                            (double)ep->timeout_ns * 1.5 / 1e9);
        }
        error = cudaStreamQuery(stream);
    }
    enum nep_status status = nep_cuda_runtime_check(error, "the stream of a dispatch");
    if (status == NEP_OK && nep_device_fault(ep, &fault)) {
        status = nep_comm_fail(ep->comm, &fault);
    }
    return status;
}

enum nep_status nep_device_counts(struct nep_handle *handle)
{
    struct nep_device_handle *here = handle->device;
    const struct nep_ep *ep = handle->ep;
    uint64_t slots = ep->shape.slots_per_rank;
    uint64_t num_ranks = ep->plan.topology->num_ranks;
    struct CUstream_st *stream = here->stream;
    int was = -1;
    /* A graph may have dispatched again since: what a completed dispatch left is read anew. */
    if (here->is_counted && handle->state == NEP_HANDLE_DISPATCHING) {
        return NEP_OK;
    }
    enum nep_status status = nep_device_enter(ep, &was);
    if (status == NEP_OK) {
        status = check_capture(stream);
    }
    if (status == NEP_OK && !here->is_placed && ep->device->far != NULL) {
        status = nep_device_far_place(handle, stream);
    } else if (status == NEP_OK && !here->is_placed) {
        struct nep_cuda_dispatch dispatch = dispatch_of(handle, false);
        status = nep_cuda_place(&dispatch, stream);
        here->is_placed = true;
    }
    uint64_t *received = here->pinned;
    uint32_t *rows = (uint32_t *)(received + 2 + slots);
    if (status == NEP_OK) {
        cudaError_t error = cudaMemcpyAsync(received, here->routing.received, (2 + slots) * 8,
                                            cudaMemcpyDeviceToHost, stream);
        if (error == cudaSuccess) {
            error = cudaMemcpyAsync(rows, here->routing.received_rows, (slots + num_ranks) * 4,
                                    cudaMemcpyDeviceToHost, stream);
        }
        status = nep_cuda_runtime_check(error, "counts of a dispatch");
    }
    if (status == NEP_OK) {
        status = wait_stream(ep, stream);
    }
    nep_device_leave(was);
    if (status == NEP_OK) {
        handle->num_rows = received[0];
        handle->num_real_rows = received[1];
        handle->first_row = received + 2;
        handle->rows_per_slot = rows;
        handle->rows_per_source = rows + slots;
        here->is_counted = true;
    }
    return status;
}

bool nep_device_is_counted(const struct nep_handle *handle)
{
    return handle->device->is_counted;
}

void nep_device_counts_at(const struct nep_handle *handle, struct nep_counts *counts)
{
    const struct nep_device_handle *here = handle->device;
    const struct nep_ep *ep = handle->ep;
    *counts = (struct nep_counts){
        .size = sizeof *counts,
        .num_rows = here->is_counted
                        ? handle->num_rows
                        : nep_device_max_rows(&ep->shape, ep->plan.topology->num_ranks),
        .num_real_rows = here->is_counted ? handle->num_real_rows : 0,
        .rows_per_slot = here->routing.received_rows,
        .first_row = here->routing.received + 2,
        .rows_per_source = here->routing.received_rows + ep->shape.slots_per_rank,
    };
}

/* ---- combine -------------------------------------------------------------------------------- */

enum nep_status nep_device_combine_await(struct nep_handle *handle,
                                         const struct nep_written *written, void *stream)
{
    const struct nep_device *device = handle->ep->device;
    int was = -1;
    enum nep_status status = nep_device_enter(handle->ep, &was);
    if (status == NEP_OK) {
        status = nep_cuda_await_written(&device->group, &handle->device->routing, written,
                                        handle->ep->shape.slots_per_rank, stream);
    }
    nep_device_leave(was);
    return status;
}

enum nep_status nep_device_combine_send(struct nep_handle *handle, bool is_whole, void *stream)
{
    struct nep_device_handle *here = handle->device;
    struct nep_ep *ep = handle->ep;
    const struct nep_device *device = ep->device;
    const struct nep_expert_rows *rows = &handle->op.rows;
    bool has_weights = rows->topk_weights != NULL;
    bool mapped = rows->y == NULL || (nep_pool_holds(&ep->pool, rows->y, ep->shape.row_bytes) &&
                                      is_mapped(ep, rows->topk_weights, ep->shape.weights_bytes));
    int was = -1;
    here->combine = (struct nep_cuda_combine){
        .group = &device->group,
        .shape = &device->shape,
        .geometry = &device->geometry,
        .routing = &here->routing,
        .rows = NEP_CUDA_NONE,
        .weights = NEP_CUDA_NONE,
        .in = rows->y,
        .in_weights = rows->topk_weights,
        .has_weights = has_weights,
        .token_weights = rows->token_weights,
        .num_tokens = handle->num_tokens,
        .dtype = ep->shape.dtype,
        .hidden = ep->shape.hidden,
    };
    if (mapped) {
        here->combine.rows = rows->y != NULL ? offset_of(ep, rows->y) : 0;
        here->combine.weights = has_weights ? offset_of(ep, rows->topk_weights) : 0;
    }
    enum nep_status status = nep_device_enter(ep, &was);
    here->is_begun = false;
    if (device->far != NULL) {
        status = status == NEP_OK ? nep_device_far_combine_send(handle, is_whole, stream) : status;
        nep_device_leave(was);
        return status;
    }
    if (status == NEP_OK && !mapped) {
        status = nep_cuda_stage(&here->combine, stream);
        here->is_begun = true;
    }
    if (status == NEP_OK && !is_whole) {
        status = nep_cuda_ready(&here->combine, here->is_begun, stream);
        here->is_begun = true;
    }
    nep_device_leave(was);
    return status;
}

enum nep_status nep_device_combine_recv(struct nep_handle *handle, bool is_whole, void *stream)
{
    struct nep_device_handle *here = handle->device;
    const struct nep_tokens_out *sum = &handle->op.sum;
    int was = -1;
    here->combine.y = sum->y;
    here->combine.bias[0] = sum->bias[0];
    here->combine.bias[1] = sum->bias[1];
    here->combine.topk_weights = sum->topk_weights;
    unsigned flags = (is_whole ? NEP_CUDA_SUM_SAYS : 0) | (here->is_begun ? NEP_CUDA_SUM_BEGUN : 0);
    enum nep_status status = nep_device_enter(handle->ep, &was);
    if (status == NEP_OK && handle->ep->device->far != NULL) {
        status = nep_device_far_combine_recv(handle, is_whole, stream);
    } else if (status == NEP_OK) {
        status = nep_cuda_sum(&here->combine, flags, stream);
    }
    nep_device_leave(was);
    return status;
}

/* ---- layout alone --------------------------------------------------------------------------- */

static enum nep_status copy(void *to, const void *from, uint64_t bytes, struct CUstream_st *stream)
{
    return to == NULL ? NEP_OK
                      : nep_cuda_runtime_check(
                            cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream),
                            "counts of a layout");
}

enum nep_status nep_device_layout(struct nep_ep *ep, const struct nep_tokens *in,
                                  const struct nep_layout_counts *counts)
{
    struct nep_handle *handle = ep->device->scratch;
    struct nep_device_handle *here = handle->device;
    const struct nep_map_version *map = nep_maps_at(&ep->maps, ep->next_op);
    uint64_t num_ranks = ep->plan.topology->num_ranks;
    uint64_t num_nodes = ep->plan.topology->num_nodes;
    struct CUstream_st *stream = counts->stream;
    const uint32_t *from = here->routing.counts;
    int was = -1;
    handle->map_version = map->version;
    handle->map_digest = map->digest;
    struct nep_cuda_dispatch dispatch = dispatch_of(handle, false);
    enum nep_status status = nep_device_enter(ep, &was);
    if (status == NEP_OK) {
        status = fill_input(ep, handle, in, &here->in);
    }
    if (status == NEP_OK) {
        status = nep_cuda_count(&dispatch, stream);
    }
    if (status == NEP_OK) {
        status = copy(counts->rows_per_rank, from, num_ranks * 4, stream);
    }
    if (status == NEP_OK) {
        status = copy(counts->rows_per_node, from + num_ranks, num_nodes * 4, stream);
    }
    if (status == NEP_OK) {
        status = copy(counts->rows_per_slot, from + num_ranks + num_nodes,
                      num_ranks * ep->shape.slots_per_rank * 4, stream);
    }
    if (status == NEP_OK) {
        status = copy(counts->topk_slots, here->routing.slots,
                      (uint64_t)in->num_tokens * ep->shape.top_k * 4, stream);
    }
    if (status == NEP_OK && counts->is_token_in_rank != NULL) {
        status = nep_cuda_is_in(&dispatch, counts->is_token_in_rank, stream);
    }
    nep_device_leave(was);
    return status;
}
