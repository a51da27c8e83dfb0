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
    uint64_t op;
    uint64_t digest; /* of the map */
    uint64_t num_tokens;
    uint64_t x_offset; /* where the sender's rows lie; NONE: in its staging area */
    uint64_t scales_offset;
    uint64_t reserved;
};

/* A rank's outputs as offsets in its window; NONE where there is no such array. */
struct nep_cuda_bind {
    uint64_t x; /* NONE: that rank pulls */
    uint64_t scales;
    uint64_t topk_slots;
    uint64_t topk_weights;
    uint64_t source_rank;
    uint64_t source_token;
    uint64_t capacity;
    uint64_t reserved;
};

/* Where a rank's expert outputs may be read. */
struct nep_cuda_lend {
    uint64_t rows;
    uint64_t weights;
};

/* The plan of words is made in plain C (geometry.c). */
static_assert(sizeof(struct nep_cuda_message) == 48 && sizeof(struct nep_cuda_bind) == 64 &&
                  sizeof(struct nep_cuda_lend) == 16,
              "geometry.c knows these sizes");

static __device__ __forceinline__ char *nep_window(const struct nep_cuda_group &group,
                                                   uint32_t rank)
{
    return group.base + rank * group.stride;
}

/* Of a table [W][R] of the words of rank `at`: the entry of op and rank `of`. */
static __device__ __forceinline__ char *nep_slot_at(const struct nep_cuda_group &group, uint32_t at,
                                                    uint64_t offset, uint64_t bytes, uint64_t op,
                                                    uint32_t of)
{
    uint64_t idx = op % group.window * group.num_ranks + of;
    return nep_window(group, at) + group.words_offset + offset + idx * bytes;
}

static __device__ __forceinline__ uint64_t *nep_word_at(const struct nep_cuda_group &group,
                                                        uint32_t at, uint64_t offset, uint64_t op,
                                                        uint32_t of)
{
    return (uint64_t *)nep_slot_at(group, at, offset, sizeof(uint64_t), op, of);
}

static __device__ __forceinline__ uint64_t *nep_fault_at(const struct nep_cuda_group &group,
                                                         uint32_t at, uint32_t of)
{
    return (uint64_t *)(nep_window(group, at) + group.words_offset + group.words.fault) + of;
}

static __device__ __forceinline__ struct nep_cuda_message *
nep_message_at(const struct nep_cuda_group &group, uint32_t at, uint64_t op, uint32_t source)
{
    return (struct nep_cuda_message *)nep_slot_at(group, at, group.words.message,
                                                  group.words.message_bytes, op, source);
}

static __device__ __forceinline__ struct nep_cuda_bind *
nep_bind_at(const struct nep_cuda_group &group, uint32_t at, uint64_t op, uint32_t of)
{
    return (struct nep_cuda_bind *)nep_slot_at(group, at, group.words.bind,
                                               sizeof(struct nep_cuda_bind), op, of);
}

static __device__ __forceinline__ struct nep_cuda_lend *
nep_lend_at(const struct nep_cuda_group &group, uint32_t at, uint64_t op, uint32_t of)
{
    return (struct nep_cuda_lend *)nep_slot_at(group, at, group.words.lend,
                                               sizeof(struct nep_cuda_lend), op, of);
}

static __device__ __forceinline__ bool nep_is_stuck(const struct nep_cuda_group &group)
{
    return nep_ld_relaxed_gpu(&group.state->status) != 0;
}

/* For kernels of an operation that has begun: its number; false: stuck. */
static __device__ __forceinline__ bool nep_begin(const struct nep_cuda_group &group,
                                                 const struct nep_cuda_cell *cell, uint64_t *op_p)
{
    uint64_t status = nep_ld_relaxed_gpu(&group.state->status);
    *op_p = nep_ld_relaxed_gpu(&cell->op);
    return status == 0;
}

/* For kernels that begin one: the number that it gets with nep_begun. */
static __device__ __forceinline__ bool nep_begin_next(const struct nep_cuda_group &group,
                                                      uint64_t *op_p)
{
    uint64_t status = nep_ld_relaxed_gpu(&group.state->status);
    *op_p = nep_ld_relaxed_gpu(&group.state->op) + 1;
    return status == 0;
}

/* By one thread, when all blocks have had nep_begin_next: for the kernels that follow. */
static __device__ __forceinline__ void nep_begun(const struct nep_cuda_group &group,
                                                 struct nep_cuda_cell *cell, uint64_t op)
{
    cell->op = op;
    group.state->op = op;
}

/*
 * The first cause stays. The host's words and the other ranks' get it: release, pairs with the
 * acquire in nep_wait_word there and with the host's load.
 */
static __device__ __noinline__ void nep_give_up(const struct nep_cuda_group &group, uint64_t op,
                                                uint64_t status)
{
    unsigned long long *word = (unsigned long long *)&group.state->status;
    if (atomicCAS(word, 0ull, (unsigned long long)status) != 0) {
        return;
    }
    if (group.status_host != nullptr) {
        group.status_host[1] = op;
        nep_st_release_sys(group.status_host, status);
    }
    for (uint32_t r = 0; r < group.num_ranks; r++) {
        if (r != group.rank) {
            nep_st_release_sys(nep_fault_at(group, r, group.rank), status);
        }
    }
}

