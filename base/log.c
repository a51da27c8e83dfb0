/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One line, one write(2): lines of many processes that append to one file do not mix, and no lock
 * is held, so that a fork in another thread's nep_log cannot leave the child with a locked log.
 *
 * The log is the one thing that belongs to the process and not to a communicator: errors before
 * there is a communicator must be seen too. A second nep_log_open replaces the file behind the same
 * descriptor number (dup3), so that a thread in the middle of a write never meets a closed one.
 * Rejected: stdio with its lock (fork), and syslog (nobody looks there for a job's output).
 */
#include "base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/config.h"
#include "base/path.h"

enum { LEVEL_UNSET = -1, LINE_CAP = 1400 };

static atomic_int log_level = LEVEL_UNSET;
static atomic_int log_fd = STDERR_FILENO;
static atomic_ullong num_warnings;

static int current_level(void)
{
    int level = atomic_load_explicit(&log_level, memory_order_relaxed);
    if (level == LEVEL_UNSET) {
        /* Two threads may both do this; both arrive at the same level. */
        nep_config_open_log();
        level = atomic_load_explicit(&log_level, memory_order_relaxed);
    }
    return level;
}

int nep_log_enabled(enum nep_log_level level)
{
    return level != NEP_LOG_NONE && (int)level <= current_level();
}

uint64_t nep_log_num_warnings(void)
{
    return atomic_load_explicit(&num_warnings, memory_order_relaxed);
}

static enum nep_status open_file(const char *path)
{
    char name[512];
    nep_path_expand(path, UINT32_MAX, name, sizeof name);
    int fd = open(name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOCTTY, 0644);
    if (fd < 0) {
        return nep_fail(NEP_ERR_IO,
                        "cannot write the log to %s (NEP_LOG_FILE): %s; name a file in a folder "
                        "that exists and that this user may write",
                        name, strerror(errno));
    }
    int old = STDERR_FILENO;
    if (!atomic_compare_exchange_strong(&log_fd, &old, fd)) {
        dup3(fd, old, O_CLOEXEC);
        close(fd);
    }
    return NEP_OK;
}

enum nep_status nep_log_open(enum nep_log_level level, const char *path)
{
    /* Set first: open_file's own failure is logged at this level. */
    atomic_store_explicit(&log_level, (int)level, memory_order_relaxed);
    if (path[0] != '\0') {
        return open_file(path);
    }
    int fd = atomic_load(&log_fd);
    if (fd != STDERR_FILENO) {
        dup3(STDERR_FILENO, fd, O_CLOEXEC);
    }
    return NEP_OK;
}

static size_t start_line(char *line, size_t cap, enum nep_log_level level)
{
    static const char *const names[] = {"none", "error", "warn", "info", "debug"};
    struct timespec now;
    struct tm day;
    clock_gettime(CLOCK_REALTIME, &now);
    localtime_r(&now.tv_sec, &day);
    int used = snprintf(line, cap, "nearep %02d:%02d:%02d.%03ld %ld %s: ", day.tm_hour, day.tm_min,
                        day.tm_sec, now.tv_nsec / 1000000, (long)gettid(), names[level]);
    return used < 0 ? 0 : (size_t)used;
}

void nep_log(enum nep_log_level level, const char *fmt, ...)
{
    if (level == NEP_LOG_WARN) {
        atomic_fetch_add_explicit(&num_warnings, 1, memory_order_relaxed);
    }
    if (!nep_log_enabled(level)) {
        return;
    }
    int saved_errno = errno;
    char line[LINE_CAP];
    size_t used = start_line(line, sizeof line, level);
    va_list args;
    va_start(args, fmt);
    int text = vsnprintf(line + used, sizeof line - used, fmt, args);
    va_end(args);
    if (text > 0) {
        used += (size_t)text;
    }
    if (used > sizeof line - 2) {
        used = sizeof line - 2;
    }
    line[used++] = '\n';
    /* A log that cannot be written has nobody to complain to. */
    ssize_t written = write(atomic_load_explicit(&log_fd, memory_order_relaxed), line, used);
    (void)written;
    errno = saved_errno;
}
