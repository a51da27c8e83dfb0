/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A recording of random steps, read back as a trace: whole requests, every layer, tokens in order;
 * steps that break off, requests beyond the sample and memory that is full.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dispatch/recorder.h"
#include "tests/unit/cmocka_all.h"

enum { LAYERS = 3, TOP_K = 2, EXPERTS = 50, MOST = 64, REQUESTS = 9 };

static const struct nep_shape shape = {
    .num_layers = LAYERS, .top_k = TOP_K, .num_experts = EXPERTS, .max_tokens = MOST};

static int32_t id_of(uint64_t key, uint32_t number, uint32_t layer, uint32_t k)
{
    uint32_t value = (uint32_t)(key * 31 + number * 7 + layer * 3 + k * 13) % (EXPERTS + 1);
    return value == EXPERTS ? -1 : (int32_t)value;
}

/* One step: `num` tokens of random requests, all layers or only the first `layers`. */
static void step(struct nep_recorder *recorder, uint32_t num, uint32_t layers, unsigned *seed,
                 uint32_t *numbers)
{
    uint64_t keys[MOST];
    uint8_t prefill[MOST];
    uint32_t at[MOST];
    for (uint32_t t = 0; t < num; t++) {
        keys[t] = 1000 + (uint64_t)rand_r(seed) % REQUESTS;
        at[t] = numbers[keys[t] - 1000]++;
        prefill[t] = at[t] < 4;
    }
    for (uint32_t l = 0; l < layers; l++) {
        int64_t ids[MOST * TOP_K];
        for (uint32_t i = 0; i < num * TOP_K; i++) {
            ids[i] = id_of(keys[i / TOP_K], at[i / TOP_K], l, i % TOP_K);
        }
        struct nep_tokens in = {.size = sizeof in,
                                .num_tokens = num,
                                .layer = l,
                                .topk_ids = ids,
                                .id_type = NEP_IDS_INT64,
                                .request_keys = keys,
                                .is_prefill = prefill};
        nep_recorder_take(recorder, &in);
    }
}

static struct nep_trace *save(struct nep_recorder *recorder, uint64_t *num_tokens)
{
    char path[] = "/tmp/nep-record-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    struct nep_trace *trace = NULL;
    assert_int_equal(nep_recorder_save(recorder, path, num_tokens), NEP_OK);
    assert_int_equal(nep_trace_open(path, &trace), NEP_OK);
    remove(path);
    return trace;
}

static void test_recorder_steps_come_back_whole(void **state)
{
    (void)state;
    struct nep_recorder_params params = {.sample_ppm = 1000000, .max_bytes = 1 << 20};
    struct nep_recorder *recorder;
    assert_int_equal(nep_recorder_create(&params, &shape, &recorder), NEP_OK);
    unsigned seed = 42;
    printf("seed %u\n", seed);
    uint32_t numbers[REQUESTS] = {0};
    uint64_t total = 0;
    for (uint32_t i = 0; i < 40; i++) {
        uint32_t num = (uint32_t)rand_r(&seed) % (MOST + 1);
        step(recorder, num, LAYERS, &seed, numbers);
        total += num;
    }
    uint32_t before[REQUESTS];
    memcpy(before, numbers, sizeof before);
    step(recorder, 20, LAYERS - 1, &seed, numbers); /* breaks off: does not count */
    uint64_t num_tokens = 0;
    struct nep_trace *trace = save(recorder, &num_tokens);
    assert_int_equal(num_tokens, total);
    struct nep_trace_shape got = {.size = sizeof got};
    assert_int_equal(nep_trace_get_shape(trace, &got), NEP_OK);
    assert_int_equal(got.num_tokens, total);
    assert_int_equal(got.num_requests, REQUESTS);
    bool seen[REQUESTS] = {false};
    for (uint32_t r = 0; r < got.num_requests; r++) {
        const struct nep_trace_request *request = nep_trace_request_at(trace, r);
        uint32_t num = request->prefill_tokens + request->decode_tokens;
        uint32_t key = 0;
        /* which request it is follows from the number of its tokens and its first ids */
        for (; key < REQUESTS; key++) {
            int32_t ids[TOP_K];
            nep_trace_ids(trace, request->first_token, 1, ids);
            if (!seen[key] && before[key] == num && ids[0] == id_of(1000 + key, 0, 1, 0)) {
                break;
            }
        }
        assert_in_range(key, 0, REQUESTS - 1);
        seen[key] = true;
        assert_int_equal(request->prefill_tokens, num < 4 ? num : 4);
        assert_int_equal(request->flags, 0);
        for (uint32_t t = 0; t < num; t++) {
            for (uint32_t l = 0; l < LAYERS; l++) {
                int32_t ids[TOP_K];
                nep_trace_ids(trace, request->first_token + t, l, ids);
                for (uint32_t k = 0; k < TOP_K; k++) {
                    assert_int_equal(ids[k], id_of(1000 + key, t, l, k));
                }
            }
        }
    }
    nep_trace_close(trace);
    nep_recorder_destroy(recorder);
}

static void test_recorder_full_stops_without_harm(void **state)
{
    (void)state;
    struct nep_recorder_params params = {
        .sample_ppm = 1000000, .max_bytes = 50 * 24, .max_requests = 4};
    struct nep_recorder *recorder;
    assert_int_equal(nep_recorder_create(&params, &shape, &recorder), NEP_OK);
    unsigned seed = 7;
    uint32_t numbers[REQUESTS] = {0};
    for (uint32_t i = 0; i < 20; i++) {
        step(recorder, MOST, LAYERS, &seed, numbers);
    }
    uint64_t num_tokens = 0;
    struct nep_trace *trace = save(recorder, &num_tokens);
    assert_in_range(num_tokens, 1, 50);
    struct nep_trace_shape got = {.size = sizeof got};
    assert_int_equal(nep_trace_get_shape(trace, &got), NEP_OK);
    assert_in_range(got.num_requests, 1, 4);
    nep_trace_close(trace);
    nep_recorder_destroy(recorder);
}

static void test_recorder_sample_is_by_request(void **state)
{
    (void)state;
    struct nep_recorder_params params = {.sample_ppm = 100000, .max_requests = 100000};
    struct nep_recorder *recorder;
    assert_int_equal(nep_recorder_create(&params, &shape, &recorder), NEP_OK);
    for (uint64_t key = 0; key < 20000; key++) {
        for (uint32_t l = 0; l < LAYERS; l++) {
            int32_t ids[2 * TOP_K] = {1, 2, 3, 4};
            uint64_t keys[2] = {key, key};
            struct nep_tokens in = {.size = sizeof in,
                                    .num_tokens = 2,
                                    .layer = l,
                                    .topk_ids = ids,
                                    .request_keys = keys};
            nep_recorder_take(recorder, &in);
        }
    }
    uint64_t num_tokens = 0;
    struct nep_trace *trace = save(recorder, &num_tokens);
    struct nep_trace_shape got = {.size = sizeof got};
    assert_int_equal(nep_trace_get_shape(trace, &got), NEP_OK);
    assert_int_equal(num_tokens, 2ull * got.num_requests); /* both tokens, or none */
    assert_in_range(got.num_requests, 1700, 2300);         /* 10 % of 20000, 7 sigma */
    assert_int_equal(nep_trace_request_at(trace, 0)->flags, NEP_TRACE_NO_BOUNDARY);
    nep_trace_close(trace);
    nep_recorder_destroy(recorder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_recorder_steps_come_back_whole),
        cmocka_unit_test(test_recorder_full_stops_without_harm),
        cmocka_unit_test(test_recorder_sample_is_by_request),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
