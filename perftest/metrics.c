/* SPDX-License-Identifier: Apache-2.0 */
/* --metrics: what an engine would hand to Prometheus, written once, at the end. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/path.h"
#include "perftest/perf.h"
#include "perftest/rank.h"

/* Of rank 0 alone where all would write to one place. */
static FILE *open_file(const struct nep_perf_rank *rank, const char *path)
{
    char name[512];
    if (strstr(path, "%r") == NULL && rank->topology.rank != 0) {
        return NULL;
    }
    nep_path_expand(path, rank->topology.rank, name, sizeof name);
    FILE *file = strcmp(path, "-") == 0 ? stdout : fopen(name, "we");
    if (file == NULL) {
        nep_perf_error(NEP_PERF_FAILED, "cannot write %s: %s", name, strerror(errno));
    }
    return file;
}

int nep_perf_metrics(struct nep_perf_rank *rank)
{
    const char *path = rank->options.metrics;
    FILE *file = path != NULL ? open_file(rank, path) : NULL;
    if (file == NULL) {
        return -1; /* nothing to do, or said: the figures of the run are worth more */
    }
    size_t len = 0;
    (void)nep_comm_metrics(rank->comm, NULL, 0, &len);
    char *text = malloc(len + 1);
    enum nep_status status =
        text == NULL ? NEP_ERR_NO_MEMORY : nep_comm_metrics(rank->comm, text, len + 1, &len);
    if (status == NEP_OK) {
        fwrite(text, 1, len, file);
    }
    bool is_written = fflush(file) == 0 && ferror(file) == 0;
    if (file != stdout) {
        is_written = fclose(file) == 0 && is_written;
    }
    free(text);
    return status == NEP_OK && is_written
               ? -1
               : nep_perf_error(NEP_PERF_FAILED, "the counters could not be written to %s", path);
}
