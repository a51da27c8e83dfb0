/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The trace as JSON that chrome://tracing and Perfetto read: one event a line, so that the dumps of
 * many ranks are merged by putting their lines together (nep-info --merge-traces). Times are of
 * rank 0's clock already; a rank is a process of the trace, and each ep has four rows: calls,
 * waits, posts, arrivals. An arrow leads from each post to its arrival, across ranks.
 *
 * A post and an arrival are moments; they are drawn WIDTH_NS wide, because arrows need something to
 * hold on to.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/out_file.h"
#include "base/path.h"
#include "dispatch/ep.h"
#include "dispatch/events.h"

enum { NEP_MAX_EPS = 64 }; /* bits of the immediate */
enum { WIDTH_NS = 200, ROWS_PER_EP = 4, ROW_CALLS = 0, ROW_WAITS, ROW_POSTS, ROW_ARRIVALS };

struct dump {
    FILE *file;
    const struct nep_comm *comm;
    struct nep_tick_pair now;
    struct nep_event_copy *events; /* by time */
    uint32_t num;
    uint64_t lost;
    uint64_t eps; /* bit i: ep i has events */
    uint8_t depth[NEP_MAX_EPS];
};

/* ---- collecting ----------------------------------------------------------------------------- */

static int compare(const void *a, const void *b)
{
    uint64_t left = ((const struct nep_event_copy *)a)->ticks;
    uint64_t right = ((const struct nep_event_copy *)b)->ticks;
    return left < right ? -1 : left > right;
}

static enum nep_status collect(struct nep_comm *comm, struct dump *dump)
{
    uint64_t cap = comm->events->num + (uint64_t)NEP_MAX_EPS * NEP_ARRIVALS;
    dump->events = calloc(cap, sizeof *dump->events);
    if (dump->events == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory for the %llu events of a trace",
                        (unsigned long long)cap);
    }
    dump->num = nep_events_read(comm->events, dump->events, comm->events->num, &dump->lost);
    pthread_mutex_lock(&comm->lock); /* an ep whose region is read must stay */
    for (const struct nep_ep *ep = comm->eps; ep != NULL; ep = ep->next) {
        uint32_t room = cap - dump->num > NEP_ARRIVALS ? NEP_ARRIVALS : (uint32_t)cap - dump->num;
        uint32_t num = ep->is_traced ? nep_events_read(nep_ep_arrivals(ep),
                                                       dump->events + dump->num, room, &dump->lost)
                                     : 0;
        for (uint32_t i = 0; i < num; i++, dump->num++) {
            struct nep_event_copy *event = &dump->events[dump->num];
            event->peer = nep_comm_name(comm, event->peer);
        }
    }
    pthread_mutex_unlock(&comm->lock);
    dump->now = nep_tick_pair_now();
    qsort(dump->events, dump->num, sizeof *dump->events, compare);
    for (uint32_t i = 0; i < dump->num; i++) {
        dump->eps |= 1ull << dump->events[i].ep % NEP_MAX_EPS;
    }
    return NEP_OK;
}

/* ---- writing -------------------------------------------------------------------------------- */

static void put_text(FILE *file, const char *text)
{
    fputc('"', file);
    for (; *text != '\0'; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\') {
            fprintf(file, "\\%c", c);
        } else if (c < ' ' || c >= 127) {
            fprintf(file, "\\u%04x", c);
        } else {
            fputc(c, file);
        }
    }
    fputc('"', file);
}

/* Microseconds on rank 0's clock, to the nanosecond, without a double's rounding. */
static void put_time(const struct dump *dump, uint64_t ticks, uint64_t before_ns)
{
    uint64_t ns = nep_ticks_to_ns(ticks, &dump->comm->started, &dump->now) - before_ns -
                  (uint64_t)dump->comm->clock.ahead_ns;
    fprintf(dump->file, "%" PRIu64 ".%03u", ns / 1000, (unsigned)(ns % 1000));
}

/* Begins the line of an event: everything but its arguments. name is JSON already. */
static void open_line(const struct dump *dump, const struct nep_event_copy *event, const char *kind,
                      uint32_t row, uint64_t before_ns)
{
    fprintf(dump->file, ",\n{\"ph\":\"%s\",\"pid\":%u,\"tid\":%u,\"ts\":", kind,
            dump->comm->world.rank, event->ep * ROWS_PER_EP + row);
    put_time(dump, event->ticks, before_ns);
}

