/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What all ranks must agree on. Every rank gathers and judges alone, so the same sentence comes out
 * everywhere. What is gathered first is small: a digest of all fields, or a status. All values, or
 * the sentences of those that failed, follow where that says that they are needed, which all ranks
 * see alike. With n ranks an exchange moves n * n times its bytes through one server, and a change
 * of the group has a dozen of them while everybody waits.
 *
 * Rejected: the digest alone. It cannot say which field of which rank is the odd one, which is the
 * only thing that the reader of the message wants.
 */
#include "transport/bootstrap.h"

#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "transport/group.h"
#include "transport/rendezvous.h"

enum { AGREE_TEXT = 56, COMMON_TEXT = 400, MOST_VALUES_NAMED = 4 };

/* One field of one rank. Texts are compared as texts, numbers as numbers. */
struct entry {
    uint64_t value;
    char text[AGREE_TEXT];
};

enum nep_status nep_bootstrap_allgather(const struct nep_bootstrap *bootstrap, const void *in,
                                        void *out, size_t bytes, uint64_t timeout_ns,
                                        const char *what)
{
    int result = bootstrap->allgather(bootstrap->ctx, in, out, bytes, timeout_ns);
    if (result == 0) {
        return NEP_OK;
    }
    if (nep_rendezvous_is_client(bootstrap) || nep_group_is(bootstrap)) {
        return nep_fail_prefix((enum nep_status)result, "exchanging %s: ", what);
    }
    return nep_fail(NEP_ERR_IO,
                    "the caller's allgather of %zu bytes (%s) returned %d: a rank is missing or "
                    "the caller's communication failed",
                    bytes, what, result);
}

/* ---- ranks in words ------------------------------------------------------------------------- */

/* Appends "0-6, 9" for the ranks that `is_in` says; the text may be cut, it stays ended. */
void nep_ranks_print(char *text, size_t cap, uint32_t num_ranks, nep_rank_test_fn is_in,
                     const void *ctx)
{
    size_t used = strlen(text);
    const char *separator = "";
    for (uint32_t r = 0; r < num_ranks && used + 1 < cap; r++) {
        if (!is_in(ctx, r)) {
            continue;
        }
        uint32_t last = r;
        while (last + 1 < num_ranks && is_in(ctx, last + 1)) {
            last++;
        }
        if (used + 32 > cap) {
            snprintf(text + used, cap - used, ", ...");
            return;
        }
        int put = r == last ? snprintf(text + used, cap - used, "%s%u", separator, r)
                            : snprintf(text + used, cap - used, "%s%u-%u", separator, r, last);
        used += (size_t)put;
        separator = ", ";
        r = last;
    }
}

struct same_as {
    const struct entry *entries; /* of field 0 of rank 0 */
    uint32_t stride;
    uint32_t rank;
};

static bool is_equal(const struct entry *a, const struct entry *b)
{
    return a->value == b->value && memcmp(a->text, b->text, sizeof a->text) == 0;
}

static bool is_same_as(const void *ctx, uint32_t rank)
{
    const struct same_as *same = ctx;
    return is_equal(&same->entries[(size_t)rank * same->stride],
                    &same->entries[(size_t)same->rank * same->stride]);
}

/* "7168 on ranks 0-6, 4096 on rank 7": a value for the first rank that has it, then its ranks. */
static void print_values(char *text, size_t cap, const struct entry *entries, uint32_t stride,
                         uint32_t num_ranks)
{
    uint32_t num_values = 0;
    for (uint32_t r = 0; r < num_ranks; r++) {
        struct same_as same = {entries, stride, r};
        uint32_t first = 0, count = 0;
        while (!is_same_as(&same, first)) {
            first++;
        }
        if (first != r) {
            continue;
        }
        for (uint32_t other = r; other < num_ranks; other++) {
            count += is_same_as(&same, other);
        }
        size_t used = strlen(text);
        if (num_values++ == MOST_VALUES_NAMED) {
            snprintf(text + used, cap - used, ", and others");
            return;
        }
        const struct entry *entry = &entries[(size_t)r * stride];
        char value[AGREE_TEXT + 4];
        if (entry->text[0] != '\0') {
            snprintf(value, sizeof value, "%.*s", AGREE_TEXT - 1, entry->text);
        } else {
            snprintf(value, sizeof value, "%llu", (unsigned long long)entry->value);
        }
        snprintf(text + used, cap - used, "%s%s on rank%s ", used == 0 ? "" : ", ", value,
                 count == 1 ? "" : "s");
        nep_ranks_print(text, cap, num_ranks, is_same_as, &same);
    }
}

