/* SPDX-License-Identifier: Apache-2.0 */
/* Impossible shapes are refused here, at creation, by numbers; the rest of dispatch trusts a shape.
 */
#include "dispatch/shape.h"

#include <string.h>

uint32_t nep_dtype_bytes(enum nep_dtype dtype)
{
    switch (dtype) {
    case NEP_DTYPE_FP32:
        return 4;
    case NEP_DTYPE_FP8_E4M3:
        return 1;
    default:
        return 2;
    }
}

const char *nep_dtype_name(enum nep_dtype dtype)
{
    static const char *const names[] = {"default", "bf16", "fp16", "fp32", "fp8_e4m3", "opaque"};
    return (unsigned)dtype < sizeof names / sizeof names[0] ? names[dtype] : "unknown";
}

static enum nep_status check_range(const char *name, uint64_t value, uint64_t least, uint64_t most)
{
    if (value < least || value > most) {
        return nep_fail(NEP_ERR_INVALID, "ep: %s is %llu; it must be %llu to %llu", name,
                        (unsigned long long)value, (unsigned long long)least,
                        (unsigned long long)most);
    }
    return NEP_OK;
}

static enum nep_status check_numbers(const struct nep_shape *shape)
{
    const struct {
        const char *name;
        uint64_t value, least, most;
    } rows[] = {
        {"num_experts", shape->num_experts, 1, 1u << 20},
        {"top_k", shape->top_k, 1, NEP_MAX_TOP_K},
        {"hidden", shape->hidden, 16, 1u << 20},
        {"max_tokens", shape->max_tokens, 1, NEP_MAX_TOKENS},
        {"outstanding", shape->outstanding, 1, NEP_MAX_OUTSTANDING},
        {"expert_alignment", shape->alignment, 1, 65536},
        {"num_layers", shape->num_layers, 1, 65535},
        {"slots_per_rank", shape->slots_per_rank, 1, NEP_MAX_NODE_SLOTS},
    };
    enum nep_status status = NEP_OK;
    for (size_t i = 0; status == NEP_OK && i < sizeof rows / sizeof rows[0]; i++) {
        status = check_range(rows[i].name, rows[i].value, rows[i].least, rows[i].most);
    }
    if (status == NEP_OK && shape->hidden % 16 != 0) {
        status = nep_fail(NEP_ERR_INVALID, "ep: hidden is %u; it must be a multiple of 16",
                          shape->hidden);
    }
    return status;
}

static enum nep_status check_types(struct nep_shape *shape, const struct nep_ep_params *params)
{
    if (shape->dtype != NEP_DTYPE_BF16 && shape->dtype != NEP_DTYPE_FP16 &&
        shape->dtype != NEP_DTYPE_FP32) {
        return nep_fail(NEP_ERR_UNSUPPORTED, "ep: dtype %s; it must be bf16, fp16 or fp32",
                        nep_dtype_name(shape->dtype));
    }
    if (shape->layout < NEP_LAYOUT_RANK || shape->layout > NEP_LAYOUT_EXPERT_FRONT) {
        return nep_fail(NEP_ERR_INVALID, "ep: layout %d is not one of enum nep_layout",
                        (int)shape->layout);
    }
    if (shape->wire == NEP_DTYPE_OPAQUE) {
        return nep_wire_init_opaque(&shape->format, params->row_bytes, params->scale_bytes);
    }
    if (params->row_bytes != 0 || params->scale_bytes != 0) {
        return nep_fail(NEP_ERR_INVALID,
                        "ep: row_bytes %u and scale_bytes %u belong to the wire type opaque; it is "
                        "%s",
                        params->row_bytes, params->scale_bytes, nep_dtype_name(shape->wire));
    }
    return nep_wire_init(&shape->format, shape->dtype, shape->wire, shape->hidden, params->scale);
}

/* Where outputs have their scales; the blocks of layouts with fixed places are those of their
 * slots.
 */
static enum nep_status check_scales(struct nep_shape *shape, const struct nep_ep_params *params,
                                    const struct nep_topology *topology)
{
    if (params->scale_order != NEP_SCALES_ROWS && params->scale_order != NEP_SCALES_COLUMNS) {
        return nep_fail(NEP_ERR_INVALID, "ep: scale_order %d is not one of enum nep_scale_order",
                        (int)params->scale_order);
    }
    if (params->scale_order == NEP_SCALES_ROWS) {
        return NEP_OK;
    }
    uint32_t block = topology->num_ranks * shape->max_tokens;
    return nep_wire_set_columns(&shape->format, nep_layout_is_fixed(shape->layout) ? block : 0);
}

