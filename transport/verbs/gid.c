/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which GID. A RoCE port has many: two versions, link-local and routable ones, both families.
 * Version 1 is not routed; link-local addresses work on one segment only; both ends must use one
 * family. So each rank publishes its first GID of each kind and every pair takes the best kind that
 * both have. Rejected: a fixed index. The order of the table differs between machines and changes
 * when an address is added (the reports are many: UCCL 617, 799 and 803, nccl 2157).
 */
#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>

#include "transport/verbs/verbs.h"

static const char *const kind_names[] = {"RoCE v2 over IPv4", "RoCE v2 over IPv6", "InfiniBand",
                                         "RoCE v2, link-local", "RoCE v1"};

const char *nep_verbs_gid_kind_name(enum nep_verbs_gid_kind kind)
{
    return kind < NEP_VERBS_GID_NUM_KINDS ? kind_names[kind] : "none";
}

enum nep_verbs_gid_kind nep_verbs_gid_classify(const struct ibv_gid_entry *entry)
{
    static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
    const uint8_t *raw = entry->gid.raw;
    if (entry->gid_type == IBV_GID_TYPE_IB) {
        return NEP_VERBS_GID_IB;
    }
    if (entry->gid_type == IBV_GID_TYPE_ROCE_V1) {
        return NEP_VERBS_GID_V1;
    }
    if (memcmp(raw, mapped, sizeof mapped) == 0) {
        return NEP_VERBS_GID_V2_IPV4;
    }
    return raw[0] == 0xfe && (raw[1] & 0xc0) == 0x80 ? NEP_VERBS_GID_V2_LINK
                                                     : NEP_VERBS_GID_V2_IPV6;
}

void nep_verbs_gid_text(const uint8_t raw[16], char text[48])
{
    if (inet_ntop(AF_INET6, raw, text, 48) == NULL) {
        snprintf(text, 48, "?");
    }
}

static void describe(const struct nep_verbs_gids *gids, char *text, size_t size)
{
    size_t used = 0;
    text[0] = '\0';
    for (uint32_t kind = 0; kind < NEP_VERBS_GID_NUM_KINDS; kind++) {
        if (gids->index[kind] >= 0 && used < size) {
            used += (size_t)snprintf(text + used, size - used, "%s%s", used > 0 ? ", " : "",
                                     kind_names[kind]);
        }
    }
    if (used == 0) {
        snprintf(text, size, "none");
    }
}

enum nep_status nep_verbs_gid_agree(const struct nep_verbs_gids *mine,
                                    const struct nep_verbs_gids *theirs,
                                    enum nep_verbs_gid_kind *kind_p)
{
    for (uint32_t kind = 0; kind < NEP_VERBS_GID_NUM_KINDS; kind++) {
        if (mine->index[kind] >= 0 && theirs->index[kind] >= 0) {
            *kind_p = (enum nep_verbs_gid_kind)kind;
            return NEP_OK;
        }
    }
    char here[160], there[160];
    describe(mine, here, sizeof here);
    describe(theirs, there, sizeof there);
    return nep_fail(NEP_ERR_UNSUPPORTED,
                    "verbs: no GID of one kind at both ends: here %s; there %s; give both ports an "
                    "address of one family (ip addr add), or set NEP_VERBS_GID",
                    here, there);
}
