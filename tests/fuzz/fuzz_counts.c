/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any COUNTS, tables and riding rows included, from another node (neighbours share memory and are
 * believed): positions that follow from them lie inside the outputs, or the sender is named and
 * refused. Input: a byte for the moment (fuzz_group.c), then patches of rank 2's right message.
 */
#include "dispatch/counts.h"
#include "tests/fuzz/fuzz.h"
#include "tests/fuzz/fuzz_group.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    if (len == 0) {
        return 0;
    }
    struct fuzz_group *group = fuzz_group_at(data[0]);
    struct nep_ep *ep = fuzz_group_ep(group);
    uint64_t op = fuzz_group_handle(group)->op.number;
    const struct nep_counts_msg *msg = nep_counts_find(ep, 2, op);
    PROMISE(msg != NULL);
    fuzz_group_patch((uint8_t *)(uintptr_t)msg, msg->bytes, data + 1, len - 1);
    fuzz_group_go_on(group);
    return 0;
}
