/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Waiting inside kernels, always bounded. On expiry the first cause is recorded in the sticky
 * status of the state (and in the pinned copy that the host reads without a CUDA call); the kernel
 * returns, and later kernels of this state return at their first instruction, so that a replayed
 * graph does not wait its deadline again and again. Never a trap, never an endless spin.
 */
#ifndef NEP_DISPATCH_CUDA_DEVICE_WAIT_CUH
#define NEP_DISPATCH_CUDA_DEVICE_WAIT_CUH

#include "dispatch/cuda/cuda_phases.h"
#include "dispatch/cuda/device/ptx.cuh"

/* The message of COUNTS: this head, then rows per rank [R], rows per slot [R * L]. */
struct nep_cuda_message {
    struct nep_cuda_output out;
    uint64_t op;
    uint64_t num_tokens;
};

static __device__ __forceinline__ char *nep_window(const struct nep_cuda_group &group,
                                                   uint32_t rank)
{
    return group.base + rank * group.stride;
}

static __device__ __forceinline__ uint64_t *
nep_word_at(const struct nep_cuda_group &group, uint32_t rank, uint64_t offset, uint64_t idx)
{
    return (uint64_t *)(nep_window(group, rank) + group.words_offset + offset) + idx;
}

static __device__ __forceinline__ char *nep_message_at(const struct nep_cuda_group &group,
                                                       uint32_t rank, uint64_t op, uint32_t source)
{
    uint64_t idx = op % NEP_CUDA_SLOTS_IN_USE * group.num_ranks + source;
    return nep_window(group, rank) + group.words_offset + group.words.message +
           idx * group.words.message_bytes;
}

static __device__ __forceinline__ bool nep_is_stuck(const struct nep_cuda_group &group)
{
    return nep_ld_relaxed_gpu(&group.state->status) != 0;
}

/* The operation's number, loaded together with the status; false: stuck. */
static __device__ __forceinline__ bool nep_begin(const struct nep_cuda_group &group, uint64_t *op_p)
{
    uint64_t status = nep_ld_relaxed_gpu(&group.state->status);
    *op_p = nep_ld_relaxed_gpu(&group.state->op);
    return status == 0;
}

static __device__ inline void nep_give_up(const struct nep_cuda_group &group, uint64_t status)
{
    unsigned long long *word = (unsigned long long *)&group.state->status;
    if (atomicCAS(word, 0ull, (unsigned long long)status) == 0 && group.status_host != nullptr) {
        nep_st_release_sys(group.status_host, status);
    }
}

/* Acquire: pairs with the release that raised the word. False: recorded, give up. */
static __device__ inline bool nep_wait_word(const struct nep_cuda_group &group,
                                            const uint64_t *word, uint64_t value,
                                            enum nep_cuda_phase phase, uint32_t who)
{
    if (nep_ld_acquire_sys(word) >= value) {
        return true;
    }
    uint64_t start = nep_globaltimer();
    while (nep_ld_acquire_sys(word) < value) {
        if (nep_is_stuck(group)) {
            return false;
        }
        if (nep_globaltimer() - start > group.timeout_ns) {
            nep_give_up(group, NEP_CUDA_STATUS(NEP_CUDA_EXPIRED, phase, who));
            return false;
        }
    }
    return true;
}

/* By all threads of a block: thread r waits for word [first + r] of this rank. */
static __device__ inline bool nep_wait_all(const struct nep_cuda_group &group, uint64_t offset,
                                           uint64_t first, uint64_t value,
                                           enum nep_cuda_phase phase)
{
    bool is_there = true;
    for (uint32_t r = threadIdx.x; r < group.num_ranks; r += blockDim.x) {
        is_there =
            is_there && nep_wait_word(group, nep_word_at(group, group.rank, offset, first + r),
                                      value, phase, r);
    }
    /* The barrier hands what the waiting threads acquired to the others. */
    return __syncthreads_and(is_there) != 0;
}

/*
 * By all threads of a block, at its end: true in the block that arrives last, which then owns what
 * all blocks did. The barriers carry the stores of a block's threads to and from the arrival.
 */
static __device__ inline bool nep_is_last_block(const struct nep_cuda_group &group)
{
    __shared__ uint32_t ticket;
    __syncthreads();
    if (gridDim.x == 1) {
        return true;
    }
    if (threadIdx.x == 0) {
        ticket = nep_add_acq_rel_gpu(&group.state->arrived, 1);
        if (ticket == gridDim.x - 1) {
            group.state->arrived = 0;
        }
    }
    __syncthreads();
    return ticket == gridDim.x - 1;
}

/* By all threads of one block: raises this rank's word at every rank. Release: pairs with the
 * acquire in nep_wait_word there. */
static __device__ inline void nep_tell_all(const struct nep_cuda_group &group, uint64_t offset,
                                           uint64_t first, uint64_t value)
{
    for (uint32_t r = threadIdx.x; r < group.num_ranks; r += blockDim.x) {
        nep_st_release_sys(nep_word_at(group, r, offset, first + group.rank), value);
    }
}

#endif
