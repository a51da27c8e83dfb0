/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the kernels of the fabric share: places in regions, waits that end, arrivals of blocks, and
 * the moving of one row by one warp. Words in pinned memory are looked at by one block of a role,
 * which relays what it saw in memory of the GPU: looks across PCIe cost a microsecond each.
 */
#ifndef NEP_DISPATCH_CUDA_DEVICE_FAR_CUH
#define NEP_DISPATCH_CUDA_DEVICE_FAR_CUH

#include "dispatch/cuda/device/launch.cuh" /* first: it names what is C */

#include "dispatch/cuda/cuda_fabric.h"
#include "dispatch/cuda/device/move.cuh"

/* ---- places --------------------------------------------------------------------------------- */

static __device__ __forceinline__ uint64_t *nep_far_word(const struct nep_far &a, uint32_t local,
                                                         uint64_t offset, uint64_t idx)
{
    return (uint64_t *)(a.words[local] + offset) + idx;
}

/* A word that ranks of this node tell each other. */
static __device__ __forceinline__ uint64_t *nep_near_word(const struct nep_far &a, uint32_t local,
                                                          uint64_t offset, uint64_t idx)
{
    return (uint64_t *)(a.near[local] + offset) + idx;
}

static __device__ __forceinline__ uint32_t nep_far_rank_at(const struct nep_far &a, uint32_t local)
{
    return a.node_rank[a.node_begin + local];
}

static __device__ __forceinline__ const struct nep_region &nep_far_region(const struct nep_far &a,
                                                                          uint32_t local)
{
    return a.regions[nep_far_rank_at(a, local)];
}

static __device__ __forceinline__ uint32_t nep_far_landing(const struct nep_far &a, uint32_t source,
                                                           uint32_t node)
{
    return a.landing[node * a.num_ranks + source];
}

static __device__ __forceinline__ uint32_t nep_far_lane(const struct nep_far &a, uint32_t source,
                                                        uint32_t node)
{
    return a.lane[node * a.num_ranks + source];
}

static __device__ __forceinline__ uint32_t nep_far_skip(uint32_t node, uint32_t other)
{
    return other < node ? other : other - 1;
}

static __device__ __forceinline__ uint32_t nep_far_payload(const struct nep_far &a, uint32_t rows)
{
    return (uint32_t)((sizeof(struct nep_tile_msg) + (uint64_t)rows * a.meta_bytes + 63) / 64 * 64);
}

static __device__ __forceinline__ uint32_t nep_far_tiles(const struct nep_far &a, uint32_t rows)
{
    return (rows + a.tile_rows - 1) / a.tile_rows;
}

/* The slot of an operation or a tile. */
static __device__ __forceinline__ uint32_t nep_far_slot(const struct nep_far &a, uint64_t number)
{
    return (uint32_t)number & (a.window - 1);
}

/* Of the slots, half are for operations that may be outstanding. */
static __device__ __forceinline__ uint32_t nep_far_area(const struct nep_far &a, uint64_t op)
{
    return (uint32_t)op & (a.window / a.tiles - 1);
}

/* As struct nep_bind of dispatch/region.h: where this rank's buffers lie in its `near` window. */
struct nep_far_bind {
    uint64_t word; /* op + 1 */
    uint64_t capacity;
    uint64_t x;
    uint64_t scales;
    uint64_t topk_slots;
    uint64_t topk_weights;
    uint64_t source_rank;
    uint64_t source_token;
};

static __device__ __forceinline__ struct nep_far_bind *
nep_far_bind_at(const struct nep_far &a, uint32_t local, uint64_t offset, uint64_t op)
{
    return (struct nep_far_bind *)(a.near[local] + offset) + nep_far_slot(a, op);
}

/* By one thread: this rank's buffers, and the word. Release: pairs with the acquire of a wait for
 * bind->word. */
