/* SPDX-License-Identifier: Apache-2.0 */
/* All of a rank's state that an operation changes is copied once and put back before each input. */
#include "tests/fuzz/fuzz_group.h"

#include "base/log.h"
#include "dispatch/combine.h"
#include "dispatch/counts.h"
#include "dispatch/recv.h"
#include "tests/fuzz/fuzz.h"
#include "tests/multi/world.h"

enum { ROWS = FUZZ_RANKS * FUZZ_TOKENS * FUZZ_TOP_K, MAX_PIECES = 16 };

/* One rank and what it passes in. */
struct seat {
    struct nep_multi_world world;
    struct nep_handle *handle;
    uint16_t x[FUZZ_TOKENS * FUZZ_HIDDEN];
    uint16_t rows[ROWS * FUZZ_HIDDEN];
    int32_t ids[FUZZ_TOKENS * FUZZ_TOP_K];
    float weights[FUZZ_TOKENS * FUZZ_TOP_K];
    float rows_weights[ROWS * FUZZ_TOP_K];
};

struct piece {
    void *at;
    void *copy;
    size_t bytes;
};

struct moment {
    enum nep_layout layout;
    uint32_t tokens;
    bool is_combine;
};
static const struct moment moments[FUZZ_MOMENTS] = {
    {NEP_LAYOUT_EXPERT_PACKED, FUZZ_TOKENS, false}, {NEP_LAYOUT_RANK, FUZZ_TOKENS, false},
    {NEP_LAYOUT_EXPERT_PACKED, 6, false}, /* so few rows that they ride in COUNTS */
    {NEP_LAYOUT_EXPERT_PACKED, FUZZ_TOKENS, true},  {NEP_LAYOUT_RANK, FUZZ_TOKENS, true},
};

struct fuzz_group {
    const struct moment *moment;
    struct seat seats[FUZZ_RANKS];
    struct piece pieces[MAX_PIECES];
    uint32_t num_pieces;
    uint16_t sum[FUZZ_TOKENS * FUZZ_HIDDEN];
    float sum_weights[FUZZ_TOKENS * FUZZ_TOP_K];
};

static struct nep_tokens tokens_of(struct seat *seat, uint32_t num)
{
    return (struct nep_tokens){.size = sizeof(struct nep_tokens),
                               .num_tokens = num,
                               .x = seat->x,
                               .topk_ids = seat->ids,
                               .topk_weights = seat->weights};
}

static bool open_seat(struct nep_multi_rank *rank)
{
    struct fuzz_group *group = rank->arg;
    struct seat *seat = &group->seats[rank->rank];
    struct nep_multi_shape shape = {.name = "fuzz",
                                    .num_nodes = 2,
                                    .ranks_per_node = {2, 1},
                                    .experts = FUZZ_EXPERTS,
                                    .top_k = FUZZ_TOP_K,
                                    .hidden = FUZZ_HIDDEN,
                                    .max_tokens = FUZZ_TOKENS,
                                    .layout = group->moment->layout,
                                    .is_private = true,
                                    .intra = "loop",
                                    .inter = "loop",
                                    .timeout_ns = 60000000000ull,
                                    .seed = 1};
    for (uint32_t i = 0; i < FUZZ_TOKENS * FUZZ_TOP_K; i++) {
        /* Both nodes for most tokens, one for some, no expert now and then. */
        seat->ids[i] = i % 11 == 0 ? -1 : (int32_t)((i * 5 + i / 7 + rank->rank) % FUZZ_EXPERTS);
        seat->weights[i] = 0.5f;
    }
    if (!nep_multi_world_create(rank, &shape, 0, &seat->world) ||
        nep_handle_create(seat->world.ep, &seat->handle) != NEP_OK) {
        return nep_multi_fail(rank, "%s", nep_last_message());
    }
    struct nep_tokens in = tokens_of(seat, group->moment->tokens);
    struct nep_rows out = {.size = sizeof out, .x = seat->rows, .capacity = ROWS};
    return !group->moment->is_combine ||
           nep_dispatch(seat->world.ep, seat->handle, &in, &out, NULL) == NEP_OK ||
           nep_multi_fail(rank, "%s", nep_last_message());
}

