/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The transports' contract over real verbs; run in the guest of nep-vm, with the variables of the
 * environment. Arguments: ranks of each node. Exit status 0: kept.
 */
#include <stdio.h>
#include <stdlib.h>

#include "tests/multi/conformance.h"

int main(int argc, char **argv)
{
    uint32_t ranks_per_node[8] = {0};
    uint32_t num_nodes = 0;
    for (int i = 1; i < argc && num_nodes < 8; i++) {
        ranks_per_node[num_nodes++] = (uint32_t)atoi(argv[i]);
    }
    struct conformance test = {
        .name = "verbs", .seed = ranks_seed("verbs"), .num_rounds = 6, .slot_bytes = 6 * 300000};
    struct ranks_params params = {
        .ranks_per_node = ranks_per_node, .num_nodes = num_nodes, .seconds = 120};
    int failed = num_nodes == 0 ? 1 : ranks_run(&params, conformance_body, &test);
    printf("%d ranks failed\n", failed);
    return failed != 0;
}