static __device__ inline void nep_far_bind_own(const struct nep_far &a, uint64_t offset,
                                               const struct nep_far_output &out, uint64_t op)
{
    struct nep_far_bind *bind = nep_far_bind_at(a, a.local, offset, op);
    bind->capacity = out.capacity;
    bind->x = out.x;
    bind->scales = out.scales;
    bind->topk_slots = out.topk_slots;
    bind->topk_weights = out.topk_weights;
    bind->source_rank = out.source_rank;
    bind->source_token = out.source_token;
    nep_st_release_sys(&bind->word, op + 1);
}

/* The word that says that COUNTS of a source are here: near, or in the landing rank's page. */
static __device__ __forceinline__ uint64_t *nep_far_counts_word(const struct nep_far &a,
                                                                uint32_t source, uint64_t op)
{
    uint32_t landing = nep_far_landing(a, source, a.node);
    uint32_t local = a.local_of_rank[landing];
    bool is_near = a.node_of_rank[source] == a.node;
    uint64_t idx =
        (uint64_t)a.control[landing * a.num_ranks + source] * a.window + nep_far_slot(a, op);
    return (uint64_t *)((is_near ? a.near : a.words)[local] + a.regions[landing].counts_word) + idx;
}

static __device__ __forceinline__ const struct nep_counts_msg *
nep_far_counts_at(const struct nep_far &a, uint32_t source, uint64_t op)
{
    uint32_t landing = nep_far_landing(a, source, a.node);
    const struct nep_region &region = a.regions[landing];
    uint64_t idx =
        (uint64_t)a.control[landing * a.num_ranks + source] * a.window + nep_far_slot(a, op);
    bool is_near = a.node_of_rank[source] == a.node;
    return (const struct nep_counts_msg *)((is_near ? a.near : a.data)[a.local_of_rank[landing]] +
                                           region.counts + idx * region.counts_bytes);
}

static __device__ __forceinline__ void nep_far_stamp(const struct nep_far &a,
                                                     enum nep_far_stamp stamp)
{
    a.state->stamps[stamp] = nep_globaltimer();
}

/* ---- waiting -------------------------------------------------------------------------------- */

/* Turns when somebody of the node gave up: looked at by all who wait. */
static __device__ __forceinline__ uint64_t *nep_far_stuck_word(const struct nep_far &a,
                                                               uint32_t local)
{
    return nep_near_word(a, local, nep_far_region(a, local).staged, 0);
}

/* What this rank gave up with, to its node. An id means something at its own rank alone. */
static __device__ inline void nep_far_tell(const struct nep_far &a, uint64_t status)
{
    if (status >> 56 == NEP_CUDA_BAD_ID) {
        status = NEP_CUDA_STATUS(NEP_CUDA_BAD_ID, NEP_CUDA_PHASE_COUNTS, a.rank);
    }
    for (uint32_t g = 0; g < a.node_size; g++) {
        nep_st_release_sys(nep_far_stuck_word(a, g), status);
    }
}

/* The first cause stays. */
static __device__ __noinline__ void nep_far_give_up(const struct nep_far &a, uint64_t status)
{
    if (atomicCAS((unsigned long long *)&a.state->run.status, 0ull, (unsigned long long)status) !=
        0) {
        return;
    }
    if (a.status_host != nullptr) {
        a.status_host[1] = a.state->run.op + 1; /* from 1, as kernels of one node count */
        nep_st_release_sys(a.status_host, status);
    }
    nep_far_tell(a, status);
}

/* By one thread of a rank that gave up: layout does, without knowing the fabric's words. */
static __device__ inline void nep_far_repeat(const struct nep_far &a)
{
    if (nep_ring_peek(a.stuck) == 0) {
        nep_far_tell(a, nep_ld_relaxed_gpu(&a.state->run.status));
    }
}

