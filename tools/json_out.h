/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One JSON object to a stream, as it is known: no tree in memory, no commas to think of. A NULL
 * stream writes nothing, so that a tool says everything twice without asking each time.
 */
#ifndef NEP_TOOLS_JSON_OUT_H
#define NEP_TOOLS_JSON_OUT_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

struct json_out {
    FILE *file; /* NULL: nothing is written */
    bool needs_comma;
};

/* name is NULL inside an array and for the outermost object. */
void json_open(struct json_out *json, const char *name, char bracket);
void json_close(struct json_out *json, char bracket);
void json_text(struct json_out *json, const char *name, const char *text);
void json_u64(struct json_out *json, const char *name, uint64_t number);
/* 6 significant digits; not finite: null. */
void json_double(struct json_out *json, const char *name, double number);
void json_bool(struct json_out *json, const char *name, bool value);
void json_null(struct json_out *json, const char *name);

#endif
