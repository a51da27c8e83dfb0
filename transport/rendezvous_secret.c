/* SPDX-License-Identifier: Apache-2.0 */
/* Where the secret of a job comes from. A file is better than the environment, which every process
 * of the same user can read. */
#include <errno.h>
#include <fcntl.h>
#include <sodium.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "transport/rendezvous.h"

enum nep_status nep_rendezvous_secret_make(char secret[NEP_RENDEZVOUS_SECRET_BYTES])
{
    uint8_t bytes[32];
    if (sodium_init() < 0) {
        return nep_fail(NEP_ERR_UNSUPPORTED, "libsodium cannot start: no source of random numbers");
    }
    randombytes_buf(bytes, sizeof bytes);
    sodium_bin2hex(secret, NEP_RENDEZVOUS_SECRET_BYTES, bytes, sizeof bytes);
    sodium_memzero(bytes, sizeof bytes);
    return NEP_OK;
}

static enum nep_status check_rights(int fd, const char *path)
{
    struct stat info;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        return nep_fail(NEP_ERR_INVALID, "NEP_SECRET_FILE %s is not a plain file", path);
    }
    if (info.st_uid != geteuid()) {
        return nep_fail(NEP_ERR_INVALID,
                        "NEP_SECRET_FILE %s belongs to user %u, not to this one (%u): chown it",
                        path, (unsigned)info.st_uid, (unsigned)geteuid());
    }
    if ((info.st_mode & 077) != 0) {
        return nep_fail(NEP_ERR_INVALID,
                        "NEP_SECRET_FILE %s has rights %03o, so that others may use it: chmod 600",
                        path, (unsigned)(info.st_mode & 0777));
    }
    return NEP_OK;
}

static enum nep_status read_file(int fd, const char *path, char secret[NEP_RENDEZVOUS_SECRET_BYTES])
{
    size_t len = 0;
    ssize_t got;
    while (len < NEP_RENDEZVOUS_SECRET_BYTES &&
           ((got = read(fd, secret + len, NEP_RENDEZVOUS_SECRET_BYTES - len)) > 0 ||
            (got < 0 && errno == EINTR))) {
        len += got > 0 ? (size_t)got : 0;
    }
    if (len == NEP_RENDEZVOUS_SECRET_BYTES) {
        return nep_fail(NEP_ERR_INVALID, "NEP_SECRET_FILE %s is longer than %d bytes", path,
                        NEP_RENDEZVOUS_SECRET_BYTES - 1);
    }
    while (len > 0 && (secret[len - 1] == '\n' || secret[len - 1] == '\r')) {
        len--;
    }
    secret[len] = '\0';
    if (len < 16 || memchr(secret, '\0', len) != NULL) {
        return nep_fail(NEP_ERR_INVALID,
                        "NEP_SECRET_FILE %s must hold 16 to %d characters of text: openssl rand "
                        "-hex 32 makes some",
                        path, NEP_RENDEZVOUS_SECRET_BYTES - 1);
    }
    return NEP_OK;
}

enum nep_status nep_rendezvous_secret_read(const struct nep_config *config,
                                           char secret[NEP_RENDEZVOUS_SECRET_BYTES])
{
    if (config->secret_file[0] == '\0') {
        snprintf(secret, NEP_RENDEZVOUS_SECRET_BYTES, "%s", config->secret);
        return NEP_OK;
    }
    if (config->secret[0] != '\0') {
        return nep_fail(NEP_ERR_INVALID, "NEP_SECRET and NEP_SECRET_FILE are both set: unset one");
    }
    int fd = open(config->secret_file, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (fd < 0) {
        return nep_fail(NEP_ERR_NOT_FOUND, "NEP_SECRET_FILE %s: %s", config->secret_file,
                        strerror(errno));
    }
    char text[NEP_RENDEZVOUS_SECRET_BYTES];
    enum nep_status status = check_rights(fd, config->secret_file);
    if (status == NEP_OK) {
        status = read_file(fd, config->secret_file, text);
    }
    close(fd);
    if (status == NEP_OK) {
        memcpy(secret, text, sizeof text);
    }
    sodium_memzero(text, sizeof text);
    return status;
}
