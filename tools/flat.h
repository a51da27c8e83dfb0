/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Flat (every rank a node of its own) or by node: the rule of docs/performance.md, one sentence for
 * every program that prints it.
 */
#ifndef NEP_TOOLS_FLAT_H
#define NEP_TOOLS_FLAT_H

#include <stdio.h>

/* So much more over the wire, per rank and iteration both ways, was what one hop less is worth. */
enum { FLAT_KIB = 700 };

static inline void flat_print(FILE *out, double more_kib)
{
    fprintf(
        out,
        "  Flat, every rank a node of its own (--ranks-per-node 1, NEP_NODE): %.1f KiB more, one "
        "hop\n  less. It was faster up to about %d KiB (docs/performance.md)%s.\n",
        more_kib, FLAT_KIB, more_kib <= FLAT_KIB ? ": try it" : "");
}

#endif
