/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The sum tree: rounding of every 16-bit value and of random floats against the formats'
 * definition, random trees against an oracle of its own bit for bit and between all tables, stored
 * partials against the whole tree, sums onto a term, and fp64 with a bound per element.
 */
#include "tests/unit/dispatch/kernels_ref.h"

#define MAX_TERMS    40
#define MAX_ELEMENTS 704
#define ROW_BYTES    (MAX_ELEMENTS * 4 + 64)
#define POISON       0xa5

struct tree {
    int dtype;
    size_t elements;
    uint32_t num_terms;
    struct nep_term terms[MAX_TERMS];
    unsigned char *rows;
};

enum bits_kind { BITS_ANY, BITS_TINY, BITS_MODEST };

static uint32_t random_bits(uint64_t *state, int dtype, enum bits_kind kind)
{
    const struct ref_format *format = &ref_formats[dtype];
    uint32_t bits = (uint32_t)(ref_random(state) >> 32);
    bits = dtype == 2 ? bits : bits & 0xffff;
    int width = dtype == 2 ? 32 : 16;
    uint32_t sign = bits & 1u << (width - 1);
    if (kind == BITS_TINY) { /* denormals, the least normals, zeros of both signs */
        uint32_t limit = 3u << (format->precision - 1);
        return sign | (bits & 1 ? bits % limit : bits % 3);
    }
    if (kind == BITS_MODEST) {
        double value = ((double)ref_below(state, 1u << 24) / (1 << 24) - 0.5) * 8;
        return ref_encode(ref_quantise(value, format), format);
    }
    return bits;
}

static float random_weight(uint64_t *state, enum bits_kind kind)
{
    if (kind == BITS_MODEST) {
        return (float)ref_below(state, 1u << 20) / (1 << 20);
    }
    if (ref_below(state, 200) == 0) {
        return ref_float(0x7fffffff); /* a GPU's NaN: adding to its bits overflows */
    }
    switch (ref_below(state, 8)) {
    case 0:
        return 0;
    case 1:
        return -1;
    case 2:
        return ref_float((uint32_t)(ref_random(state) >> 32));
    case 3:
        return 0x1p-20f;
    default:
        return 1;
    }
}

static void tree_random(struct tree *tree, uint64_t *state, int dtype, enum bits_kind kind)
{
    tree->dtype = dtype;
    tree->elements = 1 + ref_below(state, MAX_ELEMENTS);
    tree->num_terms = ref_below(state, MAX_TERMS + 1);
    for (uint32_t t = 0; t < tree->num_terms; t++) {
        unsigned char *row = tree->rows + t * ROW_BYTES + ref_below(state, 64);
        for (size_t i = 0; i < tree->elements; i++) {
            ref_store(row, i, random_bits(state, dtype, kind), dtype);
        }
        uint32_t ends = ref_below(state, 8);
        tree->terms[t] = (struct nep_term){row, random_weight(state, kind), ends < 4 ? ends : 0};
    }
}

/* One element of the tree, by the words of kernels.h. */
static uint32_t tree_element(const struct tree *tree, size_t idx)
{
    const struct ref_format *format = &ref_formats[tree->dtype];
    float rank = 0, node = 0, home = 0;
    for (uint32_t t = 0; t < tree->num_terms; t++) {
        uint32_t bits = ref_load(tree->terms[t].row, idx, tree->dtype);
        float value = (float)ref_decode(bits, format);
        rank = tree->terms[t].weight != 0 ? fmaf(tree->terms[t].weight, value, rank) : rank;
        bool last = t + 1 == tree->num_terms;
        if (last || tree->terms[t].ends != 0) {
            node += (float)ref_quantise(rank, format);
            rank = 0;
        }
        if (last || tree->terms[t].ends & 2) {
            home += (float)ref_quantise(node, format);
            node = 0;
        }
    }
    return ref_encode(ref_quantise(home, format), format);
}