/* Enough slots for all experts, and few enough on each node for a 16-bit number. */
static enum nep_status check_slots(const struct nep_shape *shape,
                                   const struct nep_topology *topology)
{
    uint64_t slots = (uint64_t)shape->slots_per_rank * topology->num_ranks;
    if (slots < shape->num_experts) {
        return nep_fail(NEP_ERR_INVALID, "ep: %u experts do not fit %u ranks of %u slots",
                        shape->num_experts, topology->num_ranks, shape->slots_per_rank);
    }
    for (uint32_t n = 0; n < topology->num_nodes; n++) {
        uint64_t on_node = (uint64_t)shape->slots_per_rank * topology->node_ranks[n];
        if (on_node > NEP_MAX_NODE_SLOTS) {
            return nep_fail(NEP_ERR_INVALID,
                            "ep: node %u has %u ranks of %u slots = %llu, more than %d", n,
                            topology->node_ranks[n], shape->slots_per_rank,
                            (unsigned long long)on_node, NEP_MAX_NODE_SLOTS);
        }
    }
    /* Rows a rank can get are counted in 32 bits. */
    uint64_t rows = (uint64_t)topology->num_ranks * shape->max_tokens * shape->slots_per_rank;
    if (nep_layout_is_fixed(shape->layout) && rows > UINT32_MAX) {
        return nep_fail(NEP_ERR_INVALID,
                        "ep: this layout would have %llu rows (%u ranks, %u tokens, %u "
                        "slots), more than 2^32: use the packed layout",
                        (unsigned long long)rows, topology->num_ranks, shape->max_tokens,
                        shape->slots_per_rank);
    }
    uint64_t most = (uint64_t)topology->num_ranks * shape->max_tokens * shape->top_k +
                    (uint64_t)shape->slots_per_rank * shape->alignment;
    if (most > UINT32_MAX) {
        return nep_fail(NEP_ERR_INVALID, "ep: a rank could get %llu rows, more than 2^32",
                        (unsigned long long)most);
    }
    return NEP_OK;
}

/*
 * Slots of a stream hold what two operations of up to TILES_AHEAD tiles send. Fewer cost time
 * where hosts share a slow link: combine takes rows in token order, so a node whose rows come late
 * stops the streams of all others as soon as their slots are full.
 */
enum { TILES_AHEAD = 8 };

static void fill_sizes(struct nep_shape *shape)
{
    shape->window = 2 * shape->outstanding;
    shape->row_bytes = shape->hidden * nep_dtype_bytes(shape->dtype);
    shape->wire_row_bytes = shape->format.row_bytes;
    shape->weights_bytes = shape->top_k * (uint32_t)sizeof(float);
    uint32_t meta =
        (uint32_t)sizeof(struct nep_meta) + (shape->top_k + 1) / 2 * 4 + shape->top_k * 4;
    shape->meta_bytes = (meta + 7) / 8 * 8;
    shape->tile_rows = shape->max_tokens < NEP_TILE_ROWS ? shape->max_tokens : NEP_TILE_ROWS;
    uint32_t tiles = (shape->max_tokens + shape->tile_rows - 1) / shape->tile_rows;
    uint32_t slots = shape->window * (tiles < TILES_AHEAD ? tiles : TILES_AHEAD);
    shape->tile_slots = slots < NEP_TILE_SLOTS ? slots : NEP_TILE_SLOTS;
    shape->ride_rows = shape->max_tokens < NEP_RIDE_ROWS ? shape->max_tokens : NEP_RIDE_ROWS;
}

enum nep_status nep_shape_init(struct nep_shape *shape, const struct nep_ep_params *params,
                               const struct nep_topology *topology, const struct nep_config *config)
{
    struct nep_map_shape map = {.size = sizeof map};
    if (params->map != NULL) {
        enum nep_status status = nep_map_get_shape(params->map, &map);
        if (status != NEP_OK) {
            return status;
        }
    }
    uint32_t ranks = topology->num_ranks;
    uint32_t slots = map.slots_per_rank;
    if (slots == 0) {
        slots = params->num_experts / ranks + (params->num_experts % ranks != 0);
    }
    memset(shape, 0, sizeof *shape);
    shape->num_experts = params->num_experts;
    shape->slots_per_rank = params->slots_per_rank != 0 ? params->slots_per_rank : slots;
    shape->top_k = params->top_k;
    shape->hidden = params->hidden;
    shape->max_tokens = params->max_tokens;
    shape->alignment = params->expert_alignment != 0 ? params->expert_alignment : 1;
    shape->outstanding = params->outstanding != 0 ? params->outstanding : 1;
    shape->num_layers = params->num_layers != 0 ? params->num_layers
                        : map.num_layers != 0   ? map.num_layers
                                                : 1;
    shape->dtype = params->dtype != NEP_DTYPE_DEFAULT ? params->dtype : NEP_DTYPE_BF16;
    shape->wire = params->wire != NEP_DTYPE_DEFAULT ? params->wire : shape->dtype;
    shape->layout =
        params->layout != NEP_LAYOUT_DEFAULT ? params->layout : NEP_LAYOUT_EXPERT_PACKED;
    shape->pool_bytes = params->pool_bytes != 0 ? params->pool_bytes : config->pool_bytes;
    shape->pool_bytes = (shape->pool_bytes + 4095) / 4096 * 4096;

    enum nep_status status = check_numbers(shape);
    if (status == NEP_OK) {
        status = check_types(shape, params);
    }
    if (status == NEP_OK) {
        status = check_scales(shape, params, topology);
    }
    if (status == NEP_OK) {
        status = check_slots(shape, topology);
    }
    if (status == NEP_OK) {
        fill_sizes(shape);
    }
    return status;
}

/* Member by member, as there are holes between them; sizes follow from these. */
bool nep_shape_is_same(const struct nep_shape *a, const struct nep_shape *b)
{
    return a->num_experts == b->num_experts && a->slots_per_rank == b->slots_per_rank &&
           a->top_k == b->top_k && a->hidden == b->hidden && a->max_tokens == b->max_tokens &&
           a->alignment == b->alignment && a->outstanding == b->outstanding &&
           a->num_layers == b->num_layers && a->dtype == b->dtype && a->wire == b->wire &&
           a->layout == b->layout && a->pool_bytes == b->pool_bytes &&
           a->weights_bytes == b->weights_bytes && a->format.scale == b->format.scale &&
           a->format.payload_bytes == b->format.payload_bytes &&
           a->format.scale_bytes == b->format.scale_bytes &&
           a->format.scale_columns == b->format.scale_columns;
}
