// SPDX-License-Identifier: Apache-2.0
/*
 * COUNTS of an operation over several nodes, as launches of their own, for calls in two halves. A
 * block per node: it lists the tokens that go there, writes the message and asks the proxy to put
 * it; the own node's block publishes it, and where this rank's buffers lie, to its neighbours. Then
 * place, one block: from all COUNTS to where every source's rows begin in every output of this
 * node, as dispatch/positions.c does for the host.
 */
#include "dispatch/cuda/device/far_counts.cuh"

using namespace far_counts;

namespace
{

enum { THREADS = 1024 };

/* Dispatch: a block per node. */
__global__ void __launch_bounds__(THREADS) counts_kernel(const __grid_constant__ counts_args a)
{
    const struct nep_far &far = a.far;
    if (nep_ld_relaxed_gpu(&far.state->run.status) != 0) {
        if (blockIdx.x == 0 && threadIdx.x == 0) {
            nep_far_repeat(far);
        }
        return;
    }
    uint64_t op = nep_ld_relaxed_gpu(&far.state->begun);
    if (blockIdx.x == far.node && threadIdx.x == 0) {
        nep_far_stamp(far, NEP_FAR_AT_COUNTS);
    }
    tell_nodes(a, blockIdx.x, gridDim.x, op);
    if (blockIdx.x == far.node) {
        count_local(a);
    }
}

/* Combine: a block per control. */
__global__ void __launch_bounds__(THREADS) offer_kernel(const __grid_constant__ counts_args a)
{
    const struct nep_far &far = a.far;
    if (nep_ld_relaxed_gpu(&far.state->run.status) != 0) {
        return;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        nep_far_stamp(far, NEP_FAR_AT_OFFER);
    }
    tell_controls(a, blockIdx.x, gridDim.x, nep_ld_relaxed_gpu(&far.state->begun));
}

__global__ void __launch_bounds__(THREADS) place_kernel(const __grid_constant__ place_args a)
{
    extern __shared__ uint32_t totals[];
    if (nep_ld_relaxed_gpu(&a.far.state->run.status) != 0) {
        return;
    }
    place(a, a.base.cell->op, totals); /* the host may ask for counts before an older one ends */
}

} // namespace

enum nep_status nep_cuda_load_far_counts(void)
{
    enum nep_status status = nep_cuda_load_kernel((const void *)counts_kernel, "far counts");
    if (status == NEP_OK) {
        status = nep_cuda_load_kernel((const void *)offer_kernel, "far offer");
    }
    return status == NEP_OK ? nep_cuda_load_kernel((const void *)place_kernel, "far place")
                            : status;
}

extern "C" enum nep_status nep_cuda_far_counts(const struct nep_far_dispatch *d, unsigned flags,
                                               struct CUstream_st *stream)
{
    counts_args args = dispatch_counts(d, flags);
    counts_kernel<<<d->far->num_nodes, THREADS, d->geometry->shared_bytes, stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of far counts");
}

extern "C" enum nep_status nep_cuda_far_offer(const struct nep_far_combine *c,
                                              struct CUstream_st *stream)
{
    counts_args args = combine_counts(c);
    offer_kernel<<<c->far->num_controls, THREADS, c->geometry->shared_bytes, stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of far offer");
}

extern "C" enum nep_status nep_cuda_far_place(const struct nep_far_dispatch *d,
                                              struct CUstream_st *stream)
{
    place_args args = place_args_of(d);
    place_kernel<<<1, THREADS, place_bytes(d->far, d->geometry), stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of far place");
}
