/* SPDX-License-Identifier: Apache-2.0 */
#ifndef NEP_TEST_MODEL_CASES_H
#define NEP_TEST_MODEL_CASES_H

#include "options.h"

struct model_case {
    const char *group;
    const char *words;
    enum verdict expect;
    const char *broken; /* NULL: any sentence */
    bool big;
};
/* Ended by words == NULL. */
extern const struct model_case model_cases[];

#endif