/* ---- agree ---------------------------------------------------------------------------------- */

/* FNV-1a; what differs by chance alone is not mistaken for equal. */
static uint64_t digest(const struct entry *entries, uint32_t num_fields)
{
    const uint8_t *bytes = (const uint8_t *)entries;
    uint64_t hash = 14695981039346656037ull ^ num_fields;
    for (size_t i = 0; i < num_fields * sizeof *entries; i++) {
        hash = (hash ^ bytes[i]) * 1099511628211ull;
    }
    return hash;
}

/* *differ_p: whether the digests of all ranks do. */
static enum nep_status compare(const struct nep_bootstrap *bootstrap, uint32_t num_ranks,
                               const char *what, uint64_t mine, uint64_t timeout_ns, bool *differ_p)
{
    uint64_t *all = calloc(num_ranks, sizeof *all);
    if (all == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory to compare %u ranks", num_ranks);
    }
    enum nep_status status =
        nep_bootstrap_allgather(bootstrap, &mine, all, sizeof mine, timeout_ns, what);
    *differ_p = false;
    for (uint32_t r = 0; status == NEP_OK && r < num_ranks; r++) {
        *differ_p = *differ_p || all[r] != all[0];
    }
    free(all);
    return status;
}

/* The digests differ: which field, on whom. */
static enum nep_status find_difference(const struct nep_bootstrap *bootstrap, uint32_t num_ranks,
                                       const char *what, const char *const *names,
                                       const struct entry *entries, uint32_t num_fields,
                                       uint64_t timeout_ns)
{
    struct entry *all = calloc((size_t)num_ranks * num_fields + 1, sizeof *all);
    if (all == NULL) {
        return nep_fail(NEP_ERR_NO_MEMORY, "no memory to compare %u fields of %u ranks", num_fields,
                        num_ranks);
    }
    enum nep_status status = nep_bootstrap_allgather(
        bootstrap, entries, all, num_fields * sizeof *entries, timeout_ns, what);
    for (uint32_t f = 0; status == NEP_OK && f < num_fields; f++) {
        for (uint32_t r = 1; r < num_ranks; r++) {
            if (!is_equal(&all[f], &all[(size_t)r * num_fields + f])) {
                char text[700] = "";
                print_values(text, sizeof text, all + f, num_fields, num_ranks);
                status =
                    nep_fail(NEP_ERR_MISMATCH, "%s: %s differs: %s; it must be equal on all ranks",
                             what, names[f], text);
                break;
            }
        }
    }
    free(all);
    return status;
}

static enum nep_status agree(const struct nep_bootstrap *bootstrap, uint32_t num_ranks,
                             const char *what, const char *const *names,
                             const struct entry *entries, uint32_t num_fields, uint64_t timeout_ns)
{
    bool differ = false;
    enum nep_status status =
        compare(bootstrap, num_ranks, what, digest(entries, num_fields), timeout_ns, &differ);
    return status == NEP_OK && differ
               ? find_difference(bootstrap, num_ranks, what, names, entries, num_fields, timeout_ns)
               : status;
}

enum nep_status nep_bootstrap_agree(const struct nep_bootstrap *bootstrap, uint32_t num_ranks,
                                    const char *what, const struct nep_agree_field *fields,
                                    uint32_t num_fields, uint64_t timeout_ns)
{
    struct entry *entries = calloc(num_fields + 1, sizeof *entries);
    const char **names = calloc(num_fields + 1, sizeof *names);
    enum nep_status status;
    if (entries == NULL || names == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "no memory to compare %u fields", num_fields);
    } else {
        for (uint32_t f = 0; f < num_fields; f++) {
            names[f] = fields[f].name;
            entries[f].value = fields[f].value;
        }
        status = agree(bootstrap, num_ranks, what, names, entries, num_fields, timeout_ns);
    }
    free(entries);
    free(names);
    return status;
}

