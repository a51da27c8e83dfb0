/* SPDX-License-Identifier: Apache-2.0 */
#ifndef NEP_TEST_MODEL_OPTIONS_H
#define NEP_TEST_MODEL_OPTIONS_H

#include "model.h"

struct options {
    struct params params; /* params.ops points to ops */
    char ops[MAX_OPS + 1];
};
/* false, and a sentence on stderr, for words that mean nothing. */
bool options_parse(const char *text, struct options *options);

#endif