static void sum_checked(const struct nep_kernels *table, const struct tree *tree,
                        unsigned char *out)
{
    size_t bytes = tree->elements * ref_bytes(tree->dtype);
    memset(out, POISON, bytes + 64);
    nep_sum_fn sum = tree->elements & 1 ? table->sum_final[tree->dtype] : table->sum[tree->dtype];
    sum(out, tree->terms, tree->num_terms, tree->elements);
    table->fence();
    for (size_t i = bytes; i < bytes + 64; i++) {
        assert_int_equal(out[i], POISON);
    }
}

static void test_kernels_sum_random_trees_equal_oracle(void **state)
{
    (void)state;
    uint64_t seed = ref_seed("random trees");
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    struct tree tree = {.rows = malloc(MAX_TERMS * ROW_BYTES)};
    unsigned char *out = aligned_alloc(64, ROW_BYTES + 64);
    assert_non_null(tree.rows);
    assert_non_null(out);
    for (int round = 0; round < 360; round++) {
        tree_random(&tree, &seed, round % 3, (enum bits_kind)(round / 3 % 3));
        for (int k = 0; k < num_tables; k++) {
            unsigned char *at = out + (round & 4 ? 0 : ref_below(&seed, 64));
            sum_checked(tables[k], &tree, at);
            for (size_t i = 0; i < tree.elements; i++) {
                uint32_t want = tree_element(&tree, i);
                uint32_t got = ref_load(at, i, tree.dtype);
                if (got != want) {
                    fail_msg("%s %s element %zu of %zu, %u terms: %08x, want %08x", tables[k]->name,
                             ref_names[tree.dtype], i, tree.elements, tree.num_terms, got, want);
                }
            }
        }
    }
    free(out);
    free(tree.rows);
}

/* All patterns of the ends of five terms, on rows whose roundings differ. */
static void test_kernels_sum_all_ends_equal_oracle(void **state)
{
    (void)state;
    uint64_t seed = ref_seed("all ends");
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    struct tree tree = {.rows = malloc(MAX_TERMS * ROW_BYTES)};
    unsigned char out[80 * 4 + 64];
    assert_non_null(tree.rows);
    for (int pattern = 0; pattern < 3 * 1024; pattern++) {
        tree_random(&tree, &seed, pattern % 3, BITS_MODEST);
        tree.elements = tree.elements % 80 + 1;
        tree.num_terms = tree.num_terms < 5 ? tree.num_terms : 5;
        for (uint32_t t = 0; t < tree.num_terms; t++) {
            tree.terms[t].ends = (uint32_t)pattern / 3 >> (2 * t) & 3;
        }
        for (int k = 0; k < num_tables; k++) {
            sum_checked(tables[k], &tree, out);
            for (size_t i = 0; i < tree.elements; i++) {
                assert_int_equal(ref_load(out, i, tree.dtype), tree_element(&tree, i));
            }
        }
    }
    free(tree.rows);
}

/* One term of weight 1: every value of the 16-bit types comes back, -0 as +0, NaN as the one. */
static void test_kernels_sum_every_half_is_kept(void **state)
{
    (void)state;
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    static uint16_t row[65536], out[65536];
    for (int dtype = 0; dtype < 2; dtype++) {
        for (uint32_t i = 0; i < 65536; i++) {
            row[i] = (uint16_t)i;
        }
        struct nep_term term = {row, 1, 0};
        for (int k = 0; k < num_tables; k++) {
            memset(out, POISON, sizeof out);
            tables[k]->sum[dtype](out, &term, 1, 65536);
            for (uint32_t i = 0; i < 65536; i++) {
                bool nan = isnan(ref_decode(i, &ref_formats[dtype]));
                assert_int_equal(out[i], nan ? 0x7fff : i == 0x8000 ? 0 : i);
            }
        }
    }
}

