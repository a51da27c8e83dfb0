/* SPDX-License-Identifier: Apache-2.0 */
/* Seeded random numbers, the same on every machine: splitmix64 (Steele, Lea, Flood 2014). */
#ifndef NEP_PLACEMENT_RNG_H
#define NEP_PLACEMENT_RNG_H

#include <stdint.h>

struct nep_rng {
    uint64_t state;
};

static inline struct nep_rng nep_rng_seed(uint64_t seed)
{
    return (struct nep_rng){seed * 0x9e3779b97f4a7c15ull + 0x243f6a8885a308d3ull};
}

static inline uint64_t nep_rng_next(struct nep_rng *rng)
{
    uint64_t z = (rng->state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

/* 0 to bound - 1; the bias of at most 2^-32 is of no account here. */
static inline uint32_t nep_rng_below(struct nep_rng *rng, uint32_t bound)
{
    return (uint32_t)(((nep_rng_next(rng) >> 32) * bound) >> 32);
}

/* 0 <= x < 1 */
static inline double nep_rng_unit(struct nep_rng *rng)
{
    return (double)(nep_rng_next(rng) >> 11) * 0x1p-53;
}

static inline void nep_rng_shuffle(struct nep_rng *rng, uint32_t *items, uint32_t num)
{
    for (uint32_t i = num; i > 1; i--) {
        uint32_t j = nep_rng_below(rng, i);
        uint32_t swap = items[i - 1];
        items[i - 1] = items[j];
        items[j] = swap;
    }
}

#endif
