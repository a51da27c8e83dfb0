/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who must not get in, and what those who belong notice of it: nothing, or one sentence. Raw
 * connections speak the protocol by the functions of rendezvous_wire.h, one step wrong each.
 */
#include <poll.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>

#include "base/log.h"
#include "tests/unit/transport/group.h"
#include "transport/rendezvous_socket.h"
#include "transport/rendezvous_wire.h"

static const char secret_text[] = "of this test";

struct raw {
    int fd;
    struct nep_rdv_secret secret;
    struct nep_rdv_session session;
};

static void raw_connect(struct raw *raw, uint16_t port)
{
    assert_int_equal(nep_rdv_connect("127.0.0.1", port, nep_deadline_ns(5 * NEP_S), &raw->fd),
                     NEP_OK);
    nep_rdv_secret_init(&raw->secret, secret_text, strlen(secret_text));
    nep_rdv_session_init(&raw->session, &raw->secret, false);
}

static void raw_send(struct raw *raw, const void *bytes, size_t len)
{
    assert_true(send(raw->fd, bytes, len, MSG_NOSIGNAL) == (ssize_t)len);
}

/* Bytes received, less than len when the other side closed. */
static size_t raw_receive(struct raw *raw, void *bytes, size_t len)
{
    size_t have = 0;
    while (have < len) {
        assert_true(nep_rdv_wait(raw->fd, POLLIN, nep_deadline_ns(20 * NEP_S)));
        ssize_t got = recv(raw->fd, (char *)bytes + have, len - have, 0);
        if (got <= 0) {
            break;
        }
        have += (size_t)got;
    }
    return have;
}

static void assert_closed(struct raw *raw)
{
    char byte;
    assert_int_equal(raw_receive(raw, &byte, 1), 0);
    close(raw->fd);
}

static void raw_prove(struct raw *raw, uint8_t proof_out[NEP_RDV_MAC_BYTES])
{
    uint8_t hello[NEP_RDV_HELLO_BYTES], challenge[NEP_RDV_CHALLENGE_BYTES];
    uint8_t proof[NEP_RDV_MAC_BYTES], welcome[NEP_RDV_WELCOME_BYTES];
    nep_rdv_write_hello(&raw->session, hello);
    raw_send(raw, hello, sizeof hello);
    assert_int_equal(raw_receive(raw, challenge, sizeof challenge), sizeof challenge);
    assert_int_equal(nep_rdv_answer_challenge(&raw->session, challenge, proof), NEP_OK);
    raw_send(raw, proof, sizeof proof);
    assert_int_equal(raw_receive(raw, welcome, sizeof welcome), sizeof welcome);
    assert_int_equal(nep_rdv_check_welcome(&raw->session, welcome), NEP_OK);
    if (proof_out != NULL) {
        memcpy(proof_out, proof, sizeof proof);
    }
}

/* Seals and sends; returns the sealed bytes for those who want to send them again. */
static size_t raw_message(struct raw *raw, const struct nep_rdv_message *message, uint8_t *out)
{
    uint8_t body[512];
    size_t len = nep_rdv_message_bytes(message);
    assert_true(len <= sizeof body);
    nep_rdv_message_encode(message, body);
    nep_rdv_seal(&raw->session, body, len, out);
    return NEP_RDV_LENGTH_BYTES + len + NEP_RDV_TAG_BYTES;
}

static size_t raw_reply(struct raw *raw, uint8_t *buffer, size_t cap,
                        struct nep_rdv_message *message)
{
    size_t sealed;
    if (raw_receive(raw, buffer, NEP_RDV_LENGTH_BYTES) != NEP_RDV_LENGTH_BYTES) {
        return 0;
    }
    assert_int_equal(nep_rdv_read_length(buffer, cap - 100, &sealed), NEP_OK);
    assert_int_equal(raw_receive(raw, buffer + 4, sealed), sealed);
    assert_int_equal(nep_rdv_open(&raw->session, buffer, buffer + 4, sealed), NEP_OK);
    assert_int_equal(nep_rdv_message_decode(buffer + 4, sealed - NEP_RDV_TAG_BYTES, message),
                     NEP_OK);
    return sealed;
}