static const char *imm_name(uint32_t imm)
{
    static const char *const names[8] = {"COUNTS",          "dispatch tile",  "combine tile",
                                         "dispatch credit", "combine credit", "LEAVE",
                                         "unknown",         "unknown"};
    return names[nep_imm_kind(imm)];
}

/* Equal for a post and its arrival alone, as far as a viewer needs: below 2^53. */
static uint64_t arrow(uint32_t src, uint32_t dst, uint64_t op, uint32_t imm)
{
    uint64_t parts[] = {src, dst, op, imm};
    uint64_t hash = 14695981039346656037ull;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        hash = (hash ^ parts[i]) * 1099511628211ull;
        hash ^= hash >> 29;
    }
    return hash >> 12;
}

static void put_message(const struct dump *dump, const struct nep_event_copy *event)
{
    uint32_t rank = dump->comm->world.rank;
    bool is_post = event->kind == NEP_EVENT_POST;
    uint32_t imm = (uint32_t)(event->value >> 32);
    uint32_t row = is_post ? ROW_POSTS : ROW_ARRIVALS;
    uint64_t id = is_post ? arrow(rank, event->peer, event->op, imm)
                          : arrow(event->peer, rank, event->op, imm);
    open_line(dump, event, "X", row, 0);
    fprintf(dump->file, ",\"dur\":0.%03u,\"name\":\"%s %s %u\",\"args\":{\"op\":%" PRIu64, WIDTH_NS,
            imm_name(imm), is_post ? "to" : "from", event->peer, event->op);
    fprintf(dump->file, ",\"number\":%u,\"imm\":%u", nep_imm_number(imm), imm);
    if (is_post) {
        fprintf(dump->file, ",\"bytes\":%u", (uint32_t)event->value);
    }
    fputs("}}", dump->file);
    open_line(dump, event, is_post ? "s" : "f", row, 0);
    fprintf(dump->file, ",\"bp\":\"e\",\"cat\":\"wire\",\"name\":\"put\",\"id\":%" PRIu64 "}", id);
}

static void put_call(struct dump *dump, const struct nep_event_copy *event)
{
    static const char *const names[NEP_NUM_CALLS] = {"dispatch send", "wait for COUNTS",
                                                     "dispatch rows", "combine send", "combine"};
    uint8_t *depth = &dump->depth[event->ep % NEP_MAX_EPS];
    uint32_t call = (uint32_t)event->value % NEP_NUM_CALLS;
    if (event->kind == NEP_EVENT_BEGIN) {
        ++*depth;
        open_line(dump, event, "B", ROW_CALLS, 0);
        fprintf(dump->file, ",\"name\":\"%s\",\"args\":{\"op\":%" PRIu64 "}}", names[call],
                event->op);
        return;
    }
    if (*depth == 0) {
        return; /* its beginning is no longer in the ring */
    }
    --*depth;
    open_line(dump, event, "E", ROW_CALLS, 0);
    fprintf(dump->file, ",\"args\":{\"status\":\"%s\"}}",
            nep_status_name((enum nep_status)(int32_t)(event->value >> 32)));
}

static void put_wait(const struct dump *dump, const struct nep_event_copy *event)
{
    const char *phase = (const char *)(uintptr_t)event->value; /* a literal of this library */
    uint64_t us = event->op >> 32;
    open_line(dump, event, "X", ROW_WAITS, us * 1000);
    fprintf(dump->file, ",\"dur\":%" PRIu64 ",\"name\":\"%s of %u\",\"args\":{\"op\":%u}}", us,
            phase, event->peer, (uint32_t)event->op);
}

static void put_fault(const struct dump *dump, const struct nep_event_copy *event,
                      const struct nep_fault *fault)
{
    open_line(dump, event, "i", ROW_CALLS, 0);
    fprintf(dump->file, ",\"s\":\"p\",\"name\":\"fault\",\"args\":{\"status\":\"%s\",\"rank\":%d",
            nep_status_name((enum nep_status)(int32_t)event->value),
            event->peer == UINT16_MAX ? -1 : (int)event->peer);
    fputs(",\"message\":", dump->file);
    put_text(dump->file, fault->message);
    fputs("}}", dump->file);
}

