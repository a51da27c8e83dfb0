/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a caller says about its memory is checked against /proc/self/maps before anybody relies on
 * it: a private mapping, or one of another file, would look right here and hold other bytes in
 * every peer. Rejected: process_vm_writev, by which a peer could store into any memory. It is a
 * system call and a walk of page tables for each row.
 */
#include "transport/share.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/clock.h"

/* Ranks that read the same number (and process id) are threads of one process. */
static uint64_t process_number(void)
{
    static _Atomic uint64_t number;
    uint64_t mine = atomic_load(&number), none = 0;
    if (mine != 0) {
        return mine;
    }
    if (getrandom(&mine, sizeof mine, 0) != (ssize_t)sizeof mine) {
        mine = nep_now_ns();
    }
    mine |= 1;
    return atomic_compare_exchange_strong(&number, &none, mine) ? mine : none;
}

/* One line of /proc/self/maps. */
struct mapping {
    uint64_t from, to, offset, inode, device;
    char rights[5]; /* "rw-s" */
};

static bool read_mapping(const char *line, struct mapping *mapping)
{
    unsigned long long from, to, offset, inode;
    unsigned major, minor;
    if (sscanf(line, "%llx-%llx %4s %llx %x:%x %llu", &from, &to, mapping->rights, &offset, &major,
               &minor, &inode) != 7) {
        return false;
    }
    mapping->from = from;
    mapping->to = to;
    mapping->offset = offset;
    mapping->inode = inode;
    mapping->device = makedev(major, minor);
    return true;
}

/*
 * Where [at, at + bytes) lies in the file: it must be one unbroken, shared, writable piece of it.
 * False with what is wrong in *why_p.
 */
static bool find_in_file(uint64_t at, uint64_t bytes, const struct stat *file, uint64_t *offset_p,
                         const char **why_p)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    char *line = NULL;
    size_t cap = 0;
    uint64_t next = at; /* all before it is right */
    *why_p = maps == NULL ? "/proc/self/maps cannot be read" : "it is not mapped to its end";
    while (maps != NULL && next < at + bytes && getline(&line, &cap, maps) > 0) {
        struct mapping mapping;
        if (!read_mapping(line, &mapping) || next < mapping.from || next >= mapping.to) {
            continue;
        }
        uint64_t offset = mapping.offset + (next - mapping.from);
        if (mapping.inode != file->st_ino || mapping.device != file->st_dev) {
            *why_p = "it is not a mapping of that file";
            break;
        }
        if (mapping.rights[1] != 'w' || mapping.rights[3] != 's') {
            *why_p = "it is not mapped MAP_SHARED and writable";
            break;
        }
        if (next != at && offset != *offset_p + (next - at)) {
            *why_p = "its pages are not in the file's order";
            break;
        }
        if (next == at) {
            *offset_p = offset;
        }
        next = mapping.to;
    }
    free(line);
    if (maps != NULL) {
        fclose(maps);
    }
    return next >= at + bytes;
}

enum nep_status nep_share_offer(void *base, size_t bytes, int fd, struct nep_share_card *card_p)
{
    struct nep_share_card card = {
        .address = (uintptr_t)base,
        .bytes = bytes,
        .process = process_number(),
        .pid = (int32_t)getpid(),
        .fd = -1,
    };
    if (fd >= 0 && bytes != 0) {
        struct stat info;
        const char *why;
        if (fstat(fd, &info) != 0) {
            return nep_fail(NEP_ERR_INVALID, "fd %d is not an open file: %m", fd);
        }
        if (!find_in_file(card.address, bytes, &info, &card.offset, &why)) {
            return nep_fail(NEP_ERR_INVALID, "memory at %p, %zu bytes, is not that of fd %d: %s",
                            base, bytes, fd, why);
        }
        if (info.st_size < 0 || card.offset + bytes > (uint64_t)info.st_size) {
            return nep_fail(NEP_ERR_INVALID,
                            "the file of fd %d has %lld bytes, the memory ends at %llu of it", fd,
                            (long long)info.st_size, (unsigned long long)(card.offset + bytes));
        }
        card.inode = info.st_ino;
        card.device = info.st_dev;
        card.fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
        if (card.fd < 0) {
            return nep_fail(NEP_ERR_IO, "fd %d cannot be duplicated: %m", fd);
        }
    }
    *card_p = card;
    return NEP_OK;
}

void nep_share_withdraw(struct nep_share_card *card)
{
    if (card->fd >= 0) {
        close(card->fd);
        card->fd = -1;
    }
}

static enum nep_status map_file(const struct nep_share_card *card, uint32_t name, int fd,
                                const char *path, struct nep_share *share)
{
    struct stat info;
    if (fstat(fd, &info) != 0 || info.st_ino != card->inode || info.st_dev != card->device) {
        return nep_fail(NEP_ERR_MISMATCH,
                        "%s is not the memory that rank %u registers: another process has that "
                        "number here",
                        path, name);
    }
    /* Whole pages of the file: 2 MiB where it is made of huge ones. */
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    page = (uint64_t)info.st_blksize > page ? (uint64_t)info.st_blksize : page;
    uint64_t from = card->offset / page * page;
    size_t bytes = (size_t)((card->offset + card->bytes - from + page - 1) / page * page);
    void *mapping = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)from);
    if (mapping == MAP_FAILED) {
        return nep_fail(NEP_ERR_NO_MEMORY, "mapping %zu bytes that rank %u registers failed: %m",
                        bytes, name);
    }
    *share = (struct nep_share){(uint8_t *)mapping + (card->offset - from), mapping, bytes};
    return NEP_OK;
}

enum nep_status nep_share_attach(const struct nep_share_card *card, uint32_t name,
                                 struct nep_share *share_p)
{
    if (card->bytes == 0) {
        *share_p = (struct nep_share){NULL, NULL, 0};
        return NEP_OK;
    }
    if (card->process == process_number() && card->pid == (int32_t)getpid()) {
        *share_p = (struct nep_share){(uint8_t *)(uintptr_t)card->address, NULL, 0};
        return NEP_OK;
    }
    if (card->fd < 0) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "rank %u registers memory without a file (fd -1), which other processes of "
                        "its node cannot map: take it from nep_buffer_alloc, or make it with "
                        "memfd_create and mmap(MAP_SHARED) and pass its fd",
                        name);
    }
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", card->pid, card->fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        return nep_fail(NEP_ERR_IO,
                        "cannot open the memory that rank %u registers (%s): %m; its file must be "
                        "open for reading and writing, by a process of the same user",
                        name, path);
    }
    enum nep_status status = map_file(card, name, fd, path, share_p);
    close(fd);
    return status;
}

void nep_share_detach(struct nep_share *share)
{
    if (share->mapping != NULL) {
        munmap(share->mapping, share->mapped_bytes);
    }
    *share = (struct nep_share){NULL, NULL, 0};
}
