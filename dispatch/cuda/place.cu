// SPDX-License-Identifier: Apache-2.0
/*
 * Positions, as a kernel of one block: where the host asks for counts, or outputs are not known
 * yet. An output that is too small is found by push, when it knows it, by every rank alike.
 */
#include "dispatch/cuda/device/launch.cuh"
#include "dispatch/cuda/device/place.cuh"

namespace
{

enum { PLACE_THREADS = 1024 };

struct place_args {
    struct nep_cuda_group group;
    struct nep_cuda_routing routing;
    struct nep_place_args place;
};

__global__ void __launch_bounds__(PLACE_THREADS) place_kernel(const __grid_constant__ place_args a)
{
    uint64_t op = 0;
    bool is_begun = nep_begin(a.group, a.routing.cell, &op);
    if (!__syncthreads_and(is_begun)) {
        return;
    }
    nep_place place = {a.group, a.routing, a.place, op, a.routing.first, a.routing.totals};
    if (nep_wait_all(a.group, a.group.words.counts, op, NEP_CUDA_PHASE_COUNTS)) {
        nep_place_first(place);
        nep_place_received(place);
    }
}

} // namespace

enum nep_status nep_cuda_load_place(void)
{
    return nep_cuda_load_kernel((const void *)place_kernel, "place");
}

extern "C" enum nep_status nep_cuda_place(const struct nep_cuda_dispatch *dispatch,
                                          struct CUstream_st *stream)
{
    place_args args = {*dispatch->group, *dispatch->routing, nep_place_args_of(dispatch)};
    /* Shared memory that keeps a kernel of another rank, which this one may wait for, elsewhere. */
    place_kernel<<<1, PLACE_THREADS, dispatch->geometry->shared_bytes, stream>>>(args);
    return nep_cuda_check(cudaGetLastError(), "launch of place");
}

extern "C" enum nep_status nep_cuda_load(void)
{
    enum nep_status (*const loads[])(void) = {
        nep_cuda_load_layout, nep_cuda_load_place, nep_cuda_load_push,   nep_cuda_load_pull,
        nep_cuda_load_stage,  nep_cuda_load_sum,   nep_cuda_load_written};
    for (auto load : loads) {
        enum nep_status status = load();
        if (status != NEP_OK) {
            return status;
        }
    }
    return NEP_OK;
}
