/* SPDX-License-Identifier: Apache-2.0 */
/* A state for each bracket that is open, instead of recursion: a file cannot exhaust the stack. */
#include "tools/json_check.h"

#include <ctype.h>
#include <string.h>

enum { MAX_DEPTH = 64 };

struct cursor {
    const char *text;
    size_t len;
    size_t at;
    const char *why;
};

static int peek(const struct cursor *in)
{
    return in->at < in->len ? (unsigned char)in->text[in->at] : -1;
}

static bool fail(struct cursor *in, const char *why)
{
    in->why = why;
    return false;
}

static void skip_space(struct cursor *in)
{
    while (in->at < in->len && strchr(" \t\r\n", in->text[in->at]) != NULL &&
           in->text[in->at] != '\0') {
        in->at++;
    }
}

static bool take_word(struct cursor *in, const char *word)
{
    size_t len = strlen(word);
    if (in->len - in->at < len || memcmp(in->text + in->at, word, len) != 0) {
        return fail(in, "a value");
    }
    in->at += len;
    return true;
}

static bool take_digits(struct cursor *in)
{
    size_t from = in->at;
    while (peek(in) >= '0' && peek(in) <= '9') {
        in->at++;
    }
    return in->at > from || fail(in, "a digit");
}

static bool take_number(struct cursor *in)
{
    in->at += peek(in) == '-';
    if (peek(in) == '0') {
        in->at++;
    } else if (!take_digits(in)) {
        return false;
    }
    if (peek(in) == '.') {
        in->at++;
        if (!take_digits(in)) {
            return false;
        }
    }
    if (peek(in) == 'e' || peek(in) == 'E') {
        in->at++;
        in->at += peek(in) == '+' || peek(in) == '-';
        return take_digits(in);
    }
    return true;
}

static bool take_escape(struct cursor *in)
{
    int c = peek(in);
    if (c > 0 && strchr("\"\\/bfnrt", c) != NULL) {
        in->at++;
        return true;
    }
    if (c != 'u') {
        return fail(in, "an escape");
    }
    in->at++;
    for (int i = 0; i < 4; i++, in->at++) {
        if (peek(in) < 0 || !isxdigit(peek(in))) {
            return fail(in, "four hexadecimal digits");
        }
    }
    return true;
}

static bool take_string(struct cursor *in)
{
    if (peek(in) != '"') {
        return fail(in, "a string");
    }
    in->at++;
    for (;;) {
        int c = peek(in);
        if (c < ' ') {
            return fail(in, c < 0 ? "the end of a string" : "no control character");
        }
        in->at++;
        if (c == '"') {
            return true;
        }
        if (c == '\\' && !take_escape(in)) {
            return false;
        }
    }
}

static bool take_name(struct cursor *in)
{
    skip_space(in);
    if (!take_string(in)) {
        return false;
    }
    skip_space(in);
    if (peek(in) != ':') {
        return fail(in, "a colon");
    }
    in->at++;
    return true;
}

static bool take_scalar(struct cursor *in)
{
    switch (peek(in)) {
    case '"':
        return take_string(in);
    case 't':
        return take_word(in, "true");
    case 'f':
        return take_word(in, "false");
    case 'n':
        return take_word(in, "null");
    default:
        return peek(in) == '-' || (peek(in) >= '0' && peek(in) <= '9') ? take_number(in)
                                                                       : fail(in, "a value");
    }
}

/* After a value: closes brackets as long as they close; true when a comma asks for another value
 * or all is closed. */
static bool close_brackets(struct cursor *in, char *open, size_t *depth_p)
{
    for (;;) {
        skip_space(in);
        if (*depth_p == 0) {
            return in->at == in->len || fail(in, "the end");
        }
        int c = peek(in);
        if (c == ',') {
            in->at++;
            return open[*depth_p - 1] != '{' || take_name(in);
        }
        if (c != (open[*depth_p - 1] == '{' ? '}' : ']')) {
            return fail(in, "a comma or a closing bracket");
        }
        in->at++;
        --*depth_p;
    }
}

static bool check(struct cursor *in)
{
    char open[MAX_DEPTH];
    size_t depth = 0;
    for (;;) {
        skip_space(in);
        int c = peek(in);
        if (c == '{' || c == '[') {
            if (depth == MAX_DEPTH) {
                return fail(in, "at most 64 brackets one in another");
            }
            open[depth++] = (char)c;
            in->at++;
            skip_space(in);
            if (peek(in) != (c == '{' ? '}' : ']')) {
                if (c == '{' && !take_name(in)) {
                    return false;
                }
                continue;
            }
        } else if (!take_scalar(in)) {
            return false;
        }
        if (!close_brackets(in, open, &depth)) {
            return false;
        }
        if (depth == 0) {
            return true;
        }
    }
}

bool json_check(const char *text, size_t len, size_t *at_p, const char **why_p)
{
    struct cursor in = {.text = text, .len = len, .why = ""};
    bool is_json = check(&in);
    *at_p = in.at;
    *why_p = in.why;
    return is_json;
}
