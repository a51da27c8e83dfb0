/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Numbers with units, as people write them. Rejected: strtod, which reads "1,5s" under some locales
 * and "0x10" or "nan" under all; a value that nobody meant must be refused, not guessed. For the
 * same reason a bare number is no time: "10" has been meant as seconds and as milliseconds.
 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "base/clock.h"
#include "base/config.h"

struct unit {
    const char *name;
    uint64_t scale;
};

static const struct unit time_units[] = {
    {"ns", 1},         {"us", 1000},        {"ms", NEP_MS},      {"s", NEP_S},
    {"m", 60 * NEP_S}, {"min", 60 * NEP_S}, {"h", 3600 * NEP_S},
};

static const struct unit byte_units[] = {
    {"", 1},
    {"b", 1},
    {"k", 1ull << 10},
    {"kb", 1ull << 10},
    {"kib", 1ull << 10},
    {"m", 1ull << 20},
    {"mb", 1ull << 20},
    {"mib", 1ull << 20},
    {"g", 1ull << 30},
    {"gb", 1ull << 30},
    {"gib", 1ull << 30},
    {"t", 1ull << 40},
    {"tb", 1ull << 40},
    {"tib", 1ull << 40},
};

static const struct unit *find_unit(const struct unit *units, size_t num_units, const char *text)
{
    for (size_t i = 0; i < num_units; i++) {
        if (strcasecmp(units[i].name, text) == 0) {
            return &units[i];
        }
    }
    return NULL;
}

/* digits[.digits] with at most 9 digits after the point, as whole * 10^9 + fraction; false when it
 * is no number or too large. *end_p: what follows. */
static bool read_decimal(const char *text, uint64_t *whole_p, uint64_t *nano_p, const char **end_p)
{
    uint64_t whole = 0, nano = 0, place = 100000000;
    const char *at = text;
    if (!isdigit((unsigned char)*at)) {
        return false;
    }
    for (; isdigit((unsigned char)*at); at++) {
        if (__builtin_mul_overflow(whole, 10, &whole) ||
            __builtin_add_overflow(whole, (uint64_t)(*at - '0'), &whole)) {
            return false;
        }
    }
    if (*at == '.') {
        at++;
        if (!isdigit((unsigned char)*at)) {
            return false;
        }
        for (; isdigit((unsigned char)*at); at++) {
            if (place == 0) {
                return false;
            }
            nano += place * (uint64_t)(*at - '0');
            place /= 10;
        }
    }
    *whole_p = whole;
    *nano_p = nano;
    *end_p = at;
    return true;
}

/* whole.nano * scale; false when it does not fit or is not a whole number of the smallest unit. */
static bool scaled(uint64_t whole, uint64_t nano, uint64_t scale, uint64_t *out_p)
{
    uint64_t part;
    unsigned __int128 fraction = (unsigned __int128)nano * scale;
    if (fraction % NEP_S != 0 || __builtin_mul_overflow(whole, scale, &part) ||
        __builtin_add_overflow(part, (uint64_t)(fraction / NEP_S), &part)) {
        return false;
    }
    *out_p = part;
    return true;
}

enum nep_status nep_parse_time_ns(const char *text, uint64_t *ns_p)
{
    uint64_t whole, nano, ns;
    const char *end;
    if (strcasecmp(text, "inf") == 0) {
        *ns_p = UINT64_MAX;
        return NEP_OK;
    }
    if (!read_decimal(text, &whole, &nano, &end)) {
        return nep_fail(
            NEP_ERR_INVALID,
            "'%.40s' is not a time: write a number and a unit, as 10ms, 1.5s, 2m or inf", text);
    }
    const struct unit *unit = find_unit(time_units, sizeof time_units / sizeof time_units[0], end);
    if (unit == NULL) {
        return nep_fail(NEP_ERR_INVALID,
                        "'%.40s' has %s: the units of time are ns, us, ms, s, m, h", text,
                        *end == '\0' ? "no unit" : "an unknown unit");
    }
    if (!scaled(whole, nano, unit->scale, &ns)) {
        return nep_fail(
            NEP_ERR_INVALID,
            "'%.40s' is no whole number of nanoseconds below 584 years; inf is for ever", text);
    }
    *ns_p = ns;
    return NEP_OK;
}

enum nep_status nep_parse_bytes(const char *text, uint64_t *bytes_p)
{
    uint64_t whole, nano, bytes;
    const char *end;
    if (!read_decimal(text, &whole, &nano, &end)) {
        return nep_fail(
            NEP_ERR_INVALID,
            "'%.40s' is not a size: write a number and a unit, as 4096, 64k, 1.5M or 2G", text);
    }
    const struct unit *unit = find_unit(byte_units, sizeof byte_units / sizeof byte_units[0], end);
    if (unit == NULL) {
        return nep_fail(NEP_ERR_INVALID,
                        "'%.40s' has an unknown unit: the units of size are k, M, G, T (powers of "
                        "1024)",
                        text);
    }
    if (!scaled(whole, nano, unit->scale, &bytes)) {
        return nep_fail(NEP_ERR_INVALID, "'%.40s' is no whole number of bytes below 2^64", text);
    }
    *bytes_p = bytes;
    return NEP_OK;
}

void nep_format_time_ns(uint64_t ns, char *text, size_t cap)
{
    if (ns == UINT64_MAX) {
        snprintf(text, cap, "inf");
    } else if (ns % NEP_S == 0) {
        snprintf(text, cap, "%llus", (unsigned long long)(ns / NEP_S));
    } else if (ns % NEP_MS == 0) {
        snprintf(text, cap, "%llums", (unsigned long long)(ns / NEP_MS));
    } else {
        snprintf(text, cap, "%lluns", (unsigned long long)ns);
    }
}

void nep_format_bytes(uint64_t bytes, char *text, size_t cap)
{
    static const char suffix[] = {'G', 'M', 'k'};
    for (int i = 0; i < 3; i++) {
        unsigned shift = 30 - 10 * (unsigned)i;
        if (bytes != 0 && (bytes & ((1ull << shift) - 1)) == 0) {
            snprintf(text, cap, "%llu%c", (unsigned long long)(bytes >> shift), suffix[i]);
            return;
        }
    }
    snprintf(text, cap, "%llu", (unsigned long long)bytes);
}

enum nep_status nep_parse_host_port(const char *text, const char *what, char *host, size_t cap,
                                    uint16_t *port_p)
{
    const char *colon = strrchr(text, ':');
    const char *start = text;
    size_t len = colon == NULL ? 0 : (size_t)(colon - text);
    if (len >= 2 && text[0] == '[' && text[len - 1] == ']') {
        start++;
        len -= 2;
    } else if (len > 0 && memchr(text, ':', len) != NULL) {
        return nep_fail(NEP_ERR_INVALID,
                        "%s is '%.200s': write an IPv6 address in brackets, as [::1]:29600", what,
                        text);
    }
    if (len == 0 || len >= cap) {
        return nep_fail(NEP_ERR_INVALID,
                        "%s is '%.200s': write host:port, as node0:29600, the host at most %zu "
                        "characters",
                        what, text, cap - 1);
    }
    char *end;
    unsigned long port = isdigit((unsigned char)colon[1]) ? strtoul(colon + 1, &end, 10) : 0;
    if (port == 0 || port > 65535 || *end != '\0') {
        return nep_fail(NEP_ERR_INVALID, "%s is '%.200s': the port must be 1 to 65535", what, text);
    }
    memcpy(host, start, len);
    host[len] = '\0';
    *port_p = (uint16_t)port;
    return NEP_OK;
}
