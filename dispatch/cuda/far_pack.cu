// SPDX-License-Identifier: Apache-2.0
/*
 * Pack: one row per (token, node) into send slots, cast to fp8 if asked, a tile at a time; the
 * block that finishes a tile last asks the proxy to put it. Here the tiles that slots hold: they
 * wait for operations that this rank has completed alone, so the send half ends by itself.
 */
#include "dispatch/cuda/device/far_rows.cuh"

using namespace far_rows;

namespace
{

/* By the last block: the operation has begun. */
__device__ void end_send(const dispatch_args &a, uint64_t op)
{
    const struct nep_far &far = a.far;
    nep_far_begun(
        far, op, a.cell, far.state->next_tile, far.num_nodes,
        [&](uint32_t node, uint32_t *ring_p) {
            *ring_p = node == far.node ? NEP_SLOT_NONE : nep_far_skip(far.node, node);
            return nep_far_tiles(far, a.routing.node_rows[node]);
        },
        [&](uint32_t node) { return stream_ahead(a, op, node); });
}

template <bool kScales>
__global__ void __launch_bounds__(THREADS, 1) pack_kernel(const __grid_constant__ dispatch_args a)
{
    if (nep_ld_relaxed_gpu(&a.far.state->run.status) != 0) {
        return;
    }
    role r = {blockIdx.x, gridDim.x};
    if (threadIdx.x == 0 && blockIdx.x == 0) {
        nep_far_stamp(a.far, NEP_FAR_AT_PACK);
    }
    __shared__ tables tab;
    load_tables(a.far, tab);
    __syncthreads();
    uint64_t op = nep_ld_relaxed_gpu(&a.far.state->begun);
    if (pack<kScales>(a, tab, r, op, false) && nep_far_is_last(&a.far.state->arrived, gridDim.x)) {
        end_send(a, op);
    }
}

} // namespace

enum nep_status nep_cuda_load_far_pack(void)
{
    enum nep_status status = nep_cuda_load_kernel((const void *)pack_kernel<true>, "far pack");
    return status == NEP_OK ? nep_cuda_load_kernel((const void *)pack_kernel<false>, "far pack")
                            : status;
}

enum nep_status nep_cuda_far_check(const struct nep_far_dispatch *d)
{
    const struct nep_far *far = d->far;
    if (far->shape.wire.payload_bytes % 16 != 0 || (uintptr_t)d->in->x % 16 != 0 ||
        far->shape.wire.row_bytes % 16 != 0 || far->num_ranks > NEP_FAR_MAX_RANKS ||
        far->num_nodes > NEP_FAR_MAX_NODES || far->shape.top_k > 32) {
        return nep_fail(NEP_ERR_INVALID,
                        "far pack: rows of %u bytes at %p (multiples of 16), %u ranks (at most "
                        "%d), %u nodes (at most %d)",
                        far->shape.wire.payload_bytes, d->in->x, far->num_ranks, NEP_FAR_MAX_RANKS,
                        far->num_nodes, NEP_FAR_MAX_NODES);
    }
    if (d->in->num_tokens > far->tiles * far->tile_rows && d->geometry->blocks < 2) {
        return nep_fail(NEP_ERR_INVALID,
                        "far pack: %u tokens are more than %u tiles of %u, which needs two SMs at "
                        "least: some pack while others receive",
                        d->in->num_tokens, far->tiles, far->tile_rows);
    }
    return NEP_OK;
}

extern "C" enum nep_status nep_cuda_far_pack(const struct nep_far_dispatch *d,
                                             struct CUstream_st *stream)
{
    enum nep_status status = nep_cuda_far_check(d);
    if (status != NEP_OK) {
        return status;
    }
    dispatch_args args = make_args(d);
    auto kernel = has_scales(args) ? pack_kernel<true> : pack_kernel<false>;
    kernel<<<d->geometry->blocks, THREADS, d->geometry->shared_bytes, stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of far pack");
}