static __device__ inline bool nep_far_ended(const struct nep_far &a, enum nep_ring_end end,
                                            uint32_t phase, uint32_t who)
{
    switch (end) {
    case NEP_RING_DONE:
        return true;
    case NEP_RING_STALE:
        nep_far_give_up(a, NEP_CUDA_STATUS(NEP_CUDA_PROXY_STALE, phase, a.rank));
        break;
    case NEP_RING_FAULT:
        nep_far_give_up(a, NEP_CUDA_STATUS(NEP_CUDA_FABRIC_FAULT, phase,
                                           nep_ring_peek(&a.ring.shared->fault) & 0xffffffffu));
        break;
    case NEP_RING_EXPIRED:
        nep_far_give_up(a, NEP_CUDA_STATUS(NEP_CUDA_EXPIRED, phase, who));
        break;
    default: { /* stuck: this rank gives up for the same reason */
        uint64_t status = nep_ring_load(a.stuck);
        nep_far_give_up(a, status);
        break;
    }
    }
    return false;
}

/* By one thread. Acquire: pairs with the release that raised the word. */
static __device__ inline bool nep_far_wait(const struct nep_far &a, const uint64_t *word,
                                           uint64_t value, uint32_t phase, uint32_t who)
{
    return nep_far_ended(a, nep_ring_wait(&a.ring, word, value, a.stuck, a.timeout_ns), phase, who);
}

/* The same for a word in memory of the GPU: of a neighbour, or relayed. */
static __device__ inline bool nep_near_wait(const struct nep_far &a, const uint64_t *word,
                                            uint64_t value, uint32_t phase, uint32_t who,
                                            uint64_t timeout_ns)
{
    return nep_far_ended(a, nep_ring_wait_near(word, value, a.stuck, timeout_ns), phase, who);
}

/*
 * By one thread of each block of a role: the first block looks at the pinned word and raises
 * `relay`, the others look there, as everybody does first.
 */
static __device__ inline bool nep_far_wait_relayed(const struct nep_far &a, bool is_first,
                                                   const uint64_t *word, uint64_t *relay,
                                                   uint64_t value, uint32_t phase, uint32_t who)
{
    if (nep_ring_load_near(relay) >= value) {
        return true;
    }
    if (!is_first) {
        /* Longer than the first block, which knows more about why. */
        return nep_near_wait(a, relay, value, phase, who, 2 * a.timeout_ns);
    }
    if (!nep_far_wait(a, word, value, phase, who)) {
        return false;
    }
    nep_ring_raise_near(relay, value); /* not what the word is by now: another look */
    return true;
}

static __device__ inline bool nep_far_post(const struct nep_far &a, uint64_t command)
{
    return nep_far_ended(a, nep_ring_post(&a.ring, command, a.stuck, a.timeout_ns),
                         NEP_FAR_PHASE_POST, a.rank);
}

/*
 * By all threads of a block; true in the block that arrives last of num, which then owns what all
 * did. The counter is 0 again.
 */
static __device__ inline bool nep_far_is_last(uint32_t *counter, uint32_t num)
{
    __shared__ uint32_t old;
    __syncthreads();
    if (threadIdx.x == 0) {
        old = nep_inc_acq_rel_gpu(counter, num - 1);
    }
    __syncthreads();
    bool is_last = old == num - 1;
    __syncthreads(); /* `old` is used again */
    return is_last;
}

/* By all threads of a block: raises this rank's word at every rank of the node. Release: what this
 * rank did before; pairs with the acquire in nep_near_met there. */
static __device__ inline void nep_near_tell(const struct nep_far &a, uint64_t value)
{
    for (uint32_t g = threadIdx.x; g < a.node_size; g += blockDim.x) {
        nep_st_release_sys(nep_near_word(a, g, nep_far_region(a, g).pushed, a.local), value);
    }
}

/* By all threads of a block: waits for the words of the node. */
static __device__ inline bool nep_near_met(const struct nep_far &a, uint64_t value, uint32_t phase)
{
    bool is_there = true;
    for (uint32_t g = threadIdx.x; g < a.node_size; g += blockDim.x) {
        is_there = nep_near_wait(a, nep_near_word(a, a.local, a.own.pushed, g), value, phase,
                                 nep_far_rank_at(a, g), a.timeout_ns);
    }
    return __syncthreads_and(is_there) != 0;
}