/* The weight is the value and the row is 1: any float reaches the rounding. Ties included. */
static void test_kernels_sum_rounds_floats_to_nearest_even(void **state)
{
    (void)state;
    uint64_t seed = ref_seed("rounding");
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    for (int round = 0; round < 100000; round++) {
        int dtype = round % 2;
        const struct ref_format *format = &ref_formats[dtype];
        uint32_t bits = (uint32_t)(ref_random(&seed) >> 32);
        uint32_t low = dtype == 0 ? 16 : 13;
        if (round & 2) { /* a tie, or next to one */
            bits = (bits >> low << low) + (1u << (low - 1)) + ref_below(&seed, 3) - 1;
        }
        if (dtype == 1 && round & 4) { /* exponents near fp16's */
            bits = (bits & 0x807fffff) | (100 + ref_below(&seed, 45)) << 23;
        }
        float value = ref_float(bits);
        uint16_t ones[16], out[16];
        for (int i = 0; i < 16; i++) {
            ones[i] = (uint16_t)ref_encode(1, format);
        }
        struct nep_term term = {ones, value, 0};
        uint32_t want = ref_encode(ref_quantise(value, format), format);
        want = want == 0x8000 ? 0 : want;
        for (int k = 0; k < num_tables; k++) {
            memset(out, POISON, sizeof out);
            tables[k]->sum[dtype](out, &term, 1, 16);
            for (int i = 0; i < 16; i++) {
                assert_int_equal(out[i], want);
            }
        }
    }
}

static void test_kernels_sum_no_terms_is_zeros(void **state)
{
    (void)state;
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    for (int k = 0; k < num_tables; k++) {
        for (int dtype = 0; dtype < REF_NUM_DTYPES; dtype++) {
            unsigned char out[100 * 4 + 1];
            memset(out, POISON, sizeof out);
            tables[k]->sum[dtype](out, NULL, 0, 100);
            for (size_t i = 0; i < 100 * ref_bytes(dtype); i++) {
                assert_int_equal(out[i], 0);
            }
            assert_int_equal(out[100 * ref_bytes(dtype)], POISON);
        }
    }
}

/* Each rank's part stored, the parts of a node stored, and summed again: the bits of the whole. */
static void test_kernels_sum_stored_partials_equal_whole(void **state)
{
    (void)state;
    uint64_t seed = ref_seed("partials");
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    struct tree tree = {.rows = malloc(MAX_TERMS * ROW_BYTES)};
    unsigned char *parts = malloc((2 * MAX_TERMS + 2) * ROW_BYTES);
    assert_non_null(tree.rows);
    assert_non_null(parts);
    unsigned char *whole = parts, *again = parts + ROW_BYTES;
    for (int round = 0; round < 180; round++) {
        tree_random(&tree, &seed, round % 3, (enum bits_kind)(round / 3 % 3));
        nep_sum_fn sum = tables[round % num_tables]->sum[tree.dtype];
        struct nep_term ranks[MAX_TERMS], nodes[MAX_TERMS];
        uint32_t num_ranks = 0, num_nodes = 0, first = 0;
        for (uint32_t t = 0; t < tree.num_terms; t++) {
            bool last = t + 1 == tree.num_terms;
            uint32_t ends = tree.terms[t].ends;
            if (last || ends != 0) {
                unsigned char *part = parts + (2 + num_ranks) * ROW_BYTES;
                sum(part, tree.terms + first, t + 1 - first, tree.elements);
                ranks[num_ranks++] = (struct nep_term){part, 1, 1};
                first = t + 1;
            }
            if (last || ends & 2) {
                unsigned char *part = parts + (2 + MAX_TERMS + num_nodes) * ROW_BYTES;
                sum(part, ranks, num_ranks, tree.elements);
                nodes[num_nodes++] = (struct nep_term){part, 1, 3};
                num_ranks = 0;
            }
        }
        sum_checked(tables[0], &tree, whole);
        sum(again, nodes, num_nodes, tree.elements);
        assert_memory_equal(again, whole, tree.elements * ref_bytes(tree.dtype));
    }
    free(parts);
    free(tree.rows);
}

