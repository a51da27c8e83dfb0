/* SPDX-License-Identifier: Apache-2.0 */
/* Any bytes as a trace of the wire: refused with a sentence, or its events make JSON again when
 * they are joined. */
#include "tests/fuzz/fuzz.h"
#include "tools/json_check.h"
#include "tools/trace_merge.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct trace_dump dump;
    char why[200] = "";
    size_t at;
    const char *expected;
    bool is_json = json_check((const char *)data, len, &at, &expected);
    PROMISE(at <= len && (is_json || expected[0] != '\0'));
    if (!trace_dump_read((const char *)data, len, &dump, why, sizeof why)) {
        PROMISE(why[0] != '\0');
        return 0;
    }
    PROMISE(is_json && dump.rank < dump.num_ranks && dump.num_ranks <= TRACE_MAX_RANKS);
    PROMISE((const uint8_t *)dump.events >= data && dump.events_len <= len);
    return 0;
}
