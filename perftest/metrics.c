/* SPDX-License-Identifier: Apache-2.0 */
/* --metrics: what an engine would hand to Prometheus, written once, at the end. */
#include <stdlib.h>
#include <string.h>

#include "base/out_file.h"
#include "base/path.h"
#include "perftest/perf.h"
#include "perftest/rank.h"

static enum nep_status write_text(const struct nep_comm *comm, FILE *file)
{
    size_t len = 0;
    (void)nep_comm_metrics(comm, NULL, 0, &len);
    char *text = malloc(len + 1);
    enum nep_status status =
        text == NULL ? NEP_ERR_NO_MEMORY : nep_comm_metrics(comm, text, len + 1, &len);
    if (status == NEP_OK) {
        fwrite(text, 1, len, file);
    }
    free(text);
    return status;
}

int nep_perf_metrics(struct nep_perf_rank *rank)
{
    const char *path = rank->options.metrics;
    char name[512];
    struct nep_out_file out;
    /* Of rank 0 alone where all would write to one place. */
    if (path == NULL || (strstr(path, "%r") == NULL && rank->topology.rank != 0)) {
        return -1;
    }
    nep_path_expand(path, rank->topology.rank, name, sizeof name);
    if (nep_out_file_open_arg(&out, name) != NEP_OK) {
        nep_perf_error(NEP_PERF_FAILED, "--metrics %s", nep_last_message());
        return -1; /* the figures of the run are worth more */
    }
    enum nep_status status = write_text(rank->comm, out.file);
    if (status != NEP_OK) {
        nep_out_file_drop(&out);
    } else {
        status = nep_out_file_commit(&out);
    }
    return status == NEP_OK
               ? -1
               : nep_perf_error(NEP_PERF_FAILED, "--metrics %s: %s", path, nep_last_message());
}
