/* SPDX-License-Identifier: Apache-2.0 */
/* Rejected: a JSON library for output alone; what is read from elsewhere is another matter. */
#include "tools/json_out.h"

#include <math.h>

static void put_string(FILE *file, const char *text)
{
    fputc('"', file);
    for (; *text != '\0'; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\') {
            fprintf(file, "\\%c", c);
        } else if (c < ' ') {
            fprintf(file, "\\u%04x", c);
        } else {
            fputc(c, file);
        }
    }
    fputc('"', file);
}

/* False when nothing is to be written. */
static bool begin(struct json_out *json, const char *name)
{
    if (json->file == NULL) {
        return false;
    }
    if (json->needs_comma) {
        fputs(", ", json->file);
    }
    if (name != NULL) {
        put_string(json->file, name);
        fputs(": ", json->file);
    }
    json->needs_comma = true;
    return true;
}

void json_open(struct json_out *json, const char *name, char bracket)
{
    if (begin(json, name)) {
        fputc(bracket, json->file);
        json->needs_comma = false;
    }
}

void json_close(struct json_out *json, char bracket)
{
    if (json->file != NULL) {
        fputc(bracket, json->file);
        json->needs_comma = true;
    }
}

void json_text(struct json_out *json, const char *name, const char *text)
{
    if (begin(json, name)) {
        put_string(json->file, text);
    }
}

void json_u64(struct json_out *json, const char *name, uint64_t number)
{
    if (begin(json, name)) {
        fprintf(json->file, "%llu", (unsigned long long)number);
    }
}

void json_double(struct json_out *json, const char *name, double number)
{
    if (!isfinite(number)) {
        json_null(json, name);
    } else if (begin(json, name)) {
        fprintf(json->file, "%.6g", number);
    }
}

void json_bool(struct json_out *json, const char *name, bool value)
{
    if (begin(json, name)) {
        fputs(value ? "true" : "false", json->file);
    }
}

void json_null(struct json_out *json, const char *name)
{
    if (begin(json, name)) {
        fputs("null", json->file);
    }
}
