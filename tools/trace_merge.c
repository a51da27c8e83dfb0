/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A dump is one event a line between a head and a tail that are fixed, so joining needs no tree of
 * JSON. But the bytes come from files: all of a dump is checked to be JSON, and so is the result,
 * before anything is written.
 */
#include "tools/trace_merge.h"

#include <stdio.h>
#include <string.h>

#include "tools/json_check.h"

static const char HEAD[] = "{\"nearepTrace\":1,";
static const char EVENTS[] = TRACE_EVENTS;
static const char TAIL[] = TRACE_TAIL;

static const char *find(const char *text, size_t len, const char *what)
{
    return memmem(text, len, what, strlen(what));
}

/* A number of the head, which has no nested objects. */
static bool read_field(const char *text, size_t len, const char *name, uint64_t *value_p)
{
    const char *at = find(text, len, name);
    uint64_t value = 0;
    size_t digits = 0;
    if (at == NULL) {
        return false;
    }
    for (at += strlen(name); at < text + len && *at >= '0' && *at <= '9' && digits < 19; at++) {
        value = value * 10 + (uint64_t)(*at - '0');
        digits++;
    }
    *value_p = value;
    return digits > 0;
}

bool trace_dump_read(const char *text, size_t len, struct trace_dump *dump, char *why, size_t cap)
{
    size_t at;
    const char *expected;
    if (!json_check(text, len, &at, &expected)) {
        snprintf(why, cap, "is not JSON: at byte %zu %s is missing", at, expected);
        return false;
    }
    size_t head = len < sizeof HEAD - 1 ? 0 : sizeof HEAD - 1;
    const char *events = find(text, len, EVENTS);
    size_t tail = sizeof TAIL - 1;
    if (head == 0 || memcmp(text, HEAD, head) != 0 || events == NULL || len < tail ||
        memcmp(text + len - tail, TAIL, tail) != 0 ||
        events + sizeof EVENTS - 1 > text + len - tail) {
        snprintf(why, cap, "is no trace of one rank as nearep writes it");
        return false;
    }
    size_t head_len = (size_t)(events - text);
    if (!read_field(text, head_len, "\"rank\":", &dump->rank) ||
        !read_field(text, head_len, "\"numRanks\":", &dump->num_ranks) ||
        !read_field(text, head_len, "\"clockErrorNs\":", &dump->clock_error_ns) ||
        !read_field(text, head_len, "\"clockAgeNs\":", &dump->clock_age_ns) ||
        !read_field(text, head_len, "\"eventsLost\":", &dump->events_lost) ||
        dump->num_ranks > TRACE_MAX_RANKS || dump->rank >= dump->num_ranks) {
        snprintf(why, cap, "has no rank, or an impossible one, in its head");
        return false;
    }
    dump->events = events + sizeof EVENTS - 1;
    dump->events_len = (size_t)(text + len - tail - dump->events);
    return true;
}
