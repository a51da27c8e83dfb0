/* SPDX-License-Identifier: Apache-2.0 */
/* nep-perf itself has no MPI: --baseline mpi starts nep-perf-mpi. */
#include <stddef.h>

#include "perftest/perf.h"

int (*const nep_perf_run_mpi)(const struct nep_perf_options *options) = NULL;
