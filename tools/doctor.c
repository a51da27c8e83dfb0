/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/doctor.h"

#include <stdarg.h>

#include "tools/nep_info.h"

struct doctor {
    struct info *info;
    uint32_t num_bad;
};

static const doctor_fn checks[] = {
    doctor_check_machine,    doctor_check_memory, doctor_check_rendezvous,
    doctor_check_transports, doctor_check_verbs,  doctor_check_peers,
};

const struct nep_config *doctor_config(const struct doctor *doctor)
{
    return &doctor->info->config;
}

void doctor_say(struct doctor *doctor, enum doctor_verdict verdict, const char *subject,
                const char *advice, const char *finding, ...)
{
    static const char *const words[] = {"ok", "note", "BAD"};
    struct info *info = doctor->info;
    char text[1200];
    va_list args;
    va_start(args, finding);
    vsnprintf(text, sizeof text, finding, args);
    va_end(args);
    fprintf(info->out, "%-5s %-16s %s\n", words[verdict], subject, text);
    if (advice[0] != '\0') {
        fprintf(info->out, "%-5s %-16s -> %s\n", "", "", advice);
    }
    json_open(&info->json, NULL, '{');
    json_text(&info->json, "verdict", words[verdict]);
    json_text(&info->json, "subject", subject);
    json_text(&info->json, "finding", text);
    json_text(&info->json, "advice", advice);
    json_close(&info->json, '}');
    doctor->num_bad += verdict == DOCTOR_BAD;
}

int info_check(struct info *info)
{
    struct doctor doctor = {.info = info};
    json_open(&info->json, "check", '[');
    for (size_t i = 0; i < sizeof checks / sizeof checks[0]; i++) {
        checks[i](&doctor);
    }
    json_close(&info->json, ']');
    fprintf(info->out, doctor.num_bad == 0 ? "nothing is broken here\n" : "%u broken\n",
            doctor.num_bad);
    return doctor.num_bad == 0 ? INFO_FINE : INFO_FAILED;
}
