/* SPDX-License-Identifier: Apache-2.0 */
/* A group of ranks as threads that meet at a rendezvous of their own, for tests. */
#ifndef NEP_TESTS_UNIT_TRANSPORT_GROUP_H
#define NEP_TESTS_UNIT_TRANSPORT_GROUP_H

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "tests/unit/cmocka_all.h"
#include "transport/bootstrap.h"
#include "transport/rendezvous.h"

enum { GROUP_MOST = 16 };

struct group_rank {
    pthread_t thread;
    uint32_t rank;
    struct group_run *run;
    struct nep_bootstrap bootstrap;
    struct nep_rendezvous_client *client; /* closed by the body only if it sets this to NULL */
    enum nep_status open_status;
    enum nep_status status; /* what the body returned */
    char message[1024];
};

struct group_run {
    uint32_t num_ranks;
    struct nep_rendezvous_params params;
    enum nep_status (*body)(struct group_rank *rank);
    void *arg;
    struct group_rank ranks[GROUP_MOST];
};

static inline void *group_rank_main(void *arg)
{
    struct group_rank *rank = arg;
    struct nep_rendezvous_params params = rank->run->params;
    params.rank = rank->rank;
    rank->open_status = nep_rendezvous_client_open(&params, &rank->client);
    if (rank->open_status == NEP_OK) {
        nep_rendezvous_client_bootstrap(rank->client, &rank->bootstrap);
        rank->status = rank->run->body(rank);
    }
    snprintf(rank->message, sizeof rank->message, "%s", nep_last_message());
    nep_rendezvous_client_close(rank->client);
    return NULL;
}

/* Runs body on num_ranks threads, except those ranks whose bit is set in `absent`. */
static inline void group_run(struct group_run *run, uint32_t num_ranks, uint64_t timeout_ns,
                             enum nep_status (*body)(struct group_rank *), void *arg,
                             uint32_t absent)
{
    struct nep_rendezvous_server *server = NULL;
    memset(run, 0, sizeof *run);
    run->num_ranks = num_ranks;
    run->body = body;
    run->arg = arg;
    run->params = (struct nep_rendezvous_params){.host = "127.0.0.1",
                                                 .num_ranks = num_ranks,
                                                 .secret = "of this test",
                                                 .timeout_ns = timeout_ns};
    assert_int_equal(nep_rendezvous_server_start(&run->params, &server, &run->params.port), NEP_OK);
    for (uint32_t r = 0; r < num_ranks; r++) {
        run->ranks[r] = (struct group_rank){.rank = r, .run = run, .status = NEP_ERR_INTERNAL};
        if (!(absent >> r & 1)) {
            assert_int_equal(
                pthread_create(&run->ranks[r].thread, NULL, group_rank_main, &run->ranks[r]), 0);
        }
    }
    for (uint32_t r = 0; r < num_ranks; r++) {
        if (!(absent >> r & 1)) {
            pthread_join(run->ranks[r].thread, NULL);
        }
    }
    nep_rendezvous_server_stop(server);
}

static inline void assert_says(const char *message, const char *part)
{
    if (strstr(message, part) == NULL) {
        fail_msg("'%s' does not say '%s'", message, part);
    }
}

#endif
