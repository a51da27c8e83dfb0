/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How many blocks of how many threads, and how much shared memory, in one place and in plain C, so
 * that it is tested where there is no GPU. Kernels that move rows run one block of 1024 threads per
 * SM (16-byte accesses, several in flight per thread: what was fastest in measurements on an H100)
 * and ask for more shared memory than half an SM has: kernels of other ranks, which they wait for,
 * then never share an SM with them. Rejected: occupancy queries at launch, which differ by device
 * state and would make `num_sms` a wish.
 */
#include "dispatch/cuda/cuda_phases.h"

enum {
    ROW_THREADS = 1024,
    ALONE_BYTES = 116 * 1024, /* two of these exceed the 164 to 228 KiB of an SM */
    LAYOUT_BLOCKS = 16,
    LAYOUT_WARPS = 16,
    /* of the structures in device/wait.cuh, which checks them */
    BIND_BYTES = 64,
    LEND_BYTES = 16,
    HEAD_BYTES = 48
};

enum nep_status nep_cuda_geometry(const struct nep_cuda_limits *limits, uint32_t num_sms,
                                  uint32_t num_buckets, uint32_t num_counts,
                                  struct nep_cuda_geometry *geometry_p)
{
    if (num_sms == 0 || (uint64_t)num_sms * limits->ranks_on_device > limits->device_sms) {
        return nep_fail(
            NEP_ERR_INVALID,
            "num_sms is %u, and %u ranks share a device of %u SMs: they wait for each "
            "other and must fit on it together; use 1 to %u",
            num_sms, limits->ranks_on_device, limits->device_sms,
            limits->ranks_on_device == 0 ? 0 : limits->device_sms / limits->ranks_on_device);
    }
    uint64_t shared = (uint64_t)num_buckets * sizeof(uint32_t);
    struct nep_cuda_geometry geometry = {
        .blocks = num_sms,
        .can_launch_early = limits->can_launch_early,
        .threads = ROW_THREADS,
        .shared_bytes = shared < ALONE_BYTES ? ALONE_BYTES : (uint32_t)shared,
        .layout_blocks = num_sms < LAYOUT_BLOCKS ? num_sms : LAYOUT_BLOCKS,
    };
    uint64_t counts_bytes = (uint64_t)num_counts * sizeof(uint32_t);
    uint32_t warps = LAYOUT_WARPS;
    while (warps > 0 && counts_bytes + warps * shared > limits->shared_bytes) {
        warps--;
    }
    if (warps == 0 || geometry.shared_bytes > limits->shared_bytes) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "%u slots of a node need more than the %u bytes of shared memory that a "
                        "block of this device has",
                        num_buckets, limits->shared_bytes);
    }
    geometry.layout_threads = warps * 32;
    geometry.layout_shared_bytes = (uint32_t)(counts_bytes + warps * shared);
    *geometry_p = geometry;
    return NEP_OK;
}

uint32_t nep_cuda_row_parts(const struct nep_cuda_geometry *geometry, uint32_t num_rows,
                            uint32_t units, uint32_t least)
{
    uint64_t warps = (uint64_t)geometry->blocks * (geometry->threads / 32);
    uint32_t most = (units + least - 1) / least;
    uint32_t best = 1;
    uint64_t best_cost = UINT64_MAX;
    for (uint32_t parts = 1; parts <= most; parts++) {
        /* What the busiest warp does: whole rounds of parts. */
        uint64_t rounds = ((uint64_t)num_rows * parts + warps - 1) / warps;
        uint64_t cost = rounds * ((units + parts - 1) / parts);
        if (cost < best_cost) {
            best = parts;
            best_cost = cost;
        }
    }
    return best;
}

static uint64_t round_up(uint64_t bytes, uint64_t to)
{
    return (bytes + to - 1) / to * to;
}

struct nep_cuda_words nep_cuda_words_plan(uint32_t num_ranks, uint32_t slots_per_rank,
                                          uint32_t window)
{
    const uint64_t word = sizeof(uint64_t);
    const uint64_t slots = (uint64_t)window * num_ranks;
    struct nep_cuda_words words = {.counts = 0};
    /* Fields that different ranks write at once lie on lines of their own. */
    words.bound = round_up(words.counts + slots * word, 128);
    words.pushed = round_up(words.bound + slots * word, 128);
    words.ready = round_up(words.pushed + slots * word, 128);
    words.read = round_up(words.ready + slots * word, 128);
    words.fault = round_up(words.read + slots * word, 128);
    words.bind = round_up(words.fault + num_ranks * word, 128);
    words.lend = round_up(words.bind + slots * BIND_BYTES, 128);
    words.message = round_up(words.lend + slots * LEND_BYTES, 128);
    uint64_t rows = num_ranks + (uint64_t)num_ranks * slots_per_rank;
    words.message_bytes = round_up(HEAD_BYTES + rows * 4, 128);
    words.bytes = round_up(words.message + slots * words.message_bytes, 4096);
    return words;
}