static void keep(struct fuzz_group *group, void *at, size_t bytes)
{
    PROMISE(group->num_pieces < MAX_PIECES);
    struct piece *piece = &group->pieces[group->num_pieces++];
    *piece = (struct piece){at, malloc(bytes), bytes};
    PROMISE(piece->copy != NULL);
    memcpy(piece->copy, at, bytes);
}

static void keep_all(struct fuzz_group *group)
{
    struct nep_ep *ep = group->seats[0].world.ep;
    struct nep_handle *handle = group->seats[0].handle;
    const struct nep_topology *topology = ep->plan.topology;
    uint32_t lanes = ep->region->num_lanes;
    for (uint32_t r = 0; r < FUZZ_RANKS; r++) {
        keep(group, group->seats[r].world.ep->head, ep->plan.window_bytes);
    }
    keep(group, ep, sizeof *ep);
    keep(group, handle, sizeof *handle);
    keep(group, handle->memory, handle->memory_bytes);
    keep(group, ep->dispatch_flows, topology->num_nodes * sizeof *ep->dispatch_flows);
    keep(group, ep->combine_flows, (lanes + 1) * sizeof *ep->combine_flows);
    keep(group, ep->rings, (ep->region->num_sends + 1) * sizeof *ep->rings);
    keep(group, ep->dispatch_in, topology->num_ranks * sizeof *ep->dispatch_in);
    keep(group, ep->combine_in, topology->num_nodes * sizeof *ep->combine_in);
    keep(group, ep->staged, topology->num_ranks * sizeof *ep->staged);
    keep(group, ep->taken, (uint64_t)(lanes + 1) * ep->node_size * sizeof *ep->taken);
    keep(group, ep->batch, sizeof *ep->batch);
}

static struct fuzz_group *group_create(const struct moment *moment)
{
    struct fuzz_group *group = calloc(1, sizeof *group);
    struct nep_multi_result result;
    PROMISE(group != NULL);
    group->moment = moment;
    nep_multi_run_threads(FUZZ_RANKS, open_seat, group, &result);
    if (result.num_failed != 0) {
        fprintf(stderr, "%s\n", result.error);
    }
    PROMISE(result.num_failed == 0);
    for (uint32_t r = 0; r < FUZZ_RANKS; r++) { /* no send half waits for another rank */
        struct seat *seat = &group->seats[r];
        struct nep_tokens in = tokens_of(seat, moment->tokens);
        struct nep_expert_rows rows = {.size = sizeof rows, .y = seat->rows};
        rows.topk_weights = moment->layout == NEP_LAYOUT_RANK ? seat->rows_weights : NULL;
        PROMISE((moment->is_combine
                     ? nep_combine_send(seat->world.ep, seat->handle, &rows, NULL)
                     : nep_dispatch_send(seat->world.ep, seat->handle, &in, NULL)) == NEP_OK);
    }
    keep_all(group);
    return group;
}

struct fuzz_group *fuzz_group_at(uint32_t number)
{
    static struct fuzz_group *groups[FUZZ_MOMENTS];
    nep_log_open(NEP_LOG_NONE, "");
    struct fuzz_group **group_p = &groups[number % FUZZ_MOMENTS];
    if (*group_p == NULL) {
        *group_p = group_create(&moments[number % FUZZ_MOMENTS]);
        nep_log_open(NEP_LOG_NONE, "");
    }
    struct fuzz_group *group = *group_p;
    for (uint32_t i = 0; i < group->num_pieces; i++) {
        memcpy(group->pieces[i].at, group->pieces[i].copy, group->pieces[i].bytes);
    }
    memset(&group->seats[0].world.comm->fault, 0, sizeof group->seats[0].world.comm->fault);
    return group;
}

struct nep_ep *fuzz_group_ep(struct fuzz_group *group)
{
    return group->seats[0].world.ep;
}