/* The first line: whose dump this is; then the names of its rows. */
static void put_head(const struct dump *dump)
{
    static const char *const rows[ROWS_PER_EP] = {"calls", "waits", "posts", "arrivals"};
    const struct nep_comm *comm = dump->comm;
    const struct nep_topology *topology = &comm->world;
    char host[65] = "";
    gethostname(host, sizeof host - 1);
    fprintf(dump->file, "{\"nearepTrace\":1,\"version\":\"%s\",\"rank\":%u,\"numRanks\":%u,",
            nep_version_string(), topology->rank, topology->num_ranks);
    fprintf(dump->file, "\"node\":%u,\"process\":%ld,\"host\":", topology->node, (long)getpid());
    put_text(dump->file, host);
    fprintf(dump->file,
            ",\"clockOf\":\"rank %u\",\"clockErrorNs\":%" PRIu64 ",\"clockAgeNs\":%" PRIu64,
            comm->members[0], comm->clock.error_ns + comm->started.error_ns + dump->now.error_ns,
            dump->now.ns - comm->clock.measured_ns);
    fprintf(dump->file, ",\"eventsLost\":%" PRIu64 ",\"displayTimeUnit\":\"ns\"", dump->lost);
    fprintf(dump->file,
            ",\"traceEvents\":[\n{\"ph\":\"M\",\"pid\":%u,\"name\":\"process_name\",\"args\":"
            "{\"name\":\"rank %u, node %u\"}},\n{\"ph\":\"M\",\"pid\":%u,\"name\":"
            "\"process_sort_index\",\"args\":{\"sort_index\":%u}}",
            topology->rank, topology->rank, topology->node, topology->rank, topology->rank);
    for (uint32_t ep = 0; ep < NEP_MAX_EPS; ep++) {
        for (uint32_t row = 0; (dump->eps >> ep & 1) != 0 && row < ROWS_PER_EP; row++) {
            fprintf(dump->file,
                    ",\n{\"ph\":\"M\",\"pid\":%u,\"tid\":%u,\"name\":\"thread_name\",\"args\":"
                    "{\"name\":\"ep %u %s\"}}",
                    topology->rank, ep * ROWS_PER_EP + row, ep, rows[row]);
        }
    }
}

static void put_all(struct dump *dump)
{
    struct nep_fault fault;
    nep_comm_fault(dump->comm, &fault);
    put_head(dump);
    for (uint32_t i = 0; i < dump->num; i++) {
        const struct nep_event_copy *event = &dump->events[i];
        switch (event->kind) {
        case NEP_EVENT_POST:
        case NEP_EVENT_ARRIVAL:
            put_message(dump, event);
            break;
        case NEP_EVENT_BEGIN:
        case NEP_EVENT_END:
            put_call(dump, event);
            break;
        case NEP_EVENT_WAIT:
            put_wait(dump, event);
            break;
        case NEP_EVENT_FAULT:
            put_fault(dump, event, &fault);
            break;
        default:
            break;
        }
    }
    fputs("\n]}\n", dump->file);
}

/* ---- the file ------------------------------------------------------------------------------- */

enum nep_status nep_events_dump(struct nep_comm *comm, const char *path)
{
    struct dump dump = {.comm = comm};
    char name[512];
    struct nep_out_file out;
    nep_path_expand(path, comm->world.rank, name, sizeof name);
    enum nep_status status = collect(comm, &dump);
    if (status != NEP_OK) {
        return status;
    }
    status = nep_out_file_open(&out, name);
    if (status == NEP_OK) {
        dump.file = out.file;
        put_all(&dump);
        status = nep_out_file_commit(&out);
    }
    free(dump.events);
    return status == NEP_OK ? NEP_OK : nep_fail_prefix(status, "the trace of the wire: ");
}

void nep_events_dump_configured(struct nep_comm *comm)
{
    char path[300];
    const char *pattern = comm->config.trace;
    if (pattern[0] == '\0' || comm->events == NULL || comm->events->num == 0) {
        return;
    }
    snprintf(path, sizeof path, strstr(pattern, "%r") != NULL ? "%s" : "%s.%%r", pattern);
    if (nep_events_dump(comm, path) != NEP_OK) {
        nep_warn("NEP_TRACE: %s", nep_last_message());
    }
}

enum nep_status nep_comm_dump_events(struct nep_comm *comm, const char *path)
{
    if (comm == NULL || path == NULL || path[0] == '\0') {
        return nep_fail(NEP_ERR_INVALID, "nep_comm_dump_events: an argument is NULL or empty");
    }
    if (comm->pid != getpid()) {
        return nep_fail(NEP_ERR_BROKEN, "nep_comm_dump_events: this communicator was made before "
                                        "fork(): its parent can write the trace");
    }
    if (comm->events->num == 0) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "nep_comm_dump_events: no events are kept (NEP_TRACE_EVENTS=0)");
    }
    return nep_events_dump(comm, path);
}
