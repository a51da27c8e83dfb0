/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bodies of members, into the hub. The input is a script: one byte says which of eight connections
 * acts and how far the clock moves, two bytes the length of the body that follows. Afterwards every
 * wait must have been answered exactly once, and all memory be free.
 */
#include "base/log.h"
#include "tests/fuzz/fuzz.h"
#include "transport/rendezvous_hub.h"

enum { NUM_CONNS = 8, NUM_RANKS = 3, LEAVE = 0x40, SHORTCUT = 0x80 };

struct conn {
    struct nep_rdv_member *member;
    uint64_t num_requests, num_replies;
};

static void on_reply(void *arg, const struct nep_rdv_message *reply)
{
    struct conn *conn = arg;
    conn->num_replies++;
    PROMISE(reply->op == NEP_RDV_REPLY);
    PROMISE(conn->num_replies <= conn->num_requests);
    PROMISE(reply->status <= 0);
    PROMISE(reply->status == NEP_OK || reply->text_len > 0);
    uint8_t *body = malloc(nep_rdv_message_bytes(reply));
    struct nep_rdv_message back;
    nep_rdv_message_encode(reply, body);
    PROMISE(nep_rdv_message_decode(body, nep_rdv_message_bytes(reply), &back) == NEP_OK);
    PROMISE(back.value_len == reply->value_len && back.status == reply->status);
    free(body);
}

/* Most inputs would die at the join: the shortcut gives a connection a right one. */
static struct nep_rdv_message right_join(uint32_t who)
{
    struct nep_rdv_message join = {.op = NEP_RDV_JOIN,
                                   .rank = who % NUM_RANKS,
                                   .num_ranks = NUM_RANKS,
                                   .version = nep_version(),
                                   .text = "x",
                                   .text_len = 1};
    join.process[0] = (uint8_t)(who % NUM_RANKS);
    return join;
}

static void act(struct nep_rdv_hub *hub, struct conn *conn, const struct nep_rdv_message *message,
                uint64_t now_ns)
{
    conn->num_requests++;
    if (conn->member == NULL) {
        struct nep_rdv_member *member = NULL;
        if (nep_rdv_hub_join(hub, message, conn, now_ns, &member) == NEP_OK) {
            conn->member = member;
        }
    } else if (nep_rdv_hub_request(conn->member, message, now_ns) != NEP_OK) {
        nep_rdv_hub_remove(conn->member, now_ns);
        conn->member = NULL;
    }
    if (conn->member == NULL) {
        conn->num_requests = conn->num_replies; /* a closed connection waits for nothing */
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct conn conns[NUM_CONNS] = {{0}};
    struct nep_rdv_hub *hub;
    uint64_t now_ns = 1000;
    nep_log_open(NEP_LOG_NONE, "");
    PROMISE(nep_rdv_hub_create(NUM_RANKS, on_reply, &hub) == NEP_OK);
    while (len >= 3) {
        uint8_t how = data[0];
        size_t body_len = data[1] | (size_t)data[2] << 8;
        struct conn *conn = &conns[how % NUM_CONNS];
        struct nep_rdv_message message;
        data += 3;
        len -= 3;
        body_len = body_len > len ? len : body_len;
        now_ns += how & 0x20 ? 1000000000ull : 1;
        if (how & LEAVE && conn->member != NULL) {
            nep_rdv_hub_remove(conn->member, now_ns);
            *conn = (struct conn){0};
        } else if (how & SHORTCUT && conn->member == NULL) {
            message = right_join(how % NUM_CONNS);
            act(hub, conn, &message, now_ns);
        } else if (nep_rdv_message_decode(data, body_len, &message) == NEP_OK) {
            PROMISE(nep_rdv_message_bytes(&message) == body_len);
            act(hub, conn, &message, now_ns);
        }
        nep_rdv_hub_expire(hub, now_ns);
        data += body_len;
        len -= body_len;
    }
    PROMISE(nep_rdv_hub_expire(hub, UINT64_MAX) == UINT64_MAX);
    for (int i = 0; i < NUM_CONNS; i++) {
        PROMISE(conns[i].member == NULL || conns[i].num_replies == conns[i].num_requests);
        if (conns[i].member != NULL) {
            nep_rdv_hub_remove(conns[i].member, now_ns);
        }
    }
    nep_rdv_hub_destroy(hub);
    return 0;
}
