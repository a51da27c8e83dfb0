/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The counters of a communicator as Prometheus text. One table holds name, help and place of each
 * counter of an ep, so that a new one is a row here. Names follow Prometheus' conventions: the unit
 * is in the name, counters end in _total, seconds and bytes are the base units.
 *
 * Rejected: a server in the library. An engine has one already, and a library that listens is a
 * matter for its threat model.
 */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "dispatch/ep.h"

struct text {
    char *to;
    size_t cap;
    size_t len; /* that all of it needs, the end not counted */
};

static void put(struct text *text, const char *fmt, ...) NEP_PRINTF(2, 3);
static void put(struct text *text, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    size_t room = text->len < text->cap ? text->cap - text->len : 0;
    int len = vsnprintf(room != 0 ? text->to + text->len : NULL, room, fmt, args);
    va_end(args);
    text->len += len > 0 ? (size_t)len : 0;
}

static void put_family(struct text *text, const char *name, const char *type, const char *help)
{
    put(text, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

#define AT(field) offsetof(struct nep_stats, field)

static const struct {
    const char *name;
    const char *help;
    size_t offset;
    bool is_ns;
} counters[] = {
    {"nearep_dispatches_total", "Dispatches sent.", AT(dispatches), false},
    {"nearep_combines_total", "Combines sent.", AT(combines), false},
    {"nearep_tokens_total", "Tokens dispatched.", AT(tokens), false},
    {"nearep_local_tokens_total", "Of them, tokens whose experts are all on their node.",
     AT(tokens_local), false},
    {"nearep_remote_rows_total", "Rows sent to other nodes by dispatch.", AT(remote_rows), false},
    {"nearep_remote_rows_back_total", "Rows sent to other nodes by combine.", AT(remote_rows_back),
     false},
    {"nearep_wire_bytes_total", "Bytes sent to other nodes, headers included.", AT(wire_bytes),
     false},
    {"nearep_wire_messages_total", "Puts posted to other nodes.", AT(wire_messages), false},
    {"nearep_intra_bytes_total", "Payload bytes moved between ranks of the node.", AT(intra_bytes),
     false},
    {"nearep_duplicate_arrivals_total", "Arrivals seen twice and dropped.", AT(duplicates), false},
    {"nearep_stale_arrivals_total", "Arrivals of another operation or generation, dropped.",
     AT(stale), false},
    {"nearep_idle_seconds_total", "Time in waits without progress.", AT(wait_ns), true},
};

static void put_counter(struct text *text, const struct nep_comm *comm, size_t idx)
{
    put_family(text, counters[idx].name, "counter", counters[idx].help);
    for (const struct nep_ep *ep = comm->eps; ep != NULL; ep = ep->next) {
        struct nep_stats stats;
        if (nep_ep_stats(ep, &stats) != NEP_OK) {
            continue;
        }
        uint64_t value = *(const uint64_t *)((const char *)&stats + counters[idx].offset);
        put(text, "%s{rank=\"%u\",node=\"%u\",ep=\"%u\"} ", counters[idx].name, comm->world.rank,
            comm->world.node, ep->number);
        if (counters[idx].is_ns) {
            put(text, "%" PRIu64 ".%09" PRIu64 "\n", value / 1000000000, value % 1000000000);
        } else {
            put(text, "%" PRIu64 "\n", value);
        }
    }
}

static void put_wait(struct text *text, const struct nep_comm *comm, const struct nep_ep *ep,
                     const struct nep_wait_stat *wait, bool is_time)
{
    put(text, "%s{rank=\"%u\",node=\"%u\",ep=\"%u\",phase=\"%s\",peer=\"%u\"} ",
        is_time ? "nearep_wait_seconds_total" : "nearep_waits_total", comm->world.rank,
        comm->world.node, ep->number, wait->phase, wait->rank);
    if (is_time) {
        put(text, "%" PRIu64 ".%09" PRIu64 "\n", wait->wait_ns / 1000000000,
            wait->wait_ns % 1000000000);
    } else {
        put(text, "%" PRIu64 "\n", wait->num);
    }
}

/* One family of waits, for all eps: the same walk twice, since a family stands together. */
static enum nep_status put_waits(struct text *text, const struct nep_comm *comm, bool is_time)
{
    put_family(text, is_time ? "nearep_wait_seconds_total" : "nearep_waits_total", "counter",
               is_time ? "Time in which nothing moved, by what was missing and of which rank."
                       : "Waits that did not end at once, by what was missing and of which rank.");
    for (const struct nep_ep *ep = comm->eps; ep != NULL; ep = ep->next) {
        uint32_t num = 0;
        (void)nep_ep_waits(ep, NULL, 0, &num);
        struct nep_wait_stat *waits = calloc((size_t)num + 1, sizeof *waits);
        if (waits == NULL) {
            return nep_fail(NEP_ERR_NO_MEMORY, "no memory for %u rows of waits", num);
        }
        if (nep_ep_waits(ep, waits, num, &num) == NEP_OK) {
            for (uint32_t i = 0; i < num; i++) {
                put_wait(text, comm, ep, &waits[i], is_time);
            }
        }
        free(waits);
    }
    return NEP_OK;
}

static void put_group(struct text *text, const struct nep_comm *comm)
{
    uint32_t rank = comm->world.rank, node = comm->world.node;
    struct nep_fault fault;
    nep_comm_fault(comm, &fault);
    put_family(text, "nearep_info", "gauge", "The library, always 1.");
    put(text, "nearep_info{rank=\"%u\",node=\"%u\",version=\"%s\"} 1\n", rank, node,
        nep_version_string());
    put_family(text, "nearep_live_ranks", "gauge", "Ranks of the group that take part.");
    put(text, "nearep_live_ranks{rank=\"%u\",node=\"%u\"} %u\n", rank, node,
        comm->topology.num_ranks);
    put_family(text, "nearep_seats", "gauge", "Ranks that the group was made for.");
    put(text, "nearep_seats{rank=\"%u\",node=\"%u\"} %u\n", rank, node, comm->world.num_ranks);
    put_family(text, "nearep_generation", "gauge", "How often the group has changed.");
    put(text, "nearep_generation{rank=\"%u\",node=\"%u\"} %" PRIu64 "\n", rank, node,
        comm->generation);
    put_family(text, "nearep_broken", "gauge", "1 while the communicator is broken.");
    put(text, "nearep_broken{rank=\"%u\",node=\"%u\"} %d\n", rank, node, fault.status != NEP_OK);
}

enum nep_status nep_comm_metrics(const struct nep_comm *comm, char *to, size_t cap, size_t *len_p)
{
    if (comm == NULL || len_p == NULL || (to == NULL && cap != 0)) {
        return nep_fail(NEP_ERR_INVALID, "nep_comm_metrics: an argument is NULL");
    }
    struct text text = {.to = to, .cap = cap};
    put_group(&text, comm);
    for (size_t i = 0; i < sizeof counters / sizeof counters[0]; i++) {
        put_counter(&text, comm, i);
    }
    enum nep_status status = put_waits(&text, comm, true);
    if (status == NEP_OK) {
        status = put_waits(&text, comm, false);
    }
    if (status == NEP_OK) {
        *len_p = text.len;
        if (text.len >= cap) {
            return nep_fail(
                NEP_ERR_OVERFLOW,
                "nep_comm_metrics: the text has %zu bytes and a zero, there is room for "
                "%zu",
                text.len, cap);
        }
    }
    return status;
}