/* ---- operations in halves ------------------------------------------------------------------- */

/* A stream of tiles within an operation: numbers of its first tile in the stream and in its send
 * ring, and how many the send half posts or has posted. */
struct nep_far_stream {
    uint64_t number;
    uint64_t sequence;
    uint32_t sent;
};

/*
 * In a send half: of a stream that `planned` tiles of operations begun are in, `first` being the
 * number of its first tile in the oldest one that is not completed. Credits for what came before
 * that one come without this rank; streams and rings are in order, so nothing may be left of
 * operations between.
 */
static __device__ __forceinline__ nep_far_stream nep_far_stream_ahead(const struct nep_far &a,
                                                                      uint64_t planned,
                                                                      uint64_t first, uint32_t ring)
{
    uint32_t taken = (uint32_t)(planned - first);
    bool may_send = a.state->due[ring] == 0 && taken < a.window;
    return {planned, a.state->next_send[ring], may_send ? a.window - taken : 0};
}

/* Later: as the send half left it. */
static __device__ __forceinline__ nep_far_stream nep_far_stream_left(const struct nep_far &a,
                                                                     uint64_t op, uint64_t first,
                                                                     uint32_t ring)
{
    uint32_t sent = a.state->ops[nep_far_slot(a, op)].sent[ring];
    return {first, a.state->next_send[ring] - sent, sent};
}

/* The oldest operation that is not completed; NULL: the one that begins is. */
static __device__ __forceinline__ const struct nep_far_op *nep_far_oldest(const struct nep_far &a,
                                                                          uint64_t op)
{
    uint64_t completed = a.state->run.op;
    return completed == op ? nullptr : &a.state->ops[nep_far_slot(a, completed)];
}

/* By a block, the last of a send half: tiles(stream) of each stream that uses ring(stream). */
template <class Tiles, class Ahead>
static __device__ inline void nep_far_begun(const struct nep_far &a, uint64_t op,
                                            struct nep_cuda_cell *cell, uint64_t *next,
                                            uint32_t num, const Tiles &tiles, const Ahead &ahead)
{
    struct nep_far_state &state = *a.state;
    struct nep_far_op &here = state.ops[nep_far_slot(a, op)];
    for (uint32_t n = threadIdx.x; n < a.num_nodes; n += blockDim.x) {
        here.first_tile[n] = state.next_tile[n];
    }
    for (uint32_t l = threadIdx.x; l < a.num_lanes; l += blockDim.x) {
        here.first_sums[l] = state.next_sums[l];
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < num; i += blockDim.x) {
        uint32_t ring = 0;
        uint32_t all = tiles(i, &ring);
        if (ring == NEP_SLOT_NONE) {
            continue;
        }
        uint32_t sent = min(all, ahead(i).sent);
        here.sent[ring] = sent;
        next[i] += all;
        state.next_send[ring] += sent;
        state.due[ring] += all - sent;
    }
    if (threadIdx.x == 0) {
        cell->op = op;
        state.begun = op + 1;
    }
}

/* By one thread, when a stream's tiles of an operation are all posted. */
static __device__ __forceinline__ void nep_far_stream_end(const struct nep_far &a, bool is_whole,
                                                          uint64_t op, uint64_t *next,
                                                          uint32_t ring, uint32_t tiles)
{
    uint32_t sent = 0;
    if (is_whole) {
        *next += tiles;
    } else {
        sent = a.state->ops[nep_far_slot(a, op)].sent[ring];
        a.state->due[ring] -= tiles - sent;
    }
    a.state->next_send[ring] += tiles - sent;
}

/* Where a lane's copy of the row goes. */
struct nep_far_place {
    bool has_row;
    char *row;
};

#endif
