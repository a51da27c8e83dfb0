/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows of every type through a tile and straight to their places: the same bytes both ways, equal
 * to a cast by plain C where there is one, nothing written around them; and what is refused.
 */
#include "dispatch/host/wire.h"
#include "tests/unit/dispatch/kernels_ref.h"

#define MAX_HIDDEN 1040
#define ROOM       (MAX_HIDDEN * 4 + 128)

struct rooms {
    unsigned char x[NEP_PUSH_MAX][ROOM];
    unsigned char scales[NEP_PUSH_MAX][ROOM];
};

static void fill(void *to, size_t bytes, uint64_t *seed)
{
    for (size_t i = 0; i < bytes; i++) {
        ((unsigned char *)to)[i] = (unsigned char)(ref_random(seed) >> 56);
    }
}

static void places_init(struct nep_wire_places *places, struct rooms *rooms, uint64_t *seed)
{
    places->num = ref_below(seed, NEP_PUSH_MAX + 1);
    memset(rooms, 0xa5, sizeof *rooms);
    for (uint32_t i = 0; i < places->num; i++) {
        places->x[i] = rooms->x[i] + ref_below(seed, 64);
        places->scales[i] =
            (struct nep_scales_at){(char *)rooms->scales[i] + ref_below(seed, 64), 4};
    }
}

static void check_room(const unsigned char *room, const unsigned char *at, const void *want,
                       size_t bytes)
{
    for (const unsigned char *byte = room; byte < room + ROOM; byte++) {
        bool inside = byte >= at && byte < at + bytes;
        assert_int_equal(*byte, inside ? ((const unsigned char *)want)[byte - at] : 0xa5);
    }
}

static void check_places(const struct nep_wire *wire, const struct nep_wire_places *places,
                         const struct rooms *rooms, const unsigned char *want)
{
    for (uint32_t i = 0; i < places->num; i++) {
        check_room(rooms->x[i], places->x[i], want, wire->payload_bytes);
        check_room(rooms->scales[i], (unsigned char *)places->scales[i].first,
                   want + wire->payload_bytes, wire->scale_bytes);
    }
}

/* Both ways of one row; `want` is payload and scales. */
static void check_row(const struct nep_wire *wire, const struct nep_kernels *table,
                      const struct nep_wire_row *row, const unsigned char *want, uint64_t *seed)
{
    static struct rooms rooms;
    static unsigned char tile[ROOM + 64], scratch[ROOM];
    struct nep_wire_places places;
    uint32_t used = wire->payload_bytes + wire->scale_bytes;

    memset(tile, 0xa5, sizeof tile);
    nep_wire_pack(wire, table, row, tile);
    assert_memory_equal(tile, want, used);
    for (size_t i = used; i < sizeof tile; i++) {
        assert_int_equal(tile[i], i < wire->row_bytes ? 0 : 0xa5);
    }

    places_init(&places, &rooms, seed);
    nep_wire_push(wire, table, row, &places, scratch);
    table->fence();
    check_places(wire, &places, &rooms, want);

    struct nep_wire_row landed = nep_wire_row_at(wire, tile);
    places_init(&places, &rooms, seed);
    nep_wire_push(wire, table, &landed, &places, NULL);
    table->fence();
    check_places(wire, &places, &rooms, want);
}

