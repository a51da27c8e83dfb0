/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of nep-perf share. Every subcommand is `int nep_perf_<name>_main(argc, argv)`. */
#ifndef NEP_PERFTEST_PERF_H
#define NEP_PERFTEST_PERF_H

#include <stdbool.h>
#include <stdint.h>

/* Exit statuses, see docs: done and right; failed or found wrong; unusable arguments. */
enum { NEP_PERF_OK = 0, NEP_PERF_FAILED = 1, NEP_PERF_USAGE = 2 };

int nep_perf_ep_main(int argc, char **argv);
int nep_perf_put_main(int argc, char **argv);

/* One line on standard error: "nep-perf: ..."; returns status. */
int nep_perf_error(int status, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Set by the binary that is linked with MPI: runs ep inside the MPI job. NULL in nep-perf. */
struct nep_perf_options;
extern int (*const nep_perf_run_mpi)(const struct nep_perf_options *options);

#endif
