/* SPDX-License-Identifier: Apache-2.0 */
/* The rendezvous and the transports, each started for real. */
#include <string.h>

#include "base/clock.h"
#include "tools/doctor.h"
#include "transport/rendezvous.h"
#include "transport/transport.h"

static void check_meeting(struct doctor *doctor, const char *secret)
{
    struct nep_rendezvous_server *server = NULL;
    struct nep_rendezvous_client *client = NULL;
    struct nep_rendezvous_params params = {
        .host = "127.0.0.1", .num_ranks = 1, .secret = secret, .timeout_ns = 5 * NEP_S};
    enum nep_status status = nep_rendezvous_server_start(&params, &server, &params.port);
    if (status == NEP_OK) {
        status = nep_rendezvous_client_open(&params, &client);
    }
    if (status == NEP_OK) {
        struct nep_bootstrap bootstrap;
        uint64_t mine = 42, all = 0;
        nep_rendezvous_client_bootstrap(client, &bootstrap);
        status = bootstrap.allgather(bootstrap.ctx, &mine, &all, sizeof mine, 5 * NEP_S);
    }
    if (status != NEP_OK) {
        doctor_say(doctor, DOCTOR_BAD, "rendezvous",
                   "allow TCP over the loopback interface, or give nep_comm_create a bootstrap",
                   "a rank of this machine cannot meet another: %s", nep_last_message());
    } else {
        doctor_say(doctor, DOCTOR_FINE, "rendezvous", "", "served, joined and used on 127.0.0.1");
    }
    nep_rendezvous_client_close(client);
    nep_rendezvous_server_stop(server);
}

void doctor_check_rendezvous(struct doctor *doctor)
{
    char secret[NEP_RENDEZVOUS_SECRET_BYTES];
    if (nep_rendezvous_secret_read(doctor_config(doctor), secret) != NEP_OK) {
        doctor_say(doctor, DOCTOR_BAD, "secret", "correct it, or unset both for none", "%s",
                   nep_last_message());
        return;
    }
    if (secret[0] == '\0') {
        doctor_say(doctor, DOCTOR_NOTE, "secret",
                   "between hosts set NEP_SECRET_FILE to a file of random text, rights 600",
                   "none: who reaches the rendezvous' port can join");
    } else {
        doctor_say(doctor, DOCTOR_FINE, "secret", "", "set");
    }
    check_meeting(doctor, secret);
}

static bool is_asked_for(const struct nep_config *config, const char *name)
{
    size_t len = strlen(name);
    return strcmp(config->intra, name) == 0 ||
           (strncmp(config->inter, name, len) == 0 &&
            (config->inter[len] == '\0' || config->inter[len] == ':'));
}

void doctor_check_transports(struct doctor *doctor)
{
    const struct nep_config *config = doctor_config(doctor);
    for (size_t i = 0; nep_transport_list[i] != NULL; i++) {
        const struct nep_transport_ops *ops = nep_transport_list[i];
        char subject[32];
        snprintf(subject, sizeof subject, "%.20s", ops->name);
        if (ops->probe(config) == NEP_OK) {
            doctor_say(doctor, DOCTOR_FINE, subject, "", "works");
        } else if (is_asked_for(config, ops->name)) {
            doctor_say(doctor, DOCTOR_BAD, subject, "set NEP_INTRA and NEP_INTER to auto",
                       "asked for, and does not work: %s", nep_last_message());
        } else {
            doctor_say(doctor, DOCTOR_NOTE, subject, "", "%s", nep_last_message());
        }
    }
}
