/* SPDX-License-Identifier: Apache-2.0 */
/* One step of a rank, call by call, each of which it may not live to see the end of. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dispatch/ep.h"
#include "tests/multi/mortals.h"

uint32_t mortals_number(const struct mortals_seat *seat)
{
    struct nep_topology topology = {.size = sizeof topology};
    nep_comm_topology(seat->comm, &topology);
    return topology.rank;
}

/* ---- buffers -------------------------------------------------------------------------------- */

static void *tensor_make(struct mortals_seat *seat, uint32_t idx, size_t bytes)
{
    struct mortals_tensor *tensor = &seat->tensors[idx];
    *tensor = (struct mortals_tensor){.bytes = bytes, .fd = -1};
    if (seat->plan->memory == MORTALS_PRIVATE) {
        tensor->base = calloc(1, bytes);
    } else if (seat->plan->memory == MORTALS_POOL) {
        nep_buffer_alloc(seat->exact.ep, bytes, &tensor->base);
    } else {
        tensor->fd = memfd_create("tensor", MFD_CLOEXEC);
        void *base = MAP_FAILED;
        if (tensor->fd >= 0 && ftruncate(tensor->fd, (off_t)bytes) == 0) {
            base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, tensor->fd, 0);
        }
        tensor->base = base != MAP_FAILED ? base : NULL;
    }
    return tensor->base;
}

static bool check_forgotten(const struct mortals_seat *seat)
{
    for (uint32_t i = 0; i < 3 && seat->is_registered; i++) {
        if (nep_buffer_deregister(seat->exact.ep, seat->tensors[i].number) != NEP_ERR_NOT_FOUND) {
            return nep_multi_fail(seat->rank, "buffer %u is registered still",
                                  seat->tensors[i].number);
        }
    }
    return true;
}

bool mortals_buffers_enrol(struct mortals_seat *seat, uint64_t generation)
{
    if (!check_forgotten(seat)) {
        return false;
    }
    seat->is_registered = seat->plan->memory == MORTALS_REGISTERED && generation % 2 == 0;
    for (uint32_t i = 0; i < 3 && seat->is_registered; i++) {
        struct mortals_tensor *tensor = &seat->tensors[i];
        struct nep_buffer_params params = {
            .size = sizeof params, .base = tensor->base, .bytes = tensor->bytes, .fd = tensor->fd};
        if (nep_buffer_register(seat->exact.ep, &params, &tensor->number) != NEP_OK) {
            return nep_multi_fail(seat->rank, "registering: %s", nep_last_message());
        }
    }
    return true;
}

bool mortals_buffers_make(struct mortals_seat *seat)
{
    struct nep_exact *exact = &seat->exact;
    size_t row = seat->plan->hidden * sizeof(float), tokens = seat->plan->num_tokens;
    if (!nep_exact_make_tables(exact)) {
        return false;
    }
    exact->x = tensor_make(seat, 0, tokens * row);
    exact->y = tensor_make(seat, 1, tokens * row);
    exact->rows = tensor_make(seat, 2, exact->capacity * row);
    seat->source_token = calloc(exact->capacity, sizeof *seat->source_token);
    return exact->x != NULL && exact->y != NULL && exact->rows != NULL &&
           seat->source_token != NULL;
}

void mortals_buffers_free(struct mortals_seat *seat)
{
    for (uint32_t i = 0; i < 3; i++) {
        if (seat->plan->memory == MORTALS_POOL) {
            nep_buffer_free(seat->exact.ep, seat->tensors[i].base);
        } else if (seat->plan->memory == MORTALS_PRIVATE) {
            free(seat->tensors[i].base);
        }
    }
    seat->exact.x = seat->exact.y = seat->exact.rows = NULL; /* they were not its own */
    nep_exact_free(&seat->exact);
    free(seat->source_token);
}

void mortals_registered_free(struct mortals_seat *seat)
{
    for (uint32_t i = 0; i < 3 && seat->plan->memory == MORTALS_REGISTERED; i++) {
        if (seat->tensors[i].base != NULL) {
            munmap(seat->tensors[i].base, seat->tensors[i].bytes);
            close(seat->tensors[i].fd);
        }
    }
}

/* Registering has an effect, and the next generation ends it. */
static bool check_mapped(const struct mortals_seat *seat, uint32_t step)
{
    return seat->plan->memory != MORTALS_REGISTERED ||
           seat->exact.handle->op.out_is_mapped == seat->is_registered ||
           nep_multi_fail(seat->rank, "step %u: its rows count as %s", step,
                          seat->is_registered ? "private" : "mapped");
}

/* ---- what must be --------------------------------------------------------------------------- */

