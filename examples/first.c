/* SPDX-License-Identifier: Apache-2.0 */
/* Every rank sends 4 tokens to 2 of 8 experts each; an "expert" doubles; combine brings them home.
 */
#include <nearep.h>
#include <stdio.h>
#include <stdlib.h>

enum { TOKENS = 4, HIDDEN = 256, EXPERTS = 8, TOP_K = 2 };

static void check(enum nep_status status)
{
    if (status != NEP_OK) { /* one sentence: what failed, where, what to do */
        fprintf(stderr, "%s: %s\n", nep_status_name(status), nep_last_message());
        exit(1);
    }
}

int main(void)
{
    /* Rank, number of ranks and where they meet come from the launcher's environment. */
    struct nep_comm_params seat = {.size = sizeof(seat)};
    struct nep_comm *comm;
    check(nep_comm_create(&seat, &comm));
    struct nep_topology group = {.size = sizeof(group)};
    check(nep_comm_topology(comm, &group));

    struct nep_ep_params shape = {.size = sizeof(shape),
                                  .num_experts = EXPERTS,
                                  .top_k = TOP_K,
                                  .hidden = HIDDEN,
                                  .max_tokens = TOKENS,
                                  .dtype = NEP_DTYPE_FP32};
    struct nep_ep *ep;
    struct nep_handle *handle;
    check(nep_ep_create(comm, &shape, &ep));
    check(nep_handle_create(ep, &handle));

    /* Memory that the ranks of the node map: rows move once. Any other memory works, too. */
    uint64_t capacity = (uint64_t)group.num_ranks * TOKENS * TOP_K;
    void *tokens, *rows, *result;
    check(nep_buffer_alloc(ep, TOKENS * HIDDEN * sizeof(float), &tokens));
    check(nep_buffer_alloc(ep, capacity * HIDDEN * sizeof(float), &rows));
    check(nep_buffer_alloc(ep, TOKENS * HIDDEN * sizeof(float), &result));
    int32_t ids[TOKENS][TOP_K]; /* the router's choice: logical experts */
    float weights[TOKENS][TOP_K];
    for (int t = 0; t < TOKENS; t++) {
        for (int i = 0; i < HIDDEN; i++) {
            ((float *)tokens)[t * HIDDEN + i] = (float)(t + i);
        }
        for (int k = 0; k < TOP_K; k++) {
            ids[t][k] = (t + 3 * k) % EXPERTS;
            weights[t][k] = 1.0f / TOP_K;
        }
    }

    struct nep_tokens in = {.size = sizeof(in),
                            .num_tokens = TOKENS,
                            .x = tokens,
                            .topk_ids = ids,
                            .topk_weights = &weights[0][0]};
    struct nep_rows out = {.size = sizeof(out), .x = rows, .capacity = capacity};
    struct nep_counts counts = {.size = sizeof(counts)};
    check(nep_dispatch(ep, handle, &in, &out, NULL));
    check(nep_dispatch_counts(ep, handle, &counts));

    /* Rows lie by local expert, counts.rows_per_slot beside them: here is the grouped matmul. */
    for (uint64_t i = 0; i < counts.num_rows * HIDDEN; i++) {
        ((float *)rows)[i] *= 2;
    }

    struct nep_expert_rows outputs = {.size = sizeof(outputs), .y = rows};
    struct nep_tokens_out home = {.size = sizeof(home), .num_tokens = TOKENS, .y = result};
    check(nep_combine(ep, handle, &outputs, &home, NULL));

    int wrong = 0;
    for (int i = 0; i < TOKENS * HIDDEN; i++) {
        wrong += ((float *)result)[i] != 2 * ((float *)tokens)[i];
    }
    printf("rank %u of %u: %llu rows for its experts, %d of %d elements wrong\n", group.rank,
           group.num_ranks, (unsigned long long)counts.num_real_rows, wrong, TOKENS * HIDDEN);

    nep_buffer_free(ep, tokens);
    nep_buffer_free(ep, rows);
    nep_buffer_free(ep, result);
    nep_handle_destroy(handle);
    nep_ep_destroy(ep);
    nep_comm_destroy(comm);
    return wrong != 0;
}
