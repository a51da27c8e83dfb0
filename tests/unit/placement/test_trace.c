/* SPDX-License-Identifier: Apache-2.0 */
/* Traces: written and read back, the shipped sample, and files that must be refused. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <zlib.h>

#include "placement/placement.h"
#include "placement/rng.h"
#include "tests/unit/cmocka_all.h"

static char path[64];
static unsigned char *good;
static size_t good_bytes;

/* 3 layers, E experts, top-2, requests of 2 + 3, 0 + 4 (no boundary) and 0 + 0 tokens. */
static void write_good(uint32_t experts)
{
    const char *const domains[] = {"code", "a name that is longer than thirty-one characters"};
    struct nep_trace_shape shape = {sizeof shape, 3, experts, 2, 0, 2, 0};
    struct nep_trace_writer *writer = NULL;
    assert_int_equal(nep_trace_writer_create(&shape, "tiny", domains, &writer), NEP_OK);
    const struct nep_trace_request requests[] = {
        {0, 2, 3, 0, 0}, {1, 0, 4, NEP_TRACE_NO_BOUNDARY, 0}, {1, 0, 0, 0, 0}};
    int32_t next = 0;
    for (size_t r = 0; r < 3; r++) {
        int32_t ids[5 * 6];
        for (size_t i = 0; i < 30; i++) {
            ids[i] = next % 7 == 6 ? -1 : next % (int32_t)experts;
            next++;
        }
        assert_int_equal(nep_trace_writer_add(writer, &requests[r], ids), NEP_OK);
    }
    int32_t bad[30] = {(int32_t)experts};
    assert_int_equal(nep_trace_writer_add(writer, &requests[0], bad), NEP_ERR_INVALID);
    assert_int_equal(nep_trace_writer_add(writer, &requests[0], NULL), NEP_ERR_INVALID);
    assert_int_equal(nep_trace_writer_add(NULL, &requests[0], bad), NEP_ERR_INVALID);
    assert_int_equal(nep_trace_writer_save(writer, NULL), NEP_ERR_INVALID);
    assert_int_equal(nep_trace_writer_save(writer, path), NEP_OK);
    nep_trace_writer_destroy(writer);
}

static void test_trace_written_is_read_back(void **state)
{
    (void)state;
    static const uint32_t sizes[] = {5, 255, 256, 300};
    for (size_t s = 0; s < 4; s++) {
        write_good(sizes[s]);
        struct nep_trace *trace = NULL;
        assert_int_equal(nep_trace_open(path, &trace), NEP_OK);
        assert_int_equal(nep_trace_num_tokens(trace), 9);
        assert_int_equal(nep_trace_num_requests(trace), 3);
        assert_string_equal(nep_trace_model(trace), "tiny");
        assert_string_equal(nep_trace_domain(trace, 1), "a name that is longer than thir");
        assert_string_equal(nep_trace_domain(trace, 2), "");
        assert_null(nep_trace_request_at(trace, 3));
        uint64_t first;
        uint64_t count;
        nep_trace_scored(trace, 0, &first, &count);
        assert_int_equal(first, 2);
        assert_int_equal(count, 3);
        nep_trace_scored(trace, 1, &first, &count);
        assert_int_equal(first, 7);
        assert_int_equal(count, 2);
        nep_trace_signature(trace, 1, &first, &count);
        assert_int_equal(first, 5);
        assert_int_equal(count, 2);
        for (uint32_t t = 0; t < 9; t++) {
            for (uint32_t layer = 0; layer < 3; layer++) {
                int32_t ids[2];
                nep_trace_ids(trace, t, layer, ids);
                int32_t at = (int32_t)(t * 6 + layer * 2);
                for (int32_t k = 0; k < 2; k++) {
                    assert_int_equal(ids[k], (at + k) % 7 == 6 ? -1 : (at + k) % (int32_t)sizes[s]);
                }
            }
        }
        nep_trace_close(trace);
    }
}

static void test_trace_shipped_sample_opens(void **state)
{
    (void)state;
    struct nep_trace *trace = NULL;
    assert_int_equal(nep_trace_open("data/demo256.nept", &trace), NEP_OK);
    assert_int_equal(nep_trace_num_experts(trace), 256);
    assert_int_equal(nep_trace_num_layers(trace), 7);
    assert_int_equal(nep_trace_num_requests(trace), 84);
    nep_trace_close(trace);
}

static void put_bytes(const unsigned char *bytes, size_t num)
{
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, num, file), num);
    assert_int_equal(fclose(file), 0);
}

/* Writes value at offset with a CRC that fits, and expects a refusal with these words. */
static void refuse_word(size_t offset, const void *value, size_t width, const char *words)
{
    unsigned char *bytes = malloc(good_bytes);
    memcpy(bytes, good, good_bytes);
    memcpy(bytes + offset, value, width);
    uint32_t crc = (uint32_t)crc32(0, bytes, (uInt)(good_bytes - 4));
    memcpy(bytes + good_bytes - 4, &crc, 4);
    put_bytes(bytes, good_bytes);
    free(bytes);
    struct nep_trace *trace = (void *)0x5a;
    enum nep_status status = nep_trace_open(path, &trace);
    if ((status != NEP_ERR_FORMAT && status != NEP_ERR_UNSUPPORTED) ||
        strstr(nep_last_message(), words) == NULL) {
        fail_msg("offset %zu: status %d, message <%s>, expected <%s>", offset, status,
                 nep_last_message(), words);
    }
    assert_ptr_equal(trace, (void *)0x5a);
}