/* What a rank gave up with, where this rank may repeat it: 0, or a status that names a rank. */
static __device__ __forceinline__ uint64_t nep_blame(const struct nep_cuda_group &group,
                                                     uint32_t who)
{
    uint64_t fault = nep_ld_acquire_sys(nep_fault_at(group, group.rank, who));
    if (fault >> 56 == NEP_CUDA_BAD_ID) {
        fault = NEP_CUDA_STATUS(NEP_CUDA_BAD_ID, NEP_CUDA_PHASE_COUNTS, who);
    }
    return fault;
}

/*
 * Until the word of rank `who` has reached value. Acquire: pairs with the release that raised it.
 * False: recorded, give up. Everything but the word is looked at now and then.
 */
static __device__ inline bool nep_wait_word(const struct nep_cuda_group &group,
                                            const uint64_t *word, uint64_t value,
                                            enum nep_cuda_phase phase, uint32_t who)
{
    uint64_t start = 0;
    for (uint32_t i = 0; nep_ld_acquire_sys(word) < value; i++) {
        if (i % 16 != 15) {
            continue;
        }
        uint64_t now = nep_globaltimer();
        start = start == 0 ? now : start;
        uint64_t status = nep_blame(group, who);
        if (status == 0 && now - start > group.timeout_ns) {
            status = NEP_CUDA_STATUS(NEP_CUDA_EXPIRED, phase, who);
        }
        if (status != 0) {
            nep_give_up(group, value, status);
            return false;
        }
        if (nep_is_stuck(group)) {
            return false;
        }
    }
    return true;
}

/* By all threads of a block: thread r waits for the word of rank r for this operation. */
static __device__ inline bool nep_wait_all(const struct nep_cuda_group &group, uint64_t offset,
                                           uint64_t op, enum nep_cuda_phase phase)
{
    bool is_there = true;
    for (uint32_t r = threadIdx.x; r < group.num_ranks; r += blockDim.x) {
        is_there = is_there && nep_wait_word(group, nep_word_at(group, group.rank, offset, op, r),
                                             op, phase, r);
    }
    /* The barrier hands what the waiting threads acquired to the others. */
    return __syncthreads_and(is_there) != 0;
}

/*
 * By all threads of a block, at its end: how many blocks came before. The last one owns what all
 * blocks did. The barriers carry the stores of a block's threads to and from the arrival.
 */
static __device__ inline uint32_t nep_arrive(struct nep_cuda_cell *cell)
{
    __shared__ uint32_t ticket;
    __syncthreads();
    if (gridDim.x == 1) {
        return 0;
    }
    if (threadIdx.x == 0) {
        ticket = nep_add_acq_rel_gpu(&cell->arrived, 1);
        if (ticket == gridDim.x - 1) {
            cell->arrived = 0;
        }
    }
    __syncthreads();
    return ticket;
}

static __device__ inline bool nep_is_last_block(struct nep_cuda_cell *cell)
{
    return nep_arrive(cell) == gridDim.x - 1;
}

/* By all threads of one block: raises this rank's word at every rank. Release: pairs with the
 * acquire in nep_wait_word there. */
static __device__ inline void nep_tell_all(const struct nep_cuda_group &group, uint64_t offset,
                                           uint64_t op)
{
    for (uint32_t r = threadIdx.x; r < group.num_ranks; r += blockDim.x) {
        nep_st_release_sys(nep_word_at(group, r, offset, op, group.rank), op);
    }
}

/* By one thread: where this rank's outputs are, to rank r; no word yet. */
static __device__ inline void nep_bind_store(const struct nep_cuda_group &group,
                                             const struct nep_cuda_output &out, uint64_t op,
                                             uint32_t r)
{
    const void *const arrays[] = {
        out.x, out.scales, out.topk_slots, out.topk_weights, out.source_rank, out.source_token};
    const char *own = nep_window(group, group.rank);
    uint64_t *to = (uint64_t *)nep_bind_at(group, r, op, group.rank);
    for (uint32_t i = 0; i < 6; i++) {
        bool is_there = out.is_mapped && arrays[i] != nullptr;
        to[i] = is_there ? (uint64_t)((const char *)arrays[i] - own) : NEP_CUDA_NONE;
    }
    to[6] = out.capacity;
}

/* By all threads of one block: the same to every rank, and the word: each thread releases what it
 * stored itself. */
static __device__ inline void nep_bind_all(const struct nep_cuda_group &group,
                                           const struct nep_cuda_output &out, uint64_t op)
{
    for (uint32_t r = threadIdx.x; r < group.num_ranks; r += blockDim.x) {
        nep_bind_store(group, out, op, r);
    }
    nep_tell_all(group, group.words.bound, op);
}

/* Where expert outputs are: as given or, where they are staged, in the area of the operation. */
static __device__ __forceinline__ struct nep_cuda_lend
nep_lend_of(const struct nep_cuda_lend &lend, const struct nep_cuda_staging &staging,
            uint32_t row_bytes, uint32_t weights_bytes, uint64_t op)
{
    uint64_t row = op % staging.depth * staging.y_rows;
    struct nep_cuda_lend is = lend;
    if (lend.rows == NEP_CUDA_NONE) {
        is.rows = staging.y + row * row_bytes;
        is.weights = staging.y_weights + row * weights_bytes;
    }
    return is;
}

/* By all threads of one block: they may be read. They were written by earlier kernels of this
 * stream. */
static __device__ inline void nep_lend_all(const struct nep_cuda_group &group,
                                           const struct nep_cuda_lend &lend, uint64_t op)
{
    for (uint32_t r = threadIdx.x; r < group.num_ranks; r += blockDim.x) {
        *nep_lend_at(group, r, op, group.rank) = lend;
        nep_st_release_sys(nep_word_at(group, r, group.words.ready, op, group.rank), op);
    }
}

#endif
