/* SPDX-License-Identifier: Apache-2.0 */
/* One step of a rank: route, dispatch, stand-in experts, combine, and what must come of it. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dispatch/ep.h"
#include "tests/multi/mortals.h"

static uint32_t mix(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t z = a * 2654435761u ^ b * 2246822519u ^ c * 3266489917u;
    z = (z ^ z >> 15) * 2246822519u;
    return z ^ z >> 13;
}

static void route(const struct mortals_plan *plan, uint32_t rank, uint32_t step, int32_t *ids,
                  float *weights)
{
    uint32_t num_experts = plan->num_ranks * MORTALS_SLOTS;
    for (uint32_t i = 0; i < plan->num_tokens * MORTALS_TOP_K; i++) {
        uint32_t first = mix(rank, step, i / MORTALS_TOP_K);
        ids[i] = (int32_t)((first + i % MORTALS_TOP_K * 3) % num_experts);
        ids[i] = mix(rank + 7, step, i) % 11 == 0 ? -1 : ids[i];
        weights[i] = 0.25f * (float)(1 + mix(rank + 3, step, i) % 8);
    }
}

static float value(uint32_t rank, uint32_t step, uint32_t token, uint32_t h)
{
    return (float)((int)(mix(rank * 64 + h, step, token) % 17) - 8);
}

static float factor(int32_t expert)
{
    return (float)(1 + expert % 4);
}

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
        nep_buffer_alloc(seat->ep, bytes, &tensor->base);
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
        if (nep_buffer_deregister(seat->ep, seat->tensors[i].number) != NEP_ERR_NOT_FOUND) {
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
        if (nep_buffer_register(seat->ep, &params, &tensor->number) != NEP_OK) {
            return nep_multi_fail(seat->rank, "registering: %s", nep_last_message());
        }
    }
    return true;
}

bool mortals_buffers_make(struct mortals_seat *seat)
{
    size_t row = seat->plan->hidden * sizeof(float), tokens = seat->plan->num_tokens;
    if (nep_ep_max_rows(seat->ep, &seat->capacity) != NEP_OK) {
        return false;
    }
    seat->x = tensor_make(seat, 0, tokens * row);
    seat->y = tensor_make(seat, 1, tokens * row);
    seat->rows = tensor_make(seat, 2, seat->capacity * row);
    seat->present = calloc(tokens, sizeof(float));
    seat->source_rank = calloc(seat->capacity, sizeof(uint32_t));
    seat->source_token = calloc(seat->capacity, sizeof(uint32_t));
    seat->slots = calloc(seat->capacity * MORTALS_TOP_K, sizeof(int32_t));
    seat->row_weights = calloc(seat->capacity * MORTALS_TOP_K, sizeof(float));
    seat->ids = calloc(tokens * MORTALS_TOP_K, sizeof(int32_t));
    seat->weights = calloc(tokens * MORTALS_TOP_K, sizeof(float));
    return seat->x != NULL && seat->y != NULL && seat->rows != NULL && seat->present != NULL &&
           seat->source_rank != NULL && seat->source_token != NULL && seat->slots != NULL &&
           seat->row_weights != NULL && seat->ids != NULL && seat->weights != NULL;
}

void mortals_buffers_free(struct mortals_seat *seat)
{
    for (uint32_t i = 0; i < 3; i++) {
        if (seat->plan->memory == MORTALS_POOL) {
            nep_buffer_free(seat->ep, seat->tensors[i].base);
        } else if (seat->plan->memory == MORTALS_PRIVATE) {
            free(seat->tensors[i].base);
        }
    }
    free(seat->present);
    free(seat->source_rank);
    free(seat->source_token);
    free(seat->slots);
    free(seat->row_weights);
    free(seat->ids);
    free(seat->weights);
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
           seat->handle->op.out_is_mapped == seat->is_registered ||
           nep_multi_fail(seat->rank, "step %u: its rows count as %s", step,
                          seat->is_registered ? "private" : "mapped");
}

/* ---- what must be --------------------------------------------------------------------------- */

