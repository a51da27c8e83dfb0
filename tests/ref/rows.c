/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which rows a rank receives and where they lie, straight from the definition: walk all sources in
 * rank order, all tokens in order, all choices in order, once per local slot. No prefix sums over
 * counts that someone sent; what is slow here is obvious here.
 */
#include <stdlib.h>
#include <string.h>

#include "tests/ref/ref.h"

static uint32_t slot_of(const struct nep_ref_group *group, uint32_t rank, uint32_t token,
                        uint32_t k)
{
    return group->slots[rank][(size_t)token * group->top_k + k];
}

static bool is_token_on_rank(const struct nep_ref_group *group, uint32_t source, uint32_t token,
                             uint32_t rank)
{
    for (uint32_t k = 0; k < group->top_k; k++) {
        uint32_t slot = slot_of(group, source, token, k);
        if (slot != NEP_REF_NONE && slot / group->slots_per_rank == rank) {
            return true;
        }
    }
    return false;
}

/* (token, choice) pairs that land on this rank: an upper bound of its rows in every layout. */
static uint64_t count_pairs(const struct nep_ref_group *group, uint32_t rank, uint32_t *per_slot)
{
    uint64_t pairs = 0;
    for (uint32_t source = 0; source < group->num_ranks; source++) {
        size_t num = (size_t)group->num_tokens[source] * group->top_k;
        for (size_t i = 0; i < num; i++) {
            uint32_t slot = group->slots[source][i];
            if (slot != NEP_REF_NONE && slot / group->slots_per_rank == rank) {
                per_slot[slot % group->slots_per_rank]++;
                pairs++;
            }
        }
    }
    return pairs;
}

static void build_rank_layout(const struct nep_ref_group *group, uint32_t rank,
                              struct nep_ref_rows *rows)
{
    uint64_t idx = 0;
    for (uint32_t source = 0; source < group->num_ranks; source++) {
        for (uint32_t token = 0; token < group->num_tokens[source]; token++) {
            if (is_token_on_rank(group, source, token, rank)) {
                rows->rows[idx] =
                    (struct nep_ref_row){.idx = idx, .source = source, .token = token};
                rows->rows_per_source[source]++;
                idx++;
            }
        }
    }
    rows->num_rows = rows->num_real_rows = idx;
}

/* Where slot `local` starts when the rows before it end at `end`. */
static uint64_t slot_start(const struct nep_ref_group *group, uint32_t local, uint64_t end)
{
    if (group->layout == NEP_LAYOUT_EXPERT_PADDED || group->layout == NEP_LAYOUT_EXPERT_FRONT) {
        return (uint64_t)local * group->num_ranks * group->max_tokens;
    }
    uint64_t align = group->expert_alignment > 1 ? group->expert_alignment : 1;
    return (end + align - 1) / align * align;
}

static void build_expert_layout(const struct nep_ref_group *group, uint32_t rank,
                                struct nep_ref_rows *rows, const uint64_t *bucket_begin)
{
    /* One pass in (source, token, k) order fills every slot's bucket in its final order. */
    uint64_t *cursor = calloc(group->slots_per_rank + 1, sizeof(*cursor));
    if (cursor == NULL) {
        rows->num_real_rows = 0;
        return;
    }
    for (uint32_t source = 0; source < group->num_ranks; source++) {
        for (uint32_t token = 0; token < group->num_tokens[source]; token++) {
            for (uint32_t k = 0; k < group->top_k; k++) {
                uint32_t slot = slot_of(group, source, token, k);
                if (slot == NEP_REF_NONE || slot / group->slots_per_rank != rank) {
                    continue;
                }
                uint32_t local = slot % group->slots_per_rank;
                rows->rows[bucket_begin[local] + cursor[local]++] =
                    (struct nep_ref_row){.source = source, .token = token, .k = k, .slot = local};
                rows->rows_per_source[source]++;
            }
        }
    }
    free(cursor);
    uint64_t end = 0;
    for (uint32_t local = 0; local < group->slots_per_rank; local++) {
        uint64_t start = slot_start(group, local, end);
        rows->first_row[local] = start;
        uint64_t in_source = 0;
        for (uint64_t i = 0; i < rows->rows_per_slot[local]; i++) {
            struct nep_ref_row *row = &rows->rows[bucket_begin[local] + i];
            row->idx = start + i;
            if (group->layout == NEP_LAYOUT_EXPERT_PADDED) {
                bool is_first = i == 0 || row[-1].source != row->source;
                in_source = is_first ? 0 : in_source + 1;
                row->idx = start + (uint64_t)row->source * group->max_tokens + in_source;
            }
        }
        end = start + rows->rows_per_slot[local];
    }
    rows->num_rows = slot_start(group, group->slots_per_rank, end);
}

