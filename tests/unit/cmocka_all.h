/* SPDX-License-Identifier: Apache-2.0 */
/* cmocka.h needs these four before it, in this order; one include for all tests. */
/* clang-format off */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>
/* clang-format on */
