/* SPDX-License-Identifier: Apache-2.0 */
/* Loops over a row that are worth vector instructions: the oracle reads every element. */
#ifndef NEP_TESTS_REF_SIMD_H
#define NEP_TESTS_REF_SIMD_H

#include <stdint.h>

struct nep_ref_simd {
    void (*bf16_load)(const uint16_t *row, uint32_t num, float *out);
    void (*bf16_store)(const float *row, uint32_t num, uint16_t *out);
    void (*bf16_round)(float *row, uint32_t num);
    void (*scale)(const float *row, float factor, uint32_t num, float *out);
    void (*fma)(float *acc, const float *row, float weight, uint32_t num);
    void (*fma64)(double *acc, double *magnitude, const float *row, float weight, uint32_t num);
    void (*gen)(uint32_t key, uint32_t num, float *out);
};

const struct nep_ref_simd *nep_ref_simd(void);

#endif
