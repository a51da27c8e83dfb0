/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Stands in for libFuzzer where the compiler has none (gcc): no coverage feedback, only mutations
 * of the corpus from a printed seed. It finds less; it runs everywhere, and with the same
 * arguments.
 */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum { MAX_INPUTS = 4096, MAX_BYTES = 1 << 16 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

struct input {
    uint8_t *bytes;
    size_t len;
};

static struct input inputs[MAX_INPUTS];
static size_t num_inputs;
static uint64_t random_state;

static uint64_t next_random(void)
{
    random_state += 0x9e3779b97f4a7c15ull; /* splitmix64 */
    uint64_t z = random_state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static size_t below(size_t limit)
{
    return limit == 0 ? 0 : (size_t)(next_random() % limit);
}

static void load(const char *path)
{
    struct stat info;
    if (stat(path, &info) != 0) {
        fprintf(stderr, "driver: %s is not there\n", path);
        exit(2);
    }
    if (S_ISDIR(info.st_mode)) {
        DIR *dir = opendir(path);
        struct dirent *entry;
        while (dir != NULL && (entry = readdir(dir)) != NULL) {
            char name[1024];
            if (entry->d_name[0] != '.') {
                snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
                load(name);
            }
        }
        closedir(dir);
        return;
    }
    FILE *file = fopen(path, "rb");
    uint8_t *bytes = malloc(MAX_BYTES);
    if (file == NULL || bytes == NULL || num_inputs == MAX_INPUTS) {
        fprintf(stderr, "driver: cannot read %s\n", path);
        exit(2);
    }
    inputs[num_inputs++] = (struct input){bytes, fread(bytes, 1, MAX_BYTES, file)};
    fclose(file);
}

static size_t mutate_once(uint8_t *bytes, size_t len, size_t max_len)
{
    static const uint8_t odd[] = {0, 1, 0x7f, 0x80, 0xff, '\n', '=', '9', '-', ':'};
    size_t at = below(len), run = 1 + below(16);
    switch (below(7)) {
    case 0:
        if (len > 0) {
            bytes[at] ^= (uint8_t)(1u << below(8));
        }
        return len;
    case 1:
        if (len > 0) {
            bytes[at] = odd[below(sizeof odd)];
        }
        return len;
    case 2: /* insert */
        run = len + run > max_len ? max_len - len : run;
        memmove(bytes + at + run, bytes + at, len - at);
        for (size_t i = 0; i < run; i++) {
            bytes[at + i] = (uint8_t)next_random();
        }
        return len + run;
    case 3: /* delete */
        run = at + run > len ? len - at : run;
        memmove(bytes + at, bytes + at + run, len - at - run);
        return len - run;
    case 4: /* a piece of another input */
        if (num_inputs > 0) {
            const struct input *other = &inputs[below(num_inputs)];
            size_t from = below(other->len), piece = below(other->len - from + 1);
            piece = at + piece > max_len ? max_len - at : piece;
            memcpy(bytes + at, other->bytes + from, piece);
            return at + piece > len ? at + piece : len;
        }
        return len;
    case 5: /* a number at its edges */
        for (size_t i = 0; i < 4 && at + i < len; i++) {
            bytes[at + i] = odd[below(5)];
        }
        return len;
    default:
        return below(len + 1);
    }
}

int main(int argc, char **argv)
{
    static uint8_t bytes[MAX_BYTES];
    unsigned long long runs = 20000, seed = (unsigned long long)time(NULL), seconds = 0;
    unsigned long long max_len = 4096;
    for (int i = 1; i < argc; i++) {
        if (sscanf(argv[i], "-runs=%llu", &runs) == 1 ||
            sscanf(argv[i], "-seed=%llu", &seed) == 1 ||
            sscanf(argv[i], "-max_len=%llu", &max_len) == 1 ||
            sscanf(argv[i], "-max_total_time=%llu", &seconds) == 1) {
            continue;
        }
        if (argv[i][0] != '-') {
            load(argv[i]);
        }
    }
    max_len = max_len > MAX_BYTES ? MAX_BYTES : max_len;
    random_state = seed;
    printf("driver: seed %llu, %zu inputs\n", seed, num_inputs);
    fflush(stdout);
    for (size_t i = 0; i < num_inputs; i++) {
        LLVMFuzzerTestOneInput(inputs[i].bytes, inputs[i].len);
    }
    time_t end = time(NULL) + (time_t)seconds;
    unsigned long long done = 0;
    for (; done < runs && (seconds == 0 || time(NULL) < end); done++) {
        size_t len = 0;
        if (num_inputs > 0) {
            const struct input *input = &inputs[below(num_inputs)];
            len = input->len < max_len ? input->len : max_len;
            memcpy(bytes, input->bytes, len);
        }
        for (size_t k = 1 + below(6); k > 0; k--) {
            len = mutate_once(bytes, len, max_len);
        }
        /* On the heap, exactly as long: a read past its end is seen by the sanitizer. */
        uint8_t *exact = malloc(len + (len == 0));
        memcpy(exact, bytes, len);
        LLVMFuzzerTestOneInput(exact, len);
        free(exact);
    }
    for (size_t i = 0; i < num_inputs; i++) {
        free(inputs[i].bytes);
    }
    printf("driver: %llu runs\n", done);
    return 0;
}
