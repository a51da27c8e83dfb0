/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The .nepmap file: text that a person can read, compare and mend. The reader trusts nothing:
 * memory grows with the bytes of the file, never with a number in it; every number is read with a
 * bound; the message names the line and what stands there. Lines may come in any order, the writer
 * sorts them, so that equal maps are equal files.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/out_file.h"
#include "base/status.h"
#include "placement/map.h"

#define MAX_FILE_BYTES (1ull << 30)

struct reader {
    const char *path;
    char *text;
    size_t bytes;
    const char *at;
    const char *end; /* of the file */
    uint32_t line;
    struct nep_map_shape shape;
    uint32_t *ranks_per_node;
    struct nep_map_entry *entries;
    size_t num_entries;
    size_t cap_entries;
};

static enum nep_status read_text(struct reader *r)
{
    int fd = open(r->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        return nep_fail(errno == ENOENT ? NEP_ERR_NOT_FOUND : NEP_ERR_IO, "%s: cannot open: %s",
                        r->path, strerror(errno));
    }
    struct stat info;
    enum nep_status status = NEP_OK;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        status = nep_fail(NEP_ERR_IO, "%s: not a regular file", r->path);
    } else if ((uint64_t)info.st_size > MAX_FILE_BYTES) {
        status = nep_fail(NEP_ERR_FORMAT, "%s: %lld bytes, more than any map (%llu)", r->path,
                          (long long)info.st_size, MAX_FILE_BYTES);
    } else if ((r->text = malloc((size_t)info.st_size + 1)) == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "%s: no memory for %lld bytes", r->path,
                          (long long)info.st_size);
    }
    while (status == NEP_OK && r->bytes < (size_t)info.st_size) {
        ssize_t got = read(fd, r->text + r->bytes, (size_t)info.st_size - r->bytes);
        if (got < 0 && errno != EINTR) {
            status = nep_fail(NEP_ERR_IO, "%s: cannot read: %s", r->path, strerror(errno));
        } else if (got == 0) {
            break;
        } else if (got > 0) {
            r->bytes += (size_t)got;
        }
    }
    close(fd);
    if (status == NEP_OK) {
        r->text[r->bytes] = '\0'; /* numbers stop here at the latest */
        r->at = r->text;
        r->end = r->text + r->bytes;
    }
    return status;
}

static int is_end_of_line(const struct reader *r)
{
    return r->at == r->end || *r->at == '\n';
}

static void skip_blanks(struct reader *r)
{
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\t' || *r->at == '\r')) {
        r->at++;
    }
}

/* Up to 20 characters of what stands at the cursor, printable, for messages. */
static const char *here(const struct reader *r, char *buffer /* [24] */)
{
    size_t n = 0;
    for (const char *p = r->at; p < r->end && *p != '\n' && n < 20; p++) {
        buffer[n++] = (*p >= ' ' && *p < 127) ? *p : '?';
    }
    buffer[n] = '\0';
    return n == 0 ? "the end of the line" : buffer;
}

static enum nep_status bad(const struct reader *r, const char *expected)
{
    char buffer[24];
    return nep_fail(NEP_ERR_FORMAT, "%s: line %u: expected %s, found \"%s\"", r->path, r->line,
                    expected, here(r, buffer));
}

/* An unsigned decimal of at most `most`. */
static enum nep_status number(struct reader *r, const char *what, uint32_t most, uint32_t *value_p)
{
    skip_blanks(r);
    uint64_t value = 0;
    const char *start = r->at;
    while (r->at < r->end && *r->at >= '0' && *r->at <= '9') {
        value = value * 10 + (uint64_t)(*r->at - '0');
        r->at++;
        if (value > most) {
            return nep_fail(NEP_ERR_FORMAT, "%s: line %u: %s is more than %u", r->path, r->line,
                            what, most);
        }
    }
    if (r->at == start) {
        return bad(r, what);
    }
    *value_p = (uint32_t)value;
    return NEP_OK;
}

static enum nep_status word(struct reader *r, const char *expected)
{
    skip_blanks(r);
    size_t len = strlen(expected);
    if ((size_t)(r->end - r->at) < len || memcmp(r->at, expected, len) != 0) {
        return bad(r, expected);
    }
    r->at += len;
    return NEP_OK;
}

static enum nep_status end_line(struct reader *r)
{
    skip_blanks(r);
    if (!is_end_of_line(r)) {
        return bad(r, "the end of the line");
    }
    if (r->at < r->end) {
        r->at++;
    }
    r->line++;
    return NEP_OK;
}

