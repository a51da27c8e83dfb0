/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What watches over an ep's kernels (dispatch/watch.h). A rank that is gone is told to them in the
 * word where it would have said itself that it gave up: kernels look at that word anyway while they
 * wait for this rank, and no other one, so nothing new is polled and nobody else is stopped. Over
 * several nodes that is the one word by which all of a node give up, and the ranks of other nodes
 * that this one exchanges rows with are the proxy's to look after, which tells kernels by its ring.
 */
#include <stdlib.h>

#include "base/clock.h"
#include "base/log.h"
#include "dispatch/cuda/exec_far.h"
#include "dispatch/watch.h"

enum { PERIOD_MS = 10 };

struct nep_device_watch {
    struct nep_ep *ep;
    const struct nep_cuda_driver *driver;
    cudaStream_t stream; /* its own: the caller's are full of kernels that wait */
    struct nep_watch *watch;
};

static enum nep_status peer_status(void *ctx, uint32_t rank)
{
    const struct nep_device_watch *here = ctx;
    const struct nep_ep *ep = here->ep;
    bool is_near = ep->plan.topology->node_of_rank[rank] == ep->node;
    struct nep_transport *transport = is_near ? ep->comm->intra : ep->comm->inter;
    return transport->ops->peer_status(transport, rank);
}

/* What the rank left in its word here is better than that it is gone. */
static bool is_silent(const struct nep_device_watch *here, const void *word)
{
    uint64_t said = 0;
    return cudaMemcpyAsync(&said, word, sizeof said, cudaMemcpyDeviceToHost, here->stream) ==
               cudaSuccess &&
           cudaStreamSynchronize(here->stream) == cudaSuccess && said == 0;
}

static void tell(void *ctx, uint32_t rank)
{
    const struct nep_device_watch *here = ctx;
    const struct nep_ep *ep = here->ep;
    const struct nep_cuda_group *group = &ep->device->group;
    bool is_near = ep->plan.topology->node_of_rank[rank] == ep->node;
    if (!is_near || cudaSetDevice(ep->device->ordinal) != cudaSuccess) {
        return;
    }
    char *word = ep->device->far != NULL
                     ? (char *)ep->device->far->far.stuck
                     : group->base + group->rank * group->stride + group->words_offset +
                           group->words.fault + (uint64_t)rank * sizeof(uint64_t);
    if (is_silent(here, word) &&
        here->driver->write_value64(here->stream, (CUdeviceptr)(uintptr_t)word,
                                    NEP_CUDA_STATUS(NEP_CUDA_LOST, 0, rank), 0) != CUDA_SUCCESS) {
        nep_warn("rank %u is gone, and kernels that wait for it cannot be told: they wait until "
                 "their deadline",
                 rank);
    }
}

static bool look(void *ctx)
{
    const struct nep_device_watch *here = ctx;
    return nep_comm_look(here->ep->comm);
}

enum nep_status nep_device_watch_start(struct nep_ep *ep)
{
    struct nep_device_watch *here = calloc(1, sizeof *here);
    if (here == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory to watch over kernels");
    }
    here->ep = ep;
    ep->device->watch = here;
    enum nep_status status = nep_cuda_driver_get(&here->driver);
    if (status == NEP_OK) {
        status = nep_cuda_runtime_check(
            cudaStreamCreateWithFlags(&here->stream, cudaStreamNonBlocking), "a stream");
    }
    struct nep_watch_params params = {.peer_status = peer_status,
                                      .tell = tell,
                                      .look = look,
                                      .ctx = here,
                                      .rank = ep->rank,
                                      .num_ranks = ep->plan.topology->num_ranks,
                                      .period_ns = PERIOD_MS * NEP_MS};
    return status == NEP_OK ? nep_watch_start(&params, &here->watch) : status;
}

void nep_device_watch_stop(struct nep_ep *ep, bool is_child)
{
    struct nep_device_watch *here = ep->device->watch;
    if (here == NULL) {
        return;
    }
    if (!is_child) { /* where the thread is */
        nep_watch_stop(here->watch);
        if (here->stream != NULL) {
            cudaStreamDestroy(here->stream);
        }
    }
    free(here);
    ep->device->watch = NULL;
}