struct nep_handle *fuzz_group_handle(struct fuzz_group *group)
{
    return group->seats[0].handle;
}

void fuzz_group_patch(uint8_t *message, uint32_t bytes, const uint8_t *data, size_t len)
{
    while (len > 3) {
        uint32_t offset = data[0] | (uint32_t)data[1] << 8;
        size_t num = 1u + (data[2] & 15u);
        num = num < len - 3 ? num : len - 3;
        for (size_t i = 0; i < num; i++) {
            message[(offset + i) % bytes] = data[3 + i];
        }
        data += 3 + num;
        len -= 3 + num;
    }
}

/* ---- rank 0 goes on ------------------------------------------------------------------------- */

/* Takes what is there, then either an error or nothing more moves. */
static enum nep_status step_on(struct nep_ep *ep, struct nep_handle *handle,
                               enum nep_status (*step)(struct nep_ep *, struct nep_handle *, bool *,
                                                       bool *))
{
    enum nep_status status = NEP_OK;
    bool progress = true, done = false;
    for (int i = 0; status == NEP_OK && progress && !done; i++) {
        PROMISE(i < 10000);
        progress = false;
        status = step(ep, handle, &progress, &done);
    }
    return status;
}

/* On the heap and exactly as large: the sanitizer sees a byte too far. */
static void *exact(uint64_t num, uint64_t bytes)
{
    void *memory = malloc(num * bytes + (num == 0));
    PROMISE(memory != NULL);
    return memory;
}

static enum nep_status dispatch_on(struct nep_ep *ep, struct nep_handle *handle)
{
    bool is_counted = false;
    enum nep_status status = nep_counts_take(ep, handle, &is_counted);
    if (status != NEP_OK || !is_counted) {
        return status;
    }
    PROMISE(handle->num_rows <= ROWS && handle->num_real_rows <= handle->num_rows);
    uint64_t rows = handle->num_rows, top_k = ep->shape.layout == NEP_LAYOUT_RANK ? FUZZ_TOP_K : 1;
    struct nep_rows out = {
        .size = sizeof out,
        .x = exact(rows, FUZZ_HIDDEN * 2),
        .capacity = rows,
        .topk_slots =
            ep->shape.layout == NEP_LAYOUT_RANK ? exact(rows, FUZZ_TOP_K * sizeof(int32_t)) : NULL,
        .topk_weights = exact(rows, top_k * sizeof(float)),
        .source_rank = exact(rows, sizeof(uint32_t)),
        .source_token = exact(rows, sizeof(uint32_t)),
    };
    handle->op.out = out;
    handle->op.is_receiving = true;
    status = step_on(ep, handle, nep_recv_step);
    free(out.x);
    free(out.topk_slots);
    free(out.topk_weights);
    free(out.source_rank);
    free(out.source_token);
    return status;
}

static enum nep_status combine_on(struct fuzz_group *group, struct nep_ep *ep,
                                  struct nep_handle *handle)
{
    bool has_weights = handle->op.rows.topk_weights != NULL;
    handle->op.sum =
        (struct nep_tokens_out){.size = sizeof handle->op.sum,
                                .num_tokens = handle->num_tokens,
                                .y = group->sum,
                                .topk_weights = has_weights ? group->sum_weights : NULL};
    handle->op.is_receiving = true;
    return step_on(ep, handle, nep_combine_step);
}

void fuzz_group_go_on(struct fuzz_group *group)
{
    struct nep_ep *ep = fuzz_group_ep(group);
    struct nep_handle *handle = fuzz_group_handle(group);
    enum nep_status status =
        group->moment->is_combine ? combine_on(group, ep, handle) : dispatch_on(ep, handle);
    const struct nep_fault *fault = &ep->comm->fault;
    PROMISE(status == NEP_OK || status == NEP_ERR_MISMATCH || status == NEP_ERR_FORMAT);
    PROMISE(status == fault->status);
    PROMISE(status == NEP_OK || (ep->is_broken && fault->rank != 0 && fault->rank < FUZZ_RANKS &&
                                 fault->message[0] != '\0'));
}
