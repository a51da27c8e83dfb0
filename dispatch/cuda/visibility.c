/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Plain C on numbers, so that every device that nobody has here can be tested. Rejected: a flush in
 * any case, 1 to 2 us per arrival where the device promises order anyway; a flush by a stream's
 * memory operation, which cannot be had by a thread that makes no CUDA calls.
 */
#include "dispatch/cuda/visibility.h"

#include <stdio.h>
#include <string.h>

enum { ORDERED_OWNER = 100, ORDERED_ALL = 200, FLUSH_BY_HOST = 1 };

const char *nep_visibility_name(enum nep_visibility visibility)
{
    static const char *const names[] = {"ordered", "flush", "staged"};
    return names[visibility];
}

static bool is_ordered(const struct nep_visibility_facts *facts)
{
    return facts->writes_ordering >= ORDERED_ALL ||
           (facts->writes_ordering >= ORDERED_OWNER && facts->num_devices == 1);
}

static enum nep_visibility choose(const struct nep_visibility_facts *facts, const char **why_p)
{
    if (!facts->reaches_device) {
        *why_p = "the fabric's transport does not reach memory of a GPU";
        return NEP_VISIBILITY_STAGED;
    }
    if (!facts->gpudirect) {
        *why_p = "the device has no GPUDirect RDMA";
        return NEP_VISIBILITY_STAGED;
    }
    if (is_ordered(facts)) {
        *why_p = facts->num_devices == 1 ? "the device orders a NIC's writes for itself, and "
                                           "no other GPU reads them"
                                         : "the device orders a NIC's writes for all GPUs";
        return NEP_VISIBILITY_ORDERED;
    }
    if ((facts->flush_options & FLUSH_BY_HOST) != 0) {
        *why_p = "the device does not order a NIC's writes for all who read them; the host can "
                 "flush";
        return NEP_VISIBILITY_FLUSH;
    }
    *why_p = "the device neither orders a NIC's writes nor lets the host flush them";
    return NEP_VISIBILITY_STAGED;
}

static bool find(const char *name, enum nep_visibility *visibility_p)
{
    for (int v = NEP_VISIBILITY_ORDERED; v <= NEP_VISIBILITY_STAGED; v++) {
        if (strcmp(name, nep_visibility_name((enum nep_visibility)v)) == 0) {
            *visibility_p = (enum nep_visibility)v;
            return true;
        }
    }
    return false;
}

enum nep_status nep_visibility_choose(const struct nep_visibility_facts *facts, const char *wish,
                                      enum nep_visibility *visibility_p, char *why, size_t cap)
{
    const char *reason = NULL;
    enum nep_visibility chosen = choose(facts, &reason);
    enum nep_visibility wanted = chosen;
    bool is_auto = strcmp(wish, "auto") == 0;
    if (!is_auto && !find(wish, &wanted)) {
        return nep_fail(NEP_ERR_INVALID,
                        "NEP_CUDA_VISIBILITY is \"%s\"; use auto, ordered, flush or staged", wish);
    }
    bool can_land = facts->reaches_device && facts->gpudirect;
    bool can_flush = (facts->flush_options & FLUSH_BY_HOST) != 0;
    if ((wanted != NEP_VISIBILITY_STAGED && !can_land) ||
        (wanted == NEP_VISIBILITY_FLUSH && !can_flush)) {
        return nep_fail(NEP_ERR_UNSUPPORTED,
                        "NEP_CUDA_VISIBILITY=%s, but %s (GPUDirect RDMA %d, flush options %d); use "
                        "auto or staged",
                        wish, can_land ? "the host cannot flush" : reason, facts->gpudirect,
                        facts->flush_options);
    }
    *visibility_p = wanted;
    snprintf(why, cap,
             "%s: %s (GPUDirect RDMA %d, writes ordering %d, flush options %d, %u GPUs read)",
             nep_visibility_name(wanted),
             is_auto ? reason
             : wanted == NEP_VISIBILITY_ORDERED && !is_ordered(facts)
                 ? "asked for, although the device does not promise it"
                 : "asked for",
             facts->gpudirect, facts->writes_ordering, facts->flush_options, facts->num_devices);
    return NEP_OK;
}