enum nep_status nep_bootstrap_agree_text(const struct nep_bootstrap *bootstrap, uint32_t num_ranks,
                                         const char *what, const char *name, const char *text,
                                         uint64_t timeout_ns)
{
    struct entry entry = {.value = 0};
    snprintf(entry.text, sizeof entry.text, "%s", text);
    return agree(bootstrap, num_ranks, what, &name, &entry, 1, timeout_ns);
}

enum nep_status nep_bootstrap_agree_config(const struct nep_bootstrap *bootstrap,
                                           uint32_t num_ranks, const struct nep_config *config,
                                           uint64_t timeout_ns)
{
    struct entry entries[65] = {0};
    const char *names[65];
    uint32_t num = 1;
    names[0] = "the version of nearep";
    snprintf(entries[0].text, AGREE_TEXT, "%s", nep_version_string());
    for (uint32_t i = 0; i < nep_config_num_rows() && num < 65; i++) {
        struct nep_config_row row = nep_config_row_at(i);
        if (row.is_shared) {
            names[num] = row.name;
            nep_config_format(config, i, entries[num].text, AGREE_TEXT);
            num++;
        }
    }
    return agree(bootstrap, num_ranks, "configuration", names, entries, num, timeout_ns);
}

/* ---- common --------------------------------------------------------------------------------- */

/* The sentence of the first that failed, with how many others did; all of them come to this. */
static enum nep_status tell_cause(const struct nep_bootstrap *bootstrap, uint32_t num_ranks,
                                  const char *mine, const int64_t *statuses, uint64_t timeout_ns)
{
    uint32_t num_failed = 0, first = 0;
    for (uint32_t r = num_ranks; r-- > 0;) {
        num_failed += statuses[r] != NEP_OK;
        first = statuses[r] != NEP_OK ? r : first;
    }
    char others[48] = "";
    if (num_failed > 1) {
        snprintf(others, sizeof others, " (and %u other rank%s)", num_failed - 1,
                 num_failed == 2 ? "" : "s");
    }
    enum nep_status status = (enum nep_status)statuses[first];
    char(*all)[COMMON_TEXT] = calloc(num_ranks, sizeof *all);
    if (all != NULL && nep_bootstrap_allgather(bootstrap, mine, all, sizeof *all, timeout_ns,
                                               "why not all ranks are ready") == NEP_OK) {
        all[first][COMMON_TEXT - 1] = '\0';
        status = nep_fail(status, "rank %u%s failed: %s", first, others, all[first]);
    } else {
        char why[COMMON_TEXT];
        snprintf(why, sizeof why, "%s", all != NULL ? nep_last_message() : "no memory");
        status = nep_fail(status, "rank %u%s failed: %s, and its sentence did not come: %s", first,
                          others, nep_status_name(status), why);
    }
    free(all);
    return status;
}

enum nep_status nep_bootstrap_common(const struct nep_bootstrap *bootstrap, uint32_t rank,
                                     uint32_t num_ranks, enum nep_status mine, uint64_t timeout_ns)
{
    char message[COMMON_TEXT] = "";
    int64_t own = mine, *all = calloc(num_ranks, sizeof *all);
    if (mine != NEP_OK) {
        snprintf(message, sizeof message, "%s", nep_last_message());
    }
    enum nep_status status;
    if (all == NULL) {
        status = nep_fail(NEP_ERR_NO_MEMORY, "no memory for the outcome of %u ranks", num_ranks);
    } else {
        status = nep_bootstrap_allgather(bootstrap, &own, all, sizeof own, timeout_ns,
                                         "whether all ranks are ready");
    }
    bool is_any = false;
    for (uint32_t r = 0; status == NEP_OK && r < num_ranks; r++) {
        is_any = is_any || (r != rank ? all[r] : own) != NEP_OK;
    }
    if (is_any) {
        /* All have just been here, so nobody is waited for long. */
        status = tell_cause(bootstrap, num_ranks, message, all, timeout_ns / 4);
    }
    free(all);
    /* The cause on this rank says more than what became of telling the others. */
    return mine != NEP_OK ? nep_fail(mine, "%s", message) : status;
}
