/* SPDX-License-Identifier: Apache-2.0 */
/* Log with levels, to standard error or NEP_LOG_FILE; the level is NEP_LOG. Thread-safe, one line a
 * call. */
#ifndef NEP_BASE_LOG_H
#define NEP_BASE_LOG_H

#include "base/status.h"

enum nep_log_level { NEP_LOG_NONE, NEP_LOG_ERROR, NEP_LOG_WARN, NEP_LOG_INFO, NEP_LOG_DEBUG };

void nep_log(enum nep_log_level level, const char *fmt, ...) NEP_PRINTF(2, 3);
/* True where nep_log would print. */
int nep_log_enabled(enum nep_log_level level);
/* Warnings written so far by this process: tests compare it before and after. */
uint64_t nep_log_num_warnings(void);
/*
 * Level and file of the whole process ("" = standard error; %p in the name becomes the process id,
 * %h the host's name). nep_config_load calls it with NEP_LOG and NEP_LOG_FILE; before that, the
 * first nep_log reads the same variables. The file is appended to, a line per write.
 */
enum nep_status nep_log_open(enum nep_log_level level, const char *path);

#define nep_warn(...)  nep_log(NEP_LOG_WARN, __VA_ARGS__)
#define nep_info(...)  nep_log(NEP_LOG_INFO, __VA_ARGS__)
#define nep_debug(...) nep_log(NEP_LOG_DEBUG, __VA_ARGS__)

#endif
