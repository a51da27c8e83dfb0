/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Credits are always sent, one message per tile that a node has read: whether a source could know
 * it by itself (dispatch/flow.h) is known to the source alone, which here is a kernel. One credit
 * of a stream is in flight at a time, as on the host.
 */
#include "dispatch/cuda/fabric_proxy.h"

#include <stdlib.h>
#include <string.h>

/* Puts of one send ring or control, by slot. */
struct sent {
    uint32_t dst;
    uint64_t number;
};

struct credit {
    uint64_t announced;
    uint64_t put;
};

struct nep_fabric_proxy {
    struct nep_fabric_proxy_params params;
    const struct nep_topology *topology;
    uint32_t rank;
    uint32_t node;
    uint32_t window;                       /* W = V */
    const struct nep_region *region;       /* own */
    uint64_t last_op;                      /* of all COUNTS posted, plus one */
    uint64_t counts_op[NEP_FAR_MAX_RANKS]; /* next operation of each control */
    struct sent counts[NEP_FAR_MAX_RANKS][NEP_FAR_MAX_WINDOW];
    uint64_t counts_done[NEP_FAR_MAX_RANKS];
    uint64_t tile_next[NEP_FAR_MAX_NODES]; /* dispatch tiles posted to each node */
    uint64_t sums_next[NEP_FAR_MAX_RANKS]; /* combine tiles posted to each lane source */
    uint64_t ring_next[NEP_FAR_MAX_RANKS]; /* puts of each send ring */
    uint64_t ring_done[NEP_FAR_MAX_RANKS];
    struct sent ring[NEP_FAR_MAX_RANKS][NEP_FAR_MAX_WINDOW];
    struct credit dispatch_credit[NEP_FAR_MAX_RANKS]; /* by source */
    struct credit sums_credit[NEP_FAR_MAX_NODES];
    struct nep_fabric_stats stats;
};

/* One thread counts, any may look. */
static void count(uint64_t *counter, uint64_t more)
{
    __atomic_store_n(counter, *counter + more, __ATOMIC_RELAXED);
}

static enum nep_status put_counted(struct nep_fabric_proxy *f, const struct nep_put *put,
                                   uint64_t *number_p)
{
    count(&f->stats.messages, 1);
    count(&f->stats.bytes, put->len);
    return f->params.inter->ops->put(f->params.inter, put, number_p);
}

/* The number whose low bits came: it lies at `expected` or a little beyond. */
static uint64_t complete(uint64_t expected, uint32_t low, uint32_t bits)
{
    uint64_t mask = (1ull << bits) - 1;
    return expected + ((low - expected) & mask);
}

static enum nep_status bad(const struct nep_command *c, const char *what)
{
    return nep_fail(NEP_ERR_INTERNAL,
                    "proxy: a command of kind %u, stream %u, operation %u, number %u, %u rows: %s",
                    c->kind, c->stream, c->op, c->number, c->rows, what);
}

/* ---- posts ---------------------------------------------------------------------------------- */

static enum nep_status post_counts(struct nep_fabric_proxy *f, const struct nep_command *c,
                                   uint32_t *who_p)
{
    const struct nep_plan *plan = f->params.plan;
    uint32_t dst = UINT32_MAX;
    for (uint32_t r = 0; r < f->topology->num_ranks; r++) {
        if (c->stream != 0 && nep_plan_control(plan, f->rank, r) == c->stream) {
            dst = r;
        }
    }
    if (dst == UINT32_MAX) {
        return bad(c, "no rank behind this control");
    }
    *who_p = dst;
    uint64_t op = complete(f->counts_op[c->stream], c->op, 12);
    uint64_t slot = op % f->window;
    const struct nep_region *there = &plan->regions[dst];
    uint64_t idx = nep_plan_control(plan, dst, f->rank) * (uint64_t)f->window + slot;
    uint32_t node_ranks = f->topology->node_ranks[f->topology->node_of_rank[dst]];
    uint32_t tables = node_ranks * (1 + plan->shape->slots_per_rank) * 4;
    uint64_t from = f->region->send_counts +
                    (c->stream * (uint64_t)f->window + slot) * f->region->send_counts_bytes;
    struct nep_put put = {
        .dst = dst,
        .window = f->params.window,
        .offset = there->counts + idx * there->counts_bytes,
        .src = f->params.data + from,
        .len =
            (uint32_t)sizeof(struct nep_counts_msg) + (c->rows == NEP_KIND_DISPATCH ? tables : 0),
        .imm = nep_imm(0, NEP_KIND_COUNTS, f->params.window, op, 0),
    };
    f->counts_op[c->stream] = op + 1;
    f->last_op = op + 1 > f->last_op ? op + 1 : f->last_op;
    f->counts[c->stream][slot].dst = dst;
    return put_counted(f, &put, &f->counts[c->stream][slot].number);
}