static struct nep_rdv_message join_of(uint32_t rank, uint32_t num_ranks, uint8_t process)
{
    struct nep_rdv_message join = {.op = NEP_RDV_JOIN,
                                   .rank = rank,
                                   .num_ranks = num_ranks,
                                   .version = nep_version(),
                                   .text = "host x\n, process 1",
                                   .text_len = 18};
    memset(join.process, process, sizeof join.process);
    return join;
}

static struct nep_rendezvous_server *serve(uint32_t num_ranks, uint16_t *port_p)
{
    struct nep_rendezvous_server *server = NULL;
    struct nep_rendezvous_params params = {
        .host = "127.0.0.1", .num_ranks = num_ranks, .secret = secret_text};
    assert_int_equal(nep_rendezvous_server_start(&params, &server, port_p), NEP_OK);
    return server;
}

/* Joins and gathers as the only rank: the server is well. */
static void assert_serves(uint16_t port)
{
    struct nep_rendezvous_client *client = NULL;
    struct nep_bootstrap b;
    uint32_t mine = 5, all = 0;
    struct nep_rendezvous_params params = {.host = "127.0.0.1",
                                           .port = port,
                                           .num_ranks = 1,
                                           .secret = secret_text,
                                           .timeout_ns = 10 * NEP_S};
    assert_int_equal(nep_rendezvous_client_open(&params, &client), NEP_OK);
    nep_rendezvous_client_bootstrap(client, &b);
    assert_int_equal(b.allgather(b.ctx, &mine, &all, 4, 10 * NEP_S), NEP_OK);
    assert_int_equal(all, 5);
    nep_rendezvous_client_close(client);
}

/* ---- strangers ------------------------------------------------------------------------------ */

static void test_strangers_scan_and_half_open_harm_nobody(void **state)
{
    (void)state;
    uint16_t port;
    struct nep_rendezvous_server *server = serve(1, &port);
    struct raw open[200];
    for (int i = 0; i < 300; i++) { /* a scan */
        struct raw raw;
        raw_connect(&raw, port);
        close(raw.fd);
    }
    for (int i = 0; i < 200; i++) { /* more half-open ones than there are places */
        raw_connect(&open[i], port);
        if (i % 2 == 1) {
            send(open[i].fd, "nearep", 6, MSG_NOSIGNAL); /* part of a hello, or pushed out */
        }
    }
    assert_serves(port);
    for (int i = 0; i < 200; i++) {
        close(open[i].fd);
    }
    assert_serves(port);
    nep_rendezvous_server_stop(server);
}

static void test_strangers_silent_one_is_dropped_in_time(void **state)
{
    (void)state;
    uint16_t port;
    struct nep_rendezvous_server *server = serve(1, &port);
    struct raw raw;
    raw_connect(&raw, port);
    assert_closed(&raw); /* within raw_receive's 20 s; the server's limit is 5 s */
    nep_rendezvous_server_stop(server);
}

static void test_strangers_garbage_is_closed_without_an_answer(void **state)
{
    (void)state;
    uint16_t port;
    struct nep_rendezvous_server *server = serve(1, &port);
    uint64_t seed = nep_now_ns();
    print_message("seed %llu\n", (unsigned long long)seed);
    for (int i = 0; i < 50; i++) {
        uint8_t bytes[NEP_RDV_HELLO_BYTES];
        struct raw raw;
        raw_connect(&raw, port);
        for (size_t k = 0; k < sizeof bytes; k++) {
            seed = seed * 6364136223846793005ull + 1442695040888963407ull;
            bytes[k] = (uint8_t)(seed >> 56);
        }
        raw_send(&raw, bytes, sizeof bytes);
        assert_closed(&raw);
    }
    struct raw http;
    raw_connect(&http, port);
    raw_send(&http, "GET / HTTP/1.1\r\nHost: a.host.to.be.named.here\r\n\r\n", 50);
    assert_closed(&http);
    assert_serves(port);
    nep_rendezvous_server_stop(server);
}