static bool check_row(struct mortals_seat *seat, uint32_t step, uint64_t row)
{
    uint32_t source = seat->exact.source_rank[row], token = seat->source_token[row];
    if (source >= seat->plan->num_ranks || token >= seat->plan->num_tokens ||
        !seat->exact.is_live[source]) {
        return nep_multi_fail(seat->rank, "step %u, row %llu: of token %u of rank %u", step,
                              (unsigned long long)row, token, source);
    }
    for (uint32_t h = 0; h < seat->plan->hidden; h++) {
        float got = seat->exact.rows[row * seat->plan->hidden + h],
              want = nep_exact_value(source, step, token, h);
        if (got != want) {
            return nep_multi_fail(
                seat->rank, "step %u, row %llu, token %u of rank %u, element %u: %g, not %g", step,
                (unsigned long long)row, token, source, h, (double)got, (double)want);
        }
    }
    return true;
}

/* Rows that a dispatch brought are right also where the combine will fail. */
static bool check_rows(struct mortals_seat *seat, uint32_t step, const struct nep_counts *counts)
{
    uint64_t room = (uint64_t)seat->plan->num_ranks * seat->plan->num_tokens;
    bool is_fine = true;
    for (uint64_t r = 0; seat->plan->layout == NEP_LAYOUT_RANK && r < counts->num_rows; r++) {
        is_fine = is_fine && check_row(seat, step, r);
    }
    for (uint32_t l = 0; seat->plan->layout != NEP_LAYOUT_RANK && l < NEP_EXACT_SLOTS; l++) {
        bool is_packed = seat->plan->layout == NEP_LAYOUT_EXPERT_PACKED;
        uint64_t first = is_packed ? counts->first_row[l] : l * room;
        /* padded rows lie with gaps between sources, whose first is checked alone */
        uint64_t num = is_packed ? counts->rows_per_slot[l] : 0;
        for (uint64_t r = 0; r < num; r++) {
            is_fine = is_fine && check_row(seat, step, first + r);
        }
    }
    return is_fine;
}

bool mortals_step_check(struct mortals_seat *seat, uint32_t step)
{
    char text[160];
    return nep_exact_is_right(&seat->exact, step, text, sizeof text) ||
           nep_multi_fail(seat->rank, "%s", text);
}

/* ---- the step ------------------------------------------------------------------------------- */

static int run_dispatch(struct mortals_seat *seat, uint32_t step, struct nep_counts *counts)
{
    struct nep_tokens in = {.size = sizeof in,
                            .num_tokens = seat->plan->num_tokens,
                            .x = seat->exact.x,
                            .topk_ids = seat->exact.ids,
                            .topk_weights = seat->exact.weights};
    bool is_rank = seat->plan->layout == NEP_LAYOUT_RANK;
    struct nep_rows out = {.size = sizeof out,
                           .x = seat->exact.rows,
                           .capacity = seat->exact.capacity,
                           .source_rank = seat->exact.source_rank,
                           .source_token = seat->source_token,
                           .topk_slots = is_rank ? seat->exact.slots : NULL,
                           .topk_weights = seat->exact.slot_weights};
    int status = mortals_call_begins(seat, step, MORTALS_DISPATCH_SEND)
                     ? 1
                     : nep_dispatch_send(seat->exact.ep, seat->exact.handle, &in, NULL);
    if (status == NEP_OK && !mortals_expect_stop(seat, step)) {
        status = NEP_ERR_INTERNAL;
    }
    if (status == NEP_OK) {
        status = mortals_call_begins(seat, step, MORTALS_DISPATCH_RECV)
                     ? 1
                     : nep_dispatch_recv(seat->exact.ep, seat->exact.handle, &out, NULL);
    }
    if (status == NEP_OK) {
        status = nep_dispatch_counts(seat->exact.ep, seat->exact.handle, counts);
    }
    return status;
}

int mortals_step_run(struct mortals_seat *seat, uint32_t step)
{
    struct nep_exact *exact = &seat->exact;
    struct nep_counts counts = {.size = sizeof counts};
    struct nep_expert_rows back = {.size = sizeof back, .y = seat->exact.rows};
    struct nep_tokens_out sum = {.size = sizeof sum,
                                 .num_tokens = seat->plan->num_tokens,
                                 .y = seat->exact.y,
                                 .present = seat->exact.present};
    nep_exact_fill(exact, step, seat->plan->num_tokens);
    memset(exact->source_rank, 0xff, exact->capacity * sizeof *exact->source_rank);
    int status = run_dispatch(seat, step, &counts);
    if (status == NEP_OK && (!check_mapped(seat, step) || !check_rows(seat, step, &counts))) {
        return NEP_ERR_INTERNAL;
    }
    if (status == NEP_OK && mortals_call_begins(seat, step, MORTALS_EXPERTS)) {
        status = 1;
    }
    if (status == NEP_OK) {
        nep_exact_run_experts(exact, &counts);
        status = mortals_call_begins(seat, step, MORTALS_COMBINE_SEND)
                     ? 1
                     : nep_combine_send(seat->exact.ep, seat->exact.handle, &back, NULL);
    }
    if (status == NEP_OK) {
        status = mortals_call_begins(seat, step, MORTALS_COMBINE_RECV)
                     ? 1
                     : nep_combine_recv(seat->exact.ep, seat->exact.handle, &sum, NULL);
    }
    if (status == NEP_OK && mortals_call_begins(seat, step, MORTALS_AFTER)) {
        status = 1;
    }
    return status;
}
