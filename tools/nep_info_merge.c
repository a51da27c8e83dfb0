/* SPDX-License-Identifier: Apache-2.0 */
/* --merge-traces: the result is made in memory and checked before anything is written. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "base/out_file.h"
#include "tools/json_check.h"
#include "tools/nep_info.h"
#include "tools/trace_merge.h"

static char *read_file(const char *path, size_t *len_p)
{
    FILE *file = fopen(path, "re");
    char *text = NULL;
    size_t len = 0, cap = 0, got;
    if (file == NULL) {
        info_error(INFO_UNUSABLE, "cannot read %s: %s", path, strerror(errno));
        return NULL;
    }
    do {
        cap = cap == 0 ? 1 << 16 : cap * 2;
        char *more = realloc(text, cap);
        if (more == NULL) {
            info_error(INFO_FAILED, "no memory for %s", path);
            free(text);
            fclose(file);
            return NULL;
        }
        text = more;
        got = fread(text + len, 1, cap - len, file);
        len += got;
    } while (len == cap);
    fclose(file);
    *len_p = len;
    return text;
}

struct merge {
    FILE *out;
    char *bytes;
    size_t len;
    uint8_t *has_rank;
    uint64_t num_ranks;
    uint64_t num_dumps;
    uint64_t error_ns;
    uint64_t age_ns;
    uint64_t lost;
};

static int add_dump(struct merge *merge, const char *path)
{
    struct trace_dump dump;
    char why[200];
    size_t len = 0;
    char *text = read_file(path, &len);
    if (text == NULL) {
        return INFO_UNUSABLE;
    }
    int status = INFO_FINE;
    if (!trace_dump_read(text, len, &dump, why, sizeof why)) {
        status = info_error(INFO_UNUSABLE, "%s %s", path, why);
    } else if (merge->num_ranks != 0 && dump.num_ranks != merge->num_ranks) {
        status =
            info_error(INFO_UNUSABLE, "%s is of a group of %" PRIu64 " ranks, others of %" PRIu64,
                       path, dump.num_ranks, merge->num_ranks);
    } else if (merge->has_rank[dump.rank]) {
        status =
            info_error(INFO_UNUSABLE, "%s is a second trace of rank %" PRIu64, path, dump.rank);
    } else {
        fputs(merge->num_dumps == 0 ? "" : ",\n", merge->out);
        fwrite(dump.events, 1, dump.events_len, merge->out);
        merge->has_rank[dump.rank] = 1;
        merge->num_ranks = dump.num_ranks;
        merge->num_dumps++;
        merge->lost += dump.events_lost;
        merge->error_ns =
            dump.clock_error_ns > merge->error_ns ? dump.clock_error_ns : merge->error_ns;
        merge->age_ns = dump.clock_age_ns > merge->age_ns ? dump.clock_age_ns : merge->age_ns;
    }
    free(text);
    return status;
}

static int write_merged(struct info *info, const struct merge *merge)
{
    size_t at;
    const char *expected;
    char head[300];
    int head_len =
        snprintf(head, sizeof head,
                 "{\"nearepMergedTrace\":1,\"numRanks\":%" PRIu64 ",\"numDumps\":%" PRIu64
                 ",\"clockErrorNs\":%" PRIu64 ",\"clockAgeNs\":%" PRIu64 ",\"eventsLost\":%" PRIu64
                 ",\"displayTimeUnit\":\"ns\",",
                 merge->num_ranks, merge->num_dumps, merge->error_ns, merge->age_ns, merge->lost);
    if (!json_check(merge->bytes, merge->len, &at, &expected)) {
        return info_error(INFO_UNUSABLE, "the traces do not join: at byte %zu %s is missing", at,
                          expected);
    }
    struct nep_out_file out;
    enum nep_status status = nep_out_file_open_arg(&out, info->merge_path);
    if (status == NEP_OK) {
        fwrite(head, 1, (size_t)head_len, out.file);
        fwrite(merge->bytes + 1, 1, merge->len - 1, out.file);
        status = nep_out_file_commit(&out);
    }
    if (status != NEP_OK) {
        return info_error(INFO_FAILED, "--merge-traces %s", nep_last_message());
    }
    fprintf(stderr,
            "%" PRIu64 " of %" PRIu64 " ranks joined; between clocks at most %" PRIu64
            " ns of error when they were compared, %" PRIu64 " ms before\n",
            merge->num_dumps, merge->num_ranks, 2 * merge->error_ns, merge->age_ns / 1000000);
    return INFO_FINE;
}

int info_merge_traces(struct info *info)
{
    struct merge merge = {.has_rank = calloc(TRACE_MAX_RANKS, 1)};
    int status = INFO_FINE;
    merge.out = open_memstream(&merge.bytes, &merge.len);
    if (merge.out == NULL || merge.has_rank == NULL) {
        status = info_error(INFO_FAILED, "no memory");
    } else {
        fprintf(merge.out, "{%s", TRACE_EVENTS);
    }
    for (uint32_t i = 0; status == INFO_FINE && i < info->num_files; i++) {
        status = add_dump(&merge, info->files[i]);
    }
    if (merge.out != NULL) {
        fputs(TRACE_TAIL, merge.out);
        fclose(merge.out);
    }
    if (status == INFO_FINE) {
        status = write_merged(info, &merge);
    }
    free(merge.bytes);
    free(merge.has_rank);
    return status;
}