static void test_strangers_other_protocol_is_told(void **state)
{
    (void)state;
    uint16_t port;
    struct nep_rendezvous_server *server = serve(1, &port);
    struct raw raw;
    uint8_t hello[NEP_RDV_HELLO_BYTES], challenge[NEP_RDV_CHALLENGE_BYTES], proof[32];
    raw_connect(&raw, port);
    nep_rdv_write_hello(&raw.session, hello);
    hello[8] = 99;
    raw_send(&raw, hello, sizeof hello);
    assert_int_equal(raw_receive(&raw, challenge, sizeof challenge), sizeof challenge);
    assert_int_equal(challenge[12], NEP_RDV_WRONG_PROTOCOL);
    assert_int_equal(nep_rdv_answer_challenge(&raw.session, challenge, proof), NEP_ERR_MISMATCH);
    assert_closed(&raw);
    nep_rendezvous_server_stop(server);
}

static void test_strangers_wrong_secret_is_refused_at_once(void **state)
{
    (void)state;
    uint16_t port;
    struct nep_rendezvous_server *server = serve(1, &port);
    const char *const secrets[] = {"of this tesT", "", "of this test "};
    for (int i = 0; i < 3; i++) {
        struct nep_rendezvous_client *client = NULL;
        struct nep_rendezvous_params params = {.host = "127.0.0.1",
                                               .port = port,
                                               .num_ranks = 1,
                                               .secret = secrets[i],
                                               .timeout_ns = 600 * NEP_S};
        assert_int_equal(nep_rendezvous_client_open(&params, &client), NEP_ERR_MISMATCH);
        assert_says(nep_last_message(), "another secret");
        assert_null(client);
    }
    assert_serves(port);
    nep_rendezvous_server_stop(server);
}

static void test_strangers_recorded_proof_does_not_open_again(void **state)
{
    (void)state;
    uint16_t port;
    struct nep_rendezvous_server *server = serve(1, &port);
    struct raw first, second;
    uint8_t proof[NEP_RDV_MAC_BYTES], challenge[NEP_RDV_CHALLENGE_BYTES];
    uint8_t welcome[NEP_RDV_WELCOME_BYTES];
    raw_connect(&first, port);
    raw_prove(&first, proof);
    /* The same hello and proof on a new connection: the server's nonce is another. */
    raw_connect(&second, port);
    raw_send(&second, first.session.hello, sizeof first.session.hello);
    assert_int_equal(raw_receive(&second, challenge, sizeof challenge), sizeof challenge);
    raw_send(&second, proof, sizeof proof);
    assert_int_equal(raw_receive(&second, welcome, sizeof welcome), sizeof welcome);
    assert_int_equal(welcome[0], NEP_RDV_WRONG_SECRET);
    assert_closed(&second);
    close(first.fd);
    nep_rendezvous_server_stop(server);
}

/* A server that does not know the secret cannot make a rank believe it. */
static void *false_server(void *arg)
{
    int *listen_fd = arg;
    uint8_t hello[NEP_RDV_HELLO_BYTES], proof[NEP_RDV_MAC_BYTES];
    uint8_t challenge[NEP_RDV_CHALLENGE_BYTES], welcome[NEP_RDV_WELCOME_BYTES] = {0};
    struct raw raw;
    size_t len;
    nep_rdv_wait(*listen_fd, POLLIN, nep_deadline_ns(10 * NEP_S));
    raw.fd = accept(*listen_fd, NULL, NULL);
    nep_rdv_secret_init(&raw.secret, "a guess", 7);
    nep_rdv_session_init(&raw.session, &raw.secret, true);
    raw_receive(&raw, hello, sizeof hello);
    nep_rdv_answer_hello(&raw.session, hello, challenge, &len);
    raw_send(&raw, challenge, sizeof challenge);
    raw_receive(&raw, proof, sizeof proof);
    raw_send(&raw, welcome, sizeof welcome); /* "accepted", and a MAC of zeros */
    close(raw.fd);
    return NULL;
}

static void test_strangers_false_server_is_not_believed(void **state)
{
    (void)state;
    int listen_fd;
    pthread_t thread;
    struct nep_rendezvous_client *client = NULL;
    struct nep_rendezvous_params params = {
        .host = "127.0.0.1", .num_ranks = 1, .secret = secret_text, .timeout_ns = 10 * NEP_S};
    assert_int_equal(nep_rdv_listen("127.0.0.1", 0, &listen_fd, &params.port), NEP_OK);
    assert_int_equal(pthread_create(&thread, NULL, false_server, &listen_fd), 0);
    assert_int_equal(nep_rendezvous_client_open(&params, &client), NEP_ERR_MISMATCH);
    pthread_join(thread, NULL);
    close(listen_fd);
}

