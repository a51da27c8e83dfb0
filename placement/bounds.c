/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The spectral bound. Let A be the matrix of how often two experts share a token (mean over
 * tokens). For any partition into K parts of C experts, the pairs inside parts, per token, are at
 * most (C / 2) (1'A1 / E + the K - 1 largest eigenvalues of A with the constant vector projected
 * out) (Donath and Hoffman 1973). A token of k picks on d nodes has at least g(d) pairs inside
 * nodes, the balanced split; the mean of d is then at least the convex, decreasing, piecewise
 * linear function through the points (g(d), d), taken at that bound. Using the most pairs for d
 * nodes instead is a common slip and gives a number that is too high.
 *
 * All eigenvalues come from Jacobi rotations, because an iteration for the largest few could stop
 * below them, and the bound would not be one. Rejected: the linear relaxation, which is
 * (K - 1) / K for any trace.
 */
#include "placement/bounds.h"

#include <math.h>
#include <stdlib.h>

#include "base/status.h"

#define MAX_SWEEPS 60

static void rotate(double *a, uint32_t n, uint32_t p, uint32_t q)
{
    double apq = a[(size_t)p * n + q];
    double theta = (a[(size_t)q * n + q] - a[(size_t)p * n + p]) / (2.0 * apq);
    double t = (theta >= 0.0 ? 1.0 : -1.0) / (fabs(theta) + sqrt(theta * theta + 1.0));
    double c = 1.0 / sqrt(t * t + 1.0);
    double s = t * c;
    for (uint32_t i = 0; i < n; i++) {
        double x = a[(size_t)p * n + i];
        double y = a[(size_t)q * n + i];
        a[(size_t)p * n + i] = c * x - s * y;
        a[(size_t)q * n + i] = s * x + c * y;
    }
    for (uint32_t i = 0; i < n; i++) {
        double x = a[(size_t)i * n + p];
        double y = a[(size_t)i * n + q];
        a[(size_t)i * n + p] = c * x - s * y;
        a[(size_t)i * n + q] = s * x + c * y;
    }
}

/* Leaves the eigenvalues on the diagonal; *left_p: what could still be wrong in any of them. */
static void diagonalise(double *a, uint32_t n, double *left_p)
{
    double off = 0.0;
    for (int sweep = 0; sweep < MAX_SWEEPS; sweep++) {
        off = 0.0;
        for (uint32_t p = 0; p < n; p++) {
            for (uint32_t q = p + 1; q < n; q++) {
                off += 2.0 * a[(size_t)p * n + q] * a[(size_t)p * n + q];
            }
        }
        if (off < 1e-18) {
            break;
        }
        for (uint32_t p = 0; p < n; p++) {
            for (uint32_t q = p + 1; q < n; q++) {
                if (fabs(a[(size_t)p * n + q]) > 1e-14) {
                    rotate(a, n, p, q);
                }
            }
        }
    }
    *left_p = sqrt(off);
}

static int falling(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;
    return x > y ? -1 : x < y;
}

/* The most pairs inside nodes per token, over all partitions. */
static enum nep_status most_pairs(const struct nep_sets *sets, uint32_t nodes, double *pairs_p)
{
    uint32_t n = sets->num_items;
    double *a = calloc((size_t)n * n, sizeof *a);
    double *row = calloc(n, sizeof *row);
    if (a == NULL || row == NULL) {
        free(a);
        free(row);
        return nep_fail(NEP_ERR_NO_MEMORY, "bound: no memory for %u experts", n);
    }
    for (uint32_t t = 0; t < sets->num_tokens; t++) {
        const uint16_t *items = &sets->items[(size_t)t * sets->width];
        for (uint32_t i = 0; i < sets->len[t]; i++) {
            for (uint32_t j = 0; j < sets->len[t]; j++) {
                if (i != j) {
                    a[(size_t)items[i] * n + items[j]] += 1.0 / sets->num_tokens;
                }
            }
        }
    }
    double sum = 0.0;
    for (size_t i = 0; i < (size_t)n * n; i++) {
        row[i / n] += a[i] / n;
        sum += a[i];
    }
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t j = 0; j < n; j++) {
            a[(size_t)i * n + j] += sum / n / n - row[i] - row[j];
        }
    }
    double left = 0.0;
    diagonalise(a, n, &left);
    for (uint32_t i = 0; i < n; i++) {
        row[i] = a[(size_t)i * n + i];
    }
    qsort(row, n, sizeof *row, falling);
    double bound = sum / n;
    for (uint32_t i = 0; i + 1 < nodes; i++) {
        bound += row[i] + left;
    }
    free(a);
    free(row);
    *pairs_p = 0.5 * (n / nodes) * bound;
    return NEP_OK;
}

/* Pairs inside nodes when k picks are spread evenly over d nodes. */
static double least_pairs(uint32_t k, uint32_t d)
{
    double small = k / d;
    double large = small + 1.0;
    return (k % d) * large * (large - 1.0) / 2.0 + (d - k % d) * small * (small - 1.0) / 2.0;
}

enum nep_status nep_bound_distinct(const struct nep_sets *sets, uint32_t num_nodes,
                                   double *distinct_p)
{
    uint32_t experts = sets->num_items;
    if (num_nodes == 0 || experts % num_nodes != 0 || experts > NEP_BOUND_MAX_EXPERTS ||
        sets->num_tokens == 0) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "bound: %u experts (at most %u) on %u nodes, %u tokens: it needs equal "
                        "nodes and tokens",
                        experts, NEP_BOUND_MAX_EXPERTS, num_nodes, sets->num_tokens);
    }
    uint32_t k = sets->len[0];
    for (uint32_t t = 0; t < sets->num_tokens; t++) {
        if (sets->len[t] != k || k == 0) {
            return nep_fail(NEP_ERR_UNSUPPORTED,
                            "bound: token %u has %u picks, token 0 has %u; it needs equal ones", t,
                            sets->len[t], k);
        }
    }
    double pairs = 0.0;
    enum nep_status status = most_pairs(sets, num_nodes, &pairs);
    if (status != NEP_OK) {
        return status;
    }
    uint32_t most = k < num_nodes ? k : num_nodes;
    uint32_t d = most;
    while (d > 1 && least_pairs(k, d - 1) <= pairs) {
        d--;
    }
    double distinct = d;
    if (d > 1 && pairs > least_pairs(k, d)) {
        distinct -= (pairs - least_pairs(k, d)) / (least_pairs(k, d - 1) - least_pairs(k, d));
    }
    *distinct_p = distinct;
    return NEP_OK;
}