static void test_wire_numbers_go_as_they_are_or_cast(void **state)
{
    (void)state;
    uint64_t seed = ref_seed("numbers");
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    static unsigned char x[ROOM], want[ROOM];
    for (int round = 0; round < 120; round++) {
        int dtype = round % 3;
        enum nep_dtype type = (enum nep_dtype)(NEP_DTYPE_BF16 + dtype);
        enum nep_scale scale = (enum nep_scale)(round / 3 % 3);
        uint32_t hidden = 16 * (1 + ref_below(&seed, MAX_HIDDEN / 16));
        const struct nep_kernels *table = tables[round % num_tables];
        struct nep_wire_row row = {x, NULL};
        struct nep_wire wire;
        fill(x, sizeof x, &seed);

        assert_int_equal(nep_wire_init(&wire, type, type, hidden, scale), NEP_OK);
        assert_int_equal(wire.row_bytes, hidden * ref_bytes(dtype));
        assert_int_equal(wire.scale_bytes, 0);
        check_row(&wire, table, &row, x, &seed);

        assert_int_equal(nep_wire_init(&wire, type, NEP_DTYPE_FP8_E4M3, hidden, scale), NEP_OK);
        uint32_t blocks = (hidden + 127) / 128;
        assert_int_equal(wire.payload_bytes, hidden);
        assert_int_equal(wire.scale_bytes, scale == NEP_SCALE_UE8M0 ? blocks : 4 * blocks);
        assert_true(wire.row_bytes % NEP_WIRE_ALIGN == 0);
        tables[0]->cast_fp8(want, want + hidden, x, type, hidden, scale);
        check_row(&wire, table, &row, want, &seed);

        /* the caller has cast already: passed through, whatever the bytes are */
        fill(want, sizeof want, &seed);
        row = (struct nep_wire_row){want, want + hidden};
        check_row(&wire, table, &row, want, &seed);
        assert_int_equal(
            nep_wire_init(&wire, NEP_DTYPE_FP8_E4M3, NEP_DTYPE_FP8_E4M3, hidden, scale), NEP_OK);
        check_row(&wire, table, &row, want, &seed);
    }
}

static void test_wire_opaque_rows_pass_through(void **state)
{
    (void)state;
    uint64_t seed = ref_seed("opaque");
    const struct nep_kernels *tables[3];
    int num_tables = ref_tables(tables);
    static unsigned char want[ROOM];
    for (int round = 0; round < 200; round++) {
        struct nep_wire wire;
        uint32_t payload = 1 + ref_below(&seed, 3000), scales = ref_below(&seed, 300);
        scales = round & 1 ? 0 : scales;
        assert_int_equal(nep_wire_init_opaque(&wire, payload, scales), NEP_OK);
        assert_true(wire.row_bytes >= payload + scales && wire.row_bytes % NEP_WIRE_ALIGN == 0);
        assert_true(wire.row_bytes < payload + scales + NEP_WIRE_ALIGN);
        fill(want, sizeof want, &seed);
        struct nep_wire_row row = nep_wire_row_at(&wire, want);
        check_row(&wire, tables[round % num_tables], &row, want, &seed);
    }
}

static void test_wire_init_impossible_is_refused(void **state)
{
    (void)state;
    struct nep_wire wire = {.row_bytes = 77};
    for (int dtype = -1; dtype < 7; dtype++) {
        for (int type = -1; type < 7; type++) {
            bool number = dtype >= NEP_DTYPE_BF16 && dtype <= NEP_DTYPE_FP32;
            bool right = (number && type == dtype) ||
                         ((number || dtype == NEP_DTYPE_FP8_E4M3) && type == NEP_DTYPE_FP8_E4M3);
            struct nep_wire made;
            enum nep_status status = nep_wire_init(&made, (enum nep_dtype)dtype,
                                                   (enum nep_dtype)type, 64, NEP_SCALE_FP32);
            assert_int_equal(status, right ? NEP_OK : NEP_ERR_UNSUPPORTED);
        }
    }
    assert_int_equal(nep_wire_init(&wire, NEP_DTYPE_BF16, NEP_DTYPE_BF16, 0, NEP_SCALE_FP32),
                     NEP_ERR_INVALID);
    assert_int_equal(
        nep_wire_init(&wire, NEP_DTYPE_FP32, NEP_DTYPE_FP32, UINT32_MAX, NEP_SCALE_FP32),
        NEP_ERR_INVALID);
    assert_int_equal(
        nep_wire_init(&wire, NEP_DTYPE_BF16, NEP_DTYPE_FP8_E4M3, 64, (enum nep_scale)3),
        NEP_ERR_INVALID);
    assert_int_equal(nep_wire_init_opaque(&wire, 0, 4), NEP_ERR_INVALID);
    assert_int_equal(nep_wire_init_opaque(&wire, UINT32_MAX, UINT32_MAX), NEP_ERR_INVALID);
    assert_int_equal(wire.row_bytes, 77);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_wire_numbers_go_as_they_are_or_cast),
        cmocka_unit_test(test_wire_opaque_rows_pass_through),
        cmocka_unit_test(test_wire_init_impossible_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
