/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the recorder adds to an operation: the time of nep_recorder_take, called as dispatch calls
 * it, for 58 layers of 128 tokens and top-8, all decode, 64 tokens a request. Arguments: requests
 * recorded, in a million (10000), and steps (200).
 */
#include <stdio.h>
#include <stdlib.h>

#include "base/clock.h"
#include "dispatch/recorder.h"

enum { LAYERS = 58, TOKENS = 128, TOP_K = 8, EXPERTS = 256 };

int main(int argc, char **argv)
{
    uint32_t ppm = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 10000;
    uint32_t steps = argc > 2 ? (uint32_t)strtoul(argv[2], NULL, 10) : 200;
    const struct nep_shape shape = {
        .num_layers = LAYERS, .top_k = TOP_K, .num_experts = EXPERTS, .max_tokens = TOKENS};
    const struct nep_recorder_params params = {.sample_ppm = ppm};
    struct nep_recorder *recorder;
    if (nep_recorder_create(&params, &shape, &recorder) != NEP_OK) {
        fprintf(stderr, "%s\n", nep_last_message());
        return 1;
    }
    static int32_t ids[TOKENS * TOP_K];
    static uint8_t prefill[TOKENS];
    static uint64_t keys[TOKENS];
    for (uint32_t i = 0; i < TOKENS * TOP_K; i++) {
        ids[i] = (int32_t)(i * 37 % EXPERTS);
    }
    uint64_t spent = 0;
    for (uint32_t s = 0; s < steps; s++) {
        for (uint32_t t = 0; t < TOKENS; t++) {
            keys[t] = t + TOKENS * (uint64_t)(s / 64);
        }
        for (uint32_t l = 0; l < LAYERS; l++) {
            struct nep_tokens in = {.size = sizeof in,
                                    .num_tokens = TOKENS,
                                    .layer = l,
                                    .topk_ids = ids,
                                    .id_type = NEP_IDS_INT32,
                                    .request_keys = keys,
                                    .is_prefill = prefill};
            uint64_t start = nep_now_ns();
            nep_recorder_take(recorder, &in);
            spent += nep_now_ns() - start;
        }
    }
    printf("%u requests in a million: %.0f ns an operation (clock included)\n", ppm,
           (double)spent / steps / LAYERS);
    nep_recorder_destroy(recorder);
    return 0;
}
