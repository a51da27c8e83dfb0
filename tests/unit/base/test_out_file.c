/* SPDX-License-Identifier: Apache-2.0 */
/* Files that are there whole or not at all. */
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/out_file.h"
#include "tests/unit/cmocka_all.h"

static char folder[64];

static const char *in_folder(const char *name)
{
    static char path[2][128];
    static int turn;
    turn = !turn;
    snprintf(path[turn], sizeof path[turn], "%s/%s", folder, name);
    return path[turn];
}

static void assert_content(const char *name, const char *expected)
{
    char text[64] = "";
    FILE *file = fopen(in_folder(name), "re");
    assert_non_null(file);
    size_t len = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[len] = '\0';
    assert_string_equal(text, expected);
}

static int num_files(void)
{
    int num = 0;
    DIR *dir = opendir(folder);
    assert_non_null(dir);
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
        num += entry->d_name[0] != '.';
    }
    closedir(dir);
    return num;
}

static void put(const char *name, const char *text)
{
    struct nep_out_file out;
    assert_int_equal(nep_out_file_open(&out, in_folder(name)), NEP_OK);
    fputs(text, out.file);
    assert_int_equal(nep_out_file_commit(&out), NEP_OK);
}

static void test_out_file_appears_at_the_end_and_replaces(void **state)
{
    (void)state;
    struct nep_out_file out;
    put("a", "first");
    assert_int_equal(nep_out_file_open(&out, in_folder("a")), NEP_OK);
    fputs("second", out.file);
    fflush(out.file);
    assert_content("a", "first");
    assert_int_equal(nep_out_file_commit(&out), NEP_OK);
    assert_content("a", "second");
    assert_int_equal(num_files(), 1);
    nep_out_file_drop(&out); /* nothing is left to drop */
    assert_content("a", "second");
}

static void test_out_file_dropped_leaves_nothing(void **state)
{
    (void)state;
    struct nep_out_file out;
    assert_int_equal(nep_out_file_open(&out, in_folder("none")), NEP_OK);
    fputs("half", out.file);
    nep_out_file_drop(&out);
    assert_int_equal(num_files(), 1);
    assert_int_equal(nep_out_file_open(&out, in_folder("no/such/folder")), NEP_ERR_IO);
    nep_out_file_drop(&out);
}

/* Room for 4 KiB: as on a full disk, the file that was there stays. */
static void test_out_file_without_room_keeps_the_old_one(void **state)
{
    (void)state;
    struct rlimit old;
    struct nep_out_file out;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    const struct rlimit small = {4096, old.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(nep_out_file_open(&out, in_folder("a")), NEP_OK);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    for (int i = 0; i < 10000; i++) {
        fputs("too much", out.file);
    }
    enum nep_status status = nep_out_file_commit(&out);
    setrlimit(RLIMIT_FSIZE, &old);
    assert_int_equal(status, NEP_ERR_IO);
    assert_non_null(strstr(nep_last_message(), in_folder("a")));
    assert_content("a", "second");
    assert_int_equal(num_files(), 1);
}

static void test_out_file_follows_links_and_writes_devices_in_place(void **state)
{
    (void)state;
    struct stat info;
    struct nep_out_file out;
    assert_int_equal(symlink("a", in_folder("link")), 0);
    put("link", "third");
    assert_content("a", "third");
    assert_int_equal(lstat(in_folder("link"), &info), 0);
    assert_true(S_ISLNK(info.st_mode));
    assert_int_equal(nep_out_file_open(&out, "/dev/null"), NEP_OK);
    assert_int_equal(nep_out_file_commit(&out), NEP_OK);
    assert_int_equal(stat("/dev/null", &info), 0);
    assert_true(S_ISCHR(info.st_mode));
    assert_int_equal(nep_out_file_open(&out, "/dev/full"), NEP_OK);
    fputs("x", out.file);
    assert_int_equal(nep_out_file_commit(&out), NEP_ERR_IO);
    assert_non_null(strstr(nep_last_message(), strerror(ENOSPC)));
    unlink(in_folder("link"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_out_file_appears_at_the_end_and_replaces),
        cmocka_unit_test(test_out_file_dropped_leaves_nothing),
        cmocka_unit_test(test_out_file_without_room_keeps_the_old_one),
        cmocka_unit_test(test_out_file_follows_links_and_writes_devices_in_place),
    };
    snprintf(folder, sizeof folder, "/tmp/test_out_file.%ld", (long)getpid());
    if (mkdir(folder, 0700) != 0) {
        perror(folder);
        return 1;
    }
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(in_folder("a"));
    rmdir(folder);
    return failed;
}
