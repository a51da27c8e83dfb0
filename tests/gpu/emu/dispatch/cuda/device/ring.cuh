/* SPDX-License-Identifier: Apache-2.0 */
/* dispatch/cuda/device/ring.cuh for the CPU (tests/gpu/emu/emu.h). */
#ifndef NEP_DISPATCH_CUDA_DEVICE_RING_CUH
#define NEP_DISPATCH_CUDA_DEVICE_RING_CUH

#include "dispatch/cuda/device/ptx.cuh"

#define NEP_RING_FN static inline

static inline uint64_t nep_ring_load(const uint64_t *word)
{
    return nep_ld_acquire_sys(word);
}

static inline uint64_t nep_ring_peek(const uint64_t *word)
{
    return nep_ld_relaxed_gpu(word);
}

static inline void nep_ring_store(uint64_t *word, uint64_t value)
{
    nep_st_release_sys(word, value);
}

static inline uint64_t nep_ring_ticket(uint64_t *head)
{
    return __atomic_fetch_add(head, 1, __ATOMIC_RELAXED);
}

static inline uint64_t nep_ring_load_near(const uint64_t *word)
{
    return nep_ld_acquire_sys(word);
}

static inline void nep_ring_raise_near(uint64_t *word, uint64_t value)
{
    uint64_t old = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (old < value && !__atomic_compare_exchange_n(word, &old, value, false, __ATOMIC_ACQ_REL,
                                                       __ATOMIC_RELAXED)) {
    }
}

static inline void nep_ring_relax(void)
{
}

static inline uint64_t nep_ring_now(void)
{
    return nep_globaltimer();
}

#endif
