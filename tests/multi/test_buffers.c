/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory of the callers' own, registered: rows move as in memory of the pool, whoever has it and
 * wherever it is mapped; what cannot be mapped is refused on every rank with what to do instead.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dispatch/ep.h"
#include "tests/multi/seat.h"
#include "tests/unit/cmocka_all.h"

enum {
    ROW = SEAT_HIDDEN * 2,
    X_AT = 64, /* not at the start, nor at a page */
    X_BYTES = X_AT + SEAT_TOKENS * ROW,
    ROWS_BYTES = SEAT_ROWS * ROW
};

/* Small halves are exact in bf16, and so are sums of three of them times a quarter to two. */
static uint16_t half(int value)
{
    float number = (float)value * 0.5f;
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static float to_float(uint16_t value)
{
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static uint16_t element(uint32_t rank, uint32_t token, uint32_t h)
{
    return half((int)(seat_mix(7, rank, (uint64_t)token * SEAT_HIDDEN + h) % 7) - 3);
}

/* ---- memory --------------------------------------------------------------------------------- */

struct memory {
    uint8_t *base;
    size_t bytes;
    int fd; /* -1: not of a file */
};

static bool memory_make(bool is_file, size_t bytes, struct memory *memory)
{
    *memory = (struct memory){NULL, bytes, -1};
    if (!is_file) {
        memory->base = malloc(bytes);
        return memory->base != NULL;
    }
    memory->fd = memfd_create("test", MFD_CLOEXEC);
    /* A page in front, so that the memory begins inside its file. */
    long page = sysconf(_SC_PAGESIZE);
    size_t whole = (bytes + (size_t)page - 1) / (size_t)page * (size_t)page;
    if (memory->fd < 0 || ftruncate(memory->fd, (off_t)whole + page) != 0) {
        return false;
    }
    void *base = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_SHARED, memory->fd, page);
    memory->base = base != MAP_FAILED ? base : NULL;
    return memory->base != NULL;
}

static void memory_free(struct memory *memory)
{
    if (memory->fd >= 0) {
        munmap(memory->base, memory->bytes);
        close(memory->fd);
    } else {
        free(memory->base);
    }
}

static enum nep_status enrol(struct seat *seat, const struct memory *memory, uint32_t *buffer_p)
{
    struct nep_buffer_params params = {.size = sizeof params,
                                       .base = memory != NULL ? memory->base : NULL,
                                       .bytes = memory != NULL ? memory->bytes : 0,
                                       .fd = memory != NULL ? memory->fd : -1};
    return nep_buffer_register(seat->ep, &params, buffer_p);
}

/* ---- there and back ------------------------------------------------------------------------- */

static bool check_rows(struct nep_multi_rank *rank, const struct seat *seat, const uint16_t *rows,
                       uint64_t num)
{
    for (uint64_t i = 0; i < num; i++) {
        for (uint32_t h = 0; h < SEAT_HIDDEN; h++) {
            uint16_t want = element(seat->source_rank[i], seat->source_token[i], h);
            if (rows[i * SEAT_HIDDEN + h] != want) {
                return nep_multi_fail(
                    rank, "row %llu, element %u: %g, not %g", (unsigned long long)i, h,
                    (double)to_float(rows[i * SEAT_HIDDEN + h]), (double)to_float(want));
            }
        }
    }
    return true;
}

static bool check_sums(struct nep_multi_rank *rank, const struct seat *seat, const uint16_t *sums)
{
    for (uint32_t t = 0; t < SEAT_TOKENS; t++) {
        float weight = 0.0f;
        for (uint32_t k = 0; k < SEAT_TOP_K; k++) {
            bool is_used = seat->ids[t * SEAT_TOP_K + k] >= 0;
            weight += is_used ? seat->weights[t * SEAT_TOP_K + k] : 0.0f;
        }
        for (uint32_t h = 0; h < SEAT_HIDDEN; h++) {
            float want = weight * to_float(element(rank->rank, t, h));
            if (to_float(sums[t * SEAT_HIDDEN + h]) != want) {
                return nep_multi_fail(rank, "token %u, element %u: %g, not %g", t, h,
                                      (double)to_float(sums[t * SEAT_HIDDEN + h]), (double)want);
            }
        }
    }
    return true;
}

/* The rows come, go back as they are, and are summed. is_mapped: as the library must see them. */
static bool there_and_back(struct nep_multi_rank *rank, struct seat *seat, struct memory *tokens,
                           struct memory *rows, bool is_mapped)
{
    uint16_t *x = (uint16_t *)(tokens->base + X_AT);
    uint16_t sums[SEAT_TOKENS * SEAT_HIDDEN];
    for (uint32_t i = 0; i < SEAT_TOKENS * SEAT_HIDDEN; i++) {
        x[i] = element(rank->rank, i / SEAT_HIDDEN, i % SEAT_HIDDEN);
    }
    memset(rows->base, 0xff, rows->bytes);
    memset(sums, 0xff, sizeof sums);
    struct nep_tokens in = seat_tokens(seat, x, NULL);
    struct nep_rows out = seat_rows(seat, rows->base, NULL);
    struct nep_counts counts;
    struct nep_expert_rows y = {.size = sizeof y, .y = rows->base};
    struct nep_tokens_out sum = {.size = sizeof sum, .num_tokens = SEAT_TOKENS, .y = sums};
    if (nep_dispatch(seat->ep, seat->handle, &in, &out, NULL) != NEP_OK ||
        nep_dispatch_counts(seat->ep, seat->handle, &counts) != NEP_OK) {
        return nep_multi_fail(rank, "dispatch: %s", nep_last_message());
    }
    if (seat->handle->op.out_is_mapped != is_mapped) {
        return nep_multi_fail(rank, "its output counts as %s", is_mapped ? "private" : "mapped");
    }
    if (!check_rows(rank, seat, out.x, counts.num_rows)) {
        return false;
    }
    if (nep_combine(seat->ep, seat->handle, &y, &sum, NULL) != NEP_OK) {
        return nep_multi_fail(rank, "combine: %s", nep_last_message());
    }
    return check_sums(rank, seat, sums);
}

static struct seat *seat_make(struct nep_multi_rank *rank)
{
    struct seat *seat = calloc(1, sizeof *seat);
    struct nep_ep_params params = {.outstanding = 1};
    if (seat == NULL || !seat_open(rank, &params, seat)) {
        return NULL;
    }
    seat_route(3, rank->rank, seat->ids, seat->weights);
    return seat;
}

/* ---- registered, registered by some, registered no more ---------------------------------------
 */

static bool used(struct nep_multi_rank *rank)
{
    bool is_file = *(const bool *)rank->arg;
    struct seat *seat = seat_make(rank);
    struct memory tokens, rows;
    uint32_t of_tokens, of_rows;
    if (seat == NULL || !memory_make(is_file, X_BYTES, &tokens) ||
        !memory_make(is_file, ROWS_BYTES, &rows)) {
        return nep_multi_fail(rank, "no memory");
    }
    if (enrol(seat, &tokens, &of_tokens) != NEP_OK || enrol(seat, &rows, &of_rows) != NEP_OK) {
        return nep_multi_fail(rank, "registering: %s", nep_last_message());
    }
    bool is_good = there_and_back(rank, seat, &tokens, &rows, true);
    if (nep_buffer_deregister(seat->ep, of_rows) != NEP_OK ||
        nep_buffer_deregister(seat->ep, of_rows) != NEP_ERR_NOT_FOUND) {
        return nep_multi_fail(rank, "deregistering: %s", nep_last_message());
    }
    is_good = is_good && there_and_back(rank, seat, &tokens, &rows, false);
    bool has_some = rank->rank != 1; /* beside one that has nothing */
    if (enrol(seat, has_some ? &rows : NULL, &of_rows) != NEP_OK) {
        return nep_multi_fail(rank, "registering again: %s", nep_last_message());
    }
    is_good = is_good && there_and_back(rank, seat, &tokens, &rows, has_some);
    seat_close(seat); /* registrations go with the ep */
    memory_free(&tokens);
    memory_free(&rows);
    return is_good;
}

static void test_buffers_registered_rows_move_once(void **state)
{
    (void)state;
    static bool is_file[] = {false, true};
    seat_run(used, &is_file[0]); /* threads: any memory will do */
    seat_run(used, &is_file[1]);
    seat_run_processes(used, &is_file[1]);
}

/* ---- refused -------------------------------------------------------------------------------- */

static bool expect(struct nep_multi_rank *rank, enum nep_status got, enum nep_status want,
                   const char *word)
{
    if (got == want && (want == NEP_OK || strstr(nep_last_message(), word) != NULL)) {
        return true;
    }
    return nep_multi_fail(rank, "%s (%s); must be %s and say '%s'", nep_status_name(got),
                          got == NEP_OK ? "" : nep_last_message(), nep_status_name(want), word);
}

static bool refused(struct nep_multi_rank *rank)
{
    struct seat *seat = seat_make(rank);
    struct memory file, plain, rows;
    uint32_t first, second, none = 0;
    if (seat == NULL || !memory_make(true, X_BYTES, &file) ||
        !memory_make(false, X_BYTES, &plain) || !memory_make(true, ROWS_BYTES, &rows)) {
        return nep_multi_fail(rank, "no memory");
    }
    struct memory empty = {NULL, 4096, file.fd};
    struct memory other = {rows.base, rows.bytes, file.fd};
    struct memory longer = {file.base, 1 << 30, file.fd};
    struct memory no_file = {file.base, file.bytes, 1000000};
    struct memory alone = {mmap(NULL, X_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, file.fd, 0),
                           X_BYTES, file.fd};
    const struct {
        const struct memory *memory;
        enum nep_status want;
        const char *word;
        bool by_one; /* the others pass what is right, and hear of it */
    } cases[] = {
        {&plain, NEP_ERR_UNSUPPORTED, "nep_buffer_alloc", false},
        {&empty, NEP_ERR_INVALID, "give both", false},
        {&other, NEP_ERR_INVALID, "not a mapping of that file", false},
        {&longer, NEP_ERR_INVALID, "is not that of fd", false},
        {&no_file, NEP_ERR_INVALID, "not an open file", false},
        {&alone, NEP_ERR_INVALID, "MAP_SHARED", false},
        {&plain, NEP_ERR_UNSUPPORTED, "rank 1", true},
    };
    bool is_good = true;
    for (size_t i = 0; is_good && i < sizeof cases / sizeof cases[0]; i++) {
        bool is_right = cases[i].by_one && rank->rank != 1;
        enum nep_status got = enrol(seat, is_right ? &file : cases[i].memory, &none);
        is_good = expect(rank, got, cases[i].want, cases[i].word);
    }
    is_good = is_good &&
              expect(rank, nep_buffer_register(seat->ep, NULL, &none), NEP_ERR_INVALID,
                     "nep_buffer_params") &&
              expect(rank, nep_buffer_deregister(seat->ep, 0), NEP_ERR_NOT_FOUND, "buffer 0");
    /* In another order than the others. */
    is_good =
        is_good && expect(rank, enrol(seat, &file, &first), NEP_OK, "") &&
        expect(rank, enrol(seat, &rows, &second), NEP_OK, "") &&
        expect(rank, nep_buffer_deregister(seat->ep, rank->rank == 0 ? first : second), NEP_OK,
               "") &&
        expect(rank, enrol(seat, &file, &none), NEP_ERR_MISMATCH, "same order") &&
        expect(rank, nep_buffer_deregister(seat->ep, rank->rank == 0 ? second : first), NEP_OK, "");
    /* None of it has hurt. */
    is_good = is_good && there_and_back(rank, seat, &file, &rows, false);
    seat_close(seat);
    munmap(alone.base, X_BYTES);
    memory_free(&file);
    memory_free(&plain);
    memory_free(&rows);
    return is_good;
}

static void test_buffers_that_cannot_be_mapped_refused(void **state)
{
    (void)state;
    seat_run_processes(refused, NULL);
}

static bool busy(struct nep_multi_rank *rank)
{
    struct seat *seat = seat_make(rank);
    struct memory rows;
    uint32_t buffer;
    if (seat == NULL || !memory_make(true, ROWS_BYTES, &rows) ||
        enrol(seat, &rows, &buffer) != NEP_OK) {
        return nep_multi_fail(rank, "%s", nep_last_message());
    }
    uint16_t x[SEAT_TOKENS * SEAT_HIDDEN] = {0};
    struct nep_tokens in = seat_tokens(seat, x, NULL);
    struct nep_rows out = seat_rows(seat, rows.base, NULL);
    uint32_t another;
    bool is_good =
        expect(rank, nep_dispatch_send(seat->ep, seat->handle, &in, NULL), NEP_OK, "") &&
        expect(rank, enrol(seat, &rows, &another), NEP_ERR_BUSY, "outstanding") &&
        expect(rank, nep_buffer_deregister(seat->ep, buffer), NEP_ERR_BUSY, "outstanding") &&
        expect(rank, nep_dispatch_recv(seat->ep, seat->handle, &out, NULL), NEP_OK, "") &&
        expect(rank, nep_buffer_deregister(seat->ep, buffer), NEP_OK, "");
    seat_close(seat);
    memory_free(&rows);
    return is_good;
}

static void test_buffers_stay_while_an_operation_runs(void **state)
{
    (void)state;
    seat_run_processes(busy, NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_buffers_registered_rows_move_once),
        cmocka_unit_test(test_buffers_that_cannot_be_mapped_refused),
        cmocka_unit_test(test_buffers_stay_while_an_operation_runs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