bool nep_ref_rows_build(const struct nep_ref_group *group, uint32_t rank, struct nep_ref_rows *rows)
{
    memset(rows, 0, sizeof(*rows));
    rows->rows_per_slot = calloc(group->slots_per_rank, sizeof(uint32_t));
    rows->first_row = calloc((size_t)group->slots_per_rank + 1, sizeof(uint64_t));
    rows->rows_per_source = calloc(group->num_ranks, sizeof(uint32_t));
    uint64_t *bucket_begin = calloc((size_t)group->slots_per_rank + 1, sizeof(uint64_t));
    uint64_t pairs = 0;
    if (rows->rows_per_slot != NULL) {
        pairs = count_pairs(group, rank, rows->rows_per_slot);
    }
    rows->rows = calloc(pairs + 1, sizeof(*rows->rows));
    if (rows->rows_per_slot == NULL || rows->first_row == NULL || rows->rows_per_source == NULL ||
        bucket_begin == NULL || rows->rows == NULL) {
        free(bucket_begin);
        nep_ref_rows_free(rows);
        return false;
    }
    if (group->layout == NEP_LAYOUT_RANK) {
        build_rank_layout(group, rank, rows);
    } else {
        rows->num_real_rows = pairs;
        for (uint32_t local = 0; local < group->slots_per_rank; local++) {
            bucket_begin[local + 1] = bucket_begin[local] + rows->rows_per_slot[local];
        }
        build_expert_layout(group, rank, rows, bucket_begin);
    }
    free(bucket_begin);
    return true;
}

void nep_ref_rows_free(struct nep_ref_rows *rows)
{
    free(rows->rows);
    free(rows->rows_per_slot);
    free(rows->first_row);
    free(rows->rows_per_source);
    memset(rows, 0, sizeof(*rows));
}

void nep_ref_traffic_add(const struct nep_ref_group *group, uint32_t rank,
                         struct nep_ref_traffic *traffic)
{
    uint32_t home = group->node_of_rank[rank];
    for (uint32_t token = 0; token < group->num_tokens[rank]; token++) {
        uint32_t ranks[32];
        uint32_t nodes[32];
        uint32_t num_ranks = 0;
        uint32_t num_nodes = 0;
        for (uint32_t k = 0; k < group->top_k; k++) {
            uint32_t slot = slot_of(group, rank, token, k);
            if (slot == NEP_REF_NONE) {
                continue;
            }
            uint32_t dest = slot / group->slots_per_rank;
            if (traffic->pairs_per_rank != NULL) {
                traffic->pairs_per_rank[dest]++;
            }
            uint32_t node = group->node_of_rank[dest];
            if (node == home) {
                continue;
            }
            traffic->remote_pairs++;
            uint32_t i = 0;
            while (i < num_ranks && ranks[i] != dest) {
                i++;
            }
            if (i == num_ranks) {
                ranks[num_ranks++] = dest;
            }
            i = 0;
            while (i < num_nodes && nodes[i] != node) {
                i++;
            }
            if (i == num_nodes) {
                nodes[num_nodes++] = node;
            }
        }
        traffic->tokens++;
        traffic->tokens_local += num_nodes == 0;
        traffic->remote_nodes += num_nodes;
        traffic->remote_ranks += num_ranks;
    }
}