/* ---- members that break the protocol --------------------------------------------------------- */

static void test_members_bad_frames_end_their_connection_only(void **state)
{
    (void)state;
    uint16_t port;
    struct nep_rendezvous_server *server = serve(1, &port);
    for (int wrong = 0; wrong < 7; wrong++) {
        struct raw raw;
        uint8_t out[1024], in[1024];
        struct nep_rdv_message join = join_of(0, 1, 7), reply;
        struct nep_rdv_message put = {.op = NEP_RDV_PUT,
                                      .id = 9,
                                      .key = "k",
                                      .key_len = 1,
                                      .value = (const uint8_t *)"v",
                                      .value_len = 1};
        raw_connect(&raw, port);
        raw_prove(&raw, NULL);
        size_t len = raw_message(&raw, &join, out);
        raw_send(&raw, out, len);
        assert_true(raw_reply(&raw, in, sizeof in, &reply) != 0);
        assert_int_equal(reply.status, NEP_OK);
        put.op = wrong == 4 ? 77 : wrong == 5 ? NEP_RDV_JOIN : NEP_RDV_PUT;
        put.key_len = wrong == 6 ? 0 : wrong == 5 ? 0 : 1;
        len = raw_message(&raw, &put, out);
        if (wrong == 0) {
            out[len - 1] ^= 1; /* damaged */
        } else if (wrong == 1) {
            memset(out, 0xff, 4); /* four gigabytes to come */
        } else if (wrong == 2) {
            memset(out, 0, 4);
        } else if (wrong == 3) {
            raw_send(&raw, out, len); /* fine once */
            assert_true(raw_reply(&raw, in, sizeof in, &reply) != 0);
            assert_int_equal(reply.id, 9);
        }
        raw_send(&raw, out, len); /* in case 3 a repetition */
        assert_closed(&raw);
        assert_serves(port);
    }
    nep_rendezvous_server_stop(server);
}

/* ---- those who belong, but wrongly ----------------------------------------------------------- */

struct waiting {
    pthread_t thread;
    struct nep_rendezvous_client *client;
    enum nep_status status;
    char message[1024];
};

static void *waiting_main(void *arg)
{
    struct waiting *waiting = arg;
    struct nep_bootstrap b;
    uint32_t mine = 0, all[GROUP_MOST];
    nep_rendezvous_client_bootstrap(waiting->client, &b);
    waiting->status = b.allgather(b.ctx, &mine, all, 4, 60 * NEP_S);
    snprintf(waiting->message, sizeof waiting->message, "%s", nep_last_message());
    nep_rendezvous_client_close(waiting->client);
    return NULL;
}

static void test_members_wrong_size_version_and_rank_are_named_on_both_sides(void **state)
{
    (void)state;
    const struct {
        uint32_t rank, num_ranks, version_add;
        const char *says;
    } cases[] = {
        {1, 3, 0,
         "rank 1 (host x?, process 1) says that there are 3 ranks, the rendezvous was "
         "started for 2"},
        {1, 2, 100, "runs nearep"},
        {2, 2, 0, "says that it is rank 2 of 2"},
        {0, 2, 0, "two processes say that they are rank 0: host "},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint16_t port;
        struct nep_rendezvous_server *server = serve(2, &port);
        struct waiting waiting = {.status = NEP_OK};
        struct nep_rendezvous_params params = {.host = "127.0.0.1",
                                               .port = port,
                                               .num_ranks = 2,
                                               .secret = secret_text,
                                               .timeout_ns = 60 * NEP_S};
        assert_int_equal(nep_rendezvous_client_open(&params, &waiting.client), NEP_OK);
        assert_int_equal(pthread_create(&waiting.thread, NULL, waiting_main, &waiting), 0);
        struct raw raw;
        uint8_t out[1024], in[2048];
        struct nep_rdv_message join = join_of(cases[i].rank, cases[i].num_ranks, 7), reply;
        join.version += cases[i].version_add;
        raw_connect(&raw, port);
        raw_prove(&raw, NULL);
        raw_send(&raw, out, raw_message(&raw, &join, out));
        assert_true(raw_reply(&raw, in, sizeof in, &reply) != 0);
        assert_int_equal(reply.status, NEP_ERR_MISMATCH);
        char sentence[1024];
        snprintf(sentence, sizeof sentence, "%.*s", (int)reply.text_len, reply.text);
        assert_says(sentence, cases[i].says);
        assert_closed(&raw);
        pthread_join(waiting.thread, NULL); /* long before its 60 s */
        assert_int_equal(waiting.status, NEP_ERR_MISMATCH);
        assert_says(waiting.message, cases[i].says);
        nep_rendezvous_server_stop(server);
    }
}

