/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any COUNTS, tables and riding rows included, from a neighbour or from another node: positions
 * that follow from them lie inside the outputs, or the sender is named and refused. Input: a byte
 * for the moment (fuzz_group.c) and, in its top bit, who lies: rank 1 or rank 2; then patches of
 * the right message.
 */
#include "dispatch/counts.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/fuzz_group.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    if (len == 0) {
        return 0;
    }
    struct fuzz_group *group = fuzz_group_at(data[0] & 127u);
    struct nep_ep *ep = fuzz_group_ep(group);
    uint64_t op = fuzz_group_handle(group)->op.number;
    uint32_t liar = (data[0] & 128u) != 0 ? 1 : 2;
    const struct nep_counts_msg *msg = nep_counts_find(ep, liar, op);
    PROMISE(msg != NULL);
    fuzz_group_patch((uint8_t *)(uintptr_t)msg, msg->bytes, data + 1, len - 1);
    fuzz_group_go_on(group);
    return 0;
}
