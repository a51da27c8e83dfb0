/* SPDX-License-Identifier: Apache-2.0 */
/* The rendezvous' store over a wire on which an answer takes longer than a caller looks at a key.
 */
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include "tests/unit/transport/group.h"
#include "transport/rendezvous_client.h"
#include "transport/rendezvous_socket.h"

enum { WAY_MS = 25 };

/* Between one client and the server: what comes is passed on WAY_MS later. */
struct relay {
    pthread_t thread;
    int listener;
    uint16_t port; /* where it listens */
    uint16_t server_port;
    enum nep_status status;
};

static bool pass_on(int from, int to)
{
    char bytes[4096];
    ssize_t got = recv(from, bytes, sizeof bytes, 0);
    if (got <= 0) {
        return false;
    }
    usleep(WAY_MS * 1000);
    for (ssize_t sent = 0; sent < got;) {
        ssize_t put = send(to, bytes + sent, (size_t)(got - sent), MSG_NOSIGNAL);
        if (put > 0) {
            sent += put;
        } else if (!nep_rdv_wait(to, POLLOUT, nep_deadline_ns(20 * NEP_S))) {
            return false;
        }
    }
    return true;
}

static void *relay_main(void *arg)
{
    struct relay *relay = arg;
    int server = -1, client = accept(relay->listener, NULL, NULL);
    relay->status =
        nep_rdv_connect("127.0.0.1", relay->server_port, nep_deadline_ns(20 * NEP_S), &server);
    bool is_up = client >= 0 && relay->status == NEP_OK;
    while (is_up) {
        struct pollfd fds[] = {{.fd = client, .events = POLLIN}, {.fd = server, .events = POLLIN}};
        is_up = poll(fds, 2, 60000) > 0;
        for (int i = 0; is_up && i < 2; i++) {
            is_up = fds[i].revents == 0 || pass_on(fds[i].fd, fds[1 - i].fd);
        }
    }
    close(client);
    close(server);
    return NULL;
}

static void relay_start(struct relay *relay, uint16_t server_port)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof at;
    relay->server_port = server_port;
    relay->listener = socket(AF_INET, SOCK_STREAM, 0);
    assert_true(relay->listener >= 0);
    assert_int_equal(bind(relay->listener, (struct sockaddr *)&at, sizeof at), 0);
    assert_int_equal(listen(relay->listener, 1), 0);
    assert_int_equal(getsockname(relay->listener, (struct sockaddr *)&at, &len), 0);
    relay->port = ntohs(at.sin_port);
    assert_int_equal(pthread_create(&relay->thread, NULL, relay_main, relay), 0);
}

struct fixture {
    struct nep_rendezvous_params params;
    struct nep_rendezvous_server *server;
    struct nep_rendezvous_client *near, *far;
    struct nep_bootstrap near_store, far_store;
    struct relay relay;
};

/* One client at the server, one behind the relay. */
static void set_up(struct fixture *f)
{
    memset(f, 0, sizeof *f);
    f->params = (struct nep_rendezvous_params){
        .host = "127.0.0.1", .num_ranks = 2, .secret = "of this test", .timeout_ns = 20 * NEP_S};
    assert_int_equal(nep_rendezvous_server_start(&f->params, &f->server, &f->params.port), NEP_OK);
    relay_start(&f->relay, f->params.port);
    assert_int_equal(nep_rendezvous_client_open(&f->params, &f->near), NEP_OK);
    f->params.rank = 1;
    f->params.port = f->relay.port;
    assert_int_equal(nep_rendezvous_client_open(&f->params, &f->far), NEP_OK);
    nep_rendezvous_client_bootstrap(f->near, &f->near_store);
    nep_rendezvous_client_bootstrap(f->far, &f->far_store);
}

static void tear_down(struct fixture *f)
{
    nep_rendezvous_client_close(f->near);
    nep_rendezvous_client_close(f->far);
    pthread_join(f->relay.thread, NULL);
    close(f->relay.listener);
    nep_rendezvous_server_stop(f->server);
    assert_int_equal(f->relay.status, NEP_OK);
}

/* Looks of a millisecond each, until the key is seen: so many at most. */
static uint32_t look(const struct nep_bootstrap *store, const char *key, uint32_t most)
{
    for (uint32_t i = 0; i < most; i++) {
        char value[8];
        size_t len = 0;
        if (store->get(store->ctx, key, value, sizeof value, &len, NEP_MS) == NEP_OK) {
            assert_int_equal(len, 5);
            assert_memory_equal(value, "hello", 5);
            return i;
        }
    }
    return most;
}

static void test_rendezvous_short_looks_find_a_key_over_a_slow_wire(void **state)
{
    (void)state;
    struct fixture f;
    set_up(&f);
    assert_int_equal(f.near_store.put(f.near_store.ctx, "key", "hello", 5, 20 * NEP_S), NEP_OK);
    /* Each look that gets no answer lasts twice as long as the one before, up to a second. */
    assert_in_range(look(&f.far_store, "key", 14), 0, 13);
    tear_down(&f);
}

static void test_rendezvous_short_looks_at_no_key_end(void **state)
{
    (void)state;
    struct fixture f;
    char value[8];
    size_t len = 0;
    set_up(&f);
    assert_int_equal(f.far_store.put(f.far_store.ctx, "other", "", 0, 20 * NEP_S), NEP_OK);
    for (uint32_t i = 0; i < 5; i++) {
        assert_int_equal(f.far_store.get(f.far_store.ctx, "key", value, 8, &len, NEP_MS),
                         NEP_ERR_TIMEOUT);
    }
    /* What was given up before, and is answered late, is not taken for what was asked later. */
    assert_int_equal(f.near_store.put(f.near_store.ctx, "key", "hello", 5, 20 * NEP_S), NEP_OK);
    assert_in_range(look(&f.far_store, "key", 14), 0, 13);
    tear_down(&f);
}

/* Who is missing in a gather is the server's to say, and it may get no core just when it must. */
static void test_rendezvous_answer_of_a_gather_may_be_late(void **state)
{
    (void)state;
    static const struct {
        enum nep_rdv_op op;
        uint64_t timeout_ns, learnt_ns, waits_ns;
    } cases[] = {
        {NEP_RDV_GATHER, 4 * NEP_S, 0, 5 * NEP_S},
        {NEP_RDV_GATHER, 100 * NEP_S, 0, 102 * NEP_S},
        {NEP_RDV_GATHER, UINT64_MAX, 0, UINT64_MAX},
        {NEP_RDV_GET, 4 * NEP_S, 0, 4 * NEP_S},
        {NEP_RDV_GET, 4 * NEP_MS, 50 * NEP_MS, 53 * NEP_MS},
        {NEP_RDV_PUT, 4 * NEP_MS, 50 * NEP_MS, 4 * NEP_MS},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct nep_rdv_message request = {.op = cases[i].op, .timeout_ns = cases[i].timeout_ns};
        assert_int_equal(nep_rdv_answer_ns(&request, cases[i].learnt_ns), cases[i].waits_ns);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rendezvous_short_looks_find_a_key_over_a_slow_wire),
        cmocka_unit_test(test_rendezvous_short_looks_at_no_key_end),
        cmocka_unit_test(test_rendezvous_answer_of_a_gather_may_be_late),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