/* The last process of an earlier job still holds its seat in a group that was complete. */
static void test_members_seat_of_an_ended_job_is_waited_for(void **state)
{
    (void)state;
    uint16_t port;
    struct nep_rendezvous_server *server = serve(1, &port);
    struct raw old, late;
    uint8_t out[1024], in[2048];
    struct nep_rdv_message join = join_of(0, 1, 7), reply;
    raw_connect(&old, port);
    raw_prove(&old, NULL);
    raw_send(&old, out, raw_message(&old, &join, out));
    assert_true(raw_reply(&old, in, sizeof in, &reply) != 0);
    assert_int_equal(reply.status, NEP_OK);
    join = join_of(0, 1, 8);
    raw_connect(&late, port);
    raw_prove(&late, NULL);
    raw_send(&late, out, raw_message(&late, &join, out));
    assert_true(raw_reply(&late, in, sizeof in, &reply) != 0);
    assert_int_equal(reply.status, NEP_ERR_BUSY);
    assert_closed(&late);
    struct nep_rendezvous_client *client = NULL;
    struct nep_rendezvous_params params = {.host = "127.0.0.1",
                                           .port = port,
                                           .num_ranks = 1,
                                           .secret = secret_text,
                                           .timeout_ns = 500 * NEP_MS};
    assert_int_equal(nep_rendezvous_client_open(&params, &client), NEP_ERR_TIMEOUT);
    assert_says(nep_last_message(), "two processes say that they are rank 0");
    close(old.fd);
    assert_serves(port);
    nep_rendezvous_server_stop(server);
}

/* ---- a server without descriptors ------------------------------------------------------------ */

static void test_members_beyond_the_file_limit_wait_and_the_cause_is_named(void **state)
{
    (void)state;
    enum { NUM = 4 };
    uint16_t port;
    uint64_t warnings = nep_log_num_warnings();
    struct nep_rendezvous_server *server = serve(NUM, &port);
    struct nep_rendezvous_client *client = NULL;
    struct rlimit before, few;
    struct raw raw[2];
    /* This process holds both ends: after these, one more descriptor is free, and no second. */
    raw_connect(&raw[0], port);
    raw_prove(&raw[0], NULL);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &before), 0);
    int next = dup(0);
    close(next);
    few = before;
    few.rlim_cur = (rlim_t)next + 1;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
    raw_connect(&raw[1], port); /* takes the last one: the server cannot accept it */
    uint64_t deadline = nep_deadline_ns(10 * NEP_S);
    while (nep_log_num_warnings() == warnings && nep_left_ns(deadline) != 0) {
        usleep(1000);
    }
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &before), 0);
    assert_true(nep_log_num_warnings() > warnings);
    raw_prove(&raw[1], NULL); /* it was not lost, only late */
    close(raw[0].fd);
    close(raw[1].fd);
    struct nep_rendezvous_params params = {.host = "127.0.0.1",
                                           .port = port,
                                           .num_ranks = NUM,
                                           .secret = secret_text,
                                           .timeout_ns = 10 * NEP_S};
    struct nep_bootstrap b;
    uint32_t all[NUM];
    assert_int_equal(nep_rendezvous_client_open(&params, &client), NEP_OK);
    nep_rendezvous_client_bootstrap(client, &b);
    assert_int_equal(b.allgather(b.ctx, &params.rank, all, 4, 2 * NEP_S), NEP_ERR_TIMEOUT);
    assert_says(nep_last_message(), "ulimit -n");
    nep_rendezvous_client_close(client);
    nep_rendezvous_server_stop(server);
}

/* ---- processes that are killed --------------------------------------------------------------- */

