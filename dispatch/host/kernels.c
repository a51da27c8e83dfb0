/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which table of kernels runs on this CPU. The choice is made at run time because one binary serves
 * all CPUs; -march=native would tie it to the machine that built it. Asked once per communicator,
 * so nothing is remembered. Rejected: ifunc, which cannot be overridden by NEP_SIMD.
 */
#include "dispatch/host/kernels.h"

#include <stdio.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "dispatch/host/kernels_impl.h"

#define LIST_SIZE 96

#if defined(__x86_64__)

static void list_add(char *list, const char *name)
{
    size_t used = strlen(list);
    snprintf(list + used, LIST_SIZE - used, "%s%s", used != 0 ? ", " : "", name);
}

/* clang 14's __builtin_cpu_supports does not know f16c. */
static bool cpu_has_f16c(void)
{
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & 1u << 29) != 0;
}

/* The builtin also asks whether the system saves the wide registers. */
static void missing_avx2(char *list)
{
    if (!__builtin_cpu_supports("avx2")) {
        list_add(list, "avx2");
    }
    if (!__builtin_cpu_supports("fma")) {
        list_add(list, "fma");
    }
    if (!cpu_has_f16c()) {
        list_add(list, "f16c");
    }
}

static void missing_avx512(char *list)
{
    missing_avx2(list);
    if (!__builtin_cpu_supports("avx512f")) {
        list_add(list, "avx512f");
    }
    if (!__builtin_cpu_supports("avx512bw")) {
        list_add(list, "avx512bw");
    }
    if (!__builtin_cpu_supports("avx512vl")) {
        list_add(list, "avx512vl");
    }
    if (!__builtin_cpu_supports("avx512dq")) {
        list_add(list, "avx512dq");
    }
}

#define KERNELS_AVX2   (&nep_kernels_avx2)
#define KERNELS_AVX512 (&nep_kernels_avx512)

#else

static void missing_avx2(char *list)
{
    snprintf(list, LIST_SIZE, "x86-64");
}

#define missing_avx512 missing_avx2
#define KERNELS_AVX2   NULL
#define KERNELS_AVX512 NULL

#endif

static void missing_nothing(char *list)
{
    (void)list;
}

/* Widest first: what "auto" tries in order. */
static const struct {
    const char *name;
    const struct nep_kernels *kernels; /* NULL: not in this build */
    void (*missing)(char *list);       /* writes what the CPU lacks, if anything */
} choices[] = {
    {"avx512", KERNELS_AVX512, missing_avx512},
    {"avx2", KERNELS_AVX2, missing_avx2},
    {"c", &nep_kernels_c, missing_nothing},
};

enum nep_status nep_kernels_select(const char *simd, const struct nep_kernels **kernels_p)
{
    bool any = strcmp(simd, "auto") == 0;
    for (size_t i = 0; i < sizeof choices / sizeof choices[0]; i++) {
        if (!any && strcmp(simd, choices[i].name) != 0) {
            continue;
        }
        char list[LIST_SIZE] = "";
        choices[i].missing(list);
        if (choices[i].kernels != NULL && list[0] == '\0') {
            *kernels_p = choices[i].kernels;
            return NEP_OK;
        }
        if (!any) {
            return nep_fail(NEP_ERR_UNSUPPORTED,
                            "NEP_SIMD=%s: this CPU lacks %s; set NEP_SIMD=auto for the widest "
                            "that it has",
                            simd, list);
        }
    }
    return nep_fail(NEP_ERR_INVALID, "NEP_SIMD=%s is unknown: auto, avx512, avx2 or c", simd);
}
