/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Times the row kernels over cold memory, each table that runs here: sums of 8 scattered rows, a
 * push to 8 scattered places, copies, fp8 casts. Nothing is asserted. Rows of 14336 bytes (hidden
 * 7168, bf16) in an arena far larger than the caches, random data, rows in random order; tables
 * alternate, medians of all rounds, thread CPU time.
 *
 *   bench_kernels [rounds [arena MiB]]
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "dispatch/host/kernels.h"

#define ELEMENTS   7168
#define ROW_BYTES  (2 * ELEMENTS)
#define FAN        8
#define MAX_ROUNDS 99

enum { JOB_SUM, JOB_SUM_RANKS, JOB_SUM_UNITS, JOB_PUSH, JOB_COPY, JOB_CAST, NUM_JOBS };

static const char *const job_names[NUM_JOBS] = {"sum of 8 rows, one rank",
                                                "sum of 8 rows, 8 ranks",
                                                "sum of 8 partials",
                                                "push to 8",
                                                "copy",
                                                "cast to fp8"};
/* Rows read and written from and to memory by one step, for the rate. */
static const double job_rows[NUM_JOBS] = {FAN + 1, FAN + 1, FAN + 1, FAN + 1, 2, 1.5};

struct arena {
    char *base;
    uint32_t num_rows;
    uint32_t *order; /* a permutation of the rows */
};

static uint64_t random_next(uint64_t *state)
{
    *state = *state * 6364136223846793005ull + 1442695040888963407ull;
    return *state >> 33;
}

/* Of this thread on a core: on a busy machine the wall clock counts others' time slices. */
static uint64_t cpu_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static bool arena_init(struct arena *arena, size_t bytes)
{
    arena->num_rows = (uint32_t)(bytes / ROW_BYTES);
    arena->base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    arena->order = malloc(arena->num_rows * sizeof *arena->order);
    if (arena->base == MAP_FAILED || arena->order == NULL) {
        return false;
    }
    uint64_t state = 2463534242u;
    for (size_t i = 0; i + 4 <= bytes; i += 4) {
        /* bf16 pairs near one, of both signs */
        uint32_t bits = (uint32_t)(random_next(&state) & 0x807f807fu) | 0x3f803f80u;
        memcpy(arena->base + i, &bits, sizeof bits);
    }
    for (uint32_t i = 0; i < arena->num_rows; i++) {
        uint32_t j = (uint32_t)(random_next(&state) % (i + 1));
        arena->order[i] = arena->order[j];
        arena->order[j] = i;
    }
    return true;
}

static char *row_at(const struct arena *arena, uint32_t idx)
{
    return arena->base + (size_t)arena->order[idx % arena->num_rows] * ROW_BYTES;
}

/* One step over rows [at, at + 9); inputs from one arena, outputs to the other. */
static void step(const struct nep_kernels *table, int job, const struct arena *in,
                 const struct arena *out, uint32_t at)
{
    static float scales[ELEMENTS / NEP_FP8_BLOCK];
    struct nep_term terms[FAN];
    void *dsts[FAN];
    for (uint32_t i = 0; i < FAN; i++) {
        terms[i] = (struct nep_term){row_at(in, at + i), job == JOB_SUM_UNITS ? 1 : 0.1234f,
                                     job != JOB_SUM};
        dsts[i] = row_at(out, at + i);
    }
    switch (job) {
    case JOB_SUM:
    case JOB_SUM_RANKS:
    case JOB_SUM_UNITS:
        table->sum_final[0](dsts[0], terms, FAN, ELEMENTS);
        break;
    case JOB_PUSH:
        table->push(dsts, FAN, terms[0].row, ROW_BYTES);
        break;
    case JOB_COPY:
        table->copy(dsts[0], terms[0].row, ROW_BYTES);
        break;
    default:
        table->cast_fp8(dsts[0], scales, terms[0].row, NEP_DTYPE_BF16, ELEMENTS, NEP_SCALE_FP32);
        break;
    }
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void bench(const struct nep_kernels **tables, int num_tables, int rounds,
                  const struct arena *in, const struct arena *out)
{
    static double ns[3][MAX_ROUNDS];
    for (int job = 0; job < NUM_JOBS; job++) {
        uint32_t num_steps = in->num_rows / FAN / 2;
        uint32_t at = 0;
        for (int round = 0; round < rounds; round++) {
            for (int k = 0; k < num_tables; k++) {
                uint64_t start_ns = cpu_now_ns();
                for (uint32_t s = 0; s < num_steps; s++, at += FAN) {
                    step(tables[k], job, in, out, at);
                }
                tables[k]->fence();
                ns[k][round] = (double)(cpu_now_ns() - start_ns) / num_steps;
            }
        }
        for (int k = 0; k < num_tables; k++) {
            qsort(ns[k], (size_t)rounds, sizeof ns[k][0], compare);
            double median = ns[k][rounds / 2];
            printf("%-24s %-7s %8.0f ns a row (%.0f to %.0f), %5.1f GB/s\n", job_names[job],
                   tables[k]->name, median, ns[k][0], ns[k][rounds - 1],
                   job_rows[job] * ROW_BYTES / median);
        }
    }
}

int main(int argc, char **argv)
{
    int rounds = argc > 1 ? atoi(argv[1]) : 7;
    size_t bytes = (size_t)(argc > 2 ? atoi(argv[2]) : 512) << 20;
    static const char *const names[] = {"c", "avx2", "avx512"};
    const struct nep_kernels *tables[3];
    struct arena in, out;
    int num = 0;
    for (int i = 0; i < 3; i++) {
        if (nep_kernels_select(names[i], &tables[num]) == NEP_OK) {
            num++;
        } else {
            printf("%s\n", nep_last_message());
        }
    }
    if (rounds < 1 || rounds > MAX_ROUNDS || bytes < ROW_BYTES * FAN * 4 ||
        !arena_init(&in, bytes) || !arena_init(&out, bytes)) {
        fprintf(stderr, "usage: bench_kernels [rounds 1 to 99 [arena MiB]]; twice the arena must "
                        "fit in memory\n");
        return 2;
    }
    bench(tables, num, rounds, &in, &out);
    return 0;
}