/* From the next slot of a send ring. */
static enum nep_status post_tile(struct nep_fabric_proxy *f, uint32_t ring, struct nep_put *put)
{
    uint64_t slot = f->ring_next[ring] % f->window;
    put->window = f->params.window;
    put->src = f->params.data + f->region->send +
               (ring * (uint64_t)f->window + slot) * f->region->send_tile_bytes;
    f->ring[ring][slot].dst = put->dst;
    enum nep_status status = put_counted(f, put, &f->ring[ring][slot].number);
    f->ring_next[ring]++;
    return status;
}

static enum nep_status post_rows(struct nep_fabric_proxy *f, const struct nep_command *c,
                                 uint32_t *who_p)
{
    const struct nep_plan *plan = f->params.plan;
    uint32_t node = c->stream;
    if (node >= f->topology->num_nodes || node == f->node || c->rows > plan->shape->tile_rows) {
        return bad(c, "no such node, or too many rows");
    }
    uint32_t dst = nep_plan_landing(plan, f->rank, node);
    const struct nep_region *there = &plan->regions[dst];
    uint64_t number = complete(f->tile_next[node], c->number, 16);
    uint64_t idx = nep_plan_lane(plan, f->rank, node) * (uint64_t)f->window + number % f->window;
    struct nep_put put = {
        .dst = *who_p = dst,
        .offset = there->dispatch_landing + idx * there->dispatch_tile_bytes,
        .len = nep_tile_payload_offset(plan->shape, NEP_KIND_DISPATCH, c->rows) +
               c->rows * plan->shape->wire_row_bytes,
        .imm = nep_imm(0, NEP_KIND_DISPATCH, f->params.window, c->op, number),
    };
    f->tile_next[node] = number + 1;
    count(&f->stats.rows, c->rows);
    /* Before the put: a credit for this tile must find it sent. */
    nep_word_set(f->params.words, f->region->dispatch_sent, node, number + 1);
    return post_tile(f, nep_plan_skip(f->node, node), &put);
}

static uint32_t source_of_lane(const struct nep_fabric_proxy *f, uint32_t lane)
{
    for (uint32_t s = 0; s < f->topology->num_ranks; s++) {
        if (f->topology->node_of_rank[s] != f->node &&
            nep_plan_landing(f->params.plan, s, f->node) == f->rank &&
            nep_plan_lane(f->params.plan, s, f->node) == lane) {
            return s;
        }
    }
    return UINT32_MAX;
}

static enum nep_status post_sums(struct nep_fabric_proxy *f, const struct nep_command *c,
                                 uint32_t *who_p)
{
    const struct nep_plan *plan = f->params.plan;
    uint32_t lane = c->stream;
    uint32_t rows = c->rows & ~(uint32_t)NEP_FAR_HAS_WEIGHTS;
    uint64_t row_bytes =
        plan->shape->row_bytes + (rows != c->rows ? plan->shape->weights_bytes : 0);
    uint32_t dst = lane < f->region->num_lanes ? source_of_lane(f, lane) : UINT32_MAX;
    if (dst == UINT32_MAX || rows > plan->shape->tile_rows) {
        return bad(c, "no such lane, or too many rows");
    }
    const struct nep_region *there = &plan->regions[dst];
    uint64_t number = complete(f->sums_next[lane], c->number, 16);
    uint64_t idx = (uint64_t)nep_plan_skip(f->topology->node_of_rank[dst], f->node) * f->window +
                   number % f->window;
    struct nep_put put = {
        .dst = *who_p = dst,
        .offset = there->combine_landing + idx * there->combine_tile_bytes,
        .len = nep_tile_payload_offset(plan->shape, NEP_KIND_COMBINE, rows) +
               (uint32_t)(rows * row_bytes),
        .imm = nep_imm(0, NEP_KIND_COMBINE, f->params.window, c->op, number),
    };
    f->sums_next[lane] = number + 1;
    count(&f->stats.rows_back, rows);
    nep_word_set(f->params.words, f->region->combine_sent, lane, number + 1);
    return post_tile(f, lane, &put);
}

