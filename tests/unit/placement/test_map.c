/* SPDX-License-Identifier: Apache-2.0 */
/* Maps: contiguous, saved and loaded, and files that must be refused with the line that is wrong.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "placement/map.h"
#include "placement/rng.h"
#include "tests/unit/cmocka_all.h"

static char dir[64];

static const char *path_of(const char *name)
{
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return path;
}

static const char *write_file(const char *text, size_t bytes)
{
    const char *path = path_of("hostile.nepmap");
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
    return path;
}

static void refuse(const char *text, enum nep_status status, const char *words)
{
    struct nep_map *map = (void *)0x5a;
    enum nep_status got = nep_map_load(write_file(text, strlen(text)), &map);
    if (got != status || strstr(nep_last_message(), words) == NULL) {
        fail_msg("text <%s>: status %d, message <%s>, expected %d and <%s>", text, got,
                 nep_last_message(), status, words);
    }
    assert_ptr_equal(map, (void *)0x5a);
}

#define HEAD "nepmap 1\nlayers 1 experts 2 nodes 2 ranks_per_node 1,1 slots_per_rank 2\n"

static void test_map_hostile_files_are_refused_with_the_line(void **state)
{
    (void)state;
    refuse("", NEP_ERR_FORMAT, "line 1");
    refuse("nepmop 1\n", NEP_ERR_FORMAT, "line 1");
    refuse("nepmap 2\n", NEP_ERR_FORMAT, "version 2");
    refuse("nepmap 1", NEP_ERR_FORMAT, "line 2");
    refuse("nepmap 99999999999999999999\n", NEP_ERR_FORMAT, "line 1");
    refuse("nepmap 1\nlayers x", NEP_ERR_FORMAT, "line 2");
    refuse("nepmap 1\nlayers 4294967295 experts 4294967295 nodes 1 ranks_per_node 1 "
           "slots_per_rank 1\n",
           NEP_ERR_FORMAT, "line 2");
    refuse("nepmap 1\nlayers 65536 experts 65536 nodes 1 ranks_per_node 1 slots_per_rank 65536\n",
           NEP_ERR_FORMAT, "truncated");
    refuse("nepmap 1\nlayers 1 experts 2 nodes 65536 ranks_per_node 1,1 slots_per_rank 1\n",
           NEP_ERR_FORMAT, "line 2");
    refuse("nepmap 1\nlayers 1 experts 5 nodes 2 ranks_per_node 1,1 slots_per_rank 2\n",
           NEP_ERR_FORMAT, "5 experts");
    refuse("nepmap 1\nlayers 1 experts 2 nodes 2 ranks_per_node 1,0 slots_per_rank 2\n",
           NEP_ERR_FORMAT, "node 1 has no ranks");
    refuse("nepmap 1\nlayers 1 experts 2 nodes 2 ranks_per_node 1,1 slots_per_rank 0\n",
           NEP_ERR_FORMAT, "slots_per_rank is 0");
    refuse("nepmap 1\nlayers 0 experts 2 nodes 2 ranks_per_node 1,1 slots_per_rank 1\n",
           NEP_ERR_FORMAT, "0 layers");
    refuse(HEAD "0 0 0:0\n", NEP_ERR_FORMAT, "expert 1 has no copy");
    refuse(HEAD "0 0 0:0\n0 1 0:0\n", NEP_ERR_FORMAT, "line 4");
    refuse(HEAD "0 0 0:0\n0 1\n", NEP_ERR_FORMAT, "line 4");
    refuse(HEAD "0 0 0:0\n0 0 1:0\n", NEP_ERR_FORMAT, "line 4: a second line");
    refuse(HEAD "0 0 0:0\n0 2 1:0\n", NEP_ERR_FORMAT, "line 4: expert is more than 1");
    refuse(HEAD "1 0 0:0\n0 1 1:0\n", NEP_ERR_FORMAT, "line 3: layer is more than 0");
    refuse(HEAD "0 0 2:0\n0 1 1:0\n", NEP_ERR_FORMAT, "line 3: rank is more than 1");
    refuse(HEAD "0 0 0:2\n0 1 1:0\n", NEP_ERR_FORMAT, "line 3: slot is more than 1");
    refuse(HEAD "0 0 0:0*0\n0 1 1:0\n", NEP_ERR_FORMAT, "line 3: weight 0");
    refuse(HEAD "0 0 0:0*65536\n0 1 1:0\n", NEP_ERR_FORMAT, "line 3: weight is more");
    refuse(HEAD "0 0 0;0\n0 1 1:0\n", NEP_ERR_FORMAT, "line 3");
    refuse(HEAD "0 0 -1:0\n0 1 1:0\n", NEP_ERR_FORMAT, "line 3");
    refuse(HEAD "0 0 0:0 0:0\n0 1 1:0\n", NEP_ERR_FORMAT, "given twice");
    refuse(HEAD "0 0 0:0 trailing\n0 1 1:0\n", NEP_ERR_FORMAT, "line 3");
}

static void test_map_nul_bytes_and_no_files_are_refused(void **state)
{
    (void)state;
    struct nep_map *map = NULL;
    static const char nul[] = HEAD "0 0 0:0\n0 \0 1:0\n";
    assert_int_equal(nep_map_load(write_file(nul, sizeof nul - 1), &map), NEP_ERR_FORMAT);
    assert_int_equal(nep_map_load(path_of("absent"), &map), NEP_ERR_NOT_FOUND);
    assert_int_equal(nep_map_load(dir, &map), NEP_ERR_IO);
    assert_int_equal(mkfifo(path_of("fifo"), 0600), 0);
    assert_int_equal(nep_map_load(path_of("fifo"), &map), NEP_ERR_IO);
    assert_int_equal(nep_map_load(NULL, &map), NEP_ERR_INVALID);
    assert_null(map);
}

/* Any damage to a good file is refused or gives a map that keeps its promises; never a crash. */
static void test_map_damaged_files_never_crash(void **state)
{
    (void)state;
    uint64_t seed = (uint64_t)time(NULL);
    print_message("seed %llu\n", (unsigned long long)seed);
    struct nep_rng rng = nep_rng_seed(seed);
    static const char good[] =
        "nepmap 1\nlayers 2 experts 3 nodes 2 ranks_per_node 2,1 slots_per_rank 2\n"
        "0 0 0:0 2:1*7\n0 1 1:0\n0 2 1:1\n1 0 2:0\n1 1 0:1\n1 2 0:0*65535 2:1\n";
    uint32_t accepted = 0;
    for (int i = 0; i < 4000; i++) {
        char text[sizeof good];
        memcpy(text, good, sizeof good);
        size_t bytes = sizeof good - 1;
        static const char alphabet[] = "0123456789 :*,\n-x\0\xff";
        for (uint32_t n = 1 + nep_rng_below(&rng, 3); n > 0; n--) {
            text[nep_rng_below(&rng, (uint32_t)bytes)] =
                alphabet[nep_rng_below(&rng, sizeof alphabet - 1)];
        }
        if (nep_rng_below(&rng, 4) == 0) {
            bytes = nep_rng_below(&rng, (uint32_t)bytes);
        }
        struct nep_map *map = NULL;
        enum nep_status status = nep_map_load(write_file(text, bytes), &map);
        assert_true(status == NEP_OK || status == NEP_ERR_FORMAT);
        accepted += status == NEP_OK;
        assert_int_equal(status == NEP_OK, map != NULL);
        nep_map_destroy(map);
    }
    print_message("%u of 4000 damaged files were still maps\n", accepted);
}

