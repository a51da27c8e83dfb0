/* SPDX-License-Identifier: Apache-2.0 */
/* Reads the traces that ranks have written (dispatch/events_dump.c), to be joined. */
#ifndef NEP_TOOLS_TRACE_MERGE_H
#define NEP_TOOLS_TRACE_MERGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Before the events and behind them. */
#define TRACE_EVENTS "\"traceEvents\":[\n"
#define TRACE_TAIL   "\n]}\n"
enum { TRACE_MAX_RANKS = 65536 };

/* What one dump says of itself, and where its events lie in it. */
struct trace_dump {
    uint64_t rank;
    uint64_t num_ranks;
    uint64_t clock_error_ns;
    uint64_t clock_age_ns;
    uint64_t events_lost;
    const char *events;
    size_t events_len;
};

/* Reads a dump; it must be JSON as a whole. False: why says what is wrong, in one sentence. */
bool trace_dump_read(const char *text, size_t len, struct trace_dump *dump, char *why, size_t cap);

#endif