enum nep_status nep_fabric_proxy_post(void *fabric, uint64_t command, uint32_t *who_p)
{
    struct nep_fabric_proxy *f = fabric;
    struct nep_command c = nep_ring_command_of(command);
    *who_p = f->rank;
    switch (c.kind) {
    case NEP_KIND_COUNTS:
        return post_counts(f, &c, who_p);
    case NEP_KIND_DISPATCH:
        return post_rows(f, &c, who_p);
    case NEP_KIND_COMBINE:
        return post_sums(f, &c, who_p);
    default:
        return bad(&c, "no such kind");
    }
}

/* ---- duty ----------------------------------------------------------------------------------- */

static bool is_complete(struct nep_fabric_proxy *f, uint32_t dst, uint64_t number)
{
    return f->params.inter->ops->completed(f->params.inter, dst) >= number;
}

/* What is complete of COUNTS and of each ring, in order, for kernels that want their slots. */
static void publish(struct nep_fabric_proxy *f)
{
    for (uint32_t c = 1; c < f->region->num_controls; c++) {
        uint64_t done = f->counts_done[c];
        const struct sent *sent = &f->counts[c][done % f->window];
        if (done < f->counts_op[c] && is_complete(f, sent->dst, sent->number)) {
            done++;
        } else if (done >= f->counts_op[c] && done < f->last_op) {
            done = f->last_op; /* operations that had nothing for this one */
        }
        if (done != f->counts_done[c]) {
            f->counts_done[c] = done;
            /* Release: pairs with nep_far_wait of whoever fills that slot next. */
            nep_ring_store(&f->params.page->counts_free[c], done);
        }
    }
    for (uint32_t r = 0; r < f->region->num_sends; r++) {
        uint64_t done = f->ring_done[r];
        const struct sent *sent = &f->ring[r][done % f->window];
        if (done < f->ring_next[r] && is_complete(f, sent->dst, sent->number)) {
            f->ring_done[r] = done + 1;
            nep_ring_store(&f->params.page->tiles_free[r], done + 1);
        }
    }
}

static bool give(struct nep_fabric_proxy *f, struct credit *credit, uint32_t dst,
                 enum nep_kind kind, uint64_t freed)
{
    if (freed <= credit->announced || !is_complete(f, dst, credit->put)) {
        return false;
    }
    struct nep_put put = {
        .dst = dst,
        .window = f->params.window,
        .imm = nep_imm(0, kind, f->params.window, 0, freed),
    };
    credit->announced = freed;
    return put_counted(f, &put, &credit->put) == NEP_OK;
}

/* Tiles of a source that all readers of the node have read. */
static uint64_t freed_of(const struct nep_fabric_proxy *f, uint32_t source)
{
    const struct nep_plan *plan = f->params.plan;
    uint64_t freed = UINT64_MAX;
    for (uint32_t g = 0; g < f->topology->node_ranks[f->node]; g++) {
        const struct nep_region *region = &plan->regions[nep_plan_rank_at(plan, f->node, g)];
        /* Acquire: pairs with the release of the block that read last (far_dispatch.cu). */
        uint64_t read = nep_word_get(f->params.node_words[g], region->dispatch_read, source);
        freed = read < freed ? read : freed;
    }
    return freed;
}