static void test_map_saved_and_loaded_is_equal(void **state)
{
    (void)state;
    const uint32_t sizes[] = {3, 1, 2};
    struct nep_map_shape shape = {sizeof shape, 4, 20, 3, 0, 5, sizes};
    struct nep_map *map = NULL;
    assert_int_equal(nep_map_contiguous(&shape, &map), NEP_OK);
    struct nep_map_shape got;
    assert_int_equal(nep_map_get_shape(map, &got), NEP_OK);
    assert_int_equal(got.num_ranks, 6);
    assert_int_equal(nep_map_save(map, path_of("a.nepmap")), NEP_OK);
    struct nep_map *again = NULL;
    assert_int_equal(nep_map_load(path_of("a.nepmap"), &again), NEP_OK);
    assert_true(nep_map_digest(map) == nep_map_digest(again));
    struct nep_copies copies;
    assert_int_equal(nep_map_copies(again, 3, &copies), NEP_OK);
    for (uint32_t e = 0; e < 20; e++) {
        assert_int_equal(copies.slot[copies.begin[e]], e);
        /* ranks 0 to 2 on node 0, 3 on node 1, 4 and 5 on node 2 */
        static const uint32_t node_of_rank[] = {0, 0, 0, 1, 2, 2};
        assert_int_equal(copies.node[copies.begin[e]], node_of_rank[e / 5]);
    }
    assert_int_equal(nep_map_copies(again, 4, &copies), NEP_ERR_INVALID);
    nep_map_retain(map);
    nep_map_destroy(map);
    assert_int_equal(nep_map_get_shape(map, &got), NEP_OK);
    nep_map_destroy(map);
    nep_map_destroy(again);
    nep_map_destroy(NULL);
    assert_int_equal(nep_map_save(NULL, "x"), NEP_ERR_INVALID);
}

