/* SPDX-License-Identifier: Apache-2.0 */
/* The shipped sample trace, open while a group of tests runs. */
#ifndef NEP_TESTS_UNIT_PLACEMENT_DEMO_H
#define NEP_TESTS_UNIT_PLACEMENT_DEMO_H

#include "placement/trace.h"

static struct nep_trace *trace;

static int open_demo(void **state)
{
    (void)state;
    return nep_trace_open("data/demo256.nept", &trace) != NEP_OK;
}

static int close_demo(void **state)
{
    (void)state;
    nep_trace_close(trace);
    return 0;
}

#endif