bool nep_fabric_proxy_duty(void *fabric)
{
    struct nep_fabric_proxy *f = fabric;
    const struct nep_plan *plan = f->params.plan;
    bool is_busy = false;
    publish(f);
    for (uint32_t s = 0; s < f->topology->num_ranks; s++) {
        if (f->topology->node_of_rank[s] != f->node &&
            nep_plan_landing(plan, s, f->node) == f->rank) {
            is_busy |= give(f, &f->dispatch_credit[s], s, NEP_KIND_DISPATCH_CREDIT, freed_of(f, s));
        }
    }
    for (uint32_t n = 0; n < f->topology->num_nodes; n++) {
        if (n != f->node) {
            /* Acquire: pairs with the release of the block that summed last (far_combine.cu). */
            uint64_t read = nep_word_get(f->params.words, f->region->combine_read, n);
            is_busy |= give(f, &f->sums_credit[n], nep_plan_landing(plan, f->rank, n),
                            NEP_KIND_COMBINE_CREDIT, read);
        }
    }
    return is_busy;
}

/* ---- the object ----------------------------------------------------------------------------- */

enum nep_status nep_fabric_proxy_create(const struct nep_fabric_proxy_params *params,
                                        struct nep_fabric_proxy **fabric_p)
{
    const struct nep_topology *topology = params->plan->topology;
    const struct nep_region *region = &params->plan->regions[topology->rank];
    uint32_t window = params->plan->shape->window;
    if (topology->num_ranks > NEP_FAR_MAX_RANKS || topology->num_nodes > NEP_FAR_MAX_NODES ||
        region->num_sends > NEP_FAR_MAX_RANKS || window > NEP_FAR_MAX_WINDOW ||
        params->plan->shape->tile_slots != window) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "a group of %u ranks (at most %d) on %u nodes (at most %d) with %u slots "
                        "(at most %d) between nodes with tokens in GPU memory",
                        topology->num_ranks, NEP_FAR_MAX_RANKS, topology->num_nodes,
                        NEP_FAR_MAX_NODES, window, NEP_FAR_MAX_WINDOW);
    }
    struct nep_fabric_proxy *f = calloc(1, sizeof *f);
    if (f == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "proxy: no memory for its tables");
    }
    f->params = *params;
    f->topology = topology;
    f->rank = topology->rank;
    f->node = topology->node;
    f->region = region;
    f->window = window;
    *fabric_p = f;
    return NEP_OK;
}

void nep_fabric_proxy_destroy(struct nep_fabric_proxy *fabric)
{
    free(fabric);
}

struct nep_fabric_stats nep_fabric_proxy_stats(const struct nep_fabric_proxy *fabric)
{
    return (struct nep_fabric_stats){
        .rows = __atomic_load_n(&fabric->stats.rows, __ATOMIC_RELAXED),
        .rows_back = __atomic_load_n(&fabric->stats.rows_back, __ATOMIC_RELAXED),
        .bytes = __atomic_load_n(&fabric->stats.bytes, __ATOMIC_RELAXED),
        .messages = __atomic_load_n(&fabric->stats.messages, __ATOMIC_RELAXED),
    };
}

void nep_fabric_fill_head(const struct nep_plan *plan, uint32_t rank, uint8_t *words)
{
    const struct nep_topology *topology = plan->topology;
    struct nep_region_head *head = (struct nep_region_head *)words;
    uint32_t node = topology->node_of_rank[rank];
    head->magic = NEP_REGION_MAGIC;
    head->rank = rank;
    head->num_ranks = topology->num_ranks;
    head->window = plan->shape->window;
    head->tile_slots = plan->shape->tile_slots;
    head->region = plan->regions[rank];
    struct nep_directory *directory = (struct nep_directory *)(words + head->region.directory);
    for (uint32_t r = 0; r < topology->num_ranks; r++) {
        directory[r].node = topology->node_of_rank[r];
        directory[r].control = nep_plan_control(plan, rank, r);
        bool is_lane = topology->node_of_rank[r] != node && nep_plan_landing(plan, r, node) == rank;
        directory[r].lane = is_lane ? nep_plan_lane(plan, r, node) : UINT32_MAX;
    }
}