static void refuse_u32(size_t offset, uint32_t value, const char *words)
{
    refuse_word(offset, &value, 4, words);
}

static void load_good(uint32_t experts)
{
    write_good(experts);
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    free(good);
    good = malloc(4096);
    good_bytes = fread(good, 1, 4096, file);
    fclose(file);
}

static void test_trace_impossible_headers_are_refused(void **state)
{
    (void)state;
    load_good(5);
    refuse_word(0, "NEPTRICK", 8, "not a trace");
    refuse_u32(8, 2, "version 2");
    refuse_u32(12, 0, "impossible");
    refuse_u32(12, 4, "promises");
    refuse_u32(12, UINT32_MAX, "promises");
    refuse_u32(16, 0, "impossible");
    refuse_u32(16, 257, "impossible");
    refuse_u32(20, 0, "impossible");
    refuse_u32(20, 6, "impossible");
    refuse_u32(24, UINT32_MAX, "promises");
    refuse_u32(28, UINT32_MAX, "promises");
    uint64_t huge = UINT64_MAX;
    refuse_word(32, &huge, 8, "promises");
    huge = UINT64_MAX / 6 + 2;
    refuse_word(32, &huge, 8, "promises");
    refuse_u32(40, 3, "id_bytes");
    refuse_u32(44, 1, "reserved");
}

static void test_trace_wrong_requests_and_ids_are_refused(void **state)
{
    (void)state;
    load_good(5);
    size_t requests = 112 + 64;
    refuse_u32(requests, 2, "domain 2 of 2");
    refuse_u32(requests + 4, 3, "tokens");
    refuse_u32(requests + 8, UINT32_MAX, "past the end");
    refuse_u32(requests + 12, 1, "boundary");
    uint64_t first = 8;
    refuse_word(requests + 16, &first, 8, "past the end");
    first = UINT64_MAX;
    refuse_word(requests + 16, &first, 8, "past the end");
    first = 3;
    refuse_word(requests + 24 + 16, &first, 8, "overlap");
    unsigned char id = 5;
    refuse_word(requests + 72 + 7, &id, 1, "token 1, layer 0, k 1: id 5 of 5");
    load_good(300);
    uint16_t wide = 300;
    refuse_word(requests + 72 + 2, &wide, 2, "id 300 of 300");
}

static void test_trace_any_flipped_or_missing_byte_is_refused(void **state)
{
    (void)state;
    load_good(5);
    struct nep_trace *trace = NULL;
    for (size_t i = 0; i < good_bytes; i++) {
        good[i] ^= 0x10;
        put_bytes(good, good_bytes);
        good[i] ^= 0x10;
        assert_int_not_equal(nep_trace_open(path, &trace), NEP_OK);
        put_bytes(good, i);
        assert_int_not_equal(nep_trace_open(path, &trace), NEP_OK);
    }
    assert_int_equal(nep_trace_open("/absent", &trace), NEP_ERR_NOT_FOUND);
    assert_int_equal(nep_trace_open("/tmp", &trace), NEP_ERR_IO);
    assert_int_equal(nep_trace_open(NULL, &trace), NEP_ERR_INVALID);
    assert_null(trace);
}

/* Random damage with a CRC that fits: refused, or a trace whose ids are in range. */
static void test_trace_damage_with_right_crc_never_crashes(void **state)
{
    (void)state;
    uint64_t seed = (uint64_t)time(NULL);
    print_message("seed %llu\n", (unsigned long long)seed);
    struct nep_rng rng = nep_rng_seed(seed);
    load_good(5);
    unsigned char *bytes = malloc(good_bytes);
    for (int i = 0; i < 3000; i++) {
        memcpy(bytes, good, good_bytes);
        for (uint32_t n = 1 + nep_rng_below(&rng, 3); n > 0; n--) {
            bytes[nep_rng_below(&rng, (uint32_t)good_bytes - 4)] =
                (unsigned char)nep_rng_next(&rng);
        }
        uint32_t crc = (uint32_t)crc32(0, bytes, (uInt)(good_bytes - 4));
        memcpy(bytes + good_bytes - 4, &crc, 4);
        put_bytes(bytes, good_bytes);
        struct nep_trace *trace = NULL;
        if (nep_trace_open(path, &trace) != NEP_OK) {
            continue;
        }
        for (uint64_t t = 0; t < nep_trace_num_tokens(trace); t++) {
            for (uint32_t layer = 0; layer < nep_trace_num_layers(trace); layer++) {
                int32_t ids[NEP_TRACE_TOP_K_LIMIT];
                nep_trace_ids(trace, t, layer, ids);
                for (uint32_t k = 0; k < nep_trace_top_k(trace); k++) {
                    assert_true(ids[k] >= -1 && ids[k] < (int32_t)nep_trace_num_experts(trace));
                }
            }
        }
        nep_trace_close(trace);
    }
    free(bytes);
}

static int set_up(void **state)
{
    (void)state;
    snprintf(path, sizeof path, "/tmp/nep_test_trace.XXXXXX");
    int fd = mkstemp(path);
    return fd < 0 || close(fd) != 0;
}

static int tear_down(void **state)
{
    (void)state;
    free(good);
    return unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_trace_written_is_read_back),
        cmocka_unit_test(test_trace_shipped_sample_opens),
        cmocka_unit_test(test_trace_impossible_headers_are_refused),
        cmocka_unit_test(test_trace_wrong_requests_and_ids_are_refused),
        cmocka_unit_test(test_trace_any_flipped_or_missing_byte_is_refused),
        cmocka_unit_test(test_trace_damage_with_right_crc_never_crashes),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