static enum nep_status named(struct reader *r, const char *name, uint32_t most, uint32_t *value_p)
{
    enum nep_status status = word(r, name);
    return status == NEP_OK ? number(r, name, most, value_p) : status;
}

static enum nep_status read_nodes(struct reader *r)
{
    enum nep_status status = named(r, "nodes", NEP_MAP_MAX_RANKS, &r->shape.num_nodes);
    if (status == NEP_OK) {
        status = word(r, "ranks_per_node");
    }
    if (status != NEP_OK) {
        return status;
    }
    r->ranks_per_node = calloc((size_t)r->shape.num_nodes + 1, sizeof *r->ranks_per_node);
    if (r->ranks_per_node == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "%s: no memory", r->path);
    }
    for (uint32_t n = 0; n < r->shape.num_nodes && status == NEP_OK; n++) {
        if (n > 0) {
            status = word(r, ",");
        }
        if (status == NEP_OK) {
            status = number(r, "ranks_per_node", NEP_MAP_MAX_RANKS, &r->ranks_per_node[n]);
        }
    }
    r->shape.ranks_per_node = r->ranks_per_node;
    return status;
}

static enum nep_status read_header(struct reader *r)
{
    uint32_t version;
    r->line = 1;
    enum nep_status status = word(r, "nepmap");
    if (status == NEP_OK) {
        status = number(r, "version", UINT32_MAX, &version);
    }
    if (status == NEP_OK && version != 1) {
        status = nep_fail(NEP_ERR_FORMAT, "%s: line 1: version %u of the map format, this reads 1",
                          r->path, version);
    }
    if (status == NEP_OK) {
        status = end_line(r);
    }
    if (status == NEP_OK) {
        status = named(r, "layers", NEP_MAP_MAX_LAYERS, &r->shape.num_layers);
    }
    if (status == NEP_OK) {
        status = named(r, "experts", NEP_MAP_MAX_EXPERTS, &r->shape.num_experts);
    }
    if (status == NEP_OK) {
        status = read_nodes(r);
    }
    if (status == NEP_OK) {
        status = named(r, "slots_per_rank", NEP_MAP_MAX_SLOTS, &r->shape.slots_per_rank);
    }
    if (status == NEP_OK && r->shape.slots_per_rank == 0) {
        status = nep_fail(NEP_ERR_FORMAT, "%s: line 2: slots_per_rank is 0", r->path);
    }
    if (status == NEP_OK) {
        status = nep_map_check_shape(&r->shape);
        if (status != NEP_OK) {
            nep_fail_prefix(NEP_ERR_FORMAT, "%s: line 2: ", r->path);
            return NEP_ERR_FORMAT;
        }
        status = end_line(r);
    }
    /* A layer and an expert need a line of at least "0 0 0:0\n". */
    if (status == NEP_OK &&
        (uint64_t)r->shape.num_layers * r->shape.num_experts > (r->bytes + 1) / 8) {
        status = nep_fail(NEP_ERR_FORMAT,
                          "%s: %zu bytes are too few for %u layers of %u experts: truncated",
                          r->path, r->bytes, r->shape.num_layers, r->shape.num_experts);
    }
    return status;
}

static enum nep_status add_entry(struct reader *r, const struct nep_map_entry *entry)
{
    if (r->num_entries == r->cap_entries) {
        size_t cap = r->cap_entries == 0 ? 1024 : r->cap_entries * 2;
        struct nep_map_entry *bigger = realloc(r->entries, cap * sizeof *bigger);
        if (bigger == NULL) {
            return nep_fail(NEP_ERR_NO_MEMORY, "%s: no memory for %zu copies", r->path, cap);
        }
        r->entries = bigger;
        r->cap_entries = cap;
    }
    r->entries[r->num_entries++] = *entry;
    return NEP_OK;
}

/* <rank>:<slot>[*<weight>] */
static enum nep_status read_copy(struct reader *r, uint32_t layer, uint32_t expert)
{
    uint32_t rank;
    uint32_t slot;
    uint32_t weight = 1;
    enum nep_status status = number(r, "rank", r->shape.num_ranks - 1, &rank);
    if (status == NEP_OK && (r->at == r->end || *r->at != ':')) {
        return bad(r, "\":\" after the rank");
    }
    if (status == NEP_OK) {
        r->at++;
        status = number(r, "slot", r->shape.slots_per_rank - 1, &slot);
    }
    if (status == NEP_OK && r->at < r->end && *r->at == '*') {
        r->at++;
        status = number(r, "weight", UINT16_MAX, &weight);
        if (status == NEP_OK && weight == 0) {
            status = nep_fail(NEP_ERR_FORMAT, "%s: line %u: weight 0, it is 1 to 65535", r->path,
                              r->line);
        }
    }
    if (status != NEP_OK) {
        return status;
    }
    struct nep_map_entry entry = {layer, expert, rank * r->shape.slots_per_rank + slot,
                                  (uint16_t)weight, r->line};
    return add_entry(r, &entry);
}

