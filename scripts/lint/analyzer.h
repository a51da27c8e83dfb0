/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Included before every file that the analyzer reads. It looks at one file at a time and would
 * otherwise take into account that nep_fail, whose body is elsewhere, returns NEP_OK, and that a
 * failure made common does.
 */
#ifndef NEP_LINT_ANALYZER_H
#define NEP_LINT_ANALYZER_H

#include "base/status.h"
#include "transport/bootstrap.h"

#define nep_fail(status, ...)        ((void)nep_fail(status, __VA_ARGS__), (status))
#define nep_fail_prefix(status, ...) ((void)nep_fail_prefix(status, __VA_ARGS__), (status))
#define nep_bootstrap_common(bootstrap, rank, num_ranks, mine, timeout_ns)                         \
    ((mine) != NEP_OK ? (mine) : nep_bootstrap_common(bootstrap, rank, num_ranks, mine, timeout_ns))

#endif