static bool check_row(struct mortals_seat *seat, uint32_t step, uint64_t row)
{
    uint32_t source = seat->source_rank[row], token = seat->source_token[row];
    if (source >= seat->plan->num_ranks || token >= seat->plan->num_tokens ||
        !seat->is_live[source]) {
        return nep_multi_fail(seat->rank, "step %u, row %llu: of token %u of rank %u", step,
                              (unsigned long long)row, token, source);
    }
    for (uint32_t h = 0; h < seat->plan->hidden; h++) {
        float got = seat->rows[row * seat->plan->hidden + h], want = value(source, step, token, h);
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
    for (uint32_t l = 0; seat->plan->layout != NEP_LAYOUT_RANK && l < MORTALS_SLOTS; l++) {
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
    uint32_t me = mortals_number(seat), hidden = seat->plan->hidden;
    for (uint32_t t = 0; t < seat->plan->num_tokens; t++) {
        const int32_t *ids = seat->ids + (size_t)t * MORTALS_TOP_K;
        const float *weights = seat->weights + (size_t)t * MORTALS_TOP_K;
        float scale = 0, weight = 0, ranks = 0;
        for (uint32_t k = 0; k < MORTALS_TOP_K; k++) {
            bool is_new = ids[k] >= 0 && seat->is_live[ids[k] / MORTALS_SLOTS];
            scale += is_new ? weights[k] * factor(ids[k]) : 0;
            weight += is_new ? weights[k] : 0;
            for (uint32_t i = 0; i < k; i++) {
                is_new = is_new && (ids[i] < 0 || ids[i] / MORTALS_SLOTS != ids[k] / MORTALS_SLOTS);
            }
            ranks += is_new;
        }
        float want = seat->plan->layout == NEP_LAYOUT_RANK ? ranks : weight;
        if (seat->present[t] != want) {
            return nep_multi_fail(seat->rank, "step %u, token %u: present %g, not %g", step, t,
                                  (double)seat->present[t], (double)want);
        }
        for (uint32_t h = 0; h < hidden; h++) {
            float sum = scale * value(me, step, t, h);
            if (seat->y[t * hidden + h] != sum) {
                return nep_multi_fail(seat->rank, "step %u, token %u, element %u: %g, not %g", step,
                                      t, h, (double)seat->y[t * hidden + h], (double)sum);
            }
        }
    }
    return true;
}

/* ---- the step ------------------------------------------------------------------------------- */

/* The stand-in experts, in place: each row times its expert's factor (rank layout: weighted sum).
 */
static void run_experts(struct mortals_seat *seat, const struct nep_counts *counts)
{
    uint32_t me = mortals_number(seat), hidden = seat->plan->hidden;
    enum nep_layout layout = seat->plan->layout;
    for (uint32_t l = 0; layout != NEP_LAYOUT_RANK && l < MORTALS_SLOTS; l++) {
        float scale = factor((int32_t)(me * MORTALS_SLOTS + l));
        uint64_t room = (uint64_t)seat->plan->num_ranks * seat->plan->num_tokens;
        bool is_packed = layout == NEP_LAYOUT_EXPERT_PACKED;
        uint64_t first = is_packed ? counts->first_row[l] : l * room;
        uint64_t num = is_packed ? counts->rows_per_slot[l] : room;
        for (uint64_t i = 0; i < num * hidden; i++) {
            seat->rows[first * hidden + i] *= scale;
        }
    }
    for (uint64_t r = 0; layout == NEP_LAYOUT_RANK && r < counts->num_rows; r++) {
        float scale = 0;
        for (uint32_t k = 0; k < MORTALS_TOP_K; k++) {
            int32_t slot = seat->slots[r * MORTALS_TOP_K + k];
            scale += slot >= 0 ? seat->row_weights[r * MORTALS_TOP_K + k] *
                                     factor((int32_t)(me * MORTALS_SLOTS) + slot)
                               : 0;
        }
        for (uint32_t h = 0; h < hidden; h++) {
            seat->rows[r * hidden + h] *= scale;
        }
    }
}

static void prepare(struct mortals_seat *seat, uint32_t step)
{
    uint32_t me = mortals_number(seat), hidden = seat->plan->hidden;
    route(seat->plan, me, step, seat->ids, seat->weights);
    for (uint32_t i = 0; i < seat->plan->num_tokens * hidden; i++) {
        seat->x[i] = value(me, step, i / hidden, i % hidden);
        seat->y[i] = 1e30f;
    }
    memset(seat->rows, 0, seat->capacity * hidden * sizeof(float));
    memset(seat->source_rank, 0xff, seat->capacity * sizeof(uint32_t));
}

static int run_dispatch(struct mortals_seat *seat, uint32_t step, struct nep_counts *counts)
{
    struct nep_tokens in = {.size = sizeof in,
                            .num_tokens = seat->plan->num_tokens,
                            .x = seat->x,
                            .topk_ids = seat->ids,
                            .topk_weights = seat->weights};
    bool is_rank = seat->plan->layout == NEP_LAYOUT_RANK;
    struct nep_rows out = {.size = sizeof out,
                           .x = seat->rows,
                           .capacity = seat->capacity,
                           .source_rank = seat->source_rank,
                           .source_token = seat->source_token,
                           .topk_slots = is_rank ? seat->slots : NULL,
                           .topk_weights = seat->row_weights};
    int status = mortals_call_begins(seat, step, MORTALS_DISPATCH_SEND)
                     ? 1
                     : nep_dispatch_send(seat->ep, seat->handle, &in, NULL);
    if (status == NEP_OK && !mortals_expect_stop(seat, step)) {
        status = NEP_ERR_INTERNAL;
    }
    if (status == NEP_OK) {
        status = mortals_call_begins(seat, step, MORTALS_DISPATCH_RECV)
                     ? 1
                     : nep_dispatch_recv(seat->ep, seat->handle, &out, NULL);
    }
    if (status == NEP_OK) {
        status = nep_dispatch_counts(seat->ep, seat->handle, counts);
    }
    return status;
}

int mortals_step_run(struct mortals_seat *seat, uint32_t step)
{
    struct nep_counts counts = {.size = sizeof counts};
    struct nep_expert_rows back = {.size = sizeof back, .y = seat->rows};
    struct nep_tokens_out sum = {.size = sizeof sum,
                                 .num_tokens = seat->plan->num_tokens,
                                 .y = seat->y,
                                 .present = seat->present};
    prepare(seat, step);
    int status = run_dispatch(seat, step, &counts);
    if (status == NEP_OK && (!check_mapped(seat, step) || !check_rows(seat, step, &counts))) {
        return NEP_ERR_INTERNAL;
    }
    if (status == NEP_OK && mortals_call_begins(seat, step, MORTALS_EXPERTS)) {
        status = 1;
    }
    if (status == NEP_OK) {
        run_experts(seat, &counts);
        status = mortals_call_begins(seat, step, MORTALS_COMBINE_SEND)
                     ? 1
                     : nep_combine_send(seat->ep, seat->handle, &back, NULL);
    }
    if (status == NEP_OK) {
        status = mortals_call_begins(seat, step, MORTALS_COMBINE_RECV)
                     ? 1
                     : nep_combine_recv(seat->ep, seat->handle, &sum, NULL);
    }
    if (status == NEP_OK && mortals_call_begins(seat, step, MORTALS_AFTER)) {
        status = 1;
    }
    return status;
}
