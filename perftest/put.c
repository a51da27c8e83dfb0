/* SPDX-License-Identifier: Apache-2.0 */
/* The transport alone. */
#include "perftest/perf.h"

int nep_perf_put_main(int argc, char **argv)
{
    (void)argc;
    (void)argv;
    return nep_perf_error(NEP_PERF_USAGE, "put is not in this build");
}