/* A term may lie where the result goes. */
static void test_kernels_sum_onto_a_term_is_exact(void **state)
{
    (void)state;
    uint64_t seed = ref_seed("in place");
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    struct tree tree = {.rows = aligned_alloc(64, MAX_TERMS * ROW_BYTES)};
    unsigned char *want = malloc(ROW_BYTES);
    assert_non_null(tree.rows);
    assert_non_null(want);
    for (int round = 0; round < 180; round++) {
        tree_random(&tree, &seed, round % 3, (enum bits_kind)(round / 3 % 3));
        if (tree.num_terms == 0) {
            continue;
        }
        const struct nep_kernels *table = tables[round % num_tables];
        nep_sum_fn sum = round & 1 ? table->sum_final[tree.dtype] : table->sum[tree.dtype];
        size_t bytes = tree.elements * ref_bytes(tree.dtype);
        struct nep_term *term = &tree.terms[ref_below(&seed, tree.num_terms)];
        unsigned char *out = tree.rows + (size_t)(term - tree.terms) * ROW_BYTES;
        memmove(out, term->row, bytes); /* aligned, so that sum_final streams */
        term->row = out;
        tables[0]->sum[tree.dtype](want, tree.terms, tree.num_terms, tree.elements);
        sum(out, tree.terms, tree.num_terms, tree.elements);
        table->fence();
        assert_memory_equal(out, want, bytes);
    }
    free(want);
    free(tree.rows);
}

static void test_kernels_sum_is_within_bound_of_fp64(void **state)
{
    (void)state;
    uint64_t seed = ref_seed("fp64");
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    static const double units[REF_NUM_DTYPES] = {3 * 0x1p-8, 3 * 0x1p-11, 0};
    struct tree tree = {.rows = malloc(MAX_TERMS * ROW_BYTES)};
    unsigned char *out = aligned_alloc(64, ROW_BYTES + 64);
    assert_non_null(tree.rows);
    assert_non_null(out);
    for (int round = 0; round < 120; round++) {
        tree_random(&tree, &seed, round % 3, BITS_MODEST);
        /* three levels of one rounding each: the bound needs few addends per level */
        tree.num_terms = tree.num_terms < 8 ? tree.num_terms : 8;
        uint32_t levels = 0;
        for (uint32_t t = 0; t < tree.num_terms; t++) {
            levels += tree.terms[t].ends != 0;
        }
        double unit =
            tree.dtype == 2 ? (tree.num_terms + 2 * levels + 2) * 0x1p-24 : units[tree.dtype];
        sum_checked(tables[round / 3 % num_tables], &tree, out);
        for (size_t i = 0; i < tree.elements; i++) {
            double exact = 0, size = 0;
            for (uint32_t t = 0; t < tree.num_terms; t++) {
                double x = ref_decode(ref_load(tree.terms[t].row, i, tree.dtype),
                                      &ref_formats[tree.dtype]);
                exact += tree.terms[t].weight * x;
                size += fabs(tree.terms[t].weight * x);
            }
            double got = ref_decode(ref_load(out, i, tree.dtype), &ref_formats[tree.dtype]);
            double least = ldexp(1, ref_formats[tree.dtype].exponent_min -
                                        ref_formats[tree.dtype].precision + 1);
            assert_true(fabs(got - exact) <= unit * size + 4 * least);
        }
    }
    free(out);
    free(tree.rows);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kernels_sum_random_trees_equal_oracle),
        cmocka_unit_test(test_kernels_sum_all_ends_equal_oracle),
        cmocka_unit_test(test_kernels_sum_every_half_is_kept),
        cmocka_unit_test(test_kernels_sum_rounds_floats_to_nearest_even),
        cmocka_unit_test(test_kernels_sum_no_terms_is_zeros),
        cmocka_unit_test(test_kernels_sum_stored_partials_equal_whole),
        cmocka_unit_test(test_kernels_sum_onto_a_term_is_exact),
        cmocka_unit_test(test_kernels_sum_is_within_bound_of_fp64),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