static enum nep_status read_line(struct reader *r, uint8_t *seen)
{
    uint32_t layer;
    uint32_t expert;
    enum nep_status status = number(r, "layer", r->shape.num_layers - 1, &layer);
    if (status == NEP_OK) {
        status = number(r, "expert", r->shape.num_experts - 1, &expert);
    }
    if (status != NEP_OK) {
        return status;
    }
    size_t pair = (size_t)layer * r->shape.num_experts + expert;
    if (seen[pair]) {
        return nep_fail(NEP_ERR_FORMAT, "%s: line %u: a second line for layer %u, expert %u",
                        r->path, r->line, layer, expert);
    }
    seen[pair] = 1;
    do {
        status = read_copy(r, layer, expert);
        skip_blanks(r);
    } while (status == NEP_OK && !is_end_of_line(r));
    return status == NEP_OK ? end_line(r) : status;
}

static enum nep_status read_body(struct reader *r)
{
    uint8_t *seen = calloc((size_t)r->shape.num_layers * r->shape.num_experts, 1);
    if (seen == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "%s: no memory", r->path);
    }
    enum nep_status status = NEP_OK;
    while (status == NEP_OK && r->at < r->end) {
        skip_blanks(r);
        status = is_end_of_line(r) ? end_line(r) : read_line(r, seen);
    }
    free(seen);
    return status;
}

enum nep_status nep_map_load(const char *path, struct nep_map **map_p)
{
    if (path == NULL || map_p == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_map_load: path or map_p is NULL");
    }
    struct reader r = {.path = path, .shape = {.size = sizeof r.shape}};
    enum nep_status status = read_text(&r);
    if (status == NEP_OK) {
        status = read_header(&r);
    }
    if (status == NEP_OK) {
        status = read_body(&r);
    }
    if (status == NEP_OK && nep_map_build(&r.shape, r.entries, r.num_entries, map_p) != NEP_OK) {
        status = nep_fail_prefix(NEP_ERR_FORMAT, "%s: ", path);
    }
    free(r.text);
    free(r.ranks_per_node);
    free(r.entries);
    return status;
}

static void write_layer(FILE *file, const struct nep_map *map, uint32_t layer)
{
    const uint32_t *begin = &map->begin[(size_t)layer * (map->shape.num_experts + 1)];
    uint32_t slots = map->shape.slots_per_rank;
    for (uint32_t expert = 0; expert < map->shape.num_experts; expert++) {
        fprintf(file, "%u %u", layer, expert);
        for (uint32_t c = begin[expert]; c < begin[expert + 1]; c++) {
            size_t at = map->first[layer] + c;
            fprintf(file, " %u:%u", map->slot[at] / slots, map->slot[at] % slots);
            if (map->weight[at] != 1) {
                fprintf(file, "*%u", map->weight[at]);
            }
        }
        fputc('\n', file);
    }
}

static void write_all(FILE *file, const struct nep_map *map)
{
    const struct nep_map_shape *shape = &map->shape;
    fprintf(file, "nepmap 1\nlayers %u experts %u nodes %u ranks_per_node ", shape->num_layers,
            shape->num_experts, shape->num_nodes);
    for (uint32_t n = 0; n < shape->num_nodes; n++) {
        fprintf(file, "%s%u", n == 0 ? "" : ",", shape->ranks_per_node[n]);
    }
    fprintf(file, " slots_per_rank %u\n", shape->slots_per_rank);
    for (uint32_t layer = 0; layer < shape->num_layers; layer++) {
        write_layer(file, map, layer);
    }
}

enum nep_status nep_map_save(const struct nep_map *map, const char *path)
{
    if (map == NULL || path == NULL) {
        return nep_fail(NEP_ERR_INVALID, "nep_map_save: map or path is NULL");
    }
    struct nep_out_file out;
    enum nep_status status = nep_out_file_open(&out, path);
    if (status != NEP_OK) {
        return status;
    }
    write_all(out.file, map);
    return nep_out_file_commit(&out);
}
