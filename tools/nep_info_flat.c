/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What flat would send more, before anything runs: expected rows for uniform routing with distinct
 * experts, placed contiguously. nep-perf counts them for the routing that it runs.
 */
#include "tools/flat.h"
#include "tools/nep_info.h"

/* That a token has one of its K experts among `num` of all E. */
static double hit(uint32_t num, uint32_t experts, uint32_t top_k)
{
    double miss = 1.0;
    for (uint32_t k = 0; k < top_k && k < experts; k++) {
        miss *= experts - num > k ? (double)(experts - num - k) / (double)(experts - k) : 0.0;
    }
    return 1.0 - miss;
}

/* Experts on ranks [first, first + num), L each until they end. */
static uint32_t experts_on(const struct info *info, uint32_t first, uint32_t num)
{
    uint32_t experts = info->shape.num_experts;
    uint64_t slots = info->shape.slots_per_rank != 0
                         ? info->shape.slots_per_rank
                         : (experts + info->num_ranks - 1) / info->num_ranks;
    uint64_t from = first * slots, to = (first + num) * slots;
    from = from < experts ? from : experts;
    to = to < experts ? to : experts;
    return (uint32_t)(to - from);
}

static double row_bytes(const struct nep_ep_params *shape)
{
    double of_dtype = shape->dtype == NEP_DTYPE_FP32 ? 4.0 : 2.0;
    double back = shape->hidden * of_dtype;
    double scales = (shape->hidden + 127) / 128 * 4.0;
    return back + (shape->wire == NEP_DTYPE_FP8_E4M3 ? shape->hidden + scales : back);
}

void info_flat(struct info *info)
{
    const struct nep_ep_params *shape = &info->shape;
    double to_nodes = 0.0, to_ranks = 0.0; /* rows per token, summed over sources */
    if (info->num_nodes < 2 || info->num_nodes == info->num_ranks) {
        return;
    }
    uint32_t first = 0;
    for (uint32_t n = 0; n < info->num_nodes; n++) {
        uint32_t here = info->ranks_per_node[n];
        double sources = info->num_ranks - here; /* of other nodes */
        to_nodes += sources * hit(experts_on(info, first, here), shape->num_experts, shape->top_k);
        for (uint32_t r = first; r < first + here; r++) {
            to_ranks += sources * hit(experts_on(info, r, 1), shape->num_experts, shape->top_k);
        }
        first += here;
    }
    to_nodes /= info->num_ranks;
    to_ranks /= info->num_ranks;
    double kib = (to_ranks - to_nodes) * shape->max_tokens * row_bytes(shape) / 1024;
    fprintf(info->out,
            "  With uniform routing a token has %.3f rows for other nodes, %.3f for their ranks.\n",
            to_nodes, to_ranks);
    flat_print(info->out, kib);
    json_open(&info->json, "flat", '{');
    json_double(&info->json, "rows_per_token_by_node", to_nodes);
    json_double(&info->json, "rows_per_token_flat", to_ranks);
    json_double(&info->json, "more_kib", kib);
    json_double(&info->json, "faster_up_to_kib", FLAT_KIB);
    json_close(&info->json, '}');
}