static void test_map_order_of_lines_does_not_matter(void **state)
{
    (void)state;
    static const char a[] = HEAD "0 0 1:1 0:0\n0 1 1:0*3\n";
    static const char b[] = HEAD "0 1 1:0*3\n\n  0 0 0:0*1 1:1\r\n";
    struct nep_map *x = NULL;
    struct nep_map *y = NULL;
    assert_int_equal(nep_map_load(write_file(a, sizeof a - 1), &x), NEP_OK);
    assert_int_equal(nep_map_load(write_file(b, sizeof b - 1), &y), NEP_OK);
    assert_true(nep_map_digest(x) == nep_map_digest(y));
    nep_map_destroy(x);
    nep_map_destroy(y);
}

static void test_map_impossible_shapes_are_refused(void **state)
{
    (void)state;
    const uint32_t sizes[] = {2, 2};
    struct nep_map *map = NULL;
    struct nep_map_shape shape = {sizeof shape, 1, 9, 2, 0, 2, sizes};
    assert_int_equal(nep_map_contiguous(&shape, &map), NEP_ERR_INVALID);
    assert_non_null(strstr(nep_last_message(), "8 slots"));
    shape = (struct nep_map_shape){sizeof shape, 1, 8, 2, 5, 2, sizes};
    assert_int_equal(nep_map_contiguous(&shape, &map), NEP_ERR_INVALID);
    shape = (struct nep_map_shape){sizeof shape, 1, 8, 2, 4, 2, NULL};
    assert_int_equal(nep_map_contiguous(&shape, &map), NEP_ERR_INVALID);
    assert_int_equal(nep_map_contiguous(NULL, &map), NEP_ERR_INVALID);
    assert_null(map);
}

static int set_up(void **state)
{
    (void)state;
    snprintf(dir, sizeof dir, "/tmp/nep_test_map.XXXXXX");
    return mkdtemp(dir) == NULL;
}

static int tear_down(void **state)
{
    (void)state;
    static const char *const names[] = {"hostile.nepmap", "a.nepmap", "fifo"};
    for (size_t i = 0; i < 3; i++) {
        unlink(path_of(names[i]));
    }
    return rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_map_hostile_files_are_refused_with_the_line),
        cmocka_unit_test(test_map_nul_bytes_and_no_files_are_refused),
        cmocka_unit_test(test_map_damaged_files_never_crash),
        cmocka_unit_test(test_map_saved_and_loaded_is_equal),
        cmocka_unit_test(test_map_order_of_lines_does_not_matter),
        cmocka_unit_test(test_map_impossible_shapes_are_refused),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
