/* SPDX-License-Identifier: Apache-2.0 */
/*
 * nep-info --check. A check tries a thing for real and says what it found; where it fails, what to
 * do. Add one: a file doctor_<subject>.c with a nep_doctor_fn, declared here and named in the list
 * of doctor.c.
 */
#ifndef NEP_TOOLS_DOCTOR_H
#define NEP_TOOLS_DOCTOR_H

#include "base/config.h"

enum doctor_verdict {
    DOCTOR_FINE, /* works */
    DOCTOR_NOTE, /* absent or less than best: nearep works without it */
    DOCTOR_BAD   /* something that was asked for, or that nearep needs, does not work: status 1 */
};

struct doctor;

const struct nep_config *doctor_config(const struct doctor *doctor);
/* subject: one word or two. finding: one line. advice: what to do, "" when nothing is to be done.
 */
void doctor_say(struct doctor *doctor, enum doctor_verdict verdict, const char *subject,
                const char *advice, const char *finding, ...) __attribute__((format(printf, 5, 6)));

typedef void (*doctor_fn)(struct doctor *doctor);

void doctor_check_machine(struct doctor *doctor);
void doctor_check_memory(struct doctor *doctor);
void doctor_check_rendezvous(struct doctor *doctor);
void doctor_check_transports(struct doctor *doctor);
void doctor_check_verbs(struct doctor *doctor);
void doctor_check_peers(struct doctor *doctor); /* collective under a launcher */

#endif