static pid_t fork_rank(uint16_t port, uint32_t rank, uint32_t num_ranks, int result_fd, bool hangs)
{
    pid_t pid = fork();
    if (pid != 0) {
        return pid;
    }
    struct nep_rendezvous_client *client = NULL;
    struct nep_bootstrap b;
    uint32_t all[GROUP_MOST];
    char line[1100];
    struct nep_rendezvous_params params = {.host = "127.0.0.1",
                                           .port = port,
                                           .rank = rank,
                                           .num_ranks = num_ranks,
                                           .secret = secret_text,
                                           .timeout_ns = 30 * NEP_S};
    enum nep_status status = nep_rendezvous_client_open(&params, &client);
    if (status == NEP_OK) {
        nep_rendezvous_client_bootstrap(client, &b);
        status = b.allgather(b.ctx, &rank, all, 4, 30 * NEP_S);
        if (hangs) {
            pause(); /* until the parent's SIGKILL */
        }
        status = status != NEP_OK ? status : b.allgather(b.ctx, &rank, all, 4, 30 * NEP_S);
    }
    int len = snprintf(line, sizeof line, "%d %s\n", status, nep_last_message());
    ssize_t written = write(result_fd, line, (size_t)len);
    (void)written;
    _exit(0);
}

static void test_members_killed_process_is_named_at_once(void **state)
{
    (void)state;
    enum { NUM = 5, VICTIM = 3 };
    uint16_t port;
    int fds[2];
    pid_t pids[NUM];
    /* The server in a process of its own: children must not inherit its thread's sockets. */
    int port_fds[2];
    assert_int_equal(pipe(fds), 0);
    assert_int_equal(pipe(port_fds), 0);
    pid_t host = fork();
    if (host == 0) {
        serve(NUM, &port);
        ssize_t written = write(port_fds[1], &port, sizeof port);
        (void)written;
        pause();
    }
    assert_int_equal(read(port_fds[0], &port, sizeof port), sizeof port);
    for (uint32_t r = 0; r < NUM; r++) {
        pids[r] = fork_rank(port, r, NUM, fds[1], r == VICTIM);
    }
    usleep(300000);
    uint64_t start = nep_now_ns();
    kill(pids[VICTIM], SIGKILL);
    for (uint32_t r = 0; r < NUM; r++) {
        waitpid(pids[r], NULL, 0);
    }
    assert_true(nep_now_ns() - start < 20 * NEP_S);
    kill(host, SIGKILL);
    waitpid(host, NULL, 0);
    close(fds[1]);
    char text[8192] = "", victim[64];
    size_t have = 0;
    ssize_t got;
    while ((got = read(fds[0], text + have, sizeof text - 1 - have)) > 0) {
        have += (size_t)got;
    }
    text[have] = '\0';
    snprintf(victim, sizeof victim, "process %ld) was lost", (long)pids[VICTIM]);
    uint32_t num_lines = 0;
    for (char *line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        num_lines++;
        assert_int_equal(atoi(line), NEP_ERR_PEER_LOST);
        assert_says(line, "rank 3 (host ");
        assert_says(line, victim);
    }
    assert_int_equal(num_lines, NUM - 1);
    close(fds[0]);
    close(port_fds[0]);
    close(port_fds[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_members_killed_process_is_named_at_once),
        cmocka_unit_test(test_strangers_scan_and_half_open_harm_nobody),
        cmocka_unit_test(test_strangers_silent_one_is_dropped_in_time),
        cmocka_unit_test(test_strangers_garbage_is_closed_without_an_answer),
        cmocka_unit_test(test_strangers_other_protocol_is_told),
        cmocka_unit_test(test_strangers_wrong_secret_is_refused_at_once),
        cmocka_unit_test(test_strangers_recorded_proof_does_not_open_again),
        cmocka_unit_test(test_strangers_false_server_is_not_believed),
        cmocka_unit_test(test_members_bad_frames_end_their_connection_only),
        cmocka_unit_test(test_members_seat_of_an_ended_job_is_waited_for),
        cmocka_unit_test(test_members_beyond_the_file_limit_wait_and_the_cause_is_named),
        cmocka_unit_test(test_members_wrong_size_version_and_rank_are_named_on_both_sides),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
